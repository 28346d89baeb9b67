"""Quantised weights under bitsandbytes' keys, and folders of quantised models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import minipeft
from minipeft import GPT, LoRA, prune_heads, prune_neurons, wrap
from minipeft.checkpoint import fingerprint
from minipeft.compressed.structured_pruning import widths
from minipeft.gpt import GPTConfig
from minipeft.interop import bitsandbytes as files
from minipeft.interop.bitsandbytes import from_state, to_state
from minipeft.memory import PeakMemory
from minipeft.quantized.nf4 import (
    DYNAMIC_MAP,
    NF4_CODEBOOK,
    dequantize_nf4,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
)
from minipeft.quantized.qlora import projections, quantize_model
from tests.tiny import tiny_ids, tiny_model

ABOUT = "w.quant_state.bitsandbytes__nf4"


def quantized(double_quant=True, rows=37):
    weight = torch.randn(rows, 50, generator=torch.Generator().manual_seed(0))
    return quantize_nf4(weight, 64, double_quant)


def about_of(state, key=ABOUT):
    return json.loads(bytes(state[key].tolist()))


def test_the_keys_and_what_they_hold():
    q = quantized()
    state = to_state(q, "w")
    assert torch.equal(state["w"], q.packed) and state["w"].shape == (37 * 25, 1)
    assert torch.equal(state["w.absmax"], q.absmax.codes)
    assert torch.equal(state["w.nested_absmax"], q.absmax.absmax)
    assert torch.equal(state["w.quant_map"], NF4_CODEBOOK)
    assert torch.equal(state["w.nested_quant_map"], DYNAMIC_MAP)
    assert about_of(state) == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [37, 50],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": q.absmax.offset.item(),
    }


def test_single_quantisation_has_no_nested_keys():
    state = to_state(quantized(False), "w")
    assert sorted(state) == ["w", "w.absmax", "w.quant_map", ABOUT]
    assert state["w.absmax"].dtype == torch.float32
    assert not any("nested" in key for key in about_of(state))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quantizer", [quantize_nf4, quantize_fp4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_and_back_is_the_same(double_quant, quantizer, dtype):
    q = quantizer(torch.randn(5, 33).to(dtype), 32, double_quant)
    again = from_state(to_state(q, "w"), "w")
    assert (again.shape, again.dtype, again.kind) == (q.shape, q.dtype, q.kind)
    assert (again.block_size, again.double_quant) == (32, double_quant)
    assert torch.equal(dequantize_nf4(again), dequantize_nf4(q))
    assert torch.equal(again.constants, q.constants)


def test_int4_has_no_name_there():
    with pytest.raises(ValueError, match="int4"):
        to_state(quantize_int4(torch.ones(3)))


def edited(**changes):
    """A state whose JSON has other values; None takes a value out."""
    state = to_state(quantized(), "w")
    about = {k: v for k, v in (about_of(state) | changes).items() if v is not None}
    return state | {ABOUT: torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: {"w": torch.ones(3)}, "not a 4-bit weight"),
        (lambda: {k: t for k, t in edited().items() if k != "w.absmax"}, r"missing w\.absmax"),
        (lambda: {k: t for k, t in edited().items() if k != "w.nested_absmax"}, "nested_absmax"),
        (lambda: edited() | {"w.quant_map": torch.arange(16.0)}, "levels of nf4"),
        (lambda: edited() | {"w.nested_quant_map": torch.zeros(256)}, "dynamic map"),
        (lambda: edited(shape=[37, 49]), r"\(37, 49\)"),
        (lambda: edited(blocksize=32), "needs 58"),
        (lambda: edited(nested_blocksize=128), "nested_blocksize=128"),
        (lambda: edited(shape=None), "does not say its shape"),
        (lambda: edited(shape=[-37, -50]), r"shape=\[-37, -50\] makes no sense"),
        (lambda: edited(shape=1850), "shape=1850 makes no sense"),
        (lambda: edited(blocksize=0), "blocksize=0 makes no sense"),
        (lambda: edited(dtype="save"), "dtype='save' makes no sense"),
        (lambda: edited(nested_offset="1"), "nested_offset='1' makes no sense"),
        (lambda: edited(nested_offset=None), "need their nested_offset"),
        (lambda: edited() | {"w": edited()["w"].int()}, r"w has dtype torch\.int32"),
        (lambda: edited() | {"w.absmax": edited()["w.absmax"].float()}, "absmax has dtype"),
        (lambda: edited() | {ABOUT: torch.tensor(list(b"[1]"), dtype=torch.uint8)}, "a list, not"),
        (lambda: edited() | {ABOUT: torch.tensor([123], dtype=torch.uint8)}, "not JSON"),
    ],
)
def test_what_does_not_fit_is_named(state, message):
    with pytest.raises(ValueError, match=message):
        from_state(state(), "w")


# -- folders


@pytest.mark.parametrize("settings", [{}, {"block_size": 32, "double_quant": False}], ids=str)
def test_a_quantised_model_saved_and_opened_is_the_same(tmp_path, settings):
    model = quantize_model(tiny_model(dtype=torch.float32), **settings, compute_dtype="bfloat16")
    files.save_model(model, tmp_path)
    again = files.load_model(tmp_path)
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    assert fingerprint(again) == fingerprint(model)
    assert again.head.weight is again.embed.token.weight
    assert again.blocks[0].attn.q.compute_dtype == "bfloat16"
    size = (tmp_path / "model.safetensors").stat().st_size
    tensors = sum(
        t.numel() * t.element_size() for t in load_file(tmp_path / "model.safetensors").values()
    )
    assert tensors < size < tensors + 20_000  # the header
    with pytest.raises(ValueError, match="minipeft_nf4"):
        GPT.from_pretrained(tmp_path)


def test_a_pruned_model_is_quantised_saved_and_opened(tmp_path):
    """Its layers' widths travel in the config, quantised or not."""
    pruned = prune_neurons(prune_heads(tiny_model(dtype=torch.float32), {0: [1, 3]}), {1: range(9)})
    pruned.save_pretrained(tmp_path / "floats")
    model = quantize_model(pruned)
    files.save_model(model, tmp_path / "nf4")
    for again in (files.load_model(tmp_path / "nf4"), files.quantize_folder(tmp_path / "floats")):
        assert torch.equal(again(tiny_ids()), model(tiny_ids()))
        assert widths(again) == widths(model) and fingerprint(again) == fingerprint(model)
    path = tmp_path / "nf4" / "config.json"
    path.write_text(path.read_text().replace('"n_head": 2', '"n_head": 7'))
    with pytest.raises(ValueError, match="n_head=7 is not 0 to 4"):
        files.load_model(tmp_path / "nf4")


@pytest.mark.parametrize("compute_dtype", [None, "float16"])
def test_a_layer_that_lost_everything_is_saved_and_opened(tmp_path, compute_dtype):
    """There is nothing to quantise in it; the last layer too, whose type is not the model's."""
    pruned = prune_heads(tiny_model(dtype=torch.float32), {0: range(4)})
    pruned = prune_neurons(pruned, {1: range(128)})
    pruned.save_pretrained(tmp_path / "floats")
    model = quantize_model(pruned, compute_dtype=compute_dtype)
    files.save_model(model, tmp_path / "nf4")
    folders = files.load_model, lambda f: files.quantize_folder(f, compute_dtype=compute_dtype)
    for again in (folders[0](tmp_path / "nf4"), folders[1](tmp_path / "floats")):
        assert torch.equal(again(tiny_ids()), model(tiny_ids()))
        assert widths(again) == widths(model) and fingerprint(again) == fingerprint(model)
        assert again.blocks[0].mlp.up.compute_dtype == compute_dtype


def test_a_head_of_its_own_is_refused_before_it_is_saved(tmp_path):
    model = quantize_model(tiny_model(dtype=torch.float32))
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    with pytest.raises(ValueError, match="not tied"):
        files.save_model(model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_only_quantised_models_without_techniques_are_saved(tmp_path):
    with pytest.raises(ValueError, match=r"attn\.q is not quantised"):
        files.save_model(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match="default"):
        files.save_model(LoRA(rank=2).attach(quantize_model(tiny_model())), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="cannot hold this model"):
        quantize_model(tiny_model()).save_pretrained(tmp_path)


def test_a_folder_of_floats_opens_quantised(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    ours = files.quantize_folder(tmp_path, block_size=32, double_quant=False)
    expected = quantize_model(model, block_size=32, double_quant=False)
    assert fingerprint(ours) == fingerprint(expected)
    assert torch.equal(ours(tiny_ids()), expected(tiny_ids()))
    assert not ours.training
    assert not any(b.is_meta for b in (*ours.parameters(), *ours.buffers()))
    adapted = minipeft.QLoRA(rank=2, block_size=32, double_quant=False).attach(ours)
    assert minipeft.report(adapted).trained == minipeft.QLoRA(rank=2).count(model.config)


def test_opening_quantised_never_holds_the_float_model(tmp_path):
    config = GPTConfig(vocab_size=32, context_length=16, n_layer=8, n_head=4, d_model=128)
    GPT(config).save_pretrained(tmp_path)
    floats, layer = 8 * 12 * 128**2 * 4, 4 * 128 * 512
    with PeakMemory() as memory:
        model = files.quantize_folder(tmp_path)
    stored = sum(wrap.resolve(model, p).quantized.nbytes for p in projections(model))
    assert stored < 0.13 * floats
    # the quantised model, its embeddings and biases, and the scratch of one layer
    assert memory.peak < stored + 6 * layer < 0.5 * floats


def test_a_broken_folder_is_named(tmp_path):
    model = quantize_model(tiny_model(dtype=torch.float32))
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        files.load_model(tmp_path)
    files.save_model(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name, message in {
        "ln_f.bias": r"missing ln_f\.bias",
        "blocks.1.mlp.up.weight.absmax": r"missing blocks\.1\.mlp\.up\.weight\.absmax",
    }.items():
        save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=message):
            files.load_model(tmp_path)
    save_file(tensors | {"more": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="unknown more"):
        files.load_model(tmp_path)
    swapped = dict(tensors)
    for name in tensors:
        if name.startswith("blocks.0.mlp.up.weight"):
            other = name.replace("up", "down")
            swapped[name], swapped[other] = tensors[other], tensors[name]
    save_file(swapped, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"mlp\.up\.weight is \(32, 128\)"):
        files.load_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["compute_dtype"] = "int8"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="compute_dtype='int8' is none of"):
        files.load_model(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'gpt2' is not 'minipeft_nf4'"):
        files.load_model(tmp_path)
