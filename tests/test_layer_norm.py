"""The specification of selective/layer_norm.py."""

from __future__ import annotations

import pytest
import torch

from minipeft import LayerNormTuning
from minipeft.gpt import GPTConfig
from minipeft.technique import trainable_parameters
from tests.tiny import close, tiny_model


def test_every_layer_norm_and_nothing_else(model):
    LayerNormTuning().attach(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    norms = [f"blocks.{n}.{ln}" for n in (0, 1) for ln in ("ln_1", "ln_2")] + ["ln_f"]
    assert trained == {f"{norm}.{part}" for norm in norms for part in ("weight", "bias")}


@pytest.mark.parametrize("place", ["ln_1", "ln_2"])
def test_gain_and_bias_move_the_output(model, place):
    """(LayerNorm 1), with mean and deviation written out."""
    norm = getattr(model.blocks[1], place)
    g, c = norm.weight.clone(), norm.bias.clone()
    LayerNormTuning().attach(model)
    dg, dc = torch.randn(2, 32, dtype=torch.float64)
    with torch.no_grad():
        norm.weight += dg
        norm.bias += dc
    x = 3 + torch.randn(4, 32, dtype=torch.float64)
    mean = sum(x[:, i] for i in range(32))[:, None] / 32
    variance = sum((x[:, i] - mean[:, 0]) ** 2 for i in range(32))[:, None] / 32
    close(norm(x), (g + dg) * (x - mean) / (variance + norm.eps).sqrt() + c + dc, 1e-12)


@pytest.mark.parametrize("layers", [1, 3])
def test_the_count_is_4_D_a_block_and_2_D(layers):
    config = GPTConfig(31, 17, n_layer=layers, n_head=2, d_model=14, d_ff=9)
    model = LayerNormTuning().attach(tiny_model(config))
    expected = 4 * 14 * layers + 2 * 14
    assert LayerNormTuning().count(config) == expected
    assert sum(p.numel() for p in trainable_parameters(model)) == expected


def test_the_start_is_the_base(model, ids):
    base = model(ids)
    assert torch.equal(LayerNormTuning().attach(model)(ids), base)


def test_the_originals_are_kept_and_do_not_move(model, ids):
    before = {n: (p, p.detach().clone()) for n, p in model.named_parameters()}
    LayerNormTuning().attach(model)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            parameter.zero_()
    assert all(torch.equal(p, bits) for p, bits in before.values())
