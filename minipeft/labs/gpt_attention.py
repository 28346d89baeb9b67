"""Lab: GPT's attention."""

from __future__ import annotations

import math

import torch
from torch import nn

from minipeft import gpt
from minipeft.labs.engine.case import check, close, same
from minipeft.labs.engine.lab import Bug, Hint, Lab

MASK = Hint(
    "(GPT 4), M: query t sees key s up to t + S - T, aligned at the lower right",
    "The last query sees all S keys. With two keys in front of the text, what does the first see?",
    ("causal_mask", "attention"),
)
CORE = Hint(
    "(GPT 4): SDPA's is_causal is right for as many keys as queries, and needed there",
    "Which of your calls have as many keys as queries? Who tells SDPA about causality in the rest?",
    ("attention",),
)
SCALE = Hint(
    "(GPT 4): scores are divided by the root of a head's width d",
    "How large is a product of two random vectors of d numbers? What does softmax make of it?",
    ("attention_written_out",),
)
HEADS = Hint(
    "(GPT 4): head h has the columns h d to (h + 1) d, side by side",
    "Write 0, 1, 2, ... into one row and split it by hand. Which numbers are head 1's?",
    ("Attention.split_heads",),
)
LAYER = Hint(
    "(GPT 4): q and k make the weights, v is what they weigh",
    "What goes into the core, in which order? And which projection comes after it?",
    ("Attention.forward",),
)
BLOCK = Hint(
    "(GPT 2) (GPT 3): x + f(LN(x)), and each sub-layer has a LayerNorm of its own",
    "Follow x through a block. Where is it normalised, and where is it added as it was?",
    ("Block.forward",),
)
GELU = Hint(
    "(GPT 3): GPT-2's GELU is the tanh form",
    "There are two GELUs. Which one do you get from torch when you ask for nothing?",
    ("MLP.forward",),
)
DROPOUT = Hint(
    "dropout is for training only; a functional dropout does not know the mode",
    "Run the same input twice in eval mode. Who tells SDPA that training is over?",
    ("AttentionCore.forward",),
)

LAB = Lab(
    title="GPT: attention from the equation, and a block around it",
    about="""
    The heart of the model: which key may be seen by which query, what softmax makes of the scores,
    how heads are cut out of a row, and how a block adds what it found to what it had. You write it
    twice, once as the equation says (`attention_written_out`) and once with torch's fast function
    (`attention`).

    Keys may outnumber queries: a cache, or a prefix, stands in front. Then causality is aligned at
    the lower right, and torch's own `is_causal` is not. `cache.append(k, v)` gives (k, v, mask).
    """,
    files=("minipeft/gpt.py",),
    blanks=(
        "causal_mask",
        "attention_written_out",
        "attention",
        "AttentionCore.forward",
        "Attention.__init__",
        "Attention.split_heads",
        "Attention.forward",
        "MLP.forward",
        "Block.forward",
    ),
    minutes=75,
    mistakes="""
    A mask aligned at the upper left, right as long as nobody caches; `view` with heads and width
    exchanged, which has the right shape; the other GELU; a LayerNorm after the sum, as in 2017.
    """,
    bugs=(
        Bug("causality at the upper left", ".tril(S - T)", ".tril()", MASK),
        Bug("mask one to the right", ".tril(S - T)", ".tril(S - T + 1)", MASK),
        Bug("no causality", "is_causal=square and T > 1)", "is_causal=False)", CORE),
        Bug(
            "scores not scaled",
            "q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])",
            "q @ k.transpose(-1, -2)",
            SCALE,
        ),
        Bug(
            "heads split in the wrong order",
            "return x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)",
            "return x.unflatten(-1, (self.head_dim, self.n_head)).permute(0, 3, 1, 2)",
            HEADS,
        ),
        Bug(
            "values for keys", "y = self.core(q, k, v, mask)", "y = self.core(q, v, k, mask)", LAYER
        ),
        Bug(
            "post-LayerNorm",
            "return x + self.mlp(self.ln_2(x))",
            "return self.ln_2(x + self.mlp(x))",
            BLOCK,
        ),
        Bug(
            "erf GELU",
            'F.gelu(up(x), approximate="tanh")',
            "F.gelu(up(x))",
            GELU,
        ),
        Bug(
            "is_causal for unequal lengths",
            "if mask is None and 1 < T != S:",
            "if mask is None and T > 1 and T > S:",
            CORE,
        ),
        Bug(
            "residual forgotten",
            "x = x + self.attn(self.ln_1(x), cache)",
            "x = self.attn(self.ln_1(x), cache)",
            BLOCK,
        ),
        Bug(
            "one LayerNorm for both",
            "return x + self.mlp(self.ln_2(x))",
            "return x + self.mlp(self.ln_1(x))",
            BLOCK,
        ),
        Bug(
            "dropout in eval mode",
            "dropout = self.dropout if self.training else 0.0",
            "dropout = self.dropout",
            DROPOUT,
        ),
    ),
)


def softmax_attention(q, k, v, allowed):
    """(GPT 4), one query at a time. allowed (T, S) bool."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for t in range(q.shape[-2]):
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k) / math.sqrt(q.shape[-1])
        weights = torch.exp(scores) * allowed[t]
        weights = weights / weights.sum(-1, keepdim=True)
        out[:, :, t] = torch.einsum("bhs,bhsd->bhd", weights, v)
    return out


def past(T, S):
    """(T, S): which keys a query may see, entry by entry."""
    return torch.tensor([[s <= t + S - T for s in range(S)] for t in range(T)])


def drawn(case, T, S):
    """q, k, v of odd sizes."""
    B, H, d = case.size(1, 3), case.size(1, 3), case.size(2, 5)
    return case.normal(B, H, T, d), case.normal(B, H, S, d), case.normal(B, H, S, d)


def whole(case, **fixed):
    """A GPT whose parameters are random, and ids."""
    return case.model(**fixed), case.ids(2, case.size(5, 9), 31)


@LAB.invariant(6)
def the_mask_shows_the_past(case):
    """(GPT 4): query t may see key s when s <= t + S - T, also where S differs from T."""
    T = case.size(2, 6)
    for S in (T, T + case.size(1, 4)):
        mask = gpt.causal_mask(T, S)
        check(mask.dtype == torch.bool, f"the mask is {mask.dtype}, not bool")
        same(mask, past(T, S), f"the mask for T={T}, S={S}")


@LAB.invariant(8)
def the_definition_is_the_softmax(case):
    """(GPT 4): attention_written_out is softmax(q k^T / sqrt(d) + M) v."""
    T = case.size(3, 6)
    q, k, v = drawn(case, T, T + case.size(0, 3))
    allowed = torch.rand(T, k.shape[2], generator=case.generator) < 0.6
    allowed[:, 0] = True
    close(
        gpt.attention_written_out(q, k, v, allowed),
        softmax_attention(q, k, v, allowed),
        "attention_written_out under a mask",
    )


@LAB.invariant(8)
def the_core_is_the_definition(case):
    """(GPT 4): AttentionCore computes the same, causal without a mask: as many keys as queries,
    more, or a single query.
    """
    T = case.size(3, 6)
    core = gpt.AttentionCore().eval()
    for queries, keys in ((T, T), (T, T + case.size(1, 3)), (1, T), (1, 1)):
        q, k, v = drawn(case, queries, keys)
        wanted = softmax_attention(q, k, v, past(queries, keys))
        close(core(q, k, v), wanted, f"the core with T={queries}, S={keys}")
    q, k, v = drawn(case, T, T)
    some = past(T, T) | (torch.rand(T, T, generator=case.generator) < 0.4)
    wanted = softmax_attention(q, k, v, some)
    close(core(q, k, v, some[None, None]), wanted, "the core with a mask")


@LAB.invariant(6)
def heads_lie_side_by_side(case):
    """(GPT 4): head h has the columns h d to (h + 1) d of a row."""
    H, d = case.sizes(2, 2, 5)
    attention = gpt.Attention(case.size(3, 8), H, d)
    x = case.normal(2, 3, H * d)
    heads = attention.split_heads(x)
    by_hand = torch.stack([x[:, :, h * d : (h + 1) * d] for h in range(H)], 1)
    same(heads, by_hand, "split_heads")


@LAB.invariant(8)
def the_layer_is_the_equation(case):
    """(GPT 4): W_o [heads side by side] + b_o, head for head, with biases."""
    D, (H, d), T = case.size(4, 9), case.sizes(2, 2, 4), case.size(3, 6)
    layer = gpt.Attention(D, H, d).double().eval()
    case.stir(layer.parameters())
    x = case.normal(2, T, D)
    heads = []
    for h in range(H):
        rows = slice(h * d, (h + 1) * d)
        q, k, v = (
            (x @ p.weight[rows].T + p.bias[rows])[:, None] for p in (layer.q, layer.k, layer.v)
        )
        heads.append(softmax_attention(q, k, v, past(T, T))[:, 0])
    wanted = torch.cat(heads, -1) @ layer.o.weight.T + layer.o.bias
    close(layer(x), wanted, "Attention")


@LAB.invariant(4)
def later_tokens_change_nothing_before(case):
    """Causality: the logits up to t do not depend on the tokens after t."""
    model, ids = whole(case)
    at = case.size(1, ids.shape[1] - 2)
    other = ids.clone()
    other[:, at + 1 :] = (other[:, at + 1 :] + 1 + case.size(0, 5)) % 31
    before, after = model(ids), model(other)
    close(after[:, : at + 1], before[:, : at + 1], "what a later token changed in earlier logits")
    check(not torch.equal(after[:, at + 1 :], before[:, at + 1 :]), "the logits ignore the tokens")


@LAB.invariant(5)
def a_block_adds_to_what_it_reads(case):
    """(GPT 2) (GPT 3): a = x + Attn(LN(x)), then a + MLP(LN(a)), each with its own LayerNorm."""
    config = case.config()
    block = gpt.Block(config).double().eval()
    case.stir(block.parameters())
    x = case.normal(2, 4, config.d_model)
    a = x + block.attn(norm(block.ln_1, x))
    close(block(x), a + block.mlp(norm(block.ln_2, a)), "a block")


@LAB.invariant(3)
def the_feed_forward_layer_bends(case):
    """(GPT 3): W_down gelu(W_up x + b_up) + b_down, with the tanh form of the GELU."""
    mlp = gpt.MLP(case.size(3, 6), case.size(7, 12)).double().eval()
    case.stir(mlp.parameters())
    x = case.normal(2, 4, mlp.up.in_features)
    h = x @ mlp.up.weight.T + mlp.up.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(mlp(x), h @ mlp.down.weight.T + mlp.down.bias, "the feed-forward layer")


def norm(layer, x):
    """LayerNorm, written out."""
    centred = x - x.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
    return centred / scale * layer.weight + layer.bias


@LAB.invariant(2)
def dropout_is_for_training(case):
    """With dropout the evaluation is the same every time, and training is not."""
    core = gpt.AttentionCore(0.4)
    q, k, v = drawn(case, 5, 5)
    core.eval()
    close(core(q, k, v), softmax_attention(q, k, v, past(5, 5)), "the core in eval mode")
    core.train()
    check(not torch.equal(core(q, k, v), core(q, k, v)), "in training nothing is dropped")
    check(not list(core.parameters()) and isinstance(core, nn.Module), "the core has parameters")
