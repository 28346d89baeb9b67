"""The specification of low_rank/lora.py."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import minipeft
from minipeft import LoRA, wrap
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.gpt import GPTConfig
from minipeft.low_rank.lora import (
    LoRALinear,
    linear_with,
    lora_delta,
    lora_forward,
    lora_scale,
    projection_shape,
)
from minipeft.technique import trainable_parameters
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: sums of some dozens of terms around 1


def random_layer(into=7, out=5, rank=3, scale=1.7, dropout=0.0):
    """A LoRALinear in float64, A and B both random; odd sizes, not square."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(into, out).double(), rank, scale, dropout)
    nn.init.normal_(layer.B)
    return layer


def by_loops(x, W, b, A, B, s):
    """W x + b + s B A x for one vector, sum by sum."""
    out, into, rank = W.shape[0], W.shape[1], A.shape[0]
    u = [sum(A[r, i] * x[i] for i in range(into)) for r in range(rank)]
    return torch.stack(
        [
            sum(W[o, i] * x[i] for i in range(into))
            + b[o]
            + s * sum(B[o, r] * u[r] for r in range(rank))
            for o in range(out)
        ]
    )


def test_forward_is_equation_1():
    """(LoRA 1), written as sums over indices."""
    layer, x = random_layer(), torch.randn(2, 3, 7, dtype=torch.float64)
    expected = torch.stack(
        [
            by_loops(row, layer.inner.weight, layer.inner.bias, layer.A, layer.B, 1.7)
            for row in x.flatten(0, 1)
        ]
    ).view(2, 3, 5)
    close(layer(x), expected, EXACT)


@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 5),
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
def test_forward_for_any_shape(into, out, rank, leading):
    x, h = torch.randn(*leading, into).double(), torch.randn(*leading, out).double()
    A, B = torch.randn(rank, into).double(), torch.randn(out, rank).double()
    expected = h + 0.3 * torch.einsum("...i,ri,or->...o", x, A, B)
    close(lora_forward(h, x, A, B, 0.3), expected, EXACT)


def test_forward_takes_strided_input():
    x = torch.randn(7, 4, 3).double().transpose(0, 2)  # (3, 4, 7), not contiguous
    layer = random_layer()
    close(layer(x), layer(x.contiguous()), EXACT)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_the_scale_is_alpha_over_rank(rank):
    """(LoRA 2)"""
    assert lora_scale(6, rank) == 6 / rank
    assert lora_scale(6, rank, rank_stabilized=True) == pytest.approx(6 / rank**0.5, rel=1e-15)
    assert LoRA(rank=rank, alpha=6).scale == 6 / rank
    assert LoRA(rank=rank, alpha=6, rank_stabilized=True).scale == 6 / math.sqrt(rank)


def test_the_attached_layers_carry_the_scale():
    model = LoRA(rank=4, alpha=6, targets=("q", "up")).attach(tiny_model())
    assert wrap.resolve(model, "blocks.1.mlp.up").scale == 1.5


def test_delta_is_equation_3():
    """(LoRA 3)"""
    layer = random_layer()
    expected = 1.7 * torch.einsum("or,ri->oi", layer.B, layer.A)
    close(lora_delta(layer.A, layer.B, 1.7), expected, EXACT)
    close(layer.delta(), expected, EXACT)


def test_merged_and_unmerged_agree():
    """(LoRA 3): W' = W + s B A, and the bias once."""
    layer, x = random_layer(), torch.randn(4, 7, dtype=torch.float64)
    plain = layer.merged(layer.inner)
    assert type(plain) is nn.Linear
    close(plain(x), layer(x), EXACT)
    assert torch.equal(plain.bias, layer.inner.bias)


def test_merging_does_not_touch_the_wrapped_layer():
    layer = random_layer()
    before = layer.inner.weight.clone()
    first, second = layer.merged(layer.inner), layer.merged(layer.inner)
    assert torch.equal(layer.inner.weight, before)
    assert torch.equal(first.weight, second.weight), "merging twice adds the delta twice"


def test_gradients_are_equation_4():
    """(LoRA 4): dB = s g (A x)^T and dA = s B^T g x^T, summed over the rows."""
    layer, x, g = random_layer(), torch.randn(6, 7).double(), torch.randn(6, 5).double()
    (layer(x) * g).sum().backward()
    A, B = layer.A.detach(), layer.B.detach()
    close(layer.B.grad, 1.7 * sum(torch.outer(g[n], A @ x[n]) for n in range(6)), EXACT)
    close(layer.A.grad, 1.7 * sum(torch.outer(B.T @ g[n], x[n]) for n in range(6)), EXACT)


def test_at_the_start_only_B_has_a_gradient():
    """(LoRA 4) at B = 0."""
    layer = random_layer()
    nn.init.zeros_(layer.B)
    layer(torch.randn(4, 7).double()).square().sum().backward()
    assert layer.A.grad.abs().max() == 0
    assert layer.B.grad.abs().max() > 0


def test_A_is_uniform_and_B_is_zero():
    """Of U(-1/sqrt(in), 1/sqrt(in)) the deviation is 1/sqrt(3 in)."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(400, 30), 20, 1.0)
    assert layer.B.abs().max() == 0
    assert layer.A.abs().max() <= 0.05
    assert layer.A.abs().max() > 0.0499  # of 8,000 draws the largest is near the bound
    # The deviation of 8,000 draws errs by about 0.6 %.
    assert layer.A.std().item() == pytest.approx(0.05 / math.sqrt(3), rel=0.03)
    assert abs(layer.A.mean().item()) < 4 * 0.0289 / math.sqrt(8000)


def test_dropout_falls_on_what_A_reads_and_only_in_training():
    layer = random_layer(dropout=0.5)
    x = torch.randn(300, 7, dtype=torch.float64)
    layer.eval()
    calm = layer(x)
    close(calm, random_layer()(x), EXACT)
    layer.train()
    torch.manual_seed(4)
    noisy = layer(x)
    torch.manual_seed(4)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    close(noisy, layer.inner(x) + 1.7 * (x * mask) @ layer.A.T @ layer.B.T, EXACT)
    assert not torch.equal(noisy, calm)


def test_a_shared_A_is_one_parameter():
    model = LoRA(rank=4, targets=("q", "k", "v", "o"), share_qkv=True).attach(tiny_model())
    for block in model.blocks:
        q, k, v, o = block.attn.q, block.attn.k, block.attn.v, block.attn.o
        assert q.A is k.A is v.A
        assert o.A is not q.A
        assert q.B is not k.B
    assert model.blocks[0].attn.q.A is not model.blocks[1].attn.q.A
    names = model.attachments[0].parameters()
    assert sum(name.endswith(".A") for name in names) == 2 * 2


def test_only_the_targets_are_wrapped():
    model = LoRA(rank=2, targets=("k", "down")).attach(tiny_model())
    paths = {s.path for s in model.attachments[0].swaps}
    assert paths == {f"blocks.{n}.{p}" for n in (0, 1) for p in ("attn.k", "mlp.down")}


@given(
    st.sets(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1),
    st.integers(1, 8),
    st.sampled_from([None, 24, 40]),
)
def test_the_count_is_rank_times_in_plus_out(targets, rank, d_ff):
    config = GPTConfig(13, 9, n_layer=2, n_head=2, d_model=16, d_ff=d_ff)
    W = d_ff or 64
    sizes = {"up": 16 + W, "down": 16 + W}
    expected = 2 * sum(rank * sizes.get(t, 32) for t in targets)
    technique = LoRA(rank=rank, targets=tuple(sorted(targets)))
    assert technique.count(config) == expected
    model = technique.attach(tiny_model(config))
    assert sum(p.numel() for p in trainable_parameters(model)) == expected


def test_the_count_with_a_shared_A():
    """r (D + 3 D) for q, k and v of a block, as in peft's c_attn."""
    technique = LoRA(rank=3, targets=("q", "k", "v"), share_qkv=True)
    assert technique.count(CONFIG) == 2 * 3 * (32 + 3 * 32)


def test_patterns_change_single_places():
    """The path counts before the target, rank 0 leaves a place alone."""
    technique = LoRA(
        rank=4,
        alpha=8,
        targets=("q", "v"),
        rank_pattern=(("v", 2), ("q", 1), ("blocks.1.attn.q", 0)),
        alpha_pattern=(("blocks.0.attn.v", 5),),
    )
    model = technique.attach(tiny_model())
    layers = {s.path: s.replacement for s in model.attachments[0].swaps}
    shapes = {path: (layer.A.shape[0], layer.scale) for path, layer in layers.items()}
    assert shapes == {
        "blocks.0.attn.q": (1, 8.0),
        "blocks.0.attn.v": (2, 2.5),
        "blocks.1.attn.v": (2, 4.0),
    }
    assert technique.count(CONFIG) == sum(p.numel() for p in trainable_parameters(model))


def test_projection_shapes_are_those_of_the_model(model):
    for target, place in {"q": "attn.q", "o": "attn.o", "up": "mlp.up", "down": "mlp.down"}.items():
        weight = wrap.resolve(model, f"blocks.0.{place}").weight
        assert projection_shape(CONFIG, target) == tuple(weight.shape)


def test_linear_with_keeps_mode_and_flags():
    like = nn.Linear(3, 2).eval()
    like.weight.requires_grad_(False)
    made = linear_with(like, torch.ones(2, 3), torch.zeros(2))
    assert not made.training
    assert not made.weight.requires_grad and not made.bias.requires_grad
    assert linear_with(like, torch.ones(2, 3), None).bias is None


def test_two_loras_add_up(model, ids):
    """Merged one after the other or both at once: the deltas are summed, none is lost."""
    base = wrap.resolve(model, "blocks.0.attn.q").weight.clone()
    LoRA(rank=2, targets=("q",)).attach(model, name="a")
    randomize(model, seed=1)
    LoRA(rank=3, targets=("q", "v")).attach(model, name="b")
    randomize(model, seed=2)
    outer = wrap.resolve(model, "blocks.0.attn.q")
    total = base + outer.delta() + outer.inner.delta()
    before = model(ids)
    merged = minipeft.merge(model)
    close(merged.blocks[0].attn.q.weight, total, EXACT)
    close(merged(ids), before, EXACT)


def test_modules_have_the_base_s_dtype():
    model = LoRA(rank=2).attach(tiny_model(dtype=torch.bfloat16))
    assert {p.dtype for p in trainable_parameters(model)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0 must be from 1 to 32"),
        ({"rank": 33}, "rank=33 must be from 1 to 32"),
        ({"targets": ("q", "w")}, "unknown target 'w'"),
        ({"targets": "q"}, "give a tuple"),
        ({"targets": ()}, "give a tuple"),
        ({"targets": ("q", "q")}, "names a projection twice"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"share_qkv": True}, "needs q, k and v"),
        ({"rank_pattern": (("up", 2),)}, "'up', which is no place"),
        ({"rank_pattern": (("q", -1),)}, "0 leaves a place alone"),
        ({"rank_pattern": (("q", 99),)}, "from 0 to 32 fits"),
    ],
)
def test_bad_settings_are_named(settings, message, model):
    with pytest.raises(ValueError, match=message):
        replace(LoRA(), **settings).attach(model)
    assert not model.attachments
    assert not any(isinstance(m, wrap.Wrapper) for m in model.modules())


def test_layers_without_heads_or_neurons_get_no_branch(ids):
    """There is nothing to adapt; A of no columns would start in U(-1/0, 1/0)."""
    targets = ("q", "o", "down")
    model = prune_neurons(prune_heads(tiny_model(), {0: range(4)}), {1: range(128)})
    before = model(ids)
    LoRA(rank=2, targets=targets).attach(model)
    assert {s.path for s in model.attachments[0].swaps} == {
        "blocks.0.mlp.down",
        "blocks.1.attn.q",
        "blocks.1.attn.o",
    }
    assert torch.equal(model(ids), before)
    logits = randomize(model)(ids)
    close(minipeft.merge(model)(ids), logits, 1e-12)


@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_on_what_is_inside_are_called(kind):
    """Where a twin could take its weights and pass it by; the result is the same."""
    model = randomize(LoRA(rank=2).attach(tiny_model()))
    wanted = model.loss(tiny_ids(), tiny_ids())
    calls, inner = [], model.blocks[1].attn.v.inner
    getattr(inner, f"register_{kind}")(lambda *_: calls.append(kind))
    found = model.loss(tiny_ids(), tiny_ids())
    found.backward()
    assert calls == [kind]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)  # float64
