"""What goes wrong in mode approximation and in the factorisations."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/mode_approximation.py"
TESTS = ["tests/test_mode_approximation.py", "tests/contract -k ModeApproximation"]

MUTANTS = [
    Mutant(
        name="both factors at zero",
        file=FILE,
        find="nn.init.uniform_(self.U, -(into**-0.5), into**-0.5)",
        replace="nn.init.zeros_(self.U)",
        why="zeros look safe",
        invariant="every tensor learns within two steps",
    ),
    Mutant(
        name="V at random",
        file=FILE,
        find="self.V = nn.Parameter(torch.zeros(out, rank, **place))",
        replace="self.V = nn.Parameter(torch.randn(out, rank, **place))",
        why="all factors drawn alike",
        invariant="point 1: the start is the base",
    ),
    Mutant(
        name="the mixture is left out",
        file=FILE,
        find="return (factors.scale * self.p)[:, None] * factors.U.T, factors.V",
        replace=("return (factors.scale + 0 * self.p)[:, None] * factors.U.T, factors.V"),
        why="lambda alone looks like the weights",
        invariant="(Mode 1)",
    ),
    Mutant(
        name="lambda is left out",
        file=FILE,
        find="return (factors.scale * self.p)[:, None] * factors.U.T, factors.V",
        replace=("return (self.p + 0 * factors.scale)[:, None] * factors.U.T, factors.V"),
        why="p alone looks like the weights",
        invariant="(Mode 1)",
    ),
    Mutant(
        name="every matrix its own factors",
        file=FILE,
        find="        if factors is None:\n",
        replace="        if True:\n",
        why="one adapter a layer is the habit",
        invariant="the factors are registered once and shared by all",
    ),
    Mutant(
        name="factors of each block",
        file=FILE,
        find="                first = first or layer\n",
        replace=(
            "                first = (first or layer) if target != self.targets[-1] else None\n"
        ),
        why="sharing within the block only",
        invariant="(Mode 3): one tensor for all layers",
    ),
    Mutant(
        name="count without the mixtures",
        file=FILE,
        find=("return self.rank * (into + out + 1 + config.n_layer * len(self.targets))"),
        replace="return self.rank * (into + out + 1)",
        why="the paper counts U and V alone",
        invariant="point 3: the count",
    ),
    Mutant(
        name="the mixtures start wide",
        file=FILE,
        find="(2 / (rank + matrices)) ** 0.5",
        replace="2 / (rank + matrices)",
        why="variance for deviation",
        invariant="the initial values",
    ),
    Mutant(
        name="unfolded in the wrong order",
        file=FILE,
        find="return T.movedim(mode, 0).flatten(1)",
        replace="return T.transpose(mode, 0).flatten(1)",
        why="transpose for movedim, the same for mode 0 and 1",
        invariant="(Mode 5): unfold(T, 2) pairs with khatri_rao(A, B)",
    ),
    Mutant(
        name="Kronecker product the other way round",
        file=FILE,
        find="return (B[:, None] * C).flatten(0, 1)",
        replace="return (C[:, None] * B).flatten(0, 1)",
        why="the order of the other two modes",
        invariant="(Mode 5)",
    ),
    Mutant(
        name="Gram matrices added",
        file=FILE,
        find="gram = (B.T @ B) * (C.T @ C)",
        replace="gram = (B.T @ B) + (C.T @ C)",
        why="a sum for an elementwise product",
        invariant="(Mode 5): every step is a least-squares solution",
    ),
    Mutant(
        name="smallest singular vectors",
        file=FILE,
        find="return torch.linalg.svd(M, full_matrices=False)[0][:, :rank]",
        replace="return torch.linalg.svd(M, full_matrices=False)[0][:, -rank:]",
        why="ascending order expected, as eigh has it",
        invariant="(Mode 6)",
    ),
    Mutant(
        name="Tucker without its iteration",
        file=FILE,
        find="factors[mode] = leading(unfold(others, mode), rank)",
        replace="factors[mode] = leading(unfold(T, mode), rank)",
        why="the higher-order SVD is thought to be the best",
        invariant="(Mode 6): the iteration ends above where it began",
    ),
    Mutant(
        name="SVD cut on the wrong side",
        file=FILE,
        find="return U[:, :rank], s[:rank], Vt[:rank].T",
        replace="return U[:, :rank], s[:rank], Vt.T[:, -rank:]",
        why="V and its transpose",
        invariant="(Mode 4)",
    ),
    Mutant(
        name="whatever width a layer has",
        file=FILE,
        find="        if shape != pile:\n",
        replace="        if len(shape) != len(pile):\n",
        why="a pile is made of matrices, and that is checked",
        invariant="matrices on one pile have one shape",
    ),
]
