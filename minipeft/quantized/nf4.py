r"""NF4: four-bit NormalFloat with double quantisation (Dettmers et al., 2023, arXiv 2305.14314).

A weight is stored as one of sixteen levels times the largest absolute value of its block of 64. The
levels are quantiles of the normal distribution, because that is how trained weights spread.

    (NF4 2)   c_b   = max |w_i| over block b                           the block's constant, float32
    (NF4 3)   k_i   = #{j: m_j < w_i (1 / c_b)},   m_j = (q_j + q_{j+1}) / 2        nearest level
    (NF4 4)   byte  = 16 k_{2i} + k_{2i+1}                             the even one is high
    (NF4 5)   w'_i  = q[k_i] c_b
    (NF4 7)   bits  = 4 + 32 / 64,  double-quantised 4 + 8 / 64 + 32 / (64 * 256)  a parameter

w the weights in row-major order, float32; q the sixteen levels, ascending from -1 to 1 (NF4 1, in
codebooks.py); c' the constants after double quantisation (NF4 6, in double_quantization.py). The
last block may be shorter. nf4_tables.py computes the same bits faster, kernels/nf4.py on a GPU.

Trained parameters: none, this is storage. |w - w'| <= 0.1520 c_b, half the widest gap of q (between
-1 and -0.696); on normal weights in blocks of 64 the error's root mean square is 0.092 of theirs.
Quantising what was dequantised gives the same codes and constants (single quantisation).

Reduces to: the identity on weights that already are q times an absmax. FP4 (a sign, two bits of
exponent, one of mantissa) and Int4 (-7 .. 7) stand beside it: the same blocks, other levels.

How this differs from bitsandbytes: same codes, bytes and constants. Any block size and any shape:
its AVX512 dequantiser reads the wrong constants where the last dimension is a multiple of 16 but
not of the block size, and the quantiser divides in a short last block (ties may fall elsewhere).

Footguns: the low nibble first; a constant a row where it is one a block; a constant in float16; >=
for > at the midpoints; NaN, which has no level (an error here).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never
from minipeft.quantized.codebooks import (
    CODEBOOKS,
    DYNAMIC_MAP,
    FP4_CODEBOOK,
    INT4_CODEBOOK,
    NF4_CODEBOOK,
    dynamic_map,
    into_blocks,
    midpoints,
    scaled_to_one,
)
from minipeft.quantized.double_quantization import (
    GROUP,
    DoubleQuantized,
    dequantize_constants,
    quantize_constants,
)

__all__ = [  # names of the two files behind this one that its readers expect here
    "DYNAMIC_MAP",
    "FP4_CODEBOOK",
    "GROUP",
    "INT4_CODEBOOK",
    "NF4_CODEBOOK",
    "dynamic_map",
]
TABLES = {"devices": ("cpu", "cuda", "mps"), "capability": (0, 0)}  # where plain PyTorch runs
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the Triton kernels read and write


def kernel(**settings):
    """The seam to the Triton kernels: not by default, as long as no measurement shows a win."""
    where = {"capability": (7, 5), "dtypes": FLOATS, "wins": never}
    return fast_path("minipeft.kernels.nf4", **where, **settings)


def writes_floats(*args):
    """The last argument, the dtype to write, and the block size are what a kernel takes."""
    return args[-1] in FLOATS and args[-3] <= 4096


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
    packed, absmax = quantize_blocks(weight.reshape(-1), kind, block_size)
    check_finite(weight, absmax)
    constants = quantize_constants(absmax) if double_quant else absmax
    return Quantized(
        packed[:, None], constants, tuple(weight.shape), weight.dtype, block_size, kind
    )


@kernel(supports=lambda flat, kind, block_size: block_size <= 4096)
@fast_path("minipeft.quantized.nf4_tables", **TABLES)
def quantize_blocks(flat, kind, block_size):
    """(n,) float -> packed (ceil(n / 2),) uint8 and absmax (ceil(n / block_size),) float32."""
    blocks = into_blocks(flat.float(), block_size)
    absmax = blocks.abs().amax(1)  # (NF4 2)
    codes = nearest(scaled_to_one(blocks, absmax), kind).view(-1)
    return pack(codes[: flat.numel() + flat.numel() % 2]), absmax


def nearest(scaled, kind):
    """The code of the level nearest to each value in [-1, 1], uint8; the lower one in a tie."""
    between, order = midpoints(kind)
    codes = torch.bucketize(scaled, between.to(scaled.device))  # (NF4 3)
    if order is not None:  # FP4's codes do not ascend
        codes = order.to(scaled.device)[codes]
    return codes.to(torch.uint8)


def pack(codes):
    """Two codes a byte, (2 n,) uint8 -> (n,) uint8. (NF4 4)"""
    return codes[0::2] * 16 + codes[1::2]


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


# -- and back


@torch.no_grad()
def dequantize_nf4(quantized, dtype=None):
    """A Quantized (of any kind) as a tensor of its shape, in its dtype or the one given.

    The product is taken in float32 and rounded once to the dtype. (NF4 5)
    """
    packed, c = quantized.packed.view(-1), quantized.absmax
    how = (quantized.numel, quantized.block_size, quantized.kind, dtype or quantized.dtype)
    if quantized.double_quant:
        flat = dequantize_doubled(packed, c.codes, c.absmax, c.offset, *how)
    else:
        flat = dequantize_blocks(packed, c, *how)
    return flat.view(quantized.shape)


@kernel(supports=writes_floats)
@fast_path("minipeft.quantized.nf4_tables", **TABLES)
def dequantize_blocks(packed, absmax, numel, block_size, kind, dtype):
    """packed (ceil(n / 2),) uint8 and absmax (blocks,) float32 -> (n,) of `dtype`."""
    levels = F.pad(CODEBOOKS[kind], (0, 16 - len(CODEBOOKS[kind]))).to(packed.device)
    codes = torch.stack([packed >> 4, packed & 15], -1).view(-1)[:numel]
    values = into_blocks(levels[codes.int()], block_size) * absmax[:, None]  # (NF4 5)
    return values.view(-1)[:numel].to(dtype)


@kernel(supports=writes_floats)
def dequantize_doubled(packed, codes, absmax, offset, numel, block_size, kind, dtype):
    """`dequantize_blocks` with the constants in eight bits: codes (blocks,) uint8, absmax (groups,)
    and offset () float32.
    """
    constants = dequantize_constants(DoubleQuantized(codes, absmax, offset))
    return dequantize_blocks(packed, constants, numel, block_size, kind, dtype)


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
    """What `quantize` and `dequantize_nf4` do, one step a line. Returns a Work."""
    check_input(weight, kind, block_size)
    blocks = into_blocks(weight.reshape(-1).float(), block_size)
    absmax = blocks.abs().max(1).values
    check_finite(weight, absmax)
    scaled, codebook = scaled_to_one(blocks, absmax), CODEBOOKS[kind].to(weight.device)
    codes = nearest(scaled, kind).long()
    kept = codes.view(-1)[: weight.numel() + weight.numel() % 2].to(torch.uint8)
    stored = quantize_constants(absmax) if double_quant else absmax
    constants = dequantize_constants(stored) if double_quant else absmax
    values = codebook[codes] * constants[:, None]
    restored = values.view(-1)[: weight.numel()].view(weight.shape).to(weight.dtype)
    quantized = Quantized(
        pack(kept)[:, None], stored, tuple(weight.shape), weight.dtype, block_size, kind
    )
    between, error = midpoints(kind)[0], restored - weight
    return Work(blocks, absmax, scaled, between, codes, constants, restored, error, quantized)
