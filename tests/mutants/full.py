"""What goes wrong in full fine-tuning and in training the top layers."""

from tests.mutants import Mutant

FILE = "minipeft/selective/full.py"
TESTS = ["tests/test_full.py", 'tests/contract -k "FullFineTuning or TopLayers"']

MUTANTS = [
    Mutant(
        name="the tied head gets a clone of its own",
        file=FILE,
        find="            clones[parameter] = attachment.replace(model, path)",
        replace="            attachment.replace(model, path)",
        why="one clone for each name",
        invariant="the head and the embedding stay one tensor",
    ),
    Mutant(
        name="the head keeps the old embedding",
        file=FILE,
        find="model.named_parameters(remove_duplicate=False)",
        replace="model.named_parameters()",
        why="named_parameters names a shared tensor once",
        invariant="the head and the embedding stay one tensor",
    ),
    Mutant(
        name="a wrapper's tensors count as the base's",
        file=FILE,
        find="return wrap.resolve(model, path) is parameter",
        replace="return wrap.resolve(model, path) is not None",
        why="the path exists, and that seems enough",
        invariant="on top of LoRA only the base is replaced",
    ),
    Mutant(
        name="the base is trained although it should be kept",
        file=FILE,
        find="        if not keep_original:\n            clones[parameter] = parameter",
        replace="        if keep_original:\n            clones[parameter] = parameter",
        why="the condition the wrong way round",
        invariant="after training every base tensor is bitwise unchanged",
    ),
    Mutant(
        name="no word that the original is gone",
        file=FILE,
        find='attachment.state["cannot_detach"] =',
        replace='attachment.state["note"] =',
        why="detach simply takes everything off",
        invariant="detach is an error that says so",
    ),
    Mutant(
        name="the bottom layers",
        file=FILE,
        find="first = len(model.blocks) - self.layers",
        replace="first = 0 if self.layers < len(model.blocks) else 0",
        why="counted from the embedding",
        invariant="(Full 2): the last blocks are trained",
    ),
    Mutant(
        name="one layer too few",
        file=FILE,
        find="first = len(model.blocks) - self.layers",
        replace="first = len(model.blocks) - max(1, self.layers - 1)",
        why="off by one",
        invariant="(Full 2); the count",
    ),
    Mutant(
        name="block 1 is also block 10",
        file=FILE,
        find='top = tuple(f"blocks.{n}." for n in range(first, len(model.blocks)))',
        replace='top = tuple(f"blocks.{n}" for n in range(first - 1, len(model.blocks)))',
        why="a range that begins one early",
        invariant="(Full 2): nothing below",
    ),
    Mutant(
        name="the block's LayerNorms not counted",
        file=FILE,
        find="(W * D + D) + 4 * D",
        replace="(W * D + D)",
        why="12 D^2 + 9 D is what the projections have",
        invariant="12 D^2 + 13 D a block",
    ),
    Mutant(
        name="d_ff is 4 D",
        file=FILE,
        find="D, W = config.d_model, config.ff_width",
        replace="D, W = config.d_model, 4 * config.d_model",
        why="it nearly always is",
        invariant="the count at another d_ff",
    ),
    Mutant(
        name="the tied head counted twice",
        file=FILE,
        find="embeddings = (config.vocab_size + config.context_length) * D",
        replace="embeddings = (2 * config.vocab_size + config.context_length) * D",
        why="it has an entry of its own in the state dict",
        invariant="the count equals the tensors'",
    ),
    Mutant(
        name="zero layers are fine",
        file=FILE,
        find="if not 1 <= self.layers <= config.n_layer",
        replace="if not 0 <= self.layers <= config.n_layer",
        why="nothing to train is no error, until the optimizer is empty",
        invariant="bad settings are named",
    ),
    Mutant(
        name="trained in place, but frozen",
        file=FILE,
        find="            attachment.thaw(parameter)\n",
        replace="",
        why="a base can be trained unless somebody froze it, as every technique does",
        invariant="in place, behind a LoRA or on a frozen base, every parameter is trained",
    ),
]
