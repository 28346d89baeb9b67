r"""MAM adapter: mix and match (He et al., 2021, arXiv 2110.04366).

The paper reads adapters, prefixes and LoRA as one thing, a learned change of a hidden vector, tries
out where the change should be put, and joins the two best answers: a short prefix for attention, a
wide adapter beside the feed-forward layer.

    (MAM 1)   head(x) = attn(q, [P_k; K], [P_v; V])               P_k, P_v in R^(p x d), each head's
    (MAM 2)   y = f + s [W_2 relu(W_1 x + b_1) + b_2]     f the feed-forward layer's output, x what
              it reads (both behind the LayerNorm), W_1 in R^(m x D), W_2 in R^(D x m), s = 4
    (MAM 3)   the paper's study, at the same number of trained parameters:
              sequential  y = f + A(f)    or    parallel  y = f + A(x)
              on attention                or    on the feed-forward layer
              scaled (s = 4)              or    not

Trained parameters: L (2 D m + m + D) and the prefix's: 2 p L D flat, or with its MLP of width n
p D + (D n + n) + 2 L D (n + 1). `placement_study` gives the techniques of (MAM 3).

    prefix    as in prefix_tuning.py
    W_1       U(-1/sqrt(D), 1/sqrt(D))
    W_2, b    0                          the start is the base behind a random prefix

Reduces to: the parallel adapter at p = 0, and then its start is the base, bitwise; prefix tuning at
W_2 = 0, b_2 = 0.

How this differs from adapters: its MAM has a prefix MLP of width 800 and a bottleneck of D / 2, and
its adapter reads the residual stream before the LayerNorm. peft has no MAM. Published counts leave
the prefix's MLP out: reparameterize=False.

Footguns: the budget belongs to the feed-forward layer, a long prefix buys little; a flat prefix
wants a learning rate at which the adapter diverges; s = 4 multiplies the adapter's steps as well.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

from minipeft.additive.adapter import Adapter, install_bottlenecks
from minipeft.soft_prompt.prefix_tuning import PrefixTuning, install_prefix
from minipeft.technique import Technique


@dataclass(frozen=True)
class MAMAdapter(Technique):
    """A prefix on attention and a scaled parallel adapter on the feed-forward layer.

    prefix_length: p, virtual tokens; 0 leaves the prefix out.
    bottleneck: m, the adapter's width.
    scale: s of the adapter.
    reparameterize: compute the prefix by an MLP while training.
    prefix_bottleneck: the width of that MLP.
    dropout: in training, on the prefix and on the adapter's m numbers.
    """

    prefix_length: int = 30
    bottleneck: int = 512
    scale: float = 4.0
    reparameterize: bool = True
    prefix_bottleneck: int = 512
    dropout: float = 0.0

    learning_rate: ClassVar[float] = 2e-3
    cannot_merge: ClassVar[str | None] = (
        "a prefix is more keys and values, and an adapter has an activation between its matrices; "
        "no weight computes either"
    )

    @property
    def prefix(self):
        """The half for attention, None at length 0. (MAM 1)"""
        shape = self.prefix_length, self.reparameterize, self.prefix_bottleneck, self.dropout
        return PrefixTuning(*shape) if self.prefix_length else None

    @property
    def adapter(self):
        """The half for the feed-forward layer. (MAM 2)"""
        return Adapter("parallel", self.bottleneck, self.scale, dropout=self.dropout)

    def check(self, config):
        for half in filter(None, (self.prefix, self.adapter)):
            half.check(config)

    def install(self, model, attachment):
        width = self.prefix_bottleneck if self.reparameterize else None
        install_prefix(model, attachment, self.prefix_length, width, self.dropout)
        sites = self.adapter.sites(len(model.blocks))
        install_bottlenecks(model, attachment, sites, **self.adapter.shape())

    def count(self, config):
        return sum(half.count(config) for half in filter(None, (self.prefix, self.adapter)))

    def flattened(self):
        """The technique without the prefix's MLP, or None when it has none."""
        has_one = self.prefix_length and self.reparameterize
        return dataclasses.replace(self, reparameterize=False) if has_one else None


def placement_study(bottleneck=16, scale=4.0, prefix_share=4):
    """What the paper compares, {name: technique}, each of about the size of one adapter of this
    bottleneck a layer. (MAM 3)

    prefix_share: MAM gives one part in `prefix_share` of its budget to the prefix, and the rest to
    the adapter. Run it with `python -m minipeft.placement_study`.
    """
    if bottleneck < prefix_share or prefix_share < 2:
        raise ValueError(
            f"bottleneck={bottleneck} cannot be shared between a prefix (one part in "
            f"prefix_share={prefix_share}) and an adapter; give at least {max(2, prefix_share)}"
        )
    one = {"bottleneck": bottleneck, "init": "lora", "activation": "relu"}
    study = {
        f"{form}, {where}": Adapter(placement, on=on, **one)
        for where, on in (("attention", "attn"), ("feed-forward", "mlp"))
        for form, placement in (("sequential", "pfeiffer"), ("parallel", "parallel"))
    }
    study["scaled parallel, feed-forward"] = Adapter("parallel", on="mlp", scale=scale, **one)
    # A prefix row costs 2 D a layer, a unit of a bottleneck 2 D + 1: the same but for biases.
    study["prefix, attention"] = PrefixTuning(bottleneck, reparameterize=False)
    p = bottleneck // prefix_share
    study["mix and match"] = MAMAdapter(p, bottleneck - p, scale, reparameterize=False)
    return study
