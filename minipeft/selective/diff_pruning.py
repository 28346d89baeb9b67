r"""Diff pruning: learn a sparse change of all parameters (Guo et al., 2020, arXiv 2012.07463).

Every parameter may move, but a gate in front of each change learns to be exactly 0; what is stored
in the end are the few changes whose gates stayed open, and where they are.

    (Diff 1)   theta = theta_0 + z * w               w, z in R^|theta|, theta_0 frozen
    (Diff 2)   s = sigmoid(log u - log(1 - u) + alpha),    u ~ U(0, 1)       a soft coin
    (Diff 3)   z = min(1, max(0, (r - l) s + l))     stretched over its ends: 0 and 1 are likely
    (Diff 4)   z = min(1, max(0, (r - l) sigmoid(alpha) + l))      without the coin, to evaluate
    (Diff 5)   P(z > 0) = sigmoid(alpha - log(-l / r))
    (Diff 6)   loss + lambda (1 / N) sum over all gates of P(z > 0)
    (Diff 7)   z_i = z'_i z_g,   P(z_i > 0) = P(z'_i > 0) P(z_g > 0)      structured: g, i's tensor
    (Diff 8)   mask = the share `sparsity` of all |z * w| that is largest

(l, r) = (-1.5, 1.5), N is the number of parameters. In the first part of training w and the gates
learn; then (Diff 8) fixes the mask, and the w that are in it are tuned on. A structured group is
one weight matrix or one vector; a shut group gate drops it whole.

Trained parameters: 2 N, and one more for each tensor if structured; stored are sparsity N values
and their indices.

    w        0           so the model at the start is the base, bitwise
    alpha    5           all gates open, both kinds

Reduces to: the base with every gate shut; full fine-tuning of the change with every gate open.

How this differs: the authors give alpha another learning rate (0.1) than w (1e-5). Adam does not
see units, so alpha = gate_speed * a with a trained is the same thing and works in any loop. Their
lambda, 1.25e-7 a gate, is 42 in the units of (Diff 6) for BERT-large's 335 million parameters.
Their classifier stays dense: attach `Head`. The tied head draws its own coins for the weight it
shares. peft and adapters have no diff pruning.

Footguns: training keeps theta_0, w and alpha and saves no memory, only the file is small; Adam
moves masked entries on by momentum, so the mask must be applied after every step; a mask from |w|
ignores that the gate already shrank the change; an index costs as much as a value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.selective.diff_module import DiffModule
from minipeft.selective.full import FullFineTuning, is_base_parameter
from minipeft.selective.sparse_files import pack, unpacked
from minipeft.technique import Technique

L, R = -1.5, 1.5  # the ends of the stretched interval, (l, r)
START = 5.0  # alpha at the start
FIXED = 20.0  # alpha of a gate that was decided: open or shut for any coin


def stretch(s):
    """Soft coins s in (0, 1) to gates in [0, 1] with both ends likely. (Diff 3) (Diff 4)"""
    return ((R - L) * s + L).clamp(0, 1)


def drawn_gates(alpha, u):
    """Gates of these alpha under the coins u, of one shape. (Diff 2) (Diff 3)"""
    u = u.clamp(1e-4, 1 - 1e-4)
    return stretch(torch.sigmoid(u.log() - (1 - u).log() + alpha))


def expected_gates(alpha):
    """Gates without coins, of alpha's shape. (Diff 4)"""
    return stretch(torch.sigmoid(alpha))


def open_probability(alpha):
    """P(z > 0), of alpha's shape. (Diff 5)"""
    return torch.sigmoid(alpha - math.log(-L / R))


def largest(changes, share):
    """Which entries of a list of tensors are kept: bool tensors of their shapes, with exactly
    floor(share * entries) True, the largest in size over all of them. (Diff 8)
    """
    flat = torch.cat([change.abs().flatten() for change in changes])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[: int(share * len(flat))]] = True
    parts = mask.split([change.numel() for change in changes])
    return [part.view_as(change) for part, change in zip(parts, changes)]


class SparseChange(nn.Module):
    """z * w for one tensor of the base: w and gate of its shape, group one number (or None)."""

    def __init__(self, like, speed, structured):
        super().__init__()
        place = {"device": like.device, "dtype": like.dtype}
        self.speed = speed
        self.w = nn.Parameter(torch.zeros(like.shape, **place))
        self.gate = nn.Parameter(torch.full(like.shape, START / speed, **place))
        self.group = nn.Parameter(torch.full((), START / speed, **place)) if structured else None

    def alphas(self):
        """alpha of the gates and of the group's, if there is one."""
        return [self.speed * a for a in (self.gate, self.group) if a is not None]

    def gates(self, drawn):
        """z of w's shape, with coins or as expected. (Diff 7)"""
        z = 1.0
        for alpha in self.alphas():
            z = z * (drawn_gates(alpha, torch.rand_like(alpha)) if drawn else expected_gates(alpha))
        return z

    def forward(self):
        """z * w: the coins fall in training only. (Diff 1)"""
        return self.gates(self.training) * self.w

    def settled(self):
        """z * w without coins, whatever the mode."""
        return self.gates(False) * self.w

    def expected_open(self):
        """How many gates are expected to be open. (Diff 5) (Diff 7)"""
        probability = 1.0
        for alpha in self.alphas():
            probability = probability * open_probability(alpha)
        return probability.sum()

    def fix(self, mask):
        """Decide all gates by `mask` (bool, w's shape) and zero the changes that are out."""
        decided = FIXED / self.speed
        self.w.masked_fill_(~mask, 0)
        self.gate.fill_(-decided).masked_fill_(mask, decided)
        if self.group is not None:
            self.group.fill_(decided)


def changes_of(attachment):
    """{path of a base tensor: its SparseChange}, each once."""
    return {
        f"{swap.path}.change.{name}": change
        for swap in attachment.swaps
        for name, change in getattr(swap.replacement, "change", {}).items()
    }


def modules_with_parameters(model):
    """{path: [names of its own tensors]} of the base's modules, wrappers left out."""
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = wrap.logical_name(name)
        if is_base_parameter(model, path, parameter):
            module, _, own = path.rpartition(".")
            found.setdefault(module, []).append(own)
    return found


@dataclass(frozen=True)
class DiffPruning(Technique):
    """A sparse change of all parameters. (Diff 1)

    sparsity: share of the parameters that end up changed.
    structured: a gate for each tensor as well as for each number.
    fix_at: share of the steps after which the mask is fixed; the rest tunes what is in it.
    l0_weight: lambda of (Diff 6), the weight of the share of gates that is open.
    gate_speed: how much faster alpha moves than w.
    """

    sparsity: float = 0.005
    structured: bool = True
    fix_at: float = 0.5
    l0_weight: float = 42.0
    gate_speed: float = 100.0

    learning_rate: ClassVar[float] = 5e-3

    def check(self, config):
        for name in ("sparsity", "fix_at"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a share in (0, 1]")
        if not self.l0_weight >= 0:
            raise ValueError(f"l0_weight={self.l0_weight} must be at least 0")
        if not self.gate_speed > 0:
            raise ValueError(f"gate_speed={self.gate_speed} must be above 0")
        size = FullFineTuning().count(config)
        if int(self.sparsity * size) < 1:
            raise ValueError(f"sparsity={self.sparsity} of {size} parameters keeps none of them")

    def install(self, model, attachment):
        changes = {}  # id of a base tensor -> its change: a shared tensor has one
        for path, names in modules_with_parameters(model).items():
            module, mine, embedding = wrap.resolve(model, path), {}, None
            if hasattr(module, "pools"):
                continue  # a classifier stands there; the language-model head is not used
            for name in names:
                tensor = wrap.resolve(model, f"{path}.{name}")
                if id(tensor) in changes:
                    embedding = wrap.base_module(model.embed)
                else:
                    changes[id(tensor)] = SparseChange(tensor, self.gate_speed, self.structured)
                mine[name] = changes[id(tensor)]
            attachment.wrap(model, path, DiffModule(module, mine, embedding))

    def count(self, config):
        tensors = 16 * config.n_layer + 4 if self.structured else 0
        return 2 * FullFineTuning().count(config) + tensors

    def extra_loss(self, model, attachment):
        """lambda times the share of gates expected to be open, until the mask is fixed. (Diff 6)"""
        if self.l0_weight == 0 or attachment.state.get("fixed"):
            return None
        changes = changes_of(attachment).values()
        size = sum(change.w.numel() for change in changes)
        return self.l0_weight / size * sum(change.expected_open() for change in changes)

    @torch.no_grad()
    def after_step(self, model, attachment, step, total_steps):
        """Fix the mask when its time has come, and put it back after every later step. (Diff 8)"""
        changes = list(changes_of(attachment).values())
        if attachment.state.get("fixed"):
            masks = [change.gate > 0 for change in changes]
        elif step >= max(1, int(self.fix_at * total_steps)):
            settled = [change.settled() for change in changes]
            masks = largest(settled, self.sparsity)
            for change, moved in zip(changes, settled):
                change.w.copy_(moved)
            attachment.state["fixed"] = True
        else:
            return
        for change, mask in zip(changes, masks):
            change.fix(mask)

    def export(self, attachment):
        """Once the mask is fixed: the changes in it and their places in the flattened tensor."""
        tensors = super().export(attachment)
        if not attachment.state.get("fixed"):
            return tensors
        return pack(changes_of(attachment))

    def unpack(self, attachment, tensors):
        """What `export` gave, with every w, gate and group in its full shape."""
        return unpacked(changes_of(attachment), tensors, FIXED)

    def restore(self, attachment, tensors):
        super().restore(attachment, tensors)
        fixed = all(f"{path}.indices" in tensors for path in changes_of(attachment))
        attachment.state["fixed"] = fixed
