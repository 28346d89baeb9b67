r"""The faster twin of gpt.py's `feed_forward` behind frozen weights: one function, in chunks.

At 2,048 tokens of width 384 a tensor of the hidden width has 12.6 MB, more than a core's cache, and
autograd, left to itself, passes over eight of them a layer. Here the tokens go through in chunks,
whose hidden numbers stay in the cache, and one such tensor is kept:

    (FeedForward 1)   u = x W1^T + b1,   h = gelu(u),   y = h W2^T + b2
    (FeedForward 2)   dx = ((dy W2) * gelu'(u)) W1

gelu'(u) is made in the forward pass, while u is at hand (gelu_tiles.py), and kept in its place;
without gradients nothing of the hidden width is kept.

It needs float32 and two plain linear layers with biases that want no gradient, as they are behind
most techniques and in evaluation, and no autocast; it cannot be differentiated twice, and
MINIPEFT_FAST_PATH=off brings the definition back for that. The last bits differ from it. Trained
weights need h as well, and then it wins nothing.

Bytes it saves over the definition, M tokens, N hidden: about 40 M N a layer and step. Where all of
the hidden numbers fit into the cache there is nothing to save.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from minipeft.gelu_tiles import gelu_and_slope

CHUNK = 1024  # tokens whose hidden numbers are held at once


def feed_forward(x, up, down):
    """down(gelu(up(x))). x (..., in) float32 on a CPU, up and down nn.Linear -> (..., out)."""
    weights = [t.detach() for t in (up.weight, up.bias, down.weight, down.bias)]
    return _FeedForward.apply(x, *weights, torch.is_grad_enabled() and x.requires_grad)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, W1, b1, W2, b2, wanted):
        rows = x.reshape(-1, x.shape[-1])
        y = rows.new_empty(len(rows), len(W2))
        slope = rows.new_empty(len(rows), len(W1)) if wanted else None
        hidden = rows.new_empty(2, min(CHUNK, len(rows)), len(W1))
        for i in range(0, len(rows), CHUNK):
            part = slice(i, i + CHUNK)
            u, h = hidden[:, : len(rows[part])]
            torch.addmm(b1, rows[part], W1.T, out=u)
            gelu_and_slope(u, h, slope[part] if wanted else None)
            torch.addmm(b2, h, W2.T, out=y[part])  # (FeedForward 1)
        ctx.save_for_backward(W1, W2, slope)
        return y.view(*x.shape[:-1], len(W2))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        W1, W2, slope = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1])
        dx = g.new_empty(len(g), W1.shape[1])
        hidden = g.new_empty(min(CHUNK, len(g)), len(W1))
        for i in range(0, len(g), CHUNK):
            part = slice(i, i + CHUNK)
            du = torch.mm(g[part], W2, out=hidden[: len(g[part])])
            torch.mm(du.mul_(slope[part]), W1, out=dx[part])  # (FeedForward 2)
        return dx.view(*grad.shape[:-1], -1), None, None, None, None, None


def examples(device):
    """Odd sizes, one token, two chunks, a strided input, an expanded input."""
    from torch import nn

    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    up, down = nn.Linear(7, 13), nn.Linear(13, 5)
    for parameter in (*up.parameters(), *down.parameters()):
        parameter.data = draw(*parameter.shape)
        parameter.requires_grad_(False)
    inputs = (draw(2, 5, 7), draw(1, 7), draw(CHUNK + 3, 7), draw(4, 14)[:, ::2])
    return [(x, up, down) for x in (*inputs, draw(1, 7).expand(5, 7))]


EXAMPLES = {"feed_forward": examples}
