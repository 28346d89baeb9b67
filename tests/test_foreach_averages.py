"""The specification of foreach_averages.py: the definition's bits, in few calls."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import GPT, AdaLoRA, GPTConfig
from minipeft.dispatch import forced
from minipeft.low_rank import foreach_averages
from minipeft.low_rank.rank_allocator import averages, groups_of, scores_after_step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_are_the_definition_s(dtype):
    """(Allocator 1) (Allocator 2) (Allocator 3), over several steps."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 3), (3,), (1, 1), (40, 50)]
    found, expected = ([[torch.zeros(s, dtype=dtype) for s in shapes]] * 2 for _ in range(2))
    for _ in range(5):
        w, g = ([torch.randn(s, generator=generator, dtype=dtype) for s in shapes] for _ in "wg")
        with forced("off"):
            expected = averages(w, g, *expected, 0.85, 0.8)
        found = foreach_averages.averages(w, g, *found, 0.85, 0.8)
        for mine, theirs in zip(found, expected):
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs))


def test_what_was_given_is_not_written_to():
    w, g, M, U = ([torch.full((3,), float(n))] for n in range(1, 5))
    foreach_averages.averages(w, g, M, U, 0.5, 0.5)
    assert [t[0].tolist() for t in (w, g, M, U)] == [[float(n)] * 3 for n in range(1, 5)]


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **kwargs or {})


def test_the_number_of_calls_does_not_grow_with_the_tensors():
    def calls(n):
        lists = [[torch.ones(3) for _ in range(n)] for _ in range(4)]
        with Calls() as counted:
            foreach_averages.averages(*lists, 0.85, 0.8)
        return counted.count

    assert calls(30) == calls(2) < 12


@pytest.mark.parametrize(("numbers", "taken"), [(2048, True), (2049, False)])
def test_it_is_taken_for_small_tensors(numbers, taken, monkeypatch):
    calls = []
    monkeypatch.setattr(averages.twin, "loaded", lambda *lists: calls.append(1))
    lists = [[torch.ones(2 * numbers - 1), torch.ones(1)] for _ in range(4)]
    with forced("auto"):
        averages(*lists, 0.85, 0.8)
    assert bool(calls) == taken


@pytest.mark.parametrize("path", ["off", "on"])
def test_scores_of_a_model_are_the_same_either_way(path):
    model = GPT(GPTConfig(11, 16, n_layer=2, n_head=2, d_model=12))
    torch.manual_seed(0)
    technique = AdaLoRA(init_rank=3, target_rank=2)
    technique.attach(model)
    attachment, state = model.attachments[-1], {}
    for p in attachment.parameters().values():
        torch.nn.init.normal_(p)
        p.grad = torch.randn(p.shape)
    for _ in range(2):
        with forced(path):
            scores = scores_after_step(state, groups_of(attachment), 0.85, 0.8)
    layer = next(iter(groups_of(attachment).values()))[0]
    M = U = torch.zeros(1)
    parts = []
    for w in (layer.P, layer.E, layer.Q):  # by the formulas, once more
        M, U = torch.zeros_like(w), torch.zeros_like(w)
        for _ in range(2):
            sensitivity = (w * w.grad).abs()
            M = 0.85 * M + 0.15 * sensitivity
            U = 0.8 * U + 0.2 * (sensitivity - M).abs()
        parts.append(M * U)
    expected = parts[1] + parts[0].mean(0) + parts[2].mean(1)
    # float32: 0.15 and 1 - 0.85 differ in the last bit
    torch.testing.assert_close(next(iter(scores.values())), expected.detach(), rtol=1e-5, atol=0)
