r"""Attention over a prefix and a text that are never put side by side in memory: an online softmax
over one, then over the other. Twin of soft_prompt/prefix_attention.py's `prefix_attention`. It
is here to teach and is never chosen by default.

    (PrefixKernel 1)   s_tj = q_t . k_j / sqrt(d)       j over p prefix keys, then S keys of text
    (PrefixKernel 2)   t sees j  where  j <= t + shift  shift = S - T for the text, p for prefixes
    (PrefixKernel 3)   top' = max(top, max_j s_tj),  fade = exp(top - top')
                       total' = fade total + sum_j exp(s_tj - top')
                       acc' = fade acc + sum_j exp(s_tj - top') v_j
    (PrefixKernel 4)   o_t = acc / total,  lse_t = top + log total

One loop serves both segments: a prefix is a text that ends before every query (PrefixKernel 2).
Its keys are read where they lie, in one copy for the whole batch (stride 0), while the definition
expands, copies and joins them. What the first loop leaves, acc / total, is attention over the
prefix alone; how much of it the second lets stand is the gate lambda of (Prefix 3).

Backward, with P_tj = exp(s_tj - lse_t) and D_t = do_t . o_t; nothing of T x S is kept:

    (PrefixKernel 5)   dS_tj = P_tj (do_t . v_j - D_t),   dq_t = sum_j dS_tj k_j / sqrt(d)
    (PrefixKernel 6)   dv_j = sum_t P_tj do_t,   dk_j = sum_t dS_tj q_t / sqrt(d)

Two kernels: one owns queries and walks over keys, one owns keys and walks over queries, so nothing
is added atomically and the same seed gives the same bits. The second runs once for each segment.
The prefix gets a gradient for each row of the batch, which autograd adds up where it expanded.

Bytes, b to a number, N = B H heads in all: joining reads and writes 4 N (p + S) d b, and as much
again for the gradients, before attention reads the result. Here q, k, v and o move once,
2 N (T + S) d b, and the prefix, 2 H p d b. The floor is that, or 4 N T (p + S) d operations (of the
text's, half are masked), whichever takes longer.

Where it wins: nowhere that a user notices. At p of 16 to 64 and T of 256 to 1,024 the prefix is 2
to 6 % of attention, and attention a small part of a step; the vendor's kernels gain more by being
good at the text than this one by sparing the copy. Where it loses: below sm_80; and a mask, a
dropout or a head wider than 256 bytes sends the definition to work anyway.

Footguns: a causal mask aligned at the upper left when p keys stand in front; exp(-inf - -inf),
which the first block avoids because every query sees key 0 of the prefix; a key past the segment's
end scores 0, which is no small score; a head's number and its row's in one 32-bit offset.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from minipeft.kernels import DOT_TARGETS, AotCase

EXACT = tl.constexpr("tf32x3")  # three products of halves give float32's precision


TILES = {  # bytes of a number, d up to -> BLOCK_M queries, BLOCK_N keys: registers do not spill
    (2, 64): (32, 64),
    (2, 128): (32, 32),
    (4, 64): (16, 16),
}


def tiles(q):
    """BLOCK_M, BLOCK_N and BLOCK_D (d, padded) for numbers of q's size."""
    d = q.shape[-1]
    padded = max(16, triton.next_power_of_2(d))
    return *TILES[q.element_size(), 64 if d <= 64 else 128], padded


@triton.jit
def block(t_x, first, count, row, d, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows first ... of a head's matrix (count, d), (COUNT, BLOCK_D), 0 outside."""
    rows = (first + tl.arange(0, COUNT).to(tl.int64))[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    return tl.load(t_x + rows * row + columns, (rows < count) & (columns < d), 0.0)


@triton.jit
def put(t_x, x, first, count, d, COUNT: tl.constexpr, BLOCK_D: tl.constexpr):
    """Store x (COUNT, BLOCK_D) as rows first ... of a contiguous matrix (count, d)."""
    rows = (first + tl.arange(0, COUNT).to(tl.int64))[:, None]
    columns = tl.arange(0, BLOCK_D)[None, :]
    tl.store(t_x + rows * d + columns, x, (rows < count) & (columns < d))


@triton.jit
def scores(b_q, b_k, queries, keys, count, shift, scale):
    """s, (BLOCK_M, BLOCK_N), -inf where a query may not look. (PrefixKernel 1) (PrefixKernel 2)"""
    s = tl.dot(b_q, tl.trans(b_k), input_precision=EXACT) * scale
    seen = (keys < count)[None, :] & (keys[None, :] <= queries[:, None] + shift)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def attend(
    acc, top, total, b_q, queries, t_k, t_v,
    count, shift, k_row, v_row, d, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The state after a segment of `count` keys and values. (PrefixKernel 3)"""
    for first in range(0, tl.minimum(count, tl.max(queries, 0) + shift + 1), BLOCK_N):
        b_k = block(t_k, first, count, k_row, d, BLOCK_N, BLOCK_D)
        s = scores(b_q, b_k, queries, first + tl.arange(0, BLOCK_N), count, shift, scale)
        new_top = tl.maximum(top, tl.max(s, 1))
        fade = tl.exp(top - new_top)
        weights = tl.exp(s - new_top[:, None])
        b_v = block(t_v, first, count, v_row, d, BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=EXACT)
        total = total * fade + tl.sum(weights, 1)
        top = new_top
    return acc, top, total


@triton.jit
def prefix_attention_kernel(
    t_q, t_k, t_v, t_pk, t_pv, t_o, t_lse,
    H, T, S, p, d, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, p_batch, p_head, p_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head's o and lse, contiguous. (PrefixKernel 4)"""
    one = tl.program_id(1).to(tl.int64)
    b, h = one // H, one % H
    first = tl.program_id(0) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    b_q = block(t_q + b * q_batch + h * q_head, first, T, q_row, d, BLOCK_M, BLOCK_D)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    far = b * p_batch + h * p_head
    acc, top, total = attend(
        acc, top, total, b_q, queries, t_pk + far, t_pv + far,
        p, p, p_row, p_row, d, scale, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, top, total = attend(
        acc, top, total, b_q, queries,
        t_k + b * k_batch + h * k_head, t_v + b * v_batch + h * v_head,
        S, S - T, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    put(t_o + one * T * d, acc / total[:, None], first, T, d, BLOCK_M, BLOCK_D)
    tl.store(t_lse + one * T + queries, top + tl.log(total), queries < T)


@triton.jit
def score_gradients(b_q, b_do, lse, delta, b_k, b_v, queries, keys, count, shift, scale):
    """P and dS, (BLOCK_M, BLOCK_N), 0 where a query may not look. (PrefixKernel 5)"""
    weights = tl.exp(scores(b_q, b_k, queries, keys, count, shift, scale) - lse[:, None])
    dots = tl.dot(b_do, tl.trans(b_v), input_precision=EXACT)
    return weights, weights * (dots - delta[:, None])


@triton.jit
def attend_backward(
    dq, b_q, b_do, lse, delta, queries, t_k, t_v,
    count, shift, k_row, v_row, d, scale,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq with a segment's part added, not yet scaled. (PrefixKernel 5)"""
    for first in range(0, tl.minimum(count, tl.max(queries, 0) + shift + 1), BLOCK_N):
        b_k = block(t_k, first, count, k_row, d, BLOCK_N, BLOCK_D)
        b_v = block(t_v, first, count, v_row, d, BLOCK_N, BLOCK_D)
        keys = first + tl.arange(0, BLOCK_N)
        _, ds = score_gradients(b_q, b_do, lse, delta, b_k, b_v, queries, keys, count, shift, scale)
        dq = tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=EXACT)
    return dq


@triton.jit
def prefix_queries_kernel(
    t_q, t_k, t_v, t_pk, t_pv, t_do, t_lse, t_delta, t_dq,
    H, T, S, p, d, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, p_batch, p_head, p_row,
    o_batch, o_head, o_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head's dq, contiguous. (PrefixKernel 5)"""
    one = tl.program_id(1).to(tl.int64)
    b, h = one // H, one % H
    first = tl.program_id(0) * BLOCK_M
    queries = first + tl.arange(0, BLOCK_M)
    b_q = block(t_q + b * q_batch + h * q_head, first, T, q_row, d, BLOCK_M, BLOCK_D)
    b_do = block(t_do + b * o_batch + h * o_head, first, T, o_row, d, BLOCK_M, BLOCK_D)
    lse = tl.load(t_lse + one * T + queries, queries < T, 0.0)
    delta = tl.load(t_delta + one * T + queries, queries < T, 0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    far = b * p_batch + h * p_head
    dq = attend_backward(
        dq, b_q, b_do, lse, delta, queries, t_pk + far, t_pv + far,
        p, p, p_row, p_row, d, scale, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = attend_backward(
        dq, b_q, b_do, lse, delta, queries,
        t_k + b * k_batch + h * k_head, t_v + b * v_batch + h * v_head,
        S, S - T, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    put(t_dq + one * T * d, dq * scale, first, T, d, BLOCK_M, BLOCK_D)


@triton.jit
def prefix_keys_kernel(
    t_q, t_k, t_v, t_do, t_lse, t_delta, t_dk, t_dv,
    H, T, count, shift, d, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of one head's dk and dv, contiguous, for one segment. (PrefixKernel 6)"""
    one = tl.program_id(1).to(tl.int64)
    b, h = one // H, one % H
    first = tl.program_id(0) * BLOCK_N
    keys = first + tl.arange(0, BLOCK_N)
    b_k = block(t_k + b * k_batch + h * k_head, first, count, k_row, d, BLOCK_N, BLOCK_D)
    b_v = block(t_v + b * v_batch + h * v_head, first, count, v_row, d, BLOCK_N, BLOCK_D)
    t_q += b * q_batch + h * q_head
    t_do += b * o_batch + h * o_head
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(tl.maximum(0, first - shift), T, BLOCK_M):  # who sees the block at all
        queries = start + tl.arange(0, BLOCK_M)
        b_q = block(t_q, start, T, q_row, d, BLOCK_M, BLOCK_D)
        b_do = block(t_do, start, T, o_row, d, BLOCK_M, BLOCK_D)
        lse = tl.load(t_lse + one * T + queries, queries < T, 0.0)
        delta = tl.load(t_delta + one * T + queries, queries < T, 0.0)
        weights, ds = score_gradients(
            b_q, b_do, lse, delta, b_k, b_v, queries, keys, count, shift, scale
        )
        dv = tl.dot(tl.trans(weights.to(b_do.dtype)), b_do, dv, input_precision=EXACT)
        dk = tl.dot(tl.trans(ds.to(b_q.dtype)), b_q, dk, input_precision=EXACT)
    put(t_dk + one * count * d, dk * scale, first, count, d, BLOCK_N, BLOCK_D)
    put(t_dv + one * count * d, dv, first, count, d, BLOCK_N, BLOCK_D)


def rows_in_place(x):
    """x, or a copy if the numbers of a row are not neighbours."""
    return x if x.stride(-1) == 1 else x.contiguous()


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, prefix):
        q, k, v, prefix = map(rows_in_place, (q, k, v, prefix))
        (B, H, T, d), S, p = q.shape, k.shape[2], prefix.shape[3]
        o = torch.empty(q.shape, device=q.device, dtype=q.dtype)
        lse = torch.empty(B, H, T, device=q.device, dtype=torch.float32)
        blocks = tiles(q)
        strides = [s for t in (q, k, v, prefix[0]) for s in t.stride()[:3]]
        prefix_attention_kernel[triton.cdiv(T, blocks[0]), B * H](
            *(q, k, v, *prefix, o, lse, H, T, S, p, d, d**-0.5),
            *(*strides, *blocks),
        )
        ctx.save_for_backward(q, k, v, prefix, o, lse)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, prefix, o, lse = ctx.saved_tensors
        do = rows_in_place(grad)
        delta = (do.float() * o.float()).sum(-1)  # D of (PrefixKernel 5), contiguous
        (B, H, T, d), S, p = q.shape, k.shape[2], prefix.shape[3]
        dq, dk, dv = (torch.empty(t.shape, device=q.device, dtype=q.dtype) for t in (q, k, v))
        dprefix = torch.empty(prefix.shape, device=q.device, dtype=q.dtype)
        blocks, sizes = tiles(q), (d, d**-0.5)
        strides = [s for t in (q, k, v, prefix[0], do) for s in t.stride()[:3]]
        prefix_queries_kernel[triton.cdiv(T, blocks[0]), B * H](
            *(q, k, v, *prefix, do, lse, delta, dq, H, T, S, p, *sizes),
            *(*strides, *blocks),
        )
        segments = (p, p, *prefix, *dprefix), (S, S - T, k, v, dk, dv)
        for count, shift, keys, values, dkeys, dvalues in segments:
            strides = [s for t in (q, keys, values, do) for s in t.stride()[:3]]
            prefix_keys_kernel[triton.cdiv(count, blocks[1]), B * H](
                *(q, keys, values, do, lse, delta, dkeys, dvalues, H, T, count, shift, *sizes),
                *(*strides, *blocks),
            )
        return dq, dk, dv, dprefix


def prefix_attention(q, k, v, prefix):
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], causal over the text. q (B, H, T, d), k and v
    (B, H, S, d), prefix (2, B, H, p, d) -> (B, H, T, d). (PrefixKernel 4)
    """
    return _PrefixAttention.apply(q, k, v, prefix)


def examples(device):
    """Odd sizes, one query, more queries and keys than a block, cached keys, heads split as a model
    splits them, an expanded prefix, strided and expanded inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    found = []
    for B, H, T, S, p, d in (
        *((2, 3, 7, 7, 5, 4), (1, 1, 1, 1, 1, 3), (1, 2, 35, 35, 3, 16), (1, 1, 3, 37, 33, 8)),
        (2, 1, 1, 9, 2, 17),
    ):
        heads = [draw(B, rows, H, d).transpose(1, 2) for rows in (T, S, S)]
        found.append((*heads, draw(2, 1, H, p, d).expand(-1, B, -1, -1, -1)))
    q, k, v = draw(1, 2, 5, 12)[..., ::2], draw(1, 2, 6, 6).mT, draw(1, 1, 1, 6)
    found.append((q, k, v.expand(1, 2, 6, 6), draw(2, 1, 2, 4, 6)))
    return [tuple(t.requires_grad_() for t in tensors) for tensors in found]


EXAMPLES = {"prefix_attention": examples}


def aot_case(kernel, b, d):
    """A launch with heads of d numbers of type b."""
    like = torch.empty(d, dtype={"fp16": torch.float16, "fp32": torch.float32}[b])
    blocks = dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_D"), tiles(like)))
    names = [n for n in kernel.arg_names if n not in blocks]
    types = {n: f"*{b}" if n.startswith("t_") else "i32" for n in names} | {"scale": "fp32"}
    types |= {n: "*fp32" for n in ("t_lse", "t_delta") if n in names}
    aligned = [n for n in names if n not in ("H", "T", "S", "p", "count", "shift", "scale")]
    return AotCase(kernel, types, blocks, tuple(aligned), DOT_TARGETS, contains=("mma",))


AOT = [
    aot_case(kernel, *numbers)
    for kernel in (prefix_attention_kernel, prefix_queries_kernel, prefix_keys_kernel)
    for numbers in (("fp16", 64), ("fp32", 64))
] + [aot_case(prefix_keys_kernel, "fp16", 128)]
