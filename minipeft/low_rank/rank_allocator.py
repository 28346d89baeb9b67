r"""AdaLoRA's allocator: which triplets stay (Zhang et al., 2023, arXiv 2303.10512, section 3.2).

After every step each triplet of every matrix gets a score from the weights and their gradients;
the best of all stay, as many as the budget allows.

    (Allocator 1)   I = |w * dL/dw|                  sensitivity of every single weight w
    (Allocator 2)   M <- b1 M + (1 - b1) I           smoothed sensitivity
    (Allocator 3)   U <- b2 U + (1 - b2) |I - M|     its uncertainty, with the new M
    (Allocator 4)   S_i = MU(E_i) + mean_o MU(P_oi) + mean_j MU(Q_ij)      importance of triplet i
    (Allocator 5)   b(t) = b_0 for t <= t_i;  b_T for t >= T - t_f;  between them
                    b(t) = floor(b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3)
    (Allocator 6)   E_i <- 0 for all triplets but the b(t) most important ones of all matrices

b_0 and b_T are init_rank and target_rank times the number of matrices, T the training steps, P in
R^(out x r), E in R^r and Q in R^(r x in) as in adalora.py. A triplet that was switched off still
has gradients (its P and Q are there), so it can come back until step T - t_f.

Trained parameters: none. Initialisation: M and U are 0.

Reduces to: with b_T = b_0 nothing is ever switched off.

How this differs: peft masks by a threshold, loses all ties with it, and fails when nothing is to
be masked; here exactly b(t) triplets stay, of equal ones the earlier. The authors' code goes on
choosing after T - t_f, on frozen scores; peft and this file stop.

Footguns: the uncertainty from the old M; sums for means, which favour large matrices; a budget for
each matrix instead of one for all; masking P and Q along with E too early, which ends their
gradients.
"""

from __future__ import annotations

import torch

from minipeft.dispatch import fast_path


def sensitivity(weight, gradient):
    """|w dL/dw|: to first order, how much the loss changes when w is set to 0. (Allocator 1)"""
    return (weight * gradient).abs()


def smooth(M, U, I, beta1, beta2):
    """The new averages of sensitivity and uncertainty. (Allocator 2) (Allocator 3)"""
    M = beta1 * M + (1 - beta1) * I
    return M, beta2 * U + (1 - beta2) * (I - M).abs()


def on_cpu_and_small(tensors):
    """Up to 2,048 numbers a tensor: there calls cost more than bytes. Not measured on a GPU."""
    on_cpu = all(t.device.type == "cpu" for t in tensors)
    return on_cpu and sum(t.numel() for t in tensors) <= 2048 * len(tensors)


@fast_path(
    "minipeft.low_rank.foreach_averages",
    devices=("cpu", "cuda", "mps"),
    capability=(0, 0),
    wins=lambda weights, *rest: on_cpu_and_small(weights),
)
def averages(weights, gradients, Ms, Us, beta1, beta2):
    """The new M and U, two lists of tensors, from lists of equal length. (Allocator 1)"""
    sensitivities = [sensitivity(w, g) for w, g in zip(weights, gradients, strict=True)]
    triples = zip(Ms, Us, sensitivities, strict=True)
    pairs = [smooth(M, U, I, beta1, beta2) for M, U, I in triples]
    return [M for M, _ in pairs], [U for _, U in pairs]


def triplet_scores(P, E, Q):
    """Importance of each triplet, (r,), from the scores M U of P (out, r), E (r,), Q (r, in).
    (Allocator 4)
    """
    return E + P.mean(0) + Q.mean(1)


def budget(step, total_steps, warm, final, first, last):
    """b(t), triplets in all: a cubic slope from `first` to `last` between the steps `warm` and
    total_steps - final. (Allocator 5)
    """
    if step <= warm:
        return first
    if step >= total_steps - final:
        return last
    left = 1 - (step - warm) / (total_steps - warm - final)
    return int(last + (first - last) * left**3)


def allocate(scores, keep):
    """Which triplets stay, {path: (r,) bool}: the `keep` best of all of {path: (r,) scores}, of
    equal ones the earlier. (Allocator 6)
    """
    return show_work(scores, keep)["kept"]


def show_work(scores, keep):
    """`allocate` with every intermediate, by name.

    order: (path, i, score) of all triplets, best first. threshold: the score of the last that
    stays. switched_off: the rest of `order`. kept: {path: (r,) bool}. ranks: {path: how many stay}.
    """
    triplets = [(path, i, s) for path, row in scores.items() for i, s in enumerate(row.tolist())]
    order = sorted(triplets, key=lambda triplet: -triplet[2])  # stable: ties keep their places
    kept = {path: torch.zeros(len(row), dtype=torch.bool) for path, row in scores.items()}
    for path, i, _ in order[:keep]:
        kept[path][i] = True
    return {
        "order": order,
        "threshold": order[keep - 1][2] if keep else float("inf"),
        "switched_off": order[keep:],
        "kept": kept,
        "ranks": {path: int(mask.sum()) for path, mask in kept.items()},
    }


# -- over a model


def groups_of(attachment):
    """{path: layers that share one E and Q}, in order; mostly one layer each."""
    groups = {}
    for swap in attachment.swaps:
        first = next((p for p, g in groups.items() if g[0].E is swap.replacement.E), swap.path)
        groups.setdefault(first, []).append(swap.replacement)
    return groups


def weights_of(path, layers):
    """(name, Parameter) pairs of a group, E and Q once."""
    pairs = [(f"{path}.P{i}", layer.P) for i, layer in enumerate(layers)]
    return [*pairs, (f"{path}.E", layers[0].E), (f"{path}.Q", layers[0].Q)]


def at_least_float32(tensor):
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def scores_after_step(state, groups, beta1, beta2):
    """One step of the averages in `state`, from the gradients that are there. Returns the scores,
    {path: (r,)}. In float32 or better: of halves the products are too small for float16.
    (Allocator 1) to (Allocator 4)
    """
    named = {path: weights_of(path, layers) for path, layers in groups.items()}
    names, weights = zip(*(pair for pairs in named.values() for pair in pairs))
    for name, weight in zip(names, weights):
        if weight.grad is None:
            raise ValueError(
                f"{name} has no gradient for AdaLoRA's allocator; call after_step after the "
                "optimizer's step and before zero_grad"
            )
    gradients = [at_least_float32(w.grad) for w in weights]
    weights = [at_least_float32(w) for w in weights]
    Ms, Us = (
        [state.get(f"{n}.{k}", torch.zeros_like(w)).to(w) for n, w in zip(names, weights)]
        for k in "MU"
    )
    Ms, Us = averages(weights, gradients, Ms, Us, beta1, beta2)
    both = dict(zip(names, zip(Ms, Us)))
    state.update({f"{n}.{k}": t for n, pair in both.items() for k, t in zip("MU", pair)})
    scores = {}
    for path, pairs in named.items():
        parts = [M * U for M, U in (both[name] for name, _ in pairs)]
        scores[path] = triplet_scores(torch.cat(parts[:-2]), *parts[-2:])
    return scores


def switch_off(layers, kept, for_good):
    """Zero the E of the triplets not `kept` (r,) bool; for good also P and Q. (Allocator 6)"""
    gone = ~kept.to(layers[0].E.device)
    layers[0].E[gone] = 0
    if for_good:
        layers[0].Q[gone] = 0
        for layer in layers:
            layer.P[:, gone] = 0
            layer.kept.copy_(~gone)


def ranks(attachment):
    """{path: active rank} of every matrix at the moment: how many of its E are not 0."""
    return {path: int((layers[0].E != 0).sum()) for path, layers in groups_of(attachment).items()}
