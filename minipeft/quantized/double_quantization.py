r"""Double quantisation: the constants of quantised blocks, themselves in eight bits.

Dettmers et al., 2023, arXiv 2305.14314. With blocks of 64 a float32 constant costs half a bit a
weight; stored like this, an eighth of a bit and a little.

    (NF4 6)   c'_b  = D[t_b] C_g + mean(c),   t_b the level of D nearest to (c_b - mean(c)) / C_g

c in R^blocks the constants; D the dynamic 8-bit map (codebooks.py); C_g the largest absolute value
of a group g of 256 centred constants. The last group may be shorter.

How this differs from bitsandbytes: the dynamic map's level is the nearest one; its CPU path looks
levels up in a rounded table, so about one in a thousand differs there. The paper writes FP8 for the
second level; its code, and this file, use the dynamic map.

Footguns: forgetting to add the mean back; one C for the whole tensor; equally spaced levels, on
constants that differ by decades.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minipeft.quantized.codebooks import DYNAMIC_MAP, into_blocks, scaled_to_one

GROUP = 256  # constants in a group


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Constants in eight bits. (NF4 6)

    codes: (blocks,) uint8. absmax: (groups,) float32, C_g. offset: () float32, the constants' mean.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


def quantize_constants(absmax):
    """(blocks,) float32 -> DoubleQuantized. (NF4 6)"""
    offset = absmax.mean()
    groups = into_blocks(absmax - offset, GROUP)
    largest = groups.abs().amax(1)
    levels = DYNAMIC_MAP.to(absmax.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled_to_one(groups, largest), midpoints, out_int32=True).view(-1)
    return DoubleQuantized(codes[: absmax.numel()].to(torch.uint8), largest, offset)


def dequantize_constants(double):
    """A DoubleQuantized as (blocks,) float32. (NF4 6)"""
    levels = DYNAMIC_MAP.to(double.codes.device)[double.codes.int()]
    blocks = into_blocks(levels, GROUP) * double.absmax[:, None]
    return blocks.view(-1)[: len(levels)] + double.offset
