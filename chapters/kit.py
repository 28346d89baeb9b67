r"""What the chapters share: the base, a short training run, pictures, planted bugs, answers.

A chapter is a script, `python chapters/09_lora.py`, and a notebook, built from the script by
build.py. Everything here works in both: a script prints what a notebook shows. With
MINIPEFT_FAST=1 in the environment a chapter takes only a few steps, so that tests can run it.

    base()       model, tokenizer          steps(n), some(rows)    fewer in the fast mode
    learn()      a curve on a task         picture(), show()       figures with their alt text
    code()       source, highlighted       planted()               the package with a bug in it
    check()      is an exercise solved?    cost()                  what the chapter took
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.abc
import importlib.util
import io
import linecache
import logging
import os
import platform
import sys
import tempfile
import textwrap
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
for folder in (HERE, ROOT):  # a clone works without being installed
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch
from minipeft.figures import (  # noqa: F401  for the chapters' own pictures
    COLOURS,
    canvas,
    label_lines,
    spread,
    styles,
)
from tests.mutants import Mutant, load

FAST = os.environ.get("MINIPEFT_FAST") == "1"

torch.set_num_threads(1)  # equal then means equal in every bit
torch.manual_seed(0)
logging.getLogger("matplotlib").setLevel(logging.ERROR)


# -- the base, and training it


def base():
    """(model, tokenizer) as shipped: 915,000 parameters that grew up in Tiny Town."""
    from minipeft import town

    return town.load_base()


def steps(n, fast=4):
    """`n` training steps, or `fast` of them in the fast mode."""
    return min(n, fast) if FAST else n


def some(rows, fast=16):
    """All the rows, or the first `fast` of them in the fast mode."""
    return rows[:fast] if FAST else rows


def learn(
    model,
    tokenizer,
    task,
    n,
    points=6,
    seed=0,
    learning_rate=None,
    score_on=None,
    **settings,
):
    """Train what is trainable on `task` (a name) for steps(n) steps of 16 examples.

    Returns [(step, score), ...], `points` of them after the one before training, the score in the
    task's metric on some(its test set), or on the first `score_on` of it. learning_rate None is
    the technique's own default; settings go to TrainingConfig.
    """
    from minipeft.dataset import encode_all
    from minipeft.evaluation import METRICS
    from minipeft.town import TASKS
    from minipeft.training import TrainingConfig, train

    task, n = TASKS[task], steps(n)
    examples, score = some(task.test())[:score_on], METRICS[task.metric]
    config = TrainingConfig(
        steps=n,
        learning_rate=learning_rate,
        seed=seed,
        eval_every=max(1, n // points),
        device="cpu",
        **settings,
    )
    rows = encode_all(task.train(seed), tokenizer, model)
    result = train(
        model,
        rows,
        config,
        evaluate=lambda m: score(m, examples, tokenizer),
        show=False,
    )
    return [(step, values["value"]) for step, values in result.evaluations]


def optimum(task, score_on=None):
    """{"floor", "best", "unadapted"} of a task on the very examples that `learn` scores."""
    from minipeft.town import TASKS

    task = TASKS[task]
    return {"unadapted": None} | task.optimum(some(task.test())[:score_on])


# -- showing things


def in_notebook():
    """Whether a notebook's kernel runs this."""
    ipython = sys.modules.get("IPython")
    return (
        ipython is not None
        and getattr(ipython.get_ipython(), "kernel", None) is not None
    )


def code(*sources):
    """Show pieces of source (from inspect.getsource) one below the other."""
    text = "\n\n".join(textwrap.dedent(source).rstrip() for source in sources)
    present(text, f"```python\n{text}\n```")


def present(text, markdown):
    """`markdown` in a notebook, `text` elsewhere."""
    if not in_notebook():
        print(text)
        return
    from IPython.display import display

    display({"text/markdown": markdown, "text/plain": text}, raw=True)


def table(head, rows):
    """A table: `head` a list of names, `rows` lists of strings or numbers."""
    cells = [[str(c) for c in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    plain = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip()
        for row in cells
    ]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    lines.insert(1, "|---" * len(head) + "|")
    present("\n".join(plain), "\n".join(lines))


def picture(draw, *args, **kwargs):
    """Call one of minipeft.figures with a temporary path in front, and show what it drew."""
    with tempfile.TemporaryDirectory() as folder:
        path, alt = draw(str(Path(folder, "picture.png")), *args, **kwargs)
        display_png(Path(path).read_bytes(), alt)


def show(figure, alt):
    """Show a figure of one's own; `alt` says in words what is to be seen, with its numbers."""
    from matplotlib import pyplot as plt

    file = io.BytesIO()
    figure.tight_layout()
    figure.savefig(file, format="png", dpi=150, metadata={"Software": None})
    plt.close(figure)
    display_png(file.getvalue(), alt)


def display_png(data, alt):
    """The picture at half its size (screens have two dots a point), or its words in a script."""
    if not in_notebook():
        print(f"[picture] {alt}")
        return
    from IPython.display import Image, display

    width = int.from_bytes(data[16:20], "big")
    display(
        Image(data=data, format="png", width=min(760, width * 3 // 5), alt=alt)
    )


# -- what goes wrong


class Planted(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module of the package from a changed source, and leaves the others alone."""

    def __init__(self, module, source, package):
        self.module, self.source, self.package = module, source, package
        self.name = f"<{module} with a bug>"

    def find_spec(self, name, path=None, target=None):
        if name != self.module:
            return None
        spec = importlib.util.spec_from_loader(
            name, self, is_package=self.package
        )
        if self.package:
            spec.submodule_search_locations = [
                str(ROOT.joinpath(*name.split(".")))
            ]
        return spec

    def exec_module(self, module):
        lines = self.source.splitlines(keepends=True)
        linecache.cache[self.name] = (len(self.source), None, lines, self.name)
        exec(compile(self.source, self.name, "exec"), module.__dict__)


@contextlib.contextmanager
def planted(where, name=None, quiet=False):
    """The whole package as it would be with one bug in it: `with planted("lora", "B random") as
    bug:`, then `bug.LoRA(...)`.

    where: a list in tests/mutants with the mutant's name, or a Mutant. Prints the change and why
    people make it. Inside the block `import minipeft` and kit.base() give the package with the
    bug; do there all that concerns it. Names imported before stay what they were. The fast twins
    are off: the definition is what runs.
    """
    mutant = where if isinstance(where, Mutant) else find_mutant(where, name)
    original = ROOT.joinpath(mutant.file).read_text(encoding="utf-8")
    source = mutant.plant(original)
    if not quiet:
        show_bug(mutant, original, source)
    module = (
        mutant.file.removesuffix(".py")
        .removesuffix("/__init__")
        .replace("/", ".")
    )
    finder = Planted(module, source, mutant.file.endswith("__init__.py"))
    kept = {
        n: sys.modules.pop(n)
        for n in list(sys.modules)
        if n.split(".")[0] == "minipeft"
    }
    sys.meta_path.insert(0, finder)
    try:
        package = importlib.import_module("minipeft")
        with importlib.import_module("minipeft.dispatch").forced("off"):
            yield package
    finally:
        sys.meta_path.remove(finder)
        for name in [n for n in sys.modules if n.split(".")[0] == "minipeft"]:
            del sys.modules[name]
        sys.modules.update(kept)


def find_mutant(where, name):
    """The mutant called `name` in the list `where`. Raises ValueError with the names there are."""
    mutants, _ = load(where)
    for mutant in mutants:
        if mutant.name == name:
            return mutant
    raise ValueError(
        f"no mutant of {where} is called {name!r}: {[m.name for m in mutants]}"
    )


def show_bug(mutant, original, source):
    """Print a mutant: the lines it changes, why somebody writes it, what must then fail."""
    changed = difflib.unified_diff(
        original.splitlines(), source.splitlines(), n=0, lineterm=""
    )
    lines = [line for line in changed if line[:2] not in ("--", "++", "@@")]
    print(f"planted in {mutant.file}")
    print(textwrap.indent("\n".join(lines), "  "))
    print(f"why: {mutant.why}\nwhat must fail: {mutant.invariant}\n")


def holds(what, condition):
    """Say whether an invariant holds."""
    print(f"{'holds' if condition else 'FAILS'}  {what}")


# -- exercises


class Blank(Exception):
    """Nothing has been answered yet."""


def check(name, answer):
    """Say whether `answer` solves exercise `name` ("09.1"), and if not what is missing."""
    right, message = verdict(name, answer)
    print(
        f"exercise {name}: {message}"
        if right
        else f"exercise {name}, not yet: {message}"
    )


def verdict(name, answer):
    """(whether the answer is right, what to tell its author).

    exercises/chNN.py has a function exercise_N for each, which asserts, every assertion with a
    hint. What comes out as None is blank.
    """
    chapter, number = name.split(".")
    judge = getattr(
        importlib.import_module(f"exercises.ch{chapter}"), f"exercise_{number}"
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            judge(filled(answer))
    except (Blank, NotImplementedError):
        return False, "it is still blank"
    except AssertionError as error:
        return False, str(error)
    except Exception as error:
        return False, f"it stops with {type(error).__name__}: {error}"
    return True, "right"


def filled(answer):
    """The answer, which must be none of None and ..., now or when it is called."""
    if answer is None or answer is ...:
        raise Blank
    if not callable(answer):
        return answer

    def call(*args, **kwargs):
        result = answer(*args, **kwargs)
        if result is None or result is ...:
            raise Blank
        return result

    return call


# -- what it cost


def cost(trained=None):
    """Print what the chapter took: seconds, memory at its peak, parameters trained."""
    print(
        f"machine             {processor()}, 1 thread, torch {torch.__version__}"
    )
    # not by the clock on the wall: others may use the machine
    print(f"seconds on a core   {time.process_time():.0f}")
    print(f"memory at the peak  {peak_memory()}")
    if trained is not None:
        print(f"trained parameters  {trained:,}")


def processor():
    """The processor's name."""
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return (
            next(x for x in lines if x.startswith("model name"))
            .split(":")[1]
            .strip()
        )
    return platform.processor() or platform.machine()


def peak_memory():
    """Resident memory of this process at its largest."""
    try:
        import resource
    except ImportError:  # Windows
        return "not measured on this system"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return f"{peak / (2**20 if sys.platform == 'darwin' else 2**10):.0f} MB"
