"""What goes wrong in gathering calibration inputs."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/calibration.py"
TESTS = ["tests/test_calibration.py", "tests/test_wanda.py"]

MUTANTS = [
    Mutant(
        name="padding counted",
        file=FILE,
        find="steps < lengths[:, None]",
        replace="steps < steps.numel() * torch.ones_like(lengths)[:, None]",
        why="the mask is for the loss",
        invariant="padding is no text",
    ),
    Mutant(
        name="the last token lost",
        file=FILE,
        find="steps < lengths[:, None]",
        replace="steps < lengths[:, None] - 1",
        why="off by one",
        invariant="(Calibration 1): all tokens",
    ),
    Mutant(
        name="the last batch alone",
        file=FILE,
        find="moments[end] = moments.get(end, 0) + x.T @ x",
        replace="moments[end] = x.T @ x",
        why="assigned for added",
        invariant="(Calibration 1): the sum over batches",
    ),
    Mutant(
        name="float32 sums",
        file=FILE,
        find="x = arguments[0][keep[-1]].double()",
        replace="x = arguments[0][keep[-1]]",
        why="the model's own precision",
        invariant="sums are float64",
    ),
    Mutant(
        name="statistics of the unpruned model",
        file=FILE,
        find=(
            '                act(f"blocks.{n}.{end}", linear, moments[SHARED.get(end, end)])\n'
            "            states = [block(x) for x in states]"
        ),
        replace=(
            "                if end == PROJECTIONS[0]:\n"
            "                    states = [block(x) for x in states]\n"
            '                act(f"blocks.{n}.{end}", linear, moments[SHARED.get(end, end)])'
        ),
        why="one pass over the text for all",
        invariant="later blocks see the pruned blocks before",
    ),
    Mutant(
        name="outputs for inputs",
        file=FILE,
        find="register_forward_pre_hook(take(end))",
        replace="register_forward_hook(lambda m, a, y, t=take(end): t(m, (y,)))",
        why="the other hook",
        invariant="G is of a projection's input",
    ),
    Mutant(
        name="hooks left on",
        file=FILE,
        find="        for hook in hooks:\n            hook.remove()",
        replace="        hooks.clear()",
        why="they do no harm",
        invariant="no hook stays",
    ),
    Mutant(
        name="the mode is lost",
        file=FILE,
        find="    with evaluating(model):\n",
        replace="    with torch.no_grad():\n        model.eval()\n",
        why="eval is the default",
        invariant="the mode comes back",
    ),
    Mutant(
        name="dropout while measuring",
        file=FILE,
        find="    with evaluating(model):\n",
        replace="    with torch.no_grad():\n",
        why="no_grad is not eval",
        invariant="dropout is off",
    ),
    Mutant(
        name="wrappers looked through",
        file=FILE,
        find="    check_plain(model)\n",
        replace="",
        why="what it wraps is still there",
        invariant="techniques are refused",
    ),
    Mutant(
        name="padding alone is a text",
        file=FILE,
        find="        if not any(text.any() for text in real):\n",
        replace="        if not real:\n",
        why="a batch is a batch",
        invariant="without a token there is nothing to calibrate on",
    ),
    Mutant(
        name="keys read with the values of the output",
        file=FILE,
        find='SHARED = {"attn.k": "attn.q", "attn.v": "attn.q"}',
        replace='SHARED = {"attn.k": "attn.q", "attn.v": "attn.o"}',
        why="v belongs to o",
        invariant="q, k and v read the same x",
    ),
    Mutant(
        name="positions left out",
        file=FILE,
        find='x = model.embed(ids, getattr(batch, "start", 0))',
        replace="x = model.embed.token(ids)",
        why="the embedding is the token's",
        invariant="(Calibration 1): what the model reads",
    ),
]
