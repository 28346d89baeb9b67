r"""SparseGPT: prune, and let the other weights make up for it (Frantar & Alistarh, 2023,
arXiv 2301.00774).

Optimal brain surgery in one sweep over the columns: a weight that is cut leaves an error in the
layer's output, and the columns to its right, not yet decided, are moved to cancel it.

    (SparseGPT 1)   H = X X^T + 0.01 mean(diag X X^T) I        the layer's squared error, X (in, n)
    (SparseGPT 2)   H^-1 = U^T U                               U upper triangular
    (SparseGPT 3)   S_ij = W_ij^2 / U_jj^2                     the error that cutting W_ij leaves
    (SparseGPT 4)   in every block of columns the smallest S go, so many that s is met so far;
                    or a z:g pattern in S
    (SparseGPT 5)   e = W_:j / U_jj where cut, else 0;   W_:,j.. <- W_:,j.. - e U_j,j..

W in R^(out x in). U_jj^2 is [(H_j..,j..)^-1]_11, the inverse for the columns that are still free:
one factorisation gives what would take an inverse a column. The mask of a block is chosen when
the sweep reaches it, on weights that earlier blocks have moved.

Trained parameters: none; the weights that stay are solved for, not trained.

Reduces to: magnitude pruning per block of columns, nothing updated, where H is proportional to I.

How this differs from the authors' code: the number of zeros is exact (there `<=` at a threshold
takes one more a block), the arithmetic is float64, no quantisation is mixed in. An input that is
always 0 loses its weights first, as there.

Footguns: the lower triangle for the upper; scores from H's diagonal and not its inverse's;
the error pushed to columns on the left, which are decided; masks of the whole matrix up front.
"""

from __future__ import annotations

import torch

from minipeft.compressed.calibration import for_each_projection
from minipeft.compressed.magnitude_pruning import count_of, keep_largest, keep_pattern
from minipeft.compressed.wanda import check_request

BLOCK = 128
DAMPING = 0.01


def inverse_factor(G, damping=DAMPING):
    """U (in, in), upper triangular, of (SparseGPT 2), from G = X X^T (in, in) float64."""
    H = G.clone()
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    H.diagonal().add_(damping * H.diagonal().mean())  # (SparseGPT 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    return torch.linalg.cholesky(inverse, upper=True)  # (SparseGPT 2)


def sparsegpt(weight, G, sparsity=0.5, pattern=None, block=BLOCK, damping=DAMPING):
    """The pruned and updated weight (out, in) in float64, and its mask, bool.

    G (in, in): sum of x x^T over the calibration tokens. pattern: (zeros, group) for a sparsity.
    """
    W, U = weight.detach().double().clone(), inverse_factor(G.double(), damping)
    W[:, G.diagonal() == 0] = 0
    keep = torch.ones_like(W, dtype=torch.bool)
    if pattern is not None:
        block = pattern[1]  # its masks are chosen a group at a time
    for first in range(0, W.shape[1], block):
        last = min(first + block, W.shape[1])
        scores = (W[:, first:last] / U.diagonal()[first:last]).square()  # (SparseGPT 3)
        keep[:, first:last] = block_mask(scores, first, sparsity, pattern)
        for j in range(first, last):
            error = torch.where(keep[:, j], 0, W[:, j] / U[j, j])
            W[:, j:] -= error[:, None] * U[j, j:]  # (SparseGPT 5)
    return W.masked_fill_(~keep, 0), keep


def block_mask(scores, first, sparsity, pattern):
    """What stays in the block of columns that begins at `first`. (SparseGPT 4)"""
    if pattern is not None:
        return keep_pattern(scores, *pattern)
    rows, width = scores.shape
    due = count_of(sparsity, rows * (first + width)) - count_of(sparsity, rows * first)
    return keep_largest(scores, due / max(1, scores.numel()))  # 0 of 0 where no head is left


def prune_sparsegpt(model, batches, sparsity=0.5, pattern=None):
    """Prune all projections in place with calibration `batches` (calibration.py); returns the
    model. pattern: (zeros, group), such as (2, 4), instead of a sparsity.

    Raises ValueError for a sparsity outside [0, 1), a pattern that does not fit, no text, and a
    model that carries techniques or is no floats; the model is then as it was.
    """
    check_request(model, sparsity, pattern)

    def act(path, linear, G):
        linear.weight.copy_(sparsegpt(linear.weight, G, sparsity, pattern)[0])

    for_each_projection(model, batches, act)
    return model
