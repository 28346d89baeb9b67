"""Timing that can be trusted: actions take turns, and only neighbours are compared.

A machine's speed drifts by a tenth and more while one measures, so two actions that are to be
compared run in turn, and the ratio is taken round by round. A GPU works behind the program's back:
its queue is drained before the clock is read.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Ratio:
    """Our time over theirs: median, 20th and 80th percentile of the rounds; medians in seconds."""

    ratio: float
    low: float
    high: float
    ours: float
    theirs: float


def seconds(action, device="cpu"):
    """Wall-clock seconds of action(), the device's queue drained before and after."""
    drain = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    drain()
    begin = time.perf_counter()
    action()
    drain()
    return time.perf_counter() - begin


def turns(actions, rounds, device="cpu"):
    """Seconds of each action in each round, [(first, second, ...), ...]; a round before the first
    warms up: allocations, kernels' choices.
    """
    found = [tuple(seconds(a, device) for a in actions) for _ in range(rounds + 1)]
    return found[1:]


def interleaved(ours, theirs, rounds, device="cpu"):
    """Two actions in turn; a Ratio."""
    found = turns((ours, theirs), rounds, device)
    ratios = sorted(a / b for a, b in found)
    low, high = (ratios[round(share * (rounds - 1))] for share in (0.2, 0.8))
    mine, other = (statistics.median(side) for side in zip(*found))
    return Ratio(statistics.median(ratios), low, high, mine, other)
