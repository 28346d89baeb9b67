r"""`minipeft prune`: take weights, heads, neurons or blocks out of a model, train on what is left.

And `minipeft shrink`, the way a person makes one task's model small, one step after another:

    fine-tuned   every parameter, on the task
    pruned       its least important heads and neurons out, for real
    distilled    the small model learns from the fine-tuned one
    quantised    what is left of the projections, in NF4

Each step's size, speed and quality stand in one table. Speeds are medians over times in which the
models take turns, on one thread, because a machine's speed drifts.
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from minipeft import technique, town
from minipeft.atomic import write_atomically
from minipeft.compressed.distillation import check_options
from minipeft.compressed.importance import (
    check_share,
    gate_importance,
    least_important,
    sizes_of,
    taylor_importance,
)
from minipeft.compressed.magnitude_pruning import (
    KeepZeros,
    check_pattern,
    check_sparsity,
    prune_magnitude,
    sparsity_of,
)
from minipeft.compressed.magnitude_pruning import count_of as floor_of
from minipeft.compressed.sparsegpt import prune_sparsegpt
from minipeft.compressed.structured_pruning import prune_blocks, prune_heads, prune_neurons
from minipeft.compressed.teachers import NetworkTeacher
from minipeft.compressed.wanda import prune_wanda
from minipeft.dataset import Example, collate, encode_all, parted, read_examples
from minipeft.doctor import machine
from minipeft.evaluation import BATCH, nats
from minipeft.gpt import GPT
from minipeft.tokenizer import Tokenizer
from minipeft.training import TrainingConfig, choose_device, train

CALIBRATION = 128  # texts that importances, Wanda and SparseGPT see
MEASURES = {"gates": gate_importance, "taylor": taylor_importance}


@dataclass(frozen=True)
class Options:
    """Take weights, heads, neurons or blocks out of a model.

    Attributes:
        method: how single weights are chosen.
        sparsity: share of the projections' weights to zero; 0 leaves them.
        scope: of magnitude: the same share in every matrix, or the smallest anywhere.
        pattern: zeros in every group of neighbours, such as 2 4, in place of a sparsity.
        heads: share of every layer's attention heads to take out.
        neurons: share of every layer's feed-forward neurons to take out.
        rounds: take heads and neurons out in this many rounds, each time the least important of the
            whole model that is left; without it every layer loses the same share at once.
        blocks: numbers of whole blocks to take out.
        importance: how heads and neurons are ranked.
        base: a model folder; the shipped base without it.
        data: your own file to calibrate, train and test on, instead of Tiny Town's documents.
        out: folder for the model.
        steps: optimizer steps of training on what is left; 0 for none.
        batch_size: rows a step.
        learning_rate: the peak.
        seed: of the documents and their order.
        device: cpu, cuda, mps, or auto.
    """

    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    sparsity: float = 0.0
    scope: Literal["layer", "global"] = "layer"
    pattern: tuple[int, int] | None = None
    heads: float = 0.0
    neurons: float = 0.0
    rounds: int | None = None
    blocks: tuple[int, ...] = ()
    importance: Literal["gates", "taylor"] = "gates"
    base: Path | None = None
    data: Path | None = None
    out: Path = Path("runs/prune")
    steps: int = 0
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "auto"


def prune(options):
    """Prune, train on, save; prints size and loss at each step. Returns the exit status."""
    wanted = (options.sparsity, options.pattern, options.heads, options.neurons, options.blocks)
    if not any(wanted):
        raise ValueError("nothing to take out: give --sparsity, --pattern, --heads, ...")
    check(options)
    model, tokenizer = open_model(options.base)
    examples, test = corpus(options.data, options.seed)
    batches = batches_of(examples[:CALIBRATION], tokenizer, model)
    print(line("before", model, nats(model, test, tokenizer)))
    take_out(model, batches, options)
    print(line("pruned", model, nats(model, test, tokenizer)))
    if options.steps:
        KeepZeros().attach(model)
        train(model, encode_all(examples, tokenizer, model), training(options))
        technique.merge(model.cpu())
        print(line("trained on", model, nats(model, test, tokenizer)))
    model.save_pretrained(options.out)
    tokenizer.save(options.out)
    print(f"model in {options.out}")
    return 0


def check(options):
    """Raise ValueError for what `minipeft prune` cannot do, before it computes anything."""
    check_shared(options)
    check_sparsity(options.sparsity)
    if options.pattern is not None:
        check_pattern(options.pattern, math.prod(options.pattern))  # the rows are asked later
    if options.steps:
        training(options)


def check_shared(options):
    """The same for what both commands have."""
    for name in ("heads", "neurons"):
        check_share(getattr(options, name), name)
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"rounds={options.rounds} must be at least 1, or None")
    choose_device(options.device)
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"out={options.out} is a file; models are written into a folder")


def take_out(model, batches, options):
    """Blocks, then heads and neurons, then single weights, as the options say, in place."""
    if options.blocks:
        prune_blocks(model, options.blocks)
    take_units(model, batches, options, options.importance)
    if options.sparsity or options.pattern:
        how = {"sparsity": options.sparsity, "pattern": options.pattern}
        if options.method == "magnitude":
            prune_magnitude(model, scope=options.scope, **how)
        else:
            act = {"wanda": prune_wanda, "sparsegpt": prune_sparsegpt}[options.method]
            act(model, batches, **how)
    return model


def take_units(model, batches, options, importance="gates"):
    """Heads and neurons, in rounds from the whole model or every layer alike, in place."""
    shares = (options.heads, options.neurons)
    if options.rounds is None:
        return shrink_layers(model, batches, *shares, importance)
    measure = MEASURES[importance]
    return shrink_anywhere(model, *shares, lambda m, k: measure(m, batches, k), options.rounds)


def shrink_layers(model, batches, heads, neurons, importance="gates"):
    """Take out these shares of every layer's heads and neurons, both ranked in the whole model."""
    chosen = {
        kind: least_important(MEASURES[importance](model, batches, kind), share)
        for kind, share in (("heads", heads), ("neurons", neurons))
        if share
    }
    prune_heads(model, chosen.get("heads", {}))
    return prune_neurons(model, chosen.get("neurons", {}))


def shrink_anywhere(model, heads, neurons, measure, rounds=1):
    """Take out these shares of all heads and of all neurons, in place, in rounds of equal size:
    each time the least important of what is left, in whatever layer. Returns the model.

    measure(model, kind) -> importances: what is gone cannot be ranked, and what is left matters
    more for it. Raises ValueError for fewer rounds than 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds={rounds} must be at least 1")
    shares = {"heads": heads, "neurons": neurons}
    goals = {k: floor_of(s, sum(sizes_of(model, k))) for k, s in shares.items() if s}
    out = dict.fromkeys(goals, 0)
    for n in range(1, rounds + 1):
        due = {kind: goal * n // rounds for kind, goal in goals.items()}
        gone = {k: lowest(measure(model, k), due[k] - out[k]) for k in goals}
        prune_neurons(prune_heads(model, gone.get("heads", {})), gone.get("neurons", {}))
        out = due
    return model


def lowest(importances, count):
    """{layer: [numbers]} of the `count` least important units anywhere. Unlike (Importance 4) a
    layer is not measured in its own norm: one that matters more should lose less.
    """
    owners = [(layer, n) for layer, units in enumerate(importances) for n in range(len(units))]
    gone = {}
    for i in torch.cat(importances).argsort(stable=True)[:count].tolist():
        layer, unit = owners[i]
        gone.setdefault(layer, []).append(unit)
    return gone


def open_model(folder):
    """(model, tokenizer) of a folder; None is the shipped base."""
    folder = Path(folder) if folder is not None else town.base_folder()
    return GPT.from_pretrained(folder), Tokenizer.load(folder)


def corpus(data, seed=0):
    """(examples to learn from, examples to test on): the user's, or documents of Tiny Town that
    the base was not trained on.
    """
    if data is not None:
        return parted(read_examples(data))
    learned = town.pretraining_documents(seed + 1, 4000)
    return tuple([Example(completion=t) for t in x] for x in (learned, town.held_out()))


def batches_of(examples, tokenizer, model):
    """Examples as batches of BATCH rows."""
    rows = encode_all(examples, tokenizer, model)
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


def training(options, **changes):
    """The training loop's settings from a command's options."""
    names = ("steps", "batch_size", "learning_rate", "seed", "device")
    return TrainingConfig(**{name: getattr(options, name) for name in names} | changes)


def line(name, model, loss):
    """What a model weighs and what it loses."""
    count = sum(p.numel() for p in model.parameters())
    zeros = 100 * sparsity_of(model)
    return f"{name:11} {count:>11,} parameters  {zeros:5.1f} % zeros  {loss:.3f} nats a document"


# -- the way to a small model


@dataclass(frozen=True)
class ShrinkOptions:
    """Fine-tune, prune heads and neurons, distil from the original, quantise.

    Attributes:
        task: one of Tiny Town's tasks.
        data: your own file instead.
        base: a model folder; the shipped base without it.
        heads: share of the attention heads to take out.
        neurons: share of the feed-forward neurons to take out.
        rounds: take them out in this many rounds, each time the least important of the whole model
            that is left; None takes the same share of every layer at once.
        temperature: of the distillation's soft labels.
        alpha: weight of the soft labels against the hard ones.
        out: folder for the models and results.json.
        steps: optimizer steps of fine-tuning, and again of distilling; without it the task's own.
        batch_size: rows a step.
        learning_rate: the peak.
        seed: of the examples and their order.
        device: cpu, cuda, mps, or auto.
        repeats: how often every model is timed.
    """

    task: str = "dialect"
    data: Path | None = None
    base: Path | None = None
    heads: float = 0.5
    neurons: float = 0.5
    rounds: int | None = 8
    temperature: float = 2.0
    alpha: float = 0.5
    out: Path = Path("runs/shrink")
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    seed: int = 0
    device: str = "auto"
    repeats: int = 7


@dataclass
class Stage:
    """A row of the table. seconds: a forward pass over BATCH rows of the test's text."""

    name: str
    parameters: int
    bytes: int
    seconds: float
    quality: float


def shrink(options, material):
    """Run the pipeline on a cli.Material, print the table, keep the models of float stages.

    Returns {"metric": , "best": , "stages": [Stage, ...]}. Raises ValueError for options that
    make no sense, before the first step.
    """
    check_shrink(options)
    base, tokenizer = open_model(options.base)
    models = {"base": base, **shrunk_models(options, material, base, tokenizer)}
    times = forward_seconds(models, batches_of(material.test[:BATCH], tokenizer, base)[0], options)
    stages = [
        Stage(n, count_of(m), bytes_of(m), times[n], material.score(m, tokenizer))
        for n, m in models.items()
    ]
    for name in ("fine-tuned", "pruned", "distilled"):
        models[name].save_pretrained(options.out / name)
        tokenizer.save(options.out / name)
    show(stages, material)
    found = {"metric": material.metric, "best": material.best, "stages": stages}
    content = found | {"stages": [asdict(s) for s in stages], "date": date.today().isoformat()}
    kept = {k: v for k, v in asdict(options).items() if not isinstance(v, Path)}
    content |= {"machine": machine() | {"threads": 1}, "options": kept}
    text = json.dumps(content, indent=1) + "\n"
    write_atomically(options.out / "results.json", text.encode())
    return found


def check_shrink(options):
    """Raise ValueError for what `minipeft shrink` cannot do, before it trains anything."""
    check_shared(options)
    check_options(options.temperature, options.alpha)
    if options.repeats < 1:
        raise ValueError(f"repeats={options.repeats} must be at least 1")


def shrunk_models(options, material, base, tokenizer):
    """{stage: model} of every step after the base."""
    from minipeft.quantized.qlora import quantize_model

    steps = material.steps if options.steps is None else options.steps
    rows = material.encode(tokenizer, base)
    tuned = copy.deepcopy(base)
    train(tuned, rows, training(options, steps=steps))
    small = copy.deepcopy(tuned.cpu())
    batches = batches_of(material.train[:CALIBRATION], tokenizer, small)
    take_units(small, batches, options)
    student = copy.deepcopy(small)
    teacher = NetworkTeacher(tuned, options.temperature, options.alpha)
    train(student, rows, training(options, steps=steps), loss_fn=teacher)
    packed = quantize_model(copy.deepcopy(student.cpu()))
    found = {"fine-tuned": tuned, "pruned": small, "distilled": student, "quantised": packed}
    return {name: model.cpu().eval() for name, model in found.items()}


def count_of(model):
    """Numbers that the model stands for: parameters, and weights that are packed."""
    packed = {m for m in model.modules() if hasattr(m, "to_linear")}
    inside = {id(p) for m in packed for p in m.parameters()}
    plain = sum(p.numel() for p in model.parameters() if id(p) not in inside)
    return plain + sum(sum(p.numel() for p in m.to_linear().parameters()) for m in packed)


def bytes_of(model):
    """Bytes of the model's tensors, the tied head once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


@torch.inference_mode()
def forward_seconds(models, batch, options):
    """{name: median seconds of a forward pass}, the models taking turns on one thread."""
    threads, found = torch.get_num_threads(), {name: [] for name in models}
    torch.set_num_threads(1)
    try:
        for n in range(options.repeats + 1):  # the first is to warm up
            for name, model in models.items():
                start = time.perf_counter()
                model(batch.ids)
                found[name] += [time.perf_counter() - start] if n else []
    finally:
        torch.set_num_threads(threads)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def show(stages, material, console=None):
    """The table: everything against the base."""
    first, best = stages[0], "" if material.best is None else f" (best {material.best:.3f})"
    table = Table(
        "step", "parameters", "bytes", "of base", "speed", material.metric, box=box.SIMPLE
    )
    for s in stages:
        share, speed = f"{100 * s.bytes / first.bytes:.0f} %", f"{first.seconds / s.seconds:.2f} x"
        row = (s.name, f"{s.parameters:,}", f"{s.bytes:,}", share, speed, f"{s.quality:.3f}")
        table.add_row(*row)
    (console or Console()).print(table)
    (console or Console()).print(f"{material.metric}{best}; NF4 saves memory, not time, on a CPU")
