"""Adapters taken off by a measured ranking: minipeft/additive/adapter_pruning.py."""

import copy

import pytest
import torch

import minipeft
from minipeft import Adapter, AdapterDrop, AdapterFusion, LoRA
from minipeft.additive import adapter_drop, adapter_pruning
from minipeft.additive.adapter_drop import dropped
from minipeft.additive.adapter_fusion import fusion_weights
from minipeft.additive.adapter_pruning import (
    adapters_of,
    left_out,
    prune_adapters,
    rank_by_loss,
    rank_by_weight,
)
from tests.test_adapter_drop import EXACT, FIVE, PFEIFFER, five, ids_of_five, without
from tests.tiny import close, tiny_model


def test_adapters_switched_off_are_on_again_afterwards_as_they_were():
    model, ids = five(PFEIFFER), ids_of_five()
    expected = without(model, [1, 3])
    wrappers = dict(adapters_of(model.attachments[0]))
    wrappers[1].left_out = True
    with pytest.raises(KeyError), left_out([wrappers[1], wrappers[3]]):
        assert torch.equal(model(ids), expected)
        raise KeyError
    assert [w.left_out for w in wrappers.values()] == [False, True, False, False, False]


def test_they_are_found_where_adapterdrop_s_readers_look():
    for name in ("prune_adapters", "rank_by_loss", "rank_by_weight"):
        assert getattr(adapter_drop, name) is getattr(adapter_pruning, name)


def test_an_adapter_s_layer_is_read_from_its_path():
    assert [adapter_pruning.layer_of(p) for p in ("blocks.5.mlp", "blocks.12.attn")] == [5, 12]


def test_fused_adapters_are_ranked_by_their_mean_weight():
    """(AdapterDrop 3): over layers and real tokens."""
    loud = Adapter(placement="pfeiffer", bottleneck=4, init="normal", scale=100.0)
    model = five(AdapterFusion(adapters=[loud] * 3))
    first, second = ids_of_five(2, 9), ids_of_five(3, 7)
    lengths = torch.tensor([7, 2, 5])
    total = fusion_weights(model, first).sum((1, 2))
    p = fusion_weights(model, second)
    total = total + sum(p[:, row, :length].sum(1) for row, length in enumerate(lengths.tolist()))
    expected = total.mean(0) / (2 * 9 + 7 + 2 + 5)
    ranking = rank_by_weight(model, [first, (second, lengths)])
    assert [weight for _, weight in ranking] == sorted((w for _, w in ranking), reverse=True)
    found = dict(ranking)
    means = torch.tensor([found[f"adapter{n}"] for n in range(3)], dtype=torch.float64)
    close(means, expected, EXACT)
    assert means.max() - means.min() > 0.004  # weights that differ, or nothing is shown
    assert sum(found.values()) == pytest.approx(1, abs=1e-12)


def test_layers_are_ranked_by_what_the_loss_rises_without_them():
    """(AdapterDrop 4)"""
    model, ids = five(PFEIFFER), ids_of_five()
    logits = {layer: without(model, [layer]) for layer in range(5)}

    def cross_entropy(y):
        return -y.log_softmax(-1).gather(-1, ids[..., None]).mean().item()

    base = cross_entropy(model(ids))
    ranking = rank_by_loss(model, lambda m: m.loss(ids, ids))
    for layer, rise in ranking:
        assert rise == pytest.approx(cross_entropy(logits[layer]) - base, abs=1e-12)
    rises = [rise for _, rise in ranking]
    assert rises == sorted(rises, reverse=True) and {n for n, _ in ranking} == set(range(5))


def test_both_adapters_of_a_houlsby_layer_are_measured_together():
    model, ids = five(Adapter(bottleneck=4, init="normal", layer_norms=False)), ids_of_five()
    rises = dict(rank_by_loss(model, lambda m: m.loss(ids, ids)))
    for layer in range(5):
        other = copy.deepcopy(model)
        for n, wrapper in adapters_of(other.attachments[0]):
            wrapper.left_out = n == layer
        rise = (other.loss(ids, ids) - model.loss(ids, ids)).item()
        assert rises[layer] == pytest.approx(rise, abs=1e-12)


def test_pruned_layers_are_gone_for_good(tmp_path):
    model, ids = five(PFEIFFER), ids_of_five()
    expected = without(model, [0, 3])
    assert prune_adapters(model, [1, 2, 4]) is model
    assert torch.equal(model(ids), expected)
    attachment = model.attachments[0]
    assert [swap.path for swap in attachment.swaps] == [f"blocks.{n}.mlp" for n in (1, 2, 4)]
    assert minipeft.report(model).trained == attachment.technique.count(FIVE)
    minipeft.save_adapter(model, tmp_path)
    assert torch.equal(minipeft.load_adapter(tiny_model(FIVE), tmp_path)(ids), expected)
    minipeft.detach(model)
    assert torch.equal(model(ids), tiny_model(FIVE)(ids))


def test_pruning_works_under_other_techniques_and_on_robust_adapters():
    model, ids = five(AdapterDrop(bottleneck=4, drop=2, robust=True)), ids_of_five()
    LoRA(rank=2).attach(model, "lora")
    with dropped(model, 0):
        expected = None
        with dropped(model, 1, "default"):
            expected = model(ids)
    prune_adapters(model, range(1, 5), "default")
    assert torch.equal(model(ids), expected)
    assert torch.isfinite(model.train()(ids)).all()
    assert [a.active for a in model.attachments] == [True, True]


def test_a_pruned_fusion_attends_to_the_adapters_that_are_left(tmp_path):
    adapters = [
        {
            "name": name,
            "technique": PFEIFFER,
            "tensors": dict(five(PFEIFFER, n).attachments[0].tensors()),
        }
        for n, name in enumerate("abc")
    ]
    model, ids = five(AdapterFusion(adapters=adapters), 7), ids_of_five()
    two = AdapterFusion(adapters=[adapters[2], adapters[0]]).attach(tiny_model(FIVE))
    kept = model.attachments[0].tensors()
    for name, tensor in two.attachments[0].parameters().items():
        tensor.data.copy_(kept[name])
    prune_adapters(model, ["a", "c"])
    close(model(ids), two(ids), EXACT)
    assert [s.name for s in model.attachments[0].technique.adapters] == ["a", "c"]
    minipeft.save_adapter(model, tmp_path)
    assert torch.equal(minipeft.load_adapter(tiny_model(FIVE), tmp_path)(ids), model(ids))


def test_keeping_only_the_best_follows_the_ranking():
    model, ids = five(AdapterFusion(adapters=[PFEIFFER] * 3)), ids_of_five()
    ranking = rank_by_weight(model, [ids])
    prune_adapters(model, [name for name, _ in ranking[:1]])
    assert fusion_weights(model, ids).shape[-1] == 1
    assert model.attachments[0].technique.adapters[0].name == ranking[0][0]


@pytest.mark.parametrize(
    ("technique", "keep", "message"),
    [
        (PFEIFFER, [7], r"keep names 7, which is not among \[0, 1, 2, 3, 4\]"),
        (AdapterDrop(drop=2), [1], r"keep names 1, which is not among \[2, 3, 4\]"),
        (Adapter(), [1], "frozen LayerNorms"),
        (LoRA(), [1], "only adapters"),
        (AdapterFusion(adapters=[PFEIFFER]), ["x"], r"keep names 'x', which is not among \['ad"),
        (AdapterFusion(adapters=[PFEIFFER]), [], "fusion over nothing"),
    ],
)
def test_what_cannot_be_pruned_is_named(technique, keep, message):
    model, ids = five(technique), ids_of_five()
    before = model(ids)
    with pytest.raises(ValueError, match=message):
        prune_adapters(model, keep)
    assert torch.equal(model(ids), before)


def test_no_data_to_rank_on_is_named():
    model = five(AdapterFusion(adapters=[PFEIFFER]))
    with pytest.raises(ValueError, match="batches is empty"):
        rank_by_weight(model, [])
