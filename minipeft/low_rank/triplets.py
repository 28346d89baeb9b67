r"""AdaLoRA's branch: a weight's change as a sum of triplets (Zhang et al., 2023, arXiv 2303.10512).

    (AdaLoRA 1)   h = W x + b + s P diag(E) Q x      P in R^(out x r), E in R^r, Q in R^(r x in)

Triplet i is a left vector P_:i, a value E_i and a right vector Q_i:, as in a singular value
decomposition, and is switched off by E_i = 0. Several branches may share E and Q (`shared`): then
the matrices stacked on one another are what is decomposed.

Trained parameters: r (in + out + 1) a matrix, or r out where E and Q are another's.

    P, Q    N(0, 0.02^2)
    E       0               so the branch at the start adds nothing, bitwise

Reduces to: LoRA with A = diag(E) Q and B = P.

How this differs: peft keeps E as (r, 1) and has one branch for c_attn; `shared` is that.

Footguns: a deep copy of a tensor has no hooks, so what notices that E is trained has to be hung on
again; P drawn at 0 like LoRA's B, which leaves E without a gradient for ever, as both would be 0.
"""

from __future__ import annotations

import torch
from torch import nn

from minipeft import wrap
from minipeft.low_rank.lora import linear_with, lora_delta, lora_forward


class AdaLoRALinear(wrap.Wrapper):
    """A projection with a branch of triplets beside it. (..., in) -> (..., out)"""

    def __init__(self, inner, rank, scale, dropout=0.0, shared=None):
        super().__init__(inner)
        base = wrap.base_module(inner)
        out, into, place = base.out_features, base.in_features, wrap.float_place(base)
        self.scale = scale
        self.P = nn.Parameter(torch.empty(out, rank, **place))
        self.E = nn.Parameter(torch.zeros(rank, **place)) if shared is None else shared.E
        self.Q = nn.Parameter(torch.empty(rank, into, **place)) if shared is None else shared.Q
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=place["device"]))
        self.drop = nn.Dropout(dropout)
        nn.init.normal_(self.P, 0.0, 0.02)
        if shared is None:
            nn.init.normal_(self.Q, 0.0, 0.02)
        self.watch()

    def watch(self):
        """Notice when a gradient comes: nothing else tells a trained E from a loaded one."""
        self.had_gradient = getattr(self, "had_gradient", False)
        if self.E.requires_grad:
            self.E.register_hook(self.saw_gradient)

    def saw_gradient(self, gradient):
        self.had_gradient = True

    def __setstate__(self, state):  # a deep copy's tensors have no hooks
        super().__setstate__(state)
        self.watch()

    def right(self):
        """diag(E) Q, (r, in)."""
        return self.E[:, None] * self.Q

    def forward(self, x):
        return lora_forward(  # (AdaLoRA 1)
            self.inner(x), self.drop(x), self.right(), self.P, self.scale
        )

    def delta(self):
        """The change of the weight, (out, in): s P diag(E) Q. (AdaLoRA 1)"""
        return lora_delta(self.right(), self.P, self.scale)

    def merged(self, inner):
        return linear_with(inner, inner.weight + self.delta(), inner.bias)
