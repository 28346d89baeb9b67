"""What hardly learned, trained for longer: minipeft/longer_study.py."""

import pytest

from minipeft import longer_study
from minipeft.presets import PRESETS
from minipeft.town import TASKS, load_base


def test_every_pair_is_of_a_known_technique_and_task_and_trains_as_its_preset():
    base, _ = load_base()
    for plan in longer_study.longer_plans():
        assert set(plan.tasks) <= set(TASKS) and plan.seeds == (0, 1, 2)
        assert all(plan.steps == 3 * TASKS[task].steps for task in plan.tasks)
        for name, preset in plan.techniques.items():
            preset.technique.check(base.config)
            if name in PRESETS:
                assert preset == PRESETS[name]


def test_a_variant_differs_from_its_preset_in_one_thing():
    (start_of, start), (rate_of, rate) = longer_study.VARIANTS.values()
    assert start_of == rate_of == "prompt"
    prompt = PRESETS["prompt"]
    assert start.rate == prompt.rate and start.technique.init == "random" != prompt.technique.init
    assert start.technique.prompt_length == prompt.technique.prompt_length
    assert rate.technique == prompt.technique and rate.rate == pytest.approx(3 * prompt.rate)


def cells(technique, qualities, task="table_to_text"):
    return [
        {"technique": technique, "task": task, "seed": seed, "quality": q}
        for seed, q in enumerate(qualities)
    ]


@pytest.fixture
def results():
    """(longer, usual)"""
    usual = cells("prompt", (0.1, 0.95, 0.2)) + cells("P-tuning", (0.1, 0.2, 0.3))
    usual += cells("diff pruning", (0.5, 0.5, 0.6), "mood")
    longer = cells("prompt", (0.9, 1.0, 0.95)) + cells("P-tuning", (0.1, 0.2, 0.99))
    longer += cells("diff pruning", (0.6, 0.6, 0.6), "mood")
    longer += cells("prompt, from random numbers", (0.2, 0.4, 0.6))
    tasks = {"table_to_text": {}, "mood": {}}
    return {"steps": 900, "tasks": tasks, "cells": longer[::-1]}, {"cells": usual}


def test_runs_stand_seed_by_seed_and_a_variant_beside_the_preset_it_varies(results):
    _, head, rows = longer_study.longer_table(*results)
    assert head[2:] == ["300 steps", "900 steps", "mean", "seeds at 0.9"]
    found = {row[0]: row[1:] for row in rows}
    assert found["prompt"] == [
        "table_to_text", "0.10, 0.95, 0.20", "0.90, 1.00, 0.95", "0.42 to 0.95", "1 to 3 of 3",
    ]  # fmt: skip
    assert found["prompt, from random numbers"][1:] == [
        "0.10, 0.95, 0.20", "0.20, 0.40, 0.60", "0.42 to 0.40", "1 to 0 of 3",
    ]  # fmt: skip


def test_the_sentences_say_which_pairs_learn_and_what_a_variant_adds(results):
    text = longer_study.told(*results)
    assert "1 of these 3 pairs reach 0.9 in every seed (prompt on table to text: 0.95)" in text
    assert "1 in some (P-tuning on table to text: 0.43)" in text
    assert "1 in none (diff pruning on mood: 0.60)" in text
    said = "Prompt, from random numbers: a mean of 0.40 on table to text, where the preset has 0.95"
    assert said in text


def test_what_falls_short_is_named_with_its_mean():
    tasks = {"table_to_text": {"metric": "exact"}, "restyling": {"metric": "exact"}}
    names = ("base", "full", "prompt")
    found = [
        c
        for task in tasks
        for name, q in zip(names, (0.0, 0.98, 0.5 if task == "restyling" else 0.975))
        for c in cells(name, (q, q), task)
    ]
    text = longer_study.shortfalls({"tasks": tasks, "cells": found, "costs": dict.fromkeys(names)})
    assert text == "Below 0.97: on table to text none; on restyling prompt 0.50."


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    plans = longer_study.longer_plans((0,), 2, {"prompt": ("mood",)})
    plans += longer_study.longer_plans((0,), 2, {"prompt, three times the rate": ("mood",)})
    first = longer_study.study(plans, tmp_path, say=lambda line: None)
    assert [c["technique"] for c in first["cells"]] == ["prompt", "prompt, three times the rate"]
    assert first["steps"] == 2 and first["machine"]["torch"]
    monkeypatch.setattr("minipeft.compare.work", None)
    assert longer_study.study(plans, tmp_path, say=print)["cells"] == first["cells"]
