"""The specification of minipeft/kernels/nf4_gemv.py; test_twins.py holds it against its definition
in all dtypes and layouts.
"""

import pytest
import torch
from torch import nn

from minipeft.dispatch import forced
from minipeft.kernels.nf4 import tables
from minipeft.kernels.nf4_gemv import ROWS, TILE, blocks_a_step, frozen_product, gemv_kernel
from minipeft.quantized import nf4_linear as defined
from minipeft.quantized.nf4 import dequantize_nf4, quantize
from minipeft.quantized.nf4_linear import TOKENS, quantized_linear
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    close,
    interpreted_only,
    nbytes,
    programs_from,
    untouched,
)


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


@pytest.mark.parametrize("out", [1, ROWS - 1, ROWS, 2 * ROWS + 1])
@pytest.mark.parametrize("width", [64, TILE - 64, TILE, TILE + 64])
@pytest.mark.parametrize("doubled", [False, True])
def test_it_is_the_product_with_the_dequantised_weight(out, width, doubled):
    """In float64, rows and widths around a program's and a step's."""
    quantized = quantize(draw(out, width), "nf4", 64, doubled)
    x, bias = draw(2, width), draw(out)
    weight = dequantize_nf4(quantized).double()
    close(frozen_product(x, quantized, bias), (x.double() @ weight.T + bias.double()).float())
    close(frozen_product(x, quantized, None), (x.double() @ weight.T).float())


@pytest.mark.parametrize("size", [2, 16, 256, 1024])
def test_any_power_of_two_is_a_block(size):
    quantized, x = quantize(draw(3, 1024), "fp4", size, True), draw(1, 1024)
    close(frozen_product(x, quantized, None), x @ dequantize_nf4(quantized).T)
    assert size * blocks_a_step(size, 1024) == max(size, TILE)


def test_half_precision_is_nearer_to_the_exact_product_than_the_definition():
    """The weight is not rounded to half precision on the way."""
    quantized, x = quantize(draw(32, 512), "nf4", 64), draw(1, 512, dtype=torch.float16)
    exact = x.double() @ dequantize_nf4(quantized).double().T
    with forced("off"):
        theirs = defined.frozen_product(x, quantized, None).double()
    mine = frozen_product(x, quantized, None).double()
    assert mine.dtype == torch.float64 and (mine - exact).norm() <= (theirs - exact).norm()


def test_the_seam_lets_few_tokens_and_whole_blocks_through():
    def refused(tokens, out, width, size):
        quantized = quantize(draw(out, width), "nf4", size)
        return defined.frozen_product.twin.refusal((draw(tokens, width), quantized, None), {}, "on")

    assert not refused(TOKENS, 3, 64, 64)
    assert refused(TOKENS + 1, 3, 64, 64), "a product of matrices"
    assert refused(1, 3, 96, 64), "a block lies in two rows"
    assert refused(1, 4, 24, 6), "not a power of two"
    assert refused(0, 3, 64, 64), "nothing to do"


def test_the_layer_uses_it_and_keeps_its_gradient():
    layer, found = quantized_linear(nn.Linear(128, 5, device=DEVICE), 64, True), []
    x = draw(1, 2, 128)
    for choice in ("on", "off"):
        with forced(choice):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), leaf)])
    for mine, plain in zip(*found):
        close(mine, plain)


@interpreted_only
def test_the_weight_is_read_once_a_token():
    """And the token once for each ROWS outputs, from the cache; the last step, which is not full,
    reads nothing of the next row.
    """
    out, width, tokens = 2 * ROWS, TILE + 64, 3
    quantized, x = quantize(draw(out, width), "nf4", 64, True), draw(tokens, width)
    bias = draw(out)
    with Traffic() as traffic:
        y = frozen_product(x, quantized, bias)
    c = quantized.absmax
    assert traffic.loaded["t_packed"] == tokens * nbytes(quantized.packed)
    assert traffic.loaded["t_absmax"] == tokens * nbytes(c.codes)
    assert traffic.loaded["t_largest"] == tokens * 4 * len(c.codes)  # a group's is shared
    assert traffic.loaded["t_x"] == nbytes(x) * out // ROWS
    assert traffic.stored == {"t_out": nbytes(y)}
    assert traffic.loaded["t_bias"] == tokens * nbytes(bias)


@interpreted_only
def test_a_weight_may_have_more_than_four_billion_elements():
    """Only the program of the last rows runs; their bytes lie past int32."""
    width, first = 4096, 2**20
    out, blocks = first + 2, width // 64
    packed, absmax = (
        untouched(out * width // 2, torch.uint8),
        untouched(out * blocks, torch.float32),
    )
    x, y, levels = torch.randn(1, width), torch.zeros(1, out), tables("nf4", torch.device("cpu"))[2]
    weight = torch.randn(2, width)
    small = quantize(weight, "nf4", 64)
    packed[-width:], absmax[-2 * blocks :] = small.packed.view(-1), small.absmax
    with programs_from(first // ROWS):
        gemv_kernel[(1, 1)](
            x, packed, absmax, absmax, absmax, levels, levels, y, y, out, blocks,
            SIZE=64, BLOCKS=blocks_a_step(64, width), ROWS=ROWS, GROUP=0, BIASED=False,
        )  # fmt: skip
    close(y[:, -2:], x @ dequantize_nf4(small).T)
