# %% [markdown]
# # 07. Prefix tuning
#
# **The question.** A soft prompt is read by the first layer; the layers above
# only see what the first ones make of it. What if every layer found notes of
# its own in front of the text, keys and values that no text has written? And
# what does it mean, exactly, to "attend to a prefix"?
#
# After this chapter you can put a prefix into attention in one line, read it
# as a gated sum of two attentions, say how much of a layer's attention it
# takes, and spot the two mistakes that leak the future or hide the prefix.
# Reading and running: about 25 minutes.

# %%
import copy
from inspect import getsource

import minipeft
import torch
from minipeft import PrefixTuning, figures, report, wrap
from minipeft.gpt import attention_written_out, causal_mask
from minipeft.soft_prompt import prefix_attention, prefix_tuning
from minipeft.soft_prompt.prompt_tuning import flatten

import kit

# %% [markdown]
# ## The equations
#
# Every head of every layer gets $p$ more keys and values, in front of the
# text's own:
#
# $$\text{head}(x) = \text{attn}(q,\; [P_k; K],\; [P_v; V]), \quad
#   P_k, P_v \in \mathbb{R}^{p \times d} \qquad \text{(Prefix 1)}$$
#
# Trained as they are, these rows learn slowly. The authors compute them by a
# small network while training, and keep only its output afterwards:
#
# $$[P_k; P_v]_l = W_l \tanh(W' E' + b') + b_l \qquad \text{(Prefix 2)}$$
#
# He and colleagues showed what (Prefix 1) really does. It mixes two
# attentions, and the share of the prefix is its softmax mass $\lambda$:
#
# $$\text{head}(x) = (1 - \lambda)\,\text{attn}(q, K, V)
#   + \lambda\,\text{attn}(q, P_k, P_v) \qquad \text{(Prefix 3)}$$
#
# $$\lambda = \frac{\sum_i \exp(q \cdot P_{k,i} / \sqrt d)}
#   {\sum_i \exp(q \cdot P_{k,i} / \sqrt d) + \sum_j \exp(q \cdot K_j /
#   \sqrt d)}$$
#
# ## By hand
#
# One head of width $d = 2$, one query, two keys of text, one of prefix:
#
# $$q = (\sqrt 2, 0), \quad K = \begin{pmatrix} \ln 1 & 0 \\ \ln 3 & 0
#   \end{pmatrix}, \quad V = \begin{pmatrix} 1 & 0 \\ 0 & 1 \end{pmatrix},
#   \quad P_k = (\ln 4, 0), \quad P_v = (2, 0).$$
#
# 1. Scores $q \cdot k / \sqrt 2$: the text has $\ln 1$ and $\ln 3$, the
#    prefix $\ln 4$. Their exponentials are 1, 3 and 4.
# 2. Text alone: weights $\tfrac14, \tfrac34$, so the output is
#    $(0.25, 0.75)$.
# 3. With the prefix the sum is 8 and $\lambda = \tfrac48 = 0.5$.
# 4. (Prefix 3): $0.5 \cdot (0.25, 0.75) + 0.5 \cdot (2, 0) = (1.125, 0.375)$.

# %%
log = torch.log
q = torch.tensor([[[[2**0.5, 0.0]]]])  # (B, H, T, d), all but d of size 1
K = torch.stack([log(torch.tensor([1.0, 3.0])), torch.zeros(2)], 1)[None, None]
V = torch.eye(2)[None, None]
P_k = torch.tensor([[[[4.0, 1.0]]]]).log()
P_v = torch.tensor([[[[2.0, 0.0]]]])

keys, values = prefix_attention.with_prefix((P_k, P_v), K, V)
out = attention_written_out(q, keys, values)
mass = prefix_tuning.prefix_mass(q, K, P_k)
alone = attention_written_out(q, K, V)
for name, row in {"text alone": alone, "with a prefix": out}.items():
    print(f"{name:14}", [round(x, 4) for x in row.flatten().tolist()])
print(f"lambda         {mass.item():.3f}")
gated = (1 - mass) * alone + mass * P_v
kit.holds("(Prefix 1) is (Prefix 3)", torch.allclose(out, gated))

# %% [markdown]
# ## The library's own source
#
# The method is the first function. The wrapper around the attention core
# calls it; nothing else of the model changes, and the cache of keys that
# decoding keeps never holds a prefix.

# %%
kit.code(
    getsource(prefix_attention.with_prefix),
    getsource(prefix_tuning.prefix_mlp),
    getsource(prefix_tuning.prefix_mass),
    getsource(prefix_tuning.PrefixCore),
)

# %% [markdown]
# ## At the start: not nothing
#
# Most methods start as a no-op. A prefix cannot: keys take softmax mass, even
# when they are zero, because $\exp(0) = 1$, and the text moves up by $p$
# places. Three ways to start, and how far the logits move. There is one
# prefix that is known exactly: the keys and values which a real text leaves
# behind. With these, the model is the base that has read that text. We
# compare in float64, where only rounding is left.

# %%
model, tokenizer = kit.base()
double = copy.deepcopy(model).double()
words = tokenizer.encode("The sky was kind .")
story = tokenizer.encode(" Jack found a calm lamp at noon .")
ids = torch.tensor([story])


@torch.no_grad()
def logits_with(package=None, length=5, base=double, **settings):
    """The story's logits behind a flat prefix."""
    kind = package.PrefixTuning if package else PrefixTuning
    torch.manual_seed(0)
    twin = copy.deepcopy(base)
    kind(length, reparameterize=False, **settings).attach(twin)
    return twin(ids)


with torch.no_grad():
    base = double(ids)
    read = double(torch.tensor([words + story]))[:, len(words) :]
moved = {
    "random": logits_with(init="random") - base,
    "zero": logits_with(init="zero") - base,
    "a text's": logits_with(init="text", text=tuple(words)) - base,
}
for name, difference in moved.items():
    print(f"{name:9} logits move by up to {difference.abs().max():.2f}")
gap = (moved["a text's"] + base - read).abs().max()
kit.holds("a text's prefix is reading that text (1e-12)", gap < 1e-12)

# %% [markdown]
# ## How many numbers
#
# Flat: two rows of width $D$ for each layer and virtual token, $2pLD$. With
# the network of (Prefix 2), of width $m$, many more while training, and as
# few as flat once it is thrown away.

# %%
config = model.config
p, m, L, D = 16, 256, config.n_layer, config.d_model
flat = PrefixTuning(p, reparameterize=False)
deep = PrefixTuning(p, bottleneck=m)
rows = []
for name, technique, formula in (
    ("flat", flat, 2 * p * L * D),
    ("network", deep, p * D + (D * m + m) + 2 * L * D * (m + 1)),
):
    twin = technique.attach(copy.deepcopy(model))
    rows.append([name, f"{formula:,}", f"{report(twin).trained:,}"])
    if name == "network":
        with torch.no_grad():
            before = twin(ids)
            flatten(twin)
            same = torch.equal(before, twin(ids))
        measured = report(twin).trained
        rows.append(
            ["network, flattened", f"{2 * p * L * D:,}", f"{measured:,}"]
        )
kit.table(["prefix", "formula", "measured"], rows)
kit.holds("flattening changes no logit", same)

# %% [markdown]
# ## Training against the floor
#
# *Dialect*, as in the chapter on LoRA: stories told with other habits. The
# floor is the loss of a model that knows the dialect perfectly. Same steps
# for both, each at its own learning rate: 0.06 for flat rows, which must
# travel far, 0.002 for the weights of a network.

# %%
curves, adapted = {}, {}
for name, technique in {"flat prefix": flat, "prefix, network": deep}.items():
    torch.manual_seed(0)
    adapted[name] = technique.attach(kit.base()[0])
    curves[name] = kit.learn(
        adapted[name], tokenizer, "dialect", 160, points=4
    )
best = kit.optimum("dialect")
for name, points in curves.items():
    print(f"{name:16} {points[-1][1]:.2f} nats, floor {best['floor']:.2f}")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Learning a dialect with a prefix",
    "nats a document",
)

# %% [markdown]
# *In words:* both curves start near the line of the perfect model that was not
# adapted and fall most of the way towards the floor, without reaching it; the
# prefix that is computed by a network is ahead.
#
# ## The picture: who looks at the prefix?
#
# (Prefix 3) says that $\lambda$ is all that matters about *how much*. So let
# us look at the attention of every layer, mean over its heads, with the
# prefix set apart by a line. A row is a word that looks, a column a key that
# is looked at.

# %%
trained = adapted["prefix, network"].eval()
tokens = tokenizer.encode("At noon Jack borrowed a calm violin .")
seen = []


def note(module, args):
    """Remember a core's attention, (T, p + T), mean over the heads."""
    q, k = args[:2]
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    hidden = ~causal_mask(*scores.shape[-2:])
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    seen.append(weights[0].mean(0).detach())


cores = [
    wrap.base_module(wrap.resolve(trained, f"blocks.{n}.attn.core"))
    for n in range(L)
]
hooks = [core.register_forward_pre_hook(note) for core in cores]
with torch.no_grad():
    trained(torch.tensor([[tokenizer.eot, *tokens]]))
for hook in hooks:
    hook.remove()
masses = [w[:, :p].sum(1).mean().item() for w in seen]

# %%
labels = ["(start)"] + [tokenizer.decode([t]).strip() for t in tokens]
figure, axes = kit.canvas(11.0, 3.3, columns=L)
for n, (axis, weights) in enumerate(zip(axes, seen)):
    axis.imshow(weights, cmap="Greys", vmin=0, vmax=1, aspect="auto")
    axis.axvline(p - 0.5, color=kit.COLOURS[1], linewidth=1.6)
    axis.set_title(f"layer {n}: {masses[n]:.0%} on it", fontsize=10)
    axis.set_xticks([p / 2, p + len(labels) / 2], ["prefix", "text"])
    axis.set_yticks(range(len(labels)), labels if n == 0 else [])
    axis.tick_params(length=0)
    axis.grid(False)
told = ", ".join(f"layer {n} {mass:.0%}" for n, mass in enumerate(masses))
kit.show(figure, f"Attention of each layer; on the prefix: {told}.")

# %% [markdown]
# *In words:* four maps of attention, dark where a word looks; left of the
# line are the columns of the prefix, right of it the triangle of the text.
# The share that falls on the prefix stands above each map and differs from
# layer to layer.
#
# What a layer gives the prefix it takes from the text: the weights of a row
# always sum to one. Nothing was retrained, and yet the text is heard less.

# %% [markdown]
# ## What goes wrong
#
# In front or behind: does the order of keys matter, if attention does not
# care for order? The mask cares. We test causality: change the last word,
# and no logit before it may move.


# %%
@torch.no_grad()
def causality(package):
    """Whether a changed last word leaves all earlier logits alone."""
    model, _ = kit.base()
    package.PrefixTuning(5, reparameterize=False).attach(model)
    other = ids.clone()
    other[0, -1] = words[0]
    moved = (model(ids) - model(other))[:, :-1].abs().max()
    kit.holds("no logit knows a later word", moved == 0)
    print(f"earlier logits moved by up to {moved:.2g}")


causality(minipeft)
print()
with kit.planted("prefix_tuning", "prefix behind the text") as bug:
    causality(bug)

# %% [markdown]
# The causal mask is aligned at the lower right: query $t$ sees $p$ keys more
# than its own place, which are meant to be the prefix. With the prefix
# behind, these $p$ keys are the *next words of the text*. The model reads the
# answer while it is asked, and the prefix is seen by the last words only.
# Training does not complain; on the contrary, the loss may look splendid. A
# loss below the floor is never a success: it is a leak.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **07.1** Causal attention of one head behind a prefix, for a text of $T$
# words: (Prefix 1), without any function of the library.


# %%
def answer(q, K, V, P_k, P_v):
    """q, K, V (T, d), P_k, P_v (p, d) -> (T, d)."""
    return None  # your code


kit.check("07.1", answer)

# %% [markdown]
# **07.2** The share $\lambda$ of (Prefix 3) for queries that see all keys.


# %%
def answer(q, K, P_k):
    """q (T, d), K (S, d), P_k (p, d) -> (T,)."""
    return None  # your code


kit.check("07.2", answer)

# %% [markdown]
# **07.3** With the network, how many numbers are trained, and how many are
# left in the file after flattening? Mind the biases.


# %%
def answer(p, L, D, m):
    """(trained, kept), two integers."""
    return None  # your code


kit.check("07.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=deep.count(config))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/soft_prompt/prefix_tuning.py`; the paper's ablations
#   (prefixes of the embedding only, infixes, lengths):
#   `minipeft/soft_prompt/prefix_ablations.py`.
# - The papers: Li and Liang 2021, *Prefix-Tuning*, arXiv 2101.00190;
#   (Prefix 3) is from He et al. 2021, arXiv 2110.04366, chapter 12's paper.
# - Next: chapter 08 moves learned words into the middle of the text, and
#   gives prefixes a classifier (P-tuning v2).
