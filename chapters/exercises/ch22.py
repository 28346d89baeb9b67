"""Chapter 22, from here to peft."""

from __future__ import annotations

import torch


def exercise_1(answer):
    D = 5
    weight = torch.randn(D, 3 * D)
    found = answer(weight)
    assert len(found) == 3, "three matrices: W_q, W_k, W_v"
    assert all(W.shape == (D, D) for W in found), "each of the three is (D, D)"
    x = torch.randn(4, D)
    joint = x @ weight  # GPT-2's Conv1D
    for n, name in enumerate("qkv"):
        ours = torch.nn.functional.linear(x, found[n])
        assert torch.allclose(
            ours, joint[:, n * D : (n + 1) * D], atol=1e-5
        ), (
            f"F.linear(x, W_{name}) should be columns {n * D} to {(n + 1) * D - 1} of x @ weight"
        )


def exercise_2(answer):
    D, ranks = 6, (1, 3, 2)
    adapters = [
        (torch.randn(r, D).double(), torch.randn(D, r).double()) for r in ranks
    ]
    A, B = answer(adapters)
    assert A.shape == (6, D), f"A' should be {(6, D)}: the ranks add up"
    assert B.shape == (3 * D, 6), f"B' should be {(3 * D, 6)}"
    x = torch.randn(D).double()
    joint = B @ A @ x
    for n, ((a, b), name) in enumerate(zip(adapters, "qkv")):
        assert torch.allclose(joint[n * D : (n + 1) * D], b @ a @ x), (
            f"the rows of {name} should add B_{name} A_{name} x, and nothing of the others"
        )


def exercise_3(answer):
    assert answer(1, 0, 1, 0) == 3, (
        "one word at width 1 without layers: its row, and the last norm"
    )
    assert answer(10, 7, 4, 0) == 76, (
        "a row for each word and each position, and the last norm"
    )
    block = answer(10, 7, 4, 3) - answer(10, 7, 4, 2)
    assert block == 12 * 16 + 13 * 4, (
        "a block has 12 D^2 weights (4 in attention, 8 behind it), and 13 D in biases and norms"
    )
    assert answer(50257, 1024, 768, 12) == 124_439_808, "GPT-2 small"
