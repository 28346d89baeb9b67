"""What goes wrong in the study of T-Few's terms."""

from tests.mutants import Mutant

FILE = "minipeft/t_few_study.py"
TESTS = ["tests/test_t_few_study.py"]

MUTANTS = [
    Mutant(
        name="the second row has the third term",
        file=FILE,
        find="(1.0, 1.0, 0.0)",
        replace="(1.0, 0.0, 1.0)",
        why="the order of three weights",
        invariant="one term after the other is added",
    ),
    Mutant(
        name="labels said the wrong way round",
        file=FILE,
        find='{"yes": " yes .", "no": " no ."}',
        replace='{"yes": " no .", "no": " yes ."}',
        why="two words in a dictionary",
        invariant="the short form is the task's own",
    ),
    Mutant(
        name="one form for all",
        file=FILE,
        find="FORMS[form][x.label], x.label)",
        replace='FORMS["short answers"][x.label], x.label)',
        why="the first form left in",
        invariant="each form says labels in its words",
    ),
    Mutant(
        name="sum and mean exchanged",
        file=FILE,
        find='{"mean": 1.0, "sum": 0.0}',
        replace='{"mean": 0.0, "sum": 1.0}',
        why="the power is of the length that divides",
        invariant="by the sum the short answer wins where all tokens are alike",
    ),
    Mutant(
        name="all examples",
        file=FILE,
        find='TASKS["mood"].train(seed)[: plan.examples]',
        replace='TASKS["mood"].train(seed)',
        why="the few are forgotten",
        invariant="a run learns from as many examples as the plan says",
    ),
    Mutant(
        name="one draw of examples",
        file=FILE,
        find='TASKS["mood"].train(seed)[',
        replace='TASKS["mood"].train(0)[',
        why="the default seed",
        invariant="a seed draws the examples, too",
    ),
    Mutant(
        name="the weights do not reach the loss",
        file=FILE,
        find="loss_fn=TFewLoss(asked, weights)",
        replace="loss_fn=TFewLoss(asked)",
        why="a default is there",
        invariant="the losses differ in their weights",
    ),
    Mutant(
        name="rows lose their seeds",
        file=FILE,
        find='(c["form"], c["loss"]) == chosen',
        replace='(c["form"], c["loss"]) == chosen and not c["seed"]',
        why="a filter of a first look left in",
        invariant="the table shows means over the seeds",
    ),
    Mutant(
        name="steps not passed on",
        file=FILE,
        find="TFewPlan(given.examples, given.steps, tuple(given.seeds))",
        replace="TFewPlan(given.examples, seeds=tuple(given.seeds))",
        why="a default is there",
        invariant="the steps asked for",
    ),
]
