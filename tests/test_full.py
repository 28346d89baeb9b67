"""The specification of selective/full.py."""

from __future__ import annotations

import pytest
import torch

import minipeft
from minipeft import FullFineTuning, Head, LoRA, TopLayers
from minipeft.checkpoint import pack_tensors, read_tensors
from minipeft.gpt import GPTConfig
from minipeft.selective.full import block_size
from minipeft.technique import trainable_parameters
from tests.tiny import CONFIG, tiny_model


def sgd_step(model, ids, lr=0.1):
    """One plain gradient step; returns name -> gradient."""
    model.zero_grad()
    model.loss(ids, ids.roll(-1, 1)).backward()
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in named.values():
            parameter -= lr * parameter.grad
    return {n: p.grad.clone() for n, p in named.items()}


def test_every_parameter_moves_as_in_plain_training(ids):
    """(Full 1): one step equals a step on the bare model, tensor by tensor."""
    bare, adapted = tiny_model(), FullFineTuning().attach(tiny_model())
    expected, found = sgd_step(bare, ids), sgd_step(adapted, ids)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)
    wanted = dict(bare.named_parameters())
    assert all(torch.equal(p, wanted[n]) for n, p in adapted.named_parameters())


def test_the_head_and_the_embedding_stay_one_tensor(model):
    FullFineTuning().attach(model)
    assert model.head.weight is model.embed.token.weight
    minipeft.detach(model)
    assert model.head.weight is model.embed.token.weight


def test_the_trained_tensors_are_clones(model):
    before = dict(model.named_parameters())
    FullFineTuning().attach(model)
    for name, parameter in model.named_parameters():
        assert parameter is not before[name]
        assert parameter.data_ptr() != before[name].data_ptr()
        assert torch.equal(parameter, before[name])


def test_top_layers_trains_the_last_blocks_and_nothing_else():
    """(Full 2)"""
    config = GPTConfig(97, 64, n_layer=3, n_head=2, d_model=16)
    model = TopLayers(layers=2).attach(tiny_model(config))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    everything = {n for n, _ in model.named_parameters()}
    assert trained == {n for n in everything if n.startswith(("blocks.1.", "blocks.2."))}


@pytest.mark.parametrize("d_ff", [None, 44])
def test_counts_are_those_of_the_tensors(d_ff):
    config = GPTConfig(31, 17, n_layer=3, n_head=2, d_model=12, d_ff=d_ff)
    model = tiny_model(config)
    assert FullFineTuning().count(config) == sum(p.numel() for p in model.parameters())
    size = sum(p.numel() for p in model.blocks[0].parameters())
    assert block_size(config) == size
    assert TopLayers(layers=2).count(config) == 2 * size


def test_a_block_has_12_D_squared_plus_13_D():
    assert block_size(GPTConfig(7, 7, n_head=1, d_model=9)) == 12 * 81 + 13 * 9


def test_without_the_original_the_base_itself_is_trained(ids):
    model = tiny_model()
    base = dict(model.named_parameters())
    bits = {n: p.detach().clone() for n, p in base.items()}
    FullFineTuning(keep_original=False).attach(model)
    assert all(p is base[n] for n, p in model.named_parameters())
    sgd_step(model, ids)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, bits[n])}
    moving = {n for n in bits if not n.endswith("attn.k.bias")}  # those get no gradient, see BitFit
    assert moving <= changed, f"not moved: {moving - changed}"


def test_without_the_original_detach_is_an_error_that_says_so(model, ids):
    FullFineTuning(keep_original=False).attach(model)
    logits = model(ids)
    with pytest.raises(ValueError, match="keep_original=False"):
        minipeft.detach(model)
    with pytest.raises(ValueError, match="keep_original=False"), minipeft.disabled(model):
        pass
    assert torch.equal(model(ids), logits)
    assert len(model.attachments) == 1


def test_without_the_original_no_second_copy_is_kept(model):
    held = {p.data_ptr() for p in model.parameters()}
    FullFineTuning(keep_original=False).attach(model)
    swaps = model.attachments[0].swaps
    assert {s.original.data_ptr() for s in swaps} <= held
    assert {s.replacement.data_ptr() for s in swaps} <= held


def test_on_top_of_lora_only_the_base_is_replaced(model, ids):
    """A wrapper's own tensors are not the base's: the LoRA stays LoRA's, frozen."""
    LoRA(rank=2).attach(model, name="first")
    A = model.blocks[0].attn.q.A
    FullFineTuning().attach(model, name="second")
    assert model.blocks[0].attn.q.A is A
    names = model.attachments[1].parameters()
    assert not any(name.endswith((".A", ".B")) for name in names)
    assert "blocks.0.attn.q.weight" in names
    assert sum(p.numel() for p in names.values()) == FullFineTuning().count(CONFIG)


def test_below_a_classifier_the_tied_head_stays_tied(model):
    """A wrapper's tensor with the name of the base's, head.weight, is not the base's either."""
    Head(num_labels=3).attach(model, name="head")
    weight = model.head.weight
    FullFineTuning().attach(model, name="full")
    assert model.head.weight is weight
    assert model.head.inner.weight is model.embed.token.weight
    trained = model.attachments[1].parameters().values()
    assert sum(p.numel() for p in trained) == FullFineTuning().count(CONFIG)


@pytest.mark.parametrize("layers", [0, 3, -1])
def test_top_layers_needs_a_number_of_blocks_that_is_there(layers, model):
    with pytest.raises(ValueError, match=f"layers={layers} must be from 1 to n_layer=2"):
        TopLayers(layers=layers).attach(model)


def test_merging_keeps_the_trained_values(model, ids):
    FullFineTuning().attach(model)
    sgd_step(model, ids)
    logits = model(ids)
    merged = minipeft.merge(model)
    assert torch.equal(merged(ids), logits)
    assert merged.head.weight is merged.embed.token.weight
    assert len(trainable_parameters(merged)) == len(list(merged.parameters()))


@pytest.mark.parametrize("frozen_by", ["a technique", "the user"])
def test_in_place_every_parameter_is_trained_whoever_froze_it(frozen_by, model, ids):
    """A base that was frozen stayed so: the run went through and nothing was learned."""
    if frozen_by == "a technique":
        LoRA(rank=2).attach(model, name="first")
    else:
        model.requires_grad_(False)
    FullFineTuning(keep_original=False).attach(model, name="full")
    assert all(p.requires_grad for p in model.parameters())
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.attachments[-1].parameters().values())


def test_a_load_that_fails_leaves_a_frozen_base_frozen(model, tmp_path):
    technique = FullFineTuning(keep_original=False)
    minipeft.save_adapter(technique.attach(tiny_model()), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    tensors, header = read_tensors(weights)
    weights.write_bytes(pack_tensors(dict(list(tensors.items())[1:]), header))
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="missing"):
        minipeft.load_adapter(model, tmp_path)
    assert not model.attachments and not any(p.requires_grad for p in model.parameters())
