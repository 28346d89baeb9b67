"""AdapterFusion on a mixed task: minipeft/fusion_study.py."""

import json
import statistics

import pytest

from minipeft import fusion_study
from minipeft.fusion_study import FRESH, FUSION, FusionPlan
from minipeft.town import TASKS

TASK_PAIR = ("question_answering", "new_facts")


def test_the_mix_holds_as_many_examples_of_every_source():
    plan = FusionPlan(TASK_PAIR)
    examples = fusion_study.mixed(plan, 0)
    texts = {task: {x.prompt for x in TASKS[task].train(0)} for task in TASK_PAIR}
    counts = {task: sum(x.prompt in texts[task] for x in examples) for task in TASK_PAIR}
    assert counts["question_answering"] == counts["new_facts"] == len(TASKS["new_facts"].train(0))
    # the larger source is there whole, each example once
    new = [x.prompt for x in examples if x.prompt in texts["new_facts"]]
    assert sorted(new) == sorted(x.prompt for x in TASKS["new_facts"].train(0))
    assert fusion_study.mixed(plan, 0) == examples != fusion_study.mixed(plan, 1)


def test_a_source_without_right_answers_is_refused_by_name():
    with pytest.raises(ValueError, match=r"dialect.*new_facts"):
        FusionPlan(("dialect", "mood"))
    with pytest.raises(ValueError, match="weather"):
        FusionPlan(("weather",))


def test_it_runs_and_only_the_fusion_differs_from_its_sources(tmp_path, capsys):
    command = ["--tasks", *TASK_PAIR, "--seeds", "0", "--steps", "2", "--bottleneck", "4"]
    fusion_study.main([*command, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "results.json").read_text())
    names = [cell["name"] for cell in results["cells"]]
    assert names == ["adapter of question answering", "adapter of new facts", FUSION, FRESH]
    for cell in results["cells"]:
        assert cell["quality"] == statistics.mean(cell["qualities"].values())
        assert list(cell["qualities"]) == list(TASK_PAIR)
    text = (tmp_path / "table.md").read_text()
    assert "| AdapterFusion |" in text and "| what answers | mixed | question answering" in text
    assert "seed 0: adapter of question answering" in capsys.readouterr().out


def test_the_table_shows_means_and_spreads():
    cell = {"name": "a", "qualities": {"mood": 0.5}}
    cells = [cell | {"seed": s, "quality": q} for s, q in enumerate((0.2, 0.4))]
    results = {"plan": {"tasks": ["mood"], "seeds": [0, 1]}, "cells": cells}
    _, head, rows = fusion_study.table(results)
    assert head == ["what answers", "mixed", "mood"]
    assert rows == [["a", "0.300 ± 0.14", "0.500 ± 0"]]
