"""Chapter 13, mode approximation."""

import torch


def change(U, V, scale, P, k):
    return V * (scale * P[k]) @ U.T


def without_mixture(U, V, scale, P, k):
    return V * scale @ U.T


def without_scale(U, V, scale, P, k):
    return V * P[k] @ U.T


def turned(U, V, scale, P, k):
    return U * (scale * P[k]) @ V.T


def best_error(W, rank):
    return torch.linalg.svdvals(W)[rank:].square().sum()


def next_value_alone(W, rank):
    values = torch.linalg.svdvals(W)
    return values[rank] ** 2 if rank < len(values) else values.sum() * 0


def kept_part(W, rank):
    return torch.linalg.svdvals(W)[:rank].square().sum()


def not_squared(W, rank):
    return best_error(W, rank).sqrt()


def joined(b, c):
    return (b[:, None] * c).flatten(0, 1)


def solve(T, b, c):
    gram = (b.T @ b) * (c.T @ c)
    return T.flatten(1) @ joined(b, c) @ torch.linalg.pinv(gram)


def gram_added(T, b, c):
    gram = b.T @ b + c.T @ c
    return T.flatten(1) @ joined(b, c) @ torch.linalg.pinv(gram)


def without_gram(T, b, c):
    return T.flatten(1) @ joined(b, c)


def joined_the_other_way(T, b, c):
    gram = (b.T @ b) * (c.T @ c)
    return T.flatten(1) @ joined(c, b) @ torch.linalg.pinv(gram)


REFERENCE = {"13.1": change, "13.2": best_error, "13.3": solve}
WRONG = {
    "13.1": [without_mixture, without_scale, turned],
    "13.2": [next_value_alone, kept_part, not_squared],
    "13.3": [gram_added, without_gram, joined_the_other_way],
}
