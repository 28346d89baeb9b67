r"""UniPELT: several techniques, each behind a gate that the text opens (Mao et al., 2021, arXiv
2110.07577).

LoRA on q and v, a prefix, and an adapter sit in every layer; how much of each is used is decided
by one number in (0, 1) that is computed from what the layer reads.

    (UniPELT 1)   q_t = W_q x_t + b_q + G^q_t B A x_t              and v likewise, with its own gate
    (UniPELT 2)   head(x)_t = attn(q_t, [G^P_t P_k; K], [G^P_t P_v; V])
    (UniPELT 3)   y_t = f_t + G^A_t [W_2 relu(W_1 f_t + b_1) + b_2]        f the feed-forward output

G in (0, 1) are gates (gates.py), the mean over the text up to t of sigmoid(w . x_t + b). Those of
q, v and the prefix read what attention reads, the adapter's reads f. LoRA's alpha / r is replaced
by the gate. In (UniPELT 2) the prefix is another one for every query, which plain attention cannot
have; with vectors of twice the width it can:

    (UniPELT 4)   q'_t = sqrt(2) [q_t; G_t q_t],   k' = [0; P_k] and [K; 0],   v' likewise,
                  y' = attn(q', k', v') = [y'_1; y'_2],   head_t = y'_1 + G_t y'_2

Trained parameters: L [4 D r + 2 (D + 1)] for LoRA, L [2 D m + m + D + D + 1] for adapters, and for
the prefix L (D + 1) and its own: 2 p L D flat, p D + (D n + n) + 2 L D (n + 1) with its MLP.

    gates                  near 1/2, see gates.py
    A, W_1                 U(-1/sqrt(D), 1/sqrt(D))
    B, W_2, b_1, b_2       0
    prefix                 as in prefix_tuning.py

Reduces to: LoRA at alpha = r with no prefix, LoRA's gates at 1 and the adapter's at 0; prefix
tuning with the prefix's gate at 1 and the others at 0. A shut prefix gate is not the base: zero
keys take softmax mass. A size of 0 leaves a technique out, as in the paper's UniPELT (AP).

How this differs from adapters, and from the authors' code: gates there are a mean over the row,
padding included, which in a causal model sees the future (gates.py). gate_over="sequence" has that
mean, without the padding, for classifiers.

Footguns: alpha / r on top of the gate; one gate for q and v; the gate put on the scores of the
prefix but not on its values; a gate on the text's keys.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.additive.adapter import Adapter, install_bottlenecks, place_of
from minipeft.hybrid.gates import BlockPass, Gate, GatedBlock
from minipeft.low_rank.lora import LoRALinear
from minipeft.soft_prompt.prefix_attention import with_prefix
from minipeft.soft_prompt.prefix_tuning import (
    PrefixCore,
    PrefixTuning,
    install_prefix,
    layers_with_heads,
)
from minipeft.technique import Technique

# -- the math


def gated_lora(h, x, A, B, gate):
    """h + G B A x: h (B, T, out), x (B, T, in), gate (B, T). (UniPELT 1)"""
    return h + gate[..., None].to(h.dtype) * F.linear(F.linear(x, A), B)


def doubled(q, k, v, prefix, gate):
    """q', k', v' of (UniPELT 4), twice as wide. q (B, H, T, d), k and v (B, H, S, d), prefix
    (2, B, H, p, d), gate (B, 1, T, 1).
    """
    d = q.shape[-1]
    q = 2**0.5 * torch.cat([q, gate * q], -1)  # sqrt(2), as attention divides by sqrt(2 d)
    return q, *with_prefix(F.pad(prefix, (d, 0)), F.pad(k, (0, d)), F.pad(v, (0, d)))


def halves(y, gate):
    """y'_1 + G y'_2, (B, H, T, 2 d) -> (B, H, T, d). (UniPELT 4)"""
    own, prefixed = y.chunk(2, -1)
    return own + gate * prefixed


# -- the modules


class GatedLoRALinear(LoRALinear):
    """A projection with a low-rank branch behind a gate, (B, T, in) -> (B, T, out)."""

    counts_calls = True  # what it is called with is text, once a pass

    def __init__(self, inner, rank, gate):
        super().__init__(inner, rank, 1.0)
        self.gate = gate

    def forward(self, x):
        return gated_lora(self.inner(x), x, self.A, self.B, self.gate(x))  # (UniPELT 1)


class PrefixGate(wrap.Wrapper):
    """The attention sub-layer, whose input decides on the prefix inside."""

    def __init__(self, inner, gate):
        super().__init__(inner)
        self.gate = gate

    def forward(self, x, cache=None):
        self.gate.current.prefix = self.gate(x)[:, None, :, None]  # (B, 1, T, 1)
        return self.inner(x, cache)


class GatedPrefixCore(PrefixCore):
    """The attention core with a prefix that is scaled anew for every query."""

    def forward(self, q, k, v, mask=None):
        prefix, gate = self.prefix(q.shape[0]).to(k.dtype), self.current.prefix.to(q.dtype)
        mask = self.widened(mask, q.shape[2], k.shape[2], prefix.shape[3])
        return halves(self.inner(*doubled(q, k, v, prefix, gate), mask), gate)  # (UniPELT 2)


class GatedAdapter(nn.Module):
    """G A(f), (B, T, D) -> (B, T, D): it stands where an adapter stands. (UniPELT 3)"""

    def __init__(self, adapter, gate):
        super().__init__()
        self.adapter, self.gate = adapter, gate

    def forward(self, f):
        y = self.adapter(f)
        return self.gate(f)[..., None].to(y.dtype) * y  # (UniPELT 3)


# -- the technique


@dataclass(frozen=True)
class UniPELT(Technique):
    """LoRA, a prefix and an adapter in every block, each behind a gate.

    rank: r of LoRA on q and v; 0 leaves LoRA out.
    prefix_length: p, virtual tokens; 0 leaves the prefix out.
    bottleneck: m, the adapter's width; 0 leaves the adapter out.
    reparameterize: compute the prefix by an MLP while training.
    prefix_bottleneck: the width of that MLP.
    gate_over: "past", the mean up to each token, or "sequence", the row's, for classifiers.
    """

    rank: int = 8
    prefix_length: int = 10
    bottleneck: int = 48
    reparameterize: bool = True
    prefix_bottleneck: int = 512
    gate_over: str = "past"

    learning_rate: ClassVar[float] = 4e-3
    cannot_merge: ClassVar[str | None] = "its gates depend on the text, and weights do not"

    @property
    def prefix(self):
        """The prefix as a technique of its own."""
        return PrefixTuning(self.prefix_length, self.reparameterize, self.prefix_bottleneck)

    @property
    def adapter(self):
        """The adapter as a technique of its own."""
        return Adapter("pfeiffer", self.bottleneck)

    def check(self, config):
        if not (self.rank or self.prefix_length or self.bottleneck):
            raise ValueError("rank, prefix_length and bottleneck are all 0: nothing is left")
        if not 0 <= self.rank <= config.d_model:
            raise ValueError(f"rank={self.rank} must be from 0 to {config.d_model}")
        if self.gate_over not in ("past", "sequence"):
            raise ValueError(f"gate_over={self.gate_over!r}; choose 'past' or 'sequence'")
        for part in self.parts():
            part.check(config)

    def parts(self):
        """The prefix and the adapter, as far as there are any."""
        return [self.prefix] * bool(self.prefix_length) + [self.adapter] * bool(self.bottleneck)

    def install(self, model, attachment):
        self.check_model(model)
        passes = [BlockPass(self.gate_over) for _ in model.blocks]

        def wrapped(path, wrapper, *args):
            return attachment.wrap(model, path, wrapper(wrap.resolve(model, path), *args))

        def gate(n, part):
            place = place_of(model, f"blocks.{n}.mlp")
            return Gate(passes[n], f"{attachment.name}/{part}", **place)

        for n, current in enumerate(passes):
            wrapped(f"blocks.{n}", GatedBlock, current)
            for part in "qv" if self.rank else "":
                wrapped(f"blocks.{n}.attn.{part}", GatedLoRALinear, self.rank, gate(n, part))
        width = self.prefix_bottleneck if self.reparameterize else None
        shape = self.prefix_length, width
        cores = install_prefix(model, attachment, *shape, core=GatedPrefixCore)
        for n, core in zip(layers_with_heads(model) if cores else (), cores):
            core.current = passes[n]
            wrapped(f"blocks.{n}.attn", PrefixGate, gate(n, "prefix"))
        sites = self.adapter.sites(len(passes)) if self.bottleneck else []
        layers = install_bottlenecks(model, attachment, sites, **self.adapter.shape())
        for n, layer in enumerate(layers):
            layer.adapter = GatedAdapter(layer.adapter, gate(n, "adapter"))

    def check_model(self, model):
        """Raise ValueError where the model, as it is wrapped by now, does not suit the gates."""
        if self.gate_over == "sequence" and not hasattr(model.head, "pools"):
            raise ValueError(
                'gate_over="sequence" lets tokens see the future, which a language model must not: '
                'attach a Head first, or use gate_over="past"'
            )
        for n in range(len(model.blocks) if self.rank else 0):
            for path in (f"blocks.{n}.attn", f"blocks.{n}.attn.core"):
                wrappers = wrap.around(wrap.resolve(model, path))
                if any(getattr(wrapper, "calls_again", False) for wrapper in wrappers):
                    raise ValueError(
                        f"{path} has prompts that go through q and v as well, and UniPELT's gates "
                        "there would count them as text: use rank=0, or a model without them"
                    )
        for n in range(len(model.blocks) if self.prefix_length else 0):
            core = wrap.resolve(model, f"blocks.{n}.attn.core")
            if isinstance(core, wrap.Wrapper):
                raise ValueError(
                    f"blocks.{n}.attn.core already has a {type(core).__name__}, and UniPELT's "
                    "prefix needs the attention core itself: attach UniPELT first"
                )

    def count(self, config):
        D, r, m, L = config.d_model, self.rank, self.bottleneck, config.n_layer
        lora = 4 * D * r + 2 * (D + 1) if r else 0
        gates = (D + 1) * (bool(self.prefix_length) + bool(m))
        return L * (lora + gates) + sum(part.count(config) for part in self.parts())

    def flattened(self):
        """The technique without the prefix's MLP, or None when it has none."""
        has_one = self.prefix_length and self.reparameterize
        return dataclasses.replace(self, reparameterize=False) if has_one else None
