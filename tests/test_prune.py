"""The specification of minipeft/prune.py: `minipeft prune`, and the pipeline `minipeft shrink`."""

import copy
import json
from pathlib import Path

import pytest
import torch

from minipeft import GPT, cli, prune
from minipeft.compressed.importance import gate_importance, least_important, taylor_importance
from minipeft.compressed.magnitude_pruning import projections, prune_magnitude, sparsity_of
from minipeft.compressed.structured_pruning import parameter_count, widths
from minipeft.dataset import Example
from minipeft.gpt import GPTConfig
from minipeft.prune import batches_of, bytes_of, count_of
from minipeft.quantized.qlora import quantize_model
from minipeft.tokenizer import Tokenizer
from tests.tiny import tiny_model

TEXTS = [Example(completion=t) for t in ("ab cd", "bead", "a", "cab dab", "dad", "faded cafe")]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer({bytes([b]): b for b in range(256)})


@pytest.fixture
def base(tokenizer):
    return tiny_model(GPTConfig(tokenizer.vocab_size, 64, 2, 4, 32), torch.float32)


@pytest.fixture
def folders(tmp_path, tokenizer, base):
    """(a model folder, a file of texts, a folder to write to)"""
    base.save_pretrained(tmp_path / "base")
    tokenizer.save(tmp_path / "base")
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"prompt": "", "completion": t.completion}) + "\n" for t in TEXTS)
    )
    return tmp_path / "base", tmp_path / "texts.jsonl", tmp_path / "out"


def run(capsys, folders, name, *flags):
    base, data, out = folders
    flags = [*flags, "--base", base, "--data", data, "--out", out, "--device", "cpu"]
    status = cli.main([name, *map(str, flags)])
    return status, *capsys.readouterr()


def zeros_of(model):
    return {path: linear.weight.detach() == 0 for path, linear in projections(model).items()}


# -- minipeft prune


def test_single_weights_are_zeroed_and_the_model_opens(capsys, folders, base):
    status, out, _ = run(capsys, folders, "prune", "--sparsity", 0.5, "--scope", "global")
    assert status == 0 and out.count("50.0 % zeros") == 1 and "nats a document" in out
    wanted = zeros_of(prune_magnitude(base, 0.5, "global"))
    found = zeros_of(GPT.from_pretrained(folders[2]))
    assert all(torch.equal(found[path], wanted[path]) for path in wanted)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_pattern_stays_through_training(capsys, folders, base, method):
    flags = ("--method", method, "--pattern", 2, 4, "--steps", 2)
    status, out, _ = run(capsys, folders, "prune", *flags)
    assert status == 0 and out.count("50.0 % zeros") == 2 and "trained on" in out
    model = GPT.from_pretrained(folders[2])
    for zeros in zeros_of(model).values():
        assert (zeros.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert not torch.equal(model.blocks[0].ln_1.weight, base.blocks[0].ln_1.weight)


def test_the_methods_choose_different_weights(tokenizer, base):
    batches, found = batches_of(TEXTS, tokenizer, base), []
    for method in ("magnitude", "wanda", "sparsegpt"):
        options = prune.Options(method=method, sparsity=0.5)
        found.append(zeros_of(prune.take_out(copy.deepcopy(base), batches, options)))
    down = [zeros["blocks.1.mlp.down"] for zeros in found]
    assert not any(torch.equal(a, b) for a, b in ((down[0], down[1]), (down[1], down[2])))


def test_heads_neurons_and_blocks_go_for_real(capsys, folders, tokenizer, base):
    flags = ("--heads", 0.5, "--neurons", 0.25, "--blocks", 0, "--steps", 1)
    status, out, _ = run(capsys, folders, "prune", *flags)
    assert status == 0
    model = GPT.from_pretrained(folders[2])
    assert widths(model) == [{"n_head": 2, "head_dim": 8, "d_ff": 96}]
    assert f"{parameter_count(model.config, widths(model)):,} parameters" in out


def test_the_least_important_go_by_the_measure_asked_for(tokenizer, base):
    batches = batches_of(TEXTS, tokenizer, base)
    chosen = least_important(gate_importance(base, batches, "heads"), 0.25)
    small = prune.shrink_layers(copy.deepcopy(base), batches, 0.25, 0)
    for layer, (head,) in chosen.items():
        rows = [r for h in range(4) if h != head for r in range(8 * h, 8 * h + 8)]
        assert torch.equal(
            small.blocks[layer].attn.v.weight, base.blocks[layer].attn.v.weight[rows]
        )
    other = prune.shrink_layers(copy.deepcopy(base), batches, 0, 0.5, "taylor")
    gates = prune.shrink_layers(copy.deepcopy(base), batches, 0, 0.5, "gates")
    assert not torch.equal(other.blocks[0].mlp.up.weight, gates.blocks[0].mlp.up.weight)


def test_the_lowest_anywhere_are_not_measured_in_their_layers_norms():
    scores = [torch.tensor([3.0, 4.0]), torch.tensor([10.0, 2.0, 50.0])]
    assert prune.lowest(scores, 0) == {}
    assert prune.lowest(scores, 2) == {0: [0], 1: [1]}
    assert prune.lowest(scores, 4) == {0: [0, 1], 1: [1, 0]}


def test_in_rounds_every_round_asks_the_model_that_is_left(base):
    """The numbers say what goes: always the first head of the second layer while it has one."""
    asked = []

    def measure(model, kind):
        asked.append((kind, [w["n_head"] for w in widths(model)]))
        sizes = [w["n_head"] if kind == "heads" else w["d_ff"] for w in widths(model)]
        return [torch.arange(n) + 100.0 * (layer == 0) for layer, n in enumerate(sizes)]

    model = prune.shrink_anywhere(copy.deepcopy(base), 0.625, 0.25, measure, rounds=3)
    heads = [(("heads", h), ("neurons", h)) for h in ([4, 4], [4, 3], [4, 1])]  # 1, 3, 5 of 8
    assert asked == [call for pair in heads for call in pair]
    assert [w["n_head"] for w in widths(model)] == [3, 0]
    assert sum(w["d_ff"] for w in widths(model)) == 0.75 * 2 * 128
    rows = base.blocks[0].attn.v.weight[8:]
    assert torch.equal(model.blocks[0].attn.v.weight, rows)


def test_the_command_ranks_anew_in_every_round(capsys, folders, tokenizer, base):
    flags = ("--heads", 0.5, "--neurons", 0.5, "--rounds", 2, "--importance", "taylor")
    assert run(capsys, folders, "prune", *flags)[0] == 0
    model = GPT.from_pretrained(folders[2])
    examples, _ = prune.corpus(folders[1], 0)
    batches = batches_of(examples, tokenizer, base)
    wanted = prune.shrink_anywhere(
        copy.deepcopy(base), 0.5, 0.5, lambda m, k: taylor_importance(m, batches, k), 2
    )
    assert widths(model) == widths(wanted) and sum(w["n_head"] for w in widths(model)) == 4
    for mine, other in zip(model.parameters(), wanted.parameters()):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "flags, message",
    [
        ((), "nothing to take out"),
        (("--heads", 0.5, "--rounds", 0), "rounds=0"),
        (("--sparsity", 1.5), "sparsity=1.5"),
        (("--sparsity", "nan"), "sparsity=nan"),
        (("--heads", 1.0), "heads=1.0"),
        (("--neurons", -0.5), "neurons=-0.5"),
        (("--pattern", 4, 2), "pattern=4:2"),
        (("--heads", 0.5, "--steps", -3), "steps=-3"),
        (("--blocks", 7), "no block 7"),
        (("--method", "wanda", "--pattern", 2, 5), "multiple of 5"),
    ],
)
def test_bad_requests_are_named(capsys, folders, flags, message):
    status, _, err = run(capsys, folders, "prune", *flags)
    assert status == 1 and message in err and not folders[2].exists()


@pytest.mark.parametrize("flags", [("--sparsity", 1.5), ("--pattern", 4, 2), ("--heads", 1.0)])
def test_what_can_be_seen_from_the_options_is_said_before_anything_is_computed(
    capsys, folders, flags
):
    assert run(capsys, folders, "prune", *flags)[1] == ""
    folders[2].write_text("")
    status, out, err = run(capsys, folders, "prune", "--heads", 0.5)
    assert status == 1 and out == "" and "is a file" in err


# -- what was measured, and is committed


def test_half_a_model_is_half_again_as_fast_and_a_model_of_zeros_is_not():
    """On one thread at width 384, 6 layers and context 256; other machines measure their own."""
    path = Path(__file__).parents[1] / "data" / "benchmarks" / "pruning.json"
    content = json.loads(path.read_text())
    half, *zeros = content["results"]
    assert content["machine"]["threads"] == 1 and half["extra"]["heads"] == 3  # of six
    assert all(r["note"] == "6 layers, width 384, batch 8 x 256" for r in (half, *zeros))
    assert half["extra"]["speed-up"] >= 1.5
    assert [r["name"] for r in zeros] == ["50 % of the weights zero", "90 % of the weights zero"]
    for result in zeros:
        assert 0.9 < result["extra"]["speed-up"] < 1.1


# -- minipeft shrink


def test_the_pipeline_writes_one_table_and_its_models(capsys, folders):
    flags = ("--steps", 2, "--repeats", 2, "--heads", 0.5, "--neurons", 0.5)
    status, out, _ = run(capsys, folders, "shrink", "--rounds", None, *flags)
    assert status == 0
    content = json.loads((folders[2] / "results.json").read_text())
    stages = {s["name"]: s for s in content["stages"]}
    names = ["base", "fine-tuned", "pruned", "distilled", "quantised"]
    assert list(stages) == names and all(name in out for name in names)
    small = GPT.from_pretrained(folders[2] / "distilled")
    assert widths(small)[0] == {"n_head": 2, "head_dim": 8, "d_ff": 64}
    size = parameter_count(small.config, widths(small))
    assert stages["base"]["parameters"] == stages["fine-tuned"]["parameters"] > size
    for name in names[2:]:
        assert stages[name]["parameters"] == size
    assert stages["pruned"]["bytes"] == stages["distilled"]["bytes"] == 4 * size
    assert stages["quantised"]["bytes"] < stages["distilled"]["bytes"]
    assert all(s["seconds"] > 0 for s in stages.values())
    tuned = GPT.from_pretrained(folders[2] / "fine-tuned")
    assert stages["fine-tuned"]["quality"] != stages["base"]["quality"]
    assert not torch.equal(tuned.ln_f.weight, small.ln_f.weight)  # the student moved on


def test_the_pipeline_takes_its_units_from_the_whole_model_in_rounds(tokenizer, base, monkeypatch):
    asked, measure = [], prune.MEASURES["gates"]

    def spy(model, batches, kind):
        asked.append((kind, sum(w["n_head"] for w in widths(model))))
        return measure(model, batches, kind)

    monkeypatch.setitem(prune.MEASURES, "gates", spy)
    material = cli.Material(TEXTS, TEXTS, "nats", 2)
    options = prune.ShrinkOptions(steps=1, heads=0.5, neurons=0.25, rounds=2, device="cpu")
    small = prune.shrunk_models(options, material, base, tokenizer)["pruned"]
    assert asked == [("heads", 8), ("neurons", 8), ("heads", 6), ("neurons", 6)]
    assert sum(w["n_head"] for w in widths(small)) == 4
    assert sum(w["d_ff"] for w in widths(small)) == 0.75 * 2 * 128


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--rounds", 0), "rounds=0"),
        (("--repeats", 0), "repeats=0"),
        (("--steps", 0), "steps=0"),
        (("--temperature", 0), "temperature=0"),
        (("--alpha", 3), "alpha=3"),
        (("--neurons", 1), "neurons=1"),
    ],
)
def test_bad_options_are_named_before_the_first_step(capsys, folders, flags, message):
    status, out, err = run(capsys, folders, "shrink", *flags)
    assert status == 1 and message in err and out == "" and not folders[2].exists()


def test_the_student_learns_from_the_fine_tuned_model(folders, tokenizer, base, monkeypatch):
    seen = []

    class Spy(prune.NetworkTeacher):
        def __init__(self, teacher, *rest):
            seen.append((copy.deepcopy(teacher), rest))
            super().__init__(teacher, *rest)

    monkeypatch.setattr(prune, "NetworkTeacher", Spy)
    material = cli.Material(TEXTS, TEXTS, "nats", 2)
    options = prune.ShrinkOptions(steps=2, temperature=3.0, alpha=0.7, device="cpu")
    models = prune.shrunk_models(options, material, base, tokenizer)
    ((teacher, rest),) = seen
    assert rest == (3.0, 0.7)
    for n, p in teacher.named_parameters():
        assert torch.equal(p, dict(models["fine-tuned"].named_parameters())[n])
    assert sparsity_of(models["distilled"]) == 0


def test_bytes_and_numbers_are_counted_once(base):
    size = sum(p.numel() for p in base.parameters())
    assert count_of(base) == size and bytes_of(base) == 4 * size
    packed = quantize_model(copy.deepcopy(base))
    assert count_of(packed) == size and bytes_of(packed) < bytes_of(base)
