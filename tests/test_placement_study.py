"""The study of placement as a comparison that runs: minipeft/placement_study.py."""

import json

import pytest

from minipeft import Adapter, MAMAdapter, PrefixTuning, placement_study
from minipeft.compare import BASE


def test_the_plan_compares_every_placement_at_its_technique_s_rate():
    plan = placement_study.placement_plan(("mood",), (0, 1), steps=7, bottleneck=8)
    assert len(plan.techniques) == 7
    for preset in plan.techniques.values():
        assert preset.rate == preset.technique.learning_rate
    adapters = [p for p in plan.techniques.values() if isinstance(p.technique, Adapter)]
    assert len({p.rate for p in adapters}) == 1 and {p.technique.bottleneck for p in adapters} == {
        8
    }
    kinds = {type(p.technique) for p in plan.techniques.values()}
    assert kinds == {Adapter, PrefixTuning, MAMAdapter}
    assert len(list(plan.cells())) == 1 + 2 * 7 and plan.steps == 7


def test_it_runs_from_the_command_line_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["--tasks", "question_answering", "--seeds", "0", "--steps", "2"]
    command += ["--bottleneck", "4", "--scale", "2", "--out", str(tmp_path)]
    placement_study.main(command)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["plan"]["seeds"] == [0]
    names = [cell["technique"] for cell in results["cells"]]
    assert names == [BASE, *placement_study.placement_study(4, 2.0)]
    trained = {results["costs"][name]["trained"] for name in names[1:]}
    assert max(trained) < 1.15 * min(trained)  # m = 4: a bias of D + m beside 2 D m = 8 D weights
    assert "parallel, feed-forward" in (tmp_path / "table.md").read_text()
    written = (tmp_path / "cells.jsonl").read_text()
    placement_study.main(command)
    assert (tmp_path / "cells.jsonl").read_text() == written


def test_an_unknown_task_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ValueError, match="moods"):
        placement_study.main(["--tasks", "moods", "--out", str(tmp_path)])


def test_what_is_asked_for_on_the_command_line_reaches_the_plan(monkeypatch):
    plans = []
    monkeypatch.setattr(placement_study, "compare", lambda plan, *_, **__: plans.append(plan))
    placement_study.main(["--steps", "7", "--bottleneck", "8", "--scale", "2.5"])
    expected = placement_study.placement_plan(["dialect", "mood"], [0, 1, 2], 7, 8, 2.5)
    assert plans == [expected]
    assert plans != [placement_study.placement_plan(["dialect", "mood"], [0, 1, 2])]
