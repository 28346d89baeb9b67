r"""The faster twin of decoding.py's `next_token_logits`: one token of each row, by weights
that were put in order before.

A token that is read alone costs the reading of all weights: 4 N bytes in float32 for N parameters,
and two operations for each number. So the floor is bytes over bandwidth; what can be saved is

    joined   q, k and v are three products of one input: their weights are put under each other and
             read as one
    layout   a product reads a weight along its rows as they are stored (2 or 3 rows of a batch), or
             down the columns of a transposed copy (faster for 4 to 11 rows; for one row where the
             weights come from memory, not from the processor's cache), or takes it as the left
             factor, W x^T (12 and more: as fast, without the copy). A single row is a vector, W x,
             for which the library has a shorter way; what is copied anyway, to be joined, is
             copied transposed. `way_to_read` looks at rows and tokens
    folded   a wrapper around a projection that can be merged (LoRA, IA3, ...) is merged into a copy
             of the weight, in float32 and better; rows that have an adapter each keep one product,
             and their branches are stacked once
    bare     no time dimension, q, k and v written to one place whose parts were cut out before, a
             layer's keys and values kept at once, and operations called directly where a module is
             the plain one

The copies are made at the first token and belong to the Cache of one `generate`: weights that
change between two calls are seen by the second. They cost the bytes of q, k, v and what is folded
once more, those of all weights that are transposed, so this wins when a few tokens at least are
wanted. What is wrapped otherwise, hooked, or of another class is called as it is; the rest around
it stays fast.

Not here: a CUDA graph. It would save launches, but needs shapes that never change, so attention
over the whole capacity behind a mask, and it cannot be run, so not be tested, without a GPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.gpt import MLP, Attention, AttentionCore, Block, Embedding, plain
from minipeft.wrap import Wrapper

EXACT = (torch.float32, torch.float64)  # halves round what is folded, nor do they read transposed


def way_to_read(batch, tokens, like):
    """vector, rows, columns or left: how so many rows read so many tokens, copying of weights
    included. like: a weight; halves and other devices read rows.
    """
    if like.device.type != "cpu" or like.dtype not in EXACT:
        return "rows"
    if batch >= 12:
        return "left"
    if batch in (2, 3) or tokens < (256 if batch == 1 else 64):
        return "vector" if batch == 1 else "rows"
    return "columns"


@torch.no_grad()
def next_token_logits(ids, model, start, cache):
    """ids (B, 1), the last token of every row, `start` tokens behind its beginning -> (B, V),
    without gradients.
    """
    if cache.ready is None:
        way = way_to_read(cache.batch, cache.tokens, next(model.parameters()))
        cache.ready = Ready(model, cache.batch, way)
    return cache.ready(ids, start, cache)


class Ready:
    """A model's layers in the form in which a token of `batch` rows is read, in one of the ways."""

    def __init__(self, model, batch, way="rows"):
        self.model, self.embed = model, ready_embedding(model.embed)
        self.layers = [ready_block(block, batch, way) for block in model.blocks]
        self.norm, self.head, self.way = ready_norm(model.ln_f), None, way
        if plain(model.head, nn.Linear):
            self.head = product([model.head], way)

    def __call__(self, ids, start, cache):
        x = self.embed(ids, start)  # (B, D)
        if self.way == "vector":
            x = x[0]  # (D,)
        for layer, part in zip(self.layers, cache.layers):
            x = layer(x, part)
        cache.advance(1)
        x = self.norm(x)
        logits = called(self.model.read_out, x) if self.head is None else self.head(x)
        return logits.view(cache.batch, -1)


def called(module, x, *more):
    """What a module that takes (B, 1, D) makes of x (B, D), or of a vector (D,)."""
    return module(x.view(-1, 1, x.shape[-1]), *more)[:, -1].view(*x.shape[:-1], -1)


def product(linears, way):
    """A function (x (B, in), out=None) -> W x + b (B, out) of one or several linear layers with the
    same input, their outputs side by side; of vectors if that is the way.
    """
    weights, bias = [linear.weight.detach() for linear in linears], joined_bias(linears)
    weight = weights[0]  # (out, in)
    if len(weights) > 1:
        weight = torch.cat([w.T for w in weights], 1).T if way == "vector" else torch.cat(weights)
    if way == "vector":
        if bias is None:
            return lambda x, out=None: torch.mv(weight, x, out=out)
        return lambda x, out=None: torch.addmv(bias, weight, x, out=out)
    if way == "left":
        column = weight.new_zeros(()) if bias is None else bias[:, None]

        def left(x, out=None):
            found = torch.addmm(column, weight, x.T).T
            return found.contiguous() if out is None else out.copy_(found)

        return left
    columns = weight.T.contiguous() if way == "columns" else weight.T  # (in, out)
    if bias is None:
        return lambda x, out=None: torch.mm(x, columns, out=out)
    return lambda x, out=None: torch.addmm(bias, x, columns, out=out)


def joined_bias(linears):
    """The biases (out,) side by side, zeros where a layer has none; None if none has one."""
    if all(linear.bias is None for linear in linears):
        return None
    none = (linear.weight.new_zeros(linear.weight.shape[0]) for linear in linears)
    return torch.cat([z if m.bias is None else m.bias.detach() for z, m in zip(none, linears)])


def parts_of(projection, batch, way):
    """(a plain nn.Linear, what is to be added to its output or None) that together compute what a
    projection does; None where it has to be called as it is.
    """
    add = None
    if isinstance(projection, Wrapper) and hasattr(projection, "branch") and unhooked(projection):
        add, projection = projection.branch(batch), projection.inner
        if way == "vector":
            rows, add = add, lambda h, x: rows(h[None], x[None])[0]
    linear = folded(projection)
    return (linear, add) if plain(linear, nn.Linear) else None


def folded(projection):
    """The nn.Linear that a merged wrapper is; the module itself where it cannot be merged."""
    if not isinstance(projection, Wrapper) or not unhooked(projection):
        return projection
    if projection.moves_base and isinstance(projection.inner, Wrapper):
        return projection  # its change belongs below what is folded first
    inner = folded(projection.inner)
    if not plain(inner, nn.Linear) or inner.weight.dtype not in EXACT:
        return projection
    try:
        return projection.merged(inner)
    except NotImplementedError:
        return projection


def unhooked(module):
    return plain(module, type(module))


def ready_block(block, batch, way):
    """A function (x (B, D) or (D,), layer cache) -> the same shape, that computes what the block
    does.
    """
    if not plain(block, Block):
        return lambda x, cache: called(block, x, cache)
    norm_1, attend = ready_norm(block.ln_1), ready_attention(block.attn, batch, way)
    norm_2, feed = ready_norm(block.ln_2), ready_mlp(block.mlp, batch, way)

    def read(x, cache):
        x = x + attend(norm_1(x), cache)
        return x + feed(norm_2(x))

    return read


def ready_embedding(embed):
    bare = plain(embed, Embedding) and plain(embed.drop, nn.Dropout)
    if not bare or not all(plain(part, nn.Embedding) for part in (embed.token, embed.position)):
        return lambda ids, start: embed(ids, start)[:, -1]
    token, position = embed.token.weight, embed.position.weight
    return lambda ids, start: F.embedding(ids[:, -1], token) + position[start]


def ready_norm(norm):
    if not plain(norm, nn.LayerNorm):
        return lambda x: called(norm, x)
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def ready_linear(projection, batch, way):
    parts = parts_of(projection, batch, way)
    if parts is None:
        return lambda x: called(projection, x)
    linear, add = parts
    read = product([linear], way)
    if add is None:
        return read
    return lambda x: add(read(x), x)


def ready_mlp(mlp, batch, way):
    if not plain(mlp, MLP) or not plain(mlp.drop, nn.Dropout):
        return lambda x: called(mlp, x)
    up, down = ready_linear(mlp.up, batch, way), ready_linear(mlp.down, batch, way)
    return lambda x: down(F.gelu(up(x), approximate="tanh"))


def ready_attention(attn, batch, way):
    """A function (x (B, D) or (D,), layer cache) -> the same shape that computes what the sub-layer
    does. What it writes q, k and v to is read before the next token comes.
    """
    joinable = plain(attn, Attention) and plain(attn.drop, nn.Dropout)
    parts = [parts_of(m, batch, way) for m in (attn.q, attn.k, attn.v)] if joinable else [None]
    if None in parts:
        return lambda x, cache: called(attn, x, cache)
    qkv, o = product([linear for linear, _ in parts], way), ready_linear(attn.o, batch, way)
    added = [(n, add) for n, (_, add) in enumerate(parts) if add is not None]
    H, d = attn.n_head, attn.head_dim
    bare = plain(attn.core, AttentionCore)
    core = F.scaled_dot_product_attention if bare else attn.core

    rows, lead = (1, ()) if way == "vector" else (batch, (batch,))
    joined = parts[0][0].weight.new_empty(*lead, 3 * H * d)
    apart = joined.view(*lead, 3, H * d).unbind(-2)
    q, kv = joined.view(rows, 3, H, 1, d).transpose(0, 1).split([1, 2])  # (1 or 2, B, H, 1, d)
    q = q[0]

    def attend(x, cache):
        qkv(x, joined)
        for n, add in added:
            add(apart[n], x)
        k, v, mask = cache.append_joined(kv)
        return o(core(q, k, v, mask).view(*lead, H * d))

    return attend


def examples(device):
    """A batch and a single row in the middle of a text; a wrapped layer; rows of unequal length."""
    from minipeft.decoding import Cache
    from minipeft.gpt import GPT, GPTConfig
    from minipeft.low_rank.lora import LoRA

    def prompt(model, B, lengths=None):
        ids = torch.arange(5 * B, device=device).view(B, 5) % 11
        cache = Cache(model, B, 9)
        cache.real, cache.tokens = lengths, 3
        with torch.no_grad():
            model.features(ids, 0, cache)
        return ids[:, :1], model, cache.length, cache

    torch.manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        model = GPT(GPTConfig(11, 16, n_layer=2, n_head=3, d_model=21)).to(device).eval()
        wrapped = GPT(GPTConfig(11, 16, n_layer=2, n_head=3, d_model=21)).to(device).eval()
        LoRA(rank=2, targets=("q",)).attach(wrapped)
    lengths = torch.tensor([5, 3], device=device)
    return [prompt(model, 3), prompt(model, 1), prompt(wrapped, 2), prompt(model, 2, lengths)]


EXAMPLES = {"next_token_logits": examples}
