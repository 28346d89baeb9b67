r"""The faster twin of lora.py's `lora_linear`: base product and low-rank branch as one function.

Autograd, left to itself, adds the branch's result and the branch's gradient in passes of their own
over M x N and M x K numbers, M tokens, K in, N out. Written by hand, both additions happen inside a
product (addmm_):

    (LoRAFunction 1)   h  = x W^T + b,   h += s (B u)^T,   u = A x^T, kept: r x M numbers
    (LoRAFunction 2)   du = s B^T g^T,   dB = s (u g)^T,   dA = du x
    (LoRAFunction 3)   dx = g W,         dx += du^T A      nothing of the size of W is formed

u and du have the tokens along their rows: a product with r rows is read faster than one with r
columns.

It needs W and b frozen, as they are behind LoRA, no dropout and no autocast. It cannot be
differentiated twice; MINIPEFT_FAST_PATH=off brings the definition back for that.

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


class _LoRALinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, A, B, scale):
        rows = x.flatten(0, -2)
        u = A @ rows.T
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
            dx = (g @ weight).addmm_(du.T, A).view(ctx.shape)  # (LoRAFunction 3)
        return dx, None, None, dA, dB, None


def examples(device):
    """Odd sizes, one row, a strided input, an expanded input."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    W, b, A, B = draw(11, 7), draw(11), draw(3, 7), draw(11, 3)
    inputs = (draw(2, 5, 7), draw(1, 7), draw(4, 14)[:, ::2], draw(1, 7).expand(5, 7))
    return [(x, W, b, A, B, 2.0) for x in inputs]


EXAMPLES = {"lora_linear": examples}
