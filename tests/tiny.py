"""A model small enough that a test takes milliseconds, and what tests do to it again and again.

Its weights are larger than GPT-2's and its biases and gains are random: with weights at 0.02,
biases at 0 and gains at 1, attention is nearly uniform and half of all mistakes do not show.
"""

from __future__ import annotations

import torch

from minipeft.dispatch import forced
from minipeft.gpt import GPT, GPTConfig
from minipeft.low_rank.lora import LoRA
from minipeft.technique import trainable_parameters

CONFIG = GPTConfig(vocab_size=97, context_length=64, n_layer=2, n_head=4, d_model=32)


def tiny_model(config=CONFIG, dtype=torch.float64, seed=0):
    """A GPT in eval mode with random weights, biases and gains; the same bits for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config).to(torch.float64)
        model.reset_parameters(std=0.15)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.to(dtype).eval()


def tiny_ids(batch=3, time=11, vocab=CONFIG.vocab_size, seed=1):
    """Random token ids, (batch, time) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (batch, time), generator=generator)


def randomize(model, std=0.1, seed=2):
    """Add noise to every trained tensor, so that nothing is at its special starting value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable_parameters(model):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += std * noise.to(parameter.dtype)
    return model


def fifty_losses(mode, **lora):
    """The losses of fifty float32 steps of a LoRA on one batch, twins `on` or `off`."""
    with forced(mode):
        torch.manual_seed(0)
        model = LoRA(**lora).attach(tiny_model(dtype=torch.float32))
        optimizer, ids = torch.optim.AdamW(trainable_parameters(model), lr=1e-2), tiny_ids()
        losses = []
        for _ in range(50):
            loss = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step(), optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def check_fifty_steps(choose, monkeypatch, calls):
    """Fifty steps by the twin of `choose`, which runs `calls` times a step, and by its definition
    give the same losses.
    """
    seen, twin = [], choose.twin.load()
    monkeypatch.setattr(choose.twin, "loaded", lambda *a: seen.append(1) or twin(*a))
    on, off = (fifty_losses(mode, rank=2) for mode in ("on", "off"))
    assert len(seen) == 50 * calls
    # float32 noise of the last bit, grown by fifty steps of AdamW
    torch.testing.assert_close(on, off, rtol=1e-3, atol=1e-3)
    assert on[-1] < on[0]


def close(a, b, tolerance):
    """Assert that two tensors agree to `tolerance` of the second's largest value (at least 1)."""
    assert a.shape == b.shape, f"shapes {tuple(a.shape)} and {tuple(b.shape)}"
    error = (a - b).abs().max().item()
    scale = max(1.0, b.abs().max().item())
    assert error <= tolerance * scale, f"off by {error:.3g}, allowed {tolerance * scale:.3g}"
