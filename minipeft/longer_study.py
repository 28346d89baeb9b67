r"""Does what hardly learns in the comparison learn when it is given three times the steps?

    python -m minipeft.longer_study --steps 900 --seeds 0 1 2

Pairs of a technique and a task on which compare.py's table shows next to nothing learned, in most
seeds or all: soft prompts where a table becomes text, diff pruning and AdapterDrop (without the
first layer) on the mood. Prompt tuning is also tried from another start (random numbers) and with
three times its rate. Every run is one of compare.py's cells, so an interrupted study goes on where
it stopped. The table sets each pair beside the same pair in the committed comparison.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from datetime import date
from pathlib import Path

from minipeft.atomic import write_json
from minipeft.compare import BASE, Plan, markdown, run_cells, summary, task_facts, title
from minipeft.doctor import machine
from minipeft.presets import PRESETS, Preset
from minipeft.soft_prompt.prompt_tuning import PromptTuning
from minipeft.town import TASKS, base_folder, data_folder

LEARNED = 0.9  # a run that reaches this has learned the task: runs either do or stay far below
PROMPT = PRESETS["prompt"]
WRITTEN = 0.97  # what is asked of every technique where a format is rewritten
VARIANTS = {  # {name in the table: (the preset it varies, Preset)}
    "prompt, from random numbers": ("prompt", Preset(PromptTuning(16, "random"), PROMPT.rate)),
    "prompt, three times the rate": ("prompt", Preset(PROMPT.technique, 3 * PROMPT.rate)),
}
PAIRS = {  # {technique: tasks}
    "prompt": ("table_to_text",),
    "P-tuning": ("table_to_text",),
    **dict.fromkeys(VARIANTS, ("table_to_text",)),
    "diff pruning": ("mood",),
    "AdapterDrop": ("mood",),
}


def longer_plans(seeds=(0, 1, 2), steps=900, pairs=None):
    """One compare.Plan for every technique; all of them share a folder."""
    plans = []
    for name, tasks in (pairs or PAIRS).items():
        preset = VARIANTS[name][1] if name in VARIANTS else PRESETS[name]
        plans.append(Plan({name: preset}, tuple(tasks), tuple(seeds), steps))
    return plans


def study(plans, folder, say=print):
    """Run the plans' cells and write results.json; returns the results."""
    folder = Path(folder)
    cells = [c for plan in plans for c in run_cells(plan, base_folder(), folder, 1, say)]
    results = {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "steps": plans[0].steps,
        "seeds": list(plans[0].seeds),
        "tasks": {t: task_facts(TASKS[t], p.steps) for p in plans for t in p.tasks},
        "cells": [c for c in cells if c["technique"] != BASE],
    }
    write_json(folder / "results.json", results)
    return results


def committed(name):
    """The results of a committed comparison."""
    return json.loads((data_folder() / "results" / name / "results.json").read_text())


def qualities(results, technique, task):
    """A pair's qualities in the order of the seeds."""
    found = [c for c in results["cells"] if (c["technique"], c["task"]) == (technique, task)]
    return [c["quality"] for c in sorted(found, key=lambda c: c["seed"])]


def rows(longer, usual):
    """[(technique, task, qualities at the usual steps, qualities at more)] for every pair; what a
    variant is compared with is the preset that it varies.
    """
    pairs = dict.fromkeys((c["technique"], c["task"]) for c in longer["cells"])
    return [
        (
            name,
            task,
            qualities(usual, VARIANTS[name][0] if name in VARIANTS else name, task),
            qualities(longer, name, task),
        )
        for name, task in pairs
    ]


def longer_table(longer, usual):
    """(title, head, rows): seed by seed, because runs either click or do not."""
    steps = sorted({TASKS[task].steps for task in longer["tasks"]})
    head = ["technique", "task", f"{' or '.join(map(str, steps))} steps"]
    head += [f"{longer['steps']} steps", "mean", f"seeds at {LEARNED}"]
    body = []
    for name, task, before, after in rows(longer, usual):
        means = f"{statistics.mean(before):.2f} to {statistics.mean(after):.2f}"
        body.append([name, task, in_turn(before), in_turn(after), means, clicks(before, after)])
    return "longer training, seed by seed", head, body


def in_turn(values):
    return ", ".join(f"{v:.2f}" for v in values)


def clicks(before, after):
    """1 to 3 of 3: how many seeds learned the task."""
    counts = [sum(v >= LEARNED for v in side) for side in (before, after)]
    return f"{counts[0]} to {counts[1]} of {len(after)}"


def told(longer, usual):
    """What the table says, in sentences: which pairs learn in every seed now, which do not."""
    found = rows(longer, usual)
    plain = [r for r in found if r[0] not in VARIANTS]
    whole = [r for r in plain if min(r[3]) >= LEARNED]
    part = [r for r in plain if min(r[3]) < LEARNED <= max(r[3])]
    never = [r for r in plain if max(r[3]) < LEARNED]
    text = [
        f"With {longer['steps']} steps, {len(whole)} of these {len(plain)} pairs reach {LEARNED} "
        f"in every seed{listed(whole)}, {len(part)} in some{listed(part)}, "
        f"{len(never)} in none{listed(never)}."
    ]
    for name, task, _, after in found:
        if name in VARIANTS:
            preset = statistics.mean(qualities(longer, VARIANTS[name][0], task))
            text.append(
                f"{name[0].upper()}{name[1:]}: a mean of {statistics.mean(after):.2f} on "
                f"{title(task).lower()}, where the preset has {preset:.2f} after as many steps."
            )
    return " ".join(text)


def listed(found):
    """The pairs and their means in parentheses; nothing for none."""
    if not found:
        return ""
    parts = [f"{n} on {title(t).lower()}: {statistics.mean(a):.2f}" for n, t, _, a in found]
    return f" ({'; '.join(parts)})"


def shortfalls(usual):
    """Who stays below WRITTEN in the comparison where every technique can write all answers."""
    said = []
    for task in ("table_to_text", "restyling"):
        means = {name: summary(usual, task, name)[0] for name in usual["costs"] if name != BASE}
        short = [f"{name} {mean:.2f}" for name, mean in means.items() if mean < WRITTEN]
        said.append(f"on {title(task).lower()} {', '.join(short) or 'none'}")
    return f"Below {WRITTEN}: {'; '.join(said)}."


def report(longer, usual):
    """Sentences and table as Markdown."""
    text = f"{shortfalls(usual)} {told(longer, usual)}"
    return f"{text}\n\n{markdown(*longer_table(longer, usual))}"


def main(argv=None):
    """Run the study, or go on with it; print its sentences and table."""
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.longer_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--steps", type=int, default=900, help="optimizer steps of every run")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    add("--out", type=Path, default=Path("runs/longer"), help="folder for cells and results")
    given = parser.parse_args(argv)
    results = study(longer_plans(given.seeds, given.steps), given.out)
    print(report(results, committed("all")))


if __name__ == "__main__":
    sys.exit(main())
