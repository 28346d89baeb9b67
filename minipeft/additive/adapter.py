r"""Adapters: small bottleneck layers inside a frozen transformer (Houlsby et al., 2019, arXiv
1902.00751; Pfeiffer et al., 2020, arXiv 2005.00247; parallel: He et al., 2021, arXiv 2110.04366).

Two thin layers squeeze the hidden vector to m numbers and back; only they learn.

    (Adapter 1)   A(x) = s [W_2 sigma(W_1 x + b_1) + b_2]     W_1 in R^(m x D), W_2 in R^(D x m)
    (Adapter 2)   Houlsby    y = f + A(f)      f the output of attention, and again of feed-forward
    (Adapter 3)   Pfeiffer   y = f + A(f)      after the feed-forward only: half the parameters
    (Adapter 4)   parallel   y = f + A(x)      x what the sub-layer reads; nothing waits for f

y goes where f went, into the residual sum. sigma is the activation, s the scale, fixed. The library
`adapters` has two forms on GPT-2 that read the residual stream h before the LayerNorm instead:

    (Adapter 5)   its Pfeiffer   y = (h + f) + A(h + f)
    (Adapter 6)   its parallel   y = (h + f) + A(h)

Trained parameters: 2 D m + m + D an adapter, 2 D more with a LayerNorm of its own; L adapters, 2 L
for Houlsby, who also trains every LayerNorm: 4 D a layer and 2 D for the last one.

    placement    sigma    W_1                   W_2                   b_1, b_2
    houlsby      gelu     N(0, 0.001^2) cut at two standard deviations       0   init="truncated"
    pfeiffer     relu     U(+-1/sqrt(D))        0                            0   init="lora"
    parallel     relu     U(+-1/sqrt(D))        0                            0   init="lora"
    variant="adapters": houlsby swish, houlsby and pfeiffer N(0, 0.02^2)     0   init="normal"

so that the start is the base, bitwise, with "lora", and close to it with the other two.

Reduces to: the base at W_2 = 0, b_2 = 0; Pfeiffer is Houlsby without the first adapter; LoRA is a
parallel adapter on a projection whose sigma is the identity, with s = alpha / r and no biases.

How this differs from adapters: there Pfeiffer adapters read h + f unless original_ln_before=False,
parallel ones h, and widths are given as a reduction factor, D / m; variant="adapters" does as
they do. peft has no adapters. Lin et al.'s adapter (Adapter_L in LoRA's tables) is `own_norm=True`.

Footguns: without the inner residual (f + ...) the first step destroys the model; a bottleneck that
starts large does too; s belongs to b_2 as well; there is nothing to merge, because sigma bends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minipeft import wrap
from minipeft.additive.bottleneck import ACTIVATIONS, INITS, Bottleneck
from minipeft.selective.full import train_parameters
from minipeft.technique import Technique

# -- modules


class AdapterWrapper(wrap.Wrapper):
    """A module with `adapter` (D -> D) at it, usually a Bottleneck, which is (Adapter 1); the three
    forms below say what it reads.

    `left_out` switches the adapter off, `drawn_out` in training only (adapter_drop.py sets both).
    """

    def __init__(self, inner, adapter):
        super().__init__(inner)
        self.adapter = adapter
        self.left_out = self.drawn_out = False

    def idle(self):
        """Whether the adapter is left out of this pass."""
        return self.left_out or (self.training and self.drawn_out)

    def added(self, f, x):
        """f + A(x). (Adapter 2) (Adapter 4)"""
        direct = type(self.adapter) is Bottleneck
        return self.adapter.add_to(f, x) if direct else f + self.adapter(x)


class SequentialAdapter(AdapterWrapper):
    """y = f + A(f), f what the wrapped module gives. (Adapter 2) (Adapter 3) (Adapter 5)"""

    def forward(self, x, *args, **kwargs):
        f = self.inner(x, *args, **kwargs)
        return f if self.idle() else self.added(f, f)  # (Adapter 2) (Adapter 3) (Adapter 5)


class ParallelAdapter(AdapterWrapper):
    """y = f + A(x), x what the wrapped module reads. (Adapter 4)"""

    def forward(self, x, *args, **kwargs):
        f = self.inner(x, *args, **kwargs)
        return f if self.idle() else self.added(f, x)  # (Adapter 4)


class ResidualParallelAdapter(AdapterWrapper):
    """Around a block: y = (h + f) + A(h), h the residual stream after attention. (Adapter 6)"""

    def forward(self, x, cache=None):
        seen = []  # h is what the block's second LayerNorm is given, whatever else is on the block
        norm = wrap.base_module(self.inner).ln_2
        hook = norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            y = self.inner(x, cache)
        finally:
            hook.remove()
        return y if self.idle() else self.added(y, seen[0])  # (Adapter 6)


def install_bottlenecks(model, attachment, sites, **shape):
    """Put a Bottleneck at every site, on its block's device and dtype; returns the wrappers.

    sites: pairs of a path ("blocks.3.mlp") and one of the three wrapper classes above. shape: what
    Bottleneck takes (bottleneck, scale, activation, init, own_norm, dropout).
    """
    wrappers = []
    for path, form in sites:
        adapter = Bottleneck(**place_of(model, path), **shape)
        wrappers.append(attachment.wrap(model, path, form(wrap.resolve(model, path), adapter)))
    return wrappers


def place_of(model, path):
    """width, device and dtype for an adapter at `path`: those of the block's second LayerNorm,
    which stays in floating point when projections are quantised.
    """
    like = wrap.resolve(model, ".".join(path.split(".")[:2]) + ".ln_2.weight")
    return {"width": like.shape[0], "device": like.device, "dtype": like.dtype}


# -- the technique

PAPERS = {  # (variant, placement): activation, init, sub-layers, whether LayerNorms train
    ("paper", "houlsby"): ("gelu", "truncated", ("attn", "mlp"), True),
    ("paper", "pfeiffer"): ("relu", "lora", ("mlp",), False),
    ("paper", "parallel"): ("relu", "lora", ("mlp",), False),
    ("adapters", "houlsby"): ("swish", "normal", ("attn", "mlp"), False),
    ("adapters", "pfeiffer"): ("relu", "normal", ("block",), False),
    ("adapters", "parallel"): ("relu", "lora", ("block",), False),
}
CHOICES = {  # field -> what it may be
    "placement": ("houlsby", "pfeiffer", "parallel"),
    "variant": ("paper", "adapters"),
    "on": (None, "mlp", "attn"),
    "activation": (None, *ACTIVATIONS),
    "init": (None, *INITS),
}


@dataclass(frozen=True)
class Adapter(Technique):
    """Bottleneck adapters in every block.

    placement: "houlsby" (after attention and feed-forward), "pfeiffer" (after one) or "parallel".
    bottleneck: m, the width in the middle.
    scale: s; He et al. use 4 with parallel adapters.
    activation: sigma: relu, gelu, gelu_tanh, swish, tanh or identity; None is the paper's.
    init: "lora", "truncated" or "normal", see the table above; None is the paper's.
    on: "mlp" or "attn", the sub-layer of pfeiffer and parallel adapters; None is mlp.
    layer_norms: train the LayerNorms of the adapted blocks and the last one; None is the paper's.
    own_norm: give every adapter a LayerNorm of its own on what it reads.
    dropout: probability of dropping one of the m numbers, in training.
    leave_out: layers, from 0, without an adapter.
    variant: "paper", or "adapters" for what that library computes.
    """

    placement: str = "houlsby"
    bottleneck: int = 64
    scale: float = 1.0
    activation: str | None = None
    init: str | None = None
    on: str | None = None
    layer_norms: bool | None = None
    own_norm: bool = False
    dropout: float = 0.0
    leave_out: tuple[int, ...] = ()
    variant: str = "paper"

    learning_rate: ClassVar[float] = 4e-3
    cannot_merge: ClassVar[str | None] = (
        "an adapter has an activation between its two matrices, so no weight computes the same"
    )

    def shape(self):
        """What Bottleneck needs, the paper's choices filled in."""
        activation, init, _, _ = PAPERS[self.variant, self.placement]
        given = {n: getattr(self, n) for n in ("bottleneck", "scale", "own_norm", "dropout")}
        return given | {"activation": self.activation or activation, "init": self.init or init}

    def layers(self, n_layer):
        """The layers that get adapters."""
        return [n for n in range(n_layer) if n not in self.leave_out]

    def sites(self, n_layer):
        """(path, wrapper class) of every adapter, from the bottom up."""
        form = SequentialAdapter if self.placement != "parallel" else ParallelAdapter
        if (self.variant, self.placement) == ("adapters", "parallel"):
            form = ResidualParallelAdapter
        subs = (self.on,) if self.on else PAPERS[self.variant, self.placement][2]
        tails = ["" if sub == "block" else f".{sub}" for sub in subs]
        return [(f"blocks.{n}{tail}", form) for n in self.layers(n_layer) for tail in tails]

    def trains_layer_norms(self):
        """Whether the LayerNorms train beside the adapters."""
        paper = PAPERS[self.variant, self.placement][3]
        return paper if self.layer_norms is None else self.layer_norms

    def check(self, config):
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                options = ", ".join(map(repr, known))
                raise ValueError(f"{name}={getattr(self, name)!r}: choose from {options}")
        if self.on and (self.placement == "houlsby" or self.variant == "adapters"):
            raise ValueError(
                f"on={self.on!r} is for variant='paper' of pfeiffer and parallel adapters; "
                f"placement={self.placement!r}, variant={self.variant!r} has its own places"
            )
        if not isinstance(self.bottleneck, int) or self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck!r} is not a positive integer")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")
        check_layers("leave_out", self.leave_out, config)

    def install(self, model, attachment):
        install_bottlenecks(model, attachment, self.sites(len(model.blocks)), **self.shape())
        if self.trains_layer_norms():
            layers = self.layers(len(model.blocks))
            chosen = tuple(f"blocks.{n}.ln_{i}." for n in layers for i in (1, 2))
            chosen += ("ln_f.",) if layers else ()
            train_parameters(model, attachment, lambda path: path.startswith(chosen))

    def count(self, config):
        D, m, layers = config.d_model, self.bottleneck, len(self.layers(config.n_layer))
        one = 2 * D * m + m + D + (2 * D if self.own_norm else 0)
        norms = 4 * D * layers + 2 * D * (layers > 0) if self.trains_layer_norms() else 0
        return one * len(self.sites(config.n_layer)) + norms


def check_layers(name, layers, config):
    """Raise ValueError naming a layer that the model does not have, or that is named twice."""
    for n in layers:
        if not isinstance(n, int) or not 0 <= n < config.n_layer:
            raise ValueError(f"{name} names layer {n!r}; the model has 0 to {config.n_layer - 1}")
    if len(set(layers)) != len(layers):
        raise ValueError(f"{name}={tuple(layers)!r} names a layer twice")
