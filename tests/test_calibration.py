"""The specification of minipeft/compressed/calibration.py."""

import dataclasses

import pytest
import torch

from minipeft import LoRA, PromptTuning
from minipeft.compressed.calibration import for_each_projection
from minipeft.dataset import Batch
from minipeft.quantized.qlora import quantize_model
from tests.tiny import CONFIG, tiny_ids, tiny_model


def collect(model, batches, change=None):
    found = {}

    def act(path, linear, G):
        found[path] = G.clone()
        if change is not None:
            change(path, linear)

    for_each_projection(model, batches, act)
    return found


def inputs_of(model, path, ids):
    """What a projection reads, by a hook of the test's own: (tokens, in)."""
    taken = []
    module = model.get_submodule(path)
    handle = module.register_forward_pre_hook(lambda _, args: taken.append(args[0].detach()))
    model(ids)
    handle.remove()
    return taken[0].flatten(0, 1)


def test_it_is_the_sum_of_outer_products_of_the_inputs():
    # (Calibration 1) over two batches
    model, batches = tiny_model(), [tiny_ids(), tiny_ids(2, 7, seed=5)]
    found = collect(model, batches)
    assert len(found) == 12
    for path, G in found.items():
        x = torch.cat([inputs_of(model, path, ids) for ids in batches])
        torch.testing.assert_close(G, x.T @ x, rtol=1e-12, atol=1e-10)  # float64, 47 terms


def test_padding_is_no_text():
    model, ids = tiny_model(), tiny_ids(2, 9)
    lengths = torch.tensor([9, 4])
    padded = collect(model, [Batch(ids, ids, lengths)])
    apart = collect(model, [ids[:1], ids[1:, :4]])
    for path, G in padded.items():
        torch.testing.assert_close(G, apart[path], rtol=1e-12, atol=1e-10)  # other summation order


def test_later_blocks_see_what_the_pruned_blocks_before_give():
    def halve(path, linear):
        linear.weight.mul_(0.5)

    model = tiny_model()
    found = collect(model, [tiny_ids()], halve)  # the model is now the changed one
    for path in ("blocks.0.attn.q", "blocks.1.attn.q", "blocks.1.attn.v"):
        x = inputs_of(model, path, tiny_ids())
        torch.testing.assert_close(found[path], x.T @ x, rtol=1e-12, atol=1e-10)
    first = tiny_model()  # inside a block, everything is taken before anything changes
    x = inputs_of(first, "blocks.0.mlp.down", tiny_ids())
    torch.testing.assert_close(found["blocks.0.mlp.down"], x.T @ x, rtol=1e-12, atol=1e-10)


def test_the_sums_are_float64_for_a_float32_model():
    assert collect(tiny_model(dtype=torch.float32), [tiny_ids()])["blocks.0.mlp.up"].dtype == (
        torch.float64
    )


def test_the_mode_comes_back_and_no_hook_stays():
    model = tiny_model().train()
    collect(model, [tiny_ids()])
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_dropout_is_off_and_the_mode_of_every_module_comes_back():
    noisy = tiny_model(dataclasses.replace(CONFIG, dropout=0.5)).train()
    noisy.blocks[1].eval()
    found, wanted = collect(noisy, [tiny_ids()]), collect(tiny_model(), [tiny_ids()])
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)
    assert noisy.training and noisy.blocks[0].mlp.training and not noisy.blocks[1].mlp.training


def test_the_mode_comes_back_after_an_error_too():
    def fail(path, linear):
        raise RuntimeError("no room")

    model = tiny_model().train()
    with pytest.raises(RuntimeError, match="no room"):
        collect(model, [tiny_ids()], fail)
    assert model.training


def test_no_text_is_an_error():
    nothing = torch.tensor([0, 0, 0])
    for batches in ([], [tiny_ids()[:0]], [Batch(tiny_ids(), tiny_ids(), nothing)]):
        with pytest.raises(ValueError, match="no calibration text"):
            collect(tiny_model(), batches)


def test_a_model_with_techniques_is_refused():
    """A technique changes what projections read, or puts rows in front that are no text."""
    for technique in (LoRA(rank=2), PromptTuning(prompt_length=3)):
        model = technique.attach(tiny_model(), "mine")
        with pytest.raises(ValueError, match=r"mine.*merge or detach"):
            collect(model, [tiny_ids()])


def test_weights_that_are_no_floats_are_refused():
    with pytest.raises(ValueError, match="NF4Linear"):
        collect(quantize_model(tiny_model(dtype=torch.float32)), [tiny_ids()])
