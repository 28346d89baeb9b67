"""The specification of minipeft/compressed/teachers.py."""

import copy
import dataclasses
import math

import pytest
import torch

from minipeft import generate
from minipeft.compressed.distillation import distillation_loss, reverse_distillation_loss
from minipeft.compressed.layer_matching import student_from
from minipeft.compressed.teachers import ExactTeacher, NetworkTeacher, generations
from minipeft.dataset import Encoded, collate
from minipeft.head import Head
from minipeft.training import TrainingConfig, train
from tests.tiny import CONFIG, randomize, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}  # float64, some hundred roundings of numbers of order one
ROWS = [
    Encoded([3, 1, 4, 1, 5], [-100, 4, 1, 5, 9]),
    Encoded([2, 7, 1], [7, 1, 8]),
    Encoded([6, 6, 2, 6], [-100, -100, 6, 0]),
]


@pytest.fixture
def teacher():
    return tiny_model(dataclasses.replace(CONFIG, n_layer=3))


@pytest.fixture
def student(teacher):
    return randomize(student_from(teacher, 2))


@pytest.fixture
def batch():
    return collate(ROWS, start=4, indices=(0, 1, 2))


def test_a_network_teaches_through_the_distillation_loss(student, teacher, batch):
    loss = NetworkTeacher(teacher, temperature=2.0, alpha=0.3)(student, batch)
    logits = [m(batch.ids, batch.start) for m in (student, teacher)]
    wanted = distillation_loss(*logits, batch.labels, 2.0, 0.3)
    torch.testing.assert_close(loss, wanted, **EXACT)


def test_a_network_may_teach_in_reverse(student, teacher, batch):
    loss = NetworkTeacher(teacher, temperature=2.0, alpha=0.3, reverse=True)(student, batch)
    logits = [m(batch.ids, batch.start) for m in (student, teacher)]
    wanted = reverse_distillation_loss(*logits, batch.labels, 2.0, 0.3)
    torch.testing.assert_close(loss, wanted, **EXACT)


def test_the_teacher_is_in_eval_mode_and_comes_back_as_it_was(student, batch):
    noisy = dataclasses.replace(CONFIG, n_layer=3, dropout=0.5)
    teacher = tiny_model(noisy).train()
    loss_fn = NetworkTeacher(teacher)
    first, second = loss_fn(student, batch), loss_fn(student, batch)
    assert torch.equal(first, second) and teacher.training
    first.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_a_teacher_is_its_own_best_student(teacher, batch):
    loss = NetworkTeacher(teacher, hidden=1.0, cosine=1.0, attention=1.0)(
        copy.deepcopy(teacher), batch
    )
    assert 0 <= loss.item() < 1e-13  # the cosine of equal vectors, rounded


@pytest.mark.parametrize("name", ("hidden", "cosine", "attention"))
def test_matching_is_added_with_its_weight(student, teacher, batch, name):
    """(Teacher 3)"""
    plain, once, thrice = (
        NetworkTeacher(teacher, 2.0, 0.5, **{name: w})(student, batch) for w in (0.0, 1.0, 3.0)
    )
    assert once > plain
    torch.testing.assert_close(thrice - plain, 3 * (once - plain), **EXACT)


def test_the_layer_map_may_be_chosen(student, teacher, batch):
    default, same, other = (
        NetworkTeacher(teacher, hidden=1.0, layers=m)(student, batch)
        for m in (None, (0, 2), (1, 2))
    )
    assert torch.equal(default, same) and not torch.equal(default, other)
    with pytest.raises(ValueError, match="layers"):
        NetworkTeacher(teacher, hidden=1.0, layers=(0, 3))(student, batch)


def test_heads_of_any_kind_are_read(batch):
    """A tagging head in place of the language model's."""
    models = [tiny_model(seed=n) for n in (0, 1)]
    for model in models:
        randomize(Head(num_labels=4, per_token=True).attach(model))
    labels = torch.where(batch.labels == -100, -100, batch.labels % 4)
    tagged = dataclasses.replace(batch, labels=labels)
    loss = NetworkTeacher(models[1], 2.0, 0.5)(models[0], tagged)
    wanted = distillation_loss(*(m(batch.ids, batch.start) for m in models), labels, 2.0, 0.5)
    torch.testing.assert_close(loss, wanted, **EXACT)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0}, "temperature=0"),
        ({"alpha": 2}, "alpha=2"),
        ({"hidden": -1.0}, "hidden=-1"),
        ({"cosine": math.nan}, "cosine=nan"),
        ({"attention": math.inf}, "attention=inf"),
    ],
)
def test_bad_options_are_named_at_once(teacher, options, words):
    with pytest.raises(ValueError, match=words):
        NetworkTeacher(teacher, **options)


def test_another_vocabulary_is_an_error(student, batch):
    other = tiny_model(dataclasses.replace(CONFIG, vocab_size=98))
    with pytest.raises(ValueError, match="98"):
        NetworkTeacher(other)(student, batch)


# -- the truth


def tables(seed=0):
    """For each of ROWS a (T, V) table of probabilities, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for row in ROWS:
        p = torch.rand(len(row.ids), CONFIG.vocab_size, generator=generator, dtype=torch.float64)
        p = p * (p > 0.5)
        found.append(p / p.sum(-1, keepdim=True))
    return found


def test_the_truth_teaches_by_its_cross_entropy(student, batch):
    """KL(p || q) of every label that counts, with p the table's row."""
    loss = ExactTeacher(tables())(student, batch)
    log_q = student(batch.ids, batch.start).log_softmax(-1)
    total, n = 0.0, 0
    for b, (row, table) in enumerate(zip(ROWS, tables())):
        for t, label in enumerate(row.labels):
            if label != -100:
                p = table[t]
                total += (p[p > 0] * (p[p > 0].log() - log_q[b, t][p > 0])).sum()
                n += 1
    torch.testing.assert_close(loss, total / n, **EXACT)


def test_hard_labels_are_mixed_in(student, batch):
    losses = [ExactTeacher(tables(), alpha)(student, batch) for alpha in (1.0, 0.0, 0.25)]
    hard = student.loss(batch.ids, batch.labels, batch.start)
    torch.testing.assert_close(losses[1], hard, **EXACT)
    torch.testing.assert_close(losses[2], 0.25 * losses[0] + 0.75 * losses[1], **EXACT)


def test_tables_are_found_by_the_batch_s_indices(student):
    """In another order, and sparse, the loss is the same."""
    backwards = collate(ROWS[::-1], indices=(2, 1, 0))
    forwards = collate(ROWS, indices=(0, 1, 2))
    sparse = ExactTeacher([t.to_sparse() for t in tables()])
    torch.testing.assert_close(
        sparse(student, backwards), ExactTeacher(tables())(student, forwards), **EXACT
    )


def test_a_table_that_does_not_fit_its_example_is_named(student, batch):
    shifted = tables()[1:] + tables()[:1]
    with pytest.raises(ValueError, match=r"table 0 is \(3, 97\), its example has 5"):
        ExactTeacher(shifted)(student, batch)


def test_a_batch_that_does_not_say_which_examples_it_has_is_named(student):
    """Without indices there is no table to read: that is no loss of 0."""
    with pytest.raises(ValueError, match="3 rows and tells of 0"):
        ExactTeacher(tables())(student, collate(ROWS))
    with pytest.raises(ValueError, match="no table of example 3, of 3"):
        ExactTeacher(tables())(student, collate(ROWS, indices=(0, 1, 3)))


def test_the_truth_stays_exact_beside_a_student_in_half_precision(student, batch):
    half = copy.deepcopy(student).to(torch.bfloat16)
    found = ExactTeacher(tables()).probabilities(batch, half(batch.ids, batch.start))
    assert found.dtype == torch.float32
    assert torch.equal(found[0], tables()[0].float())


# -- text


def test_generations_are_what_the_teacher_writes(teacher):
    """(Teacher 2): greedy, each prompt as if it were alone; the loss falls on the answer only."""
    prompts = [[5, 3], [7, 1, 2, 4]]
    rows = generations(teacher, prompts, 6, stop_token=0, temperature=0)
    for prompt, row in zip(prompts, rows):
        whole = generate(teacher, torch.tensor([prompt]), 6, temperature=0, stop_token=0)[0]
        assert [*row.ids, row.labels[-1]] == whole.tolist()
        assert row.labels[: len(prompt) - 1] == [-100] * (len(prompt) - 1)
        assert row.labels[len(prompt) - 1 :] == whole.tolist()[len(prompt) :]


def test_the_end_is_learned_and_nothing_behind_it(teacher):
    """Where a row stops early, its neighbours make it padding; that is no label."""
    prompts = [[5, 3], [7, 1, 2, 4]]
    free = generations(teacher, prompts, 6, stop_token=0, temperature=0)
    stop = free[0].labels[-3]  # a token that the first row writes before its end
    first = free[0].labels.index(stop)
    rows = generations(teacher, prompts, 6, stop_token=stop, temperature=0)
    assert rows[0].labels == free[0].labels[: first + 1]


def test_beams_find_a_text_at_least_as_probable_as_the_greedy_one(teacher):
    """(Teacher 1): -log p(y | x) of the beam's choice is no larger."""
    prompts = [[5, 3], [7, 1]]

    def nats(rows):
        with torch.no_grad():
            losses = [
                teacher.loss(torch.tensor([r.ids]), torch.tensor([r.labels])) * r.count
                for r in rows
            ]
        return [x.item() for x in losses]

    greedy = nats(generations(teacher, prompts, 5, stop_token=96, temperature=0))
    beams = nats(generations(teacher, prompts, 5, stop_token=96, num_beams=4, length_penalty=0.0))
    assert all(b <= g + 1e-12 for b, g in zip(beams, greedy)) and sum(beams) < sum(greedy)


def test_samples_depend_on_the_seed_alone(teacher):
    draws = [generations(teacher, [[5]] * 4, 5, stop_token=0, seed=s) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len({tuple(r.labels) for r in draws[0]}) > 1


@pytest.mark.parametrize("prompts", ([], [[1], []]))
def test_prompts_must_not_be_empty(teacher, prompts):
    with pytest.raises(ValueError, match="at least one"):
        generations(teacher, prompts, 4, stop_token=0)


def test_a_student_learns_from_each_of_them_in_the_training_loop(teacher):
    """Forty steps bring the student's KL from its teacher down to less than a third."""
    config = TrainingConfig(steps=40, batch_size=3, learning_rate=1e-2, device="cpu")
    batch = collate(ROWS, indices=(0, 1, 2))
    for loss_fn in (NetworkTeacher(teacher, hidden=0.1), ExactTeacher(tables())):
        student = tiny_model(seed=9)
        before = loss_fn(student, batch).item()
        train(student, ROWS, config, loss_fn=loss_fn, show=False)
        after = loss_fn(student, batch).item()
        assert after < before / 3 and math.isfinite(after)
