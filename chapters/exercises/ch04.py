"""Chapter 04, BitFit."""

from __future__ import annotations

import torch


def exercise_1(answer):
    assert answer(128, 512, 4) == 5760, (
        "the model of this chapter trains 5,760"
    )
    for D, F, L in [(8, 5, 3), (16, 64, 1), (3, 7, 12)]:
        right = L * (4 * D + F + D + 2 * D) + D
        got = answer(D, F, L)
        assert got == right, (
            f"D={D}, F={F}, L={L}: you count {got}, which of the biases is F wide?"
        )


def exercise_2(answer):
    W, delta_c, x = (
        torch.randn(5, 3).double(),
        torch.randn(3).double(),
        torch.randn(7, 3).double(),
    )
    delta_b = answer(W, delta_c)
    assert delta_b.shape == (5,), (
        f"it has shape {tuple(delta_b.shape)}, not (5,)"
    )
    assert torch.allclose((x + delta_c) @ W.T, x @ W.T + delta_b), (
        "the projection does not give the same: what does it make of the constant?"
    )
    square = torch.randn(4, 4).double(), torch.randn(4).double()
    assert torch.allclose(answer(*square), torch.einsum("oi,i->o", *square)), (
        "in a square layer the transposed matrix fits, too"
    )


def exercise_3(answer):
    W_o, b_o, b_v = (
        torch.randn(4, 4).double(),
        torch.randn(4).double(),
        torch.randn(4).double(),
    )
    p = torch.rand(3, 6).double().softmax(-1)
    v = torch.randn(6, 4).double()
    expected = (p @ (v + b_v)) @ W_o.T + b_o
    new = answer(W_o, b_o, b_v)
    assert new.shape == (4,), f"it has shape {tuple(new.shape)}, not (4,)"
    got = (p @ v) @ W_o.T + new
    assert torch.allclose(got, expected), (
        "attention with b_v = 0 and your b_o gives something else"
    )
