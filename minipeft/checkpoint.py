r"""Adapter files: what a technique trained, apart from the base it was trained on.

A folder holds

    adapter_config.json            what the adapter is: peft's keys, or `minipeft_type` and settings
    adapter_model.safetensors      its tensors: peft's names, or the logical names of this package
    minipeft_resume.safetensors    only if needed: what resuming needs and peft's format drops

Where peft knows the technique the first two are peft's own format (interop/peft.py) and open
there. What peft has no word for (settings, the base's fingerprint, the attachment's state) is one
string in the header of the tensors' file, which peft does not read:

    (Files 1)   fingerprint = sha256 over the base's tensors, by name: name, dtype, shape, bytes
    (Files 2)   header = technique, settings, base, state, the digest of the config

safetensors and JSON only: nothing that executes is ever loaded.

Three files cannot be renamed in one step, so one rename counts: that of the tensors' file. All
are written and flushed beside their places before it. The header's digest says which config
belongs to the tensors; if the program was killed between two renames that is
adapter_config.json.tmp.PID, and it is read from there.

How this differs from peft: a wrong base, a tensor missing, unknown or of another shape, a pickle
and an unknown setting are errors that name it, and the model is then as it was. A file that came
from peft and was not trained since is written as it came, byte for byte.

Footguns: the folder of an adapter that peft did not call "default" is one level down; a
fingerprint covers the dtype, so a model turned to bfloat16 is another base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from minipeft import technique as contract
from minipeft import wrap
from minipeft.atomic import write_all_atomically
from minipeft.interop import peft
from minipeft.settings import decode_settings, encode_settings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RESUME = "minipeft_resume.safetensors"
WRONG_KIND = (TypeError, AttributeError, KeyError, re.error)  # a number for a list, half a regex
FORMAT = 1  # of the header; a larger number is from a newer minipeft


def save_adapter(model, folder, name=None):
    """Write the adapter called `name` (the last one for None) to `folder`; the base is not in it.

    Either all of it is written or the folder is as it was. Raises ValueError when nothing is
    attached or a setting or state cannot be written as JSON, OSError when the disk refuses.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; an adapter needs a folder")
    attachment = contract.attachment_of(model, name)
    files = pack(attachment, model)
    write_all_atomically({folder / file: content for file, content in files.items()})
    if RESUME not in files:  # an older adapter's belongs to no file now
        (folder / RESUME).unlink(missing_ok=True)


def load_adapter(model, folder, name="default"):
    """Attach the adapter in `folder` to `model` under `name`; returns the model.

    All or nothing: after an error the model is as it was. Raises FileNotFoundError for a missing
    file and ValueError for one that is truncated, foreign, made for another base or does not fit.
    Warns, once a folder, when a file of peft's does not say which base it is for.
    """
    saved = read_folder(Path(folder))
    check_base(model, saved)
    warn_of_gaps(saved)
    try:
        technique, tensors = understand(saved, model)
        with torch.random.fork_rng(devices=[]):  # the initial values are overwritten
            technique.attach(model, name)
    except ValueError as problem:
        raise ValueError(f"{saved.folder}: {problem}") from problem
    except WRONG_KIND as problem:
        message = f"{saved.folder}: its config holds a value of the wrong kind ({problem})"
        raise ValueError(message) from problem
    attachment = contract.attachment_of(model, name)
    try:
        restore(attachment, saved, tensors)
    except BaseException as problem:
        attachment.state.pop("cannot_detach", None)  # nothing of the base has been touched yet
        contract.detach(model, name)
        if isinstance(problem, ValueError):
            raise ValueError(f"{saved.folder}: {problem}") from problem
        raise
    return model


def fingerprint(model):
    """The sha256 of the base, as hexadecimal digits, whatever is attached to it. (Files 1)"""
    for attachment in model.attachments:
        if "cannot_detach" in attachment.state:  # the base is gone; it was noted before it went
            return attachment.state["base"]
    digest = hashlib.sha256()
    with contract.disabled(model):
        tensors = {wrap.logical_name(n): t for n, t in base_tensors(model)}
        for name in sorted(tensors):
            update(digest, name, tensors[name])
    return digest.hexdigest()


def base_tensors(model):
    """(name, tensor) of every parameter and persistent buffer: quantised weights are buffers."""
    kept = model.state_dict(keep_vars=True)
    yield from model.named_parameters()
    yield from ((n, b) for n, b in model.named_buffers() if n in kept)


def update(digest, name, tensor):
    """Add one tensor to a hash: name, dtype, shape, bytes. (Files 1)"""
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
    if not tensor.is_meta:  # on the meta device, where parameters are counted, there are no bytes
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(raw.numpy())


def digest_of(tensors):
    """sha256 over named tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        update(digest, name, tensors[name])
    return digest.hexdigest()


# -- writing


def pack(attachment, model):
    """File name -> bytes; the tensors' file first, for its rename is the one that counts."""
    technique = attachment.technique
    exported = technique.export(attachment)
    config, tensors = peft_form(attachment, model) or (None, exported)
    numbers, state = split_state(attachment.state)
    about = {
        "minipeft_type": type(technique).__name__,
        "format": FORMAT,
        "settings": encode_settings(technique),
        "base": fingerprint(model),
    }
    config = config or about
    kept = state | dropped(attachment, model, config, tensors)
    # (Files 2)
    # (Files 2)
    header = about | {"state": numbers, "config": digest_of_config(config), "resume": bool(kept)}
    untouched = attachment.state.get("peft_tensors") == digest_of(tensors)
    weights = pack_tensors(tensors, None if untouched else header)
    files = {WEIGHTS: weights}
    if kept:
        files[RESUME] = pack_tensors(kept, {"of": hashlib.sha256(weights).hexdigest()})
    files[CONFIG] = json.dumps(config, indent=2, sort_keys=True).encode()
    return files


def peft_form(attachment, model):
    """(config, tensors) in peft's format, or None; an adapter from peft keeps the config it had."""
    form = peft.to_peft(attachment, model)
    if form is not None and "peft_config" in attachment.state:
        return json.loads(attachment.state["peft_config"]), peft.renamed(
            form[1], attachment.state["peft_prefix"]
        )
    return form


def dropped(attachment, model, config, tensors):
    """The tensors that reading the file back would not give bit for bit, as "tensor.NAME"."""
    if "peft_type" in config:
        tensors = peft.from_peft(config, tensors, model, attachment.technique)[1]
    tensors = attachment.technique.unpack(attachment, tensors)
    mine = attachment.tensors()
    gone = [n for n, t in mine.items() if n not in tensors or not identical(t, tensors[n])]
    return {f"tensor.{n}": mine[n] for n in gone}


def identical(a, b):
    """Bitwise: -0.0 is not 0.0, and a NaN is itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    raw = [t.detach().contiguous().flatten().view(torch.uint8) for t in (a, b)]
    return torch.equal(*raw)


def split_state(state):
    """An attachment's state as what JSON can hold and "state.KEY" -> tensor."""
    tensors = {f"state.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}
    numbers = {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}
    for key, value in numbers.items():
        if json.loads(json.dumps(value, default=str)) != value:
            raise ValueError(f"state[{key!r}]={value!r} is no number, string or tensor")
    return numbers, tensors


def pack_tensors(tensors, header=None):
    """The bytes of a safetensors file, equal for equal tensors; `header` is kept as one string."""
    plain = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
    data = save(plain, {"format": "pt"})
    if header is None:
        return data
    size = int.from_bytes(data[:8], "little")  # the layout: size, JSON, bytes of the tensors
    table = json.loads(data[8 : 8 + size])
    table["__metadata__"]["minipeft"] = json.dumps(header, sort_keys=True)
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]


def digest_of_config(config):
    """sha256 of what a config says about the tensors; where the base lies may be edited by hand."""
    said = {k: v for k, v in config.items() if k not in peft.DESCRIPTIVE}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


# -- reading


@dataclasses.dataclass
class Saved:
    """What a folder holds, read and checked for itself, not yet against a model."""

    folder: Path
    config: dict
    tensors: dict
    header: dict | None  # None for a file that minipeft did not write
    kept: dict  # from the resume file


def read_folder(folder):
    """Read an adapter's files. Raises FileNotFoundError or ValueError naming the file."""
    path = folder / WEIGHTS
    if not path.exists():
        raise FileNotFoundError(missing(folder))
    tensors, header = read_tensors(path)
    config = read_config(folder, header)
    if header is None and "minipeft_type" in config:  # tensors rewritten by another program
        header = config
    if header is not None:
        check_header(path, header)
    return Saved(folder, config, tensors, header, read_kept(folder) if header else {})


def check_header(path, header):
    """Raise ValueError for a header from a newer version or without what it must have."""
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {header.get('format')!r}; this minipeft reads {FORMAT}"
        )
    for key, kind in (("minipeft_type", str), ("settings", dict), ("base", str)):
        if not isinstance(header.get(key), kind):
            raise ValueError(f"{path} does not say its {key}; it was damaged or written by hand")


def missing(folder):
    """The message for a folder without an adapter in it, with what is there instead."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    if (folder / "adapter_model.bin").exists():
        return (
            f"{folder} holds adapter_model.bin, a pickle, which can run code when it is opened; "
            f"write it as {WEIGHTS} with peft (safe_serialization=True) where you trust it"
        )
    inside = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))
    if inside:
        return f"{folder} has no {WEIGHTS}, but these folders in it hold adapters: {inside}"
    if (folder / "model.safetensors").exists():
        return f"{folder} holds a model, not an adapter: open it with GPT.from_pretrained"
    return f"{folder} has no {WEIGHTS}, so it holds no adapter"


def read_tensors(path):
    """({name: tensor}, minipeft's header or None) of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            about = (file.metadata() or {}).get("minipeft")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, None if about is None else json.loads(about)
    except (SafetensorError, ValueError) as problem:
        raise ValueError(f"{path} is truncated or no safetensors file ({problem})") from problem


def read_config(folder, header):
    """The config that belongs to the tensors, from its place or where a killed save left it."""
    path = folder / CONFIG
    if header is None:
        return read_json(path)
    for candidate in [path, *sorted(folder.glob(f"{CONFIG}.tmp.*"))]:
        try:
            config = read_json(candidate)
        except (FileNotFoundError, ValueError):
            continue
        if digest_of_config(config) == header.get("config"):
            return config
    read_json(path)  # a missing or broken file says so itself
    raise ValueError(
        f"{path} is not the config that {WEIGHTS} was saved with: it was edited or comes from "
        "another adapter; save the adapter again"
    )


def read_json(path):
    """The JSON object in a file. Raises ValueError with line and column where it is none."""
    if not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as problem:
        raise ValueError(f"{path} is not JSON: {problem}") from problem
    if not isinstance(config, dict) or not {"peft_type", "minipeft_type"} & config.keys():
        raise ValueError(f"{path} describes no adapter: it has no peft_type and no minipeft_type")
    return config


def read_kept(folder):
    """The tensors of the resume file that belongs to these weights; {} where there is none."""
    of = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    for path in [folder / RESUME, *sorted(folder.glob(f"{RESUME}.tmp.*"))]:
        if path.exists():
            tensors, header = read_tensors(path)
            if header is not None and header.get("of") == of:
                return tensors
    return {}


def warn_of_gaps(saved):
    """Say what the files do not say: which base peft's are for, what resuming would need."""
    if saved.header is None:
        message = (
            f"{saved.folder} was written by peft, which does not note the base; taking this one"
        )
        warnings.warn(message, stacklevel=3)
    elif saved.header.get("resume") and not saved.kept:
        message = f"{saved.folder} comes without its {RESUME}: enough to use it, not to train on"
        warnings.warn(message, stacklevel=3)


def check_base(model, saved):
    """Raise ValueError when the adapter was trained on another base."""
    if saved.header is None:
        return
    wanted, found = saved.header["base"], fingerprint(model)
    before = (saved.header.get("state") or {}).get("base")  # attaching changes it for good
    if found not in (wanted, before):
        raise ValueError(
            f"{saved.folder} was trained on another base: its fingerprint is {wanted[:16]}..., "
            f"this model's {found[:16]}...; load the base it belongs to"
        )


def understand(saved, model):
    """(technique, tensors under the names of its export)."""
    technique = None if saved.header is None else decode_settings(saved.header)
    if "peft_type" in saved.config:
        if technique is not None and saved.header.get("resume") and not saved.kept:
            # Without the encoder that was kept beside, peft's rows are still a whole adapter.
            flattened = getattr(technique, "flattened", lambda: None)()
            technique = technique if flattened is None else flattened
        return peft.from_peft(saved.config, saved.tensors, model, technique)
    return technique, saved.tensors


def restore(attachment, saved, tensors):
    """Put tensors and state into a fresh attachment; the resume file goes before the rest."""
    kept = {n.split(".", 1)[1]: t for n, t in saved.kept.items() if n.startswith("tensor.")}
    if kept:
        both = attachment.technique.unpack(attachment, tensors) | kept
        attachment.load({n: both[n] for n in attachment.tensors() if n in both})
    else:
        attachment.technique.restore(attachment, tensors)
    if saved.header is None:
        attachment.state["peft_config"] = json.dumps(saved.config)
        attachment.state["peft_prefix"] = peft.prefix_of(saved.tensors)
        attachment.state["peft_tensors"] = digest_of(saved.tensors)
    else:
        attachment.state |= saved.header.get("state", {})
    state = {n.split(".", 1)[1]: t for n, t in saved.kept.items() if n.startswith("state.")}
    attachment.state |= state
