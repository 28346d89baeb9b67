"""Chapter 01, a GPT from scratch."""

from __future__ import annotations

import math

import torch


def exercise_1(answer):
    q, k, v = torch.randn(3, 5, 4).double().unbind(0)
    y = answer(q, k, v)
    assert y.shape == (5, 4), (
        f"the result has shape {tuple(y.shape)}, not (5, 4)"
    )
    assert torch.allclose(y[0], v[0]), "the first token sees only itself"
    later = v.clone()
    later[-1] += 1
    assert torch.allclose(answer(q, k, later)[:-1], y[:-1]), (
        "a later value reaches an earlier token"
    )
    expected = []
    for t in range(5):
        scores = [
            math.exp(float(q[t] @ k[s]) / math.sqrt(4)) for s in range(t + 1)
        ]
        expected.append(
            sum(w * v[s] for s, w in enumerate(scores)) / sum(scores)
        )
    assert torch.allclose(y, torch.stack(expected), rtol=1e-9), (
        "causal, but the weights are not those of (GPT 4): what divides the scores?"
    )


def exercise_2(answer):
    for V, C, L, D, F in [
        (97, 64, 2, 32, 128),
        (11, 7, 3, 8, 5),
        (5, 3, 1, 2, 9),
    ]:
        blocks = L * (4 * (D * D + D) + D * F + F + F * D + D + 4 * D)
        right = V * D + C * D + blocks + 2 * D
        got = answer(V, C, L, D, F)
        told = f"V={V}, C={C}, L={L}, D={D}, F={F}: you count {got:,}"
        assert got != right + V * D, (
            told + "; the head shares the embedding's matrix"
        )
        assert got != right - 2 * D, told + "; there is one more LayerNorm"
        assert got == right, (
            told + f", {'too many' if got > right else 'too few'}"
        )


def exercise_3(answer):
    for T, S in [(4, 4), (1, 6), (3, 5)]:
        mask = answer(T, S)
        assert mask.shape == (T, S), (
            f"for T={T}, S={S} the shape is {tuple(mask.shape)}"
        )
        assert mask.dtype == torch.bool, f"the mask is {mask.dtype}, not bool"
        assert bool(mask[-1].all()), (
            f"T={T}, S={S}: the last query may see every key"
        )
        for t in range(T):
            seen = int(mask[t].sum())
            assert seen == S - T + t + 1, (
                f"T={T}, S={S}: query {t} sees {seen} keys; "
                "it belongs to a key, and sees that one and those before"
            )
            assert bool(mask[t, :seen].all()), (
                "the keys it sees are not the earliest ones"
            )
