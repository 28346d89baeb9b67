"""The study of placement as a comparison that runs: minipeft/placement_study.py."""

import json
import statistics

import pytest

from minipeft import Adapter, MAMAdapter, PrefixTuning, placement_study
from minipeft.compare import BASE
from minipeft.town import data_folder


def test_the_plan_compares_every_placement_at_its_technique_s_rate():
    plan = placement_study.placement_plan(("mood",), (0, 1), steps=7, bottleneck=8)
    assert len(plan.techniques) == 7
    for name, preset in plan.techniques.items():
        mix = name == "mix and match"
        assert preset.rate == (1e-2 if mix else preset.technique.learning_rate)
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


# -- what the README says about the committed study

ADAPTERS = ("sequential, {}", "parallel, {}")


@pytest.fixture(scope="module")
def qualities():
    """{(technique, task): a quality a seed}"""
    folder = data_folder() / "results" / "placement"
    results = json.loads((folder / "results.json").read_text())
    assert results["plan"]["seeds"] == [0, 1, 2]
    found = {}
    for cell in sorted(results["cells"], key=lambda cell: cell["seed"]):
        found.setdefault((cell["technique"], cell["task"]), []).append(cell["quality"])
    return found


def test_the_feed_forward_layer_is_the_place_for_the_dialect_and_attention_for_the_mood(qualities):
    for form in ADAPTERS:
        mlp, attn = (form.format(where) for where in ("feed-forward", "attention"))
        assert all(a < b for a, b in zip(qualities[mlp, "dialect"], qualities[attn, "dialect"]))
        assert all(a < b for a, b in zip(qualities[mlp, "mood"], qualities[attn, "mood"]))


def test_behind_is_better_than_beside_at_one_scale(qualities):
    for where in ("feed-forward", "attention"):
        behind, beside = (form.format(where) for form in ADAPTERS)
        assert all(
            a < b for a, b in zip(qualities[behind, "dialect"], qualities[beside, "dialect"])
        )
        assert all(a > b for a, b in zip(qualities[behind, "mood"], qualities[beside, "mood"]))


def test_a_scale_helps_the_parallel_adapter_most_of_all_on_the_mood(qualities):
    plain, scaled = "parallel, feed-forward", "scaled parallel, feed-forward"
    assert all(a < b for a, b in zip(qualities[scaled, "dialect"], qualities[plain, "dialect"]))
    assert all(a > b + 0.25 for a, b in zip(qualities[scaled, "mood"], qualities[plain, "mood"]))
    behind = qualities["sequential, feed-forward", "dialect"]
    assert all(a < b for a, b in zip(behind, qualities[scaled, "dialect"]))


def test_the_mix_beats_both_its_halves_on_the_dialect_but_not_the_adapter_behind(qualities):
    mix = qualities["mix and match", "dialect"]
    for half in ("scaled parallel, feed-forward", "prefix, attention"):
        assert all(a < b for a, b in zip(mix, qualities[half, "dialect"]))
    behind = qualities["sequential, feed-forward", "dialect"]
    assert all(a < b for a, b in zip(behind, mix))


def test_the_mix_is_first_on_the_mood_by_the_mean_and_within_the_spread(qualities):
    runs = {name: values for (name, task), values in qualities.items() if task == "mood"}
    order = sorted(runs, key=lambda name: -statistics.mean(runs[name]))
    assert order[0] == "mix and match"
    gap = statistics.mean(runs[order[0]]) - statistics.mean(runs[order[1]])
    assert gap < statistics.stdev(runs[order[0]])
