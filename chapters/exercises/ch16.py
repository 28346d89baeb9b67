"""Chapter 16, QLoRA and the paged optimizer."""

from __future__ import annotations

import torch


def exercise_1(answer):
    assert answer([0, 0, 0], 1) == 1, "a page that is there is no fault"
    assert answer([0, 1, 2] * 3, 3) == 3, (
        "with a frame for each page only first touches are faults"
    )
    assert answer([0, 1, 2] * 3, 2) == 9, (
        "a sweep with one frame too few misses every time"
    )
    assert answer([0, 1, 0, 2, 0, 1], 2) == 4, (
        "a hit makes a page the most recently used, so another one goes"
    )
    generator = torch.Generator().manual_seed(3)
    touches = torch.randint(6, (60,), generator=generator).tolist()
    for frames in (1, 2, 4, 6):
        assert answer(list(touches), frames) == faults(touches, frames), (
            f"on 60 random touches of 6 pages with {frames} frames"
        )


def faults(touches, frames):
    """By the ages of pages: a touch hits if fewer than `frames` others came since the last one."""
    count = 0
    for n, page in enumerate(touches):
        before = [m for m in range(n) if touches[m] == page]
        count += not before or len({*touches[before[-1] + 1 : n]}) >= frames
    return count


def exercise_2(answer):
    assert answer(1000, 10, 1) == 80, (
        "a page has two moments of four bytes for each element"
    )
    assert answer(1000, 10, 7) == 560, "each frame holds one page"
    assert answer(1000, 10, 500) == 8000, (
        "there are no more than N elements to hold"
    )
    assert answer(5, 100, 3) == 40, (
        "a page that is larger than everything is cut to size"
    )


def exercise_3(answer):
    x, W = (
        torch.randn(4, 3).double().requires_grad_(),
        torch.randn(5, 3).double(),
    )
    b, g, calls = torch.randn(5).double(), torch.randn(4, 5).double(), []

    def unpack():
        calls.append(None)
        return W

    y, dx = answer(x.detach(), unpack, b, g)
    expected = torch.einsum("oi,ni->no", W, x) + b
    assert y.shape == (4, 5) and torch.allclose(y, expected), (
        "y is not W' x + b (Frozen 1)"
    )
    (gradient,) = torch.autograd.grad(expected, x, g)
    assert dx.shape == (4, 3) and torch.allclose(dx, gradient), (
        "dx is not W'^T g (Frozen 2)"
    )
    assert len(calls) == 2, (
        f"unpack was called {len(calls)} times; it should be 2, once a pass"
    )
