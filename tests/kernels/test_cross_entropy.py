"""The specification of minipeft/kernels/cross_entropy.py; test_twins.py holds it against its
definition in all dtypes and layouts.
"""

import pytest
import torch

from minipeft import cross_entropy as defined
from minipeft.cross_entropy import IGNORE
from minipeft.dispatch import forced
from minipeft.kernels.cross_entropy import BLOCKS, block_and_warps, rows_loss_and_gradient
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    close,
    far_rows,
    interpreted_only,
    nbytes,
)


def draw(rows, V, dtype=torch.float32):
    z = 3 * torch.randn(rows, V)
    return z.to(DEVICE, dtype), torch.randint(0, V, (rows,)).to(DEVICE)


@pytest.mark.parametrize("V", [1, 2, 1023, 1024, 1025, 5000])
def test_loss_and_gradient_of_a_row(V):
    """(CERows 1) (CERows 2) (CERows 3), in float64, V around and over the block."""
    z, labels = draw(2, V)
    exact = z.double()
    losses = exact.logsumexp(1) - exact.gather(1, labels[:, None])[:, 0]
    gradient = exact.softmax(1)
    gradient[torch.arange(2), labels] -= 1
    close(rows_loss_and_gradient(z, labels), losses.sum().float())
    close(z, gradient.float())


def test_entries_that_grow_from_block_to_block():
    """(CERows 1): each block holds a new largest entry, or only tiny ones."""
    V = 3 * block_and_warps(3000)[0]
    for z in (torch.linspace(-200, 90, V), torch.linspace(90, -200, V)):
        z = z[None].to(DEVICE)
        label = torch.tensor([V // 2], device=DEVICE)
        expected = z.double().logsumexp(1) - z.double()[:, V // 2]
        close(rows_loss_and_gradient(z, label, False), expected.sum().float())


def test_words_ruled_out_have_no_gradient():
    z, _ = draw(1, 2000)
    z[:, :1500] = -float("inf")  # the whole first block
    loss = rows_loss_and_gradient(z, torch.tensor([1700], device=DEVICE))
    assert loss.isfinite() and (z[:, :1500] == 0).all() and z.isfinite().all()


def test_a_row_that_does_not_count_is_not_read():
    """Whatever stands in it, NaN even."""
    z, labels = draw(3, 70)
    labels[1], z[1] = IGNORE, float("nan")
    expected, exact = z[::2].clone(), z[::2].clone()
    loss = rows_loss_and_gradient(z, labels)
    with forced("off"):
        close(loss, defined.rows_loss_and_gradient(expected, labels[::2]))
    close(z[::2], expected)
    assert (z[1] == 0).all() and not torch.equal(expected, exact)


def test_no_rows_and_no_counting_rows():
    z, labels = draw(2, 5)
    assert rows_loss_and_gradient(z[:0], labels[:0]) == 0
    assert rows_loss_and_gradient(z, torch.full_like(labels, IGNORE)) == 0
    assert (z == 0).all()


@pytest.mark.parametrize("label", [-1, 70, 10**6])
def test_a_label_that_is_no_word_gives_nan(label):
    """And not whatever lies beside the row."""
    z, labels = draw(2, 70)
    labels[0] = label
    assert rows_loss_and_gradient(z, labels, False).isnan()


def test_without_a_gradient_the_logits_stay():
    z, labels = draw(3, 33)
    before = z.clone()
    rows_loss_and_gradient(z, labels, False)
    assert torch.equal(z, before)


@interpreted_only
def test_rows_may_lie_more_than_two_billion_entries_away():
    z, labels = draw(3, 17, torch.float16)
    near, far = z.clone(), far_rows(z)
    assert far.stride(0) * 2 >= 2**31
    close(rows_loss_and_gradient(far, labels), rows_loss_and_gradient(near, labels))
    close(far, near)


@interpreted_only
@pytest.mark.parametrize("V", [100, 5000])
def test_three_times_the_logits_is_all_the_traffic(V):
    """Two reads and a write; one read without a gradient; one write in rows that do not count.
    Beside it 12 to 20 bytes a row.
    """
    z, labels = draw(4, V)
    with Traffic() as traffic:
        rows_loss_and_gradient(z, labels)
    assert traffic.loaded["t_z"] == 2 * nbytes(z) + 4 * 4 and traffic.stored["t_z"] == nbytes(z)
    assert traffic.total <= 3 * nbytes(z) + 4 * 20
    with Traffic() as traffic:
        rows_loss_and_gradient(*draw(4, V), False)
    assert traffic.total <= nbytes(z) + 4 * 20
    with Traffic() as traffic:
        rows_loss_and_gradient(z, torch.full_like(labels, IGNORE))
    assert traffic.loaded["t_z"] <= 4 * 4 and traffic.stored["t_z"] == nbytes(z)


def test_blocks_grow_with_the_vocabulary():
    assert block_and_warps(1) == BLOCKS[0][1:] and block_and_warps(50257) == BLOCKS[-1][1:]


def test_the_chunked_loss_uses_it_and_agrees():
    """linear_cross_entropy, with the kernel and without, loss and both gradients."""
    x, W, labels = torch.randn(9, 7), torch.randn(31, 7), torch.randint(0, 31, (9,))
    labels[3] = IGNORE
    found = []
    for choice in ("on", "off"):
        leaves = [t.to(DEVICE).requires_grad_() for t in (x.clone(), W.clone())]
        with forced(choice):
            loss = defined.linear_cross_entropy(*leaves, labels.to(DEVICE), 4)
        found.append([loss, *torch.autograd.grad(loss, leaves)])
    for mine, plain in zip(*found):
        close(mine.detach(), plain.detach())
