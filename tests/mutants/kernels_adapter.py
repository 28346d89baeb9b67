"""What goes wrong in the bottleneck adapter's kernels."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/adapter.py"
TESTS = ["tests/kernels/test_adapter.py", "tests/kernels/test_twins.py -k add_bottleneck"]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "D without a mask, forward",
        "b_x = tl.load(p_x, (rows < M) & (columns < D)[None, :], 0.0)",
        "b_x = tl.load(p_x, (rows < M) & (columns >= 0)[None, :], 0.0)",
        "D is a multiple of the block in every example",
        "what lies behind a row is not added up",
    ),
    mutant(
        "the store without a mask of rows",
        "inside = (rows < M) & (columns < D)\n        p_w2",
        "inside = (rows >= 0) & (columns < D)\n        p_w2",
        "M is a multiple of the block in every example",
        "a lane past the last row touches nothing",
    ),
    mutant(
        "units past m read",
        "b_w2 = tl.load(p_w2, (columns < D) & (units < m)[:, None], 0.0)",
        "b_w2 = tl.load(p_w2, (columns < D) & (units >= 0)[:, None], 0.0)",
        "m is a power of two in every example",
        "an m below its padded width",
    ),
    mutant(
        "row offsets in 32 bits, forward",
        "rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]\n"
        "    units = tl.arange(0, BLOCK_R)\n"
        "    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)\n    for",
        "rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]\n"
        "    units = tl.arange(0, BLOCK_R)\n"
        "    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)\n    for",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "row offsets in 32 bits, backward",
        "rows = (tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]\n"
        "    units = tl.arange(0, BLOCK_R)\n"
        "    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)\n    du",
        "rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]\n"
        "    units = tl.arange(0, BLOCK_R)\n"
        "    z = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)\n    du",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "f taken as contiguous",
        "tl.load(t_f + rows * f_row + columns * f_column, inside, 0.0)",
        "tl.load(t_f + rows * D + columns, inside, 0.0)",
        "activations are contiguous, mostly",
        "strided, transposed and expanded inputs",
    ),
    mutant(
        "the incoming gradient taken as contiguous",
        "b_g = tl.load(t_g + rows * g_row + columns[None, :] * g_column, inside, 0.0)",
        "b_g = tl.load(t_g + rows * D + columns[None, :], inside, 0.0)",
        "gradients are contiguous, mostly",
        "the gradient of a sum has strides 0",
    ),
    mutant(
        "the scale misses b_2",
        "y = b_f + scale * (tl.dot(u, b_w2, input_precision=EXACT) + b_b2)",
        "y = b_f + scale * tl.dot(u, b_w2, input_precision=EXACT) + b_b2",
        "s is thought of as scaling the product",
        "(AdapterKernel 2)",
    ),
    mutant(
        "no residual sum",
        "y = b_f + scale * (",
        "y = 0 * b_f + scale * (",
        "the block has a residual sum of its own",
        "(AdapterKernel 2)",
    ),
    mutant(
        "the slope at u",
        "slope(z, ACTIVATION)",
        "slope(activate(z, ACTIVATION), ACTIVATION)",
        "for ReLU the two are the same",
        "(AdapterKernel 3): sigma'(z)",
    ),
    mutant(
        "the scale missing in dz",
        "dz = (scale * du * slope",
        "dz = (du * slope",
        "the scale is 1 in every example",
        "(AdapterKernel 3)",
    ),
    mutant(
        "the bias missing in the second z",
        "    dz = (scale",
        "    z -= tl.load(t_b1 + units, units < m, 0.0).to(tl.float32)[None, :]\n    dz = (scale",
        "biases have no part in a gradient, one thinks",
        "(AdapterKernel 3): z is computed again, b_1 included",
    ),
    mutant(
        "tanh by exp",
        "return 2 * tl.sigmoid(2 * z) - 1",
        "return (tl.exp(2 * z) - 1) / (tl.exp(2 * z) + 1)",
        "the formula from the book",
        "no z overflows",
    ),
    mutant(
        "GELU's slope without its density",
        "+ z * density",
        "+ 0 * density",
        "the derivative of z Phi(z) taken as Phi(z)",
        "(AdapterKernel 3) for GELU",
    ),
    mutant(
        "the residual's gradient left out where x is f",
        "ctx.x_is_f, block_m, *blocks",
        "False, block_m, *blocks",
        "autograd adds the two, does it not",
        "(AdapterKernel 4): dx + g where x is f",
    ),
    mutant(
        "the residual's gradient twice where x is f",
        "df = None if ctx.x_is_f else grad",
        "df = grad",
        "f's gradient is g, always",
        "(AdapterKernel 4): once",
    ),
    mutant(
        "dW_2 without the scale",
        "(scale * (g.T @ u), scale * g.sum(0))",
        "(g.T @ u, scale * g.sum(0))",
        "u is thought to be scaled",
        "(AdapterKernel 5)",
    ),
]
