"""IA3's math written again in float64, its merge, its count and its errors."""

import copy

import pytest
import torch
from torch.nn import functional as F

import minipeft
from minipeft import GPT, GPTConfig, wrap
from minipeft.additive.ia3 import IA3, IA3Linear, rescale, rescaled_columns, rescaled_rows

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few dozen roundings of numbers of order one


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=37, context_length=19, n_layer=2, n_head=3, d_model=21, d_ff=47)
    return GPT(config).double()


@pytest.fixture
def ids():
    return torch.randint(0, 37, (3, 7), generator=torch.Generator().manual_seed(1))


def shake(model, std=0.5, seed=2):
    """Move every trained number away from its initial value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in minipeft.technique.trainable_parameters(model):
            parameter.add_(std * torch.randn(parameter.shape, generator=generator).to(parameter))
    return model


def shaken_linear(on_input, into=5, out=7):
    torch.manual_seed(3)
    inner = torch.nn.Linear(into, out).double()
    torch.nn.init.normal_(inner.bias)
    layer = IA3Linear(inner, on_input)
    torch.nn.init.normal_(layer.l)
    return inner, layer, torch.randn(2, 3, into, dtype=torch.float64)


def test_at_the_start_the_model_is_the_base_bitwise(model, ids):
    before = model(ids)
    assert torch.equal(IA3().attach(model)(ids), before)


def test_the_output_is_scaled_with_its_bias():
    """(IA3 1), coordinate by coordinate."""
    inner, layer, x = shaken_linear(on_input=False)
    y = layer(x)
    for o in range(7):
        expected = layer.l[o] * (x @ inner.weight[o] + inner.bias[o])
        torch.testing.assert_close(y[..., o], expected, **EXACT)


def test_a_feedforward_target_is_scaled_at_what_it_reads():
    """(IA3 2): the bias stays as it is."""
    inner, layer, x = shaken_linear(on_input=True)
    expected = (
        sum(inner.weight[:, i] * (layer.l[i] * x[..., i, None]) for i in range(5)) + inner.bias
    )
    torch.testing.assert_close(layer(x), expected, **EXACT)


def test_the_block_computes_the_papers_formula(model, ids):
    """(IA3 1) (IA3 2), a whole block written out."""
    shake(IA3().attach(model))
    base = copy.deepcopy(model)
    attn, mlp = (wrap.base_module(getattr(base.blocks[0], name)) for name in ("attn", "mlp"))
    block, x = base.blocks[0], base.embed(ids)
    n = block.ln_1(x)
    q = attn.q(n)
    k = attn.k.l * (n @ attn.k.inner.weight.T + attn.k.inner.bias)
    v = attn.v.l * (n @ attn.v.inner.weight.T + attn.v.inner.bias)
    heads = []
    for h in range(3):
        c = slice(7 * h, 7 * h + 7)
        scores = q[..., c] @ k[..., c].transpose(1, 2) / 7**0.5
        scores = scores.masked_fill(~torch.ones(7, 7).tril().bool(), -torch.inf)
        heads.append(scores.softmax(-1) @ v[..., c])
    a = x + torch.cat(heads, -1) @ attn.o.weight.T + attn.o.bias
    hidden = F.gelu(mlp.up(block.ln_2(a)), approximate="tanh")
    f = (mlp.down.l * hidden) @ mlp.down.inner.weight.T + mlp.down.inner.bias
    torch.testing.assert_close(model.blocks[0](x), a + f, **EXACT)


def test_merged_rows_and_columns():
    """(IA3 3) (IA3 4) against diagonal matrices."""
    torch.manual_seed(4)
    W, b = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    rows, columns = torch.randn(7, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight, bias = rescaled_rows(W, b, rows)
    torch.testing.assert_close(weight, torch.diag(rows) @ W, **EXACT)
    torch.testing.assert_close(bias, torch.diag(rows) @ b, **EXACT)
    weight, bias = rescaled_columns(W, b, columns)
    torch.testing.assert_close(weight, W @ torch.diag(columns), **EXACT)
    assert torch.equal(bias, b)
    assert rescaled_rows(W, None, rows)[1] is None


@pytest.mark.parametrize("feedforward", [("down",), ("up", "down"), ("q", "o", "down"), ()])
def test_merged_and_unmerged_agree(model, ids, feedforward):
    technique = IA3(targets=("q", "k", "v", "o", "up", "down"), feedforward=feedforward)
    shake(technique.attach(model))
    before = model(ids)
    with minipeft.merged(model):
        torch.testing.assert_close(model(ids), before, **EXACT)
    assert torch.equal(model(ids), before)  # the saved tensors are back, bitwise
    plain = minipeft.merge(model)
    torch.testing.assert_close(plain(ids), before, **EXACT)
    assert not any(isinstance(m, wrap.Wrapper) for m in plain.modules())


def test_detach_gives_the_base_back(model, ids):
    before = model(ids)
    shake(IA3().attach(model))
    assert not torch.equal(model(ids), before)
    with minipeft.disabled(model):
        assert torch.equal(model(ids), before)
    assert torch.equal(minipeft.detach(model)(ids), before)


def test_the_gradient_is_the_sum_over_tokens():
    """(IA3 5)"""
    inner, layer, x = shaken_linear(on_input=False)
    g = torch.randn(2, 3, 7, dtype=torch.float64)
    layer(x).backward(g)
    expected = (g * (x @ inner.weight.T + inner.bias)).sum((0, 1))
    torch.testing.assert_close(layer.l.grad, expected, **EXACT)


def test_every_vector_has_a_gradient_at_the_first_step(model, ids):
    IA3().attach(model)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for parameter in minipeft.technique.trainable_parameters(model):
        assert parameter.grad.abs().max() > 0


def test_rescale_passes_gradcheck():
    torch.manual_seed(5)
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    l = torch.randn(5, dtype=torch.float64, requires_grad=True)
    W = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(rescale, (h, l))
    assert torch.autograd.gradcheck(lambda W, b, l: rescaled_rows(W, b, l), (W, l, l))
    assert torch.autograd.gradcheck(lambda W, b, l: rescaled_columns(W, b, l), (W, l, l))


@pytest.mark.parametrize(
    "technique, expected",
    [
        (IA3(), 2 * (21 + 21 + 47)),
        (IA3(targets=("q", "k", "v", "down")), 2 * (3 * 21 + 47)),
        (IA3(targets=("k", "v", "up")), 2 * (21 + 21 + 47)),
        (IA3(targets=("up", "down"), feedforward=("up", "down")), 2 * (21 + 47)),
        (IA3(targets=("down",), feedforward=()), 2 * 21),
    ],
)
def test_the_count_is_the_number_of_coordinates_scaled(model, technique, expected):
    assert technique.count(model.config) == expected
    assert minipeft.report(technique.attach(model)).trained == expected


def test_the_scale_keeps_the_dtype_of_what_it_scales():
    h = torch.ones(2, 3, dtype=torch.bfloat16)
    assert rescale(h, torch.ones(3)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "technique, message",
    [
        (IA3(targets=("key",)), "unknown target 'key'"),
        (IA3(targets=()), "give a tuple"),
        (IA3(targets=("k", "k")), "twice"),
        (IA3(feedforward=("mlp",)), "unknown target 'mlp'"),
    ],
)
def test_wrong_targets_are_named(model, technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(model)
    assert not model.attachments
