"""Chapter 01, a GPT from scratch."""

import math

import torch


def attention(q, k, v):
    T, d = q.shape
    scores = (q @ k.T / math.sqrt(d)).masked_fill(torch.ones(T, T).triu(1) > 0, -math.inf)
    return scores.softmax(-1) @ v


def without_mask(q, k, v):
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(-1) @ v


def without_root(q, k, v):
    scores = (q @ k.T).masked_fill(torch.ones(len(q), len(q)).triu(1) > 0, -math.inf)
    return scores.softmax(-1) @ v


def mask_after_softmax(q, k, v):
    return (q @ k.T / math.sqrt(q.shape[1])).softmax(-1).tril() @ v


def count(V, C, L, D, F):
    return (V + C) * D + L * (4 * D * D + 2 * D * F + F + 9 * D) + 2 * D


REFERENCE = {
    "01.1": attention,
    "01.2": count,
    "01.3": lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(S - T),
}
WRONG = {
    "01.1": [without_mask, without_root, mask_after_softmax],
    "01.2": [
        lambda V, C, L, D, F: count(V, C, L, D, F) + V * D,
        lambda V, C, L, D, F: count(V, C, L, D, F) - 2 * D,
        lambda V, C, L, D, F: (V + C) * D + L * (12 * D * D + 13 * D) + 2 * D,
    ],
    "01.3": [
        lambda T, S: torch.ones(T, S, dtype=torch.bool).tril(),
        lambda T, S: torch.ones(T, S, dtype=torch.bool),
        lambda T, S: torch.ones(T, S).tril(S - T),
    ],
}
