"""Chapter 07, prefix tuning."""

import torch


def attend(q, K, V, P_k, P_v):
    keys, values = torch.cat([P_k, K]), torch.cat([P_v, V])
    scores = q @ keys.T / q.shape[-1] ** 0.5
    hidden = torch.ones_like(scores).tril(len(P_k)) == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def prefix_behind(q, K, V, P_k, P_v):
    keys, values = torch.cat([K, P_k]), torch.cat([V, P_v])
    scores = q @ keys.T / q.shape[-1] ** 0.5
    hidden = torch.ones_like(scores).tril(len(P_k)) == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def mask_not_moved(q, K, V, P_k, P_v):
    keys, values = torch.cat([P_k, K]), torch.cat([P_v, V])
    scores = q @ keys.T / q.shape[-1] ** 0.5
    hidden = torch.ones_like(scores).tril() == 0
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values


def not_causal(q, K, V, P_k, P_v):
    keys, values = torch.cat([P_k, K]), torch.cat([P_v, V])
    return (q @ keys.T / q.shape[-1] ** 0.5).softmax(-1) @ values


def mass(q, K, P_k):
    scores = q @ torch.cat([P_k, K]).T / q.shape[-1] ** 0.5
    return scores.softmax(-1)[:, : len(P_k)].sum(-1)


def mass_without_scale(q, K, P_k):
    return (q @ torch.cat([P_k, K]).T).softmax(-1)[:, : len(P_k)].sum(-1)


def odds(q, K, P_k):
    d = q.shape[-1] ** 0.5
    return (q @ P_k.T / d).exp().sum(-1) / (q @ K.T / d).exp().sum(-1)


def counts(p, L, D, m):
    return p * D + D * m + m + 2 * L * D * (m + 1), 2 * p * L * D


REFERENCE = {"07.1": attend, "07.2": mass, "07.3": counts}
WRONG = {
    "07.1": [prefix_behind, mask_not_moved, not_causal],
    "07.2": [mass_without_scale, odds],
    "07.3": [
        lambda p, L, D, m: (p * D + D * m + 2 * L * D * m, 2 * p * L * D),
        lambda p, L, D, m: (counts(p, L, D, m)[0], p * L * D),
        lambda p, L, D, m: (counts(p, L, D, m)[0] * L, 2 * p * L * D),
    ],
}
