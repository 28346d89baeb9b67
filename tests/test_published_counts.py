"""Trained-parameter counts that papers and libraries print, recounted by our own modules.

data/published_counts.json has the rows. Here every row is counted again, never by the row's
formula: rows of GPT shape by attaching the technique on the meta device, the others from modules
made there with that model's widths. To add a row: an entry in RECOUNT, id -> function(row) -> int
(or, for soft prompts, in published_soft_prompts.py).
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import minipeft
from minipeft import (
    GPT,
    IA3,
    AdaLoRA,
    Adapter,
    AdapterFusion,
    BitFit,
    FullFineTuning,
    GPTConfig,
    LoRA,
    MAMAdapter,
    TopLayers,
)
from minipeft.additive.bottleneck import Bottleneck
from minipeft.additive.ia3 import IA3Linear
from minipeft.additive.llama_adapter import PromptedCore
from minipeft.gpt import Attention
from minipeft.low_rank.lora import LoRALinear
from minipeft.low_rank.mode_approximation import Factors
from minipeft.low_rank.triplets import AdaLoRALinear
from minipeft.technique import WHERE, trainable_parameters
from tests import published_soft_prompts

PUBLISHED = json.loads((Path(__file__).parents[1] / "data" / "published_counts.json").read_text())
ROWS = {row["id"]: row for row in PUBLISHED["entries"]}


# -- by attaching


def attached(row, *techniques, context=1024):
    """Trained numbers of the last technique on a GPT with the row's dimensions. Encoders with the
    same blocks (BERT, RoBERTa, DeBERTa) count alike where only blocks are adapted.
    """
    dims = row["dims"]
    model = bare(dims["V"], context, dims["L"], dims["H"], dims["d"], dims["dff"])
    with torch.device("meta"):
        for number, technique in enumerate(techniques):
            technique.attach(model, name=str(number))
    mine = {id(p) for p in model.attachments[-1].parameters().values()}
    count = sum(p.numel() for p in trainable_parameters(model) if id(p) in mine)
    minipeft.detach(model)
    return count


@functools.cache
def bare(*sizes):
    """A GPT on the meta device, made once for all rows of its shape."""
    with torch.device("meta"):
        return GPT(GPTConfig(*sizes))


def lora(row):
    given = row["hyperparams"]
    return attached(row, LoRA(rank=given["r"], targets=tuple(given["targets"].split(","))))


def lora_everywhere(row):
    every = ("q", "k", "v", "o", "up", "down")
    return attached(row, LoRA(rank=row["hyperparams"]["r"], targets=every))


def bottleneck_of(row):
    given = row["hyperparams"]
    if "reduction" in given:
        return row["dims"]["d"] // given["reduction"]
    return given.get("m") or given["r"]


def adapter(placement, own_norm=False):
    """Adapters alone: these rows leave the LayerNorms out."""

    def count(row):
        m = bottleneck_of(row)
        return attached(row, Adapter(placement, m, layer_norms=False, own_norm=own_norm))

    return count


def mam_of_the_library(row):
    """adapters' own: a prefix behind an MLP, and a parallel adapter."""
    given = row["hyperparams"]
    m, width = bottleneck_of(row), given["mid"]
    return attached(row, MAMAdapter(given["P"], m, prefix_bottleneck=width))


def mam_flat(row):
    given = row["hyperparams"]
    return attached(row, MAMAdapter(given["P"], given["m"], reparameterize=False))


def fusion(row):
    """Fusion trains its three matrices; the adapters below are frozen."""
    adapters = (Adapter("pfeiffer", 48), Adapter("pfeiffer", 48))
    return attached(row, *adapters, AdapterFusion(adapters=("0", "1")))


def bitfit_of_bert(row):
    """A GPT has a last LayerNorm where BERT has one after the embedding; BERT also has a pooler."""
    D = row["dims"]["d"]
    return attached(row, BitFit()) + nn.Linear(D, D, device="meta").bias.numel()


def adalora_of_peft(row):
    shared = {"targets": ("q", "k", "v"), "share_qkv": True}
    return attached(row, AdaLoRA(init_rank=row["hyperparams"]["r"], target_rank=8, **shared))


# -- from the dimensions


def linear(into, out, bias=False):
    return nn.Linear(into, out, bias, device="meta")


def own(*wrappers):
    """Numbers that wrappers add to what they wrap."""
    return sum(p.numel() for w in wrappers for _, p in w.own_parameters())


def of(*modules):
    return sum(p.numel() for m in modules for p in m.parameters())


def llama_projections(row):
    """name -> linear layer of a LLaMA block; keys and values may be narrower (dkv)."""
    D, W = row["dims"]["d"], row["dims"]["dff"]
    K = row["dims"].get("dkv", D)
    shapes = {"q": (D, D), "k": (D, K), "v": (D, K), "o": (D, D)}
    shapes |= {"gate": (D, W), "up": (D, W), "down": (W, D)}
    return {name: linear(*shape) for name, shape in shapes.items()}


def llama_lora(*targets):
    def count(row):
        layers, rank = llama_projections(row), row["hyperparams"]["r"]
        return row["dims"]["L"] * own(*(LoRALinear(layers[t], rank, 1.0) for t in targets))

    return count


def llama_lora_b_only(row):
    layers, rank = llama_projections(row), row["hyperparams"]["r"]
    return row["dims"]["L"] * sum(LoRALinear(layers[t], rank, 1.0).B.numel() for t in "qv")


def llama_adalora(row):
    layers, rank = llama_projections(row), row["hyperparams"]["init_r"]
    return row["dims"]["L"] * own(*(AdaLoRALinear(layers[t], rank, 1.0) for t in "qv"))


def llama_ia3(outputs, inputs):
    def count(row):
        layers = llama_projections(row)
        scaled = [IA3Linear(layers[t]) for t in outputs]
        scaled += [IA3Linear(layers[t], on_input=True) for t in inputs]
        return row["dims"]["L"] * own(*scaled)

    return count


def llama(row):
    """The whole model; the head shares the embedding's weight."""
    dims = row["dims"]
    norm = nn.RMSNorm(dims["d"], device="meta")
    block = of(*llama_projections(row).values()) + 2 * of(norm)
    embedding = nn.Embedding(dims["V"], dims["d"], device="meta")
    return of(embedding, norm) + dims["L"] * block


def llama_adapter(row, gates=1):
    """Prompts and one gate in each of the upper layers."""
    dims, given = row["dims"], row["hyperparams"]
    with torch.device("meta"):
        attention = Attention(dims["d"], dims["H"], dims["d"] // dims["H"])
        layer = PromptedCore(attention.core, attention, given["P"], gates)
    return given["top"] * own(layer)


def t5_layers(row):
    """(linear layers, LayerNorms) of T5: an encoder block attends once, a decoder block twice."""
    dims = row["dims"]
    D, W, inner = dims["d"], dims["dff"], dims["H"] * dims["dkv"]
    blocks, norms = [], 2  # the two stacks' last LayerNorms
    for count, attentions in ((dims["Lenc"], 1), (dims["Ldec"], 2)):
        for _ in range(count):
            shapes = {(n, t): (D, inner) for n in range(attentions) for t in "qkv"}
            shapes |= {(n, "o"): (inner, D) for n in range(attentions)}
            shapes |= {"gate": (D, W), "up": (D, W), "down": (W, D)}
            blocks.append({name: linear(*shape) for name, shape in shapes.items()})
            norms += attentions + 1
    return blocks, [nn.RMSNorm(D, device="meta") for _ in range(norms)]


def t5_norms(row):
    return of(*t5_layers(row)[1])


def t5_lora(row):
    blocks, norms = t5_layers(row)
    rank = row["hyperparams"]["r"]
    return own(*(LoRALinear(x, rank, 1.0) for b in blocks for x in b.values())) + of(*norms)


def t5_adapters(row):
    blocks, norms = t5_layers(row)
    width, m = row["dims"]["d"], row["hyperparams"]["m"]
    return of(*norms, *(Bottleneck(width, m, device="meta") for _ in blocks))


def t5_biases(row):
    """Zero biases are added to T5's layers, all but the last of the feed-forward."""
    blocks, norms = t5_layers(row)
    biased = [x for b in blocks for name, x in b.items() if name != "down"]
    made = (linear(x.in_features, x.out_features, bias=True) for x in biased)
    return sum(x.bias.numel() for x in made) + of(*norms)


def t5_ia3(row):
    wrappers = []
    for block in t5_layers(row)[0]:
        wrappers += [IA3Linear(x) for n, x in block.items() if n[-1] in ("k", "v")]
        wrappers.append(IA3Linear(block["down"], on_input=True))
    return own(*wrappers)


def aurora(row):
    """The paper's figure is that of the shared factors U and V."""
    D = row["dims"]["d"]
    factors = Factors(D, D, row["hyperparams"]["R"], {"device": "meta"})
    return factors.U.numel() + factors.V.numel()


RECOUNT = {
    "lora-gpt2m-r4": lora,
    "lora-gpt2l-r4": lora,
    "lora-robertab-r8": lora,
    "lora-robertal-r8": lora,
    "lora-debertaxxl-r16": lora,
    "lora-gpt3-qv-r1": lora,
    "lora-gpt3-qv-r4": lora,
    "lora-gpt3-qv-r8": lora,
    "lora-gpt3-qv-r64": lora,
    "lora-gpt3-qkvo-r1": lora,
    "lora-gpt3-qkvo-r4": lora,
    "lora-gpt3-qkvo-r64": lora,
    "lib-lora-bert": lora,
    "unipelt-lora": lambda row: attached(row, LoRA(rank=8)),
    "adalora-lora-r8": lora_everywhere,
    "adalora-lora-r2": lora_everywhere,
    "qlora-llama7-r64": llama_lora("q", "k", "v", "o", "gate", "up", "down"),
    "dora-lora-llama7-r32": llama_lora("q", "k", "v", "up", "down"),
    "mm-lora32": llama_lora("q", "v"),
    "mm-lora10mlp": llama_lora("gate", "up", "down"),
    "mm-lorafa32": llama_lora_b_only,
    "adalora-gpt2-init12": adalora_of_peft,
    "mm-adalora": llama_adalora,
    "aurora-64": aurora,
    "fttop2-gpt2m": lambda row: attached(row, TopLayers(layers=2)),
    "ft-gpt2m": lambda row: attached(row, FullFineTuning()),
    "mm-full": llama,
    "bitfit-bert-base": bitfit_of_bert,
    "bitfit-bert-large": bitfit_of_bert,
    "unipelt-bitfit": bitfit_of_bert,
    "bitfit-bert-base-bq-bm2": lambda row: attached(row, BitFit(("query", "intermediate"))),
    "bitfit-gpt-2-small": lambda row: attached(row, BitFit()),
    "bitfit-gpt-2-medium": lambda row: attached(row, BitFit()),
    "tfew-layernorm": t5_norms,
    "tfew-lora4": t5_lora,
    "tfew-adapter": t5_adapters,
    "tfew-bitfit": t5_biases,
    "tfew-ia3": t5_ia3,
    "ia3-t0-3b": t5_ia3,
    "ia3-gpt2-peft": lambda row: attached(row, IA3(("q", "k", "v", "down"))),
    "lib-ia3-bert-adapters": lambda row: attached(row, IA3(("k", "v", "up"), ())),
    "lib-ia3-bert-large-adapters": lambda row: attached(row, IA3(("k", "v", "up"), ())),
    "mm-llamaadapter": llama_adapter,
    "llama-adapter-7b": lambda row: llama_adapter(row, gates=0),  # the figure leaves gates out
    "mm-ia3": llama_ia3("kv", ("down",)),
    "mm-ia3all": llama_ia3("qkvo", ("gate", "up", "down")),
    "adapterL-medium-r6": adapter("pfeiffer", own_norm=True),
    "adapterL-medium-r224": adapter("pfeiffer", own_norm=True),
    "adapterL-large-r8": adapter("pfeiffer", own_norm=True),
    "adapterL-large-r248": adapter("pfeiffer", own_norm=True),
    "adapterH-gpt2m": adapter("houlsby"),
    "adapterH-gpt3-r4": adapter("houlsby"),
    "adapterH-gpt3-r8": adapter("houlsby"),
    "adapterH-gpt3-r16": adapter("houlsby"),
    "adapterH-gpt3-r64": adapter("houlsby"),
    "houlsby-bertlarge-64": adapter("houlsby"),
    "houlsby-bertbase-64": adapter("houlsby"),
    "lib-doubleseqbn-bert-base": adapter("houlsby"),
    "adalora-hadapter-r16": adapter("houlsby"),
    "adalora-hadapter-r8": adapter("houlsby"),
    "pfeiffer-bert-base-rf16": adapter("pfeiffer"),
    "pfeiffer-bert-large-rf64": adapter("pfeiffer"),
    "lib-seqbn-bert-large": adapter("pfeiffer"),
    "adalora-padapter-r32": adapter("pfeiffer"),
    "adalora-padapter-r16": adapter("pfeiffer"),
    "unipelt-adapter": lambda row: attached(row, Adapter("pfeiffer", 48, layer_norms=False)),
    "lib-parbn-bert-base": adapter("parallel"),
    "lib-parbn-bert-large": adapter("parallel"),
    "fusion-bert-base": fusion,
    "lib-mam-bert-base": mam_of_the_library,
    "lib-mam-bert-large": mam_of_the_library,
    "mam-robertab": mam_flat,
} | published_soft_prompts.RECOUNT

# id -> the technique whose modules will count it; a test fails once that technique exists
PENDING: dict[str, str] = {}

# id -> why there is nothing to recount
OTHERS = {
    "lib-dora-bert": "DoRA is not built here",
    "dora-llama7-r32": "DoRA is not built here",
    "mm-dora32": "DoRA is not built here",
    "mm-beft": "one bias alone, by a method that is not built here",
    "mm-trainabletokens": "not built here",
    "adalora-target8": "depends on which of the ranks the data keeps",
    "diff-bertl": "a share that is asked for, not a count",
    "distilbert": "the size of a model, not of what is trained",
}


def as_printed(row, count):
    """The count in the row's unit: a number that may be rounded or cut to the printed digits."""
    units = {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}
    if row["published_unit"] == "%":
        return 100 * count / row["percent_denominator"]
    return count / units[row["published_unit"]]


def prints_as(value, printed):
    """Whether a value, rounded or cut at the printed number of digits, is what is printed."""
    digits = len(printed.partition(".")[2])
    cut = math.floor(value * 10**digits) / 10**digits
    return float(printed) in (round(value, digits), cut)


@pytest.mark.parametrize("name", RECOUNT)
def test_a_row_is_recounted(name):
    row = ROWS[name]
    count = RECOUNT[name](row)
    assert count == row["recomputed"]
    if row["published_value"] is not None:
        reproduced = prints_as(as_printed(row, count), row["published_value"])
        assert reproduced == row["match"], f"{row['published']} against {count}: {row['note']}"


def test_what_does_not_reproduce_says_why():
    assert all(row["note"] for row in ROWS.values() if row["match"] is False)


def test_every_row_has_its_place():
    lists = [set(RECOUNT), set(PENDING), set(OTHERS)]
    assert set.union(*lists) == set(ROWS)
    assert sum(map(len, lists)) == len(ROWS), "a row has two places"


def test_a_pending_row_waits_for_a_technique_that_is_not_there():
    for name, technique in PENDING.items():
        assert technique not in WHERE, f"{technique} is there: recount {name} in RECOUNT"


def test_rounding_and_cutting():
    assert prints_as(393216 / 1e6, "0.39") and not prints_as(393216 / 1e6, "0.35")
    assert prints_as(301.989888, "301.9") and prints_as(301.989888, "302.0")
    assert not prints_as(301.989888, "301.8")


def test_rows_quote_their_source():
    for row in ROWS.values():
        assert row["paper"] and row["verification"] and row["published"]
