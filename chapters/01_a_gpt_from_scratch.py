# %% [markdown]
# # 01. A GPT from scratch
#
# **The question.** Between a text and the probability of its next word lie
# five equations. What are they, what does each one do, and can a model built
# from nothing but them learn a language while we watch?
#
# After this chapter you can compute attention by hand, name every part of
# the model and count its parameters, see a head copy a word from one place
# to another, and say at once why a loss that is too good is a bug. Reading
# and running: about 30 minutes.

# %%
import math
import random
from collections import Counter
from inspect import getsource

import minipeft
import torch
from minipeft import GPT, GPTConfig, generate
from minipeft.dataset import Example, encode_all
from minipeft.evaluation import nats
from minipeft.gpt import (
    Attention,
    AttentionCore,
    Block,
    Embedding,
    attention_written_out,
)
from minipeft.town import WORLD, documents, grammar, held_out
from minipeft.training import TrainingConfig, train

import kit

# %% [markdown]
# ## The equations
#
# A text is a row of token ids. Each id picks a vector, and so does its
# position; their sum $x_0$ enters the *residual stream*:
#
# $$x_0 = E[\text{ids}] + P[0 \ldots T-1] \qquad \text{(GPT 1)}$$
#
# Every block reads the stream twice and adds what it found. Attention moves
# information between tokens, the feed-forward layer works on each alone:
#
# $$a_l = x_l + \mathrm{Attn}(\mathrm{LN}(x_l)) \qquad \text{(GPT 2)}$$
# $$x_{l+1} = a_l + W_\text{down}\,\mathrm{gelu}(W_\text{up}\,
#   \mathrm{LN}(a_l) + b_\text{up}) + b_\text{down} \qquad \text{(GPT 3)}$$
# $$\mathrm{Attn}(x) = W_o\,\big[\mathrm{softmax}(q k^\top / \sqrt d + M)
#   \,v\big] + b_o \qquad \text{(GPT 4)}$$
#
# $M$ is $-\infty$ where a token would look into its own future. At the end
# the stream is compared with every token's embedding:
#
# $$\text{logits} = E\,\mathrm{LN}(x_L) \qquad \text{(GPT 5)}$$
#
# ## Attention by hand
#
# Three tokens, one head of width $d = 1$, so $\sqrt d = 1$. Let every query
# be 1, the keys $0, \ln 2, \ln 3$ and the values $6, 12, 2$. A score is
# query times key, and $e$ to the score is then simply $1, 2, 3$.
#
# - Token 1 sees only itself: $6$.
# - Token 2 weighs the first two as $1 : 2$:
#   $\tfrac13 \cdot 6 + \tfrac23 \cdot 12 = 10$.
# - Token 3 weighs all three as $1 : 2 : 3$:
#   $\tfrac16 \cdot 6 + \tfrac26 \cdot 12 + \tfrac36 \cdot 2 = 6$.

# %%
q = torch.ones(1, 1, 3, 1)
k = torch.tensor([0.0, math.log(2), math.log(3)]).view(1, 1, 3, 1)
v = torch.tensor([6.0, 12.0, 2.0]).view(1, 1, 3, 1)

by_hand = torch.tensor([6.0, 10.0, 6.0])
defined = attention_written_out(q, k, v).flatten()
fast = AttentionCore()(q, k, v).flatten()
print("the definition: ", [round(x, 4) for x in defined.tolist()])
print("torch's kernel: ", [round(x, 4) for x in fast.tolist()])
print(
    "both as by hand:", torch.allclose(torch.stack([defined, fast]), by_hand)
)

# %% [markdown]
# ## The library's own source
#
# This is the model, not a sketch of it. `self.core` is a module of its own,
# without parameters, because some techniques will put themselves around it.

# %%
kit.code(
    getsource(Embedding.forward),
    getsource(attention_written_out),
    getsource(Attention.forward),
    getsource(Block.forward),
)

# %% [markdown]
# ## At the start: it knows nothing, and says so
#
# A new model should find every token about equally likely. Then its loss is
# $\ln V$ a token, with $V$ the size of the vocabulary. A first loss far
# above that is the earliest sign of a wrong initialisation.

# %%
base, tokenizer = kit.base()
torch.manual_seed(0)
config = GPTConfig(
    vocab_size=tokenizer.vocab_size,
    context_length=64,
    n_layer=2,
    n_head=4,
    d_model=64,
)
model = GPT(config)
kind = documents.of(WORLD, documents.story_with_tail)
rng = random.Random("chapter 01")
texts = [grammar.sample(kind, rng) for _ in range(4200)]
held, texts = kit.some(texts[:200]), texts[200:]
examples = [Example(completion=text) for text in held]
rows = encode_all([Example(completion=t) for t in texts], tokenizer)
tokens = sum(len(tokenizer.encode(t)) + 1 for t in held) / len(held)

first = nats(model, examples, tokenizer)
print(texts[0])
print(f"loss of the new model: {first / tokens:.3f} nats a token")
print(f"ln V:                  {math.log(config.vocab_size):.3f}")

# %% [markdown]
# ## How many numbers
#
# $$VD + CD + L\,(12 D^2 + 13 D) + 2 D$$
#
# Embeddings of $V$ tokens and $C$ positions; in each of $L$ blocks four
# $D \times D$ projections, two of $D \times 4D$, their biases, two
# LayerNorms; one LayerNorm at the end. The head is the embedding once more.


# %%
def parameters(c):
    D = c.d_model
    blocks = c.n_layer * (12 * D**2 + 13 * D)
    return (c.vocab_size + c.context_length) * D + blocks + 2 * D


for name, one in {"ours": model, "the shipped base": base}.items():
    counted = sum(p.numel() for p in one.parameters())
    print(f"{name:17} formula {parameters(one.config):8,}  is {counted:8,}")

# %% [markdown]
# ## Learning, against the floor
#
# We train it on stories of Tiny Town. Three lines tell what the loss means.
# *Guessing* is $\ln V$ for every token. *Counting* is the loss of somebody
# who knows how often each word occurs and nothing else. The *floor* is the
# loss of a reader who knows the town's grammar perfectly; chapter 02 shows
# where it comes from. No model can do better on average.

# %%
counts = Counter(
    i for t in texts for i in [*tokenizer.encode(t), tokenizer.eot]
)
total = sum(counts.values())
counting = -sum(
    math.log((counts[i] + 1) / (total + config.vocab_size))
    for t in held
    for i in [*tokenizer.encode(t), tokenizer.eot]
) / len(held)
floor = grammar.nats(kind, held)


def grow(model, n):
    """Train from nothing; [(step, nats a document), ...]."""
    n = kit.steps(n)
    settings = TrainingConfig(
        steps=n,
        batch_size=32,
        learning_rate=5e-3,
        schedule="cosine",
        pool=8,
        eval_every=max(1, n // 8),
        device="cpu",
    )
    result = train(
        model,
        rows,
        settings,
        evaluate=lambda m: nats(m, examples, tokenizer),
        show=False,
    )
    return [(step, value["value"]) for step, value in result.evaluations]


curve = grow(model, 400)
for step, value in curve:
    print(f"step {step:3}  {value:7.2f} nats a document")
print(f"floor     {floor:7.2f}")

# %%
figure, axis = kit.canvas(8.0, 4.4)
lines = {
    "guessing": math.log(config.vocab_size) * tokens,
    "counting words": counting,
    "floor": floor,
}
for value, style in zip(lines.values(), ("-", "--", ":")):
    axis.axhline(value, color="#555555", linestyle=style, linewidth=1.2)
axis.plot(*zip(*curve), "o-", color=kit.COLOURS[0], linewidth=1.8)
axis.set(yscale="log", xlabel="training step", ylabel="nats a document")
axis.set_yticks([20, 30, 50, 100, 200], ["20", "30", "50", "100", "200"])
axis.minorticks_off()
right = curve[-1][0]
axis.set(xlim=(-0.02 * right, 1.02 * right), ylim=(16, 200))
for name, value in lines.items():
    place = 0.55 * right
    high = 0.96 if name == "floor" else 1.04
    style = {"color": "#555555", "va": "top" if high < 1 else "baseline"}
    axis.text(place, value * high, f"{name} {value:.1f}", **style)
axis.text(
    right * 0.99,
    curve[-1][1] * 1.05,
    f"our model {curve[-1][1]:.1f}",
    color=kit.COLOURS[0],
    ha="right",
)
axis.set_title("A model learns to tell stories", loc="left", fontsize=11)
told = ", ".join(f"{name} {value:.1f}" for name, value in lines.items())
kit.show(
    figure,
    f"Loss of a new model from {curve[0][1]:.1f} to {curve[-1][1]:.1f} nats a "
    f"document on a logarithmic scale; lines at {told}.",
)

# %% [markdown]
# *In words:* the curve starts on the line of guessing, crosses the line of
# counting within the first steps, and bends towards the dotted floor.

# %%
start = torch.tensor([[tokenizer.eot]])
for seed in range(3):
    ids = generate(
        model, start, max_new_tokens=40, stop_token=tokenizer.eot, seed=seed
    )
    print(tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eot]))

# %% [markdown]
# ## The picture: a head that copies
#
# The shipped base has trained for longer and on more kinds of text. One
# kind is a record that is then told as a sentence: the words must be copied
# from far back. Attention weights show how. We catch queries and keys at
# every core, compute the softmax ourselves, and pick the head that puts the
# most weight on the word that comes next.

# %%
text = held_out("record_to_text")[3]
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
words = ["·", *(tokenizer.decode([i]).strip() for i in ids[0, 1:].tolist())]
border = words.index("Text") + 2  # behind "Text :"

caught = []
hooks = [
    block.attn.core.register_forward_pre_hook(lambda _, x: caught.append(x))
    for block in base.blocks
]
with torch.no_grad():
    base(ids)
for hook in hooks:
    hook.remove()

weights = []  # (H, T, T) for each block
for q, k, *_ in caught:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    T = scores.shape[-1]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    weights.append(scores.masked_fill(future, -math.inf).softmax(-1)[0])
weights = torch.stack(weights)  # (L, H, T, T)

sources = [  # (place that must predict, place in the record to copy from)
    (t - 1, words.index(words[t]))
    for t in range(border, T)
    if words[t] in words[:border] and words[t] != "."
]
mass = torch.stack([weights[:, :, t, s] for t, s in sources]).mean(0)
layer, head = divmod(int(mass.argmax()), mass.shape[1])
chosen = weights[layer, head, border - 1 : -1, :border]
print(text)
print(f"block {layer}, head {head}: {mass.max():.0%} on the word to copy")

# %%
figure, axis = kit.canvas(8.6, 4.6)
axis.grid(False)
axis.imshow(chosen, cmap="Greys", vmin=0, vmax=1, aspect="auto")
axis.set_xticks(range(border), words[:border], rotation=60, ha="right", size=9)
labels = [
    f"{a} → {b}"
    for a, b in zip(words[border - 1 : -1], words[border:], strict=True)
]
axis.set_yticks(range(len(labels)), labels, size=9)
for t, s in sources:
    axis.plot(s, t - border + 1, "s", ms=13, mec=kit.COLOURS[1], mfc="none")
axis.set(xlabel="looks at", ylabel="has read → must write")
axis.set_title(
    f"Block {layer}, head {head}: dark is attention, squares are what to copy",
    loc="left",
    fontsize=11,
)
kit.show(
    figure,
    f"Attention of block {layer}, head {head}, sentence against record; on "
    f"average {mass.max():.0%} of it lies on the word to be copied.",
)

# %% [markdown]
# *In words:* a grid with the sentence downwards and the record to the right;
# nearly everywhere where a word has to be copied, marked by a square, the
# dark cell is in the square, and where there is nothing to copy the head
# rests on *Text*.
#
# The very first word is an exception: behind the colon the model has yet to
# choose which of four sentences it will tell, and only one begins with the
# name. Nobody told this head to copy. It found (GPT 4) useful for it.
#
# ## What goes wrong
#
# A causal model must not look ahead. The invariant is one line: change the
# last token, and no earlier logit may move. Here it is on the library, and
# on a library in which one argument differs.


# %%
def looks_ahead(package):
    """Whether earlier logits depend on a later token."""
    torch.manual_seed(0)
    small = package.GPT(config).eval()
    a = ids.clone()
    b = ids.clone()
    b[0, -1] = tokenizer.eot
    with torch.no_grad():
        same = small(a)[:, :-1].equal(small(b)[:, :-1])
    kit.holds("a later token does not change earlier logits", same)
    return small


looks_ahead(minipeft)
print()
with kit.planted("gpt", "no causality") as bug:
    cheat = looks_ahead(bug)
    cheated = grow(cheat, 400)
print(f"\nit trains to {cheated[-1][1]:.2f} nats; the floor is {floor:.2f}")

# %% [markdown]
# It trains without complaint, and to a wonderful loss: *below the floor*,
# where no honest model can be. The model reads the next token and repeats
# it. On real text nobody could say that such a loss is impossible; here the
# floor convicts it. (In a real project the same bug shows when the model
# has to write, because then there is no next token to look at.)
#
# ## Exercises
#
# **01.1** Write causal attention for one head, without the library and
# without `scaled_dot_product_attention`.


# %%
def answer(q, k, v):
    """q, k, v (T, d) -> (T, d)."""
    return None  # your code


kit.check("01.1", answer)

# %% [markdown]
# **01.2** Give the number of parameters of a GPT whose feed-forward layer is
# $F$ wide instead of $4D$.


# %%
def answer(V, C, L, D, F):
    """All parameters, the head tied."""
    return None  # your code


kit.check("01.2", answer)

# %% [markdown]
# **01.3** While a text is being written, keys of earlier tokens are kept:
# there are $T$ new queries and $S \ge T$ keys, and the last query belongs to
# the last key. Which query may see which key?


# %%
def answer(T, S):
    """(T, S) bool, True where query t may look at key s."""
    return None  # your code


kit.check("01.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=sum(p.numel() for p in model.parameters()))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/gpt.py`. Its tests: `tests/test_gpt.py`; its bugs:
#   `tests/mutants/gpt.py`. The loss without all its logits in memory:
#   `minipeft/cross_entropy.py`.
# - The papers: Vaswani et al. 2017, *Attention is all you need*, arXiv
#   1706.03762; Radford et al. 2019, *Language models are unsupervised
#   multitask learners* (GPT-2).
# - Next: chapter 02, the town, and how its floor is known exactly.
