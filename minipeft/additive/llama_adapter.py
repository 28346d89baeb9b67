r"""LLaMA-Adapter: zero-initialised gated attention to learned prompts (Zhang et al., 2023, arXiv
2303.16199).

In the upper layers every query also looks at p learned vectors, in an attention of its own, and a
gate that starts at 0 decides how much of what it finds there counts.

    (LLaMA-Adapter 1)   K_a = W_k P + b_k,   V_a = W_v P + b_v      P in R^(p x D), each layer's own
    (LLaMA-Adapter 2)   a_h = g_h softmax(q_h K_a,h^T / sqrt(d)) V_a,h              g_h in R, a head
    (LLaMA-Adapter 3)   y   = W_o [y_1 + a_1, ..., y_H + a_H] + b_o    y_h the text's own attention
    (LLaMA-Adapter 4)   y   = W_o [y_1, ..., y_H] + b_o + g [a'_1, ..., a'_H]    variant="peft_gpt2"

q, W_k and W_v are the frozen model's. P enters them as it is, without LayerNorm and positions. The
two softmaxes are separate, so at g = 0 the text's attention is untouched. (LLaMA-Adapter 4), with
a' the a of gate 1 and one gate g for all heads, is what peft does on GPT-2: there the prompts' part
skips the output projection.

Trained parameters: L' (p D + H) in the L' upper layers; L' (p D + 1) in peft's variant.

    P    N(0, 1)
    g    0         so the start is the base, bitwise

Reduces to: the base at g = 0. There only g has a gradient in the first step, P from the second on.

How this differs: the authors' training code has tanh(g), their inference code g, as here. peft on
LLaMA has one gate a layer, and W_o as in (LLaMA-Adapter 3); on GPT-2 it leaves W_o out. Files in
peft's format exist for that variant alone.

Footguns: g and P both 0 (no gradient, ever); K_a and V_a computed once and kept, after which the
prompts never train; one softmax over prompts and text together, which is prefix tuning with a gate
that is no longer 1 - lambda and lambda.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.technique import Technique


def prompt_attention(q, keys, values):
    """softmax(q K_a^T / sqrt(d)) V_a: q (B, H, T, d), K_a and V_a (1, H, p, d) -> (B, H, T, d).
    (LLaMA-Adapter 2) before the gate; every query sees every prompt.
    """
    scores = q @ keys.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, T, p)
    return scores.softmax(-1) @ values


class PromptedAttention(wrap.Wrapper):
    """A module of one layer's attention that also looks at the layer's prompts.

    attn: the layer's gpt.Attention, kept in a tuple, because its tensors are not this wrapper's.
    `gates`: how many numbers g has, 1 or one a head.
    """

    calls_again = True  # q, k or v, with what is no text

    def __init__(self, inner, attn, length, gates):
        super().__init__(inner)
        like = wrap.resolve(attn, "o.bias")  # floating point, also where weights are quantised
        place = {"device": like.device, "dtype": like.dtype}
        self.around = (attn,)
        self.prompt = nn.Parameter(torch.empty(length, like.shape[0], **place).normal_())
        self.gate = nn.Parameter(torch.zeros(gates, **place))

    def found(self, q):
        """What queries (B, H, T, d) find at the prompts, ungated. (LLaMA-Adapter 2)"""
        (attn,) = self.around
        rows = self.prompt[None]
        keys, values = (attn.split_heads(project(rows)) for project in (attn.k, attn.v))
        return prompt_attention(q, keys, values)  # (LLaMA-Adapter 1): computed anew on every pass


class PromptedCore(PromptedAttention):
    """The attention core, with the prompts' part added head by head: q (B, H, T, d), k and v
    (B, H, S, d) -> (B, H, T, d).
    """

    def forward(self, q, k, v, mask=None):
        y = self.inner(q, k, v, mask)
        return y + self.gate[:, None, None].to(y.dtype) * self.found(q)  # (LLaMA-Adapter 3)


class PromptedOutput(PromptedAttention):
    """The attention sub-layer, with the prompts' part added behind its output projection:
    (B, T, D) -> (B, T, D).
    """

    def forward(self, x, cache=None):
        (attn,) = self.around
        a = self.found(attn.split_heads(attn.q(x))).transpose(1, 2).flatten(2)  # (B, T, H d)
        y = self.inner(x, cache)
        return y + self.gate.to(y.dtype) * a  # (LLaMA-Adapter 4)


@dataclass(frozen=True)
class LLaMAAdapter(Technique):
    """Prompts in the upper layers, behind gates that start shut. (LLaMA-Adapter 3)

    prompt_length: p, learned vectors a layer.
    layers: how many layers get prompts, counted from the top; None means all. The paper: 30 of 32.
    variant: "paper" (before the output projection, a gate a head) or "peft_gpt2" (behind it, one
        gate a layer).
    """

    prompt_length: int = 10
    layers: int | None = None
    variant: str = "paper"

    learning_rate: ClassVar[float] = 5e-2
    cannot_merge: ClassVar[str | None] = "an attention to more vectors fits into no weight"

    def numbers(self, n_layer):
        """Numbers of the layers that get prompts."""
        return range(n_layer - (n_layer if self.layers is None else self.layers), n_layer)

    def check(self, config):
        if self.variant not in ("paper", "peft_gpt2"):
            raise ValueError(f"variant={self.variant!r}; choose 'paper' or 'peft_gpt2'")
        if type(self.prompt_length) is not int or self.prompt_length < 1:
            raise ValueError(f"prompt_length={self.prompt_length!r} is not a positive integer")
        fits = type(self.layers) is int and 1 <= self.layers <= config.n_layer
        if self.layers is not None and not fits:
            raise ValueError(
                f"layers={self.layers!r}: the model has {config.n_layer}, give 1 to "
                f"{config.n_layer}, or None for all"
            )

    def install(self, model, attachment):
        for n in self.numbers(len(model.blocks)):
            attn = wrap.base_module(wrap.resolve(model, f"blocks.{n}.attn"))
            check_calls(attn, f"blocks.{n}.attn")
            kind, path, gates = PromptedCore, f"blocks.{n}.attn.core", attn.n_head
            if self.variant == "peft_gpt2":
                kind, path, gates = PromptedOutput, f"blocks.{n}.attn", 1
                check_width(attn, path)
            layer = kind(wrap.resolve(model, path), attn, self.prompt_length, gates)
            attachment.wrap(model, path, layer)

    def count(self, config):
        gates = config.n_head if self.variant == "paper" else 1
        return len(self.numbers(config.n_layer)) * (self.prompt_length * config.d_model + gates)


def check_calls(attn, path):
    """The prompts go through q, k and v too: raise ValueError where that would count as text."""
    for name in "qkv":
        wrappers = wrap.around(wrap.resolve(attn, name))
        if any(getattr(wrapper, "counts_calls", False) for wrapper in wrappers):
            raise ValueError(
                f"{path}.{name} has a gate that takes all it reads for text, and the prompts would "
                "go through it as well: attach LLaMA-Adapter to a model without such gates"
            )


def check_width(attn, path):
    """peft's variant adds H d numbers to D: raise ValueError where heads have been pruned."""
    width = wrap.resolve(attn, "o.bias").shape[0]
    if attn.n_head * attn.head_dim != width:
        raise ValueError(
            f"{path} has {attn.n_head} heads of {attn.head_dim}, not {width} columns in all, so "
            "what its heads find cannot be added behind the output projection; use variant='paper'"
        )
