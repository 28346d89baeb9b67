r"""How good a model is: nats, exact answers, choices among labels, slots.

    (Eval 1)   nats        = (1 / documents) sum over labels of -log p(label | what precedes it)
    (Eval 2)   bits/byte   = nats summed / (ln 2 x bytes of the text that is predicted)
    (Eval 3)   exact       = share of examples whose every label is the argmax
    (Eval 4)   choice      = argmax over candidates c of log p(c | prompt)

Exactness under teacher forcing is exactness of greedy decoding: as long as all tokens so far are
right, what the model was given is what it would have written. The final eot counts everywhere; a
model that answers and rambles on has not answered.

Every function takes (model, examples, tokenizer) first, runs in eval mode without gradients, and
leaves the model as it was. METRICS names those that give one number.

Footguns: a mean over batches of different numbers of labels; scores that compare candidates of
different length without their eot; bits per byte over the prompt's bytes.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from dataclasses import dataclass

import torch

from minipeft.cross_entropy import IGNORE
from minipeft.dataset import (
    Example,
    collate,
    encode_all,
    encode_all_for_head,
    token_tags,
)

BATCH = 64  # rows at a time; results do not depend on it
CHUNK = 512  # labels whose logits are held at once


@dataclass(frozen=True)
class Nats:
    """Negative log-probability in nats:
    `total` over `documents` examples and `tokens` labels that count.
    """

    total: float
    documents: int
    tokens: int

    @property
    def per_document(self):
        return self.total / self.documents

    @property
    def per_token(self):
        return self.total / max(1, self.tokens)


def evaluate_nats(model, examples, tokenizer, batch_size=BATCH, start=0):
    """Nats of the examples (Eval 1). `start`:
    tokens taken to stand before each text, a shift of its positions.
    """
    rows = encode_all(examples, tokenizer, model)
    total = math.fsum(per_batch(row_nats, model, rows, batch_size, start))
    return Nats(total, len(rows), sum(r.count for r in rows))


def nats(model, examples, tokenizer):
    """Mean nats of a document. (Eval 1)"""
    return evaluate_nats(model, examples, tokenizer).per_document


def nats_per_token(model, examples, tokenizer):
    """Mean nats of a label that counts."""
    return evaluate_nats(model, examples, tokenizer).per_token


def bits_per_byte(model, examples, tokenizer):
    """Bits the model needs for a byte of text (of the completions, where there are prompts).

    (Eval 2)
    """
    size = sum(len(x.completion.encode()) for x in examples)
    if not size:
        raise ValueError("there is no text to predict: every completion is empty")
    return evaluate_nats(model, examples, tokenizer).total / (math.log(2) * size)  # (Eval 2)


def exact(model, examples, tokenizer):
    """Share of examples whose every label, the final eot too, is the argmax. (Eval 3)"""
    rows = encode_all(examples, tokenizer, model)
    hits = per_batch(row_hits, model, rows)
    return share([all(ok for _, ok in row) for row in hits])  # (Eval 3)


def candidates_of(examples):
    """The different completions, sorted: what a classification in words chooses among."""
    return sorted({x.completion for x in examples})


def choices(model, examples, tokenizer, candidates=None):
    """For each example the candidate the model finds likeliest (Eval 4), a list of texts;
    ties go to the first.
    """
    candidates = candidates_of(examples) if candidates is None else list(candidates)
    if not candidates or any(not x.prompt for x in examples):
        raise ValueError("choosing needs a prompt in every example and at least one candidate")
    asked = [Example(x.prompt, c) for x in examples for c in candidates]
    rows = encode_all(asked, tokenizer, model)
    scores = torch.tensor(per_batch(row_nats, model, rows), dtype=torch.float64)
    best = scores.view(len(examples), len(candidates)).argmin(1)  # (Eval 4)
    return [candidates[i] for i in best.tolist()]


def accuracy(model, examples, tokenizer, candidates=None):
    """Share of examples whose likeliest candidate is the right one:
    restricted to the label words. (Eval 4)
    """
    picked = choices(model, examples, tokenizer, candidates)
    return share([p == x.completion for p, x in zip(picked, examples)])


def accuracy_unrestricted(model, examples, tokenizer):
    """Share of examples answered rightly among all words there are, the final eot left out."""
    hits = per_batch(row_hits, model, encode_all(examples, tokenizer, model))
    return share([all(ok for _, ok in row[:-1]) for row in hits])


def slot_accuracy(model, examples, tokenizer):
    """{tag: share of its tokens that are the argmax}, over the labels that count, from the
    examples' tags.

    The mean over slots hides the one that was never learned; look at them one by one.
    """
    rows, found = encode_all(examples, tokenizer, model), defaultdict(list)
    for example, hits in zip(examples, per_batch(row_hits, model, rows)):
        tags = (*token_tags(example, tokenizer), "")  # labels[t] is token t of the text, then eot
        for place, hit in hits:
            if tags[place]:
                found[tags[place]].append(hit)
    return {tag: share(hits) for tag, hits in sorted(found.items())}


def slots(model, examples, tokenizer):
    """The mean over slots of `slot_accuracy`. Raises ValueError when no label has a tag."""
    by_slot = slot_accuracy(model, examples, tokenizer)
    if not by_slot:
        raise ValueError("no token that is predicted has a tag")
    return sum(by_slot.values()) / len(by_slot)


def head_accuracy(model, examples, tokenizer, labels, per_token=False):
    """Share of classes (or, per token, of tags) that a Head over the names `labels` gets right.

    Raises ValueError when the model has no Head, or one of another kind or number of classes.
    """
    pools, found = getattr(model.head, "pools", None), classes_of(model)
    if pools is None or pools == per_token or found != len(labels):
        has = "writes text" if pools is None else f"decides {'a row' if pools else 'a token'}"
        raise ValueError(
            f"{len(labels)} labels {'a token' if per_token else 'a row'} need a Head for them, and "
            f"this model's head {has} among {found}: attach or load the Head it was trained with"
        )
    rows = encode_all_for_head(examples, tokenizer, labels, per_token, model)
    return share(per_batch(class_hits, model, rows))


METRICS = {
    "nats": nats,
    "nats_per_token": nats_per_token,
    "bits_per_byte": bits_per_byte,
    "exact": exact,
    "accuracy": accuracy,
    "accuracy_unrestricted": accuracy_unrestricted,
    "slots": slots,
}

LOWER_IS_BETTER = {"nats", "nats_per_token", "bits_per_byte"}


# -- what they are made of


@contextlib.contextmanager
def evaluating(model):
    """Eval mode without gradients inside; every module's own mode restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes.items():
            module.training = mode


def per_batch(score, model, rows, batch_size=BATCH, start=0):
    """The lists score(model, batch) of all batches of the rows, in order, as one list."""
    if not rows:
        raise ValueError("there are no examples to evaluate")
    device = next(model.parameters()).device
    found = []
    with evaluating(model):
        for i in range(0, len(rows), batch_size):
            found += score(model, collate(rows[i : i + batch_size], start).to(device))
    return found


def label_scores(model, batch):
    """For the n labels that count: row (n,), place (n,), nats (n,), whether it is the argmax (n,).

    The logits are made for these labels only, CHUNK of them at a time. Raises ValueError for a
    model with a Head.
    """
    if hasattr(getattr(model, "head", None), "pools"):
        raise ValueError(
            f"this model's head decides among {classes_of(model)} classes and writes no "
            "text: measure it with head_accuracy, or detach the Head"
        )
    row, place = (batch.labels != IGNORE).nonzero(as_tuple=True)
    features = model.features(batch.ids, batch.start)[row, place]  # (n, D)
    target = batch.labels[row, place]
    surprise, hit = [], []
    for x, y in zip(features.split(CHUNK), target.split(CHUNK)):
        logits = model.read_out(x[None])[0]  # (chunk, V)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        surprise.append(logits.logsumexp(-1) - logits.gather(-1, y[:, None])[:, 0])
        hit.append(logits.argmax(-1) == y)
    return row, place, torch.cat(surprise), torch.cat(hit)


def row_nats(model, batch):
    """Nats of each row's labels, a list of B floats. (Eval 1)"""
    row, _, surprise, _ = label_scores(model, batch)
    total = torch.zeros(len(batch.ids), dtype=torch.float64)
    return total.index_add_(0, row.cpu(), surprise.cpu().double()).tolist()


def row_hits(model, batch):
    """For each row its labels' [(place, whether it is the argmax), ...]."""
    hits = [[] for _ in batch.ids]
    row, place, _, hit = label_scores(model, batch)
    for r, t, ok in zip(row.tolist(), place.tolist(), hit.tolist()):
        hits[r].append((t, ok))
    return hits


def class_hits(model, batch):
    """Whether a Head's choice is right, for every class or tag that counts."""
    picked = model(batch.ids, batch.start, batch.lengths).argmax(-1)
    return (picked == batch.labels)[batch.labels != IGNORE].tolist()


def classes_of(model):
    """How many numbers the head gives: words or classes. Some wrappers around it have no weight."""
    head = model.head
    while not hasattr(head, "weight"):
        head = head.inner
    return len(head.weight)


def share(hits):
    """How many of the booleans are true, as a share. Raises ValueError where there are none."""
    if not hits:
        raise ValueError("no label counts, so there is nothing to measure")
    return sum(hits) / len(hits)
