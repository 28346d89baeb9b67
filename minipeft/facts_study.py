r"""How the new facts should be trained, chosen on facts and a seed that no result is reported on.

    python -m minipeft.facts_study --steps 800 1000 --starts 0 16

The task trains two forms of 96 facts and asks in a third. `as_learned` comes out right long before
the third form does: what is learned is tied to the place the name has in the two forms. Tried
against that, one run each:

    steps      more passes over the facts
    factor     of every technique's learning rate
    starts     half the batches moved by up to so many positions, as pre-training moved its own
    rehearse   the third form kept in use: every other resident's facts asked in it besides

The runs are committed in data/results/new_facts/choice.json. The task's own `steps` and
`random_starts` are what came of them; `minipeft compare --tasks new_facts` measures these on the
task's own facts.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from minipeft.atomic import write_json
from minipeft.compare import markdown, shown, summary
from minipeft.dataset import encode_all
from minipeft.doctor import machine
from minipeft.evaluation import METRICS
from minipeft.presets import PRESETS
from minipeft.town import load_base
from minipeft.town.tasks import ALL_FACTS, WORLD, ask, new_facts
from minipeft.training import TrainingConfig, train

DRAW, SEED = "world for choosing", 7  # facts and seed that no reported result has
TECHNIQUES = ("full", "LoRA all", "Houlsby")  # those with room for all facts


@dataclass(frozen=True)
class Way:
    """One way to train the new facts; every field is told in the study's docstring."""

    technique: str
    steps: int
    starts: int = 0
    factor: float = 1.0
    rehearse: bool = False


def examples_of(way):
    """(what to train on, what to test on)."""
    names = [p.name for p in WORLD.residents][::2]
    besides = [ask(f, "what is") for f in ALL_FACTS if f[0] in names] if way.rehearse else []
    return [*new_facts("train", SEED, DRAW), *besides], new_facts("test", 0, DRAW)


def run(way, base, tokenizer):
    """Train in this way; the record of what came of it, shares of exact answers."""
    torch.manual_seed(SEED)
    model, preset = copy.deepcopy(base), PRESETS[way.technique]
    preset.technique.attach(model)
    config = TrainingConfig(
        steps=way.steps,
        learning_rate=preset.rate * way.factor,
        random_starts=way.starts,
        seed=SEED,
        device="cpu",
    )
    examples, test = examples_of(way)
    result = train(model, encode_all(examples, tokenizer), config, show=False)
    exact = METRICS["exact"]
    learned = new_facts("validation", 0, DRAW)
    return asdict(way) | {
        "quality": exact(model, test, tokenizer),
        "as_learned": exact(model, learned, tokenizer),
        "seconds": result.seconds,
    }


def choice_table(found):
    """(title, head, rows) of the runs: a row a way, a column a technique."""
    ways = dict.fromkeys((r["steps"], r["starts"], r["factor"], r["rehearse"]) for r in found)
    rows = []
    for way in sorted(ways, key=lambda w: (w[1], w[3], w[0], -w[2])):
        steps, starts, factor, rehearse = way
        row = [
            f"{steps}",
            f"0 .. {starts}" if starts else "0",
            f"{factor:g}",
            "yes" if rehearse else "no",
        ]
        for name in TECHNIQUES:
            same = [
                r["quality"]
                for r in found
                if (r["technique"], r["steps"], r["starts"], r["factor"], r["rehearse"])
                == (name, *way)
            ]
            row.append(f"{same[0]:.2f}" if same else "-")
        rows.append(row)
    head = ["steps", "moved by", "rate times", "rehearsed", *TECHNIQUES]
    return "other facts, seed 7, asked in the third form", head, rows


def facts_table(results, before):
    """(title, head, rows): the reported facts as the task trains them now, beside `before`."""
    task, rows = "new_facts", []
    facts, was = results["tasks"][task], before["tasks"][task]
    for name in results["plan"]["techniques"]:
        values = [summary(results, task, name, v)[0] for v in ("as_learned", "old_facts")]
        row = [shown(*summary(r, task, name)[:2]) for r in (before, results)]
        rows.append([name, f"{results['costs'][name]['trained']:,}", *row, *map(shown, values)])
    head = ["technique", "trained", f"{was['steps']} steps, at fixed places"]
    head += [f"{facts['steps']} steps, moved", "in a trained form", "old facts kept"]
    return f"new facts, mean over seeds {results['plan']['seeds']}", head, rows


def report(choice, results, before):
    """Both tables as Markdown."""
    tables = facts_table(results, before), choice_table(choice["runs"])
    return "\n\n".join(markdown(*table) for table in tables)


def main(argv=None):
    """Try the ways of the grid, write choice.json, print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.facts_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--techniques", nargs="+", default=list(TECHNIQUES), help="names of presets")
    add("--steps", nargs="+", type=int, default=[800, 1000], help="optimizer steps to try")
    add("--starts", nargs="+", type=int, default=[0, 16], help="largest moves to try")
    add("--factors", nargs="+", type=float, default=[1.0], help="of every learning rate")
    add("--rehearse", action="store_true", help="with every other resident's facts besides")
    add("--out", type=Path, default=Path("runs/facts"), help="folder for choice.json")
    given = parser.parse_args(argv)
    base, tokenizer = load_base()
    grid = itertools.product(given.techniques, given.steps, given.starts, given.factors)
    runs = [run(Way(*way, given.rehearse), base, tokenizer) for way in grid]
    given.out.mkdir(parents=True, exist_ok=True)
    choice = {"date": date.today().isoformat(), "machine": machine() | {"threads": 1}, "runs": runs}
    write_json(given.out / "choice.json", choice)
    print(markdown(*choice_table(runs)))


if __name__ == "__main__":
    sys.exit(main())
