"""Chapter 12, MAM and UniPELT."""

import torch


def running(g, total, count):
    sums = total + g.cumsum(0)
    return sums / (count + torch.arange(1, len(g) + 1)), sums[-1]


def whole_row(g, total, count):
    mean = (total + g.sum()) / (count + len(g))
    return mean.expand(len(g)), total + g.sum()


def mean_remembered(g, total, count):
    G = running(g, total, count)[0]
    return G, G[-1]


def past_forgotten(g, total, count):
    return running(g, 0.0, 0)[0], total + g.sum()


def beside(f, x, W_1, b_1, W_2, b_2, s):
    return f + s * ((x @ W_1.T + b_1).relu() @ W_2.T + b_2)


def behind(f, x, W_1, b_1, W_2, b_2, s):
    return f + s * ((f @ W_1.T + b_1).relu() @ W_2.T + b_2)


def bias_not_scaled(f, x, W_1, b_1, W_2, b_2, s):
    return f + s * ((x @ W_1.T + b_1).relu() @ W_2.T) + b_2


def residual_forgotten(f, x, W_1, b_1, W_2, b_2, s):
    return beside(f, x, W_1, b_1, W_2, b_2, s) - f


def width(budget, p, D):
    return (budget - 2 * p * D - D) // (2 * D + 1)


REFERENCE = {"12.1": running, "12.2": beside, "12.3": width}
WRONG = {
    "12.1": [whole_row, mean_remembered, past_forgotten],
    "12.2": [behind, bias_not_scaled, residual_forgotten],
    "12.3": [
        lambda budget, p, D: (budget - 2 * p * D) // (2 * D),
        lambda budget, p, D: (budget - p * D - D) // (2 * D + 1),
    ],
}
