"""Chapter 14, diff pruning."""

import torch


def gate(alpha, u):
    s = torch.sigmoid(u.log() - (1 - u).log() + alpha)
    return (3 * s - 1.5).clamp(0, 1)


def not_stretched(alpha, u):
    return torch.sigmoid(u.log() - (1 - u).log() + alpha)


def not_cut_off(alpha, u):
    return 3 * torch.sigmoid(u.log() - (1 - u).log() + alpha) - 1.5


def coin_the_wrong_way(alpha, u):
    return gate(-alpha, u)


def rounded(alpha, u):
    return gate(alpha, u).round()


def masks(changes, share):
    flat = torch.cat([c.abs().flatten() for c in changes])
    keep = torch.zeros(len(flat), dtype=torch.bool)
    keep[flat.argsort(descending=True)[: int(share * len(flat))]] = True
    parts = keep.split([c.numel() for c in changes])
    return [part.view_as(c) for part, c in zip(parts, changes)]


def share_of_each(changes, share):
    return [masks([c], share)[0] for c in changes]


def with_sign(changes, share):
    return masks([c - min(x.min() for x in changes) for c in changes], share)


def smallest(changes, share):
    return [~m for m in masks(changes, 1 - share)]


REFERENCE = {
    "14.1": gate,
    "14.2": masks,
    "14.3": lambda N, share: (0.5, 8 * int(N * share)),
}
WRONG = {
    "14.1": [not_stretched, not_cut_off, coin_the_wrong_way, rounded],
    "14.2": [share_of_each, with_sign, smallest],
    "14.3": [
        lambda N, share: (1.0, 8 * int(N * share)),
        lambda N, share: (0.5, 4 * int(N * share)),
    ],
}
