"""Compile every AOT case of every kernel for each of its targets, in a process in which Triton does
not interpret: `python -m tests.kernels.compile_all FOLDER [names]` writes FOLDER/compiled.json. No
GPU and no driver is asked.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import time
from pathlib import Path

import minipeft.kernels


def kernel_modules():
    """Names of the files in minipeft/kernels."""
    return sorted(m.name for m in pkgutil.iter_modules(minipeft.kernels.__path__))


def module(name):
    return importlib.import_module(f"minipeft.kernels.{name}")


def compile_case(case, target):
    """The compiled kernel for compute capability target / 10."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    wrong = set(names) ^ (set(case.signature) | set(case.constants))
    if wrong:
        raise ValueError(f"{case.name}: neither typed nor constant, or unknown: {sorted(wrong)}")
    signature = {n: "constexpr" if n in case.constants else case.signature[n] for n in names}
    attrs = {(names.index(n),): [["tt.divisibility", 16]] for n in case.aligned}
    source = ASTSource(case.kernel, signature, case.constants, attrs)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def resources(compiled, folder):
    """{"registers": per thread, "spilled": bytes of stack and local memory per thread, "shared":
    bytes per program}, from the machine code.
    """
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
    found = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", text)}
    return {
        "registers": found["REG"],
        "spilled": found["STACK"] + found["LOCAL"],
        "shared": max(compiled.metadata.shared, found["SHARED"]),
    }


def compile_all(folder, chosen):
    """A list of {module, case, target, registers, spilled, shared, missing, seconds}."""
    results = []
    for name in kernel_modules():
        for case in module(name).AOT if not chosen or name in chosen else ():
            for target in case.targets:
                start = time.perf_counter()
                compiled = compile_case(case, target)
                facts = {"module": name, "case": case.name, "target": target}
                facts |= resources(compiled, folder)
                ptx = compiled.asm["ptx"]
                facts["missing"] = [word for word in case.contains if word not in ptx]
                results.append(facts | {"seconds": round(time.perf_counter() - start, 2)})
    return results


if __name__ == "__main__":
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does now, without a word
    where = Path(sys.argv[1])
    (where / "compiled.json").write_text(json.dumps(compile_all(where, sys.argv[2:]), indent=1))
