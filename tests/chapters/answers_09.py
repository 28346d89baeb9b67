"""Chapter 09, LoRA."""

import torch


def forward(x, W, b, A, B, alpha):
    return x @ W.T + b + alpha / A.shape[0] * (x @ A.T @ B.T)


def without_rank(x, W, b, A, B, alpha):
    return x @ W.T + b + alpha * (x @ A.T @ B.T)


def scale_on_all(x, W, b, A, B, alpha):
    return alpha / A.shape[0] * (x @ W.T + b + x @ A.T @ B.T)


def without_bias(x, W, b, A, B, alpha):
    return x @ W.T + alpha / A.shape[0] * (x @ A.T @ B.T)


def factors(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return S[:rank, None] * Vh[:rank], U[:, :rank]


def smallest_directions(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return S[-rank:, None] * Vh[-rank:], U[:, -rank:]


def values_twice(delta, rank):
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return S[:rank, None] * Vh[:rank], U[:, :rank] * S[:rank]


REFERENCE = {
    "09.1": forward,
    "09.2": lambda d_in, d_out: (d_in * d_out - 1) // (d_in + d_out),
    "09.3": factors,
}
WRONG = {
    "09.1": [without_rank, scale_on_all, without_bias],
    "09.2": [
        lambda d_in, d_out: d_in * d_out // (d_in + d_out),  # as many is not fewer
        lambda d_in, d_out: min(d_in, d_out) - 1,
        lambda d_in, d_out: d_in * d_out / (d_in + d_out),
    ],
    "09.3": [smallest_directions, values_twice],
}
