# %% [markdown]
# # 13. Mode approximation: low rank in three directions
#
# **The question.** LoRA gives every matrix thin factors of its own. But the
# changes of all layers lie on one pile, and a pile of matrices is a tensor
# with a third direction. Can all layers *share* their factors, and each only
# choose how much of every one it takes?
#
# After this chapter you can find the best matrix of a rank, unfold a tensor,
# write it as a sum of outer products, adapt a whole model with two shared
# matrices and a few numbers a layer, and say which zero start is one zero too
# many. Reading and running: about 25 minutes.

# %%
import copy
import itertools
from inspect import getsource

import minipeft
import torch
from minipeft import LoRA, ModeApproximation, figures, report
from minipeft.low_rank import mode_approximation as mode
from minipeft.wrap import resolve

import kit

# %% [markdown]
# ## The equations
#
# A matrix is a sum of $R$ outer products, best found by its singular values:
#
# $$W = \textstyle\sum_r s_r\, u_r v_r^\top \qquad \text{(Mode 4)}$$
#
# A pile of $K$ matrices is a tensor $T_{oik} = \Delta W_k[o, i]$. The same
# idea with a third vector for "which matrix" is called CP; $\circ$ is the
# outer product:
#
# $$T = \textstyle\sum_r \lambda_r\, v_r \circ u_r \circ p_r
#   \qquad \text{(Mode 3)}$$
#
# Read slice by slice, every matrix has the same $U$ and $V$ and a mixture
# $p_k$ of its own. That is the method, Aurora:
#
# $$\Delta W_k = V\, \mathrm{diag}(\lambda \odot p_k)\, U^\top
#   \qquad \text{(Mode 1)}$$
# $$h = W_k x + b_k + V (\lambda \odot p_k \odot (U^\top x))
#   \qquad \text{(Mode 2)}$$
#
# How does one find a CP? Fix two factors and solve for the third, which is
# least squares, and go round. *Unfolding* lays a tensor out as a matrix:
#
# $$a_r = \text{unfold}(T, 0)\, (b \otimes c)\,
#   ((b^\top b) \odot (c^\top c))^{+} \qquad \text{(Mode 5)}$$

# %% [markdown]
# ## By hand
#
# **A matrix of rank 1**: $\begin{pmatrix} 2 & 4 \\ 1 & 2 \end{pmatrix} =
# \begin{pmatrix} 2 \\ 1 \end{pmatrix} \begin{pmatrix} 1 & 2 \end{pmatrix}$.
# Its only singular value is the product of the two lengths,
# $\sqrt 5 \cdot \sqrt 5 = 5$.
#
# **A pile of two matrices**, both made of the same two outer products
# $A = (1, 0) \circ (1, 1)$ and $B = (0, 1) \circ (1, -1)$, in mixtures
# $(1, 2)$ and $(3, 0)$:
#
# $$1 A + 2 B = \begin{pmatrix} 1 & 1 \\ 2 & -2 \end{pmatrix}, \qquad
#   3 A + 0 B = \begin{pmatrix} 3 & 3 \\ 0 & 0 \end{pmatrix}.$$
#
# Unfolded along the third direction, each matrix becomes a row:
# $(1, 1, 2, -2)$ and $(3, 3, 0, 0)$.

# %%
s = mode.truncated_svd(torch.tensor([[2.0, 4.0], [1.0, 2.0]]), 2)[1]
print("singular values:", [round(v, 4) for v in s.abs().tolist()])

V = torch.eye(2)  # the columns (1, 0) and (0, 1)
U = torch.tensor([[1.0, 1.0], [1.0, -1.0]])  # the columns (1, 1), (1, -1)
mixtures = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # one row a matrix
T = mode.cp_tensor(torch.ones(2), (V, U, mixtures))
print("matrix 0:", T[:, :, 0].tolist())
print("matrix 1:", T[:, :, 1].tolist())
print("unfolded:", mode.unfold(T, 2).tolist())

# %% [markdown]
# ## The library's own source
#
# Three functions for the mathematics, and the wrapper that makes LoRA's $A$
# and $B$ out of the shared factors.

# %%
kit.code(
    getsource(mode.unfold),
    getsource(mode.khatri_rao),
    getsource(mode.cp),
    getsource(mode.ModeLinear.pair),
    getsource(mode.Factors),
)

# %% [markdown]
# ## A tensor that is not known: how many directions?
#
# Alternating least squares on a tensor that was made from three outer
# products: with three it is found exactly, with fewer it cannot be, and the
# error never grows from step to step. A matrix of that many numbers would
# hide its parts (rotate the factors, and the product is the same); a CP is
# unique, which is why its directions may be read.

# %%
torch.manual_seed(0)
sizes = (6, 5, 7)
made = mode.cp_tensor(
    torch.ones(3).double(), [torch.randn(n, 3).double() for n in sizes]
)
for rank in (1, 2, 3):
    weights, factors = mode.cp(made, rank)
    left = (made - mode.cp_tensor(weights, factors)).norm() / made.norm()
    numbers = rank * (sum(sizes) + 1)
    print(f"rank {rank}: {numbers:3} numbers for 210, error {left:.1%}")

# %% [markdown]
# ## At the start: nothing, but not dead
#
# $V$ begins at zero, so every $\Delta W_k$ is zero and the model is the base,
# in every bit. $U$, $\lambda$ and $p$ do not: the gradient of $V$ is made of
# them. After one step $V$ is away from zero, and all learn.

# %%
model, tokenizer = kit.base()
config = model.config
text = "Jack was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
before = model(ids)
technique = ModeApproximation(rank=32, targets=("q", "k", "v"))


def gradients(model):
    """The largest gradient of each shared factor and of one mixture."""
    model.loss(ids[:, :-1], ids[:, 1:]).backward()
    first = resolve(model, "blocks.0.attn.q")
    tensors = {**dict(first.factors.named_parameters()), "p": first.p}
    found = {n: t.grad.abs().max().item() for n, t in tensors.items()}
    return ", ".join(f"{n} {size:.1e}" for n, size in found.items())


torch.manual_seed(0)
start = technique.attach(copy.deepcopy(model))
kit.holds("the model is the base, bitwise", start(ids).equal(before))
print("gradients:", gradients(start))

# %% [markdown]
# ## How many numbers
#
# $U$ and $V$ once for the model, $\lambda$, and $R$ numbers for each of the
# $K$ matrices: $R\,(\text{in} + \text{out} + 1 + K)$. LoRA pays
# $r\,(\text{in} + \text{out})$ for every one of them.

# %%
D, K, R = config.d_model, config.n_layer * 3, technique.rank
lora = LoRA(rank=8, alpha=16, targets=("q", "k", "v"))
print(f"R (in + out + 1 + K)  {R} x ({D} + {D} + 1 + {K})", end=" = ")
print(f"{R * (2 * D + 1 + K):,}")
print(f"measured              {report(start).trained:,}")
print(f"LoRA of rank 8        {lora.count(config):,} on the same matrices")

# %% [markdown]
# ## Training against the floor
#
# *Dialect* again. Three times fewer numbers than LoRA of rank 8 on the same
# twelve matrices; the floor is the loss of a model that knows the dialect.

# %%
curves, adapted = {}, {}
for name, method in {
    "LoRA, rank 8": lora,
    "shared, R = 32": technique,
}.items():
    torch.manual_seed(0)
    adapted[name] = method.attach(kit.base()[0])
    curves[name] = kit.learn(
        adapted[name], tokenizer, "dialect", 160, points=4
    )
best = kit.optimum("dialect")
start_at = curves[name][0][1]
for name, points in curves.items():
    closed = (start_at - points[-1][1]) / (start_at - best["floor"])
    print(f"{name:15} {points[-1][1]:.2f} nats, {closed:.0%} of the way")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "Learning a dialect with shared directions",
    "nats a document",
)

# %% [markdown]
# *In words:* both curves fall from the line of the perfect model that was not
# adapted most of the way to the floor and end close together, although one of
# them has a third of the numbers.
#
# ## The picture: who takes what
#
# The whole change of twelve matrices is written in this table: row $k$ holds
# $\lambda \odot p_k$, times the lengths of the directions so that sizes can
# be compared. Directions are sorted by how much they are used in all.

# %%
tuned = adapted["shared, R = 32"]
names = [f"{n} {t}" for n in range(config.n_layer) for t in "qkv"]
shared = resolve(tuned, "blocks.0.attn.q").shared[0]
length = (shared.scale * shared.U.norm(dim=0) * shared.V.norm(dim=0)).detach()
use = torch.stack(
    [
        resolve(tuned, f"blocks.{n}.attn.{t}").p.detach() * length
        for n in range(config.n_layer)
        for t in "qkv"
    ]
)
use = use[:, use.norm(dim=0).argsort(descending=True)]
kinds = {t: use[i::3].square().sum().item() for i, t in enumerate("qkv")}
total = use.square().sum().item()

figure, axis = kit.canvas(8.6, 4.0)
limit = use.abs().flatten().quantile(0.97).item()
shown = axis.imshow(use, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
axis.set_yticks(range(K), names, fontsize=8)
axis.set(xlabel="shared direction, sorted by use", ylabel="layer, matrix")
axis.grid(False)
for k, r in itertools.product(range(K), range(R)):
    if use[k, r] < -limit / 3:  # readable in grey, too
        dark = use[k, r] < -limit * 2 / 3
        axis.plot(r, k, "_", color="white" if dark else "black", markersize=5)
figure.colorbar(
    shown, ax=axis, label="how much of it", extend="both", pad=0.02
)
axis.set_title("Each matrix chooses its own mixture", loc="left", fontsize=11)
told = ", ".join(f"{t} {size / total:.0%}" for t, size in kinds.items())
kit.show(figure, f"Mixtures of 12 matrices; share of the squares: {told}.")

# %% [markdown]
# *In words:* a table of twelve rows, one a matrix, by thirty-two shared
# directions; strong entries are dark, and a dash marks the negative ones. The
# left columns are used by many matrices, with different signs; most of what
# there is stands in the rows of the value matrices, above all the last one.
#
# ## Merged, and LoRA as a special case
#
# Each change is an ordinary matrix, so it can be merged. And for a *single*
# matrix the method is LoRA of rank $R$, with $A = U^\top$ and
# $B = V \mathrm{diag}(\lambda \odot p)$. Both in float64:

# %%
exact = copy.deepcopy(tuned).double().eval()
with torch.no_grad():
    beside = exact(ids)
    with minipeft.merged(exact):
        inside = exact(ids)
    kit.holds(
        "merged is unmerged (1e-12)", (beside - inside).abs().max() < 1e-12
    )

    layer = resolve(exact, "blocks.2.attn.v")
    factors = layer.shared[0]
    A, B = factors.U.T, factors.V * (factors.scale * layer.p)
    same = torch.allclose(B @ A, layer.delta(), rtol=0, atol=1e-12)
    kit.holds("one matrix of it is LoRA (1e-12)", same)
print("rank of that change:", int(torch.linalg.matrix_rank(layer.delta())))

# %% [markdown]
# ## What goes wrong
#
# One zero is the right number of zeros. If $U$ begins at zero too, nothing
# breaks: the model is the base, training runs, no error appears.

# %%
with kit.planted("mode_approximation", "both factors at zero") as bug:
    dead = kit.base()[0]
    bug.ModeApproximation(rank=32).attach(dead)
    kit.holds("the model is the base, bitwise", dead(ids).equal(before))
    print("gradients:", gradients(dead))
    alive = resolve(dead, "blocks.0.attn.q").factors.V.grad.abs().max() > 0
    kit.holds("some factor has a gradient", alive)

# %% [markdown]
# The gradient of $V$ is a product with $U$, that of $U$ a product with $V$.
# Both zero, and the point is a saddle that no step leaves: the loss is the
# base's for ever. "A no-op at the start" is a good test, and this bug passes
# it; the test that it fails is "everything learns within two steps".
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **13.1** The change of matrix $k$ from the shared factors, (Mode 1).


# %%
def answer(U, V, scale, P, k):
    """U (in, R), V (out, R), scale (R,), P (K, R) -> (out, in)."""
    return None  # your code


kit.check("13.1", answer)

# %% [markdown]
# **13.2** The squared error of the *best* matrix of rank R, without building
# that matrix.


# %%
def answer(W, rank):
    """A scalar tensor."""
    return None  # your code


kit.check("13.2", answer)

# %% [markdown]
# **13.3** One step of (Mode 5): the best first factor $a$ for a tensor
# $T \approx \sum_r a_r \circ b_r \circ c_r$, if $b$ and $c$ are given.


# %%
def answer(T, b, c):
    """T (I, J, K), b (J, R), c (K, R) -> a (I, R)."""
    return None  # your code


kit.check("13.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=technique.count(config))

# %% [markdown]
# ## Where to go next
#
# - The file: `minipeft/low_rank/mode_approximation.py`, with Tucker's form of
#   a tensor as well.
# - The papers: Wang et al. 2023, *Parameter-efficient Tuning of Large-scale
#   Multimodal Foundation Model* (Aurora), arXiv 2305.08381; Kolda and Bader
#   2009, *Tensor Decompositions and Applications*, for CP and Tucker.
# - Next: chapter 14 changes few numbers instead of few directions.
