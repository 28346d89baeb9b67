"""Lab: adapters."""

from __future__ import annotations

import math

import torch
from torch import nn

import minipeft
from minipeft.additive import adapter, bottleneck
from minipeft.labs.engine.case import check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab

SCALE = Hint(
    "(Bottleneck 1): s multiplies everything in the brackets, b_2 too",
    "Set s to 4 and to 0. Which parts of the output change, and which should?",
    ("bottleneck",),
)
ACTIVATION = Hint(
    "(Bottleneck 1): sigma stands between the two matrices and nowhere else",
    "Is your adapter linear? Can its output be negative in every coordinate?",
    ("bottleneck",),
)
RESIDUAL = Hint(
    "(Adapter 2) (Adapter 3): y = f + A(f), with a residual of its own",
    "With W_2 = 0 and b_2 = 0 the adapter is nothing. What is left of f then?",
    ("SequentialAdapter.forward",),
)
SEQUENTIAL = Hint(
    "(Adapter 2) (Adapter 3): the sequential adapter reads f, what the sub-layer gave",
    "Two arrows lead into the sum. What does the one through the adapter begin at?",
    ("SequentialAdapter.forward",),
)
PARALLEL = Hint(
    "(Adapter 4): the parallel adapter reads x, what the sub-layer reads",
    "Could your adapter run before the sub-layer has finished?",
    ("ParallelAdapter.forward",),
)
START = Hint(
    'the table of starts: with init="lora" W_2 is 0 and W_1 is U(+-1/sqrt(D))',
    "What does the model compute before its first step? Who gets a gradient in it?",
    ("init_lora",),
)
NEAR = Hint(
    "the table of starts: Houlsby's normal has deviation 0.001 and is cut at two of them",
    "How large is the largest weight you may draw? How far from the base is the start then?",
    ("init_truncated",),
)
DROPOUT = Hint(
    "dropout is on sigma's m numbers, in training only",
    "Run the same input twice, in eval mode and in training. What should differ?",
    ("Bottleneck.forward", "bottleneck"),
)
NORM = Hint(
    "own_norm: A reads LN(x) instead of x, alone and in the sum (Bottleneck 2)",
    "There are two ways through a Bottleneck. Does the LayerNorm stand in both?",
    ("Bottleneck.forward", "Bottleneck.add_to"),
)
SUM = Hint(
    "(Bottleneck 2): y = f + A(x)",
    "add_bottleneck gets f and x. What is left of f when W_2 and b_2 are 0?",
    ("add_bottleneck", "Bottleneck.add_to"),
)
COUNT = Hint(
    "the count: 2 D m + m + D an adapter, and the LayerNorms where they train",
    "List the tensors of one adapter with their sizes. Are all of them in your sum?",
    ("Adapter.count",),
)

BOTTLENECK, ADAPTER = "minipeft/additive/bottleneck.py", "minipeft/additive/adapter.py"
LORA_INIT = "nn.init.uniform_(down, -(down.shape[1] ** -0.5), down.shape[1] ** -0.5)"

LAB = Lab(
    title="Adapters: a bottleneck inside a frozen transformer",
    about="""
    Two thin layers squeeze the hidden vector to m numbers and back. You write the bottleneck, its
    two starts, the sequential and the parallel form, and the count. `add_bottleneck` makes the sum
    (Bottleneck 2) in one function; `add_to` and `added` may use it, or simply add.

    `Adapter.sites`, `install_bottlenecks` and the choices of the papers are given; the wrapper
    `ResidualParallelAdapter` shows how a wrapper calls what it wraps.
    """,
    files=(BOTTLENECK, ADAPTER),
    blanks=(
        "bottleneck",
        "init_lora",
        "init_truncated",
        "Bottleneck.__init__",
        "Bottleneck.forward",
        "add_bottleneck",
        "Bottleneck.add_to",
        "AdapterWrapper.added",
        "SequentialAdapter.forward",
        "ParallelAdapter.forward",
        "Adapter.count",
    ),
    minutes=75,
    mistakes="""
    The inner residual left out (the residual sum of the block looks like enough); the parallel form
    copied from the sequential one; both matrices zero; an activation behind the second matrix.
    """,
    bugs=(
        Bug(
            "no inner residual",
            "return f if self.idle() else self.added(f, f)  #",
            "return f if self.idle() else self.adapter(f)  #",
            RESIDUAL,
            ADAPTER,
        ),
        Bug(
            "parallel reads the output",
            "return f if self.idle() else self.added(f, x)  # (Adapter 4)",
            "return f if self.idle() else self.added(f, f)  # (Adapter 4)",
            PARALLEL,
            ADAPTER,
        ),
        Bug(
            "the scale misses the bias",
            "return y if scale == 1 else scale * y",
            "return y if scale == 1 else scale * y + (1 - scale) * b_2",
            SCALE,
        ),
        Bug(
            "no activation",
            "u = F.dropout(ACTIVATIONS[activation](F.linear(x, W_1, b_1)), dropout)",
            "u = F.dropout(F.linear(x, W_1, b_1), dropout)",
            ACTIVATION,
        ),
        Bug(
            "both matrices random",
            "nn.init.zeros_(up)",
            "nn.init.normal_(up, 0.0, 0.02)",
            START,
        ),
        Bug("both matrices zero", LORA_INIT, "nn.init.zeros_(down)", START),
        Bug(
            "dropout at evaluation",
            "dropout = self.dropout if self.training else 0.0",
            "dropout = self.dropout",
            DROPOUT,
        ),
        Bug(
            "biases left out of the count",
            "one = 2 * D * m + m + D +",
            "one = 2 * D * m +",
            COUNT,
            ADAPTER,
        ),
        Bug(
            "sequential reads the input",
            "return f if self.idle() else self.added(f, f)  #",
            "return f if self.idle() else self.added(f, x)  #",
            SEQUENTIAL,
            ADAPTER,
        ),
        Bug(
            "activation after the up-projection",
            "y = F.linear(u, W_2, b_2)",
            "y = ACTIVATIONS[activation](F.linear(u, W_2, b_2))",
            ACTIVATION,
        ),
        Bug(
            "the scale divides",
            "return y if scale == 1 else scale * y",
            "return y if scale == 1 else y / scale",
            SCALE,
        ),
        Bug(
            "a normal that is not cut",
            "nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)",
            "nn.init.normal_(weight, 0.0, std)",
            NEAR,
        ),
        Bug(
            "own norm ignored",
            "return bottleneck(self.norm(x), *self",
            "return bottleneck(x, *self",
            NORM,
        ),
        Bug(
            "the sum without f",
            "return f + bottleneck(x, W_1, b_1, W_2, b_2, activation, scale)",
            "return bottleneck(x, W_1, b_1, W_2, b_2, activation, scale)",
            SUM,
        ),
        Bug(
            "own norm lost in the sum",
            "return add_bottleneck(f, self.norm(x), *self",
            "return add_bottleneck(f, x, *self",
            NORM,
        ),
    ),
)

SIGMAS = {
    "relu": lambda z: z * (z > 0),
    "tanh": lambda z: (z.exp() - (-z).exp()) / (z.exp() + (-z).exp()),
    "swish": lambda z: z / (1 + (-z).exp()),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "identity": lambda z: z,
}


def expected(module, x, activation, scale):
    """(Bottleneck 1), written again."""
    down, up = module.down, module.up
    hidden = SIGMAS[activation](x @ down.weight.T + down.bias)
    return scale * (hidden @ up.weight.T + up.bias)


def stirred(case, width, m, activation="relu", scale=1.0, **more):
    """A Bottleneck whose tensors are all random, float64, in eval mode."""
    made = bottleneck.Bottleneck(width, m, scale, activation, dtype=torch.float64, **more).eval()
    case.stir(made.parameters())
    return made


class Doubling(nn.Module):
    """A sub-layer that is easy to recognise."""

    def forward(self, x, cache=None):
        return 2 * x + 1


@LAB.invariant(10)
def the_bottleneck_is_the_equation(case):
    """(Bottleneck 1): A(x) = s [W_2 sigma(W_1 x + b_1) + b_2], for every sigma."""
    D, m = case.sizes(2, 3, 11)
    activation, scale = case.pick(*SIGMAS), case.pick(1.0, case.number(1.5, 4))
    made = stirred(case, D, m, activation, scale)
    x = case.normal(2, 3, D)
    close(made(x), expected(made, x, activation, scale), f"A(x) with {activation}, s={scale:.2f}")
    weights = made.down.weight, made.down.bias, made.up.weight, made.up.bias
    wanted = expected(made, x, "tanh", 3.0)
    close(bottleneck.bottleneck(x, *weights, "tanh", 3.0), wanted, "bottleneck with tanh and s=3")
    f = case.normal(2, 3, D)
    close(bottleneck.add_bottleneck(f, x, *weights, "tanh", 3.0), f + wanted, "add_bottleneck")
    wanted = expected(made, x, "relu", 2.5)
    close(bottleneck.bottleneck(x, *weights, "relu", 2.5), wanted, "bottleneck with relu and s=2.5")


@LAB.invariant(3)
def a_norm_of_its_own_is_read_through(case):
    """own_norm: A reads LN(x), alone and in the sum."""
    D, m = case.sizes(2, 4, 9)
    made = stirred(case, D, m, own_norm=True)
    x = 3 * case.normal(4, D) + 1
    centred = x - x.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + made.norm.eps).sqrt()
    wanted = expected(made, normal * made.norm.weight + made.norm.bias, "relu", 1.0)
    close(made(x), wanted, "A(x) with a norm of its own")
    f = case.normal(4, D)
    close(made.add_to(f, x), f + wanted, "f + A(x) with a norm of its own")


@LAB.invariant(8)
def sequential_reads_what_was_given(case):
    """(Adapter 2) (Adapter 3): y = f + A(f), f what the sub-layer gave."""
    D, m = case.sizes(2, 3, 9)
    A = stirred(case, D, m)
    x = case.normal(2, 3, D)
    f = 2 * x + 1
    wanted = f + expected(A, f, "relu", 1.0)
    close(adapter.SequentialAdapter(Doubling(), A)(x), wanted, "the sequential adapter")
    off = adapter.SequentialAdapter(Doubling(), A)
    off.left_out = True
    close(off(x), f, "a sequential adapter that is left out")


@LAB.invariant(8)
def parallel_reads_what_the_sublayer_reads(case):
    """(Adapter 4): y = f + A(x), x what the sub-layer reads."""
    D, m = case.sizes(2, 3, 9)
    A = stirred(case, D, m)
    x = case.normal(2, 3, D)
    wanted = 2 * x + 1 + expected(A, x, "relu", 1.0)
    close(adapter.ParallelAdapter(Doubling(), A)(x), wanted, "the parallel adapter")


@LAB.invariant(6)
def the_start_is_the_base(case):
    """With init="lora" the model starts as the base, in every bit."""
    model, ids = case.model(), case.ids(2, 6, 31)
    before = model(ids).detach()
    placement = case.pick("pfeiffer", "parallel")
    minipeft.Adapter(placement, bottleneck=3, scale=case.pick(1.0, 4.0)).attach(model)
    same(model(ids).detach(), before, "the logits at the start")


@LAB.invariant(2)
def lora_s_start_is_the_table_s(case):
    """init="lora": W_1 is U(+-1/sqrt(D)), W_2 is 0."""
    D, m = case.size(40, 60), case.size(20, 35)
    W_1 = torch.empty(m, D, dtype=torch.float64)
    W_2 = torch.full((D, m), 7.0, dtype=torch.float64)
    bottleneck.init_lora(W_1, W_2)
    check(bool((W_1.abs() <= D**-0.5).all()), "W_1 has entries beyond its range")
    # the largest of 800 uniform numbers is below 0.95 of the bound once in e^41 times
    check(W_1.abs().max().item() >= 0.95 * D**-0.5, "W_1 does not fill its range")
    check(not W_2.any(), "W_2 does not start at 0")


@LAB.invariant(2)
def houlsby_s_start_is_cut(case):
    """init="truncated": both are normal, cut at two standard deviations."""
    D, m, std = case.size(40, 60), case.size(20, 35), case.pick(1e-3, 3e-3)
    weights = torch.empty(m, D, dtype=torch.float64), torch.empty(D, m, dtype=torch.float64)
    bottleneck.init_truncated(*weights, std=std)
    for W in weights:
        check(bool((W.abs() <= 2 * std).all()), "a truncated weight lies beyond two deviations")
        # the deviation of a normal cut at two of its own is 0.880 of it; 800 numbers give it to 5 %
        check(0.75 * std < W.std().item() < 1.0 * std, "the truncated weights spread wrongly")


@LAB.invariant(5)
def dropout_is_for_training(case):
    """Dropout: the evaluation is the same every time, training is not."""
    D, m = case.sizes(2, 5, 11)
    made = stirred(case, D, m, "tanh", dropout=0.5)
    x = case.normal(5, D)
    close(made(x), expected(made, x, "tanh", 1.0), "A(x) in eval mode")
    made.train()
    check(not torch.equal(made(x), made(x)), "in training nothing is dropped")


@LAB.invariant(6)
def the_count_is_the_tensors(case):
    """The count is 2 D m + m + D an adapter (2 D more with its own norm), and Houlsby's norms."""
    config, m = case.config(), case.size(2, 7)
    D, L = config.d_model, config.n_layer
    one, own = 2 * D * m + m + D, case.pick(True, False)
    one += 2 * D if own else 0
    for placement, wanted in (("pfeiffer", L * one), ("houlsby", 2 * L * one + (4 * L + 2) * D)):
        technique = minipeft.Adapter(placement, m, own_norm=own)
        equal(technique.count(config), wanted, f"the count of {placement}")
        model = technique.attach(minipeft.GPT(config))
        there = sum(p.numel() for p in model.parameters() if p.requires_grad)
        equal(there, wanted, f"the number of parameters {placement} trains")
