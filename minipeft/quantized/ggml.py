r"""Block formats of ggml, the library under llama.cpp: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

Every 32 weights of a row share a scale d, in some formats a minimum m too, and are stored with them
in one run of bytes, so that a block can be multiplied without looking anywhere else.

    (GGML 1)   Q4_0, Q5_0:  d = M / -2^(b-1),  M the weight with the largest |w|, with its sign
    (GGML 2)                q = min(2^b - 1, trunc(w / d + 2^(b-1) + 1/2)),   w' = d (q - 2^(b-1))
    (GGML 3)   Q4_1, Q5_1:  d = (max - min) / (2^b - 1),  m = min
    (GGML 4)                q = min(2^b - 1, trunc((w - m) / d + 1/2)),       w' = d q + m
    (GGML 5)   Q8_0:        d = max |w| / 127,  q = round(w / d),             w' = d q
    (GGML 6)   nibbles      byte j of a block holds q_j (low) and q_{j+16} (high)
    (GGML 7)   fifth bits   bit j of a 32-bit little-endian word is the fifth bit of q_j
    (GGML 8)   bits         8 x bytes of a block / 32

    kind    bytes of a block, in this order                bits a weight
    Q4_0    d (2)          16 bytes of nibbles             4.5
    Q4_1    d (2)  m (2)   16 bytes of nibbles             5.0
    Q5_0    d (2)  fifth bits (4)  16 bytes of nibbles     5.5
    Q5_1    d (2)  m (2)  fifth bits (4)  16 of nibbles    6.0
    Q8_0    d (2)          32 signed bytes                 8.5

d and m are stored as float16, but q is found with d in float32. b is 4 or 5; w in R^(... x in) with
`in` a multiple of 32; round() in (GGML 5) takes halves away from zero, as C's roundf does.

Trained parameters: none, this is storage. (GGML 1) spends the sixteenth code on the side where the
largest weight is: -8 stands for it exactly, and its opposite is off by up to one whole d.

Reduces to: the identity on weights that already are d (q - 8), d a float16. Q4_1 with blocks of
another size is the affine int4 of most comparisons (`quantize_on_range`).

How this differs from ggml: plain tensor operations and no K-quants; the bytes are the same. A block
with d below 2^-126 becomes zeros (its 1 / d would be infinite); values whose d does not fit in
float16 are an error that names them.

Footguns: bitsandbytes puts the even element in the high nibble, ggml the first sixteen in the low
ones; the sign of M; half-even rounding in Q8_0; q from the float16 d; blocks across rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

BLOCK = 32
LARGEST = 65504.0  # of float16
SMALLEST = 2.0**-126  # smaller d count as 0


@dataclass(frozen=True)
class Kind:
    """One format: bits of a code, whether a minimum is stored beside the scale."""

    bits: int
    minimum: bool = False

    @property
    def block_bytes(self):
        """Bytes of a block of 32: constants, fifth bits, codes."""
        constants = 4 if self.minimum else 2
        return constants + BLOCK * self.bits // 8


KINDS = {
    "Q4_0": Kind(4),
    "Q4_1": Kind(4, minimum=True),
    "Q5_0": Kind(5),
    "Q5_1": Kind(5, minimum=True),
    "Q8_0": Kind(8),
}


@dataclass(frozen=True, eq=False)
class GGMLQuantized:
    """A tensor in one of the block formats.

    data: (blocks, bytes of a block) uint8, the blocks in row-major order. shape and dtype: the
    tensor's. kind: a key of KINDS.
    """

    data: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: str

    @property
    def bits_per_parameter(self):
        """Exact, everything that is stored included. (GGML 8)"""
        return 8 * KINDS[self.kind].block_bytes / BLOCK

    @property
    def nbytes(self):
        return self.data.numel()


# -- there


@torch.no_grad()
def quantize_ggml(weight, kind="Q4_0"):
    """A float tensor (..., in) as blocks of `kind`; computed in float32. Returns a GGMLQuantized.

    Raises ValueError for an unknown kind, a last dimension that is no multiple of 32, NaN or
    infinity, and values too large for a float16 scale.
    """
    check_input(weight, kind)
    format, blocks = KINDS[kind], weight.reshape(-1, BLOCK).float()
    if format.bits == 8:
        q, d = quantize_by_absmax(blocks)
        parts = [as_bytes(d), q.view(torch.uint8)]
    elif format.minimum:
        q, d, m = quantize_on_range(blocks, format.bits)
        parts = [as_bytes(d), as_bytes(m), *pack(q, format.bits)]
    else:
        q, d = quantize_by_signed_max(blocks, format.bits)
        parts = [as_bytes(d), *pack(q, format.bits)]
    if not d.half().isfinite().all():
        raise ValueError(
            f"the largest value, {weight.abs().max().item():g}, needs a scale beyond float16's "
            f"{LARGEST:g}; scale the weights down or choose another format"
        )
    return GGMLQuantized(torch.cat(parts, 1), tuple(weight.shape), weight.dtype, kind)


def check_input(weight, kind):
    """Raise ValueError for what cannot be quantised."""
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")
    if not weight.is_floating_point():
        raise ValueError(f"a tensor of {weight.dtype} cannot be quantised; convert it to float32")
    if weight.ndim == 0 or weight.numel() == 0 or weight.shape[-1] % BLOCK:
        raise ValueError(
            f"{kind} needs rows of a multiple of {BLOCK} weights, not shape {tuple(weight.shape)}"
        )
    if not weight.float().isfinite().all():
        raise ValueError("the weights hold NaN or infinity in float32, which no code stands for")


def reciprocal(d):
    """1 / d, and 0 where d counts as 0."""
    return torch.where(d.abs() < SMALLEST, torch.zeros_like(d), 1 / d)


def quantize_by_signed_max(blocks, bits):
    """Blocks (n, size) -> codes (n, size) uint8, d (n, 1) float32. (GGML 1) (GGML 2)"""
    half = 2 ** (bits - 1)
    M = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # the first of equals
    d = M / -half  # (GGML 1)
    q = (blocks * reciprocal(d) + (half + 0.5)).trunc().clamp(max=2 * half - 1)  # (GGML 2)
    return q.to(torch.uint8), d


def quantize_on_range(blocks, bits):
    """Blocks (n, any size) -> codes (n, size) uint8, d and m (n, 1) float32. (GGML 3) (GGML 4)"""
    top = 2**bits - 1
    m = blocks.amin(1, keepdim=True)
    d = (blocks.amax(1, keepdim=True) - m) / top  # (GGML 3)
    q = ((blocks - m) * reciprocal(d) + 0.5).trunc().clamp(max=top)  # (GGML 4)
    return q.to(torch.uint8), d, m


def quantize_by_absmax(blocks):
    """Blocks (n, size) -> codes (n, size) int8, d (n, 1) float32. (GGML 5)"""
    d = blocks.abs().amax(1, keepdim=True) / 127
    scaled = blocks * reciprocal(d)
    size = scaled.abs()
    whole = size.floor()
    return (scaled.sign() * (whole + (2 * (size - whole)).floor())).to(torch.int8), d  # (GGML 5)


def as_bytes(constants):
    """(n, 1) float32 -> its float16 as (n, 2) bytes, little end first."""
    return constants.half().view(torch.uint8)


def pack(q, bits):
    """Codes (n, 32) -> [fifth bits (n, 4) where there are five,] nibbles (n, 16), uint8."""
    nibbles = (q[:, :16] & 15) | (q[:, 16:] << 4)  # (GGML 6)
    if bits == 4:
        return [nibbles]
    places = 2 ** torch.arange(8, device=q.device)
    fifth = ((q >> 4).view(-1, 4, 8) * places).sum(2)  # (GGML 7)
    return [fifth.to(torch.uint8), nibbles]


# -- and back


@torch.no_grad()
def dequantize_ggml(quantized, dtype=None):
    """A GGMLQuantized as a tensor of its shape, in its dtype or the one given; d q in float32."""
    format, data = KINDS[quantized.kind], quantized.data
    d, rest = from_bytes(data[:, :2]), data[:, 2:]
    if format.bits == 8:
        values = d * rest.contiguous().view(torch.int8)  # (GGML 5)
    elif format.minimum:
        m, rest = from_bytes(rest[:, :2]), rest[:, 2:]
        values = d * unpack(rest, format.bits) + m  # (GGML 4)
    else:
        values = d * (unpack(rest, format.bits) - 2.0 ** (format.bits - 1))  # (GGML 2)
    return values.view(quantized.shape).to(dtype or quantized.dtype)


def from_bytes(pair):
    """(n, 2) bytes -> (n, 1) float32."""
    return pair.contiguous().view(torch.float16).float()


def unpack(rest, bits):
    """What `pack` gave -> codes (n, 32) float32."""
    nibbles = rest[:, -16:]
    q = torch.cat([nibbles & 15, nibbles >> 4], 1)  # (GGML 6)
    if bits == 5:
        places = torch.arange(8, device=rest.device, dtype=torch.uint8)
        q = q | (((rest[:, :4, None] >> places) & 1).view(-1, BLOCK) << 4)  # (GGML 7)
    return q.float()


@torch.no_grad()
def affine(weight, bits=4, block_size=BLOCK):
    """`weight` as (GGML 4) restores it with blocks of any size, d and m in float16, in its dtype.

    Returns (restored, bits a weight). Raises ValueError for a block size that does not divide.
    """
    if block_size < 1 or weight.numel() % block_size:
        raise ValueError(f"block_size={block_size} does not divide {weight.numel()} weights")
    q, d, m = quantize_on_range(weight.reshape(-1, block_size).float(), bits)
    restored = d.half().float() * q + m.half().float()  # (GGML 4)
    return restored.view(weight.shape).to(weight.dtype), bits + 32 / block_size


def rms(error):
    """Root mean square of a tensor, a float."""
    return math.sqrt(error.double().square().mean().item())
