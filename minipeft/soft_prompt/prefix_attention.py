r"""Attention over a prefix and a text, the one thing that prefix tuning computes.

    (PrefixAttention 1)   o = softmax(q [P_k; K]^T / sqrt(d) + M) [P_v; V]

M hides text from the queries in front of it, and never the prefix. It is a function of its own
because a twin can attend to both without joining them in memory (minipeft/kernels/
prefix_attention.py). Where a mask, a dropout, a hook or another wrapper comes between, the core of
the model is given the joined keys and values itself, and computes the same.
"""

from __future__ import annotations

import torch

from minipeft.dispatch import fast_path, never
from minipeft.gpt import AttentionCore

CORE = AttentionCore()  # without parameters, without dropout


def with_prefix(prefix, k, v):
    """Prefix keys and values (2, B, H, p, d) before k and v (B, H, S, d). (Prefix 1)"""
    return torch.cat([prefix[0], k], 2), torch.cat([prefix[1], v], 2)


def fits_one_program(q, k, v, prefix):
    """What the twin takes: one dtype, heads that stay in registers, all the text's keys."""
    alike = q.dtype == k.dtype == v.dtype == prefix.dtype
    narrow = q.shape[-1] * q.element_size() <= 256
    return alike and narrow and q.shape[2] <= k.shape[2] and prefix.shape[3] > 0


@fast_path(
    "minipeft.kernels.prefix_attention",
    capability=(8, 0),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    supports=fits_one_program,
    wins=never,  # no committed measurement shows a win
)
def prefix_attention(q, k, v, prefix):
    """q (B, H, T, d), k and v (B, H, S, d) with S >= T, prefix (2, B, H, p, d) -> (B, H, T, d).
    (PrefixAttention 1)
    """
    return CORE(q, *with_prefix(prefix, k, v))


def attend(core, q, k, v, prefix, mask=None):
    """What `core` makes of these with the prefix in front; `mask` is as wide as both together."""
    hooked = core._forward_hooks or core._forward_pre_hooks
    bare = type(core) is AttentionCore and not hooked and not (core.training and core.dropout)
    if bare and mask is None:
        return prefix_attention(q, k, v, prefix)
    return core(q, *with_prefix(prefix, k, v), mask)
