r"""A linear layer whose frozen weight is stored in four bits: the base of QLoRA (2023,
arXiv 2305.14314).

    (Frozen 1)   y  = W' x + b,   W' = dequantise(packed, constants), thrown away after use
    (Frozen 2)   dx = W'^T g      dequantised once more in the backward pass; there is no dW'

x, g and W' in the type to compute in: the one asked for, autocast's, or the input's. Between the
two passes nothing is kept of W', so a layer costs its packed bytes and, while it computes, one
float weight.

Trained parameters: none of its own; the bias, if somebody trains it.

Reduces to: nn.Linear with the dequantised weight, bitwise, forward and backward.

How this differs from bitsandbytes' Linear4bit: evaluating does not repack the weight (its CPU path
does, and training then gets no gradient through the layer); the constants stay float32 whatever the
model is converted to.

Footguns: constants cast along by `model.half()`; keeping W' for the backward pass, which is the
memory that was to be saved; dequantising to float32 and multiplying in bfloat16.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never
from minipeft.quantized.nf4 import FLOATS, DoubleQuantized, Quantized, dequantize_nf4, quantize_nf4

TOKENS = 4  # up to so many, a kernel may multiply straight from the packed weight
DTYPES = ("float32", "bfloat16", "float16", "float64")


def few_tokens(x, quantized, bias):
    """Whether the matrix-vector kernel takes this: a few tokens, rows that begin with a block."""
    size, width = quantized.block_size, quantized.shape[-1]
    power_of_two = size & (size - 1) == 0 and size <= 4096
    return 0 < x.numel() <= TOKENS * width and width % size == 0 and power_of_two


@fast_path(
    "minipeft.kernels.nf4_gemv",
    capability=(7, 5),
    dtypes=FLOATS,
    supports=few_tokens,
    wins=never,  # not measured on a GPU yet
)
def frozen_product(x, quantized, bias):
    """W' x + b with x (..., in), no gradient."""
    return F.linear(x, dequantize_nf4(quantized, x.dtype), bias)  # (Frozen 1)


class FrozenProduct(torch.autograd.Function):
    """x W'^T + b without keeping W': it is dequantised in both passes."""

    @staticmethod
    def forward(ctx, x, quantized, bias):
        ctx.quantized = quantized
        return frozen_product(x, quantized, bias)

    @staticmethod
    def backward(ctx, g):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ dequantize_nf4(ctx.quantized, g.dtype)  # (Frozen 2)
        if ctx.needs_input_grad[2]:
            db = g.flatten(0, -2).sum(0)
        return dx, None, db


def frozen_linear(x, quantized, bias=None):
    """W' x + b with x (..., in), W' a Quantized of shape (out, in); differentiable in x and b."""
    return FrozenProduct.apply(x, quantized, bias)


class NF4Linear(nn.Module):
    """A linear layer whose weight is stored in four bits. (..., in) -> (..., out)

    Its buffers are `packed`, `absmax` (uint8 codes after double quantisation), `nested_absmax` and
    `nested_offset`. `dtype` is the type in which `weight` gives the floats back; a conversion of
    the model (`.half()`) changes it and leaves the constants alone.
    """

    def __init__(self, quantized, bias=None, compute_dtype=None):
        super().__init__()
        self.out_features, self.in_features = quantized.shape
        self.block_size, self.kind, self.dtype = (
            quantized.block_size,
            quantized.kind,
            quantized.dtype,
        )
        self.compute_dtype, self.bias = compute_dtype, bias
        constants, double = quantized.absmax, quantized.double_quant
        self.register_buffer("packed", quantized.packed)
        self.register_buffer("absmax", constants.codes if double else constants)
        self.register_buffer("nested_absmax", constants.absmax if double else None)
        self.register_buffer("nested_offset", constants.offset if double else None)

    @property
    def quantized(self):
        """What is stored, as nf4.py knows it."""
        constants = self.absmax
        if self.nested_absmax is not None:
            constants = DoubleQuantized(constants, self.nested_absmax, self.nested_offset)
        shape = (self.out_features, self.in_features)
        return Quantized(self.packed, constants, shape, self.dtype, self.block_size, self.kind)

    @property
    def weight(self):
        """W' (out, in), made anew at each reading."""
        return dequantize_nf4(self.quantized)

    @property
    def place(self):
        """Device and dtype of what is put beside this layer."""
        return {"device": self.packed.device, "dtype": self.dtype}

    def forward(self, x):
        dtype = self.dtype_for(x)
        bias = None if self.bias is None else self.bias.to(dtype)
        y = frozen_linear(x.to(dtype), self.quantized, bias)
        return y if self.compute_dtype is None else y.to(x.dtype)

    def dtype_for(self, x):
        """The type to compute in: the one asked for, autocast's, or the input's."""
        if self.compute_dtype is not None:
            return getattr(torch, self.compute_dtype)
        kind = x.device.type
        return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype

    def to_linear(self):
        """A plain nn.Linear that holds W'."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, "meta")
        linear.weight = nn.Parameter(self.weight, False)
        if self.bias is not None:
            linear.bias = self.bias
        return linear.train(self.training)

    def _apply(self, fn, recurse=True):
        """`.to`, `.half` and friends: move everything, convert only what is not a constant."""
        before = dict(self._buffers)
        self.dtype = fn(torch.empty(0, **self.place)).dtype
        super()._apply(fn, recurse)
        for name, now in self._buffers.items():
            if now is not None and now.dtype != before[name].dtype:
                self._buffers[name] = before[name].to(now.device)
        return self


def quantized_linear(linear, block_size, double_quant, compute_dtype=None, device=None):
    """An nn.Linear as an NF4Linear, which shares its bias."""
    weight, bias = linear.weight.detach(), linear.bias
    if device is not None:
        weight = weight.to(device)
        bias = None if bias is None else nn.Parameter(bias.detach().to(device), bias.requires_grad)
    quantized = quantize_nf4(weight, block_size, double_quant)
    return NF4Linear(quantized, bias, compute_dtype).train(linear.training)
