r"""IA3 in peft's format: one vector `ia3_l` for each of GPT-2's modules.

    scaled at what it writes    (out, 1)
    scaled at what it reads     (1, in)        the modules in `feedforward_modules`

    (peft IA3 1)   ia3_l of c_attn = [l_q; l_k; l_v]        1 where a projection is not a target

How this differs from peft: it can adapt some layers only, which is an error here; an input scaled
for one of q, k and v has no counterpart there and keeps the files of minipeft's own.

Footguns: peft decides what is feed-forward by the end of the module's name, so "c_proj" is also
attention's; without feedforward_modules the default is mlp.c_proj.
"""

from __future__ import annotations

import re

import torch

from minipeft import wrap
from minipeft.additive.ia3 import IA3
from minipeft.low_rank.lora import path_of, projection_shape

READ = {"target_modules", "exclude_modules", "feedforward_modules", "init_ia3_weights"}
DEFAULTS = {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}


def ia3_to_peft(attachment, model):
    """(config, tensors); None where q, k or v is scaled at what it reads."""
    from minipeft.interop import peft  # which lists this file's functions

    technique = attachment.technique
    inputs = set(technique.feedforward) & set(technique.targets)
    if inputs & {"q", "k", "v"}:
        return None
    modules = {m: ts for m, ts in peft.MODULES.items() if set(ts) & set(technique.targets)}
    layers, tensors = {s.path: s.replacement for s in attachment.swaps}, {}
    for n in range(len(model.blocks)):
        for module, targets in modules.items():
            paths = [path_of(n, t) for t in targets]
            joint = torch.cat([vector(layers.get(p), wrap.resolve(model, p)) for p in paths])
            shape = (1, -1) if targets[0] in inputs else (-1, 1)
            tensors[f"{peft.WITH_HEAD}h.{n}.{module}.ia3_l"] = joint.view(shape)  # (peft IA3 1)
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(modules),
        "feedforward_modules": sorted(m for m, ts in modules.items() if ts[0] in inputs),
        "fan_in_fan_out": True,
        "init_ia3_weights": True,
    }
    return config, tensors


def vector(layer, module):
    """The layer's l, or ones where the projection is no target."""
    if layer is not None:
        return layer.l.detach()
    base = wrap.base_module(module)
    return torch.ones(base.out_features, **wrap.float_place(base))


def ia3_from_peft(config, tensors, model, technique=None):
    """The technique and its tensors; a c_attn of peft's has q, k and v among the targets."""
    from minipeft.interop import peft

    prefix, blocks = peft.prefix_of(tensors), range(model.config.n_layer)
    technique = technique or ia3_from_config(config, model.config, prefix)
    technique.check(model.config)
    modules = {m: ts for m, ts in peft.MODULES.items() if set(ts) & set(technique.targets)}
    names = {(n, m): f"{prefix}h.{n}.{m}.ia3_l" for n in blocks for m in modules}
    shapes = {name: shape(modules[m], technique, model.config) for (_, m), name in names.items()}
    peft.check_tensors(tensors, shapes)
    logical = {}
    for (n, module), name in names.items():
        targets = modules[module]
        for target, part in zip(targets, tensors[name].flatten().chunk(len(targets))):
            if target in technique.targets:
                logical[f"{path_of(n, target)}.l"] = part
    return technique, logical


def shape(targets, technique, config):
    """ia3_l's shape for the module made of these targets."""
    out, into = projection_shape(config, targets[0])
    return (1, into) if targets[0] in technique.feedforward else (len(targets) * out, 1)


def ia3_from_config(config, shape, prefix):
    """The IA3 that a config of peft's asks for. Raises ValueError naming what we do not have."""
    from minipeft.interop import peft

    peft.check_supported(config, READ)
    config = config | {k: v for k, v in DEFAULTS.items() if config.get(k) is None}
    targets, feedforward = [], []
    for module, names in peft.MODULES.items():
        keys = [f"{prefix.removeprefix(peft.BARE)}h.{n}.{module}" for n in range(shape.n_layer)]
        chosen = {peft.is_target(config, key) for key in keys}
        inputs = {is_feedforward(config["feedforward_modules"], key) for key in keys}
        if len(chosen) > 1 or (True in chosen and len(inputs) > 1):
            raise ValueError(
                f"the config adapts {module} in some layers and not in others, which IA3 here "
                "cannot; write the config for all layers"
            )
        if chosen == {True}:
            targets += names
            feedforward += names if inputs == {True} else ()
    if not targets:
        raise ValueError(f"target_modules={config['target_modules']!r} names nothing of GPT-2's")
    return IA3(tuple(targets), tuple(feedforward))


def is_feedforward(names, key):
    """peft's rule: a regular expression for the whole key, or the end of it."""
    if isinstance(names, str):
        return re.fullmatch(names, key) is not None
    return any(key.endswith(name) for name in names)
