"""Four bits against bitsandbytes on a CPU: codes, constants, bytes, layers and state dicts."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import nn

from minipeft.interop.bitsandbytes import from_state, to_state
from minipeft.quantized.nf4 import (
    DYNAMIC_MAP,
    FP4_CODEBOOK,
    NF4_CODEBOOK,
    dequantize_nf4,
    dynamic_map,
    quantize,
    quantize_nf4,
)
from minipeft.quantized.nf4_linear import quantized_linear
from tests.tiny import close

bnb = pytest.importorskip("bitsandbytes")
functional = pytest.importorskip("bitsandbytes.functional")

ALIGNED = [(64, 64), (32, 128), (8, 768), (17, 256)]
ODD = [(96, 32), (64, 48), (64, 96), (7, 47), (5, 80)]  # 1 to 3: its AVX512 path is wrong there


def normal(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return (weight * torch.linspace(0.1, 3, shape[0])[:, None]).to(dtype)


def theirs(weight, kind="nf4", block_size=64, double_quant=False):
    return functional.quantize_4bit(
        weight, blocksize=block_size, quant_type=kind, compress_statistics=double_quant
    )


def test_the_tables_are_theirs():
    assert torch.equal(functional.get_4bit_type("nf4", device="cpu"), NF4_CODEBOOK)
    assert torch.equal(functional.get_4bit_type("fp4", device="cpu"), FP4_CODEBOOK)
    assert torch.equal(functional.create_dynamic_map(signed=True), DYNAMIC_MAP)
    assert torch.equal(functional.create_dynamic_map(signed=False), dynamic_map(signed=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_codes_and_constants_are_theirs(dtype, kind, block_size):
    for shape in ALIGNED + ODD:
        weight = normal(*shape, dtype=dtype)
        packed, state = theirs(weight, kind, block_size)
        ours = quantize(weight, kind, block_size)
        assert torch.equal(ours.absmax, state.absmax), f"{shape}: other constants"
        whole = weight.numel() // block_size * block_size // 2
        assert torch.equal(ours.packed[:whole], packed[:whole]), f"{shape}: other bytes"
        # in a short last block they divide by the constant, where elsewhere both multiply by its
        # reciprocal: at a midpoint, which bfloat16 weights do meet, that is another code
        assert (ours.packed[whole:] != packed[whole:]).sum() <= 1, f"{shape}: other last bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantised_weights_are_theirs(dtype):
    for shape in ALIGNED:
        weight = normal(*shape, dtype=dtype)
        packed, state = theirs(weight)
        restored = functional.dequantize_4bit(packed, state)
        assert torch.equal(dequantize_nf4(quantize_nf4(weight)), restored), shape


def test_on_other_shapes_ours_follow_the_definition_whatever_theirs_do():
    """Where a row is no whole number of blocks, the table times the block's constant is right."""
    for shape in ODD:
        weight = normal(*shape)
        packed, state = theirs(weight)
        codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], 1).view(-1).int()
        levels = state.code[codes][: weight.numel()]
        constants = state.absmax.repeat_interleave(64)[: weight.numel()]
        by_hand = (levels * constants).view(shape)
        assert torch.equal(dequantize_nf4(quantize_nf4(weight)), by_hand), shape


def test_double_quantised_constants_are_theirs_to_a_level():
    """Their CPU path finds the level in a rounded table of 65,536 entries, so a few are next to
    the nearest one.
    """
    weight = normal(2048, 64)
    _, state = theirs(weight, double_quant=True)
    ours = quantize_nf4(weight, double_quant=True).absmax
    difference = (ours.codes.int() - state.absmax.int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= 20
    assert torch.equal(ours.absmax, state.state2.absmax)
    assert ours.offset.item() == state.offset.item()
    nearest = (state.state2.code[ours.codes.int()] - state.state2.code[state.absmax.int()]).abs()
    assert nearest.max() < 0.015  # a level apart, where the map's are widest


def linear4bit(linear, double_quant):
    """Their layer with the weights of a nn.Linear."""
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        quant_type="nf4",
        compress_statistics=double_quant,
        compute_dtype=torch.float32,
    )
    layer.load_state_dict(copy.deepcopy(linear.state_dict()))
    return layer.to("cpu").train()


def test_a_layer_and_its_gradient_are_theirs():
    linear = nn.Linear(128, 96)
    peer, ours = linear4bit(linear, False), quantized_linear(linear, 64, False)
    x = torch.randn(2, 5, 128)
    outputs, gradients = [], []
    for layer in (ours, peer):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        outputs.append(y.detach())
        gradients.append(leaf.grad)
    close(outputs[0], outputs[1], 1e-6)  # the same product in another order
    close(gradients[0], gradients[1], 1e-6)


@pytest.mark.parametrize("double_quant", [False, True])
def test_their_state_dict_opens_here(double_quant):
    peer = linear4bit(nn.Linear(128, 64), double_quant)
    quantized = from_state(peer.state_dict())
    expected = functional.dequantize_4bit(peer.weight.data, peer.weight.quant_state)
    # their nested dequantisation adds the mean in float32 as well, but multiplies elsewhere
    torch.testing.assert_close(dequantize_nf4(quantized), expected, rtol=3e-7, atol=0)
    assert quantized.double_quant == double_quant


@pytest.mark.parametrize("double_quant", [False, True])
def test_our_state_opens_there(double_quant):
    weight = normal(64, 128)
    quantized = quantize_nf4(weight, double_quant=double_quant)
    state = to_state(quantized)
    reference = linear4bit(nn.Linear(128, 64), double_quant).state_dict()
    assert state.keys() == reference.keys() - {"bias"}
    for key, tensor in state.items():
        assert tensor.dtype == reference[key].dtype, key
        if "quant_state" not in key:
            assert tensor.shape == reference[key].shape, key
    packed = state.pop("weight")
    parameter = bnb.nn.Params4bit.from_prequantized(packed, state, device="cpu")
    restored = functional.dequantize_4bit(parameter.data, parameter.quant_state)
    torch.testing.assert_close(dequantize_nf4(quantized), restored, rtol=3e-7, atol=0)


def test_train_eval_train_keeps_the_gradient_that_theirs_loses():
    """On a CPU with AVX512-BF16 its evaluation repacks the weight, and no gradient passes any more;
    elsewhere it keeps it. Ours keeps it everywhere.
    """
    linear = nn.Linear(128, 64)
    peer, ours = linear4bit(linear, False), quantized_linear(linear, 64, False)
    kept = {}
    for name, layer in (("peer", peer), ("ours", ours)):
        layer.eval()
        with torch.no_grad():
            layer(torch.randn(2, 128))
        x = torch.randn(2, 128, requires_grad=True)
        with contextlib.suppress(RuntimeError):  # where there is no gradient at all to follow
            layer.train()(x).sum().backward()
        kept[name] = x.grad
    expected = ours.weight.sum(0).expand(2, -1)
    close(kept["ours"], expected, 1e-6)
    if functional.has_avx512bf16():
        assert kept["peer"] is None
