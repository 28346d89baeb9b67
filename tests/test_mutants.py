"""The lists of planted bugs: long enough, plantable, and the runner tells dead from alive. Whether
the tests find them all is what `make mutants` asks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from minipeft.technique import WHERE
from tests import mutants
from tests.mutants import ROOT, Mutant
from tests.mutants import __main__ as runner

CORE = ("gpt", "decoding", "training", "town", "checkpoint", "wrap", "technique", "dispatch")
CORE += ("cross_entropy", "tokenizer", "multi_lora", "peft_prompts")
AT_LEAST = 8
AT_LEAST_A_KERNEL = 4


def test_every_technique_and_the_core_have_a_list():
    needed = {module.rpartition(".")[2] for module in WHERE.values()} | set(CORE)
    assert not needed - set(mutants.names()), "write tests/mutants/NAME.py for these"


@pytest.mark.parametrize("name", mutants.names())
def test_a_list_can_be_planted(name):
    """Each `find` occurs once, each mutant is Python that does something else."""
    listed, tests = mutants.load(name)
    assert len(listed) >= (AT_LEAST_A_KERNEL if name.startswith("kernels_") else AT_LEAST)
    assert len({m.name for m in listed}) == len(listed), "two mutants have the same name"
    for mutant in listed:
        mutant.plant((ROOT / mutant.file).read_text())
        assert mutant.why and mutant.invariant
    assert tests
    for test in tests:
        assert runner.tests_source([test]), f"{test} names no test file"


def test_no_bug_is_planted_twice():
    seen = {}
    for name in mutants.names():
        for mutant in mutants.load(name)[0]:
            mutated = (ROOT / mutant.file).read_text().replace(mutant.find, mutant.replace)
            other = seen.setdefault((mutant.file, mutated), (name, mutant.name))
            assert other == (name, mutant.name), f"{name}: {mutant.name} is {other}"


def planted(find, replace, source):
    return Mutant("n", "f.py", find, replace, "w", "i").plant(source)


def test_planting_replaces_the_one_place():
    assert planted("a / r", "a", "s = a / r  # scale\n") == "s = a  # scale\n"


@pytest.mark.parametrize(
    ("find", "replace", "message"),
    [
        ("y", "z", "occurs 0 times"),
        ("x", "z", "occurs 2 times"),
        ("x = 1", "x = (", "not Python"),
        ("first", "other", "only comments or docstrings"),
        ("one", "two", "only comments or docstrings"),
    ],
)
def test_what_is_no_mutant_is_refused(find, replace, message):
    with pytest.raises(ValueError, match=message):
        planted(find, replace, '"""first"""\nx = 1  # one\nx\n')


def test_an_unknown_list_is_named():
    with pytest.raises(ValueError, match=r"no mutants for 'lorra'; there are .*lora"):
        mutants.load("lorra")


def test_the_published_score_is_that_of_the_lists():
    """data/mutants.json: every list, every mutant, all killed."""
    published = json.loads(Path(runner.RESULTS).read_text())
    listed = {name: [m.name for m in mutants.load(name)[0]] for name in mutants.names()}
    found = {n: [m["name"] for m in entry["mutants"]] for n, entry in published["files"].items()}
    assert found == listed, "run `make mutants`"
    assert published["planted"] == sum(map(len, listed.values())) == published["killed"]


# -- the runner, on a tree of its own


@pytest.fixture
def tree(tmp_path):
    """A small project with one source file and one test, for the runner to work on."""
    root = tmp_path / "tree"
    (root / "minipeft").mkdir(parents=True)
    (root / "minipeft" / "__init__.py").touch()
    (root / "minipeft" / "twice.py").write_text("def twice(x):\n    return 2 * x\n")
    for folder in ("tests", "tests/mutants"):
        (root / folder).mkdir()
        (root / folder / "__init__.py").touch()
    for file in ("__init__.py", "__main__.py"):
        source = (ROOT / "tests" / "mutants" / file).read_text()
        (root / "tests" / "mutants" / file).write_text(source)
    source = (ROOT / "tests" / "interpreter.py").read_text()  # the runner asks it about Triton
    (root / "tests" / "interpreter.py").write_text(source)
    (root / "tests" / "test_twice.py").write_text(
        "import subprocess, sys\n"
        "from minipeft.twice import twice\n"
        "def test_three(): assert twice(3) == 6\n"
        "def test_elsewhere():\n"
        "    code = 'from minipeft.twice import twice; print(twice(10))'\n"
        "    assert subprocess.check_output([sys.executable, '-c', code]) == b'20\\n'\n"
    )
    (root / "data").mkdir()
    return root


LIST = """
from tests.mutants import Mutant
TESTS = ["tests/test_twice.py"]
def bug(name, replace, **more):
    return Mutant(name, "minipeft/twice.py", "return 2 * x", replace, "why", "what", **more)
MUTANTS = [{}]
"""


def run(tree, *bugs):
    """(exit code, {mutant: outcome}, output) of the runner in the tree."""
    (tree / "tests" / "mutants" / "twice.py").write_text(LIST.format(", ".join(bugs)))
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutants", "--jobs", "2"],
        cwd=tree,
        env=environment,
        capture_output=True,
        text=True,
    )
    file = tree / "data" / "mutants.json"
    listed = json.loads(file.read_text())["files"]["twice"]["mutants"] if file.exists() else []
    return done.returncode, {m["name"]: m for m in listed}, done.stdout + done.stderr


def test_the_runner_tells_dead_from_alive(tree):
    code, found, output = run(
        tree,
        'bug("one more", "return 2 * x + 1")',
        'bug("only elsewhere", "return 2 * x if x == 3 else 0")',
        'bug("the same", "return x + x")',
        'bug("no import", "return 2 * x\\nimport nothing_of_this_name")',
        'bug("not there", "return 2 * x", )',
    )
    outcomes = {name: mutant["outcome"] for name, mutant in found.items()}
    assert outcomes == {
        "one more": "killed",
        "only elsewhere": "killed",
        "the same": "survived",
        "no import": "broken",
        "not there": "broken",
    }, output
    assert found["one more"]["killed_by"] == "tests/test_twice.py::test_three"
    assert found["only elsewhere"]["killed_by"] == "tests/test_twice.py::test_elsewhere"
    assert code == 1
    assert "return 2 * x" in (tree / "minipeft" / "twice.py").read_text(), "the tree was changed"
    code, found, output = run(tree, 'bug("one more", "return 2 * x + 1")')
    assert code == 0 and list(found) == ["one more"], output


def test_tests_that_fail_by_themselves_are_red(tree):
    with (tree / "tests" / "test_twice.py").open("a") as file:
        file.write("def test_wrong(): assert False\n")
    code, found, output = run(tree, 'bug("one more", "return 2 * x + 1")')
    assert code == 1 and not found
    assert "without any mutant" in output


def test_the_copy_has_what_tests_read():
    assert {"minipeft", "tests", "data"} <= set(runner.COPIED)
