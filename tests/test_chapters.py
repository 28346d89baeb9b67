"""The chapters as they lie in the repository: scripts, notebooks, exercises, and the kit they
share. That each one runs is tested in test_chapters_run_even.py and test_chapters_run_odd.py.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys

import nbformat
import pytest
import torch

import minipeft
from minipeft.technique import WHERE
from tests.chapters.running import CHAPTERS, ROOT, SCRIPTS, fresh_kit, named

PARTS = {  # what a chapter has, and the chapters that have no use for it
    "an equation": (r"\$\$.+\$\$", {"00", "21", "22"}),
    "an equation's id": (r"\([A-Z][\w -]* \d+\)", {"00", "21", "22"}),
    "the library's own source": (r"getsource\(", {"21"}),
    "a picture": (r"kit\.(picture|show)\(", set()),
    "a planted bug": (r"kit\.planted\(", {"00", "21", "22"}),
    "an exercise": (r"kit\.check\(", set()),
    "its cost": (r"kit\.cost\(", set()),
}
FORBIDDEN = {
    "a download": r"\b(urllib|requests|urlopen|wget|curl|snapshot_download)\b",
    "a magic or a shell": r"^\s*[!%]\w",
    "a widget": r"\b(ipywidgets|tqdm)\b",
}


@pytest.fixture
def kit(monkeypatch):
    """chapters/kit.py, not in the fast mode."""
    monkeypatch.delenv("MINIPEFT_FAST", raising=False)
    fresh_kit(monkeypatch)
    return importlib.import_module("kit")


def build_module():
    spec = importlib.util.spec_from_file_location("build_chapters", CHAPTERS / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def notebook_of(path):
    return nbformat.reads(path.with_suffix(".ipynb").read_text(encoding="utf-8"), as_version=4)


# -- scripts


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_lines_fit_a_notebook_s_column(path):
    long = [n for n, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 79]
    assert not long, f"lines {long} are longer than 79"


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_a_chapter_begins_with_its_number(path):
    first = path.read_text().splitlines()
    assert first[0] == "# %% [markdown]"
    assert re.fullmatch(rf"# # {path.name[:2]}\. .*[^.]", first[1]), first[1]


@pytest.mark.parametrize("path", named(SCRIPTS))
@pytest.mark.parametrize("part", PARTS)
def test_a_chapter_has_its_parts(path, part):
    pattern, without = PARTS[part]
    found = re.search(pattern, path.read_text(), re.S)
    assert found or path.name[:2] in without, f"no {pattern}"


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_equation_ids_are_those_of_the_library(path):
    """(LoRA 1) in a chapter is (LoRA 1) in a file of the package."""
    known = "\n".join(p.read_text() for p in (ROOT / "minipeft").rglob("*.py"))
    used = set(re.findall(r"\([A-Z][\w -]*? \d+\)", path.read_text()))
    assert not [name for name in used if name not in known]


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_nothing_is_fetched_installed_or_animated(path):
    source = path.read_text()
    for what, pattern in FORBIDDEN.items():
        assert not re.search(pattern, source, re.M), what


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_files_that_a_chapter_names_exist(path):
    names = re.findall(r"`((?:minipeft|tests|chapters|data)/[\w./]+)`", path.read_text())
    missing = [n for n in names if not (ROOT / n.rstrip("/.")).exists()]
    assert not missing, missing


# -- notebooks


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_script_and_notebook_agree(path):
    script, notebook = build_module().read_source(path), notebook_of(path)
    for a, b in zip(script.cells, notebook.cells, strict=True):
        assert (a.cell_type, a.source, a["id"]) == (b.cell_type, b.source, b["id"])
        assert a.metadata == b.metadata
    assert notebook.metadata == script.metadata


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_the_notebook_ran_from_top_to_bottom(path):
    code = [c for c in notebook_of(path).cells if c.cell_type == "code"]
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_the_notebook_saved_no_error_no_warning_no_machine(path):
    notebook = notebook_of(path)
    assert build_module().complaints(notebook) == []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            text = json.dumps(output.get("text") or output.get("data"))
            assert not re.search(r"Warning\b|Traceback", text), text[:300]
            assert "\\u001b" not in text, "colours of a terminal"
            assert not re.search(r" at 0x[0-9a-f]{6}", text), text[:300]
            assert not re.search(r"(?<![\w.])/(home|Users|root|tmp|work)/", text), text[:300]


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_a_notebook_shows_what_it_prints_and_nothing_by_accident(path):
    """The value of a cell's last line: a whole model, or a list of matplotlib's objects."""
    cells = notebook_of(path).cells
    kinds = {c["id"]: {o.output_type for o in c.get("outputs", ())} for c in cells}
    assert not [name for name, kind in kinds.items() if "execute_result" in kind]


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_only_the_cell_tagged_timing_tells_the_time(path):
    for cell in notebook_of(path).cells:
        if "kit.cost(" in cell.source:
            assert cell.metadata.get("tags") == ["timing"]
        elif re.search(r"\btime\.|perf_counter|timeit", cell.source) and cell.cell_type == "code":
            assert "timing" in cell.metadata.get("tags", ())


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_every_picture_has_words(path):
    """For a screen reader in the picture's metadata, for everybody in the next cell."""
    cells = notebook_of(path).cells
    for cell, following in zip(cells, [*cells[1:], None]):
        pictures = [o for o in cell.get("outputs", ()) if "image/png" in o.get("data", {})]
        for output in pictures:
            assert len(output.metadata["image/png"]["alt"]) > 20
            assert following is not None and following.cell_type == "markdown"
            assert following.source.startswith("*In words:*"), following.source[:40]


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_a_markdown_table_holds_no_bar_of_its_own(path):
    """`|x|` in a cell would cut it in two."""
    for cell in notebook_of(path).cells:
        for output in cell.get("outputs", ()):
            lines = output.get("data", {}).get("text/markdown", "").splitlines()
            rows = [line for line in lines if line.startswith("| ")]
            assert len({row.count("|") for row in rows}) <= 1, rows


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_the_source_that_a_notebook_shows_is_the_library_s(path):
    """A file that changed since the notebook was built: `python chapters/build.py NN`."""
    written = [*(ROOT / "minipeft").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    known = {line.strip() for p in written for line in p.read_text().splitlines()}
    for cell in notebook_of(path).cells:
        for output in cell.get("outputs", ()):
            shown = output.get("data", {}).get("text/markdown", "")
            if shown.startswith("```python"):
                lines = [line.strip() for line in shown.splitlines()[1:-1]]
                stale = [line for line in lines if line and line not in known]
                assert not stale, f"{cell['id']}: {stale}"


def test_every_notebook_has_a_script():
    assert {p.stem for p in CHAPTERS.glob("*.ipynb")} == {p.stem for p in SCRIPTS}


def test_the_glossary_names_every_technique():
    text = next(p for p in SCRIPTS if p.name.startswith("00")).read_text(encoding="utf-8")
    glossary = text.partition("## Glossary")[2]
    assert not [name for name in WHERE if f"`{name}`" not in glossary]
    assert len(re.findall(r"[\u4e00-\u9fff]+", glossary)) > 120


# -- exercises


def answers_of(path):
    return importlib.import_module(f"tests.chapters.answers_{path.name[:2]}")


def exercises():
    found = []
    for path in SCRIPTS:
        ids = re.findall(r'^kit\.check\("(\d\d\.\d)"', path.read_text(), re.M)
        found += [pytest.param(path, name, id=name) for name in ids]
    return found


@pytest.mark.parametrize("path", named(SCRIPTS))
def test_each_exercise_has_a_reference_and_two_wrong_answers(path):
    ids = re.findall(r'^kit\.check\("(\d\d\.\d)"', path.read_text(), re.M)
    answers = answers_of(path)
    assert len(set(ids)) == len(ids) >= 2
    assert set(ids) == set(answers.REFERENCE) == set(answers.WRONG)
    assert all(len(wrong) >= 2 for wrong in answers.WRONG.values())


@pytest.mark.parametrize("path, name", exercises())
def test_the_reference_is_right(kit, path, name):
    assert kit.verdict(name, answers_of(path).REFERENCE[name]) == (True, "right")


@pytest.mark.parametrize("path, name", exercises())
def test_wrong_answers_are_told_what_is_wrong(kit, path, name):
    """By a hint; not by running into an error of ours, and never by a word on blanks."""
    for wrong in answers_of(path).WRONG[name]:
        right, message = kit.verdict(name, wrong)
        assert not right
        assert message and "blank" not in message and "it stops with" not in message, message


@pytest.mark.parametrize("path, name", exercises())
def test_a_blank_is_blank(kit, path, name):
    blanks = [None, lambda *args, **kwargs: None]
    if not callable(answers_of(path).REFERENCE[name]):
        blanks = [None, ...]
    for blank in blanks:
        assert kit.verdict(name, blank) == (False, "it is still blank")


# -- the kit


def test_a_planted_bug_is_there_inside_the_block_alone(kit, capsys):
    layer = minipeft.technique.technique_class("LoRA")
    with kit.planted("lora", "alpha, not alpha over rank") as bug:
        assert bug.LoRA(rank=4, alpha=8).scale == 8
        assert bug.LoRA is not layer
        assert kit.base()[0].__class__ is bug.GPT
    assert sys.modules["minipeft"] is minipeft
    assert minipeft.LoRA is layer and layer(rank=4, alpha=8).scale == 2
    told = capsys.readouterr().out
    assert "-    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank" in told
    assert "the scale looks like a plain hyperparameter" in told


def test_the_package_comes_back_after_an_error(kit):
    with pytest.raises(ZeroDivisionError), kit.planted("lora", "B random", quiet=True):
        raise ZeroDivisionError
    assert sys.modules["minipeft"] is minipeft
    assert not any(isinstance(finder, kit.Planted) for finder in sys.meta_path)


def test_a_bug_that_does_not_exist_is_named(kit):
    with pytest.raises(ValueError, match=r"no mutant of lora is called 'A random': \['alpha, not"):
        kit.find_mutant("lora", "A random")


def test_the_fast_mode_takes_fewer_steps_and_rows(kit, monkeypatch):
    assert kit.steps(300) == 300 and kit.some(list(range(40))) == list(range(40))
    monkeypatch.setattr(kit, "FAST", True)
    assert kit.steps(300) == 4 and kit.steps(2) == 2 and len(kit.some(list(range(40)))) == 16


def test_learning_is_scored_before_during_and_after(kit, monkeypatch):
    monkeypatch.setattr(kit, "FAST", True)
    model, tokenizer = kit.base()
    minipeft.LoRA(rank=2).attach(model)
    curve = kit.learn(model, tokenizer, "dialect", 300, points=2)
    assert [step for step, _ in curve] == [0, 2, 4]
    assert curve[0][1] > curve[-1][1] > kit.optimum("dialect")["floor"]


def test_a_check_leaves_the_random_state_alone(kit, capsys):
    before = torch.get_rng_state()
    kit.check("09.1", lambda x, W, b, A, B, alpha: torch.zeros(1))
    assert torch.get_rng_state().equal(before)
    assert capsys.readouterr().out.startswith("exercise 09.1, not yet: h has shape (1,)")


def test_an_answer_that_crashes_is_told_how(kit):
    right, message = kit.verdict("09.2", lambda a, b: 1 // 0)
    assert not right and message.startswith("it stops with ZeroDivisionError")


def test_a_picture_has_its_words_in_a_script(kit, capsys):
    from minipeft import figures

    curves = {"LoRA": [(0, 26.0), (4, 19.0)]}
    kit.picture(figures.learning_curves, curves, {"floor": 18.0}, "Dialect", "nats")
    assert capsys.readouterr().out.startswith("[picture] Dialect: LoRA ends at 19.00")


# -- the build

SMALL = """\
# %% [markdown]
# # 99. A small chapter

# %%
import kit

print(hash("words"), kit.torch.rand(2))
figure, axis = kit.canvas()
axis.plot([0, 1])
kit.show(figure, "A line that rises from zero to one.")

# %% tags=["timing"]
kit.cost(7)
"""


def test_two_builds_give_the_same_bytes_but_for_timing(tmp_path, monkeypatch):
    build, path = build_module(), tmp_path / "99_small.py"
    path.write_text(SMALL)
    written = []
    for _ in range(2):
        build.build(path)
        notebook = notebook_of(path)
        assert "seconds" in notebook.cells[-1].outputs[0].text
        notebook.cells[-1].outputs = []
        written.append(build.text_of(notebook))
    assert written[0] == written[1]
    assert [c["id"] for c in notebook.cells] == ["cell-000", "cell-001", "cell-002"]
    assert notebook.cells[1].outputs[1].metadata["image/png"]["alt"].startswith("A line")


def test_a_cell_that_writes_to_stderr_is_not_published(tmp_path):
    build, path = build_module(), tmp_path / "99_loud.py"
    path.write_text('# %%\nimport sys\n\nprint("oh", file=sys.stderr)\n')
    with pytest.raises(SystemExit, match=r"99_loud\.py: cell-000: stderr: oh"):
        build.build(path)
    assert not path.with_suffix(".ipynb").exists()


def test_prose_is_taken_over_without_running_and_code_is_not(tmp_path):
    build, path = build_module(), tmp_path / "99_prose.py"
    path.write_text("# %% [markdown]\n# old\n\n# %%\nprint(1)\n")
    notebook = build.read_source(path)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="1\n")]
    path.with_suffix(".ipynb").write_text(build.text_of(notebook))
    path.write_text("# %% [markdown]\n# new\n\n# %%\nprint(1)\n")
    build.build(path, prose=True)
    assert notebook_of(path).cells[0].source == "new"
    assert notebook_of(path).cells[1].outputs[0].text == "1\n"
    path.write_text("# %% [markdown]\n# new\n\n# %%\nprint(2)\n")
    with pytest.raises(SystemExit, match="its code changed"):
        build.build(path, prose=True)
