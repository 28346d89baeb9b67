"""A module whose own tensors are moved while it is called, whatever the module is.

Diff pruning changes every tensor there is, in linear layers, embeddings and LayerNorms alike. So
nothing is written again for each kind: the module is called as it is, with other tensors in the
places of its own.

Footguns: a tensor that two modules share (the tied head reads the token table) has one change,
which must be registered once and merged once.
"""

from __future__ import annotations

import copy

from torch import nn
from torch.func import functional_call

from minipeft import wrap


class DiffModule(wrap.Wrapper):
    """Any module with its own tensors moved by their changes; called as the module is.

    changes: {tensor's name: SparseChange}. embedding: for the tied head the Embedding whose token
    table it shares, with the change and the merged weight; None elsewhere.
    """

    moves_base = True

    def __init__(self, inner, changes, embedding=None):
        super().__init__(inner)
        self.seen = (changes, embedding)  # in a tuple, so that nn.Module registers nothing twice
        if embedding is None:
            self.change = nn.ModuleDict(changes)

    def forward(self, *args):
        base, prefix = self.inner, ""
        while isinstance(base, wrap.Wrapper):
            base, prefix = base.inner, prefix + "inner."
        moved = {prefix + n: getattr(base, n) + c() for n, c in self.seen[0].items()}  # (Diff 1)
        return functional_call(self.inner, moved, args)

    def merged(self, inner):
        changes, embedding = self.seen
        twin = copy.copy(inner)
        twin._parameters = dict(inner._parameters)
        for name, change in changes.items():
            base = inner._parameters[name]
            if embedding is None:
                moved = nn.Parameter(base.detach() + change.settled(), base.requires_grad)
            else:  # the table was merged before the head
                moved = embedding.token.weight
            twin._parameters[name] = moved
        return twin
