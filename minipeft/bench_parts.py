"""Benchmarks of the parts: every technique's training step, and every twin against its definition.

A technique's step is timed against full fine-tuning of the same model and, where peft opens the
adapter we write, against peft's step on the same weights, their losses shown equal first. A twin is
timed against its definition at sizes one meets in practice, and against the floor: the bytes it
must move, the operations it must do. Twins that cannot run on this device are left out; `minipeft
doctor` says why.
"""

from __future__ import annotations

import copy
import tempfile

import torch
from torch import nn

from minipeft import bench, dispatch, roofline
from minipeft.checkpoint import save_adapter
from minipeft.dispatch import forced
from minipeft.gpt import GPT
from minipeft.technique import trainable_parameters

BATCH = 2  # of sequences in a technique's step: there are many techniques
PROMPTS = ("prompt", "prefix flat")  # peft opens these for inference only, and has to be told
IN_PEFT = ("LoRA", "AdaLoRA", "IA3", *PROMPTS)  # presets whose files peft trains on


def techniques(rounds=7, device="cpu"):
    """A training step of every preset of the comparison against full fine-tuning."""
    from minipeft.presets import PRESETS

    whole = step_of(None, device)
    results = []
    for name, preset in PRESETS.items():
        if name == "full":  # against itself
            continue
        model, step, loss = step_of(preset.technique, device)
        work = roofline.operations(lambda loss=loss: loss().backward())
        facts = {"note": bench.step_note(BATCH), "operations": work}
        facts["extra"] = {"trained": sum(p.numel() for p in trainable_parameters(model))}
        title = f"{name}, step"
        results.append(
            bench.interleaved(title, "full fine-tuning", step, whole[1], rounds, device, **facts)
        )
    return results


def step_of(technique, device):
    """(model, an action that does one training step, its loss); None is full fine-tuning."""
    torch.manual_seed(0)
    model = GPT(bench.SHAPE).to(device)
    if technique is not None:
        technique.attach(model)
    ids = bench.tokens(BATCH, room(model)).to(device)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()

    def loss():
        return model.loss(inputs, labels)

    return model, bench.training_step(loss, trainable_parameters(model)), loss


def room(model):
    """The longest text that fits, a multiple of 8, behind virtual tokens in front of it."""
    return (bench.SHAPE.context_length - model.embed.position_shift) // 8 * 8


def against_peft(rounds=7, device="cpu"):
    """Our step against peft's, of each technique whose file we write and peft trains on from."""
    return [step_against_peft(name, rounds, device) for name in IN_PEFT]


def step_against_peft(name, rounds, device):
    """One of them; the first losses are shown equal. Where peft has one tensor for q, k and v and
    we three, it also trains what is zero (LoRA, AdaLoRA) or one (IA3) in our file.
    """
    from peft import PeftModel

    from minipeft.presets import PRESETS

    model, peer = bench.twins(device)
    PRESETS[name].technique.attach(model)
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, folder)
        peer = PeftModel.from_pretrained(peer, folder, is_trainable=name not in PROMPTS).to(device)
    if name in PROMPTS:
        peer.prompt_encoder.requires_grad_(True)
    ids = bench.tokens(BATCH, room(model)).to(device)
    inputs, labels = ids[:, :-1], ids[:, 1:].contiguous()

    def their_loss():
        logits = peer(input_ids=inputs).logits[:, -inputs.shape[1] :]  # some keep virtual tokens
        return bench.cross_entropy(logits.flatten(0, 1), labels.flatten())

    def our_loss():
        return model.loss(inputs, labels)

    trained = [p for p in peer.parameters() if p.requires_grad]
    bench.assert_close(our_loss(), their_loss(), 1e-3, name)
    ours = bench.training_step(our_loss, trainable_parameters(model))
    theirs = bench.training_step(their_loss, trained)
    sides, title = (ours, theirs), f"{name}, step from our file"
    counts = (sum(p.numel() for p in ps) for ps in (trainable_parameters(model), trained))
    facts = {"note": bench.step_note(BATCH), "extra": dict(zip(("trained", "by peft"), counts))}
    return bench.interleaved(title, "transformers + peft", *sides, rounds, device, **facts)


# -- twins


def twins(rounds=7, device="cpu"):
    """Every twin that can run here against its definition, at the sizes of `SIZES`."""
    results = []
    for twin in dispatch.every_twin():
        name = twin.definition.__name__
        if device not in twin.devices:
            continue
        torch.manual_seed(0)
        args, note, work = SIZES[twin.definition.__module__, name](device)
        if twin.refusal(args, {}, "on"):
            continue
        sides = [once(f, args) for f in (twin.loaded, twin.definition)]
        title = f"{name} by {twin.module.rpartition('.')[2]}"
        results.append(
            bench.interleaved(title, "its definition", *sides, rounds, device, note=note, **work)
        )
    return results


def once(function, args):
    """An action that calls the function; forward and backward where a tensor wants gradients. What
    a function writes to is a copy of its own, written to again and again.
    """
    args = copy.deepcopy(args)
    wanted = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]

    def action():
        with forced("off"):  # a definition in the definition stays one
            result = function(*args)
            if wanted:
                result.backward(torch.ones_like(result))
                for tensor in wanted:
                    tensor.grad = None

    return action


def draw(*shape, device, grad=False):
    return torch.randn(*shape, device=device).requires_grad_(grad)


def lora_linear(device, M=2048, D=768, r=8):
    x, A, B = (draw(*s, device=device, grad=True) for s in ((M, D), (r, D), (D, r)))
    work = {"operations": 4 * M * D * D + 12 * M * D * r}
    args = (x, draw(D, D, device=device), draw(D, device=device), A, B, 2.0)
    return args, f"{M} x {D} x {D}, rank {r}, forward and backward", work


def feed_forward(device, M=2048, D=384):
    up, down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
    up.requires_grad_(False), down.requires_grad_(False)
    args = (draw(M, D, device=device, grad=True), up.to(device), down.to(device))
    note = f"{M} tokens, {D} to {4 * D} and back, frozen, forward and backward"
    return args, note, {"operations": 32 * M * D * D}


def causal_attention(device, B=8, H=6, T=256, d=64):
    q, k, v = (draw(B, T, H, d, device=device).transpose(1, 2) for _ in range(3))
    args = tuple(t.requires_grad_() for t in (q, k, v))
    note = f"{B} rows, {H} heads of width {d}, {T} tokens, forward and backward"
    return args, note, {"operations": 6 * B * H * T * T * d}


def next_token_logits(device):
    from minipeft.decoding import Cache

    model = GPT(bench.SHAPE).to(device).eval()
    model.requires_grad_(False)
    ids = bench.tokens(1, 16).to(device)
    cache = Cache(model, 1, bench.SHAPE.context_length, 99)
    with torch.no_grad():
        model.features(ids, 0, cache)
    cache.advance = lambda T: None  # each call reads the same position again
    weights = sum(p.numel() for p in model.parameters()) - model.embed.position.weight.numel()
    note = f"{bench.SHAPE.n_layer} layers, width {bench.SHAPE.d_model}, one row behind 17 tokens"
    return (ids[:, :1], model, cache.length, cache), note, {"bytes_moved": 4 * weights}


def quantize_blocks(device, n=2**22):
    return (draw(n, device=device), "nf4", 64), f"{n:,} weights", {"bytes_moved": 4.5625 * n}


def dequantize_blocks(device, n=2**22):
    packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=device)
    args = (packed, draw(n // 64, device=device).abs(), n, 64, "nf4", torch.float32)
    return args, f"{n:,} weights", {"bytes_moved": 4.5625 * n}


def dequantize_doubled(device, n=2**22):
    packed = torch.randint(0, 256, (n // 2,), dtype=torch.uint8, device=device)
    codes = torch.randint(0, 256, (n // 64,), dtype=torch.uint8, device=device)
    constants = draw(n // 2**14, device=device).abs(), torch.zeros((), device=device)
    args = (packed, codes, *constants, n, 64, "nf4", torch.float32)
    return args, f"{n:,} weights", {"bytes_moved": (4.5 + 1 / 64 + 4 / 2**14) * n}


def frozen_product(device, D=2048):
    from minipeft.quantized.nf4 import quantize_nf4

    quantized = quantize_nf4(draw(D, D, device=device))
    return (draw(1, D, device=device), quantized, None), f"1 x {D} x {D}", {
        "bytes_moved": 0.5625 * D * D
    }  # fmt: skip


def averages(device, matrices=72, D=64):
    shapes = [(D, 12), (12,), (12, D)] * matrices
    lists = [[draw(*s, device=device) for s in shapes] for _ in range(4)]
    count = sum(t.numel() for t in lists[0])
    return (*lists, 0.85, 0.85), f"{matrices} matrices of {D} x {D}", {"bytes_moved": 24 * count}


def cross_entropy_rows(device, M=256, V=50257):
    z, labels = draw(M, V, device=device), torch.randint(0, V, (M,), device=device)
    return (z, labels), f"{M} rows of {V:,}", {"bytes_moved": 8 * M * V}


def distillation_rows(device, M=128, V=50257):
    s, t = draw(2, M, V, device=device)
    args = (s, t, torch.randint(0, V, (M,), device=device), 2.0, 0.5)
    return args, f"{M} rows of {V:,}", {"bytes_moved": 12 * M * V}


def adamw_8bit_step(device, n=2**22):
    codes = [torch.randint(0, 256, (n,), dtype=torch.uint8, device=device) for _ in range(2)]
    absmax = [torch.full((n // 256,), 1e-3, device=device) for _ in range(2)]
    moments = (codes[0], absmax[0], codes[1], absmax[1])
    args = (draw(n, device=device), draw(n, device=device), *moments)
    args += (10, 1e-4, (0.9, 0.999), 1e-8, 0.01)
    return args, f"{n:,} weights", {"bytes_moved": 16.06 * n}


def rescale(device, M=2048, N=3072):
    args = (draw(M, N, device=device, grad=True), draw(N, device=device, grad=True))
    return args, f"{M} x {N}, forward and backward", {"bytes_moved": 20 * M * N}


def add_bottleneck(device, M=2048, D=768, m=64):
    f, x = (draw(M, D, device=device, grad=True) for _ in range(2))
    weights = [draw(*s, device=device, grad=True) for s in ((m, D), (m,), (D, m), (D,))]
    work = {"bytes_moved": 4 * 7 * M * D, "operations": 12 * M * D * m}
    return (f, x, *weights), f"{M} x {D}, bottleneck {m}, forward and backward", work


def prefix_attention(device, B=8, H=12, T=256, d=64, p=32):
    q, k, v = (draw(B, H, T, d, device=device) for _ in range(3))
    work = {"operations": 2 * B * H * T * (T + 2 * p) * d, "bytes_moved": 16 * B * H * T * d}
    args = (q, k, v, draw(2, B, H, p, d, device=device))
    return args, f"{B} rows, {H} heads, {T} tokens behind {p}", work


def rows_branches(device, rows=16, T=64, D=768, r=8):
    h, x = (draw(rows, T, D, device=device) for _ in range(2))
    h.requires_grad_(False)
    As = [draw(r, D, device=device) for _ in range(rows)]
    Bs = [0.01 * draw(D, r, device=device) for _ in range(rows)]
    args = (h, x, As, Bs, [2.0] * rows)
    work = {"bytes_moved": 12 * rows * T * D, "operations": 4 * rows * T * D * r}
    return args, f"{rows} rows of {T} x {D}, rank {r}", work


def pack_2_4(device, D=2048):
    weight = draw(D, D // 4, 4, device=device)
    weight[..., :2] = 0
    return (weight.view(D, D),), f"{D} x {D}", {"bytes_moved": 6.5 * D * D}


def unpack_2_4(device, D=2048):
    indices = torch.full((D, D // 8), 0b11100100, dtype=torch.uint8, device=device)
    args = (draw(D, D // 2, device=device), indices)
    return args, f"{D} x {D}", {"bytes_moved": 6.125 * D * D}


SIZES = {  # (module, definition) -> a function (device) -> (arguments, note, bytes and operations)
    ("minipeft.low_rank.lora", "lora_linear"): lora_linear,
    ("minipeft.gpt", "feed_forward"): feed_forward,
    ("minipeft.gpt", "attention"): causal_attention,
    ("minipeft.decoding", "next_token_logits"): next_token_logits,
    ("minipeft.quantized.nf4", "quantize_blocks"): quantize_blocks,
    ("minipeft.quantized.nf4", "dequantize_blocks"): dequantize_blocks,
    ("minipeft.quantized.nf4", "dequantize_doubled"): dequantize_doubled,
    ("minipeft.quantized.nf4_linear", "frozen_product"): frozen_product,
    ("minipeft.low_rank.rank_allocator", "averages"): averages,
    ("minipeft.cross_entropy", "rows_loss_and_gradient"): cross_entropy_rows,
    ("minipeft.compressed.linear_distillation", "rows_loss_and_gradient"): distillation_rows,
    ("minipeft.quantized.adamw_8bit", "adamw_8bit_step"): adamw_8bit_step,
    ("minipeft.additive.ia3", "rescale"): rescale,
    ("minipeft.additive.bottleneck", "add_bottleneck"): add_bottleneck,
    ("minipeft.soft_prompt.prefix_attention", "prefix_attention"): prefix_attention,
    ("minipeft.low_rank.multi_lora", "rows_branches"): rows_branches,
    ("minipeft.compressed.semi_structured", "pack_2_4"): pack_2_4,
    ("minipeft.compressed.semi_structured", "unpack_2_4"): unpack_2_4,
}
