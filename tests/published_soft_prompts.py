"""Published counts of soft prompts, recounted: row id -> function(row) -> int.

Rows of GPT shape attach the technique on the meta device. The others (BERT, T5, BART, LLaMA) are
counted from the modules that our techniques put in, made with that model's widths: a flat prefix is
a Table a layer, of the width of its keys and values.
"""

from __future__ import annotations

import torch

from minipeft import GPT, GPTConfig, PrefixTuning, PromptTuning, PTuning, PTuningV2
from minipeft.soft_prompt.p_tuning import Encoder
from minipeft.soft_prompt.prefix_tuning import MLPTable, Trunk
from minipeft.soft_prompt.prompt_tuning import Table
from minipeft.technique import trainable_parameters


def numbers(*modules):
    """Parameters of the modules, each once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def rows_of(length, width):
    return Table(torch.empty(length, width, device="meta"))


def attached(row, technique, context=2048):
    """Trained numbers of `technique` on a GPT with the row's dimensions."""
    dims = row["dims"]
    with torch.device("meta"):
        model = GPT(
            GPTConfig(
                vocab_size=dims["V"],
                context_length=context,
                n_layer=dims["L"],
                n_head=dims["H"],
                d_model=dims["d"],
                d_ff=dims["dff"],
            )
        )
        technique.attach(model)
    return sum(p.numel() for p in trainable_parameters(model))


def prefix_embed(row):
    """lp words in front of the text and li behind it, all of them learned rows."""
    given = row["hyperparams"]
    return attached(row, PromptTuning(given["lp"] + given["li"]))


def prefix_layer(row):
    """One activation a layer and virtual token, where a prefix has a key and a value."""
    given = row["hyperparams"]
    return attached(row, PTuningV2(given["lp"] + given["li"])) // 2


def flat_prefix(row):
    return attached(row, PrefixTuning(row["hyperparams"]["P"], reparameterize=False))


def mlp_prefix(row):
    given = row["hyperparams"]
    return attached(row, PrefixTuning(given["P"], bottleneck=given["mid"]))


def mlp_pseudo_tokens(row):
    given = row["hyperparams"]
    return attached(row, PTuning((given["P"],), encoder="mlp", hidden=given["h"]))


def flat_prefix_of_another_model(row):
    """Keys are as wide as the model, or narrower where several queries share one (dkv)."""
    dims, length = row["dims"], row["hyperparams"]["P"]
    width = dims.get("dkv", dims["d"])
    return numbers(*(rows_of(length, 2 * width) for _ in range(dims["L"])))


def prefix_of_bart(row):
    """The encoder's and the decoder's self-attention and the decoder's cross-attention."""
    dims, length = row["dims"], row["hyperparams"]["P"]
    places = dims["Lenc"] + 2 * dims["Ldec"]
    return numbers(*(rows_of(length, 2 * dims["d"]) for _ in range(places)))


def prompt_of_another_model(row):
    return numbers(rows_of(row["hyperparams"]["P"], row["dims"]["d"]))


def prompts_of_t_few(row):
    """One prompt for the encoder, one for the decoder."""
    return 2 * prompt_of_another_model(row)


def pseudo_tokens_of_another_model(row):
    given, width = row["hyperparams"], row["dims"]["d"]
    return numbers(Encoder(given["P"], width, given["h"], mlp_layers=3, device="meta"))


def p_tuning_v2_of_bert():
    """P-tuning v2's own constant for BERT-base: 5 rows, an MLP of width 512, a head of 9 labels."""
    trunk = Trunk(5, 768, 512, device="meta")
    layers = [MLPTable(trunk, 2 * 768, owner=n == 0, device="meta") for n in range(12)]
    return numbers(*layers, torch.nn.Linear(768, 9, device="meta"))


RECOUNT = {
    "preembed-gpt3-32-8": prefix_embed,
    "preembed-gpt3-64-8": prefix_embed,
    "preembed-gpt3-256-8": prefix_embed,
    "preembed-gpt3-512-8": prefix_embed,
    "prelayer-gpt3-2-2": prefix_layer,
    "prelayer-gpt3-8-0": prefix_layer,
    "prelayer-gpt3-32-4": prefix_layer,
    "lib-prefixflat-bert-base": flat_prefix_of_another_model,
    "lib-prefixflat-bert-large": flat_prefix_of_another_model,
    "prompt-t5xxl-5": prompt_of_another_model,
    "prompt-t5xxl-100": prompt_of_another_model,
    "prefix-gpt2m-5-train": mlp_prefix,
    "prefix-bartl-200": prefix_of_bart,
    "peft-prefix20-gpt-2-small": flat_prefix,
    "peft-prefix20-gpt-2-medium": flat_prefix,
    "peft-prefix20-mlp-gpt-2-medium": mlp_prefix,
    "peft-prefix20-gpt-2-large": flat_prefix,
    "peft-prefix20-mlp-gpt-2-large": mlp_prefix,
    "ptuning-gpt2": mlp_pseudo_tokens,
    "unipelt-prefix": flat_prefix_of_another_model,
    "mm-prompt200": prompt_of_another_model,
    "mm-prefix200": flat_prefix_of_another_model,
    "mm-prefix50": flat_prefix_of_another_model,
    "mm-ptuning20": pseudo_tokens_of_another_model,
    "tfew-prompt10": prompts_of_t_few,
    "tfew-prompt100": prompts_of_t_few,
}
