r"""What a run says while it runs: config.json and log.jsonl in its folder, and a bar or lines on
the terminal.

    config.json    the settings, the model's shape, what is attached, versions
    log.jsonl      a step           step, loss, learning_rate, gradient_norm, tokens, seconds
                   an evaluation    step, evaluation {name: value}, floor

Losses are nats per label, seconds those spent in steps. A terminal gets a progress bar; anything
else (a file, a notebook, a build log) gets a plain line every `log_every` steps, because a bar
there is a page of control codes.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from minipeft.atomic import write_atomically

REFRESH = 0.1  # seconds between drawings of the bar


class RunLog:
    """The log of one run. folder=None writes no files, show=False says nothing."""

    def __init__(self, folder, config, show, floor):
        self.folder = None if folder is None else Path(folder)
        self.config, self.show, self.floor = config, show, floor
        self.file = self.bar = None
        self.drawn = 0.0

    def begin(self, run):
        """Write config.json, open log.jsonl (keeping the lines up to the step resumed from),
        start the bar.
        """
        if self.folder is not None:
            text = json.dumps(describe(run), indent=2, default=str) + "\n"
            write_atomically(self.folder / "config.json", text.encode())
            path = self.folder / "log.jsonl"
            kept = kept_lines(path, run.result.steps) if run.result.steps else []
            write_atomically(path, "".join(kept).encode())
            self.file = open(path, "a", 1, "utf-8")  # noqa: SIM115  a line at a time
        if self.show and sys.stdout.isatty():
            self.bar = progress_bar()
            self.task = self.bar.add_task("", total=self.config.steps, completed=run.result.steps)
            self.bar.start()

    def step(self, record):
        self.write(record)
        step, last = record["step"], record["step"] == self.config.steps
        if not self.show:
            return
        text = f"loss {record['loss']:.4f}  lr {record['learning_rate']:.2e}"
        if self.bar is None:
            if last or step % self.config.log_every == 0:
                print(f"step {step}/{self.config.steps}  {text}", flush=True)
        elif last or time.monotonic() - self.drawn > REFRESH:
            self.drawn = time.monotonic()
            self.bar.update(self.task, completed=step, description=text, refresh=True)

    def evaluation(self, step, values):
        self.write({"step": step, "evaluation": values, "floor": self.floor})
        told = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        floor = "" if self.floor is None else f"  (best possible {self.floor:.4f})"
        self.say(f"evaluation after step {step}: {told}{floor}")

    def write(self, record):
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")

    def say(self, text):
        if self.show and self.bar is None:
            print(text, flush=True)
        elif self.show:
            self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self):
        if self.file is not None:
            self.file.close()
        if self.bar is not None:
            self.bar.stop()


def kept_lines(path, step):
    """The lines of an older log up to `step`.

    A run that was killed logged steps after its last checkpoint: they come again.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    kept = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:  # the line a kill cut off
            break
        if record["step"] <= step:
            kept.append(line)
    return kept


def describe(run):
    """What config.json holds."""
    model = run.model
    return {
        "training": run.config.settings(),
        "model": vars(model.config),
        "techniques": [
            {"name": a.name, "type": type(a.technique).__name__, "settings": a.technique.settings()}
            for a in model.attachments
        ],
        "examples": len(run.data),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "device": str(run.world.device),
        "processes": run.world.size,
        "torch": torch.__version__,
    }


def progress_bar():
    """A rich bar that draws only when told to: no thread beside the one that computes."""
    from rich import progress

    columns = (
        progress.TextColumn("step {task.completed}/{task.total}"),
        progress.BarColumn(),
        progress.TextColumn("{task.description}"),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, auto_refresh=False)
