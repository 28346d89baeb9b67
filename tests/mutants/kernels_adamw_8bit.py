"""What goes wrong in a kernel of blocks: the tail, the tables, the order of things."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/adamw_8bit.py"
TESTS = [
    "tests/kernels/test_adamw_8bit.py",
    "tests/kernels/test_twins.py -k adamw_8bit_step",
]

MUTANTS = [
    Mutant(
        name="the tail of a block is the map's lowest value",
        file=FILE,
        find="b_m = tl.where(inside, b_m + m_rate * (b_g - b_m), 0.0)  # (Adam8Rows 2)",
        replace="b_m = b_m + m_rate * (b_g - b_m)",
        why="a masked load gives code 0, and code 0 sounds like zero",
        invariant="missing elements of the last block are zeros",
    ),
    Mutant(
        name="no mask when weights are stored",
        file=FILE,
        find="tl.store(p_w, b_w.to(t_w.dtype.element_ty), mask=inside)",
        replace="tl.store(p_w, b_w.to(t_w.dtype.element_ty))",
        why="tensors were multiples of a block when it was tested",
        invariant="no lane outside the tensor",
    ),
    Mutant(
        name="maxima stored for blocks that do not exist",
        file=FILE,
        find="tl.store(p_v_absmax, b_v_absmax, mask=begun)",
        replace="tl.store(p_v_absmax, b_v_absmax)",
        why="a program has four blocks, the tensor may have three",
        invariant="no lane outside the tensor",
    ),
    Mutant(
        name="one maximum for the program's blocks",
        file=FILE,
        find="tl.max(tl.abs(b_m), 1), tl.max(b_v, 1)",
        replace="tl.max(tl.abs(b_m)) + 0 * tl.max(b_v, 1), tl.max(b_v, 1)",
        why="a reduction without its axis",
        invariant="(Adam8Rows 4): blocks are independent",
    ),
    Mutant(
        name="the maximum without its sign",
        file=FILE,
        find="tl.max(tl.abs(b_m), 1), tl.max(b_v, 1)",
        replace="tl.max(b_m, 1), tl.max(b_v, 1)",
        why="v needs no absolute value",
        invariant="(Adam8Rows 4)",
    ),
    Mutant(
        name="the second moment by the signed map",
        file=FILE,
        find="t_tables, t_tables + 256, t_tables + 512, t_tables + 768",
        replace="t_tables, t_tables + 256, t_tables, t_tables + 256",
        why="one map would do",
        invariant="(Adam8Rows 1)",
    ),
    Mutant(
        name="thresholds shifted by one",
        file=FILE,
        find="tl.load(p_thresholds + b_count + (half - 1))",
        replace="tl.load(p_thresholds + b_count + half)",
        why="the halving that is off by one",
        invariant="(Adam8Rows 4): the number of thresholds below",
    ),
    Mutant(
        name="a threshold counts as below itself",
        file=FILE,
        find="tl.where(b_threshold < b_x, half, 0)",
        replace="tl.where(b_threshold <= b_x, half, 0)",
        why="of two equally near values the upper",
        invariant="ties go to the lower, as in the definition",
    ),
    Mutant(
        name="a block of zeros divided by its maximum",
        file=FILE,
        find="tl.where(b_m_absmax > 0, b_m_absmax, 1.0)",
        replace="b_m_absmax",
        why="0 / 0 needs a block of zeros",
        invariant="no gradient, no moment, no NaN",
    ),
    Mutant(
        name="the decay falls on the step as well",
        file=FILE,
        find="b_w = kept * b_w - step_size * b_m / (tl.sqrt(b_v) / v_correction + eps)",
        replace="b_w = kept * (b_w - step_size * b_m / (tl.sqrt(b_v) / v_correction + eps))",
        why="decay after the step, as on bitsandbytes' GPUs",
        invariant="(Adam8Rows 3)",
    ),
    Mutant(
        name="the gradient read at the weights' stride",
        file=FILE,
        find="tl.load(t_g + i * g_stride, mask=inside, other=0)",
        replace="tl.load(t_g + i * w_stride, mask=inside, other=0)",
        why="they have one shape",
        invariant="a gradient that lies otherwise in memory",
    ),
]
