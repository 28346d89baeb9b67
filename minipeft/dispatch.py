r"""Ties a definition to its faster twin.

A technique file states its math in plain PyTorch, complete. Where a faster form pays, the function
that states it names the module in which its twin, a function of the same name, lives:

    @fast_path("minipeft.kernels.nf4", dtypes=(torch.uint8,))
    def dequantize_nf4(codes, absmax): ...          this body is the definition

The decorator is the only seam. On each call it takes the twin when all of these hold, else the
definition, and says once for each reason, by logging, which of the two runs:

    installed   the twin's module can be imported (no Triton, no twin)
    device      every tensor is on one of `devices`; one GPU at most, of at least `capability`,
                which is the current one while the twin runs
    dtype       every floating tensor has one of `dtypes`, if given
    shape       supports(*args) is true, if given
    winning     wins(*args) is true: it was measured to be faster at such sizes

MINIPEFT_FAST_PATH=auto asks all five; on leaves out the last and, under TRITON_INTERPRET=1, lets
Triton's interpreter stand in for the GPU; off always takes the definition, and so do torch.func's
grad, vmap and the like, which hand-written gradients do not know.

Two decorators on one definition are two twins; the upper one is asked first.

An error in a twin is seen, not caught. Inside torch.compile the choice is made while tracing and
nothing is said; a twin that no call has loaded before is not loaded there, for an import cannot be
traced, and the compiler fuses the definition by itself.

Tests walk `TWINS` and hold every twin against its definition, on the twin module's
EXAMPLES[name](device), a list of argument tuples.

Footguns: importing Triton at the top of a technique file; a fallback that hides a broken kernel;
deciding by device alone, when a small input is faster without a kernel.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

log = logging.getLogger("minipeft.dispatch")

MODES = ("auto", "off", "on")
TWINS: dict[tuple[str, str], Twin] = {}  # (module.name of the definition, the twin's module)
_forced: list[str] = []
_said: set[tuple[str, str, str]] = set()


@dataclass
class Twin:
    """A definition and where its faster form is."""

    definition: Callable
    module: str
    devices: tuple[str, ...]
    capability: tuple[int, int]
    dtypes: tuple[torch.dtype, ...]
    supports: Callable | None
    wins: Callable | None
    loaded: Callable | None = field(default=None, repr=False)
    missing: str = ""  # why the twin cannot be imported

    @property
    def name(self):
        return f"{self.definition.__module__}.{self.definition.__name__}"

    def load(self):
        """The twin, or None if its module (or what that imports) is not installed."""
        if self.loaded is None and not self.missing and not torch.compiler.is_compiling():
            try:
                module = importlib.import_module(self.module)
            except ImportError as problem:
                self.missing = f"{self.module} cannot be imported ({problem})"
                return None
            self.loaded = getattr(module, self.definition.__name__)
        return self.loaded

    def refusal(self, args, kwargs, mode):
        """Why the definition must run on these arguments; "" when the twin may."""
        if mode == "off":
            return "MINIPEFT_FAST_PATH=off"
        if torch._C._are_functorch_transforms_active():  # as torch's own Function asks
            return "no twin inside torch.func's transforms"
        tensors = list(tensors_in((*args, *kwargs.values())))
        return (
            self._device_refusal(tensors, mode)
            or self._dtype_refusal(tensors)
            or self._argument_refusal(args, kwargs, mode)
            or ("" if self.load() is not None else self.missing or "not loaded yet")
        )

    def _device_refusal(self, tensors, mode):
        interpreted = mode == "on" and os.environ.get("TRITON_INTERPRET") == "1"
        allowed = (*self.devices, "cpu") if interpreted else self.devices
        gpus = set()
        for tensor in tensors:
            device = tensor.device
            if device.type not in allowed:
                return f"no twin on {device.type}"
            if device.type == "cuda":
                gpus.add(device)
        if len(gpus) > 1:
            return "tensors on several GPUs"
        if any(torch.cuda.get_device_capability(gpu) < self.capability for gpu in gpus):
            return f"the GPU is older than compute capability {self.capability}"
        return "" if tensors else "no tensor to choose by"

    def _dtype_refusal(self, tensors):
        for tensor in tensors:
            if self.dtypes and tensor.is_floating_point() and tensor.dtype not in self.dtypes:
                return f"no twin for {tensor.dtype}"
        return ""

    def _argument_refusal(self, args, kwargs, mode):
        if self.supports is not None and not self.supports(*args, **kwargs):
            return "no twin for these shapes"
        if mode == "auto" and self.wins is not None and not self.wins(*args, **kwargs):
            return "not measured to be faster at this size"
        return ""


def fast_path(module, devices=("cuda",), capability=(7, 0), dtypes=(), supports=None, wins=None):
    """Decorator: the function is the definition; `module` has a faster function of the same name.

    devices: where the twin runs. capability: oldest GPU it runs on. dtypes: floating dtypes it
    takes, () for all. supports, wins: predicates over the call's arguments, see the header.
    """

    def decorate(definition):
        original = definition.twin.definition if hasattr(definition, "twin") else definition
        twin = Twin(original, module, tuple(devices), capability, tuple(dtypes), supports, wins)
        twins = (twin, *getattr(definition, "twins", ()))
        TWINS[twin.name, module] = twin

        @functools.wraps(original)
        def choose(*args, **kwargs):
            chosen, tracing = mode(), torch.compiler.is_compiling()
            for candidate in twins:
                refusal = candidate.refusal(args, kwargs, chosen)
                if not tracing:
                    say(candidate, refusal)
                if not refusal:
                    with gpu_of((*args, *kwargs.values())):
                        return candidate.loaded(*args, **kwargs)
            return original(*args, **kwargs)

        choose.twin, choose.twins = twin, twins
        return choose

    return decorate


def never(*args, **kwargs):
    """For `wins`: as long as no committed measurement shows one. MINIPEFT_FAST_PATH=on asks not."""
    return False


def tensors_in(arguments):
    """The tensors among arguments, and among those that are lists or tuples."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (a for a in argument if isinstance(a, torch.Tensor))


def every_twin():
    """All twins there are; imports the whole package but what lies in kernels and labs."""
    import minipeft

    for module in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
        parts = module.name.split(".")
        if not {"kernels", "labs", "__main__"} & set(parts):
            importlib.import_module(module.name)
    return list(TWINS.values())


def standing(twin, devices):
    """(whether a twin is in use on one of `devices`, why or why not), in words."""
    chosen = mode()
    if chosen == "off":
        return False, "MINIPEFT_FAST_PATH=off"
    there = [d for d in twin.devices if d in devices]
    if not there:
        return False, f"runs on {' and '.join(twin.devices)}, which this machine has not"
    if twin.load() is None:
        return False, twin.missing
    examples = importlib.import_module(twin.module).EXAMPLES[twin.definition.__name__](there[0])
    refusals = [twin.refusal(arguments, {}, "on") for arguments in examples]
    if "" not in refusals:
        return False, refusals[0]
    if chosen == "auto" and twin.wins is never:
        return False, "no measurement shows a win yet; MINIPEFT_FAST_PATH=on takes it"
    where = (
        ", at sizes where it was measured to be faster" if chosen == "auto" and twin.wins else ""
    )
    return True, f"on {' and '.join(there)}{where}"


def gpu_of(arguments):
    """A context in which the tensors' GPU is the current one, for that is where a kernel is
    launched; nothing for other devices. (autograd does the same in the backward pass.)
    """
    gpus = (t.device for t in tensors_in(arguments) if t.device.type == "cuda")
    gpu = next(gpus, None)
    return contextlib.nullcontext() if gpu is None else torch.cuda.device(gpu)


def mode():
    """auto, off or on, from MINIPEFT_FAST_PATH or `forced`. Raises ValueError for anything else."""
    chosen = _forced[-1] if _forced else os.environ.get("MINIPEFT_FAST_PATH", "auto")
    if chosen not in MODES:
        raise ValueError(f"MINIPEFT_FAST_PATH={chosen!r} is none of {', '.join(MODES)}")
    return chosen


@contextlib.contextmanager
def forced(choice):
    """Inside the `with` the mode is `choice`, whatever the environment says."""
    _forced.append(choice)
    try:
        mode()
        yield
    finally:
        _forced.pop()


def say(twin, refusal):
    """Log which path runs, once for each function and reason."""
    if (twin.name, twin.module, refusal) not in _said:
        _said.add((twin.name, twin.module, refusal))
        path = f"runs not as {twin.module}: {refusal}" if refusal else f"runs as {twin.module}"
        log.info("%s %s", twin.name, path)
