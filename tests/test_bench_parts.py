"""The specification of minipeft/bench_parts.py: what a technique and a twin are timed against."""

import functools

import pytest
import torch

from minipeft import LoRA, bench, bench_parts, dispatch, presets
from minipeft.gpt import GPTConfig
from minipeft.presets import Preset
from minipeft.roofline import operations
from minipeft.technique import trainable_parameters

SMALL = GPTConfig(vocab_size=97, context_length=32, n_layer=2, n_head=2, d_model=32)


@pytest.fixture
def small(monkeypatch):
    """The benchmarks' model, small enough for a test."""

    def tokens(batch=2, length=32):
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, 97, (batch, length + 1), generator=generator)

    monkeypatch.setattr(bench, "SHAPE", SMALL)
    monkeypatch.setattr(bench, "tokens", tokens)


def test_every_preset_but_full_is_timed_against_full_fine_tuning(small, monkeypatch):
    some = {n: presets.PRESETS[n] for n in ("full", "LoRA", "prompt")}
    monkeypatch.setattr(presets, "PRESETS", some | {"mine": Preset(LoRA(rank=1, targets=("q",)))})
    results = bench_parts.techniques(rounds=1)
    assert [r.name for r in results] == ["LoRA, step", "prompt, step", "mine, step"]
    assert {r.peer for r in results} == {"full fine-tuning"}
    assert results[-1].extra["trained"] == 2 * 2 * 32
    assert all(r.operations > 0 and r.ratio > 0 for r in results)


def test_a_step_trains_what_the_technique_trains_and_nothing_else(small):
    model, step, loss = bench_parts.step_of(LoRA(rank=2), "cpu")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    first = float(loss().detach())
    step(), step()
    assert float(loss().detach()) != first
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    trained = {id(p) for p in trainable_parameters(model)}
    assert moved == {n for n, p in model.named_parameters() if id(p) in trained}
    assert all(p.grad is None for p in model.parameters())


def test_a_text_fits_behind_virtual_tokens(small):
    whole, *_ = bench_parts.step_of(None, "cpu")
    shorter, *_ = bench_parts.step_of(presets.PRESETS["prompt"].technique, "cpu")
    p = shorter.embed.position_shift
    assert bench_parts.room(whole) == 32
    assert 24 - p <= bench_parts.room(shorter) <= 32 - p and bench_parts.room(shorter) % 8 == 0


@pytest.mark.parametrize("name", bench_parts.IN_PEFT)
def test_peft_trains_on_from_our_file_with_the_same_loss(small, name):
    pytest.importorskip("peft")
    result = bench_parts.step_against_peft(name, 1, "cpu")
    assert result.peer == "transformers + peft" and result.name == f"{name}, step from our file"
    ours, theirs = result.extra["trained"], result.extra["by peft"]
    assert ours == theirs if name in bench_parts.PROMPTS else ours < theirs <= 2 * ours


def test_every_twin_has_a_size_one_meets_in_practice():
    twins = {(t.definition.__module__, t.definition.__name__) for t in dispatch.every_twin()}
    assert twins == bench_parts.SIZES.keys()


SIZES = {
    "lora_linear": {"M": 6, "D": 8, "r": 2},
    "feed_forward": {"M": 6, "D": 8},
    "causal_attention": {"B": 2, "H": 2, "T": 6, "d": 8},
    "quantize_blocks": {"n": 2**9},
    "dequantize_blocks": {"n": 2**9},
    "dequantize_doubled": {"n": 2**15},
    "frozen_product": {"D": 64},
    "averages": {"matrices": 2},
    "cross_entropy_rows": {"M": 4, "V": 9},
    "distillation_rows": {"M": 4, "V": 9},
    "adamw_8bit_step": {"n": 2**9},
    "rescale": {"M": 6, "N": 8},
    "add_bottleneck": {"M": 6, "D": 8, "m": 2},
    "prefix_attention": {"B": 2, "H": 2, "T": 6, "d": 8, "p": 3},
    "rows_branches": {"rows": 3, "T": 4, "D": 8, "r": 2},
    "pack_2_4": {"D": 16},
    "unpack_2_4": {"D": 16},
}


@pytest.fixture
def small_twins(small, monkeypatch):
    """SIZES with every size small."""
    made = {
        place: functools.partial(make, **SIZES.get(make.__name__, {}))
        for place, make in bench_parts.SIZES.items()
    }
    monkeypatch.setattr(bench_parts, "SIZES", made)
    return made


def test_definitions_compute_on_every_size(small_twins):
    """Kernels for GPUs as well: what they would be compared with runs here."""
    for twin in dispatch.every_twin():
        place = twin.definition.__module__, twin.definition.__name__
        arguments, note, work = small_twins[place]("cpu")
        bench_parts.once(twin.definition, arguments)()
        assert note and max(work.values()) > 0, place


def test_twins_that_run_here_are_timed_against_their_definitions(small_twins):
    results = bench_parts.twins(rounds=1)
    names = [r.name for r in results]
    assert "lora_linear by lora_function" in names
    here = [t for t in dispatch.every_twin() if "cpu" in t.devices]
    assert len(results) == len(here) == len(set(names))
    assert {r.peer for r in results} == {"its definition"}


def test_a_twin_that_would_not_run_is_not_timed(small_twins, monkeypatch):
    (twin,) = (t for t in dispatch.every_twin() if t.module == "minipeft.feed_forward")
    monkeypatch.setattr(twin, "supports", lambda *args: False)
    assert "feed_forward by feed_forward" not in [r.name for r in bench_parts.twins(rounds=1)]


def test_both_sides_are_what_they_are_called(small_twins, monkeypatch):
    """Neither side falls back to the other, and a definition within a definition stays one."""
    modes = []

    def side(x):
        modes.append(dispatch.mode())
        return x

    with dispatch.forced("on"):
        bench_parts.once(side, (torch.ones(2),))()
    assert modes == ["off"]
    calls = []
    once = bench_parts.once
    monkeypatch.setattr(bench_parts, "once", lambda f, a: calls.append(f) or once(f, a))
    bench_parts.twins(rounds=1)
    twins = [t for t in dispatch.every_twin() if "cpu" in t.devices]
    assert calls == [f for t in twins for f in (t.loaded, t.definition)]


def test_a_side_goes_backward_where_gradients_are_wanted_and_leaves_none():
    x = torch.ones(3, requires_grad=True)
    seen = []

    def double(x):
        y = 2 * x
        y.register_hook(lambda gradient: seen.append((gradient.tolist(), x.grad)))
        return y

    action = bench_parts.once(double, (x,))
    action(), action()
    assert seen == [([1.0] * 3, None)] * 2
    assert x.grad is None


def test_what_a_side_overwrites_is_its_own_copy():
    x = torch.ones(3)
    bench_parts.once(lambda x: x.mul_(2), (x,))()
    assert x.tolist() == [1.0] * 3


def test_the_operations_of_a_linear_layer_with_lora_are_counted_right():
    """Against torch's counter on the definition: forward W x, A x, B u; backward the gradients of
    x through W, and of u, A, B and x through the branch.
    """
    arguments, _, work = bench_parts.lora_linear("cpu", M=64, D=32, r=4)
    from minipeft.low_rank.lora import lora_linear

    action = bench_parts.once(lora_linear.twin.definition, arguments)
    assert operations(action) == work["operations"]


def test_the_operations_of_the_feed_forward_layer_are_counted_right():
    from minipeft.gpt import feed_forward

    arguments, _, work = bench_parts.feed_forward("cpu", M=16, D=8)
    action = bench_parts.once(feed_forward.twin.definition, arguments)
    assert operations(action) == work["operations"]


def test_the_operations_of_attention_are_counted_right():
    """Six products of the lower triangle, which is all of what the twin does but half a block of
    the diagonal: it forms whole blocks of 64 queries.
    """
    from minipeft.causal_attention import attention

    B, H, T, d = 2, 3, 640, 4
    arguments, _, work = bench_parts.causal_attention("cpu", B, H, T, d)
    done = operations(bench_parts.once(attention, arguments))
    assert done - work["operations"] == 6 * B * H * T * 64 * d


def test_attention_is_timed_as_the_model_lays_out_its_heads():
    arguments, *_ = bench_parts.causal_attention("cpu", B=2, H=3, T=5, d=4)
    for x in arguments:
        assert x.shape == (2, 3, 5, 4) and x.transpose(1, 2).is_contiguous() and x.requires_grad
