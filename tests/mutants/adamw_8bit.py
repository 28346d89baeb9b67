"""What goes wrong in 8-bit AdamW."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/adamw_8bit.py"
TESTS = ["tests/test_adamw_8bit.py -k 'not dialect'"]

MUTANTS = [
    Mutant(
        name="one maximum for the whole tensor",
        file=FILE,
        find="absmax = padded.abs().amax(1)",
        replace="absmax = padded.abs().amax().expand(len(padded)).clone()",
        why="absmax per tensor, not per block",
        invariant="(Adam8 1): an outlier spoils its own block only",
    ),
    Mutant(
        name="the signed maximum",
        file=FILE,
        find="absmax = padded.abs().amax(1)",
        replace="absmax = padded.amax(1)",
        why="the bars overlooked",
        invariant="(Adam8 1): the largest absolute value",
    ),
    Mutant(
        name="the mean for the maximum",
        file=FILE,
        find="absmax = padded.abs().amax(1)",
        replace="absmax = padded.abs().mean(1)",
        why="a typical size to scale by",
        invariant="(Adam8 1)",
    ),
    Mutant(
        name="rounding down",
        file=FILE,
        find="thresholds = (q[1:] + q[:-1]) / 2",
        replace="thresholds = q[1:]",
        why="a search finds the next value, not the nearest",
        invariant="(Adam8 2): the nearest",
    ),
    Mutant(
        name="ties upwards",
        file=FILE,
        find="codes = torch.bucketize(scaled.flatten()[: len(x)], thresholds)",
        replace="codes = torch.bucketize(scaled.flatten()[: len(x)], thresholds, right=True)",
        why="midpoints with >=",
        invariant="(Adam8 2): of two equally near the lower",
    ),
    Mutant(
        name="signed map for both moments",
        file=FILE,
        find='MOMENTS = {"exp_avg": True, "exp_avg_sq": False}',
        replace='MOMENTS = {"exp_avg": True, "exp_avg_sq": True}',
        why="one map is enough",
        invariant="(Adam8 4): v is never negative, half of the codes would be lost",
    ),
    Mutant(
        name="blocks of 128",
        file=FILE,
        find="BLOCK = 256  #",
        replace="BLOCK = 128  #",
        why="any block will do",
        invariant="2.03125 bytes a weight",
    ),
    Mutant(
        name="maxima that start at 1",
        file=FILE,
        find="torch.zeros(-(-N // BLOCK), **where)",
        replace="torch.ones(-(-N // BLOCK), **where)",
        why="a scale that does nothing is 1",
        invariant="the moments start at 0",
    ),
    Mutant(
        name="maxima not updated",
        file=FILE,
        find="        absmax.copy_(new_absmax)",
        replace="        absmax.copy_(torch.maximum(absmax, new_absmax))",
        why="a running maximum, as observers keep it",
        invariant="(Adam8 3): codes and maximum belong together",
    ),
    Mutant(
        name="the second moment rounded before the step",
        file=FILE,
        find="    adamw_update(exact, g.float(), *moments, t, lr, betas, eps, weight_decay)\n",
        replace=(
            "    moments[1] = dequantize_blocks("
            "*quantize_blocks(moments[1].mul(betas[1]).addcmul("
            "g.float(), g.float(), value=1 - betas[1]), False), False)\n"
            "    adamw_update(exact, g.float(), *moments, t, lr, betas, eps, weight_decay)\n"
        ),
        why="quantised first, then used",
        invariant="(Adam8 5): the step uses the moments in float32",
    ),
    Mutant(
        name="stretches of blocks off by one",
        file=FILE,
        find="blocks = slice(start // BLOCK, -(-part.stop // BLOCK))",
        replace="blocks = slice(0, -(-(part.stop - start) // BLOCK))",
        why="every stretch counts its blocks from 0",
        invariant="stretches change nothing",
    ),
    Mutant(
        name="codes cast with the parameters",
        file=FILE,
        find='if name.endswith(("_codes", "_absmax")):',
        replace='if name.endswith("_absmax"):',
        why="load_state_dict left to torch",
        invariant="codes stay bytes",
    ),
    Mutant(
        name="constants cast with the parameters",
        file=FILE,
        find='if name.endswith(("_codes", "_absmax")):',
        replace='if name.endswith("_codes"):',
        why="only the codes look special",
        invariant="resumed in bfloat16, bitwise",
    ),
    Mutant(
        name="loaded state shared with what was loaded",
        file=FILE,
        find="copied = torch.empty_like(value, device=parameter.device).copy_(value)",
        replace="copied = value",
        why="a copy seems a waste",
        invariant="loading shares no memory",
    ),
    Mutant(
        name="small tensors in 8 bits too",
        file=FILE,
        find="if parameter.numel() < min_8bit_size:",
        replace="if parameter.numel() < min_8bit_size // 1000:",
        why="every tensor alike",
        invariant="AdamW bitwise below min_8bit_size",
    ),
    Mutant(
        name="a tensor that is not contiguous stays as it was",
        file=FILE,
        find="            parameter.copy_(w.view_as(parameter))",
        replace="            pass",
        why="flatten taken for a view",
        invariant="parameters that are not contiguous",
    ),
]
