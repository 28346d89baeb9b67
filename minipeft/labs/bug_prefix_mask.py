"""Lab: find the bug that hides the prefix."""

from __future__ import annotations

import torch

import minipeft
from minipeft.labs.engine.lab import BugLab


class GivenMask:
    """What a cache of rows with different lengths does to the core: it gives a mask."""

    def __init__(self, n_layer):
        self.layers = [self] * n_layer

    def append(self, k, v):
        T = k.shape[2]
        return k, v, torch.ones(1, 1, T, T, dtype=torch.bool).tril()

    def advance(self, T):
        pass


def curve():
    """The loss under a given mask while a prefix trains without one."""
    model = minipeft.GPT(minipeft.GPTConfig(13, 24, 2, 2, 24))
    for block in model.blocks:
        for writer in (block.attn.o, block.attn.v):
            torch.nn.init.normal_(writer.weight, 0.0, 0.5)
    minipeft.PrefixTuning(4, reparameterize=False).attach(model)
    ids = torch.randint(13, (16, 9))
    labels = torch.randint(3, (16, 9))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.1)
    steps, losses = [], []
    for step in range(61):
        if step % 5 == 0:
            with torch.no_grad():
                logits = model.read_out(model.features(ids, cache=GivenMask(2)))
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
            steps.append(step)
            losses.append(loss.item())
        optimizer.zero_grad()
        model.loss(ids, labels).backward()
        optimizer.step()
    return {"x": steps, "y": losses, "labels": ["step", "loss, rows of different lengths (nats)"]}


START = '''\
import math

import torch

from minipeft.gpt import AttentionCore
from minipeft.soft_prompt import prefix_tuning as prefix


def core():
    """(core with a prefix of 3, its keys and values, q, k, v): 2 rows, 2 heads of 4, 5 tokens."""
    torch.manual_seed(0)
    table = prefix.Table(torch.randn(3, 16, dtype=torch.float64))
    made = prefix.PrefixCore(AttentionCore(), table, 2).eval()
    rows = table.weight.detach().view(3, 2, 2, 4).permute(1, 2, 0, 3)
    return made, rows, *torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)


def attend(q, k, v, allowed):
    weights = torch.exp(q @ k.transpose(-1, -2) / 2) * allowed
    return weights / weights.sum(-1, keepdim=True) @ v


'''

SOLUTION = (
    START
    + '''\
def test_every_query_sees_the_prefix_under_a_mask():
    """The mask is about the text; the 3 columns in front of it are the prefix's, all of them."""
    made, rows, q, k, v = core()
    keys, values = torch.cat([rows[0].expand(2, -1, -1, -1), k], 2), torch.cat(
        [rows[1].expand(2, -1, -1, -1), v], 2
    )
    mask = torch.rand(2, 1, 5, 5) < 0.5
    allowed = torch.cat([torch.ones(2, 1, 5, 3, dtype=torch.bool), mask], -1)
    assert torch.allclose(made(q, k, v, mask), attend(q, keys, values, allowed), atol=1e-12)
'''
)

BLIND = "A test finds what it looks at"
UNTRUE = "A test states what is true of right code"
TEXT = "A test looks at what code does, not at how it is written"

LAB = BugLab(
    title="Find the bug: a prefix that is forgotten in a batch",
    about="""
    A prefix learns well. As soon as rows of different lengths are decoded together, the model
    behaves as if it had never been trained. One row at a time, all is well.

    What is different then: a cache whose rows differ gives the attention core a mask,
    `core(q, k, v, mask)`, True where a query may look at the text.
    """,
    file="minipeft/soft_prompt/prefix_tuning.py",
    bug=("F.pad(mask, (length, 0), value=True)", "F.pad(mask, (length, 0), value=False)"),
    rewrites=(
        (
            "        return None if mask is None else F.pad(mask, (length, 0), value=True)\n",
            "        if mask is None:\n            return None\n"
            "        front = torch.ones_like(mask[..., :1]).expand(*mask.shape[:-1], length)\n"
            "        return torch.cat([front, mask], -1)\n",
        ),
    ),
    rewritten_bug=("torch.ones_like(mask[..., :1])", "torch.zeros_like(mask[..., :1])"),
    siblings={
        "a mask widened on the wrong side": (
            "F.pad(mask, (length, 0), value=True)",
            "F.pad(mask, (0, length), value=True)",
        ),
        "values taken for keys": (".permute(1, 2, 0, 3)", ".flip(1).permute(1, 2, 0, 3)"),
    },
    curve=curve,
    solution=SOLUTION,
    minutes=60,
    attempts={
        "gives no mask": (
            START
            + "def test_core():\n    made, rows, q, k, v = core()\n"
            + "    keys = torch.cat([rows[0].expand(2, -1, -1, -1), k], 2)\n"
            + "    values = torch.cat([rows[1].expand(2, -1, -1, -1), v], 2)\n"
            + "    allowed = torch.ones(5, 8, dtype=torch.bool).tril(3)\n"
            + "    assert torch.allclose(made(q, k, v), attend(q, keys, values, allowed))\n",
            BLIND,
        ),
        "looks at shapes": (
            START
            + "def test_core():\n    made, rows, q, k, v = core()\n"
            + "    mask = torch.ones(5, 5, dtype=torch.bool)\n"
            + "    assert made(q, k, v, mask).shape == q.shape\n",
            BLIND,
        ),
        "looks at the width of the mask": (
            START
            + "def test_mask():\n    made, rows, q, k, v = core()\n"
            + "    mask = torch.ones(5, 5, dtype=torch.bool)\n"
            + "    assert made.widened(mask, 5, 5, 3).shape == (5, 8)\n",
            BLIND,
        ),
        "expects the text alone": (
            START
            + "def test_core():\n    made, rows, q, k, v = core()\n"
            + "    mask = torch.ones(5, 5, dtype=torch.bool).tril()\n"
            + "    assert torch.allclose(made(q, k, v, mask), attend(q, k, v, mask))\n",
            UNTRUE,
        ),
        "calls what is not there": (
            START + "def test_core():\n    prefix.widen_mask(None)\n",
            UNTRUE,
        ),
        "reads the text": (
            "import inspect\nfrom minipeft.soft_prompt import prefix_tuning\n\n\n"
            "def test_text():\n"
            "    assert 'value=True' in inspect.getsource(prefix_tuning.PrefixCore)\n",
            TEXT,
        ),
    },
    mistakes="""
    A test without a mask, or with one that allows everything to everybody and is compared with
    itself; comparing shapes; forgetting that the mask differs from row to row.
    """,
)
