"""Chapter 14, diff pruning."""

from __future__ import annotations

import math

import torch


def exercise_1(answer):
    u = torch.linspace(0.01, 0.99, 99).double()
    z = answer(torch.zeros(99).double(), u)
    assert z.shape == u.shape, f"a gate for each coin, not {tuple(z.shape)}"
    assert z.min() >= 0 and z.max() <= 1, "gates lie between 0 and 1"
    assert z[0] == 0 and z[-1] == 1, (
        "no gate is exactly 0 or 1: stretch s over both ends, then cut off"
    )
    more = answer(torch.ones(99).double(), u)
    assert (more >= z).all() and more.sum() > z.sum(), (
        "a larger alpha must open gates, not shut them"
    )
    for alpha in (-2.0, 0.0, 0.7, 3.0):
        wanted = []
        for coin in u.tolist():
            logit = math.log(coin / (1 - coin)) + alpha
            s = 1 / (1 + math.exp(-logit))
            wanted.append(min(1.0, max(0.0, 3 * s - 1.5)))
        got = answer(torch.full((99,), alpha).double(), u)
        assert torch.allclose(got, torch.tensor(wanted).double(), atol=1e-9), (
            f"between its ends the gate is wrong at alpha = {alpha}"
        )


def exercise_2(answer):
    big, small = torch.tensor([[5.0, -6.0], [4.0, 7.0]]), torch.tensor([1.0])
    masks = answer([big, small], 0.8)
    assert [m.shape for m in masks] == [big.shape, small.shape], (
        "a mask for each tensor, of its shape"
    )
    assert all(m.dtype == torch.bool for m in masks), "masks are of type bool"
    assert masks[0].all() and not masks[1].any(), (
        "4 of all 5 stay, whatever tensor they are in, and by size without the sign"
    )
    changes = [torch.randn(3, 7), torch.randn(11), 0.1 * torch.randn(5, 5)]
    for share in (0.1, 0.5):
        masks = answer(changes, share)
        count = sum(int(m.sum()) for m in masks)
        assert count == int(share * 57), (
            f"{count} of 57 stay at a share of {share}"
        )
        stay = torch.cat([c[m].abs() for c, m in zip(changes, masks)])
        go = torch.cat([c[~m].abs() for c, m in zip(changes, masks)])
        assert stay.min() > go.max(), "something larger was left out"


def exercise_3(answer):
    for N, share in [(1000, 0.1), (200_000, 0.005), (64, 0.25)]:
        pair = answer(N, share)
        assert len(pair) == 2, "two numbers"
        pays, size = pair
        assert pays < 1, "with every number changed the file is twice as large"
        assert math.isclose(pays, 0.5), (
            "dense costs 4 N bytes, sparse 8 for each changed number"
        )
        assert size == 8 * int(N * share), (
            f"{int(N * share)} numbers, each with value and place"
        )
