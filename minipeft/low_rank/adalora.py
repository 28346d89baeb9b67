r"""AdaLoRA: ranks bought from one budget (Zhang et al., 2023, arXiv 2303.10512).

A low-rank change written like a singular value decomposition; during training the least important
triplets (a left vector, a value, a right vector), whichever matrix they are in, are switched off.

    h = W x + b + s P diag(E) Q x                    (AdaLoRA 1), computed in triplets.py

    (AdaLoRA 2)   s = alpha / (r_0 + 1e-5)           r_0 = init_rank; not the ranks that are left
    (AdaLoRA 3)   R = sum over matrices |P^T P - I|_F^2 + |Q Q^T - I|_F^2        the paper's penalty
    (AdaLoRA 4)   R = mean over P and Q of all matrices of |P^T P - I|_F, |Q Q^T - I|_F      peft's

Which triplets stay is up to rank_allocator.py. It runs in `after_step`, after the optimizer and
before the gradients are cleared; our loop calls it, `follow` lets a user's optimizer call it. In
the last tfinal steps the choice stands, and what was not chosen is removed from the file. The loss
gets gamma R.

Trained parameters: the sum over the chosen projections of r_0 (in + out + 1), and about the share
target_rank / init_rank of it in the file. With `share_qkv` Q and E serve q, k and v and count once,
as on peft's c_attn.

    P, Q    N(0, 0.02^2)
    E       0               so the model at the start is the base, bitwise

Reduces to: LoRA when nothing is switched off (E goes into Q). For orthonormal P and Q R is 0.

How this differs: the default penalty is (AdaLoRA 4), peft's, because the authors' code and all
published weights gamma go with it, and because its size does not grow with rank and depth; ask for
(AdaLoRA 3) by penalty="paper". With lora_alpha 0 peft reloads with another scale than it trained.

Footguns: training without the allocator: all ranks stay and nobody notices (here: an error when
saving or merging); clearing the gradients first; alpha / r_0 updated to the ranks that are left; a
schedule in steps of another run's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from minipeft import wrap
from minipeft.low_rank.kept_triplets import cut, padded
from minipeft.low_rank.lora import PROJECTIONS, LoRA, projection_shape
from minipeft.low_rank.rank_allocator import (
    allocate,
    budget,
    groups_of,
    scores_after_step,
    switch_off,
)
from minipeft.low_rank.triplets import AdaLoRALinear
from minipeft.technique import Technique


def adalora_scale(alpha, init_rank):
    """s of (AdaLoRA 2); the 1e-5 is the authors'."""
    return alpha / (init_rank + 1e-5)


def off_orthonormal(P, Q, kept):
    """P^T P - I and Q Q^T - I, (r, r) each, for P (out, r), Q (r, in) and kept (r,) bool: rows that
    were removed are 0 and have no place in I either.
    """
    eye = torch.diag(kept.to(Q.dtype))
    return P.T @ P - eye, Q @ Q.T - eye


def paper_penalty(triples):
    """R of the paper over a list of (P, Q, kept), a scalar. (AdaLoRA 3)"""
    return sum(gap.square().sum() for triple in triples for gap in off_orthonormal(*triple))


def peft_penalty(triples):
    """R of peft and of the authors' code over a list of (P, Q, kept), a scalar. (AdaLoRA 4)"""
    gaps = [gap for triple in triples for gap in off_orthonormal(*triple)]
    return sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)


PENALTIES = {"peft": peft_penalty, "paper": paper_penalty}


@dataclass(frozen=True)
class AdaLoRA(Technique):
    """Low-rank adaptation whose ranks are allocated while it trains.

    init_rank: r_0, triplets a matrix at the start.
    target_rank: triplets a matrix on average at the end; at most init_rank.
    alpha: the scale is alpha / init_rank.
    dropout: probability of dropping what Q reads, in training.
    targets: some of q, k, v, o, up, down.
    share_qkv: one Q and E for q, k and v (all three must be targets), as peft has it on GPT-2.
    tinit: steps before the budget falls; below 1 a share of all steps.
    tfinal: steps at the end in which the choice stands; below 1 a share of all steps.
    delta_t: steps from one allocation to the next.
    beta1: of the average of the sensitivity.
    beta2: of the average of the uncertainty.
    gamma: weight of the penalty that keeps P and Q orthonormal.
    penalty: "peft" (mean of norms) or "paper" (sum of squares).
    """

    init_rank: int = 12
    target_rank: int = 8
    alpha: float = 48
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q", "v")
    share_qkv: bool = False
    tinit: float = 0.1
    tfinal: float = 0.3
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    gamma: float = 0.1
    penalty: str = "peft"

    learning_rate: ClassVar[float] = 2e-2

    @property
    def scale(self):
        """s of (AdaLoRA 2)."""
        return adalora_scale(self.alpha, self.init_rank)

    def check(self, config):
        LoRA(1, 1, self.dropout, self.targets, False, self.share_qkv).check(config)
        limit = min(min(projection_shape(config, target)) for target in self.targets)
        if not 1 <= self.init_rank <= limit:
            raise ValueError(
                f"init_rank={self.init_rank} must be from 1 to {limit}, the smaller side of the "
                f"targets {self.targets}"
            )
        if not 1 <= self.target_rank <= self.init_rank:
            raise ValueError(
                f"target_rank={self.target_rank} must be from 1 to init_rank={self.init_rank}"
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.penalty not in PENALTIES:
            raise ValueError(f"penalty={self.penalty!r}; choose from {', '.join(PENALTIES)}")
        for name, least in (("tinit", 0), ("tfinal", 0), ("gamma", 0), ("delta_t", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def install(self, model, attachment):
        for n in range(len(model.blocks)):
            shared = None  # the first of this block's q, k and v, once there is one
            for target in self.targets:
                path = f"blocks.{n}.{PROJECTIONS[target]}"
                joint = self.share_qkv and target in "qkv"
                layer = AdaLoRALinear(
                    wrap.resolve(model, path),
                    self.init_rank,
                    self.scale,
                    self.dropout,
                    shared if joint else None,
                )
                attachment.wrap(model, path, layer)
                shared = layer if joint and shared is None else shared

    def count(self, config):
        total = 0
        for target in self.targets:
            out, into = projection_shape(config, target)
            total += self.init_rank * (into + out + 1)
        saved = 2 * self.init_rank * (config.d_model + 1) if self.share_qkv else 0
        return config.n_layer * (total - saved)

    def window(self, total_steps):
        """(t_i, t_f) in steps. Raises ValueError when no step is left between them."""
        warm, final = (int(t * total_steps) if t < 1 else int(t) for t in (self.tinit, self.tfinal))
        if warm >= total_steps - final:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave AdaLoRA no step to allocate "
                f"in, of {total_steps} in all; make them smaller or train longer"
            )
        return warm, final

    def extra_loss(self, model, attachment):
        """gamma R over all matrices. (AdaLoRA 3) (AdaLoRA 4)"""
        if self.gamma == 0:
            return None
        groups = groups_of(attachment).values()
        triples = [(torch.cat([l.P for l in g]), g[0].Q, g[0].kept) for g in groups]
        return self.gamma * PENALTIES[self.penalty](triples)

    @torch.no_grad()
    def after_step(self, model, attachment, step, total_steps):
        """One step of the allocator; step counts from 1."""
        groups, state = groups_of(attachment), attachment.state
        warm, final = self.window(total_steps)
        state["allocator_steps"] = state.get("allocator_steps", 0) + 1
        if not all(layers[0].kept.all() for layers in groups.values()):  # the choice stands
            for layers in groups.values():
                switch_off(layers, layers[0].kept, True)
            return
        scores = scores_after_step(state, groups, self.beta1, self.beta2)
        sizes = (self.init_rank * len(groups), self.target_rank * len(groups))
        last = step >= total_steps - final
        if last or (step > warm and step % self.delta_t == 0):
            kept = allocate(scores, budget(step, total_steps, warm, final, *sizes))
            for path, layers in groups.items():
                switch_off(layers, kept[path], last)
        if last:  # the averages have done their work
            for name in [n for n in state if n.endswith((".M", ".U"))]:
                del state[name]

    def check_ready(self, attachment):
        trained = any(layer.had_gradient for layer in attachment.wrappers())
        if trained and not attachment.state.get("allocator_steps"):
            raise ValueError(
                f"AdaLoRA ({attachment.name!r}) was trained but its allocator never ran, so no "
                "rank was chosen; call technique.follow(optimizer, model, total_steps) before "
                "training, or after_step after each step, and train again"
            )

    def export(self, attachment):
        """The triplets that are kept, and which they were."""
        return cut(attachment, super().export(attachment))

    def unpack(self, attachment, tensors):
        """What `export` gave in its full shape: what was removed is 0."""
        return padded(attachment, tensors)
