r"""AdapterDrop: fewer adapters, where they matter least (Rücklé et al., 2021, arXiv 2010.11918).

Adapters in the first layers add little and cost most: below the first adapter, nothing needs a
gradient, and everything is the same for all tasks (shared_trunk.py). So leave the first n without:

    (AdapterDrop 1)   y_l = f_l  for l < n,    f_l + A_l(f_l)  for l >= n      l = 0 .. L-1
    (AdapterDrop 2)   robust: n ~ U{0, ..., drop}, drawn anew for every batch in training

Specialised (the default), n = drop is fixed and those adapters do not exist. Robust, all exist, and
at inference `dropped` leaves out as many as the moment's hurry asks for. Which adapters of a model
are worth keeping is measured in adapter_pruning.py, which takes the others off.

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

from minipeft import wrap
from minipeft.additive.adapter import Adapter
from minipeft.additive.adapter_pruning import (
    adapters_of,
    left_out,
    prune_adapters,
    rank_by_loss,
    rank_by_weight,
)
from minipeft.technique import attachment_of, detach
from minipeft.timing import seconds

__all__ = [  # with the names of adapter_pruning.py that its readers expect here
    "AdapterDrop",
    "DrawDepth",
    "Saving",
    "draw_depth",
    "dropped",
    "measure_savings",
    "prune_adapters",
    "rank_by_loss",
    "rank_by_weight",
]


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
