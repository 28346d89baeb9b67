"""The least time that work can take on this machine: bytes over bandwidth, operations over rate.

    (Floor 1)   floor = max(bytes / bandwidth, operations / rate)

Both rates are measured, in the run that uses them, on what the machine does best: copying a large
tensor, each byte of it read and written once, and multiplying two large float32 matrices. What is
compared with the floor moves each byte once and repeats no operation, so the share it reaches says
how much a better program could still gain. Reading alone may be faster than copying, and data that
stay in a cache faster than both: a time a little below its floor is no error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    bmm_flop,
    mm_flop,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from minipeft.timing import seconds


@dataclass(frozen=True)
class Rates:
    """Bytes a second (read and written, together) and operations a second of one device."""

    bandwidth: float
    operations: float

    def floor(self, bytes_moved=0.0, operations=0.0):
        """Seconds. (Floor 1)"""
        return max(bytes_moved / self.bandwidth, operations / self.operations)


def measure(device="cpu", rounds=7):
    """The device's Rates: the best of a few rounds, since others can only make a round slower."""
    cuda = torch.device(device).type == "cuda"
    source = torch.zeros(2**28 if cuda else 2**24, device=device)  # 1 GiB, 64 MiB: beyond caches
    target, n = torch.empty_like(source), 8192 if cuda else 1024
    a, b = torch.randn(2, n, n, device=device)
    product = torch.empty_like(a)
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(rounds))
    multiplying = min(seconds(lambda: torch.mm(a, b, out=product), device) for _ in range(rounds))
    return Rates(2 * 4 * source.numel() / copying, 2 * n**3 / multiplying)


ON_A_CPU = {  # attention's operations there, and products in place: torch's counter knows neither
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)
    ),
    torch.ops.aten.addmm_: lambda x, a, b, *args, out_shape=None, **kwargs: mm_flop(a, b),
    torch.ops.aten.baddbmm_: lambda x, a, b, *args, out_shape=None, **kwargs: bmm_flop(a, b),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda g, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(g, q, k, v)
    ),
}


def operations(action):
    """Multiplications and additions in the matrix products and the attention of action()."""
    with FlopCounterMode(display=False, custom_mapping=ON_A_CPU) as counter:
        action()
    return counter.get_total_flops()
