r"""GPTQ on a whole model: text goes through it, and every projection is rounded in turn.

The inputs of a projection are those that the projections rounded before it give: block by block,
and inside a block q, k and v, then o, up, down (gptq.py has the mathematics). Padding is left out
of H, and dropout is off.

Footguns: all Hessians taken before any rounding, which makes up for errors that are not the ones
made; a setting that does not suit the last layer found out after the first ones have changed.
"""

from __future__ import annotations

import torch
from torch import nn

from minipeft import wrap
from minipeft.evaluation import evaluating
from minipeft.low_rank.lora import path_of
from minipeft.quantized.gptq import check, dequantize_group, gptq

STAGES = (("q", "k", "v"), ("o",), ("up",), ("down",))  # projections that read the same input


@torch.no_grad()
def collect_hessians(model, batches, paths):
    """{path: H}, from the inputs that these projections get on the batches. (GPTQ 1)

    batches: dataset.Batch objects; padding does not count, and nothing is dropped.
    """
    sums, real, tokens = {}, None, 0
    device = next(model.parameters()).device

    def record(path):
        def hook(module, args):
            x = args[0][real].to(torch.promote_types(args[0].dtype, torch.float32))  # (n, in)
            sums[path] = sums.get(path, 0) + x.T @ x

        return wrap.resolve(model, path).register_forward_pre_hook(hook)

    hooks = [record(path) for path in paths]
    try:
        with evaluating(model):
            for batch in (batch.to(device) for batch in batches):
                T = torch.arange(batch.ids.shape[1], device=device)
                real = batch.lengths[:, None] > T
                tokens += int(real.sum())
                model.features(batch.ids, batch.start)
    finally:
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise ValueError("GPTQ needs text to calibrate on, and there is none")
    return {path: 2 / tokens * total for path, total in sums.items()}


def float_weights(model):
    """{path: weight} of every projection that has weights: a layer that lost all its heads or
    neurons has none. Raises ValueError for a projection that is no plain linear layer.
    """
    targets = [target for stage in STAGES for target in stage]
    found = {}
    for path in (path_of(n, target) for n in range(len(model.blocks)) for target in targets):
        module = wrap.resolve(model, path)
        if type(module) is not nn.Linear:
            raise ValueError(
                f"{path} is a {type(module).__name__}, not a plain linear layer: merge or detach "
                "what is on it, and start from floats"
            )
        if module.weight.numel():
            found[path] = module.weight
    return found


@torch.no_grad()
def quantize_model(model, batches, **settings):
    """GPTQ on every projection, in the order of computation; weights are replaced in place.

    Each projection's H comes from inputs that went through the projections rounded before it.
    settings: `gptq`'s. Returns {path: GroupQuantized}. Raises ValueError, before anything has
    changed, for settings that do not suit a projection and for one that is no plain linear layer.
    """
    done, batches, weights = {}, list(batches), float_weights(model)
    for weight in weights.values():
        check(weight, settings.get("bits", 4), settings.get("group_size"))
    for block in range(len(model.blocks)):
        for stage in STAGES:
            paths = [p for p in (path_of(block, target) for target in stage) if p in weights]
            for path, hessian in collect_hessians(model, batches, paths).items():
                linear = wrap.resolve(model, path)
                done[path] = gptq(linear.weight, hessian, **settings)
                linear.weight.copy_(dequantize_group(done[path]))
    return done
