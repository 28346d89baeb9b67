r"""The faster twin of cross_entropy.py's `rows_loss_and_gradient`: one exponential a logit.

The definition takes exp(z) twice, once to sum it for (CE 2) and once for the softmax of (CE 3).
With log-probabilities written over the logits,

    z <- z - logsumexp(z)        the loss is -z_y
    z <- exp(z)                  the softmax

one pass serves both, and nothing of the logits' size is allocated. The last bits differ: the
exponent is rounded once more.

Bytes that must move: z read and written, 8 a logit in float32. The definition reads z three times
and writes it twice.
"""

from __future__ import annotations

import torch

IGNORE = -100


def rows_loss_and_gradient(z, labels, gradient=True):
    """As the definition. z (m, V) float, always overwritten; labels (m,)."""
    if z.dtype.itemsize < 4:
        exact = z.float()
        loss = rows_loss_and_gradient(exact, labels, gradient)
        z.copy_(exact)
        return loss
    counts = labels != IGNORE
    target = labels.where(counts, 0)[:, None]
    torch.log_softmax(z, -1, out=z)
    loss = -(z.gather(-1, target)[:, 0] * counts).sum()
    if gradient:
        z.exp_()
        z.scatter_add_(-1, target, torch.full_like(target, -1, dtype=z.dtype))
        z.mul_(counts[:, None])
    return loss


def examples(device, dtype=torch.float32):
    """Odd sizes, a single row, rows that do not count, huge logits."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows, width, scale in ((7, 47, 1.0), (1, 3, 5.0), (33, 130, 30.0)):
        z = scale * torch.randn(rows, width, generator=generator)
        labels = torch.randint(0, width, (rows,), generator=generator)
        labels[1::3] = IGNORE
        for gradient in (True, False):
            found.append((z.to(device, dtype), labels.to(device), gradient))
    return found


EXAMPLES = {"rows_loss_and_gradient": examples}
