"""What goes wrong in adapters."""

from tests.mutants import Mutant

FILE = "minipeft/additive/adapter.py"
TESTS = ["tests/test_adapter.py", "tests/contract -k Adapter"]

MUTANTS = [
    Mutant(
        name="no inner residual",
        file=FILE,
        find="return f if self.idle() else self.added(f, f)  #",
        replace="return f if self.idle() else self.adapter(f)  #",
        why="the residual sum of the block looks like enough",
        invariant="(Adapter 2): with W_2 = 0 the model is the base",
    ),
    Mutant(
        name="parallel reads the output",
        file=FILE,
        find="return f if self.idle() else self.added(f, x)  # (Adapter 4)",
        replace="return f if self.idle() else self.added(f, f)  # (Adapter 4)",
        why="copied from the sequential form",
        invariant="(Adapter 4)",
    ),
    Mutant(
        name="sequential reads the input",
        file=FILE,
        find="return f if self.idle() else self.added(f, f)  #",
        replace="return f if self.idle() else self.added(f, x)  #",
        why="copied from the parallel form",
        invariant="(Adapter 2), (Adapter 3)",
    ),
    Mutant(
        name="LayerNorms stay frozen",
        file=FILE,
        find='("paper", "houlsby"): ("gelu", "truncated", ("attn", "mlp"), True),',
        replace='("paper", "houlsby"): ("gelu", "truncated", ("attn", "mlp"), False),',
        why="only the adapters are thought of",
        invariant="Houlsby trains every LayerNorm",
    ),
    Mutant(
        name="first LayerNorms forgotten",
        file=FILE,
        find="for n in layers for i in (1, 2))",
        replace="for n in layers for i in (2,))",
        why="ln_1 overlooked",
        invariant="Houlsby trains every LayerNorm",
    ),
    Mutant(
        name="last LayerNorm forgotten",
        file=FILE,
        find='chosen += ("ln_f.",) if layers else ()',
        replace="chosen += ()",
        why="it stands outside the blocks",
        invariant="Houlsby trains every LayerNorm, count + 2 D",
    ),
    Mutant(
        name="Houlsby only after the feed-forward",
        file=FILE,
        find='("paper", "houlsby"): ("gelu", "truncated", ("attn", "mlp"), True),',
        replace='("paper", "houlsby"): ("gelu", "truncated", ("mlp",), True),',
        why="Pfeiffer's placement",
        invariant="two adapters a block",
    ),
    Mutant(
        name="leave_out keeps instead",
        file=FILE,
        find="if n not in self.leave_out]",
        replace="if n in self.leave_out or not self.leave_out]",
        why="the condition the wrong way round",
        invariant="the layers named have no adapter",
    ),
    Mutant(
        name="the library's parallel form reads the block's input",
        file=FILE,
        find="lambda module, args: seen.append(args[0]))",
        replace="lambda module, args: seen.append(x))",
        why="the residual stream before attention instead of after it",
        invariant="(Adapter 6): h is read after attention",
    ),
    Mutant(
        name="biases left out of the count",
        file=FILE,
        find="one = 2 * D * m + m + D +",
        replace="one = 2 * D * m +",
        why="the matrices are nearly all of it",
        invariant="the count is exact",
    ),
]
