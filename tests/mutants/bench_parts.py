"""What goes wrong in timing techniques and twins."""

from tests.mutants import Mutant

FILE = "minipeft/bench_parts.py"
TESTS = ["tests/test_bench_parts.py"]

MUTANTS = [
    Mutant(
        name="the twin calls what the environment says",
        file=FILE,
        find='        with forced("off"):  # a definition in the definition stays one',
        replace="        if True:",
        why="off seems to be the default",
        invariant="a definition within a definition stays one",
    ),
    Mutant(
        name="both sides are the twin",
        file=FILE,
        find="for f in (twin.loaded, twin.definition)]",
        replace="for f in (twin.loaded, twin.loaded)]",
        why="copied; the ratio of 1 looks like a fair result",
        invariant="both sides are what they are called",
    ),
    Mutant(
        name="written over again and again, the caller's too",
        file=FILE,
        find="    args = copy.deepcopy(args)\n",
        replace="",
        why="copying takes time, and time is measured",
        invariant="what a side overwrites is its own copy",
    ),
    Mutant(
        name="gradients pile up",
        file=FILE,
        find="""                for tensor in wanted:
                    tensor.grad = None
""",
        replace="",
        why="nobody reads them; but adding to one is work, and the first round has none",
        invariant="a side leaves no gradients",
    ),
    Mutant(
        name="forward alone",
        file=FILE,
        find="                result.backward(torch.ones_like(result))\n",
        replace="                pass\n",
        why="the forward pass is what one thinks of",
        invariant="a side goes backward where gradients are wanted",
    ),
    Mutant(
        name="a twin that the seam would not take",
        file=FILE,
        find='        if twin.refusal(args, {}, "on"):',
        replace="        if False:",
        why="it is there, so it runs",
        invariant="only twins that run here are timed",
    ),
    Mutant(
        name="all parameters train",
        file=FILE,
        find="    return model, bench.training_step(loss, trainable_parameters(model)), loss",
        replace="    model.requires_grad_(True)\n"
        "    return model, bench.training_step(loss, list(model.parameters())), loss",
        why="an optimizer gets model.parameters()",
        invariant="a step trains what the technique trains and nothing else",
    ),
    Mutant(
        name="the text as long as the context",
        file=FILE,
        find="(bench.SHAPE.context_length - model.embed.position_shift) // 8 * 8",
        replace="bench.SHAPE.context_length // 8 * 8",
        why="virtual tokens take no room in a prefix, so they take none",
        invariant="a text fits behind virtual tokens",
    ),
    Mutant(
        name="full fine-tuning among the techniques",
        file=FILE,
        find='        if name == "full":  # against itself\n            continue\n',
        replace="",
        why="it is a preset as well",
        invariant="every preset but full is timed against full fine-tuning",
    ),
    Mutant(
        name="peft trains the base as well",
        file=FILE,
        find="        peer.prompt_encoder.requires_grad_(True)\n",
        replace="        peer.requires_grad_(True)\n",
        why="one call for the whole model",
        invariant="peft trains what the technique trains",
    ),
    Mutant(
        name="the operations of the forward pass for both",
        file=FILE,
        find='{"operations": 4 * M * D * D + 12 * M * D * r}',
        replace='{"operations": 4 * M * D * D + 4 * M * D * r}',
        why="the branch is counted once; backward it is twice as dear",
        invariant="operations are counted right",
    ),
    Mutant(
        name="four products as two",
        file=FILE,
        find='{"operations": 32 * M * D * D}',
        replace='{"operations": 16 * M * D * D}',
        why="up and down are two products; so are their gradients",
        invariant="operations are counted right",
    ),
]
