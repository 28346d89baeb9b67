# %% [markdown]
# # 14. Diff pruning: which few numbers must change?
#
# **The question.** Full fine-tuning changes every number of a model a little.
# If only one in two hundred may change, which ones? Diff pruning lets every
# number move, puts a gate in front of each change that can learn to be
# *exactly* zero, and keeps the few changes that survive.
#
# After this chapter you can build a gate that is exactly 0 or 1 and still has
# a gradient, say what the expected number of open gates costs, read where a
# model wants to be changed, and explain why a small file does not mean cheap
# training. Reading and running: about 25 minutes.

# %%
import copy
from collections import Counter
from inspect import getsource

import minipeft
import torch
from minipeft import DiffPruning, figures, report, town
from minipeft.dataset import encode_all
from minipeft.evaluation import nats
from minipeft.selective import diff_pruning
from minipeft.selective.diff_pruning import changes_of
from minipeft.technique import attachment_of
from minipeft.training import TrainingConfig, train

import kit

# %% [markdown]
# ## The equations
#
# Every parameter gets a change $w$ and a gate $z$:
#
# $$\theta = \theta_0 + z \odot w \qquad \text{(Diff 1)}$$
#
# A gate is a soft coin, stretched over both its ends and cut off there, so
# that 0 and 1 are hit exactly and often. $u$ is uniform on (0, 1), $\alpha$
# is learned, and $(l, r) = (-1.5, 1.5)$:
#
# $$s = \sigma(\log u - \log(1 - u) + \alpha) \qquad \text{(Diff 2)}$$
# $$z = \min(1, \max(0, (r - l)\, s + l)) \qquad \text{(Diff 3)}$$
#
# How many gates are open cannot be differentiated, but how many are
# *expected* to be open can, and is added to the loss:
#
# $$P(z > 0) = \sigma(\alpha - \log(-l / r)) \qquad \text{(Diff 5)}$$
# $$\text{loss} + \lambda\, \frac{1}{N} \textstyle\sum P(z > 0)
#   \qquad \text{(Diff 6)}$$
#
# In the structured form a gate for each tensor is multiplied on,
# $z_i = z'_i z_g$ (Diff 7). After the first part of training the largest
# share of all $|z \odot w|$ becomes the mask (Diff 8), and what is in it is
# tuned on.
#
# ## By hand
#
# **Three coins** for a gate with $\alpha = 0$, where $s = u$ because
# $\sigma(\log \frac{u}{1-u}) = u$:
#
# 1. $u = 0.4$: $3 \cdot 0.4 - 1.5 = -0.3$, cut off: $z = 0$. Exactly shut.
# 2. $u = 0.6$: $3 \cdot 0.6 - 1.5 = 0.3$: half-way, and here is the gradient.
# 3. $u = 0.9$: $3 \cdot 0.9 - 1.5 = 1.2$, cut off: $z = 1$. Exactly open.
#
# **The probability**: $-l/r = 1$ and $\log 1 = 0$, so
# $P(z > 0) = \sigma(0) = \tfrac12$. A gate is shut for every $u$ below a half.
#
# **A mask**: of the changes $(0.1, -0.9, 0.3, 0.2)$ the share $\tfrac12$ that
# is largest in size is the second and the third.

# %%
u = torch.tensor([0.4, 0.6, 0.9])
gates = diff_pruning.drawn_gates(torch.zeros(3), u)
print("gates:", [round(z, 4) for z in gates.tolist()])
print("P(z > 0):", diff_pruning.open_probability(torch.tensor(0.0)).item())
many = diff_pruning.drawn_gates(torch.zeros(100_000), torch.rand(100_000))
print(f"of 100,000 coins: {(many > 0).double().mean():.3f} open,", end=" ")
print(f"{(many == 0).double().mean():.3f} exactly 0,", end=" ")
print(f"{(many == 1).double().mean():.3f} exactly 1")
changes = torch.tensor([0.1, -0.9, 0.3, 0.2])
print("mask:", diff_pruning.largest([changes], 0.5)[0].tolist())

# %% [markdown]
# ## The library's own source
#
# The gate in three lines, and the change of one tensor.

# %%
kit.code(
    getsource(diff_pruning.stretch),
    getsource(diff_pruning.drawn_gates),
    getsource(diff_pruning.open_probability),
    getsource(diff_pruning.SparseChange),
    getsource(diff_pruning.largest),
)

# %% [markdown]
# ## At the start: nothing
#
# All changes are 0, so with gates wide open the model is the base, in every
# bit. Gates begin open ($\alpha = 5$): shut gates would have no gradient, and
# nothing would ever start.

# %%
model, tokenizer = kit.base()
text = "Jack was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
before = model(ids)
technique = DiffPruning(sparsity=0.005, structured=False, l0_weight=10.0)
start = technique.attach(copy.deepcopy(model))
kit.holds("the model is the base, bitwise", start(ids).equal(before))

# %% [markdown]
# ## How many numbers
#
# While training: a change and a gate for each of the $N$ parameters, twice
# the model (and one more gate for each tensor if structured). In the file:
# the share `sparsity` of $N$, each with its place, which costs as much as a
# value.

# %%
N = sum(p.numel() for p in model.parameters())
kept = int(technique.sparsity * N)
print(f"2 N             2 x {N:,} = {2 * N:,}")
print(f"measured        {report(start).trained:,}")
print(f"kept            0.005 x {N:,} = {kept:,}")
print(f"file            8 x {kept:,} = {8 * kept:,} bytes")
print(f"the whole model 4 x {N:,} = {4 * N:,} bytes")

# %% [markdown]
# ## Training against the floor
#
# *Dialect*, with a gate for each number alone, and with one for each tensor
# on top. Half of the steps find the mask, half tune what is in it. We count
# how many parameters differ from the base just before the mask is fixed, and
# at the end.

# %%
STEPS, test = kit.steps(240), kit.some(town.TASKS["dialect"].test()[:200])
data = encode_all(town.TASKS["dialect"].train(), tokenizer)
moved, curves, adapted = {}, {}, {}


def count_moved(model, step, steps):
    """Note how many parameters are not the base's, without coins."""
    if step in (steps // 2 - 1, steps):
        changes = changes_of(attachment_of(model)).values()
        moved[step] = sum(int((c.settled() != 0).sum()) for c in changes)


for name, structured in (
    ("one for each number", False),
    ("tensors too", True),
):
    model = kit.base()[0]
    DiffPruning(0.005, structured, l0_weight=10.0).attach(model)
    result = train(
        model,
        data,
        TrainingConfig(steps=STEPS, eval_every=STEPS // 4, device="cpu"),
        evaluate=lambda model: nats(model, test, tokenizer),
        after_step=(count_moved,),
        show=False,
    )
    adapted[name] = model
    curves[name] = [(n, values["value"]) for n, values in result.evaluations]
    print(f"gates, {name}: {curves[name][-1][1]:.2f} nats")
    for step, count in moved.items():
        print(f"    after step {step:3} {count:7,} parameters differ")
best = kit.optimum("dialect", 200)
print(f"floor: {best['floor']:.2f} nats")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Learning a dialect with one number in two hundred",
    "nats a document",
)

# %% [markdown]
# *In words:* with a gate for each number the curve falls almost onto the floor
# and stays there when the mask is fixed; with gates for whole tensors as well
# it falls more slowly and stops further up.
#
# One number in two hundred, and most of the way is done. Gates for tensors
# are a coarse tool: at this $\lambda$ they shut nearly everything before the
# mask is chosen, and a mask that asks for 4,574 numbers finds hardly any that
# have moved. $\lambda$ must fit the length of the training; count what is
# open before you believe a mask.
#
# ## The picture: where a model wants to be changed
#
# If chance had chosen, every kind of tensor would get the same share. These
# are the shares that training chose, by kind, over all layers.

# %%
tuned, place = adapted["one for each number"], {}
for path, change in changes_of(attachment_of(tuned)).items():
    name = path.replace(".change", "")
    kind = ".".join(p for p in name.split(".") if not p.isdigit())
    kind = kind.replace("blocks.", "").replace(".weight", "")
    count, size = place.get(kind, (0, 0))
    here = int((change.settled() != 0).sum())
    place[kind] = count + here, size + change.w.numel()
share = {kind: 100 * count / size for kind, (count, size) in place.items()}
order = sorted(share, key=share.get)

least, chance = 0.002, 100 * technique.sparsity
figure, axis = kit.canvas(7.6, 5.2)
axis.set_xscale("log")
width = [max(share[k] - least, 0) for k in order]
axis.barh(order, width, left=least, color=kit.COLOURS[0])
axis.axvline(chance, color=kit.COLOURS[1], linestyle="--")
axis.text(
    chance,
    len(order) - 0.3,
    " what chance would give",
    color=kit.COLOURS[1],
    fontsize=9,
)
for row, kind in enumerate(order):
    axis.text(
        1.08 * max(share[kind], least),
        row,
        f"{place[kind][0]:,}",
        va="center",
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )
axis.grid(axis="y", visible=False)
axis.set(
    xlabel="changed numbers, % of this kind (logarithmic)",
    xlim=(least, 150),
    ylim=(-0.7, len(order)),
)
axis.set_title("Where the changes are (and how many)", loc="left", fontsize=11)
told = ", ".join(f"{k} {share[k]:.1f} %" for k in reversed(order[-4:]))
kit.show(figure, f"Share of changed numbers by kind, the largest: {told}.")

# %% [markdown]
# *In words:* bars of the share of changed numbers for every kind of tensor, on
# a logarithmic axis, with the number of changes written behind and a dashed
# line for chance. LayerNorms stand on top, the last one far above the rest;
# the matrices inside the blocks lie below the line.

# %%
sums = Counter()
for kind, (count, size) in place.items():
    vector = kind.endswith("bias") or "ln_" in kind
    sums["vectors" if vector else "matrices", "changed"] += count
    sums["vectors" if vector else "matrices", "all"] += size
for group in ("vectors", "matrices"):
    changed, size = sums[group, "changed"], sums[group, "all"]
    print(f"{group:9} {changed:5,} of {size:7,} changed, {changed / size:.2%}")

# %% [markdown]
# Vectors are changed several times as often as matrices, and among them the
# LayerNorms: a method that trains these alone (`LayerNormTuning`) makes by
# hand a choice that training makes by itself. Counted, most changes are in
# the table of words, which is the head as well: a dialect is, first of all,
# other words.

# %% [markdown]
# ## What goes wrong
#
# After the mask is fixed, its shut gates must stay shut. But Adam remembers:
# its momentum moves a number on for many steps after its gradient has become
# zero. So the mask has to be put back after *every* step.


# %%
def sparse_at_the_end(package):
    """After training exactly the share that was asked for differs."""
    model, tokenizer = kit.base()
    package.DiffPruning(sparsity=0.005, fix_at=0.5).attach(model)
    kit.learn(model, tokenizer, "dialect", 8, 1, score_on=8)
    attachment = package.technique.attachment_of(model)
    from minipeft.selective.diff_pruning import changes_of

    changes = changes_of(attachment).values()
    differ = sum(int((c.w != 0).sum()) for c in changes)
    kit.holds(f"{kept:,} numbers differ", differ == kept)
    print(f"changes that are not 0: {differ:,}")


sparse_at_the_end(minipeft)
print()
with kit.planted("diff_pruning", "the mask is not put back") as bug:
    sparse_at_the_end(bug)

# %% [markdown]
# The shut gates hide the changes from the model's output, so the loss tells
# nothing. But the changes are there, and whoever writes them to a file, or
# counts them, gets another model than the one that was tuned. The invariant
# is a number that can be written down before training: count it.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **14.1** A drawn gate, (Diff 2) and (Diff 3), elementwise.


# %%
def answer(alpha, u):
    """alpha, u: tensors of one shape -> gates z of that shape."""
    return None  # your code


kit.check("14.1", answer)

# %% [markdown]
# **14.2** The mask (Diff 8) over *all* tensors of a list together.


# %%
def answer(changes, share):
    """List of tensors -> list of bool tensors of the same shapes."""
    return None  # your code


kit.check("14.2", answer)

# %% [markdown]
# **14.3** Values are stored in 4 bytes and places in 4 bytes. Up to which
# share of changed numbers is the sparse file smaller than the dense one? And
# how many bytes has the sparse file at a given share of N numbers?


# %%
def answer(N, share):
    """(largest share that pays, bytes of the sparse file)."""
    return None  # your code


kit.check("14.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=technique.count(model.config))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/selective/diff_pruning.py`; what it writes:
#   `minipeft/selective/sparse_files.py`.
# - The papers: Guo et al. 2020, *Parameter-Efficient Transfer Learning with
#   Diff Pruning*, arXiv 2012.07463; the gates are from Louizos et al. 2017,
#   arXiv 1712.01312.
# - Next: chapter 15 leaves all numbers in place and writes them in fewer bits.
