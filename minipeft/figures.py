"""Every picture of the project, drawn from plain results (no model is touched here).

Colours are the four of Okabe and Ito's palette that reach a contrast of 3:1 on white, and black;
line styles and markers differ besides, so that a grey print reads as well. Lines are labelled where
they end instead of in a legend. Every function returns the path it wrote and an alt text.
"""

from __future__ import annotations

import itertools
import math

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", "-.", ":")


def styles():
    """(colour, marker, line style) triples, all different for as long as possible."""
    for n in itertools.count():
        yield COLOURS[n % 5], MARKERS[n % 7], LINES[(n + n // 5) % 4]


def canvas(width=7.0, height=4.2, columns=1):
    """A figure and its axes without the box's upper and right edge."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, (axes[0][0] if columns == 1 else axes[0])


def finish(figure, path):
    """Write the figure at 150 dots an inch, without the date that would change its bytes."""
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def spread(values, gap):
    """Move labels' heights apart so that neighbours differ by `gap`, keeping their order and, in
    the mean square, as near to their values as that allows.
    """
    order = sorted(range(len(values)), key=lambda n: values[n])
    groups = []  # [sum, count] of labels that touch, each taken down by the gaps below it
    for place, n in enumerate(order):
        groups.append([values[n] - place * gap, 1])
        while len(groups) > 1 and mean_of(groups[-2]) >= mean_of(groups[-1]):
            total, count = groups.pop()
            groups[-1] = [groups[-1][0] + total, groups[-1][1] + count]
    means = [mean_of(group) for group in groups for _ in range(group[1])]
    placed = [0.0] * len(values)
    for place, (n, mean) in enumerate(zip(order, means)):
        placed[n] = mean + place * gap
    return placed


def mean_of(group):
    """The mean of a [sum, count]."""
    return group[0] / group[1]


def label_lines(axis, ends, size=9):
    """Write each label right of the frame, as high as its line ends; ends: (x, y, text, colour).
    From a line that ends early a dotted one leads to its label.
    """
    there, back = (math.log10, lambda h: 10**h) if axis.get_yscale() == "log" else (float, float)
    low, high = map(there, axis.get_ylim())
    heights = map(back, spread([there(y) for _, y, _, _ in ends], 0.052 * (high - low)))
    right = max(x for x, _, _, _ in ends)
    for (x, y, text, colour), height in zip(ends, heights):
        way = {"color": colour} if x == right else {"color": "#777777", "linestyle": ":"}
        axis.annotate(
            text,
            xy=(x, y),
            xytext=(1.015, height),
            textcoords=axis.get_yaxis_transform(),
            color=colour,
            fontsize=size,
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.6} | way,
            annotation_clip=False,
        )


def draw_curves(axis, curves):
    """curves: {name: [(step, value), ...]}. Returns the ends for label_lines."""
    ends = []
    for (name, points), (colour, marker, line) in zip(curves.items(), styles()):
        steps, values = zip(*points)
        axis.plot(steps, values, line, color=colour, marker=marker, markersize=4, linewidth=1.4)
        ends.append((steps[-1], values[-1], name, colour))
    return ends


def draw_references(axis, references, right):
    """references: {text: value}: thin horizontal lines. Returns ends for label_lines."""
    ends = []
    for (text, value), line in zip(references.items(), ("-", "--", ":")):
        axis.axhline(value, color="#555555", linestyle=line, linewidth=1.0)
        ends.append((right, value, f"{text} {value:.2f}", "#555555"))
    axis.autoscale(axis="y")  # else a line just inside of the edge would lie on the edge
    return ends


def learning_curves(path, curves, references, title, ylabel):
    """Quality while training, one line a technique, with the best there can be drawn in.

    curves: {technique: [(step, value), ...]}; references: {text: value}, such as the floor and the
    score of a perfect model that was not adapted.
    """
    figure, axis = canvas(8.0, 4.6)
    ends = draw_curves(axis, curves)
    right = max(x for x, _, _, _ in ends)
    ends += draw_references(axis, references, right)
    label_lines(axis, ends)
    axis.set(xlabel="training step", ylabel=ylabel, xlim=(-0.02 * right, 1.015 * right))
    axis.set_title(title, loc="left", fontsize=11)
    finish(figure, path)
    lines = ", ".join(f"{name} ends at {points[-1][1]:.2f}" for name, points in curves.items())
    drawn = ", ".join(f"{text} at {value:.2f}" for text, value in references.items())
    return path, f"{title}: {lines}; drawn besides: {drawn}."


def families(path, curves, references, title, xlabel, ylabel, logarithmic=False, ticks=()):
    """Quality against size, one line a family of settings, sizes on a logarithmic axis.

    curves: {family: [(size, quality), ...]}, sorted by size; references: {text: quality};
    logarithmic: whether the qualities' axis is, too; ticks: sizes to name on the axis.
    """
    figure, axis = canvas(10.0, 6.4) if len(curves) > 8 else canvas(9.0, 5.4)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x >= 1000 else f"{x:.6g}")
    if ticks:
        axis.set_xticks(ticks)
    if logarithmic:
        axis.set_yscale("log")
    ends = draw_curves(axis, curves)
    right = max(x for x, _, _, _ in ends)
    ends += draw_references(axis, references, right)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, loc="left", fontsize=11)
    if logarithmic or len(curves) > 8:
        drawn = [point for points in curves.values() for point in points]
        place_labels(axis, {name: points[-1] for name, points in curves.items()}, drawn)
    else:
        label_lines(axis, ends, size=8)
    finish(figure, path)
    style = ".2g" if logarithmic else ".2f"
    told = "; ".join(
        f"{name}: " + ", ".join(f"{y:{style}} at {x:,.6g}" for x, y in points)
        for name, points in curves.items()
    )
    return path, f"{title}. {told}."


def panels(path, parts, title, xlabel, ylabel):
    """The same lines in several pictures side by side, with the same axes, the last one's ends
    named; qualities are on a logarithmic axis where all are above 0.

    parts: {heading: {name: [(x, y), ...]}}.
    """
    figure, axes = canvas(10.0, 4.6, len(parts))
    drawn = [points for curves in parts.values() for points in curves.values()]
    logarithmic = all(y > 0 for points in drawn for _, y in points)
    for axis, (heading, curves) in zip(axes, parts.items()):
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
        ends = draw_curves(axis, curves)
        axis.set(xlabel=xlabel)
        axis.set_title(heading, loc="left", fontsize=10)
        if axis is not axes[0]:
            axis.sharex(axes[0])
            axis.sharey(axes[0])
    axes[0].set(ylabel=ylabel)
    axes[0].autoscale()
    label_lines(axes[-1], ends, size=8)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    finish(figure, path)
    told = "; ".join(
        f"{heading}, {name}: " + ", ".join(f"{y:.3g} at {x:g}" for x, y in points)
        for heading, curves in parts.items()
        for name, points in curves.items()
    )
    return path, f"{title}. {told}."


def quality_against_size(path, points, title, xlabel, ylabel, references=None):
    """The poster: one marker a technique, trained parameters (log scale) against quality.

    points: {technique: (trained parameters, quality)}.
    """
    figure, axis = canvas(9.0, 5.6)
    axis.set_xscale("log")
    axis.grid(axis="x", color="#eeeeee", linewidth=0.6)
    for (size, quality), (colour, marker, _) in zip(points.values(), styles()):
        axis.plot([size], [quality], marker, color=colour, markersize=8)
    for text, value in (references or {}).items():
        axis.axhline(value, color="#555555", linestyle="--", linewidth=1.0)
        axis.annotate(text, (0, value), (6, 2), fontsize=8, color="#555555",
                      xycoords=axis.get_yaxis_transform(), textcoords="offset points")  # fmt: skip
    axis.margins(0.06, 0.08)
    axis.autoscale()
    place_labels(axis, points)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, loc="left", fontsize=11)
    finish(figure, path)
    return path, f"{title}: " + "; ".join(f"{n} {s:,} {q:.2f}" for n, (s, q) in points.items())


def place_labels(axis, points, avoid=()):
    """Name the markers, each label at the nearest spot inside where it overlaps none before it and
    no marker; avoid: more markers (x, y) to keep off.
    """
    figure = axis.figure
    figure.canvas.draw()
    frame, taken = axis.get_window_extent(), []
    for x, y in (*points.values(), *avoid):
        px, py = axis.transData.transform((x, y))
        taken.append((px - 8, py - 8, px + 8, py + 8))
    for name, (x, y) in points.items():
        px, py = axis.transData.transform((x, y))
        width, height = 6.6 * len(name) * figure.dpi / 100, 13 * figure.dpi / 100
        spots = itertools.product(
            (-6, 8, -20, 20, -32, 32, -46, 46, 60, 74, -60), (12, -12 - width)
        )
        for dy, dx in spots:
            box = (px + dx, py + dy, px + dx + width, py + dy + height)
            inside = box[1] > frame.y0 and box[3] < frame.y1 and box[0] > frame.x0
            if inside and not any(overlap(box, other) for other in taken):
                break
        else:  # a crowd: on the others rather than far away
            box = (px + 12, py - 6, px + 12 + width, py - 6 + height)
        taken.append(box)
        spot = axis.transData.inverted().transform((box[0], box[1] + height / 2))
        axis.annotate(
            name,
            xy=(x, y),
            xytext=spot,
            fontsize=8.5,
            va="center",
            bbox={"facecolor": "#ffffff", "edgecolor": "none", "pad": 0.8},  # over a line
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.5},
        )


def overlap(a, b):
    """Whether two boxes (left, low, right, high) share a point."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def heat_table(path, table, title):
    """Shares as a table of shaded cells, darker for more; the numbers stand in the cells.

    table: {row: {column: share}}; shares are shaded from 0 to 1, a missing one stays white.
    """
    rows, columns = list(table), list(dict.fromkeys(c for row in table.values() for c in row))
    figure, axis = canvas(2.6 + 0.95 * len(columns), 1.3 + 0.27 * len(rows))
    values = [[table[r].get(c, math.nan) for c in columns] for r in rows]
    axis.imshow(values, cmap="Blues", vmin=0, vmax=1.25, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "#ffffff" if value > 0.8 else "#000000"
            text = "-" if math.isnan(value) else f"{value:.2f}"
            axis.text(x, y, text, ha="center", va="center", fontsize=8.5, color=colour)
    axis.set_xticks(range(len(columns)), [c.replace(" ", "\n") for c in columns], fontsize=8.5)
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.xaxis.tick_top()
    axis.tick_params(length=0)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.grid(False)
    axis.set_title(title, loc="left", fontsize=11)
    finish(figure, path)
    told = "; ".join(
        f"{name}: " + ", ".join(f"{c} {v:.2f}" for c, v in row.items())
        for name, row in table.items()
    )
    return path, f"{title}. {told}."


def forgetting(path, points, base, title):
    """Home against new domain, nats a document: one marker a technique, the base in black.

    points: {technique: (home nats, new-domain nats)}; base: the same for the unadapted model.
    """
    crowd = len(points) > 8
    figure, axis = canvas(10.0, 7.4) if crowd else canvas(7.4, 4.8)
    everything = {"base": base} | points
    axis.plot(*base, "*", color="#000000", markersize=12)
    for (home, new), (colour, marker, _) in zip(points.values(), styles()):
        axis.plot([home], [new], marker, color=colour, markersize=8, zorder=4)
        if not crowd:
            axis.plot([base[0], home], [base[1], new], color=colour, linewidth=0.6, alpha=0.6)
    axis.margins(0.07)
    place_labels(axis, everything)
    axis.set(xlabel="home stories, nats a document", ylabel="new dialect, nats a document")
    axis.set_title(title, loc="left", fontsize=11)
    finish(figure, path)
    moved = "; ".join(f"{n}: home {h:.1f}, new {v:.1f}" for n, (h, v) in everything.items())
    return path, f"{title}. {moved}."


def ratios(path, rows, title):
    """Ratios of times, one a row, with their spread and a line at 1.

    rows: (label, ratio, low, high). Below 1 is faster than what it is compared with.
    """
    figure, axis = canvas(8.6, 1.2 + 0.24 * len(rows))
    heights = range(len(rows))[::-1]
    for height, (_, ratio, low, high) in zip(heights, rows):
        colour, marker = (COLOURS[0], "o") if ratio <= 1 else (COLOURS[1], "s")
        axis.plot([low, high], [height, height], color=colour, linewidth=3, alpha=0.4)
        axis.plot([ratio], [height], color=colour, marker=marker, markersize=5)
        axis.annotate(f"{ratio:.2f}", (1, height), (6, -3), fontsize=8,
                      xycoords=("axes fraction", "data"), textcoords="offset points")  # fmt: skip
    axis.axvline(1, color="#000000", linewidth=0.8)
    axis.set_yticks(list(heights), [label for label, *_ in rows], fontsize=8)
    axis.set_ylim(-0.7, len(rows) - 0.3)
    axis.set_xscale("log")
    steps = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20)
    least, most = min(low for _, _, low, _ in rows), max(high for *_, high in rows)
    shown = [t for t in steps if 0.7 * least <= t <= 1.5 * most] or [1]
    axis.set_xticks(shown, [f"{t:g}" for t in shown])
    axis.minorticks_off()
    axis.set_xlabel("time, ours / theirs (log scale; bars: 20th to 80th percentile of rounds)")
    axis.set_title(title, fontsize=9)
    said = "; ".join(f"{label} {ratio:.2f}" for label, ratio, *_ in rows)
    return finish(figure, path), f"{title}: {said}."


def paging(path, trace, title):
    """A pager's trace: time to the right, one row a page; bars where a page is resident.

    trace: (step, kind, page) in order, kind one of hit, fault, prefetch, evict.
    """
    figure, axis = canvas(8.0, 4.2)
    since, times, steps = {}, {}, {}
    for time, (step, kind, page) in enumerate(trace):
        steps.setdefault(step, time)
        times.setdefault(kind, []).append((time, page))
        if kind == "evict":
            axis.plot([since.pop(page, 0), time], [page, page], color="#bbbbbb", linewidth=3)
        else:
            since.setdefault(page, time)
    for page, start in since.items():
        axis.plot([start, len(trace)], [page, page], color="#bbbbbb", linewidth=3)
    for kind, colour, marker in zip(("hit", "fault", "prefetch", "evict"), COLOURS, "oXs|"):
        if kind in times:
            axis.plot(*zip(*times[kind]), marker, color=colour, markersize=6, label=kind)
    for time in steps.values():
        axis.axvline(time - 0.5, color="#dddddd", linewidth=0.8, zorder=0)
    axis.set(xlabel="event (a thin line begins a step)", ylabel="page")
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=4, frameon=False)
    axis.set_title(title, loc="left", fontsize=11)
    finish(figure, path)
    names = {"hit": "hits", "fault": "faults", "prefetch": "prefetches", "evict": "evictions"}
    told = ", ".join(f"{len(times.get(kind, ()))} {name}" for kind, name in names.items())
    return path, f"{title}: {told} in {len(steps)} steps."
