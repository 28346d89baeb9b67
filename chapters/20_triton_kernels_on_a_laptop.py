# %% [markdown]
# # 20. Triton kernels on a laptop
#
# A GPU multiplies far faster than it reads. Most of the time it waits for
# numbers to arrive, and every operation of PyTorch that is not a large product
# reads all its numbers from memory and writes all its results back. **How much
# of that traffic is needed, and how does one write the function that moves
# just so much?** A kernel in Triton is a Python function that runs once for
# each block of the data. It needs a GPU to be fast. To be *right* it needs
# none: Triton's interpreter runs it here, one program after the other.
#
# Afterwards you can derive an online softmax, say how many bytes an operation
# must move and how many it does, read a kernel of this library, and know why a
# kernel whose results are right may still be wrong. About 30 minutes. It needs
# Triton, on Linux, and `pytest`, whose harness counts bytes here; both come
# with this project's `test` extra.

# %%
import json
import os
import subprocess
import sys
import tempfile
from inspect import getsource

import minipeft
import torch
from minipeft import IA3, dispatch
from tests import interpreter
from tests.kernels.harness import Bounds, Traffic, nbytes
from torch.utils._python_dispatch import TorchDispatchMode

import kit

interpreter.settle()  # before a kernel is imported: interpret, don't compile
os.environ["TRITON_INTERPRET"] = "1"

from minipeft import cross_entropy
from minipeft.additive import ia3
from minipeft.kernels import cross_entropy as rows_kernel
from minipeft.kernels import ia3 as ia3_kernel
from minipeft.kernels import nf4 as nf4_kernel
from minipeft.quantized import nf4
from triton.runtime.errors import InterpreterError

# %% [markdown]
# ## The equations
#
# The loss of one row of logits $z$ with label $y$ needs $\log \sum_v e^{z_v}$.
# Read naively that is three passes: the largest entry (or $e^z$ overflows),
# the sum, the gradient. *Online*, one pass does for the first two. With $m$
# the largest entry so far and $s$ the sum of $e^{z_v - m}$ so far, a block $b$
# of further entries gives
#
# $$m' = \max(m, \max b), \qquad s' = s\, e^{m - m'} + \sum_v e^{b_v - m'}
# \qquad \text{(CERows 1)}$$
#
# $$l = \log s + m - z_y \qquad \text{(CERows 2)}$$
#
# $$g_v = e^{z_v - m} / s - [v = y] \qquad \text{(CERows 3)}$$
#
# The factor $e^{m - m'}$ repairs the sum when a larger entry turns up.
#
# ## By hand
#
# Four logits $z = (0, \ln 2, \ln 4, 0)$ in two blocks of two, label 2.
#
# - First block: $m = \ln 2$, $s = e^{-\ln 2} + 1 = 1.5$.
# - Second: $m' = \ln 4$; the old sum shrinks by $e^{\ln 2 - \ln 4} = 0.5$ to
#   $0.75$; the new entries add $1$ and $e^{-\ln 4} = 0.25$. So $s' = 2$.
# - $l = \ln 2 + \ln 4 - \ln 4 = \ln 2$, and the gradient is
#   $(1, 2, 4, 1)/8$ with one taken off the third: $-0.5$.

# %%
z = torch.tensor([1.0, 2.0, 4.0, 1.0]).log()
m, s = torch.tensor(-torch.inf), torch.tensor(0.0)
for block in z.split(2):
    new = torch.maximum(m, block.max())
    s = s * (m - new).exp() + (block - new).exp().sum()
    m = new
    print(f"m = ln {m.exp():.0f}, s = {s:.2f}")

gradient = z[None].clone()
loss = rows_kernel.rows_loss_and_gradient(gradient, torch.tensor([2]))
print(f"the kernel: loss {loss:.4f} (ln 2 = 0.6931)")
print("gradient, written over z:", gradient[0].tolist())

# %% [markdown]
# ## The library's own source
#
# The kernel, and the twin that defines what it must compute. `tl.load` takes a
# block of addresses and a *mask*: a lane whose mask is false touches nothing.

# %%
kit.code(
    getsource(rows_kernel.cross_entropy_rows_kernel.fn),
    getsource(cross_entropy.rows_loss_and_gradient),
)

# %% [markdown]
# ## Changes nothing: a twin and its definition
#
# A kernel is never the definition. The function in the technique's file is,
# in plain PyTorch; the kernel carries its name in another file, and one seam
# (`minipeft/dispatch.py`) chooses. Adding a kernel is a no-op by contract: the
# same numbers to rounding, the same codes in every bit.


# %%
def furthest(definition, *args):
    """The largest difference of twin and definition, over all results."""
    results = []
    for mode in ("off", "on"):
        copies = [a.clone() if torch.is_tensor(a) else a for a in args]
        with dispatch.forced(mode):
            out = definition(*copies)
        results.append([*(out if isinstance(out, tuple) else (out,)), *copies])
    pairs = [(a, b) for a, b in zip(*results) if torch.is_tensor(a)]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


torch.manual_seed(0)
logits, labels = 4 * torch.randn(7, 129), torch.randint(129, (7,))
h, l, w = torch.randn(40, 64), torch.randn(64), torch.randn(2048)
packed, absmax = nf4.quantize_blocks(w, "nf4", 64)
gap = furthest(cross_entropy.rows_loss_and_gradient, logits, labels)
print(f"cross-entropy, loss and gradient: furthest {gap:.0e}")
kit.holds("within 1e-5", gap < 1e-5)
gap = furthest(ia3.rescale, h, l)
kit.holds("IA3's rescaling, bitwise", gap == 0)
gap = furthest(nf4.quantize_blocks, w, "nf4", 64)
kit.holds("NF4 there, every code and constant", gap == 0)
back = (packed, absmax, w.numel(), 64, "nf4", torch.float32)
gap = furthest(nf4.dequantize_blocks, *back)
kit.holds("NF4 back, bitwise", gap == 0)

# %% [markdown]
# ## The count: bytes
#
# A kernel trains no parameters; what counts is bytes. The *floor* is what must
# move: every input read once, every result written once. What plain PyTorch
# moves is counted below by listening to it, operation by operation; what the
# kernel asks for is counted in the interpreter, lane by lane.


# %%
class Moved(TorchDispatchMode):
    """Counts the bytes every operation reads and writes; views are free."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        returns = operation._schema.returns
        view = any(r.alias_info and not r.alias_info.is_write for r in returns)
        if not view:
            outs = out if isinstance(out, tuple) else (out,)
            for x in (*args, *(kwargs or {}).values(), *outs):
                if torch.is_tensor(x):
                    self.bytes += nbytes(x)
        return out


def compare(definition, twin, args, must_move):
    """[bytes of plain PyTorch, of the kernel, the floor]."""

    def copies():
        return [a.detach().clone() if torch.is_tensor(a) else a for a in args]

    with dispatch.forced("off"), Moved() as plain:
        definition(*copies())
    with Traffic() as kernel:
        twin(*copies())
    return [plain.bytes, kernel.total, must_move]


def there_and_back(function):
    """IA3's rescaling with its gradients, as training runs it."""

    def run(h, l):
        h.requires_grad_(), l.requires_grad_()
        y = function(h, l)
        y.backward(torch.ones_like(y))

    return run


V = 2048
logits, labels = torch.randn(8, V), torch.randint(V, (8,))
h, l, w = torch.randn(256, 256), torch.randn(256), torch.randn(2**15)
packed, absmax = nf4.quantize_blocks(w, "nf4", 64)
back = (packed, absmax, w.numel(), 64, "nf4", torch.float32)
found = {
    "cross-entropy of rows\nand its gradient": compare(
        cross_entropy.rows_loss_and_gradient,
        rows_kernel.rows_loss_and_gradient,
        (logits, labels),
        2 * nbytes(logits),
    ),
    "IA3's rescaling,\nforward and backward": compare(
        there_and_back(ia3.rescale),
        there_and_back(ia3_kernel.rescale),
        (h, l),
        5 * nbytes(h) + 3 * nbytes(l),
    ),
    "NF4, there": compare(
        nf4.quantize_blocks,
        nf4_kernel.quantize_blocks,
        (w, "nf4", 64),
        nbytes(w, packed, absmax),
    ),
    "NF4, back": compare(
        nf4.dequantize_blocks,
        nf4_kernel.dequantize_blocks,
        back,
        nbytes(w, packed, absmax),
    ),
}
rows = [
    [name.replace("\n", " "), *(f"{b:,}" for b in found[name])]
    for name in found
]
kit.table(["bytes", "plain PyTorch", "kernel asks for", "floor"], rows)
rows_floor = 3 * nbytes(logits)
print(f"cross-entropy by formula, 3 V b a row: {rows_floor:,}")

# %% [markdown]
# Cross-entropy asks for half as much again as its floor, because a row of any
# length is read twice (the second time it mostly comes from the cache). NF4's
# kernels also look up levels, sixteen numbers that stay in the cache; the
# memory never sees these lanes.
#
# ## The picture: bytes against the floor

# %%
figure, axis = kit.canvas(8.0, 3.6)
axis.grid(False)
arms = ("plain PyTorch", "the kernel")
places = range(len(found))
for n, (arm, hatch) in enumerate(zip(arms, ("", "//"))):
    times = [b[n] / b[2] for b in found.values()]
    spots = [p + 0.2 * (2 * n - 1) for p in places]
    style = {"color": kit.COLOURS[n], "hatch": hatch, "edgecolor": "white"}
    axis.barh(spots, times, 0.38, **style)
    for spot, value in zip(spots, times):
        text = f"{value:.1f}" + (f"  {arm}" if spot < 0.5 else "")
        axis.text(value + 0.1, spot, text, va="center", fontsize=9)
axis.axvline(1, color="#555555", linestyle="--")
axis.set_yticks(list(places), list(found))
axis.invert_yaxis()
axis.set(xlabel="bytes over what must move (dashed: the floor)")
axis.set_title("What a fused kernel saves", loc="left", fontsize=11)
told = "; ".join(
    f"{name}: plain {p / f:.1f}, kernel {k / f:.1f}".replace("\n", " ")
    for name, (p, k, f) in found.items()
)
kit.show(figure, f"Bytes moved over the floor. {told}.")

# %% [markdown]
# *In words:* the bars of plain PyTorch are several times the floor and the
# kernels' bars stop near the dashed line; the longest bar is NF4's way there,
# with its many small operations.
#
# On a GPU that moves $\beta$ bytes a second, bytes over $\beta$ is the least
# time. This is why a fused kernel wins on long rows and large weights, and why
# it loses on small ones, where starting it costs more than the bytes.

# %% [markdown]
# ## Compiled here for GPUs that are elsewhere
#
# Triton compiles without a GPU. Whether a kernel fits the registers of a GPU
# can be asked on a laptop; "spilled" bytes would be numbers that found no
# register. The gate in `tests/kernels/test_ahead_of_time.py` asks it of every
# kernel and every kind of GPU.

# %%
PROGRAM = """
import json, pathlib, sys
from minipeft.kernels import cross_entropy
from tests.kernels.compile_all import compile_case, resources
case = cross_entropy.AOT[1]
found = {}
for target in map(int, sys.argv[2:]):
    compiled = compile_case(case, target)
    found[target] = resources(compiled, pathlib.Path(sys.argv[1]))
    lines = [line.strip() for line in compiled.asm["ptx"].splitlines()]
    found[target]["ptx"] = sum(x.endswith(";") and x[0] != "." for x in lines)
print(json.dumps(found))
"""
targets = kit.some(["75", "80", "90", "120"], 1)
with tempfile.TemporaryDirectory() as folder:
    environment = os.environ | {
        "TRITON_CACHE_DIR": folder,
        "TRITON_DEFAULT_FP_FUSION": "1",
        "PYTHONPATH": str(kit.ROOT),
    }
    del environment["TRITON_INTERPRET"]
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, *targets],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
compiled = json.loads(run.stdout)
kit.table(
    [
        "capability",
        "registers",
        "spilled bytes",
        "shared bytes",
        "instructions",
    ],
    [[int(t) / 10, *found.values()] for t, found in compiled.items()],
)

# %% [markdown]
# ## Training against the floor
#
# The proof of a kernel is that nobody notices it. IA3 learns the dialect for a
# few steps, once on the definitions and once on every kernel there is for a
# step of its training, in the interpreter. Slow, but the same curve.

# %%
N = 8
curves = {}
for mode in ("off", "on"):
    model, tokenizer = kit.base()
    IA3().attach(model)
    counted = minipeft.report(model).trained
    with dispatch.forced(mode):
        curves["kernels" if mode == "on" else "definitions"] = kit.learn(
            model, tokenizer, "dialect", N, points=4, score_on=24, batch_size=4
        )
best = kit.optimum("dialect")
gaps = [abs(a - b) for (_, a), (_, b) in zip(*curves.values())]
kit.holds("the same curve, within 1e-3 nats", max(gaps) < 1e-3)
print(f"trained {counted:,}; floor {best['floor']:.2f} nats a document")

# %%
kit.picture(
    minipeft.figures.learning_curves,
    curves,
    {"floor": best["floor"]},
    "A few steps of IA3, on definitions and on kernels",
    "nats a document",
)

# %% [markdown]
# *In words:* the two curves lie exactly upon one another and have only begun
# to fall towards the floor far below.

# %% [markdown]
# ## What goes wrong: right results from a wrong kernel
#
# The mask of a store is forgotten. A program whose tile reaches beyond the end
# of the tensor then writes there, into memory that belongs to somebody else.
# The results are right, and stay right in every test that compares results;
# one day another tensor holds nonsense. What catches it is a watch on every
# lane.
#
# So that the bug harms nobody here, the constants lie at the beginning of a
# larger piece of memory, filled with sevens.

# %%
w = torch.randn(100)  # two blocks of 64; a program's tile holds sixteen
expected = nf4.quantize_blocks(w, "nf4", 64)


def launch(module, packed, absmax):
    """`quantize_blocks` of NF4, with the memory for the results given."""
    between, order, _ = module.tables("nf4", w.device)
    grid, shape = (1,), module.tile(64)
    module.quantize_kernel[grid](
        *(w, between, order, packed, absmax, len(w), len(packed)),
        MIDPOINTS=len(between),
        ASCENDING=True,
        **shape,
    )


def invariants(module):
    """The right codes; and no lane outside the tensors of the launch."""
    memory = torch.full((16,), 7.0)
    packed, absmax = torch.zeros(50, dtype=torch.uint8), memory[:2]
    launch(module, packed, absmax)
    same = packed.equal(expected[0]) and absmax.equal(expected[1])
    kit.holds("codes and constants are right", same)
    print("       memory behind them:", memory[2:].int().tolist())
    told = ""
    try:
        with Bounds():
            launch(module, packed, absmax)
    except InterpreterError as error:
        told = f" ({str(error.__cause__).split(', the first')[0]})"
    kit.holds(f"no lane outside{told}", not told)


invariants(nf4_kernel)
print()
with kit.planted("kernels_nf4", "no end when writing constants"):
    from minipeft.kernels import nf4 as broken

    invariants(broken)

# %% [markdown]
# The second bug is in arithmetic, and shows only when the largest entry is not
# in the first block: the sum is not repaired (CERows 1). A test whose rows fit
# in one block passes it.

# %%
with kit.planted(
    "kernels_cross_entropy",
    "the sum is not scaled when the largest entry changes",
):
    from minipeft.kernels import cross_entropy as broken

    for words in (47, 5000):
        z = torch.linspace(-3, 3, words)[None]
        right = torch.nn.functional.cross_entropy(z, torch.tensor([0]))
        found = broken.rows_loss_and_gradient(z.clone(), torch.tensor([0]))
        near = abs(right - found).item() < 1e-4
        kit.holds(f"{words} words: the loss is cross-entropy", near)

# %% [markdown]
# ## Exercises
#
# **20.1** One step of (CERows 1).


# %%
def answer(m, s, block):
    """(m', s') from floats m, s and a list of further entries."""
    return None  # your code


kit.check("20.1", answer)

# %% [markdown]
# **20.2** A grid of programs covers `n` elements, `BLOCK` to a program. Which
# elements does program `pid` touch, and how many programs are there?


# %%
def answer(pid, BLOCK, n):
    """(list of elements that are not masked, number of programs)."""
    return None  # your code


kit.check("20.2", answer)

# %% [markdown]
# **20.3** The least time of a kernel, in microseconds: cross-entropy and its
# gradient, written over the logits, for `rows` rows of `V` entries of `b`
# bytes (two reads and a write) on a GPU that moves `beta` bytes a second; and
# never less than `start` microseconds, which launching it takes.


# %%
def answer(rows, V, b, beta, start):
    """Microseconds."""
    return None  # your code


kit.check("20.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=counted)

# %% [markdown]
# ## Where to go next
#
# - The kernels: `minipeft/kernels/`. Each header derives its algorithm, counts
#   its bytes and says where it wins, and where it only teaches. How they are
#   tested: `tests/kernels/README.md`.
# - The papers: Tillet, Kung and Cox 2019, *Triton: An Intermediate Language
#   and Compiler for Tiled Neural Network Computations*; Milakov and Gimelshein
#   2018, *Online normalizer calculation for softmax*, arXiv 1805.02867; Dao et
#   al. 2022, *FlashAttention*, arXiv 2205.14135.
# - Next: chapter 21 puts all techniques side by side.
