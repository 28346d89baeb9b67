r"""Calibration: what the projections of a model read, block by block.

Wanda and SparseGPT decide about a weight with the inputs it meets on some text.

    (Calibration 1)   G = sum over tokens of x x^T        x in R^in, a projection's input

Blocks are done in order: the inputs of block l are those that the blocks before it, already
pruned, give. Within a block all inputs are taken before any projection changes. Padding is left
out of the sum. G is kept in float64: sums over tens of thousands of tokens. Dropout is off.

Footguns: statistics of the unpruned model in a later block; padding counted as text; q, k and v
read the same x, so their G are equal: made once.
"""

from __future__ import annotations

import torch

from minipeft import wrap
from minipeft.compressed.magnitude_pruning import PROJECTIONS
from minipeft.compressed.structured_pruning import check_plain
from minipeft.evaluation import evaluating

SHARED = {"attn.k": "attn.q", "attn.v": "attn.q"}  # read the same input


def for_each_projection(model, batches, act):
    """Call act(path, linear, G) on every projection, block by block. (Calibration 1)

    batches: list of dataset.Batch, or of (B, T) ids without padding. G (in, in) float64. `act`
    may change the linear in place. Raises ValueError, before anything has changed, without a token
    of text, and for a model with techniques on it or with weights that are no floats.
    """
    check_plain(model)
    with evaluating(model):
        found = [embedded(model, batch) for batch in batches]
        states, real = [x for x, _ in found], [text for _, text in found]
        if not any(text.any() for text in real):
            raise ValueError("there is no calibration text: batches is empty, or all its rows are")
        for n, block in enumerate(model.blocks):
            moments = moments_of(block, states, real)
            for end in PROJECTIONS:
                linear = wrap.resolve(block, end)
                act(f"blocks.{n}.{end}", linear, moments[SHARED.get(end, end)])
            states = [block(x) for x in states]


def embedded(model, batch):
    """(the first block's input (B, T, D), which positions are text (B, T) bool) of a batch."""
    ids = getattr(batch, "ids", batch)
    lengths = getattr(batch, "lengths", None)
    if lengths is None:
        lengths = torch.full((len(ids),), ids.shape[1], device=ids.device)
    x = model.embed(ids, getattr(batch, "start", 0))
    steps = torch.arange(ids.shape[1], device=ids.device)
    return x, steps < lengths[:, None]


def moments_of(block, states, real):
    """{projection: G} of one block over all batches. (Calibration 1)"""
    moments, hooks, keep = {}, [], []

    def take(end):
        def hook(module, arguments):
            x = arguments[0][keep[-1]].double()  # (tokens, in)
            moments[end] = moments.get(end, 0) + x.T @ x

        return hook

    for end in PROJECTIONS:
        if end not in SHARED:
            linear = wrap.resolve(block, end)
            hooks.append(linear.register_forward_pre_hook(take(end)))
    try:
        for x, text in zip(states, real):
            keep.append(text)
            block(x)
    finally:
        for hook in hooks:
            hook.remove()
    return moments
