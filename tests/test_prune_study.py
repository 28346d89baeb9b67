"""The specification of minipeft/prune_study.py, and what its committed results say."""

import copy
import json
import statistics
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minipeft import prune_study, town
from minipeft.compressed.importance import KINDS, gate_importance, sizes_of, taylor_importance
from minipeft.compressed.magnitude_pruning import prune_magnitude
from minipeft.compressed.structured_pruning import widths
from minipeft.evaluation import nats
from minipeft.gpt import GPTConfig
from minipeft.prune import ShrinkOptions
from minipeft.prune_study import METHODS, PATTERNS, TICKETS, WAYS, Bench, Plan, study
from minipeft.tokenizer import Tokenizer
from tests.tiny import tiny_model

TEXTS = ["ab cd", "bead", "a", "cab dab", "dad", "faded cafe"] * 3
SMALL = Plan(
    steps=2,
    ticket_steps=2,
    rounds=2,
    ticket_width=16,
    documents=9,
    batch_size=4,
    piece=0.125,
    sparsities=(0.6, 0.9),
)
RESULTS = Path(__file__).parents[1] / "data" / "results" / "pruning"


@pytest.fixture(scope="module", autouse=True)
def small_world():
    tokenizer = Tokenizer({bytes([b]): b for b in range(256)})
    model = tiny_model(GPTConfig(tokenizer.vocab_size, 64, 2, 4, 32), torch.float32)
    texts = [t + str(n) for n, t in enumerate(TEXTS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(town, "load_base", lambda: (copy.deepcopy(model), tokenizer))
        patch.setattr(town, "held_out", lambda: tuple(TEXTS[:4]))
        patch.setattr(town, "pretraining_documents", lambda s, n: texts[s : s + n])
        patch.setattr(town, "mix_floor", lambda: 5.0)
        yield model, tokenizer


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    return study(folder, SMALL, seeds=(0, 1), say=lambda _: None), folder


def test_every_arm_has_a_value_a_seed(finished):
    results, _ = finished
    cells = {(c["comparison"], c["seed"]): c["nats"] for c in results["cells"]}
    assert set(cells) == {(c, s) for c in prune_study.COMPARISONS for s in (0, 1)}
    wanda = [cells["once", seed]["Wanda, 50 %"] for seed in (0, 1)]
    assert wanda[0] != wanda[1]  # the seed draws the calibration text
    for seed in (0, 1):
        assert set(cells["once", seed]) == {f"{m}, {p}" for m in METHODS for p in PATTERNS}
        assert len(set(cells["once", seed].values())) == 6
        units = cells["structured", seed]
        assert list(units) == list(WAYS)
        for way, found in units.items():
            alike = "every layer" in way  # four heads have no eighth and no three eighths
            assert list(found) == (["0.25", "0.5"] if alike else ["0.125", "0.25", "0.375", "0.5"])
            assert all(("trained on" in found[s]) == (s in ("0.25", "0.5")) for s in found)
            assert sum(found["0.5"]["heads"]) == 4 and sum(found["0.5"]["neurons"]) == 128
        assert len({f["0.5"]["before"] for f in units.values()}) == len(WAYS)
        gradual = cells["gradual", seed]
        assert [arm.split(",")[0] for arm in gradual] == ["60 %", "60 %", "90 %", "90 %"]
        assert len(set(gradual.values())) == 4
        assert list(cells["tickets", seed]["winning ticket"]) == ["1.0000", "0.5000", "0.2500"]
        assert set(cells["tickets", seed]) == set(TICKETS)


def test_a_value_is_the_pruned_model_s_loss(finished, small_world):
    model, tokenizer = small_world
    wanted = nats(
        prune_magnitude(copy.deepcopy(model), 0.5),
        [prune_study.Example(completion=t) for t in TEXTS[:4]],
        tokenizer,
    )
    assert finished[0]["cells"][0]["nats"]["magnitude, 50 %"] == wanted


@pytest.fixture
def bench(small_world):
    return Bench(SMALL, 0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", (0.25, 0.5))
def test_exactly_the_share_of_heads_and_neurons_is_out(bench, way, share):
    model = prune_study.take_out(bench, way, share)
    for kind in KINDS:
        whole, left = (sizes_of(m, kind) for m in (bench.base, model))
        assert sum(left) == (1 - share) * sum(whole)
        assert ("every layer" in way) <= ([n / m for n, m in zip(left, whole)] == [1 - share] * 2)
    assert widths(bench.base) == widths(town.load_base()[0]), "the base is left as it was"


def test_four_heads_have_no_eighth(bench):
    assert prune_study.take_out(bench, "Taylor, every layer alike", 0.125) is None


@pytest.mark.parametrize(
    ("ranking", "measure"), (("gates", gate_importance), ("Taylor", taylor_importance))
)
def test_ranked_again_takes_the_least_of_what_is_left_a_piece_at_a_time(bench, ranking, measure):
    """By hand: one head and an eighth of the neurons, twice; both ranked before either goes."""
    by_hand = copy.deepcopy(bench.base)
    for _ in range(2):
        heads, neurons = (measure(by_hand, bench.batches, kind) for kind in KINDS)
        _, layer, head = min((float(s), n, h) for n, i in enumerate(heads) for h, s in enumerate(i))
        order = sorted((float(s), n, u) for n, i in enumerate(neurons) for u, s in enumerate(i))
        gone = {n: [u for _, m, u in order[:32] if m == n] for n in (0, 1)}  # of 2 x 128
        prune_study.prune_heads(by_hand, {layer: [head]})
        prune_study.prune_neurons(by_hand, gone)
    found = prune_study.take_out(bench, f"{ranking}, ranked anew", 0.25)
    assert widths(found) == widths(by_hand)
    for mine, wanted in zip(found.parameters(), by_hand.parameters()):
        assert torch.equal(mine, wanted)


def test_training_on_reads_every_document_once_and_tickets_read_theirs(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(
        prune_study, "train", lambda model, rows, config, **_: seen.append((len(rows), config))
    )
    bench.train_on(bench.base)
    bench.train_ticket(bench.base, None)
    (rows, config), (of_tickets, ticket) = seen
    assert rows == config.steps * config.batch_size == 8
    assert of_tickets == 9 and ticket.learning_rate == 3e-3


def test_what_is_there_is_not_measured_again(finished, monkeypatch):
    results, folder = finished
    for name in prune_study.COMPARISONS:
        monkeypatch.setitem(prune_study.COMPARISONS, name, None)
    assert study(folder, SMALL, seeds=(0, 1))["cells"] == results["cells"]
    with pytest.raises(ValueError, match="'steps': 3"):
        study(folder, replace(SMALL, steps=3))


def test_the_table_is_made_of_the_results(finished):
    results, folder = finished
    text = (folder / "table.md").read_text()
    wanda = prune_study.values(results, "once", "Wanda, 2:4")
    assert f"| Wanda, 2:4 | {statistics.mean(wanda):.3f} ± {statistics.stdev(wanda):.3f} |" in text
    assert "| winning ticket |" in text and "25.0 % kept" in text
    before = prune_study.unit_values(results, "gates, ranked once", "0.125", "before")
    line = (
        f"| gates, ranked once | {statistics.mean(before):.3f} ± {statistics.stdev(before):.3f} |"
    )
    assert line in text and "| Taylor, every layer alike | - |" in text
    count = results["cells"][1]["nats"]["at random"]["0.5"]["parameters"]
    assert f"{count:,} ({100 * count / results['parameters']:.0f} %)" in text
    alts = json.loads((folder / "pictures.json").read_text())
    assert "winning ticket" in alts["tickets.png"]
    assert "after 2 steps, at random: " in alts["units.png"]
    assert all((folder / name).stat().st_size > 1000 for name in alts)


def test_a_curve_is_the_mean_over_seeds_above_the_base(finished):
    results, _ = finished
    points = prune_study.unit_curve(results, "at random", "trained on")
    runs = [c["nats"]["at random"] for c in results["cells"] if c["comparison"] == "structured"]
    wanted = statistics.mean(r["0.25"]["trained on"] for r in runs) - results["base"]
    assert [x for x, _ in points] == [25, 50] and points[0][1] == wanted


def test_the_start_of_the_other_ticket_is_another_and_the_same_each_time():
    config = GPTConfig(64, 16, 1, 1, 8)
    a, b, c = (prune_study.small_model(config, seed).embed.token.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_the_pipeline_s_table_is_kept_once(tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"prompt": "", "completion": "abc"}\n' * 9)
    options = ShrinkOptions(data=tmp_path / "texts.jsonl", steps=1, repeats=1, device="cpu")
    base = tmp_path / "base"
    model, tokenizer = town.load_base()
    model.save_pretrained(base)
    tokenizer.save(base)
    prune_study.shrink_once(tmp_path, replace(options, base=base))
    content = (tmp_path / "shrink.json").read_text()
    assert [s["name"] for s in json.loads(content)["stages"]][-1] == "quantised"
    assert str(tmp_path) not in content  # no folder of this machine
    prune_study.shrink_once(tmp_path, replace(options, base=tmp_path / "nowhere"))
    assert (tmp_path / "shrink.json").read_text() == content


def test_the_pipeline_s_table_says_speed_and_size_against_the_base():
    stage = {"parameters": 2000, "bytes": 8000, "seconds": 0.03, "quality": 20.0}
    small = stage | {"name": "pruned", "bytes": 2000, "seconds": 0.02, "quality": 21.5}
    options = {"task": "dialect", "heads": 0.5, "neurons": 0.25, "rounds": None}
    found = {"stages": [stage | {"name": "base"}, small], "options": options}
    title, head, rows = prune_study.shrink_table(found | {"metric": "nats", "best": 18.0})
    assert rows[1] == ["pruned", "2,000", "2,000 (25 %)", "1.50 x", "21.500"]
    assert rows[-1][-1] == "18.000" and head[-1] == "nats"
    assert "50 % of every layer's heads and 25 % of every layer's neurons" in title
    options["rounds"] = 8
    title, *_ = prune_study.shrink_table(found | {"metric": "nats", "best": 18.0})
    assert "50 % of all heads and 25 % of all neurons" in title


# -- what is committed


@pytest.fixture(scope="module")
def committed():
    return json.loads((RESULTS / "results.json").read_text())


def test_the_committed_results_are_whole(committed):
    cells = {(c["comparison"], c["seed"]) for c in committed["cells"]}
    assert cells == {(c, s) for c in prune_study.COMPARISONS for s in (0, 1, 2)}
    assert committed["plan"] == Plan().settings()
    assert (RESULTS / "table.md").read_text().strip() == prune_study.tables(committed)
    alts = json.loads((RESULTS / "pictures.json").read_text())
    assert set(alts) == {"units.png", "tickets.png"}
    assert all((RESULTS / name).exists() for name in alts)


# What the README says of them, seed by seed.


def units(committed, way, share, when):
    return prune_study.unit_values(committed, way, share, when)


def all_less(*runs):
    """Whether each list lies below the next, seed by seed."""
    return all(
        a < b for first, second in pairwise(runs) for a, b in zip(first, second, strict=True)
    )


@pytest.mark.parametrize("share", ("0.25", "0.5"))
@pytest.mark.parametrize("ranking", ("gates", "Taylor"))
def test_committed_importances_beat_chance_and_ranking_anew_beats_once(committed, ranking, share):
    ways = (f"{ranking}, ranked anew", f"{ranking}, ranked once", "at random")
    assert all_less(*[units(committed, w, share, "before") for w in ways])


@pytest.mark.parametrize("ranking", ("gates", "Taylor"))
def test_committed_one_order_is_enough_for_an_eighth_and_dear_for_half(committed, ranking):
    def above(way, share):
        return statistics.mean(units(committed, way, share, "before")) - committed["base"]

    once, anew = f"{ranking}, ranked once", f"{ranking}, ranked anew"
    assert above(once, "0.125") < 0.3 < 10 < above("at random", "0.125")
    assert 3 < above(once, "0.5") / above(anew, "0.5") < 5.1


def test_committed_units_taken_anywhere_beat_the_same_share_of_every_layer(committed):
    ways = ("Taylor, ranked once", "Taylor, every layer alike")
    for share in ("0.25", "0.5"):
        assert all_less(*[units(committed, w, share, "before") for w in ways])
        assert all_less(*[units(committed, w, share, "trained on") for w in ways])


def test_committed_training_brings_most_of_it_back_and_changes_the_order(committed):
    ranked = [way for way in WAYS if "ranked" in way]
    for way in ranked:
        for share, most in (("0.25", 0.2), ("0.5", 1.0)):
            after = units(committed, way, share, "trained on")
            assert max(after) - committed["base"] < most
    best = units(committed, "gates, ranked once", "0.5", "trained on")
    others = [w for w in WAYS if w != "gates, ranked once"]
    assert all(all_less(best, units(committed, w, "0.5", "trained on")) for w in others)
    dearest = (units(committed, w, "0.5", "before") for w in ("gates, ranked once", *ranked))
    assert all(max(values) == values[0] for values in zip(*dearest))


def test_committed_chance_took_the_first_layer_s_heads_once_and_that_did_not_come_back(committed):
    heads = units(committed, "at random", "0.5", "heads")
    after = units(committed, "at random", "0.5", "trained on")
    assert [h[0] for h in heads].count(0) == 1
    lost = [h[0] for h in heads].index(0)
    assert after[lost] - committed["base"] > 10
    assert all(v - committed["base"] < 3 for n, v in enumerate(after) if n != lost)


def test_the_committed_schedule_is_worth_something_at_nine_tenths_only(committed):
    arms = ("on the cubic schedule", "at once")
    slowly, once = (prune_study.values(committed, "gradual", f"90 %, {a}") for a in arms)
    assert all(b - a > 1 for a, b in zip(slowly, once))
    slowly, once = (prune_study.values(committed, "gradual", f"80 %, {a}") for a in arms)
    assert all(abs(b - a) < 0.05 for a, b in zip(slowly, once))


def test_committed_sparsegpt_is_best_and_wanda_second_where_places_are_free(committed):
    def runs(pattern, *methods):
        return [prune_study.values(committed, "once", f"{m}, {pattern}") for m in methods]

    assert all_less(*runs("50 %", "SparseGPT", "Wanda", "magnitude"))
    assert all_less(*runs("2:4", "SparseGPT", "magnitude", "Wanda"))


def test_the_committed_pipeline_says_size_speed_and_quality_of_every_step():
    stages = {s["name"]: s for s in json.loads((RESULTS / "shrink.json").read_text())["stages"]}
    assert list(stages) == ["base", "fine-tuned", "pruned", "distilled", "quantised"]
    dense, small = stages["fine-tuned"], stages["distilled"]
    assert small["bytes"] < 0.6 * dense["bytes"] and small["seconds"] < dense["seconds"]
    assert dense["quality"] < small["quality"] < stages["pruned"]["quality"]


def test_the_committed_timing_says_what_pruning_is_worth():
    path = RESULTS.parents[1] / "benchmarks" / "pruning.json"
    speed = {r["name"]: r["extra"]["speed-up"] for r in json.loads(path.read_text())["results"]}
    assert speed["half the heads and neurons"] >= 1.5
    assert speed["50 % of the weights zero"] < 1.1  # zeros bring nothing on dense kernels
