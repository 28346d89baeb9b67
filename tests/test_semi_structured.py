"""The specification of minipeft/compressed/semi_structured.py."""

import copy

import pytest
import torch

from minipeft import LoRA
from minipeft.compressed.magnitude_pruning import keep_pattern, prune_magnitude
from minipeft.compressed.semi_structured import (
    SemiStructuredLinear,
    pack_2_4,
    pack_model,
    packed_bytes,
    torch_sparse,
    unpack_2_4,
)
from tests.tiny import tiny_ids, tiny_model


def weight_2_4(out=7, into=24, dtype=torch.float64):
    generator = torch.Generator().manual_seed(6)
    w = torch.randn(out, into, generator=generator, dtype=dtype)
    return w * keep_pattern(w.abs(), 2, 4)


def test_a_row_by_hand():
    # (Semi 1) (Semi 2): places 1,3 and 0,2: 1 + 4*3 + 16*0 + 64*2
    values, indices = pack_2_4(torch.tensor([[0.0, 5, 0, 6, 7, 0, 8, 0]]))
    assert values.tolist() == [[5, 6, 7, 8]]
    assert indices.tolist() == [[1 + 4 * 3 + 16 * 0 + 64 * 2]] and indices.dtype == torch.uint8


def test_a_group_with_three_zeros_or_four_is_stored_too():
    w = torch.tensor([[0.0, 0, 0, 9, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 4, 0]])
    assert torch.equal(unpack_2_4(*pack_2_4(w)), w)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_packing_and_unpacking_is_the_same_bits(dtype):
    w = weight_2_4(dtype=dtype)
    values, indices = pack_2_4(w)
    assert values.shape == (7, 12) and indices.shape == (7, 3)
    assert torch.equal(unpack_2_4(values, indices), w)


def test_the_bytes_are_the_formula_s():
    # (Semi 3)
    w = weight_2_4(8, 64, torch.float16)
    size = sum(t.numel() * t.element_size() for t in pack_2_4(w))
    assert size == packed_bytes(w.shape, 2) == 0.5625 * w.numel() * 2


def test_what_is_not_two_of_four_is_refused_with_its_place():
    w = weight_2_4()
    w[3, 4:8] = torch.tensor([1.0, 2, 3, 0])
    with pytest.raises(ValueError, match=r"row 3 .* columns 4 to 7"):
        pack_2_4(w)
    with pytest.raises(ValueError, match="rows of 12"):
        pack_2_4(torch.zeros(2, 12))


def test_the_linear_computes_what_the_dense_one_does():
    linear = torch.nn.Linear(24, 7).double()
    linear.weight.data = weight_2_4()
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    packed = SemiStructuredLinear(linear)
    assert torch.equal(packed(x), linear(x))
    held = sum(b.numel() * b.element_size() for b in (packed.values, packed.indices))
    assert held == packed_bytes((7, 24), 8) and not list(packed.parameters())


def test_a_whole_model_is_packed_or_none_of_it():
    model = prune_magnitude(tiny_model(), pattern=(2, 4))
    expected = model(tiny_ids())
    assert torch.equal(pack_model(copy.deepcopy(model))(tiny_ids()), expected)
    model.blocks[1].mlp.up.weight.data.fill_(1)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up: row 0"):
        pack_model(model)
    assert type(model.blocks[0].attn.q) is torch.nn.Linear


def test_a_model_with_techniques_is_refused():
    """Packing replaces modules, and what is wrapped around them would be lost."""
    model = LoRA(rank=2).attach(prune_magnitude(tiny_model(), pattern=(2, 4)), "mine")
    with pytest.raises(ValueError, match="mine"):
        pack_model(model)
    adapted = LoRA(rank=2).attach(pack_model(prune_magnitude(tiny_model(), pattern=(2, 4))))
    assert torch.equal(adapted(tiny_ids()), model(tiny_ids()))


def test_without_the_kernel_the_reason_is_given():
    linear = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match="row 0 has more than 2 nonzeros"):
        torch_sparse(linear)  # torch would take it, and drop numbers
    linear.weight.data = weight_2_4(8, 8, torch.float32)
    with pytest.raises(ValueError, match="runs on CUDA; this weight is on cpu"):
        torch_sparse(linear)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0),
    reason="needs a GPU with sparse tensor cores",
)
def test_the_gpu_s_kernel_computes_the_same():
    linear = torch.nn.Linear(128, 256, device="cuda", dtype=torch.float16)
    w = weight_2_4(256, 128, torch.float32)
    linear.weight.data = w.to(linear.weight)
    x = torch.randn(64, 128, device="cuda", dtype=torch.float16)
    fast = torch_sparse(SemiStructuredLinear(linear))
    # float16 sums of 64 products of order 1: 11 bits
    torch.testing.assert_close(fast(x), linear(x), rtol=1e-2, atol=2e-2)
    with pytest.raises(ValueError, match="float32"):
        torch_sparse(linear.float())
