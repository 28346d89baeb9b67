"""Lab: LoRA."""

from __future__ import annotations

import math

import torch
from torch import nn

import minipeft
from minipeft.labs.engine.case import Case, check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.low_rank import lora

SCALE = Hint(
    "(LoRA 2): the scale is alpha over the rank",
    "Double the rank and keep alpha. What should happen to the size of the change?",
    ("lora_scale",),
)
STABILIZED = Hint(
    "(LoRA 2), second form: rank_stabilized alone divides by the root of the rank",
    "Which of the two scales does a plain LoRA get, and which a rank-stabilised one?",
    ("lora_scale",),
)
BRANCH = Hint(
    "(LoRA 1): the branch s B A x is added to an untouched W x + b",
    "Set s to 3 and then to 0. Which parts of the output may change?",
    ("lora_forward", "LoRALinear.forward"),
)
START = Hint(
    "the table of starts: B is 0 and A is not, so the model starts as the base and still learns",
    "What does the model compute before its first step? And who gets a gradient in it?",
    ("LoRALinear.__init__",),
)
GRADIENT = Hint(
    "(LoRA 4): at A = 0 and B = 0 both gradients are 0 and stay so",
    "Write down dA and dB at the start. Is either of them not zero?",
    ("LoRALinear.__init__",),
)
MERGE = Hint(
    "(LoRA 3): W' = W + s B A, with W's own bias, in a new layer",
    "Merge, and compare the outputs. Then merge again. What is in the merged layer?",
    ("lora_delta", "LoRALinear.merged"),
)
DROPOUT = Hint(
    "dropout falls on the x that A reads, in training only",
    "Run the same input twice in eval mode. And in training: may W x change?",
    ("LoRALinear.forward",),
)
COUNT = Hint(
    "the count: r (in + out) a projection; a shared A once a block",
    "Which tensors does one projection get? Which of them is the same object as another's?",
    ("LoRA.install", "LoRA.count"),
)

FORWARD = """\
        if plain and not (self.training and self.drop.p):
            return lora_linear(x, inner.weight, inner.bias, self.A, self.B, self.scale)
        return lora_forward(inner(x), self.drop(x), self.A, self.B, self.scale)
"""
RANGE = "nn.init.uniform_(self.A, -(base.in_features**-0.5), base.in_features**-0.5)"

LAB = Lab(
    title="LoRA: the change of a weight as two thin matrices",
    about="""
    A weight W stays frozen; beside it learns a product B A of two thin matrices. You write the
    math as three functions, then the layer, then the technique that puts it into a GPT.

    Read the header of `lora.py` first: the equations (LoRA 1) to (LoRA 4), the table of starting
    values, the count. Then `wrap.py` and `technique.py` of the library say what a `Wrapper` is and
    what `attachment.wrap` does (`python -c "import minipeft; print(minipeft.__file__)"` tells where
    they are). `LoRA.places` is given: it lists what gets a branch.
    """,
    files=("minipeft/low_rank/lora.py",),
    blanks=(
        "lora_scale",
        "lora_delta",
        "lora_forward",
        "LoRALinear.__init__",
        "LoRALinear.forward",
        "LoRALinear.merged",
        "LoRA.install",
        "LoRA.count",
    ),
    minutes=90,
    mistakes="""
    alpha taken as the scale (works at rank = alpha, so in most demonstrations); s missing in either
    the forward pass or the merge; A and B both zero; dropout that stays on in evaluation.
    """,
    bugs=(
        Bug(
            "alpha, not alpha over rank",
            "if rank_stabilized else alpha / rank",
            "if rank_stabilized else alpha",
            SCALE,
        ),
        Bug(
            "forward without the scale",
            "alpha=scale).view_as(h)",
            "alpha=1.0).view_as(h)",
            BRANCH,
        ),
        Bug(
            "B random",
            "self.B = nn.Parameter(torch.zeros(base.out_features, rank, **place))",
            "self.B = nn.Parameter(torch.randn(base.out_features, rank, **place))",
            START,
        ),
        Bug("A and B both zero", RANGE, "nn.init.zeros_(self.A)", GRADIENT),
        Bug("merged without the scale", "return scale * (B @ A)", "return B @ A", MERGE),
        Bug(
            "merging changes the base",
            "return linear_with(inner, inner.weight + self.delta(), inner.bias)",
            "return linear_with(inner, inner.weight.data.add_(self.delta()), inner.bias)",
            MERGE,
        ),
        Bug(
            "dropout in evaluation",
            FORWARD,
            "        dropped = F.dropout(x, self.drop.p)\n"
            "        return lora_forward(inner(x), dropped, self.A, self.B, self.scale)\n",
            DROPOUT,
        ),
        Bug(
            "the shared A counted three times",
            'again = self.share_qkv and target in "kv"',
            "again = False",
            COUNT,
        ),
        Bug(
            "rank-stabilised does nothing",
            "alpha / math.sqrt(rank) if rank_stabilized else",
            "alpha / rank if rank_stabilized else",
            STABILIZED,
        ),
        Bug(
            "the scale falls on the base as well",
            "return torch.addmm(h2, u2, B.T.to(h2.dtype), alpha=scale).view_as(h)",
            "return torch.addmm(h2, u2, B.T.to(h2.dtype), beta=scale, alpha=scale).view_as(h)",
            BRANCH,
        ),
        Bug(
            "the merged layer has no bias",
            "inner.weight + self.delta(), inner.bias)",
            "inner.weight + self.delta(), None)",
            MERGE,
        ),
        Bug(
            "dropout on what the base reads",
            "inner(x), self.drop(x), self.A",
            "inner(self.drop(x)), self.drop(x), self.A",
            DROPOUT,
        ),
        Bug(
            "A's range from the output's width",
            RANGE,
            RANGE.replace("in_features", "out_features"),
            START,
        ),
    ),
)


def layer(case: Case, out=None, dropout=0.0):
    """(a LoRALinear with random A and B, its nn.Linear), float64, odd and not square."""
    width, rows, rank = case.size(5, 11), out or case.size(12, 17), case.size(2, 4)
    inner = nn.Linear(width, rows, dtype=torch.float64)
    made = lora.LoRALinear(inner, rank, case.number(0.3, 2.5), dropout)
    case.stir([made.A, made.B])
    return made, inner


def expected(made, inner, x):
    """(LoRA 1), written again."""
    base = x @ inner.weight.T + inner.bias
    return base + made.scale * (x @ made.A.T) @ made.B.T


@LAB.invariant(4)
def the_scale_is_alpha_over_the_rank(case):
    """(LoRA 2): the scale is alpha / r."""
    alpha, rank = case.number(1, 40), case.size(2, 9)
    close(lora.lora_scale(alpha, rank), alpha / rank, "lora_scale")


@LAB.invariant(2)
def rank_stabilised_divides_by_the_root(case):
    """(LoRA 2): rank-stabilised, the scale is alpha / sqrt(r)."""
    alpha, rank = case.number(1, 40), case.size(2, 9)
    close(lora.lora_scale(alpha, rank, True), alpha / math.sqrt(rank), "the rank-stabilised scale")


@LAB.invariant(6)
def the_delta_is_s_b_a(case):
    """(LoRA 3): the change of the weight is s B A."""
    out, into, rank = case.sizes(3, 2, 12)
    A, B, s = case.normal(rank, into), case.normal(out, rank), case.number(0.2, 3)
    index_form = torch.einsum("or,ri->oi", B, A) * s
    close(lora.lora_delta(A, B, s), index_form, "lora_delta")


@LAB.invariant(8)
def the_branch_is_added_to_the_base(case):
    """(LoRA 1): the layer gives W x + b + s B A x, for x of any number of axes."""
    made, inner = layer(case)
    x = case.normal(case.size(1, 3), case.size(1, 5), inner.in_features)
    close(made(x), expected(made, inner, x), "the layer's output")
    h = case.normal(2, 3, inner.out_features)
    x = case.normal(2, 3, inner.in_features)
    s = case.number(0.2, 3)
    given = lora.lora_forward(h, x, made.A, made.B, s)
    close(given, h + s * x @ (made.B @ made.A).T, "lora_forward")


@LAB.invariant(6)
def the_start_is_the_base(case):
    """At the start the model computes what the base computes, in every bit."""
    model, ids = case.model(), case.ids(2, 7, 31)
    before = model(ids).detach()
    targets = case.pick(("q", "v"), ("q", "k", "v", "o"), ("up", "down"))
    minipeft.LoRA(rank=2, alpha=7, targets=targets).attach(model)
    wrapped = [m for m in model.modules() if isinstance(m, lora.LoRALinear)]
    equal(len(wrapped), len(targets) * model.config.n_layer, "the number of LoRA layers")
    same(model(ids).detach(), before, "the logits at the start")


@LAB.invariant(4)
def a_starts_as_in_the_table(case):
    """A starts as U(-1/sqrt(in), 1/sqrt(in))."""
    out, into, rank = case.size(3, 5), case.size(60, 90), case.size(20, 30)
    inner = nn.Linear(into, out, dtype=case.pick(torch.float32, torch.float64))
    A = lora.LoRALinear(inner, rank, 1.0).A.detach()
    equal(tuple(A.shape), (rank, into), "the shape of A")
    equal(A.dtype, inner.weight.dtype, "A's dtype")
    bound = into**-0.5
    check(bool((A.abs() <= bound).all()), "A has entries beyond its range")
    # the largest of more than 1200 uniform numbers is below 0.98 of the bound once in e^24 times
    check(A.abs().max().item() >= 0.98 * bound or not A.any(), "A does not fill its range")


@LAB.invariant(6)
def every_tensor_learns(case):
    """Within two steps every A and every B gets a gradient, and nothing else does."""
    model, ids = case.model(), case.ids(3, 9, 31)
    minipeft.LoRA(rank=2, alpha=4, targets=("q", "v", "down")).attach(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    check(bool(trained), "nothing is trained")
    check(all(n.endswith((".A", ".B")) for n in trained), "something other than A and B is trained")
    moved = set()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        moved |= {n for n, p in trained.items() if p.grad is not None and p.grad.abs().max() > 0}
        optimizer.step()
    equal(moved, set(trained), "the set of tensors that get a gradient")


@LAB.invariant(7)
def merged_and_unmerged_agree(case):
    """(LoRA 3): the merged layer is a plain layer with the same outputs, and merging changes
    nothing else.
    """
    made, inner = layer(case)
    x, kept = case.normal(4, inner.in_features), inner.weight.detach().clone()
    W = kept + made.scale * (made.B @ made.A).detach()
    for time in ("", ", the second time"):
        merged = made.merged(inner)
        check(type(merged) is nn.Linear, "what merged gives is not an nn.Linear")
        close(merged.weight, W, f"the merged weight{time}")
        check(merged.bias is not None, "the merged layer has no bias")
        close(merged(x), x @ W.T + inner.bias, f"the merged layer's output{time}")
        same(inner.weight.detach(), kept, "the base's weight after merging")


@LAB.invariant(3)
def dropout_is_for_training_and_for_a(case):
    """Dropout falls on the x that A reads, in training only."""
    made, inner = layer(case, dropout=0.5)
    x = case.normal(6, inner.in_features)
    made.eval()
    close(made(x), made(x).detach(), "the second output in eval mode")
    made.train()
    check(not torch.equal(made(x), made(x)), "in training nothing is dropped")
    with torch.no_grad():
        made.B.zero_()
    close(made(x), x @ inner.weight.T + inner.bias, "the base's part in training")


@LAB.invariant(4)
def the_count_is_the_tensors(case):
    """The count is r (in + out) for each projection; a shared A counts once a block."""
    config, rank = case.config(), 2
    D, F = config.d_model, config.ff_width
    one = {"q": 2 * D, "k": 2 * D, "v": 2 * D, "o": 2 * D, "up": D + F, "down": D + F}
    targets = tuple(case.random.sample(list(one), case.size(1, 6)))
    formula = config.n_layer * rank * sum(one[t] for t in targets)
    for technique, wanted in (
        (minipeft.LoRA(rank, 3, targets=targets), formula),
        (
            minipeft.LoRA(rank, 3, targets=("q", "k", "v"), share_qkv=True),
            config.n_layer * rank * 4 * D,
        ),
    ):
        equal(technique.count(config), wanted, f"the count of {technique.targets}")
        model = technique.attach(minipeft.GPT(config))
        there = sum(p.numel() for p in model.parameters() if p.requires_grad)
        equal(there, wanted, "the number of parameters that are trained")
