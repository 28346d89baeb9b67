r"""Magnitude pruning: the smallest weights become zero (Han et al., 2015, arXiv 1506.02626), at
once or little by little while the rest trains on (Zhu & Gupta, 2017, arXiv 1710.01878).

A small weight changes the output little, whatever its input is; so the smallest go first.

    (Magnitude 1)   m_ij = 0 for the floor(s n) smallest of n scores, 1 for the others
                    score |w_ij|;  n counts one matrix (scope "layer") or all (scope "global")
    (Magnitude 2)   W <- m * W        after every step of the optimizer
    (Magnitude 3)   s_t = s (1 - (1 - (t - t_0) / (t_1 - t_0))^3)    t_0 <= t <= t_1, s_t = s after
    (Magnitude 4)   z:g pattern       in every g neighbours of a row the z smallest scores go; 2:4

s in [0, 1) is the sparsity, the share of zeros; t counts optimizer steps. Pruned are the six
projections of every block; embeddings, LayerNorms and biases are left whole. The cubic schedule
takes most of what it takes early, while the network is full of what it can spare.

Trained parameters: all of them, V D + C D + L (12 D^2 + 13 D) + 2 D at d_ff = 4 D; the zeros are
counted, because a dense matrix stores them.

    mask    (Magnitude 1) of the base's weights    one-shot: attaching is pruning
            ones                                   gradual: the base at the start, bitwise

Reduces to: full fine-tuning at s = 0. Wanda with unit activations is this, a row at a time;
SparseGPT with H proportional to I is this, a block of columns at a time.

How this differs from the reference code of the papers that compare with it: there
`|w| <= sorted(|w|)[int(s n)]` prunes one weight too many, and every weight of that size; here
the number is exact and of equal scores the first goes. torch.nn.utils.prune multiplies by the
mask in every forward pass; here the zeros stand in the weight itself, which costs nothing.

Footguns: a mask that is not put back: the optimizer moves pruned weights in every step; a new mask
chosen before the zeros are back, which prunes too many;
the largest pruned instead of the smallest; signs (a large negative weight is large); zeros in a
dense matrix make no multiplication faster: `minipeft bench --names pruning` measures it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.selective.full import FullFineTuning, train_parameters
from minipeft.technique import Technique

PROJECTIONS = ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.up", "mlp.down")


def count_of(share, n):
    """floor(share n), safe from 0.29 * 100 = 28.999..."""
    return math.floor(share * n * (1 + 1e-15))  # more than the product's rounding, at any size


def keep_largest(scores, sparsity):
    """What stays of one tensor: bool of its shape, exactly floor(s n) False. (Magnitude 1)"""
    return keep_largest_of_all([scores], sparsity)[0]


def keep_largest_of_all(scores, sparsity):
    """The same over a list of tensors together: scope "global". (Magnitude 1)"""
    flat = torch.cat([s.flatten() for s in scores])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[: count_of(sparsity, len(flat))]] = False
    parts = keep.split([s.numel() for s in scores])
    return [part.view_as(s) for part, s in zip(parts, scores)]


def keep_pattern(scores, zeros, group):
    """What stays in a z:g pattern of scores (out, in): `zeros` False in every `group` neighbours
    of a row. (Magnitude 4)

    Raises ValueError when `group` does not divide the row.
    """
    check_pattern((zeros, group), scores.shape[-1])
    groups = scores.unflatten(-1, (-1, group))  # (out, in / g, g)
    lowest = groups.argsort(dim=-1, stable=True)[..., :zeros]
    return torch.ones_like(groups, dtype=torch.bool).scatter(-1, lowest, False).flatten(-2)


def check_pattern(pattern, width):
    """Raise ValueError for a pattern that is none, or rows of `width` that it does not divide."""
    if len(pattern) != 2 or not all(isinstance(n, int) for n in pattern):
        raise ValueError(f"pattern={pattern} is no (zeros, group), such as (2, 4)")
    zeros, group = pattern
    if not 0 < zeros < group:
        raise ValueError(f"pattern={zeros}:{group} must have 0 < zeros < group, such as (2, 4)")
    if width % group:
        raise ValueError(
            f"pattern={zeros}:{group} needs rows of a multiple of {group}, not {width}"
        )


def check_sparsity(sparsity):
    """Raise ValueError for what is no share of zeros."""
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity={sparsity} must be at least 0 and below 1")


def cubic_sparsity(step, begin, end, final):
    """s_t at optimizer step `step`: 0 until `begin`, `final` from `end` on. (Magnitude 3)"""
    if step >= end:
        return final
    u = max(0, step - begin) / (end - begin)
    return final * (1 - (1 - u) ** 3)


# -- on a model


def projections(model):
    """{path: nn.Linear} of all projections, in order, under whatever wrappers are on them."""
    found = {}
    for n in range(len(model.blocks)):
        for end in PROJECTIONS:
            path = f"blocks.{n}.{end}"
            found[path] = wrap.base_module(wrap.resolve(model, path))
    return found


def check_floats(model):
    """Raise ValueError for projections that are quantised or packed: their `weight` is made anew at
    each reading, so what is written into it is lost.
    """
    for path, linear in projections(model).items():
        if not isinstance(linear, nn.Linear):
            raise ValueError(
                f"{path} is a {type(linear).__name__}, which is not pruned: prune the model while "
                "its weights are floats, then quantise or pack it"
            )


def masks_for(weights, sparsity, scope="layer", pattern=None):
    """One mask per weight (out, in), by size. (Magnitude 1) (Magnitude 4)"""
    scores = [w.detach().abs() for w in weights]
    if pattern is not None:
        return [keep_pattern(s, *pattern) for s in scores]
    if scope == "global":
        return keep_largest_of_all(scores, sparsity)
    return [keep_largest(s, sparsity) for s in scores]


@torch.no_grad()
def prune_magnitude(model, sparsity=0.5, scope="layer", pattern=None):
    """Zero the smallest weights of all projections, once, in place; returns the model.

    pattern: (zeros, group), such as (2, 4), instead of a sparsity.
    Raises ValueError for a sparsity outside [0, 1), an unknown scope, a pattern that does not fit,
    weights that are no floats; the model is then as it was.
    """
    MagnitudePruning(sparsity, scope, pattern).check(model.config)
    check_floats(model)
    weights = [linear.weight for linear in projections(model).values()]
    for weight, mask in zip(weights, masks_for(weights, sparsity, scope, pattern)):
        weight.masked_fill_(~mask, 0)
    return model


def sparsity_of(model):
    """Share of the projections' weights that are exactly 0."""
    weights = [linear.weight for linear in projections(model).values()]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


class Masked(wrap.Wrapper):
    """A projection whose pruned weights are held at zero. mask (out, in) bool: what stays.

    It computes what is inside: the zeros stand in the weight.
    """

    def __init__(self, inner, mask):
        super().__init__(inner)
        self.register_buffer("mask", mask)

    @property
    def weight(self):
        return wrap.base_module(self.inner).weight

    @torch.no_grad()
    def reapply(self):
        """Put the zeros back. (Magnitude 2)"""
        self.weight.masked_fill_(~self.mask, 0)

    def merged(self, inner):
        return inner


def install_masks(model, attachment, masks):
    """Train every parameter, with `masks` (one a projection, in order) held on the projections."""
    train_parameters(model, attachment, lambda path: True)
    for (path, _), mask in zip(projections(model).items(), masks):
        attachment.wrap(model, path, Masked(wrap.resolve(model, path), mask)).reapply()


class HeldMasks(Technique):
    """What the two techniques below share: every parameter is trained, the zeros are put back."""

    learning_rate: ClassVar[float] = 1e-3

    def count(self, config):
        return FullFineTuning().count(config)

    def after_step(self, model, attachment, step, total_steps):
        """Put the zeros back. (Magnitude 2)"""
        for layer in masked(attachment):
            layer.reapply()

    def export(self, attachment):
        raise ValueError(
            f"{type(self).__name__} changes the whole model, so there is no small file to write: "
            "merge(model), then model.save_pretrained(folder)"
        )


@dataclass(frozen=True)
class MagnitudePruning(HeldMasks):
    """Fine-tune every parameter while the smallest weights are zero. (Magnitude 2)

    sparsity: share of the projections' weights that are zero in the end.
    scope: "layer", the same share in every matrix, or "global", the smallest anywhere.
    pattern: (zeros, group) such as (2, 4), in place of a sparsity; None for any place.
    gradual: along the cubic schedule; otherwise all at once, when it is attached.
    begin: share of the steps after which the schedule begins.
    end: share of the steps after which the full sparsity is reached.
    every: steps between two new masks of the schedule.
    """

    sparsity: float = 0.5
    scope: str = "layer"
    pattern: tuple[int, int] | None = None
    gradual: bool = False
    begin: float = 0.0
    end: float = 0.7
    every: int = 10

    def check(self, config):
        check_sparsity(self.sparsity)
        if self.scope not in ("layer", "global"):
            raise ValueError(f"scope={self.scope!r} is neither 'layer' nor 'global'")
        if self.pattern is not None:
            check_pattern(self.pattern, math.prod(self.pattern))  # rows: as wide as they are now
            if self.gradual:
                raise ValueError("a pattern has one sparsity: gradual=True needs pattern=None")
        if not 0 <= self.begin < self.end <= 1:
            raise ValueError(f"begin={self.begin}, end={self.end}: need 0 <= begin < end <= 1")
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1 step")

    def install(self, model, attachment):
        check_floats(model)
        weights = [linear.weight for linear in projections(model).values()]
        sparsity = 0.0 if self.gradual else self.sparsity
        install_masks(model, attachment, masks_for(weights, sparsity, self.scope, self.pattern))

    def after_step(self, model, attachment, step, total_steps):
        """Put the zeros back, and raise the sparsity where it is time. (Magnitude 2)"""
        super().after_step(model, attachment, step, total_steps)  # first: zeros are the smallest
        if self.gradual and self.due(step, total_steps):
            begin, end = self.begin * total_steps, self.end * total_steps
            sparsity = cubic_sparsity(step, begin, end, self.sparsity)  # (Magnitude 3)
            layers = masked(attachment)
            new = masks_for([m.weight for m in layers], sparsity, self.scope)
            for layer, mask in zip(layers, new):
                layer.mask.logical_and_(mask)  # a pruned weight never comes back
                layer.reapply()

    def due(self, step, total_steps):
        """Whether the mask is made anew after this step: every `every` steps until the end."""
        last = math.ceil(self.end * total_steps)
        return step == last or (step < last and step % self.every == 0)


@dataclass(frozen=True)
class KeepZeros(HeldMasks):
    """Fine-tune every parameter; projection weights that are zero now stay zero. (Magnitude 2)

    What one trains on with after Wanda, SparseGPT or any other pruning that is done once.
    """

    def install(self, model, attachment):
        check_floats(model)
        masks = [linear.weight.detach() != 0 for linear in projections(model).values()]
        install_masks(model, attachment, masks)


def masked(attachment):
    """The Masked wrappers of an attachment, in order."""
    return [w for w in attachment.wrappers() if isinstance(w, Masked)]


def hold(model, masks):
    """For a training loop: a function(model, step, steps) that keeps {path: mask} applied.
    Apply it once by hand before the first step. (Magnitude 2)
    """
    linears = {path: m for path, m in projections(model).items() if path in masks}

    @torch.no_grad()
    def act(*_):
        for path, linear in linears.items():
            linear.weight.masked_fill_(~masks[path], 0)

    return act
