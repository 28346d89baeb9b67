r"""T-Few: the losses that train IA3 on few examples (Liu et al., 2022, arXiv 2205.05638).

An example is a prompt x with several choices, one of them right. Two terms are added to the usual
loss: the wrong choices are to become unlikely, and the right one is to win the comparison that will
be made when the model is used, rank classification.

    (T-Few 1)   L_LM = - mean over tokens of the right choice of log p(y_t | x, y_<t)
    (T-Few 2)   L_UL = - mean over tokens of the wrong choices of log(1 - p(y_t | x, y_<t) + e)
    (T-Few 3)   beta_c = (1 / T_c^a) sum over the T_c tokens of choice c of log p(y_t | x, y_<t)
    (T-Few 4)   L_LN = - mean over examples of log softmax(beta)_right
    (T-Few 5)   L = L_LM + L_UL + L_LN
    (T-Few 6)   the answer is argmax_c beta_c

`a` is the length power: 1 compares means over tokens, 0 the choices' whole probabilities, which
favours short ones. e keeps the logarithm finite; the paper has e = 0, its authors' code 0.01.

Trained parameters: none of its own; attach `IA3` (the paper's choice) or any other technique, and

    questions = t_few.questions(examples, tokenizer)             examples as for any other training
    train(model, encode_all(examples, tokenizer), config, loss_fn=TFewLoss(questions))
    answers = rank_classify(model, questions)

What each term is worth on Tiny Town: `python -m minipeft.t_few_study`.

Reduces to: the language-model loss for an example with one choice (L_UL and L_LN are 0 then). With
a = 0 L_LN is the cross-entropy of the choice given the prompt and that one of the choices is right.

How this differs: the authors' model is an encoder and a decoder, so its choices are read from
nothing; here they follow the prompt in one causal text. Their code makes -100 of padding by its id,
0; here labels are -100 where nothing is asked.

Footguns: summing over the prompt's tokens as well, which are the same for all choices but not their
number; -log p of a wrong choice with a minus sign in front has no lower bound, 1 - p has; dividing
by characters or by words, not by tokens; comparing normalised scores after training without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from minipeft.evaluation import candidates_of, evaluating


@dataclass(frozen=True)
class Example:
    """One question. prompt: token ids, at least one. choices: token ids of each, at least one.
    correct: index of the right one.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    correct: int = 0

    def __post_init__(self):
        if not len(self.prompt):
            raise ValueError("the prompt is empty; the first token of a choice needs one before it")
        if not len(self.choices) or not all(len(choice) for choice in self.choices):
            raise ValueError(f"choices={self.choices!r}: give at least one, none of them empty")
        if not 0 <= self.correct < len(self.choices):
            raise ValueError(f"correct={self.correct} is no index of {len(self.choices)} choices")


def questions(examples, tokenizer, choices=None):
    """Examples of a data set (dataset.Example, each with a prompt) as Examples with choices, in the
    same order; an answer ends with eot, as it does when it is learned as text.

    choices: the texts to choose among; None takes all completions that occur. Raises ValueError
    naming an example without a prompt, or whose completion is no choice.
    """
    choices = candidates_of(examples) if choices is None else list(choices)
    answers = tuple((*tokenizer.encode(choice), tokenizer.eot) for choice in choices)
    found = []
    for n, x in enumerate(examples):
        if not x.prompt or x.completion not in choices:
            raise ValueError(
                f"example {n} has prompt={x.prompt!r} and completion={x.completion!r}; a question "
                f"needs a prompt, and as its answer one of {choices}"
            )
        prompt = (tokenizer.eot, *tokenizer.encode(x.prompt))
        found.append(Example(prompt, answers, choices.index(x.completion)))
    return found


@dataclass(frozen=True)
class Choices:
    """Examples as rows, one for each choice: ids and labels (R, T), labels aligned and -100 outside
    the choice; example (R,) which example a row belongs to; correct (R,) bool.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    example: torch.Tensor
    correct: torch.Tensor


def rows_of(examples, device=None):
    """Examples as Choices, right-padded."""
    texts = [(e.prompt, choice) for e in examples for choice in e.choices]
    T = max(len(prompt) + len(choice) for prompt, choice in texts) - 1  # the last is not read
    ids = torch.zeros(len(texts), T, dtype=torch.int64)
    labels = torch.full((len(texts), T), -100)
    for row, (prompt, choice) in enumerate(texts):
        text = torch.tensor([*prompt, *choice])
        ids[row, : len(text) - 1] = text[:-1]
        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]
    number = torch.tensor([n for n, e in enumerate(examples) for _ in e.choices])
    right = torch.tensor([c == e.correct for e in examples for c in range(len(e.choices))])
    return Choices(*(t.to(device) for t in (ids, labels, number, right)))


def token_log_probs(model, ids, labels, start=0):
    """log p of every label that is not -100, (n,) float32 or finer, and the rows they stand in,
    (n,). The head sees only those positions.
    """
    asked = labels != -100
    logits = model.head(model.features(ids, start)[asked])  # (n, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    log_probs = F.log_softmax(logits, -1).gather(1, labels[asked][:, None])[:, 0]
    return log_probs, asked.nonzero()[:, 0]


def likelihood_loss(log_probs, right):
    """L_LM from log p of tokens (n,) and whether each belongs to a right choice (n,). (T-Few 1)"""
    return -log_probs[right].mean()


def unlikelihood_loss(log_probs, right, e=1e-2):
    """L_UL, likewise; 0 where no choice is wrong. (T-Few 2)"""
    p = log_probs[~right].exp()
    return -torch.log1p(e - p).sum() / max(1, len(p))


def choice_scores(log_probs, row, rows, power=1.0):
    """beta, (R,), from log p of tokens (n,) and the row of each, (n,). (T-Few 3)"""
    total = log_probs.new_zeros(rows).index_add(0, row, log_probs)
    return total / row.bincount(minlength=rows).to(total.dtype) ** power


def ranking_loss(scores, example, correct):
    """L_LN from beta (R,), the example of each row (R,) and which rows are right. (T-Few 4)"""
    losses = []
    for n in example.unique():
        mine = example == n
        losses.append(scores[mine].logsumexp(0) - scores[mine & correct].squeeze(0))
    return torch.stack(losses).mean()


def t_few_losses(model, choices, start=0, e=1e-2, power=1.0):
    """{"language_model", "unlikelihood", "length_normalized"}: the three terms, in nats."""
    log_probs, row = token_log_probs(model, choices.ids, choices.labels, start)
    right = choices.correct[row]
    scores = choice_scores(log_probs, row, len(choices.ids), power)
    return {
        "language_model": likelihood_loss(log_probs, right),
        "unlikelihood": unlikelihood_loss(log_probs, right, e),
        "length_normalized": ranking_loss(scores, choices.example, choices.correct),
    }


@dataclass(frozen=True)
class TFewLoss:
    """`loss_fn` for training.train: the rows of its data are these examples, in the same order.

    examples: list of Example. weights: of the three terms, in order. e, power: e and a above.
    """

    examples: list[Example]
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    e: float = 1e-2
    power: float = 1.0

    def __call__(self, model, batch):
        """L of the batch's examples. (T-Few 5)"""
        choices = rows_of([self.examples[i] for i in batch.indices], batch.ids.device)
        losses = t_few_losses(model, choices, batch.start, self.e, self.power)
        return sum(weight * loss for weight, loss in zip(self.weights, losses.values()))


def rank_classify(model, examples, power=1.0, batch_size=64):
    """The index of the best choice of each example, (len(examples),) int64; `correct` is not read.
    power=0 compares without length normalisation. (T-Few 6)
    """
    device, best = next(model.parameters()).device, []
    with evaluating(model):
        for i in range(0, len(examples), batch_size):
            part = examples[i : i + batch_size]
            rows = rows_of(part, device)
            log_probs = token_log_probs(model, rows.ids, rows.labels)
            scores = choice_scores(*log_probs, len(rows.ids), power)
            best += [own.argmax() for own in scores.split([len(e.choices) for e in part])]
    return torch.stack(best)
