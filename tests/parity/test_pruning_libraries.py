"""Pruning against torch's own masks and transformers' own removal of heads."""

import copy

import pytest
import torch
from torch.nn.utils import prune as torch_prune
from transformers import GPT2LMHeadModel
from transformers.pytorch_utils import prune_conv1d_layer

from minipeft import prune_heads, prune_neurons
from minipeft.compressed.magnitude_pruning import projections, prune_magnitude
from tests.tiny import tiny_ids, tiny_model


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_masks_are_torch_s_own_per_matrix_and_over_all(sparsity):
    for scope in ("layer", "global"):
        mine, other = tiny_model(), tiny_model()
        prune_magnitude(mine, sparsity, scope)
        theirs = [(linear, "weight") for linear in projections(other).values()]
        count = int(sparsity * sum(linear.weight.numel() for linear, _ in theirs))
        if scope == "layer":
            for linear, _ in theirs:
                torch_prune.l1_unstructured(
                    linear, "weight", amount=int(sparsity * linear.weight.numel())
                )
        else:
            torch_prune.global_unstructured(
                theirs, pruning_method=torch_prune.L1Unstructured, amount=count
            )
        for a, (b, _) in zip(projections(mine).values(), theirs):
            assert torch.equal(a.weight, b.weight)


def test_heads_and_neurons_are_transformers_own(tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    peer = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    before = peer(tiny_ids()).logits.detach()
    heads, gone = {0: [2], 1: [0, 3]}, [1, 5, 64]
    keep = torch.tensor([n for n in range(128) if n not in gone])
    peer.prune_heads(copy.deepcopy(heads))
    mlp = peer.transformer.h[1].mlp
    mlp.c_fc = prune_conv1d_layer(mlp.c_fc, keep, dim=1)
    mlp.c_proj = prune_conv1d_layer(mlp.c_proj, keep, dim=0)
    prune_neurons(prune_heads(model, heads), {1: gone})
    theirs = peer(tiny_ids()).logits
    assert not torch.allclose(theirs, before, atol=1e-2)
    # float32, another order of summation, logits up to 10
    torch.testing.assert_close(model(tiny_ids()), theirs, rtol=0, atol=1e-5)
