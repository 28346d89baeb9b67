r"""What the terms of T-Few's loss are worth (Liu et al., 2022, arXiv 2205.05638), on Tiny Town.

    python -m minipeft.t_few_study --seeds 0 1 2

The mood of a story is asked with few examples to learn from, and IA3 is trained on them with

    language modelling       the right answer becomes likely
    + unlikelihood           and the wrong one unlikely
    + length-normalised      and the right one wins the comparison of means over tokens

Then rank classification answers the test questions twice: by the mean log-probability of an
answer's tokens and by their sum. Where both answers have the same number of tokens these agree, so
the task is asked in a second form, whose "no" goes on with a sentence: the sum charges it for
every word of that, the mean does not.

How this differs from the paper: there the three are taken away one at a time, on eleven data sets,
from a model of 3 billion parameters.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path

import torch

from minipeft.additive.ia3 import IA3
from minipeft.additive.t_few import TFewLoss, questions, rank_classify
from minipeft.compare import shown, write_study
from minipeft.dataset import Example, encode_all
from minipeft.doctor import machine
from minipeft.town import TASKS, load_base
from minipeft.training import TrainingConfig, train

BASE = "nothing"
LOSSES = {  # weights of (T-Few 5)
    "language modelling": (1.0, 0.0, 0.0),
    "+ unlikelihood": (1.0, 1.0, 0.0),
    "+ length-normalised": (1.0, 1.0, 1.0),
}
FORMS = {  # how each label of the task is said
    "short answers": {"yes": " yes .", "no": " no ."},
    "a long no": {"yes": " yes .", "no": " no . It was a bad day ."},
}
COMPARED = {"mean": 1.0, "sum": 0.0}  # by which score: the length power of (T-Few 3)


@dataclass(frozen=True)
class TFewPlan:
    """examples: how many there are to learn from. steps: optimizer steps. seeds: one run each; a
    seed draws the examples, too.
    """

    examples: int = 128
    steps: int = 250
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 8

    def __post_init__(self):
        most = len(TASKS["mood"].train(0))
        if not 1 <= self.examples <= most:
            raise ValueError(f"examples={self.examples} must be from 1 to {most}")


def said(examples, form):
    """The task's examples with the answers of a form."""
    return [Example(x.prompt, FORMS[form][x.label], x.label) for x in examples]


def learn(model, examples, form, tokenizer, weights, plan, seed):
    """Attach IA3 and train it on questions with these weights of the three terms."""
    examples = said(examples, form)
    asked = questions(examples, tokenizer, FORMS[form].values())
    torch.manual_seed(seed)
    IA3().attach(model)
    config = TrainingConfig(plan.steps, plan.batch_size, seed=seed, device="cpu")
    data = encode_all(examples, tokenizer, model)
    return train(model, data, config, loss_fn=TFewLoss(asked, weights), show=False)


def shares(model, examples, form, tokenizer):
    """{score compared: share of right answers}."""
    asked = questions(said(examples, form), tokenizer, FORMS[form].values())
    right = torch.tensor([q.correct for q in asked])
    return {
        name: (rank_classify(model, asked, power).cpu() == right).double().mean().item()
        for name, power in COMPARED.items()
    }


def run(plan, folder, say=print):
    """Run the study; write results.json, table.md and pictures.json (empty) to `folder`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    test, cells = TASKS["mood"].test(), []
    try:
        base, tokenizer = load_base()
        for form in FORMS:
            found = shares(base, test, form, tokenizer)
            cells.append({"form": form, "loss": BASE, "seed": 0, "shares": found})
        for seed, form, loss in itertools.product(plan.seeds, FORMS, LOSSES):
            model, examples = copy.deepcopy(base), TASKS["mood"].train(seed)[: plan.examples]
            done = learn(model, examples, form, tokenizer, LOSSES[loss], plan, seed)
            found = shares(model, test, form, tokenizer)
            cell = {"form": form, "loss": loss, "seed": seed, "shares": found}
            cells.append(cell | {"seconds": done.seconds})
            text = ", ".join(f"by {name} {share:.3f}" for name, share in found.items())
            say(f"seed {seed}, {form}, {loss}: {text}")
    finally:
        torch.set_num_threads(threads)
    results = {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "plan": asdict(plan),
        "best": TASKS["mood"].best,
        "cells": cells,
    }
    write_study(folder, results, table(results))
    return results


def table(results):
    """(title, head, rows): a row a loss, a column a form and a score compared."""
    plan = results["plan"]
    columns = list(itertools.product(FORMS, COMPARED))
    rows = []
    for loss in (BASE, *LOSSES):
        row = [loss]
        for form, by in columns:
            chosen = (form, loss)
            found = [c["shares"][by] for c in results["cells"] if (c["form"], c["loss"]) == chosen]
            spread = statistics.stdev(found) if len(found) > 1 else None
            row.append(shown(statistics.mean(found), spread))
        rows.append(row)
    rows.append(["best possible", *[shown(results["best"])] * len(columns)])
    head = ["IA3 trained with", *(f"{form}, by {by}" for form, by in columns)]
    title = (
        f"moods from {plan['examples']} examples in {plan['steps']} steps, share of right answers, "
        f"seeds {list(plan['seeds'])}"
    )
    return title, head, rows


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m minipeft.t_few_study", description=__doc__.splitlines()[0]
    )
    add = parser.add_argument
    add("--examples", type=int, default=TFewPlan.examples, help="stories to learn from")
    add("--steps", type=int, default=TFewPlan.steps, help="optimizer steps of every training")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="one run each")
    add("--out", type=Path, default=Path("runs/t_few"), help="folder for the results")
    given = parser.parse_args(argv)
    run(TFewPlan(given.examples, given.steps, tuple(given.seeds)), given.out)


if __name__ == "__main__":
    sys.exit(main())
