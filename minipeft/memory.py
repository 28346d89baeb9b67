"""What training costs in memory, measured.

On CUDA the allocator knows its peak. On a CPU nobody does, so `PeakMemory` watches: a dispatch mode
sees every tensor that any operation returns, counts each storage once, and takes it off again when
the storage dies. Scratch space inside a single kernel is not seen; everything autograd keeps is.
"""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of live tensor storages inside a `with`: `now`, and `peak`, the most at once.

    Storages that existed before count only if handed to `watch`. Slow (every operation calls back
    into Python), so never time what runs inside.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # id of a live storage -> bytes
        self.now = self.peak = 0

    def watch(self, *tensors):
        """Count these tensors' storages too: weights, optimizer state, anything made before."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            if id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key):
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.watch(*(t for t in tree_leaves(result) if isinstance(t, torch.Tensor)))
        return result


def model_tensors(model):
    """Every parameter, gradient and buffer of a model, what its attachments set aside included."""
    tensors = [*model.parameters(), *model.buffers()]
    for attachment in model.attachments:
        for swap in attachment.swaps:
            if isinstance(swap.original, torch.Tensor):
                tensors.append(swap.original)
    return tensors + [t.grad for t in tensors if t.grad is not None]


def optimizer_bytes(optimizer):
    """Bytes of the tensors an optimizer keeps between steps."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    return sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor))


def measure_peak(step, model, optimizer=None):
    """Bytes at the fullest moment of `step()`, weights, gradients and optimizer state included.

    Run one step before, so that the optimizer's state exists. On CUDA it is the allocator's peak.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with PeakMemory() as memory:
        memory.watch(*model_tensors(model))
        for state in optimizer.state.values() if optimizer is not None else ():
            memory.watch(*(t for t in state.values() if isinstance(t, torch.Tensor)))
        step()
    return memory.peak
