"""What goes wrong in a chunked loss."""

from tests.mutants import Mutant

FILE = "minipeft/cross_entropy.py"
TESTS = [
    "tests/test_cross_entropy_rows.py",
    "tests/test_gpt.py",
    'tests/contract -k "LoRA or FullFineTuning"',
]

MUTANTS = [
    Mutant(
        name="the mean over all rows",
        file=FILE,
        find="        count = (labels != IGNORE).sum().clamp(min=1)\n        loss",
        replace="        count = torch.tensor(labels.numel())\n        loss",
        why="what reduction='mean' does, in numpy",
        invariant="(CE 2): the n labels that count",
    ),
    Mutant(
        name="the mean over rows in the plain form too",
        file=FILE,
        find="    return total / (labels != IGNORE).sum().clamp(min=1)",
        replace="    return total / labels.numel()",
        why="the same mistake, in the definition",
        invariant="(CE 2)",
    ),
    Mutant(
        name="no label, no number",
        file=FILE,
        find="    return total / (labels != IGNORE).sum().clamp(min=1)",
        replace="    return total / (labels != IGNORE).sum()",
        why="0 / 0 happens only in a batch of padding",
        invariant="with no label to count the loss is 0",
    ),
    Mutant(
        name="the first chunk only",
        file=FILE,
        find="    for i in range(0, x.shape[0], chunk):",
        replace="    for i in range(0, min(chunk, x.shape[0]), chunk):",
        why="tested with few rows",
        invariant="any number of rows",
    ),
    Mutant(
        name="padding counted with label 0",
        file=FILE,
        find="    loss = ((z.logsumexp(-1) - z.gather(-1, target)[:, 0]) * counts).sum()",
        replace="    loss = (z.logsumexp(-1) - z.gather(-1, target)[:, 0]).sum()",
        why="a label had to be put in for gathering",
        invariant="(CE 2): -100 does not count",
    ),
    Mutant(
        name="padding has a gradient",
        file=FILE,
        find="        z.mul_(counts[:, None])\n",
        replace="        pass\n",
        why="the loss was masked, and that seems enough",
        invariant="(CE 3): rows that do not count are 0",
    ),
    Mutant(
        name="the target's one forgotten",
        file=FILE,
        find=("        z.scatter_add_(-1, target, torch.full_like(target, -1, dtype=z.dtype))\n"),
        replace="",
        why="softmax is nearly the gradient",
        invariant="(CE 3)",
    ),
    Mutant(
        name="the gradient is not divided by n",
        file=FILE,
        find="                g = z.div_(count)\n",
        replace="                g = z\n",
        why="the loss is divided at the end",
        invariant="(CE 4)",
    ),
    Mutant(
        name="dW of the last chunk only",
        file=FILE,
        find="                add_product(dweight, g.T, x[rows])",
        replace="                dweight = g.T @ x[rows]",
        why="the sum over chunks forgotten",
        invariant="(CE 4): the sum over chunks",
    ),
    Mutant(
        name="the incoming gradient ignored",
        file=FILE,
        find="t * grad.to(t.dtype)",
        replace="t",
        why="backward is called on the loss itself, mostly",
        invariant="the gradient of a multiple is the multiple of the gradient",
    ),
    Mutant(
        name="dx and dW exchanged for a frozen head",
        file=FILE,
        find="        ctx.has = (need_x, need_weight)",
        replace="        ctx.has = (need_weight, need_x)",
        why="two flags of one type",
        invariant="only the input's gradient with a frozen head",
    ),
    Mutant(
        name="float16 sums",
        file=FILE,
        find="    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))\n",
        replace="",
        why="the loss is a number, whatever it is made of",
        invariant="the loss is summed in float32 or better",
    ),
    Mutant(
        name="the head's gradient added up in halves",
        file=FILE,
        find="dweight = torch.zeros_like(weight, dtype=loss.dtype) if",
        replace="dweight = torch.zeros_like(weight) if",
        why="the gradient has the weight's dtype in the end",
        invariant="many chunks are added up in float32",
    ),
]
