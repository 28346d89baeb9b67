"""The specification of minipeft/compare.py, minipeft/presets.py and minipeft/readme.py."""

import json
import math

import pytest

from minipeft import compare, readme
from minipeft.compare import BASE, Plan, chosen_presets
from minipeft.presets import PRESETS
from minipeft.technique import WHERE
from minipeft.town import data_folder

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


def test_the_readme_holds_what_the_results_files_say():
    path = data_folder().parent / "README.md"
    text = path.read_text()
    assert readme.filled(text, readme.blocks()) == text, "run: python -m minipeft.readme"
