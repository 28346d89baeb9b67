r"""Where soft labels come from: another network, the truth itself, or text that a network wrote.

Each teacher is a `loss_fn` (or data) for `training.train`, which trains the student as it trains
everything:

    NetworkTeacher   a trained model: Hinton's loss in chunks, and layer matching if asked for
    ExactTeacher     a table of true probabilities for every label, such as Tiny Town's generator
    generations      the teacher's own texts, learned as if they were data

Sequence-level distillation (Kim & Rush, "Sequence-Level Knowledge Distillation", 2016, arXiv
1606.07947) replaces the sum over all texts y that the teacher could answer to x, of which there are
V^T, by one:

    (Teacher 1)   L = - sum_y p_t(y | x) log p_s(y | x)  ~  - log p_s(y* | x)
    (Teacher 2)   y* = argmax_y p_t(y | x), found by beams;    or y* ~ p_t(y | x), a sample
    (Teacher 3)   L = distill + sum_j w_j match_j             j in hidden, cosine, attention

The beam's text is the easiest to imitate, and the right choice where there is one good answer; it
has none of the variety of the data, so for a language model samples are the right one.

Footguns: a loss on the prompt, which the teacher did not write; the end of the text not learned;
a teacher that reads the rows at other positions than the student does (`batch.start`).
"""

from __future__ import annotations

import math

import torch
from torch import nn

from minipeft.compressed.distillation import (
    check_options,
    distillation_loss,
    reverse_distillation_loss,
)
from minipeft.compressed.layer_matching import check_layers, matching_loss, recording
from minipeft.compressed.linear_distillation import linear_distillation_loss
from minipeft.cross_entropy import IGNORE
from minipeft.dataset import Encoded
from minipeft.decoding import generate
from minipeft.evaluation import evaluating


class NetworkTeacher:
    """`loss_fn(model, batch)` of a student that learns from `teacher`, which is never changed,
    only moved to the student's device.

    alpha: weight of the soft labels against the hard ones; temperature: of both models' softmax.
    hidden, cosine, attention: weights of the matching losses (layer_matching.py), added to it.
    layers: the layer map, None for (Match 1). reverse: KL(q || p), with all logits at once.
    Raises ValueError for options that make no sense and, when first called, for vocabularies or
    layers that do not fit.
    """

    def __init__(
        self,
        teacher,
        temperature=1.0,
        alpha=1.0,
        hidden=0.0,
        cosine=0.0,
        attention=0.0,
        layers=None,
        reverse=False,
    ):
        check_options(temperature, alpha)
        self.weights = {"hidden": hidden, "cosine": cosine, "attention": attention}
        for name, weight in self.weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight}: a weight must be a number of at least 0")
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha
        self.layers, self.reverse = layers, reverse

    def __call__(self, model, batch):
        matching = any(self.weights.values())
        layers = check_layers(self.layers, model, self.teacher) if matching else ()
        with recording(model, range(len(layers))) as seen:
            x = model.features(batch.ids, batch.start, lengths=batch.lengths)
        with evaluating(self.teacher), recording(self.teacher, layers) as teacher_seen:
            z = self.teacher.to(x.device).features(batch.ids, batch.start, lengths=batch.lengths)
            loss_arguments = self._read_out(z, batch)
        loss = self._distill(model, x, loss_arguments, batch)
        if not matching:
            return loss
        return loss + matching_loss(  # (Teacher 3)
            model, seen, teacher_seen, layers, batch.labels, self.weights
        )

    def _read_out(self, z, batch):
        """The teacher's (features, head weight), or its logits where its head is no plain
        linear layer.
        """
        if type(self.teacher.head) is nn.Linear:
            return z, self.teacher.head.weight
        return (self.teacher.read_out(z, batch.lengths),)

    def _distill(self, model, x, teacher, batch):
        options = (batch.labels.flatten(), self.temperature, self.alpha)
        if type(model.head) is nn.Linear and len(teacher) == 2 and not self.reverse:
            z, weight = teacher
            x, z = x.flatten(0, 1), z.flatten(0, 1)
            return linear_distillation_loss(x, model.head.weight, z, weight, *options)
        logits = teacher[0] if len(teacher) == 1 else teacher[0] @ teacher[1].T
        ours = model.read_out(x, batch.lengths)
        loss = reverse_distillation_loss if self.reverse else distillation_loss
        return loss(ours.flatten(0, -2), logits.flatten(0, -2), *options)


class ExactTeacher:
    """`loss_fn(model, batch)` of a student that is told the true distribution of every label.

    tables: for example i a (T_i, V) tensor, dense or sparse, whose row t is the distribution of its
    t-th label; rows of labels that do not count may hold anything. alpha: as in NetworkTeacher.
    Raises ValueError where a table does not fit its example.
    """

    def __init__(self, tables, alpha=1.0):
        check_options(1.0, alpha)
        self.tables = [
            table.to_sparse() if table.layout == torch.strided else table for table in tables
        ]
        self.alpha = alpha

    def __call__(self, model, batch):
        logits = model.read_out(model.features(batch.ids, batch.start, lengths=batch.lengths))
        truth = self.probabilities(batch, logits).log()  # -inf where a word cannot follow
        return distillation_loss(logits, truth, batch.labels, 1.0, self.alpha)

    def probabilities(self, batch, like):
        """(B, T, V) in float32 or better, on the device of `like`; padding holds zeros."""
        if len(batch.indices) != len(batch.ids):
            raise ValueError(
                f"the batch has {len(batch.ids)} rows and tells of {len(batch.indices)} which "
                "example they are; give `collate` their indices"
            )
        dtype = torch.promote_types(like.dtype, torch.float32)
        found = torch.zeros_like(like, dtype=dtype, requires_grad=False)
        for row, (index, length) in enumerate(zip(batch.indices, batch.lengths.tolist())):
            if not 0 <= index < len(self.tables):
                raise ValueError(f"there is no table of example {index}, of {len(self.tables)}")
            table = self.tables[index]
            if table.shape != (length, like.shape[-1]):
                raise ValueError(
                    f"table {index} is {tuple(table.shape)}, its example has {length} labels over "
                    f"{like.shape[-1]} words"
                )
            found[row, :length] = table.to(like.device, dtype).to_dense()
        return found


def generations(teacher, prompts, max_new_tokens, stop_token, **options):
    """The teacher's continuations of `prompts` (lists of ids) as training data, a list of Encoded.

    options: of `generate`: num_beams=5 for the teacher's favourite answer, temperature=1 with a
    seed for samples. (Teacher 2) The loss falls on what the teacher wrote, `stop_token` included
    where it stopped. Prompts are decoded together, so give some tens at a time. Raises ValueError
    for no prompts or an empty one.
    """
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("give at least one prompt, each of at least one id (the end-of-text id)")
    lengths = torch.tensor([len(p) for p in prompts])
    width = int(lengths.max())
    ids = torch.tensor([[*p, *[stop_token] * (width - len(p))] for p in prompts])
    ids, lengths = (t.to(teacher.embed.token.weight.device) for t in (ids, lengths))
    texts = generate(
        teacher, ids, max_new_tokens, stop_token=stop_token, lengths=lengths, **options
    )
    return [
        written(prompt, row, max_new_tokens, stop_token)
        for prompt, row in zip(prompts, texts.tolist())
    ]


def written(prompt, row, max_new_tokens, stop_token):
    """One decoded row, the prompt first, as Encoded. (Teacher 1)"""
    new = row[len(prompt) : len(prompt) + max_new_tokens]
    if stop_token in new:
        new = new[: new.index(stop_token) + 1]
    tokens = [*prompt, *new]
    return Encoded(tokens[:-1], [IGNORE] * (len(prompt) - 1) + tokens[len(prompt) :])
