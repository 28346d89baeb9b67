"""Chapter 06, prompts and prompt tuning."""

import torch


def first_layer(P, E, pos, ids):
    p, T = len(P), len(ids)
    return torch.cat([P + pos[:p], E[ids] + pos[p : p + T]])


def text_not_moved(P, E, pos, ids):
    return torch.cat([P + pos[: len(P)], E[ids] + pos[: len(ids)]])


def prompt_behind(P, E, pos, ids):
    p, T = len(P), len(ids)
    return torch.cat([E[ids] + pos[:T], P + pos[T : T + p]])


def prompt_without_positions(P, E, pos, ids):
    p, T = len(P), len(ids)
    return torch.cat([P, E[ids] + pos[p : p + T]])


def score(logits, ids, n):
    log_p = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]
    return log_p[len(log_p) - n :].sum()


def mean_score(logits, ids, n):
    return score(logits, ids, n) / n


def late_score(logits, ids, n):
    return logits.log_softmax(-1).gather(1, ids[:, None])[-n:, 0].sum()


def whole_row(logits, ids, n):
    return logits.log_softmax(-1)[:-1].gather(1, ids[1:, None]).sum()


def vote(logits):
    classes = logits.shape[-1]
    votes = torch.nn.functional.one_hot(logits.argmax(-1), classes).sum(0)
    tied = votes == votes.max(-1, keepdim=True).values
    return logits.softmax(-1).sum(0).masked_fill(~tied, -1.0).argmax(-1)


def mean_of_probabilities(logits):
    return logits.softmax(-1).mean(0).argmax(-1)


def first_of_a_tie(logits):
    classes = logits.shape[-1]
    votes = torch.nn.functional.one_hot(logits.argmax(-1), classes).sum(0)
    return votes.argmax(-1)


REFERENCE = {"06.1": first_layer, "06.2": score, "06.3": vote}
WRONG = {
    "06.1": [text_not_moved, prompt_behind, prompt_without_positions],
    "06.2": [mean_score, late_score, whole_row],
    "06.3": [mean_of_probabilities, first_of_a_tie],
}
