# %% [markdown]
# # 00. Start here: one model, twenty ways to change it
#
# **The question.** A language model has millions of parameters or billions.
# You have one graphics card, or none. Which part of the model do you train,
# and what do you lose by not training the rest? There are more than twenty
# published answers. What are they, how are they related, and how do you find
# your way through this repository?
#
# After this chapter you have written a text with the model, changed it and
# changed it back, seen on one picture where every technique acts, learned to
# read a technique's file, and you know what your machine can do. Reading and
# running: about 20 minutes. It ends with a glossary in English and Chinese.

# %%
import re
import sys
from inspect import getdoc, getsource

import minipeft
import torch
from minipeft import LoRA, QLoRA, generate
from minipeft.doctor import doctor
from minipeft.low_rank import lora
from minipeft.presets import PRESETS
from minipeft.wrap import Wrapper, resolve
from rich.console import Console

import kit

# %% [markdown]
# ## First success
#
# The *base* is a small GPT. It grew up in Tiny Town, a world with a few
# dozen people, ten trades, good days and bad days. Let it tell a story.

# %%
model, tokenizer = kit.base()
prompt = torch.tensor([[tokenizer.eot, *tokenizer.encode("The sky")]])
for seed in range(3):
    ids = generate(
        model, prompt, max_new_tokens=40, stop_token=tokenizer.eot, seed=seed
    )
    print(tokenizer.decode([i for i in ids[0].tolist() if i != tokenizer.eot]))

# %% [markdown]
# Everything in these chapters happens to this model. It has the parts of
# GPT-2 at a size at which a training run takes seconds:

# %%
config = model.config
print(config)
sizes = {
    "embeddings": sum(p.numel() for p in model.embed.parameters()),
    "blocks": sum(p.numel() for p in model.blocks.parameters()),
    "last LayerNorm": sum(p.numel() for p in model.ln_f.parameters()),
}
for name, size in sizes.items():
    print(f"{name:15} {size:8,} parameters")
print(f"{'in all':15} {sum(sizes.values()):8,} parameters")

# %% [markdown]
# ## Change it, and change it back
#
# A technique is a small object with hyperparameters. `attach` puts it on a
# model and freezes everything else; `detach` takes it off. Two promises hold
# for (almost) all of them: right after `attach` the model computes *exactly*
# what it did before, and after `detach` it does again, whatever happened in
# between.

# %%
ids = generate(model, prompt, max_new_tokens=20, temperature=0)
before = model(ids)

LoRA(rank=8, alpha=16).attach(model)
print("after attach, every bit the same: ", model(ids).equal(before))

kit.learn(model, tokenizer, "dialect", 5)
print("after five steps, still the same: ", model(ids).equal(before))
with minipeft.disabled(model):
    print("switched off, the same again:     ", model(ids).equal(before))

minipeft.detach(model)
print("after detach, every bit the same: ", model(ids).equal(before))

# %% [markdown]
# ## The family, drawn
#
# All techniques act at a few places of the transformer. He and colleagues
# saw in 2022 that this is what relates them: not their names, but *where*
# they touch the computation and *how*. We do not have to believe a drawing
# in a paper. Attach each technique, ask what it touched, and draw that.

# %%
PLACES = {  # the last part of a path -> a column, in the order of computation
    "embed": "embed",
    "ln_1": "norm 1",
    "q": "q",
    "k": "k",
    "v": "v",
    "core": "core",
    "o": "o",
    "attn": "attention",
    "ln_2": "norm 2",
    "up": "up",
    "down": "down",
    "mlp": "feed-fwd",
    "ln_f": "last norm",
    "head": "head",
}


def place_of(path):
    """The column that a path like blocks.3.attn.q.bias belongs to."""
    if path.startswith("embed"):
        return "embed"
    parts = [p for p in path.split(".") if p not in ("weight", "bias")]
    return PLACES.get(parts[-1])  # None: the block as a whole


def touched(technique):
    """{column: "adds" or "trains"}, the folder, the trained parameters."""
    model = kit.base()[0]
    technique.attach(model)
    found = {}
    for attachment in model.attachments:
        for swap in attachment.swaps:
            adds = isinstance(swap.replacement, Wrapper)
            found[place_of(swap.path)] = "adds" if adds else "trains"
    found.pop(None, None)
    folder = type(technique).__module__.split(".")[1]
    return found, folder, minipeft.report(model).trained


family = {name: touched(p.technique) for name, p in PRESETS.items()}
family["QLoRA"] = touched(QLoRA(rank=8))
order = [
    "selective",
    "additive",
    "soft_prompt",
    "low_rank",
    "hybrid",
    "quantized",
]
names = sorted(family, key=lambda n: order.index(family[n][1]))
columns = list(PLACES.values())

# %%
figure, axis = kit.canvas(9.6, 7.4)
axis.grid(False)
axis.spines[["left", "bottom"]].set_visible(False)
for row, name in enumerate(names):
    places, folder, count = family[name]
    colour = kit.COLOURS[order.index(folder) % 5]
    axis.axhline(row, color="#eeeeee", linewidth=0.8, zorder=0)
    for place, how in places.items():
        marker = {"adds": "o", "trains": "s"}[how]
        fill = colour if how == "adds" else "white"
        x = columns.index(place)
        axis.plot(
            x,
            row,
            marker,
            color=colour,
            markerfacecolor=fill,
            markersize=8,
            markeredgewidth=1.6,
        )
    axis.text(
        len(columns) + 0.9, row, f"{count:,}", ha="right", va="center", size=9
    )
for folder in order:
    rows = [n for n, name in enumerate(names) if family[name][1] == folder]
    colour = kit.COLOURS[order.index(folder) % 5]
    middle = (rows[0] + rows[-1]) / 2
    axis.text(-4.2, middle, folder, color=colour, ha="right", va="center")
    axis.axhline(rows[-1] + 0.5, color="#999999", linewidth=0.6)
axis.text(len(columns) + 0.9, -1, "trained", ha="right", va="center", size=9)
axis.set_xticks(range(len(columns)), columns, rotation=45, size=9)
for name in axis.get_xticklabels():
    name.set(ha="left", rotation_mode="anchor")
axis.set_yticks(range(len(names)), names, size=9)
axis.xaxis.tick_top()
axis.tick_params(length=0)
axis.set(xlim=(-0.7, len(columns) + 1), ylim=(len(names) - 0.4, -1.5))
axis.set_title(
    "Where each technique acts     ● adds a module     □ trains what is there",
    loc="left",
    fontsize=11,
    pad=14,
)
told = "; ".join(
    f"{name} ({family[name][1]}) at {', '.join(family[name][0])}"
    for name in names
)
kit.show(figure, f"Where each technique acts. {told}.")

# %% [markdown]
# *In words:* a table of dots, one row a technique and one column a place in
# the transformer; selective techniques have hollow squares in many columns
# (diff pruning dots, for its change is a parameter of its own), soft prompts
# have dots only at the embedding or the attention core, LoRA and its kin only
# at projections, hybrids in three or more columns.
#
# Read it by rows and you have the taxonomy, which is also the folder tree:
#
# | folder | idea | chapters |
# |---|---|---|
# | `selective/` | train some of what is there | 03, 04, 14 |
# | `additive/` | add small modules | 05, 11 |
# | `soft_prompt/` | add tokens that are no words | 06, 07, 08 |
# | `low_rank/` | learn the change as a product of thin matrices | 09, 10, 13 |
# | `hybrid/` | combine them | 12 |
# | `quantized/` | store the base in fewer bits | 15, 16, 17 |
# | `compressed/` | make the model itself smaller | 18, 19 |
#
# Read it by columns and you see He's point: a prefix and an adapter on
# attention are neighbours, whatever their papers call them.
#
# ## How to read a file
#
# Every technique is one file of about 150 lines, and every file begins the
# same way: what it does in one sentence, the equations with their ids, the
# count, the start, what it reduces to, how the big libraries differ, and
# what goes wrong. Here is the beginning of LoRA's:

# %%
print(getdoc(lora).split("Reduces to")[0])

# %% [markdown]
# An id such as `(LoRA 3)` is a thread to pull. The line of code that
# computes the equation carries it, and so does a test that checks it:


# %%
def where(equation):
    """Print the lines of code and of tests that carry an equation's id."""
    for name in ("minipeft/low_rank/lora.py", "tests/test_lora.py"):
        text = kit.ROOT.joinpath(name).read_text(encoding="utf-8")
        print(name)
        for line in text.splitlines():
            if equation in line:
                print("   ", line.strip())


where("(LoRA 3)")

# %% [markdown]
# All techniques use one mechanism, and it is short: put a module around a
# module. A path such as `blocks.0.attn.q` always names the same place,
# however many wrappers stand there.

# %%
kit.code(getsource(Wrapper.__init__), getsource(Wrapper.forward))

query = resolve(model, "blocks.0.attn.q")
print("\nbefore:", type(query).__name__)
LoRA().attach(model)
wrapped = resolve(model, "blocks.0.attn.q")
print(
    "after: ", type(wrapped).__name__, "around", type(wrapped.inner).__name__
)
minipeft.detach(model)
print("inside is the very same object:", wrapped.inner is query)

# %% [markdown]
# ## What this machine can do
#
# `minipeft doctor` examines it: versions, a numeric self-test for each
# device, whether kernels can run, and how many training steps a second.
# Everything in the chapters runs on one core of an ordinary processor.

# %% tags=["timing"]
plain = {"force_jupyter": False, "force_terminal": False}
healthy = doctor(Console(file=sys.stdout, width=79, **plain))
print("\nall self-tests right:", healthy)

# %% [markdown]
# ## Four ways on
#
# | you are | begin with | first success |
# |---|---|---|
# | a student | chapter 01, then in order | this page, run |
# | doing an assignment | `minipeft lab list` | `minipeft lab make lora` |
# | a teacher | the pages in `minipeft/labs/` | `minipeft lab grade` |
# | an engineer | `minipeft/low_rank/lora.py` | chapter 22, your own GPT-2 |
#
# - **A student** reads a chapter, runs it, and does its exercises; the cell
#   says whether they are right. `python chapters/build.py` runs them all,
#   and any `.py` here runs alone.
# - **For an assignment**, make a lab, fill in the functions it blanked, and
#   `minipeft lab check`. When a test fails, `minipeft lab hint` says which
#   idea to look at again, and never the answer.
# - **A teacher** finds rubric, time and common mistakes on the instructor's
#   page, and grades a folder of submissions with one command.
# - **An engineer** reads the file of the technique in question, checks their
#   own code against its equations and tests, and opens what was trained here
#   in `transformers` and `peft`, or the other way round.
#
# ## Exercises
#
# **00.1** Write the path of the value projection in the last block.

# %%
answer = None  # your answer, a string

kit.check("00.1", answer)

# %% [markdown]
# **00.2** Which of the techniques in the picture trains the fewest numbers?
# Let the program find it.


# %%
def answer(family):
    """The name; family: {name: (places, folder, trained parameters)}."""
    return None  # your code


kit.check("00.2", answer)

# %% [markdown]
# **00.3** Pull a thread: collect all equation ids of a text, like
# `(LoRA 1)` or `(P-tuning 2)`: a word that begins with a capital and may
# hold hyphens, a blank, a number, all in round brackets.


# %%
def answer(text):
    """The ids in `text` without brackets, each once, sorted."""
    return None  # your code; `re` is imported


kit.check("00.3", answer)
print("in LoRA's header:", len(set(re.findall(r"\(LoRA \d\)", getdoc(lora)))))

# %% [markdown]
# ## What it cost

# %% tags=["timing"]
kit.cost()

# %% [markdown]
# **Where to go next.** Chapter 01 builds the model from nothing; chapter 02
# shows the world it lives in and why we can know the best possible loss.
# The unified view is He et al. 2022, arXiv 2110.04366. If you only have an
# hour: 02, 09, 16, 21.
#
# ## Glossary 术语表
#
# **The model 模型**
#
# | term | 中文 | meaning |
# |---|---|---|
# | activation | 激活值 | what a layer gives for one input |
# | activation function | 激活函数 | a bend between two linear maps: GELU, ReLU |
# | attention | 注意力 | each token mixes what it finds at earlier ones |
# | attention core | 注意力核心 | softmax(QKᵀ/√d)V, no parameters |
# | attention head | 注意力头 | one of several attentions side by side |
# | autoregressive | 自回归 | writes one token after the other |
# | bias | 偏置 | the constant that a layer adds |
# | block, layer | 块，层 | attention, then feed-forward; repeated |
# | byte-pair encoding | 字节对编码 | the tokenizer's merges of frequent pairs |
# | causal mask | 因果掩码 | hides the future from a token |
# | context length | 上下文长度 | how many positions there are |
# | embedding | 嵌入 | a token's or a position's vector |
# | end-of-text token | 文本结束符 | stands at both ends of a document |
# | feed-forward, MLP | 前馈网络 | up, bend, down; for each token alone |
# | head (output) | 输出头 | from the last vector to logits |
# | hidden state | 隐藏状态 | the vector of a token between two layers |
# | key-value cache | 键值缓存 | keys and values kept while decoding |
# | language model | 语言模型 | gives the next token a probability |
# | LayerNorm | 层归一化 | shifts and scales a vector to a standard size |
# | logit | 对数几率 | a score before the softmax |
# | parameter, weight | 参数，权重 | a number that is learned |
# | projection | 投影 | a linear layer: q, k, v, o, up, down |
# | query, key, value | 查询，键，值 | what attention compares and mixes |
# | residual stream | 残差流 | the sum that all sub-layers add to |
# | token, tokenizer | 词元，分词器 | a piece of text; what cuts text |
# | transformer | Transformer 架构 | embedding, blocks, head |
# | vocabulary | 词表 | all tokens there are |
# | weight tying | 权重绑定 | head and embedding share a matrix |
#
# **Training and decoding 训练与解码**
#
# | term | 中文 | meaning |
# |---|---|---|
# | AdamW | AdamW 优化器 | steps scaled by averages of the gradient |
# | batch | 批次 | examples that share a step |
# | beam search | 束搜索 | keeps the few likeliest texts |
# | cross-entropy | 交叉熵 | mean of −ln p of the right token |
# | dropout | 随机失活 | random zeros, in training only |
# | evaluation | 评估 | a score on held-out examples |
# | fine-tuning | 微调 | training on, for a task |
# | gradient | 梯度 | how the loss changes with a parameter |
# | gradient accumulation | 梯度累积 | a batch in several pieces |
# | gradient checkpointing | 梯度检查点 | compute again instead of keeping |
# | gradient clipping | 梯度裁剪 | shorten a gradient that is too long |
# | greedy decoding | 贪心解码 | always the likeliest token |
# | label, target | 标签，目标 | the token that should come |
# | learning rate, warm-up | 学习率，预热 | step size; its rise at the start |
# | loss | 损失 | what training makes small |
# | mixed precision | 混合精度 | fewer bits where they do no harm |
# | nat | 奈特 | the unit of −ln p; 1 nat = 1.44 bits |
# | optimizer state | 优化器状态 | AdamW's two averages a parameter |
# | overfitting | 过拟合 | better on the examples, worse elsewhere |
# | pre-training | 预训练 | the long first training |
# | sampling, temperature | 采样，温度 | draw by probability; flatten it |
# | seed | 随机种子 | the number that fixes all that is random |
# | teacher forcing | 教师强制 | the right past is given at each token |
# | weight decay | 权重衰减 | pull of weights towards zero |
#
# **Adapting 适配**
#
# | term | 中文 | meaning |
# |---|---|---|
# | base | 基座模型 | the model that is adapted |
# | bottleneck | 瓶颈 | a narrow layer in the middle |
# | catastrophic forgetting | 灾难性遗忘 | new learned, old lost |
# | delta | 增量 | the change of a weight |
# | domain shift | 领域偏移 | the same task, other statistics |
# | freeze | 冻结 | do not train |
# | gate | 门控 | a number that opens or shuts a path |
# | in-context learning | 上下文学习 | examples in the prompt, no training |
# | merge | 合并 | fold a technique into the weights |
# | no-op | 空操作 | changes nothing, as at the start |
# | orthogonality | 正交性 | directions that share nothing |
# | parameter-efficient | 参数高效 | few trained numbers (PEFT) |
# | prompt: hard, soft | 硬提示，软提示 | words; learned vectors |
# | rank, low rank | 秩，低秩 | independent directions of a matrix |
# | reparameterisation | 重参数化 | other numbers for the same thing |
# | scale α/r | 缩放系数 | how strongly LoRA's branch counts |
# | singular value | 奇异值 | the weight of one direction |
# | sparsity | 稀疏性 | the share that is zero |
# | task | 任务 | what the model is adapted to |
# | tensor decomposition | 张量分解 | CP: a sum of outer products |
# | transfer learning | 迁移学习 | keep the bottom, train the top |
# | unified view | 统一视角 | techniques by place and form |
# | virtual token | 虚拟词元 | a position with no word |
# | wrapper | 包装模块 | a module around a module |
#
# **The techniques 各种方法**
#
# | term | 中文 | name in `minipeft` |
# |---|---|---|
# | full fine-tuning | 全量微调 | `FullFineTuning` |
# | top layers | 顶层微调 | `TopLayers` |
# | BitFit | 仅调偏置 | `BitFit` |
# | LayerNorm tuning | 层归一化微调 | `LayerNormTuning` |
# | diff pruning | 差分剪枝 | `DiffPruning` |
# | adapter | 适配器 | `Adapter` |
# | AdapterFusion | 适配器融合 | `AdapterFusion` |
# | AdapterDrop | 适配器丢弃 | `AdapterDrop` |
# | LLaMA-Adapter | LLaMA 适配器 | `LLaMAAdapter` |
# | IA3 | 激活值缩放（抑制与放大） | `IA3` |
# | prompt tuning | 提示微调 | `PromptTuning` |
# | P-tuning | P-tuning 提示编码 | `PTuning` |
# | P-tuning v2 | 深层提示微调 | `PTuningV2` |
# | prefix tuning | 前缀微调 | `PrefixTuning` |
# | LoRA | 低秩适配 | `LoRA` |
# | AdaLoRA | 自适应秩分配 | `AdaLoRA` |
# | Aurora, mode approximation | 模式近似 | `ModeApproximation` |
# | MAM adapter | 混合搭配适配器 | `MAMAdapter` |
# | UniPELT | 统一门控框架 | `UniPELT` |
# | QLoRA | 量化低秩适配 | `QLoRA` |
# | quantisation-aware training | 量化感知训练 | `QAT` |
# | classification head | 分类头 | `Head` |
#
# **Fewer bits, smaller models 量化与压缩**
#
# | term | 中文 | meaning |
# |---|---|---|
# | absmax | 绝对最大值 | the largest size in a block |
# | block (of weights) | 分块 | weights that share a constant |
# | calibration | 校准 | a little data to choose roundings by |
# | codebook | 码本 | the values that codes stand for |
# | dequantise | 反量化 | from codes back to numbers |
# | distillation | 知识蒸馏 | a student learns from a teacher |
# | double quantisation | 双重量化 | the constants quantised, too |
# | GGUF, ggml | GGUF 格式 | llama.cpp's files and number formats |
# | GPTQ | GPTQ 量化 | errors repaired column by column |
# | Hessian | 海森矩阵 | curvature: which errors hurt |
# | importance | 重要性 | what is lost without a weight |
# | int8, outlier | 8 位整数，离群值 | a byte a weight; huge columns |
# | Kullback-Leibler | KL 散度 | distance of two distributions |
# | lottery ticket | 彩票假设 | a sparse net that trains alone |
# | magnitude pruning | 幅值剪枝 | the smallest weights go |
# | mask | 掩码 | which entries count |
# | NF4 | 4 位正态浮点 | sixteen levels, normal quantiles |
# | nibble | 半字节 | four bits |
# | page, page fault | 页，缺页 | a piece of memory; it was not there |
# | paged optimizer | 分页优化器 | state that comes when needed |
# | post-training quantisation | 训练后量化 | round, do not train |
# | pruning | 剪枝 | taking weights out |
# | rewinding | 权重回退 | back to the early weights |
# | semi-structured, 2:4 | 半结构化稀疏 | two of every four are zero |
# | soft labels | 软标签 | a teacher's probabilities |
# | SparseGPT, Wanda | SparseGPT，Wanda | pruning by activations |
# | straight-through | 直通估计 | a gradient through rounding |
# | structured pruning | 结构化剪枝 | whole heads and neurons go |
# | teacher, student | 教师，学生模型 | the large model; the small one |
#
# **Speed 速度**
#
# | term | 中文 | meaning |
# |---|---|---|
# | bandwidth | 带宽 | bytes a second from memory |
# | fast path, twin | 快速路径，孪生实现 | the same, faster |
# | fused | 融合 | several steps in one kernel |
# | interpreter | 解释器 | runs a kernel without a GPU |
# | kernel | 核函数 | a program for a graphics card |
# | tile | 分块 | the part a kernel holds at once |
# | Triton | Triton 语言 | kernels written in Python |
#
# **Proof and world 验证与世界**
#
# | term | 中文 | meaning |
# |---|---|---|
# | ablation | 消融实验 | leave one part out and look |
# | Bayes optimum | 贝叶斯最优 | the best any reader can do |
# | bitwise equal | 逐位相等 | the same in every bit |
# | contract | 契约 | what every technique must satisfy |
# | deterministic | 确定性 | same seed, same bits |
# | fingerprint | 指纹 | the hash of a base; the set that fails |
# | floor | 损失下限 | the best possible loss |
# | invariant | 不变量 | what must hold whatever happens |
# | locality | 局部性 | what was not asked for stays |
# | mutant | 变异体 | a bug that was planted |
# | parity | 对齐验证 | equal to the library people use |
# | posterior | 后验概率 | probability after reading |
# | reduction | 归约 | one technique as a case of another |
