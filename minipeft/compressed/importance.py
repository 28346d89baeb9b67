r"""Which heads and neurons matter: importance by gates (Michel et al., 2019, arXiv 1905.10650) and
by the Taylor terms of the weights (Molchanov et al., 2019, arXiv 1906.10771).

What would the loss do if a unit were gone? Its gradient at the unit's gate says so, to first
order, without taking anything out.

    (Importance 1)   y = W_o (xi * heads) + b_o,  xi = 1       a gate on every head (or neuron)
    (Importance 2)   I_h = E_x |dL(x) / dxi_h|                 by gates; x a row of text
    (Importance 3)   I_h = sum over the unit's weights of |theta dL / dtheta|        by Taylor
    (Importance 4)   I_h <- I_h / ||I of the layer||_2         to compare layers

xi_h = 0 is what removing the unit does. At xi = 1, dL/dxi_h is the sum of theta dL/dtheta over
the columns that the gate scales: both importances are first-order Taylor terms, one of the unit
as a whole and one of its weights one by one, where signs cannot cancel.

How this differs: Michel et al. take the gradient sentence by sentence; here the gates are per
row, so that one backward pass gives every row's gradient. Molchanov et al. square the terms of a
batch; the absolute value ranks in the units of the loss.

Footguns: |E dL/dxi| for E |dL/dxi| (signs cancel over rows; at a minimum the first is 0); scores of
different scales compared over layers without (Importance 4), which takes as much from a layer that
carries the model as from an idle one; an order kept while much is taken out (a slope is for small
steps: `prune.shrink_anywhere` asks anew); a loss that is a sum in one batch and a mean in another;
dropout left on while measuring.
"""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from minipeft import wrap
from minipeft.compressed.magnitude_pruning import count_of
from minipeft.compressed.structured_pruning import check_plain, widths
from minipeft.evaluation import evaluating

KINDS = ("heads", "neurons")


class Gate(wrap.Wrapper):
    """Around attn.o or mlp.down: scales each unit's columns of the input. gates (units,) or
    (B, units). (Importance 1)
    """

    def __init__(self, inner, gates, width=1):
        super().__init__(inner)
        self.gates, self.width = gates, width

    def forward(self, x):
        scale = self.gates.repeat_interleave(self.width, -1)  # (..., units * width)
        return self.inner(x * (scale[:, None] if scale.ndim == 2 else scale))


@contextlib.contextmanager
def gated(model, kind, gates):
    """Inside the `with`, gates stand on the units of `kind`, {layer: gates}. A gate of 0 is a unit
    that is masked. (Importance 1)
    """
    swaps = []
    for layer, gate in gates.items():
        block = model.blocks[layer]
        heads = kind == "heads"
        path, width = ("attn.o", block.attn.head_dim) if heads else ("mlp.down", 1)
        parent, name = wrap.locate(block, path)
        swaps.append(wrap.Swap(path, parent, name, Gate(getattr(parent, name), gate, width)))
        swaps[-1].install()
    try:
        yield model
    finally:
        for swap in reversed(swaps):
            swap.uninstall()


def sizes_of(model, kind):
    """How many heads or neurons every layer has. Raises ValueError for another kind, and for
    techniques on the model.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is neither 'heads' nor 'neurons'")
    check_plain(model)
    unit = "n_head" if kind == "heads" else "d_ff"
    return [layer[unit] for layer in widths(model)]


def gate_importance(model, batches, kind="heads"):
    """[(units,) float64 of each layer]: E |dL/dxi| over the rows of `batches`. (Importance 2)

    batches: (ids, labels) pairs, (B, T) each, labels aligned; or dataset.Batch. A row's L is its
    own mean loss. The gates are per row, so that one backward pass gives every row's gradient.
    Raises ValueError for no rows, another kind, and a model with techniques on it.
    """
    sizes, rows = sizes_of(model, kind), 0
    total = [torch.zeros(n, dtype=torch.float64) for n in sizes]
    for batch in batches:
        ids, labels = pair(batch)
        like = model.embed.token.weight
        gates = {
            n: torch.ones(len(ids), size, dtype=like.dtype, device=ids.device, requires_grad=True)
            for n, size in enumerate(sizes)
        }
        with measuring(model), gated(model, kind, gates):
            loss = row_losses(model, ids, labels).sum()
            found = torch.autograd.grad(loss, list(gates.values()))
        for score, gradient in zip(total, found):
            score += gradient.abs().sum(0).double().cpu()
        rows += len(ids)
    check_text(rows)
    return [score / rows for score in total]


def taylor_importance(model, batches, kind="heads"):
    """[(units,) float64 of each layer]: sum of |theta dL/dtheta| over the unit's weights, L the
    mean loss over the batches. (Importance 3)

    batches: a list, of what `gate_importance` takes. Raises ValueError as that does.
    """
    sizes = sizes_of(model, kind)
    owned = [p for block in model.blocks for p, _ in unit_weights(block, kind)]
    gradients = dict.fromkeys(owned, 0)
    check_text(len(batches))
    for batch in batches:
        ids, labels = pair(batch)
        with measuring(model, owned):
            found = torch.autograd.grad(model.loss(ids, labels), owned)
        for p, g in zip(owned, found):
            gradients[p] = gradients[p] + g / len(batches)
    return [
        sum(unit_terms(p, gradients[p], axis, size) for p, axis in unit_weights(block, kind))
        for block, size in zip(model.blocks, sizes)
    ]


@contextlib.contextmanager
def measuring(model, parameters=()):
    """Inside the `with` dropout, which is noise, is off and gradients are there, for `parameters`
    also where they are frozen.
    """
    frozen = [p for p in parameters if not p.requires_grad]
    with evaluating(model), torch.enable_grad():
        try:
            for p in frozen:
                p.requires_grad_(True)
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


def check_text(amount):
    """Raise ValueError for nothing to measure on: every unit would count the same."""
    if not amount:
        raise ValueError("there is no text to measure importance on: batches is empty")


def unit_weights(block, kind):
    """(parameter, axis along which units lie) of what a unit owns."""
    attn, mlp = block.attn, block.mlp
    inputs, output = (
        ((attn.q, attn.k, attn.v), attn.o) if kind == "heads" else ((mlp.up,), mlp.down)
    )
    owned = [(p, 0) for linear in inputs for p in (linear.weight, linear.bias)]
    return [*owned, (output.weight, 1)]


def unit_terms(parameter, gradient, axis, units):
    """|theta dL/dtheta| of one tensor summed over each unit's share, (units,) float64."""
    if not units:  # a layer without heads
        return torch.zeros(0, dtype=torch.float64)
    terms = (parameter.detach() * gradient).abs().double()
    return terms.movedim(axis, 0).reshape(units, -1).sum(1).cpu()  # (Importance 3)


def row_losses(model, ids, labels):
    """Mean loss of every row over its own labels, (B,)."""
    logits = model(ids)
    surprise = nn.functional.cross_entropy(
        logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
    )
    return surprise.sum(1) / (labels != -100).sum(1).clamp(min=1)


def pair(batch):
    """(ids, labels) of a batch in either form."""
    return (batch.ids, batch.labels) if hasattr(batch, "ids") else batch


def least_important(importances, share, per_layer=True):
    """{layer: [numbers]} of the units to take out: floor(share of each layer), or of all layers
    together, normalised. (Importance 4)

    Raises ValueError for a share outside [0, 1).
    """
    check_share(share)
    if per_layer:
        lowest = [i.argsort(stable=True)[: count_of(share, len(i))] for i in importances]
        return {n: sorted(low.tolist()) for n, low in enumerate(lowest) if len(low)}
    scores = [i / i.norm().clamp(min=1e-30) for i in importances]  # (Importance 4)
    owners = [(n, unit) for n, s in enumerate(scores) for unit in range(len(s))]
    order = torch.cat(scores).argsort(stable=True)[: count_of(share, len(owners))]
    chosen = {}
    for layer, unit in sorted(owners[i] for i in order.tolist()):
        chosen.setdefault(layer, []).append(unit)
    return chosen


def check_share(share, what="share"):
    """Raise ValueError for what is no share of units to take out."""
    if not 0 <= share < 1:
        raise ValueError(f"{what}={share} of the units must be at least 0 and below 1")
