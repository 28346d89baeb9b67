"""Bugs of the feed-forward layer's hand-written gradient."""

from tests.mutants import Mutant

FILE = "minipeft/feed_forward.py"
TESTS = ["tests/test_feed_forward.py"]


def mutant(name, find, replace, why, invariant, file=FILE):
    return Mutant(name, file, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "the logistic function of z, not of 2z",
        "LINEAR = 2 * math.sqrt(2 / math.pi)",
        "LINEAR = math.sqrt(2 / math.pi)",
        "1 + tanh(z) = 2 sigma(2z) loses one of its twos",
        "(FeedForward 1)",
    ),
    mutant(
        "the cubic term is not derived",
        "value=3 * CUBIC, out=slope_tile",
        "value=CUBIC, out=slope_tile",
        "the same line as above, copied",
        "(FeedForward 2)",
    ),
    mutant(
        "the slope by u instead of u - h",
        "u_tile.sub_(h_tile)",
        "u_tile",
        "1 - s is forgotten in the derivative of s",
        "(FeedForward 2)",
    ),
    mutant(
        "the slope without its s",
        "            slope_tile.mul_(s)  # (FeedForward 2)\n",
        "",
        "the product rule's first factor is lost",
        "(FeedForward 2)",
    ),
    mutant(
        "the slope is not applied",
        "du.mul_(slope[part])",
        "du",
        "two products in a row look complete",
        "(FeedForward 3)",
    ),
    mutant(
        "the first chunk's slope for all",
        "du.mul_(slope[part])",
        "du.mul_(slope[: len(du)])",
        "one of three slices is forgotten",
        "(FeedForward 3) in chunks",
    ),
    mutant(
        "what is kept is overwritten",
        "torch.mm(du.mul_(slope[part]), W1, out=dx[part])",
        "torch.mm(slope[part].mul_(du), W1, out=dx[part])",
        "the buffer that is not needed any more, it seems",
        "twice backward gives twice the gradient",
    ),
    mutant(
        "the first bias forgotten",
        "        u_tile.add_(b1)\n",
        "",
        "mm is what one thinks of",
        "(FeedForward 1)",
    ),
    mutant(
        "the last chunk is left out",
        "for i in range(0, len(rows), CHUNK):",
        "for i in range(0, len(rows) - CHUNK + 1, CHUNK):",
        "whole chunks only",
        "(FeedForward 1) for odd sizes",
    ),
    mutant(
        "slopes kept in evaluation",
        "torch.is_grad_enabled() and x.requires_grad",
        "True",
        "one case less to think of",
        "nothing is kept without gradients",
    ),
    mutant(
        "a trained bias gets no gradient",
        "any(p.requires_grad for p in module.parameters())",
        "module.weight.requires_grad",
        "BitFit is forgotten",
        "the definition runs where a bias is trained",
        "minipeft/gpt.py",
    ),
    mutant(
        "hooks are passed over",
        "not plain(module, nn.Linear) or module.bias is None:",
        "type(module) is not nn.Linear or module.bias is None:",
        "the products are the same",
        "the definition runs where somebody listens",
        "minipeft/gpt.py",
    ),
    Mutant(
        name="tiles of a layer that has neurons",
        file=FILE,
        find="TILE // max(1, u.shape[1])",
        replace="TILE // u.shape[1]",
        why="who would have none",
        invariant="without neurons the bias is left",
    ),
    Mutant(
        name="hooks before the backward pass are passed by",
        file="minipeft/gpt.py",
        find="    hooks = hooks or module._backward_pre_hooks\n",
        replace="",
        why="three of the four kinds come to mind",
        invariant="hooked layers run as they are",
    ),
]
