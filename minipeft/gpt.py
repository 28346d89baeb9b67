r"""The model: GPT-2's architecture, from nn.Linear, nn.LayerNorm and nn.Embedding up.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. No technique is named
in this file; what the file owes to the techniques are places where a module can be put around a
module (see wrap.py) and a few promises:

    the embedding        embed                            token + position
    a projection         blocks.N.attn.{q,k,v,o}          one nn.Linear each
                         blocks.N.mlp.{up,down}
    the attention core   blocks.N.attn.core               softmax(Q K^T / sqrt(d)) V, no parameters
    a sub-layer          blocks.N.attn  blocks.N.mlp      before the residual sum
    a block              blocks.N
    the head             head                             shares the embedding's weight

Equations (x_0 is the sum of the token's and the position's embedding):

    (GPT 1)   x_0     = E[ids] + P[start + 0 .. start + T-1]
    (GPT 2)   a_l     = x_l + Attn(LN(x_l))     pre-LayerNorm: the residual is not normalised
    (GPT 3)   x_{l+1} = a_l + W_down gelu(W_up LN(a_l) + b_up) + b_down
    (GPT 4)   Attn(x) = W_o [softmax(q k^T / sqrt(d) + M) v] + b_o     per head; q = W_q x + b_q ...
    (GPT 5)   logits  = E LN(x_L)

Shapes, used in every file: B batch, T time, D width (d_model), H heads, d width of a head, V
vocabulary, L layers.

Parameters: V D + C D + L (12 D^2 + 13 D) + 2 D with C the context length, d_ff = 4 D and H d = D.
The head adds none.

Initialisation (GPT-2's):

    every weight, embeddings too              N(0, 0.02^2)
    weights that write to the residual        N(0, (0.02 / sqrt(2 L))^2)        attn.o, mlp.down
    biases                                    0
    LayerNorm                                 weight 1, bias 0

How this differs from GPT2LMHeadModel: q, k, v are three nn.Linear, because the papers speak of
W_q, W_k, W_v; weights are stored (out, in) and not transposed; heads and widths belong to each
module, so that pruning can shrink them one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from minipeft.cross_entropy import cross_entropy, linear_cross_entropy
from minipeft.dispatch import fast_path


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a GPT. `d_ff=None` means 4 * d_model, as in GPT-2.

    Raises ValueError at construction when a size is not positive or n_head does not divide d_model.
    """

    vocab_size: int = 512
    context_length: int = 128
    n_layer: int = 4
    n_head: int = 4
    d_model: int = 128
    d_ff: int | None = None
    dropout: float = 0.0
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "d_model", "d_ff"):
            value = getattr(self, name)
            if name == "d_ff" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r} is not a positive integer")
        if self.d_model % self.n_head:
            raise ValueError(
                f"d_model={self.d_model} is not a multiple of n_head={self.n_head}; "
                f"each head gets d_model / n_head columns"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")

    @property
    def ff_width(self) -> int:
        """Width of the feed-forward layer, with the default filled in."""
        return 4 * self.d_model if self.d_ff is None else self.d_ff


class Embedding(nn.Module):
    """Token + position embedding, (B, T) int64 -> (B, T, D). (GPT 1)

    `virtual_tokens` counts rows that a wrapper puts in front of the text, `position_shift` how
    far the text's positions are moved in all (virtual rows included), `extra_ids` how many ids
    from the vocabulary's end on stand for learned tokens; all are 0 here.
    """

    virtual_tokens = 0
    position_shift = 0
    extra_ids = 0

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.d_model)
        self.position = nn.Embedding(config.context_length, config.d_model)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, ids, start=0, shift=0):
        """`start`: how many tokens of each row came before `ids`, an int or a (B,) tensor; `shift`:
        how far wrappers move their positions.
        """
        return self.drop(self.token(ids) + self.position(positions(ids, start) + shift))


def positions(ids, start=0):
    """Positions of `ids` (B, T) whose rows begin at `start`: (T,) for an int, (B, T) for a (B,)
    tensor.
    """
    steps = torch.arange(ids.shape[1], device=ids.device)
    return steps + start[:, None] if isinstance(start, torch.Tensor) else steps + start


class AttentionCore(nn.Module):
    """softmax(q k^T / sqrt(d) + M) v without parameters. q (B, H, T, d), k and v (B, H, S, d) ->
    (B, H, T, d).

    `mask` (B or 1, 1, T, S), True where a query may look. None means causal, aligned at the lower
    right: the last query sees all S keys, so keys put in front (a cache, a prefix) are seen by
    every query.
    """

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout

    def forward(self, q, k, v, mask=None):
        dropout = self.dropout if self.training else 0.0
        return attention(q, k, v, mask, dropout)


def causal_and_recorded(q, k, v, mask=None, dropout=0.0):
    """Whether texts attend to themselves, nothing is masked or dropped besides, and gradients are
    wanted.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    whole = mask is None and not dropout and q.shape == k.shape == v.shape and q.shape[2] > 1
    return whole and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))


def keeping_pays(T, width):
    """Whether it saves time to keep attention's probabilities: T tokens a row, heads of `width` in
    all. On one thread only, for on more torch's kernel shares its work out.
    """
    return torch.get_num_threads() == 1 and 128 <= T <= 512 and T * width >= 2**15


@fast_path(
    "minipeft.causal_attention",
    devices=("cpu",),
    dtypes=(torch.float32,),
    supports=causal_and_recorded,
    wins=lambda q, k, v, mask=None, dropout=0.0: keeping_pays(q.shape[2], q.shape[1] * q.shape[3]),
)
def attention(q, k, v, mask=None, dropout=0.0):
    """What AttentionCore computes, by torch's kernels; `dropout` is of the weights. (GPT 4)"""
    T, S = q.shape[2], k.shape[2]
    square = mask is None and T == S
    if mask is None and 1 < T != S:  # SDPA's own is_causal aligns at the upper left: wrong here
        mask = causal_mask(T, S, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=square and T > 1)


def causal_mask(T, S, device=None):
    """(T, S) bool, True where query t may see key s: s <= t + (S - T)."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention_written_out(q, k, v, mask=None):
    """The definition of AttentionCore, one line a step (GPT 4); tests tie the two together."""
    scores = (
        q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    )  # (B, H, T, d) x (B, H, d, S) -> (B, H, T, S)
    allowed = causal_mask(*scores.shape[-2:], q.device) if mask is None else mask
    return scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v


class Attention(nn.Module):
    """Multi-head causal self-attention, (B, T, D) -> (B, T, D). (GPT 4)"""

    def __init__(self, d_model, n_head, head_dim, dropout=0.0):
        super().__init__()
        self.n_head, self.head_dim = n_head, head_dim
        self.q = nn.Linear(d_model, n_head * head_dim)
        self.k = nn.Linear(d_model, n_head * head_dim)
        self.v = nn.Linear(d_model, n_head * head_dim)
        self.core = AttentionCore(dropout)
        self.o = nn.Linear(n_head * head_dim, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x, cache=None):
        """`cache`: this layer's part of a decoding.Cache; it takes the new keys and gives back
        all of them.
        """
        q, k, v = (self.split_heads(project(x)) for project in (self.q, self.k, self.v))
        mask = None
        if cache is not None:
            k, v, mask = cache.append(k, v)
        y = self.core(q, k, v, mask)
        return self.drop(self.o(y.transpose(1, 2).flatten(2)))  # (B, H, T, d) -> (B, T, H d)

    def split_heads(self, x):
        return x.unflatten(-1, (self.n_head, self.head_dim)).transpose(1, 2)  # (B, H, T, d)


class RowLengths:
    """In a layer cache's place where nothing is cached: tells wrappers `real` (B,), how many
    positions of each right-padded row, virtual tokens included, are no padding.
    """

    def __init__(self, real):
        self.real = real

    def append(self, k, v):
        return k, v, None  # as without a cache


MANY = 2**20  # hidden numbers that outgrow a core's cache: from here on feed_forward's twin pays


def plain(module, kind):
    """Whether a module is exactly of this class: no wrapper, no subclass, no hook."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
    hooks = hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__


def plain_and_frozen(x, up, down):
    """Whether both are plain nn.Linear with a bias and want no gradient now."""
    for module in (up, down):
        if not plain(module, nn.Linear) or module.bias is None:
            return False
        if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
            return False
    return not torch.is_autocast_enabled("cpu")


@fast_path(
    "minipeft.feed_forward",
    devices=("cpu",),
    dtypes=(torch.float32,),
    supports=plain_and_frozen,
    wins=lambda x, up, down: x[..., 0].numel() * up.out_features >= MANY,
)
def feed_forward(x, up, down):
    """W_down gelu(W_up x + b_up) + b_down with GPT-2's tanh form of the GELU. (GPT 3)"""
    return down(F.gelu(up(x), approximate="tanh"))


class MLP(nn.Module):
    """The feed-forward sub-layer, (B, T, D) -> (B, T, D). (GPT 3)"""

    def __init__(self, d_model, d_ff, dropout=0.0):
        super().__init__()
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.drop(feed_forward(x, self.up, self.down))


class Block(nn.Module):
    """One layer: two sub-layers, each read through a LayerNorm and added to the residual stream.
    (GPT 2) (GPT 3)
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        D, dropout, eps = config.d_model, config.dropout, config.layer_norm_eps
        self.ln_1 = nn.LayerNorm(D, eps=eps)
        self.attn = Attention(D, config.n_head, D // config.n_head, dropout)
        self.ln_2 = nn.LayerNorm(D, eps=eps)
        self.mlp = MLP(D, config.ff_width, dropout)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """A GPT-2 language model, (B, T) int64 -> (B, T, V) logits."""

    def __init__(self, config: GPTConfig | None = None):
        super().__init__()
        self.config = config = config or GPTConfig()
        self.embed = Embedding(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model, eps=config.layer_norm_eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.head.weight = self.embed.token.weight
        self.gradient_checkpointing = False
        self.attachments = []  # what technique.py has put on this model, in order
        self.reset_parameters()

    def reset_parameters(self, std=0.02):
        """GPT-2's initialisation, the table in this file's header."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for writer in (block.attn.o, block.mlp.down):
                nn.init.normal_(writer.weight, 0.0, std / math.sqrt(2 * len(self.blocks)))

    def forward(self, ids, start=0, lengths=None):
        """Logits of the real tokens, (B, T, V). `start` as in `features`; `lengths` (B,) real
        tokens in each right-padded row, for what pools over a row: heads, whole-sequence gates.
        """
        return self.read_out(self.features(ids, start, lengths=lengths), lengths)

    def read_out(self, x, lengths=None):
        """The head on features x (B, T, D). A head that pools over the row is told the rows'
        lengths. (GPT 5)
        """
        return self.head(x, lengths) if getattr(self.head, "pools", False) else self.head(x)

    def features(self, ids, start=0, cache=None, lengths=None):
        """What the head reads, (B, T) -> (B, T, D): the last LayerNorm's output at the real tokens.

        start: tokens of each row already consumed (an int, or (B,) for rows of different lengths).
        Without a cache an int only moves the rows, and virtual tokens in front move along.
        cache: a decoding.Cache to read and extend. Rows shorter than T are right-padded:
        causality keeps the padding out of everything before it, so no mask is needed; `lengths`
        (B,) are for wrappers that look at a whole row.
        Raises ValueError when the text, with the virtual tokens in front, does not fit the context.
        """
        self.check_length(ids, start)
        moved = cache is None and not isinstance(start, torch.Tensor)  # no past: rows begin here
        x = self.embed(ids, 0, start) if moved else self.embed(ids, start)
        rows = None if lengths is None else RowLengths(lengths + x.shape[1] - ids.shape[1])
        for n, block in enumerate(self.blocks):
            layer_cache = rows if cache is None else cache.layers[n]
            if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, layer_cache, use_reentrant=False, preserve_rng_state=True)
            else:
                x = block(x, layer_cache)
        if cache is not None:
            cache.advance(x.shape[1])
        return self.ln_f(x[:, x.shape[1] - ids.shape[1] :])

    def loss(self, ids, labels, start=0, lengths=None):
        """Mean cross-entropy in nats over the labels that are not -100. ids, labels (B, T).

        Labels are aligned: labels[:, t] is the token that should follow ids[:, : t + 1]. The
        logits are made in chunks of tokens and never held all at once; a frozen head's weight
        gradient is not computed (cross_entropy.py).
        """
        x = self.features(ids, start, lengths=lengths)
        if type(self.head) is nn.Linear:
            return linear_cross_entropy(x.flatten(0, 1), self.head.weight, labels.flatten())
        logits = self.read_out(x, lengths)
        return cross_entropy(logits.flatten(0, -2), labels.flatten())

    def check_length(self, ids, start=0):
        """Refuse a text that does not fit, naming all the numbers that make up its length."""
        if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids must be (batch, time) int64, not {tuple(ids.shape)} {ids.dtype}")
        first = int(start.max()) if isinstance(start, torch.Tensor) else start
        T, p = ids.shape[1], self.embed.position_shift
        if first + T + p > self.config.context_length:
            raise ValueError(
                f"context_length={self.config.context_length} is too short for T={T} tokens from "
                f"start={first} behind p={p} virtual tokens; shorten the text or use a model "
                "with a longer context"
            )

    def check_ids(self, ids):
        """Raise ValueError when an id lies outside the vocabulary; for the edges of the program,
        where users' ids enter.
        """
        low, high = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        last = self.config.vocab_size + self.embed.extra_ids - 1
        if low < 0 or high > last:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token id {wrong} is outside the vocabulary, 0 to {last}; "
                "was the text encoded with another tokenizer?"
            )

    def _apply(self, fn, recurse=True):
        """`.to`, `.half`, `.cuda` ...: move what attachments hold outside the module tree as
        well.
        """
        super()._apply(fn, recurse)
        for attachment in self.attachments:
            attachment._apply(fn)
        return self

    @classmethod
    def from_pretrained(cls, folder):
        """Open a folder in the Hugging Face GPT-2 layout (interop/hf_gpt2.py names what is read
        and refused).
        """
        from minipeft.interop.hf_gpt2 import load_model

        return load_model(folder)

    def save_pretrained(self, folder):
        """Write config.json and model.safetensors, which `transformers` opens too."""
        from minipeft.interop.hf_gpt2 import save_model

        save_model(self, folder)
