"""The specification of minipeft/bench.py: what is timed, and that both sides compute the same."""

import json
import time

import pytest
import torch

from minipeft import bench
from minipeft.gpt import GPTConfig


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


def test_an_unknown_benchmark_is_named(tmp_path):
    with pytest.raises(ValueError, match="fulll"):
        bench.bench(["fulll"], folder=tmp_path)


def test_training_steps_are_compared_on_equal_losses(small):
    (full,) = bench.full_step(rounds=1)
    (lora,) = bench.lora_step(rounds=1)
    assert full.extra["trained"] > lora.extra["trained"] == 2 * 2 * 8 * 2 * 32
    assert full.ratio > 0 and lora.ratio > 0


def test_decoding_is_compared_on_equal_tokens(small):
    results = bench.decoding(rounds=1, new_tokens=8)
    assert [r.name[-1] for r in results] == ["1", "8"]
    for r in results:
        assert r.extra["speed-up"] == pytest.approx(r.theirs / r.ours)


def test_the_loss_in_chunks_needs_less_than_a_quarter_of_the_memory():
    # 2,048 tokens in chunks of 256: an eighth of the logits, and the gradients of the inputs.
    trained, frozen = bench.chunked_cross_entropy(rounds=1, M=2048, V=4096, D=16)
    assert trained.extra["memory ratio"] < 0.25
    assert frozen.extra["memory ratio"] < 0.25


def test_distillation_in_chunks_needs_less_than_a_quarter_of_the_memory():
    # 1,024 tokens in chunks of 128, five or so alive at once, against all logits about six times.
    (result,) = bench.chunked_distillation(rounds=1, M=1024, V=4096, D=16)
    assert result.extra["memory ratio"] < 0.25


def test_the_file_holds_machine_versions_and_what_was_left_out(tmp_path, monkeypatch):
    def needs_a_peer(rounds):
        import a_peer_that_nobody_has  # noqa: F401

    def works(rounds):
        return [bench.Result("x", "y", "s", 1.0, 2.0, 0.5, 0.4, 0.6, rounds)]

    monkeypatch.setattr(bench, "BENCHMARKS", {"one": works, "two": needs_a_peer})
    bench.bench(rounds=3, folder=tmp_path)
    content = json.loads((tmp_path / "all.json").read_text())
    assert content["results"][0]["ratio"] == 0.5 and content["results"][0]["rounds"] == 3
    assert "a_peer_that_nobody_has" in content["left_out"][0]
    assert content["machine"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == 1


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
