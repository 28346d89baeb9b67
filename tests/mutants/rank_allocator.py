"""What goes wrong in AdaLoRA's allocator."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/rank_allocator.py"
TESTS = [
    "tests/test_rank_allocator.py",
    "tests/test_adalora.py",
    "tests/parity/test_adalora_peft.py",
    "tests/contract -k AdaLoRA",
]

MUTANTS = [
    Mutant(
        name="sensitivity without the size",
        file=FILE,
        find="return (weight * gradient).abs()",
        replace="return weight * gradient",
        why="the bars around w dL/dw overlooked",
        invariant="(Allocator 1)",
    ),
    Mutant(
        name="no moving average",
        file=FILE,
        find="    M = beta1 * M + (1 - beta1) * I\n",
        replace="    M = I\n",
        why="the sensitivity of this step is at hand",
        invariant="(Allocator 2)",
    ),
    Mutant(
        name="uncertainty from the old average",
        file=FILE,
        find="return M, beta2 * U + (1 - beta2) * (I - M).abs()",
        replace=("return M, beta2 * U + (1 - beta2) * (I - (M - (1 - beta1) * I) / beta1).abs()"),
        why="both averages computed side by side",
        invariant="(Allocator 3): with the new M",
    ),
    Mutant(
        name="score without the vectors",
        file=FILE,
        find="return E + P.mean(0) + Q.mean(1)",
        replace="return E",
        why="the singular value alone decides in an SVD",
        invariant="(Allocator 4)",
    ),
    Mutant(
        name="sums for means",
        file=FILE,
        find="return E + P.mean(0) + Q.mean(1)",
        replace="return E + P.sum(0) + Q.sum(1)",
        why="a mean forgotten",
        invariant="(Allocator 4)",
    ),
    Mutant(
        name="linear schedule",
        file=FILE,
        find="(first - last) * left**3",
        replace="(first - last) * left",
        why="linear for cubic",
        invariant="(Allocator 5)",
    ),
    Mutant(
        name="the budget starts to fall at once",
        file=FILE,
        find="    if step <= warm:\n        return first\n",
        replace="",
        why="the warm-up forgotten",
        invariant="(Allocator 5)",
    ),
    Mutant(
        name="the least important stay",
        file=FILE,
        find="key=lambda triplet: -triplet[2]",
        replace="key=lambda triplet: triplet[2]",
        why="sorted the wrong way round",
        invariant="(Allocator 6)",
    ),
    Mutant(
        name="a budget for each matrix",
        file=FILE,
        find="    for path, i, _ in order[:keep]:\n        kept[path][i] = True\n",
        replace=(
            "    for path, row in scores.items():\n"
            "        kept[path][row.argsort(descending=True)[: keep // len(scores)]] "
            "= True\n"
        ),
        why="per matrix for global",
        invariant="(Allocator 6): the best of all matrices stay",
    ),
    Mutant(
        name="P and Q masked from the start",
        file=FILE,
        find="    if for_good:\n",
        replace="    if True:\n",
        why="a triplet that is off is off",
        invariant="a switched-off triplet can come back",
    ),
    Mutant(
        name="shared triplets scored without k and v",
        file=FILE,
        find="triplet_scores(torch.cat(parts[:-2]), *parts[-2:])",
        replace="triplet_scores(parts[0], *parts[-2:])",
        why="only the first wrapper of the group looked at",
        invariant="(Allocator 4) with P the three blocks",
    ),
    Mutant(
        name="averages in halves",
        file=FILE,
        find="return tensor.to(torch.promote_types(tensor.dtype, torch.float32))",
        replace="return tensor",
        why="they are the weights' own averages",
        invariant="halves are scored in float32",
    ),
]
