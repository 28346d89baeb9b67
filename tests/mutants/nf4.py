"""What goes wrong in four-bit storage."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/nf4.py"
TESTS = ["tests/test_nf4.py"]

MUTANTS = [
    Mutant(
        name="NaN becomes a level",
        file=FILE,
        find="if weight.is_meta or absmax.isfinite().all():",
        replace="if weight.is_meta or not absmax.isinf().any():",
        why="isinf for not isfinite",
        invariant="NaN is an error that says where",
    ),
    Mutant(
        name="bits without the constants",
        file=FILE,
        find="return (8 * self.packed.numel() + constants) / self.numel",
        replace="return 8 * self.packed.numel() / self.numel",
        why="four bits are four bits",
        invariant="(NF4 7)",
    ),
    Mutant(
        name="two levels' constants counted as one byte each",
        file=FILE,
        find="8 * self.absmax.codes.numel() + 32 * self.absmax.absmax.numel()",
        replace="8 * self.absmax.codes.numel() + 8 * self.absmax.absmax.numel()",
        why="everything second-level is eight bits",
        invariant="(NF4 7)",
    ),
    Mutant(
        name="the low nibble first",
        file=FILE,
        find="return codes[0::2] * 16 + codes[1::2]",
        replace="return codes[0::2] + 16 * codes[1::2]",
        why="little-endian habit",
        invariant="(NF4 4): the even element is in the high half",
    ),
    Mutant(
        name="nibbles swapped on the way back",
        file=FILE,
        find="torch.stack([packed >> 4, packed & 15], -1)",
        replace="torch.stack([packed & 15, packed >> 4], -1)",
        why="the two directions were written on different days",
        invariant="(NF4 5) at (NF4 4)'s places",
    ),
    Mutant(
        name="signed maximum",
        file=FILE,
        find="absmax = blocks.abs().amax(1)  # (NF4 2)",
        replace="absmax = blocks.amax(1)",
        why="the absolute value forgotten",
        invariant="(NF4 2)",
    ),
    Mutant(
        name="mean for maximum",
        file=FILE,
        find="absmax = blocks.abs().amax(1)  # (NF4 2)",
        replace="absmax = blocks.abs().mean(1)",
        why="a mean is the more robust scale",
        invariant="(NF4 2): every level lies between -1 and 1",
    ),
    Mutant(
        name="at a midpoint the upper level",
        file=FILE,
        find="codes = torch.bucketize(scaled, between.to(scaled.device))",
        replace="codes = torch.bucketize(scaled, between.to(scaled.device), right=True)",
        why=">= looks as good as >",
        invariant="(NF4 3): ties go to the lower code",
    ),
    Mutant(
        name="constants in the weight's dtype",
        file=FILE,
        find="blocks = into_blocks(flat.float(), block_size)",
        replace="blocks = into_blocks(flat.half().float(), block_size)",
        why="half precision is enough for weights",
        invariant="computed in float32",
    ),
    Mutant(
        name="the product in the target's dtype",
        file=FILE,
        find=("values = into_blocks(levels[codes.int()], block_size) * absmax[:, None]  # (NF4 5)"),
        replace=(
            "values = into_blocks(levels[codes.int()].to(dtype), block_size)\n"
            "    values = values * absmax[:, None].to(dtype)"
        ),
        why="everything in bfloat16 is simpler",
        invariant="one rounding, at the end",
    ),
]
