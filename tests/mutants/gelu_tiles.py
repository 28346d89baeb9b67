"""Bugs of a GELU written by hand."""

from tests.mutants import Mutant

FILE = "minipeft/gelu_tiles.py"
TESTS = ["tests/test_gelu_tiles.py"]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "the logistic function of z, not of 2z",
        "LINEAR = 2 * math.sqrt(2 / math.pi)",
        "LINEAR = math.sqrt(2 / math.pi)",
        "1 + tanh(z) = 2 sigma(2z) loses one of its twos",
        "(GeluTiles 1)",
    ),
    mutant(
        "the cubic term is not derived",
        "value=3 * CUBIC, out=slope_tile",
        "value=CUBIC, out=slope_tile",
        "the same line as above, copied",
        "(GeluTiles 2)",
    ),
    mutant(
        "the slope by u instead of u - h",
        "torch.sub(u_tile, h_tile, out=rest)",
        "rest.copy_(u_tile)",
        "1 - s is forgotten in the derivative of s",
        "(GeluTiles 2)",
    ),
    mutant(
        "the slope without its s",
        "            slope_tile.mul_(s)  # (GeluTiles 2)\n",
        "",
        "the product rule's first factor is lost",
        "(GeluTiles 2)",
    ),
    mutant(
        "the cubic term forgotten",
        "CUBIC = 0.044715 * LINEAR",
        "CUBIC = 0.0",
        "u sigma(1.6 u) is close, and has a name of its own",
        "(GeluTiles 1)",
    ),
    mutant(
        "the incoming gradient forgotten",
        "            slope_tile.mul_(grad_tile)\n",
        "            pass\n",
        "the loss is a sum in the first test one writes",
        "the chain rule",
    ),
    mutant(
        "the gradient in the input's order",
        "t.reshape(-1).split(TILE) for t in (x, slope, grad)",
        "torch.as_strided(t, (t.numel(),), (1,)).split(TILE) for t in (x, slope, grad)",
        "gradients are contiguous, nearly always",
        "a transposed gradient is taken",
    ),
    mutant(
        "the slope written over the input",
        "slope = torch.empty_like(x)",
        "slope = x",
        "as many numbers, and not needed any more",
        "twice backward gives twice the gradient",
    ),
]
