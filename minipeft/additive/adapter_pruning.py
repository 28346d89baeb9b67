r"""Adapters taken off after training, by a measured ranking (Rücklé et al., 2021, arXiv 2010.11918,
section 4).

A fusion of many adapters uses few of them, and few layers need one at all. Which, is measured on a
trained model, and the others go for good:

    (AdapterDrop 3)   importance of adapter i in a fusion: p_i averaged over layers and tokens
    (AdapterDrop 4)   importance of layer l's adapters: the loss without them minus the loss

Trained parameters: what is left, L' of L layers of an Adapter, N' of N adapters of a fusion, whose
attention keeps its size.

    initialisation    nothing to initialise

Reduces to: the trained model when all are kept. A layer that goes is one that `left_out` switches
off; a fusion of one adapter that is left attends to it with weight 1.

How this differs: the paper prunes fusions, by (AdapterDrop 3); (AdapterDrop 4) is ours. The
adapters library measures neither.

Footguns: weights averaged over padding too; ranking on the examples that were trained on; one layer
measured with several already gone, and called its importance in the whole.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace

import torch
from torch import nn

from minipeft.additive.adapter import Adapter, AdapterWrapper
from minipeft.additive.adapter_fusion import AdapterFusion, fusion_weights
from minipeft.technique import attachment_of, set_adapter


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
