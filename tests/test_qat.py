"""The specification of minipeft/quantized/qat.py; torch.fake_quantize is the oracle."""

import copy
import math

import pytest
import torch

import minipeft
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.quantized.gptq import dequantize_group, round_to_nearest
from minipeft.quantized.qat import QAT, fake_quantize, first_scale, limits
from minipeft.technique import trainable_parameters
from tests.tiny import CONFIG, tiny_ids, tiny_model


def gradients(function, *inputs):
    """(output, gradients of its product with fixed noise)"""
    inputs = [i.detach().clone().requires_grad_() for i in inputs]
    y = function(*inputs)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    (y * noise).sum().backward()
    return y, *[i.grad for i in inputs]


def values():
    """Values in and beyond the grid, ties and the very edges among them, always the same."""
    edges = torch.arange(-12, 12, 0.5) * 0.25
    noise = torch.randn(500, generator=torch.Generator().manual_seed(4))
    return torch.cat([noise, edges]).view(-1, 4)


@pytest.mark.parametrize("zero", [0, 3, -5])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scale", [0.25, 0.037])
def test_value_and_gradient_are_torch_s_bitwise(bits, zero, scale):
    """(QAT 1) (QAT 2)"""
    low, high = limits(bits)
    zero = max(low, min(high, zero))
    mine = gradients(lambda w: fake_quantize(w, torch.tensor(scale), zero, low, high), values())
    theirs = gradients(
        lambda w: torch.fake_quantize_per_tensor_affine(w, scale, zero, low, high), values()
    )
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])
    assert (mine[1] == 0).sum() > 0 or bits == 8


def test_a_scale_a_row_is_torch_s_per_channel():
    w, scale = values(), torch.rand(len(values())) * 0.3 + 0.05
    zeros = torch.zeros(len(w), dtype=torch.int32)
    mine = gradients(lambda w: fake_quantize(w, scale[:, None]), w)
    theirs = gradients(
        lambda w: torch.fake_quantize_per_channel_affine(w, scale, zeros, 0, -8, 7), w
    )
    assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.parametrize("zero", [0, 2])
def test_the_scale_s_gradient_is_torch_s_learnable_one(zero):
    """(QAT 3) Theirs takes the factor 1 / sqrt(n high) as an argument."""
    w, scale = values(), torch.tensor([0.11])
    factor = 1 / math.sqrt(w.numel() * 7)
    mine = gradients(lambda w, s: fake_quantize(w, s, zero, -8, 7), w, scale)
    theirs = gradients(
        lambda w, s: torch._fake_quantize_learnable_per_tensor_affine(
            w, s, torch.tensor([float(zero)]), -8, 7, factor
        ),
        w,
        scale,
    )
    for a, b in zip(mine, theirs):
        # sums of 548 values of order one in float32
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_scale_s_gradient_is_the_formula():
    """(QAT 3), written out for each weight of a row, float64."""
    w = torch.randn(3, 19, dtype=torch.float64)
    s = torch.tensor([[0.2], [0.4], [0.05]], dtype=torch.float64)
    _, dw, ds = gradients(lambda w, s: fake_quantize(w, s, 1, -4, 3), w, s)
    g = torch.randn(3, 19, generator=torch.Generator().manual_seed(3)).double()
    for i in range(3):
        total = 0.0
        for j in range(19):
            u = w[i, j].item() / s[i].item()
            k = round(u) + 1
            inside = -4 <= k <= 3
            assert dw[i, j] == (g[i, j] if inside else 0)
            part = round(u) - u if inside else (3 if k > 3 else -4) - 1
            total += g[i, j].item() * part
        # 19 roundings
        assert ds[i].item() == pytest.approx(total / math.sqrt(19 * 3), abs=1e-13)


def test_the_grid_of_a_symmetric_code():
    """(QAT 4)"""
    assert limits(4) == (-8, 7) and limits(2) == (-2, 1)
    w = torch.tensor([[1.0, -3.0, 2.0], [0.0, 0.0, 0.0]])
    start = first_scale(w, 7)
    assert start[0].item() == pytest.approx(2 * 2 / math.sqrt(7), rel=1e-6) and start[1] > 0


@pytest.mark.parametrize(("zero", "low", "high"), [(8, -8, 7), (0, 1, 7), (2, 2, 2)])
def test_an_empty_grid_is_an_error(zero, low, high):
    with pytest.raises(ValueError, match=f"zero={zero}"):
        fake_quantize(torch.ones(2), torch.tensor(1.0), zero, low, high)


# -- the technique


def rounded_by_hand(weight, bits, group, learn_scale):
    """A fresh layer's weight, the formula written again. (QAT 1) (QAT 4)"""
    high = 2 ** (bits - 1) - 1
    out = []
    for row in weight.tolist():
        for start in range(0, len(row), group):
            part = row[start : start + group]
            size = [abs(v) for v in part]
            s = 2 * sum(size) / group / math.sqrt(high) if learn_scale else max(size) / high
            out += [s * min(high, max(-high - 1, round(v / s))) for v in part]
    return torch.tensor(out, dtype=torch.float64).view(weight.shape)


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize(("bits", "group"), [(2, None), (4, 8), (8, 16)])
def test_it_starts_as_the_rounded_base(model, bits, group, learn_scale):
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks:
        for linear in (block.attn.q, block.mlp.down):
            size = group or linear.in_features
            linear.weight.data = rounded_by_hand(linear.weight, bits, size, learn_scale)
    QAT(bits, group, ("q", "down"), learn_scale).attach(model)
    # a tie that is seen differently would be off by 1e-2
    torch.testing.assert_close(model(tiny_ids()), by_hand(tiny_ids()), rtol=0, atol=1e-10)


def test_at_eight_bits_and_more_it_comes_near_the_base(model):
    before = model(tiny_ids())
    error = []
    for bits in (4, 6, 8):
        QAT(bits, learn_scale=False).attach(model)
        error.append((model(tiny_ids()) - before).square().mean().sqrt().item())
        minipeft.detach(model)
    assert error[0] > 2.5 * error[1] > 6.25 * error[2]  # a quarter of the step


@pytest.mark.parametrize("learn_scale", [True, False])
def test_training_lowers_the_loss_and_ends_on_the_grid(model32, learn_scale):
    model = QAT(3, 16, learn_scale=learn_scale).attach(model32)
    ids = tiny_ids(8, 12)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=3e-3)
    losses = []
    for _ in range(15):
        losses.append(model.loss(ids[:, :-1], ids[:, 1:].contiguous()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    layer = model.blocks[0].mlp.up
    k = layer.rounded().unflatten(1, (-1, 16)) / layer.scale()
    # float32's rounding of a quotient up to 4
    torch.testing.assert_close(k, k.round(), rtol=0, atol=1e-6)
    assert k.round().min() >= -4 and k.round().max() <= 3


def test_merged_weights_stay_as_they_are_under_round_to_nearest(model):
    """On the same grid: w = s k with an absmax of -4 s or 3 s; here 3 bits by the widest grid."""
    QAT(4, 8, learn_scale=False).attach(model)
    before = model(tiny_ids())
    plain = minipeft.merge(model)
    assert type(plain.blocks[0].attn.q) is torch.nn.Linear
    # the same product of the same weights
    torch.testing.assert_close(plain(tiny_ids()), before, rtol=0, atol=1e-12)
    weight = plain.blocks[1].mlp.up.weight
    again = rounded_by_hand(weight, 4, 8, learn_scale=False)
    torch.testing.assert_close(weight.detach(), again, rtol=0, atol=1e-12)
    nearest = dequantize_group(round_to_nearest(weight, 8, 8, scale_dtype=torch.float64))
    assert (nearest - weight).abs().max() < weight.abs().max() / 100


@pytest.mark.parametrize("learn_scale", [True, False])
def test_counts(model, learn_scale):
    technique = QAT(4, 16, ("q", "up", "down"), learn_scale)
    steps = (32 * 2 + 128 * 2 + 32 * 8) if learn_scale else 0
    expected = 2 * (32 * 32 + 2 * 32 * 128 + steps)
    assert technique.count(CONFIG) == expected
    assert minipeft.report(technique.attach(model)).trained == expected


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bits": 1}, "bits=1"),
        ({"bits": 9}, "bits=9"),
        ({"group_size": 5}, "group_size=5"),
        ({"group_size": 0}, "group_size=0"),
        ({"targets": ("x",)}, "'x'"),
    ],
)
def test_bad_settings_are_named(model, settings, words):
    with pytest.raises(ValueError) as problem:
        QAT(**settings).attach(model)
    assert words in str(problem.value)


def test_a_projection_with_something_on_it_is_refused(model):
    minipeft.LoRA(rank=2, targets=("v",)).attach(model)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.v is a LoRALinear"):
        QAT().attach(model, name="qat")
    assert len(model.attachments) == 1


def test_a_layer_that_lost_everything_has_nothing_to_round():
    model = prune_neurons(prune_heads(tiny_model(), {0: range(4)}), {1: range(128)})
    before = copy.deepcopy(model)
    QAT(bits=8).attach(model)
    assert len(model.attachments[0].swaps) == 6
    assert all(p.isfinite().all() for p in trainable_parameters(model))
    assert (model(tiny_ids()) - before(tiny_ids())).abs().max() < 0.5  # eight bits


def test_groups_that_do_not_divide_what_is_left_are_named():
    model = prune_neurons(tiny_model(), {1: range(3)})
    with pytest.raises(ValueError, match=r"the 125 columns of blocks\.1\.mlp\.down"):
        QAT(group_size=32).attach(model)
    assert not model.attachments
