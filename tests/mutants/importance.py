"""What goes wrong in ranking heads and neurons."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/importance.py"
TESTS = ["tests/test_importance.py"]

MUTANTS = [
    Mutant(
        name="signs cancel over rows",
        file=FILE,
        find="score += gradient.abs().sum(0).double().cpu()",
        replace="score += gradient.sum(0).abs().double().cpu()",
        why="the size of the mean for the mean size",
        invariant="(Importance 2)",
    ),
    Mutant(
        name="no sizes at all",
        file=FILE,
        find="score += gradient.abs().sum(0).double().cpu()",
        replace="score += gradient.sum(0).double().cpu()",
        why="the absolute value forgotten",
        invariant="(Importance 2)",
    ),
    Mutant(
        name="one gate for the batch",
        file=FILE,
        find="torch.ones(len(ids), size, dtype=like.dtype, device=ids.device, requires_grad=True)",
        replace="torch.ones(1, size, dtype=like.dtype, device=ids.device, requires_grad=True)",
        why="a gate is one number a head",
        invariant="(Importance 2): every row's own gradient",
    ),
    Mutant(
        name="the mean over the batch",
        file=FILE,
        find="loss = row_losses(model, ids, labels).sum()",
        replace="loss = row_losses(model, ids, labels).mean()",
        why="losses are means",
        invariant="it does not depend on how rows are batched",
    ),
    Mutant(
        name="padding in the row's mean",
        file=FILE,
        find="return surprise.sum(1) / (labels != -100).sum(1).clamp(min=1)",
        replace="return surprise.mean(1)",
        why="labels that do not count are 0 anyway",
        invariant="(Importance 2): a row's own mean loss",
    ),
    Mutant(
        name="not divided by the rows",
        file=FILE,
        find="return [score / rows for score in total]",
        replace="return total",
        why="the order is the same",
        invariant="(Importance 2): the mean",
    ),
    Mutant(
        name="gates after W_o",
        file=FILE,
        find="return self.inner(x * (scale[:, None] if scale.ndim == 2 else scale))",
        replace=(
            "return self.inner(x) * (scale.mean(-1, keepdim=True)[:, None] if "
            "scale.ndim == 2 else scale.mean())"
        ),
        why="the output is gated",
        invariant="(Importance 1): a gate on every head",
    ),
    Mutant(
        name="heads interleaved",
        file=FILE,
        find="scale = self.gates.repeat_interleave(self.width, -1)",
        replace="scale = self.gates.repeat(*[1] * (self.gates.ndim - 1), self.width)",
        why="repeat for repeat_interleave",
        invariant="(Importance 1): a head's columns",
    ),
    Mutant(
        name="taylor: signs cancel",
        file=FILE,
        find="terms = (parameter.detach() * gradient).abs().double()",
        replace="terms = (parameter.detach() * gradient).double()",
        why="the absolute value forgotten",
        invariant="(Importance 3)",
    ),
    Mutant(
        name="taylor: the gradient alone",
        file=FILE,
        find="terms = (parameter.detach() * gradient).abs().double()",
        replace="terms = gradient.abs().double()",
        why="sensitivity without size",
        invariant="(Importance 3): theta times its gradient",
    ),
    Mutant(
        name="taylor: the sum over batches",
        file=FILE,
        find="gradients[p] = gradients[p] + g / len(batches)",
        replace="gradients[p] = gradients[p] + g",
        why="a constant factor",
        invariant="(Importance 3): the mean loss",
    ),
    Mutant(
        name="taylor: rows for columns",
        file=FILE,
        find="return [*owned, (output.weight, 1)]",
        replace=(
            "return [*owned, (output.weight[:, :].T, 1)] if False else "
            "[*owned[:-1], (output.weight, 1)]"
        ),
        why="the last bias is forgotten",
        invariant="(Importance 3): the unit's weights",
    ),
    Mutant(
        name="the most important go",
        file=FILE,
        find="lowest = [i.argsort(stable=True)[:",
        replace="lowest = [i.argsort(stable=True, descending=True)[:",
        why="sorted the wrong way round",
        invariant="the least important go",
    ),
    Mutant(
        name="layers not normalised",
        file=FILE,
        find="scores = [i / i.norm().clamp(min=1e-30) for i in importances]",
        replace="scores = list(importances)",
        why="a gradient is a gradient",
        invariant="(Importance 4)",
    ),
    Mutant(
        name="normalised by the largest",
        file=FILE,
        find="scores = [i / i.norm().clamp(min=1e-30) for i in importances]",
        replace="scores = [i / i.sum().clamp(min=1e-30) for i in importances]",
        why="another norm",
        invariant="(Importance 4): l2",
    ),
    Mutant(
        name="gates stay on",
        file=FILE,
        find="        for swap in reversed(swaps):\n            swap.uninstall()",
        replace="        swaps.clear()",
        why="they are 1 anyway",
        invariant="nothing is left behind",
    ),
    Mutant(
        name="dropout while measuring",
        file=FILE,
        find="    with evaluating(model), torch.enable_grad():\n",
        replace="    with torch.enable_grad():\n",
        why="gradients are taken in train mode",
        invariant="dropout is off",
    ),
    Mutant(
        name="frozen weights thaw",
        file=FILE,
        find="                p.requires_grad_(False)\n",
        replace="                p.grad = None\n",
        why="only tensors are looked at afterwards",
        invariant="nothing is left behind",
    ),
    Mutant(
        name="nothing measured, all alike",
        file=FILE,
        find="    if not amount:\n",
        replace="    if amount is None:\n",
        why="an empty sum is 0",
        invariant="no text is an error",
    ),
]
