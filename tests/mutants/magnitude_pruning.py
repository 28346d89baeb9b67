"""What goes wrong in magnitude pruning."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/magnitude_pruning.py"
TESTS = ["tests/test_magnitude_pruning.py"]

MUTANTS = [
    Mutant(
        name="the largest pruned",
        file=FILE,
        find="flat.argsort(stable=True)[",
        replace="flat.argsort(descending=True, stable=True)[",
        why="sorted the wrong way round",
        invariant="(Magnitude 1): the smallest go",
    ),
    Mutant(
        name="size with its sign",
        file=FILE,
        find="scores = [w.detach().abs() for w in weights]",
        replace="scores = [w.detach() for w in weights]",
        why="the absolute value forgotten",
        invariant="(Magnitude 1): |w|",
    ),
    Mutant(
        name="per layer for global",
        file=FILE,
        find='    if scope == "global":\n        return keep_largest_of_all',
        replace='    if scope == "globally":\n        return keep_largest_of_all',
        why="one loop over matrices serves both",
        invariant="global compares over all matrices",
    ),
    Mutant(
        name="all of an equal size",
        file=FILE,
        find="    keep[flat.argsort(stable=True)[: count_of(sparsity, len(flat))]] = False",
        replace=(
            "    keep[flat <= flat.sort().values[max(0, count_of(sparsity, "
            "len(flat)) - 1)]] = False"
        ),
        why="a threshold instead of a number",
        invariant="exact sparsity at equal scores and at 0",
    ),
    Mutant(
        name="a floor without its margin",
        file=FILE,
        find="return math.floor(share * n * (1 + 1e-15))",
        replace="return int(share * n)",
        why="0.29 * 100 is 29, everybody knows",
        invariant="exactly floor(s n)",
    ),
    Mutant(
        name="the pattern along the outputs",
        file=FILE,
        find="groups = scores.unflatten(-1, (-1, group))  # (out, in / g, g)",
        replace="groups = scores.T.reshape(scores.shape[0], -1, group)  # (out, in / g, g)",
        why="Conv1D's orientation",
        invariant="(Magnitude 4): neighbours in a row",
    ),
    Mutant(
        name="the pattern keeps the smallest",
        file=FILE,
        find="lowest = groups.argsort(dim=-1, stable=True)[..., :zeros]",
        replace="lowest = groups.argsort(dim=-1, stable=True)[..., group - zeros :]",
        why="the wrong end",
        invariant="(Magnitude 4)",
    ),
    Mutant(
        name="a linear schedule",
        file=FILE,
        find="return final * (1 - (1 - u) ** 3)",
        replace="return final * u",
        why="linear for cubic",
        invariant="(Magnitude 3)",
    ),
    Mutant(
        name="the cube inside out",
        file=FILE,
        find="return final * (1 - (1 - u) ** 3)",
        replace="return final * u**3",
        why="1 - forgotten twice",
        invariant="(Magnitude 3): most goes early",
    ),
    Mutant(
        name="the schedule begins at 0",
        file=FILE,
        find="u = max(0, step - begin) / (end - begin)",
        replace="u = step / end",
        why="begin ignored",
        invariant="(Magnitude 3): s = 0 until t_0",
    ),
    Mutant(
        name="the mask is not put back",
        file=FILE,
        find=(
            "        for layer in masked(attachment):\n"
            "            layer.reapply()\n"
            "\n"
            "    def export"
        ),
        replace="        return\n\n    def export",
        why="masked once, masked for good",
        invariant="(Magnitude 2)",
    ),
    Mutant(
        name="pruned weights come back",
        file=FILE,
        find="layer.mask.logical_and_(mask)  # a pruned weight never comes back",
        replace="layer.mask.fill_(True)",
        why="the mask is made anew every time",
        invariant="masks are nested and exact",
    ),
    Mutant(
        name="the last mask is not made",
        file=FILE,
        find="return step == last or (step < last and step % self.every == 0)",
        replace="return step < last and step % self.every == 0",
        why="a schedule of every so many steps",
        invariant="the full sparsity is reached",
    ),
    Mutant(
        name="the schedule in whole steps of 1",
        file=FILE,
        find="begin, end = self.begin * total_steps, self.end * total_steps",
        replace="begin, end = self.begin, self.end * total_steps",
        why="shares and steps confused",
        invariant="(Magnitude 3): t_0 is a share of the steps",
    ),
    Mutant(
        name="gradual starts pruned",
        file=FILE,
        find="sparsity = 0.0 if self.gradual else self.sparsity",
        replace="sparsity = self.sparsity",
        why="one install for both",
        invariant="gradual begins as the base",
    ),
    Mutant(
        name="keeps what is zero",
        file=FILE,
        find="masks = [linear.weight.detach() != 0 for",
        replace="masks = [linear.weight.detach() == 0 for",
        why="mask of zeros or mask of what stays",
        invariant="KeepZeros holds the zeros",
    ),
    Mutant(
        name="an absolute margin for rounding",
        file=FILE,
        find="return math.floor(share * n * (1 + 1e-15))",
        replace="return math.floor(share * n + 1e-9)",
        why="small enough for every matrix one has in mind",
        invariant="exactly floor(s n), at any size",
    ),
    Mutant(
        name="a new mask before the zeros are back",
        file=FILE,
        find=(
            "        super().after_step(model, attachment, step, total_steps)"
            "  # first: zeros are the smallest\n        if self.gradual and self.due("
            "step, total_steps):\n"
        ),
        replace=(
            "        if not (self.gradual and self.due(step, total_steps)):\n"
            "            super().after_step(model, attachment, step, total_steps)\n"
            "        else:\n"
        ),
        why="the zeros are put back at the end anyway",
        invariant="(Magnitude 2) (Magnitude 3): exact however far the optimizer goes",
    ),
    Mutant(
        name="the pattern of the config's widths",
        file=FILE,
        find="check_pattern(self.pattern, math.prod(self.pattern))",
        replace="check_pattern(self.pattern, config.ff_width)",
        why="the config tells the widths",
        invariant="every module knows its own widths",
    ),
    Mutant(
        name="pruning what was packed",
        file=FILE,
        find="        if not isinstance(linear, nn.Linear):\n",
        replace="        if not hasattr(linear, 'weight'):\n",
        why="everything with a weight can be pruned",
        invariant="a weight that is made anew at each reading is refused",
    ),
]
