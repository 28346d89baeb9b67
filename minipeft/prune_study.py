r"""`python -m minipeft.prune_study`: what the ways of pruning cost, measured on the shipped base.

Four comparisons, each over several seeds, in nats a document on text nobody trained on:

    once         half of the weights zero, anywhere or 2:4, nothing trained afterwards:
                 magnitude, Wanda, SparseGPT                    the seed draws the calibration text
    structured   a share of all heads and of all neurons taken out, chosen in six ways; before and
                 after training on                              the seed draws both texts
    gradual      most of the weights zero: at once and then trained, or on the cubic schedule in
                 the same number of steps                       the seed draws the text
    tickets      a small model trained from scratch, pruned by half again and again: the winning
                 ticket, its mask shuffled, its mask on another initialisation (embeddings
                 too); all of a seed read the same text in the same order

What is gone cannot be ranked again, so an order of importance is true for the model it was made in
and for the next few units alone: `structured` ranks once, or anew before every sixteenth. And it
compares the same share of every layer with the lowest anywhere, in the units of the loss.

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
from minipeft.compressed.importance import (
    KINDS,
    gate_importance,
    least_important,
    sizes_of,
    taylor_importance,
)
from minipeft.compressed.magnitude_pruning import MagnitudePruning, prune_magnitude, sparsity_of
from minipeft.compressed.sparsegpt import prune_sparsegpt
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.compressed.wanda import prune_wanda
from minipeft.dataset import Example, encode_all
from minipeft.doctor import machine
from minipeft.evaluation import nats
from minipeft.gpt import GPT, GPTConfig
from minipeft.prune import CALIBRATION, ShrinkOptions, batches_of, shrink, shrink_anywhere
from minipeft.training import TrainingConfig, train

METHODS = {"magnitude": None, "Wanda": prune_wanda, "SparseGPT": prune_sparsegpt}
PATTERNS = {"50 %": {"sparsity": 0.5}, "2:4": {"pattern": (2, 4)}}
WAYS = {  # how heads and neurons are chosen: (ranking, where and how often)
    "at random": ("random", "once"),
    "Taylor, every layer alike": ("Taylor", "alike"),
    "gates, ranked once": ("gates", "once"),
    "Taylor, ranked once": ("Taylor", "once"),
    "gates, ranked anew": ("gates", "again"),
    "Taylor, ranked anew": ("Taylor", "again"),
}
TICKETS = ("winning ticket", "random places", "another start")


@dataclass(frozen=True)
class Plan:
    """How much to do. shares: of heads and neurons to take out; trained: those that are trained
    on; piece: the share after which they are ranked again. sparsities: of `gradual`. steps: of
    training on, over text that is new in each. documents: that the tickets read; ticket_steps: of
    each round; rounds: how often the tickets are halved.
    """

    shares: tuple = (0.125, 0.25, 0.375, 0.5)
    trained: tuple = (0.25, 0.5)
    piece: float = 0.0625
    sparsities: tuple = (0.8, 0.9)
    steps: int = 600
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

    def settings(self):
        """The values as JSON gives them back."""
        return json.loads(json.dumps(asdict(self)))


class Bench:
    """The base, its tokenizer, and the text of one seed."""

    def __init__(self, plan, seed):
        self.plan, self.seed = plan, seed
        self.base, self.tokenizer = town.load_base()
        count = max(plan.documents, plan.steps * plan.batch_size)
        texts = town.pretraining_documents(seed + 1, count)  # the base saw seed 0's
        self.examples = [Example(completion=t) for t in texts]
        self.rows = encode_all(self.examples, self.tokenizer, self.base)
        self.test = [Example(completion=t) for t in town.held_out()]
        self.batches = batches_of(self.examples[:CALIBRATION], self.tokenizer, self.base)

    def score(self, model):
        return nats(model, self.test, self.tokenizer)

    def train_on(self, model):
        """Train what is left, every document once."""
        plan = self.plan
        rows = self.rows[: plan.steps * plan.batch_size]
        train(model, rows, plan.training(plan.steps, self.seed), show=False)

    def train_ticket(self, model, after_step):
        """Train a small model from scratch."""
        plan = self.plan
        config = plan.training(plan.ticket_steps, self.seed, 3e-3)
        train(model, self.rows[: plan.documents], config, show=False, after_step=after_step)


def once(bench):
    """{arm: nats} without any training."""
    found = {}
    for pattern, how in PATTERNS.items():
        for method, act in METHODS.items():
            model = copy.deepcopy(bench.base)
            if act is None:
                prune_magnitude(model, **how)
            else:
                act(model, bench.batches, **how)
            if sparsity_of(model) != 0.5:
                raise RuntimeError(
                    f"{method}, {pattern}: {sparsity_of(model)} of the weights are 0"
                )
            found[f"{method}, {pattern}"] = bench.score(model)
    return found


def structured(bench):
    """{way: {share: what is left, and {"before": nats, "trained on": nats}}}"""
    found = {}
    for way in WAYS:
        found[way] = {}
        for share in bench.plan.shares:
            model = take_out(bench, way, share)
            if model is None:
                continue
            cell = found[way][f"{share}"] = left_of(model)
            cell["before"] = bench.score(model)
            if share in bench.plan.trained:
                bench.train_on(model)
                cell["trained on"] = bench.score(model)
    return found


def left_of(model):
    """How many parameters, and how many heads and neurons in each layer."""
    count = sum(p.numel() for p in model.parameters())
    return {"parameters": count} | {kind: sizes_of(model, kind) for kind in KINDS}


def take_out(bench, way, share):
    """A copy of the base without that share of its heads and of its neurons; None where no layer's
    heads can be divided so.
    """
    ranking, route = WAYS[way]
    model, plan = copy.deepcopy(bench.base), bench.plan
    if route == "alike":
        if any(share * heads % 1 for heads in sizes_of(model, "heads")):
            return None
        gone = {k: least_important(rank(bench, model, ranking, k), share) for k in KINDS}
        return prune_neurons(prune_heads(model, gone["heads"]), gone["neurons"])
    rounds = round(share / plan.piece) if route == "again" else 1
    return shrink_anywhere(model, share, share, lambda m, k: rank(bench, m, ranking, k), rounds)


def rank(bench, model, ranking, kind):
    """Importances of one kind of unit in this model."""
    if ranking != "random":
        measure = {"gates": gate_importance, "Taylor": taylor_importance}[ranking]
        return measure(model, bench.batches, kind)
    generator = torch.Generator().manual_seed(bench.seed)
    sizes = sizes_of(model, kind)
    return [torch.rand(n, generator=generator, dtype=torch.float64) for n in sizes]


def gradual(bench):
    """{arm: nats} of the same number of steps, all at once or on the schedule."""
    found = {}
    for sparsity in bench.plan.sparsities:
        for arm, on_schedule in (("at once", False), ("on the cubic schedule", True)):
            model = copy.deepcopy(bench.base)
            MagnitudePruning(sparsity, gradual=on_schedule).attach(model)
            bench.train_on(model)
            found[f"{100 * sparsity:.0f} %, {arm}"] = bench.score(technique.merge(model))
    return found


def tickets(bench):
    """{arm: {kept share of the weights: nats}}"""
    plan = bench.plan
    config = GPTConfig(
        bench.base.config.vocab_size, 128, n_layer=2, n_head=2, d_model=plan.ticket_width
    )
    model, other = small_model(config, bench.seed), small_model(config, bench.seed + 100)

    def fit(model, after_step):
        bench.train_ticket(model, after_step)
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
    """Run what is missing, then write results.json, table.md, the pictures and pictures.json into
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
        if results["plan"] != plan.settings():
            raise ValueError(f"{folder} holds results of {results['plan']}, not {plan.settings()}")
        return results
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = town.load_base()
    test = [Example(completion=t) for t in town.held_out()]
    return {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "plan": plan.settings(),
        "best": town.mix_floor(),
        "base": nats(base, test, tokenizer),
        "parameters": sum(p.numel() for p in base.parameters()),
        "cells": [],
    }


def publish(results, folder):
    """table.md, the pictures and pictures.json from the results alone."""
    write_atomically(folder / "table.md", (tables(results) + "\n").encode())
    panels = {
        "nothing trained afterwards": {w: unit_curve(results, w, "before") for w in WAYS},
        f"after {results['plan']['steps']} steps": {
            w: unit_curve(results, w, "trained on") for w in WAYS
        },
    }
    alts = {}
    _, alts["units.png"] = figures.panels(
        folder / "units.png",
        panels,
        "Heads and neurons out: who chooses, and how often",
        "share of all heads and neurons that is out, %",
        "nats a document above the base",
    )
    _, alts["tickets.png"] = figures.families(
        folder / "tickets.png",
        {arm: ticket_curve(results, arm) for arm in TICKETS},
        {"best possible": results["best"]},
        "Lottery tickets: the same masks, other places, another start",
        "share of the projections' weights that is kept, %",
        "nats a document",
        ticks=[share for share, _ in ticket_curve(results, TICKETS[0])],
    )
    write_json(folder / "pictures.json", alts)


def values(results, comparison, arm):
    """One value a seed."""
    cells = sorted(
        (c["seed"], c["nats"]) for c in results["cells"] if c["comparison"] == comparison
    )
    return [found[arm] for _, found in cells]


def unit_values(results, way, share, when):
    """One value a seed of `structured`; none where it was not measured."""
    runs = values(results, "structured", way)
    return [r[share][when] for r in runs if when in r.get(share, ())]


def unit_curve(results, way, when):
    """[(share out in %, mean nats above the base)] of `structured`."""
    found = {f"{s}": unit_values(results, way, f"{s}", when) for s in results["plan"]["shares"]}
    return [
        (100 * float(share), statistics.mean(numbers) - results["base"])
        for share, numbers in found.items()
        if numbers
    ]


def ticket_curve(results, arm):
    """[(share kept in %, mean nats over seeds)], the smallest share first."""
    runs = values(results, "tickets", arm)
    return sorted((100 * float(k), statistics.mean(r[k] for r in runs)) for k in runs[0])


def tables(results):
    """Markdown: one table a comparison, mean and spread over seeds; `structured` has two."""
    plan = results["plan"]
    gradually = f"Most of the weights zero, {plan['steps']} steps"
    return "\n\n".join(
        compare.markdown(*table)
        for table in (
            one_number(results, "once", "Half of the weights zero, nothing trained afterwards"),
            units_table(results, "before"),
            units_table(results, "trained on"),
            one_number(results, "gradual", gradually),
            ticket_table(results),
        )
    )


def one_number(results, comparison, title):
    """(title, head, rows) of a comparison in which every arm has one number a seed."""
    arms = next(c["nats"] for c in results["cells"] if c["comparison"] == comparison)
    rows = [[arm, *against_base(results, values(results, comparison, arm))] for arm in arms]
    rows.append(["the base itself", f"{results['base']:.3f}", "-"])
    return title, ["how", "nats a document", "above the base"], rows


def units_table(results, when):
    """(title, head, rows) of `structured`, a column a share of the heads and neurons."""
    plan = results["plan"]
    shares = [f"{s}" for s in plan["shares" if when == "before" else "trained"]]
    then = {"before": "nothing trained", "trained on": f"{plan['steps']} steps"}[when]
    title = f"A share of all heads and neurons out, {then} afterwards"
    head = ["nats a document without", *[f"{100 * float(s):g} %" for s in shares]]
    numbers = [[w, [unit_values(results, w, s, when) for s in shares]] for w in WAYS]
    rows = [[w, *[with_spread(n) if n else "-" for n in found]] for w, found in numbers]
    counts = [unit_values(results, "at random", s, "parameters")[0] for s in shares]
    rows.append(["the base itself", *[f"{results['base']:.3f}"] * len(shares)])
    left = [f"{c:,} ({100 * c / results['parameters']:.0f} %)" for c in counts]
    return title, head, [*rows, ["parameters left", *left]]


def ticket_table(results):
    """(title, head, rows) of `tickets`, a column a share that is kept."""
    plan = results["plan"]
    kept = [share for share, _ in ticket_curve(results, "random places")]
    rows = [[arm, *ticket_row(results, arm, kept)] for arm in TICKETS]
    rows.append(["dense", *[f"{ticket_curve(results, TICKETS[0])[-1][1]:.3f}"] * len(kept)])
    head = ["nats a document at", *[f"{share:.1f} % kept" for share in kept]]
    title = f"A model of width {plan['ticket_width']}, {plan['ticket_steps']} steps from scratch"
    return title, head, rows


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


def shrink_table(found):
    """(title, head, rows) of shrink.json: size, speed and quality of each step."""
    stages, options = found["stages"], found["options"]
    first = stages[0]
    rows = [
        [
            s["name"],
            f"{s['parameters']:,}",
            f"{s['bytes']:,} ({100 * s['bytes'] / first['bytes']:.0f} %)",
            f"{first['seconds'] / s['seconds']:.2f} x",
            f"{s['quality']:.3f}",
        ]
        for s in stages
    ]
    rows.append(["best possible", "", "", "", f"{found['best']:.3f}"])
    where = "of every layer's" if options["rounds"] is None else "of all"
    title = (
        f"`minipeft shrink` on the {options['task']}: {100 * options['heads']:.0f} % {where} heads "
        f"and {100 * options['neurons']:.0f} % {where} neurons out, then learning from the "
        "fine-tuned model, then NF4"
    )
    return title, ["step", "parameters", "bytes", "speed", found["metric"]], rows


if __name__ == "__main__":
    torch.set_num_threads(1)
    FOLDER = town.data_folder() / "results" / "pruning"
    study(FOLDER)
    shrink_once(FOLDER)
