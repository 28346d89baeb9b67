"""What the tests of Triton kernels share: where they run, a bounds checker and a traffic counter
around the interpreter's loads and stores, inputs in unusual layouts, tolerances.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from tempfile import TemporaryFile

import numpy as np
import pytest
import torch

from tests.interpreter import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {
    torch.float64: 1e-5,  # kernels compute in float32
    torch.float32: 1e-5,
    torch.float16: 2e-3,  # two roundings to 11 bits
    torch.bfloat16: 2**-7,  # two roundings to 8 bits; the interpreter cuts off instead of rounding
}
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="looks inside the interpreter")


# -- inputs


def layouts(x, expanded=False):
    """{name: a tensor equal to x (n >= 1 dimensions), laid out otherwise in memory}.

    sliced: part of a larger tensor, rows further apart than they are long, unaligned. strided:
    every second column of a wider one. transposed: the first of the last two dimensions is the
    one without gaps. expanded (if asked for): its first row again and again, at stride 0.
    """

    def sliced():
        wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 4)[..., 3:-1]
        return wide.copy_(x)

    def strided():
        return x.new_empty(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)

    found = {"sliced": sliced(), "strided": strided()}
    if x.dim() > 1:
        found["transposed"] = x.mT.contiguous().mT
        if expanded:
            found["expanded"] = x[:1].expand_as(x)
    return found


def far_rows(x, distance=2**30):
    """A copy of x (n, m) whose rows begin `distance` elements apart, so that the third lies past
    int32. The memory in between is promised by the system and never touched.
    """
    n, m = x.shape
    return untouched((n - 1) * distance + m, x.dtype).as_strided((n, m), (distance, 1)).copy_(x)


def untouched(count, dtype):
    """`count` zeros that the system promises and does not hold before they are written."""
    size = count * torch.empty((), dtype=dtype).element_size()
    with TemporaryFile() as file:
        memory = np.memmap(file, dtype=np.uint8, mode="w+", shape=size)
    return torch.from_numpy(memory).view(dtype)


@contextlib.contextmanager
def programs_from(first):
    """The interpreter counts programs from `first` along the grid's first axis: of a launch over a
    large tensor only the last ones need to run.
    """
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    plain = builder.set_grid_idx

    def shifted(self, x, y, z):
        plain(self, x, y, z)
        self.grid_idx = (x + first, y, z)

    builder.set_grid_idx = shifted
    try:
        yield
    finally:
        builder.set_grid_idx = plain


def close(actual, expected, dtype=None):
    """Equal to the tolerance of `dtype` (expected's own without it), relative to each element or to
    a tenth of the largest; exactly, for integers.
    """
    assert actual.shape == expected.shape
    if not expected.is_floating_point():
        assert torch.equal(actual, expected)
        return
    tolerance = TOLERANCE[dtype or expected.dtype]
    finite = expected[expected.isfinite()]
    largest = finite.abs().max().item() if len(finite) else 0.0
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=tolerance * largest / 10
    )


# -- inside the interpreter


class OutOfBounds(Exception):
    """A lane that is not masked touches memory that no tensor of the launch holds."""


class Region:
    """The addresses of a tensor's elements: an interval if it has no gaps, else a sorted list."""

    def __init__(self, name, tensor):
        self.name, self.start, size = name, tensor.data_ptr(), tensor.element_size()
        offsets, lengths = np.zeros(1, np.int64), tensor.shape
        if tensor.is_contiguous():  # its ends say it all, and it may be too large for a list
            offsets, lengths = np.array([0, max(0, tensor.numel() - 1) * size]), ()
        for length, stride in zip(lengths, tensor.stride()):
            if stride:
                offsets = (offsets[:, None] + stride * size * np.arange(length)).ravel()
        self.end = self.start + (int(offsets.max()) + size if tensor.numel() else 0)
        self.size = size
        gaps = bool(lengths) and len(offsets) * size < self.end - self.start
        self.elements = np.sort(offsets) + self.start if gaps and tensor.numel() else None

    def holds(self, addresses):
        """Which of the addresses (n,) are those of elements."""
        inside = (addresses >= self.start) & (addresses < self.end)
        if self.elements is not None:
            places = np.searchsorted(self.elements, addresses).clip(max=len(self.elements) - 1)
            inside &= self.elements[places] == addresses
        return inside & ((addresses - self.start) % self.size == 0)


REACHED = []  # what kernels may reach through a table of addresses, inside `reached`


@contextlib.contextmanager
def reached(*tensors):
    """Inside, kernels may touch these tensors, whose addresses they read from a table."""
    REACHED.extend(tensors)
    try:
        yield
    finally:
        del REACHED[len(REACHED) - len(tensors) :]


class Accesses:
    """A `with` in which every load, store and atomic of interpreted kernels is seen.

    `also` are tensors a kernel reaches without being given them, through a table of addresses.
    """

    def __init__(self, *also):
        self.also = [Region(f"also {i}", tensor) for i, tensor in enumerate(also)]
        self.regions = self.also

    def see(self, kind, addresses, size):
        """Called with kind load, store or atomic, the addresses (n,) of the lanes that are not
        masked, and the bytes of each.
        """
        raise NotImplementedError

    def __enter__(self):
        from triton.runtime import interpreter

        self.stack = contextlib.ExitStack()
        builder = interpreter.InterpreterBuilder
        for name, kind, mask_at in (
            ("create_masked_load", "load", 1),
            ("create_masked_store", "store", 2),
            ("create_atomic_rmw", "atomic", 3),
            ("create_atomic_cas", "atomic", None),
        ):
            self._patch(builder, name, self._watched(getattr(builder, name), kind, mask_at))
        executor = interpreter.GridExecutor
        self._patch(executor, "__call__", self._launched(executor.__call__))
        self._patch(executor, "_restore_args_dev", lambda *args: None)  # CPU tensors: no copies
        options = interpreter.InterpreterOptions(debug=True)  # int32 overflow is an error
        self._patch(interpreter.interpreter_builder, "options", options)
        return self

    def __exit__(self, *problem):
        self.stack.close()

    def _patch(self, place, name, value):
        self.stack.callback(setattr, place, name, getattr(place, name))
        setattr(place, name, value)

    def _launched(self, call):
        def launched(executor, *args, **kwargs):
            given = dict(zip(executor.arg_names, args)) | kwargs
            tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
            self.regions = self.also + [Region("reached", tensor) for tensor in REACHED]
            self.regions += [Region(k, v) for k, v in tensors.items()]
            return call(executor, *args, **kwargs)

        return launched

    def _watched(self, access, kind, mask_at):
        def watched(builder, *args):
            pointers = args[1] if kind == "atomic" and mask_at else args[0]
            addresses = np.atleast_1d(pointers.data).astype(np.int64)
            if mask_at is not None:
                addresses = addresses[np.broadcast_to(args[mask_at].data, addresses.shape)]
            size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
            self.see(kind, addresses.ravel(), size)
            return access(builder, *args)

        return watched


class Bounds(Accesses):
    """Raises on any lane that is not masked and touches what is no element of a tensor given to the
    kernel: past an end, in the gap between two rows, between two elements. int32 arithmetic that
    overflows raises, too.
    """

    def see(self, kind, addresses, size):
        outside = np.ones(len(addresses), bool)
        for region in self.regions:
            outside &= ~region.holds(addresses)
        if outside.any():
            first = int(addresses[outside][0])
            near = min(self.regions, key=lambda r: min(abs(first - r.start), abs(first - r.end)))
            raise OutOfBounds(
                f"{kind}: {outside.sum()} of {len(addresses)} lanes outside all tensors, the first "
                f"{first - near.start} bytes from the start of {near.name}, which spans "
                f"{near.end - near.start}"
            )


class Traffic(Accesses):
    """Counts the bytes that lanes ask for: `loaded` and `stored`, by argument name (an atomic is
    both), and `total`. Caches may serve a part of them; memory must serve the ideal at least.
    """

    def __init__(self, *also):
        super().__init__(*also)
        self.loaded, self.stored = Counter(), Counter()

    def see(self, kind, addresses, size):
        for region in self.regions:
            count = size * int(region.holds(addresses).sum())
            if count and kind != "store":
                self.loaded[region.name] += count
            if count and kind != "load":
                self.stored[region.name] += count

    @property
    def total(self):
        return sum(self.loaded.values()) + sum(self.stored.values())


def nbytes(*tensors):
    """Bytes of these tensors' elements, for the ideal that Traffic is held against."""
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
