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

The paper's ablations: placement="embedding" puts p learned rows before the first block only;
placement="infix" lets the text from its token n on see the prefix, and the n tokens before not.

Reduces to: the base reading a text first, when the prefix is that text's activations; P-tuning v2
without the MLP; with placement="embedding" and no MLP prompt tuning. An infix after 0 tokens is a
prefix.

How this differs from peft: the table is held layer by layer, [P_k; P_v] side by side, and joined
to peft's (p, 2 L D) in files. The MLP stays in our files, so training can resume; gradient
checkpointing works, because no cache carries the prefix.

Footguns: zero keys and values are not the base, they still take softmax mass; positions left at 0
while the prefix stands in front; a causal mask aligned at the upper left hides text, one that was
not widened hides the prefix; 0.02 is too small a learning rate for the flat table, and 0.06 too
large for the MLP.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.gpt import causal_mask, positions
from minipeft.soft_prompt.prompt_tuning import (
    PromptEmbedding,
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


def with_prefix(prefix, k, v):
    """Prefix keys and values (2, B, H, p, d) before k and v (B, H, S, d). (Prefix 1)"""
    return torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2)


def widened_mask(mask, length):
    """A mask (..., T, S) for the same keys behind `length` more that every query sees."""
    return None if mask is None else F.pad(mask, (length, 0), value=True)


def infix_mask(T, S, length, after, mask=None, device=None):
    """(..., T, length + S): an infix is seen by the queries that have seen more than `after`
    tokens, themselves included. `after`: an int or (B,).
    """
    mask = causal_mask(T, S, device) if mask is None else mask
    after = after.view(-1, 1, 1, 1) if isinstance(after, torch.Tensor) else after
    open_to = mask.sum(-1, keepdim=True) > after  # (..., T, 1)
    open_to = open_to.expand(*open_to.shape[:-1], length)
    return torch.cat([open_to, mask.expand(*open_to.shape[:-1], S)], -1)


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
        self.embedding = nn.Parameter(torch.empty(length, width, **place).normal_())
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
    """Moves the text's positions by p; for an infix only from token `after` on."""

    def __init__(self, inner, length, after=None):
        super().__init__(inner)
        self.own_position_shift, self.after = length, after

    def forward(self, ids, start=0, shift=0):
        moved = self.own_position_shift
        if self.after is not None:
            if not isinstance(shift, int) or shift:
                raise ValueError("an infix counts tokens of text: attach nothing in front of it")
            after = self.after
            after = after[:, None] if isinstance(after, torch.Tensor) else after
            moved = moved * (positions(ids, start) >= after)
        return self.inner(ids, start, shift + moved)


class PrefixCore(wrap.Wrapper):
    """The attention core with a prefix: q (B, H, T, d), k, v (B, H, S, d) -> (B, H, T, d).

    `table`: a module whose call gives (p, 2 H d). `place`: the PrefixPositions it goes with.
    """

    def __init__(self, inner, table, n_head, place, dropout=0.0):
        super().__init__(inner)
        self.table, self.n_head, self.place = table, n_head, (place,)
        self.drop = nn.Dropout(dropout)

    def forward(self, q, k, v, mask=None):
        T, S, after = q.shape[2], k.shape[2], self.place[0].after
        prefix = self.prefix(q.shape[0]).to(k.dtype)
        length = prefix.shape[3]
        k, v = with_prefix(prefix, k, v)  # (Prefix 1)
        if after is None:
            mask = widened_mask(mask, length)
        else:
            mask = infix_mask(T, S, length, after, mask, q.device)
        return self.inner(q, k, v, mask)

    def prefix(self, batch):
        """Keys and values for a batch, (2, B, H, p, d), expanded and not copied."""
        rows = split_prefix(self.table(), self.n_head)
        return self.drop(rows[:, None].expand(-1, batch, -1, -1, -1))

    def flatten(self):
        """Keep the table that the MLP computes, drop the MLP."""
        self.table = Table(self.table().detach().clone())


def placement(model):
    """Device and dtype for new tensors: the token table's, which no technique quantises."""
    like = wrap.resolve(model, "embed.token").weight
    return {"device": like.device, "dtype": like.dtype}


def install_prefix(
    model,
    attachment,
    length,
    bottleneck=None,
    dropout=0.0,
    tables=None,
    after=None,
    layers=None,
    core=None,
):
    """Put a prefix of `length` on every layer of `model`; returns the cores, one a layer (none at
    length 0, which installs nothing).

    bottleneck: m of the MLP, None for a flat table. tables: starting values (p, 2 H d), one a
    layer; N(0, 1) if not given. after: see infix_mask. layers: numbers of the layers that get a
    prefix, None for all. core: a class in PrefixCore's place.
    """
    if not length:
        return []
    place = placement(model)
    embed = PrefixPositions(wrap.resolve(model, "embed"), length, after)
    attachment.wrap(model, "embed", embed)
    trunk = bottleneck and Trunk(length, model.config.d_model, bottleneck, **place)
    cores = []
    for n in range(len(model.blocks)) if layers is None else sorted(layers):
        attn = wrap.base_module(wrap.resolve(model, f"blocks.{n}.attn"))
        width = 2 * attn.n_head * attn.head_dim
        if trunk:
            table = MLPTable(trunk, width, owner=not cores, **place)
        else:
            table = Table(tables[n] if tables else torch.empty(length, width, **place).normal_())
        path = f"blocks.{n}.attn.core"
        inner = wrap.resolve(model, path)
        layer = (core or PrefixCore)(inner, table, attn.n_head, embed, dropout)
        cores.append(attachment.wrap(model, path, layer))
    return cores


def activations(model, ids):
    """Keys and values that a text (a list of ids) leaves in each layer: L tensors (p, 2 H d)."""
    found, modes = [], {module: module.training for module in model.modules()}
    cores = [wrap.resolve(model, f"blocks.{n}.attn.core") for n in range(len(model.blocks))]
    hooks = [c.register_forward_pre_hook(lambda _, args: found.append(args[1:3])) for c in cores]
    model.eval()
    try:
        with torch.no_grad():
            model.features(torch.tensor([list(ids)], device=placement(model)["device"]))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    rows = [torch.stack(pair)[:, 0, :, -len(ids) :] for pair in found]  # (2, H, p, d)
    return [r.permute(2, 0, 1, 3).flatten(1).contiguous() for r in rows]


@contextlib.contextmanager
def infix_after(model, lengths):
    """Inside the `with`, row b's infix stands after lengths[b] tokens. lengths: (B,) int64.

    Raises ValueError when no infix is on the model.
    """
    places = [w for a in model.attachments for w in a.wrappers() if isinstance(w, PrefixPositions)]
    places = [p for p in places if p.after is not None]
    if not places:
        raise ValueError('no infix is on this model; attach PrefixTuning(placement="infix")')
    before = [p.after for p in places]
    for p in places:
        p.after = lengths
    try:
        yield model
    finally:
        for p, after in zip(places, before, strict=True):
            p.after = after


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
    infix_after: tokens of text before the infix; infix_after(model, lengths) sets it row by row.
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
        if not 0 <= self.infix_after < config.context_length:
            raise ValueError(f"infix_after={self.infix_after} lies outside the context")

    def install(self, model, attachment):
        bottleneck = self.bottleneck if self.reparameterize else None
        if self.placement == "embedding":
            return install_rows(model, attachment, self.prefix_length, bottleneck)
        infix = self.placement == "infix"
        if infix and model.embed.virtual_tokens:
            raise ValueError("an infix counts tokens of text: attach it to a model without prompt")
        tables = None
        if self.init == "text":
            tables = activations(model, repeat_to(self.text, self.prefix_length))
        after = self.infix_after if infix else None
        cores = install_prefix(
            model, attachment, self.prefix_length, bottleneck, self.dropout, tables, after
        )
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


def install_rows(model, attachment, length, bottleneck=None):
    """The embedding-only ablation: p rows in front of the first block, flat or from an MLP."""
    place, width = placement(model), model.config.d_model
    if bottleneck:
        trunk = Trunk(length, width, bottleneck, **place)
        prompt = MLPTable(trunk, width, owner=True, **place)
    else:
        prompt = Table(torch.empty(length, width, **place).normal_())
    wrapper = PromptEmbedding(wrap.resolve(model, "embed"), prompt, length)
    attachment.wrap(model, "embed", wrapper)


class Point(NamedTuple):
    """One point of a sweep: length, trained parameters, and what `run` returned."""

    length: int
    parameters: int
    score: float


def sweep_prefix_length(run, config, lengths=(1, 2, 5, 10, 20, 40), technique=None):
    """Train at each length, the paper's figure of quality against prefix length. run(technique) ->
    score trains a fresh model (of shape `config`) and measures it; returns a list of Points.

    Raises ValueError for a length that does not fit the model, before anything is trained.
    """
    technique = technique or PrefixTuning()
    sized = [dataclasses.replace(technique, prefix_length=length) for length in lengths]
    for each in sized:
        each.check(config)
    return [Point(t.prefix_length, t.count(config), run(t)) for t in sized]
