# %% [markdown]
# # 22. From here to peft, transformers and a real GPT-2
#
# Everything so far ran in one small package. **What happens to it in the tools
# people use at work: does an adapter trained here open there, in every number,
# and does a real GPT-2 open here?** A format is a promise that two programs
# compute the same. This chapter checks the promise in both directions.
#
# Afterwards you can hand a model to `transformers` and an adapter to `peft`,
# take both back, say what is inside the two files of an adapter, and start on
# a real GPT-2 on your own machine. About 25 minutes. It needs `transformers`
# and `peft`, which come with this project's `test` extra.

# %%
import json
import logging
import os
import tempfile
import warnings
from inspect import getsource
from pathlib import Path

import torch

import kit

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is ever fetched here
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports
warnings.simplefilter("ignore")  # of libraries about their own futures

import minipeft
import peft
import transformers
from minipeft import GPT, GPTConfig, LoRA, figures
from minipeft.dataset import collate, encode_all
from minipeft.interop import hf_gpt2
from minipeft.interop import peft as peft_format
from minipeft.technique import attachment_of
from minipeft.town import TASKS, base_folder

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
temporary = tempfile.TemporaryDirectory()
folder = Path(temporary.name)

# %% [markdown]
# ## A model is a folder
#
# Our base lies in a folder in the layout of Hugging Face's GPT-2: two files,
# and the tokenizer's ranks beside them. `transformers` opens it as it would
# open any other, and gives the same logits: the same sums in another order, so
# equal to rounding, not to the bit.

# %%
model, tokenizer = kit.base()
there = transformers.GPT2LMHeadModel.from_pretrained(base_folder()).eval()
text = "Mira was in Alder at dawn ."
ids = torch.tensor([[tokenizer.eot, *tokenizer.encode(text)]])
with torch.no_grad():
    right = there(ids).logits
    gap = (model(ids) - right).abs().max().item()
print("files:", sorted(p.name for p in base_folder().iterdir()))
kit.holds("the same logits in transformers, within 1e-4", gap < 1e-4)

# %% [markdown]
# Two conventions stand between the two. There, $W_q$, $W_k$ and $W_v$ are one
# matrix, side by side; and every matrix is stored *transposed*, because
# GPT-2's authors wrote $xW$ where PyTorch's linear layers compute $xW^\top$.
# `pairs` says which of their tensors is which of ours.

# %%
kit.code(getsource(hf_gpt2.pairs), getsource(hf_gpt2.is_conv1d))

# %% [markdown]
# ## An adapter is two files
#
# One says what it is (`adapter_config.json`), the other holds the tensors. A
# LoRA on $q$ and $v$ is two adapters to us; but peft sees one joint
# projection. Two adapters of rank $r$ side by side are one of rank $2r$ in
# block form:
#
# $$A' = \begin{pmatrix} A_q \\ A_v \end{pmatrix} \qquad \text{(Peft 1)}$$
#
# $$B' = \begin{pmatrix} B_q & 0 \\ 0 & 0 \\ 0 & B_v \end{pmatrix}
# \qquad \text{(Peft 2)}$$
#
# $$\alpha' = \alpha\, r' / r \qquad \text{(Peft 3)}$$
#
# The rows of $k$, which has no adapter, are zeros, and $\alpha'$ keeps the
# scale. By hand, at width 1 and rank 1: $A_q = (2)$, $B_q = (3)$,
# $A_v = (5)$, $B_v = (7)$, scale 1, input $x = 10$. Apart, $q$ gains
# $3 \cdot 2 \cdot 10 = 60$ and $v$ gains $7 \cdot 5 \cdot 10 = 350$. Joint,
# $A' x = (20, 50)$ and $B' A' x = (60, 0, 350)$.


# %%
class Layer:
    """What `join` looks at of a LoRA layer."""

    def __init__(self, A, B):
        self.A, self.B = torch.tensor([[A]]), torch.tensor([[B]])
        self.scale = 1.0


A, B, _ = peft_format.join([Layer(2.0, 3.0), None, Layer(5.0, 7.0)], [1, 1, 1])
x = torch.tensor([10.0])
print("A'", A.tolist(), "  B'", B.tolist())
print("B' A' x =", (B @ A @ x).tolist(), " by hand [60, 0, 350]")
kit.code(getsource(peft_format.join))

# %% [markdown]
# ## A relay: half the training here, half in peft
#
# LoRA learns the dialect here for some steps. The adapter goes to peft, which
# trains on with an optimizer and a loop of its own. Then it comes back. If the
# promise holds, the curve has no step where the runners change.

# %%
N = 60
curve_here = kit.learn(
    LoRA(rank=8, targets=("q", "v")).attach(model),
    tokenizer,
    "dialect",
    N,
    points=3,
    score_on=200,
    schedule="constant",
    learning_rate=5e-3,
)
counted = minipeft.report(model).trained
minipeft.save_adapter(model, folder / "here")
config = json.loads((folder / "here" / "adapter_config.json").read_text())
kit.table(
    ["in adapter_config.json", "value"],
    [
        [name, config[name]]
        for name in ("peft_type", "r", "lora_alpha", "target_modules")
    ],
)
in_peft = peft.PeftModel.from_pretrained(
    there, folder / "here", is_trainable=True
)
with torch.no_grad():
    gap = (model(ids) - in_peft(ids).logits).abs().max().item()
kit.holds("the same logits in peft, within 1e-4", gap < 1e-4)
stored = sum(p.numel() for p in in_peft.parameters() if p.requires_grad)
D, L, r = model.config.d_model, model.config.n_layer, 8
print(f"here, L x 2 x r x 2 D = {L * 2 * r * 2 * D:,}; measured {counted:,}")
print(f"in peft, L x 2 r x (D + 3 D) = {L * 2 * r * 4 * D:,}; {stored:,}")

# %% [markdown]
# peft counts more, because it stores the zeros of $B'$, and when it trains on
# they need not stay zero: the joint adapter may do more than ours.


# %%
def score(logits_of):
    """Nats a document on the dialect's test set, any model."""
    total = 0.0
    for start in range(0, len(rows), 50):
        batch = collate(rows[start : start + 50], 0)
        with torch.no_grad():
            logits = logits_of(batch.ids).flatten(0, 1)
        total += torch.nn.functional.cross_entropy(
            logits, batch.labels.flatten(), ignore_index=-100, reduction="sum"
        ).item()
    return total / len(rows)


rows = encode_all(kit.some(TASKS["dialect"].test())[:200], tokenizer)
lesson = encode_all(TASKS["dialect"].train(1), tokenizer)
weights = [p for p in in_peft.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
done, steps = curve_here[-1][0], kit.steps(N)
curve_there = [(done, score(lambda ids: in_peft(ids).logits))]
for step in range(steps):
    batch = collate(lesson[16 * step : 16 * (step + 1)], 0)
    logits = in_peft(batch.ids).logits
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=-100
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if (step + 1) % max(1, steps // 3) == 0:
        value = score(lambda ids: in_peft(ids).logits)
        curve_there.append((done + step + 1, value))

in_peft.save_pretrained(folder / "there")
home = kit.base()[0]
minipeft.load_adapter(home, folder / "there")  # and says it trusts the base
with torch.no_grad():
    gap = (home(ids) - in_peft(ids).logits).abs().max().item()
kit.holds("back home: the same logits, within 1e-4", gap < 1e-4)
shared = [layer.A for layer in attachment_of(home).wrappers()]
kit.holds("q, k and v now share one A", shared[0] is shared[1] is shared[2])
print(f"nats here {curve_here[-1][1]:.4f}, in peft {curve_there[0][1]:.4f}")
print(f"at the end in peft {curve_there[-1][1]:.4f}, home {score(home):.4f}")

# %% [markdown]
# ## The picture: no step where the runners change

# %%
best = kit.optimum("dialect")
kit.picture(
    figures.learning_curves,
    {"here": curve_here, "in peft": curve_there},
    {"perfect, not adapted": best["unadapted"], "floor": best["floor"]},
    "One adapter, trained by two programs",
    "nats a document",
)

# %% [markdown]
# *In words:* the first curve falls steeply from the line of a perfect model
# that was not adapted; the second begins exactly where the first one ends and
# goes on down towards the floor.

# %% [markdown]
# ## A real GPT-2
#
# The smallest GPT-2 has 124 million parameters and a folder of the same
# layout: `config.json`, `model.safetensors`, `vocab.json`, `merges.txt`. Bring
# one from wherever you get models, and
#
# ```python
# model = GPT.from_pretrained("gpt2")
# tokenizer = Tokenizer.from_gpt2_folder("gpt2")
# ```
#
# Nothing is fetched here, so this cell makes a folder of that kind with
# `transformers` itself: the same architecture, fewer layers, random numbers.
# And it counts the real one without holding it, on PyTorch's `meta` device.

# %%
torch.manual_seed(0)
config = transformers.GPT2Config(
    vocab_size=1000, n_positions=64, n_embd=96, n_layer=3, n_head=4
)
foreign = transformers.GPT2LMHeadModel(config).eval()
foreign.save_pretrained(folder / "gpt2")
opened = GPT.from_pretrained(folder / "gpt2").eval()
numbers = torch.randint(1000, (2, 20))
with torch.no_grad():
    gap = (opened(numbers) - foreign(numbers).logits).abs().max().item()
kit.holds("their folder opens here with the same logits", gap < 1e-4)

real = GPTConfig(50257, 1024, n_layer=12, n_head=12, d_model=768)
with torch.device("meta"):
    small = GPT(real)
whole = sum(p.numel() for p in small.parameters())
V, C, D, L = 50257, 1024, 768, 12
formula = V * D + C * D + L * (12 * D**2 + 13 * D) + 2 * D
print(f"GPT-2 small: {whole:,} parameters, by formula {formula:,}")
for rank in (4, 8, 64):
    trained = LoRA(rank=rank).count(real)
    share = f"{trained / whole:.2%}"
    print(f"LoRA of rank {rank:2} on q and v: {trained:9,}, {share}")

# %% [markdown]
# ## What goes wrong: shapes fit, so all seems well
#
# The transposition again. Most matrices of GPT-2 are not square, and whoever
# forgets to transpose them gets an error. One is square in every block, the
# attention's output. It fits either way round. The model loads, and speaks;
# only its logits tell.

# %%
with kit.planted("hf_gpt2", "read without transposing what is square") as bug:
    wrong = bug.GPT.from_pretrained(base_folder()).eval()
    with torch.no_grad():
        logits = wrong(ids)
        gap = (logits - right).abs().max().item()
    kit.holds(f"the same logits (furthest {gap:.1f})", gap < 1e-4)
    finite = bool(logits.isfinite().all())
    kit.holds("every shape fits and every logit is a number", finite)
temporary.cleanup()

# %% [markdown]
# ## Exercises
#
# **22.1** GPT-2's `c_attn` as $W_q$, $W_k$ and $W_v$ of PyTorch's linear
# layers, from its weight of shape `(D, 3 D)`.


# %%
def answer(weight):
    """(W_q, W_k, W_v), each (D, D) as nn.Linear stores it."""
    return None  # your code


kit.check("22.1", answer)

# %% [markdown]
# **22.2** (Peft 1) and (Peft 2) for adapters on $q$, $k$ and $v$, all three.


# %%
def answer(adapters):
    """(A', B') from three pairs (A (r, D), B (D, r)); ranks may differ."""
    return None  # your code


kit.check("22.2", answer)

# %% [markdown]
# **22.3** How many parameters does a GPT-2 have? $d_\text{ff} = 4D$, the head
# is tied to the embedding.


# %%
def answer(V, C, D, L):
    """Vocabulary, context, width, layers -> parameters."""
    return None  # your code


kit.check("22.3", answer)

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost(trained=counted)

# %% [markdown]
# ## Where to go next
#
# - What opens where: `minipeft/interop/`, one file a format. AdaLoRA, IA3,
#   prompt and prefix tuning, P-tuning and LLaMA-Adapter travel to peft as LoRA
#   does; quantised weights go to bitsandbytes and to GGUF files.
# - The tests that hold both sides together: `tests/parity/`.
# - At work: a model of billions of weights, `QLoRA`-like settings in peft
#   (`BitsAndBytesConfig` and `LoraConfig`), and the numbers you now know how
#   to read. The survey of the field: Han et al. 2024, *Parameter-Efficient
#   Fine-Tuning for Large Models*, arXiv 2403.14608.
# - You have reached the end. Chapter 00 has four ways on.
