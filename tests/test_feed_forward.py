"""The specification of minipeft/feed_forward.py: the feed-forward layer as one function."""

import copy

import pytest
import torch
from torch import nn

from minipeft import feed_forward, gpt
from minipeft.compressed.structured_pruning import shrunk
from tests.tiny import check_fifty_steps


def layers(hidden=13, dtype=torch.float64):
    """Two frozen projections, 7 -> hidden -> 5."""
    up, down = nn.Linear(7, hidden, dtype=dtype), nn.Linear(hidden, 5, dtype=dtype)
    return up.requires_grad_(False), down.requires_grad_(False)


def written_out(x, up, down):
    """(GPT 3), with the tanh form's own formula."""
    u = x @ up.weight.T + up.bias
    inner = (2 / torch.pi) ** 0.5 * (u + 0.044715 * u**3)
    return 0.5 * u * (1 + inner.tanh()) @ down.weight.T + down.bias


@pytest.fixture(params=[1, 3, 4, 1024])
def chunk(request, monkeypatch):
    monkeypatch.setattr(feed_forward, "CHUNK", request.param)
    monkeypatch.setattr(feed_forward, "TILE", 5 * request.param)


@pytest.mark.parametrize("rows", [(2, 5), (1,), (1, 1), (47,), (2, 0)])
def test_output_and_gradient_are_the_written_out_ones(rows, chunk):
    """(FeedForward 1) (FeedForward 2) (FeedForward 3), in chunks and tiles that end anywhere."""
    up, down = layers()
    x = (3 * torch.randn(*rows, 7, dtype=torch.float64)).requires_grad_()
    weights = torch.randn(*rows, 5, dtype=torch.float64)
    ours, theirs = feed_forward.feed_forward(x, up, down), written_out(x, up, down)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # float64, sums of 13 terms
    a, b = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (ours, theirs))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_neurons_the_bias_is_left():
    """As in a layer that pruning has emptied."""
    up, down = layers()
    none = torch.tensor([], dtype=torch.int64)
    up, down = shrunk(up, rows=none), shrunk(down, columns=none)
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    y = feed_forward.feed_forward(x, up, down)
    assert torch.equal(y, down.bias.expand(3, 5))
    assert not torch.autograd.grad(y.sum(), x)[0].any()


def test_gradcheck():
    x, frozen = torch.randn(4, 7, dtype=torch.float64, requires_grad=True), layers()
    assert torch.autograd.gradcheck(lambda x: feed_forward.feed_forward(x, *frozen), x)


def test_far_from_zero_the_gelu_is_its_input_or_nothing():
    """The logistic function is 0 or 1 in every bit there, and its derivative no NaN."""
    u = torch.tensor([[-200.0, -20.0, 20.0, 200.0]])
    h, slope = torch.empty_like(u), torch.empty_like(u)
    feed_forward.gelu(u + 3, torch.full((4,), -3.0), h, slope)
    assert h.tolist() == [[0, 0, 20, 200]] and slope.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("view", ["strided", "expanded", "transposed"])
def test_any_strides_are_taken(view):
    up, down = layers()
    x = torch.randn(6, 14, dtype=torch.float64)
    turned = x[:, :7].T.contiguous().T
    x = {"strided": x[:, ::2], "expanded": x[:1, :7].expand(4, 7), "transposed": turned}[view]
    x = x.detach().requires_grad_()
    y = feed_forward.feed_forward(x, up, down)
    torch.testing.assert_close(y, written_out(x, up, down), rtol=1e-12, atol=1e-12)
    expected = torch.autograd.grad(written_out(x, up, down).sum(), x)  # an expanded gradient
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x), expected, rtol=1e-12, atol=1e-12)


def test_a_transposed_gradient_is_taken():
    up, down = layers()
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 2, 5, dtype=torch.float64)

    def gradient(function):
        y = function(x, up, down).transpose(0, 1).contiguous()
        return torch.autograd.grad((y * weights).sum(), x)

    ours, theirs = gradient(feed_forward.feed_forward), gradient(written_out)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_twice_backward_gives_twice_the_gradient():
    """What is kept is not overwritten."""
    x = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    y = feed_forward.feed_forward(x, *layers()).sum()
    y.backward(retain_graph=True)
    once = x.grad.clone()
    y.backward()
    assert torch.equal(x.grad, 2 * once)


def kept(function, x, up, down):
    """Numbers that autograd keeps for the backward pass, weights and input left out."""
    seen = {}

    def pack(tensor):
        seen[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x, up, down)
    for tensor in (x, *up.parameters(), *down.parameters()):
        seen.pop(tensor.data_ptr(), None)
    return sum(seen.values()), y


def test_one_tensor_of_the_hidden_width_is_kept_and_none_without_gradients():
    x = torch.randn(40, 7, dtype=torch.float64)
    assert kept(feed_forward.feed_forward, x.clone().requires_grad_(), *layers())[0] == 40 * 13
    assert kept(feed_forward.feed_forward, x, *layers())[0] == 0
    with torch.no_grad():
        count, y = kept(feed_forward.feed_forward, x.clone().requires_grad_(), *layers())
    assert count == 0 and not y.requires_grad


@pytest.mark.parametrize("case", ["no grad", "frozen input"])
def test_without_gradients_no_slope_is_made(case, monkeypatch):
    slopes, make = [], feed_forward.gelu
    monkeypatch.setattr(
        feed_forward,
        "gelu",
        lambda u, b1, h, slope=None: slopes.append(slope) or make(u, b1, h, slope),
    )
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=case == "no grad")
    with torch.set_grad_enabled(case != "no grad"):
        feed_forward.feed_forward(x, *layers())
    assert slopes == [None]


def test_the_input_and_the_weights_are_not_changed():
    up, down = layers()
    x = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    before = copy.deepcopy([x, up.state_dict(), down.state_dict()])
    feed_forward.feed_forward(x, up, down).sum().backward()
    for old, new in zip(before[1:], (up, down)):
        assert all(torch.equal(old[name], tensor) for name, tensor in new.state_dict().items())
    assert torch.equal(before[0], x)


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
REFUSED = ["autocast", "trained weight", "trained bias", "wrapped", *HOOKS, "no bias", "small"]


@pytest.mark.parametrize("case", REFUSED)
def test_where_the_twin_cannot_serve_or_does_not_pay_the_definition_runs(case, monkeypatch):
    def refuse(*_):
        raise AssertionError("the twin ran")

    monkeypatch.setattr(gpt.feed_forward.twin, "loaded", refuse)
    up, down = layers(hidden=1024, dtype=torch.float32)
    x = torch.randn(1024, 7, requires_grad=True)
    with pytest.raises(AssertionError, match="the twin ran"):
        gpt.feed_forward(x, up, down)
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            gpt.feed_forward(x, up, down)
    elif case == "small":
        gpt.feed_forward(x[:1023], up, down)
    else:
        if case == "trained weight":
            up.weight.requires_grad_()
        elif case == "trained bias":
            down.bias.requires_grad_()
        elif case == "wrapped":
            down = nn.Sequential(down)
            down.out_features = 5
        elif case in HOOKS:
            getattr(up, f"register_{case}")(lambda *_: None)
        elif case == "no bias":
            down = nn.Linear(1024, 5, bias=False).requires_grad_(False)
        gpt.feed_forward(x, up, down)


def test_trained_weights_are_served_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(gpt.feed_forward.twin, "loaded", lambda *_: "the twin")
    up, down = nn.Linear(7, 1024), nn.Linear(1024, 5)
    with torch.no_grad():
        assert gpt.feed_forward(torch.randn(1024, 7), up, down) == "the twin"


def test_fifty_steps_give_the_losses_of_the_definition(monkeypatch):
    check_fifty_steps(gpt.feed_forward, monkeypatch, calls=2)  # two layers
