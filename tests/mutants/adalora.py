"""What goes wrong in AdaLoRA."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/adalora.py"
BRANCH = "minipeft/low_rank/triplets.py"
TESTS = ["tests/test_adalora.py", "tests/parity/test_adalora_peft.py", "tests/contract -k AdaLoRA"]

MUTANTS = [
    Mutant(
        name="alpha not divided",
        file=FILE,
        find="return alpha / (init_rank + 1e-5)",
        replace="return alpha",
        why="alpha taken as the scale",
        invariant="(AdaLoRA 2)",
    ),
    Mutant(
        name="the values start at random",
        file=BRANCH,
        find=("nn.Parameter(torch.zeros(rank, **place)) if shared is None else shared.E"),
        replace=("nn.Parameter(torch.randn(rank, **place)) if shared is None else shared.E"),
        why="all three factors drawn alike",
        invariant="point 1: the start is the base",
    ),
    Mutant(
        name="penalty on the wrong side",
        file=FILE,
        find="return P.T @ P - eye, Q @ Q.T - eye",
        replace="return P.T @ P - eye, Q @ Q.T - P.T @ P",
        why="a slip while copying the line",
        invariant="(AdaLoRA 3) (AdaLoRA 4)",
    ),
    Mutant(
        name="norms squared in the mean",
        file=FILE,
        find="return sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)",
        replace="return sum(gap.square().sum() for gap in gaps) / len(gaps)",
        why="the paper squares them",
        invariant="(AdaLoRA 4) is peft's",
    ),
    Mutant(
        name="penalty summed, not averaged",
        file=FILE,
        find="return sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)",
        replace="return sum(torch.linalg.norm(gap) for gap in gaps)",
        why="the paper sums them",
        invariant="(AdaLoRA 4) is a mean",
    ),
    Mutant(
        name="never fixed",
        file=FILE,
        find="                switch_off(layers, kept[path], last)\n",
        replace="                switch_off(layers, kept[path], False)\n",
        why="the last phase looks like the others",
        invariant="the file holds the final ranks only",
    ),
    Mutant(
        name="momentum revives after the end",
        file=FILE,
        find=(
            "        if not all(layers[0].kept.all() for layers in groups.values()): "
            " # the choice stands\n"
            "            for layers in groups.values():\n"
            "                switch_off(layers, layers[0].kept, True)\n"
            "            return\n"
        ),
        replace=(
            "        if not all(layers[0].kept.all() for layers in groups.values()):\n"
            "            return\n"
        ),
        why="once masked, always masked",
        invariant="the ranks at the end are exactly the budget",
    ),
    Mutant(
        name="the trap never springs",
        file=FILE,
        find='        if trained and not attachment.state.get("allocator_steps"):',
        replace="        if False:",
        why="the check is in the way",
        invariant="training without the allocator is an error",
    ),
    Mutant(
        name="the trap is lost in a copy",
        file=BRANCH,
        find=(
            "    def __setstate__(self, state):  # a deep copy's tensors have no "
            "hooks\n"
            "        super().__setstate__(state)\n"
            "        self.watch()\n"
        ),
        replace="",
        why="hooks are thought to be copied",
        invariant="the trap holds in a copy trained later",
    ),
    Mutant(
        name="dropout in eval",
        file=BRANCH,
        find="self.inner(x), self.drop(x), self.right()",
        replace=("self.inner(x), torch.nn.functional.dropout(x, self.drop.p), self.right()"),
        why="the functional form drops always",
        invariant="dropout falls in training only",
    ),
]
