r"""The faster twin of rank_allocator.py's `averages`: all of AdaLoRA's tensors in one call each.

The definition takes about ten operations for each of three tensors a matrix, every one of them a
launch that moves a few thousand numbers: 72 matrices are 2,000 launches a step. torch's foreach
functions take the whole list at once. The same operations on the same numbers in the same order,
so the same bits.

Bytes that must move: w, g, M and U read, M and U written, 24 a weight. Where a tensor is small the
launches cost more, and this wins; where it is large each pass over the whole list finds nothing
left in the processor's cache, and the definition wins, which finishes one tensor before the next.
"""

from __future__ import annotations

import torch


def averages(weights, gradients, Ms, Us, beta1, beta2):
    """The new M and U, two lists of tensors, from lists of equal length. They are new tensors."""
    sensitivities = torch._foreach_mul(weights, gradients)
    torch._foreach_abs_(sensitivities)
    new_M = moved(Ms, sensitivities, beta1)
    uncertainties = torch._foreach_sub(sensitivities, new_M)
    torch._foreach_abs_(uncertainties)
    return new_M, moved(Us, uncertainties, beta2)


def moved(averages, values, beta):
    """beta times each average and 1 - beta times each value."""
    kept = torch._foreach_mul(averages, beta)
    torch._foreach_add_(kept, torch._foreach_mul(values, 1 - beta))  # two roundings, as defined
    return kept


def examples(device):
    """Odd shapes, one number, a strided matrix."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (3,), (1,), (5, 9)]
    drawn = [[torch.randn(*s, generator=generator).to(device) for s in shapes] for _ in range(4)]
    for tensors in drawn:
        tensors.append(torch.randn(6, 4, generator=generator).to(device).T)
    return [(*drawn, 0.85, 0.8), (*([tensors[1]] for tensors in drawn), 0.0, 1.0)]


EXAMPLES = {"averages": examples}
