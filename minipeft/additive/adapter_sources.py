r"""Where the adapters of an AdapterFusion come from: an attachment on the model, a folder, tensors.

Whatever the form, what comes out is a Source: a name, an Adapter (the recipe) and its tensors under
the names that an adapter file has, `blocks.3.mlp.adapter.down.weight`. What is checked: that all of
them stand at the same places and that none has trained LayerNorms, which only one task can have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from minipeft.additive.adapter import Adapter, place_of
from minipeft.additive.bottleneck import Bottleneck
from minipeft.technique import detach


@dataclass(frozen=True)
class Source:
    """One adapter to fuse. `tensors` (logical name -> tensor) None: its tensors come from a file,
    or are the fresh ones of its initialisation.
    """

    name: str
    technique: Adapter
    tensors: Mapping | None = None


def described(given, n):
    """A mapping with name, technique and perhaps tensors as a Source, an Adapter as one without
    tensors; anything else as it is.
    """
    if isinstance(given, Adapter):
        return Source(f"adapter{n}", given)
    if not isinstance(given, Mapping) or "technique" not in given:
        return given
    technique = given["technique"]
    technique = Adapter(**technique) if isinstance(technique, Mapping) else technique
    return Source(given.get("name", f"adapter{n}"), technique, given.get("tensors"))


def find_source(model, given, n):
    """The Source of the n-th element of `adapters`, in any of the forms AdapterFusion takes."""
    if isinstance(given, Source):
        return replace(given, technique=as_adapter(given.technique, model))
    if isinstance(given, str | Path):
        return attached_source(model, given) or folder_source(model, given)
    raise ValueError(
        f"adapters[{n}] is {type(given).__name__}; give the name of an attached adapter, a folder, "
        "or {'name': ..., 'technique': Adapter(...), 'tensors': {...}}"
    )


def as_adapter(technique, model):
    """A plain Adapter with this technique's sites: AdapterDrop's fixed layers become leave_out."""
    if not isinstance(technique, Adapter):
        raise ValueError(f"only adapters can be fused, not {type(technique).__name__}")
    values = {f.name: getattr(technique, f.name) for f in fields(Adapter)}
    kept = technique.layers(len(model.blocks))
    values["leave_out"] = [n for n in range(len(model.blocks)) if n not in kept]
    return Adapter(**values)


def attached_source(model, name):
    """The Source of an attachment of that name, or None."""
    for attachment in model.attachments:
        if attachment.name == str(name):
            technique = as_adapter(attachment.technique, model)
            return Source(attachment.name, technique, attachment.tensors())
    return None


def folder_source(model, folder):
    """The Source in a folder that save_adapter wrote; checked as load_adapter checks it."""
    from minipeft.checkpoint import load_adapter

    if not Path(folder).is_dir():
        attached = [a.name for a in model.attachments]
        raise ValueError(
            f"adapter {str(folder)!r} is neither attached to this model ({attached}) nor a folder"
        )
    temporary = f"to fuse: {folder}"
    load_adapter(model, folder, name=temporary)
    source = attached_source(model, temporary)
    detach(model, temporary)
    return replace(source, name=Path(folder).name)


def check_sources(sources, leave_out, n_layer):
    """Raise ValueError, naming the adapter, for those that cannot stand side by side."""
    names = [source.name for source in sources]
    if len(set(names)) != len(names):
        raise ValueError(f"two of the adapters have one name: {names}")
    for source in sources:
        technique = source.technique
        if technique.placement == "houlsby" or technique.trains_layer_norms():
            raise ValueError(
                f"adapter {source.name!r} has placement={technique.placement!r} and "
                f"layer_norms={technique.trains_layer_norms()}; fusion is for pfeiffer and "
                "parallel adapters on frozen LayerNorms"
            )
        missing = set(technique.leave_out) - set(leave_out)
        if missing:
            raise ValueError(
                f"adapter {source.name!r} has nothing in layers {sorted(missing)}; "
                f"fuse with leave_out={tuple(sorted({*leave_out, *technique.leave_out}))}"
            )
        if sites_without(technique, leave_out, n_layer) != sites_without(
            sources[0].technique, leave_out, n_layer
        ):
            raise ValueError(
                f"adapters {source.name!r} and {sources[0].name!r} do not stand at the same places"
            )


def sites_without(technique, leave_out, n_layer):
    """The adapter's sites, those in the layers left out taken away."""
    return replace(technique, leave_out=leave_out).sites(n_layer)


def build_adapter(model, path, source):
    """The source's Bottleneck at one path, its tensors filled in. Raises ValueError when one is
    missing or has another shape.
    """
    shape = source.technique.shape() | {"dropout": 0.0}
    adapter = Bottleneck(**place_of(model, path), **shape)
    for name, parameter in adapter.named_parameters():
        if source.tensors is None:
            break
        tensor = source.tensors.get(f"{path}.adapter.{name}")
        if tensor is None or tensor.shape != parameter.shape:
            found = "missing" if tensor is None else tuple(tensor.shape)
            raise ValueError(
                f"adapter {source.name!r}: {path}.adapter.{name} is {found}, "
                f"{tuple(parameter.shape)} is needed"
            )
        parameter.data.copy_(tensor)
    return adapter
