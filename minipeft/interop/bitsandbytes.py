r"""Quantised weights under the keys of bitsandbytes' state dicts, and folders of quantised models.

bitsandbytes' Linear4bit keeps a weight as these tensors, and so does this file:

    NAME                                         packed codes, (ceil(n / 2), 1) uint8
    NAME.absmax                                  constants: float32, or uint8 codes of the map
    NAME.quant_map                               the sixteen levels, float32
    NAME.nested_absmax, NAME.nested_quant_map    double quantisation only: constants of the groups
                                                 (float32) and the map (256 levels)
    NAME.quant_state.bitsandbytes__nf4           JSON as bytes (uint8): quant_type, blocksize,
                                                 dtype, shape; nested_blocksize, nested_dtype,
                                                 nested_offset

A folder of a quantised model holds config.json (GPT-2's values, `model_type` minipeft_nf4 and the
quantisation's settings; for a pruned model its layers' widths) and model.safetensors: logical
names, projections under the keys above.
transformers has one joint c_attn where we have q, k and v, each with its own mean of constants, so
it cannot open the folder; `Params4bit.from_prequantized` takes each weight as it is.

How this differs from bitsandbytes: a level table that is not NF4's, a shape that does not fit the
codes and a missing key are errors that name it.

Footguns: `quant_state` is JSON in a uint8 tensor; the offset is in the JSON, a Python float.
"""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from minipeft import wrap
from minipeft.atomic import write_all_atomically
from minipeft.compressed.structured_pruning import dense_widths, with_widths
from minipeft.interop import hf_gpt2
from minipeft.quantized.nf4 import CODEBOOKS, DYNAMIC_MAP, GROUP, DoubleQuantized, Quantized
from minipeft.quantized.nf4_linear import DTYPES, NF4Linear, quantized_linear
from minipeft.quantized.qlora import projections
from minipeft.technique import check_bare

MODEL_TYPE = "minipeft_nf4"
KINDS = ("nf4", "fp4")  # what bitsandbytes has a quant_state for


def to_state(quantized, name="weight"):
    """A Quantized as bitsandbytes' tensors, {key: tensor}. Raises ValueError for Int4."""
    if quantized.kind not in KINDS:
        raise ValueError(f"bitsandbytes has no {quantized.kind}; only {' and '.join(KINDS)}")
    about = {
        "quant_type": quantized.kind,
        "blocksize": quantized.block_size,
        "dtype": str(quantized.dtype).removeprefix("torch."),
        "shape": list(quantized.shape),
    }
    constants = quantized.absmax
    state = {name: quantized.packed, f"{name}.quant_map": CODEBOOKS[quantized.kind].clone()}
    if quantized.double_quant:
        state[f"{name}.absmax"] = constants.codes
        state[f"{name}.nested_absmax"] = constants.absmax
        state[f"{name}.nested_quant_map"] = DYNAMIC_MAP.clone()
        about |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}
        about["nested_offset"] = constants.offset.item()
    else:
        state[f"{name}.absmax"] = constants
    text = json.dumps(about).encode()
    key = f"{name}.quant_state.bitsandbytes__{quantized.kind}"
    return state | {key: torch.tensor(list(text), dtype=torch.uint8)}


def from_state(state, name="weight"):
    """The Quantized that bitsandbytes' tensors describe.

    Raises ValueError for a missing key, levels that are not the kind's, or codes and constants
    that do not fit the shape, naming it.
    """
    kind = next((k for k in KINDS if f"{name}.quant_state.bitsandbytes__{k}" in state), None)
    if kind is None:
        raise ValueError(f"there is no {name}.quant_state.bitsandbytes__nf4: not a 4-bit weight")
    about = read_about(state, f"{name}.quant_state.bitsandbytes__{kind}")
    nested = "nested_blocksize" in about
    keys = ["", ".absmax", ".quant_map"] + [".nested_absmax", ".nested_quant_map"] * nested
    missing = [name + key for key in keys if name + key not in state]
    if missing:
        raise ValueError(f"missing {', '.join(missing)}")
    check_levels(state, name, kind, about)
    absmax = state[f"{name}.absmax"]
    if nested:
        device = absmax.device
        offset = torch.tensor(about["nested_offset"], dtype=torch.float32, device=device)
        absmax = DoubleQuantized(absmax, state[f"{name}.nested_absmax"], offset)
    dtype = getattr(torch, about["dtype"])
    packed = state[name].view(-1, 1)
    return Quantized(packed, absmax, tuple(about["shape"]), dtype, about["blocksize"], kind)


def read_about(state, key):
    """The JSON in a quant_state. Raises ValueError naming the key, and what it lacks."""
    try:
        about = json.loads(bytes(state[key].tolist()).decode("utf-8"))
    except ValueError as problem:
        raise ValueError(f"{key} is not JSON: {problem}") from problem
    if not isinstance(about, dict):
        raise ValueError(f"{key} holds a {type(about).__name__}, not an object {{...}}")
    lacking = [name for name in ("blocksize", "dtype", "shape") if name not in about]
    if lacking:
        raise ValueError(f"{key} does not say its {', '.join(lacking)}")
    size, shape = about["blocksize"], about["shape"]
    sensible = {
        "blocksize": type(size) is int and size > 0 and size % 2 == 0,
        "dtype": about["dtype"] in DTYPES,
        "shape": isinstance(shape, list) and all(type(n) is int and n > 0 for n in shape),
        "nested_offset": isinstance(about.get("nested_offset", 0.0), int | float),
    }
    for name, fine in sensible.items():
        if not fine:
            raise ValueError(f"{key}: {name}={about[name]!r} makes no sense")
    return about


def check_levels(state, name, kind, about):
    """Raise ValueError where tables or sizes are not what the kind and the shape ask for."""
    n, size = math.prod(about["shape"]), about["blocksize"]
    if not torch.equal(state[f"{name}.quant_map"].cpu().float(), CODEBOOKS[kind]):
        raise ValueError(f"{name}.quant_map does not hold the levels of {kind}")
    wanted = {name: -(-n // 2), f"{name}.absmax": -(-n // size)}
    nested = "nested_blocksize" in about
    if nested:
        if "nested_offset" not in about:
            raise ValueError(f"{name}: constants in eight bits need their nested_offset")
        if about["nested_blocksize"] != GROUP:
            raise ValueError(f"{name}: nested_blocksize={about['nested_blocksize']}, not {GROUP}")
        if not torch.equal(state[f"{name}.nested_quant_map"].cpu(), DYNAMIC_MAP):
            raise ValueError(f"{name}.nested_quant_map is not the dynamic map")
        wanted[f"{name}.nested_absmax"] = -(-wanted[f"{name}.absmax"] // GROUP)
    for key, count in wanted.items():
        codes = key == name or (nested and key == f"{name}.absmax")
        if state[key].dtype != (torch.uint8 if codes else torch.float32):
            raise ValueError(f"{key} has dtype {state[key].dtype}, which its content never has")
        if state[key].numel() != count:
            raise ValueError(
                f"{key} has {state[key].numel()} elements; shape {tuple(about['shape'])} in blocks "
                f"of {size} needs {count}"
            )


# -- folders


def save_model(model, folder):
    """Write a quantised model to `folder`. Raises ValueError for techniques on it, floats, or a
    head that is not tied to the embedding.
    """
    check_bare(model, "detach them, save them apart")
    if getattr(model.head, "weight", None) is not model.embed.token.weight:
        raise ValueError("the head is not tied to the embedding: the folder cannot hold it")
    tensors, compute_dtype = {n: p.detach() for n, p in model.named_parameters()}, None
    for path in projections(model):
        layer = wrap.resolve(model, path)
        if not isinstance(layer, NF4Linear):
            if layer.weight.numel():
                raise ValueError(f"{path} is not quantised; quantize_model(model) first")
            continue  # its layer lost all its heads or neurons
        tensors |= to_state(layer.quantized, f"{path}.weight")
        compute_dtype = layer.compute_dtype
    tensors = {name: t.cpu().contiguous() for name, t in tensors.items()}
    about = {"compute_dtype": compute_dtype, "quant_method": "nf4"}
    config = hf_gpt2.config_values(model) | {
        "model_type": MODEL_TYPE,
        "architectures": None,
        "quantization_config": about,
    }
    folder = Path(folder)
    write_all_atomically(
        {
            folder / hf_gpt2.WEIGHTS: lambda path: save_file(tensors, path, {"format": "pt"}),
            folder / hf_gpt2.CONFIG: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        }
    )


def load_model(folder):
    """Open what `save_model` wrote; returns a GPT with NF4 layers, in eval mode.

    Raises FileNotFoundError or ValueError naming the file, the key or the tensor.
    """
    folder = Path(folder)
    values = read_own_config(folder)
    plain = values | {"model_type": "gpt2", "quantization_config": None}
    config = hf_gpt2.to_config(folder / hf_gpt2.CONFIG, plain)
    layers = dense_widths(config)
    if "layers" in values:  # it was pruned
        layers = hf_gpt2.checked_widths(folder / hf_gpt2.CONFIG, values["layers"], config)
    compute_dtype = (values.get("quantization_config") or {}).get("compute_dtype")
    if compute_dtype not in (None, *DTYPES):
        raise ValueError(f"{folder}: compute_dtype={compute_dtype!r} is none of {DTYPES}")
    model = meta_model(config, layers)
    with contextlib.ExitStack() as stack:
        file = hf_gpt2.open_safetensors(folder / hf_gpt2.WEIGHTS, stack)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for path in projections(model):
        name = f"{path}.weight"
        layer = wrap.resolve(model, path)
        if not layer.weight.numel():
            continue
        quantized = from_state(state, name)
        if quantized.shape != tuple(layer.weight.shape):
            raise ValueError(
                f"{folder}: {name} is {quantized.shape}, config.json asks for "
                f"{tuple(layer.weight.shape)}"
            )
        put(model, path, NF4Linear(quantized, layer.bias, compute_dtype))
        state = {n: t for n, t in state.items() if n != name and not n.startswith(f"{name}.")}
    return filled(folder, model, state)


def quantize_folder(folder, block_size=64, double_quant=True, compute_dtype=None):
    """Open a GPT-2 folder of floats as a quantised model: a layer is read, quantised and dropped,
    so memory never holds more than the quantised model and one layer. In eval mode.
    """
    folder = Path(folder)
    config = hf_gpt2.read_config(folder)
    model = meta_model(config, hf_gpt2.read_widths(folder, config))
    weights, state = {f"{path}.weight" for path in projections(model)}, {}
    with contextlib.ExitStack() as stack:
        files = hf_gpt2.open_weights(folder, stack)
        dtype = hf_gpt2.check_tensors(folder, files, model)
        for theirs, ours in hf_gpt2.pairs(len(model.blocks)):
            file, name = files[theirs]
            tensor = file.get_tensor(name).to(dtype)
            tensor = tensor.T if hf_gpt2.is_conv1d(theirs) else tensor
            for our_name, part in zip(ours, tensor.chunk(len(ours)), strict=True):
                if our_name in weights and part.numel():
                    path = our_name.removesuffix(".weight")
                    linear = wrap.resolve(model, path)
                    linear.weight = nn.Parameter(part, False)
                    put(model, path, quantized_linear(linear, block_size, double_quant))
                    wrap.resolve(model, path).compute_dtype = compute_dtype
                else:
                    state[our_name] = part.contiguous().clone()
        hf_gpt2.tied_head(folder, files, state["embed.token.weight"])
    return filled(folder, model, state)


def read_own_config(folder):
    """config.json of a quantised model. Raises ValueError for any other."""
    path = folder / hf_gpt2.CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {hf_gpt2.CONFIG}, so it is not a model folder")
    values = hf_gpt2.read_json(path)
    if values.get("model_type") != MODEL_TYPE:
        raise ValueError(
            f"{path}: model_type={values.get('model_type')!r} is not {MODEL_TYPE!r}; floats are "
            "opened with GPT.from_pretrained or quantize_folder"
        )
    return values


def meta_model(config, layers):
    """A GPT whose blocks have these widths, without memory."""
    with torch.device("meta"):
        return with_widths(config, layers)


def put(model, path, layer):
    parent, name = wrap.locate(model, path)
    setattr(parent, name, layer)


def filled(folder, model, state):
    """The model with its float tensors in place. Raises ValueError for missing or unknown ones."""
    wanted = {name for name, _ in model.named_parameters()}
    wrong = [f"missing {n}" for n in sorted(wanted - state.keys())]
    wrong += [f"unknown {n}" for n in sorted(state.keys() - wanted)]
    if wrong:
        raise ValueError(f"{folder}: these tensors do not fit: {hf_gpt2.some(wrong)}")
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.embed.token.weight
    return model.eval()
