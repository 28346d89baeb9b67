r"""What every technique is: the contract, the registry, and what can be done to a model with
techniques on it.

A technique is a frozen dataclass of hyperparameters. `attach` asks it to `install` its modules,
freezes the base, and leaves one Attachment on the model, which knows every swap it made. The
technique object itself keeps no state, so one object can be attached to many models, models can
be deep-copied, and everything there is to save sits in the attachment's tensors.

    attach     all or nothing: an error half-way leaves the model as it was
    detach     last in, first out: gives the base back, bitwise, and its requires_grad flags
    disabled   the base, inside a `with`
    merge      folds every attachment into plain modules, for good; `merged` inside a `with`
    report     every tensor: shape, dtype, trained or not and why, bytes
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap


class Technique:
    """Base of every technique. A subclass is a frozen dataclass with these:

    install(model, attachment)   puts its modules in, by attachment.wrap and attachment.replace
    count(config) -> int         trained parameters by the closed formula of the file's docstring
    check(config)                raises ValueError for hyperparameters that do not suit the model
    learning_rate                a good peak for AdamW at batch 16 and 200 to 400 steps
    cannot_merge                 None, or why the technique cannot be folded into the base
    """

    learning_rate: ClassVar[float] = 1e-3
    cannot_merge: ClassVar[str | None] = None

    def __post_init__(self):
        """Settings as files give them back: a list, a range or an array as a tuple, a dict as pairs
        where the field has room for nothing else, a number of NumPy's as Python's.
        """
        for field in dataclasses.fields(self):
            value = plain_setting(getattr(self, field.name), str(field.type))
            object.__setattr__(self, field.name, value)

    def attach(self, model, name="default"):
        """Put the technique on `model` in place, freeze the base, return the model.

        Several attachments stack; each needs its own name. Raises ValueError when the name is
        taken or a hyperparameter does not suit the model; the model is then as it was.
        """
        check_switched_on(model)
        if any(a.name == name for a in model.attachments):
            raise ValueError(
                f"the name {name!r} is taken on this model; choose another or detach it first"
            )
        self.check(model.config)
        attachment = Attachment(name, self)
        try:
            self.install(model, attachment)
        except BaseException:
            attachment.uninstall()
            raise
        attachment.freeze_base(model)
        model.attachments.append(attachment)
        for module in attachment.wrappers():
            module.train(model.training)
        return model

    def install(self, model, attachment):
        raise NotImplementedError

    def count(self, config):
        raise NotImplementedError

    def check(self, config):
        pass

    def extra_loss(self, model, attachment):
        """A term to add to the training loss (AdaLoRA's orthogonality), or None."""
        return None

    def after_step(self, model, attachment, step, total_steps):
        """Called after each optimizer step (step counts from 1), before the gradients are
        cleared.
        """

    def export(self, attachment):
        """Logical name -> tensor, what an adapter file holds. Raises ValueError when what was
        trained must not leave the program yet (see check_ready).
        """
        self.check_ready(attachment)
        return attachment.tensors()

    def unpack(self, attachment, tensors):
        """The way back from `export`: tensors with the names and shapes of attachment.tensors()."""
        return tensors

    def restore(self, attachment, tensors):
        """Take in what `export` gave, all or nothing. Raises ValueError naming what is wrong."""
        attachment.load(self.unpack(attachment, tensors))

    def check_ready(self, attachment):
        """Raises ValueError, before saving and merging, when training left something undone
        (AdaLoRA whose allocator never ran).
        """

    def settings(self):
        """Hyperparameters as plain values, for config files."""
        return dataclasses.asdict(self)


def plain_setting(value, hint):
    """A setting as JSON would give it back; what `hint`, the field's type, asks for stays."""
    if hasattr(value, "tolist"):  # arrays, tensors and their numbers
        value = value.tolist()
    if isinstance(value, dict) and hint.startswith("tuple"):
        value = tuple(value.items())
    if isinstance(value, list | tuple | range) and "list" not in hint:
        return tuple(plain_setting(v, hint) for v in value)
    return value


class Attachment:
    """One technique on one model: its swaps, its tensors, the flags it changed."""

    def __init__(self, name, technique):
        self.name, self.technique, self.active = name, technique, True
        self.installed = True  # off inside `disabled` although it is active
        self.swaps: list[wrap.Swap] = []
        self.froze: list[nn.Parameter] = []
        self.thawed: list[nn.Parameter] = []  # of the base, to be trained in place
        self.suspended: list[Attachment] = []  # switched off while this one is on
        self.state: dict = {}  # step counters and the like: numbers, strings, tensors

    # -- called by a technique's install

    def wrap(self, model, path, wrapper: wrap.Wrapper):
        """Put `wrapper` around the module at the logical path; returns the wrapper."""
        return self._swap(model, path, wrapper)

    def replace(self, model, path, parameter=None):
        """Put a trainable clone (or `parameter`) in a parameter's place; returns it. The original
        is kept.
        """
        if parameter is None:
            parameter = nn.Parameter(wrap.resolve(model, path).detach().clone())
        return self._swap(model, path, parameter)

    def _swap(self, model, path, replacement):
        swap = wrap.Swap(path, *wrap.locate(model, path), replacement)
        swap.install()
        self.swaps.append(swap)
        return replacement

    # -- on and off

    def install(self):
        for swap in () if self.installed else self.swaps:
            swap.install()
        self.installed = True

    def uninstall(self):
        for swap in reversed(self.swaps if self.installed else ()):
            swap.uninstall()
        self.installed = False

    def freeze_base(self, model):
        mine = {id(p) for a in (*model.attachments, self) for p in a.parameters().values()}
        self.froze = [p for p in model.parameters() if p.requires_grad and id(p) not in mine]
        for parameter in self.froze:
            parameter.requires_grad_(False)

    def thaw(self, parameter):
        """Let a parameter of the base learn, whoever froze it before."""
        if not parameter.requires_grad:
            self.thawed.append(parameter.requires_grad_(True))

    def unfreeze_base(self):
        for parameter in self.froze:
            parameter.requires_grad_(True)
        for parameter in self.thawed:
            parameter.requires_grad_(False)

    # -- what it holds

    def wrappers(self):
        return [s.replacement for s in self.swaps if isinstance(s.replacement, wrap.Wrapper)]

    def parameters(self):
        """Logical name -> Parameter, each once even if shared."""
        return self._named(lambda w: w.own_parameters())

    def tensors(self):
        """Logical name -> tensor: parameters and persistent buffers, each once."""
        return self._named(lambda w: w.own_parameters() + w.own_buffers())

    def _named(self, own):
        found, seen = {}, set()
        for swap in self.swaps:
            if isinstance(swap.replacement, wrap.Wrapper):
                pairs = [(f"{swap.path}.{n}", t) for n, t in own(swap.replacement)]
            elif isinstance(swap.replacement, nn.Module):
                pairs = []  # the base in another storage: nothing that was added
            else:
                pairs = [(swap.path, swap.replacement)]
            for name, tensor in pairs:
                if id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[wrap.logical_name(name)] = tensor
        return found

    def load(self, tensors):
        """Copy `tensors` in. Raises ValueError naming every missing, unknown or wrongly shaped
        tensor before touching any.
        """
        mine = self.tensors()
        wrong = [f"missing {n}" for n in mine if n not in tensors]
        wrong += [f"unknown {n}" for n in tensors if n not in mine]
        wrong += [
            f"{n} is {tuple(tensors[n].shape)}, the model needs {tuple(mine[n].shape)}"
            for n in mine
            if n in tensors and tensors[n].shape != mine[n].shape
        ]
        if wrong:
            raise ValueError(f"these tensors do not fit adapter {self.name!r}: " + "; ".join(wrong))
        with torch.no_grad():
            for name, tensor in mine.items():
                tensor.copy_(tensors[name])

    def _apply(self, fn):
        """`.to` and friends for what is not in the module tree at the moment."""
        for swap in self.swaps:
            for held in (swap.original, swap.replacement):
                if isinstance(held, nn.Module):
                    held._apply(fn)
                elif held is not None:
                    held.data = fn(held.data)


# -- what a user does to a model


def attachment_of(model, name=None):
    """The attachment called `name` (the last one for None). Raises ValueError naming those that
    are there.
    """
    names = [a.name for a in model.attachments]
    if not names:
        raise ValueError("nothing is attached to this model")
    if name is not None and name not in names:
        raise ValueError(f"no attachment is called {name!r}; there are {names}")
    return model.attachments[-1 if name is None else names.index(name)]


def detach(model, name=None):
    """Take off every technique, or the one called `name`, which must be the last one put on.
    Returns the model.

    What was there before comes back, the same objects with the same bits and requires_grad flags.
    """
    check_switched_on(model)
    if name is not None and attachment_of(model, name) is not model.attachments[-1]:
        raise ValueError(
            f"{name!r} is not the last attachment; detach {model.attachments[-1].name!r} first"
        )
    doomed = [attachment_of(model, name)] if name is not None else list(model.attachments)
    for attachment in doomed:
        check_detachable(attachment)
    with _all_off(model, reinstall=False):
        for attachment in reversed(doomed):
            attachment.unfreeze_base()
            model.attachments.remove(attachment)
            for other in attachment.suspended:
                other.active = True
    for attachment in model.attachments:
        if attachment.active:
            attachment.install()
    return model


def check_detachable(attachment):
    """Raise for an attachment whose originals were not kept (full fine-tuning told not to)."""
    reason = attachment.state.get("cannot_detach")
    if reason:
        raise ValueError(f"{attachment.name!r} cannot be taken off: {reason}")


class Folded(list):
    """The attachments of a model inside `merged`: none, and none may be added."""

    def __deepcopy__(self, memo):
        return []  # a copy stays merged, a plain GPT


def check_switched_on(model):
    """Raise ValueError inside `disabled` and `merged`, whose end would undo half of a change."""
    off = [a.name for a in model.attachments if a.active and not a.installed]
    if off or isinstance(model.attachments, Folded):
        raise ValueError(
            "inside `with disabled(model)` and `with merged(model)` techniques can be neither put "
            "on, switched, taken off nor merged for good; leave the `with` first"
        )


def check_bare(model, advice):
    """Raise ValueError that names the techniques on the model, if there are any, and says what to
    do.
    """
    if model.attachments:
        names = ", ".join(a.name for a in model.attachments)
        raise ValueError(f"techniques are on this model ({names}): {advice}")


@contextlib.contextmanager
def _all_off(model, reinstall=True):
    active = [a for a in model.attachments if a.active and a.installed]
    for attachment in reversed(active):
        attachment.uninstall()
    try:
        yield model
    finally:
        if reinstall:
            for attachment in active:
                attachment.install()


@contextlib.contextmanager
def disabled(model):
    """Inside the `with` the model is its base, bitwise. Raises ValueError inside `merged`."""
    if isinstance(model.attachments, Folded):
        check_switched_on(model)
    for attachment in model.attachments:
        check_detachable(attachment)
    with _all_off(model):
        yield model


def set_adapter(model, names):
    """Make exactly these attachments active (one name or several); the others stay on the model,
    switched off.
    """
    check_switched_on(model)
    wanted = [names] if isinstance(names, str) else list(names)
    for name in wanted:
        attachment_of(model, name)
    with _all_off(model, reinstall=False):
        for attachment in model.attachments:
            attachment.active = attachment.name in wanted
    for attachment in model.attachments:
        if attachment.active:
            attachment.install()
    return model


def check_mergeable(model):
    if not model.attachments:
        raise ValueError("nothing is attached to this model, so there is nothing to merge")
    for attachment in model.attachments:
        if attachment.technique.cannot_merge:
            kind = type(attachment.technique).__name__
            why = attachment.technique.cannot_merge
            raise ValueError(f"{kind} ({attachment.name!r}) cannot be merged: {why}")
        attachment.technique.check_ready(attachment)


def merging_turn(swap):
    """The base's own tensors first, then what moves them, whenever they were attached: the other
    wrappers stand around them.
    """
    wrapper = isinstance(swap.replacement, wrap.Wrapper)
    return 2 - swap.replacement.moves_base if wrapper else 0


def _install_merged(model):
    """With everything off: put plain modules that compute the same in place. Returns how to undo
    it, in order.
    """
    undo = []
    try:
        swaps = [swap for a in model.attachments if a.active for swap in a.swaps]
        for swap in sorted(swaps, key=merging_turn):
            parent, name = wrap.locate(model, swap.path)
            current = getattr(parent, name)
            wrapper = isinstance(swap.replacement, wrap.Wrapper)
            merged = swap.replacement.merged(current) if wrapper else swap.replacement
            undo.append((parent, name, current))
            setattr(parent, name, merged)
    except BaseException:
        for parent, name, current in reversed(undo):
            setattr(parent, name, current)
        raise
    return undo


@contextlib.contextmanager
def merged(model):
    """Inside the `with` the attachments are folded into plain modules; afterwards the saved
    tensors are back, bitwise.
    """
    check_mergeable(model)
    with _all_off(model), torch.no_grad():
        undo = _install_merged(model)
        kept, model.attachments = model.attachments, Folded()
        try:
            with torch.enable_grad():
                yield model
        finally:
            model.attachments = kept
            for parent, name, current in reversed(undo):
                setattr(parent, name, current)


def merge(model):
    """Fold every active attachment into the base, for good. Returns the model, now a plain GPT.

    Raises ValueError, with the reason, when a technique cannot be folded; the model is then as it
    was.
    """
    check_switched_on(model)
    check_mergeable(model)
    with _all_off(model, reinstall=False), torch.no_grad():
        try:
            _install_merged(model)
        except BaseException:
            for attachment in model.attachments:
                if attachment.active:
                    attachment.install()
            raise
    for attachment in model.attachments:
        attachment.unfreeze_base()
    model.attachments = []
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def extra_loss(model):
    """Sum of the extra loss terms of the active techniques, or None. Add it to your loss in a
    loop of your own.
    """
    terms = (a.technique.extra_loss(model, a) for a in model.attachments if a.active)
    terms = [t for t in terms if t is not None]
    return sum(terms) if terms else None


def after_step(model, step, total_steps):
    """Let the active techniques act after an optimizer step; the gradients must still be there."""
    for attachment in model.attachments:
        if attachment.active:
            attachment.technique.after_step(model, attachment, step, total_steps)


def follow(optimizer, model, total_steps):
    """For a training loop of your own: have `after_step` called by the optimizer itself. Returns
    the hook's handle.
    """
    steps = 0

    def act(*_):
        nonlocal steps
        steps += 1
        after_step(model, steps, total_steps)

    return optimizer.register_step_post_hook(act)


def trainable_parameters(model):
    """The parameters an optimizer should get, each once."""
    return [p for p in model.parameters() if p.requires_grad]


# -- registry

WHERE = {  # technique -> module; imported when first asked for
    "FullFineTuning": "minipeft.selective.full",
    "TopLayers": "minipeft.selective.full",
    "BitFit": "minipeft.selective.bitfit",
    "LayerNormTuning": "minipeft.selective.layer_norm",
    "LoRA": "minipeft.low_rank.lora",
    "QLoRA": "minipeft.quantized.qlora",
    "DiffPruning": "minipeft.selective.diff_pruning",
    "IA3": "minipeft.additive.ia3",
    "AdaLoRA": "minipeft.low_rank.adalora",
    "ModeApproximation": "minipeft.low_rank.mode_approximation",
    "Adapter": "minipeft.additive.adapter",
    "AdapterFusion": "minipeft.additive.adapter_fusion",
    "AdapterDrop": "minipeft.additive.adapter_drop",
    "LLaMAAdapter": "minipeft.additive.llama_adapter",
    "PromptTuning": "minipeft.soft_prompt.prompt_tuning",
    "PTuning": "minipeft.soft_prompt.p_tuning",
    "PrefixTuning": "minipeft.soft_prompt.prefix_tuning",
    "PTuningV2": "minipeft.soft_prompt.p_tuning_v2",
    "MAMAdapter": "minipeft.hybrid.mam_adapter",
    "UniPELT": "minipeft.hybrid.unipelt",
    "QAT": "minipeft.quantized.qat",
    "Head": "minipeft.head",
}


def technique_class(name):
    """The class called `name`, in any spelling of case, '-' and '_'. Raises ValueError with the
    names there are.
    """
    plain = {known.lower(): known for known in WHERE}
    key = name.replace("-", "").replace("_", "").lower()
    if key not in plain:
        raise ValueError(f"no technique is called {name!r}; there are {', '.join(WHERE)}")
    return getattr(importlib.import_module(WHERE[plain[key]]), plain[key])


def all_techniques():
    """Name -> class, every technique there is."""
    return {name: technique_class(name) for name in WHERE}


# -- report


@dataclasses.dataclass(frozen=True)
class Row:
    """One tensor of a report."""

    name: str
    shape: tuple
    dtype: torch.dtype | str  # "nf4" for a weight in four bits
    trained: bool
    why: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What `report` returns: rows to compute with, a table to print."""

    rows: list[Row]

    @property
    def trained(self):
        """Number of trained parameters."""
        return sum(_numel(r.shape) for r in self.rows if r.trained)

    @property
    def total(self):
        """Number of parameters in all, the technique's own included."""
        return sum(_numel(r.shape) for r in self.rows)

    def __str__(self):
        width = max(len(r.name) for r in self.rows)
        lines = [f"{'tensor':{width}}  {'shape':>14}  {'dtype':9} {'bytes':>11}  trained"]
        for r in self.rows:
            shape = "x".join(map(str, r.shape)) or "scalar"
            dtype = str(r.dtype).removeprefix("torch.")
            mark = "yes" if r.trained else "no"
            lines.append(f"{r.name:{width}}  {shape:>14}  {dtype:9} {r.bytes:11,}  {mark}: {r.why}")
        share = 100 * self.trained / max(1, self.total)
        lines.append(f"trained {self.trained:,} of {self.total:,} parameters ({share:.3f} %)")
        return "\n".join(lines)


def _numel(shape):
    n = 1
    for size in shape:
        n *= size
    return n


def report(model):
    """Every parameter once, under its logical name: shape, dtype, whether it is trained and why,
    bytes.
    """
    owner = {id(p): a for a in model.attachments for p in a.parameters().values()}
    frozen_by = {id(p): a for a in model.attachments for p in a.froze}
    rows = []
    for name, parameter in model.named_parameters():
        mine, freezer = owner.get(id(parameter)), frozen_by.get(id(parameter))
        if mine is not None:
            why = f"{type(mine.technique).__name__} ({mine.name})"
        elif freezer is not None:
            why = f"base, frozen by {type(freezer.technique).__name__} ({freezer.name})"
        else:
            why = "base"
        size = parameter.numel() * parameter.element_size()
        rows.append(
            Row(
                wrap.logical_name(name),
                tuple(parameter.shape),
                parameter.dtype,
                parameter.requires_grad,
                why,
                size,
            )
        )
    return Report(rows + quantized_rows(model))


def quantized_rows(model):
    """A row for each weight that is stored in fewer bits: its own shape, the bytes it takes."""
    rows = []
    for name, module in model.named_modules():
        stored = getattr(module, "quantized", None)
        if stored is not None:
            why = f"base, {stored.bits_per_parameter:.4g} bits a parameter"
            path = wrap.logical_name(f"{name}.weight")
            rows.append(Row(path, stored.shape, stored.kind, False, why, stored.nbytes))
    return rows
