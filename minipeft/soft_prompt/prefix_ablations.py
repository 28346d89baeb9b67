r"""The ablations of prefix tuning (Li and Liang, 2021, arXiv 2101.00190, section 7).

What matters about a prefix: that it is long enough, that it reaches every layer, that it stands in
front. Each is taken away in turn.

    (Ablation 1)   embedding only:  x_0 = [P + pos; E[ids] + pos]   P in R^(p x D), nothing above
    (Ablation 2)   infix:           query t sees P_k, P_v  iff  t >= n;  its position moves by
                                    p [t >= n]                       n tokens stand before it
    (Ablation 3)   length:          quality as a function of p

An infix stands between two parts of a text, x and y: attention does not depend on the order of
keys, so the keys need not move, they are hidden from the n queries of x. n is `infix_after`, the
same in every row, or is set row by row by the context manager `infix_after`. "t >= n" is read from
the mask: a query that sees more than n tokens, itself included, stands behind n of them.

Trained parameters: p D for the rows of (Ablation 1), with the MLP p D + (D m + m) + (D m + D); an
infix has a prefix's.

    rows, infix    as a prefix: N(0, 1), or from the MLP

Reduces to: an infix after 0 tokens is the prefix; rows without the MLP are prompt tuning.

How this differs: peft and adapters have none of these. The authors' infix splits each example at
the end of its source, which is what the context manager does.

Footguns: an infix among virtual tokens of another technique would count them as text, so it refuses
to stand behind them; source lengths forgotten while generating.
"""

from __future__ import annotations

import contextlib
import dataclasses
from functools import partial
from typing import NamedTuple

import torch

from minipeft import wrap
from minipeft.gpt import causal_mask, positions
from minipeft.soft_prompt.prefix_start import placement, random_rows
from minipeft.soft_prompt.prefix_tuning import (
    MLPTable,
    PrefixCore,
    PrefixPositions,
    PrefixTuning,
    Trunk,
)
from minipeft.soft_prompt.prompt_tuning import PromptEmbedding, Table


def infix_mask(T, S, length, after, mask=None, device=None):
    """(..., T, length + S), True where a query may look: an infix is seen by the queries that see
    more than `after` tokens. mask: (..., T, S), None for causal. after: an int or (B,).
    (Ablation 2)
    """
    mask = causal_mask(T, S, device) if mask is None else mask
    after = after.view(-1, 1, 1, 1) if isinstance(after, torch.Tensor) else after
    behind = mask.sum(-1, keepdim=True) > after  # (..., T, 1)
    rows = behind.shape[:-1]
    return torch.cat([behind.expand(*rows, length), mask.expand(*rows, S)], -1)


class InfixPositions(PrefixPositions):
    """Moves positions by p from token `after` on, an int or (B,). (Ablation 2)"""

    def __init__(self, inner, length, after):
        super().__init__(inner, length)
        self.after = after

    def forward(self, ids, start=0, shift=0):
        if isinstance(shift, torch.Tensor) or shift:
            raise ValueError("an infix counts tokens of text: attach it behind nothing else")
        after = self.after[:, None] if isinstance(self.after, torch.Tensor) else self.after
        return self.inner(ids, start, self.own_position_shift * (positions(ids, start) >= after))


class InfixCore(PrefixCore):
    """Attention core whose learned keys only later text sees. `place`: the InfixPositions, which
    knows where; a function, because it is made later than `core` is named.
    """

    def __init__(self, *args, place):
        super().__init__(*args)
        self.place = (place(),)  # in a tuple: no module of this one

    def widened(self, mask, T, S, length):
        device = self.table().device
        return infix_mask(T, S, length, self.place[0].after, mask, device)


def infix_settings(model, after):
    """What turns install_prefix into an infix: classes for the positions and the cores."""
    if model.embed.virtual_tokens:
        raise ValueError("an infix counts tokens of text: attach it to a model without prompts")
    return {
        "positions": partial(InfixPositions, after=after),
        "core": partial(InfixCore, place=lambda: wrap.resolve(model, "embed")),
    }


@contextlib.contextmanager
def infix_after(model, lengths):
    """Inside the `with`, row b's infix stands after lengths[b] tokens. lengths: (B,) int64.

    Raises ValueError when no infix is on the model.
    """
    wrappers = [w for a in model.attachments for w in a.wrappers()]
    places = [w for w in wrappers if isinstance(w, InfixPositions)]
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


def install_rows(model, attachment, length, bottleneck=None):
    """p rows in front of the first block, flat or from an MLP. (Ablation 1)"""
    place, width = placement(model), model.config.d_model
    if bottleneck:
        trunk = Trunk(length, width, bottleneck, **place)
        prompt = MLPTable(trunk, width, owner=True, **place)
    else:
        prompt = Table(random_rows(length, width, **place))
    wrapper = PromptEmbedding(wrap.resolve(model, "embed"), prompt, length)
    attachment.wrap(model, "embed", wrapper)


class Point(NamedTuple):
    """One point of a sweep: length, trained parameters, and what `run` returned."""

    length: int
    parameters: int
    score: float


def sweep_prefix_length(run, config, lengths=(1, 2, 5, 10, 20, 40), technique=None):
    """Train at each length: run(technique) -> score trains a fresh model (of shape `config`) and
    measures it; returns a list of Points. (Ablation 3)

    Raises ValueError for a length that does not fit the model, before anything is trained.
    """
    technique = technique or PrefixTuning()
    sized = [dataclasses.replace(technique, prefix_length=length) for length in lengths]
    for each in sized:
        each.check(config)
    return [Point(t.prefix_length, t.count(config), run(t)) for t in sized]
