"""What goes wrong in GGUF files."""

from tests.mutants import Mutant

FILE = "minipeft/interop/gguf.py"
TESTS = ["tests/parity/test_gguf_files.py"]


def bug(name, find, replace, why, invariant):
    return Mutant(name, FILE, find, replace, why, invariant)


MUTANTS = [
    bug(
        "sizes forwards",
        "*reversed(shape))",
        "*shape)",
        "numpy's order",
        "the gguf package reads every tensor",
    ),
    bug(
        "q, v, k",
        '"attn_qkv": [block.attn.q, block.attn.k, block.attn.v],',
        '"attn_qkv": [block.attn.q, block.attn.v, block.attn.k],',
        "a slip our own reader would undo",
        "the stacked tensor, read by the gguf package, against ours in the right order",
    ),
    bug(
        "norms swapped",
        '"attn_norm": [block.ln_1],',
        '"attn_norm": [block.ln_2],',
        "two LayerNorms of one shape",
        "our reader gives the model back",
    ),
    bug(
        "offsets from the start of the file",
        "content = reader.content[start + offset : start + offset + size]",
        "content = reader.content[offset : offset + size]",
        "what offsets usually mean",
        "our reader gives the model back",
    ),
    bug(
        "projections by half",
        'return name.endswith(("qkv.weight", "attn_output.weight", "up.weight", "down.weight"))',
        'return name.endswith(("attn_output.weight", "up.weight", "down.weight"))',
        "the stacked tensor is not in our own list of projections",
        "every projection is of the chosen kind",
    ),
    bug(
        "the file type of another kind",
        '"Q5_0": 8, "Q5_1": 9, "Q8_0": 7}  # llama.cpp\'s',
        '"Q5_0": 8, "Q5_1": 9, "Q8_0": 8}  # llama.cpp\'s',
        "tensor types and file types are numbered differently",
        "file types are llama.cpp's",
    ),
    bug(
        "tensor types as file types",
        '"Q5_0": 6, "Q5_1": 7, "Q8_0": 8}  # ggml',
        '"Q5_0": 8, "Q5_1": 9, "Q8_0": 7}  # ggml',
        "tensor types and file types are numbered differently",
        "the gguf package reads every tensor",
    ),
    bug(
        "epsilon as written",
        'eps = round(values["gpt2.attention.layer_norm_epsilon"], 12)',
        'eps = values["gpt2.attention.layer_norm_epsilon"]',
        "it was read, so it is right",
        "the configuration comes back",
    ),
    bug(
        "any architecture",
        'if values.get("general.architecture") != "gpt2":',
        'if "general.architecture" not in values:',
        "the name is there",
        "foreign files are refused",
    ),
    bug(
        "a file cut short",
        "    if len(content) != size:",
        "    if not content:",
        "the slice was not empty",
        "damaged files are named",
    ),
    bug(
        "a file of a pruned model",
        "    if widths(model) != dense_widths(model.config):\n",
        "    if widths(model) == []:\n",
        "every tensor has its shape beside it",
        "what is written can be opened",
    ),
    bug(
        "a layer's number believed",
        'if sizes["n_layer"] > len(tensors):',
        'if sizes["n_layer"] < 0:',
        "the header is ours",
        "a damaged number of layers is named, not built",
    ),
    bug(
        "a string's length believed",
        "        if size > len(self.content):\n",
        "        if size < 0:\n",
        "the header is ours",
        "a damaged length is named",
    ),
    bug(
        "any number of codes",
        "if kind and (not shape or shape[-1] % BLOCK):",
        "if kind and not shape:",
        "the bytes fit",
        "rows that are no whole blocks are named",
    ),
    bug(
        "memory before the sizes are checked",
        'with torch.device("meta"):  # no memory before the sizes are known to be the tensors\'',
        "with torch.random.fork_rng(devices=[]):",
        "the sizes are the header's",
        "a damaged size is named, and no memory taken for it",
    ),
]
