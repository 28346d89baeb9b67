"""Lab: prefix tuning."""

from __future__ import annotations

import math

import torch

import minipeft
from minipeft import gpt
from minipeft.labs.engine.case import check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.soft_prompt import prefix_attention as attention
from minipeft.soft_prompt import prefix_tuning as prefix

MLP = Hint(
    "(Prefix 2): W_l tanh(W' E' + b') + b_l",
    "Are two linear layers in a row more than one? What stands between them in (Prefix 2)?",
    ("prefix_mlp",),
)
TABLE = Hint(
    "the table is [P_k; P_v] side by side, each head after head",
    "A row has 2 H d numbers. Which of them are the keys of head 1?",
    ("split_prefix",),
)
FRONT = Hint(
    "(Prefix 1): [P_k; K], the prefix in front, so that a mask aligned at the lower right shows it",
    "Which keys does the first token see? Is the prefix among them?",
    ("with_prefix",),
)
MASS = Hint(
    "(Prefix 3): lambda is a share of softmax(q k^T / sqrt(d))",
    "What are the scores divided by in the attention whose share you compute?",
    ("prefix_mass",),
)
MASK = Hint(
    "a given mask is widened in front, with True: every query sees the whole prefix",
    "The mask has S columns, there are p + S keys. Which columns are missing, and what is there?",
    ("PrefixCore.widened",),
)
POSITIONS = Hint(
    "the text's positions move by p, as if the prefix were text; `start` stays the text's own",
    "With p = 5, which position does the first token of the text have? And which `start`?",
    ("PrefixPositions.forward",),
)
DROPOUT = Hint(
    "dropout falls on the prefix in training only, for each row of the batch anew",
    "Run twice in eval mode. In training, do two rows of a batch lose the same numbers?",
    ("PrefixCore.prefix",),
)
COUNT = Hint(
    "the count: 2 p L D flat; p D + (D m + m) + 2 L D (m + 1) with the MLP",
    "Which tensors are there once, and which once a layer?",
    ("PrefixTuning.count",),
)
CACHED = Hint(
    "learned state is computed anew in every pass",
    "Change the table between two passes. Does the second pass see it?",
    ("PrefixCore.prefix",),
)

LAB = Lab(
    title="Prefix tuning: learned keys and values in front of the text",
    about="""
    Every layer's attention finds p more keys and values in front of the text's own. You write how
    they are made, how they enter the attention, what happens to masks and positions, and the gated
    sum that He et al. found in it.

    (Prefix 1) to (Prefix 3) are in the header of `prefix_tuning.py`; the joining of keys is in
    `prefix_attention.py`. `install_prefix`, the MLP's modules and the ablations are given.
    """,
    files=(
        "minipeft/soft_prompt/prefix_tuning.py",
        "minipeft/soft_prompt/prefix_attention.py",
    ),
    blanks=(
        "prefix_mlp",
        "split_prefix",
        "with_prefix",
        "prefix_mass",
        "PrefixCore.prefix",
        "PrefixCore.widened",
        "PrefixPositions.forward",
        "PrefixTuning.count",
    ),
    minutes=90,
    mistakes="""
    The prefix appended instead of prepended; a mask padded on the wrong side, or with False; text
    positions left at 0; heads interleaved by `view`; rows cached over training steps.
    """,
    bugs=(
        Bug(
            "prefix behind the text",
            "torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2)",
            "torch.cat([k, prefix[0]], 2), torch.cat([v, prefix[1]], 2)",
            FRONT,
            "minipeft/soft_prompt/prefix_attention.py",
        ),
        Bug("values for keys", ".permute(1, 2, 0, 3)", ".flip(1).permute(1, 2, 0, 3)", TABLE),
        Bug(
            "heads interleaved",
            "table.unflatten(1, (2, n_head, -1)).permute(1, 2, 0, 3)",
            "table.unflatten(1, (2, -1, n_head)).permute(1, 3, 0, 2)",
            TABLE,
        ),
        Bug(
            "positions at 0",
            "self.inner(ids, start, shift + self.own_position_shift)",
            "self.inner(ids, start, shift)",
            POSITIONS,
        ),
        Bug("the mask hides the prefix", "value=True", "value=False", MASK),
        Bug(
            "the mask is widened behind",
            "F.pad(mask, (length, 0), value=True)",
            "F.pad(mask, (0, length), value=True)",
            MASK,
        ),
        Bug(
            "no activation",
            "F.linear(embedding, down_weight, down_bias).tanh()",
            "F.linear(embedding, down_weight, down_bias)",
            MLP,
        ),
        Bug("mass without the scale", " / math.sqrt(q.shape[-1])", "", MASS),
        Bug(
            "dropout in evaluation too",
            "self.drop(rows[:, None].expand(-1, batch, -1, -1, -1))",
            "F.dropout(rows[:, None].expand(-1, batch, -1, -1, -1), self.drop.p)",
            DROPOUT,
        ),
        Bug(
            "one dropout for the whole batch",
            "self.drop(rows[:, None].expand(-1, batch, -1, -1, -1))",
            "self.drop(rows[:, None]).expand(-1, batch, -1, -1, -1)",
            DROPOUT,
        ),
        Bug(
            "rows cached",
            "split_prefix(self.table(), self.n_head)",
            'split_prefix(self.__dict__.setdefault("cached", self.table().clone()), self.n_head)',
            CACHED,
        ),
        Bug(
            "ReLU for tanh",
            "F.linear(embedding, down_weight, down_bias).tanh()",
            "F.linear(embedding, down_weight, down_bias).relu()",
            MLP,
        ),
    ),
)


def drawn(case, T, S):
    """q (B, H, T, d), k and v (B, H, S, d)."""
    B, H, d = case.size(2, 3), *case.sizes(2, 2, 4)
    return case.normal(B, H, T, d), case.normal(B, H, S, d), case.normal(B, H, S, d)


def attend(q, k, v, allowed):
    """Softmax attention with allowed (T, S) bool, written out."""
    weights = torch.exp(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])) * allowed
    return weights / weights.sum(-1, keepdim=True) @ v, weights


def core(case, n_head, width, length, dropout=0.0):
    """(a PrefixCore in eval mode around a plain core, its flat table's Parameter)."""
    table = prefix.Table(case.normal(length, 2 * n_head * width))
    return prefix.PrefixCore(gpt.AttentionCore(), table, n_head, dropout).eval(), table.weight


def halves(table, n_head, d):
    """P_k and P_v, (H, p, d), number by number."""
    p = table.shape[0]
    both = torch.zeros(2, n_head, p, d, dtype=table.dtype)
    for half in range(2):
        for h in range(n_head):
            first = (half * n_head + h) * d
            both[half, h] = table[:, first : first + d]
    return both.detach()


@LAB.invariant(6)
def the_mlp_is_the_equation(case):
    """(Prefix 2): W_l tanh(W' E' + b') + b_l."""
    p, D, m, out = case.sizes(4, 2, 9)
    E, W, b = case.normal(p, D), case.normal(m, D), case.normal(m)
    U, c = case.normal(out, m), case.normal(out)
    z = E @ W.T + b
    tanh = (torch.exp(z) - torch.exp(-z)) / (torch.exp(z) + torch.exp(-z))
    close(prefix.prefix_mlp(E, W, b, U, c), tanh @ U.T + c, "prefix_mlp")


@LAB.invariant(6)
def keys_come_before_values(case):
    """A row of the table is [P_k; P_v], each head after head."""
    H, d, p = case.sizes(3, 2, 6)
    table = case.normal(p, 2 * H * d)
    same(prefix.split_prefix(table, H), halves(table, H, d), "split_prefix")


@LAB.invariant(8)
def the_prefix_stands_in_front(case):
    """(Prefix 1): attention over [P_k; K] and [P_v; V], causal in the text; every query sees the
    whole prefix.
    """
    T, p = case.size(3, 6), case.size(1, 4)
    _, k, v = drawn(case, T, T)
    P = case.normal(2, *k.shape[:2], p, k.shape[-1])
    keys, values = attention.with_prefix(P, k, v)
    same(keys, torch.cat([P[0], k], 2), "the keys")
    same(values, torch.cat([P[1], v], 2), "the values")


@LAB.invariant(8)
def every_query_sees_the_prefix(case):
    """(Prefix 1): the core gives softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], causal in the text."""
    T, p = case.size(3, 6), case.size(1, 4)
    q, k, v = drawn(case, T, T)
    made, table = core(case, q.shape[1], q.shape[-1], p)
    P = halves(table, q.shape[1], q.shape[-1])
    keys = torch.cat([P[0].expand(len(k), -1, -1, -1), k], 2)
    values = torch.cat([P[1].expand(len(v), -1, -1, -1), v], 2)
    allowed = torch.tensor([[s < p or s - p <= t for s in range(p + T)] for t in range(T)])
    close(made(q, k, v), attend(q, keys, values, allowed)[0], "the core with a prefix")


@LAB.invariant(6)
def the_mass_gates_two_attentions(case):
    """(Prefix 3): (1 - lambda) attn(q, K, V) + lambda attn(q, P_k, P_v)."""
    T, p = case.size(2, 5), case.size(1, 4)
    q, k, _ = drawn(case, T, T + 1)
    P = case.normal(*k.shape[:2], p, k.shape[-1])
    on_prefix = torch.exp(torch.einsum("bhtd,bhpd->bhtp", q, P) / math.sqrt(q.shape[-1])).sum(-1)
    on_text = torch.exp(torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])).sum(-1)
    wanted = on_prefix / (on_prefix + on_text)
    close(prefix.prefix_mass(q, k, P), wanted[..., None], "prefix_mass")


@LAB.invariant(4)
def a_given_mask_still_shows_the_prefix(case):
    """A mask for the text's keys is widened in front: the prefix is seen by everybody."""
    T, p = case.size(3, 6), case.size(1, 4)
    q, k, v = drawn(case, T, T)
    made, table = core(case, q.shape[1], q.shape[-1], p)
    P = halves(table, q.shape[1], q.shape[-1])
    mask = torch.rand(T, T, generator=case.generator) < 0.5
    keys = torch.cat([P[0].expand(len(k), -1, -1, -1), k], 2)
    values = torch.cat([P[1].expand(len(v), -1, -1, -1), v], 2)
    allowed = torch.cat([torch.ones(T, p, dtype=torch.bool), mask], 1)
    wanted = attend(q, keys, values, allowed)[0]
    close(made(q, k, v, mask[None, None]), wanted, "the core with a prefix and a mask")


@LAB.invariant(6)
def a_prefix_made_of_text_is_that_text(case):
    """With a text's own keys and values the model reads as if the text stood in front: positions
    move by p.
    """
    model = case.model()
    text, ids = case.ids(1, case.size(2, 6), 31), case.ids(2, 7, 31)
    both = torch.cat([text.expand(2, -1), ids], 1)
    wanted = model(both)[:, text.shape[1] :].detach()
    words = tuple(text[0].tolist())
    minipeft.PrefixTuning(len(words), False, init="text", text=words).attach(model)
    close(model(ids), wanted, "the logits behind the prefix")


@LAB.invariant(3)
def learned_rows_are_read_in_every_pass(case):
    """What the table holds now is what the core uses now."""
    q, k, v = drawn(case, 3, 3)
    made, table = core(case, q.shape[1], q.shape[-1], 2)
    before = made(q, k, v).detach()
    with torch.no_grad():
        table += 1
    check(not torch.equal(made(q, k, v), before), "a changed table changes nothing")
    made(q, k, v).sum().backward()
    check(table.grad is not None and bool(table.grad.any()), "the table gets no gradient")


@LAB.invariant(1)
def dropout_is_for_training_and_each_row(case):
    """Dropout on the prefix: none in eval mode, another for each row in training."""
    made, table = core(case, 2, 4, 5, dropout=0.5)
    wanted = halves(table, 2, 4)[:, None].expand(-1, 3, -1, -1, -1)
    close(made.prefix(3), wanted, "the prefix in eval mode")
    made.train()
    rows = made.prefix(3).detach()
    check(not torch.equal(rows[:, 0], rows[:, 1]), "two rows lose the same numbers")
    check(not torch.equal(rows[:, 0], wanted[:, 0]), "in training nothing is dropped")


@LAB.invariant(2)
def the_count_is_the_tensors(case):
    """The count: 2 p L D flat; p D + (D m + m) + 2 L D (m + 1) with the MLP."""
    config, p, m = case.config(), case.size(2, 6), case.size(2, 7)
    L, D = config.n_layer, config.d_model
    for reparameterize, wanted in (
        (False, 2 * p * L * D),
        (True, p * D + D * m + m + 2 * L * D * (m + 1)),
    ):
        technique = minipeft.PrefixTuning(p, reparameterize, m)
        equal(technique.count(config), wanted, "the count")
        model = technique.attach(minipeft.GPT(config))
        there = sum(x.numel() for x in model.parameters() if x.requires_grad)
        equal(there, wanted, "the number of parameters that are trained")
