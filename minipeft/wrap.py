r"""The one mechanism: put a module around a module, find modules through wrappers, take wrappers
off again.

A technique changes a transformer at a few places (He et al., 2022, arXiv 2110.04366, see them all
as one family). It replaces the module there by a Wrapper that holds the original as `inner`, or a
parameter by a clone that may be trained:

    blocks.0.attn.q    nn.Linear     ->    LoRALinear(inner=nn.Linear)
    blocks.0.attn.q    LoRALinear    ->    another(inner=LoRALinear(inner=nn.Linear))

Each replacement is a Swap; undoing swaps last-in-first-out gives back the very objects that were
there, so the model is what it was, bitwise. Paths are logical: they never mention `inner`, so
they stay the same however many wrappers are on.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from torch import nn


class Wrapper(nn.Module):
    """A module around a module. Subclasses add their tensors and compute with `self.inner`.

    Every place's call is passed on as it came: an attention sub-layer is called as (x, cache),
    the embedding as
    (ids, start), the core as (q, k, v, mask), a projection, the MLP and the head as (x).
    """

    moves_base = False  # whether it changes the innermost module's own tensors, below all wrappers

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)

    def follow_mode(self, training):
        """Train or eval mode for what this wrapper added; the model may change while it is off."""
        self.training = training
        for name, child in self.named_children():
            if name != "inner":
                child.train(training)

    def own_parameters(self):
        """(name, Parameter) pairs that this wrapper added; what lies inside `inner` is not its
        own.
        """
        return [(n, p) for n, p in self.named_parameters() if not n.startswith("inner.")]

    def own_buffers(self):
        """(name, tensor) pairs of the persistent buffers that this wrapper added."""
        names = self.state_dict(keep_vars=True)
        return [
            (n, b) for n, b in self.named_buffers() if n in names and not n.startswith("inner.")
        ]

    def merged(self, inner: nn.Module) -> nn.Module:
        """A module without wrapper that computes what this one does around `inner`. `inner`
        itself is not changed.
        """
        raise NotImplementedError(f"{type(self).__name__} cannot be merged")


class EmbeddingWrapper(Wrapper):
    """A wrapper around the embedding, called as (ids, start, shift). Counts add up over wrappers.

    A wrapper that moves the text by p calls inner(ids, start, shift + p); `start` itself stays the
    number of real tokens consumed, so that every wrapper still knows a row's beginning from it.
    """

    own_virtual_tokens = 0  # rows this wrapper puts in front of the text
    own_position_shift = 0  # how far it moves the text's positions, its virtual rows included
    own_extra_ids = 0  # ids from the vocabulary's end on that it gives a meaning to

    @property
    def virtual_tokens(self):
        return self.inner.virtual_tokens + self.own_virtual_tokens

    @property
    def position_shift(self):
        return self.inner.position_shift + self.own_position_shift

    @property
    def extra_ids(self):
        return self.inner.extra_ids + self.own_extra_ids


def base_module(module: nn.Module) -> nn.Module:
    """The module inside all wrappers."""
    while isinstance(module, Wrapper):
        module = module.inner
    return module


def is_empty(projection):
    """Whether a projection has no weights left: its layer lost all its heads or neurons."""
    base = base_module(projection)
    return not (base.in_features and base.out_features)


def float_place(projection):
    """Device and dtype for floats beside a projection; one that is quantised says its own."""
    base = base_module(projection)
    if hasattr(base, "place"):
        return base.place
    return {"device": base.weight.device, "dtype": base.weight.dtype}


def around(module: nn.Module):
    """The wrappers of a module, from the outermost in."""
    while isinstance(module, Wrapper):
        yield module
        module = module.inner


def locate(model: nn.Module, path: str):
    """(parent, name) of a logical path: the innermost module that holds it, and the attribute's
    name there.

    Raises ValueError naming the path and the nearest one that exists.
    """
    *parents, name = path.split(".")
    module = model
    for step in parents:
        module = base_module(module)
        if step not in module._modules:
            raise ValueError(unknown_path(model, path))
        module = module._modules[step]
    parent = base_module(module)
    if name not in parent._modules and name not in parent._parameters:
        raise ValueError(unknown_path(model, path))
    return parent, name


def resolve(model: nn.Module, path: str):
    """The module (outermost wrapper included) or parameter at a logical path."""
    return getattr(*locate(model, path))


def unknown_path(model, path):
    paths = [logical_name(name) for name, _ in model.named_modules()]
    near = difflib.get_close_matches(path, paths, 1)
    return f"the model has no module {path!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def logical_name(name: str) -> str:
    """A module's or parameter's name without the wrappers' `inner`."""
    return ".".join(step for step in name.split(".") if step != "inner")


@dataclass(eq=False)
class Swap:
    """One attribute of one module, replaced: a module by its wrapper, or a parameter by its
    clone.
    """

    path: str  # logical
    parent: nn.Module
    name: str
    replacement: nn.Module | nn.Parameter
    original: nn.Module | nn.Parameter | None = None  # what it replaced when it was installed last

    def install(self):
        self.original = getattr(self.parent, self.name)
        if isinstance(self.replacement, Wrapper):
            self.replacement.inner = self.original
            self.replacement.follow_mode(self.parent.training)
        setattr(self.parent, self.name, self.replacement)

    def uninstall(self):
        setattr(self.parent, self.name, self.original)
