"""The specification of minipeft/kernels/nf4.py; test_twins.py holds it against its definitions in
all dtypes and layouts.
"""

import pytest
import torch
from torch import nn

from minipeft.dispatch import forced
from minipeft.kernels import nf4 as kernels
from minipeft.kernels.nf4 import (
    TILE,
    dequantize_blocks,
    dequantize_doubled,
    dequantize_kernel,
    quantize_blocks,
    quantize_kernel,
    tables,
    tile,
)
from minipeft.quantized import nf4 as defined
from minipeft.quantized.double_quantization import GROUP, dequantize_constants, quantize_constants
from minipeft.quantized.nf4 import NF4_CODEBOOK, dequantize_nf4, quantize_nf4
from minipeft.quantized.nf4_linear import quantized_linear
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    interpreted_only,
    nbytes,
    programs_from,
    untouched,
)

SIZES = [1, 2, 63, 64, 65, TILE - 1, TILE, TILE + 1, 2 * TILE + 65]


def draw(n, dtype=torch.float32):
    return torch.randn(n).to(DEVICE, dtype)


@pytest.mark.parametrize("n", SIZES)
def test_each_value_gets_the_nearest_level_and_each_block_its_largest(n):
    w = draw(n)
    packed, absmax = quantize_blocks(w, "nf4", 64)
    blocks = torch.zeros(-(-n // 64) * 64, dtype=torch.float64)
    blocks[:n] = w.cpu().double()
    blocks = blocks.view(-1, 64)
    largest = blocks.abs().amax(1)
    assert torch.equal(absmax.cpu().double(), largest)
    distance = blocks[..., None] / largest[:, None, None] - NF4_CODEBOOK.double()
    codes = distance.abs().argmin(-1).view(-1)[: n + n % 2]
    assert torch.equal(packed.cpu().long(), codes[0::2] * 16 + codes[1::2])


def test_a_value_at_a_midpoint_takes_the_lower_level():
    """As in the definition, and one step of a float32 higher it takes the upper one."""
    midpoints = tables("nf4", torch.device("cpu"))[0]
    one = torch.ones(1)
    above = torch.nextafter(midpoints, one)
    for values, codes in ((midpoints, range(15)), (above, range(1, 16))):
        packed, _ = quantize_blocks(torch.cat([values, one]).to(DEVICE), "nf4", 16)
        found = torch.stack([packed >> 4, packed & 15], 1).view(-1)
        assert found.tolist() == [*codes, 15]


@pytest.mark.parametrize("largest", [3.0, 0.7, 1e-3, 1e30, 1.1e-38, 2e-39, 0.0])
def test_the_scale_is_the_exact_reciprocal(largest):
    """Values at midpoints times the constant are the ones that another rounding would move."""
    w = tables("nf4", torch.device("cpu"))[0].repeat(20)[: 4 * 64] * torch.tensor(largest)
    w[::64] = largest
    with forced("off"):
        expected = defined.quantize_blocks(w.to(DEVICE), "nf4", 64)
    for mine, theirs in zip(quantize_blocks(w.to(DEVICE), "nf4", 64), expected):
        assert torch.equal(mine, theirs)


@pytest.mark.filterwarnings("ignore:invalid value")  # infinity times 0, in NumPy
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_has_no_level_is_found_and_named(bad):
    w = draw(130).view(2, 65)
    w[1, 3] = bad
    with pytest.raises(ValueError, match=r"the value at \(1, 3\) is"):
        quantize_nf4(w)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_dequantised_weights_have_the_definition_s_bits(n, dtype):
    """Not only to a tolerance: no multiplication is contracted with an addition."""
    for kind, size in (("nf4", 64), ("fp4", 6), ("nf4", 4096)):
        packed, absmax = quantize_blocks(draw(n), kind, size)
        c, how = quantize_constants(absmax), (n, size, kind, dtype)
        doubled = packed, c.codes, c.absmax, c.offset
        with forced("off"):
            single = defined.dequantize_blocks(packed, absmax, *how)
            double = defined.dequantize_doubled(*doubled, *how)
        assert torch.equal(dequantize_blocks(packed, absmax, *how), single)
        assert torch.equal(dequantize_doubled(*doubled, *how), double)


def test_a_group_s_constant_is_its_own():
    """More than one group of 256 constants in a tile, and groups that end inside one."""
    absmax = torch.rand(2 * GROUP + 77).to(DEVICE) * torch.logspace(-3, 3, 2 * GROUP + 77).to(
        DEVICE
    )
    c = quantize_constants(absmax)
    packed = torch.full((len(absmax),), 0xFF, dtype=torch.uint8, device=DEVICE)  # two ones a byte
    how = (2 * len(absmax), 2, "nf4", torch.float32)
    out = dequantize_doubled(packed, c.codes, c.absmax, c.offset, *how)
    assert torch.equal(out.view(-1, 2)[:, 0], dequantize_constants(c))


def test_the_public_functions_use_it_and_agree():
    """A weight that is a transposed view, both kinds of constants, and a layer's two passes."""
    w, x, found = draw(70 * 9).view(9, 70).T, draw(5 * 70).view(5, 70), []
    for choice in ("on", "off"):
        with forced(choice):
            torch.manual_seed(0)
            layer = quantized_linear(nn.Linear(70, 3, device=DEVICE), 10, True)
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            (gradient,) = torch.autograd.grad(y.sum(), leaf)
            weights = [dequantize_nf4(quantize_nf4(w, 64, double)) for double in (False, True)]
            found.append([y.detach(), gradient, *weights])
    for mine, plain in zip(*found):
        assert mine.shape == plain.shape and torch.equal(mine, plain)


MOVED = pytest.mark.parametrize(("n", "size"), [(4 * TILE, 64), (3 * TILE + 66, 64), (2000, 6)])


@interpreted_only
@MOVED
def test_quantising_moves_each_byte_once(n, size):
    """Beside the weights, codes and constants only fifteen midpoints a program. Lanes that a block
    of 6 leaves idle write nothing, least of all over the next block.
    """
    w = draw(n, torch.float16)
    with Traffic() as traffic:
        packed, absmax = quantize_blocks(w, "nf4", size)
    programs = -(-len(absmax) // tile(size)["BLOCKS"])
    assert traffic.loaded == {"t_values": nbytes(w), "t_midpoints": programs * 15 * 4}
    assert traffic.stored == {"t_packed": nbytes(packed), "t_absmax": nbytes(absmax)}


@interpreted_only
@MOVED
def test_dequantising_moves_each_byte_once(n, size):
    """Beside them the tables, from the cache: a level a lane, a level and a group's constant a
    block, the mean a program.
    """
    packed, absmax = quantize_blocks(draw(n), "nf4", size)
    c, programs = quantize_constants(absmax), -(-len(absmax) // tile(size)["BLOCKS"])
    with Traffic() as traffic:
        out = dequantize_doubled(packed, c.codes, c.absmax, c.offset, n, size, "nf4", torch.float16)
    assert traffic.stored == {"t_out": nbytes(out)}
    assert traffic.loaded["t_packed"] == nbytes(packed)
    assert traffic.loaded["t_absmax"] == nbytes(c.codes) == len(absmax)
    assert traffic.loaded["t_largest"] == 4 * len(absmax)
    assert traffic.loaded["t_offset"] == 4 * programs
    assert traffic.loaded["t_levels"] == 4 * programs * TILE


@interpreted_only
def test_a_weight_may_have_more_than_two_billion_elements():
    """Only the last program runs; where it reads and writes lies past int32."""
    start, rest = 2**31, 70
    n, shape = start + rest, tile(64)
    between, order, levels = tables("nf4", torch.device("cpu"))
    values, out = untouched(n, torch.float16), untouched(n, torch.float16)
    packed = untouched(n // 2, torch.uint8)
    absmax = untouched(-(-n // 64), torch.float32)
    values[start:] = torch.randn(rest)
    end = [t[-size:] for t, size in ((packed, rest // 2), (absmax, 2))]
    with programs_from(start // TILE):
        quantize_kernel[(1,)](
            values, between, order, packed, absmax, n, n // 2, **shape, MIDPOINTS=15, ASCENDING=True
        )
        dequantize_kernel[(1,)](
            packed, absmax, absmax, absmax, levels, levels, out, n, n // 2, **shape, GROUP=0
        )
    with forced("off"):
        expected = defined.quantize_blocks(values[start:], "nf4", 64)
        restored = defined.dequantize_blocks(*expected, rest, 64, "nf4", torch.float16)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(end, expected))
    assert torch.equal(out[start:], restored)


def test_what_the_kernels_do_not_take_goes_to_the_definition():
    """float64 in or out, blocks of more than 4096; and by default nothing is taken that no
    measurement recommends.
    """
    w = draw(70)
    packed, absmax = quantize_blocks(w, "nf4", 64)
    there, back = defined.quantize_blocks.twins[0], defined.dequantize_blocks.twins[0]
    assert {there.module, back.module} == {kernels.__name__}
    assert there.refusal((w.double(), "nf4", 64), {}, "on")
    assert there.refusal((w, "nf4", 8192), {}, "on")
    assert back.refusal((packed, absmax, 70, 64, "nf4", torch.float64), {}, "on")
    assert not back.refusal((packed, absmax, 70, 64, "nf4", torch.float16), {}, "on")
    assert not there.wins(w, "nf4", 64)
