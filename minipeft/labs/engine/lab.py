"""What a lab is: the files it hands out, what is taken out of them, the invariants that must hold.

A lab's module makes one `LAB = Lab(...)` and decorates functions with `@LAB.invariant(points)`.
The same functions judge the student, the reference and the planted bugs. Points of a lab's
invariants sum to 50: they count once on shapes the student can see, once on hidden ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import minipeft
from minipeft.labs.engine.stub import functions

PACKAGE = Path(minipeft.__file__).parent  # the reference
FINGERPRINTS = Path(__file__).parent.parent / "fingerprints.json"
VISIBLE_SEEDS = (1, 2, 3)
HALF = 50  # points of all invariants of a lab; hidden cases give as many again


@dataclass(frozen=True)
class Hint:
    """What to tell somebody whose code shows a bug, step by step; never a value to expect.

    concept: what was misunderstood, with the equation's id. nudge: a question. look: functions.
    """

    concept: str
    nudge: str
    look: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bug:
    """A mistake people make: in the reference `find`, which occurs once, becomes `replace`."""

    name: str
    find: str
    replace: str
    hint: Hint
    file: str = ""  # in the package; the lab's first file without it

    def plant(self, source):
        """The source with the bug in it. Raises ValueError when `find` does not occur once."""
        times = source.count(self.find)
        if times != 1:
            raise ValueError(f"bug {self.name!r}: its find occurs {times} times, not once")
        return source.replace(self.find, self.replace)


@dataclass(frozen=True)
class Invariant:
    """One thing that must hold: check(case) raises when it does not."""

    name: str
    points: int
    about: str
    check: Callable = field(repr=False)


def source(path):
    """The reference's text of one of the package's files, "minipeft/..."."""
    return (PACKAGE.parent / path).read_text(encoding="utf-8")


@dataclass
class Lab:
    """An assignment in which functions of the library are written anew.

    title: in a table. about: the task, for the student's README. files: that are handed out, with
    "minipeft/" in front. blanks: functions ("f" or "Class.f"), in the order in which to write them;
    where two files have one, "file.py:f". minutes: for a student who has read the chapter. bugs:
    what people get wrong. mistakes: for the instructor. preload: modules worth importing once.
    seconds, megabytes: of one test.
    """

    title: str
    about: str
    files: tuple[str, ...]
    blanks: tuple[str, ...]
    minutes: int
    bugs: tuple[Bug, ...] = ()
    mistakes: str = ""
    preload: tuple[str, ...] = ()
    seconds: float = 5.0
    megabytes: int = 2048
    name: str = ""
    invariants: list[Invariant] = field(default_factory=list)

    kind = "write"

    def invariant(self, points):
        """Decorator: the function is an invariant of this lab; its docstring says what holds."""

        def add(check):
            about = " ".join(check.__doc__.split())
            self.invariants.append(Invariant(check.__name__, points, about, check))
            return check

        return add

    @property
    def handed_out(self):
        """{name in the student's folder: path in the package}."""
        return {Path(path).name: path for path in self.files}

    def source(self, path):
        """The reference's text of one of the package's files."""
        return source(path)

    def blanks_of(self, path):
        """Names of the functions to blank in one file. Raises ValueError for one in no file."""
        known = {p: functions(self.source(p)) for p in self.files}
        found = []
        for file, _, name in (b.rpartition(":") for b in self.blanks):
            where = [p for p in self.files if file in ("", Path(p).name) and name in known[p]]
            if len(where) != 1:
                raise ValueError(f"{self.name}: {name} is a function of {len(where)} of its files")
            found += [name] if where == [path] else []
        return found

    def planted(self, bug):
        """{name in the student's folder: text}: the reference with one bug."""
        where = bug.file or self.files[0]
        return {
            name: bug.plant(self.source(path)) if path == where else self.source(path)
            for name, path in self.handed_out.items()
        }

    def fingerprints(self):
        """[(names of invariants that fail, Hint)] of every bug, measured beforehand."""
        measured = json.loads(FINGERPRINTS.read_text()) if FINGERPRINTS.exists() else {}
        mine = measured.get(self.name, {})
        return [(frozenset(mine[b.name]), b.hint) for b in self.bugs if b.name in mine]


@dataclass(frozen=True)
class World:
    """A copy of the package in which a student's tests run, and what they must say there.

    edits: (path in the package, find, replace). must: "pass" or "fail". bonus: points on top.
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]
    must: str
    points: int
    bonus: bool = False


@dataclass
class BugLab:
    """An assignment in which the student writes a test that finds a bug.

    file: where the bug is. bug: (find, replace). rewrites: (find, replace) pairs that change the
    text of the reference and not what it does; a good test does not notice. rewritten_bug: the bug
    in that text. siblings: {name: (find, replace)}, other bugs in the place; a good test finds them
    too (bonus). curve: a function that trains in the world it is imported in, and returns {"x",
    "y", "labels"}. solution: a test that does it all. attempts: {name: (text of a test that does
    not, concept of the hint it gets)}.
    """

    title: str
    about: str
    file: str
    bug: tuple[str, str]
    rewrites: tuple[tuple[str, str], ...]
    rewritten_bug: tuple[str, str]
    siblings: dict[str, tuple[str, str]]
    curve: Callable
    solution: str
    minutes: int
    attempts: dict[str, tuple[str, str]] = field(default_factory=dict)
    mistakes: str = ""
    preload: tuple[str, ...] = ()
    seconds: float = 5.0
    megabytes: int = 2048
    name: str = ""

    kind = "find"

    @property
    def handed_out(self):
        """{name in the student's folder: path in the package}: the student hands in one test."""
        return {"test_it.py": None}

    def source(self, path):
        """The reference's text of one of the package's files."""
        return source(path)

    def worlds(self):
        """Where the student's tests run, the reference first."""

        def edit(pair):
            return (self.file, *pair)

        rewritten = tuple(map(edit, self.rewrites))
        return [
            World("the reference", (), "pass", 0),
            World("the bug", (edit(self.bug),), "fail", 70),
            World("the reference, written otherwise", rewritten, "pass", 15),
            World("the bug, written otherwise", (*rewritten, edit(self.rewritten_bug)), "fail", 15),
            *(
                World(f"another bug nearby, number {n}", (edit(pair),), "fail", 5, bonus=True)
                for n, pair in enumerate(self.siblings.values(), 1)  # names would say too much
            ),
        ]
