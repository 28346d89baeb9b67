"""What goes wrong when heads, neurons and blocks are taken out."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/structured_pruning.py"
TESTS = ["tests/test_structured_pruning.py"]

MUTANTS = [
    Mutant(
        name="the wrong heads stay",
        file=FILE,
        find="return [n for n in range(size) if n not in gone]",
        replace="return [n for n in range(size) if n in gone] or [0]",
        why="mask of what goes or of what stays",
        invariant="the pruned model is the masked one",
    ),
    Mutant(
        name="rows of q, k, v but the first columns of o",
        file=FILE,
        find="attn.o = shrunk(attn.o, columns=columns)",
        replace="attn.o = shrunk(attn.o, columns=torch.arange(len(columns)))",
        why="W_o only has to fit",
        invariant="(Structured 1)",
    ),
    Mutant(
        name="k keeps other heads",
        file=FILE,
        find=(
            '        for name in "qkv":\n'
            "            setattr(attn, name, shrunk(getattr(attn, name), rows=columns))"
        ),
        replace=(
            '        for name in "qkv":\n'
            '            rows = columns if name != "k" else torch.arange(len(columns))\n'
            "            setattr(attn, name, shrunk(getattr(attn, name), rows=rows))"
        ),
        why="one of three forgotten",
        invariant="(Structured 1)",
    ),
    Mutant(
        name="columns interleaved",
        file=FILE,
        find=(
            "columns = torch.arange(attn.n_head * attn.head_dim).unflatten(0, (-1, "
            "attn.head_dim))\n"
            "        columns = columns[keep].flatten()"
        ),
        replace=(
            "columns = torch.arange(attn.n_head * attn.head_dim).unflatten(0, "
            "(attn.head_dim, -1))\n"
            "        columns = columns[:, keep].flatten()"
        ),
        why="a head's columns lie side by side",
        invariant="(Structured 1)",
    ),
    Mutant(
        name="biases of other rows",
        file=FILE,
        find="weight, bias = weight[rows], None if bias is None else bias[rows]",
        replace="weight, bias = weight[rows], None if bias is None else bias[: len(rows)]",
        why="the bias only has to fit",
        invariant="(Structured 1): rows with their biases",
    ),
    Mutant(
        name="the number of heads is not told",
        file=FILE,
        find="        attn.n_head = len(keep)\n",
        replace=(
            "        attn.n_head, attn.head_dim = attn.n_head, attn.head_dim * "
            "len(keep) // attn.n_head\n"
        ),
        why="narrower heads instead of fewer",
        invariant="a head keeps its d",
    ),
    Mutant(
        name="neurons: columns of down as they come",
        file=FILE,
        find="shrunk(mlp.down, columns=keep)",
        replace="shrunk(mlp.down, columns=torch.arange(len(keep)))",
        why="W_down only has to fit",
        invariant="(Structured 2)",
    ),
    Mutant(
        name="the output bias is halved",
        file=FILE,
        find=(
            '"bias": bias if bias is None else nn.Parameter(bias.detach().clone(), '
            "bias.requires_grad),"
        ),
        replace=(
            '"bias": bias if bias is None else nn.Parameter(bias.detach() * '
            "weight.numel() / linear.weight.numel(), bias.requires_grad),"
        ),
        why="a smaller layer says less",
        invariant="b_o stays",
    ),
    Mutant(
        name="a view, not a copy",
        file=FILE,
        find="nn.Parameter(weight.clone(), linear.weight.requires_grad)",
        replace="nn.Parameter(weight, True)",
        why="indexing copies",
        invariant="a frozen projection stays frozen",
    ),
    Mutant(
        name="n_layer stays",
        file=FILE,
        find="    model.config = dataclasses.replace(model.config, n_layer=len(left))\n",
        replace="",
        why="the modules know",
        invariant="the config says what is left",
    ),
    Mutant(
        name="negative numbers count from the end",
        file=FILE,
        find="wrong = [n for n in numbers if not 0 <= n < sizes[layer]]",
        replace="wrong = [n for n in numbers if n >= sizes[layer]]",
        why="as in a list",
        invariant="what is not there is named",
    ),
    Mutant(
        name="twice is once",
        file=FILE,
        find="        if len(set(numbers)) != len(numbers):",
        replace="        if len(set(numbers)) > len(numbers):",
        why="a set does it",
        invariant="what is named twice is refused",
    ),
    Mutant(
        name="adapters are not noticed",
        file=FILE,
        find="    if names or any(",
        replace="    if not names and any(",
        why="only wrappers put in by hand matter",
        invariant="a model with techniques is refused",
    ),
    Mutant(
        name="biases not counted",
        file=FILE,
        find="total += 4 * D * inside + 3 * inside + D",
        replace="total += 4 * D * inside + D",
        why="weights are what counts",
        invariant="(Structured 3)",
    ),
    Mutant(
        name="checked one layer at a time",
        file=FILE,
        find=(
            '    gone = check_units(model, heads, "head", [b.attn.n_head for b in '
            "model.blocks])\n"
            "    for layer, numbers in gone.items():\n"
        ),
        replace=(
            "    for layer, numbers in heads.items():\n"
            '        numbers = check_units(model, {layer: numbers}, "head", '
            "[b.attn.n_head for b in model.blocks])[layer]\n"
        ),
        why="the loop is there anyway",
        invariant="after an error the model is as it was",
    ),
    Mutant(
        name="rows of what is packed",
        file=FILE,
        find="    check_floats(model)\n",
        replace="",
        why="a layer is a layer",
        invariant="quantised weights are refused, not cut",
    ),
    Mutant(
        name="numbers cut down to whole ones",
        file=FILE,
        find="[operator.index(n) for n in given]",
        replace="[int(n) for n in given]",
        why="int() takes everything",
        invariant="what is no number of a unit is named",
    ),
]
