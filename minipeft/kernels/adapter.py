r"""The bottleneck adapter in one program: down, activation, up and residual sum. Twin of
additive/bottleneck.py's `add_bottleneck`. It is here to teach and is never chosen by default.

    (AdapterKernel 1)   z = x W_1^T + b_1,   u = sigma(z)       x (M, D), W_1 (m, D), u (M, m)
    (AdapterKernel 2)   y = f + s (u W_2^T + b_2)               W_2 (D, m)
    (AdapterKernel 3)   dz = s (g W_2) * sigma'(z)              g the gradient at y, (M, D)
    (AdapterKernel 4)   dx = dz W_1,   df = g                   dx + g at once where x is f
    (AdapterKernel 5)   dW_2 = s g^T u,  db_2 = s sum g,  dW_1 = dz^T x,  db_1 = sum dz

The bottleneck is what makes one program possible: a block of BLOCK_M rows has BLOCK_M x m numbers
in the middle, which stay in registers between the two products. The program walks over D twice:
once adding up z, once writing y. The backward pass does the same: the first walk reads x and g and
adds up z (again, nothing of M x m was kept) and g W_2, the second writes dx. Sums over all rows
(AdapterKernel 5) are no single program's: u and dz, 2 M m numbers, are written out and the library
multiplies.

Bytes, b to a number, where x is f: eager code reads x, writes A(x), reads it and f and writes y,
and writes and reads z and u, b (5 M D + 4 M m); here x is read and y is written,
b (2 M D + 2 D m). That is the floor, 2.5 times less. A program asks for its rows of x a second
time, for the residual, and finds them in the cache; the weights, 2 D m b, are asked for once for
each block of rows.

Where it wins: by its bytes, at most 2.5 times on the adapter alone, which is a few percent of a
step; no GPU has measured it here. Where it loses: below sm_80, which has no matrix instructions for
it; and a wide bottleneck, whose BLOCK_M x m numbers leave the registers, is not taken: m is at most
128.

Footguns: sigma'(z) asks for z, and u alone does not give it back (GELU is not monotone); tanh
written with exp overflows; rows and columns past the edge must be 0 before they are multiplied.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from minipeft.kernels import DOT_TARGETS, AotCase

WIDEST = 128  # largest m
EXACT = tl.constexpr("tf32x3")  # three products of halves give float32's precision


TILES = {  # bytes of a number, m up to -> BLOCK_M, BLOCK_D: what registers hold without spilling
    (2, 64): (64, 32),
    (2, 128): (32, 32),
    (4, 64): (32, 16),
    (4, 128): (16, 16),
}


def tiles(x, m):
    """BLOCK_M, BLOCK_D and BLOCK_R (m, padded) for numbers of x's size."""
    padded = max(16, triton.next_power_of_2(m))
    return *TILES[x.element_size(), 64 if m <= 64 else WIDEST], padded


@triton.jit
def tanh(z):
    """2 / (1 + exp(-2 z)) - 1, which no z overflows."""
    return 2 * tl.sigmoid(2 * z) - 1


@triton.jit
def activate(z, NAME: tl.constexpr):
    """sigma(z); 0 at 0 for all of them. (AdapterKernel 1)"""
    y = z
    if NAME == "relu":
        y = tl.where(z < 0, 0.0, z)
    elif NAME == "gelu":
        y = 0.5 * z * (1 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        y = 0.5 * z * (1 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif NAME == "swish":
        y = z * tl.sigmoid(z)
    elif NAME == "tanh":
        y = tanh(z)
    return y


@triton.jit
def slope(z, NAME: tl.constexpr):
    """sigma'(z). (AdapterKernel 3)"""
    y = tl.full(z.shape, 1.0, tl.float32)
    if NAME == "relu":
        y = tl.where(z > 0, 1.0, 0.0)
    elif NAME == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * z * z)
        y = 0.5 * (1 + tl.erf(z * 0.7071067811865476)) + z * density
    elif NAME == "gelu_tanh":
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 0.7978845608028654 * (1 + 3 * 0.044715 * z * z)
        y = 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * inner
    elif NAME == "swish":
        y = tl.sigmoid(z) * (1 + z * (1 - tl.sigmoid(z)))
    elif NAME == "tanh":
        y = 1 - tanh(z) * tanh(z)
    return y


@triton.jit
def adapter_kernel(
    t_f, t_x, t_w1, t_b1, t_w2, t_b2, t_y,
    M, D, m, scale, f_row, f_column, x_row, x_column,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of y, contiguous. (AdapterKernel 1) (AdapterKernel 2)"""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    units = tl.arange(0, BLOCK_R)
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D).to(tl.int64)
        p_x = t_x + rows * x_row + columns[None, :] * x_column
        p_w1 = t_w1 + units[None, :] * D + columns[:, None]
        b_x = tl.load(p_x, (rows < M) & (columns < D)[None, :], 0.0)
        b_w1 = tl.load(p_w1, (units < m)[None, :] & (columns < D)[:, None], 0.0)
        z = tl.dot(b_x, b_w1, z, input_precision=EXACT)
    z += tl.load(t_b1 + units, units < m, 0.0).to(tl.float32)[None, :]
    u = activate(z, ACTIVATION).to(t_x.dtype.element_ty)
    for first in range(0, D, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        inside = (rows < M) & (columns < D)
        p_w2 = t_w2 + columns * m + units[:, None]
        b_w2 = tl.load(p_w2, (columns < D) & (units < m)[:, None], 0.0)
        b_b2 = tl.load(t_b2 + columns, columns < D, 0.0).to(tl.float32)
        b_f = tl.load(t_f + rows * f_row + columns * f_column, inside, 0.0).to(tl.float32)
        y = b_f + scale * (tl.dot(u, b_w2, input_precision=EXACT) + b_b2)
        tl.store(t_y + rows * D + columns, y, inside)


@triton.jit
def adapter_backward_kernel(
    t_g, t_x, t_w1, t_b1, t_w2, t_dx, t_u, t_dz,
    M, D, m, scale, g_row, g_column, x_row, x_column,
    ACTIVATION: tl.constexpr, X_IS_F: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of dx, u and dz, contiguous. (AdapterKernel 3) (AdapterKernel 4)"""
    rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    units = tl.arange(0, BLOCK_R)
    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    du = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, D, BLOCK_D):
        columns = first + tl.arange(0, BLOCK_D).to(tl.int64)
        inside = (rows < M) & (columns < D)[None, :]
        weights = (units < m)[None, :] & (columns < D)[:, None]
        b_x = tl.load(t_x + rows * x_row + columns[None, :] * x_column, inside, 0.0)
        b_g = tl.load(t_g + rows * g_row + columns[None, :] * g_column, inside, 0.0)
        b_w1 = tl.load(t_w1 + units[None, :] * D + columns[:, None], weights, 0.0)
        b_w2 = tl.load(t_w2 + columns[:, None] * m + units[None, :], weights, 0.0)
        z = tl.dot(b_x, b_w1, z, input_precision=EXACT)
        du = tl.dot(b_g, b_w2, du, input_precision=EXACT)
    z += tl.load(t_b1 + units, units < m, 0.0).to(tl.float32)[None, :]
    dz = (scale * du * slope(z, ACTIVATION)).to(t_x.dtype.element_ty)
    middle = rows * m + units[None, :]
    tl.store(t_u + middle, activate(z, ACTIVATION), (rows < M) & (units < m)[None, :])
    tl.store(t_dz + middle, dz, (rows < M) & (units < m)[None, :])
    for first in range(0, D, BLOCK_D):
        columns = (first + tl.arange(0, BLOCK_D).to(tl.int64))[None, :]
        inside = (rows < M) & (columns < D)
        p_w1 = t_w1 + units[:, None] * D + columns
        b_w1 = tl.load(p_w1, (units < m)[:, None] & (columns < D), 0.0)
        dx = tl.dot(dz, b_w1, input_precision=EXACT)
        if X_IS_F:
            dx += tl.load(t_g + rows * g_row + columns * g_column, inside, 0.0).to(tl.float32)
        tl.store(t_dx + rows * D + columns, dx, inside)


class _AddBottleneck(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, x, W_1, b_1, W_2, b_2, activation, scale):
        D, m = W_2.shape
        rows, base = x.reshape(-1, D), f.reshape(-1, D)
        weights = [t.contiguous() for t in (W_1, b_1, W_2, b_2)]
        y = torch.empty(f.shape, device=f.device, dtype=f.dtype)
        block_m, *blocks = tiles(x, m)
        adapter_kernel[(triton.cdiv(len(rows), block_m),)](
            *(base, rows, *weights, y, len(rows), D, m, scale, *base.stride(), *rows.stride()),
            *(activation, block_m, *blocks),
        )
        ctx.save_for_backward(rows, *weights[:3])
        ctx.settings, ctx.x_is_f, ctx.shape = (activation, scale), x is f, x.shape
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, W_1, b_1, W_2 = ctx.saved_tensors
        (D, m), (activation, scale) = W_2.shape, ctx.settings
        g = grad.reshape(-1, D)
        dx = torch.empty(x.shape, device=x.device, dtype=x.dtype)
        u, dz = torch.empty(2, len(x), m, device=x.device, dtype=x.dtype).unbind()
        block_m, *blocks = tiles(x, m)
        adapter_backward_kernel[(triton.cdiv(len(x), block_m),)](
            *(g, x, W_1, b_1, W_2, dx, u, dz, len(x), D, m, scale, *g.stride(), *x.stride()),
            *(activation, ctx.x_is_f, block_m, *blocks),
        )
        df = None if ctx.x_is_f else grad
        down, up = (dz.T @ x, dz.sum(0)), (scale * (g.T @ u), scale * g.sum(0))  # (AdapterKernel 5)
        return df, dx.view(ctx.shape), *down, *up, None, None


def add_bottleneck(f, x, W_1, b_1, W_2, b_2, activation="relu", scale=1.0):
    """f + s [W_2 sigma(W_1 x + b_1) + b_2], f and x (..., D) -> (..., D). (AdapterKernel 2)"""
    return _AddBottleneck.apply(f, x, W_1, b_1, W_2, b_2, activation, scale)


def examples(device):
    """Every activation, odd sizes, x beside f and x = f, one row, strided, transposed, expanded."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, like=1.0):
        x = like * torch.randn(*shape, generator=generator)
        return x.to(device).requires_grad_()

    def weights(D, m):
        return draw(m, D, like=D**-0.5), draw(m), draw(D, m, like=m**-0.5 / 2), draw(D)

    x, one, wide = draw(2, 5, 7), draw(1, 7), draw(67, 35)
    names = ("relu", "gelu", "gelu_tanh", "swish", "tanh", "identity")
    found = [(draw(2, 5, 7), x, *weights(7, 3), name, 1.5) for name in names]
    found += [(x, x, *weights(7, 3), "gelu", 0.5), (one, one, *weights(7, 3), "swish", 1.0)]
    found += [(wide, wide, *weights(35, 17), "relu", 4.0)]
    for odd in (draw(5, 14)[:, ::2], draw(7, 5).T, draw(1, 7).expand(5, 7)):
        found.append((draw(5, 7), odd, *weights(7, 3), "tanh", 1.0))
        found.append((odd, draw(5, 7), *weights(7, 3), "relu", 1.0))
    return found


EXAMPLES = {"add_bottleneck": examples}


def aot_case(kernel, b, m, activation):
    """A launch with numbers of type b, where x is f."""
    dtype = {"fp16": torch.float16, "fp32": torch.float32}[b]
    blocks = dict(zip(("BLOCK_M", "BLOCK_D", "BLOCK_R"), tiles(torch.empty(0, dtype=dtype), m)))
    constants = {"ACTIVATION": activation, "X_IS_F": True, "x_column": 1, "f_column": 1}
    constants |= {"g_column": 1, **blocks}
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    names = [n for n in kernel.arg_names if n not in constants]
    types = {n: f"*{b}" if n.startswith("t_") else "i32" for n in names} | {"scale": "fp32"}
    aligned = tuple(n for n in names if n not in ("M", "scale"))
    return AotCase(kernel, types, constants, aligned, DOT_TARGETS, contains=("mma",))


AOT = [  # the backward kernel holds more than the forward one: it is compiled with every tile
    aot_case(adapter_kernel, "fp32", 128, "gelu"),
    aot_case(adapter_backward_kernel, "fp16", 64, "gelu_tanh"),
    aot_case(adapter_backward_kernel, "fp16", 128, "gelu"),
    aot_case(adapter_backward_kernel, "fp32", 64, "swish"),
    aot_case(adapter_backward_kernel, "fp32", 128, "gelu_tanh"),
]
