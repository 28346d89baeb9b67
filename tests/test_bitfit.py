"""The specification of selective/bitfit.py."""

from __future__ import annotations

import pytest
import torch

from minipeft import BitFit, PrefixTuning
from minipeft.gpt import GPTConfig
from minipeft.selective.bitfit import FINAL, PLACES
from tests.tiny import CONFIG, close


def trained_names(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def test_all_biases_and_nothing_else(model):
    everything = {n for n, _ in model.named_parameters() if n.endswith("bias")}
    BitFit().attach(model)
    assert trained_names(model) == everything
    assert len(everything) == 2 * 8 + 1


def test_the_papers_small_variant_is_query_and_intermediate(model):
    BitFit(biases=("query", "intermediate")).attach(model)
    places = ("attn.q.bias", "mlp.up.bias")
    assert trained_names(model) == {f"blocks.{n}.{p}" for n in (0, 1) for p in places}


@pytest.mark.parametrize("name", [*PLACES, FINAL])
def test_every_name_chooses_its_own_bias(name, model):
    BitFit(biases=(name,)).attach(model)
    place = PLACES.get(name)
    expected = {"ln_f.bias"} if name == FINAL else {f"blocks.{n}.{place}" for n in (0, 1)}
    assert trained_names(model) == expected
    assert BitFit(biases=(name,)).count(CONFIG) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_a_projection_gets_its_constant(model):
    """(BitFit 1): h = W x + (b + delta)."""
    layer = model.blocks[0].mlp.up
    W, b = layer.weight.clone(), layer.bias.clone()
    BitFit(biases=("intermediate",)).attach(model)
    delta, x = torch.randn(128, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        layer.bias += delta
    close(layer(x), torch.einsum("oi,ni->no", W, x) + b + delta, 1e-12)


def test_a_layer_norm_gets_its_constant(model):
    """(BitFit 2): the gain stays, the shift moves."""
    norm = model.blocks[1].ln_2
    g, c = norm.weight.clone(), norm.bias.clone()
    BitFit(biases=("ln_2",)).attach(model)
    delta, x = torch.randn(32, dtype=torch.float64), torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        norm.bias += delta
    centred = x - x.mean(-1, keepdim=True)
    std = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    close(norm(x), g * centred / std + c + delta, 1e-12)


def test_the_count_is_11_D_a_block_and_D():
    config = GPTConfig(31, 17, n_layer=5, n_head=2, d_model=12)
    assert BitFit().count(config) == 11 * 12 * 5 + 12
    assert BitFit(biases=("query", "intermediate")).count(config) == 5 * 12 * 5
    narrow = GPTConfig(31, 17, n_layer=5, n_head=2, d_model=12, d_ff=7)
    assert BitFit().count(narrow) == (7 * 12 + 7) * 5 + 12


def key_bias_effect(model, ids):
    """How far the logits move when the key's biases do, and the largest gradient they get."""
    model.zero_grad()
    before = model(ids)
    before.square().sum().backward()
    gradient = max(block.attn.k.bias.grad.abs().max().item() for block in model.blocks)
    others = max(block.attn.q.bias.grad.abs().max().item() for block in model.blocks)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.k.bias += torch.randn(32, dtype=torch.float64)
    return (model(ids) - before).abs().max().item(), gradient / others


def test_the_key_bias_changes_nothing(model, ids):
    """q (k + b) = q k + q b: the same number on every score of a query, and softmax ignores it."""
    moved, gradient = key_bias_effect(BitFit().attach(model), ids)
    assert moved < 1e-11  # roundings of the scores, through two layers
    assert gradient < 1e-11


def test_behind_a_prefix_the_key_bias_counts(model, ids):
    """The prefix's keys carry no bias, so it shifts mass between prefix and text."""
    PrefixTuning(prefix_length=3).attach(model, name="prefix")
    moved, gradient = key_bias_effect(BitFit().attach(model, name="biases"), ids)
    assert moved > 1e-6
    assert gradient > 1e-6


@pytest.mark.parametrize(
    ("biases", "message"),
    [
        ("query", 'give "all" or a tuple'),
        ((), 'give "all" or a tuple'),
        (("querry",), "unknown bias 'querry'"),
    ],
)
def test_bad_names_are_named(biases, message, model):
    with pytest.raises(ValueError, match=message):
        BitFit(biases=biases).attach(model)
    assert not model.attachments
