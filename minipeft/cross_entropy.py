r"""Cross-entropy of a linear head, in chunks of tokens.

A language model's logits are its largest tensor: 2,048 tokens by 50,257 words is 412 MB in
float32, and autograd keeps two such tensors. Nothing needs all of them at once. With x in R^(M x
D), W in R^(V x D), targets y and n labels that count:

    (CE 1)   z   = x W^T                                      a chunk of rows at a time
    (CE 2)   l   = (1/n) sum_i [ logsumexp(z_i) - z_{i, y_i} ]
    (CE 3)   g   = dl/dz = (softmax(z) - onehot(y)) / n       written over z
    (CE 4)   dx  = g W        dW = sum over chunks of g^T x

The gradient is made in the forward pass, while the chunk is at hand, and scaled by the incoming
one in the backward. `dW` is skipped when the head is frozen, as it is in every PEFT run: 4 M D V
operations instead of 6.

How this differs: torch's F.linear_cross_entropy chooses 8-row chunks at such shapes and is 5
times slower unless told otherwise; transformers and nanoGPT hold all logits.

Footguns: a mean over all M rows instead of the n that count; a chunk without any label (0/0);
int32 offsets.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never

IGNORE = -100  # a label that does not count
CHUNK = 256  # rows of logits held at once
FLOATS = (torch.float32, torch.float16, torch.bfloat16)  # what the Triton kernel takes


def linear_cross_entropy(x, weight, labels, chunk=CHUNK):
    """Mean cross-entropy in nats of softmax(x W^T). x (M, D), weight (V, D), labels (M,) with
    -100 ignored -> scalar.

    Twice differentiable it is not; use `linear_cross_entropy_written_out` for that. With no label
    to count the loss is 0.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _LinearCrossEntropy.apply(x, weight, labels, chunk, torch.is_grad_enabled())


def linear_cross_entropy_written_out(x, weight, labels):
    """The definition, with all logits at once. (CE 1) (CE 2)"""
    return cross_entropy(x @ weight.T, labels)


def cross_entropy(logits, labels):
    """Mean cross-entropy in nats of logits (M, V) over the labels (M,) that count, in float32 or
    better; 0 if none does.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    return total / (labels != IGNORE).sum().clamp(min=1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, labels, chunk, recorded):
        need_x, need_weight = (recorded and n for n in ctx.needs_input_grad[:2])  # no_grad or not
        count = (labels != IGNORE).sum().clamp(min=1)
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=loss.dtype) if need_weight else None
        logits = x.new_empty(min(chunk, len(x)), len(weight))  # one chunk's, used again and again
        for i in range(0, x.shape[0], chunk):
            rows = slice(i, i + chunk)
            z = torch.mm(x[rows], weight.T, out=logits[: len(x[rows])])  # (CE 1)
            loss += rows_loss_and_gradient(z, labels[rows], need_x or need_weight)
            if need_x or need_weight:
                g = z.div_(count)
            if need_x:
                torch.mm(g, weight, out=dx[rows])  # (CE 4)
            if need_weight:
                add_product(dweight, g.T, x[rows])
        if need_weight:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(*(t for t in (dx, dweight) if t is not None))
        ctx.has = (need_x, need_weight)
        return loss / count

    @staticmethod
    def backward(ctx, grad):
        saved = list(ctx.saved_tensors)
        dx, dweight = (saved.pop(0) if has else None for has in ctx.has)
        scaled = (None if t is None else t * grad.to(t.dtype) for t in (dx, dweight))
        return *scaled, None, None, None


def add_product(total, a, b):
    """total += a b, in place. `total` may be of a larger dtype: hundreds of chunks added up in half
    precision would round the small one away each time.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


@fast_path(
    "minipeft.kernels.cross_entropy",
    capability=(7, 5),
    dtypes=FLOATS,
    wins=never,  # not measured on a GPU yet
)
@fast_path("minipeft.cross_entropy_rows", devices=("cpu", "cuda", "mps"), capability=(0, 0))
def rows_loss_and_gradient(z, labels, gradient=True):
    """Sum of the rows' losses (CE 2); with `gradient`, z becomes softmax(z) - onehot, rows that
    do not count 0 (CE 3).

    z (m, V) float, overwritten; labels (m,). Half precision is computed with in float32.
    """
    if z.dtype.itemsize < 4:
        exact = z.float()
        loss = rows_loss_and_gradient(exact, labels, gradient)
        z.copy_(exact)
        return loss
    counts = labels != IGNORE
    target = labels.where(counts, 0)[:, None]
    loss = ((z.logsumexp(-1) - z.gather(-1, target)[:, 0]) * counts).sum()
    if gradient:
        torch.softmax(z, -1, out=z)
        z.scatter_add_(-1, target, torch.full_like(target, -1, dtype=z.dtype))
        z.mul_(counts[:, None])
    return loss
