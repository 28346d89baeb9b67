r"""Distillation: a small network learns from the probabilities a large one gives to every word.

Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531. A
label says which word came; a teacher says how likely each word was, so one example teaches what
otherwise takes many.

For one token with student logits s and teacher logits t, both in R^V, label y, temperature T:

    (Distill 1)   p    = softmax(t / T)          q = softmax(s / T)
    (Distill 2)   soft = T^2 KL(p || q)   = T^2 sum_v p_v (log p_v - log q_v)
    (Distill 3)   hard = -log softmax(s)_y                               at temperature 1
    (Distill 4)   L    = alpha mean(soft) + (1 - alpha) mean(hard)       over tokens that count
    (Distill 5)   soft = T^2 KL(q || p)   = T^2 sum_v q_v (log q_v - log p_v)     reversed

KL(p || q) punishes the student where the teacher is and the student is not: it covers everything
the teacher says. KL(q || p) punishes it where it is and the teacher is not: a student too small for
everything keeps to the teacher's main answers (Gu et al. 2023, MiniLLM, arXiv 2306.08543).

The gradient with respect to s is T (q - p) for (Distill 2) and T q (log(q / p) - KL(q || p)) for
(Distill 5), which is why T^2 stands in front: without it the gradient shrinks as 1 / T and alpha
means something else at every temperature.

Trained parameters: the student's own, all of them; the teacher gets no gradient.

    start    any student: random, or layers of the teacher (layer_matching.py)

Reduces to: cross-entropy at alpha = 0, and at alpha = 1, T = 1 with a one-hot teacher. As T grows
the gradient of (Distill 2) goes to ((s - mean s) - (t - mean t)) / V, the regression of centred
logits. With p equal to q both losses and their gradients are zero.

How this differs from torch's F.kl_div: that one takes the student first, in log space, the teacher
second and not in log space, and its "mean" divides by n V; here both are logits, and the mean is
over tokens. A teacher that rules words out (logit -inf) adds nothing for them to (Distill 2); in
(Distill 5), where that costs infinitely much, it costs FLOOR nats.

Footguns: the two arguments of KL exchanged; T^2 forgotten; the hard part at temperature T; means
over padding, or over the batch instead of the tokens; a gradient into the teacher; a teacher left
in train mode, whose dropout is noise; p > 0 asked for p = 0: a teacher's NaN then looks like a
word that cannot follow, and the loss like a good one.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from minipeft.cross_entropy import IGNORE

FLOOR = -100.0  # log p of a word that the teacher rules out, in (Distill 5)


def distillation_loss(
    student_logits, teacher_logits, labels, temperature, alpha, ignore_index=IGNORE
):
    """Hinton's loss in nats, a scalar. Logits (..., V), labels (...) aligned with them. (Distill 4)

    alpha weighs the soft part; both parts are means over the labels that are not `ignore_index`,
    0 if there is none. Sums are in float32 or better. Raises ValueError for a temperature that is
    not positive, an alpha outside [0, 1], and shapes that do not belong together.
    """
    return _mixed(
        forward_kl, student_logits, teacher_logits, labels, temperature, alpha, ignore_index
    )


def reverse_distillation_loss(
    student_logits, teacher_logits, labels, temperature, alpha, ignore_index=IGNORE
):
    """`distillation_loss` with KL(q || p) as its soft part. (Distill 5)"""
    return _mixed(
        reverse_kl, student_logits, teacher_logits, labels, temperature, alpha, ignore_index
    )


def forward_kl(student_logits, teacher_logits, temperature=1.0):
    """T^2 KL(p || q) of each row, (..., V) twice -> (...). (Distill 2)

    Words of probability 0 add 0, also where the student's logit is -inf as well.
    """
    log_q = (student_logits / temperature).log_softmax(-1)  # (Distill 1)
    log_p = (teacher_logits / temperature).log_softmax(-1)
    p = log_p.exp()
    return temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)  # (Distill 2)


def reverse_kl(student_logits, teacher_logits, temperature=1.0):
    """T^2 KL(q || p) of each row, (..., V) twice -> (...). (Distill 5)

    log p is no lower than FLOOR, so that a teacher's -inf stays finite. Words of which the student
    says 0 add 0.
    """
    log_q = (student_logits / temperature).log_softmax(-1)
    log_p = (teacher_logits / temperature).log_softmax(-1).clamp(min=FLOOR)
    q = log_q.exp()
    return temperature**2 * (q * torch.where(q == 0, 0, log_q - log_p)).sum(-1)  # (Distill 5)


def _mixed(divergence, student, teacher, labels, temperature, alpha, ignore_index):
    """alpha divergence + (1 - alpha) cross-entropy; a part of weight 0 is not computed."""
    check_options(temperature, alpha)
    check_shapes(student, teacher, labels)
    counts = labels != ignore_index
    n = counts.sum().clamp(min=1)
    student, teacher = _rows(student, counts), _rows(teacher.detach(), counts)  # (n, V)
    soft = hard = 0.0
    if alpha > 0:
        soft = divergence(student, teacher, temperature).sum() / n
    if alpha < 1:
        target = labels[counts]
        hard = F.cross_entropy(student, target, ignore_index=ignore_index, reduction="sum") / n
        # (Distill 3)
    return alpha * soft + (1 - alpha) * hard  # (Distill 4)


def _rows(logits, counts):
    """The rows that count; what stands in the others, NaN even, is never looked at."""
    return logits[counts].to(torch.promote_types(logits.dtype, torch.float32))


def check_options(temperature, alpha):
    """Raise ValueError for a temperature or an alpha that makes no sense."""
    if not 0 < temperature < math.inf:
        raise ValueError(
            f"temperature={temperature} must be a positive number; 1 leaves logits as they are"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is not a share in [0, 1]; it weighs the soft labels")


def check_shapes(student, teacher, labels):
    """Raise ValueError unless both logits are (..., V) and the labels (...)."""
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits {tuple(student.shape)} and teacher logits {tuple(teacher.shape)} "
            "differ; both need one vocabulary, so one tokenizer"
        )
    if labels.shape != student.shape[:-1]:
        raise ValueError(
            f"labels {tuple(labels.shape)} do not fit logits {tuple(student.shape)}; "
            "give one label a row, aligned with it"
        )
