r"""Two comparisons of quantised models, for `minipeft quantize --format all` and `--format sizes`.

`compare_formats`: every format on one model, at several block and group sizes: bits a weight, error
of the weights, loss, and drift: how far the distributions of the next token move from the float
model's, KL(float || quantised) summed over a document. The loss may fall by luck, the drift cannot,
so it tells formats apart whose losses differ by noise. A format without its bits is no result: NF4
in blocks of 64 and Q4_0 both take 4.5 bits, and at equal bits (one float32 constant a block of NF4,
two float16 of affine int4) the better one depends on the block.

`compare_sizes`: models of several widths, trained alike, each in float16 and in few bits: at equal
bytes, is it the larger one in four bits or the smaller one in sixteen?

Results go to formats.json and sizes.json with machine and versions; the tables and pictures are
made from these files (`publish`) and can be made again without computing.
"""

from __future__ import annotations

import copy
import json
from datetime import date
from pathlib import Path

import torch

from minipeft import figures, wrap
from minipeft.atomic import write_atomically
from minipeft.dataset import Example, encode_all
from minipeft.doctor import machine
from minipeft.evaluation import nats
from minipeft.gpt import GPT, GPTConfig
from minipeft.quantize import (
    Settings,
    calibration_batches,
    projections,
    quantize,
    quantize_and_measure,
    texts,
)
from minipeft.quantized.ggml import affine
from minipeft.quantized.gptq import GroupQuantized
from minipeft.quantized.int8 import Int8Linear
from minipeft.quantized.qat import QAT
from minipeft.technique import merge
from minipeft.training import TrainingConfig, train

BLOCKS = (16, 32, 64, 128)
QAT_STEPS = 300
SIZE_STEPS = 1000
WIDTHS = (32, 64, 96, 128)  # 4 heads, 4 layers each; groups of 32 divide them
SCHEMES = {  # of compare_sizes: name -> how the projections are stored
    "float16": None,
    "GPTQ, 4 bits in groups of 32": ("gptq", 4),
    "GPTQ, 3 bits in groups of 32": ("gptq", 3),
}


# -- formats


def settings_to_compare():
    """{(family, name): Settings}, a family being one format at several sizes."""
    found = {}
    for kind, label in (("nf4", "NF4"), ("fp4", "FP4"), ("int4", "Int4")):
        for block in BLOCKS:
            found[label, f"{label}, blocks of {block}"] = Settings(kind, block_size=block)
        double = f"{label} double-quantised"
        if kind == "nf4":
            found[double, f"{double}, blocks of 64"] = Settings("nf4-double")
    for kind in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"):
        found["ggml", kind.upper()] = Settings(kind)
    found["int8", "int8, absmax"] = Settings("int8")
    found["int8 with zero-point", "int8, zero-point"] = Settings("int8-zero-point")
    for format, label in (("rtn", "round to nearest"), ("gptq", "GPTQ")):
        for bits in (2, 3, 4):
            for group in (None, 32):
                size = "a grid a row" if group is None else f"groups of {group}"
                family = f"{label}, {size}"
                found[family, f"{label}, {bits} bits, {size}"] = Settings(format, bits, group)
    return found


def compare_formats(model, tokenizer, calibration, test, folder, steps=None):
    """Measure every format on `model`; writes formats.json, the table and the picture."""
    loss = nats(model, test, tokenizer)
    batches = calibration_batches(test, tokenizer, model)
    rows = [row("float32", "float32", 32.0, 0.0, loss, 0.0)]
    for (family, name), settings in settings_to_compare().items():
        small, found = quantize_and_measure(model, tokenizer, settings, calibration, test, loss)
        moved = drift(model, small, batches)
        rows.append(row(family, name, found.bits, found.error, found.loss_after, moved))
    rows += affine_rows(model, tokenizer, test)
    rows.append(vector_wise_row(model, tokenizer, test))
    for bits in (2, 3, 4):
        rows.append(qat_row(model, tokenizer, bits, calibration_many(calibration), test, steps))
    facts = {"texts": len(test), "calibration": len(calibration), "qat_steps": steps or QAT_STEPS}
    write(Path(folder) / "formats.json", {"rows": rows} | facts)
    publish(folder)


def row(family, name, bits, error, loss, moved):
    """One line of results: bits a weight, relative error of the weights, loss and drift in nats a
    document.
    """
    values = {"bits": bits, "error": error, "nats": loss, "drift": moved}
    return {"family": family, "name": name} | values


@torch.no_grad()
def drift(model, small, batches):
    """KL(model || small) in nats a document: the sum over its tokens, the mean over documents."""
    total = 0.0
    for batch in batches:
        p, q = (m(batch.ids).log_softmax(-1) for m in (model, small))
        real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
        total += (p.exp() * (p - q)).sum(-1)[real].double().sum().item()
    return total / sum(len(batch.ids) for batch in batches)


def both(model, small, tokenizer, test):
    """Loss and drift of a quantised copy."""
    moved = drift(model, small, calibration_batches(test, tokenizer, model))
    return nats(small, test, tokenizer), moved


def affine_rows(model, tokenizer, test):
    """Affine int4 as Q4_1 has it, in blocks of several sizes."""
    rows = []
    for block in BLOCKS:
        small, squares = copy.deepcopy(model), [0.0, 0.0]
        for path in projections(small):
            weight = wrap.resolve(small, path).weight
            restored, bits = affine(weight.detach(), 4, block)
            squares[0] += (restored - weight.detach()).double().square().sum().item()
            squares[1] += weight.detach().double().square().sum().item()
            weight.data.copy_(restored)
        name, error = f"affine int4, blocks of {block}", (squares[0] / squares[1]) ** 0.5
        rows.append(row("affine int4", name, bits, error, *both(model, small, tokenizer, test)))
    return rows


def vector_wise_row(model, tokenizer, test):
    """LLM.int8(): inputs in eight bits, too."""
    small = copy.deepcopy(model)
    for path in projections(small):
        parent, name = wrap.locate(small, path)
        setattr(parent, name, Int8Linear(getattr(parent, name)))
    stored = [wrap.resolve(small, path).quantized for path in projections(small)]
    bits = 8 * sum(q.nbytes for q in stored) / sum(q.codes.numel() for q in stored)
    label = "int8 weights and inputs"
    return row(label, label, bits, None, *both(model, small, tokenizer, test))


def calibration_many(calibration):
    """What quantisation-aware training learns from: more of what GPTQ saw, or the user's text."""
    from minipeft.town import pretraining_documents

    learned = pretraining_documents(count=8 * QAT_STEPS)
    known = {x.completion for x in calibration}
    ours = known <= set(learned)
    return [Example(completion=t) for t in learned] if ours else list(calibration)


def qat_row(model, tokenizer, bits, examples, test, steps):
    """Symmetric grids a row with learned steps, trained for a few steps."""
    small = copy.deepcopy(model)
    torch.manual_seed(0)
    QAT(bits).attach(small)
    config = TrainingConfig(
        steps=steps or QAT_STEPS, batch_size=16, learning_rate=QAT.learning_rate, device="cpu"
    )
    train(small, encode_all(examples, tokenizer, small), config, show=False)
    merge(small)
    widths = [wrap.resolve(small, path).weight.shape for path in projections(small)]
    grids = sum(out for out, _ in widths) / sum(out * into for out, into in widths)
    name = f"QAT, {bits} bits, a grid a row"
    found = both(model, small, tokenizer, test)
    return row("QAT, a grid a row", name, bits + 16 * grids, None, *found)


# -- sizes


def compare_sizes(folder, steps=SIZE_STEPS, widths=WIDTHS):
    """Train a model of every width alike and store each in every scheme; writes sizes.json, the
    table and the picture. About a minute a model and 1,000 steps on one core.
    """
    from minipeft.town import pretraining_documents
    from minipeft.town.base import train_tokenizer

    documents = pretraining_documents()
    tokenizer = train_tokenizer(documents)
    calibration, test = texts(None, None)
    data = encode_all([Example(completion=t) for t in documents], tokenizer)
    rows = []
    for width in widths:
        model = trained(width, data, tokenizer.vocab_size, steps)
        for scheme, choice in SCHEMES.items():
            rows.append(size_row(model, tokenizer, scheme, choice, calibration, test))
    write(Path(folder) / "sizes.json", {"rows": rows, "steps": steps, "texts": len(test)})
    publish(folder)


def trained(width, data, vocab_size, steps):
    """A model of this width after the base's recipe, with fewer steps."""
    from minipeft.town.base import recipe, sinusoids

    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=vocab_size, d_model=width))
    with torch.no_grad():  # as the base starts
        model.embed.token.weight.normal_(0, 0.04)
        model.embed.position.weight.copy_(0.05 * sinusoids(*model.embed.position.weight.shape))
    train(model, data, recipe(steps), show=False)
    return model.eval()


def size_row(model, tokenizer, scheme, choice, calibration, test):
    """Bytes and loss of a model stored in a scheme; what is not quantised counts as float16."""
    small = copy.deepcopy(model)
    for parameter in small.parameters():
        parameter.data = parameter.data.half().float()
    bytes_stored = 2 * sum(p.numel() for p in small.parameters())
    if choice is not None:
        settings = Settings(choice[0], choice[1], 32 if choice[1] < 16 else None)
        batches = calibration_batches(calibration, tokenizer, small)
        done = quantize(small, settings, batches)
        assert all(isinstance(q, GroupQuantized) for q in done.values())
        bytes_stored += sum(q.nbytes - 2 * q.shape[0] * q.shape[1] for q in done.values())
    loss = nats(small, test, tokenizer)
    return {
        "width": model.config.d_model,
        "scheme": scheme,
        "bytes": bytes_stored,
        "nats": loss,
    }


# -- tables and pictures


def write(path, results):
    """Results as JSON, with the machine and the date."""
    content = {"date": str(date.today()), "machine": machine()} | results
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def publish(folder):
    """Make README.md and the pictures from the results files that are in `folder`."""
    folder, parts = Path(folder), []
    if (folder / "formats.json").exists():
        parts.append(publish_formats(folder, json.loads((folder / "formats.json").read_text())))
    if (folder / "sizes.json").exists():
        parts.append(publish_sizes(folder, json.loads((folder / "sizes.json").read_text())))
    write_atomically(folder / "README.md", "\n".join(parts).encode())


def publish_formats(folder, results):
    """The table of formats, sorted by bits; draws formats.png."""
    base, *rows = results["rows"]
    curves = {}
    for r in sorted(rows, key=lambda r: r["bits"]):
        curves.setdefault(r["family"], []).append((r["bits"], max(r["drift"], 1e-7)))
    title = "What fewer bits cost"
    axes = (
        "bits a quantised weight, constants included",
        "drift from the float model, nats a document",
    )
    _, alt = figures.families(
        folder / "formats.png", curves, {}, title, *axes, True, (2, 3, 4, 5, 6, 8)
    )
    lines = [f"# {title}", "", f"![{alt}](formats.png)", ""]
    lines += [
        f"Mean over {results['texts']} held-out documents; {base['nats']:.3f} nats in float32. "
        f"GPTQ saw {results['calibration']} documents, QAT trained {results['qat_steps']} steps, "
        "so it drifts by learning, too. Drift: KL(float || quantised). Losses "
        "that differ by 0.01 differ by luck.",
        "",
        "| format | bits a weight | error of the weights | drift, nats | loss, nats more |",
        "|---|---:|---:|---:|---:|",
    ]
    for r in sorted(rows, key=lambda r: (r["bits"], r["drift"])):
        error = "-" if r["error"] is None else f"{100 * r['error']:.2f} %"
        loss, drift = r["nats"] - base["nats"], f"{r['drift']:.2g}"
        lines.append(f"| {r['name']} | {r['bits']:.3f} | {error} | {drift} | {loss:.4f} |")
    return "\n".join(lines) + "\n"


def publish_sizes(folder, results):
    """The table of widths; draws sizes.png."""
    curves = {}
    for r in sorted(results["rows"], key=lambda r: r["bytes"]):
        curves.setdefault(r["scheme"], []).append((r["bytes"], r["nats"]))
    title = "Larger in few bits, or smaller in many"
    axes = "bytes of the whole model", "nats a document"
    _, alt = figures.families(folder / "sizes.png", curves, {}, title, *axes)
    lines = [f"# {title}", "", f"![{alt}](sizes.png)", ""]
    lines += [
        f"Each model trained {results['steps']:,} steps alike, 4 layers; everything that is not a "
        "projection is float16.",
        "",
        "| width | stored as | bytes | nats a document |",
        "|---|---|---|---|",
    ]
    for r in sorted(results["rows"], key=lambda r: r["bytes"]):
        lines.append(f"| {r['width']} | {r['scheme']} | {r['bytes']:,} | {r['nats']:.3f} |")
    return "\n".join(lines) + "\n"
