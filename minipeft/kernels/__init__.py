"""Triton twins of functions that the technique files define. No model and no technique is known
here; Triton itself is imported by the files of this folder alone, when dispatch.py loads one.

A file holds `@triton.jit` kernels, functions with the names and signatures of their definitions
that launch them, EXAMPLES (dispatch.py says what these are) and AOT, the cases below, by which each
kernel is compiled for every GPU it may be chosen on, without one. Letters in kernels: `t_` a
tensor's first address, `p_` the addresses of a block, `b_` a block's values.

Block sizes stand in a small table in each file. Nothing is tuned at run time: a tuner runs again in
each process, costs more than a student's whole training run, and hides why a size is good.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ROW_TARGETS = (75, 80, 86, 89, 90, 120)  # compute capabilities, 10 times
DOT_TARGETS = (80, 86, 89, 90, 120)  # below 8.0 Triton makes scalar code of tl.dot


@dataclass(frozen=True)
class AotCase:
    """One way in which a kernel is launched, so that it can be compiled without a GPU.

    kernel: the `@triton.jit` function. signature: type of each argument that is no constant, such
    as "*fp16", "i32", "i64" or "fp32". constants: value of each tl.constexpr argument, and of every
    integer argument that is 1 in this case, for Triton makes a constant of a 1. aligned: arguments
    that are multiples of 16, or addresses that are; Triton finds that out at each launch. targets:
    compute capabilities. contains: what the PTX must mention, such as "mma" for a tl.dot kernel.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[str, ...] = ()
    targets: tuple[int, ...] = ROW_TARGETS
    num_warps: int = 4
    num_stages: int = 3
    contains: tuple[str, ...] = field(default=())

    @property
    def name(self):
        types = "-".join(dict.fromkeys(t.strip("*") for t in self.signature.values() if "*" in t))
        sizes = "-".join(str(v) for v in self.constants.values())
        return f"{self.kernel.__name__}-{types}-{sizes}"
