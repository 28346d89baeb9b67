r"""Several tasks in one pass, sharing the trunk below the first adapter (Rücklé et al., 2021, arXiv
2010.11918, section 3.2).

S tasks ask about the same text, each with adapters of its own on the same frozen model. Up to the
lowest adapter, layer k, all of them compute the same, so it is computed once; above, the batch is
S copies, the frozen sub-layers run on all of them together, and each copy takes its own adapters:

    (SharedTrunk 1)   X_k = [x_k; ...; x_k]     x_k in R^(B x T x D), X_k in R^(S B x T x D)
    (SharedTrunk 2)   rows s B .. (s+1) B of a site's output:  f + A_s(f)     s = 0 .. S-1

Trained parameters: none of its own. Gradients reach all S adapters, so tasks can train together.

    initialisation    nothing to initialise

Reduces to: S runs, one for each task; with AdapterDrop of n layers, k >= n, at the cost of
(k + S (L - k)) / (S L) of them, embedding and head aside.

How this differs from adapters: its Parallel block replicates the batch at the first adapter too;
there the outputs come back stacked in the batch, here under an axis of their own.

Footguns: a task that also trained LayerNorms has no trunk in common with the others; rows copied
row by row (repeat_interleave) where the adapters are dealt out block by block (repeat).
"""

from __future__ import annotations

import statistics
from functools import partial

import torch
from torch import nn

from minipeft import wrap
from minipeft.additive.adapter import AdapterWrapper
from minipeft.additive.adapter_drop import DrawDepth
from minipeft.additive.adapter_pruning import layer_of
from minipeft.gpt import RowLengths
from minipeft.technique import Attachment, attachment_of, set_adapter
from minipeft.timing import turns


class ByTask(nn.Module):
    """S adapters side by side: rows (S B, T, D) -> (S B, T, D), task s the s-th B rows. None adds
    nothing. (SharedTrunk 2)
    """

    def __init__(self, adapters):
        super().__init__()
        self.adapters = tuple(adapters)  # registered where they belong

    def forward(self, x):
        parts = zip(self.adapters, x.chunk(len(self.adapters)))  # (SharedTrunk 2)
        return torch.cat([torch.zeros_like(u) if a is None else a(u) for a, u in parts])


def tasks_at_once(model, ids, names, start=0, lengths=None):
    """Logits of the same text for several adapters in one pass, (B, T) -> (S, B, T, V): the layers
    below the lowest adapter run once, those above on S copies. (SharedTrunk 1)

    names: attachments with adapters or fusions and nothing else (no trained LayerNorms).
    """
    tasks = [attachment_of(model, name) for name in names]
    for task in tasks:
        check_task(task)
    active = [a.name for a in model.attachments if a.active]
    set_adapter(model, [name for name in active if name not in names])
    together = Attachment("several tasks", None)
    try:
        lowest = install_tasks(model, together, tasks)
        return run_tasks(model, ids, len(tasks), lowest, start, lengths)
    finally:
        together.uninstall()
        set_adapter(model, active)


def check_task(task):
    """Raise ValueError for an attachment that changes more than adapters do."""
    parts = [swap.replacement for swap in task.swaps]
    if not parts or not all(isinstance(part, AdapterWrapper | DrawDepth) for part in parts):
        raise ValueError(
            f"{task.name!r} ({type(task.technique).__name__}) has no adapters, or trains more than "
            "adapters; tasks share a trunk only where everything else is frozen"
        )


def install_tasks(model, together, tasks):
    """One wrapper for all tasks at every place where one of them has an adapter; returns the
    lowest layer among these.
    """
    places = {}  # (path, form) -> task -> adapter
    for s, task in enumerate(tasks):
        for swap in task.swaps:
            if isinstance(swap.replacement, AdapterWrapper):
                key = swap.path, type(swap.replacement)
                adapter = None if swap.replacement.left_out else swap.replacement.adapter
                places.setdefault(key, {})[s] = adapter
    for (path, form), adapters in places.items():
        side_by_side = ByTask(adapters.get(s) for s in range(len(tasks)))
        together.wrap(model, path, form(wrap.resolve(model, path), side_by_side))
    return min(layer_of(path) for path, _ in places)


def run_tasks(model, ids, S, lowest, start, lengths):
    """GPT.forward with the rows copied S times below the first adapter."""
    model.check_length(ids, start)
    moved = not isinstance(start, torch.Tensor)  # as GPT.features has it: rows begin here
    x = model.embed(ids, 0, start) if moved else model.embed(ids, start)
    virtual = x.shape[1] - ids.shape[1]
    rows = None if lengths is None else RowLengths(lengths + virtual)
    for block in model.blocks[:lowest]:
        x = block(x, rows)
    x = x.repeat(S, 1, 1)  # (S B, T, D) (SharedTrunk 1)
    lengths = None if lengths is None else lengths.repeat(S)
    rows = None if lengths is None else RowLengths(lengths + virtual)
    for block in model.blocks[lowest:]:
        x = block(x, rows)
    x = model.ln_f(x[:, virtual:])
    return model.read_out(x, lengths).unflatten(0, (S, ids.shape[0]))


@torch.no_grad()
def measure_sharing(model, ids, names, rounds=5):
    """Median seconds of (S runs one after the other, all S tasks in one pass), taken in turn."""
    active = [a.name for a in model.attachments if a.active]

    def one_by_one():
        for name in names:
            set_adapter(model, name)
            model(ids)

    try:
        actions = one_by_one, partial(tasks_at_once, model, ids, names)
        both = turns(actions, rounds, ids.device)
    finally:
        set_adapter(model, active)
    return tuple(statistics.median(side) for side in zip(*both))
