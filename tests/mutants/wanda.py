"""What goes wrong in Wanda."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/wanda.py"
TESTS = ["tests/test_wanda.py"]

MUTANTS = [
    Mutant(
        name="no activations",
        file=FILE,
        find="return weight.abs() * norms",
        replace="return weight.abs()",
        why="magnitude under another name",
        invariant="(Wanda 1)",
    ),
    Mutant(
        name="signed weights",
        file=FILE,
        find="return weight.abs() * norms",
        replace="return weight * norms",
        why="the absolute value forgotten",
        invariant="(Wanda 1)",
    ),
    Mutant(
        name="norms not rooted",
        file=FILE,
        find="G.diagonal().sqrt())",
        replace="G.diagonal())",
        why="the sum of squares is a norm, nearly",
        invariant="(Wanda 1): ||X_j||",
    ),
    Mutant(
        name="G's row sums for its diagonal",
        file=FILE,
        find="G.diagonal().sqrt())",
        replace="G.abs().sum(1).sqrt())",
        why="which part of G is the norm",
        invariant="(Wanda 1)",
    ),
    Mutant(
        name="norms along the outputs",
        file=FILE,
        find="return weight.abs() * norms",
        replace="return (weight.abs() * norms.mean()) if True else norms",
        why="one norm for the layer",
        invariant="(Wanda 1): an input's own norm",
    ),
    Mutant(
        name="the largest of a row",
        file=FILE,
        find="scores.argsort(dim=1, stable=True)[:,",
        replace="scores.argsort(dim=1, stable=True, descending=True)[:,",
        why="sorted the wrong way round",
        invariant="(Wanda 2)",
    ),
    Mutant(
        name="over the whole matrix",
        file=FILE,
        find=(
            "    lowest = scores.argsort(dim=1, stable=True)[:, : "
            "count_of(sparsity, scores.shape[1])]\n"
            "    return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)"
        ),
        replace=(
            "    keep = torch.ones(scores.numel(), dtype=torch.bool)\n"
            "    keep[scores.flatten().argsort()[: count_of(sparsity, "
            "scores.numel())]] = False\n"
            "    return keep.view_as(scores)"
        ),
        why="as in magnitude pruning",
        invariant="(Wanda 2): in every row",
    ),
    Mutant(
        name="the pattern forgotten",
        file=FILE,
        find="    if pattern is not None:\n        return keep_pattern(scores, *pattern)\n",
        replace="",
        why="half is half",
        invariant="2:4 has two in every four",
    ),
    Mutant(
        name="what stays is zeroed",
        file=FILE,
        find="masked_fill_(~wanda_mask(",
        replace="masked_fill_(wanda_mask(",
        why="mask of zeros or mask of what stays",
        invariant="survivors are untouched and right",
    ),
    Mutant(
        name="the pattern by size alone",
        file=FILE,
        find="linear.weight.masked_fill_(~wanda_mask(scores,",
        replace=(
            "linear.weight.masked_fill_(~wanda_mask(scores if pattern is None else "
            "linear.weight.abs(),"
        ),
        why="patterns are magnitude's",
        invariant="2:4 on scores",
    ),
    Mutant(
        name="nothing checked first",
        file=FILE,
        find="    check_sparsity(sparsity)\n",
        replace="",
        why="the mask fails by itself",
        invariant="bad requests are named",
    ),
]
