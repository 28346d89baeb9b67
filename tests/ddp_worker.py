"""What each process of test_ddp.py runs, under torchrun or alone: `python -m tests.ddp_worker OUT`.

Writes the losses of every scenario to OUT/NAME.RANK.json and, from the first process, the trained
tensors to OUT/NAME.safetensors.
"""

import atexit
import copy
import dataclasses
import gc
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from minipeft import Head, LoRA
from minipeft.dataset import Encoded
from minipeft.resume import model_tensors
from minipeft.training import NonFiniteError, TrainingConfig, train
from tests.tiny import CONFIG, tiny_model

RANK = int(os.environ.get("RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))


def rows(count=14):
    """Rows of different lengths; a third of them have few labels that count, one has none."""
    made = []
    for i in range(count):
        ids = [(7 * i + 3 * t) % 97 for t in range(2 + (5 * i) % 9)]
        labels = [(t + 1) % 97 for t in ids]
        hidden = len(ids) if i == 5 else len(ids) - 1 if i % 3 == 0 else 0
        made.append(Encoded(ids, [-100] * hidden + labels[hidden:]))
    return made


def lora(config=CONFIG):
    torch.manual_seed(4)
    return LoRA(rank=2).attach(tiny_model(config, torch.float32))


def pull(model):
    return 0.1 * sum(p.square().sum() for p in model.parameters() if p.requires_grad)


def run(out, name, model, data=None, expect=None, **options):
    """Train and write down what came out."""
    known = {f.name for f in dataclasses.fields(TrainingConfig)}
    settings = {k: options.pop(k) for k in list(options) if k in known}
    settings = {"steps": 4, "batch_size": 8, "device": "cpu", "learning_rate": 1e-2} | settings
    result, problem = None, ""
    try:
        result = train(model, data or rows(), TrainingConfig(**settings), show=False, **options)
    except NonFiniteError as error:
        problem = str(error)
    losses = [] if result is None else result.losses
    found = {"losses": losses, "tokens": result.tokens if result else 0, "problem": problem}
    found["interrupted"] = bool(result and result.interrupted)
    found["evaluations"] = [] if result is None else result.evaluations
    (out / f"{name}.{RANK}.json").write_text(json.dumps(found))
    if RANK == 0:
        tensors = {n: t.detach().clone() for n, t in model_tensors(model).items()}
        save_file(tensors, out / f"{name}.safetensors")


def interrupt_the_last_process(model, step, steps):
    if step == 2 and RANK == WORLD - 1:
        os.kill(os.getpid(), signal.SIGINT)


def poison(model, batch):
    """A loss that is not a number in the second step, in the last process alone."""
    loss = model.loss(batch.ids, batch.labels)
    poison.calls += 1
    return loss * float("nan") if poison.calls == 2 and RANK == WORLD - 1 else loss


def threads(out):
    """Write down the names of this process's threads, as Linux tells them."""
    tasks = Path("/proc/self/task").glob("*/comm")
    (out / f"threads.{RANK}.json").write_text(json.dumps([t.read_text().strip() for t in tasks]))


def main(out):
    atexit.register(threads, out)  # registered first, so called after all of training's own
    torch.set_num_threads(1)
    gc.disable()  # by itself it collects at some time or other; the end has to see to it
    run(out, "full", tiny_model(dtype=torch.float32), clip=0.1)
    run(out, "lora", lora(), accumulate=2, extra_losses=[pull], random_starts=9, pool=2)
    torch.manual_seed(4)
    head = Head(num_labels=3).attach(tiny_model(dtype=torch.float32))
    classes = [Encoded(r.ids, i % 3) for i, r in enumerate(rows())]
    run(out, "head", head, classes, evaluate=lambda m: {"rank": RANK}, gradient_checkpointing=True)
    poison.calls = 0
    run(out, "poison", lora(), loss_fn=poison)
    start = lora(dataclasses.replace(CONFIG, dropout=0.3))
    run(out, "whole", copy.deepcopy(start))
    stopped = copy.deepcopy(start)
    act = [interrupt_the_last_process]
    run(out, "stopped", stopped, after_step=act, folder=out / "run")
    run(out, "resumed", copy.deepcopy(start), folder=out / "run", resume=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
