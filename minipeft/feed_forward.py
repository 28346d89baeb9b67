r"""The faster twin of gpt.py's `feed_forward` behind frozen weights: one function, in chunks.

At 2,048 tokens of width 384 a tensor of the hidden width has 12.6 MB, more than a core's cache, and
autograd, left to itself, passes over several of them a layer. Here the tokens go through in chunks,
whose hidden numbers are used again while they are near, and one such tensor is kept. The tanh form
of the GELU is a logistic function in disguise, 1 + tanh(z) = 2 sigma(2z):

    (FeedForward 1)   u = x W1^T + b1,   h = u s,   s = sigma(u (a + b u^2)),   y = h W2^T + b2
    (FeedForward 2)   h' = s (1 + (u - h) (a + 3 b u^2))        a = 2 sqrt(2 / pi), b = 0.044715 a
    (FeedForward 3)   dx = ((dy W2) * h') W1

h' is made in the forward pass, while u and s are at hand, and kept in the place of u; without
gradients nothing of the hidden width is kept.

It needs float32 and two plain linear layers with biases that want no gradient, as they are behind
most techniques and in evaluation, and no autocast; it cannot be differentiated twice, and
MINIPEFT_FAST_PATH=off brings the definition back for that. The last bits differ from it. Trained
weights need h as well, and then it wins nothing.

What it saves are passes over M N numbers that miss the cache, M tokens, N hidden. Where all of them
fit there is nothing to save.
"""

from __future__ import annotations

import math

import torch
from torch.autograd.function import once_differentiable

CHUNK = 512  # tokens whose hidden numbers are held at once
TILE = 2**15  # numbers, about, that go through the steps of the GELU together
LINEAR = 2 * math.sqrt(2 / math.pi)  # a
CUBIC = 0.044715 * LINEAR  # b


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
            torch.mm(rows[part], W1.T, out=u)
            gelu(u, b1, h, slope[part] if wanted else None)
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
            torch.mm(du.mul_(slope[part]), W1, out=dx[part])  # (FeedForward 3)
        return dx.view(*grad.shape[:-1], dx.shape[1]), None, None, None, None, None


def gelu(u, b1, h, slope=None):
    """h <- gelu(u + b1) and slope <- gelu'(u + b1), tile by tile; u is overwritten. Contiguous."""
    a, one = u.new_tensor(LINEAR), u.new_ones(())
    rows = max(1, TILE // max(1, u.shape[1]))
    scratch = u.new_empty(rows, u.shape[1])
    slopes = [None] * len(u.split(rows)) if slope is None else slope.split(rows)
    for u_tile, h_tile, slope_tile in zip(u.split(rows), h.split(rows), slopes):
        s = scratch[: len(u_tile)]
        u_tile.add_(b1)
        torch.addcmul(a, u_tile, u_tile, value=CUBIC, out=s)
        s.mul_(u_tile).sigmoid_()
        torch.mul(u_tile, s, out=h_tile)
        if slope_tile is not None:
            torch.addcmul(a, u_tile, u_tile, value=3 * CUBIC, out=slope_tile)
            torch.addcmul(one, slope_tile, u_tile.sub_(h_tile), out=slope_tile)
            slope_tile.mul_(s)  # (FeedForward 2)


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
