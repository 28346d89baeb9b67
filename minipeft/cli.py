"""The commands: `minipeft NAME ...`, or `python -m minipeft NAME ...`.

Each command is a function; its flags are its parameters and its help is its docstring, read by tyro
when the command is called, so that no help text can be out of date. A technique's flags are the
fields of its dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
import typing
from pathlib import Path
from typing import Literal

import tyro

PROGRAM = "minipeft"


def main(arguments=None):
    """Run the command named first; returns the exit status: 2 for wrong usage, 1 for bad input."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        return complain(f"no command {name!r}{nearest(name, COMMANDS)}", 2)
    try:
        return COMMANDS[name](rest) or 0
    except (ValueError, OSError, FloatingPointError) as problem:
        return complain(f"{name}: {problem}", 1)
    except KeyboardInterrupt:
        return complain(f"{name}: stopped", 130)


def complain(message, status):
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def nearest(name, known):
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"


def overview():
    """The commands, each with the first line of its help."""
    lines = [f"usage: {PROGRAM} COMMAND [--help] ...", ""]
    lines += [f"  {name:10} {c.__doc__.strip().splitlines()[0]}" for name, c in COMMANDS.items()]
    return "\n".join(lines)


def command(function):
    """A function of flags as a function of a list of arguments."""

    def run(arguments):
        name = function.__name__
        return tyro.cli(function, args=arguments, prog=f"{PROGRAM} {name}", config=FLAT)

    run.__doc__ = function.__doc__
    return run


FLAT = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)


# -- what several commands share


def open_base(folder):
    """(model, tokenizer) of a model folder; None is the base that comes with minipeft.

    Raises ValueError when the folder holds no model or no vocabulary.
    """
    from minipeft.gpt import GPT
    from minipeft.tokenizer import Tokenizer
    from minipeft.town import base_folder

    folder = Path(folder) if folder is not None else base_folder()
    return GPT.from_pretrained(folder), Tokenizer.load(folder)


def open_adapted(base, adapter):
    """The base with the adapter folders on it, in order, each named after its folder (by its whole
    path where two folders have one name).
    """
    from minipeft.checkpoint import load_adapter

    model, tokenizer = open_base(base)
    names = [Path(folder).name for folder in adapter]
    for folder, name in zip(adapter, names):
        load_adapter(model, folder, name=name if names.count(name) == 1 else str(folder))
    return model, tokenizer


@dataclasses.dataclass
class Material:
    """What to learn and how it is measured.

    best: what a perfect model scores in the metric, None where nobody knows. labels: the names a
    Head decides among; () where text is written.
    """

    train: list
    test: list
    metric: str
    steps: int
    best: float | None = None
    labels: tuple[str, ...] = ()
    per_token: bool = False
    random_starts: int = 0

    def encode(self, tokenizer, model):
        """The training examples as rows."""
        from minipeft.dataset import encode_all, encode_all_for_head

        if not self.labels:
            return encode_all(self.train, tokenizer, model)
        return encode_all_for_head(self.train, tokenizer, self.labels, self.per_token, model)

    def score(self, model, tokenizer):
        """The metric on the test examples."""
        from minipeft.evaluation import METRICS, head_accuracy

        if not self.labels:
            return METRICS[self.metric](model, self.test, tokenizer)
        return head_accuracy(model, self.test, tokenizer, self.labels, self.per_token)


def material(task, data, seed=0, head=False):
    """The Material of a task of Tiny Town, or of the user's file where there is one.

    Raises ValueError for an unknown task, and when a head is wanted where nothing has a label.
    """
    from minipeft.dataset import parted, read_examples
    from minipeft.town import TASKS

    if data is not None:
        examples = read_examples(data)
        learned, held = parted(examples)
        labels = tuple(sorted({x.label for x in examples} - {None})) if head else ()
        found = Material(learned, held, "nats", 300, labels=labels)
    elif task in TASKS:
        t = TASKS[task]
        labels = t.labels if head else ()
        found = Material(
            t.train(seed), t.test(), t.metric, t.steps, t.best, labels, t.per_token, t.random_starts
        )
    else:
        raise ValueError(f"no task {task!r}{nearest(task, TASKS)}")
    if head and len(found.labels) < 2:
        raise ValueError(f"{data or task}: a head needs examples with at least two labels")
    if head:
        found.metric = "accuracy of the head"
    return found


# -- commands


def finetune(arguments):
    """Fine-tune a base with one technique."""
    from minipeft.technique import WHERE, technique_class

    if not arguments or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {plain(name)}" for name in WHERE)
        print(f"usage: {PROGRAM} finetune TECHNIQUE [--help] ...\n\ntechniques:\n{names}")
        return 0
    kind = technique_class(arguments[0])

    def run(technique, training):
        return run_finetune(kind(**vars(technique)), training)

    run.__annotations__ = {"technique": flags_of(kind), "training": FinetuneOptions}
    prog = f"{PROGRAM} finetune {arguments[0]}"
    return tyro.cli(run, args=arguments[1:], prog=prog, config=FLAT)


def flags_of(kind):
    """A dataclass with the fields of a technique, each with its help from the docstring."""
    types, texts = typing.get_type_hints(kind), field_help(kind)
    fields = []
    for f in dataclasses.fields(kind):
        given = dataclasses.field(default=f.default)
        marked = typing.Annotated[types[f.name], tyro.conf.arg(help=texts.get(f.name, ""))]
        fields.append((f.name, marked, given))
    made = dataclasses.make_dataclass(kind.__name__, fields)
    made.__doc__ = kind.__doc__.strip().split("\n\n")[0]
    return made


def field_help(kind):
    """{field: text} from the lines `name: text` of the docstrings of a technique and its bases."""
    found = {}
    for cls in reversed(kind.__mro__):
        name = None
        for line in (cls.__doc__ or "").splitlines():
            start = re.match(r"\s*(\w+): (.+)", line)
            if start and start[1] in kind.__dataclass_fields__:
                name = start[1]
                found[name] = start[2].strip()
            elif name and line.strip():
                found[name] += " " + line.strip()
            else:
                name = None
    return found


def plain(name):
    """A class's name as a command names it."""
    return name.lower()


@dataclasses.dataclass
class FinetuneOptions:
    """What to train on, and how.

    Attributes:
        task: one of Tiny Town's tasks.
        data: your own file instead: plain text, or JSONL of text/label or prompt/completion.
        base: a model folder in GPT-2's layout; the shipped base without it.
        head: classify with a new head (mood, slot_tagging, labelled files) instead of in words.
        out: folder for the adapter, the log and the checkpoints.
        steps: optimizer steps; without it what the task asks for.
        batch_size: rows a step.
        learning_rate: the peak; without it the technique's own.
        seed: of the order, the initialisation and dropout.
        device: cpu, cuda, mps, or auto.
        precision: float32, bfloat16, or auto.
        gradient_checkpointing: compute activations twice instead of keeping them.
        eval_every: steps between evaluations.
        checkpoint_every: steps between checkpoints.
        resume: go on where the run in `out` stopped.
    """

    task: str = "dialect"
    data: Path | None = None
    base: Path | None = None
    head: bool = False
    out: Path = Path("runs/finetune")
    steps: int | None = None
    batch_size: int = 16
    learning_rate: float | None = None
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    gradient_checkpointing: bool = False
    eval_every: int = 50
    checkpoint_every: int | None = None
    resume: bool = False


def run_finetune(technique, options):
    """Attach, train, test, save; prints what changed."""
    import torch

    from minipeft.checkpoint import save_adapter
    from minipeft.head import Head
    from minipeft.technique import report
    from minipeft.training import TrainingConfig, train

    lesson = material(options.task, options.data, options.seed, options.head)
    model, tokenizer = open_base(options.base)
    torch.manual_seed(options.seed)
    if options.head:
        Head(len(lesson.labels), lesson.per_token).attach(model, "head")
    before = lesson.score(model, tokenizer)
    technique.attach(model, "adapter")
    first = int(os.environ.get("RANK", "0")) == 0  # under torchrun one process speaks and saves
    if first:
        print(str(report(model)).splitlines()[-1])
    fields = {f.name for f in dataclasses.fields(TrainingConfig)}
    values = {k: v for k, v in vars(options).items() if k in fields}
    steps = lesson.steps if options.steps is None else options.steps
    own = {"steps": steps, "random_starts": lesson.random_starts}
    config = TrainingConfig(**values | own)
    result = train(
        model,
        lesson.encode(tokenizer, model),
        config,
        evaluate=lambda m: {lesson.metric: lesson.score(m, tokenizer)},
        floor=lesson.best,
        folder=options.out,
        resume=options.resume,
    )
    if result.interrupted:
        return 130
    if not first:
        return 0
    names = [attachment.name for attachment in model.attachments]
    for name in names:
        save_adapter(model, options.out / name, name)
    best = "" if lesson.best is None else f", best possible {lesson.best:.3f}"
    after = lesson.score(model, tokenizer)
    print(f"{lesson.metric} on the test set: {before:.3f} before, {after:.3f} after{best}")
    print(f"saved in {options.out}: {', '.join(names)}")
    return 0


@command
def evaluate(
    adapter: tuple[Path, ...] = (),
    task: str = "dialect",
    data: Path | None = None,
    head: bool = False,
    base: Path | None = None,
):
    """Measure a base, with adapters or without.

    Args:
        adapter: adapter folders, put on in this order.
        task: one of Tiny Town's tasks.
        data: your own file instead.
        head: measure the head that is among the adapters.
        base: a model folder; the shipped base without it.
    """
    from minipeft.evaluation import METRICS
    from minipeft.town import home_documents

    lesson = material(task, data, head=head)
    model, tokenizer = open_adapted(base, adapter)
    best = "" if lesson.best is None else f" (best possible {lesson.best:.3f})"
    print(f"{lesson.metric}: {lesson.score(model, tokenizer):.3f}{best}")
    if data is None and base is None and not head:
        home = METRICS["nats"](model, home_documents(), tokenizer)
        print(f"home stories: {home:.3f} nats a document")


@command
def generate(
    prompt: str = "",
    adapter: tuple[Path, ...] = (),
    base: Path | None = None,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    no_repeat_ngram: int = 0,
    seed: int | None = None,
):
    """Write text, token by token.

    Args:
        prompt: the beginning; nothing lets the model begin.
        adapter: adapter folders, put on in this order.
        base: a model folder; the shipped base without it.
        max_new_tokens: how many tokens at most.
        temperature: 0 is greedy.
        top_k: choose among the k likeliest only.
        top_p: choose among the likeliest that together have this probability.
        repetition_penalty: above 1 makes used tokens less likely.
        no_repeat_ngram: never repeat so many tokens in a row; 0 is off.
        seed: same seed, same text.
    """
    from minipeft.decoding import stream

    model, tokenizer = open_adapted(base, adapter)
    stream(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        no_repeat_ngram=no_repeat_ngram,
        seed=seed,
    )
    print()


@command
def merge(out: Path, adapter: tuple[Path, ...] = (), base: Path | None = None):
    """Fold adapters into their base; transformers opens the result.

    Args:
        out: the new model folder.
        adapter: adapter folders, folded in this order.
        base: the model folder they were trained on; the shipped base without it.
    """
    from minipeft.technique import merge as fold

    if not adapter:
        raise ValueError("name at least one --adapter folder to fold in")
    model, tokenizer = open_adapted(base, adapter)
    fold(model).save_pretrained(out)
    tokenizer.save(out)
    print(f"model in {out}")


@command
def compare(
    techniques: tuple[str, ...] = ("full", "BitFit", "LoRA"),
    tasks: tuple[str, ...] = ("dialect", "mood"),
    seeds: tuple[int, ...] = (0,),
    steps: int | None = None,
    out: Path = Path("runs/compare"),
    base: Path | None = None,
    jobs: int = 2,
    quick: bool = False,
):
    """Train techniques side by side from one base.

    Args:
        techniques: names of techniques, or "all".
        tasks: names of tasks, or "all".
        seeds: one run each; tables show the mean.
        steps: optimizer steps; without it what each task asks for.
        out: folder for results.json, the table and the pictures; finished cells are kept.
        base: a model folder; the shipped base without it.
        jobs: processes, one thread each.
        quick: one seed and a third of the steps, for a first look.
    """
    from minipeft.compare import Plan, chosen_presets
    from minipeft.compare import compare as run
    from minipeft.town import TASKS

    names = tuple(TASKS) if list(tasks) == ["all"] else tasks
    plan = Plan(
        chosen_presets(techniques),
        tuple(name.replace("-", "_") for name in names),
        seeds[:1] if quick else seeds,
        steps or (100 if quick else None),
    )
    run(plan, out, base, jobs)
    print(f"results, table and pictures in {out}")


@command
def demo(out: Path = Path("runs/demo"), jobs: int = 2):
    """Fine-tune the shipped base three ways on two tasks.

    Prints what each way reaches and costs, and text before and after; saves the pictures.

    Args:
        out: folder for everything that is made; finished runs in it are not made again.
        jobs: processes, one thread each.
    """
    from minipeft.demo import demo as run

    run(out, jobs)


@command
def bench(
    names: tuple[str, ...] = (),
    rounds: int = 7,
    out: Path = Path("data/benchmarks"),
    device: Literal["cpu", "cuda"] = "cpu",
):
    """Time us against the libraries, in turn, on one thread.

    Args:
        names: which benchmarks; all without it.
        rounds: how often each pair is timed.
        out: folder for the results, one file for each benchmark, and the picture.
        device: where both sides compute.
    """
    from minipeft.bench import bench as run

    run(names, rounds, out, device=device, apart=True)


@command
def doctor():
    """Examine this machine: versions, devices, a numeric self-test."""
    from minipeft.doctor import doctor as examine

    return 0 if examine() else 1


def distill(arguments):
    """Train a smaller model to imitate a larger one."""
    from minipeft import distill as distillation

    prog = f"{PROGRAM} distill"
    options = tyro.cli(distillation.Options, args=arguments, prog=prog, config=FLAT)
    return distillation.distill(options)


def prune(arguments):
    """Take weights, heads, neurons or blocks out of a model."""
    from minipeft import prune as pruning

    prog = f"{PROGRAM} prune"
    return pruning.prune(tyro.cli(pruning.Options, args=arguments, prog=prog, config=FLAT))


def shrink(arguments):
    """Fine-tune, prune, distil, quantise: one small model."""
    from minipeft import prune as pruning

    prog = f"{PROGRAM} shrink"
    options = tyro.cli(pruning.ShrinkOptions, args=arguments, prog=prog, config=FLAT)
    pruning.shrink(options, material(options.task, options.data, options.seed))
    print(f"models and results in {options.out}")
    return 0


@command
def pretrain(out: Path = Path("data"), seed: int = 0):
    """Rebuild data/: the vocabulary, the base model, the floors.

    Args:
        out: the folder to write.
        seed: of the world, the documents and the training.
    """
    from minipeft.town import build_data

    build_data(out, seed)


@command
def memory(
    technique: str = "qlora",
    n_layer: int = 24,
    n_head: int = 16,
    d_model: int = 2048,
    vocab_size: int = 50257,
    context_length: int = 2048,
    batch: int = 1,
    time: int = 1024,
    dtype: Literal["float32", "bfloat16"] = "bfloat16",
    optimizer: Literal["adamw", "adamw_8bit", "paged"] = "adamw",
    checkpointing: bool = True,
    devices: int = 8,
    fits: float = 8.0,
    measure: bool = False,
):
    """What training costs in memory, and whether it fits.

    By formula, in GiB. Without flags: 1.3 B parameters with QLoRA, on a device of 8 GB.

    Args:
        technique: any technique, with its own settings.
        n_layer: blocks.
        n_head: attention heads.
        d_model: width.
        vocab_size: tokens in the vocabulary.
        context_length: longest text.
        batch: rows in one backward pass.
        time: tokens in a row.
        dtype: of weights and computation.
        optimizer: plain, with 8-bit moments, or paged.
        checkpointing: compute activations twice instead of keeping them.
        devices: how many share the work in the last line.
        fits: GB of the device in question.
        measure: train two steps of it here and print the measured figure beside; mind the size.
    """
    import torch

    from minipeft import memory as cost
    from minipeft.gpt import GPTConfig
    from minipeft.technique import technique_class

    config = GPTConfig(vocab_size, context_length, n_layer, n_head, d_model)
    run = cost.Run(
        config,
        technique_class(technique)(),
        batch,
        time,
        getattr(torch, dtype),
        optimizer,
        checkpointing,
        device="cpu" if measure else "cuda",
    )
    print(cost.table(run, devices))
    print(cost.verdict(run, fits))
    if measure:
        found, said = cost.measure(run), cost.estimate(run).total
        print(f"measured {found / 2**30:.4f} GB, by formula {said / 2**30:.4f} GB")


@command
def quantize(
    format: str = "nf4",
    base: Path | None = None,
    data: Path | None = None,
    bits: int = 4,
    group_size: int | None = None,
    block_size: int = 64,
    symmetric: bool = False,
    act_order: bool = False,
    steps: int | None = None,
    out: Path | None = None,
):
    """Store the projections in fewer bits; prints size, error and loss.

    Args:
        format: int8, int8-zero-point, nf4, nf4-double, fp4, int4, q4_0, q4_1, q5_0, q5_1, q8_0, rtn
            or gptq; "all" compares them, "sizes" trains models of several widths and compares
            larger ones in few bits with smaller ones in many.
        base: a model folder; the shipped base without it.
        data: your own text to calibrate and test on, instead of Tiny Town's.
        bits: of rtn and gptq, from 2 to 8.
        group_size: columns of rtn and gptq that share a grid; without it the whole row.
        block_size: weights of nf4, fp4 and int4 that share a constant.
        symmetric: grids of rtn and gptq without a zero-point.
        act_order: gptq takes the columns that matter most first.
        steps: training steps, of "all" for its quantisation-aware entries, of "sizes" for each
            model.
        out: folder to write to: the model, where its format has a file; or the comparison.
    """
    from minipeft import quantize as q

    if format in ("all", "sizes"):
        from minipeft import quantize_study as study

        folder = out or Path("runs/quantisation")
        if format == "sizes":
            study.compare_sizes(folder, steps or study.SIZE_STEPS)
        else:
            study.compare_formats(*open_base(base), *q.texts(base, data), folder, steps)
        print(f"results, table and pictures in {folder}")
        return
    settings = q.Settings(format, bits, group_size, block_size, symmetric, act_order)
    q.check(settings)
    model, tokenizer = open_base(base)
    _, report = q.quantize_and_measure(model, tokenizer, settings, *q.texts(base, data))
    print(report)
    if out is not None:
        print(f"model in {q.store(model, tokenizer, settings, out)}")


def lab(arguments):
    """Make and grade assignments: list, make, check, hint, grade."""
    from minipeft.labs.engine.commands import ACTIONS

    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [f"  {name:6} {a.__doc__.splitlines()[0]}" for name, a in ACTIONS.items()]
        print(f"usage: {PROGRAM} lab ACTION [--help] ...\n\n" + "\n".join(lines))
        return 0
    name, *rest = arguments
    if name not in ACTIONS:
        return complain(f"lab: no action {name!r}{nearest(name, ACTIONS)}", 2)
    return tyro.cli(ACTIONS[name], args=rest, prog=f"{PROGRAM} lab {name}", config=FLAT)


COMMANDS = {
    "demo": demo,
    "finetune": finetune,
    "evaluate": evaluate,
    "generate": generate,
    "merge": merge,
    "compare": compare,
    "quantize": quantize,
    "distill": distill,
    "prune": prune,
    "shrink": shrink,
    "pretrain": pretrain,
    "bench": bench,
    "doctor": doctor,
    "lab": lab,
    "memory": memory,
}
