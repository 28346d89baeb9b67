r"""AdaLoRA in peft's format: lora_A, lora_E and lora_B for each of GPT-2's modules.

What is called P, E, Q here is lora_B, lora_E, lora_A there. Separate triplets on q, k and v become
one set on c_attn in block form, which has their ranks together:

    (peft AdaLoRA 1)   lora_A = [Q_q; Q_k; Q_v],  lora_E = [E_q; E_k; E_v]      (r', in), (r', 1)
    (peft AdaLoRA 2)   lora_B = blockdiag(P_q, P_k, P_v)       (3 D, r'), rows of what is left out 0
    (peft AdaLoRA 3)   alpha' = alpha (init_r + 1e-5) / (init_rank + 1e-5)       so that s' = s

`rank_pattern` says by a list of init_r truths for each module which triplets are kept; the tensors
hold those alone. A module with fewer than init_r triplets has false at the end of its list. What
peft wrote on c_attn opens with q, k and v sharing one E and Q, and is saved in that form again.

How this differs from peft: the schedule of a run that is over is not written (peft wants some
total_step, and gets 1); a config that adapts some layers only is an error.

Footguns: the scale in peft is lora_alpha / init_r whatever ranks are left; `r` means nothing there.
"""

from __future__ import annotations

import torch

from minipeft import wrap
from minipeft.low_rank.adalora import AdaLoRA
from minipeft.low_rank.lora import path_of, projection_shape

READ = {
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "init_r", "target_r",
    "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "rank_pattern",
    "r", "init_lora_weights", "bias", "layers_to_transform", "layers_pattern",
}  # fmt: skip


def adalora_to_peft(attachment, model):
    """(config, tensors) with the triplets that are kept."""
    from minipeft.interop import peft  # which lists this file's functions

    technique, layers = attachment.technique, {s.path: s.replacement for s in attachment.swaps}
    modules = modules_of(technique)
    init_r = max(total_rank(technique, targets) for targets in modules.values())
    tensors, kept = {}, {}
    for n in range(len(model.blocks)):
        for module, targets in modules.items():
            paths = [path_of(n, t) for t in targets]
            outs = [wrap.base_module(wrap.resolve(model, p)).out_features for p in paths]
            key = f"transformer.h.{n}.{module}"
            P, E, Q, mask = join([layers.get(p) for p in paths], outs)
            for name, tensor in (("lora_A", Q), ("lora_B", P), ("lora_E", E)):
                tensors[f"{peft.BARE}{key}.{name}"] = tensor
            kept[f"{key}.lora_E"] = mask.tolist() + [False] * (init_r - len(mask))
    whole = all(all(row) for row in kept.values())
    return adalora_config(technique, init_r, sorted(modules), None if whole else kept), tensors


def modules_of(technique):
    """{peft's module: the projections it is made of} of the modules with a target in them."""
    from minipeft.interop import peft

    return {m: ts for m, ts in peft.MODULES.items() if set(ts) & set(technique.targets)}


def total_rank(technique, targets):
    """Triplets of a module at the start: init_rank, times its targets where each has its own."""
    joint = technique.share_qkv and "q" in targets
    return technique.init_rank * (1 if joint else len(set(targets) & set(technique.targets)))


def join(layers, outs):
    """AdaLoRALinears of a module (None: left out) as lora_B (sum outs, r), lora_E (r, 1), lora_A
    (r, in), each with the kept triplets, and kept (r',) bool. (peft AdaLoRA 1) (peft AdaLoRA 2)
    """
    there = [layer for layer in layers if layer is not None]
    shared = all(layer.E is there[0].E for layer in there)
    own = there[:1] if shared else there
    Q, E = (torch.cat([getattr(l, k)[l.kept] for l in own]).detach() for k in "QE")
    P, column = Q.new_zeros(sum(outs), len(E)), 0
    for layer, rows in zip(layers, P.split(outs)):
        if layer is not None:
            part = layer.P.detach()[:, layer.kept]
            rows[:, column : column + part.shape[1]] = part
            column += 0 if shared else part.shape[1]
    return P, E[:, None], Q, torch.cat([layer.kept for layer in own])


def adalora_config(technique, init_r, modules, rank_pattern):
    """peft's config; tinit, tfinal and total_step belong to a run that is over."""
    alpha = technique.alpha
    if init_r != technique.init_rank:
        alpha = alpha * (init_r + 1e-5) / (technique.init_rank + 1e-5)  # (peft AdaLoRA 3)
    return {
        "peft_type": "ADALORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_r": init_r,
        "target_r": technique.target_rank,
        "lora_alpha": alpha,
        "lora_dropout": technique.dropout,
        "target_modules": modules,
        "rank_pattern": rank_pattern,
        "tinit": 0,
        "tfinal": 0,
        "total_step": 1,
        "deltaT": technique.delta_t,
        "beta1": technique.beta1,
        "beta2": technique.beta2,
        "orth_reg_weight": technique.gamma,
        "bias": "none",
        "fan_in_fan_out": True,
    }


def adalora_from_peft(config, tensors, model, technique=None):
    """The technique and its tensors, kept triplets alone, as `AdaLoRA.export` gives them."""
    from minipeft.interop import peft

    prefix = peft.prefix_of(tensors)
    technique = technique or adalora_from_config(config, model.config, prefix)
    technique.check(model.config)
    logical, shapes, found = {}, {}, []
    for n in range(model.config.n_layer):
        for module, targets in modules_of(technique).items():
            key = f"{prefix}h.{n}.{module}"
            kept = kept_of(config, key.removeprefix(peft.BARE), total_rank(technique, targets))
            out, into = projection_shape(model.config, targets[0])
            rank = int(kept.sum())
            shapes[f"{key}.lora_A"] = (rank, into)
            shapes[f"{key}.lora_B"] = (len(targets) * out, rank)
            shapes[f"{key}.lora_E"] = (rank, 1)
            found.append((key, [path_of(n, t) for t in targets], targets, kept))
    peft.check_tensors(tensors, shapes)
    for key, paths, targets, kept in found:
        A, B, E = (tensors[f"{key}.lora_{letter}"] for letter in "ABE")
        logical |= split(A, B, E[:, 0], kept, dict(zip(paths, targets)), technique)
    return technique, logical


def kept_of(config, name, total):
    """(total,) bool: which triplets of a module the file holds.

    Raises ValueError for a list of another length than init_r.
    """
    pattern = config.get("rank_pattern")
    if not pattern:
        return torch.ones(total, dtype=torch.bool)
    row = pattern.get(f"{name}.lora_E")
    if row is None or len(row) != config.get("init_r", 12):
        raise ValueError(f"rank_pattern has no list of init_r truths for {name}.lora_E")
    return torch.tensor(row[:total], dtype=torch.bool)


def split(A, B, E, kept, targets, technique):
    """A joint module's tensors as its projections' P, E, Q and kept; `targets` by path.
    (peft AdaLoRA 1) (peft AdaLoRA 2) backwards.
    """
    share, r = technique.share_qkv and len(targets) > 1, technique.init_rank
    parts, start, column = {}, 0, 0
    for (path, target), rows in zip(targets.items(), B.chunk(len(targets))):
        if target not in technique.targets:
            continue
        mine = kept[start : start + r]
        columns = slice(column, column + int(mine.sum()))
        if not (share and parts):
            parts |= {f"{path}.E": E[columns], f"{path}.Q": A[columns]}
        parts |= {f"{path}.P": rows[:, columns], f"{path}.kept": mine}
        if not share:
            start, column = start + r, columns.stop
    return parts


def adalora_from_config(config, shape, prefix):
    """The AdaLoRA that a config of peft's asks for. Raises ValueError naming what is not here."""
    from minipeft.interop import peft

    peft.check_supported(config, READ)
    targets = []
    for module, names in peft.MODULES.items():
        keys = [f"{prefix.removeprefix(peft.BARE)}h.{n}.{module}" for n in range(shape.n_layer)]
        chosen = {peft.is_target(config, key) for key in keys}
        if len(chosen) > 1:
            raise ValueError(
                f"the config adapts {module} in some layers and not in others, which AdaLoRA here "
                "cannot; write the config for all layers"
            )
        targets += names if chosen == {True} else ()
    if not targets:
        raise ValueError(
            f"target_modules={config.get('target_modules')!r} names nothing of GPT-2's"
        )
    init_r, alpha = peft.number(config, "init_r", 12), peft.number(config, "lora_alpha", 8)
    return AdaLoRA(
        init_rank=init_r,
        target_rank=peft.number(config, "target_r", 8),
        alpha=alpha if alpha > 0 else init_r,
        dropout=config.get("lora_dropout") or 0.0,
        targets=tuple(targets),
        share_qkv="q" in targets,
        tinit=peft.number(config, "tinit", 0),
        tfinal=peft.number(config, "tfinal", 0),
        delta_t=peft.number(config, "deltaT", 1),
        beta1=peft.number(config, "beta1", 0.85),
        beta2=peft.number(config, "beta2", 0.85),
        gamma=peft.number(config, "orth_reg_weight", 0.5),
    )
