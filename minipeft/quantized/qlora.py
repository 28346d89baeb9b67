r"""QLoRA: LoRA on a base in four bits (Dettmers et al., 2023, arXiv 2305.14314).

The frozen weights are stored as NF4 with double quantisation and turned back into floats only while
a layer computes; what is trained is LoRA on every projection, at full precision.

    (QLoRA 1)   y   = W' x + b,          W' = dequantise(packed, constants), thrown away after use
    (QLoRA 2)   dx  = W'^T g             dequantised once more in the backward pass; no dW'
    (QLoRA 3)   h   = y + s B A x        (LoRA 1) around it
    (QLoRA 4)   W_m = W' + s B A         merged: floats again, which are no NF4 values any more

W in R^(out x in) is each block's q, k, v, o, up or down; embeddings, biases and LayerNorms stay as
they are, and LayerNorms compute in float32. x, g and W' have the compute type.

Trained parameters: LoRA's, the sum over the targets of r (in + out); all six projections
L r (8 D + 2 (D + d_ff)). Stored: 4 + 8/64 + 32/(64 * 256) bits a quantised weight.

    packed weights    NF4 of the base's, for good: the base from now on is the quantised model
    A, B              as in LoRA, so the model at the start is the quantised base, bitwise

Reduces to: LoRA, bitwise, on weights that already are NF4 levels times an absmax.

How this differs from bitsandbytes and peft: nothing waits for a `.to(device)`; evaluating does not
repack the weights (its CPU path does, and training then gets no gradient through the layer); any
shape; a quantised weight counts once, where peft counts its bytes and doubles them and the paper's
script halves what is trained. Detaching gives back the quantised model; the floats too, if
`keep_original`.

Footguns: merging into the packed weights (it rounds most of what was learned away; `merge` says how
much); constants cast along by `model.half()`; keeping W' for the backward pass, which is the memory
that was to be saved; quantising the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import technique, wrap
from minipeft.low_rank.lora import PROJECTIONS, LoRA, path_of
from minipeft.quantized.nf4 import (
    DoubleQuantized,
    Quantized,
    check_finite,
    dequantize_nf4,
    quantize_nf4,
)

DTYPES = ("float32", "bfloat16", "float16", "float64")


class FrozenProduct(torch.autograd.Function):
    """x W'^T + b without keeping W': it is dequantised in both passes."""

    @staticmethod
    def forward(ctx, x, quantized, bias):
        ctx.quantized = quantized
        return F.linear(x, dequantize_nf4(quantized, x.dtype), bias)  # (QLoRA 1)

    @staticmethod
    def backward(ctx, g):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = g @ dequantize_nf4(ctx.quantized, g.dtype)  # (QLoRA 2)
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


class FloatAgain(wrap.Wrapper):
    """On a quantised projection that has no LoRA: does nothing, but merges into floats."""

    def merged(self, inner):
        return inner.to_linear()


class LayerNormInFloat32(wrap.Wrapper):
    """A half-precision model's LayerNorm, computed in float32 and rounded once."""

    def forward(self, x):
        weight, bias = self.inner.weight.float(), self.inner.bias.float()
        y = F.layer_norm(x.float(), self.inner.normalized_shape, weight, bias, self.inner.eps)
        return y.to(x.dtype)

    def merged(self, inner):
        return inner


# -- quantising a model, and giving the floats back


def projections(model):
    """Logical paths of every projection."""
    return [path_of(n, target) for n in range(len(model.blocks)) for target in PROJECTIONS]


def layer_norms(model):
    """Logical paths of every LayerNorm."""
    return [f"blocks.{n}.{x}" for n in range(len(model.blocks)) for x in ("ln_1", "ln_2")] + [
        "ln_f"
    ]


def quantize_model(model, block_size=64, double_quant=True, compute_dtype=None, device=None):
    """Put every projection's weight in NF4, in place and for good. Returns the model.

    Layer by layer: each float weight is gone before the next is quantised. With `device` they move
    there one by one, so it never holds more than the quantised model and one layer. Raises
    ValueError, before anything has changed, for weights that are not finite and for a model with
    techniques on it.
    """
    if model.attachments:
        names = ", ".join(a.name for a in model.attachments)
        raise ValueError(f"techniques are on this model ({names}): quantise it before attaching")
    for path in to_quantize(model, block_size, double_quant, compute_dtype):
        parent, name = wrap.locate(model, path)
        layer = quantized_linear(
            getattr(parent, name), block_size, double_quant, compute_dtype, device
        )
        setattr(parent, name, layer)
        del layer
    return model.to(device) if device is not None else model


def to_quantize(model, block_size, double_quant, compute_dtype=None):
    """Paths of the projections that are still floats. Raises ValueError for those that cannot be
    quantised, or already are, in another way.
    """
    found = []
    for path in projections(model):
        module = wrap.base_module(wrap.resolve(model, path))
        if isinstance(module, NF4Linear):
            check_same(path, module, block_size, double_quant, compute_dtype)
        elif module is not wrap.resolve(model, path):
            raise ValueError(f"a technique is on {path}, which is not quantised: quantise it first")
        else:
            weight = module.weight
            check_finite(weight.detach(), weight.detach().abs().amax(1).float())
            found.append(path)
    return found


def check_same(path, layer, block_size, double_quant, compute_dtype):
    """Raise ValueError where an NF4 layer is not what is asked for; None is any compute type."""
    stored = (layer.block_size, layer.nested_absmax is not None, layer.compute_dtype)
    if stored != (block_size, double_quant, compute_dtype or stored[2]):
        raise ValueError(
            f"{path} is already NF4 with block_size={stored[0]}, double_quant={stored[1]}, "
            f"compute_dtype={stored[2]}; ask for the same or start from the float model"
        )


def quantized_linear(linear, block_size, double_quant, compute_dtype=None, device=None):
    """An nn.Linear as an NF4Linear, which shares its bias."""
    weight, bias = linear.weight.detach(), linear.bias
    if device is not None:
        weight = weight.to(device)
        bias = None if bias is None else nn.Parameter(bias.detach().to(device), bias.requires_grad)
    quantized = quantize_nf4(weight, block_size, double_quant)
    return NF4Linear(quantized, bias, compute_dtype).train(linear.training)


def dequantize_model(model):
    """Every NF4 layer as a plain nn.Linear that holds the same values. Returns the model."""
    for path in projections(model):
        parent, name = wrap.locate(model, path)
        if isinstance(getattr(parent, name), NF4Linear):
            setattr(parent, name, getattr(parent, name).to_linear())
    return model


@dataclass(frozen=True)
class MergeError:
    """What merging one layer costs, all root mean squares over its weights.

    learned: s B A. rounding: the merged floats against the exact sum. requantized: quantising the
    merged floats again; where it is above `learned`, most of what was learned drowns in it.
    """

    path: str
    learned: float
    rounding: float
    requantized: float


@torch.no_grad()
def merge(model, requantize=False):
    """`minipeft.merge`, with the error of every layer: a list of MergeError.

    The model is then plain floats, or with `requantize` NF4 as before. (QLoRA 4)
    """
    technique.check_mergeable(model)
    layers = {p: wrap.base_module(wrap.resolve(model, p)) for p in projections(model)}
    layers = {p: m for p, m in layers.items() if isinstance(m, NF4Linear)}
    if not layers:
        raise ValueError("no projection of this model is quantised; minipeft.merge merges it")
    outermost = {p: wrap.resolve(model, p) for p in layers}
    technique.merge(model)
    rows = []
    for path, layer in layers.items():
        delta, merged = delta_of(outermost[path]), wrap.resolve(model, path).weight
        again = dequantize_nf4(
            quantize_nf4(merged, layer.block_size, layer.nested_absmax is not None)
        )
        errors = (delta, merged - (layer.weight.double() + delta), again.double() - merged)
        rows.append(MergeError(path, *(e.double().square().mean().sqrt().item() for e in errors)))
    if requantize:
        one = next(iter(layers.values()))
        quantize_model(model, one.block_size, one.nested_absmax is not None, one.compute_dtype)
    return rows


def delta_of(module):
    """The sum of s B A over all wrappers of a projection, in float64; 0 where there is none."""
    total = torch.zeros((), dtype=torch.float64, device=wrap.base_module(module).packed.device)
    while isinstance(module, wrap.Wrapper):
        if hasattr(module, "delta"):
            total = total + module.scale * (module.B.double() @ module.A.double())
        module = module.inner
    return total


@dataclass(frozen=True)
class QLoRA(LoRA):
    """LoRA around projections in NF4; all six are quantised, whatever the targets. (QLoRA 3)

    rank: r, the width of the branch; at most min(in, out) of each target.
    alpha: the scale is alpha / rank, or alpha / sqrt(rank) with rank_stabilized.
    dropout: probability of dropping what A reads, in training.
    targets: some of q, k, v, o, up, down.
    rank_stabilized: rsLoRA's scale.
    share_qkv: one A for q, k and v, as peft has it on GPT-2.
    rank_pattern: (place, rank) pairs where the rank differs, as in LoRA.
    alpha_pattern: (place, alpha) pairs, likewise.
    block_size: weights that share one constant.
    double_quant: store the constants in eight bits.
    compute_dtype: float32, bfloat16, float16 or float64 to multiply in; None takes the input's.
    keep_original: keep the float weights beside, so that `detach` gives them back.
    """

    rank: int = 64
    targets: tuple[str, ...] = tuple(PROJECTIONS)
    block_size: int = 64
    double_quant: bool = True
    compute_dtype: str | None = None
    keep_original: bool = False

    learning_rate: ClassVar[float] = 3e-3

    def check(self, config):
        super().check(config)
        if self.compute_dtype is not None and self.compute_dtype not in DTYPES:
            raise ValueError(f"compute_dtype={self.compute_dtype!r} is none of {', '.join(DTYPES)}")
        if not isinstance(self.block_size, int) or self.block_size < 2 or self.block_size % 2:
            raise ValueError(f"block_size={self.block_size!r} is not a positive even number")

    def install(self, model, attachment):
        self.quantize(model, attachment)
        for path in layer_norms(model):
            if wrap.base_module(wrap.resolve(model, path)).weight.dtype.itemsize == 2:
                attachment.wrap(model, path, LayerNormInFloat32(wrap.resolve(model, path)))
        super().install(model, attachment)
        adapted = {path for path, *_ in self.places(len(model.blocks))}
        for path in projections(model):
            if path not in adapted:
                attachment.wrap(model, path, FloatAgain(wrap.resolve(model, path)))

    def quantize(self, model, attachment):
        """Put NF4 layers in, for good unless the originals are to be kept."""
        paths = to_quantize(model, self.block_size, self.double_quant, self.compute_dtype)
        if paths and not self.keep_original:
            from minipeft.checkpoint import fingerprint

            attachment.state["base"] = fingerprint(model)  # an adapter file may go onto the floats
        for path in paths:
            parent, name = wrap.locate(model, path)
            layer = quantized_linear(
                getattr(parent, name), self.block_size, self.double_quant, self.compute_dtype
            )
            if self.keep_original:
                attachment.wrap(model, path, layer)
            else:
                setattr(parent, name, layer)
            del layer
