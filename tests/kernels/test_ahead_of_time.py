"""Every kernel compiles for every GPU it may be chosen on, and fits it. Neither needs a GPU."""

import inspect
import json
import os
import subprocess
import sys

import pytest

from minipeft.kernels import DOT_TARGETS
from tests.kernels.compile_all import kernel_modules, module

REGISTERS = 255  # a thread's registers on every GPU
SHARED = {75: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 120: 101376}  # bytes a block

CASES = [(name, case) for name in kernel_modules() for case in module(name).AOT]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """{(module, case, target): facts}, all compiled in one process that does not interpret."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_all", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    facts = json.loads((folder / "compiled.json").read_text())
    return {(f["module"], f["case"], f["target"]): f for f in facts}


def test_every_kernel_has_a_case():
    """And no case is compiled twice under one name."""
    for name in kernel_modules():
        launched = {case.kernel.__name__ for case in module(name).AOT}
        file = module(name)
        kernels = {k for k, v in vars(file).items() if k.endswith("_kernel") and hasattr(v, "fn")}
        assert launched == kernels, f"{name}: kernels without a case, or the other way round"
    names = [(name, case.name) for name, case in CASES]
    assert len(set(names)) == len(names)


def test_products_are_not_made_below_compute_capability_8():
    """Where a kernel multiplies matrices with tl.dot, Triton makes scalar code for sm_75."""
    for _, case in CASES:
        if "tl.dot(" in inspect.getsource(case.kernel.fn):
            assert set(case.targets) <= set(DOT_TARGETS) and "mma" in case.contains, case.name


@pytest.mark.parametrize(("name", "case"), [pytest.param(n, c, id=c.name) for n, c in CASES])
def test_it_fits(name, case, compiled):
    """0 bytes spilled, at most 255 registers, shared memory within the GPU's limit."""
    for target in case.targets:
        facts = compiled[name, case.name, target]
        assert facts["spilled"] == 0, facts
        assert facts["registers"] <= REGISTERS, facts
        assert facts["shared"] <= SHARED[target], facts
        assert not facts["missing"], facts
