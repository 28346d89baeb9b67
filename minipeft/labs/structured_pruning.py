"""Lab: structured pruning."""

from __future__ import annotations

import copy

import torch

from minipeft.compressed import structured_pruning as pruning
from minipeft.gpt import GPT
from minipeft.labs.engine.case import check, close, equal, refuses, same
from minipeft.labs.engine.lab import Bug, Hint, Lab

HEADS = Hint(
    "(Structured 1): a head's d rows of W_q, W_k, W_v with their biases, and its d columns of W_o",
    "Which numbers of a row of q belong to head 1? Which columns of W_o read them?",
    ("prune_heads", "shrunk"),
)
NEURONS = Hint(
    "(Structured 2): a neuron is a row of W_up with its bias and a column of W_down",
    "Neuron 3 goes. Which of W_down's columns read it, and does your W_down still have them?",
    ("prune_neurons", "shrunk"),
)
KEPT = Hint(
    "what is named goes, the others stay in their order",
    "Prune nothing: what is left? Prune head 0 of 3: which two are left?",
    ("kept",),
)
BIASES = Hint(
    "(Structured 1) (Structured 2): biases go with rows; b_o and b_down belong to nobody and stay",
    "Which bias belongs to an output row? Does taking input columns out change a bias?",
    ("shrunk",),
)
WIDTHS = Hint(
    "every module knows its own widths: n_head falls, a head keeps its d",
    "After pruning, how many heads does the layer say it has, and how wide is each?",
    ("prune_heads", "prune_blocks"),
)
OWN = Hint(
    "the smaller layer is a copy, trainable as the old one was",
    "Change the pruned weight. Does the old one change? Was a frozen layer thawed?",
    ("shrunk",),
)
COUNT = Hint(
    "(Structured 3): a head costs 4 d D + 3 d, a neuron 2 D + 1",
    "List the tensors of one head with their sizes. Which of them have biases?",
    ("parameter_count",),
)
REFUSED = Hint(
    "what cannot be pruned is an error, and the model is then as it was",
    "Layer 0 is fine and layer 1 is not. What has happened to layer 0 when you raise?",
    ("prune_heads", "prune_neurons"),
)

LAB = Lab(
    title="Structured pruning: smaller matrices, the same sums",
    about="""
    Zeros inside a matrix make it no faster; a matrix with fewer rows does. You take whole heads,
    neurons and blocks out of a GPT, so that what is left computes what the masked model computes.

    (Structured 1) to (Structured 3) are in the header of `structured_pruning.py`. `check_plain` and
    `check_units` are given: they refuse what cannot be pruned, before anything is changed.
    """,
    files=("minipeft/compressed/structured_pruning.py",),
    blanks=("kept", "shrunk", "prune_heads", "prune_neurons", "prune_blocks", "parameter_count"),
    minutes=60,
    mistakes="""
    Rows of W_q pruned and W_o cut at the end; one of q, k, v forgotten; biases that fit but belong
    to other rows; heads narrowed instead of removed; a config that still tells the old depth.
    """,
    bugs=(
        Bug(
            "the wrong heads stay",
            "return [n for n in range(size) if n not in gone]",
            "return [n for n in range(size) if n in gone] or [0]",
            KEPT,
        ),
        Bug(
            "the first columns of o",
            "attn.o = shrunk(attn.o, columns=columns)",
            "attn.o = shrunk(attn.o, columns=torch.arange(len(columns)))",
            HEADS,
        ),
        Bug(
            "k keeps other heads",
            '        for name in "qkv":\n'
            "            setattr(attn, name, shrunk(getattr(attn, name), rows=columns))",
            '        for name in "qkv":\n'
            '            rows = columns if name != "k" else torch.arange(len(columns))\n'
            "            setattr(attn, name, shrunk(getattr(attn, name), rows=rows))",
            HEADS,
        ),
        Bug(
            "biases of other rows",
            "weight, bias = weight[rows], None if bias is None else bias[rows]",
            "weight, bias = weight[rows], None if bias is None else bias[: len(rows)]",
            BIASES,
        ),
        Bug(
            "narrower heads instead of fewer",
            "        attn.n_head = len(keep)\n",
            "        attn.head_dim = attn.head_dim * len(keep) // attn.n_head\n",
            WIDTHS,
        ),
        Bug(
            "columns of down as they come",
            "shrunk(mlp.down, columns=keep)",
            "shrunk(mlp.down, columns=torch.arange(len(keep)))",
            NEURONS,
        ),
        Bug(
            "frozen layers thaw",
            "nn.Parameter(weight.clone(), linear.weight.requires_grad)",
            "nn.Parameter(weight, True)",
            OWN,
        ),
        Bug(
            "biases not counted",
            "total += 4 * D * inside + 3 * inside + D",
            "total += 4 * D * inside + D",
            COUNT,
        ),
        Bug(
            "the depth stays in the config",
            "    model.config = dataclasses.replace(model.config, n_layer=len(left))\n",
            "",
            WIDTHS,
        ),
        Bug(
            "the output bias is halved",
            '"bias": bias if bias is None else nn.Parameter(bias.detach().clone(), '
            "bias.requires_grad),",
            '"bias": bias if bias is None else nn.Parameter(bias.detach() * '
            "weight.numel() / linear.weight.numel(), bias.requires_grad),",
            BIASES,
        ),
        Bug(
            "checked one layer at a time",
            '    gone = check_units(model, heads, "head", [b.attn.n_head for b in model.blocks])\n'
            "    for layer, numbers in gone.items():\n",
            "    for layer, numbers in heads.items():\n"
            '        numbers = check_units(model, {layer: numbers}, "head", '
            "[b.attn.n_head for b in model.blocks])[layer]\n",
            REFUSED,
        ),
    ),
)


def dense(case):
    """A GPT with three or four heads a layer, and ids."""
    heads, d = case.pick((3, 4), (4, 3), (3, 2))
    return case.model(n_head=heads, d_model=heads * d), case.ids(2, 7, 31)


def some(case, size):
    """Some numbers below `size`, not all, in any order."""
    return case.random.sample(range(size), case.size(1, size - 1))


def masked(model, heads, neurons):
    """A copy in which what these heads and neurons say is multiplied by 0."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for layer, numbers in heads.items():
            attn = model.blocks[layer].attn
            for h in numbers:
                attn.o.weight[:, h * attn.head_dim : (h + 1) * attn.head_dim] = 0
        for layer, numbers in neurons.items():
            model.blocks[layer].mlp.down.weight[:, list(numbers)] = 0
    return model


@LAB.invariant(12)
def pruned_heads_are_masked_heads(case):
    """(Structured 1): the model without the heads computes what the model computes in which their
    output is multiplied by 0.
    """
    model, ids = dense(case)
    heads = {n: some(case, model.config.n_head) for n in range(case.size(1, 2))}
    wanted = masked(model, heads, {})(ids)
    close(pruning.prune_heads(model, heads)(ids), wanted, "the logits without the heads")


@LAB.invariant(10)
def pruned_neurons_are_masked_neurons(case):
    """(Structured 2): the same for neurons of the feed-forward layer."""
    model, ids = dense(case)
    neurons = {n: some(case, model.config.ff_width) for n in range(case.size(1, 2))}
    wanted = masked(model, {}, neurons)(ids)
    close(pruning.prune_neurons(model, neurons)(ids), wanted, "the logits without the neurons")


@LAB.invariant(6)
def a_pruned_block_is_no_block(case):
    """A block taken out passes on what it reads; the config says what is left."""
    model, ids = dense(case)
    L = model.config.n_layer
    gone = some(case, L)
    wanted = copy.deepcopy(model)
    with torch.no_grad():
        for n in gone:
            for writer in (wanted.blocks[n].attn.o, wanted.blocks[n].mlp.down):
                writer.weight.zero_()
                writer.bias.zero_()
    close(pruning.prune_blocks(model, gone)(ids), wanted(ids), "the logits without the blocks")
    equal(model.config.n_layer, L - len(gone), "n_layer in the config")
    equal(len(model.blocks), L - len(gone), "the number of blocks")


@LAB.invariant(6)
def modules_tell_their_widths(case):
    """The layer has fewer heads of the same width, and matrices of that size."""
    model, _ = dense(case)
    attn, D = model.blocks[0].attn, model.config.d_model
    d, H = attn.head_dim, attn.n_head
    gone = some(case, H)
    pruning.prune_heads(model, {0: gone})
    left = H - len(gone)
    equal((attn.n_head, attn.head_dim), (left, d), "n_head and head_dim")
    for name in "qkv":
        layer = getattr(attn, name)
        equal(tuple(layer.weight.shape), (left * d, D), f"the shape of W_{name}")
        equal((layer.out_features, layer.in_features), (left * d, D), f"the features of {name}")
    equal(tuple(attn.o.weight.shape), (D, left * d), "the shape of W_o")


@LAB.invariant(5)
def biases_go_with_their_rows(case):
    """shrunk: rows take their biases along, columns leave the bias alone."""
    out, into = case.sizes(2, 4, 9)
    linear = torch.nn.Linear(into, out, dtype=torch.float64)
    rows = torch.tensor(sorted(some(case, out - 1))) + 1
    columns = torch.tensor(sorted(some(case, into - 1))) + 1
    small = pruning.shrunk(linear, rows=rows)
    same(small.weight.detach(), linear.weight.detach()[rows], "the weight's rows")
    same(small.bias.detach(), linear.bias.detach()[rows], "the bias beside fewer rows")
    small = pruning.shrunk(linear, columns=columns)
    same(small.weight.detach(), linear.weight.detach()[:, columns], "the weight's columns")
    same(small.bias.detach(), linear.bias.detach(), "the bias beside fewer columns")


@LAB.invariant(4)
def the_rest_is_its_own(case):
    """The smaller layer shares no memory with the old one and is trainable as that was."""
    linear = torch.nn.Linear(4, 5, dtype=torch.float64)
    for trained in (False, True):
        linear.requires_grad_(trained)
        rows, before = torch.arange(case.size(2, 5)), linear.weight.detach().clone()
        small = pruning.shrunk(linear, rows=rows)
        flags = (small.weight.requires_grad, small.bias.requires_grad)
        equal(flags, (trained, trained), "requires_grad of the smaller layer")
        with torch.no_grad():
            small.weight += 1
        same(linear.weight.detach(), before, "the old weight after changing the new one")


@LAB.invariant(4)
def the_count_is_the_parameters(case):
    """(Structured 3): parameter_count is what the pruned model has."""
    model, _ = dense(case)
    H, F = model.config.n_head, model.config.ff_width
    D, d = model.config.d_model, model.blocks[0].attn.head_dim
    full = sum(p.numel() for p in model.parameters())
    heads, neurons = case.size(1, H - 1), case.size(1, F - 1)
    layers = [{"n_head": H, "head_dim": d, "d_ff": F} for _ in model.blocks]
    layers[-1] = {"n_head": H - heads, "head_dim": d, "d_ff": F - neurons}
    wanted = full - heads * (4 * d * D + 3 * d) - neurons * (2 * D + 1)
    equal(pruning.parameter_count(model.config, layers), wanted, "parameter_count")
    check(isinstance(model, GPT), "the model is no GPT")


@LAB.invariant(3)
def what_cannot_go_is_refused(case):
    """A head that is not there is an error, and the model is as it was."""
    model, ids = dense(case)
    before = model(ids).detach()
    wrong = {0: [0], 1: [case.pick(-1, model.config.n_head, 9)]}
    refuses(lambda: pruning.prune_heads(model, wrong), f"pruning heads {wrong}")
    equal(model.blocks[0].attn.n_head, model.config.n_head, "n_head after an error")
    same(model(ids).detach(), before, "the logits after an error")
    refuses(lambda: pruning.prune_heads(model, {0: [1, 1]}), "a head named twice")
