r"""y = W' x + b for a token or a few, straight from the packed four bits: decoding with NF4.

Twin of nf4_linear.py's `frozen_product`, which dequantises W' (out, in) to memory and multiplies.

A program computes ROWS elements of y, for one token. It walks along the inputs in steps of BLOCKS
blocks of SIZE weights, a tile (ROWS, BLOCKS, SIZE / 2) of bytes:

    y_n = sum_blocks c_nb (sum_pairs q[byte >> 4] x_2i + q[byte & 15] x_{2i+1})

    c (ROWS, BLOCKS) is loaded once a block, not once a byte, D C + mean folded in; x (BLOCKS, SIZE
    / 2) twice, even and odd; the sums stay in float32 registers, are added up at the end, then the
    bias. W' is never rounded to the type of x, so y is nearer to the exact product than the
    definition's in half precision.

Rows must begin with a block (block_size divides in), else a block has two rows; and a block's size
must be a power of two. Other shapes take the definition.

Bytes that must move: in out (1/2 + 1/64 + 4/16384) = 0.516 a weight, and 2 (in + out) for x and y,
so against a product in bfloat16 (2 a weight) the bound is 3.88 times. What is asked for is more: x
is read again for each ROWS rows, 2 / ROWS bytes a weight, from the cache. Several tokens read W'
once each, from the second-level cache if it fits.

Where it wins: W' of several million elements, in a CUDA graph. Where not: GPT-2's 768 x 2304 is 0.9
MB packed, 4 us of traffic at 256 GB/s, and a launch costs 5 to 9; more than TOKENS tokens, where a
product of matrices (dequantise, then multiply) reads W' once for all. It has no backward pass; the
gradient goes through nf4_linear.py's (Frozen 2). Not chosen by default before it was measured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minipeft.kernels import AotCase
from minipeft.kernels.nf4 import dynamic_map, load_constants, tables
from minipeft.quantized.double_quantization import GROUP
from minipeft.quantized.nf4 import quantize

ROWS = 4  # outputs a program computes
TILE = 512  # weights of a row in a step, 16 a thread with WARPS: 8 bytes a load
WARPS = 4


@triton.jit
def gemv_kernel(
    t_x,  # (tokens, WIDTH) any float
    t_packed,  # (n_out * WIDTH / 2,) uint8
    t_absmax,  # (n_out * WIDTH / SIZE,) float32, or uint8 codes where GROUP is not 0
    t_largest,  # (groups,) float32
    t_offset,  # () float32
    t_levels,  # (16,) float32
    t_map,  # (256,) float32
    t_bias,  # (n_out,) any float; read if BIASED
    t_out,  # (tokens, n_out) any float, out
    n_out,
    n_blocks,  # of a row: WIDTH / SIZE
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BIASED: tl.constexpr,
):
    """ROWS outputs of one token."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    first = row.to(tl.int64)[:, None] * n_blocks  # the row's first block in the tensor
    pair = tl.arange(0, SIZE // 2)[None, :]
    b_sum = tl.zeros([ROWS, BLOCKS, SIZE // 2], tl.float32)
    for step in range(0, n_blocks, BLOCKS):
        block = step + tl.arange(0, BLOCKS)
        there = block < n_blocks
        p_x = t_x + token * n_blocks * SIZE + block[:, None] * SIZE + 2 * pair
        b_x_even = tl.load(p_x, mask=there[:, None], other=0.0).to(tl.float32)
        b_x_odd = tl.load(p_x + 1, mask=there[:, None], other=0.0).to(tl.float32)

        block = first + block[None, :]
        inside = (row < n_out)[:, None] & there[None, :]
        b_absmax = load_constants(t_absmax, t_largest, t_offset, t_map, block, inside, GROUP)
        p_packed = t_packed + block[:, :, None] * (SIZE // 2) + pair[None, :, :]
        b_bytes = tl.load(p_packed, mask=inside[:, :, None], other=0).to(tl.int32)
        b_even = tl.load(t_levels + (b_bytes >> 4)) * b_x_even[None, :, :]
        b_odd = tl.load(t_levels + (b_bytes & 15)) * b_x_odd[None, :, :]
        b_sum += (b_even + b_odd) * b_absmax[:, :, None]
    b_out = tl.sum(tl.sum(b_sum, 2), 1)
    if BIASED:
        b_out += tl.load(t_bias + row, mask=row < n_out, other=0.0).to(tl.float32)
    tl.store(t_out + token * n_out + row, b_out, mask=row < n_out)


def frozen_product(x, quantized, bias):
    """W' x + b, x (..., in) with few tokens, W' a Quantized (out, in), b (out,) or None."""
    out, width = quantized.shape
    size, constants, doubled = quantized.block_size, quantized.absmax, quantized.double_quant
    rows = x.reshape(-1, width).contiguous()
    y = torch.empty(len(rows), out, dtype=x.dtype, device=x.device)
    gemv_kernel[(triton.cdiv(out, ROWS), len(rows))](
        rows,
        quantized.packed.contiguous(),
        (constants.codes if doubled else constants).contiguous(),
        constants.absmax if doubled else constants,
        constants.offset if doubled else constants,
        tables(quantized.kind, x.device)[2],
        dynamic_map(x.device),
        rows if bias is None else bias.contiguous(),
        y,
        out,
        width // size,
        SIZE=size,
        BLOCKS=blocks_a_step(size, width),
        ROWS=ROWS,
        GROUP=GROUP if doubled else 0,
        BIASED=bias is not None,
        num_warps=WARPS,
    )
    return y.view(*x.shape[:-1], out)


def blocks_a_step(size, width):
    """As many blocks as fill TILE, no more than a row has (rounded up to a power of two)."""
    return max(1, min(TILE // size, triton.next_power_of_2(width // size)))


def examples(device, dtype=torch.float32):
    """One token and a few, a row shorter and longer than a step, odd numbers of outputs, each kind
    of levels and constants, with and without bias.
    """
    generator = torch.Generator().manual_seed(0)

    def case(tokens, out, width, kind, size, doubled, biased):
        x, W, b = (
            torch.randn(*n, generator=generator) for n in ((*tokens, width), (out, width), (out,))
        )
        quantized = quantize(W.to(device), kind, size, doubled)
        return x.to(device, dtype), quantized, b.to(device, dtype) if biased else None

    return [
        case((1, 1), 5, 192, "nf4", 64, True, True),
        case((2, 2), 9, 768, "nf4", 64, False, False),
        case((3,), 4, 96, "int4", 32, True, True),
        case((1,), 1, 48, "fp4", 2, True, True),
    ]


EXAMPLES = {"frozen_product": examples}


def _case(dtype, group, size=64, biased=True):
    floats = ("t_largest", "t_offset", "t_levels", "t_map")
    signature = dict.fromkeys(("t_x", "t_bias", "t_out"), f"*{dtype}")
    signature |= dict.fromkeys(floats, "*fp32") | {"t_packed": "*u8"}
    signature |= {"t_absmax": "*u8" if group else "*fp32", "n_out": "i32", "n_blocks": "i32"}
    constants = {"SIZE": size, "BLOCKS": blocks_a_step(size, 4096), "ROWS": ROWS}
    constants |= {"GROUP": group, "BIASED": biased}
    addresses = tuple(name for name in signature if name.startswith("t_"))
    wide = {"contains": ("ld.global.v2.b32",), "num_warps": WARPS}  # 8 bytes of codes a thread
    return AotCase(gemv_kernel, signature, constants, addresses, **wide)


AOT = [_case(dtype, GROUP) for dtype in ("fp32", "bf16")] + [_case("fp16", 0, 32, False)]
