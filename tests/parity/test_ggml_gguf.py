"""ggml's blocks against the `gguf` package: every byte, and every restored value."""

import numpy as np
import pytest
import torch

from minipeft.quantized.ggml import KINDS, GGMLQuantized, dequantize_ggml, quantize_ggml

gguf = pytest.importorskip("gguf")


def weights(kind):
    torch.manual_seed(len(kind) + KINDS[kind].bits)
    wide = torch.randn(40, 96) * torch.logspace(-6, 3, 40)[:, None]
    flat = torch.randn(9, 64) + 5  # one sign only
    steps = (torch.randint(-9, 9, (11, 32)) / 2).float()  # full of ties
    special = torch.stack([torch.zeros(32), torch.ones(32), -torch.ones(32), torch.eye(32)[3]])
    equal = torch.tensor([-1.0, 1.0]).repeat(3, 16)  # which of equal largest counts?
    return [wide, flat, steps, special, equal]


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_gguf_s(kind):
    """(GGML 1) to (GGML 7)"""
    for weight in weights(kind):
        theirs = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])
        mine = quantize_ggml(weight, kind).data.numpy()
        np.testing.assert_array_equal(mine.reshape(theirs.shape), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_gguf_s(kind):
    for weight in weights(kind):
        quantized = quantize_ggml(weight, kind)
        rows = quantized.data.numpy().reshape(len(weight), -1)
        theirs = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(dequantize_ggml(quantized).numpy(), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_any_bytes_are_read_as_gguf_reads_them(kind):
    data = torch.randint(0, 256, (20, KINDS[kind].block_bytes), dtype=torch.uint8)
    data[:, 1] &= 0x3B  # no float16 infinity or NaN as d
    data[:, 3] &= 0x3B  # nor as m, where there is one
    mine = dequantize_ggml(GGMLQuantized(data, (20, 32), torch.float32, kind)).numpy()
    theirs = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_of_a_block_is_gguf_s(kind):
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    assert size == (32, KINDS[kind].block_bytes)
