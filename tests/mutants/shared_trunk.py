"""What goes wrong when tasks share a trunk."""

from tests.mutants import Mutant

FILE = "minipeft/additive/shared_trunk.py"
TESTS = ["tests/test_shared_trunk.py"]

MUTANTS = [
    Mutant(
        name="rows copied one by one",
        file=FILE,
        find="x = x.repeat(S, 1, 1)",
        replace="x = x.repeat_interleave(S, 0)",
        why="repeat and repeat_interleave look alike",
        invariant="(SharedTrunk 1), (SharedTrunk 2): block by block",
    ),
    Mutant(
        name="copied at the bottom",
        file=FILE,
        find="for block in model.blocks[:lowest]:",
        replace="for block in model.blocks[:0]:",
        why="the batch is copied before the first block",
        invariant="below the first adapter one copy runs",
    ),
    Mutant(
        name="the lowest layer skipped",
        file=FILE,
        find="for block in model.blocks[lowest:]:",
        replace="for block in model.blocks[lowest + 1 :]:",
        why="off by one",
        invariant="every block runs once",
    ),
    Mutant(
        name="the highest first adapter counts",
        file=FILE,
        find="return min(layer_of(path)",
        replace="return max(layer_of(path)",
        why="where the last task branches off",
        invariant="the trunk ends at the lowest adapter of any task",
    ),
    Mutant(
        name="a task without an adapter here passes its input",
        file=FILE,
        find="torch.zeros_like(u) if a is None else a(u)",
        replace="u if a is None else a(u)",
        why="no adapter looks like the identity",
        invariant="a missing adapter adds nothing",
    ),
    Mutant(
        name="tasks take each other's adapters",
        file=FILE,
        find="zip(self.adapters, x.chunk(len(self.adapters)))",
        replace="zip(self.adapters[::-1], x.chunk(len(self.adapters)))",
        why="stacking order is not thought of",
        invariant="task s takes the s-th B rows",
    ),
    Mutant(
        name="all tasks at one place share a form",
        file=FILE,
        find="key = swap.path, type(swap.replacement)",
        replace="key = swap.path, next(iter(places), (0, type(swap.replacement)))[1]",
        why="all adapters are expected to be alike",
        invariant="sequential and parallel adapters side by side",
    ),
    Mutant(
        name="what was on is not put back",
        file=FILE,
        find="    finally:\n        together.uninstall()\n        set_adapter(model, active)",
        replace="    finally:\n        together.uninstall()",
        why="errors and states are not thought through",
        invariant="what was on stays on",
    ),
    Mutant(
        name="active tasks are counted twice",
        file=FILE,
        find="set_adapter(model, [name for name in active if name not in names])",
        replace="set_adapter(model, active)",
        why="an attached adapter acts by itself too",
        invariant="every task gets what it gets alone",
    ),
    Mutant(
        name="lengths in the wrong order",
        file=FILE,
        find="lengths.repeat(S)",
        replace="lengths.repeat_interleave(S)",
        why="repeat and repeat_interleave look alike",
        invariant="each row's own last token is read",
    ),
    Mutant(
        name="virtual rows kept",
        file=FILE,
        find="x[:, x.shape[1] - ids.shape[1] :]",
        replace="x",
        why="only the text is thought of",
        invariant="logits of the real tokens",
    ),
    Mutant(
        name="a trained LayerNorm is let through",
        file=FILE,
        find="if not parts or not all(",
        replace="if not any(",
        why="adapters are found, so all is well",
        invariant="what shares no trunk is an error",
    ),
]
