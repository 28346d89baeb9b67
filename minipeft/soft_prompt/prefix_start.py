"""Where learned rows start: at random, or at what a frozen model makes of a real text.

Li and Liang (2021, arXiv 2101.00190, section 7.4) find that a prefix that starts as the keys and
values of a text learns better from few examples, even of a text that has nothing to do with the
task: it begins among the vectors that attention knows.
"""

from __future__ import annotations

import torch

from minipeft import wrap


def random_rows(length, width, **place):
    """N(0, 1), (p, width)."""
    return torch.empty(length, width, **place).normal_()


def placement(model):
    """Device and dtype for new tensors: the token table's, which no technique quantises."""
    like = wrap.resolve(model, "embed.token.weight")
    return {"device": like.device, "dtype": like.dtype}


def activations(model, ids):
    """Keys and values that a text (a list of ids) leaves in each layer: L tensors (p, 2 H d)."""
    found, modes = [], {module: module.training for module in model.modules()}
    cores = [wrap.resolve(model, f"blocks.{n}.attn.core") for n in range(len(model.blocks))]
    hooks = [c.register_forward_pre_hook(lambda _, args: found.append(args[1:3])) for c in cores]
    model.eval()
    try:
        with torch.no_grad():
            model.features(torch.tensor([list(ids)], device=placement(model)["device"]))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    rows = [torch.stack(pair)[:, 0, :, -len(ids) :] for pair in found]  # (2, H, p, d)
    return [r.permute(2, 0, 1, 3).flatten(1).contiguous() for r in rows]
