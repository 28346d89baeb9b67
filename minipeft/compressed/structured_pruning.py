r"""Structured pruning: whole heads, feed-forward neurons and blocks are taken out, and the matrices
get smaller (Michel et al., 2019, arXiv 1905.10650; Molchanov et al., 2019, arXiv 1906.10771).

Zeros inside a matrix make it no faster; a matrix with fewer rows and columns is faster anywhere.

    (Structured 1)   W_q, W_k, W_v lose the d rows of head h with their biases, W_o its d columns
    (Structured 2)   W_up loses row n with its bias, W_down its column n        a neuron
    (Structured 3)   N' = N - 4 d D - 3 d            a head
                     N' = N - 2 D - 1                a neuron
                     N' = N - 4 D^2 - 2 D d_ff - 9 D - d_ff        a whole block

Nothing is approximated: a head whose output is multiplied by zero and a head that is not there
give the same sum. b_o and b_down belong to nobody and stay. importance.py says which to take.

Trained parameters: none here; retraining afterwards trains all that is left.

Reduces to: the model itself with nothing to prune; the model with the same units masked.

How this differs from transformers: its `prune_heads` numbers heads as they were at first and
keeps a record in the config; here numbers are those of the model as it is, and every module
knows its own widths, so a pruned GPT is a GPT. Neurons and blocks have no counterpart there.

Footguns: rows of W_q pruned and the columns of W_o not; the scores divided by the root of the new
width (a head keeps its d); an optimizer that still holds the old tensors; a config that tells the
old widths: read them from the modules (`widths`).
"""

from __future__ import annotations

import copy
import dataclasses
import operator

import torch
from torch import nn

from minipeft import wrap
from minipeft.compressed.magnitude_pruning import check_floats
from minipeft.gpt import GPT

# -- smaller matrices


def prune_heads(model, heads):
    """Take heads out, in place; returns the model. heads: {layer: [numbers of its heads]}.

    Heads are numbered as they are now. A layer may lose all: its attention is then b_o alone.
    Raises ValueError for techniques on the model, for weights that are quantised or packed, and for
    layers or heads that are not there or named twice; the model is then as it was.
    """
    check_plain(model)
    gone = check_units(model, heads, "head", [b.attn.n_head for b in model.blocks])
    for layer, numbers in gone.items():
        attn = model.blocks[layer].attn
        keep = kept(attn.n_head, numbers)
        columns = torch.arange(attn.n_head * attn.head_dim).unflatten(0, (-1, attn.head_dim))
        columns = columns[keep].flatten()
        for name in "qkv":
            setattr(attn, name, shrunk(getattr(attn, name), rows=columns))  # (Structured 1)
        attn.o = shrunk(attn.o, columns=columns)
        attn.n_head = len(keep)
    return model


def prune_neurons(model, neurons):
    """Take feed-forward neurons out, in place; returns the model. neurons: {layer: [numbers]}.

    Raises ValueError as `prune_heads` does.
    """
    check_plain(model)
    gone = check_units(model, neurons, "neuron", [b.mlp.up.out_features for b in model.blocks])
    for layer, numbers in gone.items():
        mlp = model.blocks[layer].mlp
        keep = torch.tensor(kept(mlp.up.out_features, numbers), dtype=torch.long)
        mlp.up, mlp.down = (
            shrunk(mlp.up, rows=keep),
            shrunk(mlp.down, columns=keep),
        )  # (Structured 2)
    return model


def prune_blocks(model, layers):
    """Take whole blocks out, in place; returns the model, whose n_layer says what is left.

    Raises ValueError for techniques on the model, layers that are not there, and all of them.
    """
    check_plain(model)
    layers = check_units(model, {0: layers}, "block", [len(model.blocks)])[0]
    left = kept(len(model.blocks), layers)
    if not left:
        raise ValueError("all blocks would go; keep at least one")
    model.blocks = nn.ModuleList(model.blocks[n] for n in left)
    model.config = dataclasses.replace(model.config, n_layer=len(left))
    return model


def shrunk(linear, rows=None, columns=None):
    """An nn.Linear with these output rows or input columns of another, trainable as that is."""
    weight, bias = linear.weight.detach(), linear.bias
    rows, columns = (i if i is None else i.to(weight.device) for i in (rows, columns))
    if rows is not None:
        weight, bias = weight[rows], None if bias is None else bias[rows]
    if columns is not None:
        weight = weight[:, columns]
    small = copy.copy(linear)  # not nn.Linear(...), which warns when no head is left
    small.out_features, small.in_features = weight.shape
    small._parameters = {
        "weight": nn.Parameter(weight.clone(), linear.weight.requires_grad),
        "bias": bias if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad),
    }
    return small


def kept(size, gone):
    """The numbers below `size` that are not in `gone`."""
    gone = set(gone)
    return [n for n in range(size) if n not in gone]


def check_plain(model):
    """Raise ValueError when something is attached or wrapped, or weights are no floats."""
    names = [a.name for a in model.attachments]
    if names or any(isinstance(m, wrap.Wrapper) for m in model.modules()):
        raise ValueError(
            f"techniques are on this model ({', '.join(names)}): merge or detach them first, then "
            "make it smaller"
        )
    check_floats(model)


def check_units(model, chosen, what, sizes):
    """`chosen` as {int: [int]}; raises ValueError for what is not there or named twice."""
    found = {}
    for layer, given in chosen.items():
        try:
            layer, numbers = operator.index(layer), [operator.index(n) for n in given]
        except TypeError:
            raise ValueError(f"{layer!r}: {given!r} is no layer and a list of {what}s") from None
        if not 0 <= layer < len(sizes):
            raise ValueError(f"there is no layer {layer}; there are 0 to {len(sizes) - 1}")
        found[layer] = numbers
        wrong = [n for n in numbers if not 0 <= n < sizes[layer]]
        if wrong:
            where = "the model" if what == "block" else f"layer {layer}"
            raise ValueError(f"{where} has no {what} {wrong[0]}; it has {sizes[layer]} {what}s")
        if len(set(numbers)) != len(numbers):
            raise ValueError(f"{numbers} names a {what} of layer {layer} twice")
    return found


# -- widths, for files and reports


def widths(model):
    """[{"n_head": , "head_dim": , "d_ff": }] of each block, from its modules inside wrappers."""
    found = []
    for n in range(len(model.blocks)):
        attn, up = (
            wrap.base_module(wrap.resolve(model, f"blocks.{n}.{end}")) for end in ("attn", "mlp.up")
        )
        found.append({"n_head": attn.n_head, "head_dim": attn.head_dim, "d_ff": up.out_features})
    return found


def dense_widths(config):
    """The same for a model that nothing was taken out of."""
    width = {"n_head": config.n_head, "head_dim": config.d_model // config.n_head}
    return [width | {"d_ff": config.ff_width} for _ in range(config.n_layer)]


def with_widths(config, layers):
    """A freshly initialised GPT whose blocks have these widths, none larger than the config's."""
    model = GPT(config)
    for n, (layer, dense) in enumerate(zip(layers, dense_widths(config), strict=True)):
        prune_heads(model, {n: range(layer["n_head"], dense["n_head"])})
        prune_neurons(model, {n: range(layer["d_ff"], dense["d_ff"])})
    return model


def parameter_count(config, layers):
    """Parameters of a GPT whose blocks have these widths. (Structured 3)"""
    D = config.d_model
    total = (config.vocab_size + config.context_length) * D + 2 * D
    for layer in layers:
        inside = layer["n_head"] * layer["head_dim"]
        total += 4 * D * inside + 3 * inside + D  # (Structured 3): q, k, v, o
        total += (2 * D + 1) * layer["d_ff"] + D + 4 * D  # up, down; two LayerNorms
    return total
