"""Four-bit storage: levels, blocks, packing, double quantisation, and what it costs in bits."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from minipeft.dispatch import forced
from minipeft.quantized import nf4, nf4_tables
from minipeft.quantized.nf4 import (
    FP4_CODEBOOK,
    INT4_CODEBOOK,
    NF4_CODEBOOK,
    dequantize_nf4,
    dynamic_map,
    quantize_fp4,
    quantize_int4,
    quantize_nf4,
    show_work,
)

PUBLISHED = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
QUANTIZERS = {"nf4": quantize_nf4, "fp4": quantize_fp4, "int4": quantize_int4}
SHAPES = [(64, 64), (7, 47), (1, 1), (1,), (130,), (3, 5, 7), (96, 48), (5, 64), (2, 33)]


@pytest.fixture(autouse=True, params=["off", "on"], ids=["as defined", "by tables"])
def path(request):
    """Everything here holds for the definitions and for their twins."""
    with forced(request.param):
        yield request.param


def normal(*shape, seed=0, dtype=torch.float32):
    """Weights whose size differs from row to row, as it does in models."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return (weight * torch.linspace(0.1, 3, shape[0]).view(-1, *[1] * (len(shape) - 1))).to(dtype)


def by_definition(weight, block_size=64, levels=PUBLISHED):
    """(codes, absmax, restored) of every weight, in Python floats, from the equations."""
    flat = weight.double().flatten().tolist()
    codes, constants, restored = [], [], []
    for first in range(0, len(flat), block_size):
        block = flat[first : first + block_size]
        c = max(abs(w) for w in block)
        constants.append(c)
        for w in block:
            distances = [abs(w - c * level) for level in levels]
            codes.append(distances.index(min(distances)))
            restored.append(c * levels[codes[-1]])
    return codes, constants, torch.tensor(restored, dtype=torch.float64).view(weight.shape)


def unpacked(quantized):
    """Codes, one an element, from the packed bytes."""
    codes = []
    for byte in quantized.packed.flatten().tolist():
        codes += [byte // 16, byte % 16]
    return codes[: quantized.numel]


# -- levels


def test_the_codebook_is_the_published_one():
    """(NF4 1) To the bit, so codes are equal too."""
    assert NF4_CODEBOOK.dtype == torch.float32
    assert NF4_CODEBOOK.tolist() == torch.tensor(PUBLISHED).tolist()


def test_the_codebook_is_normal_quantiles():
    """(NF4 1) with an inverse of the normal distribution that is not torch's."""
    inverse = statistics.NormalDist().inv_cdf
    p = 0.9677083
    positive = [inverse(p + (0.5 - p) * i / 8) for i in range(8)]
    negative = [-inverse(p + (0.5 - p) * i / 7) for i in range(7)]
    levels = sorted([*positive, 0.0, *negative])
    for level, expected in zip(NF4_CODEBOOK.tolist(), levels, strict=True):
        # the published table was rounded to float32 on the way: up to 1.1e-7
        assert abs(level - expected / max(levels)) < 1.2e-7


def test_fp4_is_a_four_bit_float():
    """Sign, two bits of exponent, one of mantissa; the largest is 12 of its units."""
    magnitudes = {0.0, 0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0}
    assert {round(abs(v) * 12, 4) for v in FP4_CODEBOOK.tolist()} == magnitudes
    assert torch.equal(FP4_CODEBOOK[:8], -FP4_CODEBOOK[8:])


def test_int4_is_equally_spaced():
    assert INT4_CODEBOOK.tolist() == pytest.approx([k / 7 for k in range(-7, 8)])


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_map_has_seven_decades(signed):
    levels = dynamic_map(signed).tolist()
    assert len(set(levels)) == 256 and levels == sorted(levels)
    assert 0.0 in levels and levels[-1] == 1.0
    assert sum(v < 0 for v in levels) == (127 if signed else 0)
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        inside = [v for v in levels if low < v < high]
        parts = 2 ** (decade + (not signed))
        expected = [low + (high - low) * (i + 0.5) / parts for i in range(parts)]
        assert inside == pytest.approx(expected, rel=1e-6)  # float32


# -- there and back


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("block_size", [64, 32, 6])
def test_codes_constants_and_values_follow_the_definition(shape, block_size):
    """(NF4 2) (NF4 3) (NF4 5) at shapes whose last block is short, and rows that share blocks."""
    weight = normal(*shape)
    quantized = quantize_nf4(weight, block_size)
    codes, constants, restored = by_definition(weight, block_size)
    assert unpacked(quantized) == codes
    assert quantized.absmax.tolist() == torch.tensor(constants).tolist()
    assert quantized.packed.shape == (-(-weight.numel() // 2), 1)
    # one rounding of a float32 product
    torch.testing.assert_close(dequantize_nf4(quantized).double(), restored, rtol=6e-8, atol=0)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_kind_takes_the_nearest_of_its_levels(kind):
    weight = normal(9, 71)
    restored = dequantize_nf4(QUANTIZERS[kind](weight))
    levels = nf4.CODEBOOKS[kind].tolist()
    _, _, expected = by_definition(weight, levels=levels)
    torch.testing.assert_close(restored.double(), expected, rtol=6e-8, atol=0)


def test_the_even_element_is_in_the_high_half():
    """(NF4 4) 1 has code 15, -1 code 0, 0 code 7."""
    assert quantize_nf4(torch.tensor([1.0, -1.0, 0.0, 1.0])).packed.tolist() == [[0xF0], [0x7F]]


def test_an_odd_last_element_is_followed_by_the_code_of_zero():
    assert quantize_nf4(torch.tensor([-1.0, 1.0, 1.0])).packed.tolist() == [[0x0F], [0xF7]]


def test_at_a_midpoint_the_lower_level_is_taken():
    """(NF4 3) counts midpoints strictly below."""
    midpoints = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
    weight = torch.cat([midpoints, torch.tensor([1.0])])
    assert unpacked(quantize_nf4(weight)) == [*range(15), 15]


def test_blocks_run_over_the_ends_of_rows():
    """(NF4 2) Two rows of 48: the second block begins 16 columns into the second row."""
    weight = torch.full((2, 48), 0.5)
    weight[0, 0], weight[1, 16] = 4.0, 8.0
    assert quantize_nf4(weight).absmax.tolist() == [4.0, 8.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_dtype_is_quantised_in_float32_and_comes_back(dtype):
    weight = normal(5, 100, dtype=dtype)
    quantized = quantize_nf4(weight)
    same = quantize_nf4(weight.float())
    assert quantized.dtype == dtype and quantized.absmax.dtype == torch.float32
    assert torch.equal(quantized.packed, same.packed) and torch.equal(quantized.absmax, same.absmax)
    restored = dequantize_nf4(quantized)
    assert restored.dtype == dtype
    assert torch.equal(restored, dequantize_nf4(same).to(dtype))  # rounded once, at the end
    assert torch.equal(dequantize_nf4(same, dtype), restored)


def test_the_default_dtype_is_no_matter():
    """What is stored, and what values are made of, is float32 whatever torch makes of itself."""
    weight = normal(5, 100, dtype=torch.bfloat16)
    wanted = quantize_nf4(weight)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = quantize_nf4(weight)
        restored = dequantize_nf4(found)
    finally:
        torch.set_default_dtype(default)
    assert found.absmax.dtype == torch.float32 and torch.equal(found.absmax, wanted.absmax)
    assert torch.equal(restored, dequantize_nf4(wanted))


def test_strided_weights_are_read_in_row_major_order():
    weight = normal(40, 6).T
    assert torch.equal(quantize_nf4(weight).packed, quantize_nf4(weight.contiguous()).packed)


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_many_tiles_give_what_one_gives(kind, monkeypatch):
    """Every tile's edge falls on a block's and on a byte's."""
    weight = normal(31, 67)
    for double_quant in (False, True):
        whole = QUANTIZERS[kind](weight, 32, double_quant)
        monkeypatch.setattr(nf4_tables, "CPU_TILE", 100)
        tiled = QUANTIZERS[kind](weight, 32, double_quant)
        assert torch.equal(tiled.packed, whole.packed)
        assert torch.equal(tiled.constants, whole.constants)
        assert torch.equal(
            dequantize_nf4(tiled), show_work(weight, 32, double_quant, kind).restored
        )
        monkeypatch.undo()


def test_constant_blocks_and_zero_blocks_are_exact():
    weight = torch.cat([torch.zeros(64), torch.full((64,), -0.3), torch.full((5,), 1e-30)])
    quantized = quantize_nf4(weight)
    assert torch.equal(dequantize_nf4(quantized), weight)
    assert quantized.absmax.tolist() == weight[[0, 64, 128]].abs().tolist()
    assert unpacked(quantized)[:64] == [7] * 64  # the code of zero, and not of -1 times zero


def test_tiny_blocks_are_numbers():
    """Below 1e-38 a reciprocal would be infinite, and zero times it is not a number."""
    weight = torch.tensor([0.0, 1e-44, -1e-44] * 30)
    restored = dequantize_nf4(quantize_nf4(weight, double_quant=True))
    assert restored.isfinite().all() and restored.abs().max() <= 1e-44


def test_quantising_what_was_dequantised_changes_nothing():
    for block_size in (64, 18):
        first = quantize_nf4(normal(23, 50), block_size)
        again = quantize_nf4(dequantize_nf4(first), block_size)
        assert torch.equal(first.packed, again.packed) and torch.equal(first.absmax, again.absmax)


def test_the_error_is_at_most_half_the_widest_gap():
    weight = normal(64, 640)
    error = (dequantize_nf4(quantize_nf4(weight)) - weight).abs().view(-1, 64)
    gap = (1 - 0.6961928009986877) / 2  # 0.15190
    share = (error / weight.abs().view(-1, 64).amax(1, keepdim=True)).max().item()
    assert gap - 1e-3 < share <= gap + 1e-6  # 40,960 weights come close to it; float32


def test_the_error_on_normal_weights():
    """Root mean square 0.0920 and mean 0.0728 of the standard deviation (blocks of 64)."""
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(1))
    error = dequantize_nf4(quantize_nf4(weight)) - weight
    # a million weights: the spread of both figures over seeds is 7e-5
    assert error.square().mean().sqrt().item() == pytest.approx(0.0920, abs=5e-4)
    assert error.abs().mean().item() == pytest.approx(0.07280, abs=5e-4)
    twice = dequantize_nf4(quantize_nf4(weight, double_quant=True)) - weight
    assert twice.square().mean().sqrt().item() == pytest.approx(0.0920, abs=5e-4)


def test_nf4_beats_its_neighbours_on_normal_weights():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(2))
    errors = {
        kind: (dequantize_nf4(quantizer(weight)) - weight).square().mean().item()
        for kind, quantizer in QUANTIZERS.items()
    }
    assert errors["nf4"] < errors["int4"] < errors["fp4"]


# -- double quantisation


def test_double_quantisation_follows_the_definition():
    """(NF4 6) in float64: the mean off, groups of 256, the nearest of 256 levels, the mean on."""
    weight = normal(300, 64)  # 300 constants: a whole group and a short one
    absmax = quantize_nf4(weight).absmax.double()
    double = quantize_nf4(weight, double_quant=True).absmax
    mean = absmax.mean()
    assert double.offset.item() == pytest.approx(mean.item(), rel=1e-6)
    assert double.codes.dtype == torch.uint8 and double.codes.shape == (300,)
    levels, expected = dynamic_map().double(), []
    for group in (absmax - mean).split(256):
        largest = group.abs().max()
        nearest = ((group / largest)[:, None] - levels).abs().argmin(1)
        expected.append(levels[nearest] * largest + mean)
    restored = quantize_nf4(weight, double_quant=True).constants
    # float32, on numbers from 0.3 to 11, whose mean was taken off and put back
    torch.testing.assert_close(restored.double(), torch.cat(expected), rtol=1e-5, atol=0)


def test_a_group_s_constant_is_the_largest_deviation_on_either_side():
    """(NF4 6) One constant far below the others: C_g is its distance from the mean."""
    weight = torch.ones(9, 64)
    weight[4] = 0.1
    double = quantize_nf4(weight, double_quant=True).absmax
    assert double.absmax.tolist() == pytest.approx([8.1 / 9 - 0.1], rel=1e-6)  # float32


def test_double_quantised_values_use_the_restored_constants():
    weight = normal(37, 64)
    single, double = quantize_nf4(weight), quantize_nf4(weight, double_quant=True)
    assert torch.equal(single.packed, double.packed)
    levels = NF4_CODEBOOK[torch.tensor(unpacked(double))].view(-1, 64)
    assert torch.equal(dequantize_nf4(double), (levels * double.constants[:, None]).view(37, 64))
    error = ((double.constants - single.absmax) / single.absmax).abs()
    assert 0 < error.max() < 0.5  # the smallest of constants that differ thirtyfold
    assert error.median() < 0.02


def test_equal_constants_survive_double_quantisation():
    weight = torch.full((4, 64), 0.7)
    assert torch.equal(dequantize_nf4(quantize_nf4(weight, double_quant=True)), weight)


# -- bits


@pytest.mark.parametrize(("double_quant", "bits"), [(False, 4.5), (True, 4.126953125)])
def test_bits_a_parameter_are_exact(double_quant, bits):
    """(NF4 7)"""
    quantized = quantize_nf4(torch.ones(256, 64 * 256), double_quant=double_quant)
    assert quantized.bits_per_parameter == bits
    assert bits == 4 + (8 / 64 + 32 / (64 * 256) if double_quant else 32 / 64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
def test_bits_and_bytes_count_what_is_stored(shape, double_quant):
    """(NF4 7) for shapes with short blocks and odd ends."""
    quantized = quantize_nf4(normal(*shape), 32, double_quant)
    n, blocks = math.prod(shape), math.ceil(math.prod(shape) / 32)
    constants = blocks + 4 * math.ceil(blocks / 256) if double_quant else 4 * blocks
    assert quantized.bits_per_parameter == 8 * (math.ceil(n / 2) + constants) / n
    stored = [quantized.packed]
    parts = quantized.absmax
    stored += [parts.codes, parts.absmax, parts.offset] if double_quant else [parts]
    assert quantized.nbytes == sum(t.numel() * t.element_size() for t in stored)


# -- the slow twin


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("kind", QUANTIZERS)
def test_show_work_shows_what_quantize_does(kind, double_quant):
    weight = normal(11, 45)
    work = show_work(weight, 32, double_quant, kind)
    quantized = QUANTIZERS[kind](weight, 32, double_quant)
    assert torch.equal(work.quantized.packed, quantized.packed)
    assert torch.equal(work.constants, quantized.constants)
    assert torch.equal(work.restored, dequantize_nf4(quantized))
    assert torch.equal(work.error, work.restored - weight)
    assert work.blocks.shape == work.scaled.shape == work.codes.shape == (16, 32)
    assert work.scaled.abs().amax(1).allclose(torch.ones(16))
    assert torch.equal(work.absmax, work.blocks.abs().amax(1))
    assert len(work.midpoints) == len(nf4.CODEBOOKS[kind]) - 1


# -- refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("function", [quantize_nf4, show_work])
def test_what_is_not_a_number_is_named(bad, function):
    weight = normal(3, 70)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match=rf"\(1, 2\) is {bad}"):
        function(weight)


def test_a_float64_beyond_float32_is_named():
    with pytest.raises(ValueError, match="1e\\+300"):
        quantize_nf4(torch.tensor([1e300], dtype=torch.float64))


@pytest.mark.parametrize("block_size", [0, 7, -2, 2.0, "64"])
def test_a_bad_block_size_is_named(block_size):
    with pytest.raises(ValueError, match=f"block_size={block_size!r}"):
        quantize_nf4(torch.ones(4), block_size)


def test_tensors_without_floats_are_refused():
    with pytest.raises(ValueError, match="int64"):
        quantize_nf4(torch.arange(4))
    with pytest.raises(ValueError, match=r"\(0, 3\)"):
        quantize_nf4(torch.ones(0, 3))
    with pytest.raises(ValueError, match="nf5"):
        nf4.quantize(torch.ones(3), "nf5")


def test_shapes_alone_work_on_the_meta_device():
    quantized = quantize_nf4(torch.empty(300, 70, device="meta"), double_quant=True)
    assert quantized.packed.shape == (300 * 70 // 2, 1)
    assert dequantize_nf4(quantized).shape == (300, 70)


def test_gradients_do_not_pass():
    weight = torch.ones(3, 4, requires_grad=True)
    assert not dequantize_nf4(quantize_nf4(weight)).requires_grad
