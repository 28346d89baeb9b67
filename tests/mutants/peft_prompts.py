"""What goes wrong when soft prompts are written in peft's format."""

from tests.mutants import Mutant

FILE = "minipeft/interop/peft_prompts.py"
TESTS = ["tests/parity/test_prompts_peft.py"]

MUTANTS = [
    Mutant(
        name="all keys, then all values",
        file=FILE,
        find="torch.cat(tables, 1)",
        replace="torch.cat([t.chunk(2, 1)[i] for i in (0, 1) for t in tables], 1)",
        why="a plausible order of columns",
        invariant="(peft prompts 1)",
    ),
    Mutant(
        name="layers backwards",
        file=FILE,
        find="for n in range(len(model.blocks))]\n    settings",
        replace="for n in reversed(range(len(model.blocks)))]\n    settings",
        why="the last layer first",
        invariant="(peft prompts 1)",
    ),
    Mutant(
        name="the encoder's input for its output",
        file=FILE,
        find="found[swap.path] = table().detach()",
        replace="found[swap.path] = next(table.parameters()).detach()",
        why="the first tensor of the encoder has the right shape",
        invariant="peft opens what is saved here",
    ),
    Mutant(
        name="layers backwards when read",
        file=FILE,
        find="enumerate(rows.split(widths, 1))",
        replace="enumerate(rows.split(widths, 1)[::-1])",
        why="the last layer first",
        invariant="(peft prompts 1) backwards",
    ),
    Mutant(
        name="an ensemble squeezed in",
        file=FILE,
        find="if technique.members > 1:",
        replace="if technique.members > 2:",
        why="two prompts make one of double rank",
        invariant="what peft does not know keeps files of our own",
    ),
    Mutant(
        name="a template squeezed in",
        file=FILE,
        find="if length != technique.pseudo_tokens:",
        replace="if length < 0:",
        why="peft has P-tuning, after all",
        invariant="what peft does not know keeps files of our own",
    ),
    Mutant(
        name="an infix squeezed in",
        file=FILE,
        find='if technique.placement != "prefix":',
        replace='if technique.placement == "embedding":',
        why="its tensors have the right shape",
        invariant="what peft does not know keeps files of our own",
    ),
    Mutant(
        name="two submodules read as one",
        file=FILE,
        find="not in (None, 1)",
        replace="not in (None, 1, 2)",
        why="the config is not read",
        invariant="files that do not fit are refused by name",
    ),
    Mutant(
        name="unknown settings ignored",
        file=FILE,
        find='raise ValueError(f"{key}={value!r} is not supported here")',
        replace="continue",
        why="as peft does",
        invariant="files that do not fit are refused by name",
    ),
    Mutant(
        name="tensors not checked",
        file=FILE,
        find="peft.check_tensors(tensors, {KEY: (length, width)})",
        replace="pass",
        why="the right file always fits",
        invariant="a missing tensor is named",
    ),
]
