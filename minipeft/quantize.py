r"""`minipeft quantize`: a model's projections in fewer bits, what that saves and what it costs.

Every format is one entry of FORMATS: a function from a weight and its inputs' Hessian to an object
that knows its bits and can be restored. Embeddings, LayerNorms and biases stay as they are; they
are counted in the sizes. Losses are those of the restored weights, computed in the model's dtype.

    (Quantise 1)   size  = bytes of what is stored for the projections + bytes of all the rest
    (Quantise 2)   error = sqrt(sum (w - w')^2 / sum w^2)        over all projections together

A model is stored where the format has a file: the block formats of ggml as GGUF
(interop/gguf.py), NF4 under bitsandbytes' keys (interop/bitsandbytes.py). The others are for
comparison.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from minipeft import wrap
from minipeft.dataset import Example, collate, encode_all
from minipeft.evaluation import BATCH, nats
from minipeft.low_rank.lora import PROJECTIONS, path_of
from minipeft.quantized import ggml, gptq, gptq_model, int8, nf4

CALIBRATION = 128  # texts that GPTQ sees unless told otherwise


@dataclass(frozen=True)
class Settings:
    """A format and what can be chosen about it.

    format: a key of FORMATS. bits, group_size, symmetric: of rtn and gptq. act_order: of gptq.
    block_size: of nf4, fp4 and int4.
    """

    format: str = "nf4"
    bits: int = 4
    group_size: int | None = None
    block_size: int = 64
    symmetric: bool = False
    act_order: bool = False


def _absmax(weight, hessian, settings):
    return int8.quantize_absmax(weight)


def _zero_point(weight, hessian, settings):
    return int8.quantize_zero_point(weight)


def _codebook(weight, hessian, settings):
    kind, _, double = settings.format.partition("-")
    return nf4.quantize(weight, kind, settings.block_size, bool(double))


def _blocks(weight, hessian, settings):
    return ggml.quantize_ggml(weight, settings.format.upper())


def _nearest(weight, hessian, settings):
    return gptq.round_to_nearest(weight, settings.bits, settings.group_size, settings.symmetric)


FORMATS = {  # name -> function(weight, hessian, settings); gptq goes through the model in order
    "int8": _absmax,
    "int8-zero-point": _zero_point,
    "nf4": _codebook,
    "nf4-double": _codebook,
    "fp4": _codebook,
    "int4": _codebook,
    **{kind.lower(): _blocks for kind in ggml.KINDS},
    "rtn": _nearest,
    "gptq": None,
}


def restore(quantized):
    """Any format's object as floats again."""
    kinds = {
        int8.Int8: int8.dequantize_int8,
        nf4.Quantized: nf4.dequantize_nf4,
        ggml.GGMLQuantized: ggml.dequantize_ggml,
        gptq.GroupQuantized: gptq.dequantize_group,
    }
    return kinds[type(quantized)](quantized)


def check(settings):
    """Raise ValueError for a format that does not exist."""
    if settings.format not in FORMATS:
        raise ValueError(f"format={settings.format!r} is none of {', '.join(FORMATS)}")


def projections(model):
    """Logical paths of what is quantised, in order."""
    return [path_of(n, target) for n in range(len(model.blocks)) for target in PROJECTIONS]


@torch.no_grad()
def quantize(model, settings, batches=()):
    """Put restored weights in the projections' place; returns {path: the quantised object}.

    batches: dataset.Batch objects for gptq to calibrate on. Layers that lost all heads or neurons
    have nothing to quantise. Raises ValueError for unknown formats, settings that do not suit the
    shapes, gptq without text, and projections that are no plain linear layers (in four bits
    already, or with a technique on them). The model is changed in place.
    """
    check(settings)
    if settings.format == "gptq":
        names = ("bits", "group_size", "symmetric", "act_order")
        return gptq_model.quantize_model(model, batches, **{n: getattr(settings, n) for n in names})
    weights = gptq_model.float_weights(model)
    done = {p: FORMATS[settings.format](w, None, settings) for p, w in weights.items()}
    for path, weight in weights.items():
        weight.copy_(restore(done[path]))
    return done


def calibration_batches(examples, tokenizer, model):
    """Examples as batches of BATCH rows."""
    rows = encode_all(examples, tokenizer, model)
    return [collate(rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)]


@dataclass(frozen=True)
class Report:
    """What quantising did. bits: stored bits over weights quantised. Bytes are of the whole model,
    losses in nats a document, error relative. (Quantise 1) (Quantise 2)
    """

    settings: Settings
    bits: float
    bytes_before: int
    bytes_after: int
    error: float
    loss_before: float
    loss_after: float

    def __str__(self):
        share = 100 * self.bytes_after / self.bytes_before
        return (
            f"{self.settings.format}: {self.bits:.3f} bits a quantised weight\n"
            f"size  {self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.1f} %)\n"
            f"error {100 * self.error:.2f} % of the weights' root mean square\n"
            f"loss  {self.loss_before:.4f} -> {self.loss_after:.4f} nats a document"
        )


def quantize_and_measure(model, tokenizer, settings, calibration, test, loss=None):
    """(quantised copy of the model, Report). calibration and test: lists of Example; loss: the
    model's on `test` where it is known already.
    """
    small = copy.deepcopy(model)
    batches = (
        calibration_batches(calibration, tokenizer, model) if settings.format == "gptq" else ()
    )
    done = quantize(small, settings, batches)
    before = nats(model, test, tokenizer) if loss is None else loss
    return small, report(model, small, done, settings, before, nats(small, test, tokenizer))


def report(model, small, done, settings, loss_before, loss_after):
    """The Report of a model, its quantised copy and what was quantised."""
    weights = {path: wrap.resolve(model, path).weight.detach() for path in done}
    restored = {path: wrap.resolve(small, path).weight.detach() for path in done}
    count = sum(w.numel() for w in weights.values())
    before = sum(p.numel() * p.element_size() for p in model.parameters())
    floats = sum(w.numel() * w.element_size() for w in weights.values())
    stored = sum(q.nbytes for q in done.values())
    changed = sum((weights[p] - restored[p]).double().square().sum().item() for p in done)
    whole = sum(w.double().square().sum().item() for w in weights.values())
    return Report(
        settings,
        8 * stored / count,
        before,
        before - floats + stored,  # (Quantise 1)
        math.sqrt(changed / whole),  # (Quantise 2)
        loss_before,
        loss_after,
    )


def texts(base, data):
    """(calibration examples, test examples): of the user's file, else of what the base learned."""
    if data is not None:
        from minipeft.dataset import read_examples

        examples = read_examples(data)
        held = max(1, len(examples) // 4)
        return examples[held:] or examples, examples[:held]
    from minipeft.town import held_out, pretraining_documents

    learned = pretraining_documents(count=CALIBRATION)
    return [Example(completion=t) for t in learned], [Example(completion=t) for t in held_out()]


def store(model, tokenizer, settings, folder):
    """Write `model` (not yet quantised) in the format's own file, the tokenizer beside it.

    Returns what was written. Raises ValueError where the format has no file.
    """
    folder = Path(folder)
    if settings.format.upper() in ggml.KINDS:
        from minipeft.interop.gguf import save_gguf

        folder.mkdir(parents=True, exist_ok=True)
        written = save_gguf(model, folder / "model.gguf", settings.format.upper())
    elif settings.format in ("nf4", "nf4-double"):
        from minipeft.interop import bitsandbytes
        from minipeft.quantized import qlora

        small = copy.deepcopy(model)
        qlora.quantize_model(small, settings.block_size, settings.format == "nf4-double")
        bitsandbytes.save_model(small, folder)
        written = folder
    else:
        raise ValueError(
            f"{settings.format} has no file format here; {', '.join(ggml.KINDS)}, nf4 and "
            "nf4-double have one"
        )
    tokenizer.save(folder)
    return written
