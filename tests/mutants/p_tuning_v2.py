"""What goes wrong in P-tuning v2."""

from tests.mutants import Mutant

FILE = "minipeft/soft_prompt/p_tuning_v2.py"
TESTS = ["tests/test_p_tuning_v2.py", "tests/contract -k PTuningV2"]

MUTANTS = [
    Mutant(
        name="layers ignored",
        file=FILE,
        find="dropout=self.dropout, layers=self.layers",
        replace="dropout=self.dropout",
        why="the option is read and then forgotten",
        invariant="prompts can be on some layers only",
    ),
    Mutant(
        name="all layers counted",
        file=FILE,
        find="config.n_layer if self.layers is None else len(self.layers)",
        replace="config.n_layer",
        why="the count of the common case",
        invariant="the count is the formula's",
    ),
    Mutant(
        name="dropout forgotten",
        file=FILE,
        find="dropout=self.dropout, layers=self.layers",
        replace="layers=self.layers",
        why="the option is read and then forgotten",
        invariant="dropout is on the prompts",
    ),
    Mutant(
        name="the same length for every task",
        file=FILE,
        find="PTuningV2(task.prompt_length).attach(model, name)",
        replace="PTuningV2().attach(model, name)",
        why="one default for all",
        invariant="each task has a prompt of its own length",
    ),
    Mutant(
        name="every task classifies rows",
        file=FILE,
        find="Head(task.num_labels, task.per_token)",
        replace="Head(task.num_labels)",
        why="tagging forgotten",
        invariant="tags are read at every token",
    ),
    Mutant(
        name="the head of another task stays",
        file=FILE,
        find="[task if own else SHARED, head_of(task)]",
        replace="[task if own else SHARED, model.attachments[-1].name]",
        why="switching the prompt only",
        invariant="select_task switches the head too",
    ),
    Mutant(
        name="tasks in turn, whatever their size",
        file=FILE,
        find="[float(s) for s in sizes.values()]",
        replace="[1.0 for _ in sizes]",
        why="round robin is easier",
        invariant="(P-tuning v2 3): in proportion to size",
    ),
    Mutant(
        name="heads left out of the optimizer",
        file=FILE,
        find="for a in model.attachments for p in a",
        replace="for a in model.attachments[:1] for p in a",
        why="only the prompt is a technique's parameter",
        invariant="prompt and heads are trained together",
    ),
    Mutant(
        name="gradients pile up",
        file=FILE,
        find="optimizer.zero_grad()  # to None",
        replace="pass  # to None",
        why="zero_grad forgotten",
        invariant="a head moves in its own task's steps alone",
    ),
    Mutant(
        name="gradients set to 0",
        file=FILE,
        find="optimizer.zero_grad()  # to None",
        replace="optimizer.zero_grad(set_to_none=False)  # to None",
        why="AdamW moves a parameter with a zero gradient, by its momentum",
        invariant="a head moves in its own task's steps alone",
    ),
    Mutant(
        name="the last position of a padded row",
        file=FILE,
        find="(ids, lengths=lengths)",
        replace="(ids)",
        why="lengths not passed on",
        invariant="the loss reads each row at its last real token",
    ),
    Mutant(
        name="adapted from a fresh prompt",
        file=FILE,
        find="attachment_of(model, name).load(tensors)",
        replace="pass",
        why="attached anew and not loaded",
        invariant="adapting goes on from the shared prompt",
    ),
    Mutant(
        name="left in training mode",
        file=FILE,
        find="    model.eval()\n",
        replace="",
        why="dropout stays on",
        invariant="the model is back in eval mode",
    ),
]
