# %% [markdown]
# # 08. P-tuning: learned words anywhere
#
# **The question.** A soft prompt stands in front of the text, so it can never
# see the text: attention only looks back. Would learned words be worth more in
# the middle, or right before the answer, where they can read everything? And
# must every learned word be learned alone, or may a small network tie them
# together?
#
# After this chapter you can write a template with learned words in the
# middle, say what an encoder adds and why nothing of it is left afterwards,
# and turn the deep version, P-tuning v2, into a classifier.
# Reading and running: about 20 minutes.

# %%
import copy
from inspect import getsource

import minipeft
import torch
from minipeft import Head, PTuning, PTuningV2, figures, report, town
from minipeft.dataset import Encoded, encode_all_for_head
from minipeft.evaluation import head_accuracy, per_batch, row_nats
from minipeft.soft_prompt import p_tuning
from minipeft.soft_prompt.prompt_tuning import flatten
from minipeft.training import TrainingConfig, train

import kit

# %% [markdown]
# ## The equations
#
# Some ids of the input are *pseudo tokens*, numbered on from the end of the
# vocabulary. Their embeddings $h_0 \ldots h_{n-1}$ are learned, positions are
# added as to any word:
#
# $$e_j = h_j \text{ at pseudo token } j, \quad E[\mathrm{id}]
#   \text{ elsewhere} \qquad \text{(P-tuning 1)}$$
#
# The $h_j$ may be a table, or come out of an encoder that sees all of them:
# a network, or an LSTM that reads the rows $E'$ in both directions.
#
# $$h = W_3\, \mathrm{relu}(W_2\, \mathrm{relu}(W_1 E' + b_1) + b_2) + b_3
#   \qquad \text{(P-tuning 2)}$$
#
# $$h_j = [\mathrm{LSTM}^{\rightarrow}(E'_0 .. E'_j);\;
#   \mathrm{LSTM}^{\leftarrow}(E'_{n-1} .. E'_j)]
#   \qquad \text{(P-tuning 3)}$$
#
# ## By hand
#
# **A template.** `(2, 1)` means: two pseudo tokens in front of the text and
# one behind. With a vocabulary of 97 words they get the ids 97, 98 and 99. A
# text of the words 5 and 6 is then laid as `5 6 99`; 97 and 98 are put in
# front by the model itself, as in chapter 06.
#
# **An encoder** of two layers and width 2, for one row $E' = (1, -2)$:
#
# $$W_1 = \begin{pmatrix} 1 & 1 \\ 0 & -1 \end{pmatrix},\;
#   b_1 = 0, \quad W_2 = \begin{pmatrix} 1 & \tfrac12 \\ 0 & 1
#   \end{pmatrix},\; b_2 = (1, 0).$$
#
# 1. $W_1 E' = (1 - 2,\; 2) = (-1, 2)$.
# 2. relu cuts the first: $(0, 2)$.
# 3. $W_2 (0, 2) + b_2 = (1, 2) + (1, 0) = (2, 2)$.

# %%
print("ids of the places:", p_tuning.pseudo_ids((2, 1), 97))
print("the text laid:    ", p_tuning.lay_template((2, 1), [[5, 6]], 97))
row = torch.tensor([[1.0, -2.0]])
first = torch.tensor([[1.0, 1.0], [0.0, -1.0]]), torch.zeros(2)
second = torch.tensor([[1.0, 0.5], [0.0, 1.0]]), torch.tensor([1.0, 0.0])
h = p_tuning.mlp(row, first, second)
print("the encoder gives:", h.tolist())
kit.holds("as by hand", h.equal(torch.tensor([[2.0, 2.0]])))

# %% [markdown]
# ## The library's own source
#
# The table of words is wrapped, so that it knows more ids. Where the input
# holds one of these, a learned row takes the word's place.

# %%
kit.code(
    getsource(p_tuning.lay_template),
    getsource(p_tuning.PseudoTokens),
    getsource(p_tuning.Encoder.forward),
)

# %% [markdown]
# ## At the start: what the rows say
#
# Random rows are a change from the first step on. But pseudo tokens that hold
# the rows of real words *are* these words, wherever they stand. That gives an
# invariant which must hold in every bit, and we shall need it below.

# %%
model, tokenizer = kit.base()
V, D = model.config.vocab_size, model.config.d_model
story = tokenizer.encode("Jack found a calm lamp at noon .")
question = tokenizer.encode(" It was a")
n = len(question)


@torch.no_grad()
def words_as_pseudo_tokens(package):
    """Logits with the question's words held by pseudo tokens."""
    model, _ = kit.base()
    package.PTuning(template=(0, n), encoder="table").attach(model)
    rows = package.wrap.resolve(model, "embed").prompt.weight
    rows.copy_(package.wrap.resolve(model, "embed.token").weight[question])
    ids = p_tuning.lay_template((0, n), [story], V)
    print("ids of the text:", ids)
    return model(torch.tensor([ids]))


with torch.no_grad():
    read = model(torch.tensor([story + question]))
same = torch.equal(words_as_pseudo_tokens(minipeft), read)
kit.holds("rows of words are these words", same)

# %% [markdown]
# ## How many numbers
#
# A table trains $nD$ numbers. The encoders train many more, and all of them
# are thrown away in the end: `flatten` keeps the $n$ rows that they compute.
# So an encoder adds no power. It changes the path of learning, because a step
# that helps one row moves all of them. Here are the formulas for $n = 4$ and
# hidden width $h$, with two layers of LSTM.

# %%
config, k = model.config, 4


def count_lstm(h):
    first = 2 * (4 * h * (D + h) + 8 * h)  # two directions, four gates
    second = 2 * (4 * h * (2 * h + h) + 8 * h)  # reads both directions
    return first + second


formulas = {
    "table": k * D,
    "mlp": k * D + 3 * (D * D + D),  # h = D
    "lstm": k * D + count_lstm(D // 2),
    "lstm+mlp": k * D + count_lstm(D // 2) + 2 * (D * D + D),
}
rows = []
for encoder, formula in formulas.items():
    twin = copy.deepcopy(model)
    PTuning(template=(0, k), encoder=encoder).attach(twin)
    trained = report(twin).trained
    if encoder != "table":
        flatten(twin)
    rows.append(
        [encoder, f"{formula:,}", f"{trained:,}", f"{report(twin).trained:,}"]
    )
kit.table(["encoder", "formula", "measured", "after flatten"], rows)

# %% [markdown]
# ## Training against the floor
#
# The task is that of chapter 06: a story, then a question about its mood to
# which the base has no answer. Four learned words help it, at three places:
# in front of the story, between story and question, behind the question. Each
# place is tried twice, from two draws of random rows. The floor is what a
# perfect reader pays, because moods are hidden. Where would you bet?

# %%
task = town.TASKS["mood"]
QUESTION = town.tasks.MOOD_QUESTION
test = kit.some(task.test()[:200])
best = task.optimum(test)
CHOICES = ("yes", "no")


def encoded(template, example, answer):
    """Story, question and answer in the template; only the answer counts."""
    story = tokenizer.encode(example.prompt.removesuffix(QUESTION))
    parts = [[tokenizer.eot, *story], tokenizer.encode(QUESTION)]
    before = p_tuning.lay_template(template, parts, V)
    after = [*tokenizer.encode(f" {answer} ."), tokenizer.eot]
    return Encoded([*before, *after[:-1]], [-100] * (len(before) - 1) + after)


def nats(model, template):
    """Mean -log of the right answer's share of the two."""
    rows = [encoded(template, x, word) for x in test for word in CHOICES]
    scores = -torch.tensor(per_batch(row_nats, model, rows)).view(-1, 2)
    right = torch.tensor([[CHOICES.index(x.label)] for x in test])
    return -scores.log_softmax(-1).gather(1, right).mean().item()


curves, SEEDS = {}, (0, 1)
places = {"in front": (k, 0, 0), "between": (0, k, 0), "behind": (0, 0, k)}
for name, template in places.items():
    for seed in SEEDS:
        torch.manual_seed(seed)
        tuned = copy.deepcopy(model)
        PTuning(template=template, encoder="table").attach(tuned)
        result = train(
            tuned,
            [encoded(template, x, x.label) for x in task.train()],
            TrainingConfig(
                steps=kit.steps(160), eval_every=40, seed=seed, device="cpu"
            ),
            evaluate=lambda m, t=template: nats(m, t),
            show=False,
        )
        curve = [(step, v["value"]) for step, v in result.evaluations]
        curves[f"{name}, draw {seed}"] = curve
last = torch.tensor([c[-1][1] for c in curves.values()]).view(3, 2)
for name, row in zip(places, last.tolist()):
    print(f"{name:9}", "and".join(f" {value:.2f} " for value in row), "nats")
gaps = (last[:, 0] - last[:, 1]).abs()
print(f"two draws at one place differ by up to {gaps.max():.2f}")
apart = last.mean(1).max() - last.mean(1).min()
print(f"the means of two places differ by up to {apart:.2f}")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {
        "a coin toss": torch.log(torch.tensor(2.0)).item(),
        "floor": best["floor"],
    },
    "Four learned words, at three places",
    "nats an answer",
)

# %% [markdown]
# *In words:* six curves, two for each place, start above a coin toss and end
# far apart, some near the coin toss and some well below it; the two of one
# place do not end together.
#
# **That is the picture of this chapter.** Look at one draw alone, and a story
# suggests itself: in front a row is read by every word of the text, behind it
# can read every word, and surely one of these must be better. Look at the
# other draw, and the story wavers. Two draws at one place lie further apart
# than two places do. So this experiment decides nothing about places, and it
# says something that matters more: a few random rows, far from any word, are a
# lottery ticket. That is why the authors added an encoder, which is meant to
# make learning steadier, why starting from the rows of words is popular
# (chapter 06), and why a curve without a second seed is an anecdote.

# %% [markdown]
# ## P-tuning v2: deep, with a classifier
#
# Words for labels are a detour when the task is to tell two classes apart.
# Version 2 puts learned rows in *every* layer, as prefix tuning without its
# network does, and reads the class off the last token with a new head:
#
# $$\text{head}(x) = \text{attn}(q, [P_k; K], [P_v; V])
#   \qquad \text{(P-tuning v2 1)}$$
#
# $$y = W_c\, x_{\text{last}} + b_c \qquad \text{(P-tuning v2 2)}$$

# %%
kit.code(getsource(PTuningV2.install))
torch.manual_seed(0)
deep = copy.deepcopy(model)
PTuningV2(prompt_length=8).attach(deep, "prompts")
Head(num_labels=2).attach(deep, "mood")
train(
    deep,
    encode_all_for_head(task.train(), tokenizer, task.labels, False, deep),
    TrainingConfig(steps=kit.steps(120), device="cpu"),
    show=False,
)
right = head_accuracy(deep, test, tokenizer, task.labels)
print(f"trained: {report(deep).trained:,} = 2 x 8 x 4 x {D} + 2 x {D} + 2")
print(f"right: {right:.3f}, a perfect reader: {best['best']:.3f}")

# %% [markdown]
# ## What goes wrong
#
# A pseudo token has an id that the table of words does not know, so something
# must be looked up in its stead; here it is word 0, and the result is thrown
# away. Somebody adds where one must replace:

# %%
with kit.planted("p_tuning", "added, not replaced") as bug:
    broken = words_as_pseudo_tokens(bug)
    kit.holds("rows of words are these words", torch.equal(broken, read))
    print(f"logits differ by up to {(broken - read).abs().max():.2f}")

# %% [markdown]
# Every learned row now comes with word 0 added. Training makes up for it, so
# no loss curve shows the bug. It shows when the rows meet other code: in a
# file for another library, or as here, where we know what they must mean.
# One fact from outside, that rows of words are these words, tests more than
# any number of training runs.
#
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **08.1** Lay segments of text into a template of $k + 1$ counts: after
# segment $i$ come the pseudo tokens of place $i + 1$. Those of place 0 are
# numbered first, but left out.


# %%
def answer(template, segments, vocab_size):
    """A list of ids."""
    return None  # your code


kit.check("08.1", answer)

# %% [markdown]
# **08.2** Labels for a row of ids: each position's label is the next id; the
# last position has none, and no label may ask for a pseudo token. None is
# written as -100.


# %%
def answer(ids, vocab_size):
    """A list as long as ids."""
    return None  # your code


kit.check("08.2", answer)

# %% [markdown]
# **08.3** How many numbers has an LSTM in both directions with `layers`
# layers, rows of width D and hidden width h? Each direction of a layer has
# four gates, each with two matrices and two biases.


# %%
def answer(D, h, layers):
    """An integer."""
    return None  # your code


kit.check("08.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=PTuning((0, k, 0), "table").count(config))

# %% [markdown]
# ## Where to go next
#
# - The files: `minipeft/soft_prompt/p_tuning.py` and
#   `minipeft/soft_prompt/p_tuning_v2.py`, which also trains several tasks
#   together.
# - The papers: Liu et al. 2021, *GPT Understands, Too*, arXiv 2103.10385;
#   Liu et al. 2021, *P-Tuning v2*, arXiv 2110.07602.
# - Next: chapter 09 leaves the input alone and changes the weights (LoRA).
