"""The specification of minipeft/quantized/adamw_8bit.py."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft import FullFineTuning
from minipeft.dataset import encode_all
from minipeft.evaluation import METRICS
from minipeft.quantized import adamw_8bit
from minipeft.quantized.adamw_8bit import (
    MAPS,
    AdamW8bit,
    dequantize_blocks,
    quantize_blocks,
    show_work,
)
from minipeft.quantized.paged_adamw import adamw_update
from minipeft.town import TASKS, load_base
from minipeft.training import TrainingConfig, optimizer_bytes, train
from tests.test_paged_adamw import SETTINGS, give_gradients, run, same, tensors
from tests.test_resume import DATA, Stop, same_bits
from tests.tiny import tiny_model

LARGE = [(7, 147), (300,), (5,)]


def nearest(x, q):
    """Index of the value of q nearest to each of x, by trying them all."""
    return (q.double() - x.double()[:, None]).abs().argmin(1)


# -- the map and the blocks


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_has_seven_decades_each_twice_as_dense_as_the_one_below(signed):
    """(Adam8 4)"""
    q = MAPS[signed]
    assert len(q) == 256 and q[q >= 0].min() == 0 and q.max() == 1
    assert torch.all(q[1:] > q[:-1])
    for e in range(7):
        low, high = 10.0 ** (e - 7), 10.0 ** (e - 6)
        decade = q[(q > low) & (q < high)].double()
        parts = 2**e if signed else 2 ** (e + 1)
        width = 0.9 * high / parts
        expected = low + width * (torch.arange(parts, dtype=torch.float64) + 0.5)
        # float32 edges around 10^(e-6), a few roundings of it
        torch.testing.assert_close(decade, expected, rtol=0, atol=4e-7 * high)
    assert int((q < 0).sum()) == (127 if signed else 0)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("N", [1, 255, 256, 257, 1000])
def test_codes_are_the_nearest_of_the_map_in_blocks_of_256(signed, N):
    """(Adam8 1) (Adam8 2) (Adam8 3)"""
    x = torch.randn(N) * torch.logspace(-3, 3, N)
    x = x if signed else x.square()
    codes, absmax = quantize_blocks(x, signed)
    assert codes.dtype == torch.uint8 and codes.shape == (N,)
    assert absmax.shape == (-(-N // 256),)
    for b in range(len(absmax)):
        block = x[256 * b : 256 * b + 256]
        assert absmax[b] == block.abs().max()
        expected = nearest(block / absmax[b], MAPS[signed])
        assert torch.equal(codes[256 * b : 256 * b + 256].long(), expected)
    back = dequantize_blocks(codes, absmax, signed)
    scale = absmax.repeat_interleave(256)[:N]
    assert torch.equal(back, MAPS[signed][codes.long()] * scale)


def test_a_tie_goes_to_the_lower_code():
    """A value exactly halfway between two neighbours of the map, which is exact in float32."""
    q = MAPS[True]
    middle = (q[-1] + q[-2]) / 2
    x = torch.tensor([1.0, middle.item()])
    assert quantize_blocks(x, True)[0].tolist() == [255, 254]


def test_zeros_stay_zeros_and_a_block_of_them_too():
    for signed in (True, False):
        x = torch.zeros(600)
        x[300] = 2.0
        codes, absmax = quantize_blocks(x, signed)
        assert absmax.tolist() == [0.0, 2.0, 0.0]
        assert torch.equal(dequantize_blocks(codes, absmax, signed), x)


def test_the_largest_of_a_block_is_exact_when_positive():
    x = torch.rand(512) + 1
    back = dequantize_blocks(*quantize_blocks(x, False), False)
    for b in (0, 256):
        i = b + int(x[b : b + 256].argmax())
        assert back[i] == x[i]


def test_an_outlier_spoils_its_own_block_only():
    x = torch.full((512,), 1e-3)
    x[0] = 1e6
    back = dequantize_blocks(*quantize_blocks(x, True), True)
    assert torch.all(back[1:256] == 0)
    torch.testing.assert_close(back[256:], x[256:])


@given(st.integers(0, 2**31), st.integers(1, 700), st.booleans())
def test_quantising_again_changes_nothing_where_the_largest_is_positive(seed, N, signed):
    """The map has 1 but no -1, so only a positive maximum is kept exactly."""
    x = torch.randn(N, generator=torch.Generator().manual_seed(seed)).abs()
    codes, absmax = quantize_blocks(x, signed)
    again, same_absmax = quantize_blocks(dequantize_blocks(codes, absmax, signed), signed)
    assert torch.equal(codes, again) and torch.equal(absmax, same_absmax)


def test_the_work_shown_is_the_work_done():
    x = torch.randn(300)
    work = show_work(x, True)
    codes, absmax = quantize_blocks(x, True)
    assert torch.equal(work["codes"], codes) and torch.equal(work["absmax"], absmax)
    assert work["scaled"].abs().max() == 1 and work["scaled"].shape == (2, 256)
    assert work["thresholds"].shape == (255,)


# -- the optimizer


def test_small_tensors_are_adamw_bitwise():
    parameters, twins = tensors(), tensors()
    optimizer = AdamW8bit(parameters, **SETTINGS)
    plain = torch.optim.AdamW(twins, foreach=False, **SETTINGS)
    assert same(run(optimizer, parameters, 20), run(plain, twins, 20))


def test_min_8bit_size_is_the_first_size_in_8_bits():
    for size, codes in ((99, False), (100, True), (101, True)):
        w = torch.nn.Parameter(torch.zeros(size))
        w.grad = torch.ones(size)
        optimizer = AdamW8bit([w], min_8bit_size=100)
        optimizer.step()
        assert ("exp_avg_codes" in optimizer.state[w]) == codes


def by_hand(w, gradients):
    """A few steps with rounded moments, element by element in plain torch."""
    m, v = torch.zeros(w.numel()), torch.zeros(w.numel())
    w, values = w.detach().flatten().clone(), [SETTINGS[n] for n in ("lr", "betas", "eps")]
    for t, g in enumerate(gradients, 1):
        adamw_update(w, g.flatten(), m, v, t, *values, SETTINGS["weight_decay"])
        for moment, q in ((m, MAPS[True]), (v, MAPS[False])):
            for start in range(0, len(moment), 256):
                block = moment[start : start + 256]
                top = block.abs().max()
                block.copy_(q[nearest(block / top, q)] * top)
    return w


def test_large_tensors_are_adamw_on_moments_rounded_after_each_step():
    """(Adam8 5)"""
    w = tensors(shapes=[(7, 147)])[0]
    gradients = [torch.randn(7, 147) for _ in range(5)]
    expected = by_hand(w, gradients)
    optimizer = AdamW8bit([w], min_8bit_size=0, **SETTINGS)
    for g in gradients:
        w.grad = g
        optimizer.step()
    assert torch.equal(w.detach().flatten(), expected)


def test_stretches_change_nothing(monkeypatch):
    results = []
    for stretch in (2**20, 256, 512):
        monkeypatch.setattr(adamw_8bit, "STRETCH", stretch)
        parameters = tensors(shapes=LARGE)
        results.append(run(AdamW8bit(parameters, min_8bit_size=0, **SETTINGS), parameters, 6))
    assert same(results[0], results[1]) and same(results[0], results[2])


def test_parameters_in_half_precision_and_not_contiguous():
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        w = torch.nn.Parameter(torch.randn(30, 20).to(dtype).T)
        exact = w.detach().to(torch.promote_types(dtype, torch.float32), copy=True)
        g = torch.randn(20, 30).to(dtype)
        w.grad = g.clone()
        AdamW8bit([w], min_8bit_size=0, **SETTINGS).step()
        adamw_update(
            exact,
            g.float(),
            torch.zeros(20, 30),
            torch.zeros(20, 30),
            1,
            *(SETTINGS[n] for n in ("lr", "betas", "eps", "weight_decay")),
        )
        assert torch.equal(w.detach(), exact.to(dtype))  # the first step: nothing rounded yet


def test_both_moments_take_two_bytes_and_a_32nd_a_weight():
    w = torch.nn.Parameter(torch.zeros(64, 1024))
    w.grad = torch.ones_like(w)
    optimizer = AdamW8bit([w])
    optimizer.step()
    assert optimizer_bytes(optimizer) == 2.03125 * w.numel() + 4  # and the step counter
    plain = torch.optim.AdamW([w])
    plain.step()
    assert optimizer_bytes(plain) == 8 * w.numel() + 4


def test_ten_steps_stay_close_to_adamw():
    parameters, twins = tensors(shapes=LARGE), tensors(shapes=LARGE)
    before = [p.detach().clone() for p in parameters]
    optimizer = AdamW8bit(parameters, lr=1e-3, min_8bit_size=0)
    plain = torch.optim.AdamW(twins, lr=1e-3, foreach=False)
    for step in range(10):
        for ps, o in ((parameters, optimizer), (twins, plain)):
            generator = torch.Generator().manual_seed(step)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=generator) + 0.5
            o.step()
    for p, q, b in zip(parameters, twins, before):
        off, moved = (p - q).norm() / (q - b).norm(), (q - b).norm()
        assert moved > 0 and off < 0.05  # each moment is off by up to a few percent in a step


def test_a_tensor_without_a_gradient_has_no_state():
    parameters = tensors(shapes=LARGE)
    parameters[0].grad = torch.ones_like(parameters[0])
    optimizer = AdamW8bit(parameters)
    optimizer.step()
    assert list(optimizer.state) == [parameters[0]]


# -- saving


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_dict_resumes_bitwise_and_codes_stay_bytes(dtype):
    parameters = tensors(dtype, shapes=LARGE)
    optimizer = AdamW8bit(parameters, min_8bit_size=100, **SETTINGS)
    run(optimizer, parameters, 5)
    saved = copy.deepcopy(optimizer.state_dict())
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = AdamW8bit(fresh, min_8bit_size=100, **SETTINGS)
    other.load_state_dict(saved)
    state = other.state[fresh[0]]
    assert state["exp_avg_codes"].dtype == torch.uint8
    assert state["exp_avg_absmax"].dtype == torch.float32
    assert same(run(other, fresh, 5, 5), run(optimizer, parameters, 5, 5))


def test_loading_shares_no_memory_with_what_was_loaded():
    parameters = tensors(shapes=LARGE)
    optimizer = AdamW8bit(parameters, min_8bit_size=100, **SETTINGS)
    run(optimizer, parameters, 5)
    saved = optimizer.state_dict()
    other = AdamW8bit(tensors(shapes=LARGE), min_8bit_size=100, **SETTINGS)
    other.load_state_dict(saved)
    mine = other.param_groups[0]["params"][0]
    a, b = other.state[mine], optimizer.state[parameters[0]]
    assert a["exp_avg_codes"].data_ptr() != b["exp_avg_codes"].data_ptr()


def test_a_training_run_killed_and_resumed_is_the_run_that_was_not(tmp_path):
    base = FullFineTuning().attach(tiny_model(dtype=torch.float32))

    def fit(folder=None, stop=None, resume=False):
        def act(model, step, steps):
            if step == stop:
                raise Stop

        model = copy.deepcopy(base)
        config = TrainingConfig(steps=6, batch_size=3, device="cpu", checkpoint_every=2)
        options = {"folder": folder, "resume": resume, "show": False, "after_step": [act]}
        make = {"make_optimizer": lambda groups: AdamW8bit(groups, min_8bit_size=300)}
        train(model, DATA, config, **make, **options)
        return model

    with pytest.raises(Stop):
        fit(tmp_path, stop=3)
    assert same_bits(fit(tmp_path, resume=True), fit())


# -- on a real task


def test_on_the_dialect_task_the_loss_stays_within_a_percent_of_adamw():
    """Full fine-tuning: LoRA's matrices are so small that they stay in float32."""
    found = {}
    for kind in (torch.optim.AdamW, AdamW8bit):
        model, tokenizer = load_base()
        FullFineTuning().attach(model)
        data = encode_all(TASKS["dialect"].train(0), tokenizer, model)
        config = TrainingConfig(steps=25, device="cpu", precision="float32", weight_decay=0.01)
        train(model, data, config, make_optimizer=kind, show=False)
        found[kind] = METRICS["nats"](model, TASKS["dialect"].test()[:40], tokenizer)
    assert found[AdamW8bit] == pytest.approx(found[torch.optim.AdamW], rel=0.01)
    assert found[AdamW8bit] != found[torch.optim.AdamW]


# -- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"min_8bit_size": -1}, "min_8bit_size=-1"),
        ({"weight_decay": -0.1}, "weight_decay"),
    ],
)
def test_values_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        AdamW8bit(tensors(), **options)


def test_gradients_are_given_alike():
    """The tests above compare optimizers; their gradients must not depend on the parameters."""
    a, b = tensors(seed=0), tensors(seed=1)
    give_gradients(a, 3)
    give_gradients(b, 3)
    assert all(p.grad is q.grad or torch.equal(p.grad, q.grad) for p, q in zip(a, b))
