"""Chapter 11, IA3."""

from __future__ import annotations

import torch


def exercise_1(answer):
    W, b, l = torch.randn(5, 3), torch.randn(5), torch.randn(5)
    W, b, l = W.double(), b.double(), l.double()
    pair = answer(W, b, l)
    assert isinstance(pair, tuple) and len(pair) == 2, "two things: W' and b'"
    weight, bias = pair
    assert weight.shape == (5, 3), f"W' has shape {tuple(weight.shape)}"
    nothing = answer(W, b, torch.ones_like(l))
    assert close(nothing[0], W) and close(nothing[1], b), (
        "with l = 1 nothing may change"
    )
    x = torch.randn(7, 3).double()
    wanted = l * (x @ W.T + b)
    assert close((x @ weight.T), l * (x @ W.T)), (
        "without the bias it must be l * (W x): does l belong to rows or to columns?"
    )
    assert close(x @ weight.T + bias, wanted), (
        "right for inputs that silence the bias, wrong for others"
    )


def exercise_2(answer):
    l = torch.ones(4).double().requires_grad_()
    h, g = torch.randn(3, 5, 4).double(), torch.randn(3, 5, 4).double()
    (l * h * g).sum().backward()
    got = answer(g, h)
    assert got.shape == (4,), (
        f"one number a coordinate, not a shape {tuple(got.shape)}"
    )
    assert not close(got, l.grad / 15), "a sum over tokens, not their mean"
    assert not close(got, g.sum((0, 1)) * h.sum((0, 1))), (
        "first the product of each token, then the sum"
    )
    assert close(got, l.grad), "not what differentiating l * h gives"


def exercise_3(answer):
    every = ("q", "k", "v", "o", "up", "down")
    assert answer(("k", "v", "down"), 4, 128, 512) == 3072, (
        "the count above was for k, v and down"
    )
    assert answer(("up",), 1, 10, 40) == 40, "up writes d_ff numbers"
    assert answer(("down",), 1, 10, 40) != 10, (
        "down is scaled at what it reads"
    )
    for targets in (("k", "v"), every, ("o", "up"), ("down",)):
        wanted = sum(48 if t in ("up", "down") else 11 for t in targets)
        assert answer(targets, 3, 11, 48) == 3 * wanted, (
            f"wrong for {targets}, three layers"
        )


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
