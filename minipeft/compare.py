"""`minipeft compare`: techniques side by side, from the same base, on the same tasks and budget.

One cell is one technique on one task with one seed: attach, train, test. Cells are appended to
`cells.jsonl` as they finish, so a comparison that was stopped goes on where it was. What a
technique costs (parameters, file, optimizer, memory, step and inference time) is measured once, on
this machine, in turn with its reference. `results.json` holds everything with machine and versions;
the table and the pictures are made from that file and can be made again without training.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import json
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from minipeft import figures
from minipeft.atomic import write_atomically, write_json
from minipeft.checkpoint import save_adapter
from minipeft.dataset import collate, encode_all
from minipeft.doctor import machine
from minipeft.evaluation import METRICS
from minipeft.gpt import GPT
from minipeft.memory import measure_peak, optimizer_bytes
from minipeft.presets import PRESETS, Preset
from minipeft.technique import after_step, merged, technique_class, trainable_parameters
from minipeft.timing import interleaved
from minipeft.tokenizer import Tokenizer
from minipeft.town import TASKS, base_folder, home_documents
from minipeft.training import TrainingConfig, train

BASE = "base"  # the technique that does nothing
FULL = "full"  # the one that the others are measured by
CURVE_POINTS = 8  # evaluations while training, for the pictures
CURVE_EXAMPLES = 100  # of the validation set, each time
COST_STEPS = 40  # a training short enough to be measured, long enough for a schedule
CROWD = 8  # more techniques than this: a poster in place of one line for each
UNITS = {
    "nats": "nats a document",
    "exact": "share of exact answers",
    "accuracy": "accuracy",
    "slots": "share of slots right",
}


@dataclass(frozen=True)
class Plan:
    """What to compare.

    techniques: {the name in the table: Preset}; BASE is added by itself.
    tasks: names in town.TASKS. seeds: one run each. steps: optimizer steps (None: each task's).
    """

    techniques: dict
    tasks: tuple[str, ...]
    seeds: tuple[int, ...] = (0,)
    steps: int | None = None
    batch_size: int = 16
    adapters: str | None = None  # folder that gets the adapters of the first seed

    def cells(self):
        """(technique name, task, seed) in the order they are run; the base is not trained.

        Seeds go round slowest, so that a comparison that is stopped early has whole rounds.
        """
        yield from ((BASE, task, 0) for task in self.tasks)
        for seed, task, name in itertools.product(self.seeds, self.tasks, self.techniques):
            yield name, task, seed

    def identity(self):
        """What decides a cell's result, as plain values: a folder belongs to one of these."""
        techniques = {
            name: {
                "technique": type(preset.technique).__name__,
                "learning_rate": preset.rate,
                **json.loads(json.dumps(preset.technique.settings())),
            }
            for name, preset in self.techniques.items()
        }
        return {"techniques": techniques, "steps": self.steps, "batch_size": self.batch_size}

    def settings(self, name, task):
        """How a cell is trained, which its record repeats: one trained otherwise is another cell.

        {} for the base, which is not trained.
        """
        if name == BASE:
            return {}
        return {
            "steps": self.steps or TASKS[task].steps,
            "learning_rate": self.techniques[name].rate,
            "random_starts": TASKS[task].random_starts,
        }


def chosen_presets(names):
    """{name: Preset} for names as typed: a preset's, a technique's, or "all" for every preset.

    Raises ValueError naming an unknown one.
    """
    if list(names) == ["all"]:
        return dict(PRESETS)
    plain = {plain_name(known): known for known in PRESETS}
    chosen = {}
    for name in names:
        if plain_name(name) in plain:
            known = plain[plain_name(name)]
            chosen[known] = PRESETS[known]
        else:
            kind = technique_class(name)
            chosen[kind.__name__] = Preset(kind())
    return chosen


def plain_name(name):
    """A name as it compares: small letters and digits."""
    return "".join(c for c in name.lower() if c.isalnum())


# -- one cell


def run_cell(plan, base, tokenizer, name, task_name, seed):
    """Train and test one cell; returns a flat record of plain values."""
    task = TASKS[task_name]
    model = copy.deepcopy(base)
    metric = METRICS[task.metric]
    record = {"technique": name, "task": task_name, "seed": seed}
    if name != BASE:
        torch.manual_seed(seed)
        preset = plan.techniques[name]
        preset.technique.attach(model)
        validation = task.validation()[:CURVE_EXAMPLES]
        settings = plan.settings(name, task_name)
        config = TrainingConfig(
            **settings,
            batch_size=plan.batch_size,
            seed=seed,
            device="cpu",
            eval_every=max(1, settings["steps"] // CURVE_POINTS),
        )
        record |= settings
        data = encode_all(task.train(seed), tokenizer)
        result = train(
            model, data, config, evaluate=lambda m: metric(m, validation, tokenizer), show=False
        )
        record["curve"] = [[s, values["value"]] for s, values in result.evaluations]
        record["seconds"] = result.seconds
        record["loss"] = statistics.mean(result.losses[-20:])
        if plan.adapters is not None and seed == plan.seeds[0]:
            save_adapter(model, adapter_folder(plan.adapters, name, task_name))
    record["quality"] = metric(model, task.test(), tokenizer)
    record["home"] = METRICS["nats"](model, home_documents(), tokenizer)
    record |= {k: METRICS[m](model, e, tokenizer) for k, (m, e) in task.besides().items()}
    return record


def adapter_folder(folder, name, task):
    """Where a comparison that keeps adapters puts one."""
    return Path(folder) / f"{task}-{plain_name(name)}"


def read_cells(path):
    """Finished cells of an earlier run; a last line that a kill cut short is dropped."""
    cells = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            cells[record["technique"], record["task"], record["seed"]] = record
    return cells


_worker = {}


def start_worker(base_path):
    """In a worker process: one thread, and the base loaded once."""
    torch.set_num_threads(1)
    _worker["base"] = GPT.from_pretrained(base_path)
    _worker["tokenizer"] = Tokenizer.load(base_path)


def work(plan, cell):
    return run_cell(plan, _worker["base"], _worker["tokenizer"], *cell)


def run_cells(plan, base_path, folder, jobs, say):
    """Run the cells that are not in the folder yet, `jobs` at a time. Returns all finished records.

    Ctrl-C ends it early; the cells that are finished are kept and returned.
    """
    path = folder / "cells.jsonl"
    claim(folder, plan)
    wanted = list(plan.cells())
    done = {c: r for c, r in read_cells(path).items() if c in wanted and belongs(r, plan)}
    todo = [cell for cell in wanted if cell not in done]
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")  # fork and torch's threads do not agree
    with (
        path.open("a") as file,
        concurrent.futures.ProcessPoolExecutor(
            jobs, context, start_worker, (str(base_path),)
        ) as pool,
    ):
        futures = [pool.submit(work, plan, cell) for cell in todo]
        try:
            for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
                record = future.result()
                done[record["technique"], record["task"], record["seed"]] = record
                file.write(json.dumps(record) + "\n")
                file.flush()
                say(progress_line(record, n, len(todo), time.monotonic() - began))
        except BaseException as stop:
            pool.shutdown(wait=False, cancel_futures=True)
            if not isinstance(stop, KeyboardInterrupt):
                raise
            say(f"stopped with {len(done)} of {len(wanted)} cells; run it again to go on")
    return [done[cell] for cell in wanted if cell in done]


def belongs(record, plan):
    """Whether a record was trained as the plan trains this cell today; if not it is run again."""
    settings = plan.settings(record["technique"], record["task"])
    return all(record.get(name) == value for name, value in settings.items())


def claim(folder, plan):
    """A folder holds the cells of one plan. Raises ValueError when it holds another's."""
    path = folder / "plan.json"
    identity = json.loads(json.dumps(plan.identity()))
    if path.exists():
        known = json.loads(path.read_text())
        other = [n for n in ("steps", "batch_size") if known[n] != identity[n]]
        both = known["techniques"].keys() & identity["techniques"].keys()
        other += [n for n in both if known["techniques"][n] != identity["techniques"][n]]
        if other:
            raise ValueError(
                f"{folder} holds a comparison with other settings of {', '.join(other)}; "
                "choose another folder or delete it"
            )
        identity["techniques"] = known["techniques"] | identity["techniques"]
    write_json(path, identity)


def progress_line(record, n, total, seconds):
    left = seconds / n * (total - n)
    return (
        f"[{n}/{total}] {record['task']}: {record['technique']} seed {record['seed']}: "
        f"{record['quality']:.3f}, about {left / 60:.0f} min left"
    )


# -- what a technique costs


def measure_costs(plan, base, tokenizer, rounds=5):
    """{technique: what it costs}: sizes, and times in turn with full fine-tuning and the base."""
    task = TASKS[plan.tasks[0]]
    batch = collate(encode_all(task.train(0)[: plan.batch_size], tokenizer))
    reference = Runner(base, technique_class("FullFineTuning")(), batch)
    return {
        name: measure_cost(base, preset.technique, batch, reference, rounds)
        for name, preset in plan.techniques.items()
    }


class Runner:
    """A model with a technique on it and one batch, to be stepped and timed."""

    def __init__(self, base, technique, batch):
        torch.manual_seed(0)
        self.model = copy.deepcopy(base)
        if technique is not None:
            technique.attach(self.model)
            self.optimizer = torch.optim.AdamW(trainable_parameters(self.model), fused=True)
        self.batch, self.steps = batch, 0

    def step(self):
        self.model.loss(self.batch.ids, self.batch.labels).backward()
        self.optimizer.step()
        self.steps += 1
        after_step(self.model, self.steps, COST_STEPS)
        self.optimizer.zero_grad()

    def finish(self):
        """Train to the end, where some techniques decide what is kept."""
        while self.steps < COST_STEPS:
            self.step()

    def infer(self):
        with torch.inference_mode():
            self.model(self.batch.ids)


def measure_cost(base, technique, batch, reference, rounds):
    """What one technique costs: parameters, bytes, and times as shares of the reference's."""
    runner, plain = Runner(base, technique, batch), Runner(base, None, batch)
    runner.step()
    total = sum(p.numel() for p in base.parameters())
    cost = {
        "trained": technique.count(base.config),
        "share": technique.count(base.config) / total,
        "optimizer_bytes": optimizer_bytes(runner.optimizer),
        "peak_bytes": measure_peak(runner.step, runner.model, runner.optimizer),
        "step_ratio": interleaved(runner.step, reference.step, rounds).ratio,
    }
    runner.finish()
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(runner.model, folder)
        cost["file_bytes"] = sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))
    cost["inference_ratio"] = interleaved(runner.infer, plain.infer, 2 * rounds).ratio
    cost["merged_ratio"] = None
    if technique.cannot_merge is None:
        with merged(runner.model):
            cost["merged_ratio"] = interleaved(runner.infer, plain.infer, 2 * rounds).ratio
    return cost


# -- results


def compare(plan, folder, base_path=None, jobs=1, console=None):
    """Run the plan; write results.json, table.md and the pictures to `folder`; print the tables.

    Raises ValueError for unknown tasks, none at all, no seed, or a folder that holds another
    comparison. Interrupt it and run it again: finished cells are not trained twice.
    """
    console = console or Console()
    folder, base_path = Path(folder), Path(base_path or base_folder())
    if not (plan.tasks and plan.seeds):
        raise ValueError("a comparison needs at least one task and one seed")
    for task in plan.tasks:
        if task not in TASKS:
            raise ValueError(f"no task {task!r}; there are {', '.join(TASKS)}")
    folder.mkdir(parents=True, exist_ok=True)
    base, tokenizer = GPT.from_pretrained(base_path), Tokenizer.load(base_path)
    cells = run_cells(plan, base_path, folder, jobs, lambda line: console.print(line, markup=False))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        costs = measure_costs(plan, base, tokenizer)
    finally:
        torch.set_num_threads(threads)
    results = {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "plan": plan.identity() | {"tasks": list(plan.tasks), "seeds": list(plan.seeds)},
        "tasks": {name: task_facts(TASKS[name], plan.steps) for name in plan.tasks},
        "costs": costs,
        "cells": cells,
    }
    write_json(folder / "results.json", results)
    publish(results, folder, console)
    return results


def write_study(folder, results, table):
    """A study of one table and no picture: results.json, table.md, pictures.json (empty). table:
    (title, head, rows).
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "results.json", results)
    write_atomically(folder / "table.md", (markdown(*table) + "\n").encode())
    write_atomically(folder / "pictures.json", b"{}\n")


def task_facts(task, steps=None):
    """What a table or a picture needs to know of a task, as plain values. `steps`: a plan's own."""
    names = ("metric", "floor", "unadapted", "chance", "best", "random_starts")
    return {name: getattr(task, name, None) for name in names} | {"steps": steps or task.steps}


def summary(results, task, name, value="quality"):
    """(mean, standard deviation or None, runs) of a technique's cells on a task."""
    found = [c[value] for c in results["cells"] if c["task"] == task and c["technique"] == name]
    if not found:
        return None
    spread = statistics.stdev(found) if len(found) > 1 else None
    return statistics.mean(found), spread, len(found)


def publish(results, folder, console=None):
    """Tables and pictures from results alone. Returns {picture: alt text}."""
    folder = Path(folder)
    tables = all_tables(results)
    text = "\n\n".join(markdown(*table) for table in tables) + "\n"
    write_atomically(folder / "table.md", text.encode())
    if console is not None:
        for title, head, rows in tables:
            table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
            for n, column in enumerate(head):
                table.add_column(column, justify="left" if n == 0 else "right")
            for row in rows:
                table.add_row(*row)
            console.print(table)
    pictures = draw(results, folder)
    write_json(folder / "pictures.json", pictures)
    return pictures


def all_tables(results):
    """Every table of a comparison as (title, head, rows)."""
    gained = [gain_table(results)] if gains(results) else []
    return [quality_table(results), *gained, cost_table(results)]


def shown(value, spread=None):
    if value is None:
        return "-"
    text = f"{value:.2f}" if abs(value) >= 2 else f"{value:.3f}"
    return text if spread is None else f"{text} ± {spread:.2g}"


def quality_table(results):
    """(title, head, rows): a row a technique, a column a task, then what it did to home."""
    tasks, first = list(results["tasks"]), next(iter(results["tasks"]))
    head = ["technique", *(f"{t} ({results['tasks'][t]['metric']})" for t in tasks)]
    rows = []
    for name in (BASE, *results["costs"]):
        values = [summary(results, t, name) for t in tasks]
        if any(values):
            home = summary(results, first, name, "home")
            row = [shown(*v[:2]) if v else "-" for v in values]
            rows.append([name, *row, shown(*home[:2]) if home else "-"])
    for label, text in (("unadapted", "perfect, not adapted"), ("best", "best possible")):
        marks = [results["tasks"][t][label] for t in tasks]
        if any(m is not None for m in marks):
            rows.append([text, *(shown(m) for m in marks), "-"])
    if all("steps" in results["tasks"][t] for t in tasks):
        rows.append(["steps of training", *(f"{results['tasks'][t]['steps']}" for t in tasks), "-"])
    head.append(f"home after {first}")
    return f"quality, mean over seeds {results['plan']['seeds']}", head, rows


def gains(results):
    """{technique: {task: (quality - base) / (full - base)}}, means over seeds: how much of the way
    that full fine-tuning goes. Empty without full fine-tuning; a task it does not move is left out.
    """
    found = {}
    for task in results["tasks"]:
        base, full = (summary(results, task, name) for name in (BASE, FULL))
        if base is None or full is None or base[0] == full[0]:
            continue
        for name in results["costs"]:
            reached = summary(results, task, name)
            if reached and name != FULL:
                share = (reached[0] - base[0]) / (full[0] - base[0])
                found.setdefault(name, {})[task] = share
    return found


def gain_table(results):
    """(title, head, rows): `gains`, best mean first, and on how many tasks it is 90 % or more."""
    found = gains(results)
    tasks = [t for t in results["tasks"] if any(t in row for row in found.values())]
    rows = []
    for name in sorted(found, key=lambda n: -statistics.mean(found[n].values())):
        row = found[name]
        mean = f"{statistics.mean(row.values()):.2f}"
        shares = [f"{row[t]:.2f}" if t in row else "-" for t in tasks]
        rows.append([name, mean, f"{sum(g >= 0.9 for g in row.values())}", *shares])
    head = ["technique", "mean", "tasks at 0.90", *tasks]
    return "share of what full fine-tuning gains over the base", head, rows


def cost_table(results):
    """(title, head, rows) of what each technique costs; times are ratios."""
    head = ["technique", "trained", "share", "file", "optim.", "memory", "step", "infer", "merged"]
    rows = []
    for name, c in results["costs"].items():
        sizes = [in_bytes(c[k]) for k in ("file_bytes", "optimizer_bytes", "peak_bytes")]
        ratios = [c[k] for k in ("step_ratio", "inference_ratio", "merged_ratio")]
        row = [name, f"{c['trained']:,}", f"{100 * c['share']:.2f} %", *sizes]
        rows.append([*row, *("-" if r is None else f"{r:.2f}" for r in ratios)])
    title = "cost; times against full fine-tuning (step) and the base (infer, merged)"
    return title, head, rows


def in_bytes(size):
    """A size as people read it, in units of 1,000."""
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} {unit}" if size >= 9.95 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def markdown(title, head, rows):
    """A table in Markdown, numbers to the right."""
    lines = [f"**{title}**", "", "| " + " | ".join(head) + " |"]
    lines.append("|---|" + "---:|" * (len(head) - 1))
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def draw(results, folder):
    """Every picture of a comparison. Returns {file name: alt text}."""
    pictures = {}
    found = gains(results)
    crowded = len(results["costs"]) > CROWD
    if crowded and found:
        pictures |= draw_gains(results, found, folder)
    for task, facts in results["tasks"].items():
        curves = {} if crowded else mean_curves(results, task)
        if curves:
            named = {"perfect, not adapted": facts["unadapted"], "best possible": facts["best"]}
            references = {text: v for text, v in named.items() if v is not None}
            path = folder / f"curve_{task}.png"
            _, alt = figures.learning_curves(
                path, curves, references, title(task), UNITS[facts["metric"]]
            )
            pictures[path.name] = alt
    if "dialect" in results["tasks"]:
        moves = {
            name: tuple(summary(results, "dialect", name, v)[0] for v in ("home", "quality"))
            for name in (BASE, *results["costs"])
            if summary(results, "dialect", name)
        }
        path = folder / "forgetting.png"
        before = moves.pop(BASE)
        pictures[path.name] = figures.forgetting(
            path, moves, before, "What learning a dialect costs at home"
        )[1]
    return pictures


def draw_gains(results, found, folder):
    """The poster, and its numbers task by task. Returns {file name: alt text}."""
    points = {
        name: (results["costs"][name]["trained"], statistics.mean(row.values()))
        for name, row in found.items()
    }
    poster, alt = figures.quality_against_size(
        folder / "poster.png",
        points,
        f"What is gained for what is trained: mean over {len(results['tasks'])} tasks, "
        f"{len(results['plan']['seeds'])} seeds",
        "trained parameters",
        "share of what full fine-tuning gains",
        {"full fine-tuning": 1.0},
    )
    order = sorted(found, key=lambda name: -points[name][1])
    table = {name: {title(t): share for t, share in found[name].items()} for name in order}
    grid, told = figures.heat_table(
        folder / "gains.png", table, "Share of what full fine-tuning gains, task by task"
    )
    return {poster.name: alt, grid.name: told}


def title(task):
    """A task's name as a heading."""
    return task.replace("_", " ").capitalize()


def mean_curves(results, task):
    """{technique: [(step, mean over seeds)]} on the validation examples."""
    curves = {}
    for name in results["costs"]:
        runs = [
            c["curve"] for c in results["cells"] if c["task"] == task and c["technique"] == name
        ]
        if runs:
            curves[name] = [
                (points[0][0], statistics.mean(v for _, v in points)) for points in zip(*runs)
            ]
    return curves
