"""Chapter 18, distillation."""

from __future__ import annotations

import torch


def exercise_1(answer):
    s, t = torch.randn(2, 5, 7).double()
    zero = answer(t, t, 2.0)
    assert zero.shape == (5,), f"one number a row, not {tuple(zero.shape)}"
    assert zero.abs().max() < 1e-9, (
        "a student that says what the teacher says loses nothing"
    )
    found = answer(s, t, 1.0)
    p, q = torch.softmax(t, -1), torch.softmax(s, -1)
    assert torch.allclose(found, (p * (p / q).log()).sum(-1)), (
        "at T = 1 it is the mean of log p - log q under p, the teacher"
    )
    p, q = torch.softmax(t / 4, -1), torch.softmax(s / 4, -1)
    ratio = (answer(s, t, 4.0) / (p * (p / q).log()).sum(-1)).mean()
    assert abs(ratio - 16) < 1e-6, (
        "at T = 4: soften both, and multiply so that the gradient keeps its size (Distill 2)"
    )


def exercise_2(answer):
    s, t = torch.randn(2, 6, 7).double()
    labels = torch.tensor([3, -100, 0, 6, -100, 2])
    counts = labels != -100
    hard = -torch.log_softmax(s, -1)[counts, labels[counts]].mean()
    found = answer(s, t, labels, 3.0, 0.0)
    assert found.shape == (), (
        f"the loss is one number, not {tuple(found.shape)}"
    )
    assert abs(found - hard) < 1e-9, (
        "at alpha = 0 it is cross-entropy at temperature 1, a mean over the tokens that count"
    )
    p, q = torch.softmax(t / 3, -1)[counts], torch.softmax(s / 3, -1)[counts]
    soft = 9 * (p * (p / q).log()).sum(-1).mean()
    assert abs(answer(s, t, labels, 3.0, 1.0) - soft) < 1e-9, (
        "at alpha = 1 it is the soft part alone, a mean over the tokens that count"
    )
    mixed = answer(s, t, labels, 3.0, 0.25)
    assert abs(mixed - (0.25 * soft + 0.75 * hard)) < 1e-9, (
        "alpha weighs the soft part"
    )


def exercise_3(answer):
    certain = torch.eye(4).double()
    assert abs(answer(certain)) < 1e-9, (
        "where one word must follow, the truth costs nothing"
    )
    even = torch.full((2, 8), 1 / 8).double()
    assert abs(answer(even) - torch.tensor(8.0).log()) < 1e-6, (
        "where 8 words are equally likely, nobody can pay less than ln 8"
    )
    p = torch.softmax(3 * torch.randn(5, 6).double(), -1)
    q = torch.softmax(torch.randn(5, 6).double(), -1)
    cross, kl = (
        -(p * q.log()).sum(-1).mean(),
        (p * (p / q).log()).sum(-1).mean(),
    )
    assert abs(answer(p) - (cross - kl)) < 1e-6, (
        "it is cross-entropy less KL, for every student; a mean over rows"
    )
