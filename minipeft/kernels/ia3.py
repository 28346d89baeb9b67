r"""IA3's rescaling, and its gradient's sum in the pass that makes the other gradient. Twin of
additive/ia3.py's `rescale`. It is here to teach and is never chosen by default.

    (IA3Kernel 1)   y_mn  = h_mn l_n                      m of M tokens, n of N coordinates
    (IA3Kernel 2)   dh_mn = g_mn l_n                      g the gradient at y
    (IA3Kernel 3)   dl_n  = sum_m g_mn h_mn               the same g_mn, read once for both

A program of the backward pass owns a strip of columns and a group of rows. It walks down its rows a
block at a time, writes dh, and carries the strip's part of dl in registers. The parts, one row for
each group, are added by torch: in the same order every time, which atomic additions would not
promise.

Bytes, b to a number, backward: autograd makes g l (2 M N b), then g h (3 M N b), then its sum
(M N b), 6 M N b; here g and h are read and dh is written, 3 M N b, plus the parts, 4 N for each
ROWS rows. The floor is therefore 3 M N b over the memory's bandwidth, half of autograd's; forward,
2 M N b for both.

Where it wins: nowhere that a user notices. The whole of IA3 is a few percent of a step, forward it
moves what the plain product moves, and at inference the vector is folded into the weight. Where it
loses: at a few thousand numbers the launch costs more than the arithmetic.

Footguns: adding up in float16, where a sum of 8,192 products is off by percents; a gradient of
`.sum()` has strides 0 and is no contiguous matrix; rows * stride beyond 2^31 in 32 bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from minipeft.kernels import AotCase

BLOCK_M, BLOCK_N = 16, 128  # a block: 8 KiB in float32, 128 bytes or more of each row
ROWS = 128  # rows of a group: a multiple of BLOCK_M; the parts then cost under 2 %


@triton.jit
def rescale_kernel(
    t_h, t_l, t_y,
    M, N, h_row, h_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """y = h l, a block a program; y is contiguous. (IA3Kernel 1)"""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < M) & (columns < N)
    b_l = tl.load(t_l + columns, columns < N).to(tl.float32)
    b_h = tl.load(t_h + rows * h_row + columns * h_column, inside).to(tl.float32)
    tl.store(t_y + rows * N + columns, b_h * b_l, inside)


@triton.jit
def rescale_backward_kernel(
    t_g, t_h, t_l, t_dh, t_parts,
    M, N, g_row, g_column, h_row, h_column,
    WANTS_DH: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dh = g l and a group's part of dl, t_parts (groups, N). (IA3Kernel 2) (IA3Kernel 3)"""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_l = tl.load(t_l + columns, columns < N, 0.0).to(tl.float32)
    part = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, ROWS, BLOCK_M):
        rows = (group * ROWS + first + tl.arange(0, BLOCK_M))[:, None]
        inside = (rows < M) & (columns < N)[None, :]
        p_g = t_g + rows * g_row + columns[None, :] * g_column
        p_h = t_h + rows * h_row + columns[None, :] * h_column
        b_g = tl.load(p_g, inside, 0.0).to(tl.float32)
        b_h = tl.load(p_h, inside, 0.0).to(tl.float32)
        part += tl.sum(b_g * b_h, 0)
        if WANTS_DH:
            tl.store(t_dh + rows * N + columns[None, :], b_g * b_l[None, :], inside)
    tl.store(t_parts + group * N + columns, part, columns < N)


class _Rescale(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, l):
        rows, vector = h.reshape(-1, h.shape[-1]), l.to(h.dtype).contiguous()
        (M, N), y = rows.shape, torch.empty(h.shape, device=h.device, dtype=h.dtype)
        grid = triton.cdiv(M, BLOCK_M), triton.cdiv(N, BLOCK_N)
        rescale_kernel[grid](rows, vector, y, M, N, *rows.stride(), BLOCK_M, BLOCK_N)
        ctx.save_for_backward(rows, vector)
        ctx.shape, ctx.dtype = h.shape, l.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, vector = ctx.saved_tensors
        (M, N), g = h.shape, grad.reshape(h.shape)  # a view, also of a `.sum()`'s gradient
        groups = triton.cdiv(M, ROWS)
        dh = torch.empty(h.shape, device=h.device, dtype=h.dtype)
        parts = torch.empty(groups, N, device=h.device, dtype=torch.float32)
        wants_dh = ctx.needs_input_grad[0]
        rescale_backward_kernel[groups, triton.cdiv(N, BLOCK_N)](
            *(g, h, vector, dh, parts, M, N, *g.stride(), *h.stride()),
            *(wants_dh, ROWS, BLOCK_M, BLOCK_N),
        )
        return dh.view(ctx.shape) if wants_dh else None, parts.sum(0).to(ctx.dtype)


def rescale(h, l):
    """l * h, h (..., n) and l (n,) -> (..., n) in h's dtype. (IA3Kernel 1)"""
    return _Rescale.apply(h, l)


def examples(device):
    """Odd sizes, one row, more rows than a group holds, strided, transposed, expanded; h learned,
    and h frozen.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    inputs = (
        *(draw(2, 5, 7), draw(1, 130), draw(131, 7)),
        *(draw(9, 14)[:, ::2], draw(7, 9).T, draw(1, 7).expand(5, 7)),
    )
    pairs = [(h.requires_grad_(), draw(h.shape[-1]).requires_grad_()) for h in inputs]
    return [*pairs, (draw(4, 7), draw(7).requires_grad_()), (draw(4, 7).requires_grad_(), draw(7))]


EXAMPLES = {"rescale": examples}


def aot_case(kernel, b):
    """A launch with contiguous numbers of type b."""
    constants = {"h_column": 1, "g_column": 1, "WANTS_DH": True}
    constants |= {"ROWS": ROWS, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: f"*{b}" if n.startswith("t_") else "i32" for n in names}
    types |= {n: "*fp32" for n in names if n == "t_parts"}
    return AotCase(kernel, types, constants, tuple(n for n in names if n != "M"))


AOT = [aot_case(k, b) for k in (rescale_kernel, rescale_backward_kernel) for b in ("fp16", "fp32")]
