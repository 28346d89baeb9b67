"""What goes wrong in LoRA."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/lora.py"
TESTS = ["tests/test_lora.py", "tests/contract -k LoRA"]

FORWARD = """\
        if plain and not (self.training and self.drop.p):
            return lora_linear(x, inner.weight, inner.bias, self.A, self.B, self.scale)
        return lora_forward(inner(x), self.drop(x), self.A, self.B, self.scale)
"""

MUTANTS = [
    Mutant(
        name="alpha, not alpha over rank",
        file=FILE,
        find="if rank_stabilized else alpha / rank",
        replace="if rank_stabilized else alpha",
        why="the scale looks like a plain hyperparameter",
        invariant="(LoRA 2): doubling the rank at fixed alpha halves the scale",
    ),
    Mutant(
        name="square root of the rank for everybody",
        file=FILE,
        find="if rank_stabilized else alpha / rank",
        replace="if rank_stabilized else alpha / math.sqrt(rank)",
        why="rsLoRA's scale copied without its condition",
        invariant="(LoRA 2)",
    ),
    Mutant(
        name="rank-stabilized does nothing",
        file=FILE,
        find="alpha / math.sqrt(rank) if rank_stabilized else",
        replace="alpha / rank if rank_stabilized else",
        why="the option is read and then forgotten",
        invariant="(LoRA 2), second form",
    ),
    Mutant(
        name="B random",
        file=FILE,
        find="self.B = nn.Parameter(torch.zeros(base.out_features, rank, **place))",
        replace="self.B = nn.Parameter(torch.randn(base.out_features, rank, **place))",
        why="every other weight starts random",
        invariant="at the start the model is the base",
    ),
    Mutant(
        name="A and B both zero",
        file=FILE,
        find="nn.init.uniform_(self.A, -(base.in_features**-0.5), base.in_features**-0.5)",
        replace="nn.init.zeros_(self.A)",
        why="zero times zero is zero, too",
        invariant="every tensor gets a gradient within two steps",
    ),
    Mutant(
        name="A's range from the output's width",
        file=FILE,
        find="nn.init.uniform_(self.A, -(base.in_features**-0.5), base.in_features**-0.5)",
        replace="nn.init.uniform_(self.A, -(base.out_features**-0.5), base.out_features**-0.5)",
        why="fan-in and fan-out confused",
        invariant="the initialisation table",
    ),
    Mutant(
        name="merge without the scale",
        file=FILE,
        find="return scale * (B @ A)",
        replace="return B @ A",
        why="the scale lives in forward, and merging was written later",
        invariant="(LoRA 3): merged and unmerged agree",
    ),
    Mutant(
        name="forward without the scale",
        file=FILE,
        find="alpha=scale).view_as(h)",
        replace="alpha=1.0).view_as(h)",
        why="addmm's alpha mistaken for LoRA's",
        invariant="(LoRA 1)",
    ),
    Mutant(
        name="the scale falls on the base as well",
        file=FILE,
        find="return torch.addmm(h2, u2, B.T.to(h2.dtype), alpha=scale).view_as(h)",
        replace="return torch.addmm(h2, u2, B.T.to(h2.dtype), beta=scale, alpha=scale).view_as(h)",
        why="s (W x + b + B A x): the bracket closed in the wrong place",
        invariant="(LoRA 1); the base at B = 0",
    ),
    Mutant(
        name="A and B swapped in the merged weight",
        file=FILE,
        find="return scale * (B @ A)",
        replace="return scale * (B @ A).T if B.shape[0] == A.shape[1] else scale * (B @ A)",
        why="in a square layer the transposed delta has the right shape",
        invariant="(LoRA 3)",
    ),
    Mutant(
        name="merging changes the wrapped layer",
        file=FILE,
        find="return linear_with(inner, inner.weight + self.delta(), inner.bias)",
        replace="return linear_with(inner, inner.weight.data.add_(self.delta()), inner.bias)",
        why="in place saves memory",
        invariant="merging twice gives the same; leaving `merged` restores every bit",
    ),
    Mutant(
        name="the merged layer has no bias",
        file=FILE,
        find="inner.weight + self.delta(), inner.bias)",
        replace="inner.weight + self.delta(), None)",
        why="LoRA has no bias of its own",
        invariant="(LoRA 3): merged and unmerged agree",
    ),
    Mutant(
        name="dropout in evaluation",
        file=FILE,
        find=FORWARD,
        replace=(
            "        dropped = F.dropout(x, self.drop.p)\n"
            "        return lora_forward(inner(x), dropped, self.A, self.B, self.scale)\n"
        ),
        why="the function drops unless it is told that training is over",
        invariant="the same outputs on every evaluation",
    ),
    Mutant(
        name="dropout on the output of A",
        file=FILE,
        find="    u = F.linear(x, A)",
        replace="    u = F.dropout(F.linear(x, A), 0.1)",
        why="dropout is usually put after a layer",
        invariant="(LoRA 1), deterministic",
    ),
    Mutant(
        name="dropout on what the base reads",
        file=FILE,
        find="inner(x), self.drop(x), self.A",
        replace="inner(self.drop(x)), self.drop(x), self.A",
        why="one dropped x for both branches",
        invariant="dropout falls on what A reads alone",
    ),
    Mutant(
        name="the shared A is shared over blocks",
        file=FILE,
        find='block = path.split(".")[1] if',
        replace="block = 0 if",
        why="one A for the model sounds like share_qkv",
        invariant="each block has an A; the count",
    ),
    Mutant(
        name="the shared A counted three times",
        file=FILE,
        find='again = self.share_qkv and target in "kv"',
        replace="again = False",
        why="the formula was written before sharing",
        invariant="the count equals the tensors'",
    ),
    Mutant(
        name="up and down exchanged in the count",
        file=FILE,
        find='return {"up": (W, D), "down": (D, W)}.get(target, (D, D))',
        replace='return {"up": (D, W), "down": (W, D)}.get(target, (D, D))',
        why="(in, out) and (out, in)",
        invariant="(out, in) of a projection is its weight's shape",
    ),
    Mutant(
        name="the target's pattern beats the path's",
        file=FILE,
        find="return values.get(path, values.get(target, default))",
        replace="return values.get(target, values.get(path, default))",
        why="the general entry is looked up first",
        invariant="a path counts before its target",
    ),
    Mutant(
        name="a branch beside nothing",
        file=FILE,
        find="if wrap.is_empty(inner):",
        replace="if not wrap.base_module(inner).in_features:",
        why="only the start divides by the width that is read",
        invariant="layers without heads or neurons get no branch",
    ),
    Mutant(
        name="hooks of the backward pass are passed by",
        file=FILE,
        find="plain = gpt.plain(inner, nn.Linear)",
        replace="plain = type(inner) is nn.Linear and not (\n"
        "            inner._forward_hooks or inner._forward_pre_hooks\n        )",
        why="hooks are what a forward pass calls",
        invariant="hooks on what is inside are called",
    ),
]
