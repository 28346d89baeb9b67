r"""Hard prompts: the baselines a soft prompt is judged against (Brown et al., 2020, arXiv
2005.14165; Schick and Schuetze, 2021, arXiv 2001.07676).

The task is put into words, nothing is trained: a template around the text, solved examples in
front of it, and the answer that the model finds likeliest.

    (Hard prompt 1)   c(x)   = [demo_1; s; ..; demo_k; s; a; x; b]      demo_i = [a; x_i; b; y_i]
    (Hard prompt 2)   s_y(x) = sum_t log p(y_t | c(x), y_0 .. y_(t-1))      y in the set of answers
    (Hard prompt 3)   a*, b* = argmin over templates of mean over (x, y) of
                               -log(exp(s_y(x)) / sum_y' exp(s_y'(x)))

a, b and s are the template's tokens before and after the text and between examples; k = 0 is
zero-shot, 1 one-shot, more few-shot. Without a set of answers, (Hard prompt 3) takes -s_y(x).

Trained parameters: 0. What is searched is discrete: `search` tries given templates, `search_words`
improves one word at a time, over a list of words, until no single change helps.

    start of search_words    the template given, or the first word repeated

Reduces to: the language model itself, with an empty template and no examples.

How this differs: the published searches (paraphrases, gradients through words, generated templates)
differ in where candidates come from; here the caller gives them, and scoring is exact.

Footguns: judging the template on the examples it was chosen with; demonstrations all of one class
(a model copies the commonest answer); answers of different lengths, where the sum of (Hard prompt
2) favours the shorter; a context too short for k examples.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minipeft.decoding import evaluating

ROWS = 64  # rows of a forward pass; more only costs memory


class Example(NamedTuple):
    """A solved example, both as token ids."""

    text: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class HardPrompt:
    """A template of token ids around a text. (Hard prompt 1)

    before, after: what stands before and after the text. between: what ends a demonstration.
    """

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    between: tuple[int, ...] = ()

    def context(self, text, demonstrations=()):
        """The ids the model reads before it answers, a list."""
        shown = []
        for demo in demonstrations:
            shown += [*self.before, *demo.text, *self.after, *demo.answer, *self.between]
        return [*shown, *self.before, *text, *self.after]


class Scored(NamedTuple):
    """A template with its mean loss in nats and its share of right answers."""

    prompt: HardPrompt
    loss: float
    accuracy: float


# -- scoring


@torch.no_grad()
def answer_scores(model, contexts, answers):
    """log p(answer | context) for each pair, (B, C) float. contexts: B lists of ids, answers: for
    each of them the same number C of lists. Run in eval mode. (Hard prompt 2)
    """
    if not contexts or len({len(candidates) for candidates in answers}) > 1:
        numbers = [len(candidates) for candidates in answers]
        raise ValueError(
            f"{len(contexts)} contexts with {numbers} answers: give at least one context, and as "
            "many answers for each"
        )
    pairs = [
        (list(context), list(answer))
        for context, candidates in zip(contexts, answers, strict=True)
        for answer in candidates
    ]
    if any(not context or not answer for context, answer in pairs):
        raise ValueError("contexts and answers need at least one token each")
    with evaluating(model):
        parts = [pair_scores(model, pairs[n : n + ROWS]) for n in range(0, len(pairs), ROWS)]
    return torch.cat(parts).view(len(contexts), -1)


def pair_scores(model, pairs):
    """log p(answer | context) of each (context, answer), (N,)."""
    width = max(len(context) + len(answer) for context, answer in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.int64)
    asked = torch.zeros(len(pairs), width, dtype=torch.bool)  # positions that predict the answer
    for row, (context, answer) in enumerate(pairs):
        ids[row, : len(context) + len(answer)] = torch.tensor(context + answer)
        asked[row, len(context) - 1 : len(context) + len(answer) - 1] = True
    model.check_ids(ids)
    place = next(model.parameters()).device
    ids, asked = ids.to(place), asked.to(place)
    logits = model(ids[:, :-1]).log_softmax(-1)  # (N, T - 1, V)
    of_next = logits.gather(-1, ids[:, 1:, None])[..., 0]
    return of_next.masked_fill(~asked[:, :-1], 0.0).sum(-1)


def score(model, prompt, examples, answers=None, demonstrations=()):
    """The template's loss and accuracy on examples, a Scored. (Hard prompt 3)

    answers: the set of answers to choose from; None means the example's own answer is scored by
    its probability alone, and its accuracy is whether every token of it is the likeliest.
    """
    contexts = [prompt.context(e.text, demonstrations) for e in examples]
    if answers is None:
        own = answer_scores(model, contexts, [[e.answer] for e in examples])
        pairs = zip(contexts, examples, strict=True)
        right = [greedy_answer(model, c, len(e.answer)) == list(e.answer) for c, e in pairs]
        return Scored(prompt, -own.mean().item(), sum(right) / len(right))
    answers = [tuple(a) for a in answers]
    for example in examples:
        if tuple(example.answer) not in answers:
            raise ValueError(f"answer={example.answer} of an example is none of {answers}")
    truth = torch.tensor([answers.index(tuple(e.answer)) for e in examples])
    scores = answer_scores(model, contexts, [answers] * len(contexts)).cpu()
    loss = -scores.log_softmax(-1)[torch.arange(len(truth)), truth].mean().item()
    return Scored(prompt, loss, (scores.argmax(-1) == truth).double().mean().item())


@torch.no_grad()
def greedy_answer(model, context, length):
    """The `length` likeliest tokens after a context, one after the other, a list. In eval mode."""
    text = list(context)
    with evaluating(model):
        for _ in range(length):
            ids = torch.tensor([text], device=next(model.parameters()).device)
            text.append(int(model(ids)[0, -1].argmax()))
    return text[len(context) :]


def classify(model, prompt, texts, answers, demonstrations=()):
    """Which answer each text gets: (B,) int64, numbers into `answers`."""
    contexts = [prompt.context(text, demonstrations) for text in texts]
    return answer_scores(model, contexts, [answers] * len(contexts)).argmax(-1)


# -- search


def search(model, prompts, examples, answers=None):
    """Every template, scored on the examples, best first."""
    scored = [score(model, prompt, examples, answers) for prompt in prompts]
    return sorted(scored, key=lambda s: s.loss)


def search_words(model, words, length, examples, answers=None, start=None, place="before"):
    """Find the template's words one at a time: each in turn is set to the best of `words`, until a
    whole round changes nothing. place: "before" or "after" the text. Returns a Scored.
    """
    best = start or dataclasses.replace(HardPrompt(), **{place: (words[0],) * length})
    best = score(model, best, examples, answers)
    improved = True
    while improved:
        improved = False
        for n in range(length):
            now = getattr(best.prompt, place)
            tries = [
                dataclasses.replace(best.prompt, **{place: (*now[:n], word, *now[n + 1 :])})
                for word in words
            ]
            found = search(model, tries, examples, answers)[0]
            if found.loss < best.loss:
                best, improved = found, True
    return best


# -- in-context learning


def demonstrations_from(examples, shots, seed=0):
    """`shots` examples at random, as evenly over the answers as can be, in random order."""
    if not 0 <= shots <= len(examples):
        raise ValueError(f"{shots} demonstrations cannot be drawn from {len(examples)} examples")
    generator = torch.Generator().manual_seed(seed)
    shuffled = [examples[i] for i in torch.randperm(len(examples), generator=generator).tolist()]
    taken, rank = {}, []
    for example in shuffled:  # rank: how many with this answer came before
        rank.append(taken.get(example.answer, 0))
        taken[example.answer] = rank[-1] + 1
    order = sorted(range(len(shuffled)), key=lambda i: (rank[i], i))[:shots]
    mixed = torch.randperm(shots, generator=generator).tolist()
    return tuple(shuffled[order[i]] for i in mixed)


def in_context(model, prompt, examples, test, answers=None, shots=(0, 1, 4), seed=0):
    """Zero-, one- and few-shot: shots -> Scored on `test`, the examples shown drawn from
    `examples`.
    """
    return {
        k: score(model, prompt, test, answers, demonstrations_from(examples, k, seed))
        for k in shots
    }
