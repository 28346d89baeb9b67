r"""The bottleneck: the small layer that adapter.py puts at many places of a model.

    (Bottleneck 1)   A(x) = s [W_2 sigma(W_1 x + b_1) + b_2]      W_1 in R^(m x D), W_2 in R^(D x m)
    (Bottleneck 2)   y    = f + A(x)                              the sum that every placement makes

Three ways to start: "lora", U(-1/sqrt(D), 1/sqrt(D)) below and zero above; "truncated",
N(0, 0.001^2) cut at two standard deviations, for both; "normal", N(0, 0.02^2) for both. Biases: 0.

(Bottleneck 2) is a function of its own because a twin can make the sum while it has A(x) at hand,
and W_1 x never leaves the chip (minipeft/kernels/adapter.py). A dropout between the two layers, or
a hook that waits for A(x), sends the definition to work.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never


def gelu_tanh(x):
    """The tanh form of the GELU, the one GPT-2 itself uses."""
    return F.gelu(x, approximate="tanh")


def identity(x):
    """No activation: the adapter is then a low-rank linear map."""
    return x


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "swish": F.silu,
    "tanh": torch.tanh,
    "identity": identity,
}


def bottleneck(x, W_1, b_1, W_2, b_2, activation="relu", scale=1.0, dropout=0.0):
    """s [W_2 sigma(W_1 x + b_1) + b_2], (..., D) -> (..., D). (Bottleneck 1)

    dropout: probability of dropping one of sigma's numbers now; 0 outside training.
    """
    u = F.dropout(ACTIVATIONS[activation](F.linear(x, W_1, b_1)), dropout)  # (..., m)
    y = F.linear(u, W_2, b_2)
    return y if scale == 1 else scale * y


def fits_one_program(f, x, W_1, b_1, W_2, b_2, activation="relu", scale=1.0):
    """What the twin takes: one dtype, no autocast, and an m whose numbers stay in registers."""
    alike = f.shape == x.shape and f.dtype == x.dtype == W_1.dtype
    return alike and len(W_1) <= 128 and not torch.is_autocast_enabled(x.device.type)


@fast_path(
    "minipeft.kernels.adapter",
    capability=(8, 0),
    dtypes=(torch.float16, torch.bfloat16, torch.float32),
    supports=fits_one_program,
    wins=never,  # no committed measurement shows a win
)
def add_bottleneck(f, x, W_1, b_1, W_2, b_2, activation="relu", scale=1.0):
    """f + A(x), f and x (..., D) -> (..., D). (Bottleneck 2)"""
    return f + bottleneck(x, W_1, b_1, W_2, b_2, activation, scale)


def init_lora(down, up):
    """U(-1/sqrt(D), 1/sqrt(D)) below, zero above: He et al.'s, after LoRA."""
    nn.init.uniform_(down, -(down.shape[1] ** -0.5), down.shape[1] ** -0.5)
    nn.init.zeros_(up)


def init_truncated(*weights, std=1e-3):
    """Houlsby et al.'s: a normal cut at two standard deviations."""
    for weight in weights:
        nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std)


def init_normal(*weights, std=0.02):
    """BERT's, which the library `adapters` uses."""
    for weight in weights:
        nn.init.normal_(weight, 0.0, std)


INITS = {"lora": init_lora, "truncated": init_truncated, "normal": init_normal}


class Bottleneck(nn.Module):
    """A(x), (..., D) -> (..., D). (Bottleneck 1)

    own_norm: read a LayerNorm of its own instead of x. dropout: on the m numbers, in training.
    `place`: device and dtype.
    """

    def __init__(
        self,
        width,
        bottleneck,
        scale=1.0,
        activation="relu",
        init="lora",
        own_norm=False,
        dropout=0.0,
        **place,
    ):
        super().__init__()
        self.scale, self.activation, self.dropout = scale, activation, dropout
        self.norm = nn.LayerNorm(width, **place) if own_norm else nn.Identity()
        self.down = nn.Linear(width, bottleneck, **place)
        self.up = nn.Linear(bottleneck, width, **place)
        INITS[init](self.down.weight, self.up.weight)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.bias)

    def weights(self):
        """W_1, b_1, W_2, b_2."""
        return self.down.weight, self.down.bias, self.up.weight, self.up.bias

    def forward(self, x):
        dropout = self.dropout if self.training else 0.0
        return bottleneck(self.norm(x), *self.weights(), self.activation, self.scale, dropout)

    def add_to(self, f, x):
        """f + A(x), by one function where nothing comes between the two. (Bottleneck 2)"""
        if (self.training and self.dropout) or self._forward_hooks or self._forward_pre_hooks:
            return f + self(x)
        return add_bottleneck(f, self.norm(x), *self.weights(), self.activation, self.scale)
