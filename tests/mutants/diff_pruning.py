"""What goes wrong in diff pruning."""

from tests.mutants import Mutant

FILE = "minipeft/selective/diff_pruning.py"
MODULE = "minipeft/selective/diff_module.py"
TESTS = ["tests/test_diff_pruning.py", "tests/contract -k DiffPruning"]

MUTANTS = [
    Mutant(
        name="coins in eval",
        file=FILE,
        find="        return self.gates(self.training) * self.w",
        replace="        return self.gates(True) * self.w",
        why="the gates are random variables",
        invariant="coins fall in training only",
    ),
    Mutant(
        name="no coins in training",
        file=FILE,
        find="        return self.gates(self.training) * self.w",
        replace="        return self.gates(False) * self.w",
        why="the expected gate is smoother",
        invariant="(Diff 2): coins fall in training",
    ),
    Mutant(
        name="gates not stretched",
        file=FILE,
        find="return ((R - L) * s + L).clamp(0, 1)",
        replace="return s",
        why="the sigmoid is between 0 and 1 already",
        invariant="(Diff 3)",
    ),
    Mutant(
        name="gates not clamped",
        file=FILE,
        find="return ((R - L) * s + L).clamp(0, 1)",
        replace="return (R - L) * s + L",
        why="the clamp has no gradient outside",
        invariant="(Diff 3)",
    ),
    Mutant(
        name="the coin subtracted",
        file=FILE,
        find="return stretch(torch.sigmoid(u.log() - (1 - u).log() + alpha))",
        replace="return stretch(torch.sigmoid(u.log() - (1 - u).log() - alpha))",
        why="a sign",
        invariant="(Diff 2)",
    ),
    Mutant(
        name="probability of the wrong side",
        file=FILE,
        find="return torch.sigmoid(alpha - math.log(-L / R))",
        replace="return torch.sigmoid(-alpha - math.log(-L / R))",
        why="P(z = 0) for P(z > 0)",
        invariant="(Diff 5)",
    ),
    Mutant(
        name="starts shut",
        file=FILE,
        find="START = 5.0",
        replace="START = -5.0",
        why="a sparse change starts with nothing",
        invariant="every tensor has a gradient; the penalty starts near lambda",
    ),
    Mutant(
        name="the smallest changes stay",
        file=FILE,
        find="flat.argsort(descending=True, stable=True)",
        replace="flat.argsort(stable=True)",
        why="sorted the wrong way round",
        invariant="(Diff 8)",
    ),
    Mutant(
        name="largest with their sign",
        file=FILE,
        find="flat = torch.cat([change.abs().flatten() for change in changes])",
        replace="flat = torch.cat([change.flatten() for change in changes])",
        why="size without the sign forgotten",
        invariant="(Diff 8)",
    ),
    Mutant(
        name="a share of each tensor",
        file=FILE,
        find=(
            "    parts = mask.split([change.numel() for change in changes])\n"
            "    return [part.view_as(change) for part, change in zip(parts, "
            "changes)]"
        ),
        replace=(
            "    parts = [c.abs() >= c.abs().flatten().quantile(1 - share) for c in "
            "changes]\n"
            "    return parts"
        ),
        why="per tensor for global",
        invariant="(Diff 8): over all tensors",
    ),
    Mutant(
        name="the mask from w alone",
        file=FILE,
        find="            settled = [change.settled() for change in changes]",
        replace="            settled = [change.w.clone() for change in changes]",
        why="the gates are forgotten when pruning",
        invariant="(Diff 8): |z * w|",
    ),
    Mutant(
        name="the mask is not put back",
        file=FILE,
        find="            masks = [change.gate > 0 for change in changes]\n",
        replace="            return\n",
        why="masked once, masked for good",
        invariant="after the mask is fixed exactly the share moves",
    ),
    Mutant(
        name="the group gate left out",
        file=FILE,
        find=("return [self.speed * a for a in (self.gate, self.group) if a is not None]"),
        replace="return [self.speed * self.gate]",
        why="unstructured for structured",
        invariant="(Diff 7)",
    ),
    Mutant(
        name="merged with coins",
        file=MODULE,
        find=("moved = nn.Parameter(base.detach() + change.settled(), base.requires_grad)"),
        replace="moved = nn.Parameter(base.detach() + change(), base.requires_grad)",
        why="the forward is called while training",
        invariant="merged and unmerged agree in any mode",
    ),
    Mutant(
        name="the head is untied by merging",
        file=MODULE,
        find="                moved = embedding.token.weight",
        replace=(
            "                moved = nn.Parameter(base.detach() + change.settled(), "
            "base.requires_grad)"
        ),
        why="each module merges for itself",
        invariant="the head stays tied",
    ),
    Mutant(
        name="the penalty goes on",
        file=FILE,
        find='if self.l0_weight == 0 or attachment.state.get("fixed"):',
        replace="if self.l0_weight == 0:",
        why="one loss for both phases",
        invariant="the penalty ends when the mask is fixed",
    ),
    Mutant(
        name="the penalty is not divided",
        file=FILE,
        find="return self.l0_weight / size * sum(",
        replace="return self.l0_weight * sum(",
        why="the sum of the paper with our weight",
        invariant="(Diff 6): the share of open gates",
    ),
    Mutant(
        name="gate speed squared away",
        file=FILE,
        find="z * (drawn_gates(alpha, torch.rand_like(alpha)) if drawn",
        replace=("z * (drawn_gates(alpha / self.speed, torch.rand_like(alpha)) if drawn"),
        why="units of alpha and a confused",
        invariant="(Diff 2): alpha = gate_speed a",
    ),
    Mutant(
        name="what moves the base is merged above the wrappers it is below",
        file="minipeft/technique.py",
        find="return 2 - swap.replacement.moves_base if wrapper else 0",
        replace="return 2 if wrapper else 0",
        why="it is a wrapper as well",
        invariant="IA3 rescales the moved weight",
    ),
]
