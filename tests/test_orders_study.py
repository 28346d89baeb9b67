"""The orders that papers report, as a comparison that runs: minipeft/orders_study.py."""

import pytest

from minipeft import orders_study
from minipeft.technique import WHERE, technique_class
from minipeft.town import load_base


def test_all_six_pairs_of_matrices_train_the_same_number_of_parameters():
    base, _ = load_base()
    plan = orders_study.orders_plan(("mood",))
    assert len({frozenset(pair) for pair in orders_study.PAIRS}) == 6
    counts = {
        preset.technique.count(base.config)
        for name, preset in plan.techniques.items()
        if name.startswith("LoRA") and name != "LoRA all"
    }
    # 4 layers, 2 matrices, 8 ranks, each a column of 128 and a row of 128 numbers
    assert counts == {4 * 2 * 8 * (128 + 128)}


def test_every_pair_scales_its_delta_alike():
    plan = orders_study.orders_plan(("mood",))
    chosen = [p.technique for name, p in plan.techniques.items() if name.startswith("LoRA")]
    scales = {technique.alpha / technique.rank for technique in chosen}
    assert scales == {2.0}


def test_qlora_and_lora_differ_in_the_base_alone():
    techniques = orders_study.orders_plan(("mood",)).techniques
    one, other = techniques["QLoRA all"], techniques["LoRA all"]
    assert one.rate == other.rate
    for name in ("rank", "alpha", "dropout"):
        assert getattr(one.technique, name) == getattr(other.technique, name)
    base, _ = load_base()
    assert one.technique.count(base.config) == other.technique.count(base.config)


def test_every_order_names_techniques_of_the_plan():
    names = orders_study.orders_plan(("mood",)).techniques.keys()
    assert {name for pair in orders_study.ORDERS.values() for name in pair} == set(names)
    assert technique_class("QLoRA").__name__ in WHERE


def cells(task, name, qualities):
    return [
        {"technique": name, "task": task, "seed": s, "quality": q} for s, q in enumerate(qualities)
    ]


def test_a_verdict_counts_seeds_and_knows_that_fewer_nats_are_better():
    results = {
        "tasks": {"dialect": {"metric": "nats"}, "mood": {"metric": "accuracy"}},
        "cells": cells("dialect", "LoRA qv", (18.0, 20.0))
        + cells("dialect", "LoRA qk", (19.0, 19.0))
        + cells("mood", "LoRA qv", (0.9, 0.8))
        + cells("mood", "LoRA qk", (0.5, 0.7, 0.99)),
    }
    found = {task: rest for claim, task, *rest in orders_study.verdicts(results)}
    assert found == {
        "dialect": [19.0, 19.0, 1, 2],
        "mood": [pytest.approx(0.85), pytest.approx(0.6), 2, 2],  # the third seed has no pair
    }
    _, _, rows = orders_study.verdict_table(orders_study.verdicts(results))
    assert rows[0] == ["q and v over q and k", "dialect", "19.000", "19.000", "1 of 2"]


def test_it_runs_from_the_command_line(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(orders_study, "compare", lambda plan, out, jobs: seen.append((plan, out)))
    orders_study.main(["--tasks", "mood", "--seeds", "1", "--steps", "2", "--out", str(tmp_path)])
    ((plan, out),) = seen
    assert (plan.tasks, plan.seeds, plan.steps, out) == (("mood",), (1,), 2, tmp_path)
