# %% [markdown]
# # 12. MAM and UniPELT: one family, mixed
#
# **The question.** Prefixes, adapters and LoRA look like three inventions.
# Are they? He and colleagues wrote all of them in one form, which turns "which
# method is best?" into a better question: *where* should a change be put, and
# *how*? And if several are put in at once, who decides how much of each is
# used?
#
# After this chapter you can translate one method into another, run the study
# that led to the MAM adapter, open and read UniPELT's gates, and say why a
# gate in a language model must not look ahead.
# Reading and running: about 25 minutes.

# %%
import copy
from inspect import getsource

import minipeft
import torch
from minipeft import MAMAdapter, UniPELT, report
from minipeft.additive.bottleneck import bottleneck
from minipeft.gpt import attention_written_out
from minipeft.hybrid import gates, unipelt
from minipeft.hybrid.mam_adapter import placement_study

import kit

# %% [markdown]
# ## One form for all
#
# Every method changes a hidden vector, $h \leftarrow h + s\,\Delta h$:
#
# | method | the change $\Delta h$ | of what | put in |
# |---|---|---|---|
# | LoRA | $B A x$ | a projection's output | beside it |
# | adapter | $W_2\, \mathrm{relu}(W_1 h)$ | a sub-layer's output | behind it |
# | parallel adapter | $W_2\, \mathrm{relu}(W_1 x)$ | the same | beside it |
# | prefix | $\mathrm{softmax}(q P_k^\top / \sqrt d) P_v$ | head | beside it |
#
# The last row is the surprise: by (Prefix 3) of chapter 07 a prefix is a
# parallel adapter too, with a softmax for a relu, the rows of $P_k$ and $P_v$
# for $W_1$ and $W_2$, and a bottleneck of $p$. Only the sum is gated: what the
# prefix gets, the text loses.
#
# ## The equations
#
# The **MAM adapter** joins the two places that won the authors' study, a
# short prefix for attention and a wide adapter beside the feed-forward layer:
#
# $$\text{head}(x) = \text{attn}(q, [P_k; K], [P_v; V])
#   \qquad \text{(MAM 1)}$$
# $$y = f + s\,[W_2\, \mathrm{relu}(W_1 x + b_1) + b_2], \quad s = 4
#   \qquad \text{(MAM 2)}$$
#
# **UniPELT** puts LoRA, a prefix and an adapter into every layer and a *gate*
# in front of each, a number in (0, 1) that the text decides:
#
# $$g_t = \sigma(w \cdot x_t + b) \qquad \text{(Gate 1)}$$
# $$G_t = (g_1 + \ldots + g_t) / t \qquad \text{(Gate 2)}$$
# $$y_t = f_t + G_t\,[W_2\, \mathrm{relu}(W_1 f_t + b_1) + b_2]
#   \qquad \text{(UniPELT 3)}$$
#
# The paper averages over the whole row; in a model that writes from left to
# right that would be looking ahead, so (Gate 2) averages over the past.
#
# ## By hand
#
# **Beside or behind.** $x = (1, -2)$, $f = (3, 3)$, $W_1 = I$, no biases, and
# $W_2 = \begin{pmatrix} 0 & 1 \\ 1 & 0 \end{pmatrix}$ swaps two numbers.
#
# 1. Beside, $s = 4$: $\mathrm{relu}(x) = (1, 0)$, swapped $(0, 1)$, times 4
#    is $(0, 4)$, so $y = (3, 7)$.
# 2. Behind, $s = 1$: $\mathrm{relu}(f) = (3, 3)$, and $y = (6, 6)$.
#
# **A gate.** Three tokens have $g = (0.2, 0.6, 1)$. The running mean is
# $G = (0.2, 0.4, 0.6)$; the mean over the row would be $0.6$ everywhere, and
# the first token would know the third.

# %%
x, f = torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 3.0]])
layer = torch.eye(2), torch.zeros(2), torch.eye(2).flip(0), torch.zeros(2)
print("beside, s = 4:", (f + bottleneck(x, *layer, scale=4)).tolist())
print("behind, s = 1:", (f + bottleneck(f, *layer)).tolist())
g = torch.tensor([[0.2, 0.6, 1.0]])
shown = [round(v, 3) for v in gates.running_mean(g)[0][0].tolist()]
print("running mean: ", shown)

# %% [markdown]
# ## The library's own source
#
# MAM is two halves that exist already. UniPELT needs one trick: behind a gate
# the prefix is another one for every query, which attention cannot have. With
# vectors of twice the width it can, (UniPELT 4).

# %%
kit.code(
    getsource(MAMAdapter.install),
    getsource(gates.token_gates),
    getsource(gates.running_mean),
    getsource(unipelt.doubled),
    getsource(unipelt.halves),
)

# %% [markdown]
# The trick, checked against its meaning: for each query on its own, scale the
# prefix by that query's gate and attend as usual.

# %%
torch.manual_seed(0)
T, p, d = 5, 3, 4
q, k, v = (torch.randn(1, 2, T, d).double() for _ in range(3))
prefix = torch.randn(2, 1, 2, p, d).double()
G = torch.rand(1, 1, T, 1).double()
trick = attention_written_out(*unipelt.doubled(q, k, v, prefix, G))
trick = unipelt.halves(trick, G)
meaning = []
for t in range(T):
    keys = torch.cat([G[0, 0, t] * prefix[0], k[:, :, : t + 1]], 2)
    values = torch.cat([G[0, 0, t] * prefix[1], v[:, :, : t + 1]], 2)
    meaning.append(attention_written_out(q[:, :, t : t + 1], keys, values))
gap = (trick - torch.cat(meaning, 2)).abs().max()
kit.holds("twice the width is a gated prefix (1e-12)", gap < 1e-12)

# %% [markdown]
# ## At the start, and the count
#
# Adapters and LoRA begin with a zero behind them, so without a prefix both
# techniques start as the base, in every bit; a prefix disturbs, as always.
# The formulas are the sums of their parts, plus $D + 1$ for each gate.

# %%
model, tokenizer = kit.base()
config = model.config
L, D = config.n_layer, config.d_model
ids = torch.tensor([tokenizer.encode("Jack was in Alder at dawn .")])
before = model(ids)
p, m, r = 4, 12, 8
lora, gate = 4 * D * r, D + 1
adapter = 2 * D * m + m + D
parts = {
    "MAM": (
        MAMAdapter(p, m, reparameterize=False),
        L * (adapter + 2 * p * D),
    ),
    "UniPELT": (
        UniPELT(r, p, m, reparameterize=False),
        L * (lora + adapter + 2 * p * D + 4 * gate),
    ),
    "MAM, p = 0": (MAMAdapter(0, m), L * adapter),
    "UniPELT, p = 0": (UniPELT(r, 0, m), L * (lora + adapter + 3 * gate)),
}
rows = []
for name, (technique, formula) in parts.items():
    twin = technique.attach(copy.deepcopy(model))
    same = "yes" if twin(ids).equal(before) else "no"
    rows.append([name, f"{formula:,}", f"{report(twin).trained:,}", same])
kit.table(["technique", "formula", "measured", "is the base"], rows)

# %% [markdown]
# ## Training against the floor: the study of places
#
# The same budget for all, a bottleneck of 16 in each layer or what costs as
# much. Behind or beside, at attention or at the feed-forward layer, scaled or
# not, and mixed. *Dialect*, a short training, the loss on the same documents.

# %%
N, SCORED = 100, 200
study, results = placement_study(bottleneck=16), {}
for name, technique in study.items():
    torch.manual_seed(0)
    twin = technique.attach(kit.base()[0])
    points = kit.learn(twin, tokenizer, "dialect", N, 1, score_on=SCORED)
    results[name] = points[-1][1]
    size = technique.count(config)
    print(f"{name:30} {size:6,} numbers  {results[name]:.2f} nats")
best = kit.optimum("dialect", SCORED)
print(f"{'floor':30} {'':14}  {best['floor']:.2f} nats")

# %%
figure, axis = kit.canvas(8.0, 3.6)
order = sorted(results, key=results.get, reverse=True)
for row, (name, (colour, marker, _)) in enumerate(zip(order, kit.styles())):
    axis.plot(results[name], row, marker, color=colour, markersize=9)
    axis.plot(
        [best["floor"], results[name]], [row, row], color="#bbbbbb", zorder=0
    )
axis.set_yticks(range(len(order)), order)
axis.axvline(best["floor"], color="#555555", linestyle=":")
axis.text(
    best["floor"], len(order) - 0.4, " floor", color="#555555", fontsize=9
)
axis.set(xlabel="nats a document", ylim=(-0.6, len(order)))
axis.grid(axis="y", visible=False)
axis.set_title(f"Where to put a change: {N} steps", loc="left", fontsize=11)
told = ", ".join(f"{name} {results[name]:.2f}" for name in reversed(order))
kit.show(figure, f"Loss by place, floor {best['floor']:.2f}: {told}.")

# %% [markdown]
# *In words:* one row a technique with a marker at its loss, the best on top,
# and the floor as a dotted line on the left; the four best are adapters, and
# at either place the ones behind are ahead of the ones beside.
#
# Compare with three answers of the paper. *The feed-forward layer* is a better
# place than attention: here too, in both pairs. *A scale* of 4 helps: here
# too. *Beside* is better than *behind*: not here, and so the mix is not the
# winner either. A hundred steps, one seed and one small model refute no paper
# that trained large models to the end, and
# `python -m minipeft.placement_study` runs the study in full. But they show
# why one measures on one's own task.
#
# ## The picture: which gates open
#
# UniPELT, trained as long. Its gates begin near one half, because $w$ is
# small and $b$ is zero. We read them after training, mean over the words of
# some test stories.

# %%
torch.manual_seed(0)
gated = UniPELT(r, 8, 16, prefix_bottleneck=128).attach(kit.base()[0])
points = kit.learn(gated, tokenizer, "dialect", N, 1, score_on=SCORED)
print(f"UniPELT: {points[-1][1]:.2f} nats, floor {best['floor']:.2f}")

stories = kit.some(minipeft.town.TASKS["dialect"].test()[:32])
opened = {}
for story in stories:
    row = torch.tensor([tokenizer.encode(story.completion)])
    for part, values in gates.gate_values(gated, row).items():
        opened.setdefault(part, []).append(values.mean((1, 2)))
grid = torch.stack([torch.stack(v).mean(0) for v in opened.values()], 1)

# %%
figure, axis = kit.canvas(5.6, 3.2)
axis.imshow(grid, cmap="Greys", vmin=0, vmax=1.3, aspect="auto")
axis.set_xticks(range(len(opened)), opened)
axis.set_yticks(range(L), [f"layer {n}" for n in range(L)])
axis.grid(False)
axis.tick_params(length=0)
for n in range(L):
    for part in range(len(opened)):
        text, ink = f"{grid[n, part]:.2f}", "w" if grid[n, part] > 0.8 else "k"
        axis.text(part, n, text, ha="center", va="center", color=ink)
axis.set_title("How far the gates are open", loc="left", fontsize=11)
means = dict(zip(opened, grid.mean(0).tolist()))
told = ", ".join(f"{part} {value:.2f}" for part, value in means.items())
kit.show(figure, f"Gates, mean over four layers: {told}.")

# %% [markdown]
# *In words:* a map of four layers by four gates with the mean opening of
# each. The adapter's gates have opened wide in the upper layers, the prefix's
# have closed a little, and those of LoRA went different ways.

# %% [markdown]
# ## What goes wrong
#
# The paper's formula is a mean over the whole row. Copied into a language
# model, it lets the first word know the last.


# %%
@torch.no_grad()
def causality(package):
    """Whether a changed last word leaves all earlier logits alone."""
    torch.manual_seed(0)
    model = package.UniPELT(4, 0, 8).attach(kit.base()[0])
    for p in package.technique.trainable_parameters(model):
        torch.nn.init.normal_(p, 0.0, 0.1)
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    moved = (model(ids) - model(other))[:, :-1].abs().max()
    kit.holds("no logit knows a later word", moved == 0)
    print(f"earlier logits moved by up to {moved:.2g}")


causality(minipeft)
print()
with kit.planted("gates", "the future in the mean") as bug:
    causality(bug)

# %% [markdown]
# A single number leaks, the mean of the gates, and still it is a leak: the
# loss of training falls by it, and at decoding, where the future does not
# exist, the gain is gone. For a classifier, which reads a finished row, the
# paper's mean is right: `gate_over="sequence"`.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **12.1** (Gate 2) for a text that comes in pieces: the means for the new
# tokens, and the sum to remember.


# %%
def answer(g, total, count):
    """g (T,), the sum `total` of `count` earlier gates -> (G (T,), sum)."""
    return None  # your code


kit.check("12.1", answer)

# %% [markdown]
# **12.2** (MAM 2), without any function of the library.


# %%
def answer(f, x, W_1, b_1, W_2, b_2, s):
    """f, x (..., D), W_1 (m, D), W_2 (D, m) -> (..., D)."""
    return None  # your code


kit.check("12.2", answer)

# %% [markdown]
# **12.3** A budget of numbers for each layer, and a flat prefix of length p:
# how wide may the adapter be? Mind its biases.


# %%
def answer(budget, p, D):
    """The largest bottleneck m, an integer."""
    return None  # your code


kit.check("12.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=report(gated).trained)

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/hybrid/mam_adapter.py`, `minipeft/hybrid/unipelt.py`,
#   `minipeft/hybrid/gates.py`.
# - The papers: He et al. 2021, *Towards a Unified View of Parameter-Efficient
#   Transfer Learning*, arXiv 2110.04366; Mao et al. 2021, *UniPELT*, arXiv
#   2110.07577.
# - Next: chapter 13 shares one set of directions among all layers.
