"""What goes wrong in measuring time."""

from tests.mutants import Mutant

FILE = "minipeft/timing.py"
TESTS = ["tests/test_timing.py"]

MUTANTS = [
    Mutant(
        name="theirs over ours",
        file=FILE,
        find="ratios = sorted(a / b for a, b in found)",
        replace="ratios = sorted(b / a for a, b in found)",
        why="a speed-up for a share",
        invariant="the ratio is ours over theirs",
    ),
    Mutant(
        name="a ratio of medians",
        file=FILE,
        find="    return Ratio(statistics.median(ratios), low",
        replace="    return Ratio(min(b for _, b in found) and mine / found[0][1], low",
        why="the medians are at hand",
        invariant="ratios are of neighbours",
    ),
    Mutant(
        name="one side after the other",
        file=FILE,
        find="found = [tuple(seconds(a, device) for a in actions) for _ in range(rounds + 1)]",
        replace=(
            "found = list(zip(*[[seconds(a, device) for _ in range(rounds + 1)] for a in actions]))"
        ),
        why="the same number of measurements",
        invariant="the two sides run in turn",
    ),
    Mutant(
        name="the warm-up counts",
        file=FILE,
        find="    return found[1:]",
        replace="    return found[:-1]",
        why="one round is like another",
        invariant="the first round is not counted",
    ),
    Mutant(
        name="the queue is not drained at the end",
        file=FILE,
        find="    action()\n    drain()\n",
        replace="    action()\n",
        why="the call has returned",
        invariant="a GPU's queue is drained before the clock is read",
    ),
    Mutant(
        name="the queue is not drained at the start",
        file=FILE,
        find="    drain()\n    begin",
        replace="    begin",
        why="nothing has been asked yet",
        invariant="a GPU's queue is drained before the clock is read",
    ),
    Mutant(
        name="drained on a GPU called cuda alone",
        file=FILE,
        find='torch.device(device).type == "cuda"',
        replace='str(device) == "cuda"',
        why="devices have names",
        invariant="cuda:0 is a GPU too",
    ),
    Mutant(
        name="best and worst for the percentiles",
        file=FILE,
        find="for share in (0.2, 0.8))",
        replace="for share in (0.0, 1.0))",
        why="a spread is a spread",
        invariant="the spread is the 20th and the 80th percentile",
    ),
]
