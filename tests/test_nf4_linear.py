"""A frozen linear layer in four bits: its product, its gradients, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from minipeft.memory import PeakMemory
from minipeft.quantized import nf4_linear
from minipeft.quantized.nf4 import dequantize_nf4, quantize_nf4
from minipeft.quantized.nf4_linear import frozen_linear, quantized_linear
from tests.tiny import close

DOUBLE = torch.float64


def layer_and_weight(dtype=DOUBLE, out=7, into=10):
    linear = nn.Linear(into, out, dtype=dtype)
    layer = quantized_linear(linear, 6, True)
    return layer, dequantize_nf4(quantize_nf4(linear.weight.detach(), 6, True))


def test_the_layer_multiplies_with_the_dequantised_weight():
    """(Frozen 1)"""
    layer, weight = layer_and_weight()
    x = torch.randn(2, 3, 10, dtype=DOUBLE)
    close(layer(x), torch.einsum("oi,bti->bto", weight, x) + layer.bias, 1e-14)
    assert torch.equal(layer.weight, weight)


def test_the_gradients_are_the_dequantised_weight_s():
    """(Frozen 2), and the bias's for those who train it."""
    layer, weight = layer_and_weight()
    x = torch.randn(2, 3, 10, dtype=DOUBLE, requires_grad=True)
    g = torch.randn(2, 3, 7, dtype=DOUBLE)
    layer(x).backward(g)
    close(x.grad, torch.einsum("oi,bto->bti", weight, g), 1e-14)
    close(layer.bias.grad, g.sum((0, 1)), 1e-14)
    assert torch.autograd.gradcheck(lambda x: frozen_linear(x, layer.quantized), (x,))


def test_the_float_weight_is_not_kept_for_the_backward_pass():
    """Between the passes only the input and the output are alive; in them, one float weight."""
    layer = quantized_linear(nn.Linear(256, 512, bias=False), 64, True)
    x, weight_bytes = torch.randn(3, 256, requires_grad=True), 256 * 512 * 4
    with PeakMemory() as memory:
        y = layer(x)
        assert memory.now < weight_bytes / 6  # packed it is an eighth
        # the weight, and one tile of codes and levels beside it (int32, two float32)
        assert weight_bytes < memory.peak < 2.8 * weight_bytes
        y.sum().backward()
        assert memory.now < weight_bytes / 6  # packed it is an eighth


def test_no_input_gradient_no_dequantising(monkeypatch):
    calls = []
    real = nf4_linear.dequantize_nf4
    monkeypatch.setattr(nf4_linear, "dequantize_nf4", lambda *a: calls.append(1) or real(*a))
    layer, _ = layer_and_weight()
    layer(torch.randn(2, 10, dtype=DOUBLE)).sum().backward()
    assert len(calls) == 1
    layer(torch.randn(2, 10, dtype=DOUBLE, requires_grad=True)).sum().backward()
    assert len(calls) == 3


def test_the_compute_type_is_used_and_the_input_s_comes_back():
    linear = nn.Linear(64, 32)
    layer = quantized_linear(linear, 64, False, "bfloat16")
    x = torch.randn(5, 64)
    weight = layer.weight.bfloat16()
    expected = F.linear(x.bfloat16(), weight, linear.bias.bfloat16())
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), expected.float())


def test_under_autocast_it_computes_like_a_linear_layer():
    linear = nn.Linear(64, 32)
    layer = quantized_linear(linear, 64, False)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = layer(x), layer.to_linear()(x)
    assert ours.dtype == plain.dtype == torch.bfloat16 and torch.equal(ours, plain)


@pytest.mark.parametrize("convert", [torch.Tensor.half, torch.Tensor.bfloat16, torch.Tensor.double])
@pytest.mark.parametrize("double_quant", [False, True])
def test_converting_the_model_leaves_the_constants_alone(convert, double_quant):
    layer = quantized_linear(nn.Linear(64, 32), 64, double_quant)
    before, weight = layer.quantized, layer.weight
    layer._apply(lambda t: convert(t) if t.is_floating_point() else t)
    assert torch.equal(layer.quantized.constants, before.constants)
    assert layer.quantized.constants.dtype == torch.float32
    assert layer.weight.dtype == layer.bias.dtype == convert(weight).dtype
    assert torch.equal(layer.weight, convert(weight))
