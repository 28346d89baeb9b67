"""What goes wrong in ggml's block formats."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/ggml.py"
TESTS = ["tests/test_ggml.py", "tests/parity/test_ggml_gguf.py"]


def bug(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    bug(
        "neighbours share a byte",
        "nibbles = (q[:, :16] & 15) | (q[:, 16:] << 4)  # (GGML 6)",
        "nibbles = (q[:, 0::2] & 15) | (q[:, 1::2] << 4)",
        "most formats pack that way",
        "(GGML 6)",
    ),
    bug(
        "the first half high",
        "nibbles = (q[:, :16] & 15) | (q[:, 16:] << 4)  # (GGML 6)",
        "nibbles = (q[:, 16:] & 15) | (q[:, :16] << 4)",
        "bitsandbytes' habit",
        "(GGML 6)",
    ),
    bug(
        "the largest without its sign",
        "M = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # the first of equals",
        "M = blocks.abs().amax(1, keepdim=True)",
        "absmax is what every other format uses",
        "(GGML 1)",
    ),
    bug(
        "the largest and the smallest mixed up",
        "M = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))  # the first of equals",
        "M = blocks.amax(1, keepdim=True)",
        "'max' in the C source is the value with the largest size",
        "(GGML 1)",
    ),
    bug(
        "a positive scale",
        "d = M / -half  # (GGML 1)",
        "d = M / half",
        "a negative scale looks like a slip",
        "the sign of the largest gets the extra code",
    ),
    bug(
        "no clamp at the top",
        ".trunc().clamp(max=2 * half - 1)  # (GGML 2)",
        ".trunc()",
        "eight steps each way seem to fit",
        "(GGML 2): the opposite extreme is 15, not 16",
    ),
    bug(
        "codes from the stored scale",
        "q = ((blocks - m) * reciprocal(d) + 0.5).trunc().clamp(max=top)  # (GGML 4)",
        "q = ((blocks - m) * reciprocal(d.half().float()) + 0.5).trunc().clamp(max=top)",
        "one rounds against what will be read back",
        "codes come from the float32 scale",
    ),
    bug(
        "sixteen steps between fifteen points",
        "top = 2**bits - 1",
        "top = 2**bits",
        "2^b points mistaken for 2^b steps",
        "(GGML 3)",
    ),
    bug(
        "halves to even",
        "return (scaled.sign() * (whole + (2 * (size - whole)).floor())).to(torch.int8), d",
        "return scaled.round().to(torch.int8), d",
        "torch's round",
        "(GGML 5): halves go away from zero",
    ),
    bug(
        "128 steps",
        "d = blocks.abs().amax(1, keepdim=True) / 127",
        "d = blocks.abs().amax(1, keepdim=True) / 128",
        "a byte has 256 values",
        "(GGML 5)",
    ),
    bug(
        "the fifth bits from the other end",
        "places = 2 ** torch.arange(8, device=q.device)",
        "places = 2 ** torch.arange(7, -1, -1, device=q.device)",
        "packbits' default order",
        "(GGML 7)",
    ),
    bug(
        "the fifth bit forgotten on the way back",
        "    if bits == 5:",
        "    if bits == 6:",
        "four bits come back and look plausible",
        "(GGML 7)",
    ),
    bug(
        "the minimum before the scale",
        "parts = [as_bytes(d), as_bytes(m), *pack(q, format.bits)]",
        "parts = [as_bytes(m), as_bytes(d), *pack(q, format.bits)]",
        "w' = m + d q is written in that order",
        "bytes are gguf's",
    ),
    bug(
        "a minimum that costs nothing",
        "constants = 4 if self.minimum else 2",
        "constants = 2",
        "the second constant forgotten in the bill",
        "(GGML 8)",
    ),
    bug(
        "tiny blocks",
        "return torch.where(d.abs() < SMALLEST, torch.zeros_like(d), 1 / d)",
        "return torch.where(d == 0, torch.zeros_like(d), 1 / d)",
        "only zero cannot be divided by",
        "tiny blocks become zeros and not NaN",
    ),
]
