"""Bugs of LoRA's hand-written gradient."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/lora_function.py"
TESTS = ["tests/test_lora_function.py"]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "scale forgotten in the forward",
        "h.addmm_(u.T, B.T, alpha=scale)",
        "h.addmm_(u.T, B.T)",
        "alpha of addmm_ is easily taken for LoRA's alpha",
        "(LoRAFunction 1)",
    ),
    mutant(
        "scale forgotten in du",
        "du = (B.T @ g.T).mul_(ctx.scale)",
        "du = B.T @ g.T",
        "the scale is put on B's gradient and forgotten here",
        "(LoRAFunction 2)",
    ),
    mutant(
        "scale forgotten in dB",
        "dB = (u @ g).mul_(ctx.scale).T",
        "dB = (u @ g).T",
        "the scale is put on du and forgotten here",
        "(LoRAFunction 2)",
    ),
    mutant(
        "scale twice in dA",
        "dA = du @ x if",
        "dA = ctx.scale * (du @ x) if",
        "du carries the scale already",
        "(LoRAFunction 2)",
    ),
    mutant(
        "branch left out of dx",
        "(g @ weight).addmm_(du.T, A)",
        "(g @ weight)",
        "the input's gradient seems to be the base's business",
        "(LoRAFunction 3)",
    ),
    mutant(
        "base left out of dx",
        "(g @ weight).addmm_(du.T, A)",
        "(du.T @ A)",
        "the base is frozen, so its gradient seems not needed",
        "(LoRAFunction 3)",
    ),
    mutant(
        "bias left out",
        "F.linear(rows, weight, bias)",
        "F.linear(rows, weight)",
        "the bias is added by the layer, one thinks",
        "(LoRAFunction 1)",
    ),
    mutant(
        "gradient taken as contiguous",
        "g = grad.reshape(-1, grad.shape[-1])",
        "g = grad.view(-1, grad.shape[-1])",
        "reshape and view are the same on the tensors one tries",
        "an expanded gradient is taken",
    ),
    mutant(
        "dA for dB",
        "return dx, None, None, dA, dB, None",
        "return dx, None, None, dA, 0 * dB, None",
        "B starts at zero and seems to need no gradient",
        "(LoRAFunction 2)",
    ),
]
