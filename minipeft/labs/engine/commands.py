"""`minipeft lab`: the five things one can do with a lab."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from minipeft import labs
from minipeft.labs.engine import grade as grading
from minipeft.labs.engine import make as making
from minipeft.labs.engine import show

# as `--help` shows them
Folder = Annotated[Path, arg(metavar="FOLDER")]
Here = Annotated[Path, arg(metavar="[FOLDER]")]
Name = Annotated[str, arg(metavar="NAME")]
SomeFolder = Annotated[Path | None, arg(metavar="FOLDER")]
SomeName = Annotated[str | None, arg(metavar="NAME")]
SomeStep = Annotated[int | None, arg(metavar="1..3")]


def list_labs():
    """Every lab there is, with its files and the time it takes."""
    show.print_labs([labs.load(name) for name in labs.names()])
    return 0


def make(name: Positional[Name], out: SomeFolder = None, examples: SomeFolder = None):
    """Write the folder that a student gets.

    Args:
        name: of the lab; `minipeft lab list` shows them.
        out: the folder; without it one named after the lab.
        examples: a folder for ten submissions to try grading on, solutions among them.
    """
    lab = labs.load(name)
    folder = making.make(lab, out or Path(lab.name.replace("_", "-")))
    print(f"{lab.title}\nwrote {folder}; begin with {folder / 'README.md'}")
    if examples is not None:
        count = making.write_examples(lab, examples)
        print(f"wrote {examples}: {count} submissions, solutions among them")
    return 0


def check(folder: Positional[Here] = Path("."), lab: SomeName = None):
    """See what holds and what does not; status 0 when everything holds.

    Args:
        folder: with your files.
        lab: its name, where the folder was not made by `minipeft lab make`.
    """
    found = chosen(folder, lab)
    with grading.Grader(found) as grader:
        grade = grader.grade(folder)
    show.print_check(found, grade)
    return 0 if grade.score >= grade.total else 1


def hint(folder: Positional[Here] = Path("."), lab: SomeName = None, step: SomeStep = None):
    """Get a hint for what is wrong: a question, then the concept, then the lines.

    Args:
        folder: with your files.
        lab: its name, where the folder was not made by `minipeft lab make`.
        step: 1, 2 or 3; without it one further than the last time for the same mistake.
    """
    if step is not None and step not in (1, 2, 3):
        raise ValueError(f"step={step}: a hint has the steps 1, 2 and 3")
    found = chosen(folder, lab)
    with grading.Grader(found) as grader:
        grade = grader.grade(folder)
    if grade.problem:
        print(grade.problem)
    elif grade.hint is None:
        print("Everything holds: no hint needed.")
    else:
        step = step or next_step(folder, grade.hint)
        show.print_hint(grade.hint, making.places(found, folder, grade.hint), step)
    return 0


def next_step(folder, hint):
    """How far to go with a hint, remembered in the folder."""
    file = Path(folder) / ".hints.json"
    try:
        given = json.loads(file.read_text())
    except (OSError, ValueError):
        given = {}
    before = given.get(hint.concept) if isinstance(given, dict) else None
    given = given if isinstance(given, dict) else {}
    given[hint.concept] = min(3, before + 1) if before in (1, 2, 3) else 1
    file.write_text(json.dumps(given))
    return given[hint.concept]


def grade(
    folder: Positional[Folder],
    lab: SomeName = None,
    seed: int = 0,
    out: SomeFolder = None,
):
    """Grade a submission, or a folder of submissions: a table, and a results file for each.

    Args:
        folder: one submission, or a folder with one folder for each.
        lab: its name, where no folder says so.
        seed: of the hidden cases; choose one and keep it to yourself.
        out: folder for results.json and grade.json of each; without it `graded` beside `folder`.
    """
    found = chosen(folder, lab)
    single, folders = submissions(found, folder)
    out = out or folder.resolve().with_name(folder.resolve().name + "-graded")
    grades = []
    with grading.Grader(found, seed) as grader:
        for one in folders:
            grades.append(grader.grade(one, out if single else out / one.name, one.name))
    show.print_grades(found, grades)
    print(f"wrote {out}: results.json and grade.json of each")
    return 0


def submissions(lab, folder):
    """(whether it is a single one, [folders])."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder")
    if any((folder / name).exists() for name in lab.handed_out):
        return True, [folder.resolve()]
    found = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not found:
        raise ValueError(f"{folder} holds neither {', '.join(lab.handed_out)} nor submissions")
    return False, found


def chosen(folder, name):
    """The lab a folder is about. Raises ValueError when nobody says which."""
    name = name or making.lab_of(folder)
    if name is None:
        raise ValueError(
            f"{folder} does not say which lab it is for; name it with --lab, one of "
            + ", ".join(labs.names())
        )
    return labs.load(name)


ACTIONS = {"list": list_labs, "make": make, "check": check, "hint": hint, "grade": grade}
