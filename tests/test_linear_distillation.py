"""The specification of minipeft/compressed/linear_distillation.py: in chunks or at once, the same.

float64 at 1e-12: sums in another order, some hundred roundings of numbers of order one.
"""

import pytest
import torch
from torch.nn import functional as F

from minipeft import cross_entropy
from minipeft.compressed.linear_distillation import (
    linear_distillation_loss,
    linear_distillation_loss_written_out,
)
from minipeft.cross_entropy import linear_cross_entropy
from minipeft.memory import PeakMemory

EXACT = {"rtol": 0, "atol": 1e-12}
M, V, D, E = 11, 23, 5, 7  # rows, words, the student's width, the teacher's


def problem(dtype=torch.float64, M=M, V=V):
    """(x, weight, teacher_x, teacher_weight, labels), two labels not counting."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((M, D), (V, D), (M, E), (V, E))
    x, W, z, U = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    labels = torch.randint(V, (M,), generator=generator)
    labels[2] = labels[M - 1] = -100
    x, W, z, U = (t.to(dtype) for t in (x, W, z, U))
    return x.requires_grad_(), W.requires_grad_(), z, U, labels


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize("chunk", (1, 4, 9, 100))
@pytest.mark.parametrize(("temperature", "alpha"), [(1.0, 1.0), (2.0, 0.3), (0.7, 0.0)])
def test_chunks_change_nothing(chunk, temperature, alpha):
    """(LinearDistill 1) (LinearDistill 2) (LinearDistill 3) (LinearDistill 4)"""
    x, W, *rest = problem()
    ours = linear_distillation_loss(x, W, *rest, temperature, alpha, chunk=chunk)
    wanted = linear_distillation_loss_written_out(x, W, *rest, temperature, alpha)
    torch.testing.assert_close(ours, wanted, **EXACT)
    pairs = zip(gradients(ours, x, W), gradients(wanted, x, W))
    for ours, wanted in pairs:
        torch.testing.assert_close(ours, wanted, **EXACT)


def test_without_gradients_the_head_s_is_not_made(monkeypatch):
    """Though a parameter says that it wants one."""
    wanted = linear_distillation_loss(*problem(), 2.0, 0.3, chunk=4)
    monkeypatch.setattr(cross_entropy, "add_product", None)
    with torch.no_grad():
        assert linear_distillation_loss(*problem(), 2.0, 0.3, chunk=4) == wanted


def test_the_gradient_is_the_closed_form():
    """(LinearDistill 3) and (LinearDistill 4), written out once more."""
    x, W, z, U, labels = problem()
    T, alpha, counts = 2.0, 0.3, labels != -100
    s, t = (x @ W.T).detach(), z @ U.T
    soft = T * ((s / T).softmax(-1) - (t / T).softmax(-1))
    hard = s.softmax(-1) - F.one_hot(labels.clamp(min=0), V)
    g = counts[:, None] * (alpha * soft + (1 - alpha) * hard) / counts.sum()
    loss = linear_distillation_loss(x, W, z, U, labels, T, alpha, chunk=3)
    dx, dW = gradients(loss, x, W)
    torch.testing.assert_close(dx, g @ W.detach(), **EXACT)
    torch.testing.assert_close(dW, g.T @ x.detach(), **EXACT)


def test_the_gradient_of_a_multiple_is_the_multiple_of_the_gradient():
    x, W, *rest = problem()
    once = gradients(linear_distillation_loss(x, W, *rest, 2.0, 0.5), x, W)
    thrice = gradients(3 * linear_distillation_loss(x, W, *rest, 2.0, 0.5), x, W)
    for a, b in zip(once, thrice):
        torch.testing.assert_close(3 * a, b, **EXACT)


def test_equal_networks_give_no_loss_and_no_gradient():
    x, W, _, _, labels = problem()
    loss = linear_distillation_loss(x, W, x.detach(), W.detach(), labels, 3.0, 1.0)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(loss, x, W))


def test_without_a_soft_part_it_is_the_chunked_cross_entropy_bit_for_bit():
    x, W, z, U, labels = problem()
    ours = linear_distillation_loss(x, W, z, U, labels, 2.0, 0.0, chunk=4)
    assert torch.equal(ours, linear_cross_entropy(x, W, labels, chunk=4))


def test_gradients_are_made_only_where_they_are_wanted():
    x, W, z, U, labels = problem()
    for fixed in (x, W):
        kept = [t for t in (x, W) if t is not fixed]
        both = gradients(linear_distillation_loss(x, W, z, U, labels, 2.0, 0.5), *kept)
        tensors = [t.detach() if t is fixed else t for t in (x, W)]
        alone = gradients(linear_distillation_loss(*tensors, z, U, labels, 2.0, 0.5), *kept)
        assert torch.equal(both[0], alone[0])
    z.requires_grad_(), U.requires_grad_()
    linear_distillation_loss(x, W, z, U, labels, 2.0, 0.5).backward()
    assert z.grad is None and U.grad is None


def test_no_label_that_counts_gives_zero():
    x, W, z, U, labels = problem()
    loss = linear_distillation_loss(x, W, z, U, torch.full_like(labels, -100), 2.0, 0.5)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(loss, x, W))


def test_bfloat16_is_summed_in_float32():
    tensors = problem(torch.bfloat16, M=300)
    loss = linear_distillation_loss(*tensors, 2.0, 0.5)
    with torch.no_grad():
        exact = linear_distillation_loss_written_out(
            *(t.double() for t in tensors[:4]), tensors[4], 2.0, 0.5
        )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2)  # logits rounded to 8 bits


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
)
def test_two_dtypes_are_computed_with_in_the_larger(ours, theirs):
    """A teacher kept in half precision: its logits are rounded, its softmax is not."""
    x, W, z, U, labels = problem()
    tensors = [x.detach().to(ours), W.detach().to(ours), z.to(theirs), U.to(theirs)]
    tensors[0].requires_grad_()
    loss = linear_distillation_loss(*tensors, labels, 2.0, 0.5, chunk=4)
    wanted = linear_distillation_loss_written_out(*tensors, labels, 2.0, 0.5)
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6)  # a few float32 roundings
    mine, theirs = (gradients(value, tensors[0])[0] for value in (loss, wanted))
    rounding = 2 * torch.finfo(ours).eps  # of the gradient, at its end
    torch.testing.assert_close(mine, theirs, rtol=rounding, atol=max(1e-6, rounding) / 4)


def test_many_chunks_are_added_up_in_float32():
    """Of 300 additions to a bfloat16 head's gradient none is rounded but the last."""
    x, W, z, U, labels = problem(torch.bfloat16, M=300)
    loss = linear_distillation_loss(x, W, z, U, labels, 2.0, 0.5, chunk=1)
    exact = [t.detach().double() for t in (x, W, z, U)]
    exact[1].requires_grad_()
    wanted = linear_distillation_loss_written_out(*exact, labels, 2.0, 0.5)
    (mine,), (wanted,) = gradients(loss, W), gradients(wanted, exact[1])
    assert mine.dtype == torch.bfloat16
    # logits, the gradient of each row, each product: 2^-9 each; added in bfloat16 it is 0.026
    assert (mine.double() - wanted).norm() < 0.01 * wanted.norm()


def test_autocast_computes_products_in_bfloat16():
    x, W, *rest = problem(torch.float32)
    exact = linear_distillation_loss(x, W, *rest, 2.0, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_distillation_loss(x, W, *rest, 2.0, 0.5)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)
    assert all(g.dtype == torch.float32 for g in gradients(loss, x, W))


def test_memory_is_a_few_chunks_and_not_both_models_logits():
    """At 640 tokens by 2,000 words, whole logits are 5.1 MB each; a chunk is a tenth of that."""
    tensors = problem(torch.float32, M=640, V=2000)
    x, W = tensors[:2]
    peaks = []
    for loss in (
        lambda: linear_distillation_loss(*tensors, 2.0, 0.5, chunk=64),
        lambda: linear_distillation_loss_written_out(*tensors, 2.0, 0.5),
    ):
        with PeakMemory() as memory:
            gradients(loss(), x, W)
        peaks.append(memory.peak)
    assert peaks[0] < 0.2 * peaks[1]
    assert peaks[0] < 5 * 64 * 2000 * 4 + 4 * W.numel() * 4  # five chunks, the head's gradient


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (3, torch.zeros(V + 1, E), f"{V} words"),
        (2, torch.zeros(M - 1, E), f"{M} rows"),
        (4, torch.zeros(M + 2, dtype=torch.int64), "labels"),
        (5, 0.0, "temperature=0"),
        (6, 2.0, "alpha=2"),
        (7, 0, "chunk=0"),
    ],
)
def test_bad_input_is_named(place, value, words):
    arguments = [*problem(), 2.0, 0.5, 4]
    arguments[place] = value
    with pytest.raises(ValueError, match=words):
        linear_distillation_loss(*arguments)
