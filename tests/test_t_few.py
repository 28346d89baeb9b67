"""T-Few's three losses and rank classification against loops over tokens."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from minipeft import IA3
from minipeft.additive import t_few
from minipeft.additive.t_few import Example, TFewLoss, questions, rank_classify, rows_of
from minipeft.dataset import Example as Text
from minipeft.dataset import collate, encode_all
from minipeft.training import TrainingConfig, train
from tests.tiny import CONFIG, tiny_model

EXACT = {"rel_tol": 0, "abs_tol": 1e-12}  # float64: a few dozen roundings of numbers near one
EXAMPLES = [
    Example((5, 9, 3), ((7,), (8, 2), (8, 4, 1)), correct=1),
    Example((6,), ((1, 2, 3, 4), (9, 9)), correct=0),
    Example((2, 3), ((5, 6),)),
]


@pytest.fixture
def model():
    return tiny_model()


def log_probs_by_hand(model, example):
    """log p of every token of every choice, one whole text at a time."""
    found = []
    for choice in example.choices:
        text = torch.tensor([[*example.prompt, *choice]])
        table = model(text)[0].log_softmax(-1)
        first = len(example.prompt)
        found.append([table[first + t - 1, token].item() for t, token in enumerate(choice)])
    return found


def by_hand(model, examples, e, power):
    """The three losses as the paper writes them."""
    right, wrong, ranking = [], [], []
    for example in examples:
        tables = log_probs_by_hand(model, example)
        scores = [sum(row) / len(row) ** power for row in tables]
        norm = math.log(sum(math.exp(s) for s in scores))
        ranking.append(norm - scores[example.correct])
        for c, row in enumerate(tables):
            (right if c == example.correct else wrong).extend(row)
    unlikely = [math.log(1 - math.exp(lp) + e) for lp in wrong]
    return (
        -sum(right) / len(right),
        -sum(unlikely) / max(1, len(unlikely)),
        sum(ranking) / len(ranking),
    )


@pytest.mark.parametrize("power", [1.0, 0.0, 0.5])
@pytest.mark.parametrize("e", [1e-2, 0.0])
def test_the_three_losses(model, power, e):
    """(T-Few 1) (T-Few 2) (T-Few 3) (T-Few 4), over choices of different number and length."""
    losses = t_few.t_few_losses(model, rows_of(EXAMPLES), e=e, power=power)
    assert list(losses) == ["language_model", "unlikelihood", "length_normalized"]
    for found, expected in zip(losses.values(), by_hand(model, EXAMPLES, e, power)):
        assert math.isclose(found.item(), expected, **EXACT)


def test_the_rows_hold_each_text_once_with_aligned_labels():
    rows = rows_of(EXAMPLES[:2])
    assert rows.ids.shape == rows.labels.shape == (5, 5)
    assert rows.ids[1].tolist() == [5, 9, 3, 8, 0]
    assert rows.labels[1].tolist() == [-100, -100, 8, 2, -100]
    assert rows.labels[3].tolist() == [1, 2, 3, 4, -100]
    assert rows.example.tolist() == [0, 0, 0, 1, 1]
    assert rows.correct.tolist() == [False, True, False, True, False]


def test_the_loss_of_training_weighs_the_terms(model):
    """(T-Few 5), and only the batch's examples count."""
    batch = SimpleNamespace(indices=[2, 0], ids=torch.zeros(1, 1), start=0)
    terms = by_hand(model, [EXAMPLES[2], EXAMPLES[0]], 1e-2, 1.0)
    loss = TFewLoss(EXAMPLES)(model, batch)
    assert math.isclose(loss.item(), sum(terms), **EXACT)
    weighed = TFewLoss(EXAMPLES, weights=(0.5, 2.0, 0.0))(model, batch)
    assert math.isclose(weighed.item(), 0.5 * terms[0] + 2 * terms[1], **EXACT)


def test_the_start_reaches_the_positions(model):
    rows = rows_of(EXAMPLES[:1])
    moved, _ = t_few.token_log_probs(model, rows.ids, rows.labels, start=4)
    table = model(rows.ids, start=4).log_softmax(-1)
    expected = table[rows.labels != -100].gather(1, rows.labels[rows.labels != -100][:, None])
    torch.testing.assert_close(moved, expected[:, 0], rtol=0, atol=1e-12)


def test_one_choice_leaves_the_language_model_loss(model):
    rows = rows_of([EXAMPLES[2]])
    losses = t_few.t_few_losses(model, rows)
    assert losses["unlikelihood"] == losses["length_normalized"] == 0
    expected = model.loss(rows.ids, rows.labels)
    assert math.isclose(losses["language_model"].item(), expected.item(), **EXACT)


def test_unlikelihood_is_bounded_where_the_wrong_choice_is_certain():
    """(T-Few 2): -log(e) at p = 1, 0 at p = e, and a gradient that pushes p down."""
    log_probs = torch.tensor([0.0], dtype=torch.float64, requires_grad=True)
    loss = t_few.unlikelihood_loss(log_probs, torch.tensor([False]))
    assert math.isclose(loss.item(), -math.log(0.01), rel_tol=1e-12)
    loss.backward()
    assert log_probs.grad > 0
    at_e = torch.tensor([math.log(0.01)], dtype=torch.float64)
    assert abs(t_few.unlikelihood_loss(at_e, torch.tensor([False]))) < 1e-15


def test_the_losses_pass_gradcheck():
    log_probs = torch.tensor([-0.3, -1.2, -2.0, -0.7], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([True, False, False, True])
    row, example = torch.tensor([0, 1, 1, 2]), torch.tensor([0, 0, 1])
    correct = torch.tensor([True, False, True])

    def ranking(x):
        return t_few.ranking_loss(t_few.choice_scores(x, row, 3), example, correct)

    assert torch.autograd.gradcheck(lambda x: t_few.likelihood_loss(x, right), log_probs)
    assert torch.autograd.gradcheck(lambda x: t_few.unlikelihood_loss(x, right), log_probs)
    assert torch.autograd.gradcheck(ranking, log_probs)


def test_rank_classification_with_and_without_length_normalisation(model):
    """(T-Few 6): the best mean and the best sum, which differ where lengths do."""
    generator = torch.Generator().manual_seed(0)
    examples = []
    for _ in range(40):
        sizes = torch.randint(1, 6, (4,), generator=generator).tolist()
        draw = [torch.randint(97, (n,), generator=generator).tolist() for n in [3, *sizes]]
        examples.append(Example(tuple(draw[0]), tuple(tuple(c) for c in draw[1:]), correct=3))
    answers = {}
    for power in (1.0, 0.0):
        answers[power] = rank_classify(model, examples, power).tolist()
        for example, answer in zip(examples, answers[power]):
            rows = log_probs_by_hand(model, example)
            scores = [sum(row) / len(row) ** power for row in rows]
            assert answer == max(range(4), key=scores.__getitem__)
    assert answers[1.0] != answers[0.0]
    short = [sum(len(e.choices[a]) for e, a in zip(examples, answers[p])) for p in (1.0, 0.0)]
    assert short[1] < short[0], "without normalisation short choices win"


def test_ranking_is_in_eval_mode_whatever_the_batch_and_leaves_the_mode(model):
    model = tiny_model(dataclasses.replace(CONFIG, dropout=0.5)).train()
    examples = EXAMPLES * 3
    answers = rank_classify(model, examples, batch_size=2)
    assert model.training
    assert torch.equal(answers, rank_classify(model.eval(), examples))
    for example, answer in zip(examples, answers.tolist()):
        scores = [sum(row) / len(row) for row in log_probs_by_hand(model, example)]
        assert answer == max(range(len(scores)), key=scores.__getitem__)


# -- a data set's examples as questions


class Letters:
    """A tokenizer of letters: a is 1."""

    eot = 0

    def encode(self, text):
        return [ord(letter) - 96 for letter in text]


TEXTS = [Text("abc", "yes"), Text("bd", "no"), Text("f", "yes")]


def test_a_data_set_s_examples_become_questions_in_its_order():
    asked = questions(TEXTS, Letters())
    no, yes = (14, 15, 0), (25, 5, 19, 0)  # sorted by text, each ended by eot
    assert asked == [
        Example((0, 1, 2, 3), (no, yes), 1),
        Example((0, 2, 4), (no, yes), 0),
        Example((0, 6), (no, yes), 1),
    ]
    given = questions(TEXTS[:1], Letters(), ["yes", "maybe"])
    assert given[0].correct == 0 and given[0].choices == (yes, (13, 1, 25, 2, 5, 0))


def test_the_first_term_on_questions_is_the_loss_of_training_on_the_texts(model):
    """(T-Few 1) over the right answers and their eot, the batch's rows out of order."""
    order = [2, 0]
    encoded = encode_all(TEXTS, Letters(), model)
    batch = collate([encoded[i] for i in order], start=3, indices=order)
    loss = TFewLoss(questions(TEXTS, Letters()), (1.0, 0.0, 0.0))(model, batch)
    expected = model.loss(batch.ids, batch.labels, start=3)
    assert math.isclose(loss.item(), expected.item(), **EXACT)


def test_it_is_a_loss_of_the_training_loop(model):
    """Both kinds of questions are answered rightly afterwards, by the loop alone."""
    asked = questions(TEXTS, Letters())
    IA3().attach(model)
    config = TrainingConfig(40, 2, learning_rate=6e-2, device="cpu")
    result = train(
        model, encode_all(TEXTS, Letters(), model), config, loss_fn=TFewLoss(asked), show=False
    )
    assert result.losses[-1] < 0.5 * result.losses[0]
    assert rank_classify(model, asked).tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    "texts, choices, message",
    [
        ([*TEXTS, Text("", "yes")], None, "example 3 has prompt=''"),
        (TEXTS, ["no"], r"example 0 .*completion='yes'.* one of \['no'\]"),
    ],
)
def test_what_is_no_question_is_named(texts, choices, message):
    with pytest.raises(ValueError, match=message):
        questions(texts, Letters(), choices)


def test_ia3_learns_a_question_it_got_wrong(model):
    torch.manual_seed(0)
    wrong = (int(rank_classify(model, EXAMPLES[:1])) + 1) % 3
    example = Example(EXAMPLES[0].prompt, EXAMPLES[0].choices, correct=wrong)
    IA3().attach(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=6e-2)
    rows = rows_of([example])
    for _ in range(40):
        optimizer.zero_grad()
        sum(t_few.t_few_losses(model, rows).values()).backward()
        optimizer.step()
    assert rank_classify(model, [example]).item() == wrong


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Example((), ((1,),)), "the prompt is empty"),
        (lambda: Example((1,), ()), "at least one"),
        (lambda: Example((1,), ((1,), ())), "none of them empty"),
        (lambda: Example((1,), ((1,),), correct=1), "correct=1"),
    ],
)
def test_questions_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
