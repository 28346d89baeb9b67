"""What evaluation.py measures, against sums of log-probabilities written out token by token."""

import math

import pytest
import torch

from minipeft import Head
from minipeft.dataset import Example
from minipeft.evaluation import (
    METRICS,
    accuracy,
    accuracy_unrestricted,
    bits_per_byte,
    choices,
    evaluate_nats,
    exact,
    head_accuracy,
    nats,
    nats_per_token,
    slot_accuracy,
    slots,
)
from minipeft.gpt import GPTConfig
from tests.tiny import tiny_model

CONFIG = GPTConfig(vocab_size=97, context_length=64, n_layer=1, n_head=2, d_model=16)


class Letters:
    """A tokenizer of ASCII letters: one token each, from 'A' on."""

    eot, vocab_size = 96, 97

    def encode(self, text):
        return [ord(c) - 32 for c in text]

    def decode(self, ids):
        return "".join(chr(i + 32) for i in ids if i != self.eot)


LETTERS = Letters()
EXAMPLES = [
    Example(completion="abc"),
    Example("Question", " yes"),
    Example("Q", " no"),
    Example("Another question", " yes"),
]


@pytest.fixture
def small():
    return tiny_model(CONFIG)


def log_probabilities(model, example, start=0):
    """log p of each label that counts, from one forward per prefix."""
    given = [96, *LETTERS.encode(example.prompt)]
    found = []
    for token in [*LETTERS.encode(example.completion), 96]:
        logits = model(torch.tensor([given]), start=start)[0, -1]
        found.append(logits.log_softmax(-1)[token].item())
        given.append(token)
    return found


def greedy(model, prompt, length):
    """The most likely continuation, as ids."""
    ids = [96, *LETTERS.encode(prompt)]
    for _ in range(length):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(ids) - length :]


class Parrot(torch.nn.Module):
    """A model that answers from a table {ids so far: next id}, with certainty `sure`;
    else it says 0.
    """

    def __init__(self, answers, sure=20.0):
        super().__init__()
        self.config, self.embed = CONFIG, type("Shift", (), {"position_shift": 0})()
        self.answers, self.sure = answers, sure
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def features(self, ids, start=0):
        out = torch.zeros(*ids.shape, 97)
        for b, row in enumerate(ids.tolist()):
            for t in range(len(row)):
                out[b, t, self.answers.get(tuple(row[: t + 1]), 0)] = self.sure
        return out

    def read_out(self, x):
        return x


def parrot(*texts):
    """Knows the texts by heart: after each of their prefixes it says the next letter, then eot."""
    answers = {}
    for text in texts:
        tokens = [96, *LETTERS.encode(text), 96]
        answers |= {tuple(tokens[: t + 1]): tokens[t + 1] for t in range(len(tokens) - 1)}
    return Parrot(answers)


# -- nats: (Eval 1) (Eval 2)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_nats_are_the_sum_over_labels_that_count(small, batch_size):
    expected = [log_probabilities(small, x) for x in EXAMPLES]
    found = evaluate_nats(small, EXAMPLES, LETTERS, batch_size)
    total = -sum(map(sum, expected))
    assert found.total == pytest.approx(total, rel=1e-12)  # float64, sums in another order
    assert (found.documents, found.tokens) == (4, 4 + 5 + 4 + 5)
    assert found.per_document == pytest.approx(total / 4)
    assert found.per_token == pytest.approx(total / 18)


def test_the_metrics_in_nats_are_means_over_documents_and_over_tokens(small):
    found = evaluate_nats(small, EXAMPLES, LETTERS)
    assert nats(small, EXAMPLES, LETTERS) == found.per_document
    assert nats_per_token(small, EXAMPLES, LETTERS) == found.per_token


def test_nats_at_a_shifted_start_are_those_of_a_text_that_stands_there(small):
    expected = -sum(sum(log_probabilities(small, x, start=7)) for x in EXAMPLES)
    found = evaluate_nats(small, EXAMPLES, LETTERS, start=7)
    assert found.total == pytest.approx(expected, rel=1e-12)
    assert found.total != pytest.approx(evaluate_nats(small, EXAMPLES, LETTERS).total, rel=1e-3)


def test_many_labels_are_scored_in_chunks(small, monkeypatch):
    whole = evaluate_nats(small, EXAMPLES, LETTERS).total
    monkeypatch.setattr("minipeft.evaluation.CHUNK", 5)
    assert evaluate_nats(small, EXAMPLES, LETTERS).total == pytest.approx(whole, rel=1e-12)


def test_bits_per_byte_divide_by_the_bytes_that_are_predicted(small):
    expected = evaluate_nats(small, EXAMPLES, LETTERS).total / math.log(2) / (3 + 4 + 3 + 4)
    assert bits_per_byte(small, EXAMPLES, LETTERS) == pytest.approx(expected)
    with pytest.raises(ValueError, match="every completion is empty"):
        bits_per_byte(small, [Example("a")], LETTERS)


# -- exact answers: (Eval 3)


def test_exact_is_what_greedy_decoding_would_write(small):
    texts = [Example("Ask", LETTERS.decode(greedy(small, "Ask", 3))), Example("Ask", "xyz")]
    ends = [greedy(small, x.prompt + x.completion, 1) == [96] for x in texts]
    by_hand = [greedy(small, x.prompt, 3) == LETTERS.encode(x.completion) for x in texts]
    assert by_hand == [True, False]
    expected = sum(a and b for a, b in zip(ends, by_hand)) / 2
    assert exact(small, texts, LETTERS) == expected


def test_one_wrong_token_or_a_missing_eot_is_not_exact():
    model = parrot("Q: abc")
    right, longer, wrong = Example("Q:", " abc"), Example("Q:", " ab"), Example("Q:", " axc")
    assert exact(model, [right], LETTERS) == 1
    assert exact(model, [longer], LETTERS) == 0
    assert exact(model, [right, longer, wrong, right], LETTERS) == 0.5


# -- choosing among labels: (Eval 4)


def test_the_choice_is_the_candidate_with_the_largest_probability(small):
    asked = [x for x in EXAMPLES if x.prompt]
    expected = []
    for x in asked:
        scores = {c: sum(log_probabilities(small, Example(x.prompt, c))) for c in (" no", " yes")}
        expected.append(max(scores, key=scores.get))
    assert choices(small, asked, LETTERS) == expected
    right = sum(a == x.completion for a, x in zip(expected, asked)) / len(asked)
    assert accuracy(small, asked, LETTERS) == pytest.approx(right)


def test_restricted_accuracy_asks_only_which_label_is_likelier():
    model = parrot("Q: maybe", "R: yes")
    asked = [Example("Q:", " yes"), Example("R:", " yes"), Example("R:", " no")]
    # at Q the model wants " maybe": both labels are equally bad but for their length
    assert choices(model, asked, LETTERS)[1:] == [" yes", " yes"]
    assert accuracy(model, asked[1:], LETTERS, [" yes", " no"]) == 0.5
    assert accuracy_unrestricted(model, asked, LETTERS) == pytest.approx(1 / 3)


def test_an_answer_that_does_not_end_is_still_the_right_label_unrestricted():
    model, asked = parrot("Q: yes sir"), [Example("Q:", " yes")]
    assert accuracy_unrestricted(model, asked, LETTERS) == 1
    assert exact(model, asked, LETTERS) == 0


def test_choosing_without_a_prompt_or_candidates_is_an_error(small):
    with pytest.raises(ValueError, match="needs a prompt in every example"):
        accuracy(small, EXAMPLES, LETTERS)
    with pytest.raises(ValueError, match="at least one candidate"):
        accuracy(small, [Example("a", "b")], LETTERS, [])


# -- slots


def test_slots_are_reported_one_by_one():
    model = parrot("ann sat by", "bob ran to")
    tags = ("who", "who", "who", "", "did", "did", "did", "", "", "")
    examples = [
        Example(completion="ann sat by", tags=tags),
        Example(completion="ann ran by", tags=tags),
    ]
    # the first letter: the parrot knows one answer after eot ("bob"), so "a" is wrong; in the
    # second "r" is, and nothing it knows goes on from there
    expected = {"who": 4 / 6, "did": 3 / 6}
    assert slot_accuracy(model, examples, LETTERS) == pytest.approx(expected)
    assert slots(model, examples, LETTERS) == pytest.approx((4 / 6 + 3 / 6) / 2)


def test_tags_in_the_prompt_are_not_predicted_and_do_not_count():
    model = parrot("ab cd")
    example = Example("ab", " cd", tags=("P", "P", "", "C", "C"))
    assert slot_accuracy(model, [example], LETTERS) == {"C": 1.0}
    with pytest.raises(ValueError, match="no token that is predicted has a tag"):
        slots(model, [Example("ab", " cd", tags=("P", "P"))], LETTERS)


# -- heads


def test_classes_of_a_head_are_those_of_the_last_real_token():
    model = Head(num_labels=3).attach(tiny_model(CONFIG))
    texts = ["a", "abcd", "zyx", "q" * 9]
    names = ["x", "y", "z"]
    alone = [model(torch.tensor([[96, *LETTERS.encode(t)]]))[0].argmax().item() for t in texts]
    right = [Example(t, " no matter", label=names[c]) for t, c in zip(texts, alone)]
    assert head_accuracy(model, right, LETTERS, names) == 1
    wrong = Example(texts[1], label=names[(alone[1] + 1) % 3])
    assert head_accuracy(model, [*right, wrong], LETTERS, names) == pytest.approx(4 / 5)


def test_tags_of_a_head_count_token_by_token():
    model = Head(num_labels=2, per_token=True).attach(tiny_model(CONFIG))
    texts, names = ["abc", "zy"], ["A", "B"]
    examples, flipped = [], 0
    for text in texts:
        picked = model(torch.tensor([[96, *LETTERS.encode(text)]]))[0, 1:].argmax(-1).tolist()
        picked[0] = 1 - picked[0]
        flipped += 1
        examples.append(Example(text, tags=tuple(names[c] for c in picked)))
    found = head_accuracy(model, examples, LETTERS, names, per_token=True)
    assert found == pytest.approx((5 - flipped) / 5)


# -- all of them


@pytest.mark.parametrize("name", METRICS)
def test_no_metric_leaves_a_trace_and_none_depends_on_the_mode(name):
    model = tiny_model(GPTConfig(97, 64, 1, 2, 16, dropout=0.3))
    tags = ("A",) * 3
    examples = [Example("Q", " a", tags=tags), Example("R", " b", tags=tags)]
    quiet = METRICS[name](model, examples, LETTERS)
    model.blocks[0].train()
    modes = [m.training for m in model.modules()]
    assert METRICS[name](model, examples, LETTERS) == quiet
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(ValueError, match=r"no examples|every completion is empty|at least one"):
        METRICS[name](model, [], LETTERS)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("metric", sorted(METRICS))
def test_a_model_with_a_head_writes_no_text(small, metric, per_token):
    model = Head(97, per_token).attach(small)  # as many classes as words, so that all shapes fit
    examples = [Example("Question", " yes", tags=("q",) * 8 + ("a",) * 4)]
    with pytest.raises(ValueError, match="among 97 classes and writes no text"):
        METRICS[metric](model, examples, LETTERS)


@pytest.mark.parametrize(
    ("head", "per_token", "problem"),
    [
        (None, False, "2 labels a row .* writes text among 97"),
        (None, True, "2 labels a token .* writes text among 97"),
        (Head(3), False, "decides a row among 3"),
        (Head(2), True, "2 labels a token .* decides a row among 2"),
        (Head(2, per_token=True), False, "2 labels a row .* decides a token among 2"),
    ],
)
def test_labels_that_are_not_the_heads_are_refused(small, head, per_token, problem):
    model = small if head is None else head.attach(small)
    examples = [Example("ab", label="x", tags=("x", "y"))]
    with pytest.raises(ValueError, match=problem):
        head_accuracy(model, examples, LETTERS, ("x", "y"), per_token)


def test_no_tag_at_all_is_an_error(small):
    model = Head(2, per_token=True).attach(small)
    with pytest.raises(ValueError, match="no label counts"):
        head_accuracy(model, [Example("ab", tags=("", ""))], LETTERS, ("x", "y"), True)
