"""What goes wrong in what a run says."""

from tests.mutants import Mutant

FILE = "minipeft/run_log.py"
TESTS = ["tests/test_run_log.py", "tests/test_training.py -k 'log or evaluation or ctrl'"]

MUTANTS = [
    Mutant(
        name="the log appends to the last run's",
        file=FILE,
        find="kept = kept_lines(path, run.result.steps) if run.result.steps else []",
        replace="kept = kept_lines(path, 10**9)",
        why="mode 'a' is there",
        invariant="a new run starts a new log",
    ),
    Mutant(
        name="the log of a resumed run starts afresh",
        file=FILE,
        find="kept = kept_lines(path, run.result.steps) if run.result.steps else []",
        replace="kept = []",
        why="mode 'w'",
        invariant="every step is logged once",
    ),
    Mutant(
        name="steps after the checkpoint logged twice",
        file=FILE,
        find='if record["step"] <= step:',
        replace='if record["step"] <= step + 10**9:',
        why="the file is only appended to",
        invariant="every step is logged once",
    ),
    Mutant(
        name="the step of the checkpoint dropped",
        file=FILE,
        find='if record["step"] <= step:',
        replace='if record["step"] < step:',
        why="off by one",
        invariant="every step is logged once",
    ),
    Mutant(
        name="a cut line is kept",
        file=FILE,
        find="            break\n        if record",
        replace="            kept.append(line)\n            break\n        if record",
        why="the line is there, after all",
        invariant="the line a kill cut off is dropped",
    ),
    Mutant(
        name="a bar in every place",
        file=FILE,
        find="if self.show and sys.stdout.isatty():",
        replace="if self.show:",
        why="it looks nice on the author's screen",
        invariant="plain lines where there is no terminal",
    ),
    Mutant(
        name="the last step said only by chance",
        file=FILE,
        find="if last or step % self.config.log_every == 0:",
        replace="if step % self.config.log_every == 0:",
        why="every n-th line",
        invariant="the last step has its line",
    ),
    Mutant(
        name="the floor not logged",
        file=FILE,
        find='"evaluation": values, "floor": self.floor}',
        replace='"evaluation": values, "floor": None}',
        why="the terminal says it",
        invariant="the floor is in the log",
    ),
    Mutant(
        name="not quiet when asked",
        file=FILE,
        find="        if not self.show:\n            return\n",
        replace="",
        why="show is about the bar",
        invariant="nothing is said when asked not to",
    ),
    Mutant(
        name="frozen parameters counted as trained",
        file=FILE,
        find="for p in model.parameters() if p.requires_grad)",
        replace="for p in model.parameters())",
        why="the usual count",
        invariant="config.json says what was trained",
    ),
]
