"""The process in which a student's code runs: one JSON line a test, as it finishes.

`python -m minipeft.labs.engine.worker FILE` does what the request in FILE says and ends.
`python -m minipeft.labs.engine.worker --serve` imports torch once, then forks for every request
that comes in: that takes a tenth of the time. What watches over it is watch.py.

This is not a sandbox: the student's code could do all that this process may. It keeps honest
mistakes within bounds: memory and file sizes are limited where the platform can, printed text is
kept to a page, and nothing a student raises, SystemExit included, ends the run.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import random
import re
import sys
import traceback
from pathlib import Path

PAGE = 1000  # characters of a test's printed text that are kept
MESSAGE = 600  # characters of an error's message
FILE_LIMIT = 64 * 2**20  # bytes of a file that student code may write


class Page(io.TextIOBase):
    """Standard output that keeps the first page and counts the rest."""

    def __init__(self):
        self.kept, self.length = "", 0
        self.buffer = open(os.devnull, "wb")  # noqa: SIM115

    def write(self, text):
        self.kept += text[: PAGE - len(self.kept)]
        self.length += len(text)
        return len(text)

    def take(self):
        """The page so far; what follows goes to a new one."""
        cut = f"\n... {self.length} characters in all" if self.length > len(self.kept) else ""
        text, self.kept, self.length = self.kept + cut, "", 0
        return text


def run(request):
    """Do what a request says. Its keys:

    tree: folder with the copied package. module: the lab's. files: modules of the student's files.
    task: "invariants", "student tests" or "curve". jobs: [[id, invariant, seed]]. report: a file to
    write to. megabytes: memory for the run. preload: modules to import first.
    """
    with open(request["report"], "a", encoding="utf-8", buffering=1) as report:
        do(request, report)


def do(request, report):
    """Run the request's task and write events to the open report."""

    def say(**event):
        report.write(json.dumps(event) + "\n")

    page = enter(request)
    say(start="import")
    tasks = {"invariants": invariants, "student tests": student_tests, "curve": curve}
    try:
        jobs = tasks[request["task"]](request)
    except BaseException as problem:
        say(broken=describe(problem, request["tree"]), printed=page.take())
        return
    say(done="import")
    for name, job in jobs:
        say(start=name)
        say(done=name, **outcome(job, request["tree"]), printed=page.take())
    say(end=True)


def enter(request):
    """Make the copy the only minipeft there is; take the keyboard and the screen away."""
    tree = request["tree"]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("minipeft", "test_it")]:
        del sys.modules[name]
    sys.path[:] = [tree, *(p for p in sys.path if p not in ("", tree))]
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    os.chdir(tree)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    page = Page()
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), page, page
    limit(request["megabytes"])
    import torch

    torch.set_num_threads(1)
    return page


def limit(megabytes):
    """Memory and the size of files, on platforms that know how."""
    try:
        import resource

        used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
        most = used + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    except (ImportError, OSError, ValueError):
        return
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# -- the three tasks; each imports, and returns (id, function without arguments) pairs


def invariants(request):
    """The lab's invariants on its cases."""
    for name in request["files"]:
        importlib.import_module(name)
    module = importlib.import_module(request["module"])
    case = importlib.import_module("minipeft.labs.engine.case").Case
    checks = {i.name: i.check for i in module.LAB.invariants}

    def job(name, seeds):
        def run_cases():
            for seed in seeds:
                fixed_seeds(seed)
                checks[name](case(seed))

        return run_cases

    return [(id, job(name, seeds)) for id, name, seeds in request["jobs"]]


def student_tests(request):
    """The functions test_* in the student's file, as one job."""
    sys.path.insert(0, request["tree"])
    module = importlib.import_module("test_it")
    found = [f for name, f in vars(module).items() if name.startswith("test_") and callable(f)]
    if not found:
        raise ValueError("test_it.py has no function whose name begins with test_")

    def run_tests():
        for test in found:
            fixed_seeds(0)
            test()

    return [("tests", run_tests)]


def curve(request):
    """What the lab's curve() returns in this world, written as the job's message."""
    module = importlib.import_module(request["module"])

    def run_curve():
        fixed_seeds(0)
        return json.dumps(module.LAB.curve())

    return [("curve", run_curve)]


def fixed_seeds(seed):
    """So that the same submission gets the same numbers."""
    import torch

    random.seed(seed)
    torch.manual_seed(seed)


def outcome(job, tree):
    """{status, message, empty} of one job; an exercise still to be done is empty."""
    try:
        returned = job()
    except BaseException as problem:
        return {"status": "failed", "message": describe(problem, tree), "empty": to_do(problem)}
    return {"status": "passed", "message": returned or "", "empty": ""}


def to_do(problem):
    """The exercise whose emptiness is at the root of an exception, or ""."""
    while problem is not None:
        if isinstance(problem, NotImplementedError) and str(problem).startswith("exercise: "):
            return str(problem).removeprefix("exercise: ")
        problem = problem.__cause__
    return ""


def describe(problem, tree):
    """An exception for a reader: what, and the last line of the student's that was involved."""
    if isinstance(problem, SystemExit):
        said = "the program ended itself (sys.exit)"
    elif type(problem).__name__ in ("Wrong", "NotImplementedError"):
        said = str(problem)
    else:
        said = f"{type(problem).__name__}: {problem}".rstrip(": ")
    frames = traceback.extract_tb(problem.__traceback__)
    inside = [f for f in frames if f.filename.startswith(tree)]
    mine = [f for f in inside if f"{os.sep}labs{os.sep}" not in f.filename]
    where = ""
    if isinstance(problem, SyntaxError) and problem.filename:
        said = f"SyntaxError: {problem.msg}"
        where = f" ({Path(problem.filename).name}, line {problem.lineno})"
    elif mine and type(problem).__name__ not in ("Wrong", "NotImplementedError"):
        where = f" ({Path(mine[-1].filename).name}, line {mine[-1].lineno})"
    said = re.sub(r"0x[0-9a-f]{6,}", "0x...", said.replace(tree, "."))
    return (said if len(said) <= MESSAGE else said[:MESSAGE] + " ...") + where


# -- as a process


def serve():
    """Read requests from stdin, fork for each, answer with JSON lines on stdout.

    {"run": request} -> {"pid": number}; {"poll": pid} -> {"code": None while it runs}.
    """
    for name in ("torch", "numpy", *os.environ.get("MINIPEFT_LAB_PRELOAD", "").split()):
        importlib.import_module(name)
    warm()
    for line in sys.stdin:
        message = json.loads(line)
        if "run" in message:
            pid = os.fork()
            if pid == 0:
                forked(message["run"])
            answer = {"pid": pid}
        else:
            answer = {"code": exit_code(message["poll"])}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def exit_code(pid):
    """None while a child runs; 0 for one that was asked about before."""
    try:
        found, status = os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return 0
    return os.waitstatus_to_exitcode(status) if found else None


def warm():
    """The first step of an optimizer imports a compiler; do it once for all forks."""
    import torch

    torch.set_num_threads(1)
    weight = torch.nn.Parameter(torch.zeros(1))
    weight.grad = torch.zeros(1)
    torch.optim.AdamW([weight]).step()


def forked(request):
    """Never returns."""
    try:
        os.setsid()
        run(request)
    except BaseException:
        pass
    os._exit(0)


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        run(json.loads(Path(sys.argv[1]).read_text()))
        os._exit(0)
