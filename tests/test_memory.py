"""The specification of minipeft/memory.py's measured half."""

import torch

from minipeft import BitFit, FullFineTuning, LoRA
from minipeft.memory import PeakMemory, measure_peak, model_tensors, optimizer_bytes
from minipeft.technique import trainable_parameters
from tests.tiny import tiny_model


def test_the_peak_is_the_sum_of_what_lives_at_once():
    with PeakMemory() as memory:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000 live
        del a  # 4,000
        c = torch.zeros(500, dtype=torch.float64)  # 8,000
        assert memory.now == 8000
        del b, c
    assert memory.peak == 8000
    assert memory.now == 0


def test_views_cost_nothing():
    with PeakMemory() as memory:
        a = torch.zeros(7, 47)
        views = [a.T, a[3], a.view(-1), a.expand(2, 7, 47)]
        assert len(views) == 4
    assert memory.peak == 4 * 7 * 47


def test_what_was_there_before_counts_only_when_watched():
    before = torch.zeros(100)
    with PeakMemory() as memory:
        assert memory.now == 0
        memory.watch(before, before[1:])
        assert memory.now == 400


def test_autograd_keeps_what_the_backward_needs():
    x = torch.zeros(1000, requires_grad=True)
    with PeakMemory() as memory:
        y = x.exp()  # exp's gradient needs exp(x): kept by y itself
        z = y.sum()
        kept = memory.now
        del y
        assert memory.now == kept  # the graph of z still holds it
        del z
    assert kept == 4000 + 4


def test_the_optimizer_keeps_two_numbers_a_trained_parameter():
    model = LoRA(rank=4).attach(tiny_model())
    parameters = trainable_parameters(model)
    optimizer = torch.optim.AdamW(parameters)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    model.loss(ids, ids).backward()
    optimizer.step()
    steps = 4 * len(parameters)  # each tensor's step counter, one float32
    assert optimizer_bytes(optimizer) == 16 * LoRA(rank=4).count(model.config) + steps


def test_bitfit_needs_less_than_full_fine_tuning():
    peaks = {}
    for technique in (FullFineTuning(), BitFit()):
        model = technique.attach(tiny_model())
        optimizer = torch.optim.AdamW(trainable_parameters(model))
        ids = torch.zeros(2, 9, dtype=torch.int64)

        def step(model=model, optimizer=optimizer, ids=ids):
            model.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        peaks[type(technique).__name__] = measure_peak(step, model, optimizer)
    weights = 8 * FullFineTuning().count(model.config)
    # Full: weights, kept originals, gradients, two moments; nothing else here is as large.
    assert peaks["FullFineTuning"] > 5 * weights
    assert weights < peaks["BitFit"] < 2 * weights


def test_originals_set_aside_are_counted():
    plain = sum(t.numel() for t in model_tensors(tiny_model()))
    model = FullFineTuning().attach(tiny_model())
    kept = {id(t): t.numel() for t in model_tensors(model)}
    assert sum(kept.values()) == 2 * plain
