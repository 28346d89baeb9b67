"""Chapter 02, Tiny Town and its floor."""

from __future__ import annotations

import math


def exercise_1(answer):
    assert math.isclose(answer([1, 1]), math.log(2)), (
        "two equal words cost ln 2 nats on average"
    )
    assert abs(answer([5, 0])) < 1e-12, (
        "a word that always comes costs nothing"
    )
    weights = [3, 1, 4, 1]
    expected = -sum(w / 9 * math.log(w / 9) for w in weights)
    got = answer(weights)
    assert not math.isclose(got, expected / math.log(2)), (
        "that is in bits; a nat is base e"
    )
    assert math.isclose(got, expected), (
        f"for weights {weights} you say {got:.4f}: which price comes how often?"
    )


def exercise_2(answer):
    assert math.isclose(answer([]), 0.5), (
        "before the first word both moods are as likely"
    )
    for bright, grey in [(1, 0), (0, 1), (2, 1), (3, 3), (1, 4)]:
        words = ["bright"] * bright + ["grey"] * grey
        good, bad = 0.75**bright * 0.25**grey, 0.25**bright * 0.75**grey
        got = answer(words)
        assert 0 <= got <= 1, f"{got} is no probability"
        assert math.isclose(got, good / (good + bad)), (
            f"after {bright} bright and {grey} grey you say {got:.3f}: "
            "compare the two ways to write these words"
        )


def exercise_3(answer):
    assert math.isclose(answer(math.log(2) * 8, "abcd"), 2), (
        "8 bits over four bytes are 2 a byte"
    )
    text = "Müller"
    got = answer(10.0, text)
    assert not math.isclose(got, 10 / math.log(2) / len(text)), (
        "a letter can be more than one byte: count the bytes"
    )
    assert math.isclose(got, 10 / math.log(2) / len(text.encode())), (
        "nats into bits: divide by ln 2"
    )
