"""Lab: find the bug that makes distillation fade at high temperatures."""

from __future__ import annotations

import torch

from minipeft.compressed.distillation import distillation_loss
from minipeft.labs.engine.lab import BugLab


def curve():
    """How far a student of logits stays from its teacher after 200 steps, by temperature."""
    teacher = torch.randn(40, 9)
    labels = teacher.argmax(-1)
    temperatures, gaps = [1.0, 2.0, 3.0, 4.0, 6.0, 8.0], []
    for T in temperatures:
        student = torch.zeros(40, 9, requires_grad=True)
        optimizer = torch.optim.SGD([student], 4.0)
        for _ in range(200):
            optimizer.zero_grad()
            distillation_loss(student, teacher, labels, T, 1.0).backward()
            optimizer.step()
        p, q = teacher.softmax(-1), student.detach().softmax(-1)
        gaps.append((p * (p / q).log()).sum(-1).mean().item())
    y = "KL to the teacher after 200 steps (nats)"
    return {"x": temperatures, "y": gaps, "labels": ["temperature", y]}


START = """\
import torch

from minipeft.compressed import distillation


def logits():
    torch.manual_seed(0)
    return torch.randn(2, 6, 9, dtype=torch.float64).unbind()


"""

SOLUTION = (
    START
    + '''\
def divergence(a, b):
    """KL of the distributions a from b, row by row."""
    return (a * (a.log() - b.log())).sum(-1)


def test_the_soft_part_is_the_equation_at_every_temperature():
    """(Distill 2) and (Distill 5): T^2 in front, both softened, the right one as the weight."""
    s, t = logits()
    for T in (1.0, 3.0):
        p, q = (t / T).softmax(-1), (s / T).softmax(-1)
        forward, reverse = T**2 * divergence(p, q), T**2 * divergence(q, p)
        assert torch.allclose(distillation.forward_kl(s, t, T), forward, atol=1e-12)
        assert torch.allclose(distillation.reverse_kl(s, t, T), reverse, atol=1e-12)
        labels = torch.zeros(6, dtype=torch.long)
        loss = distillation.distillation_loss(s, t, labels, T, 1.0)
        assert torch.allclose(loss, forward.mean(), atol=1e-12)
'''
)

BLIND = "A test finds what it looks at"
UNTRUE = "A test states what is true of right code"
TEXT = "A test looks at what code does, not at how it is written"

LAB = BugLab(
    title="Find the bug: a student that stops listening when it gets warm",
    about="""
    At temperature 1 the student becomes its teacher. The higher the temperature, the less it
    learns, although a softened teacher should tell more and not less.
    """,
    file="minipeft/compressed/distillation.py",
    bug=("return temperature**2 * torch.where", "return torch.where"),
    rewrites=(
        (
            "    return temperature**2 * torch.where(p == 0, 0, p * (log_p - log_q)).sum(-1)",
            "    terms = torch.where(p == 0, 0, p * log_p - p * log_q)\n"
            "    return terms.sum(-1).mul(temperature * temperature)",
        ),
    ),
    rewritten_bug=("terms.sum(-1).mul(temperature * temperature)", "terms.sum(-1)"),
    siblings={
        "a teacher that is not softened": (
            "    log_p = (teacher_logits / temperature).log_softmax(-1)\n    p =",
            "    log_p = teacher_logits.log_softmax(-1)\n    p =",
        ),
        "the arguments of KL exchanged": (
            "        soft = divergence(student, teacher, temperature).sum() / n",
            "        soft = divergence(teacher, student, temperature).sum() / n",
        ),
        "T instead of T squared, reversed": (
            "    return temperature**2 * (q * torch.where",
            "    return temperature * (q * torch.where",
        ),
    },
    curve=curve,
    solution=SOLUTION,
    minutes=45,
    attempts={
        "stays at temperature 1": (
            START
            + "def test_kl():\n    s, t = logits()\n    p, q = t.softmax(-1), s.softmax(-1)\n"
            + "    expected = (p * (p / q).log()).sum(-1)\n"
            + "    assert torch.allclose(distillation.forward_kl(s, t, 1.0), expected)\n",
            BLIND,
        ),
        "has a student that is its teacher": (
            START
            + "def test_kl():\n    s, t = logits()\n"
            + "    assert distillation.forward_kl(t, t, 3.0).abs().max() < 1e-12\n",
            BLIND,
        ),
        "looks at the hard part": (
            START
            + "def test_loss():\n    s, t = logits()\n    labels = torch.arange(6)\n"
            + "    loss = distillation.distillation_loss(s, t, labels, 3.0, 0.0)\n"
            + "    expected = -s.log_softmax(-1)[torch.arange(6), labels].mean()\n"
            + "    assert torch.allclose(loss, expected)\n",
            BLIND,
        ),
        "is content with something positive": (
            START
            + "def test_kl():\n    s, t = logits()\n"
            + "    assert (distillation.forward_kl(s, t, 3.0) > 0).all()\n",
            BLIND,
        ),
        "has no temperature in its formula": (
            START
            + "def test_kl():\n    s, t = logits()\n    p, q = t.softmax(-1), s.softmax(-1)\n"
            + "    expected = (p * (p / q).log()).sum(-1)\n"
            + "    assert torch.allclose(distillation.forward_kl(s, t, 3.0), expected)\n",
            UNTRUE,
        ),
        "takes kl_div the wrong way round": (
            START
            + "def test_kl():\n    s, t = logits()\n"
            + "    expected = torch.nn.functional.kl_div(\n"
            + "        (t / 3).log_softmax(-1), (s / 3).softmax(-1), reduction='none'\n"
            + "    ).sum(-1)\n"
            + "    assert torch.allclose(distillation.forward_kl(s, t, 3.0), 9 * expected)\n",
            UNTRUE,
        ),
        "reads the text": (
            "import inspect\nfrom minipeft.compressed import distillation\n\n\n"
            "def test_text():\n"
            "    assert 'temperature**2' in inspect.getsource(distillation.forward_kl)\n",
            TEXT,
        ),
    },
    mistakes="""
    A test at temperature 1, where every power of T is 1; a student equal to its teacher; kl_div
    with its two arguments exchanged; only the sign of the loss.
    """,
)
