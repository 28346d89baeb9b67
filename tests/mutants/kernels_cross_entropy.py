"""What goes wrong in a kernel of rows: masks, casts, offsets, the running sum."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/cross_entropy.py"
TESTS = [
    "tests/kernels/test_cross_entropy.py",
    "tests/kernels/test_twins.py -k cross_entropy-rows_loss",
]

MUTANTS = [
    Mutant(
        name="no mask when the gradient is stored",
        file=FILE,
        find=".to(t_z.dtype.element_ty), mask=v < V)",
        replace=".to(t_z.dtype.element_ty))",
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
        name="the sum is not scaled when the largest entry changes",
        file=FILE,
        find="total = total * tl.exp(largest - new) + tl.sum",
        replace="total = total + tl.sum",
        why="half of the online softmax",
        invariant="(CERows 1)",
    ),
    Mutant(
        name="the largest entry of the last block alone",
        file=FILE,
        find="        new = tl.maximum(largest, tl.max(b_z, 0))",
        replace="        new = tl.max(b_z, 0) + largest * 0",
        why="the carried maximum forgotten",
        invariant="(CERows 1): entries that shrink from block to block",
    ),
    Mutant(
        name="masked entries join the sum as zeros",
        file=FILE,
        find="""        b_z = tl.load(p_z, mask=v < length, other=-float("inf")).to(tl.float32)
        new""",
        replace="""        b_z = tl.load(p_z, mask=v < length, other=0.0).to(tl.float32)
        new""",
        why="0 is the usual filler, and exp(0) is 1",
        invariant="(CERows 2): V that is no multiple of the block",
    ),
    Mutant(
        name="one is subtracted in ignored rows",
        file=FILE,
        find="tl.store(p_z, tl.where(counts, b_g, 0.0).to",
        replace="tl.store(p_z, b_g.to",
        why="the loss is masked, the gradient forgotten",
        invariant="rows that do not count have gradient 0",
    ),
    Mutant(
        name="ignored rows are read",
        file=FILE,
        find="length = tl.where(counts, V, 0)",
        replace="length = V",
        why="their loss is masked anyway",
        invariant="what stands in them, NaN even, is never looked at, nor asked of memory",
    ),
    Mutant(
        name="the target is read without a mask",
        file=FILE,
        find='column_stride, mask=is_word, other=float("nan"))',
        replace="column_stride)",
        why="labels are right, are they not",
        invariant="a label that is no word reads nobody else's memory",
    ),
    Mutant(
        name="columns without their stride",
        file=FILE,
        find="""            p_z = p_row + v.to(tl.int64) * column_stride
            b_z""",
        replace="""            p_z = p_row + v.to(tl.int64)
            b_z""",
        why="logits are contiguous",
        invariant="strided rows",
    ),
    Mutant(
        name="the gradient is made in half precision",
        file=FILE,
        find="b_g = tl.exp(b_z - largest) / total",
        replace="b_g = tl.exp(b_z - largest).to(tl.float16) / total.to(tl.float16)",
        why="the result is stored in it",
        invariant="float32 to 1e-5",
    ),
]
