r"""A step of AdamW with 8-bit moments in one pass: twin of adamw_8bit.py's `adamw_8bit_step`.

Every block of 256 elements is independent of all others: its two maxima and its codes decide the
old moments, the new moments decide the new maxima and codes. So a program that holds whole blocks
needs nobody else, and both moments exist in float32 in registers alone:

    (Adam8Rows 1)   m = n_m q_m[c]              v = n_v q_v[c]             dequantise
    (Adam8Rows 2)   m += (1 - b1) (g - m)       v = b2 v + (1 - b2) g^2
    (Adam8Rows 3)   w = (1 - lr d) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    (Adam8Rows 4)   n = max |m| over the block   c = the number of thresholds below m / n

q are the two maps of 256 values, thresholds the 255 midpoints between neighbours. Their number
below x is found by halving: eight comparisons. The four tables are 4 KB together and stay in the
first-level cache. The division by n is rounded as IEEE 754 says, so that equal moments give equal
codes here and in the definition; where a fused multiply-add moves a moment by its last bit, a code
may move by one.

A tail of less than 256 elements is its own block. Its missing elements are 0, not map value of code
0, which is the most negative there is and would be the block's maximum.

Bytes: 2 b for w, b for g, 4 for the codes, and 16 / 256 for the maxima: 16.06 an element in float32
(b = 4), 10.06 in half precision. The floor is that over the memory's bandwidth; unfused AdamW in
float32 moves 28 at the least.

Should win: on GPUs, at every size, by count: one launch instead of some forty, one pass instead of
as many. Not measured on one yet, so MINIPEFT_FAST_PATH=on alone takes it.
Cannot win: where memory is no concern, against float32 moments; in a step of LoRA, whose tensors
are mostly below `min_8bit_size`.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl

from minipeft.kernels import AotCase
from minipeft.quantized.adamw_8bit import BLOCK, MAPS

BLOCKS, WARPS = 4, 4  # blocks of 256 a program holds, its warps: 8 elements a thread


@triton.jit
def count_below(b_x, p_thresholds):
    """How many of 255 ascending thresholds are below each of b_x, by halving."""
    b_count = (b_x * 0).to(tl.int32)
    for exponent in tl.static_range(8):
        half = 128 >> exponent
        b_threshold = tl.load(p_thresholds + b_count + (half - 1))
        b_count += tl.where(b_threshold < b_x, half, 0)
    return b_count


@triton.jit
def adamw_8bit_kernel(
    t_w, t_g, t_m_codes, t_m_absmax, t_v_codes, t_v_absmax, t_tables,
    n, w_stride, g_stride, m_codes_stride, m_absmax_stride, v_codes_stride, v_absmax_stride,
    kept, m_rate, v_kept, v_rate, v_correction, eps, step_size,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """One program: a step on BLOCKS blocks of BLOCK elements. (Adam8Rows 1) to (Adam8Rows 4)"""
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    i = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside, begun = i < n, block * BLOCK < n
    p_m, p_m_absmax = t_m_codes + i * m_codes_stride, t_m_absmax + block * m_absmax_stride
    p_v, p_v_absmax = t_v_codes + i * v_codes_stride, t_v_absmax + block * v_absmax_stride
    t_m_map, t_m_thresholds, t_v_map, t_v_thresholds = (
        t_tables, t_tables + 256, t_tables + 512, t_tables + 768
    )  # fmt: skip

    b_g = tl.load(t_g + i * g_stride, mask=inside, other=0).to(tl.float32)
    b_m = tl.load(t_m_map + tl.load(p_m, mask=inside, other=0).to(tl.int32))
    b_v = tl.load(t_v_map + tl.load(p_v, mask=inside, other=0).to(tl.int32))
    b_m *= tl.load(p_m_absmax, mask=begun, other=0)[:, None]  # (Adam8Rows 1)
    b_v *= tl.load(p_v_absmax, mask=begun, other=0)[:, None]
    b_m = tl.where(inside, b_m + m_rate * (b_g - b_m), 0.0)  # (Adam8Rows 2)
    b_v = tl.where(inside, v_kept * b_v + v_rate * b_g * b_g, 0.0)

    p_w = t_w + i * w_stride
    b_w = tl.load(p_w, mask=inside, other=0).to(tl.float32)
    b_w = kept * b_w - step_size * b_m / (tl.sqrt(b_v) / v_correction + eps)  # (Adam8Rows 3)
    tl.store(p_w, b_w.to(t_w.dtype.element_ty), mask=inside)

    b_m_absmax, b_v_absmax = tl.max(tl.abs(b_m), 1), tl.max(b_v, 1)  # (Adam8Rows 4)
    tl.store(p_m_absmax, b_m_absmax, mask=begun)
    tl.store(p_v_absmax, b_v_absmax, mask=begun)
    b_m = tl.div_rn(b_m, tl.where(b_m_absmax > 0, b_m_absmax, 1.0)[:, None])
    b_v = tl.div_rn(b_v, tl.where(b_v_absmax > 0, b_v_absmax, 1.0)[:, None])
    tl.store(p_m, count_below(b_m, t_m_thresholds).to(tl.uint8), mask=inside)
    tl.store(p_v, count_below(b_v, t_v_thresholds).to(tl.uint8), mask=inside)


def adamw_8bit_step(
    w, g, m_codes, m_absmax, v_codes, v_absmax, t, lr, betas, eps, weight_decay
):  # fmt: skip
    """One step in place on w (n,), codes (n,) uint8 and absmax (ceil(n / 256),) float32 of both
    moments, from the gradient g (n,); t counts from 1.
    """
    tensors, n = (w, g, m_codes, m_absmax, v_codes, v_absmax), len(w)
    if n == 0:
        return
    b1, b2 = betas
    kept, step_size, v_correction = 1 - lr * weight_decay, lr / (1 - b1**t), math.sqrt(1 - b2**t)
    adamw_8bit_kernel[(triton.cdiv(n, BLOCKS * BLOCK),)](
        *tensors, tables(w.device), n, *(x.stride(0) for x in tensors),
        kept, 1 - b1, b2, 1 - b2, v_correction, eps, step_size,
        BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=WARPS,
    )  # fmt: skip


@functools.cache
def tables(device):
    """The signed map, its thresholds, the unsigned map, its thresholds: (4, 256) float32, the rows
    of 255 ended by a 0 that nobody reads.
    """
    rows = []
    for q in MAPS.values():
        rows += [q, torch.nn.functional.pad((q[1:] + q[:-1]) / 2, (0, 1))]
    return torch.stack(rows).to(device)


def examples(device, dtype=torch.float32):
    """The first step, with moments that float32 holds exactly, so that codes must agree: gradients
    of 11 bits, betas of a power of two. Less than a block, blocks and a tail, one element.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(n, weight_decay):
        w = torch.randn(n, generator=generator).to(device, dtype)
        g = torch.randint(-1023, 1024, (n,), generator=generator).to(device, dtype) / 2**7
        codes = torch.randint(0, 256, (2, n), generator=generator, dtype=torch.uint8).to(device)
        absmax = torch.zeros(2, -(-n // BLOCK), device=device)
        moments = (codes[0].clone(), absmax[0].clone(), codes[1].clone(), absmax[1].clone())
        return w, g, *moments, 1.0, 1e-2, (1 - 2**-3, 1 - 2**-5), 1e-8, weight_decay

    return [draw(1300, 0.0), draw(255, 0.1), draw(1, 0.1)]


EXAMPLES = {"adamw_8bit_step": examples}


def _case(dtype):
    names = adamw_8bit_kernel.arg_names
    kinds = {"codes": "*u8", "absmax": "*fp32", "tables": "*fp32"}
    tensors = {a: kinds.get(a.rpartition("_")[2], f"*{dtype}") for a in names if a[:2] == "t_"}
    strides = {a: 1 for a in names if a.endswith("_stride")}
    floats = ("kept", "m_rate", "v_kept", "v_rate", "v_correction", "eps", "step_size")
    return AotCase(
        adamw_8bit_kernel,
        tensors | {"n": "i32"} | dict.fromkeys(floats, "fp32"),
        strides | {"BLOCK": BLOCK, "BLOCKS": BLOCKS},
        aligned=(*tensors, "n"),
        num_warps=WARPS,
    )


AOT = [_case(dtype) for dtype in ("fp32", "bf16")]
