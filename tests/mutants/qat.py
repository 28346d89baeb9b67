"""What goes wrong in quantisation-aware training."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/qat.py"
TESTS = ["tests/test_qat.py", "tests/contract -k QAT"]


def bug(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    bug(
        "an estimator without its clip",
        "dw = g * inside  # (QAT 2)",
        "dw = g * 1",
        "'straight through' taken at its word",
        "(QAT 2)",
    ),
    bug(
        "the edge outside",
        "inside = (k >= low) & (k <= high)",
        "inside = (k > low) & (k < high)",
        "clamp's own gradient is a matter of taste at its ends",
        "(QAT 2), inclusive",
    ),
    bug(
        "the clip tested before rounding",
        "inside = (k >= low) & (k <= high)",
        "inside = (u + zero >= low) & (u + zero <= high)",
        "clamp first, round later",
        "(QAT 2): 7.4 steps round to 7, which is inside",
    ),
    bug(
        "zero-point forgotten on the way back",
        "return scale * (k.clamp(low, high) - zero)  # (QAT 1)",
        "return scale * k.clamp(low, high)",
        "invisible on symmetric grids",
        "(QAT 1)",
    ),
    bug(
        "truncated",
        "k = u.round() + zero",
        "k = u.trunc() + zero",
        "a cast to int",
        "(QAT 1)",
    ),
    bug(
        "the scale's gradient without u",
        "ds = g * torch.where(inside, k - zero - u, k.clamp(low, high) - zero)",
        "ds = g * (k.clamp(low, high) - zero)",
        "d(s k)/ds = k, with k held fixed",
        "(QAT 3)",
    ),
    bug(
        "without LSQ's factor",
        "return dw, ds / math.sqrt(n * max(high, 1)), None, None, None  # (QAT 3)",
        "return dw, ds, None, None, None",
        "Adam divides it out anyway",
        "(QAT 3)",
    ),
    bug(
        "the factor over all weights",
        "n = u.numel() / scale.numel()",
        "n = u.numel()",
        "n of the layer, not of what shares the step",
        "(QAT 3): n is a row's",
    ),
    bug(
        "symmetric limits",
        "return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1",
        "return 1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1",
        "one code is left unused in many papers",
        "(QAT 4)",
    ),
    bug(
        "the step at the largest weight",
        "return (2 * w.abs().mean(-1, keepdim=True) / math.sqrt(high)).clamp(min=tiny)",
        "return (w.abs().amax(-1, keepdim=True) / high).clamp(min=tiny)",
        "absmax for LSQ's start",
        "(QAT 4)",
    ),
    bug(
        "the base trained itself",
        "self.weight = nn.Parameter(weight.clone())",
        "self.weight = nn.Parameter(weight)",
        "the copy looks wasteful",
        "every base tensor is bitwise unchanged",
    ),
    bug(
        "groups down the columns",
        "return weight.unflatten(1, (-1, self.group_size))  # (out, groups, size)",
        "return weight.unflatten(1, (self.group_size, -1)).mT",
        "reshape's other order",
        "it starts as the rounded base",
    ),
    bug(
        "merged without rounding",
        "return linear_with(inner, self.rounded(), inner.bias)",
        "return linear_with(inner, self.weight, inner.bias)",
        "the trained weight is self.weight, is it not",
        "merged and unmerged agree",
    ),
    bug(
        "the largest with its sign",
        "largest = self.grouped(self.weight.detach()).abs().amax(-1, keepdim=True)",
        "largest = self.grouped(self.weight.detach()).amax(-1, keepdim=True)",
        "max for absmax",
        "it starts as the rounded base",
    ),
    bug(
        "steps not counted",
        "total += out * into + steps",
        "total += out * into",
        "there are few of them",
        "the count is the formula",
    ),
    bug(
        "empty layers rounded",
        "if not inner.weight.numel():",
        "if inner.weight is None:",
        "every layer has weights",
        "a layer that lost all its heads has nothing to round",
    ),
    bug(
        "groups of the unpruned width",
        "if inner.in_features % (self.group_size or 1):",
        "if inner.in_features < (self.group_size or 1):",
        "check has seen the widths, those of the configuration",
        "a group that does not divide what is left is named",
    ),
]
