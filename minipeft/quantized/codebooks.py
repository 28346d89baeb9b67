r"""The levels that codes of a few bits stand for, and the blocks whose values are scaled to them.

    (NF4 1)   q = sort(v, 0, -u) / max v,   v = Phi^-1(p_0 .. p_7),  u = Phi^-1(r_0 .. r_6)

p the first 8 of 9 equal steps from 0.9677083 to 1/2, r the first 7 of 8, so that there is one more
positive level than negative ones and 0 is exact (Dettmers et al., 2023, arXiv 2305.14314). Beside
them: FP4 (a sign, two bits of exponent, one of mantissa), Int4 (-7 .. 7), and the dynamic 8-bit map
(Dettmers et al., 2021, arXiv 2110.02861; 1511.04561): 256 levels, denser towards 0.

    code      0      1      2      3      4      5      6      7   8      9  ...    14   15
    NF4      -1  -0.70  -0.53  -0.39  -0.28  -0.18  -0.09      0   0.08   0.16 ...  0.72   1

Footguns: nine quantiles above zero (the sides exchanged); levels not divided by the largest; a map
with equally many levels in every decade.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

SMALLEST = 1e-38  # constants below it count as it: their reciprocal would be infinite


# -- levels


def normal_quantiles(p, count):
    """Phi^-1 at the first `count` of count + 1 equal steps from p down to 1/2, (count,) float32."""
    steps = torch.linspace(p, 0.5, count + 1, device="cpu")[:-1]  # rounded to float32, as published
    return torch.special.ndtri(steps.double()).float()


def nf4_codebook(offset=0.9677083):
    """The sixteen levels, ascending from -1 to 1, float32. (NF4 1)"""
    v, u = normal_quantiles(offset, 8), normal_quantiles(offset, 7)
    levels = torch.cat([v, torch.zeros(1, device="cpu"), -u]).sort().values
    return levels / levels.max()


def fp4_codebook():
    """The levels of a four-bit float over their largest, by code: sign, exponent (2), mantissa."""
    by_code = [0, 0.0625, 8, 12, 4, 6, 2, 3]  # bitsandbytes' own order of the bit patterns
    half = torch.tensor(by_code, dtype=torch.float32, device="cpu") / 12
    return torch.cat([half, -half])


def int4_codebook():
    """-7/7 .. 7/7: fifteen equally spaced levels; the sixteenth code is not used."""
    return torch.arange(-7, 8, dtype=torch.float32, device="cpu") / 7


def dynamic_map(signed=True):
    """The dynamic 8-bit map, (256,) float32, ascending: D of double_quantization.py.

    Seven decades down from 1, each cut into twice as many equal parts as the one below (unsigned:
    twice as many throughout); the levels are the parts' middles, and 0, and 1.
    """
    levels = [torch.tensor([0.0, 1.0], device="cpu")]
    for decade in range(7):
        parts = 2 ** (decade if signed else decade + 1)
        edges = torch.linspace(0.1, 1, parts + 1, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
        levels += [middles, -middles] if signed else [middles]
    return torch.cat(levels).sort().values


NF4_CODEBOOK, FP4_CODEBOOK, INT4_CODEBOOK = nf4_codebook(), fp4_codebook(), int4_codebook()
CODEBOOKS = {"nf4": NF4_CODEBOOK, "fp4": FP4_CODEBOOK, "int4": INT4_CODEBOOK}
DYNAMIC_MAP = dynamic_map()


def midpoints(kind):
    """(the middles between neighbouring levels, ascending; the codes of the levels in that order,
    or None where codes ascend already).
    """
    levels, order = CODEBOOKS[kind].sort(stable=True)
    middles = (levels[:-1] + levels[1:]) / 2
    return middles, None if torch.equal(levels, CODEBOOKS[kind]) else order


# -- blocks


def into_blocks(values, block_size):
    """(n,) -> (blocks, block_size), the last block filled up with zeros."""
    missing = -values.numel() % block_size
    return (F.pad(values, (0, missing)) if missing else values).view(-1, block_size)


def scaled_to_one(blocks, absmax):
    """Blocks (blocks, size) over their constants: multiplied by the reciprocal, as GPUs do."""
    return blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]
