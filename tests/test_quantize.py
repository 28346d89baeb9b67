"""The specification of minipeft/quantize.py and minipeft/quantize_study.py."""

import copy
import json
import math

import pytest
import torch

from minipeft import LoRA, cli, prune_heads, prune_neurons, quantize_study, wrap
from minipeft.dataset import Example
from minipeft.gpt import GPTConfig
from minipeft.interop import bitsandbytes
from minipeft.interop.gguf import load_gguf
from minipeft.quantize import (
    FORMATS,
    Settings,
    calibration_batches,
    projections,
    quantize,
    quantize_and_measure,
    restore,
    store,
)
from minipeft.quantize_study import publish, settings_to_compare
from minipeft.quantized.qat import QAT
from minipeft.quantized.qlora import quantize_model
from minipeft.tokenizer import Tokenizer
from tests.tiny import CONFIG, tiny_ids, tiny_model

TEXTS = [Example(completion=t) for t in ("ab cd", "bead", "a", "cab dab", "dad", "faded cafe")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([b]): b for b in range(256)})


@pytest.fixture(scope="module")
def base(tokenizer):
    config = GPTConfig(tokenizer.vocab_size, 64, 2, 4, 32)
    return tiny_model(config, torch.float32)


def settings_of(format):
    return Settings(format, bits=3, group_size=16, block_size=32)


@pytest.mark.parametrize("format", FORMATS)
def test_a_report_counts_what_is_stored(base, tokenizer, format):
    """(Quantise 1) (Quantise 2)"""
    before = {n: p.clone() for n, p in base.named_parameters()}
    small, report = quantize_and_measure(base, tokenizer, settings_of(format), TEXTS, TEXTS)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    weights = {n: p for n, p in before.items() if n.removesuffix(".weight") in projections(base)}
    assert len(weights) == 12
    done = dict(small.named_parameters())
    assert all(torch.equal(done[n], before[n]) for n in before if n not in weights)
    squares = sum((done[n] - w).double().square().sum().item() for n, w in weights.items())
    whole = sum(w.double().square().sum().item() for w in weights.values())
    assert report.error == pytest.approx(math.sqrt(squares / whole), rel=1e-9)
    assert 0 < report.error < 0.4
    count = sum(w.numel() for w in weights.values())
    everything = 4 * sum(p.numel() for p in base.parameters())
    assert report.bytes_before == everything
    assert report.bytes_after == everything - 4 * count + round(report.bits * count / 8)
    assert report.loss_after != report.loss_before


EXPECTED_BITS = {
    "int8": 8 + 32 * 288 / (2 * 12 * 1024),  # 288 rows in a block of 12 D^2 weights
    "q4_0": 4.5,
    "q5_1": 6.0,
    "nf4": 4 + 32 / 32 + 0,
    "rtn": 3 + 19 / 16,
    "gptq": 3 + 19 / 16,
}


@pytest.mark.parametrize("format", ["q4_0", "q5_1", "nf4", "rtn", "gptq"])
def test_bits_of_a_model_are_those_of_its_format(base, tokenizer, format):
    _, report = quantize_and_measure(base, tokenizer, settings_of(format), TEXTS, TEXTS)
    assert report.bits == pytest.approx(EXPECTED_BITS[format], rel=1e-12)


def test_what_is_put_in_place_is_what_is_returned(base):
    for format in ("nf4-double", "q4_1", "rtn", "int8-zero-point"):
        small = copy.deepcopy(base)
        for path, quantized in quantize(small, settings_of(format)).items():
            assert torch.equal(small.get_submodule(path).weight, restore(quantized))


@pytest.mark.parametrize("format", FORMATS)
def test_a_layer_that_lost_everything_is_left_out(base, tokenizer, format):
    pruned = prune_neurons(prune_heads(copy.deepcopy(base), {0: range(4)}), {1: range(128)})
    small, report = quantize_and_measure(pruned, tokenizer, settings_of(format), TEXTS, TEXTS)
    whole = [p for p in projections(pruned) if wrap.resolve(pruned, p).weight.numel()]
    assert len(whole) == 6
    changed = [p for p in whole if (wrap.resolve(small, p).weight != weight_of(pruned, p)).any()]
    assert changed == whole and 0 < report.error < 0.4


def weight_of(model, path):
    return wrap.resolve(model, path).weight


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("made", [quantize_model, LoRA(rank=2).attach, QAT().attach])
def test_what_is_no_plain_layer_is_refused(base, tokenizer, made, format):
    """Four bits' weights are made anew at each reading: to write to them changes nothing."""
    model = made(copy.deepcopy(base))
    text = calibration_batches(TEXTS, tokenizer, model)
    with pytest.raises(ValueError, match=r"attn\.q is a .*, not a plain linear layer"):
        quantize(model, settings_of(format), text)


def test_gptq_reads_the_text_and_beats_round_to_nearest_on_it(base, tokenizer):
    losses, before = {}, base(tiny_ids(vocab=257))
    batches = calibration_batches(TEXTS, tokenizer, base)
    ids, lengths = batches[0].ids, batches[0].lengths
    for format in ("rtn", "gptq"):
        small = copy.deepcopy(base)
        quantize(small, Settings(format, bits=3), batches)
        moved = (small(ids) - base(ids)).square().mean(2)
        losses[format] = moved[torch.arange(ids.shape[1]) < lengths[:, None]].mean()
    assert losses["gptq"] < losses["rtn"] and before.shape[2] == 257


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings("nf5"), "nf5"),
        (Settings("rtn", bits=1), "bits=1"),
        (Settings("rtn", group_size=7), "group_size=7"),
        (Settings("nf4", block_size=3), "block_size=3"),
        (Settings("gptq"), "text"),
    ],
)
def test_bad_settings_are_named(base, settings, words):
    with pytest.raises(ValueError, match=words):
        quantize(copy.deepcopy(base), settings)


# -- files


def test_a_ggml_model_is_stored_as_gguf(base, tokenizer, tmp_path):
    path = store(base, tokenizer, Settings("q5_0"), tmp_path / "m")
    small = copy.deepcopy(base)
    quantize(small, Settings("q5_0"))
    assert torch.equal(load_gguf(path)(tiny_ids()), small(tiny_ids()))
    assert Tokenizer.load(tmp_path / "m").vocab_size == 257


@pytest.mark.parametrize("format", ["nf4", "nf4-double"])
def test_an_nf4_model_is_stored_under_bitsandbytes_keys(base, tokenizer, tmp_path, format):
    small = copy.deepcopy(base)
    quantize(small, Settings(format, block_size=32))
    folder = store(base, tokenizer, Settings(format, block_size=32), tmp_path / "m")
    assert torch.equal(bitsandbytes.load_model(folder)(tiny_ids()), small(tiny_ids()))


def test_a_format_without_a_file_says_so_and_writes_nothing(base, tokenizer, tmp_path):
    with pytest.raises(ValueError, match="gptq has no file"):
        store(base, tokenizer, Settings("gptq"), tmp_path / "m")
    assert not (tmp_path / "m").exists()


# -- the command


@pytest.fixture
def folder(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n".join(x.completion for x in TEXTS) + "\n")
    return tmp_path


def run(capsys, folder, *more):
    common = ["--base", str(folder / "base"), "--data", str(folder / "text.txt")]
    status = cli.main(["quantize", *common, *more])
    return status, *capsys.readouterr()


def test_the_command_prints_size_error_and_loss(capsys, folder):
    more = ["--format", "q8_0", "--out", str(folder / "out")]
    status, out, _ = run(capsys, folder, *more)
    assert status == 0 and "8.500 bits" in out
    for word in ("size", "error", "loss", "nats a document"):
        assert word in out
    assert (folder / "out" / "model.gguf").exists()


def test_gptq_from_the_command(capsys, folder):
    more = ["--format", "gptq", "--bits", "3", "--group-size", "8", "--act-order", "True"]
    status, out, _ = run(capsys, folder, *more)
    assert status == 0 and "gptq: " in out


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--format", "q3"], "q3"),
        (["--format", "rtn", "--bits", "12"], "bits=12"),
        (["--format", "int8", "--out", "x"], "no file format"),
    ],
)
def test_bad_input_is_answered_in_one_line(capsys, folder, more, words, monkeypatch):
    monkeypatch.chdir(folder)
    status, _, err = run(capsys, folder, *more)
    assert status == 1 and words in err and "Traceback" not in err
    assert not (folder / "x").exists()


# -- the comparisons


def test_every_format_is_compared_and_names_differ():
    listed = settings_to_compare()
    assert {s.format for s in listed.values()} == set(FORMATS)
    names = [name for _, name in listed]
    assert len(set(names)) == len(names)


def test_the_comparison_of_formats_is_written_and_published(base, tokenizer, tmp_path, monkeypatch):
    kept = {k: v for k, v in settings_to_compare().items() if v.format in ("nf4", "rtn", "q4_0")}
    monkeypatch.setattr(quantize_study, "settings_to_compare", lambda: kept)
    quantize_study.compare_formats(base, tokenizer, TEXTS, TEXTS, tmp_path, steps=2)
    results = json.loads((tmp_path / "formats.json").read_text())
    rows = {r["name"]: r for r in results["rows"]}
    assert len(rows) == 1 + len(kept) + 4 + 1 + 3 and results["qat_steps"] == 2
    for block in (16, 32, 64, 128):  # at equal bits
        ours, theirs = rows[f"NF4, blocks of {block}"], rows[f"affine int4, blocks of {block}"]
        assert ours["bits"] == theirs["bits"] == 4 + 32 / block
    assert rows["float32"]["drift"] == 0 and all(r["drift"] >= 0 for r in rows.values())
    assert rows["Q4_0"]["drift"] > 0
    table = (tmp_path / "README.md").read_text()
    assert all(name in table for name in rows if name != "float32")
    assert (tmp_path / "formats.png").read_bytes()[:4] == b"\x89PNG"


def test_drift_is_the_divergence_of_every_real_token_summed_over_a_document(base, tokenizer):
    small = copy.deepcopy(base)
    quantize(small, Settings("int4", block_size=16))
    whole = quantize_study.drift(base, small, calibration_batches(TEXTS, tokenizer, base))
    alone = [
        divergence(base, small, batch).sum().item()
        for text in TEXTS
        for batch in calibration_batches([text], tokenizer, base)
    ]
    assert whole > 0 and whole == pytest.approx(sum(alone) / len(TEXTS), rel=1e-4)  # float32


def test_the_comparison_of_sizes_counts_every_byte(base, tokenizer, tmp_path):
    rows = [
        quantize_study.size_row(base, tokenizer, scheme, choice, TEXTS, TEXTS)
        for scheme, choice in quantize_study.SCHEMES.items()
    ]
    total = sum(p.numel() for p in base.parameters())
    weights = 2 * 12 * 32 * 32
    assert rows[0]["bytes"] == 2 * total
    assert rows[1]["bytes"] == 2 * (total - weights) + weights * (4 + 20 / 32) / 8
    assert rows[2]["bytes"] == 2 * (total - weights) + weights * (3 + 19 / 32) / 8
    content = {"rows": rows, "steps": 3, "texts": 6}
    (tmp_path / "sizes.json").write_text(json.dumps(content))
    publish(tmp_path)
    assert f"{rows[0]['bytes']:,}" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "sizes.png").exists() and CONFIG.d_model == 32


# -- the shipped base


@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_beats_round_to_nearest_on_the_base(bits):
    """On documents that neither has seen, from 64 that GPTQ has: how far the distributions of the
    next token move from the base's, KL(base || quantised) in nats a token.
    """
    from minipeft.town import held_out, load_base, pretraining_documents

    model, tokenizer = load_base()
    seen = [Example(completion=t) for t in pretraining_documents(count=64)]
    test = [Example(completion=t) for t in held_out()[:128]]
    learned = calibration_batches(seen, tokenizer, model)
    moved = {}
    for format in ("rtn", "gptq"):
        small = copy.deepcopy(model)
        quantize(small, Settings(format, bits), learned)
        parts = [divergence(model, small, b) for b in calibration_batches(test, tokenizer, model)]
        moved[format] = torch.cat(parts).mean().item()
    assert 0 < moved["gptq"] < 0.8 * moved["rtn"]


@torch.no_grad()
def divergence(model, small, batch):
    """KL at every real token, (n,)."""
    p, q = (m(batch.ids).log_softmax(-1) for m in (model, small))
    real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]
    return (p.exp() * (p - q)).sum(-1)[real]
