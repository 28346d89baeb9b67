"""The specification of minipeft/compressed/structured_pruning.py."""

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from minipeft import GPT, IA3, LoRA, PrefixTuning, prune_heads, prune_neurons
from minipeft.checkpoint import load_adapter, save_adapter
from minipeft.compressed.structured_pruning import (
    dense_widths,
    parameter_count,
    prune_blocks,
    widths,
)
from minipeft.decoding import generate
from minipeft.quantized.qlora import quantize_model
from tests.tiny import CONFIG, randomize, tiny_ids, tiny_model

HEADS, NEURONS = {0: [1], 1: [3, 0]}, {0: range(5, 101, 3), 1: [0, 127]}


def masked(model, heads, neurons):
    """The model with the heads' and neurons' contributions to the residual set to zero by hand."""
    with torch.no_grad():
        for layer, numbers in heads.items():
            for h in numbers:
                model.blocks[layer].attn.o.weight[:, 8 * h : 8 * h + 8] = 0
        for layer, numbers in neurons.items():
            model.blocks[layer].mlp.down.weight[:, list(numbers)] = 0
    return model


def pruned(**settings):
    return prune_neurons(prune_heads(tiny_model(**settings), HEADS), NEURONS)


def test_the_pruned_model_is_the_masked_one():
    # (Structured 1) (Structured 2); float64: the terms left out are exact zeros
    expected = masked(tiny_model(), HEADS, NEURONS)(tiny_ids())
    torch.testing.assert_close(pruned()(tiny_ids()), expected, rtol=0, atol=1e-13)


def test_in_float32_too():
    expected = masked(tiny_model(dtype=torch.float32), HEADS, NEURONS)(tiny_ids()).detach()
    found = pruned(dtype=torch.float32)(tiny_ids())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_the_matrices_are_smaller():
    model = pruned()
    attn, mlp = model.blocks[1].attn, model.blocks[0].mlp
    assert [tuple(getattr(attn, n).weight.shape) for n in "qkvo"] == [(16, 32)] * 3 + [(32, 16)]
    assert attn.n_head == 2 and attn.head_dim == 8 and attn.q.out_features == 16
    gone = len(NEURONS[0])
    assert mlp.up.weight.shape == (128 - gone, 32) and mlp.down.weight.shape == (32, 128 - gone)
    assert mlp.up.bias.shape == (128 - gone,) and mlp.down.in_features == 128 - gone


def test_the_parameters_are_the_formula_s():
    # (Structured 3), head by head and neuron by neuron
    dense = sum(p.numel() for p in tiny_model().parameters())
    d, D = 8, 32
    neurons = sum(len(list(n)) for n in NEURONS.values())
    expected = dense - 3 * (4 * d * D + 3 * d) - neurons * (2 * D + 1)
    model = pruned()
    assert sum(p.numel() for p in model.parameters()) == expected
    assert parameter_count(CONFIG, widths(model)) == expected
    assert parameter_count(CONFIG, dense_widths(CONFIG)) == dense
    block = 4 * D * D + 2 * D * 128 + 9 * D + 128
    shorter = prune_blocks(tiny_model(), [0])
    assert sum(p.numel() for p in shorter.parameters()) == dense - block
    assert parameter_count(shorter.config, widths(shorter)) == dense - block


def test_heads_are_numbered_as_they_are_now():
    twice = prune_heads(prune_heads(tiny_model(), {0: [1]}), {0: [1]})
    once = prune_heads(tiny_model(), {0: [1, 2]})
    assert torch.equal(twice(tiny_ids()), once(tiny_ids()))


def test_all_heads_and_all_neurons_of_a_layer_may_go():
    everything = {0: range(4)}, {0: range(128)}
    expected = masked(tiny_model(), *everything)(tiny_ids())
    model = prune_neurons(prune_heads(tiny_model(), everything[0]), everything[1])
    torch.testing.assert_close(model(tiny_ids()), expected, rtol=0, atol=1e-13)
    assert generate(model, tiny_ids(), max_new_tokens=3, temperature=0).shape == (3, 14)


def test_a_block_is_taken_out_whole():
    model, other = tiny_model(), tiny_model()
    other.blocks = torch.nn.ModuleList([other.blocks[1]])
    found = prune_blocks(model, [0])
    assert found.config.n_layer == 1 and found is model
    assert torch.equal(found(tiny_ids()), other(tiny_ids()))


def test_decoding_from_the_cache_is_the_whole_pass():
    model, ids = pruned(), tiny_ids(2, 5)
    cached = generate(model, ids, max_new_tokens=6, temperature=0)
    for _ in range(6):
        ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], 1)
    assert torch.equal(cached, ids)


def test_it_trains_on_and_takes_adapters():
    model = pruned().train()
    before = model.blocks[1].attn.o.weight.detach().clone()
    model.loss(tiny_ids(), tiny_ids()).backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(model.blocks[1].attn.o.weight, before)
    adapted = LoRA(rank=2).attach(pruned())
    assert torch.equal(adapted(tiny_ids()), pruned()(tiny_ids()))


def test_a_frozen_projection_stays_frozen_and_tensors_are_not_shared():
    model, base = tiny_model(), tiny_model()
    model.blocks[0].attn.q.weight.requires_grad_(False)
    weight = model.blocks[0].attn.q.weight
    prune_heads(model, {0: [3]})
    assert not model.blocks[0].attn.q.weight.requires_grad
    assert model.blocks[0].attn.k.weight.requires_grad
    assert model.blocks[0].attn.q.weight.untyped_storage().data_ptr() != (
        weight.untyped_storage().data_ptr()
    )
    assert torch.equal(weight, base.blocks[0].attn.q.weight)


# -- what is refused


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda m: prune_heads(m, {0: [4]}), "layer 0 has no head 4; it has 4 heads"),
        (lambda m: prune_heads(m, {0: [0], 2: [0]}), "no layer 2; there are 0 to 1"),
        (lambda m: prune_heads(m, {0: [1], 1: [2, 2]}), "names a head of layer 1 twice"),
        (lambda m: prune_neurons(m, {1: [-1]}), "layer 1 has no neuron -1"),
        (lambda m: prune_blocks(m, [0, 1]), "all blocks would go"),
        (lambda m: prune_blocks(m, [2]), "the model has no block 2"),
        (lambda m: prune_heads(m, {0: 1}), "0: 1 is no layer and a list of heads"),
        (lambda m: prune_heads(m, {0: [1], "1": [1]}), "'1': .* is no layer"),
        (lambda m: prune_neurons(m, {0: [1.7]}), r"\[1.7\] is no layer and a list of neurons"),
    ],
)
def test_what_is_not_there_is_named_and_nothing_changes(act, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        act(model)
    assert torch.equal(model(tiny_ids()), tiny_model()(tiny_ids()))
    assert widths(model) == dense_widths(CONFIG)


def test_a_model_with_techniques_is_refused():
    model = LoRA(rank=2).attach(tiny_model(), name="mine")
    for act in (prune_heads, prune_neurons, prune_blocks):
        with pytest.raises(ValueError, match="mine"):
            act(model, {0: [0]})


def test_weights_that_are_no_floats_are_refused():
    """Rows of a packed matrix are not what its tensors are made of."""
    model = quantize_model(tiny_model(dtype=torch.float32))
    for act in (prune_heads, prune_neurons):
        with pytest.raises(ValueError, match="NF4Linear"):
            act(model, {0: [0]})
    assert model.blocks[0].attn.n_head == 4


# -- files


def test_a_pruned_model_is_saved_and_opened(tmp_path):
    model = pruned(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "minipeft_pruned_gpt2"
    assert config["layers"][1] == {"n_head": 2, "head_dim": 8, "d_ff": 126}
    again = GPT.from_pretrained(tmp_path)
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    assert widths(again) == widths(model) and again.config == model.config


def test_its_file_is_as_small_as_the_formula_says(tmp_path):
    for name, model in (("dense", tiny_model(dtype=torch.float32)), ("small", pruned())):
        model.float().save_pretrained(tmp_path / name)
        with safe_open(tmp_path / name / "model.safetensors", "pt") as file:
            shapes = [file.get_slice(n).get_shape() for n in file.keys()]  # noqa: SIM118
        size = sum(math.prod(s) for s in shapes)
        assert size == parameter_count(model.config, widths(model))
        on_disk = (tmp_path / name / "model.safetensors").stat().st_size
        assert 4 * size < on_disk < 4 * size + 4000  # the header: names and shapes


@pytest.mark.parametrize(
    "technique",
    [LoRA(rank=2), LoRA(rank=2, targets=("q", "k", "v"), share_qkv=True), IA3(), PrefixTuning(3)],
    ids=["LoRA", "joint LoRA", "IA3", "PrefixTuning"],
)
def test_an_adapter_of_a_pruned_model_is_saved_and_opened(tmp_path, technique):
    """In our own form, whatever peft knows: peft has no model to put it on."""
    model = randomize(technique.attach(pruned(dtype=torch.float32)))
    save_adapter(model, tmp_path)
    assert "peft_type" not in json.loads((tmp_path / "adapter_config.json").read_text())
    again = load_adapter(pruned(dtype=torch.float32), tmp_path)
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    with pytest.raises(ValueError, match="another base"):
        load_adapter(tiny_model(dtype=torch.float32), tmp_path)


def test_transformers_does_not_open_it_as_something_else(tmp_path):
    from transformers import AutoModelForCausalLM

    pruned(dtype=torch.float32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="minipeft_pruned_gpt2"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_with_fewer_blocks_is_plain_gpt2(tmp_path):
    prune_blocks(tiny_model(dtype=torch.float32), [1]).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
    assert GPT.from_pretrained(tmp_path).config == replace(CONFIG, n_layer=1)


@pytest.mark.parametrize(
    "layers, message",
    [
        (None, "list of n_layer=2"),
        ([{"n_head": 2, "head_dim": 8, "d_ff": 9}], "list of n_layer=2"),
        ([{"n_head": 2, "head_dim": 8}] * 2, r"layers\[0\]"),
        ([{"n_head": 5, "head_dim": 8, "d_ff": 9}] * 2, r"n_head=5 is not 0 to 4"),
        ([{"n_head": 2, "head_dim": 16, "d_ff": 9}] * 2, "head_dim"),
        ([{"n_head": 2, "head_dim": 8, "d_ff": 2.5}] * 2, "d_ff=2.5"),
        ([{"n_head": 2, "head_dim": 8, "d_ff": 9}] * 2, "do not fit"),
    ],
)
def test_widths_that_make_no_sense_are_named(tmp_path, layers, message):
    pruned(dtype=torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layers": layers}))
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(tmp_path)
