"""What goes wrong in files of quantised weights."""

from tests.mutants import Mutant

FILE = "minipeft/interop/bitsandbytes.py"
TESTS = ["tests/test_bitsandbytes.py", "tests/parity/test_nf4_bitsandbytes.py"]

MUTANTS = [
    Mutant(
        name="the offset is not written",
        file=FILE,
        find='about["nested_offset"] = constants.offset.item()',
        replace='about["nested_offset"] = 0.0',
        why="it has no tensor of its own",
        invariant="there and back is the same",
    ),
    Mutant(
        name="the group's size is the block's",
        file=FILE,
        find='about |= {"nested_blocksize": GROUP, "nested_dtype": "float32"}',
        replace='about |= {"nested_blocksize": quantized.block_size, "nested_dtype": "float32"}',
        why="one block size for both levels",
        invariant="nested_blocksize is 256",
    ),
    Mutant(
        name="every kind is nf4",
        file=FILE,
        find='key = f"{name}.quant_state.bitsandbytes__{quantized.kind}"',
        replace='key = f"{name}.quant_state.bitsandbytes__nf4"',
        why="only NF4 was tried",
        invariant="FP4 comes back as FP4",
    ),
    Mutant(
        name="the constants restored before they are written",
        file=FILE,
        find='state[f"{name}.absmax"] = constants.codes',
        replace='state[f"{name}.absmax"] = quantized.constants',
        why="absmax sounds like floats",
        invariant="uint8 codes under .absmax",
    ),
    Mutant(
        name="levels are not checked",
        file=FILE,
        find='if not torch.equal(state[f"{name}.quant_map"].cpu().float(), CODEBOOKS[kind]):',
        replace='if len(state[f"{name}.quant_map"]) != len(CODEBOOKS[kind]):',
        why="sixteen levels are sixteen levels",
        invariant="another table is an error",
    ),
    Mutant(
        name="sizes are not checked",
        file=FILE,
        find="if state[key].numel() != count:",
        replace="if state[key].numel() < 1:",
        why="the reader will fail by itself",
        invariant="codes that do not fit the shape are named",
    ),
    Mutant(
        name="the compute type is not kept",
        file=FILE,
        find='about = {"compute_dtype": layer.compute_dtype, "quant_method": "nf4"}',
        replace='about = {"compute_dtype": None, "quant_method": "nf4"}',
        why="it is no tensor",
        invariant="the opened model computes the same",
    ),
    Mutant(
        name="transformers would take it for GPT-2",
        file=FILE,
        find='MODEL_TYPE = "minipeft_nf4"',
        replace='MODEL_TYPE = "gpt2"',
        why="it is a GPT-2, after all",
        invariant="opening it as floats is an error that names the type",
    ),
    Mutant(
        name="a layer of floats is saved as it is",
        file=FILE,
        find="        if not isinstance(layer, NF4Linear):\n            raise ValueError",
        replace="        if not isinstance(layer, NF4Linear):\n            continue\n"
        "            raise ValueError",
        why="half-quantised models exist",
        invariant="a float layer is named",
    ),
    Mutant(
        name="shapes are not compared with the model's",
        file=FILE,
        find="if quantized.shape != tuple(layer.weight.shape):",
        replace="if len(quantized.shape) != layer.weight.ndim:",
        why="two dimensions are two dimensions",
        invariant="exchanged layers are an error",
    ),
    Mutant(
        name="the whole float model is held",
        file=FILE,
        find="linear.weight = nn.Parameter(part, False)",
        replace="linear.weight = nn.Parameter(part.clone(), False);"
        " model.held = [*getattr(model, 'held', ()), linear.weight]",
        why="tensors kept in a dictionary until the end",
        invariant="one layer of floats at a time",
    ),
    Mutant(
        name="the head is no longer the embedding",
        file=FILE,
        find="    model.head.weight = model.embed.token.weight\n",
        replace="    model.head.weight = nn.Parameter(model.embed.token.weight.clone())\n",
        why="assigning tensors unties them",
        invariant="the head shares the embedding's weight",
    ),
    Mutant(
        name="a pruned model opened at the config's widths",
        file=FILE,
        find='    if "layers" in values:  # it was pruned\n',
        replace='    if values.get("model_type") == hf_gpt2.PRUNED:\n',
        why="that is what tells a pruned model of floats",
        invariant="what was written opens again",
    ),
    Mutant(
        name="a pruned folder quantised at the config's widths",
        file=FILE,
        find="meta_model(config, hf_gpt2.read_widths(folder, config))",
        replace="meta_model(config, dense_widths(config))",
        why="the config tells the shape",
        invariant="a pruned folder of floats opens quantised",
    ),
]
