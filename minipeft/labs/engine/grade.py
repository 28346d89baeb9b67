"""From a submission to points: a copy of the package, the student's files over it, the invariants.

Only the files that the lab hands out are taken from a submission. The tests, their points and the
rest of the package are the reference's, so a file that does not even import scores 0 of the full
sum. Results are written as tests finish, and hold nothing that changes from run to run: the same
submission graded twice gives the same bytes.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from minipeft.atomic import write_atomically
from minipeft.labs.engine import watch
from minipeft.labs.engine.lab import PACKAGE, VISIBLE_SEEDS, Hint

LARGEST = 2**20  # bytes of a file that is handed in
NEAR = 0.5  # share of invariants two fingerprints must have in common to be called alike
IGNORED = shutil.ignore_patterns("_data", "*.png", "*.ipynb")


@dataclass
class Test:
    """One line of a result."""

    name: str
    about: str
    points: int
    hidden: bool = False
    bonus: bool = False
    status: str = "failed"
    message: str = "not graded yet"
    printed: str = ""
    empty: str = ""  # the exercise that is still to be done

    @property
    def score(self):
        return self.points if self.status == "passed" else 0


@dataclass
class Grade:
    """What a submission is worth."""

    lab: str
    submission: str
    tests: list[Test]
    hint: Hint | None = None
    problem: str = ""  # why nothing could be run

    @property
    def score(self):
        return sum(test.score for test in self.tests)

    @property
    def total(self):
        """Full marks; a bonus comes on top."""
        return sum(test.points for test in self.tests if not test.bonus)

    @property
    def failing(self):
        """The fingerprint: names of what does not hold, whether on visible or hidden cases."""
        return frozenset(t.name for t in self.tests if t.status == "failed" and not t.bonus)

    @property
    def to_do(self):
        """Exercises that are still empty, in the order in which tests met them."""
        return list(dict.fromkeys(t.empty for t in self.tests if t.empty))


def hidden_seeds(seed):
    """Seeds of the hidden cases for the instructor's one; never the visible ones."""
    return [1000 + 3 * seed + n for n in range(3)]


# -- submissions


class Unusable(ValueError):
    """A submission of which nothing can be run; the message is for the student."""


def collected(lab, folder):
    """{path in the package (or the file's name): bytes} of what a submission hands in.

    A file lies in the folder or, if only once, somewhere below. Raises Unusable.
    """
    found = {}
    for name, path in lab.handed_out.items():
        here = Path(folder) / name
        below = [] if here.exists() else sorted(Path(folder).rglob(name))
        if not here.exists() and len(below) != 1:
            often = f"found {len(below)} times below it" if below else "missing"
            raise Unusable(f"{name} is {often}: hand it in under this name, in the folder itself")
        file = here if here.exists() else below[0]
        if file.is_symlink() or not file.is_file():
            raise Unusable(f"{name} is not a plain file")
        if file.stat().st_size > LARGEST:
            raise Unusable(f"{name} is larger than 1 MB")
        try:
            content = file.read_bytes()
        except OSError as problem:
            raise Unusable(f"{name} cannot be read: {problem.strerror}") from None
        found[path or name] = content
    return found


def copy_package(tree):
    """The reference in `tree`; compiled files stay valid for what is not replaced."""
    tree.mkdir(parents=True)
    shutil.copytree(PACKAGE, tree / "minipeft", ignore=IGNORED)


def overlay(tree, files):
    """Put {path: bytes} in place; names without a folder go beside the package."""
    for path, content in files.items():
        target = tree / path
        target.write_bytes(content)
        for compiled in (target.parent / "__pycache__").glob(f"{target.stem}.*.pyc"):
            compiled.unlink()


def module_name(path):
    """minipeft/low_rank/lora.py -> minipeft.low_rank.lora."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


# -- grading


@dataclass
class Grader:
    """Grades submissions of one lab, one after the other; close it when done."""

    lab: object
    seed: int | None = None  # the instructor's; None leaves the hidden cases out
    start: object = None
    scratch: Path = field(init=False)

    def __post_init__(self):
        self.start = self.start or watch.starter(self.lab.preload)
        self.scratch = Path(tempfile.mkdtemp(prefix="minipeft-lab-")).resolve()
        self.count = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """End the server, remove what was copied."""
        self.start.close()
        shutil.rmtree(self.scratch, ignore_errors=True)

    def grade(self, folder, out=None, name=None):
        """The Grade of one submission. out: a folder for results.json and grade.json."""
        grade = Grade(self.lab.name, name or Path(folder).name, tests_of(self.lab, self.seed))

        def tell():
            if out is not None:
                write_results(grade, out)

        tell()
        try:
            files = collected(self.lab, folder)
            run = self.run_invariants if self.lab.kind == "write" else self.run_worlds
            run(grade, files, tell)
        except Unusable as problem:
            grade.problem = str(problem)
            for test in grade.tests:
                test.message = grade.problem
        grade.hint = hint_for(self.lab, grade)
        tell()
        return grade

    def tree(self, files, edits=()):
        """A fresh copy of the package with these files over it and these edits made in it."""
        self.count += 1
        tree = self.scratch / str(self.count)
        copy_package(tree)
        edited = {}
        for path, find, replace in edits:
            text = edited.get(path) or (PACKAGE.parent / path).read_text(encoding="utf-8")
            if text.count(find) != 1:
                raise ValueError(f"{self.lab.name}: {find!r} occurs {text.count(find)} times")
            edited[path] = text.replace(find, replace)
        overlay(tree, files | {path: text.encode() for path, text in edited.items()})
        return tree

    def request(self, tree, task):
        """What a worker is asked, but for the jobs."""
        lab = self.lab
        return {
            "tree": str(tree),
            "task": task,
            "module": f"minipeft.labs.{lab.name}",
            "files": [module_name(p) for p in lab.handed_out.values() if p],
            "report": str(self.scratch / f"report-{self.count}"),
            "megabytes": lab.megabytes,
        }

    def run_invariants(self, grade, files, tell):
        """Fill in the tests of a Lab."""
        tree = self.tree(files)
        tests = {f"{t.name}{' hidden' if t.hidden else ''}": t for t in grade.tests}
        seeds = {False: list(VISIBLE_SEEDS), True: hidden_seeds(self.seed or 0)}
        jobs = [[id, test.name, seeds[test.hidden]] for id, test in tests.items()]

        def note(id, result):
            vars(tests[id]).update(result)
            tell()

        watch.run_all(self.start, self.request(tree, "invariants"), jobs, self.lab.seconds, note)
        shutil.rmtree(tree, ignore_errors=True)

    def run_worlds(self, grade, files, tell):
        """Fill in the tests of a BugLab: the student's tests, in each world."""
        wrong = ""  # why nothing further counts
        for world, test in zip(self.lab.worlds(), grade.tests, strict=True):
            if wrong:
                test.message = wrong
                continue
            result = self.in_world(world, files)
            good = (result["status"] == "passed") == (world.must == "pass")
            test.status = "passed" if good else "failed"
            test.message = "" if good else judgement(world, result)
            test.printed = result["printed"]
            if not good and world.name in BASIC:
                wrong = BASIC[world.name]
            tell()

    def in_world(self, world, files, task="student tests"):
        """The result of one job in a world."""
        tree = self.tree(files, world.edits)
        jobs = [["curve" if task == "curve" else "tests"]]
        request = self.request(tree, task)
        results = watch.run_all(self.start, request, jobs, self.lab.seconds)
        shutil.rmtree(tree, ignore_errors=True)
        return results[jobs[0][0]]


BASIC = {  # without these two nothing counts
    "the reference": "no points, because the tests fail where nothing is wrong",
    "the bug": "no points before the bug is found",
}


def judgement(world, result):
    """Why a test file gets no points in a world."""
    if world.must == "fail":
        return "the tests pass here, although there is a bug"
    return f"the tests fail here, although nothing is wrong: {result['message']}"


def tests_of(lab, seed):
    """The lines of a result, from the reference's collection."""
    if lab.kind == "find":
        return [
            Test(w.name, f"the tests must {w.must} here", w.points, bonus=w.bonus)
            for w in lab.worlds()
        ]
    visible = [Test(i.name, i.about, i.points) for i in lab.invariants]
    if seed is None:
        return visible
    return visible + [Test(i.name, i.about, i.points, hidden=True) for i in lab.invariants]


# -- hints


def hint_for(lab, grade):
    """The Hint that fits, or None when nothing is wrong (or nothing was run)."""
    if not grade.failing or grade.problem:
        return None
    if grade.to_do:
        first = next(b for b in map(plain, lab.blanks) if b in grade.to_do)
        return Hint(
            f"{first} is still empty",
            f"Next comes {first}: its docstring names the equation in the file's header.",
            (first,),
        )
    if lab.kind == "find":
        return hint_for_test(lab, grade)
    near = max(
        lab.fingerprints(), key=lambda known: likeness(known[0], grade.failing), default=None
    )
    if near is not None and likeness(near[0], grade.failing) >= NEAR:
        return near[1]
    first = next(i for i in lab.invariants if i.name in grade.failing)
    return Hint(first.about, f"The first thing that does not hold: {first.about}")


def plain(blank):
    """A blank's name without its file."""
    return blank.rpartition(":")[2]


def likeness(a, b):
    """Share of names in common, from 0 to 1."""
    return len(a & b) / max(1, len(a | b))


def hint_for_test(lab, grade):
    """What is wrong with a test that is handed in."""
    by_name = {test.name: test for test in grade.tests}
    if by_name["the reference"].status == "failed":
        return Hint(
            "A test states what is true of right code",
            "Your test fails where nothing is wrong. Which of its numbers did you take on trust?",
        )
    if by_name["the bug"].status == "failed":
        return Hint(
            "A test finds what it looks at",
            "Look at the curve: which quantity is wrong, and does your test compute it at a point "
            "where the bug makes a difference (odd shapes, factors other than 1)?",
        )
    return Hint(
        "A test looks at what code does, not at how it is written",
        "Somebody renames a variable, and your test changes its mind. What does it depend on?",
    )


# -- files


def write_results(grade, out):
    """results.json as Gradescope reads it, and grade.json with what a program wants to know."""
    out = Path(out)
    write_json(out / "results.json", gradescope(grade))
    write_json(out / "grade.json", summary(grade))


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode(errors="replace"))  # half a character may have been printed


def gradescope(grade):
    """Gradescope's format: a total, and one entry a test. Times are left out on purpose."""
    return {
        "score": grade.score,
        "output": grade.problem,
        "output_format": "text",
        "visibility": "visible",
        "stdout_visibility": "hidden",
        "extra_data": {"lab": grade.lab, "failing": sorted(grade.failing)},
        "tests": [
            {
                "score": test.score,
                "max_score": 0 if test.bonus else test.points,
                "status": test.status,
                "name": readable(test),
                "number": str(number),
                "output": "\n".join(filter(None, (test.about, test.message, shown(test)))),
                "output_format": "text",
                "tags": ["hidden"] if test.hidden else [],
                "visibility": "after_published" if test.hidden else "visible",
                "extra_data": {},
            }
            for number, test in enumerate(grade.tests, 1)
        ],
        "leaderboard": [],
    }


def readable(test):
    """A test's name for people."""
    return test.name.replace("_", " ") + (" (hidden shapes)" if test.hidden else "")


def shown(test):
    """What a test printed, if anything."""
    return f"printed:\n{test.printed}" if test.printed else ""


def summary(grade):
    """What grade.json holds."""
    return {
        "lab": grade.lab,
        "submission": grade.submission,
        "score": grade.score,
        "total": grade.total,
        "failing": sorted(grade.failing),
        "to_do": grade.to_do,
        "problem": grade.problem,
        "hint": None if grade.hint is None else grade.hint.concept,
        "tests": [
            {
                "name": test.name,
                "hidden": test.hidden,
                "bonus": test.bonus,
                "points": test.points,
                "score": test.score,
                "status": test.status,
                "message": test.message,
            }
            for test in grade.tests
        ],
    }
