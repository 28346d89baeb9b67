"""The specification of minipeft/prune_study.py, and what its committed results say."""

import copy
import json
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from minipeft import prune_study, town
from minipeft.compressed.magnitude_pruning import prune_magnitude
from minipeft.evaluation import nats
from minipeft.gpt import GPTConfig
from minipeft.prune import ShrinkOptions
from minipeft.prune_study import METHODS, PATTERNS, RANKINGS, TICKETS, Plan, study
from minipeft.tokenizer import Tokenizer
from tests.tiny import tiny_model

TEXTS = ["ab cd", "bead", "a", "cab dab", "dad", "faded cafe"] * 3
SMALL = Plan(
    steps=2, ticket_steps=2, rounds=2, ticket_width=16, documents=9, batch_size=4, sparsity=0.6
)
RESULTS = Path(__file__).parents[1] / "data" / "results" / "pruning"


@pytest.fixture(autouse=True)
def small_world(monkeypatch):
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    model = tiny_model(GPTConfig(tokenizer.vocab_size, 64, 2, 4, 32), torch.float32)
    monkeypatch.setattr(town, "load_base", lambda: (copy.deepcopy(model), tokenizer))
    monkeypatch.setattr(town, "held_out", lambda: tuple(TEXTS[:4]))
    texts = [t + str(n) for n, t in enumerate(TEXTS)]
    monkeypatch.setattr(town, "pretraining_documents", lambda s, n: texts[s : s + n])
    monkeypatch.setattr(town, "mix_floor", lambda: 5.0)
    return model, tokenizer


@pytest.fixture
def finished(tmp_path):
    return study(tmp_path, SMALL, seeds=(0, 1), say=lambda _: None), tmp_path


def test_every_arm_has_a_value_a_seed(finished):
    results, _ = finished
    cells = {(c["comparison"], c["seed"]): c["nats"] for c in results["cells"]}
    assert set(cells) == {(c, s) for c in prune_study.COMPARISONS for s in (0, 1)}
    wanda = [cells["once", seed]["Wanda, 50 %"] for seed in (0, 1)]
    assert wanda[0] != wanda[1]  # the seed draws the calibration text
    for seed in (0, 1):
        assert set(cells["once", seed]) == {f"{m}, {p}" for m in METHODS for p in PATTERNS}
        assert len(set(cells["once", seed].values())) == 6
        assert set(cells["structured", seed]) == {
            f"{r}, {when}" for r in RANKINGS for when in ("before", "trained on")
        }
        assert list(cells["tickets", seed]["winning ticket"]) == ["1.0000", "0.5000", "0.2500"]
        assert set(cells["tickets", seed]) == set(TICKETS)


def test_a_value_is_the_pruned_model_s_loss(finished, small_world):
    model, tokenizer = small_world
    wanted = nats(
        prune_magnitude(copy.deepcopy(model), 0.5),
        [prune_study.Example(completion=t) for t in TEXTS[:4]],
        tokenizer,
    )
    assert finished[0]["cells"][0]["nats"]["magnitude, 50 %"] == wanted


def test_what_is_there_is_not_measured_again(finished, monkeypatch):
    results, folder = finished
    for name in prune_study.COMPARISONS:
        monkeypatch.setitem(prune_study.COMPARISONS, name, None)
    assert study(folder, SMALL, seeds=(0, 1))["cells"] == results["cells"]
    with pytest.raises(ValueError, match="'steps': 3"):
        study(folder, replace(SMALL, steps=3))


def test_the_table_is_made_of_the_results(finished):
    results, folder = finished
    text = (folder / "table.md").read_text()
    wanda = prune_study.values(results, "once", "Wanda, 2:4")
    assert f"| Wanda, 2:4 | {statistics.mean(wanda):.3f} ± {statistics.stdev(wanda):.3f} |" in text
    assert "| winning ticket |" in text and "25.0 % kept" in text
    assert (folder / "tickets.png").exists()
    assert "winning ticket" in json.loads((folder / "pictures.json").read_text())["tickets.png"]


def test_the_start_of_the_other_ticket_is_another_and_the_same_each_time():
    config = GPTConfig(64, 16, 1, 1, 8)
    a, b, c = (prune_study.small_model(config, seed).embed.token.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_pipeline_s_table_is_kept_once(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"prompt": "", "completion": "abc"}\n' * 9)
    options = ShrinkOptions(data=tmp_path / "texts.jsonl", steps=1, rounds=1, device="cpu")
    base = tmp_path / "base"
    model, tokenizer = town.load_base()
    model.save_pretrained(base)
    tokenizer.save(base)
    prune_study.shrink_once(tmp_path, replace(options, base=base))
    content = (tmp_path / "shrink.json").read_text()
    assert [s["name"] for s in json.loads(content)["stages"]][-1] == "quantised"
    assert str(tmp_path) not in content  # no folder of this machine
    prune_study.shrink_once(tmp_path, replace(options, base=tmp_path / "nowhere"))
    assert (tmp_path / "shrink.json").read_text() == content


# -- what is committed


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "results.json").read_text())


def test_the_committed_results_are_whole(committed):
    cells = {(c["comparison"], c["seed"]) for c in committed["cells"]}
    assert cells == {(c, s) for c in prune_study.COMPARISONS for s in (0, 1, 2)}
    assert committed["plan"] == asdict(Plan())
    assert (RESULTS / "table.md").read_text().strip() == prune_study.tables(committed)
    assert (RESULTS / "tickets.png").exists()


def test_the_committed_pipeline_says_size_speed_and_quality_of_every_step():
    stages = {s["name"]: s for s in json.loads((RESULTS / "shrink.json").read_text())["stages"]}
    assert list(stages) == ["base", "fine-tuned", "pruned", "distilled", "quantised"]
    dense, small = stages["fine-tuned"], stages["distilled"]
    assert small["bytes"] < 0.6 * dense["bytes"] and small["seconds"] < dense["seconds"]
    assert dense["quality"] < small["quality"] < stages["pruned"]["quality"]


def test_the_committed_timing_says_what_pruning_is_worth():
    path = RESULTS.parents[1] / "benchmarks" / "pruning.json"
    speed = {r["name"]: r["extra"]["speed-up"] for r in json.loads(path.read_text())["results"]}
    assert speed["half the heads and neurons"] >= 1.5
    assert speed["50 % of the weights zero"] < 1.1  # zeros bring nothing on dense kernels
