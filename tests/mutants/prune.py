"""What goes wrong in minipeft prune and minipeft shrink."""

from tests.mutants import Mutant

FILE = "minipeft/prune.py"
TESTS = ["tests/test_prune.py"]

MUTANTS = [
    Mutant(
        name="nothing asked is fine",
        file=FILE,
        find="    if not any(wanted):",
        replace="    if all(wanted):",
        why="an empty request does no harm",
        invariant="nothing to take out is an error",
    ),
    Mutant(
        name="zeros forgotten in training",
        file=FILE,
        find="        KeepZeros().attach(model)\n",
        replace=(
            "        from minipeft.selective.full import FullFineTuning\n"
            "\n"
            "        FullFineTuning().attach(model)\n"
        ),
        why="training on is training",
        invariant="a pattern stays through training",
    ),
    Mutant(
        name="saved before it is trained on",
        file=FILE,
        find="    if options.steps:\n        KeepZeros",
        replace=(
            "    model.save_pretrained(options.out)\n"
            "    model = copy.deepcopy(model)\n"
            "    if options.steps > 10**6:\n"
            "        KeepZeros"
        ),
        why="steps is for fine-tuning",
        invariant="trained on when asked",
    ),
    Mutant(
        name="wanda for sparsegpt",
        file=FILE,
        find='"sparsegpt": prune_sparsegpt}[options.method]',
        replace='"sparsegpt": prune_wanda}[options.method]',
        why="a line copied",
        invariant="the methods choose different weights",
    ),
    Mutant(
        name="the pattern is not passed on",
        file=FILE,
        find='how = {"sparsity": options.sparsity, "pattern": options.pattern}',
        replace='how = {"sparsity": options.sparsity or 0.5, "pattern": None}',
        why="half is half",
        invariant="2:4 where asked",
    ),
    Mutant(
        name="the scope is not passed on",
        file=FILE,
        find="prune_magnitude(model, scope=options.scope, **how)",
        replace="prune_magnitude(model, **how)",
        why="the default will do",
        invariant="global when asked",
    ),
    Mutant(
        name="heads ranked as neurons",
        file=FILE,
        find="least_important(MEASURES[importance](model, batches, kind), share)",
        replace='least_important(MEASURES[importance](model, batches, "neurons"), share)',
        why="one list for both",
        invariant="heads by heads' importance",
    ),
    Mutant(
        name="the most important go",
        file=FILE,
        find="least_important(MEASURES[importance](model, batches, kind), share)",
        replace=(
            "least_important([-i for i in MEASURES[importance](model, batches, kind)], share)"
        ),
        why="a sign",
        invariant="the least important go",
    ),
    Mutant(
        name="taylor is gates",
        file=FILE,
        find='"taylor": taylor_importance}',
        replace='"taylor": gate_importance}',
        why="a line copied",
        invariant="the measure asked for",
    ),
    Mutant(
        name="neurons are left",
        file=FILE,
        find='return prune_neurons(model, chosen.get("neurons", {}))',
        replace="return model",
        why="heads are enough",
        invariant="heads and neurons go for real",
    ),
    Mutant(
        name="one round for all",
        file=FILE,
        find="lambda m, k: measure(m, batches, k), options.rounds)",
        replace="lambda m, k: measure(m, batches, k))",
        why="the default will do",
        invariant="as many rounds as asked for",
    ),
    Mutant(
        name="every round takes all that is due so far",
        file=FILE,
        find="due[k] - out[k]) for k in goals}",
        replace="due[k]) for k in goals}",
        why="what is gone already is forgotten",
        invariant="exactly the share that was asked for",
    ),
    Mutant(
        name="each layer in its own norm",
        file=FILE,
        find="torch.cat(importances).argsort",
        replace="torch.cat([i / i.double().norm() for i in importances]).argsort",
        why="(Importance 4)",
        invariant="the lowest anywhere, in the units of the loss",
    ),
    Mutant(
        name="blocks are left",
        file=FILE,
        find="        prune_blocks(model, options.blocks)\n",
        replace="        list(options.blocks)\n",
        why="the rest is named first",
        invariant="blocks go for real",
    ),
    Mutant(
        name="the base teaches",
        file=FILE,
        find="teacher = NetworkTeacher(tuned,",
        replace="teacher = NetworkTeacher(base,",
        why="the original is the base",
        invariant="the student learns from the fine-tuned model",
    ),
    Mutant(
        name="temperature and alpha swapped",
        file=FILE,
        find="NetworkTeacher(tuned, options.temperature, options.alpha)",
        replace="NetworkTeacher(tuned, options.alpha, options.temperature / 10)",
        why="two numbers in a row",
        invariant="the teacher's options are the user's",
    ),
    Mutant(
        name="the student is not trained",
        file=FILE,
        find="    train(student, rows, training(options, steps=steps), loss_fn=teacher)\n",
        replace="    teacher\n",
        why="pruning is the last step",
        invariant="the student moved on",
    ),
    Mutant(
        name="quantised without distilling",
        file=FILE,
        find="packed = quantize_model(copy.deepcopy(student.cpu()))",
        replace="packed = copy.deepcopy(student.cpu())",
        why="it is small enough",
        invariant="the quantised model is smaller",
    ),
    Mutant(
        name="packed weights are not counted",
        file=FILE,
        find="    return plain + sum(",
        replace="    return plain + 0 * sum(",
        why="parameters() knows",
        invariant="numbers are counted once",
    ),
    Mutant(
        name="the tied head counted twice",
        file=FILE,
        find="tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}",
        replace=(
            "tensors = dict(enumerate((*model.parameters(), model.head.weight, *model.buffers())))"
        ),
        why="every module's tensors",
        invariant="bytes are counted once",
    ),
    Mutant(
        name="fine-tuning in place",
        file=FILE,
        find="    tuned = copy.deepcopy(base)\n",
        replace="    tuned = base\n",
        why="a copy costs memory",
        invariant="the base stays the base in the table",
    ),
    Mutant(
        name="no steps are all steps",
        file=FILE,
        find="    steps = material.steps if options.steps is None else options.steps\n",
        replace="    steps = options.steps or material.steps\n",
        why="or is shorter",
        invariant="steps=0 is named, not replaced",
    ),
    Mutant(
        name="options looked at when they are needed",
        file=FILE,
        find="    check_shrink(options)\n",
        replace="",
        why="whoever uses them will complain",
        invariant="bad options are named before the first step",
    ),
    Mutant(
        name="the measurement before the complaint",
        file=FILE,
        find="    check(options)\n",
        replace="",
        why="whoever uses them will complain",
        invariant="bad options are named before anything is computed",
    ),
    Mutant(
        name="the pipeline takes every layer alike",
        file=FILE,
        find="    take_units(small, batches, options)\n",
        replace="    shrink_layers(small, batches, options.heads, options.neurons)\n",
        why="all layers look alike",
        invariant="the pipeline takes its units from the whole model, in rounds",
    ),
]
