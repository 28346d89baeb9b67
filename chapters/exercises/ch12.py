"""Chapter 12, MAM and UniPELT."""

from __future__ import annotations

import torch


def exercise_1(answer):
    g = torch.rand(7).double()
    pair = answer(g[:4], torch.tensor(0.0).double(), 0)
    assert len(pair) == 2, "two things: the means, and the sum"
    G, total = pair
    assert G.shape == (4,), f"a mean for each token, not {tuple(G.shape)}"
    assert close(G[0], g[0]), "the first token's mean is its own gate"
    wanted = torch.stack([g[: t + 1].mean() for t in range(7)])
    assert close(G, wanted[:4]), "token t's mean is over t gates"
    assert close(total, g[:4].sum()), "remember the sum, not the mean"
    later, _ = answer(g[4:], total, 4)
    assert close(later, wanted[4:]), (
        "a text in two pieces must give what it gives in one"
    )


def exercise_2(answer):
    f, x = torch.randn(3, 5, 8).double(), torch.randn(3, 5, 8).double()
    W_1, b_1 = torch.randn(4, 8).double(), torch.randn(4).double()
    W_2, b_2 = torch.randn(8, 4).double(), torch.randn(8).double()
    y = answer(f, x, W_1, b_1, W_2, b_2, 4.0)
    assert y.shape == f.shape, f"shape {tuple(y.shape)}"
    nothing = answer(f, x, W_1, b_1, 0 * W_2, 0 * b_2, 4.0)
    assert close(nothing, f), "with W_2 = 0 and b_2 = 0 only f is left"
    assert not close(answer(f, x + 1, W_1, b_1, W_2, b_2, 4.0), y), (
        "it does not read x: beside the layer, not behind it"
    )
    hidden = torch.einsum("md,...d->...m", W_1, x) + b_1
    change = torch.einsum("dm,...m->...d", W_2, hidden * (hidden > 0)) + b_2
    assert not close(y, f + 4 * (change - b_2) + b_2), (
        "the scale is on b_2 as well"
    )
    assert close(y, f + 4 * change), "not f + s [W_2 relu(W_1 x + b_1) + b_2]"


def exercise_3(answer):
    for D, p, m in [(128, 4, 12), (64, 0, 9), (10, 3, 1)]:
        cost = 2 * p * D + 2 * D * m + m + D
        got = answer(cost, p, D)
        assert got == int(got), f"{got} is no width"
        assert got <= m, (
            f"at D={D} and p={p} a bottleneck of {got} costs more than {cost}"
        )
        assert got == m, f"a wider one than {got} still fits {cost}"
        assert answer(cost - 1, p, D) == m - 1, (
            f"with one number less than {cost} it does not fit any more"
        )


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
