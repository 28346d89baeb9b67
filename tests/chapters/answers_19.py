"""Chapter 19, pruning and lottery tickets."""

import math

import torch


def smallest_go(scores, count):
    keep = torch.ones(scores.numel(), dtype=torch.bool)
    keep[scores.flatten().argsort()[:count]] = False
    return keep.view_as(scores)


def magnitude(w, s):
    return smallest_go(w.abs(), math.floor(s * w.numel() + 1e-9))


def by_threshold(w, s):
    size = w.abs().flatten().sort().values
    return w.abs() > size[int(s * w.numel())]


def wanda(w, X, s):
    scores = w.abs() * X.norm(dim=0)
    return torch.stack([smallest_go(row, int(s * len(row))) for row in scores])


def whole_matrix(w, X, s):
    return smallest_go(w.abs() * X.norm(dim=0), int(s * w.shape[1]) * w.shape[0])


def mean_input(w, X, s):
    scores = w.abs() * X.mean(0).abs()
    return torch.stack([smallest_go(row, int(s * len(row))) for row in scores])


REFERENCE = {
    "19.1": magnitude,
    "19.2": wanda,
    "19.3": lambda p, kept: math.ceil(math.log(kept) / math.log(1 - p) - 1e-9),
}
WRONG = {
    "19.1": [
        by_threshold,
        lambda w, s: smallest_go(w, math.floor(s * w.numel())),  # signed
        lambda w, s: ~magnitude(w, s),
    ],
    "19.2": [
        whole_matrix,
        mean_input,
        lambda w, X, s: torch.stack([magnitude(row, s) for row in w]),
    ],
    "19.3": [
        lambda p, kept: math.ceil((1 - kept) / p),  # a share of all, each round
        lambda p, kept: math.floor(math.log(kept) / math.log(1 - p)),
        lambda p, kept: math.ceil(math.log(kept) / math.log(p)),
    ],
}
