"""The specification of minipeft/compressed/importance.py."""

import dataclasses

import pytest
import torch

from minipeft import LoRA, prune_heads, prune_neurons
from minipeft.compressed.importance import (
    gate_importance,
    gated,
    least_important,
    taylor_importance,
)
from minipeft.dataset import Batch
from tests.tiny import CONFIG, tiny_ids, tiny_model


def batch(rows=3, time=9, seed=1):
    ids = tiny_ids(rows, time + 1, seed=seed)
    labels = ids[:, 1:].clone()
    labels[0, :4] = -100
    return ids[:, :-1], labels


def loss_with_scaled_columns(layer, columns, scale, ids, labels):
    """A row's loss with columns of W_o (or W_down) multiplied, by hand."""
    model = tiny_model()
    block = model.blocks[layer]
    linear = block.attn.o if len(columns) == 8 else block.mlp.down
    with torch.no_grad():
        linear.weight[:, columns] *= scale
    logits = model(ids).detach().log_softmax(-1)[0]
    return -sum(logits[t, y] for t, y in enumerate(labels[0].tolist()) if y >= 0) / int(
        (labels[0] >= 0).sum()
    )


@pytest.mark.parametrize("kind, unit", [("heads", 2), ("neurons", 77)])
def test_by_gates_it_is_the_mean_size_of_each_row_s_derivative(kind, unit):
    # (Importance 1) (Importance 2), against differences of the loss, row by row
    ids, labels = batch()
    columns = list(range(8 * unit, 8 * unit + 8)) if kind == "heads" else [unit]
    slopes, h = [], 1e-5
    for row in range(3):
        one = ids[row : row + 1], labels[row : row + 1]
        up, down = (loss_with_scaled_columns(1, columns, 1 + s, *one) for s in (h, -h))
        slopes.append(float((up - down) / (2 * h)))
    found = gate_importance(tiny_model(), [(ids, labels)], kind)
    # central differences: h^2 and 1e-16 / h
    assert float(found[1][unit]) == pytest.approx(sum(map(abs, slopes)) / 3, abs=1e-8)
    assert min(slopes) * max(slopes) < 0  # signs would cancel


def test_it_does_not_depend_on_how_rows_are_batched():
    ids, labels = batch()
    whole = gate_importance(tiny_model(), [(ids, labels)])
    apart = gate_importance(tiny_model(), [(ids[:1], labels[:1]), (ids[1:], labels[1:])])
    for a, b in zip(whole, apart):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)  # float64


def test_batches_of_the_dataset_s_kind_are_read():
    ids, labels = batch()
    given = Batch(ids, labels, torch.tensor([9, 9, 9]))
    for measure in (gate_importance, taylor_importance):
        pairs, batches = measure(tiny_model(), [(ids, labels)]), measure(tiny_model(), [given])
        assert all(torch.equal(a, b) for a, b in zip(pairs, batches))


def test_by_taylor_it_is_the_sum_over_the_unit_s_weights():
    # (Importance 3), with autograd on the whole model and the indices written out
    ids, labels = batch()
    other = batch(seed=8)
    model = tiny_model()
    (0.5 * (model.loss(ids, labels) + model.loss(*other))).backward()
    term = {n: (p.detach() * p.grad).abs() for n, p in model.named_parameters()}
    heads = taylor_importance(tiny_model(), [(ids, labels), other], "heads")
    neurons = taylor_importance(tiny_model(), [(ids, labels), other], "neurons")
    a, m = "blocks.1.attn.", "blocks.1.mlp."
    rows = slice(16, 24)
    wanted = sum(
        term[f"{a}{n}.weight"][rows].sum() + term[f"{a}{n}.bias"][rows].sum() for n in "qkv"
    )
    wanted += term[f"{a}o.weight"][:, rows].sum()
    assert float(heads[1][2]) == pytest.approx(float(wanted), rel=1e-12)
    wanted = term[f"{m}up.weight"][5].sum() + term[f"{m}up.bias"][5]
    wanted += term[f"{m}down.weight"][:, 5].sum()
    assert float(neurons[1][5]) == pytest.approx(float(wanted), rel=1e-12)
    assert [len(h) for h in heads] == [4, 4] and [len(n) for n in neurons] == [128, 128]


def test_a_gate_s_derivative_is_the_sum_of_theta_times_its_gradient():
    ids, labels = batch(1)
    model = tiny_model()
    model.loss(ids, labels).backward()
    o = model.blocks[0].attn.o.weight
    wanted = (o.detach() * o.grad).unflatten(1, (4, 8)).sum((0, 2)).abs()
    torch.testing.assert_close(gate_importance(model, [(ids, labels)])[0], wanted)


def test_gates_at_zero_are_the_pruned_model_and_come_off_again():
    model = tiny_model()
    heads = {0: torch.tensor([1.0, 0, 1, 0]).double(), 1: torch.tensor([1.0, 1, 1, 0]).double()}
    keep = (torch.arange(128) % 3 > 0).double()
    with gated(model, "heads", heads), gated(model, "neurons", {1: keep}):
        masked = model(tiny_ids())
    assert torch.equal(model(tiny_ids()), tiny_model()(tiny_ids()))
    prune_neurons(prune_heads(model, {0: [1, 3], 1: [3]}), {1: range(0, 128, 3)})
    torch.testing.assert_close(model(tiny_ids()), masked, rtol=0, atol=1e-13)  # exact zeros


def test_nothing_is_left_behind():
    model = tiny_model()
    before = {n: p.clone() for n, p in model.named_parameters()}
    for measure in (gate_importance, taylor_importance):
        for kind in ("heads", "neurons"):
            measure(model, [batch()], kind)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in model.named_parameters())


def test_dropout_is_off_while_measuring():
    noisy = tiny_model(dataclasses.replace(CONFIG, dropout=0.5)).train()
    for measure in (gate_importance, taylor_importance):
        found, wanted = measure(noisy, [batch()]), measure(tiny_model(), [batch()])
        assert all(torch.equal(a, b) for a, b in zip(found, wanted))
    assert all(module.training for module in noisy.modules())


def test_frozen_models_are_measured_too_and_stay_frozen():
    frozen = tiny_model().requires_grad_(False)
    for measure in (gate_importance, taylor_importance):
        with torch.no_grad():
            found = measure(frozen, [batch()])
        assert all(torch.equal(a, b) for a, b in zip(found, measure(tiny_model(), [batch()])))
    assert not any(p.requires_grad for p in frozen.parameters())


def test_pruned_models_are_measured_too():
    model = prune_heads(tiny_model(), {0: range(4), 1: [0]})
    for measure in (gate_importance, taylor_importance):
        assert [len(i) for i in measure(model, [batch()], "heads")] == [0, 3]


def test_the_least_important_of_each_layer():
    scores = [torch.tensor([3.0, 1, 2, 4]), torch.tensor([30.0, 20, 10, 40])]
    assert least_important(scores, 0.5) == {0: [1, 2], 1: [1, 2]}
    assert least_important(scores, 0.49) == {0: [1], 1: [2]}
    assert least_important(scores, 0.2) == {}


def test_over_all_layers_each_layer_is_measured_in_its_own_norm():
    # (Importance 4): norms 5 and 50, so 0.6, 0.8 against 0.2, 0.979
    scores = [torch.tensor([3.0, 4.0]), torch.tensor([10.0, 2400**0.5])]
    assert least_important(scores, 0.5, per_layer=False) == {0: [0], 1: [0]}
    assert least_important(scores, 0.75, per_layer=False) == {0: [0, 1], 1: [0]}
    # norms 2 and sqrt 5: 1 / 2 against 0.447, where shares of the sum are 1 / 4 and 1 / 3
    assert least_important([torch.ones(4), torch.tensor([1.0, 2])], 1 / 6, False) == {1: [0]}


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"share=1\.5"):
        least_important([torch.ones(2)], 1.5)
    with pytest.raises(ValueError, match="'layers'"):
        gate_importance(tiny_model(), [batch()], "layers")
    for measure in (gate_importance, taylor_importance):
        with pytest.raises(ValueError, match="no text"):
            measure(tiny_model(), [])
        with pytest.raises(ValueError, match=r"mine.*merge or detach"):
            measure(LoRA(rank=2).attach(tiny_model(), "mine"), [batch()])
