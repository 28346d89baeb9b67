"""What goes wrong between IA3 and peft's files."""

from tests.mutants import Mutant

FILE = "minipeft/interop/peft_ia3.py"
TESTS = ["tests/parity/test_ia3_peft.py"]

MUTANTS = [
    Mutant(
        name="zeros where nothing is scaled",
        file=FILE,
        find="return torch.ones(base.out_features",
        replace="return torch.zeros(base.out_features",
        why="LoRA pads with zeros",
        invariant="(peft IA3 1): ones where a projection is no target",
    ),
    Mutant(
        name="rows and columns swapped",
        file=FILE,
        find="shape = (1, -1) if targets[0] in inputs else (-1, 1)",
        replace="shape = (-1, 1) if targets[0] in inputs else (1, -1)",
        why="the vector has the same numbers either way",
        invariant="peft opens the file",
    ),
    Mutant(
        name="feed-forward forgotten",
        file=FILE,
        find="sorted(m for m, ts in modules.items() if ts[0] in inputs)",
        replace="[]",
        why="its default is thought to apply",
        invariant="down is scaled at what it reads in peft",
    ),
    Mutant(
        name="every c_proj is feed-forward",
        file=FILE,
        find="sorted(m for m, ts in modules.items() if ts[0] in inputs)",
        replace=('sorted(m.split(".")[1] for m, ts in modules.items() if ts[0] in inputs)'),
        why='"c_proj" names two modules a block',
        invariant="attention's output stays as it is",
    ),
    Mutant(
        name="q, k and v in another order",
        file=FILE,
        find=("for target, part in zip(targets, tensors[name].flatten().chunk(len(targets))):"),
        replace=(
            "for target, part in zip(targets[::-1], tensors[name].flatten().chunk(len(targets))):"
        ),
        why="c_attn is thought to be v, k, q",
        invariant="(peft IA3 1)",
    ),
    Mutant(
        name="the default has no mlp",
        file=FILE,
        find='DEFAULTS = {"target_modules": ["c_attn", "mlp.c_proj"]',
        replace='DEFAULTS = {"target_modules": ["c_attn"]',
        why="LoRA's default",
        invariant="a config without target_modules opens",
    ),
    Mutant(
        name="feed-forward is never read",
        file=FILE,
        find=('inputs = {is_feedforward(config["feedforward_modules"], key) for key in keys}'),
        replace='inputs = {module == "mlp.c_proj" for key in keys}',
        why="the paper has only this one",
        invariant="c_fc can be scaled at what it reads",
    ),
    Mutant(
        name="layers are taken for all",
        file=FILE,
        find="if len(chosen) > 1 or (True in chosen and len(inputs) > 1):",
        replace="if False:",
        why="target_modules are names of modules",
        invariant="a config for some layers is refused",
    ),
    Mutant(
        name="inputs of q pass silently",
        file=FILE,
        find='    if inputs & {"q", "k", "v"}:\n        return None\n',
        replace="",
        why="every technique peft knows is written for peft",
        invariant="what peft cannot say keeps our own files",
    ),
]
