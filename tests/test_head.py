"""The specification of head.py."""

from __future__ import annotations

import pytest
import torch

import minipeft
from minipeft import BitFit, Head, LoRA
from minipeft.technique import trainable_parameters
from tests.tiny import CONFIG, close, randomize, tiny_model

EXACT = 1e-12


def test_a_row_s_logits_come_from_its_last_real_token(model, ids):
    """(Head 1), with rows of different lengths, sum by sum."""
    lengths = torch.tensor([11, 4, 1])
    randomize(Head(num_labels=5).attach(model), std=1.0)
    x, W, b = model.features(ids), model.head.weight, model.head.bias
    last = [x[row, n - 1] for row, n in enumerate(lengths.tolist())]
    logit = lambda h, c: sum(W[c, i] * h[i] for i in range(32)) + b[c]  # noqa: E731
    expected = torch.stack([torch.stack([logit(h, c) for c in range(5)]) for h in last])
    close(model(ids, lengths=lengths), expected, EXACT)


def test_without_lengths_the_last_column_is_read(model, ids):
    Head(num_labels=3).attach(model)
    full = torch.full((3,), 11)
    assert torch.equal(model(ids), model(ids, lengths=full))
    assert model(ids).shape == (3, 3)


def test_padding_does_not_change_the_decision(model, ids):
    Head(num_labels=3).attach(model)
    lengths, other = torch.tensor([6, 2, 9]), ids.clone()
    for row, n in enumerate(lengths.tolist()):
        other[row, n:] = 0
    assert torch.equal(model(ids, lengths=lengths), model(other, lengths=lengths))


def test_per_token_decides_at_every_position(model, ids):
    """(Head 2)"""
    randomize(Head(num_labels=5, per_token=True).attach(model), std=1.0)
    expected = torch.einsum("btd,cd->btc", model.features(ids), model.head.weight) + model.head.bias
    close(model(ids), expected, EXACT)
    assert model(ids).shape == (3, 11, 5)


def test_the_features_are_the_base_s(model, ids):
    base = model.features(ids)
    assert torch.equal(Head(num_labels=4).attach(model).features(ids), base)


def test_with_the_embedding_s_rows_it_is_the_language_model_restricted(model, ids):
    """The reduction of the header: W the rows of the label words, b = 0."""
    words = torch.tensor([3, 50, 9])
    logits = model(ids)
    rows = model.embed.token.weight[words].detach().clone()
    Head(num_labels=3, per_token=True).attach(model)
    with torch.no_grad():
        model.head.weight.copy_(rows)
    close(model(ids), logits[..., words], EXACT)


def test_the_loss_is_cross_entropy_over_classes(model, ids):
    lengths, labels = torch.tensor([11, 4, 7]), torch.tensor([2, 0, 1])
    randomize(Head(num_labels=3).attach(model), std=0.5)
    logits = model(ids, lengths=lengths)
    expected = sum(logits[n].exp().sum().log() - logits[n, labels[n]] for n in range(3)) / 3
    close(model.loss(ids, labels, lengths=lengths), expected, EXACT)


def test_per_token_labels_of_minus_100_do_not_count(model, ids):
    randomize(Head(num_labels=3, per_token=True).attach(model), std=0.5)
    labels = torch.full((3, 11), -100)
    labels[0, 2], labels[2, 10] = 1, 2
    logits = model(ids)
    terms = [logits[0, 2].log_softmax(-1)[1], logits[2, 10].log_softmax(-1)[2]]
    close(model.loss(ids, labels), -sum(terms) / 2, EXACT)


def test_the_start_is_small_random_weights_and_no_bias():
    torch.manual_seed(0)
    model = Head(num_labels=60).attach(tiny_model(dtype=torch.float32))
    assert model.head.bias.abs().max() == 0
    # The deviation of 1,920 draws errs by about 1.6 %.
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.08)


def test_the_count_is_C_D_plus_C(model):
    assert Head(num_labels=7).count(CONFIG) == 7 * 32 + 7
    Head(num_labels=7).attach(model)
    assert sum(p.numel() for p in trainable_parameters(model)) == 7 * 32 + 7


def test_the_embedding_is_neither_trained_nor_changed(model, ids):
    table = model.embed.token.weight
    before = table.detach().clone()
    Head(num_labels=2).attach(model)
    model.loss(ids, torch.tensor([0, 1, 1])).backward()
    assert table.grad is None and torch.equal(table, before)
    minipeft.detach(model)
    assert model.head.weight is table


@pytest.mark.parametrize("first", ["head", "technique"])
def test_it_composes_with_a_technique_in_either_order(first, ids):
    """Whichever comes first, both are trained."""
    pair = [Head(num_labels=2), LoRA(rank=2)]
    model = tiny_model()
    for n, technique in enumerate(pair if first == "head" else pair[::-1]):
        technique.attach(model, name=str(n))
    model.loss(ids, torch.tensor([0, 1, 1])).backward()
    assert model.head.weight.grad is not None
    assert model.blocks[1].attn.v.B.grad.abs().max() > 0


def test_with_bitfit_both_are_counted(model):
    BitFit().attach(model, name="biases")
    Head(num_labels=2).attach(model, name="head")
    expected = BitFit().count(CONFIG) + Head(num_labels=2).count(CONFIG)
    assert minipeft.report(model).trained == expected


@pytest.mark.parametrize("num_labels", [1, 0, -3])
def test_one_class_is_no_classification(num_labels, model):
    with pytest.raises(ValueError, match=f"num_labels={num_labels}: a classifier needs"):
        Head(num_labels=num_labels).attach(model)


def test_merging_says_why_not(model):
    Head(num_labels=2).attach(model)
    with pytest.raises(ValueError, match="no language-model head"):
        minipeft.merge(model)
