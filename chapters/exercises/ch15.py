"""The exercises of chapter 15, NF4."""

from __future__ import annotations

import torch


def exercise_1(answer):
    assert answer([1, 2]) == [18], (
        "codes 1 and 2 should make the byte 16 * 1 + 2 (NF4 4)"
    )
    codes = [15, 0, 0, 15, 7, 9]
    assert len(answer(codes)) == 3, (
        "two codes make one byte, so six codes make three"
    )
    assert answer(codes) == [240, 15, 121], (
        "the first code of a pair is the high half"
    )


def exercise_2(answer):
    assert abs(answer(64) - 4.5) < 1e-12, (
        "a float32 constant for 64 weights is half a bit a weight"
    )
    assert abs(answer(32) - 5) < 1e-12, "smaller blocks have more constants"
    assert abs(answer(64, 256) - 4.126953125) < 1e-12, (
        "double-quantised: 8 bits a constant, and 32 bits for every 256 of them"
    )
    assert abs(answer(16, 100) - (4 + 0.5 + 0.02)) < 1e-12, (
        "the group need not be 256"
    )


def exercise_3(answer):
    levels = torch.linspace(-1, 1, 16) ** 3
    codes = torch.randint(16, (3, 8))
    constants = torch.tensor([1.0, 0.5, 20.0])
    found = answer(codes, constants, levels)
    assert found.shape == codes.shape, (
        f"the shape should be {tuple(codes.shape)}"
    )
    for b in range(3):
        for i in range(8):
            expected = levels[codes[b, i]] * constants[b]
            assert abs(found[b, i] - expected) < 1e-6, (
                f"block {b}, weight {i}: its level times the constant of its own block (NF4 5)"
            )
