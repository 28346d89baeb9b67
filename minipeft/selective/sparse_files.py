r"""What diff pruning writes: the changes that were kept, and where they stand.

Of a change of n numbers with k left, the file holds k values and k places in the flattened tensor:

    bytes = 4 k (values, float32) + 4 k (places, int32)

against 4 n for the whole change; at the paper's 0.5 % that is a hundredth.
"""

from __future__ import annotations

import torch


def pack(changes):
    """{name: tensor} of fixed changes {path: SparseChange}: indices (k,) and values (k,) each."""
    packed = {}
    for path, change in changes.items():
        where = (change.gate > 0).flatten().nonzero()[:, 0]
        packed[f"{path}.indices"] = where.to(torch.int32)
        packed[f"{path}.values"] = change.w.detach().flatten()[where]
    return packed


def unpacked(changes, tensors, decided):
    """What `pack` gave, with every w, gate and group in its full shape; other tensors as they are.

    decided: alpha of a gate that stands open (minus that: shut). Raises ValueError when one of the
    two halves of a change is missing or they do not fit the tensor.
    """
    full = dict(tensors)
    for path, change in changes.items():
        names = [f"{path}.indices", f"{path}.values"]
        missing = [name for name in names if name not in full]
        if len(missing) == 1:
            raise ValueError(f"{missing[0]} is missing beside the other half of the change")
        if not missing:
            full |= spread(path, change, *(full.pop(name) for name in names), decided)
    return full


def spread(path, change, where, values, decided):
    """{name: tensor} of a fixed change from the indices (n,) and values (n,) of its open gates.

    Raises ValueError when they do not fit the tensor.
    """
    size, shape = change.w.numel(), change.w.shape
    if where.ndim != 1 or where.shape != values.shape:
        raise ValueError(
            f"{path}.indices is {tuple(where.shape)} and {path}.values {tuple(values.shape)}; "
            "they must be two vectors of one length"
        )
    where = where.to(torch.int64)
    if bool(((where < 0) | (where >= size)).any()):
        raise ValueError(f"{path}.indices point outside a tensor of shape {tuple(shape)}")
    w, gate = values.new_zeros(size), values.new_full((size,), -decided / change.speed)
    w[where], gate[where] = values, decided / change.speed
    full = {f"{path}.w": w.view(shape), f"{path}.gate": gate.view(shape)}
    if change.group is not None:
        full[f"{path}.group"] = values.new_full((), decided / change.speed)
    return full
