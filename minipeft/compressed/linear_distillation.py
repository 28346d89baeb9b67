r"""Distillation through two linear heads, in chunks of tokens that never hold both models' logits.

`distillation_loss` needs the student's logits, the teacher's, and autograd's copies of them: at
2,048 tokens by 50,257 words each is 412 MB, and there are about six. Nothing needs them at once.
With features x in R^(M x D), z in R^(M x D'), heads W in R^(V x D), U in R^(V x D'), labels y, n of
them that count, some rows at a time:

    (LinearDistill 1)   s  = x W^T              t = z U^T
    (LinearDistill 2)   KL(p || q) = sum_v p_v (log p_v - log q_v)
    (LinearDistill 3)   g  = dL/ds = [alpha T (q - p) + (1 - alpha) (softmax(s) - onehot(y))] / n
    (LinearDistill 4)   dx = g W                dW = sum over chunks of g^T x

p, q, T and alpha are those of distillation.py. log p and log q are written over t and s, then p and
q over them: two exponentials a logit. The gradient is made in the forward pass, while the chunk is
at hand, written over s, and scaled by the incoming one in the backward.

How this differs from Liger's fused_linear_jsd: that keeps a float32 tensor of M x V for the loss
alone; here a row's loss is summed inside its chunk, so extra memory is O(chunk V + V D). Liger's
chunked form differentiates with torch.func; here the gradient is written by hand.

Footguns: n counted in each chunk instead of over all; a frozen head whose gradient is computed all
the same; the chunk's gradient kept instead of reduced to dx and dW at once; dW added up in half
precision.
"""

from __future__ import annotations

import torch

from minipeft import cross_entropy
from minipeft.compressed.distillation import check_options, distillation_loss
from minipeft.cross_entropy import FLOATS, IGNORE
from minipeft.dispatch import fast_path, never

CHUNK = 128  # rows of logits held at once


def linear_distillation_loss(
    x, weight, teacher_x, teacher_weight, labels, temperature, alpha, chunk=CHUNK
):
    """`distillation_loss` of x W^T against z U^T, a scalar: x (M, D), weight (V, D), teacher_x
    (M, D'), teacher_weight (V, D'), labels (M,) with -100 ignored.

    Gradients go to x and weight alone, once: twice differentiable it is not. Logits must be finite.
    Raises ValueError like `distillation_loss`, and for a chunk below 1.
    """
    check_options(temperature, alpha)
    _check_shapes(x, weight, teacher_x, teacher_weight, labels)
    if chunk < 1:
        raise ValueError(f"chunk={chunk} rows is not a positive number")
    if alpha == 0:  # the teacher's logits would be made for nothing
        return cross_entropy.linear_cross_entropy(x, weight, labels, chunk)
    counts = labels != IGNORE
    tensors = [x[counts], weight, teacher_x.detach()[counts], teacher_weight.detach()]
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        tensors = [t.to(dtype) for t in tensors]
    options = (float(temperature), float(alpha), chunk, torch.is_grad_enabled())
    return _LinearDistillation.apply(*tensors, labels[counts], *options)


def linear_distillation_loss_written_out(
    x, weight, teacher_x, teacher_weight, labels, temperature, alpha
):
    """The definition, with all logits of both models at once. (LinearDistill 1)"""
    s, t = x @ weight.T, teacher_x @ teacher_weight.T
    return distillation_loss(s, t, labels, temperature, alpha)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, teacher_x, teacher_weight, labels, temperature, alpha, chunk, recorded
    ):
        need_x, need_weight = (recorded and n for n in ctx.needs_input_grad[:2])  # no_grad or not
        n = max(1, x.shape[0])
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.zeros_like(weight, dtype=loss.dtype) if need_weight else None
        for i in range(0, x.shape[0], chunk):
            rows = slice(i, i + chunk)
            s = x[rows] @ weight.T  # (LinearDistill 1)
            t = teacher_x[rows] @ teacher_weight.T
            loss += rows_loss_and_gradient(s, t, labels[rows], temperature, alpha)
            g = s.div_(n)
            if need_x:
                torch.mm(g, weight, out=dx[rows])  # (LinearDistill 4)
            if need_weight:
                cross_entropy.add_product(dweight, g.T, x[rows])
            del s, t, g  # before the next chunk is made
        if need_weight:
            dweight = dweight.to(weight.dtype)
        ctx.save_for_backward(*(t for t in (dx, dweight) if t is not None))
        ctx.has = (need_x, need_weight)
        return loss / n

    @staticmethod
    def backward(ctx, grad):
        saved = list(ctx.saved_tensors)
        dx, dweight = (saved.pop(0) if has else None for has in ctx.has)
        scaled = (None if t is None else t * grad.to(t.dtype) for t in (dx, dweight))
        return *scaled, *[None] * 7


@fast_path(
    "minipeft.kernels.linear_distillation",
    capability=(7, 5),
    dtypes=FLOATS,
    wins=never,  # not measured on a GPU yet
)
def rows_loss_and_gradient(s, t, labels, temperature, alpha):
    """Sum of the rows' losses; s becomes its gradient, t is overwritten. (LinearDistill 2)
    (LinearDistill 3)

    s, t (m, V) float; labels (m,), all of them counting. Half precision is computed with in
    float32, two dtypes in the larger one.
    """
    dtype = torch.promote_types(torch.promote_types(s.dtype, t.dtype), torch.float32)
    if s.dtype != dtype or t.dtype != dtype:
        exact = s.to(dtype)
        loss = rows_loss_and_gradient(exact, t.to(dtype), labels, temperature, alpha)
        s.copy_(exact)
        return loss
    hard, hard_loss = None, 0.0
    if alpha < 1:
        hard = s.clone()
        hard_loss = cross_entropy.rows_loss_and_gradient(hard, labels)  # softmax(s) - onehot
    torch.log_softmax(s.div_(temperature), -1, out=s)  # log q, in place
    torch.log_softmax(t.div_(temperature), -1, out=t)  # log p
    difference = t - s
    kl = difference.mul_(t.exp_()).sum(-1)  # (LinearDistill 2)
    soft_loss = temperature**2 * kl.sum()
    s.exp_().sub_(t).mul_(alpha * temperature)  # (LinearDistill 3)
    if hard is not None:
        s.add_(hard, alpha=1 - alpha)
    return alpha * soft_loss + (1 - alpha) * hard_loss


def _check_shapes(x, weight, teacher_x, teacher_weight, labels):
    M, V = x.shape[0], weight.shape[0]
    if teacher_weight.shape[0] != V:
        raise ValueError(
            f"the student's head knows {V} words, the teacher's {teacher_weight.shape[0]}; "
            "both need one vocabulary, so one tokenizer"
        )
    if teacher_x.shape[0] != M or labels.shape != (M,):
        raise ValueError(
            f"{M} rows of the student, {teacher_x.shape[0]} of the teacher and labels "
            f"{tuple(labels.shape)}; give one of each for every token"
        )
