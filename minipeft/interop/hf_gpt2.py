r"""Models in the Hugging Face GPT-2 layout: a folder with config.json and model.safetensors.

`transformers` opens what `save_model` writes, and `load_model` opens what `transformers` writes,
with the same logits. The tensors, ours on the right (D width, F feed-forward width, V vocabulary,
C context length):

    wte.weight                 (V, D)     embed.token.weight, and the tied head.weight
    wpe.weight                 (C, D)     embed.position.weight
    h.N.ln_1.*  h.N.ln_2.*     (D,)       blocks.N.ln_1.*  blocks.N.ln_2.*
    h.N.attn.c_attn.weight     (D, 3 D)   blocks.N.attn.{q,k,v}.weight, stacked, transposed
    h.N.attn.c_proj.weight     (D, D)     blocks.N.attn.o.weight, transposed
    h.N.mlp.c_fc.weight        (D, F)     blocks.N.mlp.up.weight, transposed
    h.N.mlp.c_proj.weight      (F, D)     blocks.N.mlp.down.weight, transposed
    ln_f.*                     (D,)       ln_f.*

GPT-2's Conv1D multiplies from the right, y = x W + b with W of shape (in, out); nn.Linear computes
x W^T + b. Names come with and without `transformer.` in front; old files also hold the causal mask
(`attn.bias`, `attn.masked_bias`) and a copy of the tied head, which are not needed.

What we do not have is refused with its name, never opened as something else: other activations, an
untied head, cross-attention, scores divided by the layer's number, three different dropouts.

A structurally pruned model has the same tensors with fewer columns and rows, its own model_type,
and `layers`: a list of {"n_head", "head_dim", "d_ff"}, one a block. It opens here only.

How this differs from transformers: a missing or unknown tensor is an error, not a warning with
random weights; 16-bit files open in float32, exactly; pickled files (.bin) are never opened, for
they can run code.

Footguns: `h.N.attn.bias` is a mask, `h.N.attn.c_attn.bias` a bias; a square c_proj that was not
transposed still loads; transformers wants {"format": "pt"} in the file's metadata.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minipeft import wrap
from minipeft.atomic import write_all_atomically
from minipeft.compressed.structured_pruning import dense_widths, widths, with_widths
from minipeft.gpt import GPTConfig

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
PRUNED = "minipeft_pruned_gpt2"  # the model_type of a model whose layers have widths of their own
DROPOUTS = ("embd_pdrop", "attn_pdrop", "resid_pdrop")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")  # one function under three names
NOT_NEEDED = re.compile(r"h\.\d+\.attn\.(bias|masked_bias)")  # the causal mask of old files
DEFAULTS = {  # GPT2Config's, for files that leave a value out
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_inner": None,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
    **dict.fromkeys(DROPOUTS, 0.1),
}
REQUIRED = {  # what a GPT of ours is; another value is a model we do not have
    "scale_attn_weights": (True, "scores that are not divided by sqrt(d)"),
    "scale_attn_by_inverse_layer_idx": (False, "scores divided by the layer's number"),
    "add_cross_attention": (False, "cross-attention"),
    "pruned_heads": ({}, "heads missing from some layers"),
    "quantization_config": (None, "quantised tensors"),
}


# -- opening


def load_model(folder):
    """Open a GPT-2 folder; returns a GPT in eval mode, in float32 (float64 if the file is).

    Raises FileNotFoundError for a missing file, ValueError for a damaged or foreign one, naming
    the file and the field or tensor. The global random state is not touched.
    """
    folder = Path(folder)
    config = read_config(folder)
    layers = read_widths(folder, config)
    with torch.device("meta"):  # no memory and no random numbers for weights about to be replaced
        model = with_widths(config, layers)
    with contextlib.ExitStack() as stack:
        files = open_weights(folder, stack)
        state = read_tensors(folder, files, model)
    model.load_state_dict(state, strict=False, assign=True)
    model.head.weight = model.embed.token.weight
    return model.eval()


def read_config(folder):
    """config.json as a GPTConfig. Raises ValueError for a field that asks for what GPT is not."""
    path = folder / CONFIG
    if not path.is_file():
        hint = ""
        if (folder / "adapter_config.json").is_file():
            hint = "; it holds an adapter: open it with load_adapter(model, folder)"
        raise FileNotFoundError(f"{folder} has no {CONFIG}, so it is not a model folder{hint}")
    return to_config(path, read_json(path))


def to_config(path, values):
    """config.json's values as a GPTConfig; `path` for the messages of the errors."""
    check_config(path, values)
    values = DEFAULTS | {"n_positions": values.get("n_ctx", DEFAULTS["n_positions"])} | values
    try:
        return GPTConfig(
            vocab_size=values["vocab_size"],
            context_length=values["n_positions"],
            n_layer=values["n_layer"],
            n_head=values["n_head"],
            d_model=values["n_embd"],
            d_ff=values["n_inner"],
            dropout=one_dropout(path, values),
            layer_norm_eps=values["layer_norm_epsilon"],
        )
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def check_config(path, values):
    """Raise ValueError naming the first field that asks for another architecture."""
    if values.get("model_type") not in ("gpt2", PRUNED):
        hint = ""
        if values.get("model_type") == "minipeft_nf4":
            hint = "; interop.bitsandbytes.load_model opens what is quantised"
        raise ValueError(f"{path}: model_type={values.get('model_type')!r} is not 'gpt2'{hint}")
    for name, (needed, meaning) in REQUIRED.items():
        value = values.get(name)
        if value is not None and bool(value) != bool(needed):
            raise ValueError(f"{path}: {name}={value!r} means {meaning}, which GPT does not have")
    activation = values.get("activation_function", DEFAULTS["activation_function"])
    if activation not in TANH_GELUS:
        raise ValueError(
            f"{path}: activation_function={activation!r}; GPT has the tanh GELU only, called "
            f"{' or '.join(TANH_GELUS)}"
        )


def read_widths(folder, config):
    """The widths of every layer, [{"n_head": , "head_dim": , "d_ff": }]. Raises ValueError for a
    pruned model's config without them, or with widths that the architecture cannot have.
    """
    path = folder / CONFIG
    values = read_json(path)
    if values["model_type"] != PRUNED:
        return dense_widths(config)
    return checked_widths(path, values.get("layers"), config)


def checked_widths(path, layers, config):
    """`layers` of config.json, the file at `path`. Raises ValueError as `read_widths` does."""
    dense = dense_widths(config)
    if not isinstance(layers, list) or len(layers) != config.n_layer:
        raise ValueError(f"{path}: layers must be a list of n_layer={config.n_layer} widths")
    for n, (layer, most) in enumerate(zip(layers, dense)):
        if not isinstance(layer, dict) or layer.keys() != most.keys():
            raise ValueError(f"{path}: layers[{n}]={layer!r} needs {', '.join(most)}")
        if layer["head_dim"] != most["head_dim"]:
            raise ValueError(f"{path}: layers[{n}].head_dim is not n_embd / n_head")
        for name in most:
            if type(layer[name]) is not int or not 0 <= layer[name] <= most[name]:
                raise ValueError(
                    f"{path}: layers[{n}].{name}={layer[name]!r} is not 0 to {most[name]}"
                )
    return layers


def one_dropout(path, values):
    """The one dropout a GPT has; GPT-2 files have three, which must agree."""
    found = {name: values[name] for name in DROPOUTS}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{name}={value}" for name, value in found.items())
        raise ValueError(f"{path}: {listed}; GPT has one dropout, so set the three to one value")
    return found[DROPOUTS[0]]


def read_json(path):
    """The object in a JSON file. Raises ValueError naming the file, line and column."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        where = f"{path}, line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, not an object {{...}}")
    return values


def open_weights(folder, stack):
    """Name without `transformer.` -> (open file, name in it), over the one file or all shards."""
    if (folder / WEIGHTS).is_file():
        shards = {WEIGHTS: None}
    elif (folder / INDEX).is_file():
        shards = read_index(folder)
    else:
        hint = ""
        if any(folder.glob("pytorch_model*.bin")):
            hint = " (.bin files can run code and are never opened; convert them with transformers)"
        raise FileNotFoundError(f"{folder} has neither {WEIGHTS} nor {INDEX}{hint}")
    found = {}
    for shard, promised in shards.items():
        file = open_safetensors(folder / shard, stack)
        names = list(file.keys())
        lacking = sorted(set(promised or ()) - set(names))
        if lacking:
            raise ValueError(f"{folder / shard} lacks what {INDEX} promises: {some(lacking)}")
        for name in names:
            short = name.removeprefix("transformer.")
            if short in found:
                raise ValueError(f"{folder / shard}: tensor {short} is there twice")
            found[short] = (file, name)
    return found


def read_index(folder):
    """Shard's file name -> names of its tensors."""
    path = folder / INDEX
    where = read_json(path).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{path} has no weight_map from tensor names to files")
    shards = {}
    for tensor, shard in where.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path}: {tensor} is said to be in {shard!r}, not a file name")
        shards.setdefault(shard, []).append(tensor)
    for shard in shards:
        if not (folder / shard).is_file():
            raise FileNotFoundError(f"{path} names {shard}, which is missing")
    return shards


def open_safetensors(path, stack):
    """Open a safetensors file until the ExitStack closes. Raises ValueError for any other file."""
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path} ({size:,} bytes) is truncated or no safetensors file: {error}"
        ) from None


def read_tensors(folder, files, model):
    """Our name -> tensor. Every name, shape and dtype is checked before any tensor is read."""
    dtype = check_tensors(folder, files, model)
    state = {}
    for theirs, ours in pairs(len(model.blocks)):
        file, name = files[theirs]
        tensor = file.get_tensor(name).to(dtype)
        tensor = tensor.T if is_conv1d(theirs) else tensor
        for our_name, part in zip(ours, tensor.chunk(len(ours)), strict=True):
            state[our_name] = part.contiguous().clone()  # never a view into the mapped file
    return state | {"head.weight": tied_head(folder, files, state["embed.token.weight"])}


def check_tensors(folder, files, model):
    """The dtype to open in. Raises ValueError naming missing, unknown and misshapen tensors."""
    needed = shapes(model)
    wrong = [f"missing {name}" for name in needed if name not in files]
    known = {*needed, "lm_head.weight"}
    wrong += [f"unknown {n}" for n in files if n not in known and not NOT_NEEDED.fullmatch(n)]
    dtype = torch.float32
    for name in needed.keys() & files.keys():
        header = files[name][0].get_slice(files[name][1])
        if tuple(header.get_shape()) != needed[name]:
            wrong.append(f"{name} is {tuple(header.get_shape())}, {CONFIG} asks for {needed[name]}")
        if header.get_dtype() not in ("F16", "BF16", "F32", "F64"):
            wrong.append(f"{name} has dtype {header.get_dtype()}, not a floating-point one")
        dtype = torch.float64 if header.get_dtype() == "F64" else dtype
    if wrong:
        raise ValueError(f"{folder}: these tensors do not fit the model: {some(sorted(wrong))}")
    return dtype


def tied_head(folder, files, token):
    """The head's weight, which must be the embedding's. Raises ValueError for a head of its own."""
    if "lm_head.weight" in files:
        file, name = files["lm_head.weight"]
        head = file.get_tensor(name)
        if head.shape != token.shape or not torch.equal(head.to(token.dtype), token):
            raise ValueError(
                f"{folder}: lm_head.weight is not wte.weight; GPT's head is tied to the embedding "
                f"and has no weight of its own"
            )
    elif read_json(folder / CONFIG).get("tie_word_embeddings") is False:
        raise ValueError(f"{folder}: tie_word_embeddings is false, but there is no lm_head.weight")
    return token


def some(items, limit=8):
    """A list for an error message: the first few, and how many more there are."""
    more = f"; and {len(items) - limit} more" if len(items) > limit else ""
    return "; ".join(items[:limit]) + more


# -- names and shapes


def pairs(n_layer):
    """(their name, our names) of every tensor. Several of ours are stacked, first above second."""
    yield "wte.weight", ("embed.token.weight",)
    yield "wpe.weight", ("embed.position.weight",)
    for n in range(n_layer):
        for kind in ("weight", "bias"):
            for theirs, ours in (
                ("ln_1", ("ln_1",)),
                ("attn.c_attn", ("attn.q", "attn.k", "attn.v")),
                ("attn.c_proj", ("attn.o",)),
                ("ln_2", ("ln_2",)),
                ("mlp.c_fc", ("mlp.up",)),
                ("mlp.c_proj", ("mlp.down",)),
            ):
                yield f"h.{n}.{theirs}.{kind}", tuple(f"blocks.{n}.{o}.{kind}" for o in ours)
    yield "ln_f.weight", ("ln_f.weight",)
    yield "ln_f.bias", ("ln_f.bias",)


def is_conv1d(name):
    """Whether their tensor of this name is stored (in, out)."""
    return re.fullmatch(r"h\.\d+\.(attn|mlp)\.c_\w+\.weight", name) is not None


def shapes(model):
    """Their name -> shape, for a model of this configuration."""
    state, found = model.state_dict(), {}
    for theirs, ours in pairs(len(model.blocks)):
        rows = sum(state[name].shape[0] for name in ours)
        shape = (rows, *state[ours[0]].shape[1:])
        found[theirs] = shape[::-1] if is_conv1d(theirs) else shape
    return found


# -- saving


def save_model(model, folder):
    """Write `model` to `folder` as config.json and model.safetensors, in its own dtype.

    Both files are complete on disk before either takes its place, so an interrupted save leaves
    the old ones. Raises ValueError for a model with techniques on it, or one whose shapes are not
    those of its configuration.
    """
    check_savable(model)
    state = model.state_dict()
    tensors = {}
    for theirs, ours in pairs(len(model.blocks)):
        tensor = torch.cat([state[name].detach().cpu() for name in ours])
        tensor = tensor.T if is_conv1d(theirs) else tensor
        tensors[f"transformer.{theirs}"] = tensor.contiguous()
    folder = Path(folder)
    text = json.dumps(config_values(model), indent=2, sort_keys=True) + "\n"
    write_all_atomically(
        {
            folder / WEIGHTS: lambda path: save_file(tensors, path, {"format": "pt"}),
            folder / CONFIG: text.encode(),
        }
    )


def check_savable(model):
    """Raise ValueError for what this layout cannot hold."""
    names = [attachment.name for attachment in model.attachments]
    wrapped = [n for n, m in model.named_modules() if isinstance(m, wrap.Wrapper)]
    if names or wrapped:
        raise ValueError(
            f"techniques are on this model ({', '.join(names) or wrapped[0]}): fold them in with "
            f"merge(model) first, or save them alone with save_adapter(model, folder)"
        )
    if getattr(model.head, "weight", None) is not model.embed.token.weight:
        raise ValueError("the head is not tied to the embedding: a GPT-2 folder cannot hold it")
    with torch.device("meta"):
        plain = with_widths(model.config, widths_of(model)).state_dict()
    state = model.state_dict()
    wrong = sorted(plain.keys() ^ state.keys())
    wrong += [
        f"{name} is {tuple(state[name].shape)}, the configuration says {tuple(tensor.shape)}"
        for name, tensor in plain.items()
        if name in state and state[name].shape != tensor.shape
    ]
    wrong += [f"{n} has dtype {t.dtype}" for n, t in state.items() if not t.is_floating_point()]
    if wrong:
        raise ValueError(f"a GPT-2 folder cannot hold this model: {some(wrong)}")


def widths_of(model):
    """The model's widths; those of its configuration where they are no GPT's of any widths, so
    that the tensors that do not fit are named.
    """
    found, dense = widths(model), dense_widths(model.config)
    fits = len(found) == len(dense) and all(
        f["head_dim"] == d["head_dim"] and f["n_head"] <= d["n_head"] and f["d_ff"] <= d["d_ff"]
        for f, d in zip(found, dense)
    )
    whole = all(b.mlp.down.in_features == f["d_ff"] for b, f in zip(model.blocks, found))
    return found if fits and whole else dense


def config_values(model):
    """config.json's content: what transformers needs to build the same model, or, for a pruned
    one, what `load_model` needs.
    """
    config, layers = model.config, widths(model)
    values = dense_values(model, config)
    if layers == dense_widths(config):
        return values
    return values | {"architectures": ["GPT"], "model_type": PRUNED, "layers": layers}


def dense_values(model, config):
    """config.json's content for a model that nothing was taken out of."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.layer_norm_eps,
        "initializer_range": 0.02,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "tie_word_embeddings": True,
        "bos_token_id": None,  # transformers would fill in GPT-2's 50256
        "eos_token_id": None,
        "torch_dtype": str(model.embed.token.weight.dtype).removeprefix("torch."),
        **dict.fromkeys(DROPOUTS, config.dropout),
    }
