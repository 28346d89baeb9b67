"""The specification of minipeft/kernels/linear_distillation.py; test_twins.py holds it against its
definition in all dtypes and layouts.
"""

import pytest
import torch

from minipeft.compressed import linear_distillation as defined
from minipeft.dispatch import forced
from minipeft.kernels.linear_distillation import BLOCKS, block_and_warps, rows_loss_and_gradient
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    close,
    far_rows,
    interpreted_only,
    nbytes,
)


def draw(rows, V, dtype=torch.float32):
    s, t = 3 * torch.randn(2, rows, V)
    labels = torch.randint(0, V, (rows,))
    return s.to(DEVICE, dtype), t.to(DEVICE, dtype), labels.to(DEVICE)


def written_out(s, t, labels, T, alpha):
    """(loss, gradient) by autograd in float64, from the log-probabilities."""
    s, t = s.double().requires_grad_(), t.double()
    log_p, log_q = (t / T).log_softmax(1), (s / T).log_softmax(1)
    soft = T**2 * (log_p.exp() * (log_p - log_q)).sum()
    hard = -s.log_softmax(1).gather(1, labels[:, None]).sum()
    loss = alpha * soft + (1 - alpha) * hard
    return loss.detach().float(), torch.autograd.grad(loss, s)[0].float()


@pytest.mark.parametrize("V", [1, 2, 1023, 1024, 1025, 4100])
@pytest.mark.parametrize(("T", "alpha"), [(2.0, 0.3), (1.0, 1.0), (0.5, 0.9)])
def test_loss_and_gradient_of_a_row(V, T, alpha):
    """(KLRows 1) (KLRows 2) (KLRows 3) (KLRows 4), V around and over the block."""
    s, t, labels = draw(2, V)
    loss, gradient = written_out(s, t, labels, T, alpha)
    before = t.clone()
    close(rows_loss_and_gradient(s, t, labels, T, alpha), loss)
    # one word: q = p = 1 and the gradient is 0, to the rounding of exponentials near 1
    close(s, gradient) if V > 1 else torch.testing.assert_close(s, gradient, rtol=0, atol=1e-6)
    assert torch.equal(t, before)


def test_entries_that_grow_from_block_to_block():
    """(KLRows 2): both largest entries move in every block, in opposite directions."""
    V = 3 * block_and_warps(4000)[0]
    s = torch.linspace(-60, 40, V, device=DEVICE)[None]
    t, labels = s.flip(1).clone(), torch.tensor([V // 3], device=DEVICE)
    for student, teacher in ((s.clone(), t), (t.clone(), s)):
        loss, gradient = written_out(student, teacher, labels, 3.0, 0.5)
        close(rows_loss_and_gradient(student, teacher, labels, 3.0, 0.5), loss)
        close(student, gradient)


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    s, t, labels = draw(2, 50)
    t.copy_(s)
    assert rows_loss_and_gradient(s, t, labels, 2.0, 1.0).abs() < 1e-5  # sums of 50 roundings
    assert s.abs().max() < 1e-6


def test_no_rows():
    s, t, labels = draw(2, 5)
    assert rows_loss_and_gradient(s[:0], t[:0], labels[:0], 2.0, 0.5) == 0


@pytest.mark.parametrize("label", [-1, 70, 10**6])
def test_a_label_that_is_no_word_gives_nan(label):
    """And not whatever lies beside the row. Without a hard part no label is looked at."""
    s, t, labels = draw(2, 70)
    labels[0] = label
    assert rows_loss_and_gradient(s.clone(), t, labels, 2.0, 0.5).isnan()
    assert rows_loss_and_gradient(s, t, labels, 2.0, 1.0).isfinite()


@interpreted_only
def test_rows_may_lie_more_than_two_billion_entries_away():
    s, t, labels = draw(3, 17, torch.float16)
    near, far, far_t = s.clone(), far_rows(s), far_rows(t)
    expected = rows_loss_and_gradient(near, t, labels, 2.0, 0.5)
    close(rows_loss_and_gradient(far, far_t, labels, 2.0, 0.5), expected)
    close(far, near)


@interpreted_only
@pytest.mark.parametrize("V", [100, 3000])
def test_five_times_a_row_s_logits_is_all_the_traffic(V):
    """Both rows twice, and the gradient. Beside it 16 bytes a row."""
    s, t, labels = draw(3, V)
    with Traffic() as traffic:
        rows_loss_and_gradient(s, t, labels, 2.0, 0.5)
    assert traffic.loaded["t_t"] == 2 * nbytes(t) and traffic.stored["t_s"] == nbytes(s)
    assert traffic.total <= 5 * nbytes(s) + 3 * 16


def test_blocks_grow_with_the_vocabulary():
    assert block_and_warps(1) == BLOCKS[0][1:] and block_and_warps(50257) == BLOCKS[-1][1:]


@pytest.mark.parametrize("alpha", [0.4, 1.0])
def test_the_chunked_loss_uses_it_and_agrees(alpha):
    """linear_distillation_loss, with the kernel and without, loss and both gradients."""
    x, W = torch.randn(9, 7), torch.randn(31, 7)
    z, U, labels = torch.randn(9, 5), torch.randn(31, 5), torch.randint(0, 31, (9,))
    found = []
    for choice in ("on", "off"):
        leaves = [u.to(DEVICE).requires_grad_() for u in (x.clone(), W.clone())]
        others = [u.to(DEVICE) for u in (z, U, labels)]
        with forced(choice):
            loss = defined.linear_distillation_loss(*leaves, *others, 2.0, alpha, 4)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, plain in zip(*found):
        close(mine.detach(), plain.detach())
