r"""`python -m minipeft.prune_study`: what the ways of pruning cost, measured on the shipped base.

Four comparisons, each over several seeds, in nats a document on text nobody trained on:

    once         half of the weights zero, anywhere or 2:4, nothing trained afterwards:
                 magnitude, Wanda, SparseGPT                    the seed draws the calibration text
    structured   half the heads and half the neurons taken out, ranked by gates, by Taylor terms,
                 or at random; before and after training on     the seed draws both texts
    gradual      four fifths of the weights zero: at once and then trained, or on the cubic
                 schedule in the same number of steps           the seed draws the text
    tickets      a small model trained from scratch, pruned by half again and again: the winning
                 ticket, its mask shuffled, its mask on another initialisation (embeddings
                 too); all of a seed read the same text in the same order

Cells are kept in results.json as they finish, so a measurement that was stopped goes on. Beside it
lies shrink.json: `minipeft shrink` on the dialect, one run.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path

import torch

from minipeft import compare, figures, technique, town
from minipeft.atomic import write_atomically, write_json
from minipeft.compressed import lottery_ticket as lottery
from minipeft.compressed.importance import gate_importance, least_important, taylor_importance
from minipeft.compressed.magnitude_pruning import MagnitudePruning, prune_magnitude, sparsity_of
from minipeft.compressed.sparsegpt import prune_sparsegpt
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.compressed.wanda import prune_wanda
from minipeft.dataset import Example, encode_all
from minipeft.doctor import machine
from minipeft.evaluation import nats
from minipeft.gpt import GPT, GPTConfig
from minipeft.prune import CALIBRATION, ShrinkOptions, batches_of, shrink
from minipeft.training import TrainingConfig, train

METHODS = {"magnitude": None, "Wanda": prune_wanda, "SparseGPT": prune_sparsegpt}
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": (2, 4)}}
RANKINGS = ("gates", "Taylor", "at random")
TICKETS = ("winning ticket", "random places", "another start")


@dataclass(frozen=True)
class Plan:
    """How much to do. share: of heads and neurons. sparsity: of `gradual`. steps: of training on;
    ticket_steps: of each round; rounds: how often the tickets are halved.
    """

    share: float = 0.5
    sparsity: float = 0.8
    steps: int = 150
    batch_size: int = 16
    learning_rate: float = 1e-3
    documents: int = 2400
    rounds: int = 4
    ticket_steps: int = 400
    ticket_width: int = 64

    def training(self, steps, seed, learning_rate=None):
        """The training loop's settings."""
        rate = learning_rate or self.learning_rate
        return TrainingConfig(steps, self.batch_size, rate, seed=seed, pool=8, device="cpu")


class Bench:
    """The base, its tokenizer, and the text of one seed."""

    def __init__(self, plan, seed):
        self.plan, self.seed = plan, seed
        self.base, self.tokenizer = town.load_base()
        texts = town.pretraining_documents(seed + 1, plan.documents)  # the base saw seed 0's
        self.examples = [Example(completion=t) for t in texts]
        self.rows = encode_all(self.examples, self.tokenizer, self.base)
        self.test = [Example(completion=t) for t in town.held_out()]

    def batches(self):
        return batches_of(self.examples[:CALIBRATION], self.tokenizer, self.base)

    def score(self, model):
        return nats(model, self.test, self.tokenizer)

    def train(self, model, steps, **options):
        rate = options.pop("learning_rate", None)
        train(model, self.rows, self.plan.training(steps, self.seed, rate), show=False, **options)


def once(bench):
    """{arm: nats} without any training."""
    found = {}
    for pattern, how in PATTERNS.items():
        for method, act in METHODS.items():
            model = copy.deepcopy(bench.base)
            if act is None:
                prune_magnitude(model, **how)
            else:
                act(model, bench.batches(), **how)
            if sparsity_of(model) != 0.5:
                raise RuntimeError(
                    f"{method}, {pattern}: {sparsity_of(model)} of the weights are 0"
                )
            found[f"{method}, {pattern}"] = bench.score(model)
    return found


def structured(bench):
    """{arm: nats}, before and after training on."""
    found = {}
    for ranking in RANKINGS:
        model, share = copy.deepcopy(bench.base), bench.plan.share
        gone = {k: least_important(rank(bench, ranking, k), share) for k in ("heads", "neurons")}
        prune_neurons(prune_heads(model, gone["heads"]), gone["neurons"])
        found[f"{ranking}, before"] = bench.score(model)
        bench.train(model, bench.plan.steps)
        found[f"{ranking}, trained on"] = bench.score(model)
    return found


def rank(bench, ranking, kind):
    """Importances of one kind of unit by one of RANKINGS."""
    if ranking != "at random":
        measure = {"gates": gate_importance, "Taylor": taylor_importance}[ranking]
        return measure(bench.base, bench.batches(), kind)
    generator = torch.Generator().manual_seed(bench.seed)
    sizes = [b.attn.n_head if kind == "heads" else b.mlp.up.out_features for b in bench.base.blocks]
    return [torch.rand(n, generator=generator, dtype=torch.float64) for n in sizes]


def gradual(bench):
    """{arm: nats} of the same number of steps, all at once or on the schedule."""
    found = {}
    for arm, on_schedule in (("at once", False), ("on the cubic schedule", True)):
        model = copy.deepcopy(bench.base)
        MagnitudePruning(bench.plan.sparsity, gradual=on_schedule).attach(model)
        bench.train(model, bench.plan.steps)
        found[arm] = bench.score(technique.merge(model))
    return found


def tickets(bench):
    """{arm: {kept share of the weights: nats}}"""
    plan = bench.plan
    config = GPTConfig(
        bench.base.config.vocab_size, 128, n_layer=2, n_head=2, d_model=plan.ticket_width
    )
    model, other = small_model(config, bench.seed), small_model(config, bench.seed + 100)

    def fit(model, after_step):
        bench.train(model, plan.ticket_steps, after_step=after_step, learning_rate=3e-3)
        return bench.score(model)

    found = {arm: {} for arm in TICKETS}
    for ticket in lottery.find_tickets(model, fit, plan.rounds, rate=0.5):
        kept = f"{1 - ticket.sparsity:.4f}"
        found["winning ticket"][kept] = ticket.outcome
        if ticket.round == 0:
            continue
        shuffled = lottery.random_masks(ticket.masks, bench.seed)
        start = lottery.snapshot(other)
        twin = copy.deepcopy(other)
        found["random places"][kept] = lottery.train_ticket(twin, fit, ticket.start, shuffled)
        found["another start"][kept] = lottery.train_ticket(twin, fit, start, ticket.masks)
    return found


def small_model(config, seed):
    """An untrained model, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GPT(config)


COMPARISONS = {"once": once, "structured": structured, "gradual": gradual, "tickets": tickets}


def study(folder, plan=None, seeds=(0, 1, 2), say=print):
    """Run what is missing, then write results.json, table.md, tickets.png and pictures.json into
    `folder`. Returns the results.

    Raises ValueError when the folder holds results of another plan.
    """
    folder, plan = Path(folder), plan or Plan()
    results = begin(folder, plan)
    done = {(c["comparison"], c["seed"]) for c in results["cells"]}
    for seed in seeds:
        bench = None
        for name, run in COMPARISONS.items():
            if (name, seed) in done:
                continue
            bench = bench or Bench(plan, seed)
            results["cells"].append({"comparison": name, "seed": seed, "nats": run(bench)})
            write_json(folder / "results.json", results)
            say(f"seed {seed}: {name} is done")
    publish(results, folder)
    return results


def begin(folder, plan):
    """The results so far, or empty ones with the base's own."""
    path = folder / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
        if results["plan"] != asdict(plan):
            raise ValueError(f"{folder} holds results of {results['plan']}, not {asdict(plan)}")
        return results
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = town.load_base()
    test = [Example(completion=t) for t in town.held_out()]
    return {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "plan": asdict(plan),
        "best": town.mix_floor(),
        "base": nats(base, test, tokenizer),
        "cells": [],
    }


def publish(results, folder):
    """table.md, tickets.png and pictures.json from the results alone."""
    write_atomically(folder / "table.md", (tables(results) + "\n").encode())
    curves = {arm: ticket_curve(results, arm) for arm in TICKETS}
    references = {"best possible": results["best"]}
    name = "tickets.png"
    _, alt = figures.families(
        folder / name,
        curves,
        references,
        "Lottery tickets: the same masks, other places, another start",
        "share of the projections' weights that is kept, %",
        "nats a document",
    )
    write_json(folder / "pictures.json", {name: alt})


def values(results, comparison, arm):
    """One value a seed."""
    cells = sorted(
        (c["seed"], c["nats"]) for c in results["cells"] if c["comparison"] == comparison
    )
    return [found[arm] for _, found in cells]


def ticket_curve(results, arm):
    """[(share kept in %, mean nats over seeds)], the smallest share first."""
    runs = values(results, "tickets", arm)
    return sorted((100 * float(k), statistics.mean(r[k] for r in runs)) for k in runs[0])


def tables(results):
    """Markdown: one table a comparison, mean and spread over seeds."""
    plan, written = results["plan"], []
    titles = {
        "once": "Half of the weights zero, nothing trained afterwards",
        "structured": f"{100 * plan['share']:.0f} % of the heads and neurons out, "
        f"then {plan['steps']} steps",
        "gradual": f"{100 * plan['sparsity']:.0f} % of the weights zero, {plan['steps']} steps",
    }
    for comparison, title in titles.items():
        arms = next(c["nats"] for c in results["cells"] if c["comparison"] == comparison)
        rows = [[arm, *against_base(results, values(results, comparison, arm))] for arm in arms]
        rows.append(["the base itself", f"{results['base']:.3f}", "-"])
        written.append(compare.markdown(title, ["how", "nats a document", "above the base"], rows))
    kept = [share for share, _ in ticket_curve(results, "random places")]
    rows = [[arm, *ticket_row(results, arm, kept)] for arm in TICKETS]
    rows.append(["dense", *[f"{ticket_curve(results, TICKETS[0])[-1][1]:.3f}"] * len(kept)])
    head = ["nats a document at", *[f"{share:.1f} % kept" for share in kept]]
    title = f"A model of width {plan['ticket_width']}, {plan['ticket_steps']} steps from scratch"
    return "\n\n".join([*written, compare.markdown(title, head, rows)])


def against_base(results, numbers):
    """(mean and spread, how much more than the base)"""
    return with_spread(numbers), f"{statistics.mean(numbers) - results['base']:.3f}"


def ticket_row(results, arm, kept):
    """Mean and spread of an arm at each share kept, in %."""
    runs = values(results, "tickets", arm)
    by_share = {round(100 * float(k), 6): [r[k] for r in runs] for k in runs[0]}
    return [with_spread(by_share[round(share, 6)]) for share in kept]


def with_spread(numbers):
    """The mean and the standard deviation over seeds."""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    return f"{statistics.mean(numbers):.3f} ± {spread:.3f}"


def shrink_once(folder, options=None):
    """The pipeline's table as shrink.json, unless it is there; its models are not kept."""
    from minipeft.cli import material

    options = options or ShrinkOptions(device="cpu")
    path = Path(folder) / "shrink.json"
    if path.exists():
        return
    with tempfile.TemporaryDirectory() as out:
        found = material(options.task, options.data, options.seed)
        shrink(replace(options, out=Path(out)), found)
        write_atomically(path, (Path(out) / "results.json").read_bytes())


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = town.data_folder() / "results" / "pruning"
    study(FOLDER)
    shrink_once(FOLDER)
