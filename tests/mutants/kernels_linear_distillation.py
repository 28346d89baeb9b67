"""What goes wrong in a kernel of two rows: masks, offsets, sums that are not scaled."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/linear_distillation.py"
TESTS = [
    "tests/kernels/test_linear_distillation.py",
    "tests/kernels/test_twins.py -k linear_distillation-rows_loss",
]
LOADS = """\
        b_s = tl.load(p_s + v * s_column, mask=v < V, other=-float("inf")).to(tl.float32)
        b_t = tl.load(p_t + v * t_column, mask=v < V, other=-float("inf")).to(tl.float32)
"""

MUTANTS = [
    Mutant(
        name="no mask when the gradient is stored",
        file=FILE,
        find="b_g.to(p_s.dtype.element_ty), mask=v < V)",
        replace="b_g.to(p_s.dtype.element_ty))",
        why="V was a multiple of the block when it was tested",
        invariant="no lane outside the row",
    ),
    Mutant(
        name="offsets of 32 bits",
        file=FILE,
        find="row = tl.program_id(0).to(tl.int64)",
        replace="row = tl.program_id(0)",
        why="70,000 rows of 50,257 words are rare in tests",
        invariant="rows beyond 2^31 entries",
    ),
    Mutant(
        name="the weighted sum is not scaled",
        file=FILE,
        find="weighted = weighted * shrink + tl.sum",
        replace="weighted = weighted + tl.sum",
        why="the normaliser is, and that looks like all",
        invariant="(KLRows 2)",
    ),
    Mutant(
        name="the student's largest entry scales the teacher's sums",
        file=FILE,
        find="shrink = tl.exp((largest_t - new_t) * rate)",
        replace="shrink = tl.exp((largest_s - new_s) * rate)",
        why="one letter",
        invariant="(KLRows 1)",
    ),
    Mutant(
        name="the hard part at temperature T",
        file=FILE,
        find="            total_hard += tl.sum(tl.exp(b_s - new_s), 0)",
        replace="            total_hard += tl.sum(tl.exp((b_s - new_s) * rate), 0)",
        why="the line above is copied",
        invariant="(KLRows 4): H is at temperature 1",
    ),
    Mutant(
        name="masked entries are differences of infinities",
        file=FILE,
        find="b_difference = tl.where(v < V, (b_t - b_s) * rate, 0.0)",
        replace="b_difference = (b_t - b_s) * rate",
        why="their probability is 0, and 0 times anything is 0",
        invariant="(KLRows 2): V that is no multiple of the block",
    ),
    Mutant(
        name="masked entries are zeros",
        file=FILE,
        find=LOADS + "        new_s",
        replace=LOADS.replace('-float("inf")', "0.0") + "        new_s",
        why="0 is the usual filler, and exp(0) is 1",
        invariant="(KLRows 1): V that is no multiple of the block",
    ),
    Mutant(
        name="the largest entries left out of the divergence",
        file=FILE,
        find="    kl += (largest_s - largest_t) * rate  # (KLRows 3)\n",
        replace="",
        why="the logarithms of the sums look complete",
        invariant="(KLRows 3)",
    ),
    Mutant(
        name="T squared in the gradient",
        file=FILE,
        find="b_g = alpha * temperature * (b_q - b_p)",
        replace="b_g = alpha * temperature * temperature * (b_q - b_p)",
        why="the loss has it",
        invariant="(KLRows 4)",
    ),
    Mutant(
        name="the teacher's row at the student's stride",
        file=FILE,
        find="p_s, p_t = t_s + row * s_row, t_t + row * t_row",
        replace="p_s, p_t = t_s + row * s_row, t_t + row * s_row",
        why="both are (m, V)",
        invariant="a teacher that lies otherwise in memory",
    ),
]
