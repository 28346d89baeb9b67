"""Chapter 17, quantisation."""

import math

import torch


def absmax(w):
    s = w.abs().max() / 127
    return (w / s).round() * s


def largest_with_its_sign(w):
    s = w.max() / 127
    return (w / s).round().clamp(-127, 127) * s


def truncated(w):
    s = w.abs().max() / 127
    return (w / s).trunc() * s


def made_up_for(W, q, U, i):
    W, e = W.clone(), (W[:, i] - q) / U[i, i]
    W[:, i:] -= e[:, None] * U[i, i:]
    return W


def in_place(W, q, U, i):
    e = (W[:, i] - q) / U[i, i]
    W[:, i:] -= e[:, None] * U[i, i:]
    return W


def wrong_way(W, q, U, i):
    W, e = W.clone(), (W[:, i] - q) / U[i, i]
    W[:, i + 1 :] += e[:, None] * U[i, i + 1 :]
    W[:, i] = q
    return W


def diagonal_squared(W, q, U, i):
    W, e = W.clone(), (W[:, i] - q) / U[i, i] ** 2
    W[:, i + 1 :] -= e[:, None] * U[i, i + 1 :]
    W[:, i] = q
    return W


REFERENCE = {
    "17.1": absmax,
    "17.2": lambda budget: math.ceil(16 / (budget - 3) - 1e-9),
    "17.3": made_up_for,
}
WRONG = {
    "17.1": [largest_with_its_sign, truncated, torch.clone],
    "17.2": [
        lambda budget: math.floor(16 / (budget - 3) + 1e-9),
        lambda budget: math.ceil(32 / (budget - 3)),  # a float32 scale
        lambda budget: 16 / (budget - 3),
    ],
    "17.3": [in_place, wrong_way, diagonal_squared],
}
