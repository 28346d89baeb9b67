"""What goes wrong in eight bits."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/int8.py"
TESTS = ["tests/test_int8.py", "tests/parity/test_int8_bitsandbytes.py"]


def bug(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    bug(
        "one scale a tensor",
        "largest = w.abs().amax(-1, keepdim=True)",
        "largest = w.abs().amax().expand(*w.shape[:-1], 1)",
        "absmax of the whole matrix",
        "(Int8 1): a scale a row",
    ),
    bug(
        "the largest with its sign",
        "largest = w.abs().amax(-1, keepdim=True)",
        "largest = w.amax(-1, keepdim=True)",
        "max for absmax",
        "(Int8 1)",
    ),
    bug(
        "truncated",
        "q = (w * safe_ratio(127, largest)).round()  # (Int8 1)",
        "q = (w * safe_ratio(127, largest)).trunc()",
        "a cast to int8 truncates",
        "the error is at most half a step",
    ),
    bug(
        "scaled by 128",
        "return Int8(q.to(torch.int8), largest / 127, None, weight.dtype)",
        "return Int8(q.to(torch.int8), largest / 128, None, weight.dtype)",
        "a byte has 256 values",
        "constants come back exactly",
    ),
    bug(
        "a range without zero",
        "low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)",
        "low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)",
        "the range is the range",
        "(Int8 2): z fits in eight bits",
    ),
    bug(
        "unsigned zero-point",
        "zero = (-low * inverse).round() - 128  # (Int8 2)",
        "zero = (-low * inverse).round()",
        "codes from 0 to 255, as in most texts",
        "(Int8 2)",
    ),
    bug(
        "no clamp",
        "q = ((w * inverse).round() + zero).clamp(-128, 127)  # (Int8 3)",
        "q = (w * inverse).round() + zero",
        "the range was chosen to fit",
        "(Int8 3): at the ends two roundings add up",
    ),
    bug(
        "the zero-point added back",
        "q = q - quantized.zero",
        "q = q + quantized.zero",
        "the sign of z",
        "(Int8 3)",
    ),
    bug(
        "outliers inside the integers",
        "y = integer_product(quantize_absmax(rows.masked_fill(outlier, 0)), weight)",
        "y = integer_product(quantize_absmax(rows), weight)",
        "the columns are multiplied apart, so they may stay, too",
        "(Int8 5)",
    ),
    bug(
        "more than the threshold",
        "outlier = (rows.abs() >= threshold).any(0)",
        "outlier = (rows.abs() > threshold).any(0)",
        "'exceeds 6' in prose",
        "outlier columns are theirs",
    ),
    bug(
        "outlier rows",
        "outlier = (rows.abs() >= threshold).any(0)",
        "outlier = (rows >= threshold).any(0)",
        "negative outliers forgotten",
        "(Int8 5): -6 is one",
    ),
    bug(
        "one side's scale",
        "return sums.to(x.scale.dtype) * (x.scale * w.scale.T.to(x.scale.dtype))  # (Int8 4)",
        "return sums.to(x.scale.dtype) * x.scale * w.scale.mean()",
        "the weight's scales are nearly equal",
        "(Int8 4)",
    ),
    bug(
        "scales counted as bytes",
        "(4 if self.zero is None else 5)",
        "(1 if self.zero is None else 2)",
        "everything is eight bits",
        "(Int8 6)",
    ),
    bug(
        "a layer without its bias",
        "return y if self.shift is None else y + self.shift",
        "return y",
        "the product was the hard part",
        "the layer is near the layer it was made from",
    ),
]
