# %% [markdown]
# # 03. Full fine-tuning, and what it forgets
#
# **The question.** The obvious way to adapt a model is to keep training it.
# Everything may move. What does that cost in memory, what does it cost in
# things the model could do before, and what helps?
#
# After this chapter you can say where the 16 bytes a parameter come from,
# make one AdamW step by hand, measure forgetting instead of fearing it, and
# know three remedies and their price. Every later chapter is measured against
# this one. Reading and running: about 25 minutes.

# %%
import random
from inspect import getsource

import minipeft
import torch
from minipeft import FullFineTuning, TopLayers, figures
from minipeft.dataset import Example, encode_all
from minipeft.evaluation import exact, nats
from minipeft.selective import full
from minipeft.town import TASKS, WORLD, documents, grammar, home_documents
from minipeft.training import TrainingConfig, train

import kit

# %% [markdown]
# ## The equations
#
# Full fine-tuning gives every parameter a change of its own. Its oldest
# economy lets only the last $n$ blocks move:
#
# $$\theta' = \theta + \delta, \quad \delta \in \mathbb{R}^{|\theta|}
#   \qquad \text{(Full 1)}$$
# $$\delta_i = 0 \text{ in every block below the last } n
#   \qquad \text{(Full 2)}$$
#
# ## One step by hand
#
# AdamW keeps two running averages for each parameter, of the gradient and of
# its square, and divides one by the root of the other. Take $w = 1$, a first
# gradient of $g = 0.5$, learning rate $0.1$, no decay, and the usual
# $\beta = (0.9, 0.999)$:
#
# 1. $m = 0.1 \cdot 0.5 = 0.05$ and $v = 0.001 \cdot 0.25 = 0.00025$.
# 2. Both began at zero and are too small. Correct them:
#    $\hat m = 0.05 / (1 - 0.9) = 0.5$ and
#    $\hat v = 0.00025 / (1 - 0.999) = 0.25$.
# 3. $w \leftarrow 1 - 0.1 \cdot 0.5 / \sqrt{0.25} = 0.9$.
#
# In the first step every parameter moves by the learning rate, whatever the
# size of its gradient.

# %%
for gradient in (0.5, 0.0001):
    w = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimizer = torch.optim.AdamW([w], lr=0.1, weight_decay=0.0)
    w.grad = torch.tensor(gradient, dtype=torch.float64)
    optimizer.step()
    print(f"gradient {gradient:<7} w becomes {w.item():.4f}")
state = optimizer.state[w]
print("kept beside w:", [name for name in state if name != "step"])

# %% [markdown]
# ## The library's own source
#
# A base that is trained in place is gone. So the library puts a trainable
# *clone* in the place of every parameter and keeps the original; `detach`
# then gives the base back, bit for bit. One clone for each parameter, also
# where a parameter stands in two places: the head shares the embedding.

# %%
kit.code(
    getsource(full.train_parameters),
    getsource(FullFineTuning.install),
    getsource(TopLayers.install),
)

# %% [markdown]
# ## At the start, and how many numbers
#
# $$VD + CD + L\,(12 D^2 + 13 D) + 2D$$
#
# for everything; $n\,(12 D^2 + 13 D)$ for the top $n$ blocks.

# %%
model, tokenizer = kit.base()
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode("Ada found a bright")]])
before = model(ids)
V, C, D, L = (
    model.config.vocab_size,
    model.config.context_length,
    model.config.d_model,
    model.config.n_layer,
)
block = 12 * D**2 + 13 * D
formulas = {
    FullFineTuning(): (V + C) * D + L * block + 2 * D,
    TopLayers(layers=1): block,
    TopLayers(layers=2): 2 * block,
}
for technique, formula in formulas.items():
    technique.attach(model)
    trained = minipeft.report(model).trained
    print(f"{technique}: formula {formula:,}, counted {trained:,}")
    print("    logits equal in every bit:", model(ids).equal(before))
    minipeft.detach(model)

# %% [markdown]
# ## Sixteen bytes a parameter
#
# In float32 a trained parameter needs 4 bytes for itself, 4 for its gradient
# and 8 for AdamW's two averages. A frozen one needs the first 4. For a model
# of 7 billion parameters the sum is 112 GB against 28 GB, before a single
# activation: this arithmetic is why the rest of this course exists. Measure
# it on ours, while training on the dialect:

# %%
dialect = TASKS["dialect"]
home, new = kit.some(home_documents()), kit.some(dialect.test())
questions = kit.some(TASKS["new_facts"].besides()["old_facts"][1])
kind = documents.of(WORLD, documents.story_with_tail)
rng = random.Random("chapter 03")
replay = [Example(completion=grammar.sample(kind, rng)) for _ in range(700)]


def adapt(technique, rate=None, also=()):
    """Train on the dialect and the examples `also`; (model, result)."""
    model, tokenizer = kit.base()
    technique.attach(model)
    rows = encode_all([*dialect.train(0), *also], tokenizer)
    n = kit.steps(160)
    config = TrainingConfig(
        steps=n,
        learning_rate=rate,
        eval_every=max(1, n // 4),
        device="cpu",
    )
    result = train(model, rows, config, evaluate=both, show=False)
    return model, result


def both(model):
    """Nats a document at home and in the dialect."""
    return {
        "home": nats(model, home, tokenizer),
        "new": nats(model, new, tokenizer),
    }


adapted, result = adapt(FullFineTuning())
trained = minipeft.report(adapted).trained
print(f"AdamW keeps {result.optimizer_bytes:,} bytes,")
print(f"which is    {result.optimizer_bytes / trained:.2f} a parameter")

# %% [markdown]
# ## Learning and forgetting, together
#
# Two numbers now, at every evaluation: stories in the new dialect, which it
# trains on, and stories from home, which it no longer sees.

# %%
floor = kit.optimum("dialect")["floor"]
home_before = nats(kit.base()[0], home, tokenizer)
rows = [
    [step, f"{value['new']:.2f}", f"{value['home']:.2f}"]
    for step, value in result.evaluations
]
kit.table(["step", "dialect, nats", "home, nats"], rows)
print(
    f"\nfloor of the dialect {floor:.2f}; the base at home {home_before:.2f}"
)

# %% [markdown]
# The dialect is learned almost to its floor, and with it home gets worse,
# most of it in the first steps, when the learning rate is high.
#
# ## What helps
#
# Three things people try: a smaller learning rate, training fewer layers,
# and *replay*, some home stories among the new ones (here one in four). We
# also ask every resident's facts again, in a form the base answers
# perfectly: is the knowledge gone, too?

# %%
attempts = {
    "full": (FullFineTuning(), None, ()),
    "full, a tenth of the rate": (FullFineTuning(), 1e-4, ()),
    "top layer only": (TopLayers(layers=1), None, ()),
    "full, with replay": (FullFineTuning(), None, replay),
}
models = {"full": (adapted, result)}
for name, (technique, rate, also) in attempts.items():
    if name not in models:
        models[name] = adapt(technique, rate, also)

points, rows = {}, []
base = both(kit.base()[0])
known = exact(kit.base()[0], questions, tokenizer)
rows.append(
    ["the base", f"{base['new']:.2f}", f"{base['home']:.2f}", f"{known:.0%}"]
)
for name, (model, result) in models.items():
    last = result.evaluations[-1][1]
    points[name] = (last["home"], last["new"])
    known = exact(model, questions, tokenizer)
    rows.append(
        [name, f"{last['new']:.2f}", f"{last['home']:.2f}", f"{known:.0%}"]
    )
kit.table(["", "dialect, nats", "home, nats", "old facts right"], rows)

# %% [markdown]
# What was lost is the way home stories are told, not what they tell: the old
# facts are all still right. "Forgetting" is not one thing, and a single
# number hides which kind it is.
#
# ## The picture
#
# One axis for what is gained, one for what is lost. Down is better at the
# new, left is better at the old; the base starts at the upper left.

# %%
kit.picture(
    figures.forgetting,
    points,
    (base["home"], base["new"]),
    "What learning a dialect costs at home",
)

# %% [markdown]
# *In words:* from the base at the upper left, plain full fine-tuning goes
# far down and far to the right; replay goes nearly as far down and hardly to
# the right.
#
# Replay wins clearly, and it needs what you often do not have: the old data.
# The later techniques buy something else. Many forget as much *while they are
# on* (chapter 21), but the base underneath is untouched, and
# `minipeft.disabled` or `detach` brings all of it back:

# %%
with minipeft.disabled(adapted):
    print("home, switched off:", round(nats(adapted, home, tokenizer), 4))
print("home, the base:    ", round(base["home"], 4))

# %% [markdown]
# ## What goes wrong
#
# The clone is where bugs live. Three invariants:


# %%
def invariants(package):
    """Check full fine-tuning."""
    model = kit.base()[0]
    logits = model(ids)
    technique = package.FullFineTuning()
    technique.attach(model)
    tied = model.head.weight is model.embed.token.weight
    kit.holds("head and embedding are one tensor", tied)
    count = technique.count(model.config)
    trained = [p for p in model.parameters() if p.requires_grad]
    same = sum(p.numel() for p in trained) == count
    kit.holds("the count is that of the formula", same)
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    torch.optim.SGD(trained, lr=0.1).step()
    package.detach(model)
    kit.holds("detach gives the base back (Full 1)", model(ids).equal(logits))


invariants(minipeft)
for bug in (
    "the head keeps the old embedding",
    "the base is trained although it should be kept",
):
    print()
    with kit.planted("full", bug) as package:
        invariants(package)

# %% [markdown]
# The first bug trains well: the head keeps the old embedding, frozen, and
# the embedding below drifts away from it. Nothing crashes, the loss falls,
# and the saved file holds one matrix where the model had two. The second is
# only noticed by whoever wants the base back.
#
# ## Exercises
#
# **03.1** Make AdamW's step number $t$ yourself (decay first, as the W
# says: $w \leftarrow w - \text{lr} \cdot \text{decay} \cdot w$).


# %%
def answer(w, g, m, v, t, lr, decay):
    """The new w; m, v are the averages before this step, t counts from 1.

    beta = (0.9, 0.999), eps = 1e-8 added to the root.
    """
    return None  # your code


kit.check("03.1", answer)

# %% [markdown]
# **03.2** How many bytes do weights, gradients and AdamW's state take in
# float32, if of `total` parameters only `trained` are trained?


# %%
def answer(total, trained):
    """Bytes."""
    return None  # your code


kit.check("03.2", answer)

# %% [markdown]
# **03.3** Does `TopLayers(layers)` train the tensor at this path?


# %%
def answer(path, n_layer, layers):
    """True or False; path such as "blocks.3.attn.q.bias" or "ln_f.weight"."""
    return None  # your code


kit.check("03.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=FullFineTuning().count(adapted.config))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/selective/full.py`; what training costs, by formula
#   and measured: `minipeft/memory.py`; the loop: `minipeft/training.py`.
# - The papers: Loshchilov & Hutter 2019, *Decoupled weight decay
#   regularization*, arXiv 1711.05101; forgetting has its name from McCloskey
#   & Cohen 1989.
# - Next: chapter 04 trains six tenths of a percent of the model, the biases.
