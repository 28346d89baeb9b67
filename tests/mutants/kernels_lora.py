"""What goes wrong in LoRA's kernel."""

from tests.mutants import Mutant

FILE = "minipeft/kernels/lora.py"
TESTS = ["tests/kernels/test_lora.py", "tests/kernels/test_twins.py -k lora_linear"]


def mutant(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "K without a mask",
        "b_x = tl.load(p_x, (rows < M) & (ks < K)[None, :], 0.0)",
        "b_x = tl.load(p_x, (rows < M) & (ks >= 0)[None, :], 0.0)",
        "K is a multiple of the block in every example",
        "what lies behind a row is not added up",
    ),
    mutant(
        "rows without a mask",
        "b_x = tl.load(p_x, (rows < M) & (ks < K)[None, :], 0.0)",
        "b_x = tl.load(p_x, (rows >= 0) & (ks < K)[None, :], 0.0)",
        "rows past M are not stored anyway",
        "a lane past the last row touches nothing",
    ),
    mutant(
        "the store without a mask",
        "tl.store(t_h + rows * N + columns, h, (rows < M) & (columns < N))",
        "tl.store(t_h + rows * N + columns, h, rows < M)",
        "N is a multiple of the block in every example",
        "a lane past the last column touches nothing",
    ),
    mutant(
        "the rank without a mask",
        "b_u = tl.load(p_u, (rows < M) & (ranks < r)[None, :], 0.0)",
        "b_u = tl.load(p_u, (rows < M) & (ranks >= 0)[None, :], 0.0)",
        "ranks are powers of two from 16 on, one thinks",
        "r below the smallest block",
    ),
    mutant(
        "row offsets in 32 bits",
        "rows = (tl.program_id(0).to(tl.int64) * BLOCK_M",
        "rows = (tl.program_id(0) * BLOCK_M",
        "offsets look small",
        "rows past 2^31 elements are reached",
    ),
    mutant(
        "offsets along K in 32 bits",
        "ks = first + tl.arange(0, BLOCK_K).to(tl.int64)",
        "ks = first + tl.arange(0, BLOCK_K)",
        "K is small; its stride is not when x is transposed",
        "columns past 2^31 elements are reached",
    ),
    mutant(
        "the weight taken as contiguous",
        "p_w = t_w + columns * w_row + ks[:, None] * w_column",
        "p_w = t_w + columns * K + ks[:, None]",
        "parameters are contiguous",
        "(LoRAKernel 2): backward reads W transposed",
    ),
    mutant(
        "the scale on the whole sum",
        "h = tl.dot(b_x, b_w, h, input_precision=EXACT)",
        "h = tl.dot(b_x, b_w, h, input_precision=EXACT) * (scale if first + BLOCK_K >= K else 1)",
        "a scale at the end costs nothing, too",
        "(LoRAKernel 1): s belongs to the branch",
    ),
    mutant(
        "the accumulator starts at 0",
        "h = tl.dot(b_u, b_b, input_precision=EXACT) * scale",
        "h = tl.dot(b_u, b_b, input_precision=EXACT) * 0",
        "accumulators do",
        "(LoRAKernel 1): it starts from the branch",
    ),
    mutant(
        "dx without the base",
        "dx = lora_product(g, weight.T, None, du, A.T, 1.0)",
        "dx = (du @ A)",
        "the base is frozen, so its gradient seems not needed",
        "(LoRAKernel 2)",
    ),
    mutant(
        "s twice in dx",
        "dx = lora_product(g, weight.T, None, du, A.T, 1.0)",
        "dx = lora_product(g, weight.T, None, du, A.T, ctx.scale)",
        "forward passes the scale, so backward does",
        "(LoRAKernel 2): du has it already",
    ),
    mutant(
        "dB without s",
        "(g.T @ u).mul_(ctx.scale)",
        "(g.T @ u)",
        "u is thought to be scaled",
        "(LoRAKernel 3)",
    ),
    mutant(
        "the bias as if it were scaled down to a tile",
        "h += tl.load(t_bias + columns, columns < N, 0.0)",
        "h += tl.load(t_bias + columns % BLOCK_N, columns % BLOCK_N < N, 0.0)",
        "one tile in every example",
        "(LoRAKernel 1): each column has its own bias",
    ),
]
