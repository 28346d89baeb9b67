"""What goes wrong in the matrix-vector product with packed weights."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/nf4_gemv.py"
TESTS = ["tests/kernels/test_nf4_gemv.py", "tests/kernels/test_twins.py -k frozen"]

MUTANTS = [
    Mutant(
        name="outputs past the last one written",
        file=FILE,
        find="tl.store(t_out + token * n_out + row, b_out, mask=row < n_out)",
        replace="tl.store(t_out + token * n_out + row, b_out)",
        why="widths are multiples of 4",
        invariant="Bounds",
    ),
    Mutant(
        name="rows past the last one read",
        file=FILE,
        find="inside = (row < n_out)[:, None] & there[None, :]",
        replace="inside = (row >= 0)[:, None] & there[None, :]",
        why="their sums are thrown away",
        invariant="Bounds",
    ),
    Mutant(
        name="a step reads into the next row",
        file=FILE,
        find="inside = (row < n_out)[:, None] & there[None, :]",
        replace="inside = (row < n_out)[:, None] & (block < n_out * n_blocks)",
        why="the tensor's end is what must not be passed",
        invariant="x is 0 there, but each byte is read once",
    ),
    Mutant(
        name="the token read past its end",
        file=FILE,
        find="        there = block < n_blocks\n",
        replace="        there = block < n_blocks + BLOCKS\n",
        why="widths are multiples of the step",
        invariant="Bounds",
    ),
    Mutant(
        name="32-bit places",
        file=FILE,
        find="first = row.to(tl.int64)[:, None] * n_blocks",
        replace="first = row[:, None] * n_blocks",
        why="it is enough for every model one has",
        invariant="a weight of 2^32 elements",
    ),
    Mutant(
        name="even and odd inputs exchanged",
        file=FILE,
        find="b_even = tl.load(t_levels + (b_bytes >> 4)) * b_x_even[None, :, :]",
        replace="b_even = tl.load(t_levels + (b_bytes & 15)) * b_x_even[None, :, :]",
        why="the low nibble first",
        invariant="(NF4 4)",
    ),
    Mutant(
        name="every token is the first",
        file=FILE,
        find="p_x = t_x + token * n_blocks * SIZE + block[:, None] * SIZE + 2 * pair",
        replace="p_x = t_x + block[:, None] * SIZE + 2 * pair",
        why="decoding has one token",
        invariant="several tokens",
    ),
    Mutant(
        name="summed in the input's type",
        file=FILE,
        find="b_sum += (b_even + b_odd) * b_absmax[:, :, None]",
        replace="b_sum += ((b_even + b_odd) * b_absmax[:, :, None]).to(t_x.dtype.element_ty)",
        why="the result has that type",
        invariant="nearer to the exact product than the definition",
    ),
    Mutant(
        name="the bias once a step",
        file=FILE,
        find="        b_out += tl.load(t_bias + row, mask=row < n_out, other=0.0)",
        replace="        b_out += tl.cdiv(n_blocks, BLOCKS) * tl.load("
        "t_bias + row, mask=row < n_out, other=0.0)",
        why="it stands in the loop",
        invariant="(Frozen 1)",
    ),
]
