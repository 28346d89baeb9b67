"""Triton without a GPU. Whether a kernel is compiled or interpreted is settled when Triton and then
the kernel's module are imported, for the whole process: so it is settled first, in one place.

The environment is left as it was: MINIPEFT_FAST_PATH=on takes a kernel on a CPU only where
TRITON_INTERPRET=1 says so, and that is for the kernels' own tests to say.
"""

import importlib.util
import os

import torch

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and (
    os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
)


def settle():
    """Import Triton so that every `@triton.jit` from now on makes a function to be interpreted,
    where there is no GPU; else do nothing.
    """
    if not INTERPRETED:
        return
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"  # Triton's own library is decorated on import
    import triton

    triton.knobs.runtime.interpret = True  # also writes the variable
    if before is None:
        del os.environ["TRITON_INTERPRET"]
