"""Chapter 10, AdaLoRA."""


def budget(t, total, warm, final, first, last):
    if t <= warm:
        return first
    if t >= total - final:
        return last
    left = 1 - (t - warm) / (total - warm - final)
    return int(last + (first - last) * left**3)


def linear_budget(t, total, warm, final, first, last):
    if t <= warm:
        return first
    if t >= total - final:
        return last
    return int(last + (first - last) * (1 - (t - warm) / (total - warm - final)))


def budget_without_ends(t, total, warm, final, first, last):
    return int(last + (first - last) * (1 - t / total) ** 3)


def importance(weights, gradients, beta1, beta2):
    M = U = 0.0
    for w, g in zip(weights, gradients):
        M = beta1 * M + (1 - beta1) * abs(w * g)
        U = beta2 * U + (1 - beta2) * abs(abs(w * g) - M)
    return M * U


def uncertainty_from_the_old_mean(weights, gradients, beta1, beta2):
    M = U = 0.0
    for w, g in zip(weights, gradients):
        U = beta2 * U + (1 - beta2) * abs(abs(w * g) - M)
        M = beta1 * M + (1 - beta1) * abs(w * g)
    return M * U


def last_step_alone(weights, gradients, beta1, beta2):
    return importance(weights[-1:], gradients[-1:], beta1, beta2)


def without_size(weights, gradients, beta1, beta2):
    M = U = 0.0
    for w, g in zip(weights, gradients):
        M = beta1 * M + (1 - beta1) * w * g
        U = beta2 * U + (1 - beta2) * abs(w * g - M)
    return M * U


def ranks(scores, keep):
    order = [(s, name) for name, row in scores.items() for s in row]
    order.sort(key=lambda pair: -pair[0])
    best = [name for _, name in order[:keep]]
    return {name: best.count(name) for name in scores}


def a_purse_for_each(scores, keep):
    return {name: keep // len(scores) for name in scores}


def threshold_with_ties(scores, keep):
    values = sorted((s for row in scores.values() for s in row), reverse=True)
    least = values[keep - 1] if keep else float("inf")
    return {name: sum(s >= least for s in row) for name, row in scores.items()}


def worst_stay(scores, keep):
    return ranks({name: [-s for s in row] for name, row in scores.items()}, keep)


REFERENCE = {"10.1": budget, "10.2": importance, "10.3": ranks}
WRONG = {
    "10.1": [linear_budget, budget_without_ends],
    "10.2": [uncertainty_from_the_old_mean, last_step_alone, without_size],
    "10.3": [a_purse_for_each, threshold_with_ties, worst_stay],
}
