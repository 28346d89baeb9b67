"""What goes wrong in opening and saving GPT-2 folders, and in writing files."""

from tests.mutants import Mutant

FILE = "minipeft/interop/hf_gpt2.py"
ATOMIC = "minipeft/atomic.py"
TESTS = [
    "tests/test_hf_gpt2.py",
    "tests/test_atomic.py",
    "tests/test_structured_pruning.py",
    "tests/parity/test_gpt_hf.py",
]

MUTANTS = [
    Mutant(
        name="written without transposing",
        file=FILE,
        find=("        tensor = tensor.T if is_conv1d(theirs) else tensor\n        tensors[f"),
        replace="        tensors[f",
        why="nn.Linear's orientation is taken for everybody's",
        invariant="c_attn is (in, out)",
    ),
    Mutant(
        name="read without transposing what is square",
        file=FILE,
        find="tensor = tensor.T if is_conv1d(theirs) else tensor\n        for",
        replace=(
            "tensor = tensor.T if is_conv1d(theirs) and tensor.shape[0] != "
            "tensor.shape[1] else tensor\n        for"
        ),
        why="shapes fit, so all seems well",
        invariant="attn.c_proj is transposed too",
    ),
    Mutant(
        name="k and v exchanged",
        file=FILE,
        find='("attn.c_attn", ("attn.q", "attn.k", "attn.v")),',
        replace='("attn.c_attn", ("attn.q", "attn.v", "attn.k")),',
        why="the order is a convention nobody writes down",
        invariant="q beside k beside v",
    ),
    Mutant(
        name="every bias called attn.bias is a mask",
        file=FILE,
        find='NOT_NEEDED = re.compile(r"h\\.\\d+\\.attn\\.(bias|masked_bias)")',
        replace='NOT_NEEDED = re.compile(r".*")',
        why="a pattern too wide",
        invariant="an unknown tensor is refused",
    ),
    Mutant(
        name="head not tied after opening",
        file=FILE,
        find="    model.head.weight = model.embed.token.weight\n",
        replace="",
        why="the values are equal, so it looks tied",
        invariant="head and embedding are one parameter",
    ),
    Mutant(
        name="untied head accepted",
        file=FILE,
        find=("if head.shape != token.shape or not torch.equal(head.to(token.dtype), token):"),
        replace="if head.shape != token.shape:",
        why="a head is a head",
        invariant="a head of its own is refused",
    ),
    Mutant(
        name="views into the file",
        file=FILE,
        find="part.contiguous().clone()",
        replace="part.contiguous()",
        why="contiguous is thought to copy",
        invariant="an opened model does not hang on its file",
    ),
    Mutant(
        name="prefix required",
        file=FILE,
        find='short = name.removeprefix("transformer.")',
        replace='short = name[len("transformer.") :] if "." in name else name',
        why="every file seen so far had it",
        invariant="names come with and without it",
    ),
    Mutant(
        name="second shard forgotten",
        file=FILE,
        find="        shards.setdefault(shard, []).append(tensor)\n",
        replace="        shards = {shard: [*shards.get(shard, []), tensor]}\n",
        why="one loop, one file",
        invariant="shards are put together",
    ),
    Mutant(
        name="path in the index followed anywhere",
        file=FILE,
        find="if not isinstance(shard, str) or Path(shard).name != shard:",
        replace="if not isinstance(shard, str):",
        why="an index is trusted",
        invariant="a shard lies in the folder",
    ),
    Mutant(
        name="dropouts averaged silently",
        file=FILE,
        find="    if len(set(found.values())) > 1:\n",
        replace="    if len(found) > 3:\n",
        why="one of three is as good as another",
        invariant="different dropouts are refused",
    ),
    Mutant(
        name="inverse layer index ignored",
        file=FILE,
        find=(
            '    "scale_attn_by_inverse_layer_idx": (False, "scores divided by the '
            "layer's number\"),\n"
        ),
        replace="",
        why="an unknown key is skipped",
        invariant="what we do not have is refused",
    ),
    Mutant(
        name="16 bits stay 16 bits",
        file=FILE,
        find="tensor = file.get_tensor(name).to(dtype)",
        replace="tensor = file.get_tensor(name)",
        why="the file's dtype is kept",
        invariant="16-bit files open in float32",
    ),
    Mutant(
        name="no metadata",
        file=FILE,
        find='save_file(tensors, path, {"format": "pt"})',
        replace="save_file(tensors, path)",
        why="our own reader does not need it",
        invariant="transformers opens the file",
    ),
    Mutant(
        name="saved with techniques on",
        file=FILE,
        find="    if names or wrapped:\n",
        replace="    if False:\n",
        why="state_dict works all the same",
        invariant="the error names merge and save_adapter",
    ),
    Mutant(
        name="epsilon not written",
        file=FILE,
        find='        "layer_norm_epsilon": config.layer_norm_eps,\n',
        replace="",
        why="1e-5 is the default",
        invariant="every field of the configuration survives",
    ),
    Mutant(
        name="random state used up",
        file=FILE,
        find=(
            '    with torch.device("meta"):  # no memory and no random numbers for '
            "weights about to be replaced\n        model = with_widths(config, layers)\n"
        ),
        replace="    model = with_widths(config, layers)\n",
        why="the weights are overwritten anyway",
        invariant="opening leaves the random state alone",
    ),
    Mutant(
        name="left in training mode",
        file=FILE,
        find="    return model.eval()\n",
        replace="    return model.train()\n",
        why="a new module is in training mode",
        invariant="an opened model is in eval mode",
    ),
    Mutant(
        name="written in place",
        file=ATOMIC,
        find='temporary[path] = path.with_name(f"{path.name}.tmp.{os.getpid()}")',
        replace="temporary[path] = path",
        why="one step fewer",
        invariant="an interrupted save leaves the old file whole",
    ),
    Mutant(
        name="renamed before it is on disk",
        file=ATOMIC,
        find=('        with open(path, "rb+") as file:\n            os.fsync(file.fileno())\n'),
        replace="",
        why="closing a file is thought to be enough",
        invariant="content is on disk before the rename",
    ),
    Mutant(
        name="renamed one by one",
        file=ATOMIC,
        find="            fill(temporary[path], content)\n",
        replace=(
            "            fill(temporary[path], content)\n            "
            "os.replace(temporary[path], path)\n            "
            "path.link_to(temporary[path]) if hasattr(path, 'link_to') else "
            "os.link(path, temporary[path])\n"
        ),
        why="each file when it is ready",
        invariant="no file is renamed before all are written",
    ),
    Mutant(
        name="leftovers",
        file=ATOMIC,
        find="            beside.unlink(missing_ok=True)\n",
        replace="            pass\n",
        why="a failed save cleans up later",
        invariant="no temporary file stays",
    ),
    Mutant(
        name="a pruned model called gpt2",
        file=FILE,
        find='"model_type": PRUNED, "layers": layers}',
        replace='"layers": layers}',
        why="the tensors have GPT-2's names",
        invariant="a pruned model has its own model type",
    ),
    Mutant(
        name="widths not read",
        file=FILE,
        find="    return layers\n\n\ndef one_dropout",
        replace="    return dense\n\n\ndef one_dropout",
        why="the config has the sizes",
        invariant="a pruned model opens with its own widths",
    ),
    Mutant(
        name="any width goes",
        file=FILE,
        find="if type(layer[name]) is not int or not 0 <= layer[name] <= most[name]:",
        replace="if layer[name] is None:",
        why="a file that minipeft wrote is right",
        invariant="widths that make no sense are named",
    ),
    Mutant(
        name="one list for all layers",
        file=FILE,
        find="if not isinstance(layers, list) or len(layers) != config.n_layer:",
        replace="if not isinstance(layers, list):",
        why="the list is as long as it is",
        invariant="layers is a list of n_layer widths",
    ),
]
