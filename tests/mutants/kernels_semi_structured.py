"""What goes wrong in packing and unpacking 2:4."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/semi_structured.py"
TESTS = ["tests/kernels/test_semi_structured.py", "tests/kernels/test_twins.py -k 2_4"]

MUTANTS = [
    Mutant(
        name="no end when reading weights",
        file=FILE,
        find="b_weight = tl.load(p_weight, mask=inside, other=0.0)",
        replace="b_weight = tl.load(p_weight)",
        why="the sizes one tries are multiples of the tile",
        invariant="Bounds",
    ),
    Mutant(
        name="no end when writing values",
        file=FILE,
        find="tl.arange(0, 4)[None, :], b_values, mask=inside)",
        replace="tl.arange(0, 4)[None, :], b_values)",
        why="the sizes one tries are multiples of the tile",
        invariant="Bounds",
    ),
    Mutant(
        name="no end when writing indices",
        file=FILE,
        find="(b_low + 16 * b_high).to(tl.uint8), mask=byte < n_bytes)",
        replace="(b_low + 16 * b_high).to(tl.uint8))",
        why="the sizes one tries are multiples of the tile",
        invariant="Bounds",
    ),
    Mutant(
        name="32-bit places there",
        file=FILE,
        find="    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)\n"
        "    inside = byte[:, None] < n_bytes\n    row",
        replace="    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)\n"
        "    inside = byte[:, None] < n_bytes\n    row",
        why="it is enough for every model one has",
        invariant="a weight of 2^31 elements",
    ),
    Mutant(
        name="columns that lie side by side",
        file=FILE,
        find="tl.arange(0, 8)[None, :].to(tl.int64) * column_stride",
        replace="tl.arange(0, 8)[None, :].to(tl.int64)",
        why="they usually do",
        invariant="transposed and strided weights",
    ),
    Mutant(
        name="a zero stays although there is no room",
        file=FILE,
        find="keep2 = (n2 == 1) | (2 - n0 - n1 < room)",
        replace="keep2 = (n2 == 1) | (1 - n0 < room)",
        why="zeros before it miscounted",
        invariant="every pattern of a group",
    ),
    Mutant(
        name="three are not too many",
        file=FILE,
        find="tl.where(nonzeros > 2, group, NONE)",
        replace="tl.where(nonzeros > 3, group, NONE)",
        why="a comparison",
        invariant="the error",
    ),
    Mutant(
        name="the last program is the one that tells",
        file=FILE,
        find="tl.atomic_min(t_bad, first_bad)",
        replace="tl.store(t_bad, first_bad)",
        why="one bad group is enough to fail",
        invariant="the first bad group is named",
    ),
    Mutant(
        name="the first index in the high bits",
        file=FILE,
        find="tl.split(b_first + 4 * b_last)",
        replace="tl.split(4 * b_first + b_last)",
        why="as one writes numbers",
        invariant="(Semi 2)",
    ),
    # -- back
    Mutant(
        name="the second group first",
        file=FILE,
        find="tl.join(b_byte & 15, b_byte >> 4)",
        replace="tl.join(b_byte >> 4, b_byte & 15)",
        why="as one writes numbers",
        invariant="(Semi 2), backwards",
    ),
    Mutant(
        name="no end when reading values",
        file=FILE,
        find="tl.load(p_values, mask=inside, other=0.0)",
        replace="tl.load(p_values)",
        why="the sizes one tries are multiples of the tile",
        invariant="Bounds",
    ),
    Mutant(
        name="no end when writing weights",
        file=FILE,
        find="tl.store(p_weight, tl.reshape(b_weight, [BYTES, 8]), mask=inside)",
        replace="tl.store(p_weight, tl.reshape(b_weight, [BYTES, 8]))",
        why="the sizes one tries are multiples of the tile",
        invariant="Bounds",
    ),
    Mutant(
        name="32-bit places back",
        file=FILE,
        find="    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)\n"
        "    inside = byte[:, None] < n_bytes\n    p_values",
        replace="    byte = tl.program_id(0) * BYTES + tl.arange(0, BYTES)\n"
        "    inside = byte[:, None] < n_bytes\n    p_values",
        why="it is enough for every model one has",
        invariant="a weight of 2^31 elements",
    ),
    Mutant(
        name="values with gaps",
        file=FILE,
        find="        values.contiguous(),",
        replace="        values,",
        why="what is stored has no gaps",
        invariant="strided inputs",
    ),
]
