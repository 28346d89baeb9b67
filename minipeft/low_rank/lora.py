r"""LoRA: low-rank adaptation (Hu et al., 2021, arXiv 2106.09685).

The weight's change is a product of two thin matrices; the weight itself stays frozen.

    (LoRA 1)   h  = W x + b + s B A x          W in R^(out x in), A in R^(r x in), B in R^(out x r)
    (LoRA 2)   s  = alpha / r                  rank-stabilised: alpha / sqrt(r)  (arXiv 2312.03732)
    (LoRA 3)   W' = W + s B A                  merged: no cost at inference
    (LoRA 4)   dB = s g (A x)^T,   dA = s B^T g x^T      g the gradient at h; at the start dA = 0

Dropout, where asked for, falls on the x that A reads, in training only.

Trained parameters: the sum over the chosen projections of r (in + out). With `share_qkv` the three
projections that read the same x share one A, and A counts once: the form peft gives GPT-2's c_attn.

    A    U(-1/sqrt(in), 1/sqrt(in))    (Kaiming, a = sqrt 5)
    B    0                             so the model at the start is the base, bitwise

Reduces to: the base at B = 0; a parallel adapter with the identity as activation; at rank
min(in, out) it can represent any change of W. AdaLoRA with nothing pruned is LoRA.

How this differs from peft: q, k and v are adapted apart, as in the paper; peft adapts GPT-2's joint
c_attn, where one A serves all three. From loralib: eval() merges nothing here, `merge` does.

Footguns: alpha instead of alpha / r (the scale then grows with the rank); A and B both zero (no
gradient, ever) or both random (not the base at the start); s applied to the bias too; merging
twice. A config without alpha means alpha = 8 in peft, not alpha = r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import gpt, wrap
from minipeft.dispatch import fast_path, never
from minipeft.technique import Technique

PROJECTIONS = {  # short name -> path inside a block
    "q": "attn.q",
    "k": "attn.k",
    "v": "attn.v",
    "o": "attn.o",
    "up": "mlp.up",
    "down": "mlp.down",
}


def projection_shape(config, target):
    """(out, in) of a projection in the model that `config` describes."""
    D, W = config.d_model, config.ff_width
    return {"up": (W, D), "down": (D, W)}.get(target, (D, D))


def path_of(block, target):
    """Logical path of a target in a block."""
    return f"blocks.{block}.{PROJECTIONS[target]}"


def pattern_value(pattern, path, default):
    """A pattern of (place, value) pairs at a path: its entry, its target's, or `default`."""
    values = dict(pattern)
    target = next(t for t, end in PROJECTIONS.items() if path.endswith(end))
    return values.get(path, values.get(target, default))


def check_targets(targets):
    """Raise ValueError naming an unknown, missing or repeated target."""
    if isinstance(targets, str) or not targets:
        raise ValueError(f"targets={targets!r}: give a tuple of some of {', '.join(PROJECTIONS)}")
    for target in targets:
        if target not in PROJECTIONS:
            raise ValueError(f"unknown target {target!r}; choose from {', '.join(PROJECTIONS)}")
    if len(set(targets)) != len(targets):
        raise ValueError(f"targets={targets!r} names a projection twice")


def lora_scale(alpha, rank, rank_stabilized=False):
    """s of (LoRA 2)."""
    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank


def lora_delta(A, B, scale):
    """s B A, (out, in): what is added to the weight. (LoRA 3)"""
    return scale * (B @ A)


def lora_forward(h, x, A, B, scale):
    """h + s B A x with h (..., out), x (..., in), in one pass over h. (LoRA 1)

    What autograd makes of these two products is (LoRA 4).
    """
    u = F.linear(x, A)  # (..., r): never a matrix of the size of W
    h2, u2 = h.flatten(0, -2), u.flatten(0, -2)
    return torch.addmm(h2, u2, B.T.to(h2.dtype), alpha=scale).view_as(h)


def one_function(x, weight, bias, A, B, scale):
    """What the twin needs: gradients for x, A and B alone, one dtype, and no autocast."""
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    plain = x.dtype == weight.dtype == A.dtype and not torch.is_autocast_enabled(x.device.type)
    return frozen and plain


def pays(x, weight, bias, A, B, scale):
    """The twin saves passes over the rows, so there must be rows, and a backward pass."""
    return torch.is_grad_enabled() and x.numel() > 32 * x.shape[-1]


@fast_path(
    "minipeft.kernels.lora",
    capability=(8, 0),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    supports=one_function,
    wins=never,  # no committed measurement shows a win
)
@fast_path(
    "minipeft.low_rank.lora_function",
    devices=("cpu", "cuda", "mps"),
    supports=one_function,
    wins=pays,
)
def lora_linear(x, weight, bias, A, B, scale):
    """W x + b + s B A x, x (..., in) -> (..., out). (LoRA 1)"""
    return lora_forward(F.linear(x, weight, bias), x, A, B, scale)


class LoRALinear(wrap.Wrapper):
    """A projection with a low-rank branch beside it. (..., in) -> (..., out)"""

    def __init__(self, inner, rank, scale, dropout=0.0, A=None):
        super().__init__(inner)
        base = wrap.base_module(inner)
        place = getattr(base, "place", None)  # a quantised layer says what its floats would be
        place = place or {"device": base.weight.device, "dtype": base.weight.dtype}
        self.scale = scale
        self.A = nn.Parameter(torch.empty(rank, base.in_features, **place)) if A is None else A
        self.B = nn.Parameter(torch.zeros(base.out_features, rank, **place))
        self.drop = nn.Dropout(dropout)
        if A is None:
            nn.init.uniform_(self.A, -(base.in_features**-0.5), base.in_features**-0.5)

    def forward(self, x):
        inner = self.inner
        plain = gpt.plain(inner, nn.Linear)
        if plain and not (self.training and self.drop.p):
            return lora_linear(x, inner.weight, inner.bias, self.A, self.B, self.scale)
        return lora_forward(inner(x), self.drop(x), self.A, self.B, self.scale)

    def delta(self):
        """The change of the weight, (out, in). (LoRA 3)"""
        return lora_delta(self.A, self.B, self.scale)

    def merged(self, inner):
        return linear_with(inner, inner.weight + self.delta(), inner.bias)


def linear_with(like, weight, bias):
    """An nn.Linear with these tensors, trainable as `like` is."""
    linear = nn.Linear(like.in_features, like.out_features, bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach(), like.weight.requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), like.weight.requires_grad)
    return linear.train(like.training)


@dataclass(frozen=True)
class LoRA(Technique):
    """Low-rank adaptation of chosen projections in every block.

    rank: r, the width of the branch; at most min(in, out) of each target.
    alpha: the scale is alpha / rank, or alpha / sqrt(rank) with rank_stabilized.
    dropout: probability of dropping what A reads, in training.
    targets: some of q, k, v, o, up, down.
    rank_stabilized: rsLoRA's scale.
    share_qkv: one A for q, k and v (all three must be targets), as peft has it on GPT-2.
    rank_pattern: (place, rank) pairs where the rank differs. A place is a target ("q") or one path
        ("blocks.0.attn.q"), which counts before the target; rank 0 leaves the place alone.
    alpha_pattern: (place, alpha) pairs, likewise.
    """

    rank: int = 8
    alpha: float = 16
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    rank_stabilized: bool = False
    share_qkv: bool = False
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()

    learning_rate: ClassVar[float] = 1e-2

    @property
    def scale(self):
        """s of (LoRA 2)."""
        return lora_scale(self.alpha, self.rank, self.rank_stabilized)

    def check(self, config):
        check_targets(self.targets)
        if self.share_qkv and not {"q", "k", "v"} <= set(self.targets):
            raise ValueError(f"share_qkv needs q, k and v among the targets, not {self.targets}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")
        limit = min(min(projection_shape(config, t)) for t in self.targets)
        if not 1 <= self.rank <= limit:
            raise ValueError(
                f"rank={self.rank} must be from 1 to {limit}, the smaller side of the targets "
                f"{self.targets}; beyond it B A gains nothing"
            )
        self.check_patterns(config)

    def check_patterns(self, config):
        """Raise ValueError for an entry that names no place or a rank that does not fit."""
        known = {p for n in range(config.n_layer) for t in self.targets for p in (t, path_of(n, t))}
        for name, value in (*self.rank_pattern, *self.alpha_pattern):
            if name not in known:
                raise ValueError(f"a pattern names {name!r}, which is no place of {self.targets}")
            if (name, value) in self.rank_pattern and value < 0:
                raise ValueError(f"rank_pattern gives {name} rank {value}; 0 leaves a place alone")
        for path, target, rank, _ in self.places(config.n_layer):
            limit = min(projection_shape(config, target))
            if not 1 <= rank <= limit:
                raise ValueError(f"rank_pattern gives {path} rank {rank}; from 0 to {limit} fits")
        for n in range(config.n_layer if self.share_qkv else 0):
            ranks = {pattern_value(self.rank_pattern, path_of(n, t), self.rank) for t in "qkv"}
            if len(ranks) > 1:
                raise ValueError(f"share_qkv needs one rank for q, k, v of block {n}, not {ranks}")

    def places(self, n_layer):
        """(path, target, rank, scale) of every projection that gets a branch, in order."""
        found = []
        for path, target in [(path_of(n, t), t) for n in range(n_layer) for t in self.targets]:
            rank = pattern_value(self.rank_pattern, path, self.rank)
            alpha = pattern_value(self.alpha_pattern, path, self.alpha)
            if rank:
                found.append((path, target, rank, lora_scale(alpha, rank, self.rank_stabilized)))
        return found

    def install(self, model, attachment):
        shared = {}  # block -> the A of its q, k and v
        for path, target, rank, scale in self.places(len(model.blocks)):
            block = path.split(".")[1] if self.share_qkv and target in "qkv" else None
            inner = wrap.resolve(model, path)
            if wrap.is_empty(inner):
                continue
            layer = LoRALinear(inner, rank, scale, self.dropout, shared.get(block))
            attachment.wrap(model, path, layer)
            if block is not None:
                shared[block] = layer.A

    def count(self, config):
        total = 0
        for _, target, rank, _ in self.places(config.n_layer):
            out, into = projection_shape(config, target)
            again = self.share_qkv and target in "kv"  # its A is q's, counted there
            total += rank * (out if again else into + out)
        return total
