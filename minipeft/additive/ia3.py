r"""IA3: learned rescaling of activations (Liu et al., 2022, arXiv 2205.05638).

Three learned vectors a block, "infused adapters by inhibiting and amplifying inner activations":
each coordinate of the keys, of the values and of the hidden layer gets a volume knob.

    (IA3 1)   k  = l_k * (W_k x + b_k),    v = l_v * (W_v x + b_v)        l_k, l_v in R^(H d)
    (IA3 2)   f  = W_down (l_ff * gelu(W_up x + b_up)) + b_down           l_ff in R^(d_ff)
    (IA3 3)   W' = diag(l) W,  b' = l * b       merged, where l multiplies what a projection writes
    (IA3 4)   W' = W diag(l),  b' = b           merged, where l multiplies what a projection reads
    (IA3 5)   dl = sum over tokens of g * h     g the gradient at l * h: never 0 because of l

`*` is elementwise. Every projection can be a target; those in `feedforward` are scaled at what they
read (IA3 2), the others at what they write (IA3 1).

Trained parameters: one number for each coordinate scaled, L (2 D + d_ff) as in the paper; with
q, k, v scaled, as peft does on GPT-2, L (3 D + d_ff).

    l    1            so the model at the start is the base, bitwise

Reduces to: the base at l = 1. On a projection it is the row scaling diag(l) W, on the feed-forward
layer the column scaling W_down diag(l): a change of full rank with a single number a row.

How this differs: peft scales GPT-2's joint c_attn, so the queries too: targets=("q", "k", "v",
"down") is that. The adapters library scales the hidden layer before the activation, which is
targets=("k", "v", "up") here. peft's unmerge divides by l + 1e-8 and is not exact; `merged` puts
the saved tensors back. The authors' code calls it LoRA of rank 0 with one scaling vector.

Footguns: the bias is scaled along with W x, so merging must scale it too; scaling the queries as
well adds nothing that l_k cannot do (the score sees only the product l_q * l_k); l = 0 silences a
coordinate and, through the product, every other technique behind it; weight decay pulls l to 0,
where it should be pulled to 1; it wants learning rates 5 to 10 times LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.dispatch import fast_path, never
from minipeft.low_rank.lora import PROJECTIONS, check_targets, linear_with, projection_shape
from minipeft.technique import Technique


@fast_path(
    "minipeft.kernels.ia3",
    capability=(7, 5),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    wins=never,  # no committed measurement shows a win
)
def rescale(h, l):
    """l * h, h (..., n) and l (n,) -> (..., n) in h's dtype. (IA3 1) (IA3 2), gradient (IA3 5)"""
    return h * l.to(h.dtype)


def rescaled_rows(weight, bias, l):
    """diag(l) W (out, in) and l * b (out,) or None: l at what the projection writes. (IA3 3)"""
    return l[:, None] * weight, None if bias is None else l * bias


def rescaled_columns(weight, bias, l):
    """W diag(l) (out, in) and b as it is: l at what the projection reads. (IA3 4)"""
    return weight * l, bias


class IA3Linear(wrap.Wrapper):
    """A projection whose output, or whose input, is rescaled. (..., in) -> (..., out)"""

    def __init__(self, inner, on_input=False):
        super().__init__(inner)
        base = wrap.base_module(inner)
        self.on_input = on_input
        size = base.in_features if on_input else base.out_features
        self.l = nn.Parameter(torch.ones(size, **wrap.float_place(base)))

    def forward(self, x):
        if self.on_input:
            return self.inner(rescale(x, self.l))  # (IA3 2)
        return rescale(self.inner(x), self.l)  # (IA3 1)

    def merged(self, inner):
        fold = rescaled_columns if self.on_input else rescaled_rows
        return linear_with(inner, *fold(inner.weight, inner.bias, self.l))


@dataclass(frozen=True)
class IA3(Technique):
    """Learned rescaling of chosen projections in every block. (IA3 1) (IA3 2)

    targets: some of q, k, v, o, up, down. The paper's are k, v, down.
    feedforward: the targets scaled at what they read; those not among the targets are no matter.
    """

    targets: tuple[str, ...] = ("k", "v", "down")
    feedforward: tuple[str, ...] = ("down",)

    learning_rate: ClassVar[float] = 6e-2

    def check(self, config):
        check_targets(self.targets)
        if self.feedforward:
            check_targets(self.feedforward)

    def install(self, model, attachment):
        for n in range(len(model.blocks)):
            for target in self.targets:
                path = f"blocks.{n}.{PROJECTIONS[target]}"
                layer = IA3Linear(wrap.resolve(model, path), target in self.feedforward)
                attachment.wrap(model, path, layer)

    def count(self, config):
        """One number for each coordinate scaled: `in` where it reads, `out` where it writes."""
        total = 0
        for target in self.targets:
            out, into = projection_shape(config, target)
            total += into if target in self.feedforward else out
        return config.n_layer * total
