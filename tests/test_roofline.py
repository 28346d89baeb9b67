"""The specification of minipeft/roofline.py."""

from __future__ import annotations

import pytest
import torch

from minipeft import GPT, GPTConfig, roofline
from minipeft.cross_entropy import linear_cross_entropy
from minipeft.roofline import Rates, operations


def test_the_floor_is_the_slower_of_the_two():
    """(Floor 1)"""
    rates = Rates(bandwidth=10.0, operations=100.0)
    assert rates.floor(bytes_moved=50, operations=200) == 5
    assert rates.floor(bytes_moved=10, operations=200) == 2
    assert rates.floor() == 0


def test_rates_count_reading_and_writing_and_both_operations(monkeypatch):
    monkeypatch.setattr(roofline, "seconds", lambda action, device: 0.5)
    found = roofline.measure("cpu")
    assert found == Rates(2 * 64 * 2**20 / 0.5, 2 * 1024**3 / 0.5)


def test_the_best_round_counts(monkeypatch):
    times = iter([3.0, 2.0, 4.0, 7.0, 9.0, 8.0])
    monkeypatch.setattr(roofline, "seconds", lambda action, device: next(times))
    found = roofline.measure("cpu", rounds=3)
    assert found == Rates(2 * 64 * 2**20 / 2.0, 2 * 1024**3 / 7.0)


def test_this_machine_moves_bytes_and_multiplies():
    found = roofline.measure("cpu", rounds=1)
    assert 1e8 < found.bandwidth < 1e13 and 1e8 < found.operations < 1e14


def test_operations_of_a_training_step_are_six_a_weight_and_token():
    """Two forward, two for dx, two for dW; of a frozen head no dW; the first layer needs no dx."""
    linear, x = torch.nn.Linear(7, 5), torch.randn(3, 7)
    assert operations(lambda: linear(x).sum().backward()) == 3 * 7 * 5 * 4
    y = x.clone().requires_grad_()
    assert operations(lambda: linear(y).sum().backward()) == 3 * 7 * 5 * 6
    model = GPT(GPTConfig(vocab_size=11, context_length=8, n_layer=1, n_head=1, d_model=4))
    ids = torch.zeros(2, 8, dtype=torch.int64)
    whole = operations(lambda: model.loss(ids, ids).backward())
    for p in model.parameters():
        p.requires_grad_(False)
    model.ln_f.weight.requires_grad_(True)
    frozen = operations(lambda: model.loss(ids, ids).backward())
    head, weights = 11 * 4, 12 * 4 * 4
    attention = 2 * 8 * 8 * 4 * 2  # scores and sums, 2 operations each, 2 rows
    assert frozen == pytest.approx(16 * (4 * head + 2 * weights) + 2 * attention)
    assert whole > 2 * frozen - 16 * 4 * head


def test_products_in_place_are_counted_like_others():
    a, b, y = torch.randn(3, 7, 5), torch.randn(3, 5, 2), torch.zeros(3, 7, 2)
    assert operations(lambda: y.baddbmm_(a, b)) == operations(lambda: a @ b) == 2 * 3 * 7 * 5 * 2
    assert operations(lambda: y[0].addmm_(a[0], b[0])) == 2 * 7 * 5 * 2


def test_the_gradient_of_a_chunked_head_is_counted():
    """Logits, dx and dW: six operations a weight and token."""
    x, W = torch.randn(9, 4, requires_grad=True), torch.randn(11, 4, requires_grad=True)
    labels = torch.zeros(9, dtype=torch.int64)
    found = operations(lambda: linear_cross_entropy(x, W, labels, chunk=5))
    assert found == 6 * 9 * 11 * 4
