"""The specification of minipeft/quantized/int8.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from minipeft.quantized.int8 import (
    Int8Linear,
    dequantize_int8,
    integer_product,
    quantize_absmax,
    quantize_zero_point,
    vector_wise_product,
)

BOTH = [quantize_absmax, quantize_zero_point]


def matrix(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_absmax_is_the_formula():
    """(Int8 1)"""
    w = matrix(7, 47)
    quantized = quantize_absmax(w)
    for row, codes, scale in zip(w.tolist(), quantized.codes.tolist(), quantized.scale.tolist()):
        s = max(map(abs, row)) / 127
        assert scale[0] == pytest.approx(s, rel=1e-15)
        assert codes == [round(v / s) for v in row]  # Python's round is half to even, too
        assert max(map(abs, codes)) == 127


def test_zero_point_is_the_formula():
    """(Int8 2) (Int8 3)"""
    w = matrix(6, 33) + torch.tensor([0.0, 3.0, -3.0, 0.5, 1.0, -1.0])[:, None]
    quantized = quantize_zero_point(w)
    restored = dequantize_int8(quantized)
    for i, row in enumerate(w.tolist()):
        low, high = min(0, *row), max(0, *row)
        s = (high - low) / 255
        z = round(-low / s) - 128
        assert quantized.zero[i].item() == z
        codes = [min(127, max(-128, round(v / s) + z)) for v in row]
        assert quantized.codes[i].tolist() == codes
        # one rounding of a product
        assert restored[i].tolist() == pytest.approx([s * (q - z) for q in codes], abs=1e-14)


@pytest.mark.parametrize("quantize", BOTH)
@given(seed=st.integers(0, 10**6), shift=st.floats(-5, 5), scale=st.floats(1e-6, 1e6))
def test_the_error_is_at_most_half_a_step(quantize, seed, shift, scale):
    generator = torch.Generator().manual_seed(seed)
    w = scale * (torch.randn(5, 19, generator=generator, dtype=torch.float64) + shift)
    quantized = quantize(w)
    error = (dequantize_int8(quantized) - w).abs().amax(1, keepdim=True)
    # at the ends z's own rounding can cost another half step
    allowed = 0.5 if quantized.zero is None else 1.0
    assert (error <= (allowed + 1e-9) * quantized.scale).all()


@pytest.mark.parametrize("quantize", BOTH)
def test_zeros_and_constants_are_exact(quantize):
    w = torch.tensor([[0.0, 0.0, 0.0], [2.0, 2.0, 2.0], [-3.0, -3.0, 0.0]])
    # 127 and 255 steps of a rounded size: a rounding of float32 each
    torch.testing.assert_close(dequantize_int8(quantize(w)), w, rtol=3e-7, atol=0)
    assert (
        (dequantize_int8(quantize(torch.randn(3, 5) * (torch.rand(3, 5) > 0.5)))).isfinite().all()
    )


def test_two_roundings_up_do_not_run_over():
    """127.5 rounds to 128, the zero-point too. (Int8 3)"""
    quantized = quantize_zero_point(torch.tensor([[-127.5, 0.0, 127.5]]))
    assert quantized.codes.tolist() == [[-128, 0, 127]] and quantized.zero.item() == 0


def test_zero_points_help_where_a_row_is_lopsided():
    w = torch.rand(4, 64, dtype=torch.float64)
    errors = [(dequantize_int8(q(w)) - w).square().mean().sqrt() for q in BOTH]
    assert 0.4 < errors[1] / errors[0] < 0.6  # half the step


@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_come_back_and_scales_are_float32(quantize, dtype):
    w = torch.randn(3, 4, 17).to(dtype)
    quantized = quantize(w)
    assert quantized.scale.dtype == torch.float32 and quantized.codes.dtype == torch.int8
    restored = dequantize_int8(quantized)
    assert restored.dtype == dtype and restored.shape == w.shape
    assert (restored - w).abs().max() <= w.abs().max() / 100


def test_bits_and_bytes():
    """(Int8 6)"""
    w = torch.randn(10, 40)
    assert quantize_absmax(w).bits_per_parameter == 8 + 32 / 40
    assert quantize_zero_point(w).bits_per_parameter == 8 + 40 / 40
    assert quantize_absmax(w).nbytes == 10 * 40 + 10 * 4


def test_the_integer_product_is_exact_in_its_codes():
    """(Int8 4)"""
    x, w = quantize_absmax(matrix(5, 31)), quantize_absmax(matrix(7, 31))
    sums = [
        [sum(a * b for a, b in zip(row, column)) for column in w.codes.tolist()]
        for row in x.codes.tolist()
    ]
    expected = torch.tensor(sums).double() * x.scale * w.scale.T
    torch.testing.assert_close(integer_product(x, w), expected, rtol=1e-14, atol=0)
    restored = dequantize_int8(x) @ dequantize_int8(w).T
    torch.testing.assert_close(integer_product(x, w), restored, rtol=0, atol=1e-12)


def test_whole_numbers_up_to_127_are_multiplied_exactly():
    x, w = (torch.randint(-126, 127, (n, 23)).float() for n in (4, 6))
    x[:, 0], w[:, -1] = 127, -127
    assert torch.equal(vector_wise_product(x, quantize_absmax(w), None), x @ w.T)


def test_an_outlier_column_is_left_out_of_the_integers():
    """With it inside, every other value of the row would be rounded to 60 / 127. (Int8 5)"""
    x, w = matrix(9, 48), matrix(11, 48)
    x[3, 5], x[7, 5], x[8, 20] = 60.0, 5.9, -6.0
    quantized = quantize_absmax(w)
    exact = x @ dequantize_int8(quantized).T

    def error(threshold):
        return (vector_wise_product(x, quantized, threshold) - exact).abs().amax(1)

    outlier = torch.tensor([k in (5, 20) for k in range(48)])
    kept = dequantize_int8(quantize_absmax(x.masked_fill(outlier, 0))).masked_fill(outlier, 0)
    expected = (kept + x.masked_fill(~outlier, 0)) @ dequantize_int8(quantized).T
    torch.testing.assert_close(vector_wise_product(x, quantized), expected, rtol=0, atol=1e-12)
    assert error(6.0)[3] < error(None)[3] / 10


def test_with_every_column_an_outlier_the_product_is_the_dequantised_one():
    x, quantized = matrix(2, 3, 10), quantize_absmax(matrix(4, 10))
    expected = x @ dequantize_int8(quantized).T
    torch.testing.assert_close(vector_wise_product(x, quantized, 0.0), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_near_the_layer_it_was_made_from(bias):
    linear = nn.Linear(64, 48, bias).double()
    layer, x = Int8Linear(linear), matrix(2, 5, 64)
    x[0, 0, 3] = 40
    assert layer(x).shape == (2, 5, 48) and not list(layer.parameters())
    # each product is off by about 1/127/sqrt(12) of the largest, in x and in w, over 64 of them
    assert (layer(x) - linear(x)).abs().max() < 0.05
    expected = vector_wise_product(x, quantize_absmax(linear.weight)) + (linear.bias if bias else 0)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-13)


def test_the_layer_s_state_goes_through_a_state_dict():
    layer, other = Int8Linear(nn.Linear(8, 5)), Int8Linear(nn.Linear(8, 5))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 8)
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("quantize", BOTH)
@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (torch.tensor([[1.0, math.nan]]), "NaN"),
        (torch.tensor([[1.0, -math.inf]]), "infinity"),
        (torch.ones(2, 2, dtype=torch.int32), "int32"),
        (torch.empty(0, 3), "(0, 3)"),
    ],
)
def test_bad_input_is_named(quantize, weight, words):
    with pytest.raises(ValueError) as problem:
        quantize(weight)
    assert words in str(problem.value)


def test_a_product_needs_absmax_rows_of_the_right_width():
    with pytest.raises(ValueError, match="absmax"):
        vector_wise_product(torch.randn(2, 5), quantize_zero_point(torch.randn(3, 5)))
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        vector_wise_product(torch.randn(2, 4), quantize_absmax(torch.randn(3, 5)))
