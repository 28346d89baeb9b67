r"""Models in ggml's file format, GGUF version 3, with projections in one of its block formats.

The tensors carry llama.cpp's names for GPT-2; ours on the right:

    token_embd.weight             embed.token.weight, and the tied head
    position_embd.weight          embed.position.weight
    blk.N.attn_norm.*             blocks.N.ln_1.*
    blk.N.attn_qkv.*              blocks.N.attn.{q,k,v}.*, stacked
    blk.N.attn_output.*           blocks.N.attn.o.*
    blk.N.ffn_norm.*              blocks.N.ln_2.*
    blk.N.ffn_up.*  ffn_down.*    blocks.N.mlp.up.*  down.*
    output_norm.*                 ln_f.*

Projection weights are blocks of the chosen kind, everything else float32. The file, little-endian:

    "GGUF"  version (u32)  tensors (u64)  values (u64)
    values     key, type (u32), value; a string is its length (u64) and its bytes
    tensors    name, dimensions (u32), sizes (u64 each, the fastest first), type (u32), offset (u64)
    data       from the next multiple of 32 on; every tensor begins at one, counted from there

How this differs from llama.cpp's converter: no vocabulary is written (its tokenizer stays beside
the file), so llama.cpp itself needs one added before it can run the model; the `gguf` package opens
the file as it is. Our own reader takes GPT-2 with these tensors, any of the five block formats and
float32, nothing else.

Footguns: sizes run backwards (rows last); offsets count from the start of the data, not the file.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch

from minipeft.atomic import write_atomically
from minipeft.compressed.structured_pruning import dense_widths, widths
from minipeft.gpt import GPT, GPTConfig
from minipeft.interop.hf_gpt2 import check_savable
from minipeft.quantized.ggml import (
    BLOCK,
    KINDS,
    GGMLQuantized,
    dequantize_ggml,
    quantize_ggml,
)

ALIGNMENT = 32
FLOAT32 = 0
TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8}  # ggml's numbers of tensor types
FILE_TYPES = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 8, "Q5_1": 9, "Q8_0": 7}  # llama.cpp's, "mostly this"
VALUES = {4: "<I", 6: "<f", 8: ""}  # u32, f32, string
SIZES = {
    "gpt2.context_length": "context_length",
    "gpt2.embedding_length": "d_model",
    "gpt2.feed_forward_length": "ff_width",
    "gpt2.block_count": "n_layer",
    "gpt2.attention.head_count": "n_head",
}


def save_gguf(model, path, kind="Q4_0"):
    """Write a plain GPT with its projections as `kind`; returns the path.

    Raises ValueError for an unknown kind, wrappers on the model, widths that are no multiples of
    32, or layers that lost heads or neurons.
    """
    check_savable(model)
    if widths(model) != dense_widths(model.config):
        raise ValueError(
            "this model was pruned, and a GGUF file of a gpt2 tells one width for all layers: save "
            "it with save_pretrained, or quantise it as nf4"
        )
    tensors = {name: as_stored(name, t, kind) for name, t in named_tensors(model).items()}
    config = model.config
    values = {"general.architecture": "gpt2", "general.quantization_version": 2}
    values |= {"general.file_type": FILE_TYPES[kind]}
    values |= {key: getattr(config, ours) for key, ours in SIZES.items()}
    values["gpt2.attention.layer_norm_epsilon"] = float(config.layer_norm_eps)
    head, data, offset = b"", [], 0
    for key, value in values.items():
        head += string(key) + typed(value)
    for name, (shape, type_number, content) in tensors.items():
        head += string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", type_number, offset)
        data.append(content + bytes(-len(content) % ALIGNMENT))
        offset += len(data[-1])
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(values)) + head
    write_atomically(path, head + bytes(-len(head) % ALIGNMENT) + b"".join(data))
    return Path(path)


def load_gguf(path):
    """A GPT in eval mode, float32, from a file that `save_gguf` wrote.

    Raises ValueError for another architecture, another tensor type, missing or unknown tensors.
    """
    values, tensors = read(Path(path))
    if values.get("general.architecture") != "gpt2":
        raise ValueError(f"{path} holds a {values.get('general.architecture')!r}, not a gpt2")
    missing = [k for k in (*SIZES, "gpt2.attention.layer_norm_epsilon") if k not in values]
    if missing or "token_embd.weight" not in tensors:
        raise ValueError(f"{path} lacks {', '.join(missing) or 'token_embd.weight'}")
    sizes = {ours: values[key] for key, ours in SIZES.items()}
    sizes["d_ff"] = sizes.pop("ff_width")
    eps = round(values["gpt2.attention.layer_norm_epsilon"], 12)  # float32 has 9.99999975e-06
    vocabulary = tensors["token_embd.weight"].shape[0]
    if sizes["n_layer"] > len(tensors):
        raise ValueError(f"{path} has no tensors for gpt2.block_count={sizes['n_layer']}")
    try:
        with torch.device("meta"):  # no memory before the sizes are known to be the tensors'
            model = GPT(GPTConfig(vocab_size=vocabulary, layer_norm_eps=eps, **sizes))
    except ValueError as problem:
        raise ValueError(f"{path}: {problem}") from None
    ours = named_tensors(model)
    wrong = sorted(ours.keys() ^ tensors.keys())
    wrong += [n for n in ours if n in tensors and ours[n].shape != tensors[n].shape]
    if wrong:
        raise ValueError(f"{path}: missing, unknown or wrongly shaped: {', '.join(wrong[:8])}")
    model = model.to_empty(device="cpu")
    model.head.weight = model.embed.token.weight
    with torch.no_grad():
        for name, parts in parts_of(model).items():
            rows = [p.shape[0] for p in parts]
            for part, value in zip(parts, tensors[name].split(rows)):
                part.copy_(value)
    return model.eval()


# -- names


def parts_of(model):
    """llama.cpp's name -> our tensors, stacked there along the first dimension."""
    found = {
        "token_embd.weight": [model.embed.token.weight],
        "position_embd.weight": [model.embed.position.weight],
    }
    for n, block in enumerate(model.blocks):
        modules = {
            "attn_norm": [block.ln_1],
            "attn_qkv": [block.attn.q, block.attn.k, block.attn.v],
            "attn_output": [block.attn.o],
            "ffn_norm": [block.ln_2],
            "ffn_up": [block.mlp.up],
            "ffn_down": [block.mlp.down],
        }
        for name, group in modules.items():
            found[f"blk.{n}.{name}.weight"] = [m.weight for m in group]
            found[f"blk.{n}.{name}.bias"] = [m.bias for m in group]
    return found | {
        "output_norm.weight": [model.ln_f.weight],
        "output_norm.bias": [model.ln_f.bias],
    }


def named_tensors(model):
    """llama.cpp's name -> tensor."""
    return {name: torch.cat([p.detach() for p in parts]) for name, parts in parts_of(model).items()}


def is_projection(name):
    return name.endswith(("qkv.weight", "attn_output.weight", "up.weight", "down.weight"))


def as_stored(name, tensor, kind):
    """(shape, ggml's type, bytes) of one tensor."""
    if not is_projection(name):
        return tensor.shape, FLOAT32, tensor.float().cpu().numpy().tobytes()
    quantized = quantize_ggml(tensor.cpu(), kind)
    return tensor.shape, TYPES[kind], quantized.data.numpy().tobytes()


# -- bytes


def string(text):
    return struct.pack("<Q", len(text.encode())) + text.encode()


def typed(value):
    """A value behind the number of its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + string(value)
    number = 6 if isinstance(value, float) else 4
    return struct.pack("<I", number) + struct.pack(VALUES[number], value)


class Reader:
    """The bytes of a file, taken from the front."""

    def __init__(self, content, path):
        self.content, self.path, self.at = content, path, 0

    def take(self, format):
        size = struct.calcsize(format)
        if self.at + size > len(self.content):
            raise ValueError(f"{self.path} ends in the middle of its header; copy it again")
        self.at += size
        found = struct.unpack(format, self.content[self.at - size : self.at])
        return found[0] if len(found) == 1 else found

    def string(self):
        size = self.take("<Q")
        if size > len(self.content):
            raise ValueError(f"{self.path} ends in the middle of its header; copy it again")
        return self.take(f"<{size}s").decode()

    def value(self):
        number = self.take("<I")
        if number not in VALUES:
            raise ValueError(f"{self.path} has a value of type {number}; only u32, f32, strings")
        return self.string() if number == 8 else self.take(VALUES[number])


def read(path):
    """(values, {name: float32 tensor}) of a GGUF file."""
    reader = Reader(path.read_bytes(), path)
    if reader.content[:8] != b"GGUF" + struct.pack("<I", 3):
        raise ValueError(f"{path} is no GGUF file of version 3")
    reader.at = 8
    tensors, count = reader.take("<QQ")
    values = {reader.string(): reader.value() for _ in range(count)}
    listed = []
    for _ in range(tensors):
        name, dimensions = reader.string(), reader.take("<I")
        shape = tuple(reader.take("<Q") for _ in range(dimensions))[::-1]
        listed.append((name, shape, *reader.take("<IQ")))
    start = reader.at + -reader.at % ALIGNMENT
    return values, {n: restored(reader, start, n, *rest) for n, *rest in listed}


def restored(reader, start, name, shape, type_number, offset):
    """One tensor as float32."""
    kinds = {number: kind for kind, number in TYPES.items()}
    if type_number != FLOAT32 and type_number not in kinds:
        raise ValueError(f"{reader.path}: {name} has ggml's type {type_number}, not one of {TYPES}")
    kind, count = kinds.get(type_number), math.prod(shape)
    if kind and (not shape or shape[-1] % BLOCK):
        raise ValueError(f"{reader.path}: {name} is {shape}, and {kind} has rows of {BLOCK}s")
    width = KINDS[kind].block_bytes if kind else 4 * BLOCK
    size = count * width // BLOCK
    content = reader.content[start + offset : start + offset + size]
    if len(content) != size:
        raise ValueError(f"{reader.path} ends in the middle of {name}; copy it again")
    if kind is None:
        return torch.frombuffer(bytearray(content), dtype=torch.float32).view(shape)
    data = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, width)
    return dequantize_ggml(GGMLQuantized(data, shape, torch.float32, kind))
