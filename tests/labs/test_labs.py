"""Every lab: what is handed out, and how the reference, a blank and every mistake are graded."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from minipeft import labs
from minipeft.labs.engine import grade as grading
from minipeft.labs.engine import make as making
from minipeft.labs.engine.lab import FINGERPRINTS, HALF
from minipeft.labs.engine.stub import functions, statements

LABS = [labs.load(name) for name in labs.names()]
WRITE = [lab for lab in LABS if lab.kind == "write"]
FIND = [lab for lab in LABS if lab.kind == "find"]
BUGS = [(lab, bug) for lab in WRITE for bug in lab.bugs]
ATTEMPTS = [(lab, name) for lab in FIND for name in lab.attempts]
SEED = 5  # an instructor's


def by_name(lab):
    return lab.name


def by_bug(value):
    return getattr(value, "name", str(value)).replace(" ", "_")


def test_there_are_labs_of_both_kinds():
    assert len(WRITE) >= 11 and len(FIND) >= 3


@pytest.mark.parametrize("lab", WRITE, ids=by_name)
def test_points_sum_to_half_of_a_hundred(lab):
    assert sum(i.points for i in lab.invariants) == HALF
    assert all(i.about for i in lab.invariants)


@pytest.mark.parametrize("lab", WRITE, ids=by_name)
def test_a_stub_holds_no_solution_and_all_of_the_rest(lab):
    """None of the statements that were taken out is anywhere in what is handed out."""
    for name, text in making.stubs(lab).items():
        path = lab.handed_out[name]
        source, blanked = lab.source(path), lab.blanks_of(path)
        rest = {ast.unparse(n) for n in ast.walk(ast.parse(text)) if isinstance(n, ast.stmt)}
        leaked = [s for s in statements(source, blanked) if s in rest and len(s) > 40]
        assert not leaked, leaked
        assert text.count("NotImplementedError") - source.count("NotImplementedError") == len(
            blanked
        )
        assert ast.get_docstring(ast.parse(text)) == ast.get_docstring(ast.parse(source))
        before, after = functions(source), functions(text)
        for function in blanked:
            assert ast.get_docstring(after[function]) == ast.get_docstring(before[function])


@pytest.mark.parametrize("lab", WRITE, ids=by_name)
def test_the_reference_has_full_marks_and_no_hint(lab, graded):
    grade = graded(lab, making.reference(lab), SEED)
    assert [t.message for t in grade.tests if t.status != "passed"] == []
    assert grade.score == grade.total == 2 * HALF and grade.hint is None


@pytest.mark.parametrize("lab", WRITE, ids=by_name)
def test_a_blank_has_no_points_and_is_told_where_to_begin(lab, graded):
    """It imports: what fails is the exercises, and the hint is the first of them."""
    grade = graded(lab, making.stubs(lab), SEED)
    assert grade.score == 0 and grade.total == 2 * HALF
    assert all(t.empty for t in grade.tests), [t.message for t in grade.tests if not t.empty]
    assert "still empty" in grade.hint.concept


@pytest.mark.parametrize(("lab", "bug"), BUGS, ids=by_bug)
def test_a_mistake_costs_points_and_its_hint_names_the_concept(lab, bug, graded):
    grade = graded(lab, lab.planted(bug), 0)  # the seed the fingerprints were measured with
    measured = json.loads(FINGERPRINTS.read_text())[lab.name][bug.name]
    assert sorted(grade.failing) == measured, "run python -m minipeft.labs.engine.fingerprints"
    assert grade.score < grade.total
    assert grade.hint.concept == bug.hint.concept


@pytest.mark.parametrize("lab", WRITE, ids=by_name)
def test_hints_point_at_functions_that_are_there(lab, tmp_path):
    for name, text in making.reference(lab).items():
        (tmp_path / name).write_text(text)
    for bug in lab.bugs:
        places = making.places(lab, tmp_path, bug.hint)
        assert len(places) == len(bug.hint.look), f"{bug.hint.look}: {places}"
        assert bug.hint.nudge.count("?") >= 1


@pytest.mark.parametrize("lab", FIND, ids=by_name)
def test_the_solution_finds_the_bug_and_its_siblings(lab, graded):
    grade = graded(lab, making.reference(lab))
    assert [t.message for t in grade.tests if t.status != "passed"] == []
    assert grade.total == 100 and grade.score == 100 + 5 * len(lab.siblings)


@pytest.mark.parametrize("lab", FIND, ids=by_name)
def test_an_empty_test_has_no_points(lab, graded):
    grade = graded(lab, making.stubs(lab))
    assert grade.score == 0
    assert grade.hint.concept == "A test finds what it looks at"


@pytest.mark.parametrize(("lab", "name"), ATTEMPTS, ids=by_bug)
def test_a_weak_test_is_told_why(lab, name, graded):
    text, concept = lab.attempts[name]
    grade = graded(lab, {"test_it.py": text})
    assert grade.score < grade.total
    assert grade.hint.concept == concept


def test_fingerprints_are_of_the_labs_there_are():
    measured = json.loads(FINGERPRINTS.read_text())
    assert measured.keys() == {lab.name for lab in WRITE}
    for lab in WRITE:
        assert list(measured[lab.name]) == [bug.name for bug in lab.bugs]


def test_likeness_is_the_share_in_common():
    assert grading.likeness(frozenset("ab"), frozenset("bc")) == 1 / 3
    assert grading.likeness(frozenset(), frozenset()) == 0


def test_the_teacher_s_page_lists_every_lab():
    """Between its marks; `make.overview` says what belongs there."""
    page = (Path(labs.__path__[0]) / "INSTRUCTOR.md").read_text(encoding="utf-8")
    table = page.split("<!-- labs -->\n")[1].split("<!-- /labs -->")[0]
    assert table == making.overview(LABS)


@pytest.mark.parametrize("lab", LABS, ids=by_name)
def test_a_lab_tells_the_student_and_the_teacher_enough(lab):
    page = making.readme(lab)
    assert lab.title in page and str(lab.minutes) in page
    assert len(lab.mistakes.split()) > 15
    assert len(making.examples(lab)) >= (10 if lab.kind == "write" else 8)
    for text in making.stubs(lab).values():
        ast.parse(text)


@pytest.mark.parametrize("lab", FIND, ids=by_name)
def test_a_bug_s_worlds_can_be_made(lab):
    """Every edit fits the text that the edits before it left; rewriting is not the identity."""
    for world in lab.worlds():
        text = lab.source(lab.file)
        for _, find, replace in world.edits:
            assert text.count(find) == 1, (world.name, find)
            text = text.replace(find, replace)
        ast.parse(text)


def test_the_curve_shows_the_bug(tmp_path):
    """The picture that a student gets; the two lines end far apart."""
    lab = labs.load("bug_distillation_temperature")
    folder = making.make(lab, tmp_path / "lab")
    last = (folder / "curve.csv").read_text().splitlines()[-1].split(",")
    assert float(last[1]) > 10 * float(last[2])
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert lab.bug[1] in (folder / "library" / "distillation.py").read_text()
