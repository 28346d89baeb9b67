"""What goes wrong in GPTQ."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/gptq.py"
MODEL = "minipeft/quantized/gptq_model.py"
TESTS = ["tests/test_gptq.py", "tests/test_quantize.py", "tests/test_reductions.py -k gptq"]


def bug(name, find, replace, why, invariant, file=FILE):
    return Mutant(name, file, find, replace, why, invariant)


MUTANTS = [
    bug(
        "the lower factor",
        "return torch.linalg.cholesky(inverse, upper=True)  # (GPTQ 2)",
        "return torch.linalg.cholesky(inverse)",
        "cholesky's default",
        "(GPTQ 2)",
    ),
    bug(
        "the factor of H itself",
        "return torch.linalg.cholesky(inverse, upper=True)  # (GPTQ 2)",
        "return torch.linalg.cholesky(H, upper=True)",
        "the inverse forgotten",
        "(GPTQ 2): U^T U H = I",
    ),
    bug(
        "divided by the diagonal squared",
        "(scale * (k - zero))[:, 0]) / U[i, i]  # (GPTQ 3)",
        "(scale * (k - zero))[:, 0]) / U[i, i] ** 2",
        "OBQ divides by [H^-1]_ii",
        "(GPTQ 3)",
    ),
    bug(
        "nothing made up for",
        "W[:, i:stop] -= e[:, None] * U[i, i:stop]",
        "W[:, i] -= e * U[i, i]",
        "that is round-to-nearest within a block",
        "it is the explicit algorithm",
    ),
    bug(
        "the wrong way",
        "W[:, i:stop] -= e[:, None] * U[i, i:stop]",
        "W[:, i:stop] += e[:, None] * U[i, i:stop]",
        "the sign of the error",
        "it beats round-to-nearest",
    ),
    bug(
        "the block's errors stay in the block",
        "W[:, stop:] -= E @ U[start:stop, stop:]  # (GPTQ 4)",
        "W[:, stop:] -= 0 * (E @ U[start:stop, stop:])",
        "the lazy update forgotten",
        "(GPTQ 4): block sizes do not matter",
    ),
    bug(
        "the update by whole errors",
        "E[:, i - start] = e = (W[:, i] - (scale * (k - zero))[:, 0]) / U[i, i]  # (GPTQ 3)",
        "e = (W[:, i] - (scale * (k - zero))[:, 0]) / U[i, i]\n"
        "            E[:, i - start] = e * U[i, i]",
        "the error kept undivided for the product",
        "(GPTQ 4)",
    ),
    bug(
        "grids from the original weights",
        "scale, zero = find_grid(W[:, i : i + size], bits, symmetric, scale_dtype)",
        "first = weight[:, order][:, i : i + size].to(W)\n"
        "                scale, zero = find_grid(first, bits, symmetric, scale_dtype)",
        "static groups, unasked",
        "a group's grid is that of the weights as they then are",
    ),
    bug(
        "blocks across groups",
        "step = block_size if group_size is None else size * max(1, block_size // size)",
        "step = block_size",
        "the authors' code, whose groups are multiples of 128",
        "a group sees up-to-date weights",
    ),
    bug(
        "columns left in act-order",
        "pack_bits(codes[:, back].flatten().to(torch.uint8), bits),",
        "pack_bits(codes.flatten().to(torch.uint8), bits),",
        "the permutation is not undone",
        "it is the explicit algorithm, with act-order",
    ),
    bug(
        "groups of the permuted columns",
        "(back // size).int() if act_order",
        "(order // size).int() if act_order",
        "a permutation and its inverse mixed up",
        "it is the explicit algorithm, with act-order and groups",
    ),
    bug(
        "the least important first",
        "order = H.diagonal().argsort(descending=True, stable=True)",
        "order = H.diagonal().argsort(stable=True)",
        "argsort's default",
        "act-order helps",
    ),
    bug(
        "absolute damping",
        "H.diagonal().add_(damping * H.diagonal().mean())  # (GPTQ 1)",
        "H.diagonal().add_(damping)",
        "a small number added to the diagonal",
        "damping is relative",
    ),
    bug(
        "a grid without zero",
        "low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True)"
        ".clamp(min=0)",
        "low, high = group.amin(1, keepdim=True), group.amax(1, keepdim=True)",
        "the range is the range",
        "(GPTQ 5)",
    ),
    bug(
        "padding counts",
        "real = batch.lengths[:, None] > T",
        "real = batch.lengths[:, None] > T - T.numel()",
        "the inputs are there, after all",
        "hessians are of the real tokens' inputs",
        MODEL,
    ),
    bug(
        "all Hessians before any rounding",
        "linear.weight.copy_(dequantize_group(done[path]))",
        "done[path]",
        "one pass over the text is cheaper",
        "each projection sees what was rounded before it",
        MODEL,
    ),
    bug(
        "dead inputs keep their weights",
        "    W[:, dead] = 0\n",
        "    W[:, dead] *= 1\n",
        "the diagonal was mended, what else",
        "an input that was always zero gets weight zero",
    ),
    bug(
        "free zero-points",
        "(16 if self.zero is None else 16 + self.bits)",
        "16",
        "they are small",
        "(GPTQ 8)",
    ),
    bug(
        "calibrated as the model stands",
        "        with evaluating(model):\n",
        "        with torch.no_grad():\n",
        "models that were opened are in eval mode",
        "calibration drops nothing",
        MODEL,
    ),
    bug(
        "text read once",
        "done, batches, weights = {}, list(batches), float_weights(model)",
        "done, batches, weights = {}, batches, float_weights(model)",
        "a loop over batches, like any other",
        "batches may come from a generator",
        MODEL,
    ),
    bug(
        "settings checked layer by layer",
        '        check(weight, settings.get("bits", 4), settings.get("group_size"))',
        "        pass",
        "gptq checks them itself",
        "settings that do not suit change nothing",
        MODEL,
    ),
    bug(
        "anything with a weight",
        "        if type(module) is not nn.Linear:",
        '        if not hasattr(module, "weight"):',
        "a quantised layer has a weight too, made anew at each reading",
        "a model in four bits is refused, not left as it is",
        MODEL,
    ),
    bug(
        "empty layers rounded",
        "        if module.weight.numel():\n            found",
        "        if True:\n            found",
        "every layer has weights",
        "a layer that lost all its heads has nothing to quantise",
        MODEL,
    ),
]
