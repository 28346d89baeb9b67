"""The rows of a cross-entropy, as defined and as their faster twin on any device: the loss's sum
(CE 2) and, written over the logits, its gradient (CE 3).
"""

from __future__ import annotations

import pytest
import torch

from minipeft import cross_entropy_rows
from minipeft.cross_entropy import IGNORE, rows_loss_and_gradient
from minipeft.dispatch import forced


def as_defined(*args):
    with forced("off"):
        return rows_loss_and_gradient(*args)


WAYS = {"definition": as_defined, "twin": cross_entropy_rows.rows_loss_and_gradient}


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def rows(request):
    return request.param


def formula(z, labels):
    """(CE 2) summed over the rows that count, and its gradient, in float64, row by row."""
    loss, gradient = 0.0, torch.zeros_like(z, dtype=torch.float64)
    for i, y in enumerate(labels.tolist()):
        if y == IGNORE:
            continue
        e = (z[i].double() - z[i].double().max()).exp()
        p = e / e.sum()
        loss -= p[y].log().item()
        gradient[i] = p
        gradient[i, y] -= 1
    return loss, gradient


def drawn(rows, width, dtype=torch.float64, scale=3.0):
    z = scale * torch.randn(rows, width, dtype=torch.float64)
    labels = torch.randint(0, width, (rows,))
    labels[1::3] = IGNORE
    return z.to(dtype), labels


@pytest.mark.parametrize("shape", [(7, 47), (1, 3), (64, 130)])
def test_loss_and_gradient_are_the_formula_s(rows, shape):
    z, labels = drawn(*shape)
    loss, gradient = formula(z, labels)
    found = rows(z, labels, True)
    assert found.item() == pytest.approx(loss, rel=1e-12)
    assert torch.allclose(z, gradient, rtol=0, atol=1e-14)  # entries of at most 1


def test_without_a_gradient_the_loss_is_the_same(rows):
    z, labels = drawn(9, 31)
    assert rows(z.clone(), labels, False) == rows(z, labels, True)


def test_rows_that_do_not_count_have_no_gradient_and_no_loss(rows):
    z, _ = drawn(4, 11)
    labels = torch.full((4,), IGNORE)
    assert rows(z, labels, True) == 0
    assert not z.any()


def test_large_logits_stay_finite(rows):
    """exp(1000) does not exist, exp(1000 - 1000) does."""
    z = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    loss = rows(z, torch.tensor([1, 1]), True)
    assert loss == 1000
    assert z.tolist() == [[1, -1], [0, 0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(rows, dtype):
    z, labels = drawn(5, 400, dtype)
    loss, gradient = formula(z, labels)
    found = rows(z, labels, True)
    assert found.dtype == torch.float32 and z.dtype == dtype
    assert found.item() == pytest.approx(loss, rel=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-10
    assert torch.allclose(z.double(), gradient, rtol=rounding, atol=2**-24)  # float16's smallest


def test_the_twin_is_what_runs_on_a_cpu():
    z, labels = drawn(6, 21, torch.float32)
    ours, twins = z.clone(), z.clone()
    assert rows_loss_and_gradient(ours, labels) == WAYS["twin"](twins, labels)
    assert torch.equal(ours, twins)
