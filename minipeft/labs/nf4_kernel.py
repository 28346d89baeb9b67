"""Lab: an NF4 kernel in Triton, run by Triton's interpreter."""

from __future__ import annotations

import torch

from minipeft.labs.engine.case import check, close, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.quantized.codebooks import CODEBOOKS, DYNAMIC_MAP

CONSTANT = Hint(
    "c_b = max |w_bi|: a row's maximum of absolute values, for blocks of zeros and short ones too",
    "A block holds -3 and 2; another holds zeros alone. What is divided by what?",
    ("quantize_kernel",),
)
CODES = Hint(
    "k = sum_j [m_j < w (1 / c)]: how many midpoints lie below",
    "A value lies exactly on a midpoint. Is that midpoint below it?",
    ("quantize_kernel",),
)
NIBBLES = Hint(
    "byte = 16 k_even + k_odd, there and back",
    "Pack the codes 1 and 2 by hand, then read them again. Which half is whose?",
    ("quantize_kernel", "dequantize_kernel"),
)
PLACES = Hint(
    "the levels interleave: (BLOCKS, PAIRS) twice -> (BLOCKS, 2 PAIRS), even, odd, even, odd",
    "Which element does byte 3 of a block hold in its high half? Where is it stored?",
    ("dequantize_kernel",),
)
MASKS = Hint(
    "the tile is wider than the block and longer than the tensor: every lane beyond is masked",
    "For a block size of 6 the tile has 8 columns. What do the last two do, and the last block?",
    ("quantize_kernel", "dequantize_kernel"),
)
ORDER = Hint(
    "FP4's codes do not ascend: the count of midpoints is looked up in t_order",
    "For FP4, is the fifth level's code 5?",
    ("quantize_kernel",),
)
DOUBLED = Hint(
    "c_b = D[t_b] C_g + mean, with g = b // GROUP",
    "Which group does block 300 belong to? What was taken away before the codes were made?",
    ("load_constants",),
)
KERNEL = "minipeft/kernels/nf4.py"
INSIDE = "    inside = (column < SIZE) & (place < numel)\n    b_values"

LAB = Lab(
    title="A Triton kernel: NF4 there and back in one launch each",
    about="""
    Three Triton functions: quantise a tile of blocks, fetch a tile's constants, and write the
    weights back. No GPU is needed: Triton's interpreter runs them on the CPU, slowly and with
    Python's own error messages (print works in a kernel).

    The header of `kernels/nf4.py` derives the tile and says which division to use. Arguments,
    shapes, launchers and tables are given. A tile is (BLOCKS, 2 PAIRS), rounded up to powers of
    two: mask what is beyond a block and beyond the tensor, on every load and store.
    """,
    files=(KERNEL,),
    blanks=("quantize_kernel", "load_constants", "dequantize_kernel"),
    minutes=120,
    preload=("triton",),
    mistakes="""
    A mask that forgets the lanes between the block size and the tile, or the short last block; the
    low nibble first; the mean of the constants not added; `>=` at the midpoints.
    """,
    bugs=(
        Bug(
            "signed maximum",
            "b_absmax = tl.max(tl.abs(b_values), 1)",
            "b_absmax = tl.max(b_values, 1)",
            CONSTANT,
        ),
        Bug(
            "at a midpoint the upper level",
            "(b_scaled > tl.load(t_midpoints + j))",
            "(b_scaled >= tl.load(t_midpoints + j))",
            CODES,
        ),
        Bug(
            "the low nibble first",
            "(b_even * 16 + b_odd)",
            "(b_odd * 16 + b_even)",
            NIBBLES,
        ),
        Bug(
            "the last block is not cut",
            INSIDE,
            INSIDE.replace(" & (place < numel)", ""),
            MASKS,
        ),
        Bug(
            "nibbles swapped on the way back",
            "b_even = tl.load(t_levels + (b_bytes >> 4))\n"
            "    b_odd = tl.load(t_levels + (b_bytes & 15))",
            "b_even = tl.load(t_levels + (b_bytes & 15))\n"
            "    b_odd = tl.load(t_levels + (b_bytes >> 4))",
            NIBBLES,
        ),
        Bug(
            "the mean is not added",
            "return b_level * b_largest + tl.load(t_offset)",
            "return b_level * b_largest",
            DOUBLED,
        ),
        Bug(
            "one group for all",
            "t_largest + block // GROUP",
            "t_largest + block * 0",
            DOUBLED,
        ),
        Bug(
            "evens first, then odds",
            "b_out = tl.interleave(b_even, b_odd)",
            "b_out = tl.reshape(tl.permute(tl.join(b_even, b_odd), (0, 2, 1)), "
            "[BLOCKS, 2 * PAIRS])",
            PLACES,
        ),
        Bug(
            "stored beyond the end",
            "mask=(column < SIZE) & (place < numel))",
            "mask=column < SIZE)",
            MASKS,
        ),
        Bug(
            "columns beyond the block",
            INSIDE,
            INSIDE.replace("(column < SIZE) & ", ""),
            MASKS,
        ),
        Bug(
            "codes in the order of levels",
            "    if not ASCENDING:\n",
            "    if ASCENDING and False:\n",
            ORDER,
        ),
        Bug(
            "zeros divided by zero",
            "tl.div_rn(1.0, tl.maximum(b_absmax, smallest))",
            "tl.div_rn(1.0, b_absmax)",
            CONSTANT,
        ),
    ),
)

GUARD = 4096  # elements behind every tensor: a lane that is not masked lands there


def kernels():
    """The student's file, imported when Triton is wanted."""
    from minipeft.kernels import nf4

    return nf4


def guarded(tensor, fill):
    """(a view like `tensor`, what lies behind it): together one piece of memory."""
    room = torch.full((tensor.numel() + GUARD,), fill, dtype=tensor.dtype)
    room[: tensor.numel()] = tensor.reshape(-1)
    return room[: tensor.numel()], room[tensor.numel() :]


def quantized(w, size, kind="nf4", watched=False):
    """(packed, absmax) from the kernel; raises Wrong when a guard is touched and watched."""
    nf4, n = kernels(), w.numel()
    flat, _ = guarded(w, 1e4)
    packed, behind = guarded(torch.full((-(-n // 2),), 255, dtype=torch.uint8), 170)
    absmax, beyond = guarded(torch.full((-(-n // size),), -1.0), -7.0)
    between, order, _ = nf4.tables(kind, flat.device)
    shape = nf4.tile(size)
    grid = (-(-len(absmax) // shape["BLOCKS"]),)
    how = {"MIDPOINTS": len(between), "ASCENDING": kind != "fp4"}
    nf4.quantize_kernel[grid](flat, between, order, packed, absmax, n, len(packed), **shape, **how)
    if watched:
        check(bool((behind == 170).all()), "bytes behind the last are written")
        check(bool((beyond == -7).all()), "constants behind the last are written")
    return packed, absmax


def dequantized(packed, constants, n, size, dtype=torch.float32, watched=False):
    """Weights (n,) from the kernel. constants: (absmax,), or (codes, C, mean)."""
    nf4 = kernels()
    packed, _ = guarded(packed, 90)
    first, _ = guarded(constants[0], 3)
    largest, offset = constants[1:] if len(constants) == 3 else (first, first)
    out, behind = guarded(torch.zeros(n, dtype=dtype), 5.0)
    shape = nf4.tile(size)
    grid = (-(-len(first) // shape["BLOCKS"]),)
    levels, group = nf4.tables("nf4", out.device)[2], 256 if len(constants) == 3 else 0
    nf4.dequantize_kernel[grid](
        packed, first, largest, offset, levels, DYNAMIC_MAP, out, n, len(packed), **shape,
        GROUP=group,
    )  # fmt: skip
    check(not watched or bool((behind == 5).all()), "weights behind the last are written")
    return out


def drawn(case, size):
    """Weights (n,) whose last block is short and whose third block is all zeros."""
    w = case.normal(size * case.size(4, 9) + case.size(1, size - 1), dtype=torch.float32)
    w[0] = -3 * w.abs().max()
    w[2 * size : 3 * size] = 0
    return w


def constants(w, size):
    """(blocks,): the largest absolute value of each."""
    return torch.stack([b.abs().max() for b in w.split(size)])


def codes(w, size, kind="nf4"):
    """The nearest level's code of every weight, computed in float64."""
    c = constants(w, size).double().clamp(min=1e-38).repeat_interleave(size)[: len(w)]
    return ((w.double() / c)[:, None] - CODEBOOKS[kind].double()).abs().argmin(-1)


def bytes_of(codes):
    """Two codes a byte, the even one high; the last half byte holds a 0's code if n is odd."""
    pairs = torch.cat([codes, codes.new_full((len(codes) % 2,), 7)]).view(-1, 2)
    return (pairs[:, 0] * 16 + pairs[:, 1]).to(torch.uint8)


@LAB.invariant(8)
def constants_are_the_largest_sizes(case):
    """c_b = max |w_bi|, for a short last block too; a block of zeros has the code of 0."""
    size = case.pick(16, 32, 64)
    w = drawn(case, size)
    packed, absmax = quantized(w, size)
    same(absmax, constants(w, size), "the constants")
    zeros = packed[size : size + size // 2]
    same(zeros, torch.full_like(zeros, 7 * 16 + 7), "the bytes of a block of zeros")


@LAB.invariant(9)
def bytes_are_pairs_of_nearest_codes(case):
    """byte = 16 k_even + k_odd, k the level nearest to w / c."""
    size = case.pick(16, 32, 64)
    w = drawn(case, size)
    packed, _ = quantized(w, size)
    same(packed, bytes_of(codes(w, size)), "the bytes")


@LAB.invariant(4)
def a_tie_goes_to_the_lower_level(case):
    """k counts the midpoints that lie below w / c: one that is met exactly does not."""
    levels = CODEBOOKS["nf4"]
    w = torch.cat([torch.ones(1), (levels[:-1] + levels[1:]) / 2])  # one block of 16, c = 1
    packed, _ = quantized(w, 16)
    same(packed, bytes_of(torch.tensor([15, *range(15)])), "the bytes of the midpoints")


@LAB.invariant(4)
def codes_may_be_in_any_order(case):
    """FP4: the count of midpoints is looked up in t_order."""
    levels = CODEBOOKS["fp4"]
    wanted = torch.randperm(14, generator=case.generator) + 1
    wanted = torch.cat([wanted[wanted != 8], torch.tensor([3])])  # code 8 is a second 0
    packed, _ = quantized(levels[wanted], 64, "fp4")
    same(packed, bytes_of(wanted), "the bytes of FP4's levels")


@LAB.invariant(5)
def a_block_may_have_any_even_size(case):
    """Blocks of 6, 10 or 24: the lanes beyond a block neither read nor write."""
    size = case.pick(6, 10, 24)
    w = drawn(case, size)
    packed, absmax = quantized(w, size)
    same(absmax, constants(w, size), "the constants")
    same(packed, bytes_of(codes(w, size)), "the bytes")
    bytes_ = torch.randint(0, 256, (-(-len(w) // 2),), generator=case.generator).to(torch.uint8)
    given = dequantized(bytes_, (absmax,), len(w), size)
    same(given, weights(bytes_, absmax, len(w), size), "the weights that come back")


def weights(packed, c, n, size):
    """q[k] c, byte by byte."""
    halves = [half for byte in packed.tolist() for half in (byte // 16, byte % 16)]
    return CODEBOOKS["nf4"][torch.tensor(halves[:n])] * c.repeat_interleave(size)[:n]


@LAB.invariant(6)
def levels_times_constants_come_back(case):
    """w' = q[k] c, even elements from the high half, rounded once to the dtype."""
    size, n = case.pick(16, 64), case.size(70, 300)
    packed = torch.randint(0, 256, (-(-n // 2),), generator=case.generator).to(torch.uint8)
    c = case.normal(-(-n // size), dtype=torch.float32).abs()
    dtype = case.pick(torch.float32, torch.float16)
    given = dequantized(packed, (c,), n, size, dtype)
    same(given, weights(packed, c, n, size).to(dtype), "the weights that come back")


@LAB.invariant(3)
def elements_are_in_their_places(case):
    """Even, odd, even, odd: a byte's two elements lie side by side."""
    size, n = case.pick(16, 64), case.size(70, 300)
    halves = torch.randint(0, 16, (-(-n // 2),), generator=case.generator)
    packed, c = (halves * 17).to(torch.uint8), torch.ones(-(-n // size))
    wanted = CODEBOOKS["nf4"][halves.repeat_interleave(2)[:n]]
    same(dequantized(packed, (c,), n, size), wanted, "the weights that come back")


@LAB.invariant(4)
def nothing_behind_the_end_is_written(case):
    """Lanes beyond the last weight, byte and constant are masked when they store."""
    size = case.pick(6, 16, 64)
    w = drawn(case, size)
    packed, absmax = quantized(w, size, watched=True)
    dequantized(packed, (absmax,), len(w), size, watched=True)


@LAB.invariant(7)
def doubled_constants_are_decoded_on_the_way(case):
    """c_b = D[t_b] C_g + mean, g = b // 256."""
    size, blocks = 4, 256 + case.size(20, 90)
    n = size * blocks - case.size(0, 3)
    packed = torch.randint(0, 256, (-(-n // 2),), generator=case.generator).to(torch.uint8)
    t = torch.randint(0, 256, (blocks,), generator=case.generator).to(torch.uint8)
    C, mean = case.normal(2, dtype=torch.float32).abs() + 1, torch.tensor(case.number(0.5, 2))
    c = DYNAMIC_MAP[t.int()] * C.repeat_interleave(256)[:blocks] + mean
    given = dequantized(packed, (t, C, mean), n, size)
    # D C + mean may be one rounding or two: 1 in 2^23
    close(given, weights(packed, c, n, size), "the weights that come back", 1e-6)
