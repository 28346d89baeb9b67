# %% [markdown]
# # 04. BitFit: train the biases
#
# **The question.** Suppose you may not touch a single matrix. Each layer can
# only learn a *constant*: one vector that is added whatever the input says.
# Ben Zaken and colleagues tried that in 2021 and lost surprisingly little.
# How can a constant teach a model anything?
#
# After this chapter you can write BitFit in two lines, say why one of its
# biases can never learn, know the one setting that decides whether it works,
# and see in which places of a network a constant is worth most. Reading and
# running: about 20 minutes.

# %%
from inspect import getsource

import minipeft
import torch
from minipeft import BitFit, FullFineTuning, figures
from minipeft.selective import bitfit
from minipeft.wrap import resolve

import kit

# %% [markdown]
# ## The equations
#
# A projection and a LayerNorm, each with a change of its bias:
#
# $$h = Wx + (b + \delta_b) \qquad \text{(BitFit 1)}$$
# $$\mathrm{LN}(x) = g \odot (x - \text{mean}) / \text{std} + (c + \delta_c)
#   \qquad \text{(BitFit 2)}$$
#
# $W$ and $g$ are frozen. So what is learned is a constant after each
# projection and each LayerNorm, the same for every token and every text.
#
# ## By hand
#
# $$W = \begin{pmatrix} 1 & 2 \\ 0 & 1 \end{pmatrix}, \quad
#   b = \begin{pmatrix} 0 \\ 1 \end{pmatrix}, \quad
#   \delta_b = \begin{pmatrix} 3 \\ -1 \end{pmatrix}.$$
#
# For $x = (1, 1)$ the layer gave $(3, 2)$ and now gives $(6, 1)$. For
# $x = (-2, 0)$ it gave $(-2, 1)$ and now $(1, 0)$. Both moved by the very
# same $(3, -1)$. But behind a ReLU the first changes from $(3, 2)$ to
# $(6, 1)$ and the second from $(0, 1)$ to $(1, 0)$: *the bend* turns a
# constant into something that depends on the input. A constant moves every
# threshold of the network, and that is the answer to the question.

# %%
layer = torch.nn.Linear(2, 2)
with torch.no_grad():
    layer.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    layer.bias.copy_(torch.tensor([0.0, 1.0]))
    x = torch.tensor([[1.0, 1.0], [-2.0, 0.0]])
    before = layer(x)
    layer.bias += torch.tensor([3.0, -1.0])
    after = layer(x)
print("moved by            ", (after - before).tolist())
print("behind a ReLU moved ", (after.relu() - before.relu()).tolist())

# %% [markdown]
# One bias cannot learn at all. Adding $\delta$ to every key adds the same
# number $q^\top \delta$ to every score of a query, and the softmax ignores
# what all its scores have in common: scores of $(1, 2)$ and of
# $(1 + c, 2 + c)$ give the same weights.

# %%
scores = torch.tensor([1.0, 2.0], dtype=torch.float64)
for c in (0.0, 5.0, -3.0):
    print(
        f"c = {c:4}: weights",
        [round(p, 6) for p in (scores + c).softmax(0).tolist()],
    )

# %% [markdown]
# ## The library's own source
#
# There is little to see, and that is the beauty of it: choose names, put
# trainable clones in their place.

# %%
kit.code(getsource(BitFit.install), getsource(BitFit.count))
print("\nthe biases of a block:", *bitfit.PLACES.items(), sep="\n  ")

# %% [markdown]
# ## At the start, and how many numbers
#
# The clones begin as the base's biases, so nothing changes. In a block the
# biases of q, k, v and o are $4D$, of the feed-forward layer $4D + D$, of two
# LayerNorms $2D$: together $11D$; and $D$ for the last LayerNorm.
#
# $$11\,D\,L + D$$

# %%
model, tokenizer = kit.base()
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Ada found a bright")]])
before = model(ids)

technique = BitFit()
technique.attach(model)
print("logits equal the base's in every bit:", model(ids).equal(before))

D, L = model.config.d_model, model.config.n_layer
report = minipeft.report(model)
print(f"formula 11 D L + D = {11 * D * L + D:,}")
print(f"counted            = {report.trained:,}")
print(f"share of the model = {report.trained / report.total:.2%}")

model.loss(ids[:, :-1], ids[:, 1:]).backward()
gradients = {
    name: max(
        resolve(model, f"blocks.{n}.{path}").grad.abs().max().item()
        for n in range(L)
    )
    for name, path in bitfit.PLACES.items()
}
largest = max(gradients.values())
for name, g in gradients.items():
    print(f"gradient at {name:17} {g / largest:8.1e} of the largest")

# %% [markdown]
# The key's gradient is rounding noise, as promised.
#
# ## Training against the floor
#
# The task is *mood*: read a story and say whether it was a good day. Nobody
# can be right always, because some stories are ambiguous; the best reader
# possible, Bayes, is right as often as the upper line says, and guessing is
# right half of the time.
#
# Three runs: full fine-tuning; BitFit at the learning rate that suits full
# fine-tuning; BitFit at its own, fifteen times larger. A constant has to
# move far to matter.

# %%
N, ROWS = 240, 250  # steps; stories that are asked for a score
runs = {
    "full": (FullFineTuning(), None),
    "BitFit, rate of full": (BitFit(), FullFineTuning.learning_rate),
    "BitFit": (BitFit(), None),
}
curves, adapted = {}, {}
for name, (method, rate) in runs.items():
    adapted[name], tokenizer = kit.base()
    method.attach(adapted[name])
    curves[name] = kit.learn(
        adapted[name],
        tokenizer,
        "mood",
        N,
        points=4,
        learning_rate=rate,
        score_on=ROWS,
    )
    used = rate or method.learning_rate
    print(f"{name:21} rate {used:<6} right {curves[name][-1][1]:.1%}")

best = kit.optimum("mood", ROWS)["best"]
print(f"{'Bayes':21}             right {best:.1%}")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"Bayes": best, "guessing": 0.5},
    "Reading the mood of a story",
    "share of stories read rightly",
)

# %% [markdown]
# *In words:* full fine-tuning and BitFit at its own rate rise from the line
# of guessing to just below the line of Bayes; BitFit at the rate of full
# fine-tuning does not rise at all.
#
# ## The picture: where a constant is worth most
#
# How far did each bias move? One number for each kind of bias in each block:
# the root mean square of $\delta_b$.

# %%
original = kit.base()[0]


def moved(place, n):
    """Root mean square of the change of one bias."""
    path = f"blocks.{n}.{place}"
    delta = resolve(adapted["BitFit"], path) - resolve(original, path)
    return delta.detach().square().mean().sqrt().item()


grid = torch.tensor(
    [[moved(p, n) for p in bitfit.PLACES.values()] for n in range(L)]
)
figure, axis = kit.canvas(8.2, 3.6)
axis.grid(False)
axis.imshow(grid, cmap="Greys", vmin=0, vmax=grid.max() * 1.15, aspect="auto")
for n in range(L):
    for p, value in enumerate(grid[n].tolist()):
        dark = value > 0.6 * grid.max()
        text = f"{value:.3f}"
        colour = "white" if dark else "black"
        axis.text(p, n, text, ha="center", va="center", color=colour, size=9)
names = [name.replace("n_o", "n\no") for name in bitfit.PLACES]
axis.set_xticks(range(len(names)), names, size=9)
axis.set_yticks(range(L), [f"block {n}" for n in range(L)], size=9)
axis.tick_params(length=0)
axis.set_title("How far each bias moved", loc="left", fontsize=11)
mean = {name: grid[:, p].mean() for p, name in enumerate(bitfit.PLACES)}
told = ", ".join(f"{name} {value:.3f}" for name, value in mean.items())
kit.show(figure, f"How far each bias moved, mean over blocks: {told}.")

# %% [markdown]
# *In words:* a grid of four blocks by eight kinds of bias, darker where the
# bias moved farther; the column of the key is the lightest by far.
#
# The key's bias still moves a little. AdamW divides a gradient by its own
# size, and so makes steps even of rounding noise: a good reason to look at
# what a parameter *does*, not at whether it moved.
#
# ## What goes wrong
#
# Four invariants, and three bugs that train happily.


# %%
def invariants(package):
    """Check BitFit."""
    model = kit.base()[0]
    technique = package.BitFit(biases=("query", "intermediate"))
    technique.attach(model)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    small = all(n.endswith("bias") for n in trained)
    kit.holds("only biases are trained", small)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    right = count == 5 * D * L == technique.count(model.config)
    kit.holds("query and intermediate are 5 D L", right)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    live = [p.grad.abs().max() for p in model.parameters() if p.requires_grad]
    kit.holds(
        "every trained bias has a gradient", min(live) > 1e-6 * max(live)
    )
    full = package.BitFit().attach(kit.base()[0])
    counted = sum(p.numel() for p in full.parameters() if p.requires_grad)
    kit.holds("all biases are 11 D L + D", counted == 11 * D * L + D)


invariants(minipeft)
for bug in (
    "query and key exchanged",
    "intermediate means output",
    "all includes the weights",
):
    print()
    with kit.planted("bitfit", bug) as package:
        invariants(package)

# %% [markdown]
# Look at the first. With query and intermediate chosen, the count is right,
# the names look right, and the loss falls, because the rest learns. Only the
# gradients tell that a fifth of what is trained is dead.
#
# ## Exercises
#
# **04.1** How many numbers does BitFit train in a model whose feed-forward
# layer is $F$ wide?


# %%
def answer(D, F, L):
    """All biases of L blocks and of the last LayerNorm."""
    return None  # your code


kit.check("04.1", answer)

# %% [markdown]
# **04.2** A LayerNorm's bias moved by $\delta_c$, and a projection with the
# weight $W$ reads that LayerNorm. Which change of the *projection's* bias
# does the same?


# %%
def answer(W, delta_c):
    """delta_b (out,), for W (out, in) and delta_c (in,)."""
    return None  # your code


kit.check("04.2", answer)

# %% [markdown]
# **04.3** The value's bias can be moved into the output's bias without
# changing what attention computes, because attention weights sum to one.
# Give the output bias that makes up for a value bias set to zero.


# %%
def answer(W_o, b_o, b_v):
    """The new b_o, for W_o (D, H d), b_o (D,) and the old b_v (H d,)."""
    return None  # your code


kit.check("04.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=report.trained)

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/selective/bitfit.py`; its neighbour
#   `minipeft/selective/layer_norm.py` trains the LayerNorms alone. Tests:
#   `tests/test_bitfit.py`; bugs: `tests/mutants/bitfit.py`.
# - The paper: Ben Zaken, Ravfogel & Goldberg 2021, *BitFit*, arXiv
#   2106.10199.
# - Next: chapter 05 adds something that bends: adapters.
