"""`minipeft bench`: how fast, against the libraries people use, on this machine, in one run.

Every figure is a ratio. Both sides start from the same weights and are shown to give the same
outputs first; then they run in turn, ours, theirs, ours, theirs, on one thread, and the ratio is
taken round by round, because a machine's speed drifts and a ratio of neighbours does not. Reported:
the median, the 20th and the 80th percentile over the rounds.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from minipeft.atomic import write_atomically
from minipeft.cross_entropy import cross_entropy, linear_cross_entropy
from minipeft.doctor import machine
from minipeft.gpt import GPT, GPTConfig
from minipeft.memory import PeakMemory
from minipeft.technique import technique_class, trainable_parameters

SHAPE = GPTConfig(vocab_size=4096, context_length=256, n_layer=6, n_head=6, d_model=384)
BATCH = 8


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


def seconds(action):
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def interleaved(name, peer, ours, theirs, rounds=7, unit="s", note="", extra=None):
    """Time two actions in turn; the ratio of each round, and its spread."""
    ours(), theirs()  # warm up: allocations, kernels' choices
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    ratios = sorted(a / b for a, b in pairs)
    low, high = ratios[round(0.2 * (rounds - 1))], ratios[round(0.8 * (rounds - 1))]
    mine, other = (statistics.median(side) for side in zip(*pairs))
    ratio = statistics.median(ratios)
    return Result(name, peer, unit, mine, other, ratio, low, high, rounds, note, extra or {})


def assert_close(ours, theirs, tolerance, what):
    """A comparison of speed means nothing unless both compute the same."""
    worst = float((ours - theirs).detach().abs().max())
    if worst > tolerance:
        raise RuntimeError(f"{what}: the two sides differ by {worst:.2e}, more than {tolerance:g}")


def twins(seed=0):
    """(our GPT, transformers' GPT-2) with the same weights."""
    from transformers import GPT2LMHeadModel

    torch.manual_seed(seed)
    model = GPT(SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peer = GPT2LMHeadModel.from_pretrained(folder)
    return model, peer.train()


def training_step(loss, parameters):
    """An action that does one step: forward, backward, clip-free AdamW, gradients cleared."""
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
    ids = tokens()
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()

    def their_loss():
        return cross_entropy(peer(input_ids=inputs).logits.flatten(0, 1), labels.flatten())

    def our_loss():
        return model.loss(inputs, labels)

    assert_close(our_loss(), their_loss(), 1e-4, name)
    ours = training_step(our_loss, trainable_parameters(model))
    theirs = training_step(their_loss, [p for p in peer.parameters() if p.requires_grad])
    count = sum(p.numel() for p in trainable_parameters(model))
    shape = f"{SHAPE.n_layer} layers, width {SHAPE.d_model}, batch {BATCH} x {SHAPE.context_length}"
    return interleaved(
        name, against, ours, theirs, rounds, note=f"{shape}, fp32", extra={"trained": count}
    )


def full_step(rounds=7):
    """Full fine-tuning: a step of ours against a step of transformers."""
    model, peer = twins()
    return [steps_against(model, peer, "full fine-tuning step", "transformers", rounds)]


def lora_step(rounds=7):
    """LoRA: rank 8 on q and v here, rank 8 on c_attn in peft; the same number of parameters."""
    from peft import LoraConfig, get_peft_model

    model, peer = twins()
    technique_class("LoRA")(rank=8, alpha=16).attach(model)
    peer = get_peft_model(
        peer, LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    return [steps_against(model, peer, "LoRA step", "transformers + peft", rounds)]


def decoding(rounds=7, new_tokens=200):
    """Greedy decoding at batch 1 and 8 against transformers' generate, token for token the same."""
    from minipeft.decoding import generate

    model, peer = twins()
    model.eval(), peer.eval()
    results = []
    for batch in (1, 8):
        ids = tokens(batch, 15)

        def ours(ids=ids):
            return generate(model, ids, max_new_tokens=new_tokens, temperature=0)

        def theirs(ids=ids):
            with torch.inference_mode():
                return peer.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=new_tokens,
                    do_sample=False,
                    pad_token_id=0,
                    eos_token_id=None,
                )

        if not torch.equal(ours(), theirs()):
            raise RuntimeError("greedy decoding: the two sides chose different tokens")
        r = interleaved(f"greedy decoding, batch {batch}", "transformers", ours, theirs, rounds)
        r.note = f"{new_tokens} tokens from 16, fp32"
        r.extra = {
            "our tokens/s": batch * new_tokens / r.ours,
            "their tokens/s": batch * new_tokens / r.theirs,
            "speed-up": r.theirs / r.ours,
        }
        results.append(r)
    return results


def chunked_cross_entropy(rounds=5, M=2048, V=50257, D=384):
    """The head and its loss, in chunks against all logits at once: time, and memory on top."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(M, D, generator=generator)
    weight = torch.randn(V, D, generator=generator) * 0.02
    labels = torch.randint(0, V, (M,), generator=generator)
    results = []
    for frozen in (False, True):
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)]

        def run(loss, inputs=inputs):
            for t in inputs:
                t.grad = None
            value = loss(*inputs, labels)
            value.backward()
            return value.detach()

        def whole(x, weight, labels):
            return cross_entropy(x @ weight.T, labels)

        def ours():
            return run(linear_cross_entropy)

        def theirs():
            return run(whole)

        assert_close(ours(), theirs(), 1e-4, "cross-entropy")
        memory = [extra_bytes(action, inputs) for action in (ours, theirs)]
        kind = "frozen head" if frozen else "trained head"
        r = interleaved(
            f"chunked cross-entropy, {kind}", "full logits in torch", ours, theirs, rounds
        )
        r.note = f"{M} tokens x {V} words x width {D}, fp32, forward and backward"
        r.extra = {
            "our extra MB": memory[0] / 1e6,
            "their extra MB": memory[1] / 1e6,
            "memory ratio": memory[0] / memory[1],
        }
        results.append(r)
    return results


def chunked_distillation(rounds=5, M=2048, V=50257, D=384, temperature=2.0, alpha=0.5):
    """Hinton's loss through two heads, in chunks against all logits of both: time, and memory."""
    from torch.nn import functional as F

    from minipeft.compressed.linear_distillation import linear_distillation_loss

    generator = torch.Generator().manual_seed(0)
    x, teacher_x = torch.randn(2, M, D, generator=generator)
    weight, teacher_weight = 0.02 * torch.randn(2, V, D, generator=generator)
    labels = torch.randint(0, V, (M,), generator=generator)
    inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]

    def whole(x, weight, teacher_x, teacher_weight, labels, temperature, alpha):
        s, t = x @ weight.T, teacher_x @ teacher_weight.T
        log_q, p = (s / temperature).log_softmax(-1), (t / temperature).softmax(-1)
        soft = temperature**2 * F.kl_div(log_q, p, reduction="batchmean")
        return alpha * soft + (1 - alpha) * F.cross_entropy(s, labels)

    def run(loss):
        for t in inputs:
            t.grad = None
        value = loss(*inputs, teacher_x, teacher_weight, labels, temperature, alpha)
        value.backward()
        return value.detach()

    def ours():
        return run(linear_distillation_loss)

    def theirs():
        return run(whole)

    assert_close(ours(), theirs(), 1e-4, "distillation")
    memory = [extra_bytes(action, inputs) for action in (ours, theirs)]
    peer = "full logits in torch"
    r = interleaved("chunked distillation", peer, ours, theirs, rounds)
    r.note = f"{M} tokens x {V} words x width {D} twice, fp32, forward and backward"
    r.extra = {
        "our extra MB": memory[0] / 1e6,
        "their extra MB": memory[1] / 1e6,
        "memory ratio": memory[0] / memory[1],
    }
    return [r]


def multi_lora(rounds=7, adapters=16, length=64):
    """A batch in which each row has its own LoRA, against peft's mixed batch; equal outputs."""
    from peft import PeftModel
    from transformers import GPT2LMHeadModel

    from minipeft.checkpoint import save_adapter
    from minipeft.low_rank.multi_lora import use_adapters

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=512, n_layer=2, n_head=12, d_model=768)).eval()
    ids = torch.randint(0, 512, (adapters, length))
    names = [f"a{n}" for n in range(adapters)]
    lora = technique_class("LoRA")(rank=8, targets=("q", "k", "v"), share_qkv=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        peer = GPT2LMHeadModel.from_pretrained(folder)
        for name in names:
            lora.attach(model, name)
            for parameter in model.attachments[-1].parameters().values():
                torch.nn.init.normal_(parameter, 0.0, 0.05)
            save_adapter(model, f"{folder}/{name}", name)
        peer = PeftModel.from_pretrained(peer, f"{folder}/{names[0]}", adapter_name=names[0])
        for name in names[1:]:
            peer.load_adapter(f"{folder}/{name}", adapter_name=name)
    peer.eval()

    def theirs():
        return peer(input_ids=ids, adapter_names=names).logits

    with torch.inference_mode(), use_adapters(model, rows=names):
        assert_close(model(ids), theirs(), 1e-3, "a LoRA a row")
        result = interleaved(
            "each row its own LoRA",
            "peft, mixed batch",
            lambda: model(ids),
            theirs,
            rounds,
            note=f"{adapters} adapters, {adapters} rows x {length} tokens, 2 layers, width 768",
        )
    return [result]


def adapter_drop(rounds=7):
    """AdapterDrop: the first n of 6 layers without adapters, against adapters everywhere."""
    from minipeft.additive.adapter_drop import AdapterDrop, measure_savings

    torch.manual_seed(0)
    ids = tokens()
    technique = AdapterDrop(bottleneck=64)
    savings = measure_savings(
        GPT(SHAPE), ids[:, :-1], ids[:, 1:].contiguous(), technique, (0, 3, 6), rounds
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


def pruning(rounds=7):
    """A forward pass of a model with half its heads and half its neurons out, and of one with half
    and nine tenths of its weights zero, each against the dense model.
    """
    from minipeft.compressed.magnitude_pruning import prune_magnitude
    from minipeft.compressed.structured_pruning import prune_heads, prune_neurons, widths

    torch.manual_seed(0)
    dense, ids = GPT(SHAPE).eval(), tokens()[:, :-1]
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
            r = interleaved(
                name, "the dense model", lambda m=model: m(ids), lambda: dense(ids), rounds
            )
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


def nf4(rounds=7, size=4096):
    """Quantising and dequantising a square matrix in blocks of 64 against bitsandbytes, the bytes,
    the constants and the restored weights shown equal.
    """
    from bitsandbytes import functional

    from minipeft.quantized.nf4 import dequantize_nf4, quantize_nf4

    weight = torch.randn(size, size, generator=torch.Generator().manual_seed(0))

    def theirs():
        return functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")

    quantized, (packed, state) = quantize_nf4(weight), theirs()
    if not torch.equal(quantized.packed, packed) or not torch.equal(quantized.absmax, state.absmax):
        raise RuntimeError("NF4: the two sides gave different codes or constants")
    restored = functional.dequantize_4bit(packed, state)
    assert_close(dequantize_nf4(quantized), restored, 0, "NF4")
    results = [
        interleaved("NF4 quantise", "bitsandbytes", lambda: quantize_nf4(weight), theirs, rounds),
        interleaved(
            "NF4 dequantise",
            "bitsandbytes",
            lambda: dequantize_nf4(quantized),
            lambda: functional.dequantize_4bit(packed, state),
            rounds,
        ),
    ]
    for result in results:
        result.note = f"{size} x {size}, blocks of 64, fp32"
    return results


BENCHMARKS = {
    "full": full_step,
    "lora": lora_step,
    "decoding": decoding,
    "cross-entropy": chunked_cross_entropy,
    "nf4": nf4,
    "distillation": chunked_distillation,
    "multi-lora": multi_lora,
    "adapter-drop": adapter_drop,
    "pruning": pruning,
}


def bench(names=None, rounds=7, folder=None, console=None):
    """Run the named benchmarks (all for None), print the table, write it to `folder` as JSON.

    Raises ValueError for an unknown name. A benchmark whose peer is not installed is left out, and
    the results file says so.
    """
    console = console or Console()
    for name in names or ():
        if name not in BENCHMARKS:
            raise ValueError(f"no benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    results, left_out = [], []
    try:
        for name in names or BENCHMARKS:
            try:
                results += BENCHMARKS[name](rounds=rounds)
            except ImportError as missing:
                left_out.append(f"{name}: {missing.name} is not installed")
                console.print(f"left out {left_out[-1]}")
    finally:
        torch.set_num_threads(threads)
    show(results, console)
    content = {
        "date": date.today().isoformat(),
        "machine": machine() | {"threads": 1},
        "left_out": left_out,
        "results": [asdict(r) for r in results],
    }
    if folder is not None:
        name = "all" if not names else "-".join(names)
        path = Path(folder) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())
        console.print(f"written to {path}")
    return content


def show(results, console):
    """The ratios as a table that fits 80 columns, and a line of figures for each."""
    table = Table("what", "against", "ratio", "p20 .. p80", box=box.SIMPLE)
    for r in results:
        spread = f"{r.low:.3f} .. {r.high:.3f}"
        table.add_row(r.name, r.peer, f"{r.ratio:.3f}", spread)
    console.print(table)
    for r in results:
        figures = {"ours ms": 1000 * r.ours, "theirs ms": 1000 * r.theirs} | r.extra
        shown = ", ".join(f"{name} {figure(value)}" for name, value in figures.items())
        console.print(f"{r.name}: {shown} ({r.note}, {r.rounds} rounds)", highlight=False)


def figure(value):
    """A number as people read it: thousands separated, three digits otherwise."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
