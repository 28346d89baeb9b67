"""What AdaLoRA writes: the triplets that are kept, and which they were.

A matrix that kept r of r_0 triplets writes r columns of P, r numbers of E, r rows of Q and the r_0
bits `kept`; read again, the others are 0 in their old places, as they are after training.
"""

from __future__ import annotations


def cut(attachment, tensors):
    """`tensors` with P, E and Q cut to the kept triplets."""
    tensors = dict(tensors)
    for name, tensor, axis, kept in cuts(attachment, tensors):
        tensors[name] = tensor.index_select(axis, kept.nonzero()[:, 0])
    return tensors


def padded(attachment, tensors):
    """What `cut` gave in its full shape: what was removed is 0."""
    full = dict(tensors)
    for name, tensor, axis, kept in cuts(attachment, tensors):
        if tensor.shape[axis] == kept.sum():
            shape = [*tensor.shape[:axis], len(kept), *tensor.shape[axis + 1 :]]
            where = kept.nonzero()[:, 0]
            full[name] = tensor.new_zeros(shape).index_copy(axis, where, tensor)
    return full


def cuts(attachment, tensors):
    """(name, tensor, axis of the triplets, kept) of every P, E and Q among `tensors`."""
    found = []
    for swap in attachment.swaps:
        kept = tensors.get(f"{swap.path}.kept")
        for letter, axis in (("P", 1), ("E", 0), ("Q", 0)):
            name = f"{swap.path}.{letter}"
            if kept is not None and name in tensors:
                found.append((name, tensors[name], axis, kept))
    return found
