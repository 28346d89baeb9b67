r"""From text to batches: examples, their tokens, the labels that count, and the order they come in.

One example is one row, never several packed into one, so that nothing attends to a neighbour:

    (Data 1)   tokens   = [eot] + tokens(prompt) + tokens(completion) + [eot]        n of them
    (Data 2)   ids      = tokens[0 .. n-2],     labels = tokens[1 .. n-1]            aligned
    (Data 3)   labels_t = -100   where tokens[t+1] belongs to the prompt

Aligned: labels[t] is the target of logits[t], and nothing shifts later. The loss falls on the
answer and on the eot that ends it.

An example without a prompt is a whole document: every token counts, the first word too, because the
leading eot predicts it. Rows of a batch are padded on the right with the row's own first id,
which is eot; causality hides the padding from everything real and its labels are -100.

The order is a function of the seed and the step alone, so a run that was stopped finds its place
without remembering anything:

    (Data 4)   stream  = permutation(seed, 0), permutation(seed, 1), ...     epochs without a gap
    (Data 5)   batch s = stream[s b .. s b + b - 1]                          b = batch_size

With `pool` > 1 that many batches at a time are sorted by length, cut and shuffled, so that the
rows of one batch are of like length and little is padding.

How this differs from transformers' collators: labels are aligned here and shifted inside the
model there; padding never reaches an attention mask, because there is none to reach.

Footguns: tokenizing prompt + completion as one string, which can merge a token across the border;
a loss on the prompt, which drowns the answer; forgetting the final eot, after which generation
never stops.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft.cross_entropy import IGNORE


@dataclass(frozen=True)
class Example:
    """One thing to learn from. Without a prompt it is a document, learned from its first word on.

    prompt: what is given; no loss is taken on it.
    completion: what is to be written.
    label: name of the class, for a Head that classifies.
    tags: one name per token of prompt + completion (or of the prompt alone), "" for none; what a
        tagging Head learns, and what `evaluation.slot_accuracy` groups by.
    """

    prompt: str = ""
    completion: str = ""
    label: str | None = None
    tags: tuple[str, ...] | None = None

    @property
    def question(self):
        """What a Head reads: the prompt, or the document where there is none."""
        return self.prompt or self.completion


@dataclass(frozen=True)
class Encoded:
    """ids: T ints. labels: T ints with -100 where nothing counts, or one int, the row's class."""

    ids: list[int]
    labels: list[int] | int

    @property
    def count(self):
        """How many labels count."""
        return 1 if isinstance(self.labels, int) else len(self.labels) - self.labels.count(IGNORE)


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64, right-padded; labels (B, T), or (B,) for classes; lengths (B,), real ids
    in each row.

    start: tokens taken to stand before every row (a shift of the positions). indices: which
    examples these are.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    lengths: torch.Tensor
    start: int = 0
    indices: tuple[int, ...] = ()

    def to(self, device):
        moved = (t.to(device, non_blocking=True) for t in (self.ids, self.labels, self.lengths))
        return Batch(*moved, self.start, self.indices)


# -- one example


def encode(example, tokenizer):
    """The example as text, Encoded with T = 1 + its tokens: the table in this file's header."""
    prompt, completion = tokenizer.encode(example.prompt), tokenizer.encode(example.completion)
    tokens = [tokenizer.eot, *prompt, *completion, tokenizer.eot]  # (Data 1)
    ids, labels = tokens[:-1], tokens[1:]  # (Data 2)
    labels[: len(prompt)] = [IGNORE] * len(prompt)  # (Data 3)
    return Encoded(ids, labels)


def encode_class(example, tokenizer, labels):
    """For `Head(len(labels))`: ids are [eot] + tokens(question), the label is the class's place
    in `labels`.

    Raises ValueError when the example has no label or one that is not in `labels`.
    """
    ids = [tokenizer.eot, *tokenizer.encode(example.question)]
    return Encoded(ids, _index(example.label, labels, "label"))


def encode_tags(example, tokenizer, labels):
    """For `Head(len(labels), per_token=True)`: a label for every token of the question, -100 at
    eot and where the tag is "".

    Raises ValueError when tags and tokens differ in number, or a tag is not in `labels`.
    """
    ids = [tokenizer.eot, *tokenizer.encode(example.question)]
    tags = token_tags(example, tokenizer)[: len(ids) - 1]
    return Encoded(ids, [IGNORE] + [_index(t, labels, "tag") if t else IGNORE for t in tags])


def token_tags(example, tokenizer):
    """One tag per token of prompt + completion, "" where there is none.

    Raises ValueError when their number is wrong.
    """
    prompt = len(tokenizer.encode(example.prompt))
    total = prompt + len(tokenizer.encode(example.completion))
    tags = example.tags or ()
    if len(tags) not in (prompt, total):
        raise ValueError(
            f"{len(tags)} tags for {prompt} tokens of prompt and {total} in all; give one tag "
            f"per token"
        )
    return (*tags, *[""] * (total - len(tags)))


def _index(name, names, what):
    if name not in names:
        raise ValueError(f"{what} {name!r} is none of {list(names)}")
    return list(names).index(name)


# -- many examples


def encode_all(examples, tokenizer, model=None, too_long="error"):
    """Every example as text, checked against the model's context. Returns a list of Encoded.

    model: its context length and the virtual tokens in front of the text set the limit; None
    checks nothing.
    too_long: "error"; "truncate" drops the oldest tokens of the prompt, or the end of a document;
    "window" cuts documents into consecutive pieces, each label kept once. Raises ValueError
    naming the example and its length.
    """
    limit = Room(model, too_long)
    return [
        e for n, x in enumerate(examples) for e in limit.fit(n, encode(x, tokenizer), not x.prompt)
    ]


def encode_all_for_head(examples, tokenizer, labels, per_token=False, model=None):
    """Every example for a Head over the names `labels`: classes, or tags with `per_token`.

    Raises ValueError like `encode_all`.
    """
    encode_one = encode_tags if per_token else encode_class
    limit = Room(model, "error")
    rows = []
    for n, example in enumerate(examples):
        try:
            row = encode_one(example, tokenizer, labels)
        except ValueError as problem:
            raise ValueError(f"example {n}: {problem}") from None
        rows += limit.fit(n, row, True)
    return rows


class Room:
    """How much text fits in front of a model, and what to do with more."""

    def __init__(self, model, too_long):
        if too_long not in ("error", "truncate", "window"):
            raise ValueError(f"too_long={too_long!r} is none of 'error', 'truncate', 'window'")
        self.too_long = too_long
        self.context = None if model is None else model.config.context_length
        self.virtual = 0 if model is None else model.embed.position_shift

    def fit(self, number, row, document):
        """The row as a list of rows that fit."""
        length = len(row.ids)
        if self.context is None or length + self.virtual <= self.context:
            return [row]
        room = self.context - self.virtual
        if self.too_long == "error" or room < 1:
            raise ValueError(
                f"example {number} has {length} tokens; with {self.virtual} virtual tokens in "
                f"front it does not "
                f"fit context_length={self.context}. Shorten it, or ask for too_long='truncate' "
                f"or 'window'"
            )
        if self.too_long == "window" and document:
            cuts = range(0, length, room)
            return [Encoded(row.ids[i : i + room], row.labels[i : i + room]) for i in cuts]
        return [truncated(row, room, document)]


def truncated(row, room, document):
    """`room` tokens of a row: a document's first ones;
    else the eot, what fits of the prompt's end, and the answer.
    """
    first = 0 if document else min(len(row.ids) - room, len(row.labels) - row.count)
    ids, labels = row.ids[first:], row.labels[first:]
    return Encoded([row.ids[0], *ids[1:room]], labels[:room])


def collate(rows, start=0, indices=()):
    """Encoded rows as one Batch, padded on the right to the longest."""
    longest = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + r.ids[:1] * (longest - len(r.ids)) for r in rows])
    if isinstance(rows[0].labels, int):
        labels = torch.tensor([r.labels for r in rows])
    else:
        labels = [r.labels + [IGNORE] * (longest - len(r.labels)) for r in rows]
        labels = torch.tensor(labels)
    lengths = torch.tensor([len(r.ids) for r in rows])
    return Batch(ids, labels, lengths, start, tuple(indices))


class BatchOrder:
    """Which examples make up batch s, for s = 0, 1, ...: a function of (seed, s) alone.

    lengths: one per example, needed for `pool` > 1. Raises ValueError for sizes below 1 or no
    examples.
    """

    def __init__(self, lengths, batch_size, seed=0, pool=1):
        if not lengths:
            raise ValueError("there are no examples to train on")
        for name, value in (("batch_size", batch_size), ("pool", pool)):
            if value < 1:
                raise ValueError(f"{name}={value} is not a positive number")
        self.lengths, self.batch_size, self.seed, self.pool = lengths, batch_size, seed, pool
        self._epochs, self._pools = {}, {}

    def batch(self, step):
        """Example indices of batch `step` (from 0)."""
        number, place = divmod(step, self.pool)
        if number not in self._pools:
            self._pools = {number: self._cut(number)}
        return self._pools[number][place]

    def _cut(self, number):
        size = self.batch_size * self.pool
        picked = [self._at(i) for i in range(number * size, (number + 1) * size)]  # (Data 5)
        if self.pool > 1:
            picked.sort(key=lambda i: self.lengths[i])
        cut = [picked[i : i + self.batch_size] for i in range(0, size, self.batch_size)]
        if self.pool > 1:
            random.Random(f"pool {self.seed} {number}").shuffle(cut)
        return cut

    def _at(self, place):
        epoch, i = divmod(place, len(self.lengths))  # (Data 4)
        if epoch not in self._epochs:
            permutation = list(range(len(self.lengths)))
            random.Random(f"epoch {self.seed} {epoch}").shuffle(permutation)
            self._epochs = {epoch: permutation}
        return self._epochs[epoch][i]


# -- files


def read_examples(path):
    """Examples from a user's file: `.jsonl`, or any other name for plain text whose documents are
    separated by blank lines.

    JSONL has one object a line: {"text"}, {"text", "label"} or {"prompt", "completion"}. A
    labelled text becomes prompt=text, completion=" " + label, so that it can be learned as text
    and by a Head. Raises ValueError for a file that is empty or not UTF-8 (with the byte's
    offset), and for a malformed line (with its number).
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        offset = problem.start
        raise ValueError(
            f"{path}: byte {data[offset]:#04x} at offset {offset} is not UTF-8; save the file "
            f"as UTF-8"
        ) from None
    read = _read_jsonl if path.suffix.lower() == ".jsonl" else _read_documents
    examples = read(text, path)
    if not examples:
        raise ValueError(f"{path}: the file is empty, there is nothing to learn from")
    return examples


def parted(examples):
    """(examples to learn from, examples to test on): every tenth is held out, from the first on.

    Not the first tenth: files come sorted, by label for instance. A single example is both.
    """
    if len(examples) < 2:
        return examples, examples
    return [x for n, x in enumerate(examples) if n % 10], examples[::10]


def _read_documents(text, path):
    documents, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.strip():
            lines.append(line)
        elif lines:
            documents.append(Example(completion="\n".join(lines)))
            lines = []
    return documents


def _read_jsonl(text, path):
    # not splitlines(): JSON strings may hold U+2028 and U+0085 unescaped, at which it would split
    lines = text.split("\n")
    return [_parse(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]


def _parse(line, where):
    try:
        found = json.loads(line)
    except ValueError as problem:
        raise ValueError(f"{where}: not JSON ({problem})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{where}: {type(found).__name__} instead of an object {{...}}")
    if set(found) not in ({"text"}, {"text", "label"}, {"prompt", "completion"}):
        raise ValueError(
            f"{where}: keys {sorted(found)}; known are text, or text and label, or prompt and "
            f"completion"
        )
    for key, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{where}: {key!r} is {value!r}, not a string")
    if not (found.get("text") or found.get("completion")):
        raise ValueError(f"{where}: the text is empty")
    if "label" in found:
        label = found["label"]
        return Example(prompt=found["text"], completion=f" {label}", label=label)
    return Example(found.get("prompt", ""), found.get("text") or found.get("completion"))
