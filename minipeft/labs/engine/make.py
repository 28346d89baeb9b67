"""Writes what a lab hands out, and submissions to try grading on."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from minipeft.atomic import write_atomically
from minipeft.labs.engine.grade import Grader, module_name
from minipeft.labs.engine.lab import HALF
from minipeft.labs.engine.stub import blank, body_lines, functions

NOTE = "lab.json"  # in a lab's folder: which lab it is


def stubs(lab):
    """{name: text} of the files a student gets."""
    if lab.kind == "find":
        return {"test_it.py": EMPTY_TEST.format(module=module_name(lab.file))}
    return {
        name: blank(lab.source(path), lab.blanks_of(path)) for name, path in lab.handed_out.items()
    }


EMPTY_TEST = '''"""Hand in this file. Its functions test_... must pass where the code is right and
fail where the bug is. Compute what is right yourself, from the equation.
"""

import torch

import {module} as library


def test_it():
    pass
'''


def make(lab, folder):
    """Write the lab's folder. Raises ValueError when a file of it is there and differs."""
    folder = Path(folder)
    files = {name: text.encode() for name, text in stubs(lab).items()}
    taken = [n for n, text in files.items() if (folder / n).exists()]
    if taken:
        raise ValueError(f"{folder / taken[0]} exists: somebody may have worked on it already")
    files["README.md"] = readme(lab).encode()
    files[NOTE] = (json.dumps({"lab": lab.name}) + "\n").encode()
    if lab.kind == "find":
        mutated = lab.source(lab.file).replace(*lab.bug)
        files[f"library/{Path(lab.file).name}"] = mutated.encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    if lab.kind == "find":
        write_curve(lab, folder)
    return folder


def lab_of(folder):
    """The name of the lab that a folder, or the first of its subfolders, was made for; or None."""
    for note in [Path(folder) / NOTE, *sorted(Path(folder).glob(f"*/{NOTE}"))]:
        if note.is_file():
            return json.loads(note.read_text())["lab"]
    return None


# -- the student's README


def readme(lab):
    """The assignment as one page."""
    writer = readme_find if lab.kind == "find" else readme_write
    return f"# {lab.title}\n\n{paragraphs(lab.about)}\n\n{writer(lab)}\n"


def paragraphs(text):
    return textwrap.dedent(text).strip()


def readme_write(lab):
    """What to write, how it is judged, how to work: for a Lab."""
    names = ", ".join(f"`{name}`" for name in lab.handed_out)
    rows = "\n".join(f"{n}. `{place}`" for n, place in enumerate(lab.blanks, 1))
    points = "\n".join(f"| {i.about} | {i.points} |" for i in lab.invariants)
    return f"""## What to write

You get {names} as the library has it, without the bodies of these functions. Signatures,
docstrings and the equations at the top of the file are all you need; write in this order.

{rows}

## How it is judged

| what must hold | points |
|---|---:|
{points}

Each of these counts twice: on shapes you can try, and on others that you cannot see. Together that
makes {2 * HALF} points.

## How to work

```
minipeft lab check      # in this folder: what holds, what does not
minipeft lab hint       # a hint for what is wrong; ask again for the next step
```

Allow about {lab.minutes} minutes. Hand in {names} and nothing else."""


def readme_find(lab):
    """The same for a BugLab."""
    name = Path(lab.file).name
    rows = "\n".join(
        f"| {w.name}: your tests must {w.must} | {w.points}{' extra' if w.bonus else ''} |"
        for w in lab.worlds()
        if w.points
    )
    return f"""![Two curves: with the bug, and as it should be](curve.png)

## What to write

`library/{name}` is the library's file with one bug in it; `curve.png` (and `curve.csv`) shows what
it does to training. Find it, and write a test in `test_it.py` that would have caught it: it must
pass on right code and fail on this one. Reading the source text is no test: rename a variable and
it breaks.

## How it is judged

| where your tests run | points |
|---|---:|
{rows}

Nothing counts unless your tests pass on the library as it is.

## How to work

```
minipeft lab check      # in this folder: where your tests pass and fail
minipeft lab hint       # a hint; ask again for the next step
```

Allow about {lab.minutes} minutes. Hand in `test_it.py` and nothing else."""


# -- the teacher's page


def overview(labs):
    """A row for each lab: what is learned, how long it takes, what goes wrong."""
    rows = ["| lab | hand in | minutes | often wrong |", "|---|---|---:|---|"]
    for lab in labs:
        names = ", ".join(f"`{name}`" for name in lab.handed_out)
        wrong = " ".join(lab.mistakes.split())
        rows.append(f"| `{lab.name}`: {lab.title} | {names} | {lab.minutes} | {wrong} |")
    return "\n".join(rows) + "\n"


# -- the curve of a bug


def write_curve(lab, folder):
    """curve.csv and curve.png: what the lab's curve() gives with the bug and without."""
    found, reference = curves(lab)
    x, y = found["labels"]
    lines = [f"{x},with the bug,as it should be"]
    lines += [f"{a:g},{b:.6g},{c:.6g}" for a, b, c in zip(found["x"], found["y"], reference["y"])]
    write_atomically(folder / "curve.csv", ("\n".join(lines) + "\n").encode())

    def draw(path):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = (
            (found, "with the bug", {"color": "#D55E00", "marker": "o", "ms": 4}),
            (reference, "as it should be", {"color": "#0072B2", "ls": "--"}),
        )
        for curve, label, style in lines:
            axes.plot(curve["x"], curve["y"], **style)
            end = (curve["x"][-1], curve["y"][-1])
            where = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
            axes.annotate(label, end, color=style["color"], **where)
        first, last = found["x"][0], found["x"][-1]
        axes.set_xlim(right=last + 0.27 * (last - first))  # room for the labels
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, dpi=120, format="png", metadata={"Software": None})

    write_atomically(folder / "curve.png", draw)


def curves(lab):
    """What the lab's curve() returns in the world of the bug, and in the reference."""
    found = []
    with Grader(lab) as grader:
        grader.lab.seconds = max(60.0, lab.seconds)
        reference, bug = lab.worlds()[:2]
        for world in (bug, reference):
            result = grader.in_world(world, {}, "curve")
            if result["status"] != "passed":
                raise ValueError(f"{lab.name}: no curve in {world.name}: {result['message']}")
            found.append(json.loads(result["message"]))
    return found


# -- examples


def examples(lab):
    """{folder: {file: text}}: the reference, a blank, and what people get wrong."""
    found = {"reference": reference(lab), "blank": stubs(lab)}
    if lab.kind == "find":
        found |= {name: {"test_it.py": text} for name, (text, _) in lab.attempts.items()}
    else:
        found |= {bug.name: lab.planted(bug) for bug in lab.bugs}
    return {name.replace(" ", "-").replace(",", ""): files for name, files in found.items()}


def reference(lab):
    """{file: text} of a submission that deserves full marks."""
    if lab.kind == "find":
        return {"test_it.py": lab.solution}
    return {name: lab.source(path) for name, path in lab.handed_out.items()}


def write_examples(lab, folder, count=10):
    """Write the first `count` example submissions below `folder`; returns how many there are."""
    chosen = list(examples(lab).items())[:count]
    for name, files in chosen:
        for file, text in files.items():
            write_atomically(Path(folder) / name / file, text.encode())
    return len(chosen)


# -- where to look


def places(lab, folder, hint):
    """["lora.py, lines 96 to 99: lora_forward"] of the functions a hint points at."""
    found = []
    for name in lab.handed_out:
        file = Path(folder) / name
        try:
            known = functions(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError):
            continue
        for wanted in hint.look:
            if wanted in known:
                first, last = body_lines(known[wanted])
                where = f"line {first}" if first == last else f"lines {first} to {last}"
                found.append(f"{name}, {where}: {wanted}")
    return found
