"""What goes wrong in the kernels for attention over a prefix."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/prefix_attention.py"
TESTS = [
    "tests/kernels/test_prefix_attention.py",
    "tests/kernels/test_twins.py -k prefix_attention",
]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "a key past the end scores 0",
        "seen = (keys < count)[None, :] & (keys[None, :] <= queries[:, None] + shift)",
        "seen = keys[None, :] <= queries[:, None] + shift",
        "masked loads are 0, so they seem to add nothing",
        "(PrefixKernel 2): exp(0) is 1",
    ),
    mutant(
        "everything is seen",
        "seen = (keys < count)[None, :] & (keys[None, :] <= queries[:, None] + shift)",
        "seen = (keys < count)[None, :] & (queries[:, None] >= 0)",
        "the causal mask is SDPA's business",
        "(PrefixKernel 2): causal over the text",
    ),
    mutant(
        "aligned at the upper left",
        "S, S - T, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    put(t_o",
        "S, 0, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    put(t_o",
        "as SDPA's is_causal",
        "the last query sees all keys of a cache",
    ),
    mutant(
        "aligned at the upper left in the backward pass",
        "S, S - T, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    put(t_dq",
        "S, 0, k_row, v_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    put(t_dq",
        "as SDPA's is_causal",
        "(PrefixKernel 5) with a cache",
    ),
    mutant(
        "the prefix is causal, too",
        "        p, p, p_row, p_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    acc",
        "        p, 0, p_row, p_row, d, scale, BLOCK_N, BLOCK_D,\n    )  # fmt: skip\n    acc",
        "one loop for both, one shift for both",
        "(PrefixKernel 2): every query sees the prefix",
    ),
    mutant(
        "what was summed does not fade",
        "acc = tl.dot(weights.to(b_v.dtype), b_v, acc * fade[:, None], input_precision=EXACT)",
        "acc = tl.dot(weights.to(b_v.dtype), b_v, acc, input_precision=EXACT)",
        "with one block of keys nothing has to fade",
        "(PrefixKernel 3)",
    ),
    mutant(
        "the total does not fade",
        "total = total * fade + tl.sum(weights, 1)",
        "total = total + tl.sum(weights, 1)",
        "with one block of keys nothing has to fade",
        "(PrefixKernel 3)",
    ),
    mutant(
        "no largest score taken off",
        "new_top = tl.maximum(top, tl.max(s, 1))",
        "new_top = tl.maximum(top, 0.0 * tl.max(s, 1) + 0.0)",
        "softmax does not change by a constant",
        "(PrefixKernel 3): exp of large scores",
    ),
    mutant(
        "rows without a mask",
        "return tl.load(t_x + rows * row + columns, (rows < count) & (columns < d), 0.0)",
        "return tl.load(t_x + rows * row + columns, (rows >= 0) & (columns < d), 0.0)",
        "T is a multiple of the block in every example",
        "a lane past the last row touches nothing",
    ),
    mutant(
        "columns without a mask",
        "return tl.load(t_x + rows * row + columns, (rows < count) & (columns < d), 0.0)",
        "return tl.load(t_x + rows * row + columns, (rows < count) & (columns >= 0), 0.0)",
        "d is a power of two in every example",
        "heads of a width that is no power of two",
    ),
    mutant(
        "the store without a mask",
        "tl.store(t_x + rows * d + columns, x, (rows < count) & (columns < d))",
        "tl.store(t_x + rows * d + columns, x, columns < d)",
        "T is a multiple of the block in every example",
        "the next head's rows are not overwritten",
    ),
    mutant(
        "row offsets in 32 bits",
        "rows = (first + tl.arange(0, COUNT).to(tl.int64))[:, None]\n"
        "    columns = tl.arange(0, BLOCK_D)[None, :]\n    return",
        "rows = (first + tl.arange(0, COUNT))[:, None]\n"
        "    columns = tl.arange(0, BLOCK_D)[None, :]\n    return",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "heads in 32 bits, forward",
        "one = tl.program_id(1).to(tl.int64)\n    b, h = one // H, one % H\n"
        "    first = tl.program_id(0) * BLOCK_M\n    queries = first + tl.arange(0, BLOCK_M)\n"
        "    b_q = block(t_q + b * q_batch + h * q_head, first, T, q_row, d, BLOCK_M, BLOCK_D)\n"
        "    acc",
        "one = tl.program_id(1)\n    b, h = one // H, one % H\n"
        "    first = tl.program_id(0) * BLOCK_M\n    queries = first + tl.arange(0, BLOCK_M)\n"
        "    b_q = block(t_q + b * q_batch + h * q_head, first, T, q_row, d, BLOCK_M, BLOCK_D)\n"
        "    acc",
        "offsets look small",
        "batches past 2^31 elements are reached",
    ),
    mutant(
        "heads in 32 bits, keys' gradients",
        "one = tl.program_id(1).to(tl.int64)\n    b, h = one // H, one % H\n"
        "    first = tl.program_id(0) * BLOCK_N",
        "one = tl.program_id(1)\n    b, h = one // H, one % H\n"
        "    first = tl.program_id(0) * BLOCK_N",
        "offsets look small",
        "batches past 2^31 elements are reached",
    ),
    mutant(
        "dS without D",
        "return weights, weights * (dots - delta[:, None])",
        "return weights, weights * dots",
        "the softmax's normalisation forgotten in its gradient",
        "(PrefixKernel 5)",
    ),
    mutant(
        "dq without the scale",
        "put(t_dq + one * T * d, dq * scale,",
        "put(t_dq + one * T * d, dq,",
        "the scale is in the scores already",
        "(PrefixKernel 5)",
    ),
    mutant(
        "dk without the scale",
        "put(t_dk + one * count * d, dk * scale,",
        "put(t_dk + one * count * d, dk,",
        "the scale is in the scores already",
        "(PrefixKernel 6)",
    ),
    mutant(
        "dv by dS",
        "dv = tl.dot(tl.trans(weights.to(b_do.dtype)), b_do, dv",
        "dv = tl.dot(tl.trans(ds.to(b_do.dtype)), b_do, dv",
        "the two products look alike",
        "(PrefixKernel 6)",
    ),
    mutant(
        "queries walked over from the block's own row",
        "range(tl.maximum(0, first - shift), T, BLOCK_M)",
        "range(first, T, BLOCK_M)",
        "in a square matrix the diagonal block is the first",
        "(PrefixKernel 6): prefixes are seen by every query",
    ),
    mutant(
        "the text's keys in the prefix's place",
        "segments = (p, p, *prefix, *dprefix), (S, S - T, k, v, dk, dv)",
        "segments = (p, p, *prefix.flip(0), *dprefix), (S, S - T, k, v, dk, dv)",
        "values for keys",
        "(PrefixKernel 6)",
    ),
    mutant(
        "rows taken as contiguous",
        "return x if x.stride(-1) == 1 else x.contiguous()",
        "return x",
        "heads are split from contiguous rows",
        "strided and expanded inputs",
    ),
]
