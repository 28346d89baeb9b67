"""Every Triton twin against its definition, on its module's EXAMPLES: results, gradients, what is
written in place, in each dtype, however the inputs lie in memory.

A kernel file needs nothing here. `examples(device)` or `examples(device, dtype)` gives argument
tuples; tensors in them that require a gradient get one, and it is compared. SCRATCH = {function:
positions of arguments, or what gives them for a call} names those whose content afterwards means
nothing. NOT_INTERPRETED = {(function, dtype): reason} names what the interpreter gets wrong.
"""

import importlib
import inspect
import itertools
import pkgutil

import pytest
import torch

import minipeft
from minipeft.dispatch import TWINS, forced
from tests.interpreter import INTERPRETED
from tests.kernels.compile_all import kernel_modules, module
from tests.kernels.harness import DEVICE, close, layouts, reached

HALVES = (torch.float16, torch.bfloat16)

for _package in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
    if not _package.name.startswith(("minipeft.kernels", "minipeft.__main__")):
        importlib.import_module(_package.name)
KERNELS = [t for t in TWINS.values() if t.module.startswith("minipeft.kernels.")]


def named(twin):
    return twin.definition.__name__


def label(twin):
    """What `pytest -k` finds it by: file and function."""
    return f"{twin.module.rpartition('.')[2]}-{named(twin)}"


def examples(twin, dtype):
    """The argument tuples of a twin in this dtype, or a skip that says why there are none."""
    file = importlib.import_module(twin.module)
    make = file.EXAMPLES[named(twin)]
    reason = getattr(file, "NOT_INTERPRETED", {}).get((named(twin), dtype))
    if INTERPRETED and reason:
        pytest.skip(f"the interpreter cannot: {reason}")
    if "dtype" in inspect.signature(make).parameters:
        if twin.dtypes and dtype not in twin.dtypes:
            pytest.skip(f"not made for {dtype}")
        return make(DEVICE, dtype=dtype)
    if dtype != torch.float32:
        pytest.skip("its examples come in one dtype")
    return make(DEVICE)


def kinds():
    """(twin, dtype) that there is to test."""
    pairs = [(twin, dtype) for twin in KERNELS for dtype in (torch.float32, *HALVES)]
    return [pytest.param(t, d, id=f"{label(t)}-{str(d)[6:]}") for t, d in pairs]


def leaf(value, change=torch.clone):
    """A tensor of its own with the same values, and the same wish for a gradient."""
    if isinstance(value, list):  # whose addresses a kernel gets: they lie in memory as they are
        return [leaf(v, wide if change is wide else torch.clone) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    fresh = change(value.detach())
    return fresh.requires_grad_() if value.requires_grad else fresh


def wide(x):
    """Half precision as float32, in which the definition is computed."""
    return x.float() if x.dtype in HALVES else x.clone()


def outputs(result):
    """The tensors in a function's result, and numbers as tensors."""
    values = result if isinstance(result, tuple | list) else [result]
    values = list(values.values()) if isinstance(result, dict) else values
    return [v if isinstance(v, torch.Tensor) else torch.tensor(v) for v in values if v is not None]


def incoming(results, layout):
    """Gradients for the results: random, or of a sum, at stride 0."""
    generator = torch.Generator().manual_seed(1)
    for y in results:
        if layout == "expanded":
            yield torch.ones((), device=y.device).expand(y.shape)
            continue
        g = torch.randn(y.shape, generator=generator).to(y.device)
        yield layouts(g).get(layout, g) if g.dim() else g


def run(function, arguments, layout):
    """(results, gradients of the arguments that want one, arguments afterwards)"""
    results = outputs(function(*arguments))
    through = [y for y in results if y.requires_grad]
    wanting = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    gradients = ()
    if wanting:
        grads = [g.to(y.dtype) for g, y in zip(incoming(through, layout), through)]
        gradients = torch.autograd.grad(through, wanting, grads)
    afterwards = [a for a in arguments if isinstance(a, torch.Tensor)]
    return results, gradients, afterwards


def check(twin, arguments, dtype, layout="as given", change=torch.clone):
    """The twin on `arguments`, laid out anew by `change`, against the definition."""
    with forced("off"):
        expected = run(twin.definition, [leaf(a, wide) for a in arguments], layout)
    mine = [leaf(a, change) for a in arguments]
    assert not twin.refusal(mine, {}, "on"), "the seam would not let this call through"
    listed = [t for a in mine if isinstance(a, list) for t in a if isinstance(t, torch.Tensor)]
    with reached(*listed):
        actual = run(twin.load(), mine, layout)
    scratch = getattr(importlib.import_module(twin.module), "SCRATCH", {}).get(named(twin), ())
    scratch = scratch(*arguments) if callable(scratch) else scratch
    unused = [a for i, a in enumerate(mine) if i in scratch]
    for what, a_all, e_all in zip(("results", "gradients", "arguments"), actual, expected):
        assert len(a_all) == len(e_all), what
        for a, e in zip(a_all, e_all):
            if not any(a is u for u in unused):
                close(a.detach(), e.detach(), dtype)


@pytest.mark.parametrize(("twin", "dtype"), kinds())
def test_it_computes_its_definition(twin, dtype):
    found = examples(twin, dtype)
    assert found, f"{twin.name} has no examples"
    for arguments in found:
        check(twin, arguments, dtype)


@pytest.mark.parametrize("layout", ["sliced", "strided", "transposed", "mixed"])
@pytest.mark.parametrize("twin", [pytest.param(t, id=label(t)) for t in KERNELS])
def test_memory_may_lie_otherwise(twin, layout):
    """Parts of larger tensors, every second column, transposed, each argument otherwise: inputs,
    and gradients coming in.
    """
    mixed = ("strided", "as given", "sliced", "transposed", "strided", "sliced")
    turns = itertools.cycle(mixed if layout == "mixed" else (layout,))

    def change(x):
        return layouts(x).get(next(turns), x.clone()) if x.dim() else x.clone()

    for arguments in examples(twin, torch.float32)[:2]:
        check(twin, arguments, torch.float32, layout, change)


@pytest.mark.parametrize("twin", [pytest.param(t, id=label(t)) for t in KERNELS])
def test_a_gradient_may_be_expanded(twin):
    """What y.sum().backward() hands back: one number at stride 0."""
    for arguments in examples(twin, torch.float32):
        if any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
            check(twin, arguments, torch.float32, "expanded")


def test_every_kernel_file_is_behind_the_seam():
    """Each function with examples is the twin of some definition, and the other way round."""
    behind = {(t.module.rpartition(".")[2], named(t)) for t in KERNELS}
    assert behind == {(name, f) for name in kernel_modules() for f in module(name).EXAMPLES}
