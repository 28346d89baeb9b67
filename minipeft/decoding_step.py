r"""The faster twin of decoding.py's `next_token_logits`: one token of each row, by weights
that were put in order before.

A token that is read alone costs the reading of all weights: 4 N bytes in float32 for N parameters,
and two operations for each number. So the floor is bytes over bandwidth; what can be saved is

    joined   q, k and v are three products of one input: their weights are put under each other and
             read as one, where none of the three is wrapped
    turned   a product may go along the weight's rows, as long as the input, or down its columns, as
             long as the output if it is kept transposed. A CPU reads longer rows faster, so weights
             with at least as many outputs as inputs are kept transposed (with 384 inputs a Xeon
             reads 16 GB/s instead of 13)
    bare     no time dimension, a layer's keys and values written at once, and operations called
             directly where a module is the plain one: 80 calls a token in 6 layers, 0.25 ms

The copies are made at the first token and belong to the Cache of one `generate`: weights that
change between two calls are seen by the second. They cost the bytes of the weights once more on a
CPU, those of q, k and v on a GPU, so this wins when a few tokens at least are wanted. What is
wrapped, hooked, or of another class is called as it is; the rest around it stays fast.

Not here: a CUDA graph. It would save launches, but needs shapes that never change, so attention
over the whole capacity behind a mask, and it cannot be run, so not be tested, without a GPU.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.gpt import MLP, Attention, AttentionCore, Block, plain

COPIED = (torch.float32, torch.float64)  # on a CPU; products in halves do not read transposed


def next_token_logits(ids, model, start, cache):
    """ids (B, 1), the last token of every row, `start` tokens behind its beginning -> (B, V)."""
    if cache.ready is None:
        cache.ready = Ready(model)
    return cache.ready(ids, start, cache)


class Ready:
    """A model's layers in the form in which a token is read."""

    def __init__(self, model):
        self.model, self.embed = model, model.embed
        self.layers = [ready_block(block) for block in model.blocks]
        self.norm, self.head = ready_norm(model.ln_f), None
        if plain(model.head, nn.Linear):
            self.head = Product([model.head])

    def __call__(self, ids, start, cache):
        x = self.embed(ids, start)[:, -1]  # (B, D)
        for layer, part in zip(self.layers, cache.layers):
            x = layer(x, part)
        cache.advance(1)
        x = self.norm(x)
        return self.model.read_out(x[:, None])[:, -1] if self.head is None else self.head(x)


class Product:
    """y = W x + b of one or several linear layers with the same input, their outputs side by
    side: (B, in) -> (B, out).
    """

    def __init__(self, linears):
        weight = linears[0].weight.detach()
        if len(linears) > 1:
            weight = torch.cat([linear.weight.detach() for linear in linears])
        turn = weight.shape[0] >= weight.shape[1] and weight.device.type == "cpu"
        if turn and weight.dtype in COPIED:
            weight = weight.T.contiguous().T
        self.columns, biases = weight.T, [linear.bias for linear in linears]
        self.bias = None
        if any(bias is not None for bias in biases):
            none = (weight.new_zeros(linear.weight.shape[0]) for linear in linears)
            self.bias = torch.cat([z if b is None else b.detach() for z, b in zip(none, biases)])

    def __call__(self, x):
        if self.bias is None:
            return torch.mm(x, self.columns)
        return torch.addmm(self.bias, x, self.columns)


def ready_block(block):
    """A function (x (B, D), layer cache) -> (B, D) that computes what the block does."""
    if not plain(block, Block):
        return lambda x, cache: block(x[:, None], cache)[:, -1]
    norm_1, attend = ready_norm(block.ln_1), ready_attention(block.attn)
    norm_2, feed = ready_norm(block.ln_2), ready_mlp(block.mlp)

    def read(x, cache):
        x = x + attend(norm_1(x), cache)
        return x + feed(norm_2(x))

    return read


def ready_norm(norm):
    if not plain(norm, nn.LayerNorm):
        return lambda x: norm(x[:, None])[:, -1]
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def ready_linear(linear):
    return Product([linear]) if plain(linear, nn.Linear) else lambda x: linear(x[:, None])[:, -1]


def ready_mlp(mlp):
    if not plain(mlp, MLP) or not plain(mlp.drop, nn.Dropout):
        return lambda x: mlp(x[:, None])[:, -1]
    up, down = ready_linear(mlp.up), ready_linear(mlp.down)
    return lambda x: down(F.gelu(up(x), approximate="tanh"))


def ready_attention(attn):
    joinable = plain(attn, Attention) and plain(attn.drop, nn.Dropout)
    if not joinable or not all(plain(m, nn.Linear) for m in (attn.q, attn.k, attn.v)):
        return lambda x, cache: attn(x[:, None], cache)[:, -1]
    qkv, o = Product([attn.q, attn.k, attn.v]), ready_linear(attn.o)
    H, d = attn.n_head, attn.head_dim
    bare = plain(attn.core, AttentionCore)
    core = F.scaled_dot_product_attention if bare else attn.core

    def attend(x, cache):
        parts = qkv(x).view(-1, 3, H, 1, d).transpose(0, 1)  # (3, B, H, 1, d)
        k, v, mask = cache.append_joined(parts[1:])
        return o(core(parts[0], k, v, mask).view(-1, H * d))  # (B, H, 1, d) -> (B, H d)

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
