"""What goes wrong in the ablations of prefix tuning."""

from tests.mutants import Mutant

FILE = "minipeft/soft_prompt/prefix_ablations.py"
TESTS = ["tests/test_prefix_ablations.py", "tests/contract -k infix"]

MUTANTS = [
    Mutant(
        name="the infix one token late",
        file=FILE,
        find="mask.sum(-1, keepdim=True) > after",
        replace="mask.sum(-1, keepdim=True) - 1 > after",
        why="a query sees itself",
        invariant="an infix after 0 tokens is a prefix",
    ),
    Mutant(
        name="the infix one token early",
        file=FILE,
        find="mask.sum(-1, keepdim=True) > after",
        replace="mask.sum(-1, keepdim=True) >= after",
        why="> for >=",
        invariant="what stands before an infix does not notice it",
    ),
    Mutant(
        name="positions jump one token late",
        file=FILE,
        find="(positions(ids, start) >= after)",
        replace="(positions(ids, start) > after)",
        why="> for >=",
        invariant="positions jump where the infix stands",
    ),
    Mutant(
        name="positions do not jump",
        file=FILE,
        find="self.own_position_shift * (positions",
        replace="0 * (positions",
        why="the infix takes no room",
        invariant="positions jump where the infix stands",
    ),
    Mutant(
        name="positions counted from the cache's end",
        file=FILE,
        find="(positions(ids, start) >= after)",
        replace="(positions(ids) >= after)",
        why="start forgotten: while decoding nothing is behind the infix",
        invariant="positions go on while decoding",
    ),
    Mutant(
        name="columns in the wrong order",
        file=FILE,
        find="torch.cat([behind.expand(*rows, length), mask.expand(*rows, S)], -1)",
        replace="torch.cat([mask.expand(*rows, S), behind.expand(*rows, length)], -1)",
        why="the infix stands after text, but its keys in front",
        invariant="the mask opens behind n tokens",
    ),
    Mutant(
        name="the place is not put back",
        file=FILE,
        find="            p.after = after",
        replace="            pass",
        why="no restoring",
        invariant="the place is put back afterwards",
    ),
    Mutant(
        name="one length for all",
        file=FILE,
        find="prefix_length=length) for length in lengths",
        replace="prefix_length=lengths[0]) for length in lengths",
        why="a loop variable not used",
        invariant="a sweep trains every length once",
    ),
    Mutant(
        name="checked while training",
        file=FILE,
        find="        each.check(config)",
        replace="        pass",
        why="the error comes after hours",
        invariant="a sweep refuses a length before it trains any",
    ),
    Mutant(
        name="rows without their MLP",
        file=FILE,
        find="    if bottleneck:",
        replace="    if False:",
        why="the option is read and then forgotten",
        invariant="rows from the MLP; the count",
    ),
    Mutant(
        name="prompts counted as text",
        file=FILE,
        find="if model.embed.virtual_tokens:",
        replace="if False:",
        why="they are keys like others",
        invariant="an infix does not count virtual tokens as text",
    ),
    Mutant(
        name="text counted behind other virtual tokens",
        file=FILE,
        find="or shift:",
        replace="or False:",
        why="they are keys like others",
        invariant="an infix does not count virtual tokens as text",
    ),
]
