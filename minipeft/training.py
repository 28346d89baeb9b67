r"""The training loop: one for pre-training, fine-tuning, distillation and pruning.

    (Train 1)   lr_s  = peak (s + 1) / W                              warm-up, steps s = 0 .. W-1
    (Train 2)   lr_s  = peak [m + (1 - m) d(u)],  u = (s - W) / (S - W)       m = min_lr_ratio
                d(u)  = 1 (constant),  1 - u (linear),  (1 + cos(pi u)) / 2 (cosine)
    (Train 3)   L     = (1 / N) sum over micro-batches of n_i L_i + extra     N = sum n_i
    (Train 4)   g     = g min(1, clip / |g|)                          |g| over all tensors

S is the number of steps, W the number of warm-up steps, L_i the mean over the n_i labels of
micro-batch i that count. Because (Train 3) weights by labels and not by micro-batches, cutting a
batch in pieces, or over processes, changes nothing but the rounding. The optimizer is AdamW
(Loshchilov & Hutter, 2019, arXiv 1711.05101); weight decay touches matrices only, never biases,
LayerNorms or scales.

One step is: micro-batches forward and backward, the check that all is finite, (Train 4), the
optimizer, `technique.after_step` and the user's own, the gradients cleared. A step depends on the
seed and its number, the tensors, and torch's random state; resume.py keeps all of them, so that a
run that was stopped and resumed is bitwise the run that was not.

Under `torchrun` every process runs this same loop. `batch_size` counts the rows of one optimizer
step over all processes, so a run means the same on one process or eight.

How this differs from transformers' Trainer: no callbacks, two lists of functions instead; labels
are aligned; the last step's learning rate is not zero, so no step is wasted.

Footguns: dividing by the number of micro-batches when their label counts differ; clipping before
the last micro-batch is in; calling `model.loss` around DistributedDataParallel, which then never
sees the forward and never averages; a schedule that counts micro-batches.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import importlib
import math
import os
import random
import signal
import threading
import time
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import distributed, nn

from minipeft import resume as resuming
from minipeft import technique
from minipeft.cross_entropy import IGNORE
from minipeft.dataset import BatchOrder, Room, collate
from minipeft.evaluation import classes_of, evaluating
from minipeft.memory import optimizer_bytes
from minipeft.run_log import RunLog

REALS = ("learning_rate", "clip", "weight_decay")  # what is counted in TrainingConfig is whole
LEARNING_RATE = 1e-3  # for tensors that belong to no technique: the whole model, trained plainly


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. Raises ValueError at construction for values that make no sense.

    steps: optimizer steps.
    batch_size: rows in one optimizer step, over all micro-batches and processes.
    learning_rate: the peak; None takes each technique's own default.
    schedule: "linear", "cosine" or "constant", after the warm-up.
    warmup: share of the steps in which the learning rate rises.
    min_lr_ratio: where the decay ends, as a share of the peak.
    betas: AdamW's averages of the gradient and of its square.
    weight_decay: AdamW's, on matrices only.
    clip: largest norm of the gradient; None for no limit.
    accumulate: in how many micro-batches a process cuts its rows, to save memory.
    seed: of the order, the starts, dropout.
    pool: batches sorted by length together, to waste less on padding; 1 for none.
    random_starts: largest start position; half the batches start at 0, the others anywhere up to
    it.
    precision: "float32", "bfloat16" (autocast), or "auto": bfloat16 on GPUs that have it.
    gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
    device: "cpu", "cuda", "mps", or "auto" for the first there is of cuda, mps, cpu.
    eval_every: steps between evaluations (the last step is always evaluated); None for no others.
    checkpoint_every: steps between checkpoints; None saves on Ctrl-C alone.
    log_every: steps between lines where there is no progress bar.
    """

    steps: int = 200
    batch_size: int = 16
    learning_rate: float | None = None
    schedule: str = "linear"
    warmup: float = 0.05
    min_lr_ratio: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    accumulate: int = 1
    seed: int = 0
    pool: int = 1
    random_starts: int = 0
    precision: str = "auto"
    gradient_checkpointing: bool = False
    device: str = "auto"
    eval_every: int | None = None
    checkpoint_every: int | None = None
    log_every: int = 20

    def __post_init__(self):
        object.__setattr__(self, "betas", tuple(self.betas))
        choices = {"schedule": tuple(DECAYS), "precision": ("auto", "float32", "bfloat16")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is none of {allowed}")
        limits = {
            "positive": ("steps", "batch_size", "learning_rate", "clip", "accumulate", "pool")
            + ("eval_every", "checkpoint_every", "log_every"),
            "at least 0": ("random_starts", "weight_decay"),
        }
        for limit, names in limits.items():
            for name in names:
                value = getattr(self, name)
                if value is not None and not (value > 0 or (limit == "at least 0" and value == 0)):
                    raise ValueError(f"{name}={value} must be {limit}")
                if value is not None and name not in REALS and not isinstance(value, Integral):
                    raise ValueError(f"{name}={value} must be a whole number")
        for name in ("warmup", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is not a share between 0 and 1")

    def settings(self):
        """The values as plain types, for config.json."""
        return dataclasses.asdict(self) | {"betas": list(self.betas)}


@dataclass
class TrainingResult:
    """What a run did. `losses[s]` is step s's mean loss per label in nats, extra terms left out.

    seconds: in steps, evaluations and files left out. tokens: real ids read. interrupted: stopped
    by Ctrl-C, `steps` of them done. evaluations: (step, {name: value}) in order. optimizer_bytes:
    the optimizer's state.
    """

    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, dict]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    optimizer_bytes: int = 0
    interrupted: bool = False

    @property
    def steps(self):
        return len(self.losses)


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not a number; the tensors are still those of the step before."""


def train(
    model,
    data,
    config=None,
    *,
    loss_fn=None,
    extra_losses=(),
    after_step=(),
    evaluate=None,
    floor=None,
    folder=None,
    resume=False,
    make_optimizer=None,
    show=True,
):
    """Train what requires a gradient in `model`, in place, on `data`. Returns a TrainingResult.

    data: list of dataset.Encoded (`encode_all`). loss_fn(model, batch): mean over the batch's
    labels that count; None is `model.loss`. extra_losses: f(model) -> scalar or None, added once
    a step. after_step: f(model, step, steps), called after the optimizer with the gradients still
    there; steps count from 1. evaluate(model): a number or {name: number}, called in eval mode
    under no_grad; floor: the best possible value, for the log. folder: gets config.json,
    log.jsonl and checkpoints; with it Ctrl-C saves and returns, and `resume=True` goes on.
    make_optimizer(groups): an optimizer over parameter groups in place of AdamW. show: progress.

    The global random state is left as it was. Raises ValueError for input that cannot be trained
    on, NonFiniteError (a FloatingPointError) when a loss or gradient stops being a number.
    """
    config = config or TrainingConfig()
    world = processes(config)
    device = world.device
    with contextlib.ExitStack() as stack:
        stack.enter_context(forked_random_state(device))
        torch.manual_seed(config.seed + world.rank)
        model.to(device)
        stack.enter_context(training_mode(model, config.gradient_checkpointing))
        run = Run(model, data, config, world, loss_fn, extra_losses, after_step, make_optimizer)
        log = RunLog(folder if world.rank == 0 else None, config, show and world.rank == 0, floor)
        keeper = resuming.Keeper(folder, run) if folder is not None else None
        if keeper is not None:
            keeper.begin(resume)
        stack.callback(log.close)
        log.begin(run)
        stop = stack.enter_context(StopOnSignal(enabled=keeper is not None))
        loop(run, log, keeper, stop, evaluate)
    return run.result


def loop(run, log, keeper, stop, evaluate):
    """Steps, evaluations and checkpoints until the last step or a signal."""
    config, result = run.config, run.result
    if evaluate is not None and config.eval_every and result.steps == 0:
        run.evaluate(evaluate, log)
    while result.steps < config.steps:
        record = run.step(stop.asked)
        log.step(record)
        last, done = result.steps == config.steps, result.steps
        due = last or (config.eval_every and done % config.eval_every == 0)
        if evaluate is not None and due:
            run.evaluate(evaluate, log)
        due = config.checkpoint_every and (last or done % config.checkpoint_every == 0)
        result.interrupted = run.stop_agreed and not last
        due = due or (last and keeper is not None and keeper.path.exists())  # it says: unfinished
        if keeper is not None and (due or run.stop_agreed):
            keeper.save()
        if result.interrupted:
            log.say(f"stopped after step {done} of {config.steps}; resume with {keeper.path}")
            break


class Run:
    """One training run: the model, its optimizer, and how far it is."""

    def __init__(self, model, data, config, world, loss_fn, extra_losses, after_step, optimizer):
        self.model, self.data, self.config, self.world = model, data, config, world
        self.after_step_functions = after_step
        self.result, self.stop_agreed = TrainingResult(), False
        self.autocast = autocast(config.precision, world.device)
        check_data(model, data)
        if loss_fn is None:
            check_labels(model, data)
        lengths = [len(row.ids) for row in data]
        self.order = BatchOrder(lengths, config.batch_size, config.seed, config.pool)
        parts = world.size * config.accumulate
        if config.batch_size < parts:
            raise ValueError(
                f"batch_size={config.batch_size} cannot be cut into {parts} parts "
                f"({world.size} processes x accumulate={config.accumulate})"
            )
        groups = parameter_groups(model, config)
        self.optimizer = (optimizer or (lambda g: adamw(g, config, world.device)))(groups)
        self.optimizer.zero_grad(set_to_none=True)  # what is left of a backward before this run
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]
        self.objective = world.wrap(Objective(model, loss_fn or language_model_loss, extra_losses))

    def step(self, stop=False):
        """One optimizer step. Returns its record for the log."""
        began, number = time.perf_counter(), self.result.steps
        scale = learning_rate_scale(self.config, number)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"] = peak * scale
        indices = self.order.batch(number)
        loss, tokens = self.forward_backward(indices, number)
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None]
        norm = nn.utils.get_total_norm(gradients)
        loss, norm, self.stop_agreed = self.world.agree(loss, norm, stop)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise NonFiniteError(non_finite_message(self, number, indices, loss))
        clip_gradients(gradients, norm, self.config.clip)
        self.optimizer.step()
        done, steps = number + 1, self.config.steps
        technique.after_step(self.model, done, steps)
        for act in self.after_step_functions:
            act(self.model, done, steps)
        self.optimizer.zero_grad(set_to_none=True)
        if number == 0:
            self.result.optimizer_bytes = optimizer_bytes(self.optimizer)
        self.result.losses.append(loss)
        self.result.tokens += tokens
        self.result.step_seconds.append(time.perf_counter() - began)
        self.result.seconds += self.result.step_seconds[-1]
        return self.record(norm)

    def forward_backward(self, indices, number):
        """Gradients of (Train 3) over this process's micro-batches; its share of the loss, and the
        number of ids that all processes read.
        """
        rows = [self.data[i] for i in indices]
        start = random_start(self.config, number, self.model, max(len(r.ids) for r in rows))
        counted = max(1, sum(r.count for r in rows))  # N, over all processes
        parts = self.world.size * self.config.accumulate
        losses = []
        for i in range(self.config.accumulate):
            part = slice(self.world.rank * self.config.accumulate + i, None, parts)
            batch = collate(rows[part], start, indices[part]).to(self.world.device)
            weight = sum(r.count for r in rows[part]) / counted
            last = i == self.config.accumulate - 1
            with self.world.no_sync(self.objective, not last):
                with self.autocast:
                    objective, loss = self.objective(batch, weight, self.world.size, last)
                objective.backward()
            losses.append(loss)
        return torch.stack(losses).sum(), sum(len(r.ids) for r in rows)

    def evaluate(self, evaluate, log):
        """Call the user's evaluation in eval mode, without touching the run's random state."""
        if self.world.rank == 0:
            with forked_random_state(self.world.device), evaluating(self.model):
                values = evaluate(self.model)
            values = values if isinstance(values, dict) else {"value": values}
            values = {name: float(value) for name, value in values.items()}
            self.result.evaluations.append((self.result.steps, values))
            log.evaluation(self.result.steps, values)

    def record(self, norm):
        """What log.jsonl says about the step just done."""
        result = self.result
        return {
            "step": result.steps,
            "loss": result.losses[-1],
            "learning_rate": max(group["lr"] for group in self.optimizer.param_groups),
            "gradient_norm": norm,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 4),
        }


class Objective(nn.Module):
    """A module whose forward is the loss: what DistributedDataParallel has to be put around."""

    def __init__(self, model, loss_fn, extra_losses):
        super().__init__()
        self.model, self.loss_fn, self.extra_losses = model, loss_fn, extra_losses

    def forward(self, batch, weight, size, last):
        """What to call backward on, and the batch's share of the loss to report. (Train 3)

        weight: n_i / N. size: number of processes; gradients are averaged over them, so the
        loss is multiplied by it. last: add the extra terms, once a step.
        """
        loss = weight * self.loss_fn(self.model, batch)  # (Train 3)
        objective = loss * size
        extras = [technique.extra_loss, *self.extra_losses] if last else []
        for extra in (f(self.model) for f in extras):
            objective = objective if extra is None else objective + extra
        return objective, loss.detach()


def language_model_loss(model, batch):
    """The default loss: `model.loss`, cross-entropy in nats, a head's classes too."""
    return model.loss(batch.ids, batch.labels, start=batch.start, lengths=batch.lengths)


def check_data(model, data):
    """Raise ValueError naming the first example that does not fit the context or the vocabulary."""
    room, vocabulary = Room(model, "error"), model.config.vocab_size + model.embed.extra_ids
    for number, row in enumerate(data):
        if not row.ids:
            raise ValueError(f"example {number} has no ids; a text begins with the end-of-text id")
        room.fit(number, row, True)
        if not 0 <= min(row.ids) <= max(row.ids) < vocabulary:
            raise ValueError(
                f"example {number} has ids from {min(row.ids)} to {max(row.ids)}; the model's "
                f"vocabulary has {vocabulary}: was it encoded with another tokenizer?"
            )


def check_labels(model, data):
    """Raise ValueError naming the first example whose labels are none of what the head decides."""
    pools, classes = getattr(model.head, "pools", False), classes_of(model)
    for number, row in enumerate(data):
        whole = isinstance(row.labels, int)
        if whole != pools or not (whole or len(row.labels) == len(row.ids)):
            given = "one label" if whole else f"{len(row.labels)} labels for {len(row.ids)} ids"
            raise ValueError(
                f"example {number} has {given}, and this model's head decides "
                f"{'once a row' if pools else 'at every id'}: encode_all is for text, "
                "encode_all_for_head for a Head"
            )
        labels = [row.labels] if whole else row.labels
        outside = [label for label in labels if label != IGNORE and not 0 <= label < classes]
        if outside:
            raise ValueError(
                f"example {number} has the label {outside[0]}; this model's head decides among "
                f"{classes}, and {IGNORE} is a label that does not count"
            )


# -- the optimizer


def parameter_groups(model, config):
    """AdamW's groups: each technique at its own rate; what is no matrix (vectors, scalars, QAT's
    steps) without weight decay.
    """
    trained = {id(p): p for p in technique.trainable_parameters(model)}
    if not trained:
        raise ValueError("nothing in this model requires a gradient; attach a technique first")
    peaks = dict.fromkeys(trained, LEARNING_RATE)
    for attachment in model.attachments:
        for parameter in attachment.parameters().values():
            peaks[id(parameter)] = attachment.technique.learning_rate
    groups = {}
    for key, parameter in trained.items():
        peak = peaks[key] if config.learning_rate is None else config.learning_rate
        decay = config.weight_decay if parameter.ndim == 2 else 0.0
        groups.setdefault((peak, decay), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": wd} for (lr, wd), p in groups.items()]


def adamw(groups, config, device):
    """torch's AdamW in its fused form where there is one: a third of the time on a CPU."""
    fused = device.type in ("cpu", "cuda", "mps")
    return torch.optim.AdamW(groups, betas=config.betas, fused=fused)


def learning_rate_scale(config, step):
    """The learning rate of step 0, 1, ... as a share of the peak."""
    warm = round(config.warmup * config.steps)
    if step < warm:
        return (step + 1) / warm  # (Train 1)
    u = (step - warm) / max(1, config.steps - warm)
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * DECAYS[config.schedule](u)  # (Train 2)


DECAYS = {
    "linear": lambda u: 1 - u,
    "cosine": lambda u: (1 + math.cos(math.pi * u)) / 2,
    "constant": lambda u: 1.0,
}


def clip_gradients(gradients, norm, clip):
    """Scale the gradients, whose joint norm is `norm`, to one of at most `clip`, in place."""
    if clip is not None and norm > clip:
        for gradient in gradients:
            gradient.mul_(clip / norm)  # (Train 4)


def random_start(config, step, model, longest):
    """Start position of a step's rows: 0 in half the steps, else uniform up to `random_starts`, or
    as far as the context allows.
    """
    if not config.random_starts:
        return 0
    room = model.config.context_length - model.embed.position_shift - longest
    chance = random.Random(f"start {config.seed} {step}")
    return (
        0 if chance.random() < 0.5 else chance.randint(0, max(0, min(config.random_starts, room)))
    )


def non_finite_message(run, number, indices, loss):
    """Where it happened, and which gradients are the largest: what one needs to find out why."""
    sizes = {
        name: p.grad.detach().float().abs().max().item()
        for name, p in run.model.named_parameters()
        if p.grad is not None
    }
    # a NaN is larger than everything
    largest = sorted(sizes, key=lambda n: sizes[n] if sizes[n] == sizes[n] else math.inf)[-5:]
    named = ", ".join(f"{n} {sizes[n]:.3g}" for n in reversed(largest))
    return (
        f"step {number + 1}: the loss is {loss} on the batch of examples {list(indices)}. Largest "
        f"gradients: {named or 'none'}. The model still has the tensors of step {number}; try a "
        f"smaller learning rate or a longer warm-up, or look at these examples"
    )


# -- where it runs


def choose_device(name="auto"):
    """The torch.device to train on. Raises ValueError when the one asked for is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    there["cpu"] = True
    if name == "auto":
        return torch.device(next(kind for kind, yes in there.items() if yes))
    kind = name.split(":")[0]
    if kind not in there:
        raise ValueError(f"device={name!r} is none of 'auto', 'cpu', 'cuda', 'mps'")
    if not there[kind]:
        raise ValueError(f"device={name!r}: torch finds none here; use 'auto' or 'cpu'")
    return torch.device(name)


def has_bfloat16(device):
    """Whether the hardware multiplies bfloat16 itself;
    elsewhere it is emulated and slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(precision, device):
    """The context that forward passes run in.

    Raises ValueError when bfloat16 is asked for and not there.
    """
    if precision == "bfloat16" and not has_bfloat16(device):
        raise ValueError(f"precision='bfloat16': this {device.type} has none; use 'float32'")
    wanted = precision == "bfloat16" or (
        precision == "auto" and device.type == "cuda" and has_bfloat16(device)
    )
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


@contextlib.contextmanager
def forked_random_state(device):
    """Whatever is drawn inside, the global random state is afterwards what it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        yield


@contextlib.contextmanager
def training_mode(model, gradient_checkpointing):
    """Train mode inside, every module's own mode and the checkpointing switch restored
    afterwards.
    """
    modes = {module: module.training for module in model.modules()}
    was, model.gradient_checkpointing = model.gradient_checkpointing, gradient_checkpointing
    try:
        yield model.train()
    finally:
        model.gradient_checkpointing = was
        for module, mode in modes.items():
            module.training = mode


# -- several processes


@dataclass(frozen=True)
class World:
    """The processes that train together: `size` of them, this one being `rank`, on `device`."""

    device: torch.device
    rank: int = 0
    size: int = 1
    parallel: bool = False

    def wrap(self, objective):
        if not self.parallel:
            return objective
        # some techniques leave tensors out of a step (AdapterDrop), which must be looked for
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=True)

    def no_sync(self, objective, wait):
        """Between micro-batches gradients stay here;
        only the last one averages them over the processes.
        """
        return objective.no_sync() if self.parallel and wait else contextlib.nullcontext()

    def agree(self, loss, norm, stop):
        """The loss summed over the processes, the norm, and whether any process was asked to
        stop.
        """
        if not self.parallel:
            return loss.item(), norm.item(), stop
        shared = torch.stack([loss, torch.tensor(stop).to(loss)])
        distributed.all_reduce(shared)
        return shared[0].item(), norm.item(), shared[1].item() > 0

    def gather(self, tensor):
        """One tensor from every process, in the order of ranks."""
        if not self.parallel:
            return [tensor]
        mine = tensor.to(self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(everyone, mine)
        return everyone


def processes(config):
    """This process's World:
    alone, or one of those that torchrun started (it sets RANK and WORLD_SIZE).
    """
    device = choose_device(config.device)
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return World(device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        # before there is a group: its functions take the group that is there as a default, and
        # what they hold is never given back (DistributedDataParallel would import it later)
        importlib.import_module("torch.distributed.nn")
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        # at the very end, not after this run: torchrun's store lets nobody meet there twice
        atexit.register(leave_the_group)
    return World(device, distributed.get_rank(), distributed.get_world_size(), True)


def leave_the_group():
    """Give up the group of processes while Python still runs: the last reference joins its threads.

    One of gloo's that still held a tensor when the interpreter ended would abort the process.
    """
    gc.collect()  # DistributedDataParallel is a cycle and holds the group
    distributed.destroy_process_group()


class StopOnSignal:
    """Ctrl-C (and SIGTERM, which torchrun and clusters send) asks for a stop at the end of the
    step;
    a second one stops at once.
    """

    def __init__(self, enabled):
        # Python lets only the main thread set handlers; elsewhere signals do what they always did
        self.enabled = enabled and threading.current_thread() is threading.main_thread()
        self.asked, self.before = False, {}

    def __enter__(self):
        if self.enabled:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self.ask)
        return self

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def __exit__(self, *problem):
        for number, handler in self.before.items():
            signal.signal(number, handler)
