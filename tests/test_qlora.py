"""QLoRA: a base in four bits that stays as it is, LoRA around it, and the way back to floats."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import minipeft
from minipeft import GPT, BitFit, FullFineTuning, GPTConfig, LoRA, QLoRA, TopLayers, wrap
from minipeft.checkpoint import fingerprint
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.low_rank.lora import PROJECTIONS
from minipeft.memory import PeakMemory, measure_peak, model_tensors
from minipeft.quantized.nf4 import DYNAMIC_MAP, dequantize_nf4, quantize_nf4
from minipeft.quantized.nf4_linear import NF4Linear, quantized_linear
from minipeft.quantized.qlora import (
    dequantize_model,
    merge,
    projections,
    quantize_model,
)
from minipeft.technique import attachment_of, trainable_parameters
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

ALL = tuple(PROJECTIONS)
DOUBLE = torch.float64


def layers_of(model):
    """Logical path -> NF4Linear."""
    found = {p: wrap.base_module(wrap.resolve(model, p)) for p in projections(model)}
    return {p: m for p, m in found.items() if isinstance(m, NF4Linear)}


def packed_bytes(model):
    """Everything that is stored for the quantised weights, copied."""
    return {
        (path, name): buffer.clone()
        for path, layer in layers_of(model).items()
        for name, buffer in layer.named_buffers()
    }


def assert_same_bytes(before, after):
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def steps(model, count=3, learning_rate=1e-2):
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=learning_rate)
    ids, losses = tiny_ids(), []
    for _ in range(count):
        optimizer.zero_grad()
        loss = model.train().loss(ids, ids.roll(-1, 1))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def output(model, ids=None):
    with torch.no_grad():
        return model(tiny_ids() if ids is None else ids)


# -- quantising a model


def test_every_projection_is_quantised_and_nothing_else():
    model = tiny_model()
    floats = copy.deepcopy(model)
    quantize_model(model, block_size=32)
    assert list(layers_of(model)) == projections(model) and len(layers_of(model)) == 12
    for path, layer in layers_of(model).items():
        expected = quantize_nf4(wrap.resolve(floats, path).weight.detach(), 32, True)
        assert torch.equal(layer.packed, expected.packed)
        assert torch.equal(layer.quantized.constants, expected.constants)
    kept = dict(model.named_parameters())
    plain = {n: p for n, p in floats.named_parameters() if n.removesuffix(".weight") not in
             projections(model)}  # fmt: skip
    assert kept.keys() == plain.keys()
    assert all(torch.equal(kept[n], plain[n]) for n in kept)


def test_quantising_holds_one_float_layer_more_than_it_ends_with():
    """Memory falls from the float model's to the quantised one's, never above one layer more."""
    config = GPTConfig(vocab_size=32, context_length=16, n_layer=6, n_head=4, d_model=128)
    model = GPT(config)
    layer = 4 * 128 * 512  # bytes of the largest weight
    with PeakMemory() as memory:
        memory.watch(*model_tensors(model), DYNAMIC_MAP)
        before = memory.now
        quantize_model(model)
        after = memory.now
    # scratch of one layer: absolute values, scaled ones, codes, comparisons
    assert memory.peak < before + 4 * layer
    weights = 6 * 12 * 128**2
    assert before - after == 4 * weights - sum(
        m.quantized.nbytes for m in layers_of(model).values()
    )
    assert (before - after) / (4 * weights) == pytest.approx(1 - 4.127 / 32, abs=2e-3)


def test_quantising_twice_is_quantising_once():
    model = quantize_model(tiny_model())
    before = packed_bytes(model)
    assert_same_bytes(before, packed_bytes(quantize_model(model)))
    with pytest.raises(ValueError, match="already NF4 with block_size=64"):
        quantize_model(model, block_size=32)
    with pytest.raises(ValueError, match="double_quant=True"):
        quantize_model(model, double_quant=False)
    with pytest.raises(ValueError, match="compute_dtype=None"):
        QLoRA(rank=2, compute_dtype="bfloat16").attach(model)


def test_a_weight_that_is_not_finite_stops_it_before_anything_changes():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[3, 4] = torch.inf
    for action in (quantize_model, QLoRA(rank=2).attach):
        with pytest.raises(ValueError, match=r"\(3, 4\) is inf"):
            action(model)
        assert not layers_of(model) and not model.attachments


def test_a_model_with_techniques_on_it_is_quantised_first():
    model = LoRA(rank=2).attach(tiny_model())
    with pytest.raises(ValueError, match="default"):
        quantize_model(model)
    with pytest.raises(ValueError, match=r"attn\.q"):
        QLoRA(rank=2).attach(model, name="other")
    assert not layers_of(model)


def test_dequantising_gives_plain_layers_with_the_same_values():
    model = quantize_model(tiny_model())
    logits = output(model)
    assert torch.equal(output(dequantize_model(model)), logits)
    assert not layers_of(model)
    assert all(type(wrap.resolve(model, p)) is nn.Linear for p in projections(model))


def test_what_has_techniques_on_it_is_not_dequantised_in_vain():
    model = QLoRA(rank=2).attach(tiny_model())
    with pytest.raises(ValueError, match=r"techniques are on this model \(default\)"):
        dequantize_model(model)


# -- the technique


def test_a_layer_that_lost_all_heads_and_neurons_has_nothing_to_quantise():
    """Pruning leaves such layers: `minipeft shrink` quantises what it has pruned."""
    model = prune_neurons(prune_heads(tiny_model(), {0: range(4)}), {0: range(128)})
    ids = tiny_ids()
    quantize_model(model)
    inside = [type(m) for m in model.blocks[0].modules() if isinstance(m, nn.Linear | NF4Linear)]
    assert set(inside) == {nn.Linear} and isinstance(model.blocks[1].attn.q, NF4Linear)
    close(dequantize_model(copy.deepcopy(model))(ids), model(ids), 1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("targets", [("q",), ("k", "up")])
def test_a_model_with_empty_layers_is_adapted_and_merged(targets, keep):
    model = prune_neurons(prune_heads(tiny_model(), {0: range(4)}), {0: range(128)})
    randomize(QLoRA(rank=2, targets=targets, keep_original=keep).attach(model))
    before = model(tiny_ids())
    close(minipeft.merge(model)(tiny_ids()), before, 1e-5)  # W' is float32's
    assert not any(isinstance(m, NF4Linear) for m in model.modules())


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_starts_as_the_quantised_base_bitwise(keep, dtype):
    quantised = quantize_model(tiny_model(dtype=dtype))
    model = QLoRA(rank=4, keep_original=keep).attach(tiny_model(dtype=dtype))
    assert torch.equal(output(model), output(quantised))
    assert_same_bytes(packed_bytes(model), packed_bytes(quantised))


def test_only_the_lora_matrices_are_trained_and_no_packed_byte_changes():
    model = QLoRA(rank=3, targets=("q", "down")).attach(tiny_model())
    assert len(layers_of(model)) == 12, "the other projections are quantised, too"
    before = packed_bytes(model)
    first, *_, last = steps(model, 5)
    assert last < first
    assert_same_bytes(before, packed_bytes(model))
    trained = {n.rsplit(".", 1)[1] for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"}
    assert sum(p.numel() for p in trainable_parameters(model)) == 2 * 3 * (32 + 32 + 128 + 32)


def test_the_branch_is_lora_s():
    """(QLoRA 1) on one projection, alpha / r and all."""
    model = randomize(QLoRA(rank=4, alpha=6).attach(tiny_model()))
    layer = wrap.resolve(model, "blocks.0.mlp.up")
    x = torch.randn(2, 5, 32, dtype=DOUBLE)
    W, b = layer.inner.weight, layer.inner.bias
    expected = x @ W.T + b + 6 / 4 * (x @ layer.A.T) @ layer.B.T
    close(layer(x), expected, 1e-13)


def test_train_eval_train_keeps_gradients():
    """Evaluating without gradients changes nothing that a later backward pass needs."""
    model = randomize(QLoRA(rank=3).attach(tiny_model(dtype=torch.float32)))
    ids = tiny_ids()

    def gradients():
        model.zero_grad()
        model.train().loss(ids, ids.roll(-1, 1)).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    before = gradients()
    model.eval()
    with torch.inference_mode():
        model(ids)
    output(model)
    after = gradients()
    assert all(torch.equal(before[n], after[n]) and before[n].any() for n in before)


def test_detach_and_disabled_give_the_quantised_base():
    base = output(quantize_model(tiny_model()))
    model = QLoRA(rank=4, double_quant=True).attach(tiny_model())
    before = packed_bytes(model)
    steps(model)
    model.eval()
    with minipeft.disabled(model):
        assert torch.equal(output(model), base)
    assert torch.equal(output(minipeft.detach(model)), base)
    assert_same_bytes(before, packed_bytes(model))
    assert not any(isinstance(m, wrap.Wrapper) for m in model.modules())


def test_with_the_floats_kept_detach_gives_them_back():
    model, plain = tiny_model(), tiny_model()
    weight = model.blocks[0].attn.q.weight
    QLoRA(rank=4, keep_original=True).attach(model)
    steps(model)
    with minipeft.disabled(model):
        assert torch.equal(output(model), output(plain))
    minipeft.detach(model.eval())
    assert model.blocks[0].attn.q.weight is weight and weight.requires_grad
    assert torch.equal(output(model), output(plain))


def test_half_precision_layer_norms_compute_in_float32():
    model = tiny_model(dtype=torch.bfloat16)
    norm = copy.deepcopy(model.blocks[0].ln_1)
    QLoRA(rank=4).attach(model)
    x = 5 + torch.randn(2, 3, 32).bfloat16()
    expected = F.layer_norm(x.float(), (32,), norm.weight.float(), norm.bias.float(), 1e-5)
    assert torch.equal(wrap.resolve(model, "blocks.0.ln_1")(x), expected.bfloat16())
    wrapped = [s.path for s in attachment_of(model).swaps if "ln" in s.path]
    assert wrapped == ["blocks.0.ln_1", "blocks.0.ln_2", "blocks.1.ln_1", "blocks.1.ln_2", "ln_f"]
    assert all(torch.isfinite(torch.tensor(steps(model, 2))))
    minipeft.detach(model)
    assert type(model.ln_f) is nn.LayerNorm
    full = QLoRA(rank=4).attach(tiny_model())
    assert type(full.ln_f) is nn.LayerNorm, "nothing to do in float64"


def test_other_techniques_go_on_top():
    from minipeft import Adapter, PromptTuning

    model = quantize_model(tiny_model())
    for technique in (Adapter(bottleneck=3), PromptTuning(prompt_length=2), LoRA(rank=2)):
        technique.attach(model, name=type(technique).__name__)
    first, *_, last = steps(model, 4)
    assert last < first


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"compute_dtype": "int8"}, "compute_dtype='int8'"),
        ({"block_size": 7}, "block_size=7"),
        ({"rank": 64}, "rank=64 must be from 1 to 32"),
        ({"rank": 2, "targets": ("w",)}, "unknown target 'w'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        QLoRA(**({"rank": 2} | settings)).attach(model)
    assert not layers_of(model) and not model.attachments


# -- files and fingerprints


def test_the_fingerprint_covers_the_packed_weights():
    model = quantize_model(tiny_model())
    before = fingerprint(model)
    assert before == fingerprint(QLoRA(rank=2).attach(copy.deepcopy(model)))
    assert before != fingerprint(tiny_model())
    assert before != fingerprint(quantize_model(tiny_model(), block_size=32))
    wrap.resolve(model, "blocks.1.mlp.up").packed[5] += 1
    assert fingerprint(model) != before


def test_an_adapter_opens_on_the_floats_and_on_the_quantised_base(tmp_path):
    model = randomize(QLoRA(rank=4).attach(tiny_model()))
    minipeft.save_adapter(model, tmp_path)
    for base in (tiny_model(), quantize_model(tiny_model())):
        loaded = minipeft.load_adapter(base, tmp_path)
        assert torch.equal(output(loaded), output(model))
    with pytest.raises(ValueError, match="another base"):
        minipeft.load_adapter(quantize_model(tiny_model(), block_size=32), tmp_path)
    with pytest.raises(ValueError, match="another base"):
        minipeft.load_adapter(tiny_model(seed=5), tmp_path)


def test_the_adapter_file_is_peft_s_lora(tmp_path):
    model = randomize(QLoRA(rank=4).attach(tiny_model()))
    minipeft.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    modules = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert set(config["target_modules"]) == modules


# -- back to floats


def test_merging_gives_floats_that_compute_the_same():
    """(QLoRA 2)"""
    model = randomize(QLoRA(rank=4, targets=("q", "up")).attach(tiny_model()))
    before = output(model)
    q = wrap.resolve(model, "blocks.0.attn.q")
    expected = q.inner.weight + 16 / 4 * q.B @ q.A
    rows = {row.path: row for row in merge(model)}
    close(output(model), before, 1e-12)
    close(model.blocks[0].attn.q.weight, expected, 1e-14)
    assert all(type(wrap.resolve(model, p)) is nn.Linear for p in projections(model))
    assert rows.keys() == set(projections(model))
    delta = 16 / 4 * q.B @ q.A
    row = rows["blocks.0.attn.q"]
    assert row.learned == pytest.approx(delta.square().mean().sqrt().item())
    assert row.rounding < 1e-15
    again = dequantize_nf4(quantize_nf4(expected.detach(), 64, True))
    assert row.requantized == pytest.approx((again - expected).square().mean().sqrt().item())
    assert rows["blocks.0.attn.k"].learned == 0


def test_merging_in_bfloat16_reports_its_rounding():
    model = randomize(QLoRA(rank=4).attach(tiny_model(dtype=torch.bfloat16)))
    rows = merge(model)
    # bfloat16 keeps 8 bits of weights around 0.15, and delta is rounded before it is added
    assert all(1e-5 < row.rounding < 3e-3 for row in rows)


def test_requantised_on_request():
    model = randomize(QLoRA(rank=4, block_size=32, double_quant=False).attach(tiny_model()))
    floats = copy.deepcopy(model)
    merge(floats)
    rows = merge(model, requantize=True)
    assert all(row.requantized > 0 for row in rows)
    assert_same_bytes(
        packed_bytes(model), packed_bytes(quantize_model(floats, 32, double_quant=False))
    )


def test_merging_needs_a_quantised_model():
    with pytest.raises(ValueError, match="quantised"):
        merge(LoRA(rank=2).attach(tiny_model()))
    with pytest.raises(ValueError, match="nothing"):
        merge(quantize_model(tiny_model()))


# -- numbers


def test_the_report_shows_weights_by_shape_and_bytes():
    model = QLoRA(rank=4).attach(tiny_model())
    rows = {row.name: row for row in minipeft.report(model).rows}
    row = rows["blocks.0.mlp.up.weight"]
    assert (row.shape, row.dtype, row.trained) == ((128, 32), "nf4", False)
    assert row.bytes == 128 * 32 // 2 + 64 + 4 + 4
    base = sum(p.numel() for p in tiny_model().parameters())
    lora = QLoRA(rank=4).count(CONFIG)
    assert minipeft.report(model).total == base + lora  # a four-bit weight counts once
    assert minipeft.report(model).trained == lora


def test_peak_memory_is_the_formula_s():
    """Weights in NF4, the rest in floats, A and B with gradient and two moments; on top of it
    activations, which LoRA on the float model has as well, and one dequantised weight.
    """
    config = GPTConfig(vocab_size=64, context_length=32, n_layer=4, n_head=4, d_model=128)
    ids = tiny_ids(2, 16, vocab=64)

    def peak(technique):
        model = technique.attach(GPT(config))
        optimizer = torch.optim.AdamW(trainable_parameters(model))

        def step():
            model.train().loss(ids, ids.roll(-1, 1)).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        return measure_peak(step, model, optimizer)

    weights, largest = 4 * 12 * 128**2, 4 * 128 * 512
    saved = 4 * weights - weights * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    difference = peak(LoRA(rank=8, targets=ALL)) - peak(QLoRA(rank=8))
    # between no and three layers' worth of scratch: the weight, its levels, its codes
    assert saved - 3 * largest < difference < saved + 0.01 * saved


def test_the_count_is_lora_s_and_the_published_one():
    """LLaMA-7B at rank 64: 159,907,840, of which the paper's script prints half."""
    path = Path(__file__).parents[1] / "data" / "published_counts.json"
    rows = json.loads(path.read_text())
    row = next(r for r in rows["entries"] if r["id"] == "qlora-llama7-r64")
    d, dff, L = (row["dims"][k] for k in ("d", "dff", "L"))
    shapes = [(d, d)] * 4 + [(dff, d)] * 2 + [(d, dff)]  # q, k, v, o, gate, up, down
    count = 0
    for out, into in shapes:
        with torch.device("meta"):
            layer = quantized_linear(nn.Linear(into, out, bias=False), 64, True)
            lora = minipeft.low_rank.lora.LoRALinear(layer, row["hyperparams"]["r"], 0.25)
        count += sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert L * count == row["recomputed"] == 159_907_840


def test_the_count_of_gpt2():
    config = GPTConfig(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768)
    assert QLoRA().count(config) == 12 * 64 * (8 * 768 + 2 * (768 + 3072)) == 10_616_832


@pytest.mark.parametrize("first", [FullFineTuning(), TopLayers(layers=1), BitFit()])
def test_what_a_technique_trains_is_not_rounded(first, model):
    """It stopped learning, and the file of the QLoRA fitted no base."""
    first.attach(model, name="first")
    with pytest.raises(ValueError, match=r"'first' trains blocks.*merge or detach it first"):
        QLoRA(rank=2, block_size=32).attach(model, name="second")
    assert [a.name for a in model.attachments] == ["first"]
    assert not any(isinstance(m, NF4Linear) for m in model.modules())


def test_trained_biases_stay_trained_beside_weights_that_are_kept(model, ids):
    BitFit().attach(model, name="first")
    QLoRA(rank=2, block_size=32, keep_original=True).attach(model, name="second")
    randomize(model).loss(ids, ids).backward()
    assert all(p.grad is not None for p in model.attachments[0].parameters().values())
    minipeft.detach(model)
    assert torch.equal(model(ids), tiny_model(dtype=model.ln_f.weight.dtype)(ids))
