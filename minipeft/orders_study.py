r"""Do the orders that papers report hold here? LoRA's matrices, AdaLoRA's budget, QLoRA's price.

    python -m minipeft.orders_study --tasks dialect mood slot_tagging --seeds 0 1 2

Each group trains the same number of parameters at the end, so what differs is where they are:

    pairs    LoRA (Hu et al., 2021, arXiv 2106.09685, table 5): which two of W_q, W_k, W_v, W_o, at
             rank 8
    budget   AdaLoRA (Zhang et al., 2023, arXiv 2303.10512): ranks spread by importance or all equal
    bits     QLoRA (Dettmers et al., 2023, arXiv 2305.14314): the base in NF4 or in float32

compare.py runs the cells and goes on where an interrupted run stopped. `verdicts` says of each
order whether it holds: on which tasks, in how many seeds.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minipeft.compare import Plan, compare
from minipeft.low_rank.adalora import AdaLoRA
from minipeft.low_rank.lora import LoRA
from minipeft.presets import EVERY, Preset
from minipeft.quantized.qlora import QLoRA

ALL_RATE = 3e-3  # of low-rank changes on all six projections, as in presets.py
PAIRS = ("qk", "qv", "qo", "kv", "ko", "vo")
ORDERS = {  # what the papers lead one to expect: {claim: (expected to be better, than)}
    "AdaLoRA over LoRA, q and v": ("AdaLoRA qv", "LoRA qv"),
    "AdaLoRA over LoRA, all projections": ("AdaLoRA all", "LoRA all"),
    "QLoRA equal to LoRA, all projections": ("QLoRA all", "LoRA all"),
} | {
    f"q and v over {' and '.join(other)}": ("LoRA qv", f"LoRA {other}")
    for other in PAIRS
    if other != "qv"
}


def orders_plan(tasks, seeds=(0,), steps=None):
    """The comparison as a compare.Plan."""
    techniques = {f"LoRA {pair}": Preset(LoRA(8, 16, targets=tuple(pair))) for pair in PAIRS}
    techniques |= {
        "LoRA all": Preset(LoRA(8, 16, targets=EVERY), ALL_RATE),
        "QLoRA all": Preset(QLoRA(rank=8, alpha=16, dropout=0.0), ALL_RATE),
        "AdaLoRA qv": Preset(AdaLoRA(init_rank=12, target_rank=8)),
        "AdaLoRA all": Preset(AdaLoRA(init_rank=12, target_rank=8, targets=EVERY)),
    }
    return Plan(techniques, tuple(tasks), tuple(seeds), steps)


def verdicts(results):
    """[(claim, task, mean of the one, mean of the other, seeds in which the one is better, seeds)]
    for every order and task of a results file.
    """
    found = []
    for claim, (one, other) in ORDERS.items():
        for task, facts in results["tasks"].items():
            pairs = paired(results["cells"], task, one, other)
            if pairs:
                means = [sum(side) / len(pairs) for side in zip(*pairs)]
                sign = -1 if facts["metric"] == "nats" else 1
                wins = sum(sign * (a - b) > 0 for a, b in pairs)
                found.append((claim, task, *means, wins, len(pairs)))
    return found


def paired(cells, task, one, other):
    """[(quality of one, quality of other)] for the seeds that both have."""
    runs = {
        name: {
            c["seed"]: c["quality"] for c in cells if (c["technique"], c["task"]) == (name, task)
        }
        for name in (one, other)
    }
    return [(runs[one][s], runs[other][s]) for s in sorted(runs[one].keys() & runs[other].keys())]


def verdict_table(found):
    """(title, head, rows) of `verdicts`."""
    rows = [
        [claim, task, f"{a:.3f}", f"{b:.3f}", f"{wins} of {seeds}"]
        for claim, task, a, b, wins, seeds in found
    ]
    return "orders that papers report", ["order", "task", "first", "second", "seeds"], rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.orders_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    tasks = ["dialect", "mood", "slot_tagging"]
    add("--tasks", nargs="+", default=tasks, help="names of Tiny Town's tasks")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    add("--steps", type=int, help="optimizer steps; each task's own number if not given")
    add("--jobs", type=int, default=1, help="cells to run at the same time")
    add("--out", type=Path, default=Path("runs/orders"), help="folder for results and pictures")
    given = parser.parse_args(argv)
    compare(orders_plan(given.tasks, given.seeds, given.steps), given.out, jobs=given.jobs)


if __name__ == "__main__":
    sys.exit(main())
