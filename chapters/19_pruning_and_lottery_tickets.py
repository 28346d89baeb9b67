# %% [markdown]
# # 19. Pruning and lottery tickets
#
# Set half the weights of a trained model to zero and it still speaks. **Which
# half? And if so few weights are enough, could the small network have been
# trained alone, from the start?** The first question is about importance: is
# a small weight unimportant, or a weight on a quiet input? The second is the
# lottery ticket hypothesis.
#
# Afterwards you can prune by hand by two rules and say when they disagree,
# take half of the heads out of a model with little harm and know how many
# parameters went, and find a winning ticket. About 35 minutes. Files in
# `minipeft/compressed/`: `magnitude_pruning.py`, `wanda.py`, `sparsegpt.py`,
# `structured_pruning.py`, `importance.py` and `lottery_ticket.py`.

# %%
import copy
import json
from inspect import getsource
from itertools import pairwise

import torch
from minipeft import GPT, GPTConfig, figures, prune_study, town
from minipeft.compressed import lottery_ticket as lottery
from minipeft.compressed import magnitude_pruning as magnitude
from minipeft.compressed import structured_pruning as structured
from minipeft.compressed import wanda
from minipeft.compressed.importance import (
    gate_importance,
    gated,
    least_important,
)
from minipeft.compressed.sparsegpt import prune_sparsegpt
from minipeft.dataset import Example, collate, encode_all
from minipeft.evaluation import nats
from minipeft.prune import lowest, shrink_anywhere
from minipeft.training import TrainingConfig, train

import kit

model, tokenizer = kit.base()

# %% [markdown]
# ## The equations
#
# A score for every weight; the lowest go, the rest are left as they are:
#
# $$m_{ij} = 0 \text{ for the } \lfloor s n \rfloor \text{ smallest of } n
# \text{ scores } |w_{ij}| \qquad \text{(Magnitude 1)}$$
#
# $$W \leftarrow m \odot W \text{ after every step} \qquad
# \text{(Magnitude 2)}$$
#
# $$S_{ij} = |W_{ij}|\, \lVert X_j \rVert_2, \text{ compared within a row}
# \qquad \text{(Wanda 1)}$$
#
# $s$ is the sparsity, the share of zeros; $X_j$ is everything that input $j$
# was on some text. Tickets are found by pruning again and again, and putting
# what is left back to where it began:
#
# $$m_{r+1} = m_r \text{ without its } \lfloor p k \rfloor \text{ smallest }
# |w| \text{ of the } k \text{ it keeps} \qquad \text{(Ticket 1)}$$
#
# $$\text{round } r \text{ trains from } m_r \odot \theta_0
# \qquad \text{(Ticket 3)}$$

# %% [markdown]
# ## Four weights by hand
#
# $$W = \begin{pmatrix} 3 & -0.5 \\ 0.6 & -2 \end{pmatrix}, \qquad
# \text{norms of the inputs } (0.1,\ 10)$$
#
# Half of the weights shall go.
#
# - *Magnitude* takes the two smallest: $-0.5$ and $0.6$.
# - *Wanda* scores the first row $(3 \cdot 0.1,\ 0.5 \cdot 10) = (0.3, 5)$ and
#   takes the $3$: it sits on an input that is hardly ever there. In the second
#   row the scores are $(0.06, 20)$, and the $0.6$ goes.
#
# For the input $(0.1, 10)$ the first output was $0.3 - 5 = -4.7$. Without the
# $0.5$ it is $0.3$; without the $3$ it is $-5$.

# %%
W = torch.tensor([[3.0, -0.5], [0.6, -2.0]])
norms = x = torch.tensor([0.1, 10.0])
by_size = magnitude.keep_largest(W.abs(), sparsity=0.5)
scores = wanda.wanda_scores(W, norms)
by_input = wanda.wanda_mask(scores, sparsity=0.5)
rows = []
for name, mask in {
    "dense": torch.ones(2, 2, dtype=torch.bool),
    "magnitude": by_size,
    "Wanda": by_input,
}.items():
    outputs = [round(y, 2) for y in ((mask * W) @ x).tolist()]
    rows.append([name, mask.int().tolist(), outputs])
kit.table(["", "kept", "outputs for (0.1, 10)"], rows)
kit.holds("magnitude as by hand", by_size.tolist() == [[1, 0], [0, 1]])
kit.holds("Wanda as by hand", by_input.tolist() == [[0, 1], [0, 1]])

# %% [markdown]
# ## The library's own source

# %%
kit.code(
    getsource(magnitude.keep_largest_of_all),
    getsource(magnitude.hold),
    getsource(wanda.wanda_scores),
    getsource(wanda.wanda_mask),
    getsource(lottery.drop_smallest),
    getsource(lottery.find_tickets),
)

# %% [markdown]
# ## A no-op, and how many numbers
#
# At sparsity 0 nothing changes. At any other, exactly $\lfloor s n \rfloor$
# weights of each matrix are zero, not one more. The zeros are still stored, so
# the count of parameters is what it was, and so is the time.
#
# What gets smaller and faster is a model whose matrices lose whole rows and
# columns. A head that is masked and a head that is not there give the same
# sum; without it the model has $4 d D + 3 d$ parameters less (Structured 3).

# %%
ids = torch.tensor([tokenizer.encode("Ada is kind .")])
with torch.no_grad():
    none = magnitude.prune_magnitude(copy.deepcopy(model), sparsity=0.0)
    kit.holds("sparsity 0: the base, bitwise", none(ids).equal(model(ids)))
third = magnitude.prune_magnitude(copy.deepcopy(model), sparsity=1 / 3)
w = third.blocks[0].mlp.up.weight
zeros = int((w == 0).sum())
print(f"zeros in one matrix {zeros:,}, floor(s n) = {w.numel() // 3:,}")


def count(of):
    """All parameters of a model."""
    return sum(p.numel() for p in of.parameters())


gone = {0: [1], 2: [0, 3]}  # layer: heads
smaller = structured.prune_heads(copy.deepcopy(model), gone)
d, D = model.blocks[0].attn.head_dim, model.config.d_model
formula = 3 * (4 * d * D + 3 * d)
print(f"three heads: {count(model) - count(smaller):,} less, {formula:,}")

keep = {layer: torch.ones(4) for layer in gone}
for layer, heads in gone.items():
    keep[layer][heads] = 0
with torch.no_grad():
    with gated(model, "heads", keep):
        masked = model(ids)
    gap = (masked - smaller(ids)).abs().max().item()
kit.holds("masked and removed give the same logits", gap < 1e-4)

# %% [markdown]
# ## The picture: which weights can go?
#
# The base, pruned once, nothing trained afterwards. *SparseGPT* is Wanda's
# relative in the family of chapter 17's GPTQ: it too lets the weights that
# stay make up for those that go.

# %%
texts = kit.some(town.held_out()[:200])
documents = [Example(completion=text) for text in texts]
floor = -sum(town.log_prob(town.mix(), t) for t in texts) / len(texts)
seen = town.pretraining_documents(5, 32)
seen = encode_all([Example(completion=t) for t in seen], tokenizer)
batches = [collate(seen, 0)]


def loss(of):
    """Nats a document, held-out documents of the mix."""
    return nats(of, documents, tokenizer)


def at_random(of, batches, sparsity):
    """Zero that share of every matrix, anywhere."""
    torch.manual_seed(0)
    for linear in magnitude.projections(of).values():
        scores = torch.rand_like(linear.weight)
        mask = magnitude.keep_largest(scores, sparsity)
        linear.weight.data.masked_fill_(~mask, 0)


def by_magnitude(of, batches, sparsity):
    """Zero the smallest weights of every matrix."""
    magnitude.prune_magnitude(of, sparsity)


methods = {
    "at random": at_random,
    "magnitude": by_magnitude,
    "Wanda": wanda.prune_wanda,
    "SparseGPT": prune_sparsegpt,
}
base, curves = loss(model), {}
for name, prune in methods.items():
    curves[name] = []
    for sparsity in kit.some((0.1, 0.3, 0.5, 0.6, 0.7, 0.8), 2):
        pruned = copy.deepcopy(model)
        prune(pruned, batches, sparsity=sparsity)
        curves[name].append((100 * sparsity, loss(pruned) - floor))

figure, axis = kit.canvas(8.0, 4.4)
axis.set_yscale("log")
for points, (colour, marker, line) in zip(curves.values(), kit.styles()):
    axis.plot(*zip(*points), line, color=colour, marker=marker)
last = max(x for points in curves.values() for x, _ in points)
for (name, points), colour in zip(curves.items(), kit.COLOURS):
    spot = {"xytext": (9, -3), "textcoords": "offset points"}
    axis.annotate(name, points[-1], color=colour, **spot)
axis.axhline(base - floor, color="#555555", linestyle=":")
style = {"color": "#555555", "fontsize": 9, "va": "top"}
axis.text(last + 2, 0.94 * (base - floor), "the base", **style)
axis.set(xlabel="weights that are zero, %", ylabel="nats above the floor")
axis.set(xlim=(5, last + 12))
axis.set_title("Which weights can go?", loc="left", fontsize=11)
told = "; ".join(
    f"{name}: " + ", ".join(f"{y:.2f} at {x:.0f} %" for x, y in points)
    for name, points in curves.items()
)
kit.show(figure, f"Nats above the floor against sparsity. {told}.")

# %% [markdown]
# *In words:* taking weights at random ruins the model at once; by magnitude a
# third can go at hardly a price and half at a small one; Wanda pays less at
# half, but more than magnitude beyond two thirds; SparseGPT stays near the
# base longest, and beyond two thirds all of them leave it.

# %% [markdown]
# ## Half of the heads: whom to ask, and how often
#
# How much a head matters is told by a gate $\xi_h = 1$ on its output: to first
# order the loss moves by the slope there when the gate is closed, and
#
# $$I_h = \mathbb{E}_x \left| \frac{\partial L(x)}{\partial \xi_h} \right|
# \qquad \text{(Importance 2)}$$
#
# A slope is true where it is taken: in this model, for a small step. Taking
# half of the heads out is no small step. So take one, and ask again.

# %%
heads = [block.attn.n_head for block in model.blocks]
half = sum(heads) // 2


def slopes(of, kind="heads"):
    """(Importance 2) of every head it has now, a tensor a layer."""
    return gate_importance(of, batches, kind)


torch.manual_seed(0)
chance = [torch.rand(n) for n in heads]
ways = {
    "at random": lambda of: structured.prune_heads(of, lowest(chance, half)),
    "half of every layer": lambda of: structured.prune_heads(
        of, least_important(slopes(of), 0.5)
    ),
    "the lowest anywhere": lambda of: structured.prune_heads(
        of, lowest(slopes(of), half)
    ),
    "the lowest, asked again each time": lambda of: shrink_anywhere(
        of, 0.5, 0, slopes, rounds=half
    ),
}
rows = []
for name, act in ways.items():
    pruned = copy.deepcopy(model)
    act(pruned)
    left = [block.attn.n_head for block in pruned.blocks]
    rows.append([name, left, count(pruned), f"{loss(pruned) - floor:.2f}"])
kit.table(["", "heads left", "parameters", "nats above the floor"], rows)
kit.code(getsource(lowest), getsource(shrink_anywhere))

# %% [markdown]
# No layer may be asked for the same as every other: the first one's heads
# carry the model, the second's hardly anything. Below are heads *and* neurons,
# before and after training on what is left, three seeds; ranked anew means
# before every sixteenth. Made by `python -m minipeft.prune_study`, in
# `data/results/pruning/results.json`:

# %%
folder = town.data_folder() / "results" / "pruning"
results = json.loads((folder / "results.json").read_text())
title, head, rows = prune_study.units_table(results, "before")
print(title)
kit.table(head, rows)

# %%
title, head, rows = prune_study.units_table(results, "trained on")
print(title)
kit.table(head, rows)

# %% [markdown]
# *In words:* before training chance is the worst of all and its spread the
# largest, one share for every layer comes next, one order for all units next,
# a new order for every piece is best. Training brings nearly all of it back
# and changes the order: at half, the heads and neurons that gates chose once
# were dear to lose, and are the easiest to do without. Judge a choice after
# training.

# %% [markdown]
# ## Training against the floor: a lottery ticket
#
# A small model (two layers of width 64) from scratch. Train it, drop three
# fifths of what each matrix keeps, put the rest back to its initial numbers,
# train again; three rounds. Two controls say what it is about the ticket that
# wins: the same number of weights in *random places*, and the ticket's places
# with *another start* (Ticket 4).

# %%
N = 300
lesson = town.pretraining_documents(4, 16 * N if not kit.FAST else 64)
data = encode_all([Example(completion=t) for t in lesson], tokenizer)


def new(seed):
    """An untrained model, the same for the same seed."""
    torch.manual_seed(seed)
    return GPT(
        GPTConfig(tokenizer.vocab_size, 128, n_layer=2, n_head=2, d_model=64)
    )


def fit(of, after_step):
    """Train it, zeros held; nats a document above the floor."""
    config = TrainingConfig(
        steps=kit.steps(N),
        learning_rate=3e-3,
        schedule="cosine",
        pool=8,
        device="cpu",
    )
    train(of, data, config, after_step=after_step, show=False)
    return loss(of) - floor


small, other = new(0), new(1)
arms = {"winning ticket": [], "random places": [], "another start": []}
tickets = lottery.find_tickets(small, fit, kit.some((1, 2, 3), 1)[-1], 0.6)
for ticket in tickets:
    kept = 100 * (1 - ticket.sparsity)
    arms["winning ticket"].append((kept, ticket.outcome))
    if ticket.round == 0:
        continue
    shuffled = lottery.random_masks(ticket.masks, seed=0)
    for arm, start, masks in (
        ("random places", ticket.start, shuffled),
        ("another start", lottery.snapshot(other), ticket.masks),
    ):
        outcome = lottery.train_ticket(copy.deepcopy(other), fit, start, masks)
        arms[arm].append((kept, outcome))
for arm, points in arms.items():
    print(f"{arm:15}", ", ".join(f"{y:.2f} at {x:.1f} %" for x, y in points))

# %%
curves = {arm: sorted(points) for arm, points in arms.items()}
dense = arms["winning ticket"][0][1]
kit.picture(
    figures.families,
    {arm: [(round(x, 1), y) for x, y in c] for arm, c in curves.items()},
    {"dense": dense, "floor": 0.0},
    "Lottery tickets: the same weights, other places, another start",
    "share of the projections' weights that is kept, %",
    "nats above the floor",
)

# %% [markdown]
# *In words:* the winning ticket's curve lies below the line of the dense model
# all the way down to a sixteenth of the weights, while both controls lie above
# it and rise as weights go.
#
# Neither the places alone nor the numbers alone are the ticket: it takes this
# mask on these initial weights. In a run as short as this one the ticket even
# learns faster than the whole. Three seeds with more steps are in the same
# file.

# %% [markdown]
# ## What goes wrong
#
# Two bugs in the search for tickets. With the first, each round takes its
# share of *all* weights instead of those left, and the third round leaves
# nothing. With the second, sizes keep their signs: a large negative weight
# counts as small, and goes.


# %%
def invariants(module):
    """What must be true of any search for tickets; nothing is trained."""
    tiny, path = new(2), "blocks.0.attn.q"
    masks, small_go = [module.full_masks(tiny)], True
    for _ in range(3):
        for linear in magnitude.projections(tiny).values():
            torch.nn.init.normal_(linear.weight)  # as after some training
        masks.append(module.shrink_masks(tiny, masks[-1], rate=0.5))
        before, now = masks[-2][path], masks[-1][path]
        size = magnitude.projections(tiny)[path].weight.detach().abs()
        gone, stays = size[before & ~now], size[now]
        small_go &= not len(stays) or bool(gone.max() <= stays.min())
    kept = [int(m[path].sum()) for m in masks]
    halves = [kept[0] // 2**r for r in range(4)]
    kit.holds(f"kept {kept}: half of those left (Ticket 2)", kept == halves)
    kit.holds("what goes is smaller than what stays (Ticket 1)", small_go)
    nested = all((b[path] <= a[path]).all() for a, b in pairwise(masks))
    kit.holds("masks are nested", nested)


invariants(lottery)
print()
for bug in ("a share of all weights", "signed weights"):
    with kit.planted("lottery_ticket", bug):
        from minipeft.compressed import lottery_ticket as broken

        invariants(broken)
    print()

# %% [markdown]
# Both run to the end and print a number for every round. With the first bug it
# is a number for an empty network.
#
# ## Exercises
#
# **19.1** Write (Magnitude 1) for one matrix: which weights stay? Of equal
# sizes it does not matter which goes; the number must be exact.


# %%
def answer(w, s):
    """A bool tensor of w's shape, floor(s n) of it False."""
    return None  # your code


kit.check("19.1", answer)

# %% [markdown]
# **19.2** Now by (Wanda 1), row by row, from the inputs themselves.


# %%
def answer(w, X, s):
    """w (out, in), X (tokens, in): bool (out, in), floor(s in) False a row."""
    return None  # your code


kit.check("19.2", answer)

# %% [markdown]
# **19.3** After how many rounds at rate `p` (Ticket 2) is at most a share
# `kept` of the weights left?


# %%
def answer(p, kept):
    """The smallest number of rounds."""
    return None  # your code


kit.check("19.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=count(small))

# %% [markdown]
# ## Where to go next
#
# - Pruning while training goes on, along a cubic schedule: `MagnitudePruning`
#   with `gradual=True`; what it is worth at 80 % and at 90 % of zeros stands
#   in `data/results/pruning/table.md`. Two of every four weights, as GPUs like
#   it: `minipeft/compressed/semi_structured.py`.
# - The papers: Han et al. 2015, arXiv 1506.02626; Sun et al. 2023, *Wanda*,
#   arXiv 2306.11695; Frantar and Alistarh 2023, *SparseGPT*, arXiv 2301.00774;
#   Frankle and Carbin 2018, *The Lottery Ticket Hypothesis*, arXiv 1803.03635.
# - Zeros in a dense matrix are no faster: `minipeft bench --names pruning`.
# - Next: chapter 20 makes things faster without making them smaller.
