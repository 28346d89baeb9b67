"""What goes wrong in IA3."""

from tests.mutants import Mutant

FILE = "minipeft/additive/ia3.py"
TESTS = ["tests/test_ia3.py", "tests/contract -k IA3"]

MUTANTS = [
    Mutant(
        name="the bias is left out of the scaling",
        file=FILE,
        find="return l[:, None] * weight, None if bias is None else l * bias",
        replace="return l[:, None] * weight, bias",
        why="merging is thought of as a change of W alone",
        invariant="(IA3 3): merged equals unmerged",
    ),
    Mutant(
        name="the bias is scaled where the input is",
        file=FILE,
        find="    return weight * l, bias",
        replace=(
            "    return weight * l, None if bias is None else l[: len(bias)] * bias "
            "if len(l) >= len(bias) else bias"
        ),
        why="one rule for both ways of merging",
        invariant="(IA3 4): the bias stays as it is",
    ),
    Mutant(
        name="starts at zero",
        file=FILE,
        find="torch.ones(size",
        replace="torch.zeros(size",
        why="LoRA starts at zero",
        invariant="point 1: the start is the base",
    ),
    Mutant(
        name="a change added to one",
        file=FILE,
        find="    return h * l.to(h.dtype)",
        replace="    return h * (1 + l.to(h.dtype))",
        why="thinking of l as a delta",
        invariant="(IA3 1): l h, and the start is the base",
    ),
    Mutant(
        name="scaled on the wrong side",
        file=FILE,
        find="        if self.on_input:\n            return",
        replace=(
            "        if not self.on_input and self.l.numel() == x.shape[-1]:\n            return"
        ),
        why="keys are what attention reads, so the input is scaled",
        invariant="(IA3 1): what the projection writes is scaled",
    ),
    Mutant(
        name="down is scaled at its output",
        file=FILE,
        find="target in self.feedforward)\n",
        replace='target in self.feedforward and target != "down")\n',
        why="every target treated like k and v",
        invariant="(IA3 2): the hidden layer is scaled",
    ),
    Mutant(
        name="merged rows for columns",
        file=FILE,
        find="fold = rescaled_columns if self.on_input else rescaled_rows",
        replace=(
            "fold = rescaled_rows if self.on_input and inner.in_features == "
            "inner.out_features else rescaled_columns if self.on_input else "
            "rescaled_rows"
        ),
        why="a square matrix hides the transposition",
        invariant="(IA3 4): W diag(l)",
    ),
    Mutant(
        name="one vector for all blocks counted",
        file=FILE,
        find="return config.n_layer * total",
        replace="return total",
        why="the formula of one block",
        invariant="point 3: the count",
    ),
    Mutant(
        name="the scale promotes to its own dtype",
        file=FILE,
        find="h * l.to(h.dtype)",
        replace="h * l",
        why="float32 l beside bfloat16 activations",
        invariant="the scale keeps the dtype of what it scales",
    ),
    Mutant(
        name="the count takes the other side",
        file=FILE,
        find="total += into if target in self.feedforward else out",
        replace="total += out if target in self.feedforward else into",
        why="in and out confused, which square projections hide",
        invariant="point 3: the count of up and down",
    ),
    Mutant(
        name="the scaling is detached",
        file=FILE,
        find="            return self.inner(rescale(x, self.l))",
        replace="            return self.inner(rescale(x, self.l.detach()))",
        why="a detach left over from debugging",
        invariant="(IA3 5): every vector has a gradient",
    ),
]
