"""Chapter 07, prefix tuning."""

from __future__ import annotations

import math

import torch


def exercise_1(answer):
    T, p, d = 5, 3, 4
    q, K, V = (torch.randn(T, d).double() for _ in range(3))
    P_k, P_v = (torch.randn(p, d).double() for _ in range(2))
    out = answer(q, K, V, P_k, P_v)
    assert out.shape == (T, d), f"shape {tuple(out.shape)}, not {(T, d)}"
    changed = K.clone()
    changed[-1] += 1
    again = answer(q, changed, V, P_k, P_v)
    assert close(again[:-1], out[:-1]), (
        "a changed last key moved earlier outputs: somebody sees the future"
    )
    assert not close(answer(q, K, V, P_k + 1, P_v)[0], out[0]), (
        "the first word does not see the prefix"
    )
    wanted = []
    for t in range(T):
        keys = torch.cat([P_k, K[: t + 1]])
        scores = (keys @ q[t]) / math.sqrt(d)
        weights = scores.exp() / scores.exp().sum()
        wanted.append(weights @ torch.cat([P_v, V[: t + 1]]))
    assert close(out, torch.stack(wanted)), (
        "causal, and every word sees the prefix; but the weights are not those of (Prefix 1)"
    )


def exercise_2(answer):
    q, K = torch.randn(4, 9).double(), torch.randn(6, 9).double()
    P_k = torch.randn(2, 9).double()
    mass = answer(q, K, P_k)
    assert mass.shape == (4,), f"a number a query, not {tuple(mass.shape)}"
    even = answer(torch.zeros_like(q), K, P_k)
    assert close(even, torch.full((4,), 0.25).double()), (
        "a query of zeros likes all 8 keys equally: what share have 2 of them?"
    )
    own, text = (q @ P_k.T / 3).exp().sum(1), (q @ K.T / 3).exp().sum(1)
    assert close(mass, own / (own + text)), "scores are divided by sqrt(d)"


def exercise_3(answer):
    for p, L, D, m in [(16, 4, 128, 256), (3, 2, 10, 7)]:
        pair = answer(p, L, D, m)
        assert len(pair) == 2, "two numbers: trained, kept"
        trained, kept = pair
        assert kept == 2 * p * L * D, (
            f"kept: keys and values, for {p} tokens in {L} layers of width {D}"
        )
        wanted = p * D + (m * D + m) + L * (2 * D * m + 2 * D)
        assert trained != wanted - m - 2 * L * D, "the biases are missing"
        assert trained == wanted, (
            "trained: E', then W' and b' once, then W_l and b_l for each layer"
        )


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
