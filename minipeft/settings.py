r"""A technique's settings as JSON and back: equal, or an error when they are written.

    a technique        an object with its `minipeft_type`, found again by its name in the registry
    a dataclass        an object, found again by the type hint of the field it stands in
    a tuple, a list    an array; a tuple unless the hint says list
    a dict             an object; the hint says what its keys were

Only names in the registry and types in the hints are ever built, never what a file asks for.
"""

from __future__ import annotations

import dataclasses
import json
import types
import typing

from minipeft.technique import Technique, technique_class


def encode_settings(technique):
    """A technique's fields as JSON values. Raises ValueError if they would not come back equal."""
    settings = encode(technique)
    settings.pop("minipeft_type")
    text = json.loads(json.dumps(settings))
    if decode_settings({"minipeft_type": type(technique).__name__, "settings": text}) != technique:
        raise ValueError(f"{technique} does not survive being written as JSON")
    return settings


def encode(value):
    """Dataclasses as dicts (a technique with its `minipeft_type`), tuples as lists."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = {"minipeft_type": type(value).__name__}
        return kind | fields if isinstance(value, Technique) else fields
    if isinstance(value, dict):
        return {str(k): encode(v) for k, v in value.items()}
    return [encode(v) for v in value] if isinstance(value, list | tuple) else value


def decode_settings(header):
    """The technique that a header names. Raises ValueError for an unknown name or setting."""
    kind = technique_class(header["minipeft_type"])
    return build(kind, header["settings"])


def build(kind, settings):
    """A dataclass from its encoded fields. Raises ValueError naming a field it does not have."""
    known = {f.name for f in dataclasses.fields(kind)}
    unknown = settings.keys() - known
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {sorted(unknown)}")
    hints = typing.get_type_hints(kind)
    return kind(**{name: decode(value, hints[name]) for name, value in settings.items()})


def decode(value, hint):
    """An encoded value as its type hint wants it: lists are tuples unless the hint says list."""
    if isinstance(value, dict) and "minipeft_type" in value:
        rest = {k: v for k, v in value.items() if k != "minipeft_type"}
        return build(technique_class(value["minipeft_type"]), rest)
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    if isinstance(value, dict):
        for kind in kinds:
            if dataclasses.is_dataclass(kind):
                return build(kind, value)
        key, item = arguments(kinds, (dict,)) or (str, None)
        return {key(k): decode(v, item) for k, v in value.items()}
    if not isinstance(value, list):
        return value
    items = [i for i in arguments(kinds, (list, tuple)) if i is not ...] or [None]
    items += items[-1:] * (len(value) - len(items))
    made = [decode(v, i) for v, i in zip(value, items)]
    wanted = {typing.get_origin(kind) or kind for kind in kinds}
    return made if list in wanted else tuple(made)


def arguments(kinds, holders):
    """What stands in the brackets of the first of `kinds` that is one of `holders`."""
    found = (typing.get_args(kind) for kind in kinds if typing.get_origin(kind) in holders)
    return next(found, ())
