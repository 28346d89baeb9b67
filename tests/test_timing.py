"""The specification of minipeft/timing.py."""

from __future__ import annotations

import time

import pytest
import torch

from minipeft import timing


def test_the_two_sides_run_in_turn_and_the_first_round_is_not_counted():
    calls = []
    found = timing.turns((lambda: calls.append("a"), lambda: calls.append("b")), rounds=3)
    assert calls == ["a", "b"] * 4 and len(found) == 3 and all(len(r) == 2 for r in found)


def test_the_ratio_is_ours_over_theirs():
    r = timing.interleaved(lambda: time.sleep(0.004), lambda: time.sleep(0.02), rounds=5)
    assert 0.15 < r.ratio < 0.6  # 0.2 on a quiet machine
    assert r.low <= r.ratio <= r.high and r.ours < r.theirs


def test_ratios_are_of_neighbours(monkeypatch):
    """A machine twice as slow in two of three rounds changes the times and not the ratio."""
    times = iter([0, 0, 1, 2, 2, 4, 2, 4])  # ours, theirs; the first two warm up
    monkeypatch.setattr(timing, "seconds", lambda action, device: next(times))
    r = timing.interleaved(None, None, rounds=3)
    assert (r.ratio, r.low, r.high, r.ours, r.theirs) == (0.5, 0.5, 0.5, 2, 4)


def test_the_spread_is_the_twentieth_and_the_eightieth_percentile(monkeypatch):
    ours = [0, 30, 10, 50, 20, 40]  # the first warms up
    times = iter([t for a in ours for t in (a, 10)])
    monkeypatch.setattr(timing, "seconds", lambda action, device: next(times))
    r = timing.interleaved(None, None, rounds=5)
    assert (r.low, r.ratio, r.high) == (2, 3, 4)


@pytest.mark.parametrize(("device", "drained"), [("cpu", 0), ("cuda:0", 2)])
def test_a_gpu_s_queue_is_drained_before_the_clock_is_read(device, drained, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: calls.append("drain"))
    timing.seconds(lambda: calls.append("work"), torch.device(device))
    assert calls == (["drain", "work", "drain"] if drained else ["work"])
