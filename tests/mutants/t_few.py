"""What goes wrong in T-Few's losses."""

from tests.mutants import Mutant

FILE = "minipeft/additive/t_few.py"
TESTS = ["tests/test_t_few.py"]

MUTANTS = [
    Mutant(
        name="the wrong choices made likely",
        file=FILE,
        find="return -torch.log1p(e - p).sum() / max(1, len(p))",
        replace="return torch.log1p(e - p).sum() / max(1, len(p))",
        why="a sign",
        invariant="(T-Few 2)",
    ),
    Mutant(
        name="unlikelihood as minus likelihood",
        file=FILE,
        find="return -torch.log1p(e - p).sum() / max(1, len(p))",
        replace="return p.log().sum() / max(1, len(p))",
        why="pushing log p down directly, without a bound",
        invariant="(T-Few 2): bounded where the wrong choice is certain",
    ),
    Mutant(
        name="unlikelihood of the right choice",
        file=FILE,
        find="    p = log_probs[~right].exp()",
        replace="    p = log_probs[right].exp()",
        why="the mask not inverted",
        invariant="(T-Few 2)",
    ),
    Mutant(
        name="likelihood of every choice",
        file=FILE,
        find="return -log_probs[right].mean()",
        replace="return -log_probs.mean()",
        why="all rows have labels",
        invariant="(T-Few 1)",
    ),
    Mutant(
        name="no length normalisation",
        file=FILE,
        find=("return total / row.bincount(minlength=rows).to(total.dtype) ** power"),
        replace="return total",
        why="the sum is the log-probability of the choice",
        invariant="(T-Few 3)",
    ),
    Mutant(
        name="divided by the padded length",
        file=FILE,
        find=("return total / row.bincount(minlength=rows).to(total.dtype) ** power"),
        replace="return total / float(row.bincount().max()) ** power",
        why="the length of the batch, not of the row",
        invariant="(T-Few 3): T_c of each choice",
    ),
    Mutant(
        name="compared over the whole batch",
        file=FILE,
        find="        mine = example == n\n",
        replace=(
            "        mine = torch.ones_like(correct)\n"
            "        mine = mine & (~correct | (example == n))\n"
        ),
        why="one softmax for all rows",
        invariant="(T-Few 4): softmax over the choices of one example",
    ),
    Mutant(
        name="the worst choice wins",
        file=FILE,
        find="own.argmax() for own in",
        replace="own.argmin() for own in",
        why="losses are minimised, scores are not",
        invariant="(T-Few 6)",
    ),
    Mutant(
        name="the prompt is scored too",
        file=FILE,
        find=("        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]"),
        replace="        labels[row, : len(text) - 1] = text[1:]",
        why="language-model labels for the whole text",
        invariant="labels are -100 outside the choice",
    ),
    Mutant(
        name="labels one too late",
        file=FILE,
        find=("        labels[row, len(prompt) - 1 : len(text) - 1] = text[len(prompt) :]"),
        replace=("        labels[row, len(prompt) : len(text) - 1] = text[len(prompt) + 1 :]"),
        why="the first token of the choice is thought to be given",
        invariant="labels are aligned",
    ),
    Mutant(
        name="the start does not reach the model",
        file=FILE,
        find="model.features(ids, start)",
        replace="model.features(ids)",
        why="positions from 0 always",
        invariant="the start reaches the positions",
    ),
    Mutant(
        name="answers without their end",
        file=FILE,
        find="(*tokenizer.encode(choice), tokenizer.eot) for choice",
        replace="tuple(tokenizer.encode(choice)) for choice",
        why="eot is thought to belong to generation",
        invariant="the first term is the loss of training on the texts",
    ),
    Mutant(
        name="a prompt without its beginning",
        file=FILE,
        find="prompt = (tokenizer.eot, *tokenizer.encode(x.prompt))",
        replace="prompt = tuple(tokenizer.encode(x.prompt))",
        why="eot is thought to end a text only",
        invariant="the first term is the loss of training on the texts",
    ),
    Mutant(
        name="the first choice is the right one",
        file=FILE,
        find="Example(prompt, answers, choices.index(x.completion))",
        replace="Example(prompt, answers)",
        why="the default of Example",
        invariant="the right choice is the example's completion",
    ),
    Mutant(
        name="ranking with dropout",
        file=FILE,
        find="    with evaluating(model):\n",
        replace="    with torch.no_grad():\n",
        why="no gradient is taken for evaluation mode",
        invariant="rank classification draws no dropout",
    ),
    Mutant(
        name="the weights are ignored",
        file=FILE,
        find="sum(weight * loss for weight, loss",
        replace="sum(loss for weight, loss",
        why="the three are simply added",
        invariant="(T-Few 5) with weights",
    ),
    Mutant(
        name="examples looked up by their place in the batch",
        file=FILE,
        find="self.examples[i] for i in batch.indices",
        replace="self.examples[i] for i, _ in enumerate(batch.indices)",
        why="the data are thought to arrive in order",
        invariant="(T-Few 5): the batch's examples",
    ),
]
