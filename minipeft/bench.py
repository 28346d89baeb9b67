"""`minipeft bench`: how fast, against the libraries people use and against the floor, in one run.

Every figure is a ratio. Both sides start from the same weights and are shown to give the same
outputs first; then they run in turn, ours, theirs, ours, theirs, on one thread, and the ratio is
taken round by round, because a machine's speed drifts and a ratio of neighbours does not. Reported:
the median, the 20th and the 80th percentile over the rounds, and how far our time is from the least
the machine could need (roofline.py), whose rates are measured in the same run.

What is timed is what users get: the models' own options, AdamW as the training loop makes it. Twins
and techniques have a file of their own (bench_parts.py).
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from minipeft import figures, roofline, timing
from minipeft.atomic import write_json
from minipeft.cross_entropy import cross_entropy, linear_cross_entropy
from minipeft.dispatch import forced
from minipeft.doctor import machine
from minipeft.gpt import GPT, GPTConfig
from minipeft.memory import PeakMemory
from minipeft.technique import technique_class, trainable_parameters

SHAPE = GPTConfig(vocab_size=4096, context_length=256, n_layer=6, n_head=6, d_model=384)
BATCH = 8
SUFFIX = {"cpu": "", "cuda": "-cuda"}  # of the results files, by device
COSTS = "What techniques cost"
SERVED = GPTConfig(vocab_size=512, n_layer=2, n_head=12, d_model=768)  # by many adapters at once


@dataclass
class Result:
    """One comparison: `ratio` is our time over theirs, the median over the rounds."""

    name: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    low: float  # 20th percentile of the rounds' ratios
    high: float  # 80th
    rounds: int
    note: str = ""
    extra: dict = field(default_factory=dict)
    bytes_moved: float = 0.0  # that our side must move at the least
    operations: float = 0.0  # that it must do, multiplications and additions; 0 where not counted
    floor: float = 0.0  # seconds; 0 where neither is known


def interleaved(name, peer, ours, theirs, rounds=7, device="cpu", **facts):
    """Time two actions in turn; a Result. facts: its note, extra, bytes_moved, operations."""
    found = timing.interleaved(ours, theirs, rounds, device)
    times = (found.ours, found.theirs, found.ratio, found.low, found.high)
    return Result(name, peer, "s", *times, rounds, **facts)


def assert_close(ours, theirs, tolerance, what):
    """A comparison of speed means nothing unless both compute the same."""
    worst = float((ours - theirs).detach().abs().max())
    if not worst <= tolerance:  # nor may it be NaN
        raise RuntimeError(f"{what}: the two sides differ by {worst:.2e}, more than {tolerance:g}")


def twins(device="cpu", shape=None):
    """(our GPT, transformers' GPT-2) with the same weights, of `shape` or SHAPE."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT(shape or SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peer = GPT2LMHeadModel.from_pretrained(folder)
    return model.to(device), peer.to(device).train()


def training_step(loss, parameters):
    """An action that does one step as the training loop does: forward, backward, fused AdamW,
    gradients cleared; no clipping.
    """
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step():
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def tokens(batch=BATCH, length=SHAPE.context_length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, SHAPE.vocab_size, (batch, length + 1), generator=generator)


def steps_against(model, peer, name, against, rounds):
    """Training steps of two models on the same batch, their first losses shown equal."""
    device = next(model.parameters()).device
    ids = tokens().to(device)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()

    def their_loss():
        return cross_entropy(peer(input_ids=inputs).logits.flatten(0, 1), labels.flatten())

    def our_loss():
        return model.loss(inputs, labels)

    assert_close(our_loss(), their_loss(), 1e-4, name)
    ours = training_step(our_loss, trainable_parameters(model))
    theirs = training_step(their_loss, [p for p in peer.parameters() if p.requires_grad])
    count = sum(p.numel() for p in trainable_parameters(model))
    facts = {"note": step_note(BATCH), "extra": {"trained": count}}
    work = roofline.operations(lambda: our_loss().backward())
    return interleaved(name, against, ours, theirs, rounds, device, **facts, operations=work)


def step_note(batch):
    shape = f"{SHAPE.n_layer} layers, width {SHAPE.d_model}"
    return f"{shape}, batch {batch} x {SHAPE.context_length}, fp32"


def full_step(rounds=7, device="cpu"):
    """Full fine-tuning: a step of ours against a step of transformers."""
    model, peer = twins(device)
    return [steps_against(model, peer, "full fine-tuning step", "transformers", rounds)]


def lora_step(rounds=7, device="cpu"):
    """LoRA: rank 8 on q and v here, rank 8 on c_attn in peft; the same number of parameters. Then
    our own definition as the peer of our twin.
    """
    from peft import LoraConfig, get_peft_model

    model, peer = twins(device)
    technique_class("LoRA")(rank=8, alpha=16).attach(model)
    peer = get_peft_model(
        peer, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    peer = peer.to(device)
    against = steps_against(model, peer, "LoRA step", "transformers + peft", rounds)
    ids = tokens().to(device)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()
    fast = training_step(lambda: model.loss(inputs, labels), trainable_parameters(model))

    def defined():
        with forced("off"):
            fast()

    note = step_note(BATCH)
    own = interleaved("LoRA step", "our definition", fast, defined, rounds, device, note=note)
    return [against, own]


def decoding(rounds=7, device="cpu", new_tokens=200):
    """Greedy decoding at batch 1 and 8, and with a LoRA that is not merged, against transformers'
    generate, token for token the same. Each token must read every weight of blocks and head.
    """
    model, peer = twins(device)
    with_lora = serving(["a"], device, SHAPE)
    weights = sum(p.numel() for p in model.parameters()) - model.embed.position.weight.numel()
    cases = [("", "transformers", model, peer, 1), ("", "transformers", model, peer, 8)]
    cases.append((" with LoRA", "transformers + peft", *with_lora, 1))
    results = []
    for what, against, model, peer, batch in cases:
        pair = greedy(model.eval(), peer.eval(), tokens(batch, 15).to(device), new_tokens)
        name = f"greedy decoding{what}, batch {batch}"
        work = {"bytes_moved": 4.0 * weights * new_tokens}
        work["operations"] = 2.0 * weights * new_tokens * batch
        r = interleaved(name, against, *pair, rounds, device, **work)
        r.note = f"{new_tokens} tokens from 16, fp32"
        r.extra = {
            "our tokens/s": batch * new_tokens / r.ours,
            "their tokens/s": batch * new_tokens / r.theirs,
            "speed-up": r.theirs / r.ours,
        }
        results.append(r)
    return results


def greedy(model, peer, ids, new_tokens, **options):
    """Two actions that continue ids, ours and theirs. Raises RuntimeError where they differ."""
    from minipeft.decoding import generate

    def ours():
        return generate(model, ids, max_new_tokens=new_tokens, temperature=0)

    def theirs():
        with torch.inference_mode():
            return peer.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **options,
            )

    if not torch.equal(ours(), theirs()):
        raise RuntimeError("greedy decoding: the two sides chose different tokens")
    return ours, theirs


def chunked_cross_entropy(rounds=7, device="cpu", M=2048, V=50257, D=384):
    """The head and its loss, in chunks against all logits at once: time, and memory on top."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.02
    labels = torch.randint(0, V, (M,), generator=generator).to(device)
    x, weight, results = x.to(device), weight.to(device), []

    def whole(x, weight, labels):
        return cross_entropy(x @ weight.T, labels)

    for frozen in (False, True):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]
        name = f"chunked cross-entropy, {'frozen' if frozen else 'trained'} head"
        facts = {"note": f"{M} tokens x {V} words x width {D}, fp32, forward and backward"}
        facts["operations"] = (4 if frozen else 6) * M * V * D
        losses = linear_cross_entropy, whole
        results.append(losses_against(name, losses, inputs, (labels,), rounds, device, **facts))
    return results


def chunked_distillation(
    rounds=7, device="cpu", M=2048, V=50257, D=384, temperature=2.0, alpha=0.5
):
    """Hinton's loss through two heads, in chunks against all logits of both: time, and memory."""
    from torch.nn import functional as F

    from minipeft.compressed.linear_distillation import linear_distillation_loss

    generator = torch.Generator().manual_seed(0)
    x, teacher_x = torch.randn(2, M, D, generator=generator).to(device)
    weight, teacher_weight = 0.02 * torch.randn(2, V, D, generator=generator).to(device)
    labels = torch.randint(0, V, (M,), generator=generator).to(device)

    def whole(x, weight, teacher_x, teacher_weight, labels, temperature, alpha):
        s, t = x @ weight.T, teacher_x @ teacher_weight.T
        log_q, p = (s / temperature).log_softmax(-1), (t / temperature).softmax(-1)
        soft = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        return alpha * soft + (1 - alpha) * F.cross_entropy(s, labels)

    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    rest = teacher_x, teacher_weight, labels, temperature, alpha
    facts = {"note": f"{M} tokens x {V} words x width {D} twice, fp32, forward and backward"}
    facts["operations"] = 8 * M * V * D  # the teacher's logits are a product more
    losses = linear_distillation_loss, whole
    name = "chunked distillation"
    return [losses_against(name, losses, inputs, rest, rounds, device, **facts)]


def losses_against(name, losses, inputs, rest, rounds, device, **facts):
    """A loss in chunks against the same in one piece, forward and backward: time, and memory on top
    of the inputs.
    """

    def action(loss):
        def run():
            for t in inputs:
                t.grad = None
            value = loss(*inputs, *rest)
            value.backward()
            return value.detach()

        return run

    ours, theirs = map(action, losses)
    assert_close(ours(), theirs(), 1e-4, name)
    memory = [extra_bytes(run, inputs) for run in (ours, theirs)]
    facts["extra"] = {
        "our extra MB": memory[0] / 1e6,
        "their extra MB": memory[1] / 1e6,
        "memory ratio": memory[0] / memory[1],
    }
    return interleaved(name, "full logits in torch", ours, theirs, rounds, device, **facts)


def multi_lora(rounds=7, device="cpu", adapters=16, length=64):
    """A batch in which each row has its own LoRA, against peft's mixed batch; equal outputs. Whole
    texts, one token a row, and greedy decoding.
    """
    from minipeft.low_rank.multi_lora import use_adapters

    names = [f"a{n}" for n in range(adapters)]
    model, peer = serving(names, device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SERVED.vocab_size, (adapters, length), generator=generator).to(device)
    results, tensors = [], [p for a in model.attachments for p in a.parameters().values()]
    shape = f"{SERVED.n_layer} layers, width {SERVED.d_model}"

    def add(many, ours, theirs, times=1, **facts):
        name = f"each row its own LoRA, {many}"
        facts["note"] = f"{adapters} adapters, {adapters} rows x {many}, {shape}"
        facts["bytes_moved"] = 4.0 * sum(p.numel() for p in tensors) * times
        found = interleaved(name, "peft, mixed batch", ours, theirs, rounds, device, **facts)
        results.append(found)

    with torch.inference_mode(), use_adapters(model, rows=names):
        tensors += [*model.blocks.parameters(), model.head.weight]  # without the last one's adapter
        for part in (ids, ids[:, :1]):

            def ours(part=part):
                return model(part)

            def theirs(part=part):
                return peer(input_ids=part, adapter_names=names).logits

            assert_close(ours(), theirs(), 1e-3, "a LoRA a row")
            many = f"{part.shape[1]} token{'s' if part.shape[1] > 1 else ''}"
            add(many, ours, theirs, operations=roofline.operations(ours))
        pair = greedy(model, peer, ids[:, :16], length, adapter_names=names)
        add(f"{length} tokens decoded", *pair, times=length)
    return results


def serving(names, device, shape=None):
    """(our model, peft's) of `shape` or SERVED with the same LoRAs of rank 8 on q, k and v, by
    name.
    """
    from peft import PeftModel

    from minipeft.checkpoint import save_adapter

    model, peer = twins(device, shape or SERVED)
    lora = technique_class("LoRA")(rank=8, targets=("q", "k", "v"), share_qkv=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            lora.attach(model, name)
            for parameter in model.attachments[-1].parameters().values():
                torch.nn.init.normal_(parameter, 0.0, 0.05)
            save_adapter(model, f"{folder}/{name}", name)
        peer = PeftModel.from_pretrained(peer, f"{folder}/{names[0]}", adapter_name=names[0])
        for name in names[1:]:
            peer.load_adapter(f"{folder}/{name}", adapter_name=name)
    return model.eval(), peer.to(device).eval()


def adapter_drop(rounds=7, device="cpu"):
    """AdapterDrop: the first n of 6 layers without adapters, against adapters everywhere."""
    from minipeft.additive.adapter_drop import AdapterDrop, measure_savings

    torch.manual_seed(0)
    ids = tokens().to(device)
    technique = AdapterDrop(bottleneck=64)
    savings = measure_savings(
        GPT(SHAPE).to(device), ids[:, :-1], ids[:, 1:].contiguous(), technique, (0, 3, 6), rounds
    )
    results, whole = [], savings[0]
    for s in savings[1:]:
        for kind in ("training", "inference"):
            ours, theirs = getattr(s, kind), getattr(whole, kind)
            ratio = ours / theirs
            name = f"AdapterDrop, {kind}, {s.drop} of 6 layers dropped"
            note = "medians of rounds that take turns"
            peer = "adapters in all layers"
            results.append(Result(name, peer, "s", ours, theirs, ratio, ratio, ratio, rounds, note))
    return results


def pruning(rounds=7, device="cpu"):
    """A forward pass of a model with half its heads and half its neurons out, and of one with half
    and nine tenths of its weights zero, each against the dense model.
    """
    from minipeft.compressed.magnitude_pruning import prune_magnitude
    from minipeft.compressed.structured_pruning import prune_heads, prune_neurons, widths

    torch.manual_seed(0)
    dense, ids = GPT(SHAPE).eval().to(device), tokens()[:, :-1].to(device)
    small, layers = copy.deepcopy(dense), range(SHAPE.n_layer)
    prune_heads(small, {n: range(SHAPE.n_head // 2) for n in layers})
    prune_neurons(small, {n: range(SHAPE.ff_width // 2) for n in layers})
    models = {"half the heads and neurons": small}
    for share in (0.5, 0.9):
        name = f"{100 * share:.0f} % of the weights zero"
        models[name] = prune_magnitude(copy.deepcopy(dense), share)
    results = []
    for name, model in models.items():
        with torch.inference_mode():
            work = roofline.operations(lambda m=model: m(ids))
            sides = (lambda m=model: m(ids)), (lambda: dense(ids))
            r = interleaved(name, "the dense model", *sides, rounds, device, operations=work)
        count = sum(p.numel() for p in model.parameters())
        r.note = f"{SHAPE.n_layer} layers, width {SHAPE.d_model}, batch {len(ids)} x {ids.shape[1]}"
        r.extra = {
            "speed-up": 1 / r.ratio,
            "parameters": count,
            "heads": widths(model)[0]["n_head"],
        }
        results.append(r)
    return results


def extra_bytes(action, inputs):
    """Peak bytes on top of the inputs and the gradients that the caller keeps."""
    for t in inputs:
        t.grad = None
    with PeakMemory() as memory:
        action()
    kept = sum(t.grad.numel() * t.grad.element_size() for t in inputs if t.grad is not None)
    return memory.peak - kept


def nf4(rounds=7, device="cpu", size=4096):
    """Quantising and dequantising a square matrix in blocks of 64 against bitsandbytes, the bytes,
    the constants and the restored weights shown equal.
    """
    from bitsandbytes import functional

    from minipeft.quantized.nf4 import dequantize_nf4, quantize_nf4

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device)

    def theirs():
        return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    quantized, (packed, state) = quantize_nf4(weight), theirs()
    if not torch.equal(quantized.packed, packed) or not torch.equal(quantized.absmax, state.absmax):
        raise RuntimeError("NF4: the two sides gave different codes or constants")
    assert_close(dequantize_nf4(quantized), functional.dequantize_4bit(packed, state), 0, "NF4")
    pairs = {
        "NF4 quantise": (lambda: quantize_nf4(weight), theirs),
        "NF4 dequantise": (
            lambda: dequantize_nf4(quantized),
            lambda: functional.dequantize_4bit(packed, state),
        ),
    }
    facts = {"note": f"{size} x {size}, blocks of 64, fp32"}
    facts["bytes_moved"] = (4 + 0.5 + 4 / 64) * size**2
    return [
        interleaved(name, "bitsandbytes", *pair, rounds, device, **facts)
        for name, pair in pairs.items()
    ]


def parts(name):
    """A benchmark of bench_parts.py, imported when it runs."""

    def run(rounds=7, device="cpu"):
        from minipeft import bench_parts

        return getattr(bench_parts, name)(rounds, device)

    return run


TABLES = {  # title -> {benchmark: function (rounds, device) -> [Result]}
    "Against other libraries, from the same weights": {
        "full": full_step,
        "lora": lora_step,
        "decoding": decoding,
        "multi-lora": multi_lora,
        "peft": parts("against_peft"),
        "nf4": nf4,
    },
    "Faster forms against what defines them": {
        "cross-entropy": chunked_cross_entropy,
        "distillation": chunked_distillation,
        "twins": parts("twins"),
    },
    COSTS: {
        "techniques": parts("techniques"),
        "adapter-drop": adapter_drop,
        "pruning": pruning,
    },
}
BENCHMARKS = {name: run for table in TABLES.values() for name, run in table.items()}


def bench(names=None, rounds=7, folder=None, console=None, device="cpu", apart=False):
    """Run the named benchmarks (all for None) on one thread, print the table, and write each to
    NAME.json in `folder` as soon as it is measured, with a picture of all that is in `folder`.
    apart: each in a new process. Memory that earlier work left behind is handed out again without
    the kernel's pages, and what allocates little to begin with looks slower beside what does not.

    Returns {name: what its file holds}. Raises ValueError for an unknown name and for a device that
    is not there. A benchmark whose peer is not installed is left out, and its file says so.
    """
    console, names = console or Console(), tuple(names or BENCHMARKS)
    check(names, device, rounds)
    threads, contents = torch.get_num_threads(), {}
    torch.set_num_threads(1)
    try:
        rates = roofline.measure(device)
        for name in names:
            contents[name] = (alone if apart else measured)(name, rounds, device, rates)
            if folder is not None:
                write_json(results_file(folder, name, device), contents[name])
    finally:
        torch.set_num_threads(threads)
    show(contents, rates, console)
    if folder is not None:
        picture(Path(folder), device)
        console.print(f"written to {folder}")
    return contents


def check(names, device, rounds):
    """Raise ValueError for an unknown name, an unknown device, one that is not here, no round."""
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if device not in SUFFIX:
        raise ValueError(f"device={device!r} is none of {', '.join(SUFFIX)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda', but torch finds no CUDA device here; leave it at cpu")
    if rounds < 1:
        raise ValueError(f"rounds={rounds}: at least one is needed, after the one that warms up")


def alone(*arguments):
    """`measured` in a process of its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (1,)) as process:
        return process.submit(measured, *arguments).result()


def measured(name, rounds, device, rates):
    """One benchmark's results, with the machine and its rates, as its file holds them."""
    results, left_out = [], ""
    try:
        results = BENCHMARKS[name](rounds=rounds, device=device)
    except ImportError as missing:
        left_out = f"{missing.name} is not installed"
    for r in results:
        r.floor = rates.floor(r.bytes_moved, r.operations)
    there = torch.cuda.is_available()
    on = {"threads": 1, "device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    return {
        "benchmark": name,
        "date": date.today().isoformat(),
        "machine": machine() | on,
        "gpu": on["device"] if device == "cuda" else "not measured" if there else "none here",
        "rates": asdict(rates),
        "left_out": left_out,
        "results": [asdict(r) for r in results],
    }


def results_file(folder, name, device="cpu"):
    """Where a benchmark's results are: one file, which the next run replaces."""
    return Path(folder) / f"{name}{SUFFIX[device]}.json"


def stored(folder, names, device="cpu"):
    """What the files of these benchmarks hold; those that were never measured are left out."""
    paths = (results_file(folder, name, device) for name in names)
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def picture(folder, device="cpu"):
    """All the ratios in `folder` as bench.png, but those that only say what a technique costs."""
    names = (name for title, table in TABLES.items() if title != COSTS for name in table)
    results = [r for content in stored(folder, names, device) for r in content["results"]]
    if results:
        rows = [(f"{r['name']}: {r['peer']}", r["ratio"], r["low"], r["high"]) for r in results]
        drawn, alts = folder / f"bench{SUFFIX[device]}.png", folder / "pictures.json"
        _, alt = figures.ratios(drawn, rows, "Our time over theirs, on one thread")
        known = json.loads(alts.read_text()) if alts.is_file() else {}
        write_json(alts, known | {drawn.name: alt})


def show(contents, rates, console):
    """The ratios as a table that fits 80 columns, and a line of figures for each."""
    table = Table("what", "against", "ratio", "p20 .. p80", "floor", box=box.SIMPLE)
    results = [Result(**r) for content in contents.values() for r in content["results"]]
    for r in results:
        spread = f"{r.low:.3f} .. {r.high:.3f}" if r.low < r.high else ""
        reached = f"{r.floor / r.ours:.0%}" if r.floor else ""
        table.add_row(r.name, r.peer, f"{r.ratio:.3f}", spread, reached)
    console.print(table)
    for r in results:
        times = {"ours ms": 1000 * r.ours, "theirs ms": 1000 * r.theirs}
        times |= {"floor ms": 1000 * r.floor} if r.floor else {}
        shown = ", ".join(f"{name} {figure(value)}" for name, value in (times | r.extra).items())
        console.print(f"{r.name}: {shown} ({r.note}, {r.rounds} rounds)", highlight=False)
    for name, content in contents.items():
        if content["left_out"]:
            console.print(f"left out {name}: {content['left_out']}")
    console.print(
        f"this machine copies {rates.bandwidth / 1e9:.1f} GB/s and multiplies "
        f"{rates.operations / 1e9:,.0f} GFLOP/s; floor: the share of our time that is unavoidable"
    )


def figure(value):
    """A number as people read it: thousands separated, three digits otherwise."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
