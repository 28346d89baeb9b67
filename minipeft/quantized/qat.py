r"""QAT: quantisation-aware training, LSQ's learned step (Esser et al., 2019, arXiv 1902.08153).

Training goes on with weights that are rounded in every forward pass, so that they settle where
rounding hurts little. Rounding has no gradient; the straight-through estimator (Bengio et al.,
2013, arXiv 1308.3432) takes it for the identity.

    (QAT 1)   k  = clamp(round(w / s) + z, low, high),    w' = s (k - z)
    (QAT 2)   dw = g  where low <= round(w / s) + z <= high, else 0         g the gradient at w'
    (QAT 3)   ds = (1 / sqrt(n high)) sum of g (round(w / s) - w / s), clipped: g (limit - z)
    (QAT 4)   low = -2^(b-1),  high = 2^(b-1) - 1,  z = 0,  s = e^sigma at 2 mean |w| / sqrt(high)

s has one value a row of W, or a group of `group_size` columns of it; n is the number of weights
that share it. With `learn_scale=False` s = max |w| / high of the present weights, without gradient;
nothing is clipped then.

Trained parameters: the sum over the chosen projections of out in, and out (in / group_size) steps
where they are learned. Everything else is frozen.

    w        the base's weight, a copy
    sigma    log(2 mean |w| / sqrt(high)), the mean over the group

It is no no-op: it starts as the base rounded to b bits.

Reduces to: full fine-tuning of the projections' weights as b grows; merged it is a plain GPT whose
weights lie on the grid, which round-to-nearest on the same grid leaves as they are.

How this differs from torch.ao: the same function and gradient (`fake_quantize`), no observers. From
LSQ: the logarithm of s is trained, so that an Adam step changes every s by the same factor and none
becomes negative; activations stay in floating point.

Footguns: rounding without the estimator (no gradient at all); the estimator without the clip
(weights wander off beyond the grid); the clip's test on w / s where it belongs on the rounded
value; the gradient of max |w|; a rate that suits the base's weights is too high for 2 bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.low_rank.lora import check_targets, linear_with, path_of, projection_shape
from minipeft.technique import Technique


class FakeQuantize(torch.autograd.Function):
    """Rounding to a grid with the gradients of (QAT 2) and (QAT 3)."""

    @staticmethod
    def forward(ctx, w, scale, zero, low, high):
        u = w * (1 / scale)
        k = u.round() + zero
        ctx.save_for_backward(u, k, scale)
        ctx.limits = zero, low, high
        return scale * (k.clamp(low, high) - zero)  # (QAT 1)

    @staticmethod
    def backward(ctx, g):
        u, k, scale = ctx.saved_tensors
        zero, low, high = ctx.limits
        inside = (k >= low) & (k <= high)
        dw = g * inside  # (QAT 2)
        ds = g * torch.where(inside, k - zero - u, k.clamp(low, high) - zero)
        ds = ds.sum_to_size(scale.shape)
        n = u.numel() / scale.numel()
        return dw, ds / math.sqrt(n * max(high, 1)), None, None, None  # (QAT 3)


def fake_quantize(w, scale, zero=0, low=-8, high=7):
    """w rounded to the points scale (k - zero), k a whole number from low to high. (QAT 1)

    w any shape; scale a tensor that broadcasts to it, positive; zero a whole number. Gradients are
    the straight-through estimator's for w and LSQ's for scale. Raises ValueError for an empty grid.
    """
    if not low <= zero <= high or low == high:
        raise ValueError(f"zero={zero} must lie between low={low} and high={high}, which differ")
    return FakeQuantize.apply(w, scale, zero, low, high)


def limits(bits):
    """(low, high) of a symmetric grid. (QAT 4)"""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def first_scale(w, high):
    """LSQ's start for weights (..., size), (..., 1). (QAT 4)"""
    tiny = torch.finfo(w.dtype).tiny
    return (2 * w.abs().mean(-1, keepdim=True) / math.sqrt(high)).clamp(min=tiny)


class FakeQuantizedLinear(wrap.Wrapper):
    """A projection whose weight is a trained copy, rounded on every use. (..., in) -> (..., out)"""

    def __init__(self, inner, bits, group_size, learn_scale):
        super().__init__(inner)
        self.low, self.high = limits(bits)
        weight = inner.weight.detach()
        self.group_size = group_size or weight.shape[1]
        self.weight = nn.Parameter(weight.clone())
        self.sigma = None
        if learn_scale:
            start = first_scale(self.grouped(weight), self.high)
            self.sigma = nn.Parameter(start.log())  # (out, groups, 1)

    def grouped(self, weight):
        return weight.unflatten(1, (-1, self.group_size))  # (out, groups, size)

    def scale(self):
        """s, (out, groups, 1). (QAT 4)"""
        if self.sigma is not None:
            return self.sigma.exp()
        largest = self.grouped(self.weight.detach()).abs().amax(-1, keepdim=True)
        return (largest / self.high).clamp(min=torch.finfo(largest.dtype).tiny)

    def rounded(self):
        """w', (out, in). (QAT 1)"""
        groups = self.grouped(self.weight)
        return fake_quantize(groups, self.scale(), 0, self.low, self.high).flatten(1)

    def forward(self, x):
        return F.linear(x, self.rounded(), self.inner.bias)

    def merged(self, inner):
        return linear_with(inner, self.rounded(), inner.bias)


@dataclass(frozen=True)
class QAT(Technique):
    """Train the projections' weights so that they can be rounded to few bits.

    bits: of a weight, from 2 to 8.
    group_size: columns of a row that share a step; None for the whole row.
    targets: some of q, k, v, o, up, down.
    learn_scale: train the steps too (LSQ); without it they follow the largest weight.
    """

    bits: int = 4
    group_size: int | None = None
    targets: tuple[str, ...] = ("q", "k", "v", "o", "up", "down")
    learn_scale: bool = True

    learning_rate: ClassVar[float] = 1e-3

    def check(self, config):
        check_targets(self.targets)
        if self.bits not in range(2, 9):
            raise ValueError(f"bits={self.bits!r} must be from 2 to 8")
        for target in self.targets:
            width = projection_shape(config, target)[1]
            if self.group_size is not None and (self.group_size < 1 or width % self.group_size):
                raise ValueError(
                    f"group_size={self.group_size} does not divide the {width} columns of {target}"
                )

    def install(self, model, attachment):
        for n in range(len(model.blocks)):
            for path in (path_of(n, target) for target in self.targets):
                inner = wrap.resolve(model, path)
                if type(inner) is not nn.Linear:
                    raise ValueError(
                        f"{path} is a {type(inner).__name__}, not a plain linear layer: merge or "
                        "detach what is on it, then attach QAT"
                    )
                if not inner.weight.numel():  # pruned away: there is nothing to round
                    continue
                if inner.in_features % (self.group_size or 1):  # pruned to other widths
                    raise ValueError(
                        f"group_size={self.group_size} does not divide the {inner.in_features} "
                        f"columns of {path}"
                    )
                layer = FakeQuantizedLinear(inner, self.bits, self.group_size, self.learn_scale)
                attachment.wrap(model, path, layer)

    def count(self, config):
        total = 0
        for target in self.targets:
            out, into = projection_shape(config, target)
            steps = out * into // (self.group_size or into) if self.learn_scale else 0
            total += out * into + steps
        return config.n_layer * total
