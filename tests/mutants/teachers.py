"""What people get wrong around the teacher."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/teachers.py"
TESTS = ["tests/test_teachers.py"]

MUTANTS = [
    Mutant(
        name="the teacher stays in train mode",
        file=FILE,
        find="        with evaluating(self.teacher), recording(",
        replace="        with torch.no_grad(), recording(",
        why="no_grad is not eval",
        invariant="the teacher has no dropout",
    ),
    Mutant(
        name="the teacher reads at other positions",
        file=FILE,
        find="features(batch.ids, batch.start, lengths=batch.lengths)\n            loss_arguments",
        replace="features(batch.ids, lengths=batch.lengths)\n            loss_arguments",
        why="start has a default",
        invariant="both read the rows at batch.start",
    ),
    Mutant(
        name="teacher and student exchanged",
        file=FILE,
        find="linear_distillation_loss(x, model.head.weight, z, weight, *options)",
        replace="linear_distillation_loss(z, model.head.weight, x, weight, *options)",
        why="four tensors in a row",
        invariant="the gradient goes to the student",
    ),
    Mutant(
        name="the student's head on the teacher's features",
        file=FILE,
        find="            return z, self.teacher.head.weight",
        replace="            return z, self.teacher.head.weight * 1.01",
        why="a copy of the head that has drifted",
        invariant="the teacher's own logits",
    ),
    Mutant(
        name="matching in the place of distillation",
        file=FILE,
        find="        return loss + matching_loss(",
        replace="        return matching_loss(",
        why="an accumulation that overwrites",
        invariant="(Teacher 3): a sum",
    ),
    Mutant(
        name="the temperature ignored by the network",
        file=FILE,
        find="        options = (batch.labels.flatten(), self.temperature, self.alpha)",
        replace="        options = (batch.labels.flatten(), 1.0, self.alpha)",
        why="a default passed by hand",
        invariant="the distillation loss at T",
    ),
    Mutant(
        name="tables by place in the batch",
        file=FILE,
        find="enumerate(zip(batch.indices, batch.lengths.tolist()))",
        replace="enumerate(zip(range(len(batch.indices)), batch.lengths.tolist()))",
        why="works for the first batch of an unshuffled run",
        invariant="tables are found by the batch's indices",
    ),
    Mutant(
        name="log of a little more than zero",
        file=FILE,
        find="        truth = self.probabilities(batch, logits).log()",
        replace="        truth = (self.probabilities(batch, logits) + 1e-3).log()",
        why="against -inf, which the loss takes well",
        invariant="the true distribution",
    ),
    Mutant(
        name="the prompt is learned too",
        file=FILE,
        find="[IGNORE] * (len(prompt) - 1) + tokens[len(prompt) :]",
        replace="tokens[1:]",
        why="the labels of a document",
        invariant="the loss falls on what the teacher wrote",
    ),
    Mutant(
        name="the end is not learned",
        file=FILE,
        find="        new = new[: new.index(stop_token) + 1]",
        replace="        new = new[: new.index(stop_token)]",
        why="the stop token is stripped as in printing",
        invariant="the end is learned",
    ),
    Mutant(
        name="padding learned as text",
        file=FILE,
        find="    if stop_token in new:\n",
        replace="    if False:\n",
        why="rows of a batch have one length",
        invariant="nothing behind the end",
    ),
    Mutant(
        name="prompts of one length",
        file=FILE,
        find="max_new_tokens, stop_token=stop_token, lengths=lengths, **options",
        replace="max_new_tokens, stop_token=stop_token, **options",
        why="lengths are optional",
        invariant="each prompt as if it were alone",
    ),
    Mutant(
        name="labels one further",
        file=FILE,
        find="[IGNORE] * (len(prompt) - 1) + tokens[len(prompt) :]",
        replace="[IGNORE] * len(prompt) + tokens[len(prompt) + 1 :]",
        why="labels shifted twice",
        invariant="labels are aligned",
    ),
]
