# %% [markdown]
# # 09. LoRA: a change of low rank
#
# **The question.** Full fine-tuning moves every weight of a matrix. Does the
# *change* of that matrix really need as many numbers as the matrix itself?
# In 2021 Hu and colleagues bet that it does not: they froze the matrix and
# learned its change as a product of two thin ones. Was the bet good?
#
# After this chapter you can write LoRA from memory, say how many numbers it
# trains and why it starts as a no-op, read off a spectrum whether the bet
# holds on your own data, and tell three classic bugs from one another by
# what they break. Reading and running: about 25 minutes.

# %%
from inspect import getsource

import minipeft
import torch
from minipeft import FullFineTuning, LoRA, figures
from minipeft.low_rank import lora
from minipeft.wrap import resolve

import kit

# %% [markdown]
# ## The equations
#
# A projection computes $Wx + b$. LoRA puts a branch beside it:
#
# $$h = Wx + b + s\,BAx \qquad \text{(LoRA 1)}$$
# $$s = \alpha / r \qquad \text{(LoRA 2)}$$
# $$W' = W + s\,BA \qquad \text{(LoRA 3)}$$
#
# with $A \in \mathbb{R}^{r \times \text{in}}$,
# $B \in \mathbb{R}^{\text{out} \times r}$ and a small rank $r$. $W$ and $b$
# stay as they are; $A$ and $B$ learn. Because the branch is linear, (LoRA 3)
# can fold it into the weight when training is over: it then costs nothing.
#
# The gradients, with $g$ the gradient that arrives at $h$:
#
# $$\mathrm{d}B = s\,g\,(Ax)^\top, \qquad
#   \mathrm{d}A = s\,B^\top g\,x^\top \qquad \text{(LoRA 4)}$$
#
# ## By hand
#
# Take $W = I$, $b = 0$, rank 1, $\alpha = \tfrac12$, and
#
# $$x = \begin{pmatrix} 1 \\ 2 \end{pmatrix}, \quad
#   A = \begin{pmatrix} 1 & 1 \end{pmatrix}, \quad
#   B = \begin{pmatrix} 2 \\ -1 \end{pmatrix}.$$
#
# 1. $A$ reads two numbers and keeps one: $Ax = 1 + 2 = 3$.
# 2. $B$ writes that one number into both outputs: $BAx = (6, -3)$.
# 3. The scale is $s = \tfrac12 / 1$, so the branch adds $(3, -1.5)$.
# 4. $h = (1, 2) + (3, -1.5) = (4, 0.5)$.
#
# Merged: $W' = I + \tfrac12 \begin{pmatrix} 2 & 2 \\ -1 & -1 \end{pmatrix}
# = \begin{pmatrix} 2 & 1 \\ -0.5 & 0.5 \end{pmatrix}$, and
# $W'x = (4, 0.5)$ again. Now the library's own functions on these numbers:

# %%
x = torch.tensor([1.0, 2.0])
W, A, B = torch.eye(2), torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0], [-1]])
s = lora.lora_scale(alpha=0.5, rank=1)

h = lora.lora_forward((W @ x)[None], x[None], A, B, s)[0]
merged = W + lora.lora_delta(A, B, s)
print("beside the weight:", h.tolist())
print("in the weight:    ", (merged @ x).tolist())
print("as by hand:       ", h.equal(torch.tensor([4.0, 0.5])))

# %% [markdown]
# ## The library's own source
#
# Nothing below was copied: it is what the model runs. Three small functions
# are the mathematics, one module puts them beside a projection.

# %%
kit.code(
    getsource(lora.lora_scale),
    getsource(lora.lora_delta),
    getsource(lora.lora_forward),
    getsource(lora.LoRALinear.__init__),
)

# %% [markdown]
# ## At the start: nothing
#
# $B$ begins at zero, so $BA = 0$ and the adapted model *is* the base, in
# every bit. $A$ must not be zero as well. Look at (LoRA 4): with $B = 0$ no
# gradient reaches $A$ in the first step, so all learning begins in $B$, and
# $B$ only gets its gradient because $Ax$ is not zero.

# %%
model, tokenizer = kit.base()
text = "Mira was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
before = model(ids)

technique = LoRA(rank=8, alpha=16, targets=("q", "v"))
technique.attach(model)
print("logits equal the base's in every bit:", torch.equal(model(ids), before))

model.loss(ids[:, :-1], ids[:, 1:]).backward()
query = resolve(model, "blocks.0.attn.q")
print("gradient at A, largest:", query.A.grad.abs().max().item())
print(f"gradient at B, largest: {query.B.grad.abs().max().item():.2e}")
model.zero_grad()

# %% [markdown]
# ## How many numbers
#
# Each adapted projection trains $r\,(\text{in} + \text{out})$ numbers
# instead of $\text{in} \cdot \text{out}$. Here: 4 blocks, 2 targets each,
# $r = 8$ and $\text{in} = \text{out} = 128$.

# %%
config = model.config
formula = config.n_layer * 2 * 8 * (config.d_model + config.d_model)
counted = minipeft.report(model).trained
whole = sum(p.numel() for p in kit.base()[0].parameters())

print(f"L x 2 x r x (in + out) = {formula:,}")
print(f"technique.count(config) = {technique.count(config):,}")
print(f"counted on the model    = {counted:,}")
print(f"share of the base       = {counted / whole:.2%} of {whole:,}")

# %% [markdown]
# ## Training against the floor
#
# The task is *dialect*: the town's stories, told with other habits. Because
# we know the generator, we know two lines that no experiment on real text
# can draw. The **floor** is the loss of a model that knows the dialect
# perfectly. **Perfect, not adapted** is what a flawless model of the old
# stories would pay. All learning happens between the two.
#
# Same base, same 300 steps, same examples; each method at its own learning
# rate.

# %%
N = 300
curves, adapted = {}, {}
for name, method in {"full": FullFineTuning(), "LoRA": technique}.items():
    adapted[name], tokenizer = kit.base()
    method.attach(adapted[name])
    curves[name] = kit.learn(adapted[name], tokenizer, "dialect", N)

best = kit.optimum("dialect")
lines = {"perfect, not adapted": best["unadapted"], "floor": best["floor"]}
start = curves["LoRA"][0][1]
for name, points in curves.items():
    closed = (start - points[-1][1]) / (start - best["floor"])
    print(f"{name:5} {points[-1][1]:.2f} nats, {closed:.1%} of the way")
print(f"from  {start:.2f} (the base) to {best['floor']:.2f} (the floor)")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    lines,
    "Learning a dialect",
    "nats a document",
)

# %% [markdown]
# *In words:* both curves fall steeply from the line of the perfect model
# that was not adapted and flatten just above the floor, full fine-tuning
# a little lower than LoRA.
#
# ## The picture: was the bet good?
#
# Full fine-tuning was free to change each matrix in any direction. How many
# directions did it use? The singular values of its change
# $\Delta W = W_{\text{after}} - W_{\text{before}}$ answer: a matrix of rank
# $r$ has $r$ of them above zero. We take the query and the value projection
# of every block, scale each spectrum to its largest value, and average.


# %%
def spectrum(deltas):
    """Singular values over the largest, averaged over the matrices."""
    values = [torch.linalg.svdvals(delta) for delta in deltas]
    return torch.stack([v / v[0] for v in values]).mean(0)


places = [f"blocks.{n}.attn.{p}" for n in range(config.n_layer) for p in "qv"]
original = kit.base()[0]


def full_delta(place):
    after = resolve(adapted["full"], place).weight
    return (after - resolve(original, place).weight).detach()


spectra = {
    "full fine-tuning": spectrum([full_delta(p) for p in places]),
    "LoRA, rank 8": spectrum(
        [resolve(adapted["LoRA"], p).delta().detach() for p in places]
    ),
    "random numbers": spectrum(
        [torch.randn(config.d_model, config.d_model) for _ in places]
    ),
}
for name, values in spectra.items():
    share = (values[:8] ** 2).sum() / (values**2).sum()
    print(f"{name:17} first 8 of 128 directions hold {share:.0%}")

# %%
figure, axis = kit.canvas(8.0, 4.4)
ends = []
for (name, values), line in zip(spectra.items(), ("-", "--", ":")):
    colour = kit.COLOURS[len(ends)]
    shown = values[:48].clamp(min=1e-3)
    axis.plot(range(1, 49), shown, line, color=colour, linewidth=1.8)
    ends.append((48, shown[-1].item(), name, colour))
axis.axvline(8, color="#555555", linewidth=1)
axis.text(8.6, 0.93, "rank 8", color="#555555", fontsize=9)
axis.set(
    xlabel="direction", ylabel="singular value, largest = 1", xlim=(0, 49)
)
kit.label_lines(axis, ends)
axis.set_title("How many directions a change uses", loc="left", fontsize=11)
half = {n: int((v > 0.5).sum()) for n, v in spectra.items()}
told = "; ".join(f"{n} has {k} directions above half" for n, k in half.items())
kit.show(figure, f"Singular values of the change of W. {told}.")

# %% [markdown]
# *In words:* the spectrum of full fine-tuning drops fast and then trails
# off, far below random numbers of the same shape; LoRA's stops exactly at
# direction 8.
#
# So the change is *approximately* low-rank, not exactly: there is a long
# tail of small values that rank 8 cannot have. The curves above show what
# LoRA gives up by it, and by leaving four of the six matrices of every block
# alone. It is little, for a fiftieth of the numbers.
#
# ## Merging
#
# (LoRA 3) promises that the branch can vanish into the weight. Two orders
# of the same sums round differently, so we compare in float64, where the
# difference must be rounding and nothing else.

# %%
exact = adapted["LoRA"].double().eval()
with torch.no_grad():
    beside = exact(ids)
    with minipeft.merged(exact):
        inside = exact(ids)
    again = exact(ids)
gap = (beside - inside).abs().max().item()
print("merged and unmerged agree to 1e-12:", gap < 1e-12)
print("un-merging restores every bit:", torch.equal(beside, again))

# %% [markdown]
# ## What goes wrong
#
# Three invariants, one line each, as a function of the package. On the
# library as it is, all hold.


# %%
def invariants(package):
    """Check what must be true of any LoRA."""
    model, tokenizer = kit.base()
    base = model(ids)
    package.LoRA(rank=4, alpha=8).attach(model)
    kit.holds("at the start the model is the base", model(ids).equal(base))

    torch.manual_seed(0)
    layer = trained_layer(package, rank=4)
    x = torch.randn(5, 128, dtype=torch.float64)
    plain = layer.inner
    close = torch.allclose(layer.merged(plain)(x), layer(x), atol=1e-12)
    kit.holds("merged and unmerged agree (LoRA 3)", close)

    ratio = layer.scale / trained_layer(package, rank=8).scale
    kit.holds("twice the rank, half the scale (LoRA 2)", ratio == 2)


def trained_layer(package, rank):
    """A layer in float64 that has learned something."""
    model = kit.base()[0].double()
    package.LoRA(rank=rank, alpha=16, targets=("q",)).attach(model)
    layer = package.wrap.resolve(model, "blocks.0.attn.q")
    torch.nn.init.normal_(layer.B)
    return layer


invariants(minipeft)

# %% [markdown]
# Now plant bugs that people really write, one at a time. `kit.planted` gives
# a package in which one line differs; the change is printed first.

# %%
for bug in (
    "alpha, not alpha over rank",
    "merge without the scale",
    "B random",
):
    with kit.planted("lora", bug) as package:
        invariants(package)
    print()

# %% [markdown]
# Each bug trains without complaint, and each breaks a different line. That
# is the value of several small invariants over one big "it works" test: the
# *set* that fails is a fingerprint which names the bug. With $\alpha$ in
# place of $\alpha / r$ a larger rank also means larger steps, and a rank
# sweep then measures the learning rate. A merge without the scale is only
# seen after training, on the machine where the model is served.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **09.1** Write (LoRA 1) and (LoRA 2) yourself, for `x` of shape
# `(..., in)`, without any function of the library.


# %%
def answer(x, W, b, A, B, alpha):
    """h of (LoRA 1), shape (..., out)."""
    return None  # your code


kit.check("09.1", answer)

# %% [markdown]
# **09.2** From some rank on LoRA trains *more* numbers than the matrix has.
# Give the largest rank that still trains fewer, for any shape.


# %%
def answer(d_in, d_out):
    """The largest r with r (in + out) < in x out."""
    return None  # your code


kit.check("09.2", answer)

# %% [markdown]
# **09.3** Somebody hands you the change $\Delta W$ of a full fine-tuning.
# Find the $A$ and $B$ of rank $r$ whose product is closest to it (in the sum
# of squares). The picture above is a hint.


# %%
def answer(delta, rank):
    """(A, B): A (rank, in), B (out, rank), B @ A close to delta."""
    return None  # your code


kit.check("09.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=counted)

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/low_rank/lora.py`. Its tests: `tests/test_lora.py`;
#   its bugs: `tests/mutants/lora.py`.
# - The paper: Hu et al. 2021, *LoRA: Low-Rank Adaptation of Large Language
#   Models*, arXiv 2106.09685. Rank-stabilised scale: Kalajdzievski 2023,
#   arXiv 2312.03732.
# - Next: chapter 10 lets the model decide which matrices deserve how much
#   rank (AdaLoRA); chapter 16 puts LoRA on a base in four bits (QLoRA).
