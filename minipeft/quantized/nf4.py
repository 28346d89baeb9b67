r"""NF4: four-bit NormalFloat with double quantisation (Dettmers et al., 2023, arXiv 2305.14314).

A weight is stored as one of sixteen levels times the largest absolute value of its block of 64. The
levels are quantiles of the normal distribution, because that is how trained weights spread.

    (NF4 1)   q     = sort(v, 0, -u) / max v,   v = Phi^-1(p_0 .. p_7),  u = Phi^-1(r_0 .. r_6)
    (NF4 2)   c_b   = max |w_i| over block b                           the block's constant, float32
    (NF4 3)   k_i   = #{j: m_j < w_i (1 / c_b)},   m_j = (q_j + q_{j+1}) / 2        nearest level
    (NF4 4)   byte  = 16 k_{2i} + k_{2i+1}                             the even one is high
    (NF4 5)   w'_i  = q[k_i] c_b
    (NF4 6)   c'_b  = D[t_b] C_g + mean(c),   t_b the level of D nearest to (c_b - mean(c)) / C_g
    (NF4 7)   bits  = 4 + 32 / 64,  double-quantised 4 + 8 / 64 + 32 / (64 * 256)  a parameter

w the weights in row-major order, float32; p the first 8 of 9 equal steps from 0.9677083 to 1/2, r
the first 7 of 8, so that there is one more positive level than negative ones and 0 is exact. D is
the dynamic 8-bit map (arXiv 1511.04561): 256 levels, denser towards 0; C_g is the largest absolute
value of a group g of 256 centred constants. The last block and the last group may be shorter.

Trained parameters: none, this is storage. |w - w'| <= 0.1520 c_b, half the widest gap of q (between
-1 and -0.696); on normal weights in blocks of 64 the error's root mean square is 0.092 of theirs.
Quantising what was dequantised gives the same codes and constants (single quantisation).

Reduces to: the identity on weights that already are q times an absmax. FP4 (a sign, two bits of
exponent, one of mantissa) and Int4 (-7 .. 7) stand beside it: the same blocks, other levels.

How this differs from bitsandbytes: same codes, bytes and constants. Any block size and any shape:
its AVX512 dequantiser reads the wrong constants where the last dimension is a multiple of 16 but
not of the block size, and the quantiser divides in a short last block (ties may fall elsewhere).
The dynamic map's level is the nearest one; its CPU path looks levels up in a
rounded table, so about one in a thousand differs there. The paper writes FP8 for the second level;
its code, and this file, use the dynamic map.

Footguns: the low nibble first; a constant a row where it is one a block; a constant in float16; >=
for > at the midpoints; forgetting to add the mean back; NaN, which has no level (an error here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

GROUP = 256  # constants in a group of the second level
CPU_TILE = 2**17  # weights worked on at once: what a core's cache holds
SMALLEST = 1e-38  # constants below it count as it: their reciprocal would be infinite


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
    """The dynamic 8-bit map, (256,) float32, ascending: D of (NF4 6).

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


@dataclass(frozen=True, eq=False)
class DoubleQuantized:
    """Constants in eight bits. (NF4 6)

    codes: (blocks,) uint8. absmax: (groups,) float32, C_g. offset: () float32, the constants' mean.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    offset: torch.Tensor


@dataclass(frozen=True, eq=False)
class Quantized:
    """A tensor in four bits an element.

    packed: (ceil(n / 2), 1) uint8. absmax: (blocks,) float32, or a DoubleQuantized. shape and
    dtype: the tensor's. kind: "nf4", "fp4" or "int4".
    """

    packed: torch.Tensor
    absmax: torch.Tensor | DoubleQuantized
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_size: int = 64
    kind: str = "nf4"

    @property
    def double_quant(self):
        return isinstance(self.absmax, DoubleQuantized)

    @property
    def constants(self):
        """c_b or c'_b, (blocks,) float32."""
        return dequantize_constants(self.absmax) if self.double_quant else self.absmax

    @property
    def numel(self):
        return math.prod(self.shape)

    @property
    def bits_per_parameter(self):
        """Stored bits over elements, padding included, the mean's one float not. (NF4 7)"""
        if self.double_quant:
            constants = 8 * self.absmax.codes.numel() + 32 * self.absmax.absmax.numel()
        else:
            constants = 32 * self.absmax.numel()
        return (8 * self.packed.numel() + constants) / self.numel

    @property
    def nbytes(self):
        """Bytes of everything that is stored for this tensor, the mean included."""
        mean = 4 if self.double_quant else 0
        return round(self.bits_per_parameter * self.numel / 8) + mean


# -- there


def quantize_nf4(weight, block_size=64, double_quant=False):
    """A float tensor of any shape and dtype as NF4; computed in float32. Returns a Quantized.

    Raises ValueError for NaN or infinity (naming the first), an empty tensor, a bad block size.
    """
    return quantize(weight, "nf4", block_size, double_quant)


def quantize_fp4(weight, block_size=64, double_quant=False):
    """As quantize_nf4, with the levels of a four-bit float."""
    return quantize(weight, "fp4", block_size, double_quant)


def quantize_int4(weight, block_size=64, double_quant=False):
    """As quantize_nf4, with fifteen equally spaced levels."""
    return quantize(weight, "int4", block_size, double_quant)


@torch.no_grad()
def quantize(weight, kind, block_size=64, double_quant=False):
    """Four bits a weight with the levels of CODEBOOKS[kind]; see quantize_nf4."""
    check_input(weight, kind, block_size)
    flat = weight.reshape(-1)
    n, tile = flat.numel(), tile_size(flat, block_size)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), device=flat.device)
    for first in range(0, n, tile):  # a tile stays in the cache through all of its steps
        blocks = into_blocks(flat[first : first + tile].float(), block_size)
        c = absmax[first // block_size :][: len(blocks)]
        torch.amax(blocks.abs(), 1, out=c)  # (NF4 2)
        codes = nearest(scaled_to_one(blocks, c), kind).view(-1)
        room = packed[first // 2 :][: tile // 2]
        pack(codes[: 2 * room.numel()], room)
    check_finite(weight, absmax)
    constants = quantize_constants(absmax) if double_quant else absmax
    return Quantized(
        packed[:, None], constants, tuple(weight.shape), weight.dtype, block_size, kind
    )


def check_input(weight, kind, block_size):
    """Raise ValueError for what cannot be quantised."""
    if kind not in CODEBOOKS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(CODEBOOKS)}")
    if not isinstance(block_size, int) or block_size < 2 or block_size % 2:
        raise ValueError(f"block_size={block_size!r} is not a positive even number; 64 is usual")
    if not weight.is_floating_point():
        raise ValueError(f"a tensor of {weight.dtype} cannot be quantised; convert it to float32")
    if not weight.numel():
        raise ValueError(f"a tensor of shape {tuple(weight.shape)} has nothing to quantise")


def check_finite(weight, absmax):
    """Raise ValueError naming the first value that no level stands for; absmax has seen them."""
    if weight.is_meta or absmax.isfinite().all():
        return
    where = (~weight.float().isfinite()).nonzero()[0].tolist()
    raise ValueError(
        f"the value at {tuple(where)} is {weight[tuple(where)].item()}; only numbers that are "
        "finite in float32 can be quantised"
    )


def tile_size(tensor, block_size):
    """Elements to work on at once: whole blocks and whole bytes; on a GPU everything."""
    if tensor.device.type != "cpu":
        return 2 * block_size * -(-tensor.numel() // block_size)
    return 2 * block_size * max(1, CPU_TILE // (2 * block_size))


def into_blocks(values, block_size):
    """(n,) -> (blocks, block_size), the last block filled up with zeros."""
    missing = -values.numel() % block_size
    return (F.pad(values, (0, missing)) if missing else values).view(-1, block_size)


def scaled_to_one(blocks, absmax):
    """Blocks (blocks, size) over their constants: multiplied by the reciprocal, as GPUs do."""
    return blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]


def nearest(scaled, kind):
    """The code of the level nearest to each value in [-1, 1], uint8; the lower one in a tie.

    Counting the midpoints below a value is fifteen passes of two instructions over the cache, and
    faster than a search. (NF4 3)
    """
    codebook = CODEBOOKS[kind]
    levels, order = codebook.sort(stable=True)
    count = torch.zeros_like(scaled, dtype=torch.uint8)
    above = torch.empty_like(scaled, dtype=torch.bool)
    for midpoint in ((levels[:-1] + levels[1:]) / 2).tolist():
        torch.gt(scaled, midpoint, out=above)
        count += above.view(torch.uint8)
    if torch.equal(levels, codebook):
        return count
    return order.to(scaled.device, torch.uint8)[count.int()]  # FP4's codes are not in order


def pack(codes, out):
    """Two codes a byte, (2 n,) uint8 -> `out` (n,) uint8. (NF4 4)"""
    torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=out)


def quantize_constants(absmax):
    """(blocks,) float32 -> DoubleQuantized. (NF4 6)"""
    offset = absmax.mean()
    groups = into_blocks(absmax - offset, GROUP)
    largest = groups.abs().amax(1)
    levels = DYNAMIC_MAP.to(absmax.device)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = torch.bucketize(scaled_to_one(groups, largest), midpoints, out_int32=True).view(-1)
    return DoubleQuantized(codes[: absmax.numel()].to(torch.uint8), largest, offset)


# -- and back


@torch.no_grad()
def dequantize_nf4(quantized, dtype=None):
    """A Quantized (of any kind) as a tensor of its shape, in its dtype or the one given.

    The product is taken in float32 and rounded once to the dtype. (NF4 5)
    """
    flat, size = quantized.packed.view(-1), quantized.block_size
    constants = quantized.constants
    n, tile = quantized.numel, tile_size(flat, size)
    out = torch.empty(len(constants), size, dtype=dtype or quantized.dtype, device=flat.device)
    pairs = pair_table(quantized.kind, flat.device)
    for first in range(0, n, tile):
        numbers = flat[first // 2 :][: tile // 2].int()
        levels = pairs.index_select(0, numbers).view(torch.float32)
        c = constants[first // size :][: tile // size, None]
        room = out[first // size :][: tile // size]
        torch.mul(into_blocks(levels, size), c, out=room)
    return out.view(-1)[:n].view(quantized.shape)


def pair_table(kind, device):
    """Byte -> the two levels it stands for, (256,) int64: two float32 carried as one number,
    because looking up one number of eight bytes is twice as fast as two of four.
    """
    levels = F.pad(CODEBOOKS[kind], (0, 16 - len(CODEBOOKS[kind])))
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)  # (NF4 4), backwards
    return pairs.view(torch.int64).view(-1).to(device)


def dequantize_constants(double):
    """A DoubleQuantized as (blocks,) float32. (NF4 6)"""
    levels = DYNAMIC_MAP.to(double.codes.device)[double.codes.int()]
    blocks = into_blocks(levels, GROUP) * double.absmax[:, None]
    return blocks.view(-1)[: len(levels)] + double.offset


# -- slowly, and with everything to see


@dataclass(frozen=True, eq=False)
class Work:
    """Every intermediate of quantising one tensor, by the names in the header.

    blocks: w, (blocks, block_size), zeros behind the last weight. absmax: c. scaled: w / c.
    midpoints: m. codes: k. constants: what is stored for c, as float32 again. restored: w', of the
    weight's shape. error: restored - weight. quantized: the finished Quantized.
    """

    blocks: torch.Tensor
    absmax: torch.Tensor
    scaled: torch.Tensor
    midpoints: torch.Tensor
    codes: torch.Tensor
    constants: torch.Tensor
    restored: torch.Tensor
    error: torch.Tensor
    quantized: Quantized


@torch.no_grad()
def show_work(weight, block_size=64, double_quant=False, kind="nf4"):
    """What `quantize` does, one step a line, nothing tiled or counted. Returns a Work."""
    check_input(weight, kind, block_size)
    blocks = into_blocks(weight.reshape(-1).float(), block_size)
    absmax = blocks.abs().max(1).values  # (NF4 2)
    check_finite(weight, absmax)
    scaled = scaled_to_one(blocks, absmax)
    levels, order = CODEBOOKS[kind].to(weight.device).sort(stable=True)
    midpoints = (levels[:-1] + levels[1:]) / 2
    codes = order[torch.bucketize(scaled, midpoints)]  # (NF4 3)
    kept = codes.view(-1)[: weight.numel() + weight.numel() % 2].to(torch.uint8)
    packed = (kept[0::2] * 16 + kept[1::2])[:, None]  # (NF4 4)
    stored = quantize_constants(absmax) if double_quant else absmax
    constants = dequantize_constants(stored) if double_quant else absmax
    values = CODEBOOKS[kind].to(weight.device)[codes] * constants[:, None]  # (NF4 5)
    restored = values.view(-1)[: weight.numel()].view(weight.shape).to(weight.dtype)
    quantized = Quantized(packed, stored, tuple(weight.shape), weight.dtype, block_size, kind)
    error = restored - weight
    return Work(blocks, absmax, scaled, midpoints, codes, constants, restored, error, quantized)
