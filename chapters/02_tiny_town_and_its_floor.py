# %% [markdown]
# # 02. Tiny Town and its floor
#
# **The question.** A model pays 19 nats for a document. Is that good? On
# real text nobody knows, because nobody knows what the best possible model
# would score. So we build a world in which everybody can know.
#
# After this chapter you can compute the probability of a document with a
# hidden cause, say what a floor is and what it is not, tell "the model has
# not learned" from "there is nothing left to learn", and ask the perfect
# reader for its next word. Reading and running: about 25 minutes.

# %%
import math
import random
from collections import Counter
from inspect import getsource

import torch
from minipeft import LoRA
from minipeft.dataset import Example, encode_all
from minipeft.evaluation import nats, per_batch, row_nats
from minipeft.town import (
    DIALECT,
    TASKS,
    WORLD,
    documents,
    grammar,
    held_out,
    home_documents,
    mix,
)

import kit

# %% [markdown]
# ## The equations
#
# A document is written by a small program that makes random decisions
# $d_1, d_2, \ldots$ Some of them are said aloud, some stay hidden. The
# probability of a text $x$ is the sum over all ways $d$ to write it:
#
# $$P(x) = \sum_{d \,\to\, x}\; \prod_i P(d_i \mid d_{<i})
#   \qquad \text{(Town 1)}$$
#
# From it follow the perfect reader's next word, and the price of a document:
#
# $$P(w \mid x_{<t}) = P(x_{<t}\,w \ldots) \,/\, P(x_{<t} \ldots)
#   \qquad \text{(Town 2)}$$
# $$H(x) = -\ln P(x) \qquad \text{(Town 3)}$$
#
# The mean of $H$ over documents is the **floor**. A model $q$ pays
# $-\ln q(x)$, and on average over the world's documents that is never less:
# the difference is a Kullback-Leibler divergence, and those are never
# negative.
#
# ## By hand
#
# A weather report has a hidden mood, good or bad, one half each. It says two
# words. On a good day each word is *bright* with probability 3/4 and *grey*
# with 1/4; on a bad day the other way round.
#
# - *bright bright*: $\tfrac12 \cdot \tfrac34 \cdot \tfrac34 +
#   \tfrac12 \cdot \tfrac14 \cdot \tfrac14 = \tfrac5{16}$
# - *bright grey*: $\tfrac12 \cdot \tfrac34 \cdot \tfrac14 +
#   \tfrac12 \cdot \tfrac14 \cdot \tfrac34 = \tfrac3{16}$
# - the other two by symmetry; together $\tfrac{16}{16}$.
#
# After one *bright* the next word is *bright* with probability
# $\tfrac5{16} / \tfrac12 = \tfrac58$: the first word is a hint about the
# mood. The same with the library. A kind of document is a function of two
# callbacks:


# %%
def weather(choose, say):
    """Two words about the sky on a day whose mood is hidden."""
    mood = choose(("good", "bad"))
    odds = (3, 1) if mood == "good" else (1, 3)
    choose(("bright", "grey"), odds, aloud=True)
    choose(("bright", "grey"), odds, aloud=True)


by_hand = {"bright bright": 5 / 16, "bright grey": 3 / 16}
for text, p in by_hand.items():
    exact = math.exp(grammar.log_prob(weather, text))
    print(f"{text:14} {exact:.6f}  as by hand: {math.isclose(exact, p)}")

second = grammar.next_words(weather, "bright bright")[1]
print("after one bright:", {w: round(p, 6) for w, p in second.items()})

everything = grammar.enumerate_documents(weather)
print("sum over all documents:", sum(everything.values()))
floor = grammar.nats(weather, ["bright bright", "bright grey"])
print(f"mean price of these two: {floor:.4f} nats")

# %% [markdown]
# ## The library's own source
#
# One function writes a document or weighs it, depending on the callbacks it
# is given. Below: sampling, weighing, and the first sentence of every story.

# %%
kit.code(
    getsource(grammar.sample),
    getsource(grammar.log_prob),
    getsource(grammar.nats),
    getsource(documents._did),
)

# %% [markdown]
# ## Who lives there
#
# The town's people have facts that must be memorised; its stories have a
# mood that must be inferred; its records must be copied.

# %%
person = WORLD.residents[0]
print(len(WORLD.residents), "residents, such as", person.name, person.facts)
print(len(WORLD.visitors), "visitors, of whom nothing is known")
rng = random.Random(0)
for kind in documents.KINDS:
    text = grammar.sample(documents.of(WORLD, documents.KINDS[kind]), rng)
    print(f"\n{kind}:\n  {text}")

# %% [markdown]
# ## The base stands on its floor
#
# Here is the shipped base on each kind of document it grew up with, next to
# the floor of the very same documents.

# %%
model, tokenizer = kit.base()
table = []
for kind in (*documents.KINDS, None):
    texts = kit.some(held_out(kind)[:150])
    rows = [Example(completion=text) for text in texts]
    score, best = nats(model, rows, tokenizer), grammar.nats(mix(), texts)
    name = kind or "the whole mix"
    table.append([name, f"{best:.2f}", f"{score:.2f}", f"{score - best:+.2f}"])
kit.table(["kind", "floor", "base", "above"], table)

# %% [markdown]
# The perfect reader knows more than a number. After each word it has the
# exact distribution of the next one. Compare it with the base's, at the
# place in a story where the mood shows:

# %%
text = "Ada found a bright lamp . She felt glad ."
place = text.split().index("glad")
truth = grammar.next_words(mix(), text)[place]
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
with torch.no_grad():
    belief = model(ids)[0, place].softmax(-1)

print(f"{text.split(' glad')[0]} ...")
for word, p in sorted(truth.items(), key=lambda pair: -pair[1])[:8]:
    (token,) = tokenizer.encode(" " + word)
    print(f"  {word:8} truth {p:.3f}   base {belief[token]:.3f}")

# %% [markdown]
# ## Two lines for every task
#
# In the *dialect* the same program runs with other weights: things depend on
# verbs, the time of day comes first. A home reader can still read all of it,
# at a price. So there are two lines, both exact:
#
# - **floor**: the reader who knows the dialect's weights;
# - **perfect, not adapted**: the flawless reader of the old mix.
#
# Training moves a model from the second towards the first. Let LoRA do it
# for a moment (it has a chapter of its own), and count what it trains.

# %%
home = kit.some(home_documents()[:300])
new = kit.some(TASKS["dialect"].test()[:300])
dialect = documents.of(WORLD, documents.story, style=DIALECT)


def prices(model, examples):
    """Nats of each document for a model."""
    rows = encode_all(examples, tokenizer, model)
    return torch.tensor(per_batch(row_nats, model, rows))


def exact(kind, examples):
    """Nats of each document for the reader who knows this kind."""
    return -torch.tensor(
        [grammar.log_prob(kind, x.completion) for x in examples]
    )


best_home, best_new = exact(mix(), home), exact(dialect, new)
unadapted = exact(mix(), new)
before_home, before_new = prices(model, home), prices(model, new)

technique = LoRA(rank=8, alpha=16)
technique.attach(model)
curve = kit.learn(model, tokenizer, "dialect", 150, points=3)
after_new = prices(model, new)

print(f"{technique.count(model.config):,} parameters trained")
print(f"floor                  {best_new.mean():.2f} nats a document")
print(f"perfect, not adapted   {unadapted.mean():.2f}")
print(f"the base before        {before_new.mean():.2f}")
print(f"the base with LoRA     {after_new.mean():.2f}")

# %%
figure, (left, right) = kit.canvas(9.4, 4.8, columns=2)
panels = {
    left: [(best_home, before_home, "o", kit.COLOURS[0], "● the base")],
    right: [
        (best_new, before_new, "^", kit.COLOURS[1], "▲ before"),
        (best_new, after_new, "o", kit.COLOURS[0], "● after LoRA"),
    ],
}
for axis, clouds in panels.items():
    for x, y, marker, colour, _name in clouds:
        axis.plot(x, y, marker, color=colour, ms=4, alpha=0.55, mec="none")
    low = min(float(c[0].min()) for c in clouds) - 1
    high = max(float(c[1].max()) for c in clouds) + 1
    axis.plot([low, high], [low, high], "--", color="#000000", linewidth=1)
    axis.set(xlim=(low, high), ylim=(low, high))
    axis.set(xlabel="exact price, nats", ylabel="the model's price, nats")
    for n, (_x, _y, _marker, colour, name) in enumerate(clouds):
        axis.text(
            0.62, 0.14 - 0.07 * n, name, color=colour, transform=axis.transAxes
        )
left.set_title("Home stories", loc="left", fontsize=11)
right.set_title("Stories in dialect", loc="left", fontsize=11)
above = {
    "home": before_home - best_home,
    "dialect before": before_new - best_new,
    "dialect after": after_new - best_new,
}
told = ", ".join(f"{n} {d.mean():.2f}" for n, d in above.items())
kit.show(
    figure,
    "Exact price of each document against the model's price. Mean height "
    f"above the diagonal in nats: {told}.",
)

# %% [markdown]
# *In words:* two clouds of points around a dashed diagonal, one point a
# document; home stories lie on the diagonal, dialect stories lie far above
# it before training and come down close to it afterwards.
#
# This is what the floor is: the diagonal, averaged. It is a statement about
# the *mean*. A single document may well lie below it, where the model bet
# on a mood and was lucky:

# %%
for name, d in above.items():
    error = d.std() / math.sqrt(len(d))
    lucky = (d < 0).double().mean()
    print(f"{name:15} {d.mean():6.3f} +- {error:.3f}, below: {lucky:.0%}")

# %% [markdown]
# ## What goes wrong
#
# A floor that is wrong is worse than none: too high, and models "beat the
# optimum"; too low, and honest work looks bad. So the floor has invariants
# of its own. On a small world all can be checked by listing everything.


# %%
def invariants(grammar):
    """Check a grammar on the weather report."""
    listed = grammar.enumerate_documents(weather)
    kit.holds("all documents sum to 1", math.isclose(sum(listed.values()), 1))
    scored = {
        text: math.exp(grammar.log_prob(weather, text)) for text in listed
    }
    same = all(math.isclose(scored[t], p) for t, p in listed.items())
    kit.holds("scored one by one they are the same (Town 1)", same)
    rng = random.Random(1)
    seen = Counter(grammar.sample(weather, rng) for _ in range(4000))
    close = all(
        abs(seen[t] / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000)
        for t, p in listed.items()
    )
    kit.holds("samples come as often, within four sigma", close)


invariants(grammar)
for bug in (
    "the likeliest derivation for all of them",
    "weights that are not normalised",
    "the sampler ignores weights",
):
    print()
    with kit.planted("town", bug):
        from minipeft.town import grammar as planted_grammar

        invariants(planted_grammar)

# %% [markdown]
# The first is the subtlest: the best path instead of the sum over paths, as
# a parser would do it. Every probability comes out too small, the floor too
# high, and a good model then seems to beat the impossible.
#
# ## Exercises
#
# **02.1** A document is one word, drawn with the given weights (not
# necessarily summing to 1). What is its floor?


# %%
def answer(weights):
    """The mean price in nats for the reader who knows the weights."""
    return None  # your code


kit.check("02.1", answer)

# %% [markdown]
# **02.2** In the weather report: how likely is a good day, after these words?


# %%
def answer(words):
    """P(good | words); words a list of "bright" and "grey", any length."""
    return None  # your code


kit.check("02.2", answer)

# %% [markdown]
# **02.3** Models with different tokenizers compare in bits a byte. Convert.


# %%
def answer(nats_in_all, text):
    """Bits for each byte of the text, which is encoded as UTF-8."""
    return None  # your code


kit.check("02.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=technique.count(model.config))

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/town/grammar.py` (the sum over derivations),
#   `minipeft/town/documents.py` (what people write),
#   `minipeft/town/tasks.py` (seven tasks and their floors). Tests:
#   `tests/test_town.py`; bugs: `tests/mutants/town.py`.
# - The idea of a measure below which nobody can go: Shannon 1948, *A
#   mathematical theory of communication*.
# - Next: chapter 03 adapts the whole model, and looks at what it forgets.
