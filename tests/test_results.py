"""What the README claims of the base and the first techniques, held to the results files."""

import json
from itertools import product

import pytest

from minipeft import compare, longer_study
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


# what can be demanded of each technique at this size; shares are of full fine-tuning's gain
DIALECT = {
    0.94: ("LoRA all", "Houlsby"),
    0.85: ("LoRA", "BitFit", "IA3"),
    0.80: ("prefix MLP",),
    0.70: ("prefix flat",),
    0.20: ("prompt",),
}
MOOD = {  # points below Bayes
    0.015: ("full", "LoRA", "LoRA all", "Houlsby"),
    0.04: ("BitFit", "IA3", "prompt", "prefix flat", "prefix MLP"),
}
QUESTIONS = {
    0.90: ("full", "LoRA", "LoRA all", "BitFit"),
    0.85: ("IA3",),
    0.75: ("prefix MLP",),
    0.65: ("Houlsby",),
    0.60: ("prompt",),
    0.30: ("prefix flat",),
}


@pytest.mark.parametrize("limit", DIALECT)
def test_the_dialect_is_learned_as_far_as_can_be_demanded(limit):
    shares = compare.gains(results_of("all"))
    assert all(shares[name]["dialect"] >= limit for name in DIALECT[limit])


@pytest.mark.parametrize("limit", MOOD)
def test_moods_are_read_as_well_as_can_be_demanded(limit):
    results = results_of("all")
    best = results["tasks"]["mood"]["best"]
    assert all(mean(results, name, "mood") >= best - limit for name in MOOD[limit])


@pytest.mark.parametrize("limit", QUESTIONS)
def test_what_the_base_knows_is_pulled_out_as_far_as_can_be_demanded(limit):
    results = results_of("all")
    assert all(mean(results, n, "question_answering") >= limit for n in QUESTIONS[limit])


def test_a_table_becomes_text_with_every_technique_that_was_not_tried_for_longer():
    results, longer = results_of("all"), results_of("longer")
    tried = {c["technique"] for c in longer["cells"] if c["task"] == "table_to_text"}
    short = {n for n in results["costs"] if mean(results, n, "table_to_text") < 0.97}
    assert short == {"prompt", "P-tuning"} <= tried


def test_restyling_asks_more_and_flat_prefixes_learn_half_of_it():
    assert mean(results_of("all"), "prefix flat", "restyling") >= 0.5


def test_the_longer_runs_are_whole_and_had_three_times_the_steps():
    results = results_of("longer")
    found = {(c["technique"], c["task"], c["seed"]) for c in results["cells"]}
    pairs = {(name, task) for name, tasks in longer_study.PAIRS.items() for task in tasks}
    assert found == {(*pair, seed) for pair in pairs for seed in (0, 1, 2)}
    for cell in results["cells"]:
        assert cell["steps"] == results["steps"] == 3 * TASKS[cell["task"]].steps


def test_with_more_steps_adapter_drop_reads_moods_and_diff_pruning_does_in_some_seed():
    """Every technique that is more than 10 points below Bayes was tried for longer."""
    usual, longer = results_of("all"), results_of("longer")
    best = usual["tasks"]["mood"]["best"]
    slow = {n for n in usual["costs"] if mean(usual, n, "mood") < best - 0.1}
    assert slow == {c["technique"] for c in longer["cells"] if c["task"] == "mood"}
    adapters, gates = (
        longer_study.qualities(longer, n, "mood") for n in ("AdapterDrop", "diff pruning")
    )
    assert min(adapters) >= longer_study.LEARNED
    assert max(gates) >= longer_study.LEARNED and min(gates) < 0.6


def test_every_longer_soft_prompt_clicks_in_two_seeds_of_three():
    longer = results_of("longer")
    names = {c["technique"] for c in longer["cells"] if c["task"] == "table_to_text"}
    assert names == {"prompt", "P-tuning", *longer_study.VARIANTS}
    for name in names:
        runs = longer_study.qualities(longer, name, "table_to_text")
        assert sum(run >= 0.97 for run in runs) == 2 and min(runs) < 0.2


def test_prompt_tuning_clicks_in_more_seeds_with_more_steps():
    usual, longer = results_of("all"), results_of("longer")
    assert mean(longer, "prompt", "table_to_text") > mean(usual, "prompt", "table_to_text") + 0.2


LARGE, SMALL = ("full", "LoRA all", "Houlsby"), ("BitFit", "prompt", "prefix flat", "prefix MLP")


def test_new_facts_are_a_matter_of_capacity():
    results = results_of("new_facts")
    assert results["plan"]["seeds"] == [0, 1, 2] and not results["plan"]["steps"]
    large, small = ([mean(results, n, "new_facts") for n in names] for names in (LARGE, SMALL))
    assert min(large) >= 0.75 and max(small) <= 0.60


@pytest.mark.parametrize("name", ["all", "new_facts"])
def test_all_cells_of_a_column_were_trained_alike(name):
    results = results_of(name)
    for cell in results["cells"]:
        if cell["technique"] != "base":
            facts = results["tasks"][cell["task"]]
            assert all(cell[k] == facts[k] for k in ("steps", "random_starts"))
            chosen = results["plan"]["techniques"][cell["technique"]]
            assert cell["learning_rate"] == chosen["learning_rate"]


def test_the_new_facts_were_learned_as_the_task_says_now():
    facts = results_of("new_facts")["tasks"]["new_facts"]
    task = TASKS["new_facts"]
    assert (facts["steps"], facts["random_starts"]) == (task.steps, task.random_starts)


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
