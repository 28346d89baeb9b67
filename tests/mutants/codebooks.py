"""What goes wrong in tables of levels."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/codebooks.py"
TESTS = ["tests/test_nf4.py"]

MUTANTS = [
    Mutant(
        name="one quantile fewer above zero",
        file=FILE,
        find="normal_quantiles(offset, 8), normal_quantiles(offset, 7)",
        replace="normal_quantiles(offset, 7), normal_quantiles(offset, 8)",
        why="the sides of the asymmetric table exchanged",
        invariant="(NF4 1): eight levels above zero",
    ),
    Mutant(
        name="one quarter for one half",
        file=FILE,
        find="def nf4_codebook(offset=0.9677083)",
        replace="def nf4_codebook(offset=1 - 1 / 32)",
        why="the paper's simpler bound",
        invariant="(NF4 1): the published levels",
    ),
    Mutant(
        name="levels not divided by the largest",
        file=FILE,
        find="    return levels / levels.max()\n",
        replace="    return levels\n",
        why="quantiles taken as they are",
        invariant="(NF4 1): from -1 to 1",
    ),
    Mutant(
        name="linear eight bits",
        file=FILE,
        find="DYNAMIC_MAP = dynamic_map()",
        replace="DYNAMIC_MAP = torch.linspace(-1, 1, 256)",
        why="int8 for the constants",
        invariant="the dynamic map has seven decades",
    ),
    Mutant(
        name="every decade of the map has 64 parts",
        file=FILE,
        find="parts = 2 ** (decade if signed else decade + 1)",
        replace="parts = 64 if signed and decade > 4 else 2 ** (decade if signed else decade + 1)",
        why="the exponent's cost in fraction bits overlooked",
        invariant="256 levels, halving towards zero",
    ),
    Mutant(
        name="no bound below the constants",
        file=FILE,
        find="return blocks * (1 / absmax.clamp(min=SMALLEST))[:, None]",
        replace="return blocks * (1 / absmax)[:, None]",
        why="no block is all zeros, surely",
        invariant="zeros and tiny numbers come back as numbers",
    ),
    Mutant(
        name="signs of FP4 lost",
        file=FILE,
        find="return torch.cat([half, -half])",
        replace="return torch.cat([half, half])",
        why="the sign bit taken for one more value",
        invariant="a sign, two bits of exponent, one of mantissa",
    ),
    Mutant(
        name="int4 from -8 to 7",
        file=FILE,
        find='return torch.arange(-7, 8, dtype=torch.float32, device="cpu") / 7',
        replace='return torch.arange(-8, 8, dtype=torch.float32, device="cpu") / 8',
        why="two's complement has one more below zero",
        invariant="fifteen equally spaced levels",
    ),
    Mutant(
        name="the upper level for the middle",
        file=FILE,
        find="middles = (levels[:-1] + levels[1:]) / 2\n",
        replace="middles = levels[1:]\n",
        why="bucketize over the levels themselves",
        invariant="(NF4 3): nearest, not rounded down",
    ),
    Mutant(
        name="codes taken to ascend",
        file=FILE,
        find="return middles, None if torch.equal(levels, CODEBOOKS[kind]) else order",
        replace="return middles, None",
        why="NF4's do",
        invariant="every kind takes the nearest of its levels",
    ),
    Mutant(
        name="no zero among the levels",
        file=FILE,
        find='levels = torch.cat([v, torch.zeros(1, device="cpu"), -u]).sort().values',
        replace='levels = torch.cat([v, torch.full((1,), 1e-3, device="cpu"), -u]).sort().values',
        why="a small number is as good as zero",
        invariant="(NF4 1): zero is exact",
    ),
]
