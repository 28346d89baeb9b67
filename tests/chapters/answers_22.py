"""Chapter 22, from here to peft."""

import torch


def three(weight):
    return weight.T.chunk(3)


def joined(adapters):
    A = torch.cat([a for a, _ in adapters])
    return A, torch.block_diag(*[b for _, b in adapters])


def blocks_the_wrong_way_round(adapters):
    A, B = joined(adapters)
    return A, B.flip(0)


def without_zeros(adapters):
    A = torch.cat([a for a, _ in adapters])
    return A, torch.cat([b for _, b in adapters], 1).repeat(3, 1)


REFERENCE = {
    "22.1": three,
    "22.2": joined,
    "22.3": lambda V, C, D, L: V * D + C * D + L * (12 * D**2 + 13 * D) + 2 * D,
}
WRONG = {
    "22.1": [
        lambda weight: weight.chunk(3, 1),  # not transposed
        lambda weight: weight.T.chunk(3)[::-1],
        lambda weight: weight.T,
    ],
    "22.2": [blocks_the_wrong_way_round, without_zeros],
    "22.3": [
        lambda V, C, D, L: 2 * V * D + C * D + L * (12 * D**2 + 13 * D) + 2 * D,  # untied
        lambda V, C, D, L: V * D + C * D + L * (12 * D**2 + 9 * D) + 2 * D,
        lambda V, C, D, L: V * D + C * D + L * 12 * D**2,
    ],
}
