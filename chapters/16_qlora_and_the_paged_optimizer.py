# %% [markdown]
# # 16. QLoRA and the paged optimizer
#
# LoRA trains little, but the frozen weights still lie there in full size.
# **What is left to save once the trained part is small, and what does saving
# it cost in quality?** QLoRA keeps the base in four bits and turns a layer
# back into floats only while that layer computes. Its paged optimizer lends
# the device a few pages of AdamW's state at a time, as an operating system
# does with a program's memory.
#
# Afterwards you can say where every byte of a training step lives, follow a
# pager with pencil and paper, and explain why a merged QLoRA model is not in
# four bits any more. About 25 minutes. It builds on chapters 09 (LoRA) and 15
# (NF4). Paper: Dettmers et al., 2023
# ([arXiv 2305.14314](https://arxiv.org/abs/2305.14314)).

# %%
import copy
from inspect import getsource

import minipeft
import torch
from minipeft import LoRA, QLoRA, figures, memory
from minipeft.dataset import encode_all
from minipeft.evaluation import nats
from minipeft.gpt import GPTConfig
from minipeft.low_rank.lora import PROJECTIONS
from minipeft.quantized import nf4_linear, paged_adamw, qlora
from minipeft.quantized.paged_adamw import PagedAdamW
from minipeft.town import TASKS
from minipeft.training import TrainingConfig, train

import kit

model, tokenizer = kit.base()

# %% [markdown]
# ## The equations
#
# $$h = y + s\, B A x, \qquad y = W' x + b \qquad \text{(QLoRA 1)}$$
#
# $W'$ is what NF4 kept of the weight. It exists only while it is used, once
# in the forward pass and once in the backward pass:
#
# $$y = W' x + b, \quad W' = \text{dequantise}(\text{packed})
# \qquad \text{(Frozen 1)}$$
#
# $$\mathrm{d}x = W'^{\top} g \qquad \text{(Frozen 2)}$$
#
# There is no $\mathrm{d}W'$. The gradient flows *through* the frozen weight,
# down to the $A$ and $B$ of the layers below. The optimizer is AdamW,
#
# $$m = b_1 m + (1 - b_1) g, \qquad v = b_2 v + (1 - b_2) g^2
# \qquad \text{(Paged 1)}$$
#
# $$w = (1 - \eta d)\, w - \frac{\eta}{1 - b_1^t}
# \frac{m}{\sqrt{v} / \sqrt{1 - b_2^t} + \epsilon} \qquad \text{(Paged 2)}$$
#
# with the moments $m$ and $v$ of all tensors laid end to end and cut in pages
# of $P$ elements: element $i$ is on page $\lfloor i / P \rfloor$ (Paged 3). A
# page that is needed goes to a free frame of the device, else to the frame of
# the page whose last use lies furthest back, once that page is written back
# (Paged 4).

# %% [markdown]
# ## A pager by hand
#
# Three pages, two frames. Touch the pages in the order 0, 1, 0, 2, 1:
#
# - 0 and 1 are not there: two faults, and both frames are full;
# - 0 is there: a hit. Now 1 is the page that was used longest ago;
# - 2 is not there: a fault, and 1 must go;
# - 1 is not there, it just went: a fault, and 0 must go.
#
# `show_work` does the same.

# %%
by_hand = [("fault", None), ("fault", None), ("hit", None)]
by_hand += [("fault", 1), ("fault", 0)]
rows = paged_adamw.show_work([0, 1, 0, 2, 1], resident_pages=2)
shown = [["-" if x is None else x for x in row.values()] for row in rows]
kit.table(list(rows[0]), shown)
found = [(row["kind"], row["evicted"]) for row in rows]
kit.holds("by hand and by the library (Paged 4)", found == by_hand)

# %% [markdown]
# An optimizer touches its pages in order, step after step: 0, 1, 2, 0, 1, 2.
# Then the page that is needed next is always the one that just had to go. With
# one frame too few, *every* touch is a fault.

# %%
for frames in (3, 2):
    rows = paged_adamw.show_work([0, 1, 2] * 3, resident_pages=frames)
    print(frames, "frames:", " ".join(row["kind"] for row in rows))

# %% [markdown]
# No rule for choosing a victim helps much against a sweep. What helps is to
# know the future: the pager fetches the next page while it computes with this
# one, so nobody waits for it.
#
# One step of (Paged 1) and (Paged 2) by hand as well, with $w = 1$,
# $g = 0.02$, $\eta = 0.1$, no decay. In the first step $m = 0.1\, g$ and
# $v = 0.001\, g^2$, and the corrections divide by just that: $w$ moves by
# $\eta\, g / |g| = 0.1$, whatever the size of the gradient.

# %%
w, g, m, v = (
    torch.tensor([x], dtype=torch.float64) for x in (1.0, 0.02, 0.0, 0.0)
)
paged_adamw.adamw_update(w, g, m, v, 1, 0.1, (0.9, 0.999), 0.0, 0.0)
print(f"m {m.item():.3f}, v {v.item():.1e}, w {w.item():.6f}, by hand 0.9")
kit.holds("w moved by the learning rate", abs(w.item() - 0.9) < 1e-12)

# %% [markdown]
# ## The library's own source
#
# The product that keeps nothing, and the pager's three verbs:

# %%
kit.code(
    getsource(nf4_linear.FrozenProduct),
    getsource(paged_adamw.Pager.touch),
    getsource(paged_adamw.Pager.load),
    getsource(paged_adamw.Pager.evict),
)

# %% [markdown]
# ## At the start, and how many numbers
#
# With $B = 0$ the model is, in every bit, the *quantised* base. It is not the
# float base; that much chapter 15 rounded away. And paged AdamW is AdamW in
# every bit, for any size and number of pages, because no operation of
# (Paged 1) and (Paged 2) mixes elements.

# %%
ids = torch.tensor([tokenizer.encode("Ada is kind .")])
technique = QLoRA(rank=8, targets=tuple(PROJECTIONS))
adapted = technique.attach(copy.deepcopy(model))
rounded = qlora.quantize_model(copy.deepcopy(model))
with torch.no_grad():
    start, four_bits, floats = (f(ids) for f in (adapted, rounded, model))
kit.holds("the quantised base, bitwise", start.equal(four_bits))
print(
    f"furthest logit from the float base: {(start - floats).abs().max():.3f}"
)


def walk(make, **settings):
    """A tensor after 20 steps of an optimizer on gradients of all sizes."""
    w = torch.nn.Parameter(torch.linspace(-1, 1, 1000))
    optimizer = make([w], **settings)
    for step in range(20):
        w.grad = torch.sin(w.detach() * step) * 10.0 ** (step % 5 - 2)
        optimizer.step()
    return w.detach()


adamw = walk(torch.optim.AdamW, foreach=False)
for page, frames in [(7, 1), (64, 3), (2000, None)]:
    same = walk(PagedAdamW, page_size=page, resident_pages=frames)
    kit.holds(
        f"AdamW's bits with pages of {page}, frames {frames}",
        same.equal(adamw),
    )

c, r = model.config, technique.rank
formula = c.n_layer * r * (8 * c.d_model + 2 * (c.d_model + c.ff_width))
counted = minipeft.report(adapted).trained
print(f"L r (8 D + 2 (D + d_ff)) = {formula:,}; measured {counted:,}")

# %% [markdown]
# ## Training against the floor
#
# The same LoRA twice, on the same examples in the same order at the same rate:
# once on the float base with AdamW, once on the base in four bits with paged
# AdamW, three frames on the device. The task is *dialect*.


# %%
N = 150
optimizers = []


def paged(groups):
    """PagedAdamW in place of the training loop's AdamW."""
    made = PagedAdamW(groups, weight_decay=0, page_size=8192, resident_pages=3)
    optimizers.append(made)
    return made


def learn(technique, make_optimizer=None):
    """The curve of one run, [(step, nats a document)], and the model."""
    adapted = technique.attach(kit.base()[0])
    task, n = TASKS["dialect"], kit.steps(N)
    test = kit.some(task.test())
    result = train(
        adapted,
        encode_all(task.train(0), tokenizer),
        TrainingConfig(
            steps=n,
            learning_rate=5e-3,
            eval_every=max(1, n // 5),
            device="cpu",
        ),
        evaluate=lambda m: nats(m, test, tokenizer),
        make_optimizer=make_optimizer,
        show=False,
    )
    return [(s, v["value"]) for s, v in result.evaluations], adapted


curves = {}
curves["LoRA"], _ = learn(LoRA(rank=8, targets=tuple(PROJECTIONS)))
curves["QLoRA, paged"], trained = learn(technique, paged)
best = kit.optimum("dialect")
for name, points in curves.items():
    print(
        f"{name:13} {points[0][1]:.3f} -> {points[-1][1]:.3f} nats a document"
    )
print(f"floor         {best['floor']:.3f}")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "The dialect, learned on a float base and on one in four bits",
    "nats a document",
)

# %% [markdown]
# *In words:* the two curves start together at the line of a perfect model that
# was not adapted and stay together down to just above the floor.
#
# What rounding took from the base, the adapter makes up for: what is left
# between the two is less than a hundredth of a nat. The paper reports the same
# for models of 7 to 65 billion weights.

# %% [markdown]
# ## The picture: a pager at work
#
# What the optimizer of that run did in its first steps. Each row is a page of
# the moments; a grey bar says that it is on the device. One page is waited
# for, the very first. Every other one comes in while the one before it is
# computed with.

# %%
trace = [event for event in optimizers[0].trace if event.step <= 3]
title = f"{len({e.page for e in trace})} pages, three frames, three steps"
kit.picture(figures.paging, trace, title)
pager = optimizers[0].pagers[0]
print(f"moments on the device {pager.frames.numel() * 4:9,} bytes")
print(f"moments in all        {pager.host.numel() * 4:9,} bytes")

# %% [markdown]
# *In words:* a staircase of grey bars climbs through the pages once a step;
# a single cross, the only fault, stands at its foot, and every other page is
# prefetched just before its hit, while the page three below is evicted.

# %% [markdown]
# ## Where the bytes are
#
# `minipeft.memory` knows each part of a training step by formula, and can
# measure the whole. First both on a model that fits here; then the formula
# alone on the shape of a model with billions of weights, in bfloat16.

# %%
little = GPTConfig(vocab_size=800, d_model=128, n_layer=4, n_head=4)
for one in (LoRA(rank=8, targets=tuple(PROJECTIONS)), QLoRA(rank=8)):
    case = memory.Run(little, one, batch=4, time=64)
    said, seen = memory.estimate(case).total, memory.measure(case)
    name = type(one).__name__
    print(
        f"{name:6} formula {said / 1e6:6.2f} MB  measured {seen / 1e6:6.2f} MB"
    )

seven = GPTConfig(
    vocab_size=50257,
    context_length=1024,
    n_layer=32,
    n_head=32,
    d_model=4096,
)
runs = {
    "full": (minipeft.FullFineTuning(keep_original=False), "adamw"),
    "LoRA": (LoRA(rank=64, targets=tuple(PROJECTIONS)), "adamw"),
    "QLoRA": (QLoRA(rank=64), "adamw"),
    "QLoRA, paged": (QLoRA(rank=64), "paged"),
}
costs = {
    name: memory.estimate(
        memory.Run(
            seven,
            one,
            time=512,
            dtype=torch.bfloat16,
            optimizer=optimizer,
            checkpointing=True,
        )
    )
    for name, (one, optimizer) in runs.items()
}
parts = list(vars(costs["full"]))
rows = [
    [
        name,
        *(f"{v / 1e9:.1f}" for v in vars(c).values()),
        f"{c.total / 1e9:.1f}",
    ]
    for name, c in costs.items()
]
print(f"\n{memory.base_parameters(seven):,} weights; gigabytes:")
kit.table(["", *parts, "total"], rows)

# %%
figure, axis = kit.canvas(8.0, 3.4)
axis.grid(False)
shown = [name for name in costs if name != "full"]
left, hatches = [0.0] * len(shown), ("", "//", "..", "xx", "\\\\", "++")
for part, colour, hatch in zip(parts, kit.COLOURS + ("#888888",), hatches):
    widths = [getattr(costs[name], part) / 1e9 for name in shown]
    style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
    axis.barh(shown, widths, 0.6, left=left, label=part, **style)
    left = [a + b for a, b in zip(left, widths)]
for n, total in enumerate(left):
    axis.text(total + 0.2, n, f"{total:.1f}", va="center")
axis.invert_yaxis()
axis.set(xlabel="gigabytes at the fullest moment of a step")
axis.legend(
    ncols=6, loc="upper center", bbox_to_anchor=(0.45, -0.2), frameon=False
)
axis.set_title("What is left once little is trained", loc="left", fontsize=11)
told = "; ".join(f"{n} {costs[n].total / 1e9:.1f} GB" for n in shown)
kit.show(figure, f"Memory of a training step at billions of weights: {told}.")

# %% [markdown]
# *In words:* LoRA's bar is almost all weights; QLoRA's bar is a fraction as
# long, because the weights shrank to less than a third; paging takes the
# optimizer's part off what is left.

# %% [markdown]
# ## Merging
#
# $$W_m = W' + s\, B A \qquad \text{(QLoRA 2)}$$
#
# The sum is floats. It lies between NF4's levels, and putting it back into
# NF4 rounds again: by how much, next to what was learned?

# %%
exact = copy.deepcopy(trained)
rows = qlora.merge(exact)
kit.table(
    ["path", "learned", "rounding of the sum", "if put back in NF4"],
    [
        [r.path, *(f"{x:.1e}" for x in (r.learned, r.rounding, r.requantized))]
        for r in rows[:6]
    ],
)
ratio = sum(r.requantized for r in rows) / sum(r.learned for r in rows)
print(f"over all layers, rounding again is {ratio:.1f} times what was learned")

# %% [markdown]
# That is why `merge` leaves floats behind, and says so.

# %% [markdown]
# ## What goes wrong: state lost when a page is evicted
#
# A page that is overwritten before it was written back loses its last step.
# Nothing crashes; the moments are merely a little old, and training is a
# little worse. What catches it is an exact promise: the bits of AdamW, at
# every budget of pages. With all pages resident the bug cannot be seen.

# %%
with kit.planted(
    "paged_adamw", "state lost when a page is evicted"
) as package:
    from minipeft.quantized.paged_adamw import PagedAdamW as Forgetful

    for frames in (None, 5, 1):
        broken = walk(Forgetful, page_size=64, resident_pages=frames)
        gap = (broken - adamw).abs().max().item()
        kit.holds(
            f"AdamW's bits with frames {frames} (furthest {gap:.4f})",
            broken.equal(adamw),
        )

# %% [markdown]
# ## Exercises
#
# **16.1** Write the pager of (Paged 4) for a list of touches: how many of them
# are faults?


# %%
def answer(touches, frames):
    """The number of faults; the least recently used page makes room."""
    return None  # your code


kit.check("16.1", answer)

# %% [markdown]
# **16.2** How many bytes of AdamW's two float32 moments are on the device, for
# `N` trained numbers, pages of `P` elements and `F` frames? No frame is ever
# larger than what there is.


# %%
def answer(N, P, F):
    """Bytes; with enough frames it is all of the state."""
    return None  # your code


kit.check("16.2", answer)

# %% [markdown]
# **16.3** Write (Frozen 1) and (Frozen 2): the product and, by hand, the
# gradient of $x$. `unpack()` gives $W'$, `g` is the gradient at $y$; call
# `unpack` in both, and keep nothing.


# %%
def answer(x, unpack, b, g):
    """(y, dx): x (n, in), unpack() (out, in), b (out,), g (n, out)."""
    return None  # your code


kit.check("16.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=counted)

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/quantized/qlora.py`, `nf4_linear.py` and
#   `paged_adamw.py`; for the moments in eight bits, `adamw_8bit.py`. Their
#   bugs: `tests/mutants/qlora.py`, `tests/mutants/paged_adamw.py`.
# - The papers: Dettmers et al. 2023, *QLoRA: Efficient Finetuning of Quantized
#   LLMs*, arXiv 2305.14314; 8-bit optimizers: Dettmers et al. 2021, arXiv
#   2110.02861.
# - Next: chapter 17 rounds to fewer bits and asks what helps.
