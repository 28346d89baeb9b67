"""Lab: find the bug that shows when LoRA is merged."""

from __future__ import annotations

import torch

import minipeft
from minipeft.labs.engine.lab import BugLab


def curve():
    """The loss of the merged model while LoRA trains, on a small model that learns to count."""
    model = minipeft.GPT(minipeft.GPTConfig(13, 16, 2, 2, 24))
    for block in model.blocks:
        torch.nn.init.normal_(block.attn.o.weight, 0.0, 0.2)
    minipeft.LoRA(4, 24, targets=("q", "k", "v", "o", "up", "down")).attach(model)
    ids = (torch.arange(12) + torch.arange(13)[:, None]) % 13
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    steps, losses = [], []
    for step in range(61):
        if step % 5 == 0:
            with torch.no_grad(), minipeft.merged(model):
                losses.append(model.loss(ids, (ids + 1) % 13).item())
            steps.append(step)
        optimizer.zero_grad()
        model.loss(ids, (ids + 1) % 13).backward()
        optimizer.step()
    return {"x": steps, "y": losses, "labels": ["step", "loss of the merged model (nats)"]}


SOLUTION = '''\
import torch

from minipeft.low_rank import lora


def test_merged_and_unmerged_agree():
    """W' = W + s B A: the same outputs, again and again, and the base as it was."""
    torch.manual_seed(0)
    for into, out in ((5, 7), (6, 6)):
        inner = torch.nn.Linear(into, out, dtype=torch.float64)
        layer = lora.LoRALinear(inner, 3, 2.5)
        torch.nn.init.normal_(layer.B)
        x, before = torch.randn(4, into, dtype=torch.float64), inner.weight.detach().clone()
        expected = x @ before.T + inner.bias + 2.5 * x @ layer.A.T @ layer.B.T
        assert torch.allclose(layer(x), expected, atol=1e-12)
        for _ in range(2):
            assert torch.allclose(layer.merged(inner)(x), expected, atol=1e-12)
        assert torch.equal(inner.weight, before)
'''

START = """\
import torch

from minipeft.low_rank import lora


def layer(scale):
    torch.manual_seed(0)
    inner = torch.nn.Linear(5, 7, dtype=torch.float64)
    made = lora.LoRALinear(inner, 3, scale)
    return made, inner, torch.randn(4, 5, dtype=torch.float64)


"""

BLIND = "A test finds what it looks at"
UNTRUE = "A test states what is true of right code"
TEXT = "A test looks at what code does, not at how it is written"

LAB = BugLab(
    title="Find the bug: a LoRA that is worse once it is merged",
    about="""
    Training goes well, the adapter is merged into the weights, and the model is worse than before.
    Nothing crashes, every shape fits.
    """,
    file="minipeft/low_rank/lora.py",
    bug=("return scale * (B @ A)", "return B @ A"),
    rewrites=(
        (
            'def lora_delta(A, B, scale):\n    """s B A, (out, in): what is added to the weight. '
            '(LoRA 3)"""\n    return scale * (B @ A)\n',
            "def lora_delta(A, B, s):\n    product = torch.mm(B, A)\n    return product.mul(s)\n",
        ),
        (
            "return linear_with(inner, inner.weight + self.delta(), inner.bias)",
            "total = self.delta() + inner.weight\n"
            "        return linear_with(inner, total, inner.bias)",
        ),
    ),
    rewritten_bug=("return product.mul(s)", "return product"),
    siblings={
        "a merged layer without its bias": (
            "inner.weight + self.delta(), inner.bias)",
            "inner.weight + self.delta(), None)",
        ),
        "merging that changes the base": (
            "return linear_with(inner, inner.weight + self.delta(), inner.bias)",
            "return linear_with(inner, inner.weight.data.add_(self.delta()), inner.bias)",
        ),
    },
    curve=curve,
    solution=SOLUTION,
    minutes=45,
    attempts={
        "looks at shapes": (
            START
            + "def test_shape():\n    made, inner, x = layer(2.5)\n"
            + "    assert made.merged(inner)(x).shape == (4, 7)\n",
            BLIND,
        ),
        "looks at the start, where B is 0": (
            START
            + "def test_merge():\n    made, inner, x = layer(2.5)\n"
            + "    assert torch.allclose(made.merged(inner)(x), made(x))\n",
            BLIND,
        ),
        "has a scale of 1": (
            START
            + "def test_merge():\n    made, inner, x = layer(1.0)\n"
            + "    torch.nn.init.normal_(made.B)\n"
            + "    assert torch.allclose(made.merged(inner)(x), made(x))\n",
            BLIND,
        ),
        "looks at the unmerged layer": (
            START
            + "def test_forward():\n    made, inner, x = layer(2.5)\n"
            + "    torch.nn.init.normal_(made.B)\n"
            + "    assert torch.allclose(made(x), inner(x) + 2.5 * x @ made.A.T @ made.B.T)\n",
            BLIND,
        ),
        "expects no change": (
            START
            + "def test_merge():\n    made, inner, x = layer(2.5)\n"
            + "    torch.nn.init.normal_(made.B)\n"
            + "    assert torch.allclose(made.merged(inner)(x), inner(x))\n",
            UNTRUE,
        ),
        "expects equal bits": (
            START
            + "def test_merge():\n    made, inner, x = layer(2.5)\n"
            + "    torch.nn.init.normal_(made.B)\n"
            + "    assert torch.equal(made.merged(inner)(x), made(x))\n",
            UNTRUE,
        ),
        "never runs": ("def check_merge():\n    assert False\n", UNTRUE),
        "reads the text": (
            "import inspect\nfrom minipeft.low_rank import lora\n\n\n"
            "def test_text():\n"
            "    assert 'return scale * (B @ A)' in inspect.getsource(lora.lora_delta)\n",
            TEXT,
        ),
    },
    mistakes="""
    Testing at the start, where B is 0 and any merge is right; a scale of 1; equal bits where
    rounding differs; testing `lora_delta` against the formula it should have had.
    """,
)
