"""What goes wrong in BitFit."""

from tests.mutants import Mutant

FILE = "minipeft/selective/bitfit.py"
TESTS = ["tests/test_bitfit.py", "tests/contract -k BitFit"]

MUTANTS = [
    Mutant(
        name="query and key exchanged",
        file=FILE,
        find='"query": "attn.q.bias"',
        replace='"query": "attn.k.bias"',
        why="copied from the line below",
        invariant="every name chooses its own bias",
    ),
    Mutant(
        name="intermediate means output",
        file=FILE,
        find='"intermediate": "mlp.up.bias"',
        replace='"intermediate": "mlp.down.bias"',
        why="BERT's names are not GPT-2's",
        invariant="the paper's small variant is query and intermediate",
    ),
    Mutant(
        name="the value's bias forgotten",
        file=FILE,
        find='    "value": "attn.v.bias",\n',
        replace="",
        why="a list typed by hand",
        invariant="all biases; 11 D a block",
    ),
    Mutant(
        name="the last LayerNorm forgotten",
        file=FILE,
        find='wanted.add("ln_f.bias")',
        replace="wanted.add(FINAL)",
        why="the loop over blocks never reaches it",
        invariant="all biases; D for the last LayerNorm",
    ),
    Mutant(
        name="all includes the weights",
        file=FILE,
        find="train_parameters(model, attachment, wanted.__contains__)",
        replace='train_parameters(model, attachment, lambda p: p in wanted or "q.weight" in p)',
        why="a pattern that is too wide",
        invariant="nothing but biases",
    ),
    Mutant(
        name="all leaves out the LayerNorms",
        file=FILE,
        find="return (*PLACES, FINAL) if",
        replace="return (*list(PLACES)[1:5], *list(PLACES)[6:]) if",
        why="BitFit is told as the biases of linear layers",
        invariant="(BitFit 2)",
    ),
    Mutant(
        name="only the first block",
        file=FILE,
        find="for n in range(len(model.blocks))",
        replace="for n in range(1)",
        why="tried out on one block and left there",
        invariant="the count",
    ),
    Mutant(
        name="intermediate counted as D",
        file=FILE,
        find='config.ff_width if n == "intermediate" else D',
        replace='D if n == "intermediate" else D',
        why="all biases have the same size, nearly",
        invariant="11 D a block, not 8 D",
    ),
    Mutant(
        name="4 D whatever the feed-forward's width",
        file=FILE,
        find='config.ff_width if n == "intermediate" else D',
        replace='4 * D if n == "intermediate" else D',
        why="d_ff is nearly always 4 D",
        invariant="the count at another d_ff",
    ),
    Mutant(
        name="the last LayerNorm counted once a block",
        file=FILE,
        find="return config.n_layer * per_block + (D if FINAL in names else 0)",
        replace="return config.n_layer * (per_block + (D if FINAL in names else 0))",
        why="a bracket",
        invariant="the count",
    ),
    Mutant(
        name="unknown names are ignored",
        file=FILE,
        find="if name not in PLACES and name != FINAL:",
        replace="if False:",
        why="a set simply has no such element",
        invariant="an unknown bias is an error that names it",
    ),
]
