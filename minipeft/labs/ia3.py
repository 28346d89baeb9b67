"""Lab: IA3."""

from __future__ import annotations

import torch
from torch import nn

import minipeft
from minipeft.additive import ia3
from minipeft.labs.engine.case import check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab

START = Hint(
    "the table of starts: l is 1, a factor that changes nothing",
    "What must l be so that the model starts as the base? Is l a factor or a change of one?",
    ("IA3Linear.__init__", "rescale"),
)
WRITES = Hint(
    "(IA3 1): l multiplies what a projection writes, its bias included",
    "Which vector is as long as l: what the projection reads, or what it writes?",
    ("IA3Linear.forward",),
)
READS = Hint(
    "(IA3 2): on the feed-forward layer l multiplies what W_down reads",
    "Where in (IA3 2) does l_ff stand, before W_down or behind it? How long is it?",
    ("IA3.install", "IA3Linear.__init__", "IA3Linear.forward"),
)
ROWS = Hint(
    "(IA3 3): l at what is written scales rows, and the bias with them",
    "Multiply W x + b by l on paper. What happens to W, and what to b?",
    ("rescaled_rows",),
)
COLUMNS = Hint(
    "(IA3 4): l at what is read scales columns, and the bias not at all",
    "Write W (l * x) + b. Which side of W does diag(l) stand on? Does b see l?",
    ("rescaled_columns", "IA3Linear.merged"),
)
DTYPE = Hint(
    "(IA3 1): what is scaled keeps its dtype",
    "Activations in bfloat16 meet an l in float32. What is the product's dtype?",
    ("rescale",),
)
GRADIENT = Hint(
    "(IA3 5): dl is the sum over tokens of g * h",
    "Is every l reached by the gradient? Ask for it on both kinds of layers.",
    ("IA3Linear.forward", "rescale"),
)
COUNT = Hint(
    "the count: one number for each coordinate that is scaled, in every block",
    "How long is l where it multiplies what is read, and where what is written?",
    ("IA3.count",),
)

FOLD = "fold = rescaled_columns if self.on_input else rescaled_rows"

LAB = Lab(
    title="IA3: a learned volume knob for every coordinate",
    about="""
    The smallest technique of all: vectors that multiply keys, values and the hidden layer. What is
    easy to get wrong is on which side of a matrix a factor stands, and whether the bias feels it.

    The equations (IA3 1) to (IA3 5) are in the header of `ia3.py`; `linear_with` from `lora.py`
    makes a layer from a weight and a bias.
    """,
    files=("minipeft/additive/ia3.py",),
    blanks=(
        "rescale",
        "rescaled_rows",
        "rescaled_columns",
        "IA3Linear.__init__",
        "IA3Linear.forward",
        "IA3Linear.merged",
        "IA3.install",
        "IA3.count",
    ),
    minutes=60,
    mistakes="""
    Merging without the bias; scaling the bias where l is at the input; l started at 0 (as LoRA's B)
    or used as 1 + l; rows for columns, which a square matrix hides.
    """,
    bugs=(
        Bug("starts at zero", "torch.ones(size", "torch.zeros(size", START),
        Bug(
            "the bias is left out of the merge",
            "return l[:, None] * weight, None if bias is None else l * bias",
            "return l[:, None] * weight, bias",
            ROWS,
        ),
        Bug(
            "scaled on the wrong side",
            "        if self.on_input:\n            return",
            "        if not self.on_input and self.l.numel() == x.shape[-1]:\n            return",
            WRITES,
        ),
        Bug(
            "down is scaled at its output",
            "target in self.feedforward)\n",
            'target in self.feedforward and target != "down")\n',
            READS,
        ),
        Bug(
            "merged rows for columns",
            FOLD,
            "fold = rescaled_rows if self.on_input and inner.in_features == inner.out_features "
            "else rescaled_columns if self.on_input else rescaled_rows",
            COLUMNS,
        ),
        Bug("one block counted", "return config.n_layer * total", "return total", COUNT),
        Bug("the scale promotes", "h * l.to(h.dtype)", "h * l", DTYPE),
        Bug(
            "the scaling is detached",
            "            return self.inner(rescale(x, self.l))",
            "            return self.inner(rescale(x, self.l.detach()))",
            GRADIENT,
        ),
        Bug(
            "the bias is scaled where the input is",
            "    return weight * l, bias",
            "    return weight * l, None if bias is None else bias * l.mean()",
            COLUMNS,
        ),
        Bug(
            "the count takes the other side",
            "total += into if target in self.feedforward else out",
            "total += out if target in self.feedforward else into",
            COUNT,
        ),
        Bug(
            "a change added to one",
            "    return h * l.to(h.dtype)",
            "    return h * (1 + l.to(h.dtype))",
            START,
        ),
    ),
)


def layer(case, on_input, square=False):
    """(an IA3Linear with a random l, its nn.Linear), float64."""
    out, into = case.sizes(2, 4, 11)
    inner = nn.Linear(into, into if square else out, dtype=torch.float64)
    made = ia3.IA3Linear(inner, on_input)
    case.stir([made.l])
    return made, inner


@LAB.invariant(6)
def rescaling_is_elementwise(case):
    """(IA3 1): rescale gives l * h, in h's dtype."""
    n = case.size(3, 9)
    h, l = case.normal(2, 3, n), case.normal(n)
    close(ia3.rescale(h, l), torch.einsum("abn,n->abn", h, l), "rescale")
    half = case.pick(torch.bfloat16, torch.float16)
    equal(ia3.rescale(h.to(half), l.float()).dtype, half, "the dtype of what is scaled")


@LAB.invariant(8)
def what_is_written_is_scaled(case):
    """(IA3 1): l * (W x + b), bias included, for square matrices too."""
    for square in (False, True):
        made, inner = layer(case, False, square)
        x = case.normal(2, 3, inner.in_features)
        wanted = made.l * (x @ inner.weight.T + inner.bias)
        close(made(x), wanted, "the layer that scales what it writes")


@LAB.invariant(8)
def what_is_read_is_scaled(case):
    """(IA3 2): W (l * x) + b where l is at the input; in a GPT that is mlp.down."""
    made, inner = layer(case, True)
    x = case.normal(2, 3, inner.in_features)
    close(
        made(x), (made.l * x) @ inner.weight.T + inner.bias, "the layer that scales what it reads"
    )
    model = case.model()
    minipeft.IA3().attach(model)
    for block in model.blocks:
        equal(block.mlp.down.l.shape, (model.config.ff_width,), "the length of l at mlp.down")
        equal(block.attn.k.l.shape, (model.config.d_model,), "the length of l at attn.k")


@LAB.invariant(7)
def merged_rows_carry_the_bias(case):
    """(IA3 3): merged, l at the output is diag(l) W and l * b."""
    made, inner = layer(case, False, case.pick(True, False))
    merged = made.merged(inner)
    close(merged.weight, torch.diag(made.l) @ inner.weight, "the merged weight")
    close(merged.bias, made.l * inner.bias, "the merged bias")
    close(ia3.rescaled_rows(inner.weight, inner.bias, made.l)[1], made.l * inner.bias, "its bias")
    bare = ia3.rescaled_rows(inner.weight, None, made.l)
    check(bare[1] is None, "rescaled_rows invents a bias")


@LAB.invariant(6)
def merged_columns_leave_the_bias(case):
    """(IA3 4): merged, l at the input is W diag(l), and b as it is; for square matrices too."""
    for square in (False, True):
        made, inner = layer(case, True, square)
        merged = made.merged(inner)
        close(merged.weight, inner.weight @ torch.diag(made.l), "the merged weight")
        close(merged.bias, inner.bias, "the merged bias")


@LAB.invariant(6)
def the_start_is_the_base(case):
    """At the start the model computes what the base computes, in every bit."""
    model, ids = case.model(), case.ids(2, 6, 31)
    before = model(ids).detach()
    minipeft.IA3(targets=case.pick(("k", "v", "down"), ("q", "o", "up"))).attach(model)
    same(model(ids).detach(), before, "the logits at the start")


@LAB.invariant(4)
def every_vector_has_its_gradient(case):
    """(IA3 5): dl is the sum over tokens of g * h, wherever l stands."""
    for on_input in (False, True):
        made, inner = layer(case, on_input)
        x, g = case.normal(2, 3, inner.in_features), case.normal(2, 3, inner.out_features)
        made(x).backward(g)
        check(made.l.grad is not None, "l gets no gradient")
        into, at = (g @ inner.weight, x) if on_input else (g, inner(x))
        close(made.l.grad, (into * at).sum((0, 1)), "the gradient of l")


@LAB.invariant(5)
def the_count_is_the_tensors(case):
    """The count is one number for each coordinate that is scaled, in every block."""
    config = case.config()
    D, F = config.d_model, config.ff_width
    reads = tuple(case.random.sample(("down", "up", "o"), case.size(1, 2)))
    targets = tuple(case.random.sample(("q", "k", "v", "o", "up", "down"), case.size(3, 6)))
    writes = {"up": F}
    takes = {"down": F}
    each = [takes.get(t, D) if t in reads else writes.get(t, D) for t in targets]
    technique = minipeft.IA3(targets, reads)
    wanted = config.n_layer * sum(each)
    equal(technique.count(config), wanted, f"the count of {targets}, read at {reads}")
    model = technique.attach(minipeft.GPT(config))
    there = sum(p.numel() for p in model.parameters() if p.requires_grad)
    equal(there, wanted, "the number of parameters that are trained")
