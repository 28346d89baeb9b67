r"""Gates for UniPELT (Mao et al., 2021, arXiv 2110.07577), causal and ready for a cache.

A gate is one number in (0, 1), computed from what a layer reads, that says how much of a change is
used.

    (Gate 1)   g_t = sigmoid(w . x_t + b)                        w in R^D, b in R, each gate's own
    (Gate 2)   G_t = (g_1 + ... + g_t) / t                       over="past": the text so far
    (Gate 3)   G_t = (g_1 + ... + g_T) / T                       over="sequence": the whole row

The paper's gate is (Gate 3). In a causal model it would let tokens see the future, so there it is
(Gate 2), which at the last token is the paper's. (Gate 3) is for classifiers, which read a row
after it is complete. t counts virtual tokens in front, too: their vectors pass the same layers.

Trained parameters: D + 1 a gate.

    w    N(0, 0.02^2)        b    0        so gates start near 1/2

Reduces to: a constant, at w = 0; 1 and 0 for b far above and below 0.

How this differs from adapters, and from the authors' code: gates there average over the whole row,
padding included, and see the future; here G's sum is kept in the layer cache, so decoding token by
token is exact, padding is left out, and a row does not depend on its neighbours.

Footguns: a mean over padding; a sum that goes on from padding when decoding; a step counted twice;
another row's sum after beams were reordered (it is in the cache's `state`, which follows).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.decoding import evaluating
from minipeft.gpt import RowLengths
from minipeft.technique import attachment_of

# -- the math


def token_gates(x, weight, bias):
    """g of each token, x (B, T, D) -> (B, T), in float32 or wider. (Gate 1)"""
    g = F.linear(x, weight, bias).squeeze(-1).sigmoid()
    return g.to(torch.promote_types(g.dtype, torch.float32))


def running_mean(g, total=0.0, count=0):
    """The mean of all gates up to each token, and the sums: g (B, T) -> (B, T), (B, T). (Gate 2)

    total: the sum (B, 1) over earlier tokens, count: how many they were, an int or (B, 1).
    """
    sums = total + g.cumsum(1)
    return sums / (count + torch.arange(1, g.shape[1] + 1, device=g.device)), sums


def sequence_mean(g, real=None):
    """The row's mean for each of its tokens, (B, T) -> (B, T). real (B,): tokens that are no
    padding, None for all. (Gate 3)
    """
    if real is None:
        return g.mean(1, keepdim=True).expand_as(g)
    inside = torch.arange(g.shape[1], device=g.device) < real[:, None]
    return ((g * inside).sum(1) / real)[:, None].expand_as(g)


# -- the modules


class BlockPass:
    """What the parts of one block share while it runs: the layer cache, which sub-layers do not get
    to see, and the prefix's gate, which the attention core cannot compute.
    """

    def __init__(self, over):
        self.over, self.cache, self.prefix = over, None, None

    def mean(self, key, g):
        """G for the gates g (B, T) of this pass; `key` names the gate in the layer cache."""
        cache = self.cache
        if self.over == "sequence":
            return sequence_mean(g, self.real())
        if cache is None or isinstance(cache, RowLengths):
            return running_mean(g)[0]
        count = cache.cache.length  # virtual tokens in front have gates too, and count
        count = count[:, None] if isinstance(count, torch.Tensor) else count
        G, sums = running_mean(g, cache.state.get(key, 0.0), count)
        real = cache.cache.real
        cache.state[key] = sums[:, -1:] if real is None else sums.gather(1, real[:, None] - 1)
        return G

    def real(self):
        """Positions of each row that are no padding, None for all; in sequence mode."""
        if self.cache is not None and not isinstance(self.cache, RowLengths):
            raise ValueError(
                'gate_over="sequence" needs the whole row at once, so it cannot decode with a '
                'cache; use gate_over="past"'
            )
        return None if self.cache is None else self.cache.real


class Gate(nn.Module):
    """G of one technique in one block, x (B, T, D) -> (B, T). (Gate 1)"""

    def __init__(self, current, key, width, **place):
        super().__init__()
        self.current, self.key = current, key
        self.weight = nn.Parameter(torch.empty(1, width, **place).normal_(0.0, 0.02))
        self.bias = nn.Parameter(torch.zeros(1, **place))

    def forward(self, x):
        return self.current.mean(self.key, token_gates(x, self.weight, self.bias))


class GatedBlock(wrap.Wrapper):
    """A block that tells the gates inside which cache is at work."""

    def __init__(self, inner, current):
        super().__init__(inner)
        self.current = current

    def forward(self, x, cache=None):
        self.current.cache = cache
        try:
            return self.inner(x, cache)
        finally:
            self.current.cache = self.current.prefix = None


def gate_values(model, ids, lengths=None, name=None):
    """How far each gate is open for each token, in eval mode: {"q", "v", "prefix" or "adapter":
    G (layers, B, T)}, for those that there are, layers from the bottom up.

    lengths (B,): real tokens in each right-padded row. Raises ValueError where there are no gates.
    """
    attachment, seen = attachment_of(model, name), {}
    gates = {g: None for w in attachment.wrappers() for g in w.modules() if isinstance(g, Gate)}
    gates = [g for g in gates if g.key.startswith(f"{attachment.name}/")]
    if not gates:
        raise ValueError(f"{attachment.name!r} is no UniPELT, so it has no gates")

    def note(gate, args, G):
        seen.setdefault(gate.key.rpartition("/")[2], []).append(G[:, -ids.shape[1] :])

    hooks = [gate.register_forward_hook(note) for gate in gates]
    try:
        with evaluating(model), torch.no_grad():
            model.features(ids, lengths=lengths)
    finally:
        for hook in hooks:
            hook.remove()
    return {part: torch.stack(values) for part, values in seen.items()}
