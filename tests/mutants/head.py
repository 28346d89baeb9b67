"""What goes wrong in a classifying head."""

from tests.mutants import Mutant

FILE = "minipeft/head.py"
TESTS = ["tests/test_head.py", "tests/contract -k Head"]

MUTANTS = [
    Mutant(
        name="reads the padding",
        file=FILE,
        find="last = -1 if lengths is None else lengths - 1",
        replace="last = -1",
        why="x[:, -1] is the last token, of rows without padding",
        invariant="(Head 1): the last real token",
    ),
    Mutant(
        name="one after the last real token",
        file=FILE,
        find="last = -1 if lengths is None else lengths - 1",
        replace="last = -1 if lengths is None else (lengths).clamp(max=x.shape[1] - 1)",
        why="a length is not an index",
        invariant="(Head 1)",
    ),
    Mutant(
        name="reads the first token",
        file=FILE,
        find="last = -1 if lengths is None else lengths - 1",
        replace="last = 0",
        why="BERT's [CLS] stands in front",
        invariant="(Head 1): the last token has read everything",
    ),
    Mutant(
        name="the mean over the row",
        file=FILE,
        find="x = x[torch.arange(x.shape[0], device=x.device), last]",
        replace="x = x.mean(1)",
        why="another pooling",
        invariant="(Head 1); padding does not change the decision",
    ),
    Mutant(
        name="per token is ignored",
        file=FILE,
        find="self.pools = not per_token",
        replace="self.pools = True",
        why="the option is read and forgotten",
        invariant="(Head 2)",
    ),
    Mutant(
        name="no bias",
        file=FILE,
        find="return nn.functional.linear(x, self.weight, self.bias)",
        replace="return nn.functional.linear(x, self.weight)",
        why="the language-model head has none",
        invariant="(Head 1)",
    ),
    Mutant(
        name="starts with torch's own initialisation",
        file=FILE,
        find="nn.init.normal_(self.weight, 0.0, 0.02)",
        replace="nn.init.kaiming_uniform_(self.weight, a=5**0.5)",
        why="what nn.Linear does",
        invariant="the initialisation table",
    ),
    Mutant(
        name="the bias random",
        file=FILE,
        find="torch.zeros(num_labels, **place)",
        replace="torch.randn(num_labels, **place)",
        why="everything starts random",
        invariant="the initialisation table",
    ),
    Mutant(
        name="the bias not counted",
        file=FILE,
        find="return self.num_labels * (config.d_model + 1)",
        replace="return self.num_labels * config.d_model",
        why="C D",
        invariant="C D + C",
    ),
    Mutant(
        name="a single class is accepted",
        file=FILE,
        find="if self.num_labels < 2:",
        replace="if self.num_labels < 1:",
        why="one score for a yes-or-no question",
        invariant="bad settings are named",
    ),
    Mutant(
        name="merges silently",
        file=FILE,
        find='cannot_merge: ClassVar[str | None] = "a classifier is no language-model head"',
        replace="cannot_merge: ClassVar[str | None] = None",
        why="nothing was said about it",
        invariant="merging is an error that says why",
    ),
]
