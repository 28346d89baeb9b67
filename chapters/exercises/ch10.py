"""Chapter 10, AdaLoRA."""

from __future__ import annotations

import math


def exercise_1(answer):
    assert answer(0, 100, 10, 20, 48, 16) == 48, "before t_i nothing falls"
    assert answer(10, 100, 10, 20, 48, 16) == 48, "at t_i nothing has fallen"
    assert answer(80, 100, 10, 20, 48, 16) == 16, "from T - t_f on it is b_T"
    assert answer(100, 100, 10, 20, 48, 16) == 16, "at the end it is b_T"
    half = answer(45, 100, 10, 20, 48, 16)
    assert half != 32, "halfway a straight line has 32; (Allocator 5) has less"
    assert half == 20, "halfway the cube of a half is left of the difference"
    for t in range(0, 61):
        b = answer(t, 60, 6, 18, 144, 48)
        assert b == int(b), f"at step {t} you keep {b} triplets: cut it off"
        u = min(1, max(0, (t - 6) / (60 - 6 - 18)))
        assert abs(b - (48 + 96 * (1 - u) ** 3)) < 1, f"wrong at step {t}"


def exercise_2(answer):
    weights, gradients = [0.5, 0.4, -0.3], [-0.2, 1.0, 0.7]
    once = answer(weights[:1], gradients[:1], 0.85, 0.85)
    assert once >= 0, "a sensitivity is a size: it is never below 0"
    assert close(once, 0.00019125), (
        "after one step it is 0.00019125, worked out by hand above"
    )
    assert not close(answer([1], [1], 0.5, 0.5), 0.5), "U is from the new M"
    M = U = 0.0
    for w, g in zip(weights, gradients):
        M = 0.6 * M + 0.4 * abs(w * g)
        U = 0.9 * U + 0.1 * abs(abs(w * g) - M)
    assert close(answer(weights, gradients, 0.6, 0.9), M * U), (
        "right after one step, wrong after three: what goes on from step to step?"
    )


def exercise_3(answer):
    scores = {"q": [5.0, 1.0], "v": [4.0, 3.0]}
    assert answer(scores, 3) != {"q": 2, "v": 1}, (
        "the best stay, not the worst"
    )
    assert answer(scores, 3) == {"q": 1, "v": 2}, "5, 4 and 3 are the best"
    skewed = {"a": [9.0, 8.0, 7.0], "b": [1.0, 2.0, 3.0]}
    assert answer(skewed, 3) == {"a": 3, "b": 0}, (
        "a matrix may keep everything, and another nothing"
    )
    assert answer(skewed, 0) == {"a": 0, "b": 0}, "a budget of 0 keeps none"
    ties = {"a": [2.0, 1.0], "b": [1.0, 1.0]}
    assert answer(ties, 2) == {"a": 2, "b": 0}, (
        "exactly `keep` triplets stay; of equal ones the earlier"
    )


def close(a, b):
    return math.isclose(a, b, rel_tol=1e-9)
