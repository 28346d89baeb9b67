"""What goes wrong where log-probabilities are written over the logits."""

from tests.mutants import Mutant

FILE = "minipeft/cross_entropy_rows.py"
TESTS = ["tests/test_cross_entropy_rows.py"]


def bug(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    bug(
        "the sign of the loss",
        "loss = -(z.gather(",
        "loss = (z.gather(",
        "a log-probability looks like a loss",
        "(CE 2)",
    ),
    bug(
        "padding counted with label 0",
        "[:, 0] * counts).sum()",
        "[:, 0]).sum()",
        "a label had to be put in for gathering",
        "(CE 2): -100 does not count",
    ),
    bug(
        "padding has a gradient",
        "        z.mul_(counts[:, None])\n",
        "",
        "the loss was masked, and that seems enough",
        "(CE 3): rows that do not count are 0",
    ),
    bug(
        "log-probabilities for probabilities",
        "        z.exp_()\n",
        "",
        "the gradient needs the softmax, and that was computed, nearly",
        "(CE 3)",
    ),
    bug(
        "the target's one forgotten",
        "        z.scatter_add_(-1, target, torch.full_like(target, -1, dtype=z.dtype))\n",
        "",
        "the softmax is most of it",
        "(CE 3)",
    ),
    bug(
        "the exponential without its maximum",
        "torch.log_softmax(z, -1, out=z)",
        "z.sub_(z.exp().sum(-1, keepdim=True).log())",
        "the formula as it is written",
        "large logits stay finite",
    ),
    bug(
        "over rows, not words",
        "torch.log_softmax(z, -1, out=z)",
        "torch.log_softmax(z, 0, out=z)",
        "the wrong axis",
        "(CE 2): a row's probabilities sum to 1",
    ),
    bug(
        "half precision in half precision",
        "if z.dtype.itemsize < 4:",
        "if z.dtype.itemsize < 2:",
        "it is half precision anyway",
        "half precision is computed in float32",
    ),
    bug(
        "the gradient of half precision thrown away",
        "        z.copy_(exact)\n",
        "",
        "the loss was returned",
        "(CE 3) in every dtype",
    ),
    bug(
        "a gradient that nobody asked for",
        "    if gradient:\n",
        "    if not gradient:\n",
        "the flag the wrong way round",
        "with `gradient`, z becomes the gradient",
    ),
]
