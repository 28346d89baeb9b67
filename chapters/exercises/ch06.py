"""Chapter 06, prompts and prompt tuning."""

from __future__ import annotations

import torch


def exercise_1(answer):
    E, pos = torch.randn(9, 4).double(), torch.randn(12, 4).double()
    P, ids = torch.randn(3, 4).double(), torch.tensor([5, 0, 5, 8, 1])
    x = answer(P, E, pos, ids)
    assert x.shape == (8, 4), (
        f"3 rows and 5 words make 8 rows of 4, not {tuple(x.shape)}"
    )
    words = torch.stack([E[i] for i in ids.tolist()])
    assert not close(x[:5], words + pos[:5]), "the prompt stands in front"
    assert not close(x[3:], words + pos[:5]), (
        "the text still stands at positions 0 to T-1, where the prompt is"
    )
    assert close(x[3:], words + pos[3:8]), "the rows of the text are wrong"
    assert not close(x[:3], P), "virtual tokens have positions too"
    assert close(x[:3], P + pos[:3]), "the rows of the prompt are wrong"


def exercise_2(answer):
    for T, n in [(6, 2), (5, 1), (7, 5)]:
        logits = torch.randn(T, 11).double()
        ids = torch.randint(11, (T,))
        score = torch.as_tensor(answer(logits, ids, n))
        assert score.ndim == 0, f"one number, not a shape {tuple(score.shape)}"
        p = logits.exp() / logits.exp().sum(-1, keepdim=True)
        wanted = sum(p[t - 1, ids[t]].log() for t in range(T - n, T))
        late = sum(p[t, ids[t]].log() for t in range(T - n, T))
        assert not close(score, late), (
            "aligned one token late: which row of logits predicts ids[t]?"
        )
        assert not (n > 1 and close(score, wanted / n)), (
            "(Hard prompt 2) is a sum over the answer, not its mean"
        )
        assert close(score, wanted), f"not the sum for T={T}, n={n}"


def exercise_3(answer):
    loud = torch.zeros(3, 1, 2)
    loud[0, 0, 0], loud[1:, 0, 1] = 50.0, 1.0
    got = answer(loud)
    assert got.shape == (1,), f"one class a row, not {tuple(got.shape)}"
    assert got.tolist() == [1], "two prompts against one: the majority wins"
    tie = torch.tensor([[[0.0, 0.1, 0.0]], [[0.0, 0.0, 9.0]]])
    assert answer(tie).tolist() == [2], (
        "a tie goes to the class with the larger sum of probabilities"
    )
    unvoted = torch.tensor([[[4.0, 0, 3.9]], [[0, 4.0, 3.9]]])
    assert answer(unvoted)[0] != 2, "a class without a vote cannot win a tie"
    logits = torch.randn(5, 20, 4)
    for b, chosen in enumerate(answer(logits).tolist()):
        votes = [int(row[b].argmax()) for row in logits]
        most = max(votes.count(c) for c in range(4))
        assert votes.count(chosen) == most, "not the most frequent vote"


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
