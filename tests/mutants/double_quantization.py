"""What goes wrong in the second level of quantisation."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/double_quantization.py"
TESTS = ["tests/test_nf4.py"]

MUTANTS = [
    Mutant(
        name="the mean is not added back",
        file=FILE,
        find="return blocks.view(-1)[: len(levels)] + double.offset",
        replace="return blocks.view(-1)[: len(levels)]",
        why="only one direction was centred",
        invariant="(NF4 6)",
    ),
    Mutant(
        name="constants not centred",
        file=FILE,
        find="groups = into_blocks(absmax - offset, GROUP)",
        replace="groups = into_blocks(absmax, GROUP)",
        why="the paper's centring skipped",
        invariant="(NF4 6)",
    ),
    Mutant(
        name="one second-level constant for the tensor",
        file=FILE,
        find="largest = groups.abs().amax(1)",
        replace="largest = groups.abs().amax().repeat(len(groups))",
        why="groups forgotten, shapes still fit",
        invariant="(NF4 6): a constant a group of 256",
    ),
    Mutant(
        name="groups of 64",
        file=FILE,
        find="GROUP = 256  # constants in a group",
        replace="GROUP = 64  # constants in a group",
        why="the weights' block size",
        invariant="(NF4 6): groups of 256",
    ),
    Mutant(
        name="the map's neighbour",
        file=FILE,
        find="(scaled_to_one(groups, largest), midpoints,",
        replace="(scaled_to_one(groups, largest), levels[1:],",
        why="searched among the levels, not between them",
        invariant="(NF4 6): the nearest level",
    ),
    Mutant(
        name="the signed largest",
        file=FILE,
        find="largest = groups.abs().amax(1)",
        replace="largest = groups.amax(1)",
        why="the absolute value forgotten after centring",
        invariant="(NF4 6): C_g is the largest absolute value",
    ),
    Mutant(
        name="the first group's constant for all",
        file=FILE,
        find="into_blocks(levels, GROUP) * double.absmax[:, None]",
        replace="into_blocks(levels, GROUP) * double.absmax[:1, None]",
        why="one group in small examples",
        invariant="(NF4 6): each group its own",
    ),
    Mutant(
        name="the median for the mean",
        file=FILE,
        find="offset = absmax.mean()",
        replace="offset = absmax.median()",
        why="robustness",
        invariant="(NF4 6)",
    ),
]
