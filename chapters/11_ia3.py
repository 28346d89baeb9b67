# %% [markdown]
# # 11. IA3: volume knobs
#
# **The question.** How little can one train? LoRA adds thin matrices. IA3
# adds no matrix at all: three vectors a block, one number for each
# coordinate, which turn that coordinate up or down. Can a model learn a new
# dialect by turning the volume of what it already computes?
#
# After this chapter you can write IA3 in one line, fold it into the weights
# without a trace, say why its change has full rank although it has so few
# numbers, and why it wants a learning rate that would wreck other methods.
# Reading and running: about 20 minutes.

# %%
import copy
from inspect import getsource

import minipeft
import torch
from minipeft import IA3, figures, report
from minipeft.additive import ia3
from minipeft.wrap import resolve

import kit

# %% [markdown]
# ## The equations
#
# Keys and values are rescaled where they are written, the hidden layer of the
# feed-forward part where it is read; $\odot$ is elementwise:
#
# $$k = l_k \odot (W_k x + b_k), \quad v = l_v \odot (W_v x + b_v)
#   \qquad \text{(IA3 1)}$$
# $$f = W_{\text{down}}\, (l_{\text{ff}} \odot \mathrm{gelu}(W_{\text{up}} x
#   + b_{\text{up}})) + b_{\text{down}} \qquad \text{(IA3 2)}$$
#
# Merged, a vector where a projection *writes* scales its rows and its bias,
# one where it *reads* scales its columns:
#
# $$W' = \mathrm{diag}(l)\, W, \quad b' = l \odot b
#   \qquad \text{(IA3 3)}$$
# $$W' = W\, \mathrm{diag}(l), \quad b' = b \qquad \text{(IA3 4)}$$
#
# The gradient, with $g$ that at $l \odot h$: never zero because of $l$.
#
# $$\mathrm{d}l = \textstyle\sum_{\text{tokens}} g \odot h
#   \qquad \text{(IA3 5)}$$
#
# ## By hand
#
# $$W = \begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}, \quad b = (1, -1),
#   \quad x = (1, 1), \quad l = (2, \tfrac12).$$
#
# 1. Written: $Wx + b = (3 + 1, 7 - 1) = (4, 6)$, rescaled $(8, 3)$.
# 2. Merged: rows times $2$ and $\tfrac12$ give
#    $W' = \begin{pmatrix} 2 & 4 \\ 1.5 & 2 \end{pmatrix}$,
#    $b' = (2, -0.5)$, and $W'x + b' = (8, 3)$ again.
# 3. Read: $l \odot x = (2, 0.5)$, so $W (2, 0.5) + b = (3 + 1, 8 - 1) =
#    (4, 7)$; the columns take the scale, and the bias stays.

# %%
W, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, -1.0])
x, l = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.5])

rows, bias = ia3.rescaled_rows(W, b, l)
print("written:", ia3.rescale(W @ x + b, l).tolist(), end="  ")
print("merged:", (rows @ x + bias).tolist())
columns, bias = ia3.rescaled_columns(W, b, l)
print("read:   ", (W @ ia3.rescale(x, l) + b).tolist(), end="  ")
print("merged:", (columns @ x + bias).tolist())

# %% [markdown]
# ## The library's own source
#
# The whole method. `on_input` decides between (IA3 1) and (IA3 2).

# %%
kit.code(
    getsource(ia3.rescale),
    getsource(ia3.rescaled_rows),
    getsource(ia3.rescaled_columns),
    getsource(ia3.IA3Linear),
)

# %% [markdown]
# ## At the start: nothing
#
# All $l$ are 1, and times 1 changes no bit. Unlike in LoRA no part must wait
# for another: every knob has a gradient from the first step on, as long as
# there is something to hear. Where a hidden unit is 0 for every word of a
# text, (IA3 5) says that turning its knob changes nothing.

# %%
model, tokenizer = kit.base()
config = model.config
text = "Jack was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
before = model(ids)

technique = IA3(targets=("k", "v", "down"))
technique.attach(model)
kit.holds("the model is the base, bitwise", model(ids).equal(before))
model.loss(ids[:, :-1], ids[:, 1:]).backward()
for path in ("attn.k", "attn.v", "mlp.down"):
    knobs = [resolve(model, f"blocks.{n}.{path}").l for n in range(4)]
    silent = sum(int((l.grad == 0).sum()) for l in knobs)
    print(f"{path:9} knobs without a gradient: {silent}")
model.zero_grad()

# %% [markdown]
# ## How many numbers
#
# One for each coordinate that is scaled: $D$ for the keys, $D$ for the
# values, $d_{\text{ff}}$ for the hidden layer, in each of $L$ blocks.

# %%
L, D, F = config.n_layer, config.d_model, config.ff_width
whole = sum(p.numel() for p in kit.base()[0].parameters())
print(f"L (2 D + d_ff)  {L} x (2 x {D} + {F}) = {L * (2 * D + F):,}")
print(f"count           {technique.count(config):,}")
print(f"measured        {report(model).trained:,}")
print(f"of the base     {technique.count(config) / whole:.2%}")

# %% [markdown]
# ## Training against the floor
#
# *Dialect* once more, with two learning rates: IA3's own, 0.06, and one at
# which other methods learn well. The floor is the loss of a model that knows
# the dialect perfectly.

# %%
curves, adapted = {}, {}
for rate in (6e-2, 3e-3):
    name = f"IA3, rate {rate:g}"
    adapted[name] = IA3().attach(kit.base()[0])
    curves[name] = kit.learn(
        adapted[name], tokenizer, "dialect", 160, 4, learning_rate=rate
    )
best = kit.optimum("dialect")
start = curves[name][0][1]
for name, points in curves.items():
    closed = (start - points[-1][1]) / (start - best["floor"])
    print(f"{name:15} {points[-1][1]:.2f} nats, {closed:.0%} of the way")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Learning a dialect by turning knobs",
    "nats a document",
)

# %% [markdown]
# *In words:* at the high rate the curve falls steeply and ends not far above
# the floor; at the low rate it has come a small part of the way.
#
# A knob starts at 1 and must get to 0 or 2 to matter, and Adam moves each
# number by about the learning rate a step. Small steps do not get there in
# time.
#
# ## The picture: where the knobs went
#
# All $l$ of each layer, sorted. A flat line at 1 would be the base; below 1 a
# coordinate is turned down, at 0 it is silent, above 1 it is turned up.

# %%
tuned = adapted["IA3, rate 0.06"]
names = {"keys": "attn.k", "values": "attn.v", "hidden layer": "mlp.down"}
figure, axes = kit.canvas(10.0, 3.6, columns=3)
told = []
for axis, (name, path) in zip(axes, names.items()):
    for n, (colour, _, line) in zip(range(L), kit.styles()):
        knobs = resolve(tuned, f"blocks.{n}.{path}").l.detach().sort().values
        percent = torch.linspace(0, 100, len(knobs))
        axis.plot(percent, knobs, line, color=colour, label=f"layer {n}")
    every = torch.cat(
        [resolve(tuned, f"blocks.{n}.{path}").l.detach() for n in range(L)]
    )
    told.append(f"{name} from {every.min():.1f} to {every.max():.1f}")
    share = (every < 0).double().mean()
    print(f"{name:13} turned to the other sign: {share:.0%}")
    axis.axhline(1, color="#555555", linewidth=0.8)
    axis.set(xlabel="coordinates, sorted, %", ylim=(-4, 6))
    axis.set_title(name, loc="left", fontsize=11)
axes[0].set_ylabel("scale l")
axes[2].legend(frameon=False, fontsize=8, loc="upper left")
kit.show(figure, f"The sorted knobs of every layer: {', '.join(told)}.")

# %% [markdown]
# *In words:* three panels of rising curves through the line at 1, one a
# layer. About half of the knobs are turned down and half up; at the low end
# some have passed 0 and turn the sign of what they scale.
#
# Few numbers, and yet: what is the rank of the change $W' - W =
# \mathrm{diag}(l - 1) W$? Count of numbers and rank are different things.

# %%
value = resolve(tuned, "blocks.0.attn.v")
weight = value.inner.weight.detach().double()
delta = (value.l.detach().double()[:, None] - 1) * weight
print("numbers trained:", value.l.numel())
print(f"rank of the change: {torch.linalg.matrix_rank(delta)} of {D}")

# %% [markdown]
# ## Merged, without a trace
#
# (IA3 3) and (IA3 4) fold the knobs into the weights: the model that is
# served costs what the base costs. In float64 only rounding is left. Also the
# reason why the paper leaves queries alone: the score is a product of query
# and key, coordinate by coordinate, so $l_q \odot l_k$ on the keys does the
# same.

# %%
exact = copy.deepcopy(tuned).double().eval()
with torch.no_grad():
    beside = exact(ids)
    with minipeft.merged(exact):
        inside = exact(ids)
    kit.holds(
        "merged is unmerged (1e-12)", (beside - inside).abs().max() < 1e-12
    )
    kit.holds("afterwards every bit is back", exact(ids).equal(beside))

    logits = []
    for targets in (("q", "k"), ("k",)):
        twin = IA3(targets).attach(kit.base()[0].double())
        for n in range(L):
            torch.manual_seed(n)
            l_q, l_k = torch.rand(2, D).double() * 2
            key = resolve(twin, f"blocks.{n}.attn.k")
            key.l.copy_(l_k if "q" in targets else l_q * l_k)
            if "q" in targets:
                resolve(twin, f"blocks.{n}.attn.q").l.copy_(l_q)
        logits.append(twin(ids))
same = torch.allclose(*logits, rtol=0, atol=1e-12)
kit.holds("knobs on queries are knobs on keys", same)

# %% [markdown]
# ## What goes wrong
#
# A projection writes $Wx + b$, and the knob turns the sum. Whoever merges by
# scaling the weight alone forgets the bias.


# %%
def merging(package):
    """Merged and unmerged agree, with knobs away from 1."""
    model = package.IA3().attach(kit.base()[0].double().eval())
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    with torch.no_grad():
        beside = model(ids)
        with package.merged(model):
            gap = (model(ids) - beside).abs().max()
    kit.holds(f"merged is unmerged (off by {gap:.1g})", gap < 1e-12)


merging(minipeft)
print()
with kit.planted("ia3", "the bias is left out of the scaling") as bug:
    merging(bug)

# %% [markdown]
# Training, evaluation and the saved file are all right with this bug. Only
# the merged model is wrong, the one that is shipped. And a model without
# biases, as many are today, would never show it: test with biases that are
# not zero.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **11.1** Fold $l$ into a projection whose *output* it scales.


# %%
def answer(W, b, l):
    """W (out, in), b (out,), l (out,) -> (W', b')."""
    return None  # your code


kit.check("11.1", answer)

# %% [markdown]
# **11.2** The gradient of $l$, (IA3 5), for a whole batch.


# %%
def answer(g, h):
    """g, h (B, T, n) -> (n,)."""
    return None  # your code


kit.check("11.2", answer)

# %% [markdown]
# **11.3** How many numbers does IA3 train for some of the targets q, k, v, o,
# up and down? `down` is scaled at what it reads, the others at what they
# write.


# %%
def answer(targets, L, D, d_ff):
    """An integer; targets is a tuple of names."""
    return None  # your code


kit.check("11.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=technique.count(config))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/additive/ia3.py`. The paper's recipe for learning from
#   a handful of examples has three losses and is in
#   `minipeft/additive/t_few.py`.
# - The paper: Liu et al. 2022, *Few-Shot Parameter-Efficient Fine-Tuning is
#   Better and Cheaper than In-Context Learning*, arXiv 2205.05638.
# - Next: chapter 12 shows that prefixes, adapters and LoRA are one thing, and
#   mixes them.
