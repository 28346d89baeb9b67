"""What the terms of T-Few's loss are worth: minipeft/t_few_study.py."""

import copy
import json
import statistics
from types import SimpleNamespace

import pytest
import torch

from minipeft import IA3, t_few_study
from minipeft.t_few_study import BASE, FORMS, LOSSES, TFewPlan
from minipeft.town import TASKS, data_folder, load_base


def test_the_losses_add_one_term_after_the_other():
    assert list(LOSSES.values()) == [(1, 0, 0), (1, 1, 0), (1, 1, 1)]


def test_a_form_says_each_label_in_its_words():
    examples = TASKS["mood"].validation()[:20]
    _, tokenizer = load_base()
    for form, words in FORMS.items():
        told = t_few_study.said(examples, form)
        assert [x.prompt for x in told] == [x.prompt for x in examples]
        assert [x.completion for x in told] == [words[x.label] for x in examples]
    assert [x.completion for x in t_few_study.said(examples, "short answers")] == [
        x.completion for x in examples
    ]
    lengths = {f: {len(tokenizer.encode(t)) for t in words.values()} for f, words in FORMS.items()}
    assert len(lengths["short answers"]) == 1 and len(lengths["a long no"]) == 2


def test_shares_count_right_answers_by_the_mean_and_by_the_sum(monkeypatch):
    """A model that finds every token equally likely: by the sum the short answer wins always."""
    model, tokenizer = load_base()
    with torch.no_grad():
        model.ln_f.weight.zero_(), model.ln_f.bias.zero_()
    examples = TASKS["mood"].validation()[:41]
    yes = sum(x.label == "yes" for x in examples) / 41
    monkeypatch.setitem(FORMS, "a long yes", {"yes": " yes . It was a good day .", "no": " no ."})
    for form, short in (("a long no", yes), ("a long yes", 1 - yes)):
        found = t_few_study.shares(model, examples, form, tokenizer)
        assert found["sum"] == pytest.approx(short) and 0 < yes < 1


def test_it_runs_from_the_command_line(tmp_path, capsys, monkeypatch):
    task = TASKS["mood"]
    monkeypatch.setattr(type(task), "test", lambda self: self.validation()[:20])
    command = ["--examples", "5", "--steps", "2", "--seeds", "0", "--out", str(tmp_path)]
    t_few_study.main(command)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["plan"]["examples"] == 5 and results["plan"]["steps"] == 2
    assert results["machine"]["threads"] == 1 and "torch" in results["machine"]
    cells = [(c["form"], c["loss"]) for c in results["cells"]]
    assert cells == [(f, BASE) for f in FORMS] + [(f, loss) for f in FORMS for loss in LOSSES]
    for cell in results["cells"]:
        if cell["form"] == "short answers":  # answers of one length: the comparisons agree
            assert cell["shares"]["mean"] == cell["shares"]["sum"]
    assert "| + length-normalised |" in (tmp_path / "table.md").read_text()
    assert "seed 0, a long no, + unlikelihood: by mean 0." in capsys.readouterr().out


def test_a_run_learns_from_the_plan_s_examples_of_its_seed_with_its_weights(tmp_path, monkeypatch):
    seen = []

    def learn(model, examples, form, tokenizer, weights, plan, seed):
        seen.append((examples, form, weights, seed))
        return SimpleNamespace(seconds=0.0)

    monkeypatch.setattr(t_few_study, "learn", learn)
    monkeypatch.setattr(t_few_study, "shares", lambda *_: {"mean": 0.5, "sum": 0.5})
    t_few_study.run(TFewPlan(7, seeds=(0, 3)), tmp_path, say=lambda line: None)
    expected = [
        (TASKS["mood"].train(seed)[:7], form, weights, seed)
        for seed in (0, 3)
        for form in FORMS
        for weights in LOSSES.values()
    ]
    assert seen == expected and seen[0][0] != seen[-1][0]


def test_the_weights_reach_the_loss():
    """The first step's loss is the sum of the terms that are asked for, so it grows by each."""
    base, tokenizer = load_base()
    plan, examples = TFewPlan(8, steps=1), TASKS["mood"].train(0)[:8]
    losses = []
    for weights in LOSSES.values():
        model = copy.deepcopy(base)
        done = t_few_study.learn(model, examples, "a long no", tokenizer, weights, plan, 0)
        losses += done.losses
        assert isinstance(model.attachments[0].technique, IA3)
    assert losses[0] < losses[1] < losses[2]


def test_the_table_shows_means_and_spreads():
    cells = [
        {"form": form, "loss": loss, "seed": seed, "shares": {"mean": mean, "sum": 0.5}}
        for form in FORMS
        for loss in (BASE, *LOSSES)
        for seed, mean in enumerate((0.2, 0.4))
    ]
    plan = {"examples": 3, "steps": 7, "seeds": [0, 1]}
    title, head, rows = t_few_study.table({"plan": plan, "best": 0.968, "cells": cells})
    assert "3 examples in 7 steps" in title and head[-1] == "a long no, by sum"
    assert rows[0] == [BASE, *["0.300 ± 0.14", "0.500 ± 0"] * 2]
    assert rows[-1] == ["best possible", *["0.968"] * 4] and len(rows) == 5


@pytest.mark.parametrize("examples", [0, 2001])
def test_more_examples_than_there_are_are_refused(examples):
    with pytest.raises(ValueError, match=f"examples={examples} must be from 1 to 2000"):
        TFewPlan(examples)


# -- what the README says about the committed study


@pytest.fixture(scope="module")
def found():
    """{(form, loss, score compared): a share of right answers a seed}"""
    results = json.loads((data_folder() / "results" / "t_few" / "results.json").read_text())
    assert results["plan"]["seeds"] == [0, 1, 2]
    assert results["plan"]["examples"] == 128 and results["plan"]["steps"] == 250
    shares = {}
    for cell in sorted(results["cells"], key=lambda cell: cell["seed"]):
        for by, share in cell["shares"].items():
            shares.setdefault((cell["form"], cell["loss"], by), []).append(share)
    return shares


LM, UNLIKELY, ALL = LOSSES


def test_from_few_examples_the_three_terms_together_are_best_in_every_seed(found):
    for loss in (LM, UNLIKELY):
        columns = (found["short answers", name, "mean"] for name in (ALL, loss))
        assert all(all_three > fewer for all_three, fewer in zip(*columns, strict=True))


def test_unlikelihood_alone_is_within_the_spread_of_language_modelling(found):
    for form in FORMS:
        both = [found[form, loss, "mean"] for loss in (LM, UNLIKELY)]
        gap = abs(statistics.mean(both[0]) - statistics.mean(both[1]))
        assert gap < max(statistics.stdev(runs) for runs in both)


def test_where_lengths_differ_answers_are_compared_better_by_the_mean_in_every_run(found):
    for loss in LOSSES:
        mean, total = (found["a long no", loss, by] for by in ("mean", "sum"))
        assert len(mean) == 3 and all(a > b for a, b in zip(mean, total))


def test_without_normalisation_the_third_term_makes_up_for_a_part(found):
    mean = {loss: statistics.mean(found["a long no", loss, "sum"]) for loss in LOSSES}
    assert mean[ALL] > mean[UNLIKELY] and mean[ALL] > mean[LM]
    assert mean[ALL] < statistics.mean(found["a long no", ALL, "mean"])
