"""Chapter 18, distillation."""

import torch
from torch.nn import functional as F


def kl(s, t, T):
    log_p, log_q = (t / T).log_softmax(-1), (s / T).log_softmax(-1)
    return T**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def exchanged(s, t, T):
    return kl(t, s, T)


def without_t_squared(s, t, T):
    return kl(s, t, T) / T**2


def loss(s, t, labels, T, alpha):
    counts = labels != -100
    soft = kl(s[counts], t[counts], T).mean()
    return alpha * soft + (1 - alpha) * F.cross_entropy(s[counts], labels[counts])


def alpha_on_the_hard_part(s, t, labels, T, alpha):
    return loss(s, t, labels, T, 1 - alpha)


def padding_counts(s, t, labels, T, alpha):
    return alpha * kl(s, t, T).mean() + (1 - alpha) * F.cross_entropy(s, labels)


def hard_part_softened(s, t, labels, T, alpha):
    counts = labels != -100
    soft = kl(s[counts], t[counts], T).mean()
    return alpha * soft + (1 - alpha) * F.cross_entropy(s[counts] / T, labels[counts])


REFERENCE = {
    "18.1": kl,
    "18.2": loss,
    "18.3": lambda p: -torch.special.xlogy(p, p).sum(-1).mean(),
}
WRONG = {
    "18.1": [exchanged, without_t_squared, lambda s, t, T: T * kl(s, t, T)],
    "18.2": [alpha_on_the_hard_part, padding_counts, hard_part_softened],
    "18.3": [
        lambda p: -(p * p.log()).sum(-1).mean(),  # 0 times minus infinity
        lambda p: -torch.special.xlogy(p, p).sum(),
        lambda p: -torch.special.xlogy(p, p).mean(),
    ],
}
