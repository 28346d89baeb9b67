"""How the new facts are trained, and that it was chosen apart: minipeft/facts_study.py."""

import json

from minipeft import facts_study
from minipeft.facts_study import DRAW, SEED, Way, examples_of
from minipeft.presets import PRESETS
from minipeft.town import TASKS, data_folder, load_base
from minipeft.town.tasks import new_fact_list


def test_settings_are_chosen_on_other_facts_and_another_seed_than_are_reported():
    chosen, reported = new_fact_list(DRAW), new_fact_list()
    assert [fact[:2] for fact in chosen] == [fact[:2] for fact in reported]
    same = sum(a == b for a, b in zip(chosen, reported)) / len(reported)
    assert same < 0.3  # chance 0.14, 96 draws: a standard deviation is 0.035
    results = json.loads((data_folder() / "results/new_facts/results.json").read_text())
    assert SEED not in results["plan"]["seeds"]


def test_both_forms_are_trained_and_the_third_is_asked():
    train, test = examples_of(Way("full", 1))
    answers = {x.prompt: x.completion for x in train}
    assert len(train) == 192 and len(test) == 96
    assert not any(x.prompt in answers for x in test)
    for name, attribute, value in new_fact_list(DRAW):
        assert answers[f"{attribute} of {name} :"] == f" {value} ."


def test_rehearsing_keeps_the_third_form_in_use_for_people_who_are_not_asked_about():
    plain, _ = examples_of(Way("full", 1))
    train, test = examples_of(Way("full", 1, rehearse=True))
    besides = train[len(plain) :]
    assert train[: len(plain)] == plain and len(besides) == 16 * 4
    assert all(x.prompt.startswith("What is") for x in besides)
    assert not {x.prompt for x in besides} & {x.prompt for x in test}


def test_a_run_trains_as_the_way_says(monkeypatch):
    seen = {}

    def watch(model, data, config, show):
        seen.update(config=config, rows=len(data))
        return real(model, data, config, show=show)

    real = facts_study.train
    monkeypatch.setattr(facts_study, "train", watch)
    record = facts_study.run(Way("LoRA", 2, starts=5, factor=0.5), *load_base())
    config = seen["config"]
    assert (config.steps, config.random_starts, seen["rows"]) == (2, 5, 192)
    assert config.learning_rate == 0.5 * PRESETS["LoRA"].rate and config.seed == SEED
    assert 0 <= record["quality"] <= 1 and record["starts"] == 5 and record["technique"] == "LoRA"


def run_of(technique, quality, **way):
    return {"technique": technique, "quality": quality} | {
        "steps": 800, "starts": 0, "factor": 1.0, "rehearse": False, **way,
    }  # fmt: skip


def test_the_table_has_a_row_a_way_and_a_column_a_technique():
    found = [run_of("Houlsby", 0.25), run_of("full", 0.5, starts=16), run_of("full", 0.75)]
    _, head, rows = facts_study.choice_table(found)
    assert head[-3:] == ["full", "LoRA all", "Houlsby"]
    assert rows == [
        ["800", "0", "1", "no", "0.75", "-", "0.25"],
        ["800", "0 .. 16", "1", "no", "0.50", "-", "-"],
    ]


def test_the_tasks_own_settings_are_the_best_that_was_tried_for_the_worst_off():
    """Of the ways that all three large techniques were tried in."""
    choice = json.loads((data_folder() / "results/new_facts/choice.json").read_text())
    ways = {}
    for r in choice["runs"]:
        way = (r["steps"], r["starts"], r["factor"], r["rehearse"])
        ways.setdefault(way, {})[r["technique"]] = r["quality"]
    whole = {w: q for w, q in ways.items() if set(facts_study.TECHNIQUES) <= set(q)}
    best = max(whole, key=lambda w: min(whole[w][name] for name in facts_study.TECHNIQUES))
    task = TASKS["new_facts"]
    assert best == (task.steps, task.random_starts, 1.0, False)
