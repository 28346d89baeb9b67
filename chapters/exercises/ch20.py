"""Chapter 20, Triton kernels on a laptop."""

from __future__ import annotations

import math


def exercise_1(answer):
    m, s = answer(math.log(2), 1.5, [math.log(4), 0.0])
    assert abs(m - math.log(4)) < 1e-9, "m' is the largest entry of all so far"
    assert abs(s - 2) < 1e-9, (
        "the example of this chapter gives s' = 2: the old sum shrinks by exp(m - m') first"
    )
    m, s = answer(3.0, 2.0, [-1.0, 1.0])
    assert m == 3.0, "a block without a new largest entry leaves m alone"
    assert abs(s - (2 + math.exp(-4) + math.exp(-2))) < 1e-9, (
        "then the old sum stays as it is"
    )
    m, s = answer(-math.inf, 0.0, [900.0, 901.0])
    assert m == 901.0 and abs(s - (1 + math.exp(-1))) < 1e-9, (
        "from nothing, and with entries whose exp alone would overflow"
    )


def exercise_2(answer):
    touched, programs = answer(0, 8, 20)
    assert list(touched) == list(range(8)), "program 0 has the first block"
    assert programs == 3, (
        "20 elements in blocks of 8 need 3 programs: the last is not full"
    )
    assert list(answer(2, 8, 20)[0]) == [16, 17, 18, 19], (
        "the last program is masked where there are no elements"
    )
    assert answer(0, 8, 16)[1] == 2, (
        "16 elements in blocks of 8 need 2 programs, no empty one"
    )


def exercise_3(answer):
    found = answer(2048, 50257, 2, 3.35e12, 5.0)
    assert abs(found - 3 * 2048 * 50257 * 2 / 3.35e12 * 1e6) < 1e-6, (
        "bytes over bytes a second is seconds; a row is read twice and written once"
    )
    assert answer(1, 100, 4, 3.35e12, 5.0) == 5.0, (
        "a small launch costs its start"
    )
    half = answer(2048, 50257, 4, 3.35e12, 5.0)
    assert abs(half / found - 2) < 1e-9, (
        "twice the bytes an entry, twice the time"
    )
