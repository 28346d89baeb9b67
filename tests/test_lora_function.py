"""The specification of minipeft/low_rank/lora_function.py: LoRA's layer as one function."""

import pytest
import torch

from minipeft import LoRA
from minipeft.dispatch import forced
from minipeft.low_rank import lora, lora_function
from tests.tiny import fifty_losses, tiny_ids, tiny_model


def tensors(dtype=torch.float64, rows=(2, 5)):
    """x, W, b, A, B, s with W and b frozen."""
    x = torch.randn(*rows, 7, dtype=dtype, requires_grad=True)
    W, b = torch.randn(11, 7, dtype=dtype), torch.randn(11, dtype=dtype)
    A = torch.randn(3, 7, dtype=dtype, requires_grad=True)
    B = torch.randn(11, 3, dtype=dtype, requires_grad=True)
    return x, W, b, A, B, 0.7


def gradients(function, args, weights):
    leaves = [t for t in args if isinstance(t, torch.Tensor) and t.requires_grad]
    y = function(*args)
    return [y.detach(), *torch.autograd.grad((y * weights).sum(), leaves)]


def written_out(x, W, b, A, B, s):
    return x @ W.T + b + s * ((x @ A.T) @ B.T)


@pytest.mark.parametrize("rows", [(2, 5), (1,), (1, 1), (47,)])
def test_output_and_gradients_are_the_written_out_ones(rows):
    """(LoRAFunction 1) (LoRAFunction 2) (LoRAFunction 3)"""
    args = tensors(rows=rows)
    weights = torch.randn(*rows, 11, dtype=torch.float64)
    ours = gradients(lora_function.lora_linear, args, weights)
    theirs = gradients(written_out, args, weights)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # float64, sums of 47 terms


def test_gradcheck():
    x, W, b, A, B, s = tensors()
    assert torch.autograd.gradcheck(
        lambda x, A, B: lora_function.lora_linear(x, W, b, A, B, s), (x, A, B)
    )


def test_an_expanded_gradient_is_taken():
    """`.sum()` hands the backward a gradient whose strides are 0."""
    args = tensors()
    leaves = [args[0], args[3], args[4]]
    ours = torch.autograd.grad(lora_function.lora_linear(*args).sum(), leaves)
    theirs = torch.autograd.grad(written_out(*args).sum(), leaves)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_transposed_gradient_is_taken():
    """What reads the output turned round hands back a gradient that no view flattens."""
    args = tensors()
    leaves, weights = [args[0], args[3], args[4]], torch.randn(5, 2, 11, dtype=torch.float64)

    def loss(function):
        return (function(*args).transpose(0, 1).contiguous() * weights).sum()

    ours = torch.autograd.grad(loss(lora_function.lora_linear), leaves)
    theirs = torch.autograd.grad(loss(written_out), leaves)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_without_a_bias_and_with_a_frozen_input():
    x, W, _, A, B, s = tensors()
    y = lora_function.lora_linear(x.detach(), W, None, A, B, s)
    dA, dB = torch.autograd.grad(y.sum(), [A, B])
    expected = x.detach() @ W.T + s * ((x.detach() @ A.T) @ B.T)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert dA.abs().max() > 0 and dB.abs().max() > 0


def test_with_b_zero_the_output_is_the_base_bitwise():
    x, W, b, A, B, s = tensors(torch.float32)
    y = lora_function.lora_linear(x, W, b, A, torch.zeros_like(B), s)
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))


def test_a_shared_a_gets_the_gradients_of_all_three():
    losses = {}
    for mode in ("on", "off"):
        with forced(mode):
            model = LoRA(rank=4, targets=("q", "k", "v"), share_qkv=True).attach(tiny_model())
            torch.manual_seed(1)
            for p in model.attachments[0].parameters().values():
                torch.nn.init.normal_(p)
            ids = tiny_ids()
            model.loss(ids, ids).backward()
            losses[mode] = [p.grad for p in model.attachments[0].parameters().values()]
    for a, b in zip(losses["on"], losses["off"]):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # float64 through two blocks


@pytest.mark.parametrize("case", ["autocast", "trained weight", "trained bias", "no grad", "few"])
def test_where_the_twin_cannot_serve_or_does_not_pay_the_definition_runs(case, monkeypatch):
    def refuse(*_):
        raise AssertionError("the twin ran")

    x, W, b, A, B, s = tensors(torch.float32, rows=(50,))
    W, b = W.clone(), b.clone()
    (twin,) = [t for t in lora.lora_linear.twins if t.module == lora_function.__name__]
    monkeypatch.setattr(twin, "loaded", refuse)
    with pytest.raises(AssertionError, match="the twin ran"):
        lora.lora_linear(x, W, b, A, B, s)
    if case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            lora.lora_linear(x, W, b, A, B, s)
    elif case == "no grad":
        with torch.no_grad():
            lora.lora_linear(x, W, b, A, B, s)
    elif case == "few":
        lora.lora_linear(x[:3], W, b, A, B, s)
    else:
        (W if case == "trained weight" else b).requires_grad_()
        lora.lora_linear(x, W, b, A, B, s)


def test_a_hook_on_the_projection_still_fires():
    model = LoRA(rank=4).attach(tiny_model())
    seen = []
    model.blocks[0].attn.q.inner.register_forward_hook(lambda *_: seen.append(1))
    ids = torch.zeros(2, 30, dtype=torch.int64)
    model.loss(ids, ids).backward()
    assert seen == [1]


def test_fifty_steps_give_the_same_losses_as_the_definition():
    on, off = (fifty_losses(mode, rank=4, targets=("q", "v", "down")) for mode in ("on", "off"))
    assert max(abs(a - b) for a, b in zip(on, off)) < 1e-3  # float32 roundings, 50 steps on
    assert on[-1] < on[0] - 0.5
