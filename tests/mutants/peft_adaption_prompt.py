"""What goes wrong in LLaMA-Adapter's files."""

from tests.mutants import Mutant

FILE = "minipeft/interop/peft_adaption_prompt.py"
TESTS = ["tests/parity/test_llama_adapter_peft.py"]

MUTANTS = [
    Mutant(
        name="the paper's variant as peft's",
        file=FILE,
        find='if technique.variant != "peft_gpt2":',
        replace="if False:",
        why="both are LLaMA-Adapter",
        invariant="the paper's variant keeps files of its own",
    ),
    Mutant(
        name="opened as the paper's variant",
        file=FILE,
        find='layers, "peft_gpt2")',
        replace='layers, "paper")',
        why="the better one",
        invariant="the same logits",
    ),
    Mutant(
        name="layers counted from the bottom",
        file=FILE,
        find="layers = technique.numbers(model.config.n_layer)",
        replace="layers = range(len(technique.numbers(model.config.n_layer)))",
        why="adapter_layers sounds like the first ones",
        invariant="adapter_layers counts from the top",
    ),
    Mutant(
        name="no batch axis in the file",
        file=FILE,
        find="swap.replacement.prompt.detach()[None]",
        replace="swap.replacement.prompt.detach()",
        why="the axis has length 1",
        invariant="peft opens it; byte for byte",
    ),
    Mutant(
        name="all layers always",
        file=FILE,
        find="layers = None if layers == shape.n_layer else layers",
        replace="layers = None",
        why="usually all",
        invariant="a file for the upper layers opens with these",
    ),
    Mutant(
        name="number of blocks for number of layers",
        file=FILE,
        find='"adapter_layers": len(technique.numbers(len(model.blocks))),',
        replace='"adapter_layers": len(model.blocks),',
        why="usually all",
        invariant="adapter_layers is what it is",
    ),
    Mutant(
        name="only with a head",
        file=FILE,
        find="prefix, p, D = peft.prefix_of(tensors),",
        replace="prefix, p, D = peft.WITH_HEAD,",
        why="the model has a head",
        invariant="files of a model without head open",
    ),
    Mutant(
        name="unknown settings ignored",
        file=FILE,
        find="if key not in peft.DESCRIPTIVE | SETTINGS and value:",
        replace="if False:",
        why="peft ignores them too",
        invariant="a setting we do not have is an error",
    ),
    Mutant(
        name="unknown tensors ignored",
        file=FILE,
        find="peft.check_tensors(tensors, shapes)",
        replace="pass",
        why="missing ones raise anyway",
        invariant="tensors that do not fit are errors that name them",
    ),
    Mutant(
        name="target modules ignored",
        file=FILE,
        find='if config.get("target_modules") not in (None, "attn"):',
        replace="if False:",
        why="always attn",
        invariant="a setting we do not have is an error",
    ),
    Mutant(
        name="a bool is a number",
        file=FILE,
        find="isinstance(value, bool) or value < 1",
        replace="value < 1",
        why="True is an int",
        invariant="bad numbers are errors that name them",
    ),
]
