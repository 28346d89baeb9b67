"""The specification of minipeft/compare.py, minipeft/presets.py and minipeft/readme.py."""

import concurrent.futures
import json
import math

import pytest

from minipeft import compare, readme
from minipeft.atomic import write_json
from minipeft.compare import BASE, Plan, chosen_presets
from minipeft.presets import PRESETS
from minipeft.technique import WHERE
from minipeft.town import TASKS, data_folder

TINY = {"tasks": ("question_answering",), "steps": 4, "batch_size": 4}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, results) of a comparison of two techniques, four steps each."""
    folder = tmp_path_factory.mktemp("compare")
    plan = Plan(chosen_presets(("lora", "BitFit")), **TINY, adapters=str(folder / "adapters"))
    return folder, compare.compare(plan, folder, jobs=1)


def test_names_are_found_in_any_spelling():
    assert list(chosen_presets(("lora-all", "LoRA_ALL", "FULL"))) == ["LoRA all", "full"]
    assert set(chosen_presets(("all",))) == set(PRESETS)


@pytest.mark.parametrize(("tasks", "seeds"), [((), (0,)), (("mood",), ())])
def test_nothing_to_compare_is_an_error(tmp_path, tasks, seeds):
    with pytest.raises(ValueError, match="at least one task and one seed"):
        compare.compare(Plan(chosen_presets(["LoRA"]), tasks, seeds), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_unknown_name_is_an_error():
    with pytest.raises(ValueError, match="lroa"):
        chosen_presets(("lroa",))


def test_every_preset_suits_the_shipped_base():
    from minipeft.town import load_base

    config = load_base()[0].config
    for preset in PRESETS.values():
        preset.technique.check(config)
        assert 0 < preset.rate < 1
        assert type(preset.technique).__name__ in WHERE


def test_every_cell_is_there_once_and_the_base_is_not_trained(finished):
    _, results = finished
    assert [c["technique"] for c in results["cells"]] == [BASE, "LoRA", "BitFit"]
    base = results["cells"][0]
    assert "curve" not in base
    for cell in results["cells"]:
        assert 0 <= cell["quality"] <= 1 and math.isfinite(cell["home"])


def test_costs_are_what_was_attached(finished):
    _, results = finished
    costs = results["costs"]
    assert costs["LoRA"]["trained"] == 4 * 2 * 8 * 2 * 128  # 4 layers, q and v, r (in + out)
    assert costs["LoRA"]["file_bytes"] > 4 * costs["LoRA"]["trained"]
    assert costs["BitFit"]["optimizer_bytes"] >= 8 * costs["BitFit"]["trained"]
    assert costs["LoRA"]["merged_ratio"] > 0


def test_the_same_cell_again_gives_the_same_numbers(finished):
    from minipeft.town import load_base

    _, results = finished
    plan = Plan(chosen_presets(("lora",)), **TINY)
    record = compare.run_cell(plan, *load_base(), "LoRA", "question_answering", 0)
    before = next(c for c in results["cells"] if c["technique"] == "LoRA")
    for name in ("quality", "home", "loss", "curve"):
        assert record[name] == before[name]


def test_finished_cells_are_not_run_again(finished, monkeypatch):
    folder, results = finished
    plan = Plan(chosen_presets(("lora", "BitFit")), **TINY)

    def refuse(*_):
        raise AssertionError("a cell was run again")

    monkeypatch.setattr(compare, "work", refuse)
    again = compare.run_cells(plan, data_folder() / "base", folder, 1, print)
    assert again == results["cells"]


def test_a_cell_that_was_trained_otherwise_is_run_again(finished, tmp_path, monkeypatch):
    """A task's steps or starts have changed since: the old record does not count."""
    _, results = finished
    plan = Plan(chosen_presets(("lora",)), **TINY)
    trained = next(c for c in results["cells"] if c["technique"] == "LoRA")
    assert compare.belongs(trained, plan)
    assert {k: trained[k] for k in ("steps", "learning_rate", "random_starts")} == {
        "steps": 4, "learning_rate": PRESETS["LoRA"].rate, "random_starts": 0,
    }  # fmt: skip
    new = trained | {"quality": -1.0}
    records = {"LoRA": new, BASE: results["cells"][0]}
    monkeypatch.setattr(compare, "work", lambda _, cell: records[cell[0]])
    monkeypatch.setattr(compare.concurrent.futures, "ProcessPoolExecutor", AtOnce)
    changed = [{k: v for k, v in trained.items() if k != "random_starts"}, trained | {"steps": 3}]
    for number, old in enumerate(changed):
        assert not compare.belongs(old, plan)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "cells.jsonl").write_text(json.dumps(old) + "\n")
        cells = compare.run_cells(plan, data_folder() / "base", folder, 1, print)
        assert cells == [results["cells"][0], new]


class AtOnce(concurrent.futures.ThreadPoolExecutor):
    """Threads in place of processes."""

    def __init__(self, jobs, *_):
        super().__init__(jobs)


def test_the_base_is_not_trained_and_so_has_no_settings():
    assert Plan(chosen_presets(("lora",)), ("mood",)).settings(BASE, "mood") == {}


def test_the_table_tells_how_long_each_task_was_trained(finished):
    _, results = finished
    assert results["tasks"]["question_answering"]["steps"] == 4
    _, _, rows = compare.quality_table(results)
    assert rows[-1] == ["steps of training", "4", "-"]


def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "cells.jsonl"
    whole = {"technique": "LoRA", "task": "mood", "seed": 0, "quality": 0.5}
    path.write_text(json.dumps(whole) + '\n{"technique": "Lo')
    assert compare.read_cells(path) == {("LoRA", "mood", 0): whole}


def test_a_folder_belongs_to_one_plan(finished):
    folder, _ = finished
    other = Plan(chosen_presets(("lora",)), **(TINY | {"steps": 5}))
    with pytest.raises(ValueError, match="steps"):
        compare.claim(folder, other)


def test_tables_and_pictures_come_from_the_file_alone(finished, tmp_path):
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    pictures = compare.publish(results, tmp_path)
    assert (tmp_path / "table.md").read_text() == (folder / "table.md").read_text()
    for name, alt in pictures.items():
        assert (tmp_path / name).exists() and len(alt) > 20


def test_the_adapters_of_the_first_seed_are_kept_where_asked(finished):
    folder, _ = finished
    kept = compare.adapter_folder(folder / "adapters", "LoRA", "question_answering")
    assert (kept / "adapter_model.safetensors").exists()


def test_sizes_read_as_people_say_them():
    said = [compare.in_bytes(n) for n in (7, 1000, 26_400, 3_700_000, 29_000_000, 2.5e9)]
    assert said == ["7.0 B", "1.0 kB", "26 kB", "3.7 MB", "29 MB", "2.5 GB"]


def test_the_mean_and_the_spread_are_over_seeds():
    cells = [{"technique": "a", "task": "t", "seed": s, "quality": q} for s, q in enumerate((1, 3))]
    mean, spread, runs = compare.summary({"cells": cells}, "t", "a")
    assert (mean, runs) == (2, 2) and spread == pytest.approx(math.sqrt(2))


def test_a_gain_is_the_share_of_full_fine_tunings_way_from_the_base():
    results = synthetic({"base": (30.0, 0.5), "full": (20.0, 0.5), "LoRA": (22.0, 0.9)})
    assert compare.gains(results) == {"LoRA": {"dialect": pytest.approx(0.8)}}
    _, head, rows = compare.gain_table(results)
    assert head == ["technique", "mean", "tasks at 0.90", "dialect"]
    assert rows == [["LoRA", "0.80", "0", "0.80"]]


def test_without_full_fine_tuning_there_are_no_gains():
    results = synthetic({"base": (30.0, 0.5), "LoRA": (22.0, 0.9)})
    assert compare.gains(results) == {} and len(compare.all_tables(results)) == 2


def test_a_crowd_of_techniques_gets_a_poster_in_place_of_curves(tmp_path):
    names = {f"technique {n}": (20.0 + n, 0.5 + n / 30) for n in range(compare.CROWD)}
    results = synthetic({"base": (30.0, 0.5), "full": (20.0, 0.9)} | names)
    pictures = compare.draw(results, tmp_path)
    assert list(pictures) == ["poster.png", "gains.png", "forgetting.png"]
    assert "technique 2 1,000 0.48" in pictures["poster.png"]  # (0.8 + 1 / 6) / 2
    assert "technique 3: Dialect 0.70, Mood 0.25" in pictures["gains.png"]


def test_every_metric_of_a_task_has_a_unit():
    assert {task.metric for task in TASKS.values()} <= compare.UNITS.keys()


def synthetic(qualities):
    """Results of a comparison whose qualities on two tasks are given."""
    cells = [
        {"technique": name, "task": task, "seed": 0, "quality": q, "home": 21.0, "curve": [[0, q]]}
        for name, pair in qualities.items()
        for task, q in zip(("dialect", "mood"), pair)
    ]
    facts = {"floor": 18.0, "unadapted": None, "chance": None, "best": None}
    tasks = {"dialect": facts | {"metric": "nats"}, "mood": facts | {"metric": "accuracy"}}
    one = {"trained": 1000, "share": 0.01, "file_bytes": 1, "optimizer_bytes": 1, "peak_bytes": 1}
    cost = one | {"step_ratio": 1.0, "inference_ratio": 1.0, "merged_ratio": None}
    costs = {name: cost for name in qualities if name != "base"}
    return {"cells": cells, "tasks": tasks, "costs": costs, "plan": {"seeds": [0]}}


def test_the_benchmarks_block_holds_ratios_floors_and_what_was_left_out(tmp_path, monkeypatch):
    machine = {"processor": "P", "system": "S", "threads": 1, "python": "3", "torch": "2"}
    result = {"name": "step", "note": "width 8", "peer": "peft", "ratio": 0.5, "ours": 0.25}
    result |= {"low": 0.4, "high": 0.6, "floor": 0.05, "extra": {"trained": 1234}}
    content = {"benchmark": "lora", "date": "today", "machine": machine, "left_out": ""}
    content |= {"rates": {"bandwidth": 2e9, "operations": 3e10}, "results": [result]}
    folder = tmp_path / "benchmarks"
    for name, changes in {
        "lora": {"gpu": "none here"},
        "nf4": {"benchmark": "nf4", "results": [], "left_out": "b is not installed", "gpu": "G"},
        "of-old": {"results": None},
    }.items():
        write_json(folder / f"{name}.json", content | changes)
    write_json(folder / "pictures.json", {"bench.png": "alt"})
    monkeypatch.setattr(readme, "data_folder", lambda: tmp_path)
    text = readme.benchmarks()
    row = "| step (width 8) | peft | **0.50** | 0.40 .. 0.60 | 250 | 20% | trained 1,234 |"
    assert row in text and text.count("**Against") == 1
    same = content | {"gpu": "none here", "results": [result | {"low": 0.5, "high": 0.5}]}
    assert "| **0.50** |  | 250 |" in readme.ratios([same]), "no rounds, no spread"
    assert "Left out: nf4, b is not installed." in text
    assert "2.0 GB/s" in text and "30 GFLOP/s" in text
    assert "No GPU was there: nothing is said about GPUs." in text and "GPU: G." in text
    assert "![alt](data/benchmarks/bench.png)" in text
    monkeypatch.setattr(readme, "data_folder", lambda: tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError):
        readme.benchmarks()


def test_the_readme_holds_what_the_results_files_say():
    path = data_folder().parent / "README.md"
    text = path.read_text()
    assert readme.filled(text, readme.blocks()) == text, "run: python -m minipeft.readme"
