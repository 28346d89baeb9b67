"""Chapter 03, full fine-tuning and forgetting."""

from __future__ import annotations

import math


def exercise_1(answer):
    first = answer(1.0, 0.5, 0.0, 0.0, 1, 0.1, 0.0)
    assert abs(first - 0.9) < 1e-6, (
        f"the step from the text gives {first:.4f}, not 0.9"
    )
    w, g, m, v, t, lr, decay = 2.0, -0.3, 0.2, 0.04, 7, 0.05, 0.5
    got = answer(w, g, m, v, t, lr, decay)
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    step = lr * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
    assert abs(got - (w - step)) > 1e-6, "the decay is missing"
    assert abs(got - (w - step - lr * decay * w)) < 1e-6, (
        "the first step is right, the seventh is not: what do both corrections divide by, "
        "and which w does the decay shrink?"
    )


def exercise_2(answer):
    assert answer(10, 10) == 160, "all trained: 16 bytes for each"
    assert answer(10, 0) == 40, "nothing trained: the weights alone"
    assert answer(1000, 7) == 4084, (
        "a trained parameter needs 12 bytes more than a frozen one"
    )


def exercise_3(answer):
    cases = {
        ("blocks.3.attn.q.bias", 4, 1): True,
        ("blocks.2.attn.q.bias", 4, 1): False,
        ("blocks.2.mlp.up.weight", 4, 2): True,
        ("blocks.3.attn.o.weight", 4, 2): True,
        ("ln_f.weight", 4, 1): False,
        ("embed.token.weight", 4, 4): False,
        ("blocks.1.ln_1.weight", 12, 2): False,
        ("blocks.10.ln_1.weight", 12, 2): True,
        ("blocks.0.mlp.down.bias", 4, 4): True,
    }
    for (path, n_layer, layers), right in cases.items():
        got = answer(path, n_layer, layers)
        assert bool(got) == right, (
            f"{path} of {n_layer} blocks, layers={layers}: you say {bool(got)}"
        )
