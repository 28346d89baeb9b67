"""Fifty steps of training with kernels and without end at the same losses: what single calls
cannot show, a gradient that is slightly wrong in one direction.
"""

import pytest
import torch

from minipeft import IA3, Adapter, FullFineTuning, LoRA, PrefixTuning, dispatch
from minipeft.compressed.linear_distillation import linear_distillation_loss
from minipeft.dispatch import forced
from minipeft.gpt import GPTConfig
from minipeft.quantized.adamw_8bit import AdamW8bit
from minipeft.technique import trainable_parameters
from tests.kernels.harness import DEVICE
from tests.tiny import tiny_ids, tiny_model

STEPS = 50
CONFIG = GPTConfig(vocab_size=37, context_length=16, n_layer=1, n_head=2, d_model=16)


def losses(technique, choice, distilled, optimizer):
    """The losses of fifty steps on one batch, labels that are not all counted."""
    torch.manual_seed(3)
    model = tiny_model(CONFIG, torch.float32).to(DEVICE)
    technique.attach(model)
    ids = tiny_ids(2, 6, CONFIG.vocab_size).to(DEVICE)
    x, labels = ids[:, :-1], ids[:, 1:].clone()
    labels[0, :2] = -100
    teacher = torch.randn(labels.numel(), 5).to(DEVICE), torch.randn(37, 5).to(DEVICE)
    optimizer = optimizer(trainable_parameters(model))
    found = []
    with forced(choice):
        for _ in range(STEPS):
            if distilled:
                features = model.features(x).flatten(0, 1)
                head = model.head.weight
                loss = linear_distillation_loss(
                    features, head, *teacher, labels.flatten(), 2.0, 0.5
                )
            else:
                loss = model.loss(x, labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    return found


def adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-2)


def adamw_8bit(parameters):
    return AdamW8bit(parameters, lr=1e-2, min_8bit_size=0)


@pytest.mark.parametrize(
    ("technique", "kernels", "distilled", "optimizer"),
    [
        (LoRA(rank=2), ("lora", "cross_entropy"), False, adamw),
        (Adapter(bottleneck=4), ("adapter", "cross_entropy"), False, adamw),
        (IA3(), ("ia3", "cross_entropy"), False, adamw),
        (PrefixTuning(prefix_length=3), ("prefix_attention", "cross_entropy"), False, adamw),
        (FullFineTuning(), ("linear_distillation",), True, adamw),
        (LoRA(rank=2), ("adamw_8bit", "cross_entropy"), False, adamw_8bit),
    ],
    ids=["LoRA", "Adapter", "IA3", "PrefixTuning", "distillation", "AdamW8bit"],
)
def test_fifty_steps(technique, kernels, distilled, optimizer, monkeypatch):
    monkeypatch.setattr(dispatch, "_said", set())
    fast = losses(technique, "on", distilled, optimizer)
    ran = {module for _, module, refusal in dispatch._said if not refusal}
    assert {f"minipeft.kernels.{name}" for name in kernels} <= ran
    plain = losses(technique, "off", distilled, optimizer)
    assert plain[-1] < plain[0] - 0.05, "nothing was learned, so nothing is compared"
    # float32 on both sides; 50 steps multiply a rounding by a few hundred
    assert max(abs(a - b) for a, b in zip(fast, plain)) < 1e-3
