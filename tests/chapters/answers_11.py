"""Chapter 11, IA3."""


def fold(W, b, l):
    return l[:, None] * W, l * b


def bias_left_out(W, b, l):
    return l[:, None] * W, b


def one_added(W, b, l):
    return (1 + l[:, None]) * W, (1 + l) * b


def scale_from_the_mean(W, b, l):
    return l.mean() * W, l.mean() * b


def gradient(g, h):
    return (g * h).sum((0, 1))


def mean_gradient(g, h):
    return (g * h).mean((0, 1))


def product_of_sums(g, h):
    return g.sum((0, 1)) * h.sum((0, 1))


def no_sum(g, h):
    return g * h


def count(targets, L, D, d_ff):
    return L * sum(d_ff if t in ("up", "down") else D for t in targets)


def down_at_its_output(targets, L, D, d_ff):
    return L * sum(d_ff if t == "up" else D for t in targets)


def one_block(targets, L, D, d_ff):
    return count(targets, 1, D, d_ff)


REFERENCE = {"11.1": fold, "11.2": gradient, "11.3": count}
WRONG = {
    "11.1": [bias_left_out, one_added, scale_from_the_mean],
    "11.2": [mean_gradient, product_of_sums, no_sum],
    "11.3": [down_at_its_output, one_block],
}
