"""The specification of minipeft/compressed/distillation.py.

Formulas are written again here in float64 from the header's equations; 1e-12 covers a few hundred
roundings of numbers of order one.
"""

import math

import pytest
import torch
from torch.nn import functional as F

from minipeft.compressed.distillation import (
    FLOOR,
    distillation_loss,
    forward_kl,
    reverse_distillation_loss,
    reverse_kl,
)

EXACT = {"rtol": 0, "atol": 1e-12}
TEMPERATURES = (0.5, 1.0, 3.0)


def logits(*shape, seed=0, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def batch():
    """(student, teacher, labels): 3 rows of 7 tokens over 11 words, five labels not counting."""
    labels = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(2))
    labels[0, :3] = labels[2, 5:] = -100
    return logits(3, 7, 11, seed=0).requires_grad_(), logits(3, 7, 11, seed=1), labels


def by_hand(student, teacher, labels, temperature, alpha, reverse=False):
    """(Distill 4), word by word in plain Python."""
    total, n = 0.0, 0
    rows = zip(student.flatten(0, -2), teacher.flatten(0, -2), labels.flatten().tolist())
    for s, t, y in rows:
        if y == -100:
            continue
        n += 1
        q = [math.exp(v / temperature) for v in s.tolist()]
        p = [math.exp(v / temperature) for v in t.tolist()]
        q, p = [v / sum(q) for v in q], [v / sum(p) for v in p]
        a, b = (q, p) if reverse else (p, q)  # (Distill 5), (Distill 2)
        kl = sum(u * (math.log(u) - math.log(v)) for u, v in zip(a, b))
        whole = [math.exp(v) for v in s.tolist()]
        hard = -math.log(whole[y] / sum(whole))  # (Distill 3)
        total += alpha * temperature**2 * kl + (1 - alpha) * hard
    return total / n


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
def test_the_loss_is_the_formula(batch, temperature, alpha):
    """(Distill 1) to (Distill 4), over the labels that count alone."""
    student, teacher, labels = batch
    loss = distillation_loss(student, teacher, labels, temperature, alpha)
    wanted = by_hand(student.detach(), teacher, labels, temperature, alpha)
    assert loss.item() == pytest.approx(wanted, abs=1e-12)
    loss = reverse_distillation_loss(student, teacher, labels, temperature, alpha)
    wanted = by_hand(student.detach(), teacher, labels, temperature, alpha, reverse=True)
    assert loss.item() == pytest.approx(wanted, abs=1e-12)


def softmaxes(student, teacher, temperature):
    q = (student.detach() / temperature).softmax(-1)
    return (teacher / temperature).softmax(-1), q


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("alpha", (0.0, 0.3, 1.0))
def test_the_gradient_is_the_closed_form(batch, temperature, alpha):
    """alpha T (q - p) / n + (1 - alpha) (softmax(s) - onehot) / n, and zero where no label
    counts.
    """
    student, teacher, labels = batch
    distillation_loss(student, teacher, labels, temperature, alpha).backward()
    p, q = softmaxes(student, teacher, temperature)
    counts = (labels != -100)[..., None]
    onehot = F.one_hot(labels.clamp(min=0), 11)
    hard = student.detach().softmax(-1) - onehot
    wanted = counts * (alpha * temperature * (q - p) + (1 - alpha) * hard) / counts.sum()
    torch.testing.assert_close(student.grad, wanted, **EXACT)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_the_reverse_gradient_is_the_closed_form(batch, temperature):
    """T q (log(q / p) - KL(q || p)) / n."""
    student, teacher, labels = batch
    reverse_distillation_loss(student, teacher, labels, temperature, 1.0).backward()
    p, q = softmaxes(student, teacher, temperature)
    ratio = (q / p).log()
    kl = (q * ratio).sum(-1, keepdim=True)
    counts = (labels != -100)[..., None]
    wanted = counts * temperature * q * (ratio - kl) / counts.sum()
    torch.testing.assert_close(student.grad, wanted, **EXACT)


@pytest.mark.parametrize("loss", (distillation_loss, reverse_distillation_loss))
def test_equal_teacher_and_student_give_no_loss_and_no_gradient(batch, loss):
    student, _, labels = batch
    value = loss(student, student.detach().clone(), labels, 2.0, 1.0)
    value.backward()
    assert value.item() == 0
    assert student.grad.abs().max() < 1e-16  # rounding of p - q, which are equal bit for bit


def test_the_soft_part_is_torch_s_kl_div_with_the_teacher_second(batch):
    student, teacher, labels = batch
    rows = labels != -100
    s, t = student[rows] / 2.0, teacher[rows] / 2.0
    wanted = 4 * F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean")
    loss = distillation_loss(student, teacher, labels, 2.0, 1.0)
    torch.testing.assert_close(loss, wanted, **EXACT)


def test_forward_and_reverse_are_each_other_with_the_arguments_exchanged():
    s, t = logits(5, 11), logits(5, 11, seed=1)
    torch.testing.assert_close(forward_kl(s, t, 2.0), reverse_kl(t, s, 2.0), **EXACT)
    assert (forward_kl(s, t) - reverse_kl(s, t)).abs().max() > 0.1
    assert forward_kl(s, t).min() > 0 and reverse_kl(s, t).min() > 0


def test_what_stands_at_labels_that_do_not_count_does_not_matter(batch):
    student, teacher, labels = batch
    wanted = distillation_loss(student, teacher, labels, 2.0, 0.5)
    spoilt, other = student.detach().clone(), teacher.clone()
    spoilt[labels == -100], other[labels == -100] = math.inf, math.nan
    spoilt.requires_grad_()
    loss = distillation_loss(spoilt, other, labels, 2.0, 0.5)
    loss.backward()
    assert torch.equal(loss, wanted) and spoilt.grad.isfinite().all()


def test_no_label_that_counts_gives_zero(batch):
    student, teacher, labels = batch
    loss = distillation_loss(student, teacher, torch.full_like(labels, -100), 2.0, 0.5)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_another_ignore_index_counts_minus_100_as_a_mistake(batch):
    student, teacher, labels = batch
    renamed = labels.masked_fill(labels == -100, -7)
    loss = distillation_loss(student, teacher, renamed, 2.0, 0.5, ignore_index=-7)
    assert torch.equal(loss, distillation_loss(student, teacher, labels, 2.0, 0.5))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_teacher_that_rules_words_out_stays_finite(batch, temperature):
    student, teacher, labels = batch
    teacher[..., 4:9] = -math.inf
    loss = distillation_loss(student, teacher, labels, temperature, 0.5)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    kept = [0, 1, 2, 3, 9, 10]
    p = (teacher[..., kept] / temperature).softmax(-1)
    log_q = (student / temperature).log_softmax(-1)[..., kept]
    kl = temperature**2 * (p * (p.log() - log_q)).sum(-1)
    soft = forward_kl(student, teacher, temperature)
    torch.testing.assert_close(soft, kl, **EXACT)


def test_a_student_may_rule_out_the_same_words(batch):
    student, teacher, labels = batch
    masked = student.detach().clone()
    teacher[..., 4:9] = masked[..., 4:9] = -math.inf
    masked.requires_grad_()
    loss = distillation_loss(masked, teacher, labels, 2.0, 1.0)
    loss.backward()
    assert loss.isfinite() and masked.grad.isfinite().all()


def test_a_word_ruled_out_costs_a_finite_amount_in_reverse():
    """(Distill 5): q of it times FLOOR nats, the rest as ever."""
    s, t = logits(2, 3), logits(2, 3, seed=1)
    t[:, 0] = -math.inf
    q, p = s.softmax(-1), t.softmax(-1)
    wanted = q[:, 0] * (q[:, 0].log() - FLOOR) + (q[:, 1:] * (q / p)[:, 1:].log()).sum(-1)
    torch.testing.assert_close(reverse_kl(s, t), wanted, **EXACT)


def test_the_teacher_gets_no_gradient(batch):
    student, teacher, labels = batch
    teacher.requires_grad_()
    for loss in (distillation_loss, reverse_distillation_loss):
        loss(student, teacher, labels, 2.0, 0.5).backward()
    assert teacher.grad is None


def test_sums_are_in_float32_or_better(batch):
    student, teacher, labels = batch
    half = [t.detach().to(torch.bfloat16) for t in (student, teacher)]
    loss = distillation_loss(*half, labels, 2.0, 0.5)
    exact = distillation_loss(*(t.double() for t in half), labels, 2.0, 0.5)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)  # a few float32 roundings


def test_a_student_may_rule_out_words_in_reverse(batch):
    """0 log 0 is 0: the sum is over the words that the student leaves, and so is its gradient."""
    student, teacher, _ = batch
    masked, kept = student.detach().clone(), [0, 1, 2, 3, 9, 10]
    masked[..., 4:9] = -math.inf
    masked.requires_grad_()
    soft = reverse_kl(masked, teacher, 2.0)
    soft.sum().backward()
    log_p = (teacher / 2).log_softmax(-1)[..., kept]
    log_q = (masked.detach()[..., kept] / 2).log_softmax(-1)
    torch.testing.assert_close(soft, 4 * (log_q.exp() * (log_q - log_p)).sum(-1), **EXACT)
    assert masked.grad.isfinite().all() and masked.grad[..., 4:9].abs().max() == 0


@pytest.mark.parametrize("broken", (math.nan, math.inf))
@pytest.mark.parametrize("loss", (distillation_loss, reverse_distillation_loss))
def test_a_broken_teacher_is_not_a_good_loss(batch, loss, broken):
    """NaN at a label that counts makes the loss NaN, which the training loop stops at."""
    student, teacher, labels = batch
    row = (labels != -100).nonzero()[0]
    teacher[row[0], row[1], 5] = broken
    assert loss(student, teacher, labels, 2.0, 1.0).isnan()
    teacher[row[0], row[1]] = -math.inf  # no word can follow: no distribution
    assert loss(student, teacher, labels, 2.0, 1.0).isnan()


@pytest.mark.parametrize("divergence", (forward_kl, reverse_kl))
def test_gradcheck(divergence):
    s = logits(2, 5).requires_grad_()
    t = logits(2, 5, seed=1)
    assert torch.autograd.gradcheck(lambda s: divergence(s, t, 1.7), s)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, "temperature=0"),
        ({"temperature": -2.0}, "temperature=-2"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"alpha": math.nan}, "alpha=nan"),
        ({"alpha": 1.5}, r"alpha=1\.5"),
        ({"alpha": -0.1}, r"alpha=-0\.1"),
        ({"teacher_logits": torch.zeros(3, 7, 12)}, "one vocabulary"),
        ({"labels": torch.zeros(3, 6, dtype=torch.int64)}, r"labels \(3, 6\)"),
    ],
)
def test_bad_input_is_named(batch, change, words):
    student, teacher, labels = batch
    arguments = {"student_logits": student, "teacher_logits": teacher, "labels": labels}
    arguments |= {"temperature": 2.0, "alpha": 0.5}
    with pytest.raises(ValueError, match=words):
        distillation_loss(**arguments | change)
