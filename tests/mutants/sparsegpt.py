"""What goes wrong in SparseGPT."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/sparsegpt.py"
TESTS = ["tests/test_sparsegpt.py"]

MUTANTS = [
    Mutant(
        name="the factor of H",
        file=FILE,
        find="inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))",
        replace="inverse = H",
        why="H for its inverse",
        invariant="(SparseGPT 2)",
    ),
    Mutant(
        name="the lower triangle",
        file=FILE,
        find="return torch.linalg.cholesky(inverse, upper=True)",
        replace="return torch.linalg.cholesky(inverse)",
        why="the default of the library",
        invariant="(SparseGPT 2): upper",
    ),
    Mutant(
        name="no damping",
        file=FILE,
        find="H.diagonal().add_(damping * H.diagonal().mean())",
        replace="H.diagonal().add_(1e-12)",
        why="a small constant will do",
        invariant="(SparseGPT 1)",
    ),
    Mutant(
        name="damping not relative",
        file=FILE,
        find="H.diagonal().add_(damping * H.diagonal().mean())",
        replace="H.diagonal().add_(damping)",
        why="0.01 whatever the scale",
        invariant="(SparseGPT 1): 0.01 of the mean",
    ),
    Mutant(
        name="scores by size alone",
        file=FILE,
        find="scores = (W[:, first:last] / U.diagonal()[first:last]).square()",
        replace="scores = W[:, first:last].square()",
        why="magnitude under another name",
        invariant="(SparseGPT 3)",
    ),
    Mutant(
        name="scores by the diagonal times",
        file=FILE,
        find="scores = (W[:, first:last] / U.diagonal()[first:last]).square()",
        replace="scores = (W[:, first:last] * U.diagonal()[first:last]).square()",
        why="multiply for divide",
        invariant="(SparseGPT 3)",
    ),
    Mutant(
        name="nothing moves",
        file=FILE,
        find="            W[:, j:] -= error[:, None] * U[j, j:]",
        replace="            error[:, None] * U[j, j:]",
        why="the mask is what counts",
        invariant="(SparseGPT 5)",
    ),
    Mutant(
        name="the error added",
        file=FILE,
        find="            W[:, j:] -= error[:, None] * U[j, j:]",
        replace="            W[:, j:] += error[:, None] * U[j, j:]",
        why="a sign",
        invariant="(SparseGPT 5)",
    ),
    Mutant(
        name="the error of all weights",
        file=FILE,
        find="error = torch.where(keep[:, j], 0, W[:, j] / U[j, j])",
        replace="error = W[:, j] / U[j, j]",
        why="as in GPTQ, where every weight errs",
        invariant="(SparseGPT 5): where cut",
    ),
    Mutant(
        name="the error not divided",
        file=FILE,
        find="error = torch.where(keep[:, j], 0, W[:, j] / U[j, j])",
        replace="error = torch.where(keep[:, j], 0, W[:, j])",
        why="U's diagonal is not 1",
        invariant="(SparseGPT 5)",
    ),
    Mutant(
        name="columns to the left move",
        file=FILE,
        find="            W[:, j:] -= error[:, None] * U[j, j:]",
        replace="            W -= error[:, None] * U[:, j]",
        why="the column for the row of U",
        invariant="(SparseGPT 5)",
    ),
    Mutant(
        name="a share of each block rounded",
        file=FILE,
        find=(
            "    due = count_of(sparsity, rows * (first + width)) - "
            "count_of(sparsity, rows * first)"
        ),
        replace="    due = count_of(sparsity, rows * width)",
        why="every block for itself",
        invariant="so many that s is met so far",
    ),
    Mutant(
        name="masks of the whole matrix first",
        file=FILE,
        find="        block = pattern[1]  # its masks are chosen a group at a time",
        replace="        block = W.shape[1]  # one pattern for all",
        why="one call is simpler",
        invariant="(SparseGPT 4): chosen on moved weights",
    ),
    Mutant(
        name="dead inputs forgotten",
        file=FILE,
        find="    W[:, G.diagonal() == 0] = 0\n",
        replace="",
        why="no input is always 0",
        invariant="an input that is always zero is pruned first",
    ),
    Mutant(
        name="a share of nothing",
        file=FILE,
        find="due / max(1, scores.numel())",
        replace="due / scores.numel()",
        why="a matrix has weights",
        invariant="layers without heads are pruned as what they are",
    ),
]
