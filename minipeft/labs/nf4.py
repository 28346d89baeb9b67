"""Lab: NF4 with double quantisation."""

from __future__ import annotations

import torch

from minipeft.labs.engine.case import check, close, equal, refuses, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.quantized import double_quantization as double
from minipeft.quantized import nf4
from minipeft.quantized.codebooks import DYNAMIC_MAP, NF4_CODEBOOK

CONSTANT = Hint(
    "(NF4 2): a block's constant is its largest absolute value, in float32",
    "A block holds -3 and 2. What is its constant? And which dtype do you look for it in?",
    ("quantize_blocks",),
)
NEAREST = Hint(
    "(NF4 3): the code of the nearest level, found at the midpoints; the lower one in a tie",
    "A value lies exactly between two levels. And one just below a level: which code gets it?",
    ("nearest",),
)
NIBBLES = Hint(
    "(NF4 4): the even element is in the byte's high half, there and back",
    "Pack the codes 1 and 2 by hand. Which byte is it, and what do you read from it?",
    ("pack", "dequantize_blocks"),
)
BACK = Hint(
    "(NF4 5): the product is taken in float32 and rounded once",
    "In which dtype do level and constant meet? How often is the result rounded?",
    ("dequantize_blocks",),
)
MEAN = Hint(
    "(NF4 6): the mean is taken away before, and added back after",
    "Constants are all positive, the map is symmetric. What is done about that, on both ways?",
    ("quantize_constants", "dequantize_constants"),
)
GROUPS = Hint(
    "(NF4 6): one C for a group of 256 constants, the nearest level of the dynamic map",
    "How many numbers C are there for 600 constants? Which level is nearest to a quotient?",
    ("quantize_constants",),
)
BITS = Hint(
    "(NF4 7): 4 bits and 32 / 64, doubled 4 + 8 / 64 + 32 / (64 * 256)",
    "What is stored for one block, and what for a group of blocks? How many bits is that?",
    ("Quantized.bits_per_parameter",),
)
WORK = Hint(
    "show_work: the same steps, with every intermediate",
    "Compare show_work with what your quantize gives. Which field differs?",
    ("show_work",),
)

DOUBLE = "minipeft/quantized/double_quantization.py"

LAB = Lab(
    title="NF4: four bits a weight, constants in eight",
    about="""
    A weight is stored as one of sixteen levels times the largest absolute value of its block; the
    blocks' constants are stored in eight bits themselves. You write the way there and the way back.

    (NF4 2) to (NF4 5) and (NF4 7) are in the header of `nf4.py`, (NF4 6) in that of
    `double_quantization.py`. The levels, `midpoints`, `into_blocks` and `scaled_to_one` of
    `codebooks.py` are given. `nearest` serves FP4 too, whose codes do not ascend: `midpoints` then
    gives the order.
    """,
    files=("minipeft/quantized/nf4.py", DOUBLE),
    blanks=(
        "nearest",
        "pack",
        "quantize_blocks",
        "dequantize_blocks",
        "quantize_constants",
        "dequantize_constants",
        "dequantize_doubled",
        "Quantized.bits_per_parameter",
        "show_work",
    ),
    minutes=90,
    mistakes="""
    The low nibble first, on one of the two ways; a signed maximum; levels rounded down instead of
    to the nearest; the mean of the constants never added back; products in bfloat16.
    """,
    bugs=(
        Bug(
            "the low nibble first",
            "return codes[0::2] * 16 + codes[1::2]",
            "return codes[0::2] + 16 * codes[1::2]",
            NIBBLES,
        ),
        Bug(
            "nibbles swapped on the way back",
            "torch.stack([packed >> 4, packed & 15], -1)",
            "torch.stack([packed & 15, packed >> 4], -1)",
            NIBBLES,
        ),
        Bug(
            "signed maximum",
            "absmax = blocks.abs().amax(1)  # (NF4 2)",
            "absmax = blocks.amax(1)",
            CONSTANT,
        ),
        Bug(
            "mean for maximum",
            "absmax = blocks.abs().amax(1)  # (NF4 2)",
            "absmax = blocks.abs().mean(1)",
            CONSTANT,
        ),
        Bug(
            "rounded down to a level",
            "    between, order = midpoints(kind)\n",
            "    between, order = midpoints(kind)\n"
            "    between = CODEBOOKS[kind].sort().values[1:]\n",
            NEAREST,
        ),
        Bug(
            "the mean is not added back",
            "return blocks.view(-1)[: len(levels)] + double.offset",
            "return blocks.view(-1)[: len(levels)]",
            MEAN,
            DOUBLE,
        ),
        Bug(
            "one second-level constant",
            "largest = groups.abs().amax(1)",
            "largest = groups.abs().amax().repeat(len(groups))",
            GROUPS,
            DOUBLE,
        ),
        Bug(
            "bits without the constants",
            "return (8 * self.packed.numel() + constants) / self.numel",
            "return 8 * self.packed.numel() / self.numel",
            BITS,
        ),
        Bug(
            "at a midpoint the upper level",
            "codes = torch.bucketize(scaled, between.to(scaled.device))",
            "codes = torch.bucketize(scaled, between.to(scaled.device), right=True)",
            NEAREST,
        ),
        Bug(
            "constants not centred",
            "groups = into_blocks(absmax - offset, GROUP)",
            "groups = into_blocks(absmax, GROUP)",
            MEAN,
            DOUBLE,
        ),
        Bug(
            "the product in the target's dtype",
            "values = into_blocks(levels[codes.int()], block_size) * absmax[:, None]",
            "values = into_blocks(levels[codes.int()], block_size).to(dtype) "
            "* absmax.to(dtype)[:, None]",
            BACK,
        ),
        Bug(
            "work shown with other constants",
            "    absmax = blocks.abs().max(1).values\n",
            "    absmax = blocks.max(1).values\n",
            WORK,
        ),
    ),
)


def drawn(case):
    """(weight (out, in) float32, block size): the last block is short, the end odd or even."""
    size = case.pick(6, 16, 64)
    out, into = case.sizes(2, 5, 13)
    return case.normal(out, into, dtype=torch.float32, std=case.number(0.01, 2)), size


def blocks_of(w, size):
    """The weight's blocks, the last one shorter."""
    return list(w.reshape(-1).double().split(size))


def unpacked(quantized):
    """The codes, element by element: the even one is the high half of its byte."""
    codes = []
    for byte in quantized.packed.view(-1).tolist():
        codes += [byte // 16, byte % 16]
    return torch.tensor(codes[: quantized.numel])


def nearest_codes(scaled):
    """The nearest level's code of each value, the lower one in a tie."""
    distance = (scaled.double()[:, None] - NF4_CODEBOOK.double()).abs()
    return distance.argmin(-1)


@LAB.invariant(7)
def the_constant_is_the_largest_size(case):
    """(NF4 2): a float32 constant for each block, its largest absolute value; the last block may be
    shorter.
    """
    w, size = drawn(case)
    w[0, 0] = -4 * w.abs().max()
    wanted = torch.stack([b.abs().max() for b in blocks_of(w, size)])
    absmax = nf4.quantize_nf4(w, size).absmax
    equal(absmax.dtype, torch.float32, "the constants' dtype")
    close(absmax, wanted, "the constants", 1e-7)  # a maximum is exact; float32 to float64


@LAB.invariant(8)
def the_code_is_the_nearest_level(case):
    """(NF4 3): every value in [-1, 1] gets the code of the level nearest to it, in a tie the lower
    one.
    """
    values = torch.empty(200, dtype=torch.float32).uniform_(-1, 1, generator=case.generator)
    far = (values[:, None] - (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2).abs().amin(1) > 1e-6
    values = values[far]
    codes = nf4.nearest(values, "nf4")
    equal(codes.dtype, torch.uint8, "the codes' dtype")
    same(codes.long(), nearest_codes(values), "the codes")
    middles = (NF4_CODEBOOK[:-1] + NF4_CODEBOOK[1:]) / 2
    same(nf4.nearest(middles, "nf4").long(), torch.arange(15), "the codes of the midpoints")
    same(nf4.nearest(NF4_CODEBOOK, "nf4").long(), torch.arange(16), "the codes of the levels")


@LAB.invariant(7)
def the_even_element_is_high(case):
    """(NF4 4): byte = 16 k_{2i} + k_{2i+1}."""
    codes = torch.randint(0, 16, (2 * case.size(3, 20),), generator=case.generator)
    pairs = codes.view(-1, 2)
    packed = nf4.pack(codes.to(torch.uint8))
    equal(packed.dtype, torch.uint8, "the bytes' dtype")
    same(packed.long().view(-1), pairs[:, 0] * 16 + pairs[:, 1], "the bytes")


@LAB.invariant(7)
def what_comes_back_is_level_times_constant(case):
    """(NF4 5): w' = q[k] c, taken in float32, rounded once, of the weight's shape."""
    w, size = drawn(case)
    n = w.numel()
    packed = torch.randint(0, 256, (-(-n // 2), 1), generator=case.generator).to(torch.uint8)
    absmax = case.normal(-(-n // size), dtype=torch.float32).abs()
    dtype = case.pick(torch.float32, torch.bfloat16, torch.float16)
    stored = nf4.Quantized(packed, absmax, tuple(w.shape), dtype, size)
    levels = NF4_CODEBOOK[unpacked(stored)]
    wanted = levels * absmax.repeat_interleave(size)[:n]
    same(nf4.dequantize_nf4(stored), wanted.to(dtype).view(w.shape), "the weight that comes back")


@LAB.invariant(6)
def there_and_back_is_near(case):
    """|w - w'| <= 0.1520 c: half the widest gap between levels; and once more gives the same."""
    w, size = drawn(case)
    stored = nf4.quantize_nf4(w, size)
    again = nf4.dequantize_nf4(stored)
    for a, b in zip(blocks_of(w, size), blocks_of(again, size), strict=True):
        check(bool((a - b).abs().max() <= 0.1520 * a.abs().max()), "an error beyond half a gap")
    same(nf4.quantize_nf4(again, size).packed, stored.packed, "the codes of what came back")
    refuses(lambda: nf4.quantize_nf4(w * float("nan")), "quantising NaN")


def many_constants(case):
    """(c (blocks,) float32 of two groups that differ, how many are in the second)."""
    more = case.size(20, 200)
    c = case.normal(256 + more, dtype=torch.float32).abs() + 1
    c[:256] *= 3
    return c, more


def centred_groups(c):
    """The constants without their mean, in groups of 256, float64."""
    return (c.double() - c.double().mean()).split(256)


@LAB.invariant(3)
def each_group_of_constants_has_its_largest(case):
    """(NF4 6): mean(c), and one C for each group of 256 centred constants."""
    c, _ = many_constants(case)
    given = double.quantize_constants(c)
    close(given.offset, c.double().mean(), "the mean", 1e-6)  # a float32 sum of 500 numbers
    largest = torch.stack([g.abs().max() for g in centred_groups(c)])
    close(given.absmax, largest, "C of the groups", 1e-6)


@LAB.invariant(3)
def a_constant_s_code_is_the_nearest_level(case):
    """(NF4 6): t is the level of D nearest to (c - mean) / C."""
    c, more = many_constants(case)
    given = double.quantize_constants(c)
    C = given.absmax.double().repeat_interleave(torch.tensor([256, more]))
    distance = ((c.double() - c.double().mean()) / C)[:, None] - DYNAMIC_MAP.double()
    reached = distance.gather(1, given.codes.long()[:, None])[:, 0].abs()
    close(reached, distance.abs().amin(1), "the distance to the level", 1e-6)


@LAB.invariant(2)
def constants_come_back_with_their_mean(case):
    """(NF4 6): c' = D[t] C + mean, for constants and for weights stored with them."""
    c, _ = many_constants(case)
    given = double.quantize_constants(c)
    levels = DYNAMIC_MAP[given.codes.long()]
    wanted = levels * given.absmax.repeat_interleave(256)[: len(c)] + given.offset
    close(double.dequantize_constants(given), wanted, "the constants that come back", 1e-6)
    weight = case.normal(40, 64, dtype=torch.float32)
    doubled = nf4.quantize_nf4(weight, 64, True)
    stored = doubled.absmax
    c = DYNAMIC_MAP[stored.codes.long()] * stored.absmax + stored.offset
    wanted = NF4_CODEBOOK[unpacked(doubled)].view(40, 64) * c[:, None]
    close(nf4.dequantize_nf4(doubled), wanted, "a weight with doubled constants", 1e-6)


@LAB.invariant(4)
def bits_are_what_is_stored(case):
    """(NF4 7): 4.5 bits a parameter; with double quantisation 4 + 8 / 64 + 32 / (64 * 256)."""
    w = case.normal(64 * case.size(1, 2), 256, dtype=torch.float32)
    close(nf4.quantize_nf4(w).bits_per_parameter, 4 + 32 / 64, "the bits")
    doubled = nf4.quantize_nf4(w, 64, True).bits_per_parameter
    groups = -(-(w.numel() // 64) // 256)
    close(doubled, 4 + 8 / 64 + 32 * groups / w.numel(), "the bits with double quantisation")


@LAB.invariant(3)
def the_work_is_shown(case):
    """show_work gives the constants, codes and weights that the formulas give."""
    w, size = drawn(case)
    w[0, 0] = -4 * w.abs().max()
    work = nf4.show_work(w, size)
    wanted = torch.stack([b.abs().max() for b in blocks_of(w, size)])
    close(work.absmax, wanted, "absmax of the work", 1e-7)
    scaled = w.reshape(-1).double() / wanted.repeat_interleave(size)[: w.numel()]
    error = (NF4_CODEBOOK.double()[work.codes.view(-1)[: w.numel()].long()] - scaled).abs()
    least = (scaled[:, None] - NF4_CODEBOOK.double()).abs().amin(1)
    close(error, least, "the distance to the level in the work", 1e-6)
    close(work.error, work.restored - w, "the error of the work", 1e-6)
