"""What a person sees in the terminal: tables that fit 80 columns, colours that need not be seen."""

from __future__ import annotations

import textwrap

from rich import box
from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from minipeft.labs.engine.grade import readable

NAME_WIDTH = 24
HOLDS, FAILS, EMPTY = "✓", "✗", "·"


def console():
    """The terminal; a file or a pipe gets 80 columns."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=80)


def table(*columns):
    """An empty table; a column is (title, keywords)."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for title, options in columns:
        made.add_column(title, **options)
    return made


def print_labs(labs, screen=None):
    """All labs: name, what is learned and handed in, how long it takes."""
    rows = table(
        ("lab", {"no_wrap": True, "style": "bold"}),
        ("what is learned", {"overflow": "fold"}),
        ("min", {"justify": "right"}),
    )
    for kind in ("write", "find"):
        for lab in labs:
            if lab.kind == kind:
                said = Text(lab.title).append(f"\n{', '.join(lab.handed_out)}", style="dim")
                rows.add_row(lab.name, said, str(lab.minutes))
        if kind == "write":
            rows.add_section()
    (screen or console()).print(rows)


def mark(test):
    """A sign for one test's result."""
    if test.status == "passed":
        return Text(HOLDS, style="green")
    return Text(EMPTY if test.empty else FAILS, style="dim" if test.empty else "bold red")


def print_check(lab, grade, screen=None):
    """One submission, test by test, for the one who wrote it."""
    screen = screen or console()
    rows = table(
        ("", {"no_wrap": True}),
        ("what must hold", {"ratio": 1, "overflow": "fold"}),
        ("points", {"justify": "right", "no_wrap": True}),
    )
    for test in grade.tests:
        said = Text(test.about if lab.kind == "write" else f"{readable(test)}: {test.about}")
        note = "still to be written: " + test.empty if test.empty else test.message
        if test.status != "passed" and not grade.problem:
            said.append(f"\n{note}", style="dim" if test.empty else "red")
            if test.printed:
                said.append(f"\nprinted: {test.printed.strip()}", style="dim")
        rows.add_row(mark(test), said, points(test))
    screen.print(Text(f"\n{lab.title}", style="bold"))
    screen.print(rows)
    if grade.problem:
        screen.print(Text(grade.problem, style="bold red"))
    screen.print(Text(f"{grade.score} of {grade.total} points", style="bold"))
    if lab.kind == "write" and grade.score == grade.total:
        screen.print("As many again are given on shapes that you cannot see.")
    elif grade.failing:
        screen.print("[dim]minipeft lab hint[/] helps with the next step.")


def points(test):
    """What a test gave of what it can give; nothing where it must hold for the others to count."""
    return f"{'+' if test.bonus else ''}{test.score} of {test.points}" if test.points else "-"


STEPS = ("a question", "the concept", "where to look")


def print_hint(hint, places, step, screen=None):
    """The hint up to a step, from 1 to 3."""
    screen = screen or console()
    said = (hint.nudge, hint.concept, "\n".join(places) or "the whole file")
    for number in range(step):
        screen.print(Text(f"\n{STEPS[number]}", style="bold"))
        screen.print(Padding(Text(said[number]), (0, 0, 0, 2)))
    if step < len(STEPS):
        screen.print(f"\n[dim]Ask again for {STEPS[step]}.[/]")


def print_grades(lab, grades, screen=None):
    """Many submissions in one table: a sign for each test, then what was misunderstood."""
    screen = screen or console()
    total = grades[0].total if grades else 0
    rows = table(
        ("submission", {"no_wrap": True}),
        (f"of {total}", {"justify": "right", "no_wrap": True}),
        ("tests", {"no_wrap": True}),
        ("what to talk about", {"ratio": 1, "overflow": "fold"}),
    )
    for grade in grades:
        name = textwrap.fill(grade.submission, NAME_WIDTH)
        rows.add_row(name, str(grade.score), marks(grade), remark(grade))
    screen.print(Text(f"\n{lab.title}", style="bold"))
    screen.print(rows)
    screen.print(legend(lab, grades[0] if grades else None))


def marks(grade):
    """A line of signs for the visible tests, and one for the hidden ones."""
    lines = []
    for hidden in (False, True):
        mine = [mark(t) for t in grade.tests if t.hidden == hidden]
        lines += [Text().join(mine)] if mine else []
    return Text("\n").join(lines)


def remark(grade):
    """The concept of the hint, or that there is nothing to say."""
    if grade.problem:
        return Text(grade.problem, style="red")
    if grade.hint is None:
        return Text("everything holds", style="green")
    return Text(grade.hint.concept)


def legend(lab, grade):
    """What the marks stand for: the student's words for an invariant, a test's name where it is
    the student who writes tests.
    """
    if grade is None:
        return Text("no submissions")
    rows = Table.grid(padding=(0, 1))
    rows.add_column(justify="right", style="dim")
    rows.add_column(style="dim")
    visible = [t for t in grade.tests if not t.hidden]
    for n, test in enumerate(visible, 1):
        rows.add_row(f"{n}.", Text(test.about if lab.kind == "write" else readable(test)))
    marks = f"{HOLDS} holds   {FAILS} fails   {EMPTY} not written yet"
    if len(visible) < len(grade.tests):
        marks += "   second line: the same on hidden shapes"
    return Group(Text(marks, style="dim"), rows)
