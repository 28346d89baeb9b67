"""Nothing in minipeft needs Triton: where it is not installed the definitions run."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

PROGRAM = """
import logging, pkgutil, sys
sys.modules["triton"] = None  # importing it raises ImportError, as where it is missing
logging.basicConfig(level=logging.INFO, stream=sys.stdout)

import importlib, torch, minipeft
from minipeft import GPT, GPTConfig, LoRA
from minipeft.dispatch import TWINS

for module in pkgutil.walk_packages(minipeft.__path__, "minipeft."):
    if not module.name.startswith(("minipeft.kernels.", "minipeft.__main__")):
        importlib.import_module(module.name)
torch.manual_seed(0)
model = GPT(GPTConfig(vocab_size=31, context_length=8, n_layer=1, n_head=2, d_model=8))
LoRA(rank=2).attach(model)
ids = torch.randint(31, (2, 8))
loss = model.loss(ids, ids)
loss.backward()
triton = [twin for twin in TWINS.values() if twin.module.startswith("minipeft.kernels.")]
print("twins", len(triton), "loaded", sum(twin.load() is not None for twin in triton))
print("missing", all("cannot be imported" in twin.missing for twin in triton))
print("loss", loss.item())
"""


def run(**environment):
    return subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={"PATH": "", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_everything_imports_and_trains_without_triton():
    """Even when kernels are asked for: it says why they do not run."""
    plain = run()
    asked = run(MINIPEFT_FAST_PATH="on", TRITON_INTERPRET="1")
    assert plain.returncode == 0, plain.stderr
    assert asked.returncode == 0, asked.stderr
    told = asked.stdout.splitlines()
    (counts,) = (line.split() for line in told if line.startswith("twins"))
    assert int(counts[1]) > 5 and counts[3] == "0"
    assert "missing True" in told
    assert any("minipeft.kernels.cross_entropy cannot be imported" in line for line in told)
    assert plain.stdout.splitlines()[-1] == told[-1], "the same loss, to the last bit"
