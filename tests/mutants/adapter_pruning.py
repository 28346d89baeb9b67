"""What goes wrong when adapters are taken off."""

from tests.mutants import Mutant

FILE = "minipeft/additive/adapter_pruning.py"
TESTS = ["tests/test_adapter_pruning.py", "tests/test_adapter_drop.py"]

MUTANTS = [
    Mutant(
        name="left out for ever",
        file=FILE,
        find="            wrapper.left_out = was\n",
        replace="            pass\n",
        why="the state is not put back",
        invariant="dropped ends with its with",
    ),
    Mutant(
        name="not put back after an error",
        file=FILE,
        find="    finally:\n        for wrapper, was",
        replace="    except GeneratorExit:\n        pass\n    else:\n        for wrapper, was",
        why="no finally",
        invariant="dropped ends with its with, also after an error",
    ),
    Mutant(
        name="ranked from the least",
        file=FILE,
        find="sorted(zip(names, (total / count).tolist()), key=lambda pair: -pair[1])",
        replace="sorted(zip(names, (total / count).tolist()), key=lambda pair: pair[1])",
        why="sorted is ascending",
        invariant="the most used first",
    ),
    Mutant(
        name="padding counts",
        file=FILE,
        find="real = steps < (ids.shape[1] if lengths is None else lengths[:, None])",
        replace="real = steps < ids.shape[1]",
        why="lengths are read and forgotten",
        invariant="(AdapterDrop 3): over real tokens",
    ),
    Mutant(
        name="mean of batch means",
        file=FILE,
        find="total, count = total + p[real].sum(0), count + int(real.sum())",
        replace="total, count = total + p[real].mean(0), count + 1",
        why="means are averaged",
        invariant="(AdapterDrop 3): every token counts the same",
    ),
    Mutant(
        name="the loss without, not the rise",
        file=FILE,
        find="rises.append((layer, float(loss(model)) - base))",
        replace="rises.append((layer, float(loss(model))))",
        why="the base loss is the same for all",
        invariant="(AdapterDrop 4)",
    ),
    Mutant(
        name="one of Houlsby's two adapters is measured",
        file=FILE,
        find="with left_out([w for n, w in adapters if n == layer]):",
        replace="with left_out([w for n, w in adapters if n == layer][:1]):",
        why="one adapter a layer is assumed",
        invariant="both adapters of a layer are left out",
    ),
    Mutant(
        name="the wrong fused adapters are kept",
        file=FILE,
        find="if source.name in keep]\n",
        replace="if source.name not in keep]\n",
        why="prune and keep confused",
        invariant="keep is kept",
    ),
    Mutant(
        name="the recipe is not shortened",
        file=FILE,
        find="attachment.technique = replace(attachment.technique, adapters=recipe)",
        replace="recipe",
        why="the modules are thought to be all there is",
        invariant="a pruned fusion saves and loads",
    ),
    Mutant(
        name="the settings do not know of the pruning",
        file=FILE,
        find="attachment.technique = replace(technique, leave_out=leave_out)",
        replace="leave_out",
        why="the modules are thought to be all there is",
        invariant="pruned adapters save and load",
    ),
    Mutant(
        name="layers ranked from the least",
        file=FILE,
        find="return sorted(rises, key=lambda pair: -pair[1])",
        replace="return sorted(rises, key=lambda pair: pair[1])",
        why="sorted is ascending",
        invariant="the most important layer first",
    ),
    Mutant(
        name="the pruned layers stay on the model",
        file=FILE,
        find="or layer_of(swap.path) in keep",
        replace="or layer_of(swap.path) not in keep",
        why="what goes and what stays confused",
        invariant="keep is kept",
    ),
]
