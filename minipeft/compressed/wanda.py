r"""Wanda: pruning by weights and activations (Sun et al., 2023, arXiv 2306.11695).

A small weight on a large input matters more than a large weight on a small one.

    (Wanda 1)   S_ij = |W_ij| ||X_j||_2            X_j: input j over all tokens of the text
    (Wanda 2)   in every row i the floor(s in) smallest S_ij go; or a z:g pattern in S

W in R^(out x in). Nothing is updated: the weights that stay are those that were there. Rows
are compared within themselves, for each output has a scale of its own.

Trained parameters: none.

Reduces to: magnitude pruning per row with unit activations.

How this differs from the authors' code: they take the mean over sequences of ||X_j||^2, which
scales all of a layer's scores alike and changes no mask. Blocks are done in order on the inputs
that the pruned blocks before them give, as there.

Footguns: comparing over the whole matrix, which prunes whole rows of small scale; the mean of X
for its norm (signs cancel); a calibration text that is not the kind of text that comes later.
"""

from __future__ import annotations

import torch

from minipeft.compressed.calibration import for_each_projection
from minipeft.compressed.magnitude_pruning import (
    check_pattern,
    check_sparsity,
    count_of,
    keep_pattern,
    projections,
)


def wanda_scores(weight, norms):
    """S (out, in) of a weight (out, in) and its inputs' norms (in,). (Wanda 1)"""
    return weight.abs() * norms


def wanda_mask(scores, sparsity, pattern=None):
    """What stays of S (out, in), bool: every row loses its floor(s in) smallest. (Wanda 2)"""
    if pattern is not None:
        return keep_pattern(scores, *pattern)
    lowest = scores.argsort(dim=1, stable=True)[:, : count_of(sparsity, scores.shape[1])]
    return torch.ones_like(scores, dtype=torch.bool).scatter(1, lowest, False)


def prune_wanda(model, batches, sparsity=0.5, pattern=None):
    """Prune all projections in place with calibration `batches` (calibration.py); returns the
    model. pattern: (zeros, group), such as (2, 4), instead of a sparsity.

    Raises ValueError for a sparsity outside [0, 1), a pattern that does not fit, no text, and a
    model that carries techniques or is no floats; the model is then as it was.
    """
    check_request(model, sparsity, pattern)

    def act(path, linear, G):
        scores = wanda_scores(linear.weight.double(), G.diagonal().sqrt())
        linear.weight.masked_fill_(~wanda_mask(scores, sparsity, pattern), 0)

    for_each_projection(model, batches, act)
    return model


def check_request(model, sparsity, pattern):
    """Raise ValueError before anything is pruned, rather than half-way."""
    check_sparsity(sparsity)
    if pattern is not None:
        for linear in projections(model).values():
            check_pattern(pattern, linear.in_features)
