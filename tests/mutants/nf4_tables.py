"""What goes wrong in four-bit storage by tables and counting."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/nf4_tables.py"
TESTS = ["tests/test_nf4.py"]

MUTANTS = [
    Mutant(
        name="the low nibble first",
        file=FILE,
        find="torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=room)",
        replace="torch.bitwise_or(codes[1::2] << 4, codes[0::2], out=room)",
        why="little-endian habit",
        invariant="(NF4 4): the even element is in the high half",
    ),
    Mutant(
        name="nibbles swapped on the way back",
        file=FILE,
        find="torch.stack([levels[byte >> 4], levels[byte & 15]], 1)",
        replace="torch.stack([levels[byte & 15], levels[byte >> 4]], 1)",
        why="the two directions were written on different days",
        invariant="(NF4 5) at (NF4 4)'s places",
    ),
    Mutant(
        name="signed maximum",
        file=FILE,
        find="torch.amax(blocks.abs(), 1, out=c)",
        replace="torch.amax(blocks, 1, out=c)",
        why="the absolute value forgotten",
        invariant="(NF4 2)",
    ),
    Mutant(
        name="mean for maximum",
        file=FILE,
        find="torch.amax(blocks.abs(), 1, out=c)",
        replace="torch.mean(blocks.abs(), 1, out=c)",
        why="a mean is the more robust scale",
        invariant="(NF4 2): every level lies between -1 and 1",
    ),
    Mutant(
        name="at a midpoint the upper level",
        file=FILE,
        find="torch.gt(scaled, midpoint, out=above)",
        replace="torch.ge(scaled, midpoint, out=above)",
        why=">= looks as good as >",
        invariant="(NF4 3): ties go to the lower code",
    ),
    Mutant(
        name="the product in the target's dtype",
        file=FILE,
        find="torch.mul(here[:n].view(-1, block_size), c, out=blocks)",
        replace="torch.mul(here[:n].view(-1, block_size).to(dtype), c.to(dtype), out=blocks)",
        why="everything in bfloat16 is simpler",
        invariant="one rounding, at the end",
    ),
    Mutant(
        name="constants in the weight's dtype",
        file=FILE,
        find="blocks = into_blocks(flat[first : first + tile].float(), block_size)",
        replace="blocks = into_blocks(flat[first : first + tile].half().float(), block_size)",
        why="half precision is enough for weights",
        invariant="computed in float32",
    ),
    Mutant(
        name="each tile takes the first tile's constants",
        file=FILE,
        find="c = absmax[first // block_size :][: tile // block_size, None]",
        replace="c = absmax[: len(absmax[first // block_size :][: tile // block_size]), None]",
        why="the tile's offset forgotten for one of three tensors",
        invariant="many tiles give what one gives",
    ),
    Mutant(
        name="the last midpoint is not counted",
        file=FILE,
        find="for midpoint in between.tolist():",
        replace="for midpoint in between[:-1].tolist():",
        why="fourteen gaps between fifteen levels, or was it",
        invariant="the code is the number of midpoints below",
    ),
    Mutant(
        name="tiles that end inside a byte",
        file=FILE,
        find="return 2 * block_size * max(1, CPU_TILE // (2 * block_size))",
        replace="return max(1, CPU_TILE // (2 * block_size)) * 2 * block_size - 1",
        why="a round number was wanted",
        invariant="every tile's edge falls on a block's and on a byte's",
    ),
    Mutant(
        name="levels of whatever dtype torch is in",
        file=FILE,
        find="out.new_empty(min(tile, size), dtype=torch.float32)",
        replace="torch.empty(min(tile, size), device=packed.device)",
        why="float32 is what torch.empty gives",
        invariant="the default dtype is no matter",
    ),
]
