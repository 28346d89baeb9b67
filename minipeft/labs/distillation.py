"""Lab: distillation."""

from __future__ import annotations

import math

import torch

from minipeft.compressed import distillation
from minipeft.labs.engine.case import check, close, equal
from minipeft.labs.engine.lab import Bug, Hint, Lab

FORWARD = Hint(
    "(Distill 2): KL(p || q) sums p (log p - log q): the teacher's p weighs",
    "Whose probabilities weigh the difference of the logarithms, the teacher's or the student's?",
    ("forward_kl", "_mixed"),
)
TEMPERATURE = Hint(
    "(Distill 1): both are softened at T, and T^2 stands in front",
    "Double T. What should the size of the gradient do? Whose logits are divided by T?",
    ("forward_kl",),
)
REVERSED = Hint(
    "(Distill 5): T^2 KL(q || p): the student's q weighs",
    "Write the reversed divergence down. Which power of T stands in front of it?",
    ("reverse_kl",),
)
WEIGHTS = Hint(
    "(Distill 4): alpha weighs the soft part, 1 - alpha the hard one",
    "What must the loss be at alpha = 0, and what at alpha = 1?",
    ("_mixed",),
)
HARD = Hint(
    "(Distill 3): the hard part is cross-entropy at temperature 1",
    "Change T at alpha = 0. May the loss change?",
    ("_mixed",),
)
TOKENS = Hint(
    "(Distill 4): means are over the tokens that count, and only ignore_index does not",
    "Put more padding behind the text. May the loss change? Is 0 a label?",
    ("_mixed", "_rows"),
)
TEACHER = Hint(
    "the teacher gets no gradient",
    "Ask for the gradient at the teacher's logits. What should it be?",
    ("_mixed",),
)
INFINITE = Hint(
    "a word of probability 0 adds 0 to (Distill 2), and FLOOR nats to (Distill 5)",
    "What is 0 times the logarithm of 0 in floating point, and what should it be here?",
    ("forward_kl", "reverse_kl"),
)
PRECISION = Hint(
    "sums are in float32 or better",
    "Logits come in bfloat16. In which dtype are thousands of words summed up?",
    ("_rows",),
)

LAB = Lab(
    title="Distillation: learning from every word's probability",
    about="""
    A label says which word came; a teacher says how likely every word was. You write both
    divergences and the loss that mixes them with cross-entropy: five equations, (Distill 1) to
    (Distill 5), in the header of `distillation.py`.

    Labels are aligned with logits (no shift), and -100 marks what does not count. `_mixed` gets the
    divergence as a function; `_rows` picks the rows that count and makes them precise enough.
    """,
    files=("minipeft/compressed/distillation.py",),
    blanks=("forward_kl", "reverse_kl", "_rows", "_mixed"),
    minutes=60,
    mistakes="""
    torch's kl_div takes the student first and in log space; T^2 forgotten, so that alpha means
    something else at every temperature; the mean over padding; a gradient into the teacher.
    """,
    bugs=(
        Bug(
            "KL with its arguments exchanged",
            "        soft = divergence(student, teacher, temperature).sum() / n",
            "        soft = divergence(teacher, student, temperature).sum() / n",
            FORWARD,
        ),
        Bug(
            "T squared forgotten",
            "    return temperature**2 * torch.where",
            "    return torch.where",
            TEMPERATURE,
        ),
        Bug(
            "only the student is softened",
            "    log_p = (teacher_logits / temperature).log_softmax(-1)\n    p =",
            "    log_p = teacher_logits.log_softmax(-1)\n    p =",
            TEMPERATURE,
        ),
        Bug(
            "the hard part softened as well",
            "        hard = F.cross_entropy(student, target,",
            "        hard = F.cross_entropy(student / temperature, target,",
            HARD,
        ),
        Bug(
            "alpha weighs the hard part",
            "    return alpha * soft + (1 - alpha) * hard",
            "    return (1 - alpha) * soft + alpha * hard",
            WEIGHTS,
        ),
        Bug("padding in the mean", "n = counts.sum().clamp(min=1)", "n = labels.numel()", TOKENS),
        Bug(
            "the teacher is trained as well",
            "_rows(teacher.detach(), counts)",
            "_rows(teacher, counts)",
            TEACHER,
        ),
        Bug(
            "zero times minus infinity",
            "torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)",
            "(p * (log_p - log_q)).sum(-1)",
            INFINITE,
        ),
        Bug(
            "T instead of T squared",
            "    return temperature**2 * (q * torch.where",
            "    return temperature * (q * torch.where",
            REVERSED,
        ),
        Bug(
            "a token counts when its label is not 0",
            "counts = labels != ignore_index",
            "counts = labels > 0",
            TOKENS,
        ),
        Bug(
            "no floor under the teacher",
            ".log_softmax(-1).clamp(min=FLOOR)",
            ".log_softmax(-1)",
            INFINITE,
        ),
        Bug(
            "sums in half precision",
            "    return logits[counts].to(torch.promote_types(logits.dtype, torch.float32))",
            "    return logits[counts]",
            PRECISION,
        ),
    ),
)


def softmax(logits, T):
    """Probabilities at temperature T, written out."""
    e = torch.exp(logits / T - (logits / T).amax(-1, keepdim=True))
    return e / e.sum(-1, keepdim=True)


def drawn(case, *shape):
    """Student and teacher logits (..., V), and a temperature."""
    V = case.size(5, 13)
    return case.normal(*shape, V, std=2), case.normal(*shape, V, std=2), case.number(1.3, 5)


def by_hand(s, t, labels, T, alpha):
    """(Distill 4) token by token, in Python."""
    soft, hard, n = 0.0, 0.0, 0
    rows = zip(s.flatten(0, -2), t.flatten(0, -2), labels.flatten().tolist(), strict=True)
    for a, b, label in rows:
        if label != -100:
            p, q = softmax(b, T), softmax(a, T)
            soft = soft + T * T * (p * (p.log() - q.log())).sum()
            hard = hard - softmax(a, 1.0)[label].log()
            n += 1
    return (alpha * soft + (1 - alpha) * hard) / n


def some_labels(case, shape, V):
    """Labels of which some do not count, and one is 0."""
    labels = torch.randint(1, V, shape, generator=case.generator)
    labels[torch.rand(shape, generator=case.generator) < 0.3] = -100
    labels.view(-1)[:3] = torch.tensor([0, 2, -100])
    return labels


@LAB.invariant(9)
def forward_kl_is_the_formula(case):
    """(Distill 1) (Distill 2): T^2 sum_v p_v (log p_v - log q_v), a number for each row."""
    s, t, T = drawn(case, 2, 3)
    p, q = softmax(t, T), softmax(s, T)
    close(distillation.forward_kl(s, t, T), T * T * (p * (p / q).log()).sum(-1), "forward_kl")


@LAB.invariant(7)
def reverse_kl_is_the_formula(case):
    """(Distill 5): T^2 sum_v q_v (log q_v - log p_v)."""
    s, t, T = drawn(case, 2, 3)
    p, q = softmax(t, T), softmax(s, T)
    close(distillation.reverse_kl(s, t, T), T * T * (q * (q / p).log()).sum(-1), "reverse_kl")


@LAB.invariant(6)
def the_gradient_is_t_times_the_difference(case):
    """(Distill 2): the gradient at the student's logits is T (q - p), so it does not fade."""
    s, t, T = drawn(case, 4)
    s.requires_grad_()
    distillation.forward_kl(s, t, T).sum().backward()
    close(s.grad, T * (softmax(s.detach(), T) - softmax(t, T)), "the gradient")


@LAB.invariant(9)
def alpha_weighs_the_soft_part(case):
    """(Distill 4): alpha soft + (1 - alpha) hard, also at alpha 0 and 1."""
    s, t, T = drawn(case, 2, 5)
    labels = torch.randint(1, s.shape[-1], (2, 5), generator=case.generator)
    for alpha in (0.0, case.number(0.1, 0.4), 1.0):
        given = distillation.distillation_loss(s, t, labels, T, alpha)
        close(given, by_hand(s, t, labels, T, alpha), f"the loss at alpha={alpha:.2f}")


@LAB.invariant(4)
def the_hard_part_knows_no_temperature(case):
    """(Distill 3): at alpha = 0 the temperature changes nothing."""
    s, t, T = drawn(case, 7)
    labels = torch.randint(1, s.shape[-1], (7,), generator=case.generator)
    wanted = by_hand(s, t, labels, 1.0, 0.0)
    close(distillation.distillation_loss(s, t, labels, T, 0.0), wanted, "the hard part")


@LAB.invariant(7)
def only_what_counts_counts(case):
    """(Distill 4): means are over the labels that are not -100; what stands elsewhere, NaN even,
    is not looked at, and without a label the loss is 0.
    """
    s, t, T = drawn(case, 2, 6)
    labels = some_labels(case, (2, 6), s.shape[-1])
    wanted = by_hand(s, t, labels, T, 0.3)
    s[labels == -100], t[labels == -100] = math.nan, math.nan
    close(distillation.distillation_loss(s, t, labels, T, 0.3), wanted, "the loss with padding")
    nothing = torch.full((2, 6), -100)
    close(distillation.distillation_loss(s, t, nothing, T, 0.3), 0.0, "the loss without labels")


@LAB.invariant(4)
def the_teacher_is_not_trained(case):
    """The student's logits get a gradient, the teacher's none."""
    s, t, T = drawn(case, 5)
    labels = torch.randint(1, s.shape[-1], (5,), generator=case.generator)
    s.requires_grad_()
    t.requires_grad_()
    distillation.distillation_loss(s, t, labels, T, 0.5).backward()
    check(s.grad is not None and bool(s.grad.any()), "the student gets no gradient")
    check(t.grad is None or not t.grad.any(), "the teacher gets a gradient")


@LAB.invariant(2)
def words_that_are_ruled_out(case):
    """A word the teacher rules out (-inf) adds 0 to (Distill 2), and FLOOR nats to (Distill 5)."""
    s, t, T = drawn(case, 3)
    t[:, 1] = -math.inf
    p, q = softmax(t, T), softmax(s, T)
    some = p > 0
    terms = torch.zeros_like(p)
    terms[some] = p[some] * (p[some] / q[some]).log()
    both = s.clone()
    both[:, 1] = -math.inf
    close(distillation.forward_kl(s, t, T), T * T * terms.sum(-1), "forward_kl with -inf")
    check(bool(distillation.forward_kl(both, t, T).isfinite().all()), "0 log 0 is not 0")
    log_p = torch.full_like(p, distillation.FLOOR)
    log_p[some] = p[some].log()
    wanted = T * T * (q * (q.log() - log_p)).sum(-1)
    close(distillation.reverse_kl(s, t, T), wanted, "reverse_kl with -inf")


@LAB.invariant(2)
def sums_are_precise(case):
    """Logits in half precision are summed in float32."""
    s, t, T = drawn(case, 50)
    dtype = case.pick(torch.bfloat16, torch.float16)
    s, t = s.to(dtype), t.to(dtype)
    labels = torch.randint(1, s.shape[-1], (50,), generator=case.generator)
    given = distillation.distillation_loss(s, t, labels, T, 0.5)
    equal(given.dtype, torch.float32, "the loss's dtype")
    # float32 sums of 50 rows: 1e-6 of the loss; bfloat16 would be off by 1e-3
    close(given, by_hand(s.double(), t.double(), labels, T, 0.5), "the loss", 1e-5)
