"""Kernels are tested in Triton's interpreter, every access watched; on the GPU where there is one.
Without Triton nothing here is collected.
"""

import numpy
import pytest
import torch

from tests.interpreter import INSTALLED, INTERPRETED

collect_ignore_glob = [] if INSTALLED else ["test_*.py"]


@pytest.fixture(autouse=True)
def fast_path(monkeypatch):
    """Inside a test of this folder the interpreter may stand in for a GPU."""
    monkeypatch.setenv("MINIPEFT_FAST_PATH", "on")
    if INTERPRETED:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def watched():
    """Every lane stays inside the launch's tensors, and what nobody wrote is NaN, not 0."""
    from tests.kernels.harness import Bounds

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        if INTERPRETED:
            with Bounds(), numpy.errstate(all="ignore"):  # masked lanes: -inf - -inf
                yield
        else:
            yield
    finally:
        torch.use_deterministic_algorithms(False)
