"""`minipeft doctor`: what this machine is, and whether it computes what it should.

Versions, devices, a numeric self-test for each device and dtype, whether Triton is there, which
faster twins are in use and why the others are not, how long this machine needs for the project's
own unit of work, and so for each chapter.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import re
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from minipeft import dispatch
from minipeft.gpt import GPT, AttentionCore, GPTConfig, attention_written_out

PACKAGES = ("torch", "numpy", "tiktoken", "safetensors", "matplotlib", "tyro", "rich", "triton")
PEERS = ("transformers", "peft", "adapters", "bitsandbytes")
TOLERANCE = {  # of attention against its float64 definition: a few roundings of unit-size values
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}


CHAPTERS = Path(__file__).resolve().parent.parent / "chapters"
CHAPTERS_SPEED = 29.0  # steps a second of the machine on which the chapters were run
FRAME = 7  # columns that the lines and margins of a table with two columns take


def version(package):
    """Installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def machine():
    """The facts that every results file carries: processor, system, threads, versions, device."""
    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return facts | {p: v for p in (*PACKAGES, *PEERS) if (v := version(p))}


def processor_name():
    """The processor's model name where the system tells it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def devices():
    """The devices torch can use here, best first."""
    found = ["cuda"] if torch.cuda.is_available() else []
    found += ["mps"] if torch.backends.mps.is_available() else []
    return [*found, "cpu"]


def attention_error(device, dtype):
    """Largest error of the model's attention, output and gradient, against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 33, 16, generator=generator, dtype=torch.float64)
    outputs = []
    for where, kind, core in (
        ("cpu", torch.float64, attention_written_out),
        (device, dtype, AttentionCore()),
    ):
        inputs = [t.clone().to(where, kind).requires_grad_() for t in (q, k, v)]
        y = core(*inputs)
        y.sum().backward()
        outputs.append([t.detach().to("cpu", torch.float64) for t in (y, inputs[2].grad)])
    return max(float((a - b).abs().max()) for a, b in zip(*outputs))


def self_test(device, dtype):
    """("ok" or what is wrong, error) of one device and dtype."""
    try:
        error = attention_error(device, dtype)
    except (RuntimeError, TypeError, AssertionError) as problem:  # torch asserts a CUDA build
        return f"not available ({str(problem).splitlines()[0][:60]})", None
    return ("ok" if error <= TOLERANCE[dtype] else "WRONG"), error


def steps_per_second(seconds=1.0):
    """Training steps a second of the shipped model's shape, 16 x 32 tokens, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = GPT(GPTConfig(vocab_size=768, context_length=128))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(0, 768, (16, 32), generator=torch.Generator().manual_seed(0))
        steps, start = -2, time.perf_counter()
        while steps < 1 or time.perf_counter() - start < seconds:
            steps += 1
            if steps == 0:
                start = time.perf_counter()  # the first rounds only warm up
            model.loss(ids, ids).backward()
            optimizer.step()
            optimizer.zero_grad()
        return steps / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def triton_state():
    """Whether the Triton twins can run here, and why not."""
    if importlib.util.find_spec("triton") is None:
        return "not installed; the plain definitions run (pip install 'minipeft[triton]' on Linux)"
    if not torch.cuda.is_available():
        return f"{version('triton')}, no CUDA device: kernels run in the interpreter only, in tests"
    major, minor = torch.cuda.get_device_capability()
    dots = "all kernels" if major >= 8 else "row kernels only (tl.dot needs sm_80)"
    return f"{version('triton')} on sm_{major}{minor}: {dots}"


def chapter_seconds(folder=CHAPTERS):
    """{chapter: seconds on a core}, as its committed notebook says in the cell tagged `timing`."""
    found = {}
    for path in sorted(Path(folder).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        timing = [c for c in cells if "timing" in c["metadata"].get("tags", ())]
        text = "".join(line for c in timing for o in c["outputs"] for line in o.get("text", ()))
        seconds = re.search(r"seconds on a core\s+(\d+)", text)
        if seconds:
            found[path.stem] = int(seconds[1])
    return found


def twins():
    """[(definition, its faster twin, "in use" and where, or why not here)] of the whole package."""
    found = []
    for twin in dispatch.every_twin():
        used, why = dispatch.standing(twin, devices())
        names = (n.removeprefix("minipeft.") for n in (twin.name, twin.module))
        found.append((*names, f"in use {why}" if used else why))
    return sorted(found)


def twin_tables(width):
    """The twins as tables that fit `width` columns, one for each reason, those in use first. Where
    the lines are short a definition goes by its file and name, without the folder.
    """
    found = twins()
    longest = max(len(name) + len(module) for name, module, _ in found) + FRAME
    if longest > width:
        found = [(".".join(name.split(".")[-2:]), *rest) for name, *rest in found]
    widest = [max(len(row[n]) for row in found) for n in (0, 1)]
    tables = {}
    for name, module, why in found:
        if why not in tables:
            tables[why] = Table(title=f"faster twin: {why}")
            for head, least in zip(("definition", "twin in"), widest):
                tables[why].add_column(head, min_width=least, overflow="fold")
        tables[why].add_row(name, module)
    return [tables[why] for why in sorted(tables, key=lambda why: not why.startswith("in use"))]


def doctor(console=None):
    """Print the examination. Returns True when every self-test that ran is right."""
    console = console or Console()
    facts = Table(title="this machine", show_header=False)
    for name, value in machine().items():
        facts.add_row(name, str(value))
    facts.add_row("Triton kernels", escape(triton_state()))
    console.print(facts)

    tests = Table("device", "dtype", "error", "tolerance", "", title="attention against float64")
    healthy = True
    for device in devices():
        for dtype, tolerance in TOLERANCE.items():
            verdict, error = self_test(device, dtype)
            healthy &= verdict != "WRONG"
            shown = "" if error is None else f"{error:.1e}"
            name = str(dtype).removeprefix("torch.")
            tests.add_row(device, name, shown, f"{tolerance:.0e}", verdict)
    console.print(tests)

    for table in twin_tables(console.width):
        console.print(table)

    speed = steps_per_second()
    console.print(
        f"speed: {speed:.1f} training steps a second (the base, 16 x 32 tokens, one thread)"
    )
    chapters = chapter_seconds()
    if chapters:
        minutes = Table("chapter", "minutes", title="about how long a chapter runs here")
        for name, seconds in chapters.items():
            minutes.add_row(name, f"{seconds * CHAPTERS_SPEED / speed / 60:.1f}")
        console.print(minutes)
    return healthy
