"""Chapter 19, pruning and lottery tickets."""

from __future__ import annotations

import math

import torch


def exercise_1(answer):
    w = torch.tensor([[3.0, -4.0, 0.5], [-0.1, 2.0, -1.0]])
    found = answer(w, 0.5)
    assert found.shape == w.shape, f"the mask should be {tuple(w.shape)}"
    assert found.dtype == torch.bool, (
        f"the mask should be bool, not {found.dtype}"
    )
    assert found[0, 1], "-4 is the largest weight: its sign does not matter"
    assert found.tolist() == [[True, True, False], [False, True, False]], (
        "the three smallest sizes go, and nothing else"
    )
    flat = answer(torch.ones(10, 10), 0.29)
    assert int((~flat).sum()) == 29, (
        "of 100 equal weights exactly 29 go at s = 0.29"
    )
    assert answer(w, 0.0).all(), "at s = 0 everything stays"


def exercise_2(answer):
    w = torch.tensor([[3.0, -0.5], [0.6, -2.0]])
    X = torch.tensor([[0.06, 6.0], [0.08, -8.0]])  # norms 0.1 and 10
    assert answer(w, X, 0.5).tolist() == [[False, True], [False, True]], (
        "the example of this chapter: scores (0.3, 5) and (0.06, 20); signs of inputs do not matter"
    )
    w, X = torch.randn(5, 9), torch.randn(30, 9) * torch.logspace(-1, 1, 9)
    found = answer(w, X, 0.4)
    assert found.shape == w.shape, f"the mask should be {tuple(w.shape)}"
    assert ((~found).sum(1) == 3).all(), (
        "every row loses floor(0.4 * 9) = 3 weights"
    )
    for i in range(5):
        scores = [
            abs(w[i, j]) * math.sqrt((X[:, j] ** 2).sum()) for j in range(9)
        ]
        lowest = sorted(range(9), key=lambda j: scores[j])[:3]
        gone = (~found[i]).nonzero()[:, 0].tolist()
        assert gone == sorted(lowest), (
            f"row {i} does not lose its lowest scores (Wanda 1)"
        )


def exercise_3(answer):
    for p, kept, rounds in [
        (0.5, 0.25, 2),
        (0.5, 0.2, 3),
        (0.2, 0.1, 11),
        (0.9, 1.0, 0),
    ]:
        found = answer(p, kept)
        assert found == int(found), (
            f"for p = {p} you say {found}, which is no whole number"
        )
        assert (1 - p) ** found <= kept + 1e-12, (
            f"after {found} rounds at p = {p} a share of {(1 - p) ** found:.3f} is left"
        )
        assert found == rounds, (
            f"for p = {p} and {kept} fewer rounds than {found} would do"
        )
