"""What the README claims of the base and the first techniques, held to the results files."""

import json
from itertools import product

import pytest

from minipeft import compare
from minipeft.presets import PRESETS
from minipeft.town import TASKS, data_folder


@pytest.fixture(scope="module")
def results():
    return json.loads((data_folder() / "results" / "demo" / "results.json").read_text())


def mean(results, technique, task, value="quality"):
    found = [c[value] for c in results["cells"] if (c["technique"], c["task"]) == (technique, task)]
    return sum(found) / len(found)


def test_three_seeds_of_every_technique_are_in(results):
    assert results["plan"]["seeds"] == [0, 1, 2]
    cells = {(c["technique"], c["task"], c["seed"]) for c in results["cells"]}
    for technique in ("full", "BitFit", "LoRA"):
        for task in ("dialect", "mood"):
            assert {(technique, task, seed) for seed in (0, 1, 2)} <= cells


def test_lora_closes_at_least_85_percent_of_the_dialect_s_gap(results):
    """gap = [loss(base, dialect) - floor(dialect)] - [loss(base, home) - floor(home)]"""
    base = json.loads((data_folder() / "base.json").read_text())
    excess_at_home = base["home"] - base["home floor"]
    gap = (base["dialect"] - base["dialect floor"]) - excess_at_home
    assert gap > 3 * excess_at_home
    closed = base["dialect"] - mean(results, "LoRA", "dialect")
    assert closed / gap >= 0.85


def test_lora_learns_the_dialect_in_under_a_minute_on_one_thread(results):
    assert mean(results, "LoRA", "dialect", "seconds") < 60


def test_lora_reads_moods_within_a_point_and_a_half_of_bayes(results):
    best = results["tasks"]["mood"]["best"]
    assert mean(results, "LoRA", "mood") >= best - 0.015


def test_no_result_lies_below_the_floor(results):
    """By more than 4 sigma of a mean over 500 test documents; theirs differ by some 6 nats."""
    floor = results["tasks"]["dialect"]["floor"]
    for cell in results["cells"]:
        if cell["task"] == "dialect":
            assert cell["quality"] > floor - 4 * 6 / 500**0.5


# -- the large comparison, the orders, the fusion


def results_of(name):
    return json.loads((data_folder() / "results" / name / "results.json").read_text())


def test_the_large_comparison_is_whole():
    """Every preset on every task with three seeds."""
    results = results_of("all")
    done = {(c["technique"], c["task"], c["seed"]) for c in results["cells"]}
    assert done >= set(product(PRESETS, TASKS, (0, 1, 2)))


@pytest.mark.parametrize("name", ["LoRA all", "Houlsby", "parallel", "MAM", "UniPELT"])
def test_on_five_tasks_of_seven_little_is_lost(name):
    """At least 90 % of the way that full fine-tuning goes, means over the seeds."""
    shares = compare.gains(results_of("all"))[name]
    assert sum(share >= 0.9 for share in shares.values()) >= 5


def test_qlora_stays_within_two_percent_of_lora():
    results = results_of("orders")
    assert len(results["tasks"]) >= 3
    for task, facts in results["tasks"].items():
        ours, theirs = (
            compare.summary(results, task, name)[0] for name in ("QLoRA all", "LoRA all")
        )
        worse = ours / theirs if facts["metric"] == "nats" else theirs / ours
        assert worse <= 1.02, task


def test_a_fusion_beats_the_best_of_its_adapters_on_the_mix_in_every_seed():
    results = results_of("fusion")
    assert results["plan"]["seeds"] == [0, 1, 2]
    for seed in results["plan"]["seeds"]:
        found = {c["name"]: c["quality"] for c in results["cells"] if c["seed"] == seed}
        alone = [q for name, q in found.items() if name.startswith("adapter of")]
        assert len(alone) == 3 and found["AdapterFusion"] > max(alone)
