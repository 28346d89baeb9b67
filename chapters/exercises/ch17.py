"""Chapter 17, quantisation."""

from __future__ import annotations

import torch


def exercise_1(answer):
    w = torch.tensor([0.5, -1.27, 1.006, 0.008])
    found = answer(w)
    assert found.shape == w.shape, f"the shape should be {tuple(w.shape)}"
    assert abs(found[1] + 1.27) < 1e-6, (
        "the largest weight comes back exactly, sign and all"
    )
    step = 1.27 / 127
    assert (found - w).abs().max() <= step / 2 + 1e-6, (
        "no weight is off by more than half a step"
    )
    codes = found / step
    assert (codes - codes.round()).abs().max() < 1e-3, (
        "every weight comes back as a whole number of steps"
    )


def exercise_2(answer):
    for budget, group in [
        (4, 16),
        (3.5, 32),
        (3.1, 160),
        (3.15, 107),
        (19, 1),
    ]:
        found = answer(budget)
        assert found == int(found), (
            f"for {budget} bits you say {found}, which is no whole number"
        )
        assert 3 + 16 / found <= budget + 1e-9, (
            f"groups of {found} cost more than {budget} bits: 3 a weight, and 16 for each group"
        )
        assert found == group, (
            f"for {budget} bits a smaller group than {found} would do"
        )


def exercise_3(answer):
    root = torch.randn(6, 6).double()
    U = torch.linalg.cholesky(torch.linalg.inv(root @ root.T), upper=True)
    W, kept = torch.randn(4, 6).double(), None
    kept = W.clone()
    for i in (0, 3, 5):
        q = W[:, i].round()
        found = answer(W, q, U, i)
        assert torch.equal(W, kept), "W itself was changed; work on a copy"
        assert found.shape == W.shape, f"the shape should be {tuple(W.shape)}"
        assert torch.equal(found[:, :i], W[:, :i]), (
            "columns before i are rounded and stay"
        )
        assert torch.allclose(found[:, i], q), (
            "column i should be what it was rounded to"
        )
        for j in range(i + 1, 6):
            moved = W[:, j] - (W[:, i] - q) / U[i, i] * U[i, j]
            assert torch.allclose(found[:, j], moved), (
                f"after rounding column {i}, column {j} is not what (GPTQ 3) says"
            )
