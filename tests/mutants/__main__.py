"""The mutation runner: `python -m tests.mutants [names ...] [--jobs 2]`.

What costs time is importing torch, so it is imported once, here, and every mutant runs in a fork
of this process, in its own copy of the tree. minipeft is never imported here: a fork imports the
mutated one, and so do the processes its tests start, since they run in the copy.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "HF_HUB_OFFLINE"), "1")

from tests import interpreter
from tests.mutants import ROOT, Mutant, load, names

RESULTS = ROOT / "data" / "mutants.json"
COPIED = ("minipeft", "tests", "data", "chapters", ".ci")  # folders a fork gets; and plain files
HEAVY = ("transformers", "peft", "adapters", "bitsandbytes", "gguf", "matplotlib.pyplot")
TIMEOUT = 180  # seconds; a mutant usually takes two


@dataclass
class Job:
    """Tests to run in a copy of the tree, with a mutant planted or (None) as it is."""

    list_name: str
    mutant: Mutant | None
    arguments: list[list[str]]  # one pytest run each, until one fails
    folder: Path | None = None
    process: int = 0
    deadline: float = 0.0
    outcome: str = ""  # killed, survived, broken, timeout
    detail: str = ""  # the test that failed, or what is wrong
    stopped: bool = field(default=False, repr=False)


def main(argv=None):
    options = parse(argv)
    chosen = options.names or names()
    lists = {name: load(name) for name in chosen}
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        scratch = Path(scratch)
        snapshot = scratch / "tree"
        copy_tree(ROOT, snapshot)
        preload(lists)
        killers = {} if options.fresh else remembered()
        if not options.no_baseline and not baseline_passes(lists, scratch, options):
            return 1
        jobs = [
            Job(name, mutant, [*killers.get((name, mutant.name), []), *map(shlex.split, tests)])
            for name, (mutants, tests) in lists.items()
            for mutant in mutants
            if options.only in mutant.name
        ]
        run_all(jobs, scratch, options)
    print_table(jobs)
    if not options.only:
        write_results(jobs, complete=not options.names)
    return 0 if all(job.outcome == "killed" for job in jobs) else 1


def parse(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="lists to run; all of them without a name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at the same time")
    parser.add_argument("--only", default="", help="only mutants whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="forget which test found what")
    parser.add_argument("--no-baseline", action="store_true", help="do not run the clean tests")
    parser.add_argument("-v", "--verbose", action="store_true", help="print the tests' output")
    return parser.parse_args(argv)


def copy_tree(source, target):
    """What the tests need of the tree, compiled files included: those of unchanged sources stay
    valid, because modification times are copied too.
    """
    target.mkdir()
    for entry in source.iterdir():
        if entry.is_dir() and entry.name in COPIED:
            shutil.copytree(entry, target / entry.name, ignore=sockets)
        elif entry.is_file():
            shutil.copy2(entry, target / entry.name)


def sockets(folder, names):
    """What cannot be copied: a notebook that is being executed has some beside it."""
    return [name for name in names if Path(folder, name).is_socket()]


def preload(lists):
    """Import what every fork would import, except minipeft."""
    import hypothesis
    import numpy
    import pytest
    import safetensors.torch
    import tiktoken
    import torch

    torch.set_num_threads(1)
    interpreter.settle()  # kernels' tests need Triton's interpreter, and torch imports Triton below
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()  # pulls in the compiler's modules, once for all forks
    text = "\n".join(tests_source(tests) for _, tests in lists.values())
    for module in HEAVY:
        if re.search(rf"(import|from) {module.partition('.')[0]}\b", text):
            importlib.import_module(module)
            if module == "transformers":
                importlib.import_module("transformers.models.gpt2.modeling_gpt2")
    assert "minipeft" not in sys.modules, "minipeft must not be imported before forking"
    return hypothesis, numpy, pytest, safetensors, tiktoken


def tests_source(tests):
    """The text of the test files that pytest arguments name."""
    paths = [ROOT / shlex.split(test)[0].partition("::")[0] for test in tests]
    files = [f for p in paths for f in (p.rglob("*.py") if p.is_dir() else [p])]
    return "\n".join(f.read_text() for f in files if f.exists())


def remembered():
    """(list, mutant) -> the pytest run that found it last time."""
    if not RESULTS.exists():
        return {}
    files = json.loads(RESULTS.read_text())["files"]
    return {
        (name, mutant["name"]): [[mutant["killed_by"]]]
        for name, entry in files.items()
        for mutant in entry["mutants"]
        if mutant["killed_by"] and mutant["outcome"] == "killed"
    }


def baseline_passes(lists, scratch, options):
    """Whether all tests pass with nothing planted; a failing one would kill anything."""
    runs = {test: name for name, (_, tests) in lists.items() for test in tests}
    jobs = [Job(name, None, [shlex.split(test)]) for test, name in runs.items()]
    run_all(jobs, scratch, options)
    failed = [job for job in jobs if job.outcome != "survived"]
    for job in failed:
        print(f"without any mutant {job.arguments[0]} fails: {job.outcome} {job.detail}")
    return not failed


def run_all(jobs, scratch, options):
    """Run the jobs, several at a time, in the order given."""
    waiting, running = list(reversed(jobs)), []
    while waiting or running:
        while waiting and len(running) < options.jobs:
            running.append(start(waiting.pop(), scratch, options))
        time.sleep(0.01)
        for job in [job for job in running if finished(job)]:
            running.remove(job)
            shutil.rmtree(job.folder, ignore_errors=True)
            if job.mutant is not None:
                print(f"{job.outcome:9} {job.list_name}: {job.mutant.name}  [{job.detail}]")
                sys.stdout.flush()


def start(job, scratch, options):
    """Copy the tree, plant the bug and fork."""
    job.folder = Path(tempfile.mkdtemp(dir=scratch))
    tree = job.folder / "tree"
    copy_tree(scratch / "tree", tree)
    try:
        if job.mutant is not None:
            source = tree / job.mutant.file
            source.write_text(job.mutant.plant(source.read_text()))
    except (ValueError, OSError) as error:
        job.outcome, job.detail, job.stopped = "broken", str(error), True
        return job
    sys.stdout.flush()
    job.process = os.fork()
    if job.process == 0:
        child(job, tree, options.verbose)
    job.deadline = time.monotonic() + TIMEOUT
    return job


def finished(job):
    """Whether the job is over; its outcome is then filled in."""
    if job.stopped:
        return True
    process, _ = os.waitpid(job.process, os.WNOHANG)
    if process == 0 and time.monotonic() < job.deadline:
        return False
    with contextlib.suppress(ProcessLookupError):  # whatever the tests have started and left
        os.killpg(job.process, signal.SIGKILL)
    if process == 0:
        os.waitpid(job.process, 0)
        found = job.mutant is not None and job.mutant.hangs
        job.outcome, job.detail = ("killed", "") if found else ("timeout", f"over {TIMEOUT} s")
        return True
    report = job.folder / "report.json"
    if report.exists():
        job.outcome, job.detail = json.loads(report.read_text())
    else:
        job.outcome, job.detail = "broken", "the process died without a report"
    return True


# -- in the fork


class Watcher:
    """A pytest plugin that remembers the first test that failed."""

    def __init__(self):
        self.failed = self.not_collected = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and self.not_collected is None:
            self.not_collected = report.nodeid


def child(job, tree, verbose):
    """Never returns: runs the tests in the copy and leaves a report beside it."""
    try:
        os.setsid()
        if not verbose:
            silence = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silence, 1)
            os.dup2(silence, 2)
        enter(tree)
        report = import_and_test(job, tree)
    except BaseException:
        report = ("broken", traceback.format_exc().strip().splitlines()[-1])
    (job.folder / "report.json").write_text(json.dumps(report))
    os._exit(0)


def enter(tree):
    """Make the copy the only minipeft and the only tests that this process and its children see."""
    os.chdir(tree)
    real = {str(ROOT), ""}
    sys.path[:] = [str(tree), *(p for p in sys.path if p not in real)]
    for name in [n for n in sys.modules if n == "tests" or n.startswith("tests.")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    os.environ["PYTHONPATH"] = str(tree)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    for name in ("CI", "BUILD_NUMBER"):  # with these pytest prints differences in full
        os.environ.pop(name, None)
    os.environ["TMPDIR"] = tempfile.tempdir = str(tree.parent)
    sys.dont_write_bytecode = True


def import_and_test(job, tree):
    """(outcome, detail) of this job."""
    import pytest

    if job.mutant is not None and job.mutant.file.startswith("minipeft/"):
        module = job.mutant.file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        loaded = importlib.import_module(module)
        assert Path(loaded.__file__).is_relative_to(tree), f"{loaded.__file__} is not the copy"
    for arguments in job.arguments:
        watcher = Watcher()
        temporary = ["--basetemp", str(tree.parent / "pytest")]
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", *temporary, *arguments], plugins=[watcher]
        )
        if watcher.failed:
            return "killed", watcher.failed
        if code == pytest.ExitCode.OK or arguments != job.arguments[-1]:
            continue  # a remembered test that no longer exists is no answer
        return "broken", f"pytest stopped with {code}: {watcher.not_collected or arguments}"
    return "survived", ""


# -- what is told


def print_table(jobs):
    lists = list(dict.fromkeys(job.list_name for job in jobs))
    width = max(map(len, [*lists, "total"]))
    print(f"\n{'mutants of':{width}}  planted  killed")
    for name in lists:
        mine = [job.outcome for job in jobs if job.list_name == name]
        print(f"{name:{width}}  {len(mine):7}  {mine.count('killed'):6}")
    outcomes = [job.outcome for job in jobs]
    print(f"{'total':{width}}  {len(jobs):7}  {outcomes.count('killed'):6}")
    for job in jobs:
        if job.outcome != "killed":
            print(f"{job.outcome.upper()} {job.list_name}: {job.mutant.name}  {job.detail}")


def write_results(jobs, complete):
    """Update data/mutants.json: of the lists that ran, or (complete) all of it."""
    old = {} if complete or not RESULTS.exists() else json.loads(RESULTS.read_text())["files"]
    files = {name: entry for name, entry in old.items() if name in names()}
    for name in dict.fromkeys(job.list_name for job in jobs):
        mine = [job for job in jobs if job.list_name == name]
        files[name] = {
            "planted": len(mine),
            "killed": sum(job.outcome == "killed" for job in mine),
            "mutants": [
                {
                    "name": job.mutant.name,
                    "file": job.mutant.file,
                    "outcome": job.outcome,
                    "killed_by": job.detail if job.outcome == "killed" else "",
                }
                for job in mine
            ],
        }
    totals = {key: sum(entry[key] for entry in files.values()) for key in ("planted", "killed")}
    text = json.dumps(totals | {"files": dict(sorted(files.items()))}, indent=1)
    temporary = RESULTS.with_suffix(".json.tmp")
    temporary.write_text(text + "\n")
    temporary.replace(RESULTS)


if __name__ == "__main__":
    sys.exit(main())
