r"""QLoRA: LoRA on a base in four bits (Dettmers et al., 2023, arXiv 2305.14314).

The frozen weights are stored as NF4 with double quantisation and turned back into floats only while
a layer computes; what is trained is LoRA on every projection, at full precision.

    (QLoRA 1)   h   = y + s B A x,   y = W' x + b                (Frozen 1) and around it (LoRA 1)
    (QLoRA 2)   W_m = W' + s B A                  merged: floats, which are no NF4 values any more

W' in R^(out x in) is what NF4 keeps of each block's q, k, v, o, up and down (nf4_linear.py);
embeddings, biases and LayerNorms stay floats, and LayerNorms compute in float32.

Trained parameters: LoRA's, the sum over the targets of r (in + out); all six projections
L r (8 D + 2 (D + d_ff)). Stored: 4 + 8/64 + 32/(64 * 256) bits a quantised weight.

    packed weights    NF4 of the base's, for good: the base from now on is the quantised model
    A, B              as in LoRA, so the model at the start is the quantised base, bitwise

Reduces to: LoRA, bitwise, on weights that already are NF4 levels times an absmax.

How this differs from bitsandbytes and peft: nothing waits for a `.to(device)`; evaluating does not
repack the weights; any shape; a quantised weight counts once, where peft counts its bytes and
doubles them and the paper's script halves what is trained. Detaching gives back the quantised
model, or with `keep_original` the floats.

Footguns: merging into the packed weights (it rounds most of what was learned away; `merge` says how
much); quantising the head; an adapter opened on a base that was quantised in another way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from minipeft import technique, wrap
from minipeft.low_rank.lora import PROJECTIONS, LoRA, path_of
from minipeft.quantized.nf4 import check_finite, dequantize_nf4, quantize_nf4
from minipeft.quantized.nf4_linear import DTYPES, NF4Linear, quantized_linear


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
    technique.check_bare(model, "quantise it before attaching")
    for path in to_quantize(model, block_size, double_quant, compute_dtype):
        parent, name = wrap.locate(model, path)
        layer = quantized_linear(
            getattr(parent, name), block_size, double_quant, compute_dtype, device
        )
        setattr(parent, name, layer)
        del layer
    return model.to(device) if device is not None else model


def to_quantize(model, block_size, double_quant, compute_dtype=None):
    """Paths of the projections that are still floats and have any: a layer that lost all heads or
    neurons has nothing to quantise. Raises ValueError for those that cannot be quantised, or
    already are, in another way.
    """
    found = []
    for path in projections(model):
        module = wrap.base_module(wrap.resolve(model, path))
        if isinstance(module, NF4Linear):
            check_same(path, module, block_size, double_quant, compute_dtype)
        elif module is not wrap.resolve(model, path):
            raise ValueError(f"a technique is on {path}, which is not quantised: quantise it first")
        elif module.weight.numel():
            weight = module.weight
            check_finite(weight.detach(), weight.detach().abs().amax(1).float())
            found.append(path)
    return found


def check_untrained(model, paths, names):
    """Raise ValueError where a technique trains tensors of these `names`: NF4 would round them once
    and for all, and no base would fit the adapter's file afterwards.
    """
    trained = {id(p): a.name for a in model.attachments for p in a.parameters().values()}
    for path in paths:
        for tensor in (wrap.resolve(model, f"{path}.{name}") for name in names):
            if id(tensor) in trained:
                raise ValueError(
                    f"{trained[id(tensor)]!r} trains {path}, which NF4 would round and freeze: "
                    "merge or detach it first, or attach it to the quantised model"
                )


def check_same(path, layer, block_size, double_quant, compute_dtype):
    """Raise ValueError where an NF4 layer is not what is asked for; None is any compute type."""
    stored = (layer.block_size, layer.nested_absmax is not None, layer.compute_dtype)
    if stored != (block_size, double_quant, compute_dtype or stored[2]):
        raise ValueError(
            f"{path} is already NF4 with block_size={stored[0]}, double_quant={stored[1]}, "
            f"compute_dtype={stored[2]}; ask for the same or start from the float model"
        )


def dequantize_model(model):
    """Every NF4 layer as a plain nn.Linear that holds the same values. Returns the model.

    Raises ValueError for a model with techniques on it, whose wrappers would keep the NF4 layers.
    """
    technique.check_bare(model, "merge or detach them first")
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

    The model is then plain floats, or with `requantize` NF4 as before. (QLoRA 2)
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
    """LoRA around projections in NF4; all six are quantised, whatever the targets. (QLoRA 1)

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
            inner = wrap.resolve(model, path)
            if path not in adapted and isinstance(wrap.base_module(inner), NF4Linear):
                attachment.wrap(model, path, FloatAgain(inner))

    def quantize(self, model, attachment):
        """Put NF4 layers in, for good unless the originals are to be kept."""
        paths = to_quantize(model, self.block_size, self.double_quant, self.compute_dtype)
        check_untrained(model, paths, ("weight",) if self.keep_original else ("weight", "bias"))
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
