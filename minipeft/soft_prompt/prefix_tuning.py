r"""Prefix tuning (Li and Liang, 2021, arXiv 2101.00190).

Every layer's attention finds p more keys and values in front of the text's own. They are learned;
the model is frozen.

    (Prefix 1)   head(x) = attn(q, [P_k; K], [P_v; V])            P_k, P_v in R^(p x d), each head's
    (Prefix 2)   [P_k; P_v]_l = W_l tanh(W' E' + b') + b_l        re-parameterised, for training
                 E' in R^(p x D), W' in R^(m x D) shared by all layers; W_l in R^(2 H d x m)
    (Prefix 3)   head(x) = (1 - lambda) attn(q, K, V) + lambda attn(q, P_k, P_v)
                 lambda = sum_i exp(q . P_k,i / sqrt(d)) / (the same + sum_j exp(q . K_j / sqrt(d)))

(Prefix 3) is He et al.'s reading (arXiv 2110.04366): a gated sum of two attentions. Every query
sees the whole prefix; the text's positions move by p, as if the prefix were text. The W_l of all
layers, stacked, are the one large matrix of the paper; after training `flatten` keeps the p rows
it computes and drops the MLP.

Trained parameters: 2 p L D flat; p D + (D m + m) + 2 L D (m + 1) with the MLP.

    flat             N(0, 1), or 0, or the keys and values of a real text
    E'               N(0, 1)
    W', W_l, b       U(-1/sqrt(in), 1/sqrt(in))

Where rows start is in prefix_start.py; the paper's ablations are in prefix_ablations.py: p learned
rows before the first block only (placement="embedding"), an infix between two parts of the text,
and a sweep over p.

Reduces to: the base reading a text first, when the prefix is that text's activations; P-tuning v2
without the MLP, exactly.

How this differs from peft: the table is held layer by layer, [P_k; P_v] side by side, and joined
to peft's (p, 2 L D) in files. The MLP stays in our files, so training can resume; gradient
checkpointing works, because no cache carries the prefix.

Footguns: zero keys and values are not the base, they still take softmax mass; positions left at 0
while the prefix stands in front; a causal mask aligned at the upper left hides text, one that was
not widened hides the prefix; 0.02 is too small a learning rate for the flat table, and 0.06 too
large for the MLP.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.soft_prompt.prefix_attention import attend
from minipeft.soft_prompt.prefix_start import activations, placement, random_rows
from minipeft.soft_prompt.prompt_tuning import (
    Table,
    check_prompt_length,
    check_words,
    repeat_to,
)
from minipeft.technique import Technique

# -- the math


def prefix_mlp(embedding, down_weight, down_bias, up_weight, up_bias):
    """W_l tanh(W' E' + b') + b_l: (p, D) -> (p, 2 H d). (Prefix 2)"""
    hidden = F.linear(embedding, down_weight, down_bias).tanh()  # (p, m)
    return F.linear(hidden, up_weight, up_bias)


def split_prefix(table, n_head):
    """(p, 2 H d) -> keys and values, (2, H, p, d)."""
    return table.unflatten(1, (2, n_head, -1)).permute(1, 2, 0, 3)


def prefix_mass(q, k, prefix_keys):
    """lambda, the softmax mass that queries q (..., T, d) put on the prefix when they see all keys
    k (..., S, d): (..., T, 1). (Prefix 3)
    """
    scores = q @ torch.cat([prefix_keys, k], -2).transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.softmax(-1)[..., : prefix_keys.shape[-2]].sum(-1, keepdim=True)


# -- the modules


class Trunk(nn.Module):
    """E', W' and b', shared by all layers. (Prefix 2)"""

    def __init__(self, length, width, bottleneck, **place):
        super().__init__()
        self.embedding = nn.Parameter(random_rows(length, width, **place))
        self.down = nn.Linear(width, bottleneck, **place)


class MLPTable(nn.Module):
    """One layer's rows, computed: () -> (p, out). The trunk is registered by its `owner` alone, so
    that it is trained and saved once; the others reach it through a tuple, which no module tree
    looks into.
    """

    def __init__(self, trunk, out, owner, **place):
        super().__init__()
        self.shared = (trunk,)
        if owner:
            self.trunk = trunk
        self.up = nn.Linear(trunk.down.out_features, out, **place)

    def forward(self):
        (trunk,) = self.shared
        down, up = trunk.down, self.up
        return prefix_mlp(trunk.embedding, down.weight, down.bias, up.weight, up.bias)


class PrefixPositions(wrap.EmbeddingWrapper):
    """Moves the text's positions by p, as if the prefix were text."""

    def __init__(self, inner, length):
        super().__init__(inner)
        self.own_position_shift = length

    def forward(self, ids, start=0, shift=0):
        return self.inner(ids, start, shift + self.own_position_shift)


class PrefixCore(wrap.Wrapper):
    """The attention core with a prefix: q (B, H, T, d), k, v (B, H, S, d) -> (B, H, T, d).

    `table`: a module whose call gives (p, 2 H d).
    """

    def __init__(self, inner, table, n_head, dropout=0.0):
        super().__init__(inner)
        self.table, self.n_head = table, n_head
        self.drop = nn.Dropout(dropout)

    def forward(self, q, k, v, mask=None):
        prefix = self.prefix(q.shape[0]).to(k.dtype)
        mask = self.widened(mask, q.shape[2], k.shape[2], prefix.shape[3])
        return attend(self.inner, q, k, v, prefix, mask)  # (Prefix 1)

    def prefix(self, batch):
        """Keys and values for a batch, (2, B, H, p, d), expanded and not copied."""
        rows = split_prefix(self.table(), self.n_head)
        return self.drop(rows[:, None].expand(-1, batch, -1, -1, -1))

    def widened(self, mask, T, S, length):
        """The mask (..., T, S) for the same keys behind the prefix, which every query sees. None,
        causal at the lower right, is right as it is.
        """
        return None if mask is None else F.pad(mask, (length, 0), value=True)

    def flatten(self):
        """Keep the table that the MLP computes, drop the MLP."""
        self.table = Table(self.table().detach().clone())


def layers_with_heads(model, layers=None):
    """Those of `layers` (numbers, None for all), in order, whose attention has heads: where a
    pruned layer lost all of them, nothing would read a prefix. Raises ValueError for none.
    """
    chosen = range(len(model.blocks)) if layers is None else sorted(layers)
    found = [n for n in chosen if wrap.base_module(wrap.resolve(model, f"blocks.{n}.attn")).n_head]
    if not found:
        raise ValueError(f"layers {list(chosen)} have lost all their heads: none reads a prefix")
    return found


def install_prefix(
    model,
    attachment,
    length,
    bottleneck=None,
    dropout=0.0,
    tables=None,
    layers=None,
    core=PrefixCore,
    positions=PrefixPositions,
):
    """Put a prefix of `length` on the layers of `model`; returns the cores, one for each of
    `layers_with_heads` (none at length 0, which installs nothing).

    bottleneck: m of the MLP, None for a flat table. tables: starting values (p, 2 H d), one a
    layer; N(0, 1) if not given. layers: numbers of those that get a prefix, None for all. core,
    positions: classes in PrefixCore's and PrefixPositions' place, made with the same arguments.
    """
    if not length:
        return []
    place, cores = placement(model), []
    attachment.wrap(model, "embed", positions(wrap.resolve(model, "embed"), length))
    trunk = bottleneck and Trunk(length, model.config.d_model, bottleneck, **place)
    for n in layers_with_heads(model, layers):
        attn = wrap.base_module(wrap.resolve(model, f"blocks.{n}.attn"))
        width = 2 * attn.n_head * attn.head_dim
        if trunk:
            table = MLPTable(trunk, width, owner=not cores, **place)
        else:
            table = Table(tables[n] if tables else random_rows(length, width, **place))
        path = f"blocks.{n}.attn.core"
        layer = core(wrap.resolve(model, path), table, attn.n_head, dropout)
        cores.append(attachment.wrap(model, path, layer))
    return cores


@dataclass(frozen=True)
class PrefixTuning(Technique):
    """Learned keys and values in front of the text's, in every layer. (Prefix 1)

    prefix_length: p, virtual tokens.
    reparameterize: compute the prefix by an MLP while training. (Prefix 2)
    bottleneck: m, the MLP's width.
    dropout: on the prefix, in training.
    init: of the flat table, "random", "zero" or "text" (a real text's keys and values).
    text: token ids for init="text", repeated or cut to prefix_length.
    placement: "prefix", or the paper's ablations "infix" and "embedding".
    infix_after: tokens of text before the infix, in every row.
    """

    prefix_length: int = 30
    reparameterize: bool = True
    bottleneck: int = 512
    dropout: float = 0.0
    init: str = "random"
    text: tuple[int, ...] = ()
    placement: str = "prefix"
    infix_after: int = 0

    cannot_merge: ClassVar[str | None] = "a prefix is more keys and values, no weight could hold it"

    @property
    def learning_rate(self):
        """Flat rows need large steps, an MLP's weights small ones."""
        return 2e-3 if self.reparameterize else 6e-2

    def check(self, config):
        check_prompt_length("prefix_length", self.prefix_length, config)
        if self.placement not in ("prefix", "infix", "embedding"):
            raise ValueError(f"placement={self.placement!r}; choose prefix, infix or embedding")
        if self.init not in ("random", "zero", "text"):
            raise ValueError(f"init={self.init!r}; choose random, zero or text")
        if self.init != "random" and (self.reparameterize or self.placement == "embedding"):
            raise ValueError(
                f"init={self.init!r} is for a flat prefix (reparameterize=False): an MLP's output "
                "cannot be set, and rows of an embedding come from prompt tuning's init"
            )
        if self.init == "text" and not self.text:
            raise ValueError('init="text" needs token ids in text=(...)')
        check_words(self.text, config)
        if self.reparameterize and self.bottleneck < 1:
            raise ValueError(f"bottleneck={self.bottleneck} is not a positive width")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")
        if self.dropout and self.placement == "embedding":
            raise ValueError("rows of an embedding get the model's own dropout; set dropout=0")
        if not 0 <= self.infix_after < config.context_length:
            raise ValueError(f"infix_after={self.infix_after} lies outside the context")

    def install(self, model, attachment):
        from minipeft.soft_prompt import prefix_ablations  # it is built on this file

        bottleneck = self.bottleneck if self.reparameterize else None
        if self.placement == "embedding":
            rows = self.prefix_length, bottleneck
            return prefix_ablations.install_rows(model, attachment, *rows)
        settings = {"bottleneck": bottleneck, "dropout": self.dropout}
        if self.init == "text":
            settings["tables"] = activations(model, repeat_to(self.text, self.prefix_length))
        if self.placement == "infix":
            settings |= prefix_ablations.infix_settings(model, self.infix_after)
        cores = install_prefix(model, attachment, self.prefix_length, **settings)
        if self.init == "zero":
            for core in cores:
                nn.init.zeros_(core.table.weight)

    def count(self, config):
        p, D, m = self.prefix_length, config.d_model, self.bottleneck
        out = D if self.placement == "embedding" else 2 * config.n_layer * D
        return p * D + D * m + m + out * (m + 1) if self.reparameterize else p * out

    def flattened(self):
        """The technique without its MLP, or None when it has none."""
        return dataclasses.replace(self, reparameterize=False) if self.reparameterize else None
