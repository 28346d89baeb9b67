"""`minipeft distill`: a student of fewer layers and neurons, started from the teacher's own and
trained to imitate it. And `python -m minipeft.distill`: what soft labels are worth, measured.

The measurement trains one student of half the teacher's parameters three times, from the same
start, on the same documents in the same order, for the same number of steps. Only what the loss
compares the student with is different:

    hard labels       the word that came                          cross-entropy
    trained teacher   the base's probabilities of every word      KL, at temperature 1
    perfect teacher   the generator's own, exact                  KL, at temperature 1

All three have the same optimum, the truth; a softer label is a less noisy one. Runs are kept in
results.json as they finish, so a measurement that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch

from minipeft import compare, figures, town
from minipeft.atomic import write_atomically, write_json
from minipeft.checkpoint import fingerprint
from minipeft.compressed.importance import check_share, gate_importance, least_important
from minipeft.compressed.layer_matching import layer_map, student_from
from minipeft.compressed.structured_pruning import prune_neurons
from minipeft.compressed.teachers import ExactTeacher, NetworkTeacher, generations
from minipeft.dataset import Example, collate, encode_all, parted, read_examples
from minipeft.doctor import machine
from minipeft.evaluation import BATCH, nats
from minipeft.gpt import GPT
from minipeft.tokenizer import Tokenizer
from minipeft.training import TrainingConfig, train

BEAMS = 5  # Kim & Rush's
CALIBRATION = 128  # texts that the importance of neurons is measured on
TOGETHER = 50  # prompts that the teacher answers at a time
LECTURE = "lecture.json"  # in a run's folder: who teaches what


@dataclass(frozen=True)
class Options:
    """Train a smaller model to imitate a larger one.

    Attributes:
        teacher: a model folder; the shipped base without it.
        layers: how many of the teacher's layers the student is made of.
        neurons: share of these layers' feed-forward neurons that it goes without, the least
            important ones.
        labels: what it learns from: the teacher's probabilities, the teacher's own texts, the exact
            probabilities of Tiny Town, or the data alone.
        data: your own file: plain text, or JSONL; without it documents of Tiny Town.
        documents: how many documents of Tiny Town.
        out: folder for the student, the log and the checkpoints.
        temperature: softens both models' probabilities; this and what follows up to reverse is of
            labels=teacher, alpha of labels=exact too.
        alpha: weight of soft labels against hard ones.
        hidden: weight of the hidden states' squared difference.
        cosine: weight of the angle between hidden states.
        attention: weight of the difference of attention.
        reverse: KL from the student to the teacher instead.
        steps: optimizer steps.
        batch_size: rows a step.
        learning_rate: the peak.
        seed: of the documents and their order.
        device: cpu, cuda, mps, or auto.
        checkpoint_every: steps between checkpoints.
        resume: go on where the run in `out` stopped.
    """

    teacher: Path | None = None
    layers: int = 2
    neurons: float = 0.0
    labels: Literal["teacher", "generated", "exact", "hard"] = "teacher"
    data: Path | None = None
    documents: int = 4000
    out: Path = Path("runs/distill")
    temperature: float = 1.0
    alpha: float = 1.0
    hidden: float = 0.0
    cosine: float = 0.0
    attention: float = 0.0
    reverse: bool = False
    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 2e-3
    seed: int = 0
    device: str = "auto"
    checkpoint_every: int | None = None
    resume: bool = False

    def training(self, **changes):
        """The training loop's settings."""
        names = ("steps", "batch_size", "learning_rate", "seed", "device", "checkpoint_every")
        values = {name: getattr(self, name) for name in names}
        return TrainingConfig(**values | {"schedule": "cosine", "pool": 8} | changes)


def distill(options):
    """Make the student, train it, save it as a model folder; prints what it reaches. Returns the
    exit status.
    """
    check_uses(options)
    folder = Path(options.teacher) if options.teacher is not None else town.base_folder()
    teacher, tokenizer = GPT.from_pretrained(folder).eval(), Tokenizer.load(folder)
    lecture = lecture_of(options, teacher)
    examples, test = corpus(options)
    student = student_of(options, teacher, tokenizer, examples)
    data, loss_fn = lesson(options, teacher, tokenizer, examples)
    sizes = [sum(p.numel() for p in m.parameters()) for m in (teacher, student)]
    print(f"student: {sizes[1]:,} of the teacher's {sizes[0]:,} parameters")
    before = nats(student, test, tokenizer)

    def note(model, step, steps):
        if step == 1:  # not before: until then another run's checkpoint may be in the folder
            write_json(options.out / LECTURE, lecture)

    result = train(
        student,
        data,
        options.training(),
        loss_fn=loss_fn,
        after_step=(note,),
        folder=options.out,
        resume=options.resume,
    )
    if result.interrupted:
        return 130
    student.save_pretrained(options.out / "student")
    tokenizer.save(options.out / "student")
    after, best = nats(student, test, tokenizer), nats(teacher, test, tokenizer)
    print(f"nats a document: {before:.3f} before, {after:.3f} after; the teacher {best:.3f}")
    print(f"student in {options.out / 'student'}")
    return 0


def lecture_of(options, teacher):
    """What a run depends on and its checkpoint does not tell. Raises ValueError when a run that is
    to be resumed had another one.
    """
    names = ("layers", "neurons", "labels", *SOFT)
    mine = {name: getattr(options, name) for name in names} | {"teacher": fingerprint(teacher)}
    path = options.out / LECTURE
    if options.resume and path.exists():
        theirs = json.loads(path.read_text())
        wrong = [
            f"{n} was {theirs.get(n)} and is {v}" for n, v in mine.items() if theirs.get(n) != v
        ]
        if wrong:
            raise ValueError(f"{options.out} cannot be resumed: " + "; ".join(wrong))
    return mine


SOFT = ("temperature", "alpha", "hidden", "cosine", "attention", "reverse")
USES = {"teacher": SOFT, "exact": ("alpha",), "generated": (), "hard": ()}


def check_uses(options):
    """Raise ValueError for an option that was given and that these labels have no use for."""
    for name in SOFT:
        value = getattr(options, name)
        if name not in USES[options.labels] and value != getattr(Options, name):
            users = " or ".join(labels for labels, used in USES.items() if name in used)
            raise ValueError(
                f"{name}={value} means nothing with labels={options.labels}; it is of "
                f"labels={users}"
            )


def student_of(options, teacher, tokenizer, examples):
    """The student before training: layers of the teacher by (Match 1), less the share of their
    neurons that the teacher needs least, by gates, on the first of the examples.
    """
    check_share(options.neurons, "neurons")
    student = student_from(teacher, options.layers)
    if not options.neurons:
        return student
    rows = encode_all(examples[:CALIBRATION], tokenizer, teacher)
    batches = [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]
    importance = gate_importance(teacher, batches, "neurons")
    chosen = layer_map(options.layers, len(teacher.blocks))
    return prune_neurons(student, least_important([importance[m] for m in chosen], options.neurons))


def corpus(options):
    """(examples to learn from, examples to test on)"""
    if options.data is not None:
        return parted(read_examples(options.data))
    return town_examples(options.seed, options.documents), held_out()


def town_examples(seed, count):
    """Documents that the base was not trained on: those come from seed 0."""
    texts = town.pretraining_documents(seed + 1, count)
    return [Example(completion=text) for text in texts]


def held_out():
    """The documents that Tiny Town keeps for measuring."""
    return [Example(completion=text) for text in town.held_out()]


def lesson(options, teacher, tokenizer, examples):
    """(data, loss_fn) for the training loop, from the kind of labels asked for."""
    if options.labels == "generated":
        return generated(options, teacher, tokenizer, examples), None
    data = encode_all(examples, tokenizer, teacher)
    if options.labels == "hard":
        return data, None
    if options.labels == "exact":
        if options.data is not None:
            raise ValueError(
                f"labels=exact: nobody knows the true probabilities of {options.data}; "
                "take labels=teacher"
            )
        return data, ExactTeacher(exact_tables(tokenizer, examples), options.alpha)
    return data, NetworkTeacher(teacher, **{name: getattr(options, name) for name in SOFT})


def exact_tables(tokenizer, examples):
    """Tiny Town's own distribution of every label, sparse."""
    kind = town.mix()
    return [town.soft_labels(tokenizer, kind, x.completion).to_sparse() for x in examples]


def generated(options, teacher, tokenizer, examples):
    """The teacher's text in the place of each example's: its best answer to a prompt, or a sample
    where there is none to answer.
    """
    prompts = [[tokenizer.eot, *tokenizer.encode(x.prompt)] for x in examples]
    answering = any(x.prompt for x in examples)
    how = {"num_beams": BEAMS} if answering else {}
    rows = []
    for i in range(0, len(prompts), TOGETHER):
        some = prompts[i : i + TOGETHER]
        room = teacher.config.context_length - max(map(len, some))
        if room < 1:
            raise ValueError(f"a prompt fills the teacher's {teacher.config.context_length} tokens")
        seed = options.seed * len(prompts) + i  # rows with one prompt differ inside a call alone
        rows += generations(teacher, some, room, tokenizer.eot, seed=seed, **how)
    return rows


# -- what soft labels are worth


ARMS = {"hard labels": "hard", "trained teacher": "teacher", "perfect teacher": "exact"}
STUDY = Options(neurons=0.25, documents=3000, steps=800, device="cpu")
POINTS = 8  # measurements while training


def study(folder, options=None, seeds=(0, 1, 2), say=print):
    """Run what is missing of the comparison, then write results.json, table.md, curves.png and
    pictures.json into `folder`. Returns the results.

    Raises ValueError when the folder holds a comparison with other settings.
    """
    folder = Path(folder)
    results = begin(folder, options or STUDY)
    done = {(c["arm"], c["seed"]) for c in results["cells"]}
    for seed in seeds:
        missing = [arm for arm in ARMS if (arm, seed) not in done]
        for cell in run_seed(results["plan"], seed, missing):
            results["cells"].append(cell)
            write_json(folder / "results.json", results)
            say(f"seed {seed}, {cell['arm']}: {cell['nats']:.3f} nats a document")
    publish(results, folder)
    return results


def begin(folder, options):
    """The results so far, or empty ones with all that is known before training."""
    chosen = ("layers", "neurons", "documents", "steps", "batch_size", "learning_rate")
    plan = {name: asdict(options)[name] for name in (*chosen, "temperature", "alpha")}
    teacher, tokenizer = town.load_base()
    plan["teacher"] = fingerprint(teacher)
    path = folder / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
        if results["plan"] != plan:
            raise ValueError(
                f"{folder} holds a study with {results['plan']}, not {plan}; "
                "remove it to begin again"
            )
        return results
    folder.mkdir(parents=True, exist_ok=True)
    student = student_of(options, teacher, tokenizer, town_examples(0, BATCH))
    models = {"teacher": teacher, "student": student}
    return {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": torch.get_num_threads()},
        "plan": plan,
        "parameters": {n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        "best": town.mix_floor(),
        "teacher": nats(teacher, held_out(), tokenizer),
        "cells": [],
    }


def run_seed(plan, seed, arms):
    """Yield one record for each of the arms: {arm, seed, nats, curve}."""
    if not arms:
        return
    teacher, tokenizer = town.load_base()
    examples = town_examples(seed, plan["documents"])
    for arm in arms:
        settings = {name: value for name, value in plan.items() if name != "teacher"}
        options = Options(**settings, labels=ARMS[arm], seed=seed, device="cpu")
        student = student_of(options, teacher, tokenizer, examples)
        data, loss_fn = lesson(options, teacher, tokenizer, examples)
        config = options.training(eval_every=max(1, options.steps // POINTS))
        result = train(
            student,
            data,
            config,
            loss_fn=loss_fn,
            evaluate=lambda model: nats(model, held_out(), tokenizer),
            show=False,
        )
        curve = [(step, values["value"]) for step, values in result.evaluations]
        yield {"arm": arm, "seed": seed, "nats": curve[-1][1], "curve": curve}


def publish(results, folder):
    """table.md, curves.png and pictures.json from the results alone."""
    table = compare.markdown(*summary(results))
    write_atomically(folder / "table.md", (table + "\n").encode())
    first = results["plan"]["steps"] // 4  # before that the picture would show nothing else
    curves = {arm: [p for p in mean_curve(results, arm) if p[0] >= first] for arm in ARMS}
    references = {"the teacher": results["teacher"], "best possible": results["best"]}
    name = "curves.png"
    _, alt = figures.learning_curves(
        folder / name, curves, references, "What soft labels are worth", "nats a document"
    )
    write_json(folder / "pictures.json", {name: alt})


def runs(results, arm):
    """{seed: record} of one arm."""
    return {c["seed"]: c for c in results["cells"] if c["arm"] == arm}


def mean_curve(results, arm):
    """[(step, mean over seeds)]"""
    curves = [c["curve"] for c in runs(results, arm).values()]
    return [(points[0][0], statistics.mean(v for _, v in points)) for points in zip(*curves)]


def summary(results):
    """(title, head, rows): nats, the distance to the best possible, and how much less than with
    hard labels, seed by seed.
    """
    seeds = sorted(runs(results, "hard labels"))
    hard = runs(results, "hard labels")
    rows = []
    for arm in ARMS:
        mine = runs(results, arm)
        values = [mine[s]["nats"] for s in seeds]
        gains = [hard[s]["nats"] - mine[s]["nats"] for s in seeds]
        mean = statistics.mean(values)
        gain = "-" if arm == "hard labels" else with_spread(gains)
        rows.append([arm, with_spread(values), f"{mean - results['best']:.3f}", gain])
    above = results["teacher"] - results["best"]
    rows.append(["the teacher itself", f"{results['teacher']:.3f}", f"{above:.3f}", "-"])
    rows.append(["best possible", f"{results['best']:.3f}", "0.000", "-"])
    share = results["parameters"]["student"] / results["parameters"]["teacher"]
    plan = results["plan"]
    narrower = f" with {100 - 100 * plan['neurons']:g} % of their neurons" * bool(plan["neurons"])
    title = (
        f"A student of {plan['layers']} layers{narrower} ({100 * share:.1f} % of the parameters) "
        f"after {plan['steps']} steps of {plan['batch_size']} documents, mean over seeds {seeds}"
    )
    return title, ["labels", "nats a document", "above best", "better than hard by"], rows


def with_spread(values):
    """The mean and the standard deviation over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {spread:.3f}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    study(town.data_folder() / "results" / "distillation")
