"""LLM.int8() against bitsandbytes on a CPU: codes, scales, outlier columns, the layer's output."""

import pytest
import torch
from torch import nn

from minipeft.quantized.int8 import Int8Linear, quantize_absmax

bnb = pytest.importorskip("bitsandbytes")


def inputs(rows=9, width=48):
    x = torch.randn(rows, width).half()
    x[2, 5], x[7, 30], x[3, 11] = 9.0, -6.0, 5.996  # float16 has 5.996 and it is no outlier
    return x


def test_codes_and_scales_are_theirs():
    """(Int8 1) Their largest is 127 times our scale."""
    x = torch.randn(33, 47).half()
    codes, absmax, _ = bnb.functional.int8_vectorwise_quant(x, threshold=0.0)
    mine = quantize_absmax(x)
    assert torch.equal(mine.codes, codes)
    # one rounding of a division
    torch.testing.assert_close(127 * mine.scale[:, 0], absmax, rtol=2e-7, atol=0)


def test_outlier_columns_are_theirs():
    """(Int8 5)"""
    x = inputs()
    codes, _, columns = bnb.functional.int8_vectorwise_quant(x, threshold=6.0)
    assert columns.tolist() == [5, 30]
    mine = quantize_absmax(x.masked_fill((x.abs() >= 6).any(0), 0))
    theirs = codes.clone()
    theirs[:, columns] = 0  # left in place there, multiplied apart all the same
    assert torch.equal(mine.codes, theirs)


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_s_output_is_theirs(bias):
    """(Int8 4) (Int8 5) Their output is rounded to float16, about 2^-11 of values up to 5."""
    linear = nn.Linear(48, 20, bias)
    theirs = bnb.nn.Linear8bitLt(48, 20, bias, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.half().state_dict())
    theirs = theirs.to("cpu").eval()
    x = inputs()
    with torch.no_grad():
        assert (Int8Linear(linear)(x).float() - theirs(x).float()).abs().max() < 5e-3
