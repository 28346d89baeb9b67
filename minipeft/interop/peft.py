r"""Adapters in peft's format: what its PeftModel.from_pretrained opens, and what opens here.

A folder holds adapter_config.json, with a `peft_type`, and adapter_model.safetensors (checkpoint.py
reads and writes the files; this file only translates). peft sees GPT-2 as transformers has it:

    base_model.model.transformer.h.N.attn.c_attn     blocks.N.attn.{q,k,v}    one joint projection
    base_model.model.transformer.h.N.attn.c_proj     blocks.N.attn.o
    base_model.model.transformer.h.N.mlp.c_fc        blocks.N.mlp.up
    base_model.model.transformer.h.N.mlp.c_proj      blocks.N.mlp.down

A LoRA on M has M.lora_A.weight (r, in) and M.lora_B.weight (out, r). Separate adapters on q, k and
v become one adapter on c_attn in block form, of rank r' = r_q + r_k + r_v (left out: rank 0):

    (Peft 1)   A' = [A_q; A_k; A_v]      (r', in)
    (Peft 2)   B' = blockdiag(B_q, B_k, B_v)      (3 D, r'), rows of a projection left out are 0
    (Peft 3)   alpha' = alpha r'/r, rank-stabilised: alpha sqrt(r'/r)        so that s' = s

The other way, a joint c_attn adapter opens with q, k and v sharing one A, the same Parameter, and B
cut in three; it is saved in joint form again, so the rank never grows, however often it travels.

A structurally pruned model opens here only (hf_gpt2.py), and so do its adapters: they are written
in our own form.

To add a technique: write `X_to_peft(attachment, model)`, which gives (config, peft's tensors) or
None where peft has nothing like it, and `X_from_peft(config, tensors, model, technique)`, which
gives (technique, tensors under the names of `Technique.export`); `technique` is the one the file
was saved from, None for a file that peft wrote. Then add a line to FORMATS. What a format drops (an
encoder, say) needs no code: checkpoint.py compares and keeps it beside.

How this differs from peft: a missing or unknown tensor and a setting we do not have are errors that
name them (peft warns, or ignores them).

Footguns: no lora_alpha in a config means 8, no target_modules c_attn; "c_proj" names two modules a
block; the regular expressions of rank_pattern match the end of a module's name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch

from minipeft import wrap
from minipeft.compressed.structured_pruning import dense_widths, widths
from minipeft.interop import peft_adalora, peft_adaption_prompt, peft_ia3, peft_prompts
from minipeft.low_rank.lora import LoRA, LoRALinear, path_of, pattern_value, projection_shape

MODULES = {  # peft's name inside a block -> the projections it is made of
    "attn.c_attn": ("q", "k", "v"),
    "attn.c_proj": ("o",),
    "mlp.c_fc": ("up",),
    "mlp.c_proj": ("down",),
}
WITH_HEAD, BARE = "base_model.model.transformer.", "base_model.model."  # GPT2LMHeadModel, GPT2Model
PLAIN = {"QLoRA": "LoRA"}  # ours that are another to peft: a quantised base is its affair
HARMLESS_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")  # others change the base
DESCRIPTIVE = {  # keys of a config that do not touch what is computed from the tensors
    "peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path",
    "revision", "inference_mode", "fan_in_fan_out", "ensure_weight_tying",
}  # fmt: skip
READ = {
    "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "bias",
    "init_lora_weights",
}  # fmt: skip
ONLY_WITH_ANOTHER = {  # options of a switch that is refused by its own name
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "runtime_config",
}  # fmt: skip


@dataclass(frozen=True)
class Format:
    """One technique that peft knows too; see the file's header for the two functions."""

    technique: str
    to_peft: Callable
    from_peft: Callable


def to_peft(attachment, model):
    """(config, tensors) of an attachment in peft's format; None where peft has nothing like it,
    neither the technique nor a model whose layers have widths of their own.
    """
    if widths(model) != dense_widths(model.config):
        return None
    kind = type(attachment.technique).__name__
    for form in FORMATS.values():
        if form.technique == PLAIN.get(kind, kind):
            return form.to_peft(attachment, model)
    return None


def from_peft(config, tensors, model, technique=None):
    """(technique, tensors under their names here) of an adapter in peft's format.

    Raises ValueError for a peft_type, a setting or a tensor that has no counterpart, naming it.
    """
    kind = config.get("peft_type")
    if kind not in FORMATS:
        raise ValueError(f"peft_type {kind!r} is not read here; {', '.join(FORMATS)} are")
    return FORMATS[kind].from_peft(config, tensors, model, technique)


def prefix_of(tensors):
    """What stands before the block's name: peft wrapped the model with its head or without."""
    with_head = not tensors or any(key.startswith(WITH_HEAD) for key in tensors)
    return WITH_HEAD if with_head else BARE


def renamed(tensors, prefix):
    """`to_peft`'s tensors under another prefix."""
    return {n.replace(WITH_HEAD, prefix, 1): t for n, t in tensors.items()}


# -- LoRA, there


def lora_to_peft(attachment, model):
    """A LoRA as one adapter for each of GPT-2's modules. (Peft 1) (Peft 2) (Peft 3)"""
    technique = attachment.technique
    swaps = [s for s in attachment.swaps if isinstance(s.replacement, LoRALinear)]
    layers = {s.path: s.replacement for s in swaps}
    tensors, ranks, alphas = {}, {}, {}
    for n in range(len(model.blocks)):
        for module, targets in MODULES.items():
            paths = [path_of(n, t) for t in targets]
            if not any(path in layers for path in paths):
                continue
            outs = [wrap.base_module(wrap.resolve(model, p)).out_features for p in paths]
            A, B, first = join([layers.get(p) for p in paths], outs)
            key = f"transformer.h.{n}.{module}"
            tensors[f"base_model.model.{key}.lora_A.weight"] = A
            tensors[f"base_model.model.{key}.lora_B.weight"] = B
            path = next(p for p in paths if layers.get(p) is first)
            ranks[key] = A.shape[0]
            alphas[key] = joint_alpha(technique, path, A.shape[0], first.A.shape[0])
    return lora_config(technique, ranks, alphas, len(model.blocks)), tensors


def join(layers, outs):
    """LoRALinears of a joint module (None: left out) as A' (r', in), B' (sum outs, r'); the first.

    A scale other than the first one's is folded into B, for c_attn has only one.
    """
    there = [layer for layer in layers if layer is not None]
    first = there[0]
    shared = all(layer.A is first.A for layer in there)
    A = first.A if shared else torch.cat([layer.A for layer in there])  # (Peft 1)
    B, column = A.new_zeros(sum(outs), A.shape[0]), 0
    for layer, rows in zip(layers, B.split(outs)):
        if layer is None:
            continue
        ratio = layer.scale / first.scale if layer.scale != first.scale else 1.0
        width = layer.A.shape[0]
        rows[:, column : column + width] = layer.B.detach() * ratio  # (Peft 2)
        column += 0 if shared else width
    return A.detach(), B, first


def joint_alpha(technique, path, joint_rank, rank):
    """alpha' of (Peft 3), an int where it is one."""
    alpha = pattern_value(technique.alpha_pattern, path, technique.alpha)
    if joint_rank != rank:
        growth = joint_rank / rank
        alpha = alpha * (math.sqrt(growth) if technique.rank_stabilized else growth)
    return int(alpha) if float(alpha).is_integer() else alpha


def lora_config(technique, ranks, alphas, n_layer):
    """The config for adapters of these ranks and alphas, {module's full name: value}."""
    r, alpha = most_common(ranks.values()), most_common(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": technique.dropout,
        "target_modules": sorted(shortest(dict.fromkeys(ranks), n_layer, lambda value: True)),
        "rank_pattern": pattern(ranks, r, n_layer),
        "alpha_pattern": pattern(alphas, alpha, n_layer),
        "bias": "none",
        "fan_in_fan_out": True,
        "use_rslora": technique.rank_stabilized,
    }


def pattern(values, default, n_layer):
    """peft's rank_pattern or alpha_pattern: expression -> value, where it is not the default."""
    chosen = shortest(values, n_layer, lambda value: value != default)
    return {re.escape(name): value for name, value in chosen.items()}


def shortest(values, n_layer, chosen):
    """{module's full name: value} for chosen values, a module alone for all layers if equal."""
    found = {}
    for module in MODULES:
        names = [f"transformer.h.{n}.{module}" for n in range(n_layer)]
        mine = {name: values[name] for name in names if name in values and chosen(values[name])}
        if len(mine) == n_layer and len(set(mine.values())) == 1:
            mine = {module: mine[names[0]]}
        found |= mine
    return found


def most_common(values):
    return Counter(values).most_common(1)[0][0]


# -- LoRA, back


def lora_from_peft(config, tensors, model, technique=None):
    """The technique and its tensors; where peft adapted c_attn it is LoRA(share_qkv=True)."""
    prefix = prefix_of(tensors)
    technique = technique or lora_from_config(config, model.config, prefix)
    technique.check(model.config)
    places = {
        path: (rank, scale) for path, _, rank, scale in technique.places(model.config.n_layer)
    }
    modules = {
        f"{prefix}h.{n}.{module}": [path_of(n, t) for t in targets]
        for n in range(model.config.n_layer)
        for module, targets in MODULES.items()
        if any(path_of(n, t) in places for t in targets)
    }
    check_tensors(tensors, lora_shapes(modules, places, technique, model.config))
    logical = {}
    for key, paths in modules.items():
        A, B = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
        logical |= split(A, B, paths, places, technique.share_qkv)
    return technique, logical


def split(A, B, paths, places, share):
    """A' and B' of a joint module cut into its projections': (Peft 1), (Peft 2) backwards."""
    parts, column, first = {}, 0, next(p for p in paths if p in places)
    for path, rows in zip(paths, B.chunk(len(paths))):
        if path not in places:
            continue
        rank, scale = places[path]
        columns = slice(0, rank) if share else slice(column, column + rank)
        column += rank
        if path == first or not share:
            parts[f"{path}.A"] = A[columns]
        ratio = scale / places[first][1] if scale != places[first][1] else 1.0
        parts[f"{path}.B"] = rows[:, columns] / ratio
    return parts


def lora_shapes(modules, places, technique, config):
    """peft's tensor name -> shape, for every tensor the file must hold."""
    shapes = {}
    for key, paths in modules.items():
        ranks = [places[p][0] for p in paths if p in places]
        joint = len(paths) > 1
        rank = sum(ranks) if joint and not technique.share_qkv else ranks[0]
        out, into = projection_shape(config, "q" if joint else paths[0].rsplit(".", 1)[1])
        shapes[f"{key}.lora_A.weight"] = (rank, into)
        shapes[f"{key}.lora_B.weight"] = (out * len(paths), rank)
    return shapes


def check_tensors(tensors, shapes):
    """Raise ValueError naming every missing, unknown or wrongly shaped tensor of a peft file."""
    wrong = [f"missing {n}" for n in shapes if n not in tensors]
    wrong += [f"unknown {n}" for n in tensors if n not in shapes]
    wrong += [
        f"{n} is {tuple(tensors[n].shape)}, the config and the model need {shape}"
        for n, shape in shapes.items()
        if n in tensors and tuple(tensors[n].shape) != shape
    ]
    if wrong:
        raise ValueError("these tensors do not fit: " + "; ".join(wrong))


def lora_from_config(config, shape, prefix=WITH_HEAD):
    """The LoRA that a config of peft's asks for on a GPT of this `shape` (a GPTConfig).

    Raises ValueError naming a setting we do not have.
    """
    check_supported(config)
    default_rank, default_alpha = number(config, "r", 8), number(config, "lora_alpha", 8)
    ranks, alphas = {}, {}
    for n in range(shape.n_layer):
        for module, targets in MODULES.items():
            key = f"{prefix.removeprefix(BARE)}h.{n}.{module}"
            adapted = is_target(config, key)
            rank = matching(config.get("rank_pattern"), key, default_rank) if adapted else 0
            alpha = matching(config.get("alpha_pattern"), key, default_alpha)
            for target in targets:
                ranks[n, target], alphas[n, target] = rank, alpha
    targets = [
        t for ts in MODULES.values() for t in ts if any(ranks[n, t] for n in range(shape.n_layer))
    ]
    if not targets:
        raise ValueError(
            f"target_modules={config.get('target_modules')!r} names nothing of GPT-2's"
        )
    there = [place for place in ranks if ranks[place]]
    rank, alpha = most_common(ranks[p] for p in there), most_common(alphas[p] for p in there)
    return LoRA(
        rank=rank,
        alpha=alpha,
        dropout=config.get("lora_dropout") or 0.0,
        targets=tuple(targets),
        rank_stabilized=bool(config.get("use_rslora")),
        share_qkv="q" in targets,
        rank_pattern=exceptions({p: v for p, v in ranks.items() if p[1] in targets}, rank),
        alpha_pattern=exceptions({p: alphas[p] for p in there}, alpha),
    )


def exceptions(values, default):
    """The pattern, ((path, value), ...), of places (block, target) that differ from the default."""
    return tuple((path_of(*place), v) for place, v in values.items() if v != default)


def number(config, key, default):
    """A positive number of the config; None and absence mean the default."""
    value = config.get(key, default)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key}={value!r} in the config is not a number")
    return value


def check_supported(config, read=READ):
    """Raise ValueError naming the first setting that changes the result and is not read here."""
    if config.get("bias", "none") not in ("none", None):
        raise ValueError(
            f"bias={config['bias']!r} is not supported, only 'none': BitFit trains biases"
        )
    if config.get("init_lora_weights") not in HARMLESS_STARTS:
        raise ValueError(
            f"init_lora_weights={config['init_lora_weights']!r} changes the base, so the adapter "
            "alone does not say what the model computes; convert it to a plain LoRA with peft first"
        )
    for key, value in config.items():
        if key not in DESCRIPTIVE | read | ONLY_WITH_ANOTHER and value:
            raise ValueError(f"{key}={value!r} is not supported here")


def matching(pattern, key, default):
    """peft's rule: the first regular expression that matches the end of the module's name wins."""
    for expression, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({expression})$", key):
            return value
    return default


def is_target(config, key):
    """peft's rule for whether a module gets an adapter (target, excluded, layers_to_transform)."""
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    if excluded and named(excluded, key):
        return False
    if targets is None:
        targets = ["c_attn"]
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or named(targets, key)
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return named(targets, key)
    patterns = config.get("layers_pattern") or r"[^.]*"
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = (re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", key) for p in patterns)
    block = next((int(match.group(1)) for match in found if match), None)
    return named(targets, key) and block in ([layers] if isinstance(layers, int) else layers)


def named(names, key):
    """Whether a regular expression (str) matches all of `key`, or one of the names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key == name or key.endswith(f".{name}") for name in names)


FORMATS = {
    "ADAPTION_PROMPT": Format(
        "LLaMAAdapter",
        peft_adaption_prompt.llama_adapter_to_peft,
        peft_adaption_prompt.llama_adapter_from_peft,
    ),
    "ADALORA": Format("AdaLoRA", peft_adalora.adalora_to_peft, peft_adalora.adalora_from_peft),
    "IA3": Format("IA3", peft_ia3.ia3_to_peft, peft_ia3.ia3_from_peft),
    "LORA": Format("LoRA", lora_to_peft, lora_from_peft),
    "PROMPT_TUNING": Format(
        "PromptTuning", peft_prompts.prompt_tuning_to_peft, peft_prompts.prompt_tuning_from_peft
    ),
    "P_TUNING": Format("PTuning", peft_prompts.p_tuning_to_peft, peft_prompts.p_tuning_from_peft),
    "PREFIX_TUNING": Format(
        "PrefixTuning", peft_prompts.prefix_tuning_to_peft, peft_prompts.prefix_tuning_from_peft
    ),
}
