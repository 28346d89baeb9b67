r"""NF4 on a GPU: four bits a weight there in one launch, and back in one, constants included.

Twins of nf4.py's `quantize_blocks`, `dequantize_blocks` and `dequantize_doubled`; same bits.

A program takes BLOCKS blocks of w as a tile (BLOCKS, SIZE), so that all that belongs to a block is
in one program and a constant is read or written once:

    there   c_b = max_i |w_bi|                    a row's maximum, in registers
            k   = sum_j [m_j < w (1 / c)]         fifteen comparisons: no branch, no search
            (BLOCKS, SIZE) -> (BLOCKS, SIZE / 2, 2) -> split -> 16 k_even + k_odd
    back    byte -> q[byte >> 4], q[byte & 15]    sixteen floats, one line of the cache
            c_b = D[t_b] C_g + mean               the double quantisation, folded in
            interleave -> w' = q c

Blocks whose size is no power of two leave lanes idle (the tile is rounded up), nothing else.

Bits: 1 / c is `div_rn`, because `/` compiles to an approximate division and codes at a midpoint
would move; D C + mean and q c are not contracted into one instruction (enable_fp_fusion=False).

Bytes that must move, a weight of b bytes (blocks of 64, groups of 256):

    there    b + 1/2 + 4/64             bfloat16 2.56
    back     1/2 + 4/64 + b             bfloat16 2.56, doubled 1/2 + 1/64 + 4/16384 + b = 2.52

so the floor of dequantising N K weights to bfloat16 is 2.52 N K / bandwidth: 165 us for 4096 x 4096
at 256 GB/s, 23 us for GPT-2's 768 x 3072. In plain PyTorch nf4_tables.py moves 14.5 bytes a weight
in three launches (int32 numbers, pairs of levels, products), and three more for the constants.

Where it wins: weights of 1M elements and more, where bytes count. Where not: small ones, where the
launch (5 to 9 us) costs more than the bytes. The sixteen levels are looked up in the cache, one
load a weight; a tree of fifteen selects would cost more than the bytes on GPUs with fast memory.
Nothing here is chosen by default before it was measured on a GPU.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch.nn import functional as F

from minipeft.kernels import AotCase
from minipeft.quantized import codebooks
from minipeft.quantized.codebooks import CODEBOOKS, DYNAMIC_MAP, midpoints
from minipeft.quantized.double_quantization import GROUP, quantize_constants

TILE = 1024  # weights a program works on, 8 a thread: stores of bfloat16 are 16 bytes wide
WARPS = 4
SMALLEST = tl.constexpr(codebooks.SMALLEST)


@triton.jit
def quantize_kernel(
    t_values,  # (numel,) any float
    t_midpoints,  # (MIDPOINTS,) float32, ascending
    t_order,  # (MIDPOINTS + 1,) uint8, the level's code; read where codes do not ascend
    t_packed,  # (ceil(numel / 2),) uint8, out
    t_absmax,  # (ceil(numel / SIZE),) float32, out
    numel,
    n_bytes,  # ceil(numel / 2), given: where 16 divides it Triton knows, and loads are wide
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,  # SIZE / 2 rounded up to a power of two
    BLOCKS: tl.constexpr,
    MIDPOINTS: tl.constexpr,
    ASCENDING: tl.constexpr,
):
    """BLOCKS blocks of the tensor."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    column = tl.arange(0, 2 * PAIRS)[None, :]
    place = block[:, None] * SIZE + column
    inside = (column < SIZE) & (place < numel)
    b_values = tl.load(t_values + place, mask=inside, other=0.0).to(tl.float32)

    b_absmax = tl.max(tl.abs(b_values), 1)
    wrong = tl.max((b_values != b_values).to(tl.int32), 1)  # a GPU's maximum passes NaN over
    b_absmax = tl.where(wrong > 0, float("nan"), b_absmax)
    tl.store(t_absmax + block, b_absmax, mask=block * SIZE < numel)

    smallest = tl.full([BLOCKS], SMALLEST, tl.float32)
    b_scaled = b_values * tl.div_rn(1.0, tl.maximum(b_absmax, smallest))[:, None]
    b_codes = tl.zeros([BLOCKS, 2 * PAIRS], tl.int32)
    for j in tl.static_range(MIDPOINTS):
        b_codes += (b_scaled > tl.load(t_midpoints + j)).to(tl.int32)
    if not ASCENDING:
        b_codes = tl.load(t_order + b_codes).to(tl.int32)

    b_even, b_odd = tl.split(tl.reshape(b_codes, [BLOCKS, PAIRS, 2]))
    pair = tl.arange(0, PAIRS)[None, :]
    byte = block[:, None] * (SIZE // 2) + pair
    inside = (pair < SIZE // 2) & (byte < n_bytes)
    tl.store(t_packed + byte, (b_even * 16 + b_odd).to(tl.uint8), mask=inside)


@triton.jit
def load_constants(t_absmax, t_largest, t_offset, t_map, block, inside, GROUP: tl.constexpr):
    """c_b, float32; D[t_b] C_g + mean where GROUP is not 0. Shapes are `block`'s."""
    b_absmax = tl.load(t_absmax + block, mask=inside, other=0)
    if GROUP:
        b_level = tl.load(t_map + b_absmax.to(tl.int32))
        b_largest = tl.load(t_largest + block // GROUP, mask=inside, other=0.0)
        return b_level * b_largest + tl.load(t_offset)
    else:
        return b_absmax


@triton.jit
def dequantize_kernel(
    t_packed,  # (ceil(numel / 2),) uint8
    t_absmax,  # (blocks,) float32, or uint8 codes where GROUP is not 0
    t_largest,  # (groups,) float32
    t_offset,  # () float32
    t_levels,  # (16,) float32
    t_map,  # (256,) float32
    t_out,  # (numel,) any float, out
    numel,
    n_bytes,  # ceil(numel / 2), given: where 16 divides it Triton knows, and loads are wide
    SIZE: tl.constexpr,
    PAIRS: tl.constexpr,  # SIZE / 2 rounded up to a power of two
    BLOCKS: tl.constexpr,
    GROUP: tl.constexpr,  # constants in a group, 0 without double quantisation
):
    """BLOCKS blocks of the tensor."""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = block * SIZE < numel
    b_absmax = load_constants(t_absmax, t_largest, t_offset, t_map, block, there, GROUP)

    pair = tl.arange(0, PAIRS)[None, :]
    byte = block[:, None] * (SIZE // 2) + pair
    inside = (pair < SIZE // 2) & (byte < n_bytes)
    b_bytes = tl.load(t_packed + byte, mask=inside, other=0).to(tl.int32)
    b_even = tl.load(t_levels + (b_bytes >> 4))
    b_odd = tl.load(t_levels + (b_bytes & 15))

    column = tl.arange(0, 2 * PAIRS)[None, :]
    place = block[:, None] * SIZE + column
    b_out = tl.interleave(b_even, b_odd) * b_absmax[:, None]
    tl.store(t_out + place, b_out, mask=(column < SIZE) & (place < numel))


# -- launchers: names and arguments of the definitions


def quantize_blocks(flat, kind, block_size):
    """(n,) float -> packed (ceil(n / 2),) uint8 and absmax (ceil(n / block_size),) float32."""
    flat, numel = flat.contiguous(), flat.numel()  # an expanded or strided row is one, too
    blocks = triton.cdiv(numel, block_size)
    packed = torch.empty(triton.cdiv(numel, 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    between, order, _ = tables(kind, flat.device)
    shape = tile(block_size)
    quantize_kernel[(triton.cdiv(blocks, shape["BLOCKS"]),)](
        flat,
        between,
        order,
        packed,
        absmax,
        numel,
        packed.numel(),
        **shape,
        MIDPOINTS=len(between),
        ASCENDING=kind != "fp4",
        num_warps=WARPS,
    )
    return packed, absmax


def dequantize_blocks(packed, absmax, numel, block_size, kind, dtype):
    """packed (ceil(n / 2),) uint8 and absmax (blocks,) float32 -> (n,) of `dtype`."""
    return launch(packed, absmax, absmax, absmax, numel, block_size, kind, dtype, 0)


def dequantize_doubled(packed, codes, absmax, offset, numel, block_size, kind, dtype):
    """The same from constants in eight bits: codes (blocks,) uint8, absmax (groups,) and offset ()
    float32.
    """
    return launch(packed, codes, absmax, offset, numel, block_size, kind, dtype, GROUP)


def launch(packed, absmax, largest, offset, numel, block_size, kind, dtype, group):
    """One launch of `dequantize_kernel`, (numel,) of `dtype`."""
    out = torch.empty(numel, dtype=dtype, device=packed.device)
    shape = tile(block_size)
    dequantize_kernel[(triton.cdiv(absmax.numel(), shape["BLOCKS"]),)](
        packed.contiguous(),
        absmax.contiguous(),
        largest.contiguous(),
        offset,
        tables(kind, packed.device)[2],
        dynamic_map(packed.device),
        out,
        numel,
        packed.numel(),
        **shape,
        GROUP=group,
        num_warps=WARPS,
        enable_fp_fusion=False,
    )
    return out


def tile(block_size):
    """The tile's constants: as many blocks as fill TILE, at least one."""
    pairs = triton.next_power_of_2(block_size // 2)
    return {"SIZE": block_size, "PAIRS": pairs, "BLOCKS": max(1, TILE // (2 * pairs))}


@functools.cache
def tables(kind, device):
    """(midpoints float32, their levels' codes uint8, the sixteen levels float32) on the device."""
    between, order = midpoints(kind)
    order = torch.arange(len(between) + 1) if order is None else order
    levels = F.pad(CODEBOOKS[kind], (0, 16 - len(CODEBOOKS[kind])))
    return between.to(device), order.to(device, torch.uint8), levels.to(device)


@functools.cache
def dynamic_map(device):
    """D, (256,) float32, on the device."""
    return DYNAMIC_MAP.to(device)


# -- for the tests


def quantize_examples(device, dtype=torch.float32):
    """Short last blocks, an odd end, a stride, an expanded number, one number, zeros; blocks of 64,
    of 6 (no power of two) and of 32; levels that ascend and that do not.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(7, 130, generator=generator).to(device, dtype)
    found = [(drawn.view(-1), "nf4", 64), (drawn[:3].view(-1), "fp4", 6)]
    found += [(drawn[:, ::3][1], "int4", 32), (drawn[0, :1].expand(70), "nf4", 64)]
    found += [(drawn[0, :1], "nf4", 6), (torch.zeros(65, device=device, dtype=dtype), "nf4", 64)]
    if dtype == torch.float32:  # of bfloat16's subnormals the interpreter makes other numbers
        tiny = 1e-39 * torch.randn(70, generator=generator)  # a block's largest is below SMALLEST
        found.append((tiny.to(device), "nf4", 64))
    return found


def dequantize_examples(device, dtype=torch.float32):
    """What quantize_examples come to."""
    return [
        (*quantize_blocks(flat, kind, size), flat.numel(), size, kind, dtype)
        for flat, kind, size in quantize_examples(device, dtype)
    ]


def doubled_examples(device, dtype=torch.float32):
    """The same with constants in eight bits; the first has more than one group of them."""
    generator = torch.Generator().manual_seed(0)
    many = torch.randn(6 * GROUP + 9, generator=generator).to(device)
    found = []
    for flat, kind, size in [(many, "nf4", 4), *quantize_examples(device, dtype)]:
        packed, absmax = quantize_blocks(flat, kind, size)
        c = quantize_constants(absmax)
        stored = packed, c.codes, c.absmax, c.offset
        found.append((*stored, flat.numel(), size, kind, dtype))
    return found


EXAMPLES = {
    "quantize_blocks": quantize_examples,
    "dequantize_blocks": dequantize_examples,
    "dequantize_doubled": doubled_examples,
}


def _quantize_case(dtype, block_size, kind):
    floats = {"t_values": f"*{dtype}", "t_midpoints": "*fp32", "t_absmax": "*fp32"}
    bytes_ = {"t_order": "*u8", "t_packed": "*u8", "numel": "i32", "n_bytes": "i32"}
    how = {"MIDPOINTS": len(midpoints(kind)[0]), "ASCENDING": kind != "fp4"}
    signature = floats | bytes_
    constants = tile(block_size) | how
    wide = {"contains": ("ld.global.v4.b32",) if block_size == 64 else (), "num_warps": WARPS}
    return AotCase(quantize_kernel, signature, constants, tuple(signature), **wide)


def _dequantize_case(dtype, block_size, group):
    signature = dict.fromkeys(("t_largest", "t_offset", "t_levels", "t_map"), "*fp32")
    signature |= {"t_packed": "*u8", "t_absmax": "*u8" if group else "*fp32"}
    signature |= {"t_out": f"*{dtype}", "numel": "i32", "n_bytes": "i32"}
    constants = tile(block_size) | {"GROUP": group}
    wide = {"contains": ("st.global.v4.b32",), "num_warps": WARPS}  # 16 bytes a thread
    return AotCase(dequantize_kernel, signature, constants, tuple(signature), **wide)


AOT = [_quantize_case("fp32", 64, "nf4"), _quantize_case("bf16", 6, "fp4")]
AOT += [_dequantize_case(dtype, 64, GROUP) for dtype in ("fp32", "fp16", "bf16")]
AOT += [_dequantize_case("fp32", 4096, 0)]
