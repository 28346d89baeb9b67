"""What goes wrong when adapters for a fusion are fetched."""

from tests.mutants import Mutant

FILE = "minipeft/additive/adapter_sources.py"
TESTS = ["tests/test_adapter_fusion.py", "tests/contract -k AdapterFusion"]

MUTANTS = [
    Mutant(
        name="tensors are not filled in",
        file=FILE,
        find="        parameter.data.copy_(tensor)",
        replace="        pass",
        why="the shapes fit, so all seems well",
        invariant="a fusion computes with the adapters it was given",
    ),
    Mutant(
        name="the first layer's tensors for all layers",
        file=FILE,
        find='tensor = source.tensors.get(f"{path}.adapter.{name}")',
        replace='tensor = source.tensors.get(f"blocks.1.mlp.adapter.{name}")',
        why="the path is fixed while debugging",
        invariant="each layer has its own adapter",
    ),
    Mutant(
        name="a wrong shape is let through",
        file=FILE,
        find="if tensor is None or tensor.shape != parameter.shape:",
        replace="if tensor is None:",
        why="copy_ broadcasts",
        invariant="a wrong shape is an error that names it",
    ),
    Mutant(
        name="missing tensors are skipped",
        file=FILE,
        find="tensor is None or tensor.shape",
        replace="tensor is None:\n            continue\n        if tensor.shape",
        why="strict=False",
        invariant="a missing tensor is an error that names it",
    ),
    Mutant(
        name="the folder's adapter stays on",
        file=FILE,
        find="    detach(model, temporary)\n",
        replace="",
        why="it was only loaded to be read",
        invariant="fusing from folders leaves one attachment",
    ),
    Mutant(
        name="dropout in frozen adapters",
        file=FILE,
        find='shape = source.technique.shape() | {"dropout": 0.0}',
        replace="shape = source.technique.shape()",
        why="the settings are copied as they are",
        invariant="frozen adapters give the same in training",
    ),
    Mutant(
        name="activations of the first adapter for all",
        file=FILE,
        find="adapter = Bottleneck(**place_of(model, path), **shape)",
        replace='adapter = Bottleneck(**place_of(model, path), **(shape | {"activation": "relu"}))',
        why="all adapters are expected to be alike",
        invariant="each adapter keeps its own activation",
    ),
    Mutant(
        name="layers of AdapterDrop forgotten",
        file=FILE,
        find='values["leave_out"] = [n for n in range(len(model.blocks)) if n not in kept]',
        replace="kept = kept",
        why="drop is not a field of Adapter",
        invariant="adapters of AdapterDrop are fused where they are",
    ),
    Mutant(
        name="trained LayerNorms are lost in silence",
        file=FILE,
        find='if technique.placement == "houlsby" or technique.trains_layer_norms():',
        replace='if technique.placement == "houlsby":',
        why="only adapters are looked for",
        invariant="what a fusion cannot take is an error",
    ),
    Mutant(
        name="places are not compared",
        file=FILE,
        find="if sites_without(technique, leave_out, n_layer) !=",
        replace="if False and sites_without(technique, leave_out, n_layer) !=",
        why="all adapters are expected to be alike",
        invariant="adapters at different places are an error that names them",
    ),
    Mutant(
        name="two adapters of one name",
        file=FILE,
        find="    if len(set(names)) != len(names):",
        replace="    if not names:",
        why="names are only labels",
        invariant="two of one name are an error",
    ),
]
