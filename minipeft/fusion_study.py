r"""AdapterFusion on a mixed task (Pfeiffer et al., 2020, arXiv 2005.00247), run on Tiny Town.

    python -m minipeft.fusion_study --tasks mood question_answering slot_tagging --seeds 0 1 2

Stage one trains one adapter on each source task. The mixed task asks all of them, in any order,
without saying which is asked. Compared on it:

    each source adapter alone, as stage one left it
    AdapterFusion over all of them: only the attention over them learns from the mix
    one new adapter of the same size, trained on the mix for as many steps

A quality is the mean over the source tasks, each in its own metric (all are shares of right
answers). How this differs from the paper: there the target is a task of its own, here it is made of
the sources, so that what the fusion has to find is known: the right adapter at each document.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from minipeft.additive.adapter import Adapter
from minipeft.additive.adapter_fusion import AdapterFusion, extract_knowledge
from minipeft.compare import shown, title, write_study
from minipeft.dataset import encode_all
from minipeft.doctor import machine
from minipeft.evaluation import METRICS
from minipeft.technique import set_adapter
from minipeft.town import TASKS, load_base
from minipeft.training import TrainingConfig, train

FUSION, FRESH = "AdapterFusion", "one new adapter"


@dataclass(frozen=True)
class FusionPlan:
    """tasks: the sources. steps: of the mix (None: the mean of the sources' own)."""

    tasks: tuple[str, ...] = ("mood", "question_answering", "slot_tagging")
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    bottleneck: int = 16
    batch_size: int = 16

    def __post_init__(self):
        for task in self.tasks:
            if task not in TASKS or TASKS[task].metric == "nats":
                shares = [name for name, t in TASKS.items() if t.metric != "nats"]
                raise ValueError(
                    f"tasks={task!r} has no share of right answers; choose of {shares}"
                )

    def adapter(self):
        return Adapter(placement="pfeiffer", bottleneck=self.bottleneck)

    def mixed_steps(self):
        return self.steps or round(statistics.mean(TASKS[t].steps for t in self.tasks))


def mixed(plan, seed):
    """Training examples of all source tasks, equally many of each, shuffled."""
    rng = random.Random(f"mixed/{seed}")
    lists = [TASKS[task].train(seed) for task in plan.tasks]
    each = max(map(len, lists))
    examples = [rng.choice(few) if n >= len(few) else few[n] for few in lists for n in range(each)]
    rng.shuffle(examples)
    return examples


def run_seed(plan, base, tokenizer, seed):
    """[{name, seed, qualities: {task: share}, quality: their mean}] of one seed."""
    model = copy.deepcopy(base)

    def learn(model, examples, steps):
        config = TrainingConfig(steps, plan.batch_size, seed=seed, device="cpu")
        train(model, encode_all(examples, tokenizer), config, show=False)

    def record(name):
        qualities = {
            t: METRICS[TASKS[t].metric](model, TASKS[t].test(), tokenizer) for t in plan.tasks
        }
        mean = statistics.mean(qualities.values())
        return {"name": name, "seed": seed, "qualities": qualities, "quality": mean}

    torch.manual_seed(seed)
    examples = mixed(plan, seed)
    extract_knowledge(
        model,
        {task: task for task in plan.tasks},
        lambda model, task: learn(model, TASKS[task].train(seed), plan.steps or TASKS[task].steps),
        plan.adapter(),
    )
    found = []
    for task in plan.tasks:
        set_adapter(model, task)
        found.append(record(f"adapter of {title(task).lower()}"))
    set_adapter(model, [])
    AdapterFusion(adapters=plan.tasks).attach(model, "fusion")
    learn(model, examples, plan.mixed_steps())
    found.append(record(FUSION))

    model = copy.deepcopy(base)
    plan.adapter().attach(model)
    learn(model, examples, plan.mixed_steps())
    return [*found, record(FRESH)]


def run(plan, folder, say=print):
    """Run the study; write results.json, table.md and pictures.json (empty) to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        base, tokenizer = load_base()
        cells = []
        for seed in plan.seeds:
            cells += run_seed(plan, base, tokenizer, seed)
            say(f"seed {seed}: " + ", ".join(f"{c['name']} {c['quality']:.3f}" for c in cells[-5:]))
    finally:
        torch.set_num_threads(threads)
    results = {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "plan": asdict(plan),
        "cells": cells,
    }
    write_study(folder, results, table(results))
    return results


def table(results):
    """(title, head, rows): a row a way, the mixed task first, then each source task."""
    tasks = list(results["plan"]["tasks"])
    rows = []
    for name in dict.fromkeys(c["name"] for c in results["cells"]):
        cells = [c for c in results["cells"] if c["name"] == name]
        columns = [[c["quality"] for c in cells]]
        columns += [[c["qualities"][task] for c in cells] for task in tasks]
        spread = [statistics.stdev(v) if len(v) > 1 else None for v in columns]
        rows.append([name, *(shown(statistics.mean(v), s) for v, s in zip(columns, spread))])
    head = ["what answers", "mixed", *(title(task).lower() for task in tasks)]
    return (
        f"a mixed task, share of right answers, seeds {list(results['plan']['seeds'])}",
        head,
        rows,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.fusion_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=list(FusionPlan.tasks), help="names of the source tasks")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    add("--steps", type=int, help="optimizer steps of every training; the tasks' own if not given")
    add("--bottleneck", type=int, default=16, help="width of the adapters")
    add("--out", type=Path, default=Path("runs/fusion"), help="folder for the results")
    given = parser.parse_args(argv)
    plan = FusionPlan(tuple(given.tasks), tuple(given.seeds), given.steps, given.bottleneck)
    run(plan, given.out)


if __name__ == "__main__":
    sys.exit(main())
