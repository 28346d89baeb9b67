"""What goes wrong in the study of placement."""

from tests.mutants import Mutant

FILE = "minipeft/placement_study.py"
TESTS = ["tests/test_placement_study.py"]

MUTANTS = [
    Mutant(
        name="one rate for all",
        file=FILE,
        find="Preset(technique, rates.get(name)) for",
        replace="Preset(technique, rates.get(name, 1e-3)) for",
        why="a fair comparison has one rate",
        invariant="every technique at its own rate",
    ),
    Mutant(
        name="the bottleneck is not passed on",
        file=FILE,
        find="study = placement_study(bottleneck, scale)",
        replace="study = placement_study(scale=scale)",
        why="a default is there",
        invariant="the plan has the width asked for",
    ),
    Mutant(
        name="one seed",
        file=FILE,
        find="tuple(seeds), steps",
        replace="tuple(seeds)[:1], steps",
        why="a quick run left in",
        invariant="every seed is run",
    ),
    Mutant(
        name="steps not passed on",
        file=FILE,
        find="tuple(seeds), steps, **settings)",
        replace="tuple(seeds), **settings)",
        why="each task has its own",
        invariant="the steps asked for",
    ),
    Mutant(
        name="one task",
        file=FILE,
        find="Plan(techniques, tuple(tasks),",
        replace="Plan(techniques, tuple(tasks)[:0],",
        why="a slice",
        invariant="every task is run",
    ),
    Mutant(
        name="scale not passed on",
        file=FILE,
        find="sizes = given.steps, given.bottleneck, given.scale",
        replace="sizes = given.steps, given.bottleneck",
        why="a default is there",
        invariant="the scale asked for",
    ),
    Mutant(
        name="results elsewhere",
        file=FILE,
        find="given.out, jobs",
        replace="Path('runs/placement'), jobs",
        why="a default is there",
        invariant="results go where asked",
    ),
    Mutant(
        name="bottleneck from the command line lost",
        file=FILE,
        find="sizes = given.steps, given.bottleneck, given.scale",
        replace="sizes = given.steps, 16, given.scale",
        why="a default is there",
        invariant="the width asked for",
    ),
    Mutant(
        name="the mix at its adapter's rate",
        file=FILE,
        find="rates.get(name)",
        replace="None",
        why="a technique has a rate of its own",
        invariant="a rate between those of its halves",
    ),
]
