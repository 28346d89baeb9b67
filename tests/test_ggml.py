"""The specification of minipeft/quantized/ggml.py; byte for byte against gguf in tests/parity."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft.quantized.ggml import (
    KINDS,
    affine,
    check_input,
    dequantize_ggml,
    quantize_by_absmax,
    quantize_by_signed_max,
    quantize_ggml,
    quantize_on_range,
    rms,
)

SHAPES = [(32,), (3, 32), (7, 96), (2, 3, 64)]
CONSTANTS = {"Q4_0": (8, 15), "Q5_0": (16, 31), "Q4_1": (0, 15), "Q5_1": (0, 31)}


def half(x):
    return struct.unpack("e", struct.pack("e", x))[0]


def single(x):
    return struct.unpack("f", struct.pack("f", x))[0]


def restored_by_hand(values, kind):
    """One block of Python floats, the formula written again with struct's float16."""
    if kind == "Q8_0":  # (GGML 5)
        d = single(max(map(abs, values)) / 127)
        codes = [math.copysign(math.floor(abs(w / d) + 0.5), w) for w in values]
        return [half(d) * q for q in codes]
    zero, top = CONSTANTS[kind]
    if kind.endswith("1"):  # (GGML 3) (GGML 4)
        d, m = single((max(values) - min(values)) / top), min(values)
        return [half(d) * min(top, int((w - m) / d + 0.5)) + half(m) for w in values]
    d = single(max(values, key=abs) / -zero)  # (GGML 1) (GGML 2)
    return [half(d) * (min(top, int(w / d + zero + 0.5)) - zero) for w in values]


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_the_formula(kind):
    blocks = torch.randn(50, 32)
    restored = dequantize_ggml(quantize_ggml(blocks, kind))
    for values, mine in zip(blocks.tolist(), restored.tolist()):
        # a few roundings of float32 at values of order one; a wrong code would be off by d
        assert mine == pytest.approx(restored_by_hand(values, kind), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_shape_and_dtype_come_back(kind, shape, dtype):
    weight = torch.randn(shape).to(dtype)
    quantized = quantize_ggml(weight, kind)
    restored = dequantize_ggml(quantized)
    assert restored.shape == shape and restored.dtype == dtype
    # the widest step is Q4_0's d, an eighth of the largest weight
    assert (restored - weight).abs().max() <= weight.abs().max() / 7.9


def test_bits_are_those_of_the_bytes():
    """(GGML 8)"""
    expected = {"Q4_0": 4.5, "Q4_1": 5.0, "Q5_0": 5.5, "Q5_1": 6.0, "Q8_0": 8.5}
    for kind, bits in expected.items():
        quantized = quantize_ggml(torch.randn(3, 64), kind)
        assert quantized.bits_per_parameter == bits == 8 * quantized.nbytes / (3 * 64)


def test_the_layout_of_q4_0_by_hand():
    """Codes 15, 14, .. in the low nibbles of d = 1, then 0, 1, .. in the high ones. (GGML 6)"""
    low = [float(7 - j) for j in range(16)]
    high = [float(j - 8) for j in range(16)]
    data = quantize_ggml(torch.tensor(low + high), "Q4_0").data[0].tolist()
    assert bytes(data[:2]) == struct.pack("<e", 1.0)  # M = -8 gives d = 1
    assert data[2:] == [(15 - j) | (j << 4) for j in range(16)]


def test_the_layout_of_q5_0_by_hand():
    """Only element 9 has its fifth bit set: bit 1 of byte 1 of the word. (GGML 7)"""
    values = torch.full((32,), -1.0)  # code 15: no fifth bit
    values[0], values[9] = -16.0, 3.0  # codes 0 (and d = 1) and 19
    data = quantize_ggml(values, "Q5_0").data[0].tolist()
    assert bytes(data[:2]) == struct.pack("<e", 1.0)
    assert data[2:6] == [0, 2, 0, 0]
    assert data[6:] == [0xF0, *[0xFF] * 8, 0xF3, *[0xFF] * 6]


def test_the_sign_of_the_largest_gets_the_extra_code():
    """-8 stands for it exactly; its opposite is a whole d off. (GGML 1)"""
    for sign in (1.0, -1.0):
        block = torch.zeros(1, 32)
        block[0, 3], block[0, 20] = 8 * sign, -7.99 * sign
        q, d = quantize_by_signed_max(block, 4)
        assert q[0, 3] == 0 and d.item() == -sign
        restored = dequantize_ggml(quantize_ggml(block, "Q4_0"))[0]
        assert restored[3] == 8 * sign and restored[20] == -7 * sign


def test_q8_0_rounds_halves_away_from_zero():
    block = torch.zeros(1, 32)
    block[0, :5] = torch.tensor([127.0, 0.5, -0.5, 1.5, 2.5])
    q, d = quantize_by_absmax(block)
    assert d.item() == 1.0 and q[0, :5].tolist() == [127, 1, -1, 2, 3]


def test_codes_come_from_the_float32_scale():
    """The stored float16 d is rounded afterwards. (GGML 4)"""
    blocks = torch.randn(400, 32)
    q, d, m = quantize_on_range(blocks, 4)
    exact = ((blocks.double() - m) / d.double() + 0.5).floor().clamp(max=15)
    rounded = ((blocks.double() - m) / d.half().double() + 0.5).floor().clamp(max=15)
    assert (q != exact).sum() <= 1  # a tie that float32 sees the other way
    assert (q != rounded).sum() > 20  # the mistake would show


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_what_was_restored_is_restored_again(kind):
    once = dequantize_ggml(quantize_ggml(torch.randn(5, 64).half().float(), kind))
    assert torch.equal(dequantize_ggml(quantize_ggml(once, kind)), once)


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_zero_blocks(kind):
    for value in (0.0, 1.0, -2.0):
        weight = torch.full((2, 32), value)
        restored = dequantize_ggml(quantize_ggml(weight, kind))
        # float16 rounds d = 2 / 127 to 11 bits
        torch.testing.assert_close(restored, weight, rtol=2**-11, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_blocks_become_zeros_and_not_nan(kind):
    weight = torch.full((1, 32), 1e-40)
    weight[0, 0] = -1e-39
    quantized = quantize_ggml(weight, kind)
    assert dequantize_ggml(quantized).abs().max() == 0
    codes = KINDS[kind].bits * 32 // 8  # the constants before them differ in the sign of zero
    zeros = quantize_ggml(torch.zeros(1, 32), kind)
    assert torch.equal(quantized.data[:, -codes:], zeros.data[:, -codes:])


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10**6), st.floats(1e-3, 1e3))
def test_the_error_is_at_most_half_a_step(kind, seed, scale):
    """But for the opposite end of Q4_0 and Q5_0, a whole step; float16's rounding of d besides."""
    weight = scale * torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    error = (dequantize_ggml(quantize_ggml(weight, kind)) - weight).abs().amax(1)
    largest = weight.abs().amax(1)
    step = {"Q4_0": largest / 8, "Q5_0": largest / 16, "Q8_0": largest / 127}.get(
        kind, (weight.amax(1) - weight.amin(1)) / (2 ** KINDS[kind].bits - 1)
    )
    allowed = step * (1 if kind in ("Q4_0", "Q5_0") else 0.5) + 2e-3 * largest
    assert (error <= allowed).all()


def test_rmse_on_normal_weights():
    """Over 131,072 values; the sampling error of each figure is about 0.2 %."""
    weight = torch.randn(1024, 128)
    expected = {"Q4_0": 0.0862, "Q4_1": 0.0775, "Q5_0": 0.0427, "Q5_1": 0.0376, "Q8_0": 0.0054}
    for kind, error in expected.items():
        found = rms(dequantize_ggml(quantize_ggml(weight, kind)) - weight)
        assert found == pytest.approx(error, rel=0.02), kind


def test_affine_at_32_is_q4_1():
    weight = torch.randn(3, 64)
    restored, bits = affine(weight, 4, 32)
    assert torch.equal(restored, dequantize_ggml(quantize_ggml(weight, "Q4_1"))) and bits == 5.0
    assert affine(weight, 4, 64)[1] == 4.5
    with pytest.raises(ValueError, match="block_size=7"):
        affine(weight, 4, 7)


def test_nf4_and_affine_int4_cross_between_blocks_of_32_and_256():
    """At equal bits (32 bits of constants a block each): affine is better on small blocks, whose
    range it follows, NF4 on large ones, where most weights are near 0.
    """
    from minipeft.quantized.nf4 import dequantize_nf4, quantize_nf4

    weight = torch.randn(512, 256)
    ratio = {}
    for block in (16, 32, 128, 256):
        quantized = quantize_nf4(weight, block)
        restored, bits = affine(weight, 4, block)
        assert bits == quantized.bits_per_parameter
        ratio[block] = rms(restored - weight) / rms(dequantize_nf4(quantized) - weight)
    assert ratio[16] < ratio[32] < 0.95 and 1.02 < ratio[128] < ratio[256]


@pytest.mark.parametrize(
    ("weight", "kind", "words"),
    [
        (torch.randn(4, 33), "Q4_0", "(4, 33)"),
        (torch.randn(0, 32), "Q4_0", "(0, 32)"),
        (torch.tensor(1.0), "Q4_0", "shape ()"),
        (torch.randn(32), "Q6_K", "Q6_K"),
        (torch.ones(32, dtype=torch.int8), "Q4_0", "int8"),
        (torch.full((32,), math.nan), "Q8_0", "NaN"),
        (torch.full((32,), math.inf), "Q8_0", "infinity"),
    ],
)
def test_bad_input_is_named(weight, kind, words):
    with pytest.raises(ValueError) as problem:
        check_input(weight, kind)
    assert words in str(problem.value)


def test_a_scale_beyond_float16_is_an_error():
    with pytest.raises(ValueError, match="1e\\+07"):
        quantize_ggml(torch.full((32,), 1e7), "Q8_0")
