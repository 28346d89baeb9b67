r"""AdapterFusion (Pfeiffer et al., 2020, arXiv 2005.00247): a new task chooses, token by token,
among adapters trained on other tasks.

Stage one, knowledge extraction: N adapters, each trained alone on its own task. Stage two,
knowledge composition: all N are frozen, and one attention over them per layer is trained. Its
query is what the adapters read (x in R^D), keys and values are what they give (z_n in R^D):

    (AdapterFusion 1)   z_n = A_n(x)                                 n = 1 .. N, frozen
    (AdapterFusion 2)   p   = softmax_n( (Q x + b_q)^T (K z_n + b_k) )     no 1/sqrt(D)
    (AdapterFusion 3)   y   = f + V sum_n p_n z_n                    f the sub-layer's output
    (AdapterFusion 4)   L'  = L + lambda ||V - I||_F^2               summed over the layers

Trained parameters: Q, K, V in R^(D x D) and two biases a layer, L (3 D^2 + 2 D), whatever N is.

    Q, K        N(0, 0.02^2)
    b_q, b_k    0
    V           1 on the diagonal, 1e-6 elsewhere: at the start a mean of the adapters, nearly

So the start is not the base, it is the average of what the adapters say.

Reduces to: the one adapter at N = 1 and V = I, because a softmax over one is 1; the base when every
adapter gives 0.

How this differs from adapters: the same with the temperature at its usual 1 and no dropout on the
scores; there the adapters stay modules of the model, here the fusion keeps frozen copies, so its
file is complete and what happens to the single adapters later does not reach it. With parallel
adapters that library adds the residual twice; here y is (AdapterFusion 3).

Footguns: scores divided by sqrt(D); the adapters' inner residual inside z_n (then every value is
nearly f, and the keys hardly differ); adapters trained on top of each other instead of each alone;
b_k adds one number to all N scores, so it never learns, and nor do Q and K at N = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.additive.adapter import Adapter, check_layers, place_of
from minipeft.additive.adapter_sources import (
    build_adapter,
    check_sources,
    described,
    find_source,
    sites_without,
)
from minipeft.technique import Technique, attachment_of, set_adapter


def fusion_weights_of(x, Z, Q, b_q, K, b_k):
    """p, (..., N), for x (..., D) and the adapters' outputs Z (..., N, D). (AdapterFusion 2)"""
    q = nn.functional.linear(x, Q, b_q)
    keys = nn.functional.linear(Z, K, b_k)  # (..., N, D)
    return (keys @ q[..., None]).squeeze(-1).softmax(-1)  # (..., N, D) x (..., D, 1) -> (..., N)


def fuse(x, Z, Q, b_q, K, b_k, V):
    """V sum_n p_n z_n, (..., D). (AdapterFusion 3)"""
    p = fusion_weights_of(x, Z, Q, b_q, K, b_k)
    return nn.functional.linear((p[..., None, :] @ Z).squeeze(-2), V)


def value_penalty(V):
    """||V - I||_F^2. (AdapterFusion 4)"""
    return (V - torch.eye(V.shape[0], dtype=V.dtype, device=V.device)).square().sum()


class FusionAttention(nn.Module):
    """Attention over frozen adapters, (..., D) -> (..., D). It stands where one adapter stands."""

    def __init__(self, adapters, width, **place):
        super().__init__()
        self.query = nn.Linear(width, width, **place)
        self.key = nn.Linear(width, width, **place)
        self.value = nn.Linear(width, width, bias=False, **place)
        self.adapters = nn.ModuleList(frozen(adapter) for adapter in adapters)
        for linear in (self.query, self.key):
            nn.init.normal_(linear.weight, 0.0, 0.02)
            nn.init.zeros_(linear.bias)
        nn.init.constant_(self.value.weight, 1e-6)
        with torch.no_grad():
            self.value.weight.fill_diagonal_(1.0)

    def outputs(self, x):
        """Z, (..., N, D). (AdapterFusion 1)"""
        return torch.stack([adapter(x) for adapter in self.adapters], -2)

    def attention(self):
        """Q, b_q, K, b_k."""
        return self.query.weight, self.query.bias, self.key.weight, self.key.bias

    def weights(self, x):
        """p, (..., N): how much each adapter counts. (AdapterFusion 2)"""
        return fusion_weights_of(x, self.outputs(x), *self.attention())

    def forward(self, x):
        return fuse(x, self.outputs(x), *self.attention(), self.value.weight)


def frozen(module):
    """The module with its parameters turned into buffers: saved and moved, never trained."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                delattr(part, name)
                part.register_buffer(name, parameter.detach().clone())
    return module


# -- the technique


@dataclass(frozen=True)
class AdapterFusion(Technique):
    """Stage two of AdapterFusion: an attention over frozen single-task adapters in every layer.

    adapters: what to fuse, each the name of an attachment (switched off while the fusion is on),
        a folder, or a mapping with name, technique (an Adapter) and tensors.
    penalty: lambda, how strongly V is pulled to the identity.
    leave_out: layers, from 0, without fusion and without adapters (AdapterDrop).
    """

    adapters: tuple[Any, ...] = ()
    penalty: float = 0.01
    leave_out: tuple[int, ...] = ()

    learning_rate: ClassVar[float] = 1e-3
    cannot_merge: ClassVar[str | None] = (
        "each token mixes the adapters with weights of its own; no fixed matrix computes the same"
    )

    def __post_init__(self):
        given = tuple(described(one, n) for n, one in enumerate(self.adapters))
        object.__setattr__(self, "adapters", given)
        object.__setattr__(self, "leave_out", tuple(self.leave_out))

    def check(self, config):
        if not self.adapters:
            raise ValueError("adapters=() is empty; name at least one adapter to fuse")
        if self.penalty < 0:
            raise ValueError(f"penalty={self.penalty} must not be negative")
        check_layers("leave_out", self.leave_out, config)

    def attach(self, model, name="default"):
        """As for every technique; attached adapters that are fused are switched off, since they act
        through the fusion now. `detach` switches them on again.
        """
        names = {str(given) for given in self.adapters if isinstance(given, str)}
        active = [a for a in model.attachments if a.active]
        fused = [a for a in active if a.name in names]
        set_adapter(model, [a.name for a in active if a not in fused])
        try:
            super().attach(model, name)
        except BaseException:
            set_adapter(model, [a.name for a in active])
            raise
        attachment_of(model, name).suspended = fused
        return model

    def install(self, model, attachment):
        sources = [find_source(model, given, n) for n, given in enumerate(self.adapters)]
        check_sources(sources, self.leave_out, len(model.blocks))
        sites = sites_without(sources[0].technique, self.leave_out, len(model.blocks))
        for path, form in sites:
            adapters = [build_adapter(model, path, source) for source in sources]
            fusion = FusionAttention(adapters, **place_of(model, path))
            attachment.wrap(model, path, form(wrap.resolve(model, path), fusion))
        recipe = tuple(replace(source, tensors=None) for source in sources)
        attachment.technique = replace(self, adapters=recipe)  # what a file needs to build it again

    def extra_loss(self, model, attachment):
        terms = [value_penalty(w.adapter.value.weight) for w in attachment.wrappers()]
        return self.penalty * sum(terms) if self.penalty and terms else None

    def count(self, config):
        D = config.d_model
        return (config.n_layer - len(self.leave_out)) * (3 * D * D + 2 * D)


def extract_knowledge(model, tasks, train, technique=None):
    """Stage one: one adapter for each task, each trained with no other one on the model.

    tasks: name -> data. train: called as train(model, data) with the task's adapter as the only
    trainable thing. technique: the adapter, Pfeiffer's by default. Returns the names; the adapters
    stay attached, switched off, ready for AdapterFusion(adapters=names).
    """
    technique = technique or Adapter(placement="pfeiffer")
    others = [a.name for a in model.attachments if a.active]
    for name, data in tasks.items():
        technique.attach(model, name)
        try:
            train(model, data)
        finally:
            set_adapter(model, others)
    return list(tasks)


@torch.no_grad()
def fusion_weights(model, ids, name=None):
    """How much each adapter counts, for every layer and token: (layers, B, T, N), rows that sum to
    1, layers with fusion from the bottom up, adapters in their order. Run in eval mode.
    """
    attachment, seen = attachment_of(model, name), []
    fusions = [w.adapter for w in attachment.wrappers() if isinstance(w.adapter, FusionAttention)]
    if not fusions:
        raise ValueError(f"{attachment.name!r} is no AdapterFusion, so it has no fusion weights")
    hooks = [
        fusion.register_forward_hook(lambda module, args, y: seen.append(module.weights(*args)))
        for fusion in fusions
    ]
    was_training = model.training
    try:
        model.eval().features(ids)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return torch.stack(seen)[:, :, -ids.shape[1] :]  # behind virtual tokens, where there are any
