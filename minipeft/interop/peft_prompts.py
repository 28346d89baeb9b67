r"""Soft prompts in peft's format: prompt tuning, P-tuning with its tokens in front, prefix tuning.

peft keeps one tensor, `prompt_embeddings`, whatever trained it: the encoder or the MLP is dropped
(checkpoint.py keeps it beside, so that training can go on).

    PROMPT_TUNING, P_TUNING    (p, D)        the rows in front of the text
    PREFIX_TUNING              (p, 2 L D)    column block 2 l is layer l's keys, 2 l + 1 its values

    (peft prompts 1)   prompt_embeddings = [P_k,0, P_v,0, P_k,1, P_v,1, ..]     side by side

What is written always says that nothing is re-parameterised (prefix_projection false), since the
rows are final. What peft wrote is read as rows without encoder: it has none to give.

How this differs from peft: an ensemble of prompts, an infix, tokens inside a template and P-tuning
v2 have no counterpart there and keep the files of minipeft's own.

Footguns: peft reads P-tuning's rows as rows only while inference_mode is true; a prompt for a model
with more submodules (encoder and decoder) has more rows than num_virtual_tokens says.
"""

from __future__ import annotations

import torch

from minipeft import wrap
from minipeft.soft_prompt.p_tuning import PTuning
from minipeft.soft_prompt.prefix_tuning import PrefixTuning
from minipeft.soft_prompt.prompt_tuning import PromptTuning

KEY = "prompt_embeddings"
DESCRIBE_SHAPE = {  # keys of all three configs; what they say must fit the model
    "num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads",
    "num_transformer_submodules", "modules_to_save",
}  # fmt: skip
ABOUT_TRAINING = {  # how the rows came to be, which the rows no longer need
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
    "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
    "encoder_reparameterization_type", "prefix_projection", "init_weights",
}  # fmt: skip


def shape_of(kind, length, model):
    """What the three configs have in common."""
    return {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "token_dim": model.config.d_model,
        "num_layers": len(model.blocks),
        "num_attention_heads": model.config.n_head,
        "num_transformer_submodules": 1,
    }


def rows_of(attachment):
    """The rows that the attachment's wrappers compute, tables by logical path."""
    found = {}
    for swap in attachment.swaps:
        table = getattr(swap.replacement, "table", getattr(swap.replacement, "prompt", None))
        if table is not None:
            with torch.no_grad():
                found[swap.path] = table().detach()
    return found


def one_table(config, tensors, width):
    """(p, the table) of a file, checked against the config and a row's width.

    Raises ValueError for a setting we do not have and for tensors that do not fit.
    """
    from minipeft.interop import peft  # which lists this file's functions

    known = peft.DESCRIPTIVE | DESCRIBE_SHAPE | ABOUT_TRAINING
    for key, value in config.items():
        if (key not in known or key == "modules_to_save") and value:
            raise ValueError(f"{key}={value!r} is not supported here")
    length = config.get("num_virtual_tokens")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"num_virtual_tokens={length!r} in the config is no positive number")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise ValueError(
            f"num_transformer_submodules={config['num_transformer_submodules']}: a GPT has one"
        )
    peft.check_tensors(tensors, {KEY: (length, width)})
    return length, tensors[KEY]


# -- prompt tuning


def prompt_tuning_to_peft(attachment, model):
    """One prompt; None for an ensemble."""
    technique = attachment.technique
    if technique.members > 1:
        return None
    config = shape_of("PROMPT_TUNING", technique.prompt_length, model)
    return config | {"prompt_tuning_init": "RANDOM"}, {KEY: rows_of(attachment)["embed"]}


def prompt_tuning_from_peft(config, tensors, model, technique=None):
    length, rows = one_table(config, tensors, model.config.d_model)
    technique = technique or PromptTuning(prompt_length=length, init="random")
    return technique, {"embed.prompt.weight": rows}


# -- P-tuning


def p_tuning_to_peft(attachment, model):
    """Pseudo tokens in front; None where the template has others."""
    technique = attachment.technique
    length = technique.template[0]
    if length != technique.pseudo_tokens:
        return None
    config = shape_of("P_TUNING", length, model)
    config["encoder_reparameterization_type"] = "LSTM" if "lstm" in technique.encoder else "MLP"
    config["encoder_hidden_size"] = technique.width(model.config)
    config["encoder_num_layers"] = technique.layers
    config["encoder_dropout"] = technique.dropout
    return config, {KEY: rows_of(attachment)["embed"]}


def p_tuning_from_peft(config, tensors, model, technique=None):
    length, rows = one_table(config, tensors, model.config.d_model)
    technique = technique or PTuning(template=(length,), encoder="table")
    return technique, {"embed.prompt.weight": rows}


# -- prefix tuning


def prefix_tuning_to_peft(attachment, model):
    """A prefix on every layer; None for the ablations. (peft prompts 1)"""
    technique = attachment.technique
    if technique.placement != "prefix":
        return None
    config = shape_of("PREFIX_TUNING", technique.prefix_length, model)
    rows = rows_of(attachment)
    tables = [rows[f"blocks.{n}.attn.core"] for n in range(len(model.blocks))]
    settings = {"prefix_projection": False, "encoder_hidden_size": model.config.d_model}
    return config | settings, {KEY: torch.cat(tables, 1)}


def prefix_tuning_from_peft(config, tensors, model, technique=None):
    """(peft prompts 1) backwards."""
    keys = [wrap.resolve(model, f"blocks.{n}.attn.k") for n in range(len(model.blocks))]
    widths = [2 * wrap.base_module(key).out_features for key in keys]
    length, rows = one_table(config, tensors, sum(widths))
    technique = technique or PrefixTuning(prefix_length=length, reparameterize=False)
    tables = {
        f"blocks.{n}.attn.core.table.weight": table for n, table in enumerate(rows.split(widths, 1))
    }
    return technique, tables
