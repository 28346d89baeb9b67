"""Chapter 21, side by side."""

from __future__ import annotations


def exercise_1(answer):
    assert answer(26.0, 26.0, 18.0) == 0, (
        "a technique that did nothing gains nothing"
    )
    assert answer(0.8, 0.0, 0.8) == 1, (
        "who gets as far as full fine-tuning gains all"
    )
    assert abs(answer(19.0, 26.0, 18.0) - 7 / 8) < 1e-12, (
        "in nats lower is better; see by hand"
    )
    assert abs(answer(0.6, 0.2, 0.7) - 0.8) < 1e-12, (
        "the base need not be at 0"
    )
    assert answer(17.0, 26.0, 18.0) > 1, (
        "nothing forbids to be better than full fine-tuning"
    )


def exercise_2(answer):
    points = {
        "a": (10, 0.5),
        "b": (20, 0.4),
        "c": (30, 0.9),
        "d": (40, 0.9),
        "e": (10, 0.3),
    }
    found = set(answer(dict(points)))
    assert "a" in found, "a is the smallest with its gain: nothing beats it"
    assert "b" not in found and "e" not in found, (
        "a is at most as large as b and e, and better"
    )
    assert "c" in found, "nothing up to c's size gains as much"
    assert "d" not in found, "c is smaller than d and gains as much"
    assert found == {"a", "c"}, f"the front is a and c, not {sorted(found)}"
    larger = {"x": (5, 0.1), "y": (1, -0.2), "z": (3, 0.05)}
    assert set(answer(larger)) == {"x", "y", "z"}, (
        "the order of the names says nothing"
    )
