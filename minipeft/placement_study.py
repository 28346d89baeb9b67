r"""He et al.'s study of placement (2021, arXiv 2110.04366, section 4), run on Tiny Town.

    python -m minipeft.placement_study --tasks dialect mood --seeds 0 1 2

Where should a learned change be put: behind a sub-layer or beside it, at attention or at the
feed-forward layer? Every technique of `hybrid.mam_adapter.placement_study` trains nearly the same
number of parameters; compare.py runs them, goes on where an interrupted run stopped, and writes the
table and the pictures.

How this differs from the paper: its tasks are summarisation and translation, its adapters share one
learning rate, as here; the flat prefix keeps its own, without which it hardly moves, and the mix of
both has one between them, chosen on validation examples.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from minipeft.compare import Plan, compare
from minipeft.hybrid.mam_adapter import placement_study
from minipeft.presets import Preset

MIX_RATE = 1e-2  # between its adapter's 4e-3 and its flat prefix's 6e-2


def placement_plan(tasks, seeds=(0,), steps=None, bottleneck=16, scale=4.0, **settings):
    """The comparison as a compare.Plan; `settings` are more of its fields."""
    study = placement_study(bottleneck, scale)
    rates = {"mix and match": MIX_RATE}
    techniques = {name: Preset(technique, rates.get(name)) for name, technique in study.items()}
    return Plan(techniques, tuple(tasks), tuple(seeds), steps, **settings)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.placement_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--tasks", nargs="+", default=["dialect", "mood"], help="names of Tiny Town's tasks")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    add("--steps", type=int, help="optimizer steps; each task's own number if not given")
    add("--bottleneck", type=int, default=16, help="width of the adapters, and of all the rest")
    add("--scale", type=float, default=4.0, help="s of the scaled adapters")
    add("--jobs", type=int, default=1, help="cells to run at the same time")
    add("--out", type=Path, default=Path("runs/placement"), help="folder for results and pictures")
    given = parser.parse_args(argv)
    sizes = given.steps, given.bottleneck, given.scale
    compare(placement_plan(given.tasks, given.seeds, *sizes), given.out, jobs=given.jobs)


if __name__ == "__main__":
    sys.exit(main())
