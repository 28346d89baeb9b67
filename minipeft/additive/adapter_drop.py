r"""AdapterDrop: fewer adapters, where they matter least (Rücklé et al., 2021, arXiv 2010.11918).

Adapters in the first layers add little and cost most: below the first adapter, nothing needs a
gradient, and everything is the same for all tasks (shared_trunk.py). So leave the first n without:

    (AdapterDrop 1)   y_l = f_l  for l < n,    f_l + A_l(f_l)  for l >= n      l = 0 .. L-1
    (AdapterDrop 2)   robust: n ~ U{0, ..., drop}, drawn anew for every batch in training
    (AdapterDrop 3)   importance of adapter i in a fusion: p_i averaged over layers and tokens
    (AdapterDrop 4)   importance of layer l's adapters: the loss without them minus the loss

Specialised (the default), n = drop is fixed and those adapters do not exist. Robust, all exist, and
at inference `dropped` leaves out as many as the moment's hurry asks for.

Trained parameters: those of the adapters above, (L - drop) of L layers; robust, of all.

    W_1, W_2, b_1, b_2    as in adapter.py, and so the start is what it is there

Reduces to: the plain adapter at drop = 0; the base at drop = L.

How this differs from adapters: there `leave_out` lists layers (so does Adapter here) and drawing n
is left to the reader; peft has none.

Footguns: dropping the last layers instead of the first, which are the cheap ones to keep; drawing n
at evaluation too; n drawn a layer at a time (that is LayerDrop); timing a training step whose
embedding asks for a gradient, which goes all the way down whatever is dropped.
"""

from __future__ import annotations

import contextlib
import statistics
from dataclasses import dataclass, replace

import torch
from torch import nn

from minipeft import wrap
from minipeft.additive.adapter import Adapter, AdapterWrapper
from minipeft.additive.adapter_fusion import AdapterFusion, fusion_weights
from minipeft.technique import attachment_of, detach, set_adapter
from minipeft.timing import seconds


def draw_depth(most):
    """n ~ U{0, ..., most}, from torch's global generator, as dropout draws. (AdapterDrop 2)"""
    return int(torch.randint(most + 1, ()))


class DrawDepth(wrap.EmbeddingWrapper):
    """Around the embedding, which every pass begins with: draws n for the adapters above."""

    def __init__(self, inner, adapters, most):
        super().__init__(inner)
        self.adapters = tuple(adapters)  # (layer, wrapper) pairs, registered at their own places
        self.most = most

    def forward(self, *args, **kwargs):
        if self.training:
            n = draw_depth(self.most)
            for layer, wrapper in self.adapters:
                wrapper.drawn_out = layer < n  # (AdapterDrop 1) (AdapterDrop 2)
        return self.inner(*args, **kwargs)


def layer_of(path):
    """5 for "blocks.5.mlp"."""
    return int(path.split(".")[1])


def adapters_of(attachment):
    """(layer, wrapper) of every adapter or fusion of an attachment, from the bottom up."""
    return [
        (layer_of(swap.path), swap.replacement)
        for swap in attachment.swaps
        if isinstance(swap.replacement, AdapterWrapper)
    ]


@dataclass(frozen=True)
class AdapterDrop(Adapter):
    """Adapters without the first layers' (AdapterDrop 1), or robust against their loss.

    drop: n, how many of the first layers have no adapter; with robust, the most that are dropped.
    robust: keep all adapters and draw n from 0 to drop for every training batch.
    placement: "pfeiffer", "houlsby" or "parallel", as in Adapter, and so are the other fields.
    """

    placement: str = "pfeiffer"
    drop: int = 1
    robust: bool = False

    def layers(self, n_layer):
        kept = super().layers(n_layer)
        return kept if self.robust else [n for n in kept if n >= self.drop]  # (AdapterDrop 1)

    def check(self, config):
        super().check(config)
        if not isinstance(self.drop, int) or not 0 <= self.drop <= config.n_layer:
            raise ValueError(f"drop={self.drop!r} must be from 0 to n_layer={config.n_layer}")

    def install(self, model, attachment):
        super().install(model, attachment)
        if self.robust:
            embed = wrap.resolve(model, "embed")
            attachment.wrap(model, "embed", DrawDepth(embed, adapters_of(attachment), self.drop))


@contextlib.contextmanager
def dropped(model, n, name=None):
    """Inside the `with`, the adapters of the first n layers are left out: of the attachment called
    `name`, or of all. For inference with a robust model, and to measure what adapters are worth.
    """
    layers = len(model.blocks)
    if not 0 <= n <= layers:
        raise ValueError(f"n={n} must be from 0 to the model's {layers} layers")
    chosen = model.attachments if name is None else [attachment_of(model, name)]
    wrappers = [w for a in chosen for layer, w in adapters_of(a) if layer < n]
    with left_out(wrappers):
        yield model


@contextlib.contextmanager
def left_out(wrappers):
    """Inside the `with`, these adapters are switched off."""
    before = [w.left_out for w in wrappers]
    for wrapper in wrappers:
        wrapper.left_out = True
    try:
        yield
    finally:
        for wrapper, was in zip(wrappers, before):
            wrapper.left_out = was


# -- pruning after training


def rank_by_weight(model, batches, name=None):
    """Fused adapters by their mean fusion weight, the most used first: [(name, weight), ...].
    (AdapterDrop 3)

    batches: tensors of ids (B, T), or pairs (ids, lengths) when rows are padded.
    """
    total, count = 0.0, 0
    for batch in batches:
        ids, lengths = batch if isinstance(batch, tuple) else (batch, None)
        p = fusion_weights(model, ids, name).mean(0)  # (B, T, N)
        steps = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        real = steps < (ids.shape[1] if lengths is None else lengths[:, None])  # (B, T)
        total, count = total + p[real].sum(0), count + int(real.sum())
    if not count:
        raise ValueError("batches is empty, so there is nothing to measure the adapters on")
    names = [source.name for source in attachment_of(model, name).technique.adapters]
    return sorted(zip(names, (total / count).tolist()), key=lambda pair: -pair[1])


@torch.no_grad()
def rank_by_loss(model, loss, name=None):
    """Layers by what the loss rises without their adapters, most important first: [(layer, rise)].
    (AdapterDrop 4)

    loss: called as loss(model), gives a number, on held-out data.
    """
    adapters = adapters_of(attachment_of(model, name))
    base = float(loss(model))
    rises = []
    for layer in sorted({layer for layer, _ in adapters}):
        with left_out([w for n, w in adapters if n == layer]):
            rises.append((layer, float(loss(model)) - base))
    return sorted(rises, key=lambda pair: -pair[1])


def prune_adapters(model, keep, name=None):
    """Take adapters off for good, all but those in `keep`: layers of an Adapter, or the names of
    adapters in an AdapterFusion. Take `keep` from the top of a ranking. Returns the model.

    Raises ValueError naming what is not there.
    """
    attachment = attachment_of(model, name)
    if isinstance(attachment.technique, AdapterFusion):
        keep_fused(attachment, list(keep))
    else:
        keep_layers(model, attachment, list(keep))
    return model


def keep_fused(attachment, keep):
    """Shorten every fusion's list of adapters."""
    sources = attachment.technique.adapters
    check_keep(keep, [source.name for source in sources])
    if not keep:
        raise ValueError("keep=[] would leave a fusion over nothing; detach it instead")
    kept = [n for n, source in enumerate(sources) if source.name in keep]
    for _, wrapper in adapters_of(attachment):
        wrapper.adapter.adapters = nn.ModuleList(wrapper.adapter.adapters[n] for n in kept)
    recipe = tuple(sources[n] for n in kept)
    attachment.technique = replace(attachment.technique, adapters=recipe)


def keep_layers(model, attachment, keep):
    """Take the adapter wrappers of the other layers out of the model."""
    technique, n_layer = attachment.technique, len(model.blocks)
    if not isinstance(technique, Adapter) or technique.trains_layer_norms():
        raise ValueError(
            f"{attachment.name!r} is {technique}: only adapters on frozen LayerNorms can be pruned "
            "by layer (layer_norms=False)"
        )
    check_keep(keep, technique.layers(n_layer))
    active = [a.name for a in model.attachments if a.active]
    set_adapter(model, [])
    attachment.swaps = [
        swap
        for swap in attachment.swaps
        if not isinstance(swap.replacement, AdapterWrapper) or layer_of(swap.path) in keep
    ]
    leave_out = tuple(n for n in range(n_layer) if n not in keep)
    attachment.technique = replace(technique, leave_out=leave_out)
    set_adapter(model, active)


def check_keep(keep, there):
    """Raise ValueError naming the first of `keep` that is not there."""
    for one in keep:
        if one not in there:
            raise ValueError(f"keep names {one!r}, which is not among {there}")


# -- what it saves


@dataclass(frozen=True)
class Saving:
    """Median seconds with the first `drop` layers' adapters left out."""

    drop: int
    training: float  # forward and backward
    inference: float  # forward
    trained: int  # parameters


def measure_savings(model, ids, labels, technique=None, drops=None, rounds=5):
    """What dropping saves on this machine: a Saving for every n in `drops` (0 to L by default).

    The n take turns, so that a drifting clock harms none more than another. Needs a model without
    attachments on it, ids and labels (B, T); the model is as it was afterwards.
    """
    technique = technique or AdapterDrop()
    drops = range(len(model.blocks) + 1) if drops is None else drops
    times = {n: ([], []) for n in drops}
    trained = {n: replace(technique, drop=n, robust=False).count(model.config) for n in drops}
    for round_number in range(rounds + 1):
        for n in drops:
            training, inference = time_once(model, ids, labels, replace(technique, drop=n))
            if round_number:  # the first round warms up
                times[n][0].append(training)
                times[n][1].append(inference)
    medians = {n: tuple(statistics.median(side) for side in times[n]) for n in drops}
    return [Saving(n, *medians[n], trained[n]) for n in drops]


def time_once(model, ids, labels, technique):
    """Seconds of (forward and backward, forward alone) with the technique on the model."""
    name = "to be timed"
    technique.attach(model, name)
    try:
        training = seconds(lambda: backward(model.loss(ids, labels)), ids.device)
        with torch.no_grad():
            return training, seconds(lambda: model(ids), ids.device)
    finally:
        detach(model, name)


def backward(loss):
    """Gradients, where anything asks for them (with every adapter dropped, nothing does)."""
    if loss.requires_grad:
        loss.backward()
