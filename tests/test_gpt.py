"""The specification of gpt.py and cross_entropy.py: every equation of their headers, written again
with plain tensor operations, and what techniques and decoding rely on.

transformers as a second opinion: tests/parity/test_gpt_hf.py.
"""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minipeft.cross_entropy import (
    cross_entropy,
    linear_cross_entropy,
    linear_cross_entropy_written_out,
)
from minipeft.gpt import (
    GPT,
    AttentionCore,
    GPTConfig,
    attention_written_out,
    causal_mask,
    positions,
)
from tests.tiny import CONFIG, close, tiny_ids, tiny_model

EXACT = 1e-12  # float64, the same sums in another order


# -- the whole model, written again


def layer_norm(x, module, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(variance + eps) * module.weight + module.bias


def affine(x, module):
    return torch.einsum("...i,oi->...o", x, module.weight) + module.bias


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def attention(x, module, d):
    """(GPT 4), one row, head and query at a time."""
    q, k, v = (affine(x, p) for p in (module.q, module.k, module.v))
    y = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(q.shape[-1] // d):
            columns = slice(h * d, (h + 1) * d)
            for t in range(x.shape[1]):
                scores = k[b, : t + 1, columns] @ q[b, t, columns] / math.sqrt(d)
                weights = torch.exp(scores - scores.max())
                y[b, t, columns] = (weights / weights.sum()) @ v[b, : t + 1, columns]
    return affine(y, module.o)


def reference(model, ids, start=0):
    """(GPT 1) to (GPT 5) with no module of the model called."""
    at = [[start + t for t in range(ids.shape[1])]] * len(ids)
    eps = model.config.layer_norm_eps
    x = model.embed.token.weight[ids] + model.embed.position.weight[torch.tensor(at)]
    for block in model.blocks:
        x = x + attention(layer_norm(x, block.ln_1, eps), block.attn, block.attn.head_dim)
        hidden = gelu_tanh(affine(layer_norm(x, block.ln_2, eps), block.mlp.up))
        x = x + affine(hidden, block.mlp.down)
    return layer_norm(x, model.ln_f, eps) @ model.embed.token.weight.T


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        GPTConfig(vocab_size=5, context_length=11, n_layer=1, n_head=1, d_model=7),
        GPTConfig(vocab_size=47, context_length=19, n_layer=3, n_head=3, d_model=15, d_ff=13),
        replace(CONFIG, layer_norm_eps=0.3),
    ],
)
@torch.no_grad()
def test_the_model_is_its_equations(config):
    """(GPT 1) (GPT 2) (GPT 3) (GPT 4) (GPT 5)"""
    model, ids = tiny_model(config), tiny_ids(2, 9, config.vocab_size)
    close(model(ids), reference(model, ids), EXACT)
    close(model(ids, start=2), reference(model, ids, 2), EXACT)
    assert torch.equal(model.embed(ids, 2), model.embed(ids, 0, 2))
    assert torch.equal(model.embed(ids, torch.tensor([2, 2])), model.embed(ids, 2))


# -- attention


@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 5), st.integers(1, 9)
)
def test_the_core_is_the_softmax_written_out(B, H, T, earlier, d):
    """(GPT 4), with `earlier` keys in front (a cache, a prefix): causal at the lower right."""
    q = torch.randn(B, H, T, d, dtype=torch.float64)
    k, v = torch.randn(2, B, H, T + earlier, d, dtype=torch.float64)
    y = AttentionCore()(q, k, v)
    close(y, attention_written_out(q, k, v), EXACT)
    for t in range(T):
        seen = slice(0, t + 1 + earlier)
        weights = (q[:, :, t : t + 1] @ k[:, :, seen].mT / math.sqrt(d)).softmax(-1)
        close(y[:, :, t : t + 1], weights @ v[:, :, seen], EXACT)


def test_the_core_follows_a_mask():
    q, k, v = torch.randn(3, 2, 3, 5, 4, dtype=torch.float64)
    mask = torch.rand(2, 1, 5, 5) < 0.5
    mask[..., 0] = True
    close(AttentionCore()(q, k, v, mask), attention_written_out(q, k, v, mask), EXACT)


def test_the_causal_mask_is_aligned_at_the_lower_right():
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert torch.equal(causal_mask(3, 5), expected.bool())


def test_dropout_acts_on_attention_weights_in_training_only():
    core = AttentionCore(dropout=0.5)
    q = k = torch.zeros(1, 1, 6, 4)
    v = torch.ones(1, 1, 6, 4)
    assert not torch.allclose(core(q, k, v), v)
    assert torch.allclose(core.eval()(q, k, v), v)


# -- promises


@torch.no_grad()
def test_later_tokens_do_not_change_earlier_logits(model):
    ids = tiny_ids(2, 12)
    before = model(ids)
    for t in (1, 5, 11):
        changed = ids.clone()
        changed[:, t:] = (changed[:, t:] + 1) % CONFIG.vocab_size
        after = model(changed)
        close(after[:, :t], before[:, :t], EXACT)
        assert (after[:, t] - before[:, t]).abs().max() > 1e-3


@torch.no_grad()
def test_a_row_alone_equals_the_row_in_a_batch(model, ids):
    for row in range(3):
        close(model(ids[row : row + 1]), model(ids)[row : row + 1], EXACT)


@torch.no_grad()
def test_rows_may_start_at_different_places(model, ids):
    start = torch.tensor([0, 7, 53])
    for row, first in enumerate(start.tolist()):
        close(model(ids, start)[row], model(ids[row : row + 1], first)[0], EXACT)
    assert positions(ids, start)[1].tolist() == list(range(7, 18))


def test_the_head_is_the_embedding(model):
    assert model.head.weight is model.embed.token.weight
    assert isinstance(model.head, nn.Linear) and model.head.bias is None


def test_no_buffer_is_called_bias(model):
    assert not dict(model.named_buffers())


@pytest.mark.parametrize("config", [CONFIG, GPTConfig(31, 17, 3, 2, 10)])
def test_the_count_of_parameters_is_the_formula(config):
    V, C, L, D = config.vocab_size, config.context_length, config.n_layer, config.d_model
    count = sum(p.numel() for p in GPT(config).parameters())
    assert count == V * D + C * D + L * (12 * D**2 + 13 * D) + 2 * D


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_initialisation_is_the_table_in_the_header():
    """Standard deviations within 4 sigma of an estimate from n numbers, sigma = std / sqrt(2 n)."""
    config = GPTConfig(vocab_size=300, context_length=100, n_layer=8, n_head=4, d_model=64)
    for name, p in GPT(config).named_parameters():
        if p.ndim == 1:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all(), name
            continue
        residual = name.endswith(("attn.o.weight", "mlp.down.weight"))
        std = 0.02 / math.sqrt(2 * 8) if residual else 0.02
        assert abs(p.std().item() - std) < 4 * std / math.sqrt(2 * p.numel()), name
        assert abs(p.mean().item()) < 4 * std / math.sqrt(p.numel()), name


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = tiny_model(replace(CONFIG, dropout=0.2)).train(), tiny_ids()
    gradients = []
    for on in (False, True):
        model.gradient_checkpointing = on
        model.zero_grad()
        torch.manual_seed(5)  # the same dropout, again in the recomputation
        model.loss(ids, ids).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        close(a, b, EXACT)


def test_gradient_checkpointing_saves_the_activations_of_blocks(model, ids):
    """Counted, not trusted: bytes that autograd keeps with and without."""

    def kept(on):
        model.train().gradient_checkpointing = on
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.features(ids)
        return total

    assert kept(True) < 0.5 * kept(False)


def test_a_wrong_dropout_place_would_show():
    """In training embedding, attention and MLP are dropped: p = 0.999 leaves ln_f(0)."""
    model = tiny_model(replace(CONFIG, dropout=0.999)).train()
    x = model.features(tiny_ids(2, 8))
    plain = model.ln_f.bias.expand_as(x)
    assert torch.isclose(x, plain, atol=1e-12).all(-1).float().mean() > 0.5


# -- refused


@pytest.mark.parametrize(
    "values, says",
    [
        ({"vocab_size": 0}, "vocab_size=0 is not a positive integer"),
        ({"n_layer": -2}, "n_layer=-2"),
        ({"d_ff": 0}, "d_ff=0"),
        ({"d_model": 12.0}, "d_model=12.0"),
        ({"n_head": True}, "n_head=True"),
        ({"d_model": 10, "n_head": 4}, "d_model=10 is not a multiple of n_head=4"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"dropout": -0.1}, "dropout=-0.1"),
    ],
)
def test_an_impossible_configuration_is_refused(values, says):
    with pytest.raises(ValueError, match=says):
        GPTConfig(**values)


def test_a_text_that_does_not_fit_is_refused_with_all_its_numbers(model):
    model(tiny_ids(1, 64))
    model(tiny_ids(1, 60), start=4)
    with pytest.raises(
        ValueError, match=r"context_length=64 is too short for T=65 .*start=0 .*p=0"
    ):
        model(tiny_ids(1, 65))
    with pytest.raises(ValueError, match="T=60 tokens from start=5"):
        model(tiny_ids(2, 60), start=torch.tensor([5, 0]))


def test_ids_of_another_kind_are_refused(model):
    for bad in (torch.tensor([1, 2]), torch.zeros(1, 2), torch.zeros(1, 2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="ids must be"):
            model(bad)


def test_an_id_outside_the_vocabulary_is_named(model):
    model.check_ids(torch.tensor([[0, 96]]))
    model.check_ids(torch.zeros(0, 3, dtype=torch.int64))
    for wrong in (97, -1):
        with pytest.raises(ValueError, match=f"token id {wrong} is outside"):
            model.check_ids(torch.tensor([[3, wrong, 5]]))


# -- cross-entropy


def reference_loss(z, labels):
    """(CE 2): the mean of -log softmax(z)[label] over the labels that are not -100."""
    terms = [
        -math.log(math.exp(row[label] - max(row)) / sum(math.exp(x - max(row)) for x in row))
        for row, label in zip(z.tolist(), labels.tolist(), strict=True)
        if label != -100
    ]
    return sum(terms) / max(1, len(terms))


def problem(M=13, D=5, V=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (M, V))
    labels = torch.randint(V, (M,), generator=generator)
    labels[::3] = -100
    return x.requires_grad_(), W.requires_grad_(), labels


@pytest.mark.parametrize("chunk", [1, 2, 5, 13, 100])
@torch.no_grad()
def test_chunked_cross_entropy_is_the_definition(chunk):
    """(CE 1) (CE 2), chunks without any label and a last chunk that is shorter included."""
    x, W, labels = problem()
    labels[4:9] = -100
    expected = reference_loss((x @ W.T).detach(), labels)
    assert abs(float(linear_cross_entropy(x, W, labels, chunk)) - expected) < EXACT
    assert abs(float(linear_cross_entropy_written_out(x, W, labels)) - expected) < EXACT
    assert abs(float(cross_entropy(x @ W.T, labels)) - expected) < EXACT


@pytest.mark.parametrize("chunk", [2, 100])
def test_its_gradients_are_those_of_the_definition(chunk):
    """(CE 3) (CE 4), under an incoming gradient that is not 1."""
    x, W, labels = problem()
    (3 * linear_cross_entropy(x, W, labels, chunk)).backward()
    p = (x @ W.T).softmax(-1).detach()
    counts = labels != -100
    g = p - torch.nn.functional.one_hot(labels.clamp(min=0), 11)
    g = 3 * g * counts[:, None] / counts.sum()
    close(x.grad, g @ W.detach(), EXACT)
    close(W.grad, g.T @ x.detach(), EXACT)
    assert torch.autograd.gradcheck(lambda x, W: linear_cross_entropy(x, W, labels, chunk), (x, W))


def test_many_chunks_of_a_half_precision_head_are_added_up_in_float32():
    """Of 300 additions to a bfloat16 head's gradient none is rounded but the last. (CE 4)"""
    generator = torch.Generator().manual_seed(3)
    x, W = (torch.randn(n, 5, generator=generator).bfloat16() for n in (300, 11))
    labels = torch.randint(11, (300,), generator=generator)
    W.requires_grad_()
    exact = W.detach().double().requires_grad_()
    linear_cross_entropy(x, W, labels, 1).backward()
    cross_entropy(x.double() @ exact.T, labels).backward()
    assert W.grad.dtype == torch.bfloat16
    # logits, the gradient of each row, each product: 2^-9 each
    assert (W.grad.double() - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_a_frozen_head_gets_no_gradient_and_the_features_the_same_one():
    x, W, labels = problem()
    linear_cross_entropy(x, W, labels, 4).backward()
    both, x.grad = x.grad, None
    linear_cross_entropy(x, W.detach(), labels, 4).backward()
    close(x.grad, both, EXACT)


def test_without_gradients_nothing_but_the_logits_is_multiplied(monkeypatch):
    """Though the head could have one: 2 M D V operations, none of them in place."""
    x, W, labels = problem()
    monkeypatch.setattr("minipeft.cross_entropy.add_product", None)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, W, labels, 4)
    assert counter.get_total_flops() == 2 * x.numel() * len(W)


def test_the_inputs_are_not_changed():
    x, W, labels = problem()
    copies = [t.detach().clone() for t in (x, W, labels)]
    linear_cross_entropy(x, W, labels, 4).backward()
    assert all(torch.equal(t.detach(), copy) for t, copy in zip((x, W, labels), copies))


def test_without_a_label_that_counts_the_loss_is_zero_and_so_are_gradients():
    x, W, labels = problem()
    labels[:] = -100
    loss = linear_cross_entropy(x, W, labels, 4)
    loss.backward()
    assert loss.item() == 0 == cross_entropy(x @ W.T, labels).item()
    assert (x.grad == 0).all() and (W.grad == 0).all()


def test_large_logits_do_not_overflow():
    x = torch.tensor([[1e4, 0.0]])
    W = torch.eye(2)
    assert float(linear_cross_entropy(x, W, torch.tensor([0]))) == 0
    assert float(linear_cross_entropy(x, W, torch.tensor([1]))) == 1e4


def test_all_logits_are_never_held_at_once(monkeypatch):
    """The largest matrix product made has `chunk` rows."""
    x, W, labels = problem(M=40)
    seen, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(out) or mm(a, b, out=out))
    linear_cross_entropy(x.detach(), W.detach(), labels, chunk=8)
    assert [len(z) for z in seen] == [8] * 5
    assert len({z.data_ptr() for z in seen}) == 1, "one chunk's memory, used again"


def test_bfloat16_logits_are_summed_in_float32():
    """2,000 equal logits: the loss is log 2,000; bfloat16 sums would be off by a percent."""
    z = torch.zeros(1, 2000, dtype=torch.bfloat16)
    loss = cross_entropy(z, torch.tensor([3]))
    assert loss.dtype == torch.float32
    assert abs(float(loss) - math.log(2000)) < 1e-5


def test_the_models_loss_is_the_cross_entropy_of_its_logits(model, ids):
    """Aligned: labels[:, t] belongs to logits[:, t]; and the gradient reaches every tensor."""
    labels = tiny_ids(3, 11, seed=9)
    labels[1, 3:] = -100
    loss = model.loss(ids, labels)
    expected = reference_loss(model(ids).detach().flatten(0, 1), labels.flatten())
    assert abs(float(loss.detach()) - expected) < EXACT
    loss.backward()
    slow = torch.autograd.grad(
        cross_entropy(model(ids).flatten(0, 1), labels.flatten()), list(model.parameters())
    )
    for p, g in zip(model.parameters(), slow, strict=True):
        close(p.grad, g, EXACT)
