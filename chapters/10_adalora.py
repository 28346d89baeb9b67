# %% [markdown]
# # 10. AdaLoRA: ranks from one purse
#
# **The question.** LoRA gives every matrix the same rank. But why should the
# query of the first layer need as much change as the feed-forward matrix of
# the last? If there is one budget for the whole model, can training itself
# find out where to spend it?
#
# After this chapter you can score a single direction of a single matrix by
# hand, run one allocation with pencil and paper, read a map of ranks, and
# name the mistake that turns AdaLoRA into a slow LoRA without anybody
# noticing. Reading and running: about 25 minutes.

# %%
import copy
import textwrap
from inspect import getsource

import minipeft
import torch
from minipeft import AdaLoRA, LoRA, figures, report
from minipeft.low_rank import adalora, rank_allocator
from minipeft.technique import attachment_of
from minipeft.wrap import resolve

import kit

# %% [markdown]
# ## The equations
#
# The change of a matrix is written like a singular value decomposition, as a
# sum of $r$ *triplets*: a left vector, a value, a right vector.
#
# $$h = Wx + b + s\,P\,\mathrm{diag}(E)\,Qx \qquad \text{(AdaLoRA 1)}$$
#
# with $P \in \mathbb{R}^{\text{out} \times r}$, $E \in \mathbb{R}^r$ and
# $Q \in \mathbb{R}^{r \times \text{in}}$.
#
# Setting one $E_i$ to zero switches its triplet off, and the others stay as
# they are. That needs vectors that do not overlap, so a penalty keeps $P$ and
# $Q$ near orthonormal. In the paper's form:
#
# $$R = \textstyle\sum \lVert P^\top P - I \rVert_F^2
#   + \lVert Q Q^\top - I \rVert_F^2 \qquad \text{(AdaLoRA 3)}$$
#
# After every step the *allocator* scores all triplets of all matrices. For
# each single weight $w$:
#
# $$I = |w \cdot \partial L / \partial w| \qquad \text{(Allocator 1)}$$
# $$M \leftarrow \beta_1 M + (1 - \beta_1) I \qquad \text{(Allocator 2)}$$
# $$U \leftarrow \beta_2 U + (1 - \beta_2) |I - M|
#   \qquad \text{(Allocator 3)}$$
# $$S_i = MU(E_i) + \text{mean}_o\, MU(P_{oi}) + \text{mean}_j\, MU(Q_{ij})
#   \qquad \text{(Allocator 4)}$$
#
# and the best $b(t)$ of *all* triplets stay on (Allocator 6), where the
# budget falls from $b_0$ to $b_T$ along a cubic:
#
# $$b(t) = \Big\lfloor b_T + (b_0 - b_T) \left(1 -
#   \frac{t - t_i}{T - t_i - t_f}\right)^3 \Big\rfloor
#   \qquad \text{(Allocator 5)}$$

# %% [markdown]
# ## By hand
#
# **A score.** A weight $w = 0.5$ has the gradient $-0.2$, in the first step,
# with $\beta_1 = \beta_2 = 0.85$:
#
# 1. $I = |0.5 \cdot (-0.2)| = 0.1$: to first order, what the loss would
#    change by if the weight were 0.
# 2. $M = 0.15 \cdot 0.1 = 0.015$.
# 3. $U = 0.15 \cdot |0.1 - 0.015| = 0.01275$.
# 4. The product $MU = 0.00019125$ is the weight's share of a score.
#
# **The budget.** From 16 triplets to 8 in ten steps, halfway:
# $8 + 8 \cdot (\tfrac12)^3 = 9$. A straight line would still keep 12.
#
# **An allocation.** Two matrices of two triplets, scores $q: (5, 1)$ and
# $v: (4, 3)$, budget 3. The three best of all are 5, 4 and 3: $q$ keeps one
# triplet and $v$ keeps two.

# %%
w, gradient = torch.tensor(0.5), torch.tensor(-0.2)
zero = torch.tensor(0.0)
sensitivity = rank_allocator.sensitivity(w, gradient)
M, U = rank_allocator.smooth(zero, zero, sensitivity, 0.85, 0.85)
print(f"I {sensitivity:.3f}   M {M:.3f}   U {U:.5f}   MU {M * U:.8f}")
print("budget at step 5 of 10:", rank_allocator.budget(5, 10, 0, 0, 16, 8))
scores = {"q": torch.tensor([5.0, 1.0]), "v": torch.tensor([4.0, 3.0])}
work = rank_allocator.show_work(scores, keep=3)
print("in order:", [(path, i, s) for path, i, s in work["order"]])
print("ranks:   ", work["ranks"])

# %% [markdown]
# ## The library's own source
#
# `show_work` is the allocation with every intermediate by name; the library's
# own `allocate` returns one of them.

# %%
kit.code(
    getsource(rank_allocator.triplet_scores),
    getsource(rank_allocator.budget),
    getsource(rank_allocator.show_work),
    getsource(adalora.AdaLoRALinear.delta),
    getsource(adalora.paper_penalty),
)

# %% [markdown]
# ## At the start: nothing
#
# $E$ begins at zero, so the model is the base in every bit. $P$ and $Q$ begin
# small and random. As in LoRA one part must learn first: with $E = 0$ only
# $E$ has a gradient.

# %%
model, tokenizer = kit.base()
text = "Jack was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
before = model(ids)

EVERY = ("q", "k", "v", "o", "up", "down")
technique = AdaLoRA(init_rank=6, target_rank=2, targets=EVERY)
torch.manual_seed(0)
start = technique.attach(copy.deepcopy(model))
kit.holds("the model is the base, bitwise", start(ids).equal(before))
start.loss(ids[:, :-1], ids[:, 1:]).backward()
layer = resolve(start, "blocks.0.mlp.up")
for name in ("P", "E", "Q"):
    largest = getattr(layer, name).grad.abs().max()
    print(f"largest gradient at {name}: {largest:.2g}")

# %% [markdown]
# ## How many numbers
#
# Each triplet of a matrix costs $\text{out} + \text{in} + 1$ numbers. While
# training there are $r_0$ of them in each; the file gets those that are kept.

# %%
config = model.config
D, F, r = config.d_model, config.ff_width, technique.init_rank
square, wide = r * (D + D + 1), r * (D + F + 1)
print(f"formula   {config.n_layer * (4 * square + 2 * wide):,}")
print(f"count     {technique.count(config):,}")
print(f"measured  {report(start).trained:,}")

# %% [markdown]
# ## Training against the floor
#
# *Dialect* again, beside a LoRA with the rank that AdaLoRA ends with in the
# mean. The floor is the loss of a model that knows the dialect perfectly.

# %%
N = 160
curves, adapted = {}, {}
contenders = {
    "LoRA, rank 2": (LoRA(rank=2, alpha=4, targets=EVERY), 3e-3),
    "AdaLoRA, 6 to 2": (technique, None),
}
for name, (method, rate) in contenders.items():
    torch.manual_seed(0)
    adapted[name] = method.attach(kit.base()[0])
    curves[name] = kit.learn(
        adapted[name], tokenizer, "dialect", N, 4, learning_rate=rate
    )
best = kit.optimum("dialect")
for name, points in curves.items():
    print(f"{name:16} {points[-1][1]:.2f} nats, floor {best['floor']:.2f}")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Learning a dialect, one rank for all or one budget for all",
    "nats a document",
)

# %% [markdown]
# *In words:* both curves fall from the line of the perfect model that was not
# adapted and flatten above the floor; which of the two ends lower says less
# here than where the ranks went.
#
# ## The picture: where the rank went
#
# Every matrix began with six triplets. These are left:

# %%
attachment = attachment_of(adapted["AdaLoRA, 6 to 2"])
left = rank_allocator.ranks(attachment)
where = {t: "mlp" if t in ("up", "down") else "attn" for t in EVERY}
grid = torch.tensor(
    [
        [left[f"blocks.{n}.{where[t]}.{t}"] for t in EVERY]
        for n in range(config.n_layer)
    ]
)
figure, axis = kit.canvas(6.4, 3.4)
axis.imshow(grid, cmap="Greys", vmin=0, vmax=9, aspect="auto")
axis.set_xticks(range(6), EVERY)
axis.set_yticks(range(config.n_layer), [f"layer {n}" for n in range(4)])
axis.grid(False)
axis.tick_params(length=0)
for n in range(config.n_layer):
    for t in range(6):
        rank = int(grid[n, t])
        style = {"ha": "center", "va": "center", "fontsize": 11}
        axis.text(t, n, rank, color="white" if rank > 5 else "black", **style)
axis.set_title("Ranks that are left of 6", loc="left", fontsize=11)
per_kind = dict(zip(EVERY, grid.sum(0).tolist()))
told = ", ".join(f"{name} {rank}" for name, rank in per_kind.items())
kit.show(figure, f"Ranks left, summed over the four layers: {told}.")

# %% [markdown]
# *In words:* a map of four layers by six matrices with the rank that is left
# in each; some kinds of matrix keep most of what they had, others next to
# nothing.
#
# Nobody told the model which matrices matter. Add up the columns, and check
# the promise of (Allocator 6): what is left is the budget, to the triplet.

# %%
budget = technique.target_rank * len(left)
kit.holds(f"{budget} triplets are left in all", grid.sum() == budget)
print("by kind: ", per_kind)
print("by layer:", grid.sum(1).tolist())
kept = technique.export(attachment)
numbers = sum(t.numel() for n, t in kept.items() if not n.endswith("kept"))
print(f"numbers in the file: {numbers:,} of {technique.count(config):,}")

# %% [markdown]
# ## What goes wrong
#
# **A purse for each.** The classic misreading: the best triplets of *each*
# matrix stay. The ranks then are the same everywhere, and what is left is
# LoRA with more work. The invariant asks for the best of all.


# %%
def best_of_all():
    """The kept triplets are the largest, whatever matrix they are in."""
    from minipeft.low_rank.rank_allocator import allocate  # with the bug?

    torch.manual_seed(0)
    rows = {f"m{n}": torch.rand(4) * (n + 1) for n in range(3)}
    kept = allocate(rows, 6)
    stay = torch.cat([rows[name][mask] for name, mask in kept.items()])
    go = torch.cat([rows[name][~mask] for name, mask in kept.items()])
    print("ranks:", [int(mask.sum()) for mask in kept.values()])
    kit.holds("the best of all matrices stay", stay.min() > go.max())


best_of_all()
print()
with kit.planted("rank_allocator", "a budget for each matrix"):
    best_of_all()

# %% [markdown]
# **Nobody calls the allocator.** It works after the optimizer's step and
# before the gradients are cleared. Our training loop calls it; in a loop of
# one's own one forgets. Then all ranks stay, the loss is fine, and the file is
# far too large. The library refuses to let such a model out:

# %%
torch.manual_seed(0)
own = technique.attach(kit.base()[0])
optimizer = torch.optim.AdamW(minipeft.technique.trainable_parameters(own))
own.loss(ids[:, :-1], ids[:, 1:]).backward()
optimizer.step()  # and no technique.after_step
try:
    minipeft.merge(own)
except ValueError as error:
    print(textwrap.fill(str(error), 76))

# %% [markdown]
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **10.1** The budget at step `t`, (Allocator 5), at its two ends as well:
# until `warm` it is `first`, from `total - final` on it is `last`.


# %%
def answer(t, total, warm, final, first, last):
    """An integer."""
    return None  # your code


kit.check("10.1", answer)

# %% [markdown]
# **10.2** The product $MU$ of one weight after several steps, from the lists
# of its values and gradients. $M$ and $U$ begin at zero.


# %%
def answer(weights, gradients, beta1, beta2):
    """A number."""
    return None  # your code


kit.check("10.2", answer)

# %% [markdown]
# **10.3** The ranks after an allocation: of equal scores the earlier triplet
# stays, in the order of the dictionary.


# %%
def answer(scores, keep):
    """scores {name: list of numbers} -> {name: rank}."""
    return None  # your code


kit.check("10.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=technique.count(config))

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/low_rank/adalora.py` and
#   `minipeft/low_rank/rank_allocator.py`.
# - The paper: Zhang et al. 2023, *AdaLoRA: Adaptive Budget Allocation for
#   Parameter-Efficient Fine-Tuning*, arXiv 2303.10512.
# - Next: chapter 11 asks how little one can train at all (IA3).
