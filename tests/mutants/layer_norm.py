"""What goes wrong in tuning the LayerNorms."""

from tests.mutants import Mutant

FILE = "minipeft/selective/layer_norm.py"
TESTS = ["tests/test_layer_norm.py", "tests/contract -k LayerNorm"]
CHOSEN = 'lambda path: path.split(".")[-2].startswith("ln_")'


def chooses(name, condition, why):
    """A mutant that trains other tensors than it should."""
    return Mutant(
        name=name,
        file=FILE,
        find=CHOSEN,
        replace=f"lambda path: {condition}",
        why=why,
        invariant="every LayerNorm and nothing else",
    )


MUTANTS = [
    chooses(
        "the last LayerNorm forgotten",
        'path.split(".")[-2].startswith("ln_") and path.startswith("blocks")',
        "the loop over blocks never reaches it",
    ),
    chooses(
        "gains only",
        'path.split(".")[-2].startswith("ln_") and path.endswith("weight")',
        "the gain is what a LayerNorm is about",
    ),
    chooses(
        "biases only",
        'path.split(".")[-2].startswith("ln_") and path.endswith("bias")',
        "mistaken for a part of BitFit",
    ),
    chooses(
        "every vector",
        'path.endswith("bias") or path.split(".")[-2].startswith("ln_")',
        "one-dimensional parameters, as optimizers group them",
    ),
    chooses(
        "the first LayerNorm of each block",
        'path.split(".")[-2] in ("ln_1", "ln_f")',
        "there are two in a block",
    ),
    chooses(
        "any name with ln in it, and the embedding",
        'path.split(".")[-2].startswith("ln_") or path.startswith("embed.position")',
        "what the original calls wpe is small, too",
    ),
    Mutant(
        name="one LayerNorm a block counted",
        file=FILE,
        find="return 4 * config.d_model * config.n_layer",
        replace="return 2 * config.d_model * config.n_layer",
        why="there are two in a block",
        invariant="4 D L + 2 D",
    ),
    Mutant(
        name="the last LayerNorm not counted",
        file=FILE,
        find=" + 2 * config.d_model",
        replace="",
        why="it stands outside the blocks",
        invariant="4 D L + 2 D",
    ),
    Mutant(
        name="the width of the feed-forward in the count",
        file=FILE,
        find="return 4 * config.d_model * config.n_layer",
        replace="return config.ff_width * config.n_layer",
        why="4 D is d_ff, nearly always",
        invariant="4 D L + 2 D at another d_ff",
    ),
]
