"""Chapter 05, adapters."""

from __future__ import annotations

import torch


def exercise_1(answer):
    f = torch.randn(2, 7, 5).double()
    W_1, b_1 = torch.randn(3, 5).double(), torch.randn(3).double()
    W_2, b_2 = torch.randn(5, 3).double(), torch.randn(5).double()
    silent = answer(
        f, W_1, b_1, torch.zeros_like(W_2), torch.zeros_like(b_2), 2.0
    )
    assert silent.shape == f.shape, (
        f"y has shape {tuple(silent.shape)}, not {tuple(f.shape)}"
    )
    assert torch.allclose(silent, f), (
        "with W_2 = 0 and b_2 = 0 nothing may change"
    )
    constant = answer(f, W_1, b_1, torch.zeros_like(W_2), b_2, 2.0)
    assert torch.allclose(constant, f + 2 * b_2), (
        "the scale belongs to b_2 as well"
    )
    u = torch.einsum("md,...d->...m", W_1, f) + b_1
    u = torch.where(u > 0, u, torch.zeros_like(u))
    expected = f + 2.0 * (torch.einsum("dm,...m->...d", W_2, u) + b_2)
    y = answer(f, W_1, b_1, W_2, b_2, 2.0)
    assert torch.allclose(y, expected), (
        "is the bend between the two matrices, and b_1 before it?"
    )


def exercise_2(answer):
    for budget, D, L in [
        (16960, 128, 4),
        (16959, 128, 4),
        (100, 8, 2),
        (50, 8, 2),
        (10, 8, 2),
    ]:
        m = answer(budget, D, L)
        assert m == int(m) and m >= 0, f"m = {m} is no size"

        def size(m, D=D, L=L):
            return L * (2 * D * m + m + D) if m else 0

        told = f"budget {budget}, D={D}, L={L}: m={m}"
        assert size(m) <= budget, f"{told} trains {size(m)}"
        assert size(m + 1) > budget, f"{told}, but {m + 1} fits, too"


def exercise_3(answer):
    x, Z = torch.randn(6).double(), torch.randn(3, 6).double()
    Q, K = torch.randn(6, 6).double() / 3, torch.randn(6, 6).double() / 3
    b_q, b_k = torch.randn(6).double(), torch.randn(6).double()
    p = answer(x, Z, Q, b_q, K, b_k)
    assert p.shape == (3,), f"p has shape {tuple(p.shape)}, not (3,)"
    assert torch.allclose(p.sum(), torch.ones(()).double()), (
        "the weights do not sum to 1"
    )
    scores = torch.stack(
        [
            sum((Q[i] @ x + b_q[i]) * (K[i] @ z + b_k[i]) for i in range(6))
            for z in Z
        ]
    )
    expected = scores.exp() / scores.exp().sum()
    divided = (scores / 6**0.5).exp() / (scores / 6**0.5).exp().sum()
    assert not torch.allclose(p, divided), (
        "this paper does not divide the scores by sqrt(D)"
    )
    assert torch.allclose(p, expected), (
        "the query is made of x, the keys of the z"
    )
