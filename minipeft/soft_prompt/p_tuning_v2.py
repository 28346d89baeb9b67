r"""P-tuning v2 (Liu et al., 2021, arXiv 2110.07602).

Prefix tuning for understanding: prompts in every layer, trained as they are, with a classifier on
top in place of words that stand for labels.

    (P-tuning v2 1)   head(x) = attn(q, [P_k; K], [P_v; V])     P_k, P_v in R^(p x d) of each layer
    (P-tuning v2 2)   y   = W_c x_last + b_c                    a class for the row, or
                      y_t = W_c x_t + b_c                       a tag for each token (Head)
    (P-tuning v2 3)   min over P, W_1 .. W_k of sum_i (|D_i| / sum_j |D_j|) L_i(P, W_i)

(P-tuning v2 3) is multi-task training: tasks share the prompt P and keep a head each; each step
draws its task with probability proportional to the task's size. `adapt` then goes on with one task.

Trained parameters: 2 p L' D with prompts on L' of the L layers, plus Head's C D + C.

    P_k, P_v    N(0, 1)

Reduces to: prefix tuning without the MLP; with prompts on fewer layers, the paper's study of depth.

How this differs from the authors' code: theirs can put the MLP back (here that is PrefixTuning);
theirs trains the head at the prompt's learning rate too, as here. peft has no P-tuning v2, its
flat prefix is the same function.

Footguns: the best prompt length depends on the task (easy classification below 20, hard sequence
labelling about 100); a learning rate below 0.02; a new head that does not train because it was
attached and then left out of the optimizer; tags of padding counted in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from minipeft.cross_entropy import cross_entropy
from minipeft.head import Head
from minipeft.soft_prompt.prefix_tuning import install_prefix
from minipeft.soft_prompt.prompt_tuning import check_prompt_length
from minipeft.technique import Technique, attachment_of, detach, set_adapter

SHARED = "shared"  # the name of a prompt that several tasks use


@dataclass(frozen=True)
class PTuningV2(Technique):
    """Deep prompts without re-parameterisation. (P-tuning v2 1)

    prompt_length: p, virtual tokens.
    dropout: on the prompts, in training.
    layers: numbers of the layers that get prompts, from 0; None means all.
    """

    prompt_length: int = 20
    dropout: float = 0.0
    layers: tuple[int, ...] | None = None

    learning_rate: ClassVar[float] = 6e-2
    cannot_merge: ClassVar[str | None] = "prompts are more keys and values, no weight holds them"

    def check(self, config):
        check_prompt_length("prompt_length", self.prompt_length, config)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")
        layers = range(config.n_layer) if self.layers is None else self.layers
        known = all(n in range(config.n_layer) for n in layers)
        if not len(layers) or not known or len(set(layers)) < len(layers):
            raise ValueError(
                f"layers={self.layers}: give some of 0 to {config.n_layer - 1}, each once"
            )

    def install(self, model, attachment):
        install_prefix(
            model, attachment, self.prompt_length, dropout=self.dropout, layers=self.layers
        )

    def count(self, config):
        layers = config.n_layer if self.layers is None else len(self.layers)
        return 2 * self.prompt_length * layers * config.d_model


# -- several tasks


class Task(NamedTuple):
    """What a task needs: classes, whether each token is tagged, and the length of its prompt."""

    num_labels: int
    per_token: bool = False
    prompt_length: int = 20


def head_of(task):
    """The name under which a task's classifier is attached."""
    return f"{task} head"


def attach_tasks(model, tasks, shared=None):
    """Put a classifier for each task (name -> Task) on the model, and a prompt for each, of the
    task's own length; or, with `shared` a PTuningV2, one prompt for all. Returns the model with
    the first task selected.
    """
    if shared is not None:
        shared.attach(model, SHARED)
    for name, task in tasks.items():
        if shared is None:
            PTuningV2(task.prompt_length).attach(model, name)
        Head(task.num_labels, task.per_token).attach(model, head_of(name))
    return select_task(model, next(iter(tasks)))


def select_task(model, task):
    """Make the task's prompt and classifier the active ones. Returns the model."""
    own = any(a.name == task for a in model.attachments)
    return set_adapter(model, [task if own else SHARED, head_of(task)])


def task_order(sizes, steps, seed=0):
    """Which task each step trains: names drawn in proportion to `sizes` (name -> number of
    examples). (P-tuning v2 3)
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([float(s) for s in sizes.values()])
    drawn = torch.multinomial(weights, steps, replacement=True, generator=generator)
    names = list(sizes)
    return [names[i] for i in drawn.tolist()]


def classification_loss(logits, labels):
    """Mean cross-entropy of (P-tuning v2 2): logits (B, C) with labels (B,), or (B, T, C) with
    (B, T), where -100 is ignored.
    """
    return cross_entropy(logits.flatten(0, -2), labels.flatten())


def train_together(
    model, batch: Callable, sizes, steps, learning_rate=PTuningV2.learning_rate, seed=0
):
    """Multi-task training. batch(task) -> (ids, labels, lengths). Returns [(task, loss)], a pair
    a step.
    """
    model.train()
    trained = [p for a in model.attachments for p in a.parameters().values()]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    history = []
    for step, task in enumerate(task_order(sizes, steps, seed)):
        optimizer.param_groups[0]["lr"] = learning_rate * (1 - step / steps)
        ids, labels, lengths = batch(task)
        loss = classification_loss(select_task(model, task)(ids, lengths=lengths), labels)
        optimizer.zero_grad()  # to None: the heads of other tasks stay where they are
        loss.backward()
        optimizer.step()
        history.append((task, loss.item()))
    model.eval()
    return history


def adapt(model, task):
    """After multi-task training, keep one task: its head and a prompt of its own that starts from
    the shared one. Returns the model with just these two attached, ready to be trained on.

    Raises ValueError when the model has no shared prompt or no such task.
    """
    prompt, head = attachment_of(model, SHARED), attachment_of(model, head_of(task))
    keep = [(task, prompt.technique, prompt), (head_of(task), head.technique, head)]
    keep = [(n, t, {k: v.detach().clone() for k, v in a.tensors().items()}) for n, t, a in keep]
    detach(model)
    for name, technique, tensors in keep:
        technique.attach(model, name)
        attachment_of(model, name).load(tensors)
    return model
