# %% [markdown]
# # 15. NF4: a weight in four bits
#
# A trained weight is stored as a 32-bit number, but it never needed all those
# bits. **How can sixteen values do for every weight of a model, so that it
# hardly notices?** QLoRA's authors answered in three parts: put the sixteen
# levels where trained weights are, give every 64 weights a scale of their own,
# and then store the scales in few bits as well.
#
# Afterwards you can quantise a tensor with pencil and paper, say what a block
# size costs in bits and buys in error, and explain why the table of levels is
# lopsided. About 20 minutes. The file is `minipeft/quantized/nf4.py`, the
# paper Dettmers et al., 2023
# ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)).

# %%
import copy
from inspect import getsource

import torch
from minipeft import town, wrap
from minipeft.dataset import Example
from minipeft.evaluation import nats
from minipeft.quantized import codebooks, nf4
from minipeft.quantized.nf4_linear import quantized_linear
from minipeft.quantized.qlora import projections, quantize_model

import kit
from kit import COLOURS

model, tokenizer = kit.base()
BLUE, RED = COLOURS[:2]

# %% [markdown]
# ## The equations
#
# Lay the weights $w$ of a tensor out in one row and cut it in blocks of 64.
#
# $$c_b = \max_{i \in b} |w_i| \qquad \text{(NF4 2)}$$
#
# $$k_i = \#\{j : m_j < w_i / c_b\}, \quad m_j = (q_j + q_{j+1})/2
# \qquad \text{(NF4 3)}$$
#
# $$\text{byte} = 16\, k_{2i} + k_{2i+1} \qquad \text{(NF4 4)}$$
#
# $$w'_i = q[k_i]\, c_b \qquad \text{(NF4 5)}$$
#
# $c_b$ is the *constant* of block $b$, and $q$ the table of sixteen levels
# from $-1$ to $1$ (NF4 1). The code $k_i$ counts the midpoints below the
# scaled weight, which gives the number of the nearest level. Two codes make a
# byte. The way back is a look-up and a product.

# %% [markdown]
# ## Four weights by hand
#
# One block of four. First the constant, then the weights divided by it, then
# the nearest level of each, then two codes a byte.

# %%
weights = [0.5, -2.0, 0.1, 1.2]
levels = nf4.NF4_CODEBOOK.tolist()

c = max(abs(w) for w in weights)
codes, rows = [], []
for w in weights:
    k = min(range(16), key=lambda k: abs(levels[k] - w / c))
    codes.append(k)
    back = levels[k] * c
    numbers = (w, w / c, levels[k], back, back - w)
    w, ratio, level, back, error = (f"{x:.3f}" for x in numbers)
    rows.append([w, ratio, k, level, back, error])
packed = [16 * codes[0] + codes[1], 16 * codes[2] + codes[3]]

print("constant", c, "  bytes", packed)
kit.table(["w", "w / c", "code", "level", "w'", "error"], rows)

# %% [markdown]
# The library's `show_work` is a twin of `quantize_nf4` that returns every
# intermediate by its name. It must agree with the pencil.

# %%
work = nf4.show_work(torch.tensor(weights), block_size=4)
print("constant", work.absmax.tolist())
print("codes   ", work.codes[0].tolist(), " by hand", codes)
stored = work.quantized.packed.flatten().tolist()
print("bytes   ", stored, " by hand", packed)
kit.holds("the same codes", work.codes[0].tolist() == codes)
kit.holds("the same bytes", stored == packed)

# %% [markdown]
# ## The library's own source
#
# Where the levels come from, there, and back again:

# %%
kit.code(
    getsource(codebooks.normal_quantiles),
    getsource(codebooks.nf4_codebook),
    getsource(nf4.quantize_blocks),
    getsource(nf4.nearest),
    getsource(nf4.pack),
    getsource(nf4.dequantize_blocks),
)

# %% [markdown]
# The levels are quantiles of the normal distribution, so that each of them is
# the nearest one for about equally many normally spread weights. Zero must be
# among them, exactly: padding and pruned weights have to stay zero. Zero takes
# one code of the sixteen, and fifteen do not divide between two sides. The
# positive side gets the spare one.

# %% [markdown]
# ## The picture: levels where the weights are
#
# Every projection of the shipped base, each weight over the constant of its
# block. Lines are the levels of NF4; diamonds below are the equally spaced
# levels of a plain four-bit integer.


# %%
def matrices(of):
    """Every projection's (path, weight)."""
    return [(p, wrap.resolve(of, p).weight.detach()) for p in projections(of)]


scaled = [nf4.show_work(w).scaled.flatten() for _, w in matrices(model)]
scaled = torch.cat(scaled)
figure, axis = kit.canvas(7.5, 3.8)
axis.hist(
    scaled.numpy(),
    bins=100,
    range=(-0.98, 0.98),
    color="#c4c4c4",
    density=True,
)
top = 1.08 * axis.get_ylim()[1]
axis.vlines(nf4.NF4_CODEBOOK, 0, top, color=BLUE, linewidth=1.1)
axis.plot(nf4.INT4_CODEBOOK, [-0.06 * top] * 15, "D", color=RED, markersize=4)
axis.text(1.03, 0.93 * top, "NF4", color=BLUE)
axis.text(1.06, -0.09 * top, "Int4", color=RED)
axis.set(xlabel="weight over its block's constant", ylabel="density")
axis.set(ylim=(-0.12 * top, top))
axis.set_title("Levels where the weights are", loc="left", fontsize=11)
middle = (scaled.abs() < 0.5).float().mean().item()
near = (nf4.NF4_CODEBOOK.abs() < 0.5).sum().item()
alt = (
    f"{100 * middle:.0f} % of {len(scaled):,} scaled weights lie between -0.5 "
    f"and 0.5, in a bell; so do {near} of NF4's 16 levels, and 7 of Int4's 15."
)
kit.show(figure, alt)

# %% [markdown]
# *In words:* a grey bell of scaled weights; NF4's levels, blue lines, stand
# close together in its middle and far apart at its ends, while Int4's, red
# diamonds, are evenly spaced and waste half of themselves on the ends.

# %% [markdown]
# ## Against the floor
#
# Nothing is trained in this chapter, so there is no learning curve. But the
# question is the same as in every chapter: how far from the best possible loss
# is the model now? The error is the root mean square of $w' - w$ over that of
# $w$, over all projections; the loss is in nats a document of the
# pre-training mix, whose floor is known exactly.

# %%
texts = kit.some(town.held_out())
documents = [Example(completion=text) for text in texts]
floor = -sum(town.log_prob(town.mix(), t) for t in texts) / len(texts)
rows = [["float32", "32.00", "0", f"{nats(model, documents, tokenizer):.3f}"]]
for kind in ("nf4", "fp4", "int4"):
    smaller, lost, all_of_it = copy.deepcopy(model), 0.0, 0.0
    for path, weight in matrices(model):
        quantized = nf4.quantize(weight, kind)
        restored = nf4.dequantize_nf4(quantized)
        lost += (restored - weight).double().square().sum().item()
        all_of_it += weight.double().square().sum().item()
        wrap.resolve(smaller, path).weight.data.copy_(restored)
    bits, error = quantized.bits_per_parameter, (lost / all_of_it) ** 0.5
    loss = nats(smaller, documents, tokenizer)
    rows.append([kind, f"{bits:.2f}", f"{error:.4f}", f"{loss:.3f}"])
kit.table(["levels", "bits", "error of w", "nats a document"], rows)
print(f"floor: {floor:.3f}")

# %% [markdown]
# At equal bits NF4 has the smallest error of the three: its levels are where
# the weights are. The loss moves by hundredths of a nat whichever table one
# takes, up or down. A loss on a few hundred documents is too blunt to rank
# four-bit formats; look at the error of the weights, or of the outputs
# (chapter 17), before believing such a ranking.

# %% [markdown]
# ## The scales cost bits too
#
# A float32 constant for 64 weights is half a bit a weight. Smaller blocks fit
# better and cost more. *Double quantisation* makes constants cheap: centre
# them, take them in groups of 256, and store each in eight bits.
#
# $$c'_b = D[t_b]\, C_g + \mathrm{mean}(c) \qquad \text{(NF4 6)}$$
#
# $$\text{bits} = 4 + \frac{32}{64}, \qquad \text{double-quantised: }
# 4 + \frac{8}{64} + \frac{32}{64 \cdot 256} \qquad \text{(NF4 7)}$$
#
# $D$ is a table of 256 levels, $C_g$ the largest centred constant of group
# $g$. The formula, and what is really stored, for a million normal numbers:

# %%
normal = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
rows = []
for block in (16, 32, 64, 128, 256):
    for double in (False, True):
        constants = 8 / block + 32 / (256 * block) if double else 32 / block
        quantized = nf4.quantize_nf4(normal, block, double)
        lost = nf4.dequantize_nf4(quantized) - normal
        error = (lost.norm() / normal.norm()).item()
        stored = quantized.bits_per_parameter
        kind = "double" if double else "single"
        rows.append([block, kind, 4 + constants, stored, f"{error:.4f}"])
kit.table(["block", "constants", "bits, formula", "stored", "error"], rows)

# %% [markdown]
# At 64 weights a block, double quantisation takes the constants from half a
# bit to about an eighth of a bit and leaves the error where it was. Spend the
# saving on smaller blocks: 32 with double quantisation needs fewer bits than
# 64 without, and fits better.

# %% [markdown]
# ## Not a no-op, and no parameters
#
# A technique in this course starts as a no-op. Quantisation cannot: it rounds.
# Two other things hold instead, bit for bit. Quantising what was dequantised
# changes nothing. And a layer that stores NF4 computes what a plain layer with
# the dequantised weight computes, forward and backward.

# %%
first = nf4.quantize_nf4(normal)
again = nf4.quantize_nf4(nf4.dequantize_nf4(first))
kit.holds("quantising twice: the same codes", first.packed.equal(again.packed))
kit.holds("and the same constants", first.absmax.equal(again.absmax))

x = torch.randn(5, 128)
layer = quantized_linear(wrap.resolve(model, "blocks.0.attn.q"), 64, True)
found = []
for linear in (layer, layer.to_linear()):
    leaf = x.clone().requires_grad_()
    y = linear(leaf)
    y.square().sum().backward()
    found.append((y, leaf.grad))
(y, dx), (y_plain, dx_plain) = found
kit.holds("NF4 layer = plain layer, forward", torch.equal(y, y_plain))
kit.holds("NF4 layer = plain layer, backward", torch.equal(dx, dx_plain))

# %% [markdown]
# Nothing is trained, so the count that matters is bytes. The projections of a
# block hold $4 D^2 + 2 D\, d_\text{ff}$ weights; (NF4 7) says what they cost.

# %%
small = quantize_model(copy.deepcopy(model))
D, F, L = model.config.d_model, model.config.ff_width, model.config.n_layer
count = L * (4 * D * D + 2 * D * F)
layers = [wrap.resolve(small, path).quantized for path in projections(small)]
assert count == sum(q.numel for q in layers)
formula = count * (4 + 8 / 64 + 32 / (64 * 256)) / 8
print(f"weights in projections    {count:9,}")
print(f"bytes as float32          {4 * count:9,}")
print(
    f"bytes as NF4, formula     {formula:9,.0f}  (and 4 a matrix for the mean)"
)
print(f"bytes as NF4, stored      {sum(q.nbytes for q in layers):9,}")
print(f"trained parameters        {0:9,}")

# %% [markdown]
# ## What goes wrong: the signed maximum
#
# Forget the absolute value in (NF4 2), and a block whose largest weight is
# negative is scaled beyond $-1$, where there are no levels. Most blocks look
# fine. The invariant that fails is the bound: no weight may be off by more
# than half the widest gap between levels, times the block's constant.


# %%
def furthest(module):
    """The largest |w' - w| over max |w| of its block, on normal weights."""
    w = torch.randn(400, 64, generator=torch.Generator().manual_seed(1))
    restored = module.dequantize_nf4(module.quantize_nf4(w))
    return ((restored - w).abs().amax(1) / w.abs().amax(1)).max().item()


bound = nf4.NF4_CODEBOOK.diff().max().item() / 2
print(f"bound {bound:.4f}, without a bug: {furthest(nf4):.4f}\n")
with kit.planted("nf4", "signed maximum"):
    from minipeft.quantized import nf4 as with_bug

    worst = furthest(with_bug)
print(f"with the bug: {worst:.4f}")
kit.holds(
    "(NF4 2): the error is at most 0.152 of the constant", worst <= bound
)

# %% [markdown]
# ## Exercises
#
# **15.1** Pack codes by (NF4 4): a list of codes (an even number of them) to a
# list of bytes.


# %%
def answer(codes):
    """[k0, k1, k2, k3, ...] -> [byte, byte, ...]"""
    return None  # your code


kit.check("15.1", answer)

# %% [markdown]
# **15.2** Bits a weight for any block size and any number of constants in a
# group; `group=None` means single quantisation. (NF4 7)


# %%
def answer(block, group=None):
    """block: weights a constant; group: constants a second-level constant."""
    return None  # your code


kit.check("15.2", answer)

# %% [markdown]
# **15.3** Turn codes and constants back into weights (NF4 5) with one look-up
# and one product, without a loop over weights. `codes` is (blocks, size),
# `constants` is (blocks,), `levels` is (16,); all are tensors.


# %%
def answer(codes, constants, levels):
    """w' of (NF4 5), (blocks, size)."""
    return None  # your code


kit.check("15.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=0)

# %% [markdown]
# **Where to go next.** Chapter 16 trains LoRA on a base stored like this.
# Chapter 17 uses the inputs, and training, to get below four bits. The file is
# `minipeft/quantized/nf4.py`, its tests `tests/test_nf4.py`, and
# `tests/parity/test_nf4_bitsandbytes.py` holds it byte for byte against
# bitsandbytes. The dynamic table of constants is from Dettmers et al., 2021
# ([arXiv 2110.02861](https://arxiv.org/abs/2110.02861)).
