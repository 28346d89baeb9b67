r"""UniPELT: several techniques, each behind a gate that the text opens (Mao et al., 2021, arXiv
2110.07577).

LoRA on q and v, a prefix, and an adapter sit in every layer; how much of each is used is decided
by one number in (0, 1) that is computed from what the layer reads.

    (UniPELT 1)   g_t = sigmoid(w . x_t + b)                       w in R^D, b in R, each gate's own
    (UniPELT 2)   G_t = (g_1 + ... + g_t) / t                       what the text so far says
    (UniPELT 3)   G   = (g_1 + ... + g_T) / T                       gate_over="sequence": the row's
    (UniPELT 4)   q_t = W_q x_t + b_q + G^q_t B A x_t              and v likewise, with its own gate
    (UniPELT 5)   head(x)_t = attn(q_t, [G^P_t P_k; K], [G^P_t P_v; V])
    (UniPELT 6)   y_t = f_t + G^A_t [W_2 relu(W_1 f_t + b_1) + b_2]        f the feed-forward output

The gates of q, v and the prefix read what attention reads, the adapter's reads f. LoRA's alpha / r
is replaced by the gate. The paper's gate (UniPELT 3) is a mean over the whole row and so, in a
causal model, would see the future; here it is the mean up to t (UniPELT 2), which at the last token
is the paper's. (UniPELT 3) is for classifiers. In (UniPELT 5) the prefix is another one for
every query, which plain attention cannot have; with vectors of twice the width it can:

    (UniPELT 7)   q'_t = sqrt(2) [q_t; G_t q_t],   k' = [0; P_k] and [K; 0],   v' likewise,
                  y' = attn(q', k', v') = [y'_1; y'_2],   head_t = y'_1 + G_t y'_2

Trained parameters: L [4 D r + 2 (D + 1)] for LoRA, L [2 D m + m + D + D + 1] for adapters, and for
the prefix L (D + 1) and its own: 2 p L D flat, p D + (D n + n) + 2 L D (n + 1) with its MLP.

    w                      N(0, 0.02^2)        b    0        gates start near 1/2
    A, W_1                 U(-1/sqrt(D), 1/sqrt(D))
    B, W_2, b_1, b_2       0
    prefix                 as in prefix_tuning.py

Reduces to: LoRA at alpha = r with no prefix, LoRA's gates at 1 and the adapter's at 0; prefix
tuning with the prefix's gate at 1 and the others at 0. A shut prefix gate is not the base: zero
keys take softmax mass. A size of 0 leaves a technique out, as in the paper's UniPELT (AP).

How this differs from adapters, and from the authors' code: gates there average over the whole row,
padding included, and see the future; here G's sum is kept in the layer cache, so decoding token by
token is exact, padding is left out, and a row does not depend on its neighbours.

Footguns: a mean over padding; a gate that counts a step twice when decoding; alpha / r on top of
the gate; a gate read from another row's sum after beams were reordered.
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
from minipeft.decoding import evaluating
from minipeft.gpt import RowLengths
from minipeft.low_rank.lora import LoRALinear
from minipeft.soft_prompt.prefix_tuning import PrefixCore, PrefixTuning, install_prefix, with_prefix
from minipeft.technique import Technique, attachment_of

# -- the math


def token_gates(x, weight, bias):
    """g of each token, x (B, T, D) -> (B, T), in float32 or wider. (UniPELT 1)"""
    g = F.linear(x, weight, bias).squeeze(-1).sigmoid()
    return g.to(torch.promote_types(g.dtype, torch.float32))


def running_mean(g, total=0.0, count=0):
    """The mean of all gates up to each token, and the sums: g (B, T) -> (B, T), (B, T). (UniPELT 2)

    total: the sum (B, 1) over earlier tokens, count: how many they were, an int or (B, 1).
    """
    sums = total + g.cumsum(1)
    return sums / (count + torch.arange(1, g.shape[1] + 1, device=g.device)), sums


def sequence_mean(g, real=None):
    """The row's mean for each of its tokens, (B, T) -> (B, T). real (B,): tokens that are no
    padding, None for all. (UniPELT 3)
    """
    if real is None:
        return g.mean(1, keepdim=True).expand_as(g)
    inside = torch.arange(g.shape[1], device=g.device) < real[:, None]
    return ((g * inside).sum(1) / real)[:, None].expand_as(g)


def gated_lora(h, x, A, B, gate):
    """h + G B A x: h (B, T, out), x (B, T, in), gate (B, T). (UniPELT 4)"""
    return h + gate[..., None].to(h.dtype) * F.linear(F.linear(x, A), B)


def doubled(q, k, v, prefix, gate):
    """q', k', v' of (UniPELT 7), twice as wide. q (B, H, T, d), k and v (B, H, S, d), prefix
    (2, B, H, p, d), gate (B, 1, T, 1).
    """
    d = q.shape[-1]
    q = 2**0.5 * torch.cat([q, gate * q], -1)  # sqrt(2), as attention divides by sqrt(2 d)
    return q, *with_prefix(F.pad(prefix, (d, 0)), F.pad(k, (0, d)), F.pad(v, (0, d)))


def halves(y, gate):
    """y'_1 + G y'_2, (B, H, T, 2 d) -> (B, H, T, d). (UniPELT 7)"""
    own, prefixed = y.chunk(2, -1)
    return own + gate * prefixed


# -- the modules


class BlockPass:
    """What the parts of one block share while it runs: the layer cache, which sub-layers do not get
    to see, and the prefix's gate, which the attention core cannot compute.
    """

    def __init__(self, over):
        self.over, self.cache, self.prefix = over, None, None

    def mean(self, key, g):
        """G for the gates g (B, T) of this pass; `key` names the gate in the layer cache."""
        cache = self.cache
        if self.over == "sequence":
            return sequence_mean(g, self.real())
        if cache is None or isinstance(cache, RowLengths):
            return running_mean(g)[0]
        count = cache.cache.length  # virtual tokens in front have gates too, and count
        count = count[:, None] if isinstance(count, torch.Tensor) else count
        G, sums = running_mean(g, cache.state.get(key, 0.0), count)
        real = cache.cache.real
        cache.state[key] = sums[:, -1:] if real is None else sums.gather(1, real[:, None] - 1)
        return G

    def real(self):
        """Positions of each row that are no padding, None for all; in sequence mode."""
        if self.cache is not None and not isinstance(self.cache, RowLengths):
            raise ValueError(
                'gate_over="sequence" needs the whole row at once, so it cannot decode with a '
                'cache; use gate_over="past"'
            )
        return None if self.cache is None else self.cache.real


class Gate(nn.Module):
    """G of one technique in one block, x (B, T, D) -> (B, T). (UniPELT 1)"""

    def __init__(self, current, key, width, **place):
        super().__init__()
        self.current, self.key = current, key
        self.weight = nn.Parameter(torch.empty(1, width, **place).normal_(0.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(1, **place))

    def forward(self, x):
        return self.current.mean(self.key, token_gates(x, self.weight, self.bias))


class GatedBlock(wrap.Wrapper):
    """A block that tells the gates inside which cache is at work."""

    def __init__(self, inner, current):
        super().__init__(inner)
        self.current = current

    def forward(self, x, cache=None):
        self.current.cache = cache
        try:
            return self.inner(x, cache)
        finally:
            self.current.cache = self.current.prefix = None


class GatedLoRALinear(LoRALinear):
    """A projection with a low-rank branch behind a gate, (B, T, in) -> (B, T, out)."""

    def __init__(self, inner, rank, gate):
        super().__init__(inner, rank, 1.0)
        self.gate = gate

    def forward(self, x):
        return gated_lora(self.inner(x), x, self.A, self.B, self.gate(x))  # (UniPELT 4)


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
        return halves(self.inner(*doubled(q, k, v, prefix, gate), mask), gate)  # (UniPELT 5)


class GatedAdapter(nn.Module):
    """G A(f), (B, T, D) -> (B, T, D): it stands where an adapter stands. (UniPELT 6)"""

    def __init__(self, adapter, gate):
        super().__init__()
        self.adapter, self.gate = adapter, gate

    def forward(self, f):
        y = self.adapter(f)
        return self.gate(f)[..., None].to(y.dtype) * y  # (UniPELT 6)


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
        for n, core in enumerate(install_prefix(model, attachment, self.prefix_length, width)):
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


def gate_values(model, ids, lengths=None, name=None):
    """How far each gate is open for each token, in eval mode: {"q", "v", "prefix" or "adapter":
    G (layers, B, T)}, for those that there are, layers from the bottom up.

    lengths (B,): real tokens in each right-padded row. Raises ValueError where there are no gates.
    """
    attachment, seen = attachment_of(model, name), {}
    gates = {g: None for w in attachment.wrappers() for g in w.modules() if isinstance(g, Gate)}
    gates = [g for g in gates if g.key.startswith(f"{attachment.name}/")]
    if not gates:
        raise ValueError(f"{attachment.name!r} is no UniPELT, so it has no gates")

    def note(gate, args, G):
        seen.setdefault(gate.key.rpartition("/")[2], []).append(G[:, -ids.shape[1] :])

    hooks = [gate.register_forward_hook(note) for gate in gates]
    try:
        with evaluating(model), torch.no_grad():
            model.features(ids, lengths=lengths)
    finally:
        for hook in hooks:
            hook.remove()
    return {part: torch.stack(values) for part, values in seen.items()}
