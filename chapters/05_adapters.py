# %% [markdown]
# # 05. Adapters, their fusion and their drop
#
# **The question.** A constant cannot depend on the input (chapter 04 had to
# rely on what bends behind it). The next smallest thing that can is a tiny
# network of its own. Where do you put it, how small may it be, can several
# of them work together, and do all of them matter?
#
# After this chapter you can write an adapter, tell the three placements
# apart and say which of them starts as a no-op, let a model choose among
# adapters that were trained for different tasks, and find out which layers
# could do without. Reading and running: about 30 minutes.

# %%
import random
from inspect import getsource

import minipeft
import torch
from minipeft import Adapter, AdapterFusion, figures
from minipeft.additive import adapter, adapter_fusion, bottleneck
from minipeft.additive.adapter_drop import dropped, rank_by_loss
from minipeft.additive.adapter_fusion import fusion_weights
from minipeft.dataset import Example, encode_all
from minipeft.evaluation import accuracy, nats
from minipeft.technique import set_adapter
from minipeft.town import DIALECT, TASKS, WORLD, documents, grammar, tasks
from minipeft.training import TrainingConfig, train

import kit

# %% [markdown]
# ## The equations
#
# An adapter squeezes a vector of width $D$ to $m$ numbers, bends them, and
# goes back:
#
# $$A(x) = s\,[W_2\,\sigma(W_1 x + b_1) + b_2] \qquad \text{(Adapter 1)}$$
#
# With $f$ what a sub-layer gives and $x$ what it reads, three placements:
#
# $$y = f + A(f) \text{ after attention and after the feed-forward layer}
#   \qquad \text{(Adapter 2)}$$
# $$y = f + A(f) \text{ after the feed-forward layer only}
#   \qquad \text{(Adapter 3)}$$
# $$y = f + A(x) \text{ beside it: nothing has to wait}
#   \qquad \text{(Adapter 4)}$$
#
# Houlsby and colleagues (2019) had the first, Pfeiffer and colleagues (2020)
# the second, He and colleagues (2021) the third.
#
# ## By hand
#
# $D = 2$, $m = 1$, ReLU, $s = 1$:
#
# $$W_1 = \begin{pmatrix} 1 & 1 \end{pmatrix}, \; b_1 = -1, \;
#   W_2 = \begin{pmatrix} 1 \\ -2 \end{pmatrix}, \; b_2 = 0.$$
#
# For $f = (1, 2)$: $W_1 f + b_1 = 2$, the ReLU lets it pass, $W_2$ makes
# $(2, -4)$ of it, and $y = (1, 2) + (2, -4) = (3, -2)$. For
# $f = (0.5, 0.25)$ the sum is $-0.25$, the ReLU shuts, and $y = f$. That is
# what a constant cannot do: act here, and not there.

# %%
f = torch.tensor([[1.0, 2.0], [0.5, 0.25]])
W_1, b_1 = torch.tensor([[1.0, 1.0]]), torch.tensor([-1.0])
W_2, b_2 = torch.tensor([[1.0], [-2.0]]), torch.zeros(2)
y = f + bottleneck.bottleneck(f, W_1, b_1, W_2, b_2)
print("y =", y.tolist())
print("as by hand:", y.equal(torch.tensor([[3.0, -2.0], [0.5, 0.25]])))

# %% [markdown]
# ## The library's own source

# %%
kit.code(
    getsource(bottleneck.bottleneck),
    getsource(adapter.SequentialAdapter),
    getsource(adapter.ParallelAdapter),
)

# %% [markdown]
# ## At the start, and how many numbers
#
# An adapter trains $2Dm + m + D$ numbers. Houlsby has two in a block and
# trains the LayerNorms too, $4D$ in a block and $2D$ at the end.
#
# With $W_2 = 0$ the start is the base in every bit. Houlsby's paper starts
# with small random numbers in both matrices instead: close to the base, but
# not equal.

# %%
model, tokenizer = kit.base()
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Ada found a bright")]])
before = model(ids)
D, L, m = model.config.d_model, model.config.n_layer, 16
one = 2 * D * m + m + D
formulas = {
    "houlsby": 2 * L * one + 4 * D * L + 2 * D,
    "pfeiffer": L * one,
    "parallel": L * one,
}
placements = {
    "houlsby": Adapter(placement="houlsby", bottleneck=m),
    "pfeiffer": Adapter(placement="pfeiffer", bottleneck=m),
    "parallel": Adapter(placement="parallel", bottleneck=m, scale=4.0),
}
rows = []
for name, technique in placements.items():
    technique.attach(model)
    off = (model(ids) - before).abs().max().item()
    counted = minipeft.report(model).trained
    rows.append([name, f"{formulas[name]:,}", f"{counted:,}", f"{off:.1e}"])
    minipeft.detach(model)
kit.table(["placement", "formula", "counted", "logits moved by"], rows)

# %% [markdown]
# ## Training against the floor
#
# The dialect again, the same 120 steps for each placement.

# %%
N = 120
curves, adapted = {}, {}
for name, technique in placements.items():
    adapted[name], tokenizer = kit.base()
    technique.attach(adapted[name], "dialect")
    curves[name] = kit.learn(adapted[name], tokenizer, "dialect", N, points=4)
best = kit.optimum("dialect")
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Three places for an adapter",
    "nats a document",
)

# %% [markdown]
# *In words:* three curves fall from the line of the perfect model that was
# not adapted; Houlsby's and Pfeiffer's lie on one another just above the
# floor, the parallel one ends a little higher.
#
# Two adapters a block and trained LayerNorms buy Houlsby nothing here over
# Pfeiffer's one, which is what Pfeiffer and colleagues had found.
#
# ## The picture: do all layers matter?
#
# Rücklé and colleagues (2021) asked which adapters one could leave out. The
# importance of a layer's adapter is what the loss gains from it:
#
# $$\text{importance}_l = \text{loss without layer } l\text{'s adapters}
#   - \text{loss} \qquad \text{(AdapterDrop 4)}$$
#
# and dropping the first $n$ layers saves most, because below the first
# adapter nothing needs a gradient (AdapterDrop 1).

# %%
examples = kit.some(TASKS["dialect"].test()[:250])
subject = adapted["pfeiffer"]
loss = nats(subject, examples, tokenizer)
rise = dict(rank_by_loss(subject, lambda m: nats(m, examples, tokenizer)))
prefix = {}
for n in range(L + 1):
    with dropped(subject, n):
        prefix[n] = nats(subject, examples, tokenizer)

figure, (left, right) = kit.canvas(9.4, 3.9, columns=2)
left.bar(
    range(L), [rise[n] for n in range(L)], color=kit.COLOURS[0], width=0.6
)
for n in range(L):
    left.text(n, rise[n], f"{rise[n]:.2f}", ha="center", va="bottom", size=9)
left.set_xticks(range(L), [f"layer {n}" for n in range(L)])
left.set(ylabel="nats lost without it")
left.set_title("One layer's adapter switched off", loc="left", fontsize=11)
right.plot(*zip(*prefix.items()), "s--", color=kit.COLOURS[1])
right.axhline(loss, color="#555555", linewidth=1, linestyle=":")
right.text(L, loss, "all adapters on", ha="right", va="bottom", size=9)
right.set_xticks(range(L + 1))
right.set(xlabel="first layers dropped", ylabel="nats a document")
right.set_title("The first n switched off", loc="left", fontsize=11)
told = ", ".join(f"layer {n} {rise[n]:.2f}" for n in range(L))
kit.show(figure, f"Nats lost without one layer's adapter: {told}.")

# %% [markdown]
# *In words:* on the left four bars, one a layer, for what is lost when that
# layer's adapter is switched off; on the right the loss rising step by step
# as more of the first layers go without.
#
# The first layers could do nearly without, the last ones could not: what the
# paper found on models a hundred times as large.
# `AdapterDrop(robust=True)` trains for being dropped; what that costs would
# be a good experiment of your own.
#
# ## Fusion: choosing among adapters
#
# Suppose you have one adapter for the dialect and one that reads moods. The
# new task is to read the mood of stories *in dialect*. AdapterFusion freezes
# both and learns an attention over what they say, for each token and layer:
#
# $$z_n = A_n(x) \qquad \text{(AdapterFusion 1)}$$
# $$p = \mathrm{softmax}_n\big((Qx + b_q)^\top (K z_n + b_k)\big)
#   \qquad \text{(AdapterFusion 2)}$$
# $$y = f + V \textstyle\sum_n p_n z_n \qquad \text{(AdapterFusion 3)}$$

# %%
kit.code(
    getsource(adapter_fusion.fusion_weights_of),
    getsource(adapter_fusion.fuse),
)


# %%
def moods_in_dialect(count, seed):
    """Stories in dialect, each asked for its mood; and Bayes' share right."""
    rng, examples, right = random.Random(seed), [], 0
    for _ in range(count):
        mood = rng.choice(list(tasks.MOOD_ANSWERS))
        odds = {}
        text = grammar.sample(in_dialect(mood), rng)
        for guess in tasks.MOOD_ANSWERS:
            odds[guess] = grammar.log_prob(in_dialect(guess), text)
        right += max(odds, key=odds.get) == mood
        answer = tasks.MOOD_ANSWERS[mood]
        prompt = text + tasks.MOOD_QUESTION
        examples.append(Example(prompt, f" {answer} .", label=answer))
    return examples, right / count


def in_dialect(mood):
    return documents.of(WORLD, documents.story, style=DIALECT, mood=mood)


lessons, _ = moods_in_dialect(400, "fusion, train")
stories, bayes = moods_in_dialect(16 if kit.FAST else 300, "fusion, test")

fused = subject  # it already carries the adapter called "dialect"
set_adapter(fused, [])
Adapter(placement="pfeiffer", bottleneck=m).attach(fused, "mood")
kit.learn(fused, tokenizer, "mood", N, points=1)

rows = []


def score(name):
    """A row: nats on the dialect, accuracy on moods in dialect."""
    told = nats(fused, examples, tokenizer)
    read = accuracy(fused, stories, tokenizer)
    rows.append([name, f"{told:.2f}", f"{read:.1%}"])


for names in (["dialect"], ["mood"], ["dialect", "mood"]):
    set_adapter(fused, names)
    score(" + ".join(names))

AdapterFusion(adapters=("dialect", "mood")).attach(fused, "fusion")
score("fusion, untrained")
config = TrainingConfig(steps=kit.steps(60), device="cpu")
train(fused, encode_all(lessons, tokenizer), config, show=False)
score("fusion, trained")
rows.append(["the best there can be", f"{best['floor']:.2f}", f"{bayes:.1%}"])
kit.table(["adapters on", "dialect, nats", "moods in dialect"], rows)
print("\nfusion trains", f"{minipeft.report(fused).trained:,}", "numbers")

# %% [markdown]
# At its start the fusion is the mean of its adapters, not the base. Trained
# on the new task, its attention learns whom to ask, word by word. (The
# numbers are means over four layers. That they come near quarters says that
# most layers ask one adapter alone.)

# %%
text = stories[0].prompt
tokens = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
p = fusion_weights(fused, tokens)[:, 0].mean(0)  # over layers: (T, 2)
print("weight of      dialect   mood")
for token, (first, second) in list(zip(tokens[0].tolist(), p.tolist()))[-6:]:
    word = tokenizer.decode([token]).strip()
    print(f"  at {word:10} {first:6.2f} {second:6.2f}")

# %% [markdown]
# ## What goes wrong


# %%
def invariants(package):
    """Check a Pfeiffer adapter."""
    model = kit.base()[0]
    base = model(ids)
    technique = package.Adapter(placement="pfeiffer", bottleneck=4, scale=3.0)
    technique.attach(model)
    kit.holds("at the start the model is the base", model(ids).equal(base))
    layer = package.wrap.resolve(model, "blocks.0.mlp")
    inside = layer.adapter
    torch.manual_seed(0)
    for parameter in inside.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(5, D)
    f = layer.inner(x)
    u = (f @ inside.down.weight.T + inside.down.bias).relu()
    A = 3 * (u @ inside.up.weight.T + inside.up.bias)
    close = torch.allclose(layer(x), f + A, rtol=1e-4, atol=1e-4)
    kit.holds("y = f + s [W2 relu(W1 f + b1) + b2] (Adapter 1, 3)", close)
    for parameter in inside.up.parameters():
        torch.nn.init.zeros_(parameter)
    kit.holds("at W2 = 0, b2 = 0 it is the sub-layer", layer(x).equal(f))


invariants(minipeft)
for where, bug in (
    ("adapter", "no inner residual"),
    ("adapter", "sequential reads the input"),
    ("bottleneck", "the scale misses the bias"),
):
    print()
    with kit.planted(where, bug) as package:
        invariants(package)

# %% [markdown]
# The first destroys the model at step zero and is seen at once. The other
# two start as perfect no-ops and train: a sequential adapter that reads the
# input is simply a parallel one, a fine technique with the wrong name in
# your table. Only the equation, written again, tells.
#
# ## Exercises
#
# **05.1** Write (Adapter 1) with a ReLU and put it in its place: give $y$ of
# (Adapter 3).


# %%
def answer(f, W_1, b_1, W_2, b_2, s):
    """y, of the shape of f (..., D)."""
    return None  # your code


kit.check("05.1", answer)

# %% [markdown]
# **05.2** You may train at most `budget` numbers, with Pfeiffer adapters in
# $L$ blocks of width $D$. What is the largest bottleneck?


# %%
def answer(budget, D, L):
    """The largest m, 0 if not even 1 fits."""
    return None  # your code


kit.check("05.2", answer)

# %% [markdown]
# **05.3** Give the fusion's weights for one token, as in (AdapterFusion 2).


# %%
def answer(x, Z, Q, b_q, K, b_k):
    """p (N,), for x (D,), the adapters' outputs Z (N, D), Q and K (D, D)."""
    return None  # your code


kit.check("05.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=formulas["pfeiffer"])

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/additive/adapter.py`,
#   `minipeft/additive/adapter_fusion.py`,
#   `minipeft/additive/adapter_drop.py`. Bugs: `tests/mutants/adapter.py`.
# - The papers: Houlsby et al. 2019, arXiv 1902.00751; Pfeiffer et al. 2020,
#   *AdapterFusion*, arXiv 2005.00247; He et al. 2021, arXiv 2110.04366;
#   Rücklé et al. 2021, *AdapterDrop*, arXiv 2010.11918.
# - Next: chapter 06 changes no layer at all, only what stands in front of
#   the text.
