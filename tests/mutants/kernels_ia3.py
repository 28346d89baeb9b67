"""What goes wrong in IA3's kernel."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/ia3.py"
TESTS = ["tests/kernels/test_ia3.py", "tests/kernels/test_twins.py -k rescale"]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "forward without the mask of rows",
        "inside = (rows < M) & (columns < N)\n    b_l = tl.load(t_l + columns, columns < N)",
        "inside = (rows >= 0) & (columns < N)\n    b_l = tl.load(t_l + columns, columns < N)",
        "M is a multiple of the block in every example",
        "a lane past the last row touches nothing",
    ),
    mutant(
        "forward without the mask of columns",
        "inside = (rows < M) & (columns < N)\n    b_l = tl.load(t_l + columns, columns < N)",
        "inside = (rows < M) & (columns >= 0)\n    b_l = tl.load(t_l + columns, columns < N)",
        "N is a multiple of the block in every example",
        "a lane past the last column touches nothing",
    ),
    mutant(
        "the vector's load without a mask",
        "tl.load(t_l + columns, columns < N).to(tl.float32)\n    b_h",
        "tl.load(t_l + columns).to(tl.float32)\n    b_h",
        "it is only N numbers",
        "a lane past the last column touches nothing",
    ),
    mutant(
        "row offsets in 32 bits, forward",
        "rows = (tl.program_id(0).to(tl.int64) * BLOCK_M",
        "rows = (tl.program_id(0) * BLOCK_M",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "row offsets in 32 bits, backward",
        "group = tl.program_id(0).to(tl.int64)",
        "group = tl.program_id(0)",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "h taken as contiguous",
        "tl.load(t_h + rows * h_row + columns * h_column, inside)",
        "tl.load(t_h + rows * N + columns, inside)",
        "activations are contiguous, mostly",
        "strided, transposed and expanded inputs",
    ),
    mutant(
        "g taken as contiguous",
        "p_g = t_g + rows * g_row + columns[None, :] * g_column",
        "p_g = t_g + rows * N + columns[None, :]",
        "gradients are contiguous, mostly",
        "the gradient of a sum has strides 0",
    ),
    mutant(
        "the sum in the inputs' precision",
        "part += tl.sum(b_g * b_h, 0)",
        "part = (part + tl.sum(b_g * b_h, 0)).to(t_h.dtype.element_ty).to(tl.float32)",
        "the result is stored in float16 anyway",
        "(IA3Kernel 3) in float32",
    ),
    mutant(
        "a group's part is its last block",
        "part += tl.sum(b_g * b_h, 0)",
        "part = tl.sum(b_g * b_h, 0)",
        "one block a group in every example",
        "(IA3Kernel 3): all rows of the group",
    ),
    mutant(
        "the gradient of l times l",
        "part += tl.sum(b_g * b_h, 0)",
        "part += tl.sum(b_g * b_h * b_l[None, :], 0)",
        "y for h: the scaled activations are what the paper draws",
        "(IA3Kernel 3): h before it was scaled",
    ),
    mutant(
        "dh without l",
        "b_g * b_l[None, :], inside)",
        "b_g, inside)",
        "l is 1 at the start",
        "(IA3Kernel 2)",
    ),
    mutant(
        "all groups write one part",
        "tl.store(t_parts + group * N + columns",
        "tl.store(t_parts + columns",
        "the parts look like one vector",
        "(IA3Kernel 3): a part for each group",
    ),
    mutant(
        "the gradient in h's dtype",
        "parts.sum(0).to(ctx.dtype)",
        "parts.sum(0).to(dh.dtype)",
        "one dtype in every example",
        "l's gradient has l's dtype",
    ),
]
