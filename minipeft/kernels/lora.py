r"""LoRA's two products as one: the base product starts from the branch. Twin of `lora_linear` in
low_rank/lora.py. It is here to teach and is never chosen by default.

    (LoRAKernel 1)   h  = s u B^T + x W^T + b       x (M, K), W (N, K), u = x A^T (M, r), B (N, r)
    (LoRAKernel 2)   dx = du A + g W                du = s g B, g the gradient at h
    (LoRAKernel 3)   dA = du^T x,   dB = s g^T u    thin: the library multiplies

A program owns a tile of h, BLOCK_M x BLOCK_N. Its accumulator does not start at 0: it starts at
s u B^T, one more step of the same product with r in the place of K, and goes on over K. So h is
written once and never read again, and the tiles of u and B leave the registers before the long loop
begins. (LoRAKernel 2) is (LoRAKernel 1) with other letters, x = g, W = W^T, u = du, B = A^T, s = 1,
and the same kernel does it, for it asks for the strides of all that it reads.

Bytes beyond the base product, b to a number: two products and an addition read and write M N more
than once, 3 M N b; addmm_ reads and writes h once more, 2 M N b; here u is read, M r b, for each
column of tiles. The floor is the base product's own, 2 M K N operations or b (M K + K N + M N)
bytes, whichever takes longer. Tiles ask for more than that: x once for each of N / BLOCK_N tiles, W
once for each of M / BLOCK_M, which the second-level cache absorbs.

Where it wins: against addmm_ at most those 2 M N b, a few percent of a product of GPT-2's sizes,
and only where this product is as fast as the vendor's, which a page of Triton seldom is; no GPU has
measured it here. Where it loses: below sm_80 there are no matrix instructions for it, and it is
many times slower.

Footguns: tl.dot in float32 rounds its factors to 10 bits unless told not to; a K that is no
multiple of the tile needs zeros from the mask, for whatever lies behind a row is added up; s
applied to the whole accumulator scales the base too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from minipeft.kernels import DOT_TARGETS, AotCase

TILES = {2: (64, 128, 32), 4: (64, 64, 32)}  # bytes of a number -> BLOCK_M, BLOCK_N, BLOCK_K
EXACT = tl.constexpr("tf32x3")  # three products of halves give float32's precision


@triton.jit
def lora_product_kernel(
    t_x, t_w, t_bias, t_u, t_b, t_h,
    M, N, K, r, scale,
    x_row, x_column, w_row, w_column, u_row, u_column, b_row, b_column,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """A tile of h, contiguous. (LoRAKernel 1)"""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    ranks = tl.arange(0, BLOCK_R).to(tl.int64)
    p_u = t_u + rows * u_row + ranks[None, :] * u_column
    p_b = t_b + columns * b_row + ranks[:, None] * b_column
    b_u = tl.load(p_u, (rows < M) & (ranks < r)[None, :], 0.0)
    b_b = tl.load(p_b, (columns < N) & (ranks < r)[:, None], 0.0)
    h = tl.dot(b_u, b_b, input_precision=EXACT) * scale
    for first in range(0, K, BLOCK_K):
        ks = first + tl.arange(0, BLOCK_K).to(tl.int64)
        p_x = t_x + rows * x_row + ks[None, :] * x_column
        p_w = t_w + columns * w_row + ks[:, None] * w_column
        b_x = tl.load(p_x, (rows < M) & (ks < K)[None, :], 0.0)
        b_w = tl.load(p_w, (columns < N) & (ks < K)[:, None], 0.0)
        h = tl.dot(b_x, b_w, h, input_precision=EXACT)
    if HAS_BIAS:
        h += tl.load(t_bias + columns, columns < N, 0.0).to(tl.float32)
    tl.store(t_h + rows * N + columns, h, (rows < M) & (columns < N))


def lora_product(x, weight, bias, u, B, scale):
    """x W^T + b + s u B^T, x (M, K), weight (N, K), bias (N,) or None, u (M, r), B (N, r) ->
    (M, N). (LoRAKernel 1)
    """
    (M, K), (N, r) = x.shape, B.shape
    h = torch.empty(M, N, device=x.device, dtype=x.dtype)
    block_m, block_n, block_k = TILES[x.element_size()]
    lora_product_kernel[triton.cdiv(M, block_m), triton.cdiv(N, block_n)](
        *(x, weight, h if bias is None else bias.contiguous(), u, B, h, M, N, K, r, scale),
        *(*x.stride(), *weight.stride(), *u.stride(), *B.stride()),
        *(bias is not None, block_m, block_n, block_k, max(16, triton.next_power_of_2(r))),
    )
    return h


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        rows = x.reshape(-1, x.shape[-1])
        u = rows @ A.T
        ctx.save_for_backward(rows, u, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return lora_product(rows, weight, bias, u, B, scale).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, u, weight, A, B = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        du = (g @ B).mul_(ctx.scale)
        dA, dB = du.T @ x, (g.T @ u).mul_(ctx.scale)  # (LoRAKernel 3)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = lora_product(g, weight.T, None, du, A.T, 1.0).view(ctx.shape)  # (LoRAKernel 2)
        return dx, None, None, dA, dB, None


def lora_linear(x, weight, bias, A, B, scale):
    """W x + b + s B A x, x (..., in) -> (..., out); W and b are frozen. (LoRAKernel 1)"""
    return _LoRALinear.apply(x, weight, bias, A, B, scale)


def examples(device):
    """Odd sizes, one row, more than a tile, strided, transposed and expanded inputs, no bias, a
    frozen input. The branch is small beside the base, as it is in training.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def layer(N, K, r):
        A, B = draw(r, K) / K**0.5, draw(N, r) / 4
        return draw(N, K) / K**0.5, draw(N), A.requires_grad_(), B.requires_grad_()

    x, wide = draw(2, 5, 7), draw(67, 41).requires_grad_()
    odd = (x, draw(1, 7), draw(4, 14)[:, ::2], draw(7, 5).T, draw(1, 7).expand(5, 7))
    found = [(h.requires_grad_(), *layer(11, 7, 3), 2.0) for h in odd]
    W, _, A, B = layer(131, 41, 17)
    return [*found, (wide, W, None, A, B, 0.5), (draw(5, 7), *layer(11, 7, 3), 1.0)]


EXAMPLES = {"lora_linear": examples}


def aot_case(b, bytes_, forward):
    """A launch forward, W and B as they are stored, or backward, both transposed."""
    stored, turned = ("row", "column") if forward else ("column", "row")
    constants = dict.fromkeys(("x_column", f"w_{turned}", "u_column", f"b_{turned}"), 1)
    constants |= dict(zip(("BLOCK_M", "BLOCK_N", "BLOCK_K"), TILES[bytes_]))
    constants |= {"HAS_BIAS": forward, "BLOCK_R": 16}
    names = [n for n in lora_product_kernel.arg_names if n not in constants]
    types = {n: f"*{b}" if n.startswith("t_") else "i32" for n in names} | {"scale": "fp32"}
    aligned = [n for n in names if n.startswith("t_")] + ["N", "K", "x_row", f"w_{stored}"]
    tensor_cores = {"targets": DOT_TARGETS, "contains": ("mma",)}
    return AotCase(lora_product_kernel, types, constants, tuple(aligned), **tensor_cores)


AOT = [aot_case("fp16", 2, True), aot_case("fp16", 2, False), aot_case("fp32", 4, True)]
