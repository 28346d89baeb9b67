"""What goes wrong when distillation is cut in chunks."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/linear_distillation.py"
TESTS = ["tests/test_linear_distillation.py"]

MUTANTS = [
    Mutant(
        name="the mean over all rows",
        file=FILE,
        find="        n = max(1, x.shape[0])",
        replace="        n = max(1, x.shape[0] + 2)",
        why="rows that do not count are counted",
        invariant="n labels that count",
    ),
    Mutant(
        name="each chunk's own mean",
        file=FILE,
        find="            g = s.div_(n)\n",
        replace="            g = s.div_(s.shape[0])\n",
        why="what calling the loss on each chunk does",
        invariant="(LinearDistill 3): n over all chunks",
    ),
    Mutant(
        name="padding distilled",
        file=FILE,
        find="    counts = labels != IGNORE\n",
        replace="    counts, labels = labels >= IGNORE, labels.clamp(min=0)\n",
        why="the teacher says something there as well",
        invariant="rows whose label is -100 do not count",
    ),
    Mutant(
        name="the soft gradient without T",
        file=FILE,
        find=".sub_(t).mul_(alpha * temperature)",
        replace=".sub_(t).mul_(alpha)",
        why="T^2 / T forgotten in the hand-written gradient",
        invariant="(LinearDistill 3): T (q - p)",
    ),
    Mutant(
        name="the soft loss without T squared",
        file=FILE,
        find="    soft_loss = temperature**2 * kl.sum()",
        replace="    soft_loss = temperature * kl.sum()",
        why="one of the two is taken for the gradient's",
        invariant="(LinearDistill 2) with (Distill 2)",
    ),
    Mutant(
        name="p and q exchanged",
        file=FILE,
        find="    s.exp_().sub_(t)",
        replace="    s.exp_().sub_(t).neg_()",
        why="the sign of a difference",
        invariant="(LinearDistill 3): q - p",
    ),
    Mutant(
        name="the divergence's sign",
        file=FILE,
        find="    difference = t - s\n",
        replace="    difference = s - t\n",
        why="student first, teacher second, as in every call",
        invariant="(LinearDistill 2)",
    ),
    Mutant(
        name="the hard gradient unweighted",
        file=FILE,
        find="        s.add_(hard, alpha=1 - alpha)",
        replace="        s.add_(hard)",
        why="the loss is weighted, and that seems enough",
        invariant="(LinearDistill 3): (1 - alpha)",
    ),
    Mutant(
        name="the hard part at temperature T",
        file=FILE,
        find="        hard = s.clone()\n",
        replace="        hard = s / temperature\n",
        why="the division is moved to the top",
        invariant="(Distill 3): at temperature 1",
    ),
    Mutant(
        name="dW of the last chunk only",
        file=FILE,
        find="                dweight.addmm_(g.T, x[rows])",
        replace="                dweight = g.T @ x[rows]",
        why="the sum over chunks forgotten",
        invariant="(LinearDistill 4)",
    ),
    Mutant(
        name="the incoming gradient ignored",
        file=FILE,
        find="t * grad.to(t.dtype)",
        replace="t",
        why="backward is called on the loss itself, mostly",
        invariant="the gradient of a multiple is the multiple of the gradient",
    ),
    Mutant(
        name="the chunk before last kept alive",
        file=FILE,
        find="            del s, t, g  # before the next chunk is made\n",
        replace="            ctx.chunks = [*getattr(ctx, 'chunks', ()), s]\n",
        why="kept for the backward pass, as autograd would",
        invariant="memory of a few chunks",
    ),
    Mutant(
        name="a frozen head's gradient in the place of the input's",
        file=FILE,
        find="        ctx.has = (need_x, need_weight)",
        replace="        ctx.has = (need_weight, need_x)",
        why="two flags of one type",
        invariant="gradients only where they are wanted",
    ),
]
