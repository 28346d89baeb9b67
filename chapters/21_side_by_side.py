# %% [markdown]
# # 21. Side by side
#
# Twenty chapters, and every technique won in its own. **Which one should you
# take?** That question has an answer only if everybody starts from the same
# base, learns from the same examples for the same number of steps, at a rate
# chosen for it, and is scored on the same tests. `minipeft compare` did that,
# for hours; its results lie in the repository. This chapter reads them, draws
# the poster of the course, and runs one cell again to see whether it agrees.
#
# Afterwards you can read the poster with the caution it needs, and choose a
# technique by what you have: memory, time, data, many tasks or one. About 20
# minutes.

# %%
import json
import math
import statistics
from dataclasses import replace
from inspect import getsource

import torch
from minipeft import compare, figures, town
from minipeft.presets import PRESETS

import kit

folder = town.data_folder() / "results" / "all"
results = json.loads((folder / "results.json").read_text())
tasks, costs, plan = results["tasks"], results["costs"], results["plan"]
model, tokenizer = kit.base()
print(f"{len(costs)} techniques x {len(tasks)} tasks x seeds {plan['seeds']}")
print(f"on {results['date']}, torch {results['machine']['torch']}")

# %% [markdown]
# ## What one cell is
#
# One technique on one task with one seed: attach, train, test. This is the
# function that computed each of the numbers below:

# %%
kit.code(getsource(compare.run_cell))

# %% [markdown]
# ## One scale for all tasks
#
# Nats, shares of exact answers and accuracies do not add up. But on every task
# there is a base, which does nothing, and full fine-tuning, which may change
# everything. Between the two:
#
# $$\text{gain} = \frac{\text{quality} - \text{base}}
# {\text{full} - \text{base}}$$
#
# By hand: on a task in nats the base has 26, full fine-tuning 18, a technique
# 19. Its gain is $(19 - 26)/(18 - 26) = 7/8$. On a task in shares of exact
# answers with a base at 0 and full fine-tuning at 0.8, a technique at 0.6
# gains $0.75$. Lower is better on the first and higher on the second, and the
# quotient does not care. The library's own function on these numbers:

# %%
cells = [
    {"technique": name, "task": task, "seed": 0, "quality": quality}
    for task, found in {
        "one": {"base": 26.0, "full": 18.0, "X": 19.0},
        "two": {"base": 0.0, "full": 0.8, "X": 0.6},
    }.items()
    for name, quality in found.items()
]
paper = {
    "tasks": {"one": {}, "two": {}},
    "costs": {"full": {}, "X": {}},
    "cells": cells,
}
for task, gain in compare.gains(paper)["X"].items():
    print(f"task {task}: gain {gain:.4f}")

# %% [markdown]
# ## Who starts as a no-op, and how many numbers
#
# Every technique of the comparison, attached here to the shipped base: is it
# the base at the start, and does it train as many numbers as its formula says
# and as the results file remembers?

# %%
ids = torch.tensor([tokenizer.encode("Ada is kind .")])
with torch.no_grad():
    before = model(ids)
rows = []
for name in costs:
    technique = PRESETS[name].technique
    adapted = technique.attach(kit.base()[0]).eval()
    with torch.no_grad():
        gap = (adapted(ids) - before).abs().max().item()
    start = "the base, bitwise" if gap == 0 else f"off by {gap:.1g}"
    formula = technique.count(model.config)
    same = "yes" if formula == costs[name]["trained"] else "NO"
    rows.append([name, f"{formula:,}", same, start])
kit.table(
    ["technique", "trained, by formula", "as in the file", "start"], rows
)

# %% [markdown]
# Those that are off put random virtual tokens in front of the text, or begin
# with a small random bottleneck; their chapters say why.

# %% [markdown]
# ## Quality, task by task
#
# Means over seeds; how far seeds differ is a section of its own below. Below
# the techniques stand two lines that no experiment on real text can add: a
# perfect model that was not adapted, and the best that is possible. The last
# line says for how long each task was trained.

# %%
_, head, rows = compare.quality_table(results)
rows = [[cell.split(" ±")[0] for cell in row] for row in rows]
kit.table([name.replace("_", " ") for name in head], rows)

# %% [markdown]
# A flat prefix and P-tuning v2 agree in every digit. They should: at these
# settings they are the same function, as chapter 08 shows.

# %% [markdown]
# ## The picture: the poster
#
# To the right more trained parameters, on a logarithmic axis; up is better.
# The line is full fine-tuning, by definition 1.

# %%
found = compare.gains(results)
points = {
    name: (costs[name]["trained"], statistics.mean(gains.values()))
    for name, gains in found.items()
}
kit.picture(
    figures.quality_against_size,
    points,
    f"What is gained for what is trained: mean over {len(tasks)} tasks",
    "trained parameters",
    "share of what full fine-tuning gains",
    {"full fine-tuning": 1.0},
)

# %% [markdown]
# *In words:* one marker a technique. There is hardly a slope: some of the
# smallest stand nearly as high as the largest, and low markers occur at every
# size, prompts at the small end and gates or encoders at the large one.

# %%
names = sorted(points, key=lambda name: points[name][0])
front, best_so_far = [], -math.inf
for name in names:
    if points[name][1] > best_so_far:
        best_so_far = points[name][1]
        front.append(name)
print("nothing smaller is better than these:")
for name in front:
    size, gain = points[name]
    print(f"  {name:20} {size:9,} trained, gain {gain:.2f}")


def ranks(values):
    """1 for the smallest."""
    order = sorted(range(len(values)), key=values.__getitem__)
    return [order.index(n) + 1 for n in range(len(values))]


sizes = ranks([points[name][0] for name in names])
scores = ranks([points[name][1] for name in names])
rho = statistics.correlation(sizes, scores)
print(f"rank correlation of size and gain: {rho:.2f}")

# %% [markdown]
# Size is not capacity: *where* a number acts counts for more. Three thousand
# scales at the right places beat five times as many numbers in a prefix. The
# same results task by task:

# %%
order = sorted(found, key=lambda name: -points[name][1])
kit.picture(
    figures.heat_table,
    {
        name: {t.replace("_", " "): g for t, g in found[name].items()}
        for name in order
    },
    "Share of what full fine-tuning gains, task by task",
)

# %% [markdown]
# *In words:* a table of techniques against tasks, coloured by gain: whole
# columns in which nearly every technique gains all, and one, the new facts,
# that divides them: there adapters, low rank and whole layers gain from half
# to all, scales less than half, prompts, prefixes and biases hardly a quarter.

# %% [markdown]
# ## What it costs at home
#
# A technique that learned a dialect may have lost the stories it came with.
# Each can be taken off again (`detach`); but while it is on, this is what the
# model pays on its old stories, in nats.

# %%
moves = {
    name: tuple(
        compare.summary(results, "dialect", name, value)[0]
        for value in ("home", "quality")
    )
    for name in ("base", *costs)
}
before = moves.pop("base")
kit.picture(
    figures.forgetting,
    moves,
    before,
    "What learning a dialect costs at home",
)

# %% [markdown]
# *In words:* a star, the base, at the upper left; every technique lies lower,
# with a better dialect, and further right, with worse stories at home; the
# lowest are among those furthest right.

# %% [markdown]
# ## One cell again, live
#
# A results file is a claim. This runs one of its cells on your machine. The
# same code on the same machine gives the same digits; another machine, or a
# faster path that adds in another order, starts a run that drifts from the
# first bit on, by less than a seed does.

# %%
name, task, seed = "BitFit", "dialect", plan["seeds"][0]
again = compare.Plan({name: PRESETS[name]}, (task,), (seed,))
if kit.FAST:
    again = replace(again, steps=4)  # a try-out, not comparable
record = compare.run_cell(again, model, tokenizer, name, task, seed)
(claimed,) = (
    cell
    for cell in results["cells"]
    if (cell["technique"], cell["task"], cell["seed"]) == (name, task, seed)
)
spread = compare.summary(results, task, name)[1] or 0.0
print(f"{name} on {task}, seed {seed}")
for value in ("quality", "home"):
    print(f"  {value:8} file {claimed[value]:.4f}, here {record[value]:.4f}")
near = abs(claimed["quality"] - record["quality"]) < max(0.1, 3 * spread)
if not kit.FAST:
    kit.holds("within three standard deviations of seeds", near)

# %% [markdown]
# ## Training against the floor
#
# The curve of that cell, as it ran here, between the two lines of its task.

# %%
facts = tasks[task]
kit.picture(
    figures.learning_curves,
    {name: [tuple(point) for point in record["curve"]]},
    {"perfect, not adapted": facts["unadapted"], "floor": facts["best"]},
    f"{name} on the dialect, validation set",
    "nats a document",
)

# %% [markdown]
# *In words:* the curve falls from the line of a perfect model that was not
# adapted and flattens a little above the floor.

# %% [markdown]
# ## What goes wrong: differences that are none
#
# Two techniques differ by a hundredth. Is that a result? Compare the
# difference with how much the same technique differs from itself between
# seeds. Of all pairs on all tasks:

# %%
pairs = noise = 0
for task in tasks:
    rows = [compare.summary(results, task, name) for name in costs]
    for i, (mean_i, spread_i, _) in enumerate(rows):
        for mean_j, spread_j, _ in rows[:i]:
            pairs += 1
            own = math.hypot(spread_i or 0.0, spread_j or 0.0)
            noise += abs(mean_i - mean_j) <= own
print(f"{noise} of {pairs} differences are no larger than")
print(f"the spread between seeds: {noise / pairs:.0%}")

# %% [markdown]
# A ranking that breaks such ties tells you about seeds. Two more ways to be
# wrong: one learning rate for everybody, which ranks techniques by how well
# they like that rate; and a mean over tasks of which most are solved by all,
# which hides the one task that decides. And one that this chapter cannot
# repair: the base has a million weights. Orders of magnitude travel to larger
# models better than ranks do.

# %% [markdown]
# ## Exercises
#
# **21.1** Write the gain.


# %%
def answer(quality, base, full):
    """The share of full fine-tuning's way."""
    return None  # your code


kit.check("21.1", answer)

# %% [markdown]
# **21.2** The front: which techniques are not beaten by any that is at most as
# large?


# %%
def answer(points):
    """{name: (size, gain)} -> the set of names on the front."""
    return None  # your code


kit.check("21.2", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=PRESETS["BitFit"].technique.count(model.config))

# %% [markdown]
# ## Where to go next
#
# - `minipeft compare --techniques LoRA IA3 --tasks dialect` compares on your
#   machine. The settings and rates of this comparison: `minipeft/presets.py`.
# - Surveys that do this at scale: Han et al. 2024, arXiv 2403.14608; He et al.
#   2021, *Towards a Unified View of Parameter-Efficient Transfer Learning*,
#   arXiv 2110.04366, who explain why some of these are the same thing.
# - Next: chapter 22 takes what you trained to peft, transformers and a real
#   GPT-2.
