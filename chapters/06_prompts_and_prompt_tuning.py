# %% [markdown]
# # 06. Prompts and prompt tuning
#
# A language model does what the text before it asks for. **How far do words
# alone get us, and what does it buy to replace them by vectors that no
# dictionary holds?** No weight of the model is touched in this chapter. First
# we look for good words, then we learn the words.
#
# Afterwards you can score a template exactly, say why solved examples in the
# context help one model and not another, build a soft prompt by hand, and name
# the mistakes that make one fail. About 20 minutes. The files are
# `minipeft/soft_prompt/hard_prompt.py` and
# `minipeft/soft_prompt/prompt_tuning.py`; the papers are Brown et al., 2020
# (arXiv 2005.14165) and Lester et al., 2021 (arXiv 2104.08691).

# %%
import copy
from inspect import getsource

import torch
from minipeft import GPT, GPTConfig, PromptTuning, figures, report, town, wrap
from minipeft.dataset import encode_all
from minipeft.soft_prompt import hard_prompt, prompt_tuning
from minipeft.soft_prompt.hard_prompt import HardPrompt
from minipeft.training import TrainingConfig, train

import kit

model, tokenizer = kit.base()
task = town.TASKS["mood"]
print(task.test()[1].prompt)
print("->", task.test()[1].completion)

# %% [markdown]
# That is the task: read a story, answer a question about its mood. The moods
# are hidden, so even a perfect reader errs now and then, and Tiny Town knows
# how often.
#
# ## The equations
#
# A **hard prompt** is a template around the text $x$, with solved examples in
# front. The answer is the one that the model finds likeliest:
#
# $$c(x) = [\text{demo}_1; s; \ldots; \text{demo}_k; s; a; x; b], \quad
# \text{demo}_i = [a; x_i; b; y_i] \qquad \text{(Hard prompt 1)}$$
#
# $$s_y(x) = \sum_t \log p(y_t \mid c(x), y_0 \ldots y_{t-1})
# \qquad \text{(Hard prompt 2)}$$
#
# $a$ and $b$ are the words before and after the text, $s$ ends an example,
# $k$ is the number of *shots*. A **soft prompt** leaves the dictionary. Its
# $p$ rows $P$ are trained, in front of the embedded text:
#
# $$x_0 = [P + \mathrm{pos}(0 .. p-1);\; E[\mathrm{ids}] +
# \mathrm{pos}(p .. p+T-1)] \qquad \text{(Prompt 1)}$$
#
# $P \in \mathbb{R}^{p \times D}$; $E$ is the table of embeddings and
# $\mathrm{pos}$ that of positions, both frozen. The text moves up by $p$
# places to make room.

# %% [markdown]
# ## One virtual word by hand
#
# Width $D = 2$, a text of two words, a prompt of one row. Three sums are all
# there is to it. The third row shows the move: the text's second word has
# position 2, not 1.

# %%
E = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 3.0]])  # three words
pos = torch.tensor([[0.1, 0.0], [0.2, 0.0], [0.3, 0.0], [0.4, 0.0]])
P = torch.tensor([[5.0, -5.0]])  # the virtual word
ids = [2, 0]  # the text

by_hand = [
    [5.0 + 0.1, -5.0 + 0.0],  # P[0] + pos(0)
    [3.0 + 0.2, 3.0 + 0.0],  # E[2] + pos(1)
    [1.0 + 0.3, 0.0 + 0.0],  # E[0] + pos(2)
]

tiny = GPT(GPTConfig(vocab_size=3, context_length=4, n_head=1, d_model=2))
with torch.no_grad():
    tiny.embed.token.weight.copy_(E)
    tiny.embed.position.weight.copy_(pos)
    PromptTuning(prompt_length=1).attach(tiny)
    wrap.resolve(tiny, "embed").prompt.weight.copy_(P)
    x_0 = tiny.embed(torch.tensor([ids]))[0]
print(x_0)
kit.holds("(Prompt 1) by hand", torch.equal(x_0, torch.tensor(by_hand)))

# %% [markdown]
# The library does no more than this. `rows` makes the first part of
# (Prompt 1), `put_in_front` joins the two, and `shift` is the move:

# %%
kit.code(
    getsource(prompt_tuning.put_in_front),
    getsource(prompt_tuning.PromptEmbedding),
)

# %% [markdown]
# ## First, words
#
# We ask for the mood in several ways, and let the model choose between two
# answers. `score` computes (Hard prompt 2) for both and compares. *Nats* is
# the mean of $-\log$ of the right answer's share: 0.69 is a coin toss.

# %%
QUESTION = town.tasks.MOOD_QUESTION


def solved(examples, answers=None):
    """Stories and answers as ids; `answers` maps yes and no to words."""
    found = []
    for x in examples:
        story = tokenizer.encode(x.prompt.removesuffix(QUESTION))
        answer = answers[x.label] if answers else x.completion
        found.append(
            hard_prompt.Example(tuple(story), tuple(tokenizer.encode(answer)))
        )
    return found


def ask(model, words, examples, answers=None, shots=0, seed=0):
    """Scored: the words put after the story, `shots` examples in front."""
    words = tuple(tokenizer.encode(words))
    rows, shown = solved(examples, answers), ()
    if shots:  # short ones, so that two fit the context
        pool = [x for x in task.train() if len(x.prompt.split()) < 24]
        pool = solved(pool, answers)
        shown = hard_prompt.demonstrations_from(pool, shots, seed)
    before = () if shots else (tokenizer.eot,)
    template = HardPrompt(before, words, (tokenizer.eot,) if shots else ())
    choices = sorted({x.answer for x in solved(task.train()[:50], answers)})
    return hard_prompt.score(model, template, rows, choices, shown)


test = kit.some(task.test()[:200])
MOODS = {"yes": " good", "no": " bad"}
asked = {
    "the question, no example": ask(model, QUESTION, test),
    "the question, 1 example": ask(model, QUESTION, test, shots=1),
    "the question, 2 examples": ask(model, QUESTION, test, shots=2),
    "She felt ...": ask(model, " She felt", test, MOODS),
    "It was a ...": ask(model, " It was a", test, MOODS),
}
floor = task.optimum(test)
kit.table(
    ["what stands after the story", "nats", "right"],
    [[n, f"{s.loss:.3f}", f"{s.accuracy:.3f}"] for n, s in asked.items()]
    + [["best possible", f"{floor['floor']:.3f}", f"{floor['best']:.3f}"]],
)

# %% [markdown]
# The same frozen model, the same stories. Asked with a question it never met
# it guesses, and examples in the context do not help: learning from context is
# itself a skill, and nothing in this base's schooling taught it. Asked in the
# words of its schooling, "It was a ...", it answers nearly as well as anybody
# could. **The knowledge was there; the words were wrong.** That is the whole
# promise of prompting, and its trouble: somebody has to find the words.

# %% [markdown]
# ## Then, vectors
#
# Is a soft prompt a no-op at the start? No, and it cannot be: something stands
# in front of the text from the first step on. But it is never more than text.
# A soft prompt made of the rows of real words *is* the base that reads those
# words first, to the last bit. A random prompt is a change that no text makes.

# %%
story = tokenizer.encode(task.test()[1].prompt)
words = tokenizer.encode(" The sky was kind .")
with torch.no_grad():
    read = model(torch.tensor([words + story]))[:, len(words) :]
    alone = model(torch.tensor([story]))

    def with_prompt(**settings):
        torch.manual_seed(0)
        twin = copy.deepcopy(model)
        PromptTuning(prompt_length=len(words), **settings).attach(twin)
        return twin(torch.tensor([story]))

    from_text = with_prompt(init="text", text=tuple(words))
    random = with_prompt(init="random")

kit.holds("a prompt of words is reading them", torch.equal(from_text, read))
kit.holds("a random prompt is a change", not torch.equal(random, alone))
print(f"largest change of a logit by it: {(random - alone).abs().max():.2f}")

# %% [markdown]
# ## The count
#
# Only $P$ is trained, so the count is $p D$ and nothing else. Here is the
# formula against what `report` finds on the model.

# %%
D = model.config.d_model
rows = []
for p in (1, 4, 16):
    twin = PromptTuning(prompt_length=p).attach(copy.deepcopy(model))
    measured = report(twin).trained
    rows.append([p, f"{p} x {D} = {p * D:,}", f"{measured:,}"])
kit.table(["p", "formula p D", "measured"], rows)

# %% [markdown]
# ## Training against the floor
#
# Two prompts, of one row and of sixteen, learn to answer the *wrong* question
# rightly, the one on which the base was guessing. They start from rows of
# words. The learning rate is 0.1, a hundred times what full fine-tuning takes:
# only the input moves, and it has to move far. The words are drawn from those
# of the task: the dictionary also holds pieces that no text of the town uses,
# and their rows were never trained.

# %%
data = encode_all(task.train(), tokenizer)
known = tuple(sorted({i for row in data for i in row.ids}))
curves = {}
for p in (1, 16):
    torch.manual_seed(0)
    technique = PromptTuning(prompt_length=p, words=known)
    soft = technique.attach(copy.deepcopy(model))
    config = TrainingConfig(steps=kit.steps(200), eval_every=40, device="cpu")
    result = train(
        soft,
        data,
        config,
        evaluate=lambda m: ask(m, QUESTION, test).loss,
        show=False,
    )
    name = f"soft prompt, p = {p}"
    curves[name] = [(s, v["value"]) for s, v in result.evaluations]
    print(f"{name}: {ask(soft, QUESTION, test).accuracy:.3f} right")

# %%
kit.picture(
    figures.learning_curves,
    curves,
    {
        "best possible": floor["floor"],
        'words: "It was a"': asked["It was a ..."].loss,
        "not adapted": asked["the question, no example"].loss,
    },
    "Mood: learned vectors against the best words",
    "nats an answer",
)

# %% [markdown]
# *In words:* both curves start at the line of the base that was not adapted or
# above it and fall, sixteen rows much further than one; the words "It was a"
# lie lower still, almost on the line of the best possible.
#
# A soft prompt can only say things. It finds a way to ask that no text has,
# and reaches far with 2,048 numbers, but what the frozen layers do not do for
# any input, no prompt gets.
#
# What *do* the learned rows say? For each we look up the nearest word of the
# dictionary. A cosine of 1 would be that word.

# %%
prompt = wrap.resolve(soft, "embed").prompt.weight.detach()
table = wrap.resolve(soft, "embed.token").weight.detach()
near = torch.nn.functional.cosine_similarity(
    prompt[:, None], table[None], dim=-1
)
best, which = near.max(1)
kit.table(
    ["row", "nearest word", "cosine", "length", "length of that word"],
    [
        [
            n,
            repr(tokenizer.decode([int(which[n])])),
            f"{best[n]:.2f}",
            f"{prompt[n].norm():.2f}",
            f"{table[which[n]].norm():.2f}",
        ]
        for n in range(4)
    ],
)

# %% [markdown]
# They are no words. They lie far outside the cloud of embeddings, in places
# where no text can be; reading them off as words explains nothing.
#
# ## What goes wrong
#
# The mistake everybody makes once: the prompt is put in front, but the text
# keeps its old positions, so two words now claim position 0. Training runs,
# the loss falls, nothing complains. The invariant from above finds it.

# %%
with kit.planted("prompt_tuning", "the text does not move") as bug:
    broken, _ = kit.base()
    bug.PromptTuning(len(words), init="text", text=tuple(words)).attach(broken)
    with torch.no_grad():
        seen = broken(torch.tensor([story]))
    kit.holds("a prompt of words is reading them", torch.equal(seen, read))
    print(f"largest difference of a logit: {(seen - read).abs().max():.2f}")

# %% [markdown]
# A prompt that begins as words must behave as those words; it does not,
# because the story stands on the same places as the prompt. Note what kind of
# test this is: it does not look at a loss, it compares with something that is
# known exactly. Real models show the same: a soft prompt trained under one
# convention of positions is noise under another.

# %% [markdown]
# ## Exercises
#
# Fill in the functions. The cell says what is missing, and never more.
#
# **06.1** What the first block reads: (Prompt 1), without any function of the
# library.


# %%
def first_layer_input(P, E, pos, ids):
    """(Prompt 1): P (p, D), tables E (V, D) and pos (C, D), ids (T,)
    int64 -> (p + T, D)."""
    return None  # your code


kit.check("06.1", first_layer_input)

# %% [markdown]
# **06.2** The score of an answer: (Hard prompt 2) from the logits of a row.


# %%
def answer_score(logits, ids, n):
    """(Hard prompt 2): logits (T, V) of a row of ids (T,) whose last n are
    the answer; logits[t] predicts ids[t + 1]. A scalar."""
    return None  # your code


kit.check("06.2", answer_score)

# %% [markdown]
# **06.3** Several prompts for one task can vote, at the price of one forward
# pass with a larger batch:
#
# $$\text{vote} = \arg\max_c \#\{m : \arg\max \text{logits}^m = c\}
# \qquad \text{(Prompt 2)}$$
#
# Ties go to the class with the larger sum of probabilities.


# %%
def vote(logits):
    """(Prompt 2): logits (N, B, C) of N prompts -> (B,) int64."""
    return None  # your code


kit.check("06.3", vote)

# %% [markdown]
# ## What it cost, and where to go

# %% tags=["timing"]
kit.cost(PromptTuning(prompt_length=16).count(model.config))

# %% [markdown]
# Prompts cost $D$ numbers a row and context besides. They serve best where one
# frozen model serves many tasks: a batch can hold a different prompt in every
# row. Next: [prefix tuning](07_prefix_tuning.ipynb), which speaks to every
# layer instead of the first; P-tuning in chapter 08 puts learned words in the
# middle. The code read here:
# [hard_prompt.py](../minipeft/soft_prompt/hard_prompt.py),
# [prompt_tuning.py](../minipeft/soft_prompt/prompt_tuning.py).
