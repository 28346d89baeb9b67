"""The specification of minipeft/bench.py: what is timed, and that both sides compute the same."""

import io
import json
import time
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from minipeft import bench
from minipeft.gpt import GPTConfig
from minipeft.roofline import Rates
from minipeft.town import data_folder


@pytest.fixture
def small(monkeypatch):
    """The benchmarks' model, small enough for a test."""
    shape = GPTConfig(vocab_size=97, context_length=32, n_layer=2, n_head=2, d_model=32)
    monkeypatch.setattr(bench, "SHAPE", shape)
    monkeypatch.setattr(bench, "BATCH", 2)
    monkeypatch.setattr(bench, "tokens", lambda batch=2, length=32: small_ids(batch, length))


def small_ids(batch, length):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 97, (batch, length + 1), generator=generator)


def test_the_ratio_is_ours_over_theirs():
    result = bench.interleaved(
        "sleep", "a longer sleep", lambda: time.sleep(0.004), lambda: time.sleep(0.02), rounds=5
    )
    assert 0.15 < result.ratio < 0.6  # 0.2 on a quiet machine
    assert result.low <= result.ratio <= result.high
    assert result.ours < result.theirs


def test_the_two_sides_run_in_turn():
    calls = []
    bench.interleaved("a", "b", lambda: calls.append("a"), lambda: calls.append("b"), rounds=3)
    assert calls == ["a", "b"] * 4  # the warm-up is a round too


def test_sides_that_differ_are_refused():
    with pytest.raises(RuntimeError, match="differ"):
        bench.assert_close(torch.tensor(1.0), torch.tensor(1.1), 1e-4, "something")
    with pytest.raises(RuntimeError, match="by 1"):
        bench.assert_close(torch.tensor(1.1), torch.tensor(1.0), 1e-4, "something")
    with pytest.raises(RuntimeError, match="by nan"):
        bench.assert_close(torch.tensor([1.0, torch.nan]), torch.ones(2), 1e-4, "something")
    bench.assert_close(torch.tensor(1.0), torch.tensor(1.00001), 1e-4, "something")


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(ValueError, match="fulll"):
        bench.bench(["fulll"], folder=tmp_path)


def test_no_round_is_an_error_before_anything_runs(monkeypatch):
    monkeypatch.setattr(bench.roofline, "measure", None)
    with pytest.raises(ValueError, match="rounds=0"):
        bench.bench(["full"], rounds=0)


def test_a_device_that_is_not_there_is_an_error_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        bench.bench(["full"], folder=tmp_path, device="cuda")
    with pytest.raises(ValueError, match="'gpu' is none of cpu, cuda"):
        bench.bench(["full"], folder=tmp_path, device="gpu")
    assert not list(tmp_path.iterdir())


def test_training_steps_are_compared_on_equal_losses(small):
    (full,) = bench.full_step(rounds=1)
    lora, defined = bench.lora_step(rounds=1)
    assert (lora.peer, defined.peer) == ("transformers + peft", "our definition")
    # 2 D (12 D^2 L + D V) a token forward: with the attention and the gradients of x and of the
    # weights between 3 and 4 times as much; a frozen model leaves out a third
    forward = 2 * (12 * 32**2 * 2 + 32 * 97) * 2 * 32
    assert 3 * forward < full.operations < 4 * forward
    assert lora.operations < 0.85 * full.operations
    assert full.extra["trained"] > lora.extra["trained"] == 2 * 2 * 8 * 2 * 32
    assert full.ratio > 0 and lora.ratio > 0


def test_decoding_is_compared_on_equal_tokens(small):
    results = bench.decoding(rounds=1, new_tokens=8)
    assert [r.name[-1] for r in results] == ["1", "8", "1"]
    assert "LoRA" in results[2].name and results[2].peer == "transformers + peft"
    for r in results:
        assert r.extra["speed-up"] == pytest.approx(r.theirs / r.ours)
        assert r.operations == r.bytes_moved / 2 * int(r.name[-1])
        assert r.bytes_moved == 4 * 8 * (2 * (12 * 32**2 + 13 * 32) + 2 * 32 + 97 * 32)  # 8 tokens


def test_rows_with_their_own_adapters_are_compared_on_texts_and_on_tokens(monkeypatch):
    shape = GPTConfig(vocab_size=97, context_length=32, n_layer=2, n_head=2, d_model=32)
    monkeypatch.setattr(bench, "SERVED", shape)
    texts, tokens, decoded = bench.multi_lora(rounds=1, adapters=3, length=8)
    assert "3 rows x 8 tokens," in texts.note and "3 rows x 1 token," in tokens.note
    assert "3 rows x 8 tokens decoded," in decoded.note
    base, adapters = 2 * (12 * 32**2 + 13 * 32) + 97 * 32, 3 * 2 * (8 * 32 + 3 * 32 * 8)
    assert texts.bytes_moved == tokens.bytes_moved == 4 * (base + adapters)
    assert decoded.bytes_moved == 8 * tokens.bytes_moved
    assert 7 * tokens.operations < texts.operations < 9 * tokens.operations


def test_rows_that_peft_computes_otherwise_are_refused(monkeypatch):
    shape = GPTConfig(vocab_size=97, context_length=32, n_layer=2, n_head=2, d_model=32)
    monkeypatch.setattr(bench, "SERVED", shape)
    model, peer = bench.serving(["a0", "a1"], "cpu")
    torch.nn.init.normal_(peer.base_model.model.lm_head.weight)
    monkeypatch.setattr(bench, "serving", lambda names, device: (model, peer))
    with pytest.raises(RuntimeError, match="a LoRA a row"):
        bench.multi_lora(rounds=1, adapters=2, length=8)


def test_the_loss_in_chunks_needs_less_than_a_quarter_of_the_memory():
    # 2,048 tokens in chunks of 256: an eighth of the logits, and the gradients of the inputs.
    trained, frozen = bench.chunked_cross_entropy(rounds=1, M=2048, V=4096, D=16)
    assert trained.extra["memory ratio"] < 0.25
    assert frozen.extra["memory ratio"] < 0.25
    assert trained.operations == 3 * (2 * 2048 * 4096 * 16) == 1.5 * frozen.operations


def test_distillation_in_chunks_needs_less_than_a_quarter_of_the_memory():
    # 1,024 tokens in chunks of 128, five or so alive at once, against all logits about six times.
    (result,) = bench.chunked_distillation(rounds=1, M=1024, V=4096, D=16)
    assert result.extra["memory ratio"] < 0.25


RATES = Rates(bandwidth=1e9, operations=2e9)


def works(rounds, device):
    times = {"ours": 1.0, "theirs": 2.0, "ratio": 0.5, "low": 0.4, "high": 0.6}
    work = {"bytes_moved": 2.5e8, "operations": 1e9}
    return [bench.Result("x", "y", "s", **times, rounds=rounds, **work)]


def needs_a_peer(rounds, device):
    import a_peer_that_nobody_has  # noqa: F401


@pytest.fixture
def instant(monkeypatch):
    """Two benchmarks that take no time and one whose peer is missing; rates that are known."""
    first, second = {"one": works, "two": needs_a_peer}, {"three": works}
    monkeypatch.setattr(bench, "BENCHMARKS", first | second)
    monkeypatch.setattr(bench, "TABLES", {"first": first, bench.COSTS: second})
    monkeypatch.setattr(bench.roofline, "measure", lambda device: RATES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_a_file_holds_machine_versions_rates_and_what_was_left_out(tmp_path, instant):
    contents = bench.bench(rounds=3, folder=tmp_path)
    one, two, three = (json.loads((tmp_path / f"{n}.json").read_text()) for n in contents)
    assert one["results"][0]["ratio"] == 0.5 and one["results"][0]["rounds"] == 3
    assert two["left_out"] == "a_peer_that_nobody_has is not installed" and not two["results"]
    assert not one["left_out"] and three["benchmark"] == "three"
    assert one["machine"]["torch"] == torch.__version__
    assert one["machine"]["threads"] == 1
    assert one["gpu"] == "none here" and one["machine"]["device"] == "cpu"
    assert one["rates"] == {"bandwidth": 1e9, "operations": 2e9}


def test_apart_a_benchmark_has_a_process_of_its_own(monkeypatch, tmp_path):
    """What was done to this process is not done to the other; an error there is one here."""
    monkeypatch.setattr(bench.roofline, "measure", lambda device: RATES)
    monkeypatch.setitem(bench.BENCHMARKS, "adapter-drop", works)
    monkeypatch.setattr(bench, "SHAPE", None)
    content = bench.bench(["adapter-drop"], rounds=1, folder=tmp_path, apart=True)["adapter-drop"]
    assert content == json.loads((tmp_path / "adapter-drop.json").read_text())
    names = [r["name"] for r in content["results"]]
    assert len(names) == 4 and all("AdapterDrop" in name for name in names)
    assert content["machine"]["threads"] == 1 and content["rates"] == asdict(RATES)
    monkeypatch.setitem(bench.BENCHMARKS, "none", works)
    with pytest.raises(KeyError, match="none"):
        bench.bench(["none"], rounds=1, apart=True)


def test_one_thread_inside_and_as_many_as_before_outside(instant, monkeypatch):
    inside = []
    monkeypatch.setitem(
        bench.BENCHMARKS, "one", lambda **k: inside.append(torch.get_num_threads()) or []
    )
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        bench.bench(["one"])
        assert inside == [1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_floor_is_that_of_the_rates(instant):
    (result,) = bench.bench(["one"])["one"]["results"]
    assert result["floor"] == 0.5  # 1e9 operations at 2e9 a second; the bytes need 0.25 s


def test_a_run_replaces_its_own_files_and_no_others(tmp_path, instant):
    bench.bench(rounds=3, folder=tmp_path)
    bench.bench(["one"], rounds=5, folder=tmp_path)
    kept = {c["benchmark"]: c["results"] for c in bench.stored(tmp_path, bench.BENCHMARKS)}
    assert [kept[n][0]["rounds"] for n in ("one", "three")] == [5, 3]
    names = {"one.json", "two.json", "three.json", "bench.png", "pictures.json"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_was_measured_is_on_disk_when_a_later_benchmark_fails(tmp_path, instant, monkeypatch):
    def fails(rounds, device):
        raise RuntimeError("differ")

    monkeypatch.setitem(bench.BENCHMARKS, "two", fails)
    with pytest.raises(RuntimeError):
        bench.bench(folder=tmp_path)
    assert [c["benchmark"] for c in bench.stored(tmp_path, bench.BENCHMARKS)] == ["one"]


def test_results_of_a_gpu_stand_in_files_of_their_own(tmp_path, instant, monkeypatch):
    bench.bench(["one"], rounds=3, folder=tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    bench.bench(["one"], rounds=4, folder=tmp_path, device="cuda")
    (there,) = bench.stored(tmp_path, ["one"], "cuda")
    (here,) = bench.stored(tmp_path, ["one"])
    assert there["gpu"] == there["machine"]["device"] == "a GPU"
    assert (here["results"][0]["rounds"], there["results"][0]["rounds"]) == (3, 4)
    alts = json.loads((tmp_path / "pictures.json").read_text())
    assert list(alts) == ["bench.png", "bench-cuda.png"]


def test_the_picture_shows_all_but_what_techniques_cost(tmp_path, instant):
    bench.bench(["three"], folder=tmp_path)
    assert not (tmp_path / "bench.png").exists()
    bench.bench(["one"], folder=tmp_path)
    alts = json.loads((tmp_path / "pictures.json").read_text())
    assert alts["bench.png"].count("0.50") == 1 and "x: y 0.50" in alts["bench.png"]


def test_the_table_says_how_near_the_floor_is(instant):
    out = io.StringIO()
    bench.bench(["one", "two"], console=Console(file=out, width=80))
    text = out.getvalue()
    assert "50%" in text and "floor ms 500" in text
    assert "left out two: a_peer_that_nobody_has" in text
    assert "copies 1.0 GB/s and multiplies 2 GFLOP/s" in text


def test_the_committed_files_are_those_of_the_benchmarks_there_are():
    names = {path.name for path in (data_folder() / "benchmarks").iterdir()}
    assert names == {f"{name}.json" for name in bench.BENCHMARKS} | {"bench.png", "pictures.json"}


def test_nf4_is_compared_on_equal_bytes():
    pytest.importorskip("bitsandbytes")
    there, back = bench.nf4(rounds=1, size=128)
    assert (there.name, back.name) == ("NF4 quantise", "NF4 dequantise")
    assert there.ratio > 0 and back.ratio > 0 and "128 x 128" in back.note


def test_a_pruned_model_is_compared_with_the_dense_one(small):
    pruned, half, most = bench.pruning(rounds=1)
    assert pruned.extra["heads"] == 1 and half.extra["heads"] == 2
    # half of 4 D^2 + 3 D and of 8 D^2 + 4 D, in each of 2 layers of width 32
    assert half.extra["parameters"] - pruned.extra["parameters"] == (12 * 32**2 + 7 * 32)
    assert most.extra["speed-up"] == pytest.approx(1 / most.ratio)
