"""The specification of minipeft/quantized/gptq.py and gptq_model.py."""

import copy
import dataclasses
import math

import pytest
import torch

from minipeft.compressed.structured_pruning import prune_neurons
from minipeft.dataset import Batch
from minipeft.quantized.gptq import (
    dequantize_group,
    find_grid,
    gptq,
    inverse_factor,
    output_loss,
    pack_bits,
    round_to_nearest,
    unpack_bits,
)
from minipeft.quantized.gptq_model import STAGES, collect_hessians, quantize_model
from tests.tiny import CONFIG, tiny_ids, tiny_model

DOUBLE = {"scale_dtype": torch.float64}


def layer(out=7, width=24, n=60, seed=0):
    """Weights (out, width) and inputs (n, width) whose columns hang together."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(out, width, generator=generator, dtype=torch.float64)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64)
    x = torch.randn(n, width, generator=generator, dtype=torch.float64) @ mix
    return w, x * torch.logspace(-1, 1, width, dtype=torch.float64)[torch.randperm(width)]


def hessian_of(x):
    return 2 / len(x) * x.T @ x  # (GPTQ 1)


def nearest_on(w, group, bits, symmetric):
    """One weight on the grid of its group, Python floats. (GPTQ 5) (GPTQ 6)"""
    low, high = min(0.0, *group), max(0.0, *group)
    if symmetric:
        high = max(high, -low)
        low = -high
    if low == high:
        low, high = -1.0, 1.0
    top = 2**bits - 1
    s = (high - low) / top
    z = 2 ** (bits - 1) if symmetric else round(-low / s)
    return s * (min(top, max(0, round(w / s) + z)) - z)


def column_by_column(w, H, bits, size, symmetric=False, act_order=False, damping=0.01):
    """The explicit algorithm: after each column its row and column leave the inverse Hessian."""
    w, H = w.clone(), H.clone()
    order = H.diagonal().argsort(descending=True, stable=True).tolist()
    order = order if act_order else list(range(len(H)))
    w, H = w[:, order], H[order][:, order]
    inverse = torch.linalg.inv(H + damping * H.diagonal().mean() * torch.eye(len(H)).double())
    q = torch.zeros_like(w)
    for i in range(len(H)):
        if i % size == 0:
            groups = w[:, i : i + size].tolist()
        column = [nearest_on(v, g, bits, symmetric) for v, g in zip(w[:, i].tolist(), groups)]
        q[:, i] = torch.tensor(column, dtype=torch.float64)
        w -= torch.outer((w[:, i] - q[:, i]) / inverse[i, i], inverse[i])
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    back = torch.tensor(order).argsort()
    return q[:, back]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [None, 8, 3, 1])
@pytest.mark.parametrize("act_order", [False, True])
def test_it_is_the_explicit_column_by_column_algorithm(bits, group, act_order):
    """(GPTQ 2) (GPTQ 3) (GPTQ 4) (GPTQ 5) (GPTQ 6)"""
    w, x = layer()
    H, size = hessian_of(x), group or w.shape[1]
    # A symmetric grid's most negative weight lies half-way between two points: only in groups that
    # start before any column was made up for is it the same number in both, to the last bit.
    for symmetric in (False, True) if group is None else (False,):
        settings = {"symmetric": symmetric, "act_order": act_order}
        mine = dequantize_group(gptq(w, H, bits, group, block_size=5, **settings, **DOUBLE))
        theirs = column_by_column(w, H, bits, size, **settings)
        # two ways to the same inverse in float64; another code would be off by a step, 1e-2
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.parametrize("group", [None, 6])
def test_the_block_size_does_not_matter(group):
    """(GPTQ 4)"""
    w, x = layer()
    results = [
        gptq(w, hessian_of(x), 3, group, block_size=size, **DOUBLE) for size in (1, 5, 8, 24, 128)
    ]
    for other in results[1:]:
        assert torch.equal(other.codes, results[0].codes)
        torch.testing.assert_close(other.scale, results[0].scale, rtol=1e-12, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [None, 4])
def test_with_independent_equal_inputs_it_is_round_to_nearest(group, act_order):
    """H proportional to I: nothing off U's diagonal, nothing to make up for."""
    w, _ = layer()
    H = 3.7 * torch.eye(24, dtype=torch.float64)
    mine = gptq(w, H, 3, group, act_order=act_order, block_size=7)
    nearest = round_to_nearest(w, 3, group)
    assert torch.equal(mine.codes, nearest.codes) and torch.equal(mine.scale, nearest.scale)
    assert torch.equal(dequantize_group(mine), dequantize_group(nearest))


def test_round_to_nearest_is_the_formula():
    """(GPTQ 5) (GPTQ 6)"""
    w, _ = layer(5, 12)
    w[1] = w[1].abs()
    w[2, :4] = 0.0
    for symmetric in (False, True):
        mine = dequantize_group(round_to_nearest(w, 3, 4, symmetric, **DOUBLE))
        for i, j in ((i, j) for i in range(5) for j in range(12)):
            group = w[i, j // 4 * 4 : j // 4 * 4 + 4].tolist()
            expected = nearest_on(w[i, j].item(), group, 3, symmetric)
            assert mine[i, j].item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_it_beats_round_to_nearest_on_its_inputs(bits):
    """(GPTQ 7)"""
    ratios = []
    for seed in range(10):
        w, x = layer(16, 24, seed=seed)
        H = hessian_of(x)
        clever, nearest = gptq(w, H, bits), round_to_nearest(w, bits)
        loss = [output_loss(w, dequantize_group(q), H) for q in (clever, nearest)]
        ratios.append(loss[0] / loss[1])
    assert max(ratios) < 1 and sum(ratios) / 10 < 0.7


def test_act_order_helps_when_few_inputs_matter():
    better = 0
    for seed in range(10):
        w, x = layer(16, 24, seed=seed)
        H = hessian_of(x)
        loss = [
            output_loss(w, dequantize_group(gptq(w, H, 3, act_order=order)), H)
            for order in (True, False)
        ]
        better += loss[0] < loss[1]
    assert better >= 8


def test_the_loss_is_that_of_the_outputs():
    """(GPTQ 1) (GPTQ 7)"""
    w, x = layer()
    q = dequantize_group(gptq(w, hessian_of(x), 3))
    expected = ((x @ (w - q).T) ** 2).sum().item() / len(x)
    assert output_loss(w, q, hessian_of(x)) == pytest.approx(expected, rel=1e-10)


def test_the_factor_is_upper_and_gives_the_inverse():
    """(GPTQ 2)"""
    _, x = layer()
    H = hessian_of(x)
    U = inverse_factor(H)
    assert torch.equal(U, U.triu())
    torch.testing.assert_close(U.T @ U @ H, torch.eye(24).double(), rtol=0, atol=1e-8)


def test_damping_is_relative():
    """The same codes when all inputs are a thousand times larger. (GPTQ 1)"""
    w, x = layer(n=10)  # fewer inputs than columns: without damping H has no inverse
    assert torch.equal(gptq(w, hessian_of(x), 3).codes, gptq(w, hessian_of(1000 * x), 3).codes)
    with pytest.raises(ValueError, match="damping"):
        inverse_factor(torch.zeros(3, 3))


def test_an_input_that_was_always_zero_gets_weight_zero():
    w, x = layer()
    x[:, 4] = 0
    restored = dequantize_group(gptq(w, hessian_of(x), 4, **DOUBLE))
    assert (restored[:, 4] == 0).all() and (restored[:, 5] != 0).any()
    without = [k for k in range(24) if k != 4]
    assert (restored[:, without] - w[:, without]).abs().max() < 2


def test_the_arguments_are_left_alone():
    w, x = layer()
    x[:, 2] = 0
    H = hessian_of(x)
    before = w.clone(), H.clone()
    gptq(w, H, 3, act_order=True)
    assert torch.equal(w, before[0]) and torch.equal(H, before[1])


def test_float32_gives_float64_s_codes():
    w, x = layer(32, 24, 200)
    codes = [gptq(w.to(t), hessian_of(x).to(t), 4).codes for t in (torch.float32, torch.float64)]
    assert (codes[0] != codes[1]).sum() <= 2  # near-ties, out of 768


# -- storage


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 129])
def test_codes_are_packed_without_gaps(bits, count):
    codes = torch.randint(0, 2**bits, (count,), dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert len(packed) == math.ceil(count * bits / 8)
    number = sum(code << (bits * n) for n, code in enumerate(codes.tolist()))
    assert int.from_bytes(bytes(packed.tolist()), "little") == number
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_bits_of_every_kind():
    """(GPTQ 8)"""
    w, x = layer(10, 24)
    H = hessian_of(x)
    assert gptq(w, H, 3).bits_per_parameter == pytest.approx(3 + 19 / 24, rel=1e-15)
    assert gptq(w, H, 4, 8).bits_per_parameter == 4 + 20 / 8
    assert gptq(w, H, 4, 8, symmetric=True).bits_per_parameter == 4 + 16 / 8
    ordered = gptq(w, H, 4, 8, act_order=True)
    assert ordered.bits_per_parameter == pytest.approx(4 + 20 / 8 + 32 / 10, rel=1e-15)
    assert gptq(w, H, 4, act_order=True).group_of is None  # one grid a row: no order to keep
    assert ordered.nbytes == round(10 * 24 * (4 + 20 / 8 + 32 / 10) / 8)


def test_scales_are_float16_before_they_are_used():
    w, _ = layer()
    quantized = round_to_nearest(w, 4, 8)
    scale = quantized.scale.double().repeat_interleave(8, 1)
    zero = quantized.zero.double().repeat_interleave(8, 1)
    assert quantized.scale.dtype == torch.float16
    expected = ((w / scale).round() + zero).clamp(0, 15)
    assert torch.equal(quantized.codes.double(), expected)


def test_symmetric_grids_and_groups_of_zeros():
    """(GPTQ 5)"""
    w = torch.tensor([[0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [-4.0, 1.0, 1.0]])
    scale, zero = find_grid(w, 4, symmetric=True, scale_dtype=torch.float32)
    torch.testing.assert_close(scale[:, 0], torch.tensor([2 / 15, 6 / 15, 8 / 15]))
    assert (zero == 8).all()
    assert (dequantize_group(round_to_nearest(w, 4))[0] == 0).all()
    assert dequantize_group(round_to_nearest(1e-9 * w, 4)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_weight_s_dtype_comes_back(dtype):
    w, x = layer()
    restored = dequantize_group(gptq(w.to(dtype), hessian_of(x), 8))
    assert restored.dtype == dtype and (restored - w).abs().max() < 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 7}, "group_size=7"),
        ({"group_size": 0}, "group_size=0"),
        ({"hessian": torch.eye(5)}, "(5, 5)"),
        ({"weight": torch.ones(3)}, "(3,)"),
        ({"weight": torch.full((3, 24), math.nan)}, "NaN"),
    ],
)
def test_bad_input_is_named(arguments, words):
    w, x = layer()
    with pytest.raises(ValueError) as problem:
        gptq(**{"weight": w, "hessian": hessian_of(x)} | arguments)
    assert words in str(problem.value)


# -- a model


def batches():
    lengths = torch.tensor([11, 4, 7])
    return [Batch(tiny_ids(), tiny_ids(), lengths), Batch(tiny_ids(seed=5), tiny_ids(), lengths)]


def test_hessians_are_of_the_real_tokens_inputs(model):
    """Padding is left out; every token counts the same. (GPTQ 1)"""
    seen = []
    handle = model.blocks[1].attn.q.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    found = collect_hessians(model, batches(), ["blocks.1.attn.q", "blocks.0.mlp.down"])
    handle.remove()
    rows = [x[b, :n] for x in seen for b, n in enumerate((11, 4, 7))]
    expected = hessian_of(torch.cat(rows))
    torch.testing.assert_close(found["blocks.1.attn.q"], expected, rtol=0, atol=1e-12)
    assert found["blocks.0.mlp.down"].shape == (128, 128)
    assert not model.blocks[1].attn.q._forward_pre_hooks


def test_each_projection_sees_what_was_rounded_before_it(model):
    original = copy.deepcopy(model)
    done = quantize_model(model, batches(), bits=3, group_size=8)
    paths = [f"blocks.{n}.{p}.{t}" for n in (0, 1) for s in STAGES for t in s for p in PART[t]]
    assert list(done) == paths
    by_hand = copy.deepcopy(original)  # everything before the last projection is rounded
    for path in paths[:-1]:
        by_hand.get_submodule(path).weight.data.copy_(dequantize_group(done[path]))
    H = collect_hessians(by_hand, batches(), paths[-1:])[paths[-1]]
    last = gptq(original.get_submodule(paths[-1]).weight, H, bits=3, group_size=8)
    assert torch.equal(last.codes, done[paths[-1]].codes)
    for path in paths:
        assert torch.equal(model.get_submodule(path).weight, dequantize_group(done[path]))
    assert torch.equal(model.embed.token.weight, original.embed.token.weight)


PART = {"q": ["attn"], "k": ["attn"], "v": ["attn"], "o": ["attn"], "up": ["mlp"], "down": ["mlp"]}


def test_calibration_drops_nothing_and_may_come_from_a_generator():
    config = dataclasses.replace(CONFIG, dropout=0.3)
    still, training = tiny_model(config), tiny_model(config).train()
    quantize_model(still, batches(), bits=3)
    quantize_model(training, (batch for batch in batches()), bits=3)
    assert torch.equal(training.blocks[1].mlp.down.weight, still.blocks[1].mlp.down.weight)
    assert all(module.training for module in training.modules())


def test_what_does_not_suit_the_last_layer_changes_none():
    model = prune_neurons(tiny_model(), {1: range(3)})
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="group_size=32 does not divide the 125 columns"):
        quantize_model(model, batches(), group_size=32)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_without_text_it_says_so(model):
    with pytest.raises(ValueError, match="text"):
        quantize_model(model, [])


def test_the_model_s_outputs_suffer_less_than_from_rounding():
    nearest, clever = tiny_model(), tiny_model()
    before = tiny_model()(tiny_ids())
    for path in quantize_model(clever, batches(), bits=3):
        linear = nearest.get_submodule(path)
        linear.weight.data.copy_(dequantize_group(round_to_nearest(linear.weight, 3)))
    error = [(m(tiny_ids()) - before).square().mean() for m in (clever, nearest)]
    assert error[0] < 0.6 * error[1]
