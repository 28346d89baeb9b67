# %% [markdown]
# # 18. Distillation: learning from probabilities
#
# A label says which word came. It does not say that three others could have
# come as well, and that a hundred could not. **What is a teacher's whole
# distribution worth to a smaller student, and what would a perfect teacher's
# be worth?** In Tiny Town the second question has an answer, too: the
# generator knows the true probability of every next word.
#
# Afterwards you can compute Hinton's loss by hand, say why $T^2$ stands in
# front of it, build a student out of its teacher's layers, and read off how
# much of a student's loss is noise in its labels. About 25 minutes. Files:
# `minipeft/compressed/distillation.py` and `minipeft/compressed/teachers.py`.

# %%
import json
from inspect import getsource

import torch
from minipeft import distill, figures, town
from minipeft.compressed import distillation, layer_matching, teachers
from minipeft.dataset import collate, encode_all
from minipeft.evaluation import nats
from minipeft.training import TrainingConfig, train

import kit

teacher, tokenizer = kit.base()

# %% [markdown]
# ## The equations
#
# For one token with student logits $s$, teacher logits $t$, label $y$ and
# temperature $T$:
#
# $$p = \text{softmax}(t / T), \qquad q = \text{softmax}(s / T)
# \qquad \text{(Distill 1)}$$
#
# $$\text{soft} = T^2\, \mathrm{KL}(p \,\|\, q)
# = T^2 \sum_v p_v (\log p_v - \log q_v) \qquad \text{(Distill 2)}$$
#
# $$\text{hard} = -\log \text{softmax}(s)_y \qquad \text{(Distill 3)}$$
#
# $$L = \alpha\, \mathrm{mean}(\text{soft}) + (1 - \alpha)\,
# \mathrm{mean}(\text{hard}) \qquad \text{(Distill 4)}$$
#
# The means are over the tokens that count. $\alpha$ weighs the soft part;
# the hard part is always at temperature 1.

# %% [markdown]
# ## Three words by hand
#
# The teacher's logits are $(\ln 4, \ln 2, \ln 2)$, the student's $(0, 0, 0)$.
# At $T = 1$:
#
# - $p = (4, 2, 2) / 8 = (0.5,\ 0.25,\ 0.25)$ and $q = (1, 1, 1) / 3$;
# - $\mathrm{KL} = 0.5 \ln 1.5 + 2 \cdot 0.25 \ln 0.75 = 0.2027 - 0.1438
#   = 0.0589$;
# - the gradient with respect to $s$ is $q - p = (-0.1667, 0.0833, 0.0833)$:
#   more of the first word, less of the others, *in the teacher's proportions*.
#
# A hard label on the first word would say $q - y = (-0.667, 0.333, 0.333)$:
# louder, and wrong about the other two.

# %%
t = torch.tensor([4.0, 2.0, 2.0]).log()
s = torch.zeros(3, requires_grad=True)
soft = distillation.forward_kl(s, t)
soft.backward()
print(f"KL       {soft.item():.4f}  by hand 0.0589")
print("gradient", [round(g, 4) for g in s.grad.tolist()])
by_hand = torch.tensor([-1 / 6, 1 / 12, 1 / 12])
kit.holds("gradient as by hand", torch.allclose(s.grad, by_hand, atol=1e-6))

# %% [markdown]
# Why $T^2$? At temperature $T$ the gradient of the KL itself is $(q - p) / T$,
# and $q - p$ shrinks like $1 / T$ as well. Without a factor the soft part
# would fade as $1 / T^2$, and $\alpha$ would mean something else at every
# temperature.

# %%
rows = []
for T in (1.0, 2.0, 4.0, 8.0, 64.0):
    s = torch.zeros(3, requires_grad=True)
    distillation.forward_kl(s, t, T).backward()
    size = s.grad.abs().max().item()
    rows.append([T, f"{size / T**2:.6f}", f"{size:.4f}"])
kit.table(["T", "gradient of KL", "times T squared"], rows)
limit = (t - t.mean()).abs().max().item() / 3
print(f"as T grows: the centred logits over V, {limit:.4f}")

# %% [markdown]
# ## The library's own source

# %%
kit.code(
    getsource(distillation.forward_kl),
    getsource(distillation._mixed),
    getsource(teachers.ExactTeacher.__call__),
    getsource(layer_matching.layer_map),
)

# %% [markdown]
# ## The start, and how many numbers
#
# The student is made of the teacher's own layers, first to first and last to
# last (Match 1): with all of them it *is* the teacher, and the soft loss is
# zero. With half of them it has $V D + C D + L' (12 D^2 + 13 D) + 2 D$
# parameters; all are trained, and the teacher none.


# %%
def soft_loss(student):
    """KL to the teacher, nats a token, on eight held-out documents."""
    ids = batch.ids
    with torch.no_grad():
        return distillation.distillation_loss(
            student(ids), teacher(ids), batch.labels, 1.0, alpha=1.0
        ).item()


examples = distill.held_out()
batch = collate(encode_all(examples[:8], tokenizer, teacher), 0)
for layers in (4, 3, 2, 1):
    student = layer_matching.student_from(teacher, layers)
    kept = layer_matching.layer_map(layers, 4)
    print(f"{layers} layers {kept!s:13} soft loss {soft_loss(student):.4f}")

student = layer_matching.student_from(teacher, 2)
c = student.config
V, C, D, L = c.vocab_size, c.context_length, c.d_model, c.n_layer
formula = V * D + C * D + L * (12 * D**2 + 13 * D) + 2 * D
counted = sum(p.numel() for p in student.parameters())
whole = sum(p.numel() for p in teacher.parameters())
print(f"by formula {formula:,}, counted {counted:,}, of {whole:,}")

# %% [markdown]
# ## The picture: what a label does not say
#
# One place in one story, where about six words are likely. The generator knows
# how likely each next word is; the base, our trained teacher, has learned it
# almost perfectly; and the label names the one word that came.

# %%
text = town.held_out("story")[2]
truth = town.soft_labels(tokenizer, town.mix(), text)
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
with torch.no_grad():
    guess = teacher(ids)[0].softmax(-1)
entropy = -(truth * truth.clamp(min=1e-30).log()).sum(1)
place = int((entropy[2:-1].exp() - 6).abs().argmin()) + 2  # about 6 words
words = truth[place].argsort(descending=True)[:9].tolist()
label = [*ids[0, 1:].tolist(), tokenizer.eot][place]
if label not in words:
    words[-1] = label

before = tokenizer.decode(ids[0, 1 : place + 1].tolist())
names = [tokenizer.decode([w]).strip() or "(end)" for w in words]
figure, axes = kit.canvas(8.0, 3.8, columns=3)
shown = {
    "perfect teacher": truth[place, words],
    "trained teacher": guess[place, words],
    "the label": torch.tensor([float(w == label) for w in words]),
}
for axis, (title, values), colour in zip(axes, shown.items(), kit.COLOURS):
    axis.grid(False)
    axis.barh(names, values.tolist(), color=colour, height=0.7)
    axis.invert_yaxis()
    axis.set_title(title, loc="left", fontsize=10, color=colour)
    axis.set(xlabel="probability")
    if axis is not axes[0]:
        axis.set_yticks([])
print(f"... {before[-60:]} ___")
gap = (truth[place] - guess[place]).abs().max().item()
told = ", ".join(
    f"{n} {p:.2f}" for n, p in zip(names, truth[place, words].tolist())
)
alt = f"Next words and their true probabilities: {told}. The trained teacher "
alt += (
    f"is off by at most {gap:.2f}; the label says{tokenizer.decode([label])}."
)
kit.show(figure, alt)

# %% [markdown]
# *In words:* the bars of the perfect and of the trained teacher fall alike,
# six likely words and then three of the other mood with hardly any bar; the
# label is a single bar of length one, on a word that was the least likely of
# the six.

# %% [markdown]
# ## Training against the floor
#
# The same student three times: same start, same documents, same order, same
# number of steps. Only what the loss compares it with differs.
#
# All three have the same optimum: the truth is the mean of the labels, and a
# perfect teacher *is* that mean. A softer label is a less noisy one.

# %%
N = 200
n, count = kit.steps(N), 16 * N
lesson = kit.some(distill.town_examples(0, count), 64)
data = encode_all(lesson, tokenizer, teacher)
held = kit.some(examples)
kinds = {
    "hard labels": None,
    "trained teacher": teachers.NetworkTeacher(teacher),
    "perfect teacher": teachers.ExactTeacher(
        distill.exact_tables(tokenizer, lesson)
    ),
}
curves = {}
for name, loss_fn in kinds.items():
    student = layer_matching.student_from(teacher, 2)
    config = TrainingConfig(
        steps=n,
        learning_rate=2e-3,
        schedule="cosine",
        pool=8,
        device="cpu",
        eval_every=max(1, n // 5),
    )
    result = train(
        student,
        data,
        config,
        loss_fn=loss_fn,
        evaluate=lambda m: nats(m, held, tokenizer),
        show=False,
    )
    curves[name] = [(s, v["value"]) for s, v in result.evaluations]
    print(f"{name:16} {curves[name][-1][1]:.3f} nats a document")
texts = [x.completion for x in held]
floor = -sum(town.log_prob(town.mix(), t) for t in texts) / len(texts)
above = nats(teacher, held, tokenizer)
print(f"the teacher      {above:.3f}\nfloor            {floor:.3f}")

# %%
later = {name: points[1:] for name, points in curves.items()}
kit.picture(
    figures.learning_curves,
    later,
    {"the teacher": above, "floor": floor},
    "A student of half the layers, and three kinds of label",
    "nats a document",
)

# %% [markdown]
# *In words:* three falling curves end one above the other, hard labels the
# highest, the two teachers' soft labels close together below; all still lie
# above the line of the teacher, which lies just above the floor.

# %% [markdown]
# The same comparison with more steps, three seeds, and a student that is less
# than half of its teacher is in `data/results/distillation/results.json`, made
# by `python -m minipeft.distill`. Two layers are more than half, because the
# embeddings stay whole; so the layers go without a quarter of their neurons,
# those that chapter 19's gates find least important:

# %%
folder = town.data_folder() / "results" / "distillation"
results = json.loads((folder / "results.json").read_text())
title, head, rows = distill.summary(results)
print(title)
kit.table(head, rows)

# %% [markdown]
# ## What goes wrong
#
# KL is not symmetric, and its arguments come in one order in formulas and in
# another in `F.kl_div`. $T^2$ is easily forgotten, or written as $T$. None of
# it crashes, and the loss falls in each case. The gradient tells: it must be
# $T (q - p)$.


# %%
def invariants(module):
    """What must be true of (Distill 2) and (Distill 4)."""
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 5, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(7, (5,), generator=generator)
    s.requires_grad_()
    for T in (1.0, 3.0):
        loss = module.distillation_loss(s, t, labels, T, alpha=1.0)
        (gradient,) = torch.autograd.grad(loss, s)
        q, p = (s / T).softmax(-1), (t / T).softmax(-1)
        same = torch.allclose(gradient, T * (q - p) / 5, atol=1e-12)
        kit.holds(f"the gradient is T (q - p) at T = {T:.0f}", same)
    hard = module.distillation_loss(s, t, labels, 3.0, alpha=0.0)
    cross = torch.nn.functional.cross_entropy(s, labels)
    kit.holds("alpha = 0 is cross-entropy", torch.allclose(hard, cross))


invariants(distillation)
print()
for bug in (
    "T squared forgotten",
    "KL with its arguments exchanged",
    "the hard part softened as well",
):
    with kit.planted("distillation", bug):
        from minipeft.compressed import distillation as broken

        invariants(broken)
    print()

# %% [markdown]
# At $T = 1$ a forgotten $T^2$ cannot be seen. A test that only tries the
# default value passes it.

# %% [markdown]
# ## Exercises
#
# **18.1** Write (Distill 2) for one token or many.


# %%
def answer(s, t, T):
    """T^2 KL(p || q) of each row: s, t (n, V) -> (n,)."""
    return None  # your code


kit.check("18.1", answer)

# %% [markdown]
# **18.2** Write (Distill 4) with means over the tokens that count. Labels are
# -100 where a token does not.


# %%
def answer(s, t, labels, T, alpha):
    """A scalar: s, t (n, V), labels (n,)."""
    return None  # your code


kit.check("18.2", answer)

# %% [markdown]
# **18.3** A perfect teacher at $T = 1$ and $\alpha = 1$: its loss is the
# student's cross-entropy to the truth, less something that does not depend on
# the student. Compute that something for a table of true probabilities.


# %%
def answer(p):
    """The mean over rows: p (n, V), rows sum to 1, zeros allowed."""
    return None  # your code


kit.check("18.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=counted)

# %% [markdown]
# ## Where to go next
#
# - Inside the network there is more to imitate: hidden states and attention
#   (`minipeft/compressed/layer_matching.py`). Loss without ever holding both
#   models' logits: `minipeft/compressed/linear_distillation.py`.
# - The papers: Hinton, Vinyals and Dean 2015, *Distilling the Knowledge in a
#   Neural Network*, arXiv 1503.02531; Sanh et al. 2019, *DistilBERT*, arXiv
#   1910.01108; Kim and Rush 2016, arXiv 1606.07947, for whole sequences.
# - `minipeft distill` does it on your own model and text.
# - Next: chapter 19 takes weights out one by one.
