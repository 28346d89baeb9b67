"""The specification of minipeft/soft_prompt/prefix_attention.py. Reference math in float64."""

import math

import pytest
import torch

from minipeft.gpt import AttentionCore, causal_mask
from minipeft.soft_prompt.prefix_attention import attend, prefix_attention, with_prefix
from minipeft.wrap import Wrapper
from tests.tiny import close

EXACT = 1e-12  # float64: the same sums in another order


def tensors(T=5, S=7, p=3, d=4, dtype=torch.float64):
    """q, k, v of 2 rows and 3 heads, and a prefix."""
    q, k, v = (torch.randn(2, 3, rows, d, dtype=dtype) for rows in (T, S, S))
    return q, k, v, torch.randn(2, 2, 3, p, d, dtype=dtype)


def written_out(q, k, v, prefix):
    """One query and one key at a time: text after the query is not seen, the prefix always is."""
    o, (T, d), S = torch.zeros_like(q), q.shape[2:], k.shape[2]
    for t in range(T):
        keys = [*prefix[0].unbind(2), *k.unbind(2)[: t + 1 + S - T]]
        values = [*prefix[1].unbind(2), *v.unbind(2)[: t + 1 + S - T]]
        weights = [((q[:, :, t] * key).sum(-1, keepdim=True) / math.sqrt(d)).exp() for key in keys]
        o[:, :, t] = sum(w * value for w, value in zip(weights, values)) / sum(weights)
    return o


@pytest.mark.parametrize(("T", "S"), [(5, 5), (1, 1), (1, 6), (3, 7)])
def test_attention_over_prefix_and_text(T, S):
    """(PrefixAttention 1), also when earlier keys come from a cache."""
    q, k, v, prefix = tensors(T, S)
    close(prefix_attention(q, k, v, prefix), written_out(q, k, v, prefix), EXACT)


def test_a_bare_core_gives_what_it_gave_bit_for_bit():
    q, k, v, prefix = tensors()
    core = AttentionCore(dropout=0.5).eval()
    assert torch.equal(attend(core, q, k, v, prefix), core(q, *with_prefix(prefix, k, v)))


def test_a_mask_is_obeyed():
    q, k, v, prefix = tensors(5, 5)
    mask = causal_mask(5, 8) & (torch.arange(8) != 4)
    expected = AttentionCore()(q, *with_prefix(prefix, k, v), mask)
    assert torch.equal(attend(AttentionCore(), q, k, v, prefix, mask), expected)
    assert not torch.equal(attend(AttentionCore(), q, k, v, prefix), expected)


def test_dropout_of_the_core_falls_in_training():
    q, k, v, prefix = tensors()
    core = AttentionCore(dropout=0.5)
    assert not torch.equal(attend(core, q, k, v, prefix), attend(core.eval(), q, k, v, prefix))


def test_a_wrapper_around_the_core_is_asked():
    class Twice(Wrapper):
        def forward(self, *args):
            return 2 * self.inner(*args)

    q, k, v, prefix = tensors()
    twice = attend(Twice(AttentionCore()), q, k, v, prefix)
    assert torch.equal(twice, 2 * attend(AttentionCore(), q, k, v, prefix))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_core_still_fires(register):
    core, seen = AttentionCore(), []
    getattr(core, register)(lambda *_: seen.append(1))
    attend(core, *tensors())
    assert seen == [1]


@pytest.mark.parametrize("case", ["wide heads", "two dtypes", "fewer keys", "no prefix", "double"])
def test_what_the_twin_does_not_take_the_definition_computes(case, monkeypatch):
    def refuse(*_):
        raise AssertionError("the twin ran")

    twin = prefix_attention.twin
    monkeypatch.setattr(twin, "loaded", refuse)
    monkeypatch.setattr(twin, "devices", ("cpu",))
    monkeypatch.setenv("MINIPEFT_FAST_PATH", "on")
    q, k, v, prefix = tensors(d=64, dtype=torch.float32)
    with pytest.raises(AssertionError, match="the twin ran"):
        prefix_attention(q, k, v, prefix)
    if case == "wide heads":
        prefix_attention(*tensors(d=65, dtype=torch.float32))
    elif case == "two dtypes":
        assert twin.refusal((q, k, v, prefix.bfloat16()), {}, "on")
    elif case == "fewer keys":
        assert twin.refusal((q, k[:, :, :4], v[:, :, :4], prefix), {}, "on")
    elif case == "no prefix":
        prefix_attention(q, k, v, prefix[..., :0, :])
    else:
        prefix_attention(*tensors())


def test_a_kernel_that_teaches_is_not_chosen_by_default():
    arguments = tensors(dtype=torch.float32)
    assert "not measured" in prefix_attention.twin._argument_refusal(arguments, {}, "auto")
