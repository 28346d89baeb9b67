"""What goes wrong in 2:4 storage."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/semi_structured.py"
TESTS = ["tests/test_semi_structured.py"]

MUTANTS = [
    Mutant(
        name="the first index in the high bits",
        file=FILE,
        find="SHIFTS = (0, 2, 4, 6)",
        replace="SHIFTS = (6, 4, 2, 0)",
        why="bytes read from the left",
        invariant="(Semi 2)",
    ),
    Mutant(
        name="three bits an index",
        file=FILE,
        find="SHIFTS = (0, 2, 4, 6)",
        replace="SHIFTS = (0, 1, 2, 3)",
        why="one bit an index",
        invariant="(Semi 2): two bits",
    ),
    Mutant(
        name="the zeros are stored",
        file=FILE,
        find="places = (groups == 0).to(torch.uint8)",
        replace="places = (groups != 0).to(torch.uint8)",
        why="sorted the wrong way round",
        invariant="(Semi 1): what stays",
    ),
    Mutant(
        name="places in any order",
        file=FILE,
        find="[..., :2].sort(-1)[0]",
        replace="[..., :2].flip(-1)",
        why="a set has no order",
        invariant="(Semi 1): increasing places",
    ),
    Mutant(
        name="too many nonzeros dropped quietly",
        file=FILE,
        find="    full = ((groups != 0).sum(-1) > 2).nonzero()",
        replace="    full = ((groups != 0).sum(-1) > 4).nonzero()",
        why="two of four is what is kept anyway",
        invariant="what is not 2:4 is refused",
    ),
    Mutant(
        name="one zero is enough",
        file=FILE,
        find="    full = ((groups != 0).sum(-1) > 2).nonzero()",
        replace="    full = ((groups != 0).sum(-1) > 3).nonzero()",
        why="off by one",
        invariant="what is not 2:4 is refused",
    ),
    Mutant(
        name="the bias is forgotten",
        file=FILE,
        find="return F.linear(x, self.weight, self.bias)",
        replace="return F.linear(x, self.weight)",
        why="the weight is what is sparse",
        invariant="the same output",
    ),
    Mutant(
        name="indices cost a byte",
        file=FILE,
        find="return n * element_size // 2 + n // 8",
        replace="return n * element_size // 2 + n // 2",
        why="unpacked indices",
        invariant="(Semi 3)",
    ),
    Mutant(
        name="rows of four",
        file=FILE,
        find="if weight.shape[-1] % 8:",
        replace="if weight.shape[-1] % 4:",
        why="a group is four",
        invariant="two groups a byte",
    ),
    Mutant(
        name="half the model is packed",
        file=FILE,
        find="        try:\n            packed[path] = SemiStructuredLinear(linear)",
        replace=(
            "        try:\n"
            "            parent, name = wrap.locate(model, path)\n"
            "            packed[path] = SemiStructuredLinear(linear)\n"
            "            setattr(parent, name, packed[path])"
        ),
        why="in one loop",
        invariant="all or nothing",
    ),
    Mutant(
        name="values scattered to neighbours",
        file=FILE,
        find="pairs = places.unflatten(-1, (-1, 2)).long()",
        replace="pairs = places.unflatten(-1, (-1, 2)).long().flip(-1)",
        why="pairs read backwards",
        invariant="unpacking gives the same bits",
    ),
    Mutant(
        name="packed under a technique",
        file=FILE,
        find='    check_bare(model, "pack it before attaching")\n',
        replace="",
        why="the projection is found under its wrappers",
        invariant="techniques are not thrown away with what they wrap",
    ),
    Mutant(
        name="any weight for the sparse kernel",
        file=FILE,
        find="    check_2_4(weight)\n",
        replace="",
        why="torch will say so",
        invariant="what is not 2:4 is refused",
    ),
]
