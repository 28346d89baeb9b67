"""The specification of minipeft/figures.py."""

import itertools

import pytest

from minipeft import figures

CURVES = {"LoRA": [(0, 31.0), (100, 25.0)], "BitFit": [(0, 31.0), (100, 25.1)]}


def is_png(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_learning_curves_are_drawn_with_their_references(tmp_path):
    path, alt = figures.learning_curves(
        tmp_path / "a.png", CURVES, {"floor": 23.7}, "Dialect", "nats a document"
    )
    assert is_png(path)
    assert "LoRA ends at 25.00" in alt and "floor at 23.70" in alt


def test_ratios_are_drawn_and_said(tmp_path):
    rows = [("a step: peft", 0.85, 0.8, 0.9), ("NF4: bitsandbytes", 2.4, 2.3, 2.5)]
    path, alt = figures.ratios(tmp_path / "r.png", rows, "Ours over theirs")
    assert is_png(path)
    assert alt == "Ours over theirs: a step: peft 0.85; NF4: bitsandbytes 2.40."


def test_panels_are_drawn_and_every_point_of_each_is_said(tmp_path):
    parts = {"before": CURVES, "after": {"LoRA": [(5, 2.0)], "BitFit": [(5, 2.1)]}}
    path, alt = figures.panels(tmp_path / "p.png", parts, "Title", "x", "y")
    assert is_png(path)
    assert alt == (
        "Title. before, LoRA: 31 at 0, 25 at 100; before, BitFit: 31 at 0, 25.1 at 100; "
        "after, LoRA: 2 at 5; after, BitFit: 2.1 at 5."
    )


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("a.png", "b.png"):
        figures.learning_curves(tmp_path / name, CURVES, {"floor": 23.7}, "t", "y")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_the_poster_and_the_forgetting_picture_are_drawn(tmp_path):
    points = {f"technique {n}": (10**n, 0.5 + 0.05 * n) for n in range(2, 7)}
    path, alt = figures.quality_against_size(
        tmp_path / "p.png", points, "t", "x", "y", {"Bayes": 1}
    )
    assert is_png(path) and "technique 2 100 0.60" in alt
    moves = {"LoRA": (24.0, 25.0), "full": (26.0, 24.0)}
    path, alt = figures.forgetting(tmp_path / "f.png", moves, (23.0, 31.0), "t")
    assert is_png(path) and "base: home 23.0, new 31.0" in alt


def test_a_table_of_shares_is_drawn_with_gaps(tmp_path):
    table = {"LoRA": {"a b": 0.5, "c": 1.1}, "prompt": {"c": -0.2}}
    path, alt = figures.heat_table(tmp_path / "h.png", table, "t")
    assert is_png(path) and "LoRA: a b 0.50, c 1.10; prompt: c -0.20" in alt


def test_labels_are_moved_apart_and_keep_their_order():
    placed = figures.spread([5.0, 5.1, 5.05, 9.0], gap=1.0)
    order = sorted(range(4), key=lambda n: placed[n])
    assert order == [0, 2, 1, 3]
    heights = sorted(placed)
    assert all(b - a >= 1.0 - 1e-9 for a, b in itertools.pairwise(heights))


def test_labels_far_apart_stay_where_they_are():
    assert figures.spread([1.0, 5.0], gap=1.0) == [1.0, 5.0]


def test_a_lone_label_stays_beside_its_line_whatever_the_others_need():
    assert figures.spread([18.0, 25.0, 25.1], gap=1.0) == pytest.approx([18.0, 24.55, 25.55])
    assert figures.spread([], gap=1.0) == []


def test_the_floor_is_drawn_inside_of_the_frame_however_near_the_curves_come():
    """matplotlib leaves the limits alone when a line falls into the curves' margin."""
    _, axis = figures.canvas()
    ends = figures.draw_curves(axis, {"LoRA": [(0, 26.0), (100, 18.4)]})
    figures.draw_references(axis, {"floor": 18.1}, 100)
    low, high = axis.get_ylim()
    assert low < 18.1 - 0.03 * (high - low)
    figures.label_lines(axis, [*ends, (40, 22.0, "ends early", "#000000")])
    lines = [text.arrow_patch.get_linestyle() for text in axis.texts]
    assert lines == ["solid", ":"]


def test_the_first_twenty_styles_all_differ():
    drawn = list(itertools.islice(figures.styles(), 20))
    assert len(set(drawn)) == 20


@pytest.mark.parametrize("colour", figures.COLOURS)
def test_every_colour_reaches_a_contrast_of_three_on_white(colour):
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert 1.05 / (luminance + 0.05) >= 2.9  # WCAG's formula; the palest, #CC79A7, reaches 2.98
