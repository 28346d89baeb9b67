"""The specification of minipeft/kernels/semi_structured.py; test_twins.py holds it against its
definitions in all dtypes and layouts.
"""

import itertools

import pytest
import torch
from torch import nn

from minipeft.compressed import semi_structured as defined
from minipeft.compressed.semi_structured import SemiStructuredLinear
from minipeft.dispatch import forced
from minipeft.kernels.semi_structured import (
    BYTES,
    pack_2_4,
    pack_kernel,
    sparse,
    unpack_2_4,
    unpack_kernel,
)
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    interpreted_only,
    nbytes,
    programs_from,
    untouched,
)

BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


def draw(*shape, dtype=torch.float32):
    return sparse(shape, torch.Generator().manual_seed(1)).to(DEVICE, dtype)


@pytest.mark.parametrize("second", [False, True])
def test_every_pattern_of_a_group(second):
    """All eleven groups with at most two nonzeros, as the first and as the second of a byte: what
    stays is the nonzeros, filled up with the first zeros, in order.
    """
    for kept in itertools.chain(*(itertools.combinations(range(4), n) for n in (0, 1, 2))):
        weight = torch.zeros(1, 8)
        for place in kept:
            weight[0, 4 * second + place] = place - 7.5
        values, indices = pack_2_4(weight.to(DEVICE))
        fill = [place for place in range(4) if place not in kept]
        i, j = sorted([*kept, *fill][:2])
        byte = (i + 4 * j) * 16 + (0 + 4 * 1) if second else (i + 4 * j) + 16 * (0 + 4 * 1)
        assert indices.tolist() == [[byte]]
        group = weight[0, 4 * second :][:4]
        assert values[0, 2 * second :][:2].tolist() == [group[i], group[j]]
        assert torch.equal(unpack_2_4(values, indices).cpu(), weight)


@pytest.mark.parametrize("dtype", list(BITS))
@pytest.mark.parametrize(
    "shape", [(1, 8), (3, 8 * (BYTES // 3)), (1, 8 * BYTES), (2, 8 * BYTES + 8)]
)
def test_bits_are_the_definition_s(shape, dtype):
    """The sign of a zero that is kept included, and numbers so small that half of them is 0."""
    weight = draw(*shape, dtype=dtype)
    weight[0, :4] = torch.tensor([0.0, torch.finfo(dtype).smallest_normal, -0.0, 0.0])
    if dtype == torch.float32:
        weight[0, 4:8] = torch.tensor([1e-45, 0.0, -0.0, -1e-45])
    with forced("off"):
        expected = defined.pack_2_4(weight)
        dense = defined.unpack_2_4(*expected)
    values, indices = pack_2_4(weight)
    assert torch.equal(indices, expected[1])
    assert torch.equal(values.view(BITS[dtype]), expected[0].view(BITS[dtype]))
    assert torch.equal(unpack_2_4(values, indices).view(BITS[dtype]), dense.view(BITS[dtype]))


@pytest.mark.parametrize("places", [[(0, 1)], [(1, 500), (0, 3)], [(2, 0), (1, 511), (2, 513)]])
def test_the_first_group_that_is_too_full_is_named(places):
    """Whichever program meets one first, in whichever group of a byte."""
    weight = draw(3, 2 * 4 * BYTES)
    for row, group in places:
        weight[row, 4 * group : 4 * group + 3] = 1.0
    row, group = min(places)
    message = f"row {row} has more than 2 nonzeros in columns {4 * group} to {4 * group + 3}"
    for function in (pack_2_4, defined.pack_2_4.twin.definition):
        with pytest.raises(ValueError, match=message):
            function(weight)


def test_a_row_that_is_no_multiple_of_8_goes_to_the_definition_s_error():
    with pytest.raises(ValueError, match="needs a multiple of 8"):
        defined.pack_2_4(torch.zeros(2, 12, device=DEVICE))


def test_a_gradient_goes_through_the_definition():
    values, indices = pack_2_4(draw(2, 16))
    for tensor, function, rest in ((draw(2, 16), defined.pack_2_4, ()),
                                   (values, defined.unpack_2_4, (indices,))):  # fmt: skip
        wanting = tensor.clone().requires_grad_()
        assert function.twin.refusal((wanting, *rest), {}, "on")
        assert not function.twin.refusal((tensor, *rest), {}, "on")
        with torch.no_grad():
            assert not function.twin.refusal((wanting, *rest), {}, "on")
        result = function(wanting, *rest)
        assert (result[0] if isinstance(result, tuple) else result).requires_grad


def test_the_layer_uses_it_and_agrees():
    linear, x, found = nn.Linear(40, 3, device=DEVICE), torch.randn(5, 40, device=DEVICE), []
    linear.weight.data = draw(3, 40)
    for choice in ("on", "off"):
        with forced(choice), torch.no_grad():
            found.append(SemiStructuredLinear(linear)(x))
    assert torch.equal(*found)


@interpreted_only
@pytest.mark.parametrize("rows", [2, 5])
def test_each_byte_moves_once(rows):
    """Both ways; where a group is too full, one number more a program."""
    weight = draw(rows, 8 * BYTES - 8, dtype=torch.float16)
    with Traffic() as there:
        values, indices = pack_2_4(weight)
    with Traffic() as back:
        unpack_2_4(values, indices)
    packed = nbytes(values, indices)
    assert (sum(there.loaded.values()), sum(there.stored.values())) == (nbytes(weight), packed)
    assert (sum(back.loaded.values()), sum(back.stored.values())) == (packed, nbytes(weight))


@interpreted_only
def test_a_weight_may_have_more_than_two_billion_elements():
    """Only the program of the last row runs; where it reads and writes lies past int32."""
    rows, columns = 2**31 // (8 * BYTES) + 1, 8 * BYTES
    weight = untouched(rows * columns, torch.float16).view(rows, columns)
    dense = untouched(rows * columns, torch.float16)
    values = untouched(rows * columns // 2, torch.float16)
    indices = untouched(rows * columns // 8, torch.uint8)
    bad = torch.full((1,), 2**62)
    weight[-1] = draw(1, columns)[0].half()
    with programs_from(rows - 1):
        pack_kernel[(1,)](
            weight, values, indices, bad, len(indices), BYTES, columns, 1, BYTES=BYTES
        )
        unpack_kernel[(1,)](values, indices, dense, len(indices), BYTES=BYTES)
    assert torch.equal(dense[-columns:], weight[-1]) and weight[-1].any() and bad == 2**62
