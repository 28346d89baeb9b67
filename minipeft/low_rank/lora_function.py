r"""The faster twin of lora.py's `lora_linear`: base product and low-rank branch as one function.

Autograd, left to itself, adds the branch's result and the branch's gradient in passes of their own
over M x N and M x K numbers, M tokens, K in, N out. Written by hand, both additions happen inside a
product; with fewer tokens inside the branch's (addmm_), with more inside the base's, whose weight
takes the branch in first, a pass over N x K numbers instead:

    (LoRAFunction 1)   h  = x W^T + b,   h += s B u = s B (A x^T),   u kept: r x M numbers
    (LoRAFunction 2)   du = s B^T g^T,   dB = s (u g)^T,   dA = du x
    (LoRAFunction 3)   dx = g W,         dx += du^T A               nothing of the size of W is kept
    (LoRAFunction 4)   W' = W + s B A,   h = x W'^T + b,   dx = g W'        from 2 max(K, N) tokens

u and du have their tokens along the rows: products with so few rows are read faster that way.

It needs W and b frozen, as they are behind LoRA, no dropout and no autocast. It cannot be
differentiated twice; MINIPEFT_FAST_PATH=off brings the definition back for that. W' is formed in
float32 and better on a CPU only (a half would round the branch away), and again for the gradient:
it is not worth its memory. The last bits differ from the definition's.

Bytes it saves over the definition: 4 (M N + 2 M K) in float32 per layer and step. Where M is a
token or two there is nothing to save.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def lora_linear(x, weight, bias, A, B, scale):
    """x W^T + b + s (x A^T) B^T. x (..., in), weight (out, in), A (r, in), B (out, r)."""
    return _LoRALinear.apply(x, weight, bias, A, B, scale)


def merging_pays(rows, weight):
    """Whether to take the branch into the weight, for so many rows. (LoRAFunction 4)"""
    exact = weight.dtype in (torch.float32, torch.float64) and weight.device.type == "cpu"
    return exact and len(rows) >= 2 * max(weight.shape)


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        rows = x.flatten(0, -2)
        u = A @ rows.T
        if merging_pays(rows, weight):
            h = F.linear(rows, torch.addmm(weight, B, A, alpha=scale), bias)  # (LoRAFunction 4)
        else:
            h = F.linear(rows, weight, bias)
            h.addmm_(u.T, B.T, alpha=scale)  # (LoRAFunction 1)
        ctx.save_for_backward(rows, u, weight, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return h.view(*x.shape[:-1], h.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, u, weight, A, B = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        du = (B.T @ g.T).mul_(ctx.scale)  # (LoRAFunction 2)
        dA = du @ x if ctx.needs_input_grad[3] else None
        dB = (u @ g).mul_(ctx.scale).T if ctx.needs_input_grad[4] else None
        dx = None
        if ctx.needs_input_grad[0]:
            if merging_pays(g, weight):
                dx = g @ torch.addmm(weight, B, A, alpha=ctx.scale)  # (LoRAFunction 4)
            else:
                dx = (g @ weight).addmm_(du.T, A)  # (LoRAFunction 3)
            dx = dx.view(ctx.shape)
        return dx, None, None, dA, dB, None


def examples(device):
    """Odd sizes, one row, a strided input, an expanded input; many rows."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    W, b, A, B = draw(11, 7), draw(11), draw(3, 7), draw(11, 3)
    inputs = (draw(2, 5, 7), draw(1, 7), draw(4, 14)[:, ::2], draw(1, 7).expand(5, 7), draw(23, 7))
    return [(x, W, b, A, B, 2.0) for x in inputs]


EXAMPLES = {"lora_linear": examples}
