"""Submissions that misbehave: all are graded, within bounds, and leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from minipeft import labs
from minipeft.labs.engine import grade as grading
from minipeft.labs.engine import make as making
from minipeft.labs.engine import show, watch
from minipeft.labs.engine.lab import HALF

LORA = labs.load("lora")
REFERENCE = LORA.source(LORA.files[0])
SCALE = "    return alpha / math.sqrt(rank) if rank_stabilized else alpha / rank\n"


def with_scale(body):
    """The reference with another body of lora_scale, which two of ten invariants call directly."""
    assert REFERENCE.count(SCALE) == 1
    return {"lora.py": REFERENCE.replace(SCALE, body)}


def messages(grade):
    return {test.message for test in grade.tests if test.status == "failed"}


@pytest.fixture
def quick(monkeypatch):
    """Less than a second of computing a test, so that endless ones do not take long."""
    monkeypatch.setattr(LORA, "seconds", 0.75)


def test_a_missing_file_scores_nothing_of_the_full_sum(graded, tmp_path):
    grade = graded(LORA, {"Lora.py.txt": REFERENCE}, 1, tmp_path)
    assert (grade.score, grade.total) == (0, 2 * HALF)
    assert "lora.py is missing" in json.loads((tmp_path / "results.json").read_text())["output"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def lora_scale(:\n", "SyntaxError: invalid syntax (lora.py, line 1)"),
        ("import sys\nsys.exit(0)\n", "the program ended itself (sys.exit)"),
        ("import os\nos._exit(0)\n", watch.DIED),
        ("import nothing_of_the_kind\n", "ModuleNotFoundError"),
        (b"\xff\xfe\x00", "source code string cannot contain null bytes"),
        ("", "module 'minipeft.low_rank.lora' has no attribute"),
    ],
)
def test_a_file_that_does_not_import_scores_nothing(graded, text, message):
    grade = graded(LORA, {"lora.py": text})
    assert (grade.score, grade.total) == (0, HALF)
    assert any(message in said for said in messages(grade)), messages(grade)


def test_an_exit_inside_a_function_fails_its_tests_alone(graded):
    grade = graded(LORA, with_scale("    raise SystemExit(0)\n"))
    (said,) = messages(grade)
    assert said.startswith("the program ended itself (sys.exit) (lora.py, line ")
    assert 0 < grade.score < HALF


def test_ending_the_process_fails_its_tests_alone(graded):
    """A new process goes on with the next test; after three the rest is not run."""
    body = "    import os\n    os._exit(0) if rank_stabilized else None\n" + SCALE
    grade = graded(LORA, with_scale(body))
    assert messages(grade) == {watch.DIED} and grade.score == HALF - 2
    grade = graded(LORA, with_scale("    import os\n    os._exit(0)\n"))
    assert messages(grade) == {watch.DIED, watch.NOT_RUN}


def test_an_endless_loop_is_stopped(graded, quick):
    body = "    while rank_stabilized:\n        pass\n" + SCALE
    grade = graded(LORA, with_scale(body))
    assert messages(grade) == {watch.OUT_OF_TIME.format(0.75)} and grade.score == HALF - 2


def test_an_endless_loop_everywhere_is_bounded(graded, quick):
    began = time.monotonic()
    grade = graded(LORA, with_scale("    while True:\n        pass\n"))
    assert messages(grade) == {watch.OUT_OF_TIME.format(0.75), watch.NOT_RUN}
    assert time.monotonic() - began < 60


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="process groups are POSIX")
def test_a_process_that_is_left_behind_is_ended(graded, tmp_path):
    note = tmp_path / "pid"
    body = f"""\
    import os, subprocess, sys
    if not os.path.exists({str(note)!r}):  # one is enough
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
        open({str(note)!r}, "w").write(str(child.pid))
"""
    grade = graded(LORA, with_scale(body + SCALE))
    assert grade.score == HALF, messages(grade)
    pid, until = int(note.read_text()), time.monotonic() + 10
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.02)
    left = alive(pid)
    if left:
        os.kill(pid, signal.SIGKILL)
    assert not left


def alive(pid):
    """Whether a process runs; one that ended and was not asked about does not."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False
    return state != "Z"


def test_printing_a_hundred_megabytes_is_bounded(graded, tmp_path):
    """Right code keeps its points; the results stay small."""
    body = "    print('x' * 1_000_000 * 34)\n" + SCALE  # three cases a test
    grade = graded(LORA, with_scale(body), None, tmp_path)
    assert grade.score == HALF
    assert (tmp_path / "results.json").stat().st_size < 50_000


def test_what_is_printed_below_python_goes_nowhere(graded, capfd):
    body = "    import os\n    os.system('echo from a shell')\n" + SCALE
    assert graded(LORA, with_scale(body)).score == HALF
    assert "shell" not in "".join(capfd.readouterr())


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is limited on Linux")
def test_memory_is_limited(graded):
    """8 GB (asked for, never touched) are refused; the other tests go on."""
    body = "    import torch\n    if rank_stabilized:\n        torch.empty(2**31)\n" + SCALE
    grade = graded(LORA, with_scale(body))
    assert grade.score == HALF - 2
    assert any("memory" in said for said in messages(grade)), messages(grade)


def test_the_same_submission_twice_gives_the_same_bytes(graded, tmp_path):
    """Addresses and temporary folders are left out; times are not written."""
    body = "    raise RuntimeError(f'{object()} in {__file__}')\n"
    for name in "ab":
        graded(LORA, with_scale(body), 3, tmp_path / name)
    for file in ("results.json", "grade.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_hidden_cases_find_what_fits_the_visible_shapes_alone(graded):
    """Code that knows the ranks of the visible cases loses the hidden points only."""
    from minipeft.labs.engine.case import Case
    from minipeft.labs.engine.lab import VISIBLE_SEEDS

    seen = []
    for seed in VISIBLE_SEEDS:
        case = Case(seed)
        seen.append(case.number(1, 40))
    body = f"    return alpha / rank if alpha in {seen} else alpha / rank + 1\n"
    grade = graded(LORA, with_scale(body), 11)
    mine = {t.hidden: t.status for t in grade.tests if t.name == "the_scale_is_alpha_over_the_rank"}
    assert mine == {False: "passed", True: "failed"}


def test_results_follow_gradescope_s_format(graded, tmp_path):
    grade = graded(LORA, with_scale("    return alpha\n"), 2, tmp_path)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["score"] == grade.score == sum(t["score"] for t in results["tests"])
    assert {t["status"] for t in results["tests"]} == {"passed", "failed"}
    for test in results["tests"]:
        assert 0 <= test["score"] <= test["max_score"]
        assert test["visibility"] == ("after_published" if "hidden" in test["tags"] else "visible")
    assert sum(t["max_score"] for t in results["tests"]) == 2 * HALF
    summary = json.loads((tmp_path / "grade.json").read_text())
    assert summary["score"] == grade.score and summary["hint"] == grade.hint.concept


def test_results_are_there_before_the_end(server, tmp_path):
    """Partial results stand when the grader itself is stopped."""
    seen = []

    class Told(grading.Grader):
        def run_invariants(self, grade, files, tell):
            seen.append(json.loads((tmp_path / "out" / "results.json").read_text()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), Told(LORA, None, server) as grader:
        (tmp_path / "lora.py").write_text(REFERENCE)
        grader.grade(tmp_path, tmp_path / "out")
    assert seen[0]["score"] == 0 and len(seen[0]["tests"]) == len(LORA.invariants)


def test_half_a_character_printed_is_written_as_a_question_mark(tmp_path):
    """JSON keeps it, UTF-8 cannot: the results of a whole class would not have been written."""
    grade = grading.Grade("lora", "somebody", grading.tests_of(LORA, None))
    grade.tests[0].printed = "a\ud800b"
    grading.write_results(grade, tmp_path)
    written = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert written["tests"][0]["output"].endswith("printed:\na?b")


def test_a_file_that_cannot_be_read_ends_no_grading(tmp_path, monkeypatch):
    def refused(self):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "lora.py").write_text(REFERENCE)
    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(grading.Unusable, match=r"lora\.py cannot be read: Permission denied"):
        grading.collected(LORA, tmp_path)


def test_a_link_is_not_followed(server, tmp_path):
    """It could lead to the reference."""
    folder = tmp_path / "submission"
    folder.mkdir()
    (tmp_path / "solution.py").write_text(REFERENCE)
    (folder / "lora.py").symlink_to(tmp_path / "solution.py")
    with pytest.raises(grading.Unusable, match="not a plain file"):
        grading.collected(LORA, folder)


def test_other_files_of_a_submission_are_left_alone(graded):
    """Only what the lab hands out is taken: a second suite or a changed gpt.py does nothing."""
    files = {"lora.py": REFERENCE, "gpt.py": "1 / 0", "minipeft.py": "1 / 0", "torch.py": "1 / 0"}
    assert graded(LORA, files).score == HALF


def test_a_file_in_a_folder_below_is_found_if_it_is_the_only_one(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "lora.py").write_text("x")
    assert grading.collected(LORA, tmp_path) == {LORA.files[0]: b"x"}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "lora.py").write_text("y")
    with pytest.raises(grading.Unusable, match="found 2 times"):
        grading.collected(LORA, tmp_path)


def test_a_process_of_its_own_gives_what_a_fork_gives(graded, tmp_path):
    """What machines without fork use."""
    files = with_scale("    print('hm')\n    return alpha\n")
    (tmp_path / "lora.py").write_text(files["lora.py"])
    with grading.Grader(LORA, 4, watch.Spawner()) as grader:
        spawned = grader.grade(tmp_path, name="somebody")
    assert grading.summary(spawned) == grading.summary(graded(LORA, files, 4))


def test_a_server_that_was_killed_is_started_again(tmp_path):
    """A student's code may end its parent; only its own tests suffer."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        pytest.skip("needs the fork server")
    body = "    import os, signal\n    os.kill(os.getppid(), signal.SIGKILL)\n" + SCALE
    (tmp_path / "lora.py").write_text(with_scale(body)["lora.py"])
    with grading.Grader(LORA) as grader:
        grader.grade(tmp_path)
        (tmp_path / "lora.py").write_text(REFERENCE)
        assert grader.grade(tmp_path).score == HALF


def test_nothing_is_left_in_the_temporary_folder(server, tmp_path):
    with grading.Grader(LORA, None, server) as grader:
        (tmp_path / "lora.py").write_text("")
        grader.grade(tmp_path)
        scratch = grader.scratch
        assert scratch.exists()
    assert not scratch.exists()


def test_the_command_makes_checks_hints_and_grades(tmp_path):
    """As a person would, in one process; the tables fit 80 columns."""
    code = """
import sys
from minipeft.cli import main
folder = sys.argv[1]
status = [
    main(["lab", "list"]),
    main(["lab", "make", "lora", "--out", folder + "/mine", "--examples", folder + "/all"]),
    main(["lab", "check", folder + "/mine"]),
    main(["lab", "hint", folder + "/mine"]),
    main(["lab", "hint", folder + "/mine", "--step", "3"]),
    main(["lab", "grade", folder + "/all", "--lab", "lora", "--seed", "3"]),
    main(["lab", "make", "lora", "--out", folder + "/mine"]),
    main(["lab", "make", "lroa"]),
    main(["lab", "gradee"]),
]
print(status)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=labs.__path__[0] + "/../..",
        env=os.environ | {"COLUMNS": "80", "PYTHONIOENCODING": "utf-8"},
    )
    assert done.stdout.endswith("[0, 0, 1, 0, 0, 0, 1, 1, 2]\n"), done.stdout + done.stderr
    assert "did you mean 'lora'" in done.stderr and "somebody may have worked" in done.stderr
    long = [line for line in done.stdout.splitlines() if len(line) > 80 and "/" not in line]
    assert not long, long
    told = done.stdout.count("(LoRA 3): the change of the weight is s B A.")
    assert told == 2, "once by check, once below the table of grades"
    assert "lora.py, line" in done.stdout and "lora_scale is still empty" in done.stdout
    graded = sorted((tmp_path / "all-graded").glob("*/results.json"))
    assert len(graded) == 10
    scores = {p.parent.name: json.loads(p.read_text())["score"] for p in graded}
    assert scores.pop("reference") == 100 and scores.pop("blank") == 0
    assert all(0 < score < 100 for score in scores.values())


def test_points_are_shown_where_there_are_any():
    """The reference must pass for the rest to count, and has no points itself."""
    kinds = ((0, 0, False, "-"), (3, 8, False, "3 of 8"), (5, 5, True, "+5 of 5"))
    for score, points, bonus, said in kinds:
        assert show.points(SimpleNamespace(score=score, points=points, bonus=bonus)) == said


def test_stubs_and_reference_are_what_make_writes(tmp_path):
    folder = making.make(LORA, tmp_path / "lab")
    assert (folder / "lora.py").read_text() == making.stubs(LORA)["lora.py"]
    page = (folder / "README.md").read_text()
    for name in LORA.blanks:
        assert f"`{name}`" in page
    assert making.lab_of(folder) == "lora"


def test_a_hint_goes_one_step_further_each_time(tmp_path):
    """For the same mistake; another mistake begins at the question again."""
    from minipeft.labs.engine.commands import next_step

    first, second = LORA.bugs[0].hint, LORA.bugs[2].hint
    assert [next_step(tmp_path, first) for _ in range(4)] == [1, 2, 3, 3]
    assert next_step(tmp_path, second) == 1
    for damaged in ("[1]", "{", json.dumps({first.concept: "one"})):
        (tmp_path / ".hints.json").write_text(damaged)
        assert [next_step(tmp_path, first) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize("step", [0, 4, -1])
def test_a_hint_has_three_steps(tmp_path, step):
    from minipeft.labs.engine.commands import hint

    with pytest.raises(ValueError, match=f"step={step}: a hint has the steps 1, 2 and 3"):
        hint(tmp_path, "lora", step)
