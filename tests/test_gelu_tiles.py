"""The specification of minipeft/gelu_tiles.py: the tanh form of the GELU, tile by tile."""

import pytest
import torch

from minipeft import GPT, GPTConfig, gelu_tiles, gpt
from minipeft.dispatch import forced


def written_out(u):
    """(GPT 3), by the tanh form's own formula."""
    inner = (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)
    return 0.5 * u * (1 + inner.tanh())


@pytest.mark.parametrize("tile", [1, 5, 64, 2**15])
@pytest.mark.parametrize("shape", [(2, 5, 13), (1,), (129,)])
def test_values_and_gradients_are_the_written_out_ones(shape, tile, monkeypatch):
    """(GeluTiles 1) (GeluTiles 2), in tiles that end anywhere."""
    monkeypatch.setattr(gelu_tiles, "TILE", tile)
    x = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(shape, dtype=torch.float64)
    ours, theirs = gelu_tiles.gelu(x), written_out(x)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, one number each
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gelu_tiles.gelu, x)


def test_far_from_zero_it_is_its_input_or_nothing():
    """The logistic function is 0 or 1 in every bit there, and the slope no NaN."""
    u = torch.tensor([[-200.0, -20.0, 20.0, 200.0]])
    h, slope = torch.empty_like(u), torch.empty_like(u)
    gelu_tiles.gelu_and_slope(u, h, slope)
    assert h.tolist() == [[0, 0, 20, 200]] and slope.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("view", ["strided", "expanded", "transposed"])
def test_any_strides_are_taken_of_inputs_and_of_gradients(view):
    x = torch.randn(6, 14, dtype=torch.float64)
    x = {"strided": x[:, ::2], "expanded": x[:1].expand(4, 14), "transposed": x.T}[view]
    x = x.detach().requires_grad_()
    y = gelu_tiles.gelu(x)
    torch.testing.assert_close(y, written_out(x), rtol=1e-12, atol=1e-12)
    weights = torch.randn(*x.shape[::-1], dtype=torch.float64)
    for loss in (lambda y: y.sum(), lambda y: (y.T.contiguous() * weights).sum()):
        ours, theirs = (torch.autograd.grad(loss(f(x)), x) for f in (gelu_tiles.gelu, written_out))
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_the_input_is_not_changed_and_is_all_that_is_kept():
    x = torch.randn(40, dtype=torch.float64, requires_grad=True)
    before, kept = x.detach().clone(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = gelu_tiles.gelu(x).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x, before) and torch.equal(x.grad, 2 * once)
    assert [t.data_ptr() for t in kept] == [x.data_ptr()]


def test_it_runs_where_numbers_are_many_and_only_in_float32(monkeypatch):
    monkeypatch.setattr(gpt.gelu.twin, "loaded", lambda x: "the twin")
    many = torch.zeros(2**20)
    assert gpt.gelu(many) == "the twin"
    for x in (many[1:], many.double(), many.bfloat16()):
        assert isinstance(gpt.gelu(x), torch.Tensor)


def test_a_trained_model_has_the_loss_and_the_gradients_of_the_definition():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=31, n_layer=2, n_head=2, d_model=16, context_length=40))
    ids, found = torch.randint(0, 31, (3, 40)), {}
    for mode in ("on", "off"):
        model.zero_grad()
        with forced(mode):
            loss = model.loss(ids, ids)
            loss.backward()
        found[mode] = [loss.detach(), *(p.grad for p in model.parameters())]
    # float32: the last bits of sums of 120 terms
    torch.testing.assert_close(found["on"], found["off"], rtol=1e-4, atol=1e-6)
