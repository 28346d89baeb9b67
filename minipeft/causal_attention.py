r"""The faster twin of gpt.py's `attention` where a text is learned on one core: nothing is formed
twice.

torch's kernel (Dao et al., "FlashAttention", 2022) keeps one number a query and forms the scores
again in the backward pass: five products where four would do, in blocks small enough to be shared
out among threads. Here the probabilities are kept. It takes one row of the batch and one block of
queries at a time, all heads in one batched product with the keys that the block may see:

    (CausalAttention 1)   S = s Q K^T + M,   P = softmax(S),   O = P V            s = 1 / sqrt(d)
    (CausalAttention 2)   dV = P^T dO,   dP = dO V^T
    (CausalAttention 3)   dS = P * (dP - rowsum(P * dP))
    (CausalAttention 4)   dQ = s dS K,   dK = s dS^T Q

From dL = <dO, dP V + P dV> follow dV and dP, and from P_ij = e^S_ij / sum_k e^S_ik, of which the
derivative is dP_ij / dS_ik = P_ij ([j = k] - P_ik), follows dS. Q, K, V, O are T x d, a block of S
and P n x S, n queries and the S keys up to the last of them.

Outputs and gradients lie as the projections around them read them, (B, T, H, d), and products are
written where they belong, so nothing is copied or joined. The softmax and its gradient take the
place of their inputs.

What it costs is memory: T (T + 64) / 2 probabilities a row and head, 4 bytes each, until the
backward pass has used them; the output is not kept. MINIPEFT_FAST_PATH=off brings torch's kernel
back, and so does checkpointing for all blocks but one.

Where it wins: on one thread, where rows are neither so short that calls weigh more than the work
nor so long that the probabilities crowd everything else out of memory. torch's kernel shares its
blocks among threads, and this loop does not. It needs float32, as many keys as queries, no mask, no
dropout, no autocast, and cannot be differentiated twice (nor can torch's kernel). The last bits
differ from the definition's.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

BLOCK = 64  # queries whose scores are made at once


def attention(q, k, v, mask=None, dropout=0.0):
    """Causal softmax(q k^T / sqrt(d)) v. q, k, v (B, H, T, d) -> (B, H, T, d); `mask` is None and
    `dropout` 0.
    """
    return _CausalAttention.apply(q, k, v)


def blocks(T):
    """[(first query, one past the last)] of each block; it sees as many keys as the latter."""
    return [(first, min(first + BLOCK, T)) for first in range(0, T, BLOCK)]


def kept(T):
    """Probabilities that are kept a row and head."""
    return sum((seen - first) * seen for first, seen in blocks(T))


def empty_by_token(x):
    """An empty (B, H, T, d) that lies in memory as (B, T, H, d)."""
    B, H, T, d = x.shape
    return x.new_empty_strided((B, H, T, d), (T * H * d, d, H * d, 1))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v):
        T, s, P = q.shape[2], q.shape[3] ** -0.5, []
        M = q.new_full((BLOCK, BLOCK), -torch.inf).triu(1)
        o, nothing = empty_by_token(q), q.new_zeros(())
        for q_b, k_b, v_b, o_b in zip(q, k.transpose(2, 3), v, o):  # (H, T, d), k_b (H, d, T)
            for first, seen in blocks(T):
                keys = k_b[:, :, :seen]
                p = torch.baddbmm(nothing, q_b[:, first:seen], keys, beta=0, alpha=s)
                p[:, :, first:].add_(M[: seen - first, : seen - first])
                torch.softmax(p, -1, out=p)
                o_b[:, first:seen].baddbmm_(p, v_b[:, :seen], beta=0)  # (CausalAttention 1)
                P.append(p)
        ctx.save_for_backward(q, k, v, *P)
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        q, k, v, *P = ctx.saved_tensors
        s, wanted = q.shape[3] ** -0.5, ctx.needs_input_grad
        dq, dk, dv = (empty_by_token(t) if w else None for t, w in zip((q, k, v), wanted))
        for b in reversed(range(len(q))):
            q_b, k_b, g_b, v_t = q[b], k[b], grad[b], v[b].transpose(1, 2)
            for first, seen in reversed(blocks(q.shape[2])):  # the last block sees every key:
                beta = 0 if seen == q.shape[2] else 1  # it writes, the others add
                p, g = P.pop(), g_b[:, first:seen]
                if dv is not None:
                    dv[b, :, :seen].baddbmm_(p.transpose(1, 2), g, beta=beta)
                if dq is None and dk is None:
                    continue
                ds = torch.bmm(g, v_t[:, :, :seen])  # (CausalAttention 2): dP
                torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)
                # (CausalAttention 3): in the place of dP
                if dq is not None:
                    dq[b, :, first:seen].baddbmm_(ds, k_b[:, :seen], beta=0, alpha=s)
                if dk is not None:
                    keys, queries = ds.transpose(1, 2), q_b[:, first:seen]
                    dk[b, :, :seen].baddbmm_(keys, queries, beta=beta, alpha=s)
        return dq, dk, dv  # (CausalAttention 4)


def examples(device):
    """Odd sizes, part of a block, blocks and a part, one row and head, strided, expanded; q, k and
    v that want gradients and some that do not.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, grad=True):
        return torch.randn(*shape, generator=generator).to(device).requires_grad_(grad)

    def turned(*shape):
        return draw(*shape).detach().transpose(1, 2).requires_grad_()

    long = 2 * BLOCK + 3
    return [
        tuple(draw(2, 3, 7, 5) for _ in range(3)),
        tuple(draw(1, 1, long, 4) for _ in range(3)),
        tuple(turned(2, long, 3, 5) for _ in range(3)),
        (draw(3, 2, BLOCK, 4), draw(3, 2, BLOCK, 4, grad=False), draw(3, 2, BLOCK, 4)),
        (draw(1, 2, 9, 4).detach().expand(3, 2, 9, 4), draw(3, 2, 9, 4), draw(3, 2, 9, 4)),
    ]


EXAMPLES = {"attention": examples}
