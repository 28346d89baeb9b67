"""What goes wrong around a comparison of labels."""

from tests.mutants import Mutant

FILE = "minipeft/distill.py"
TESTS = ['tests/test_distill.py -k "not committed"']

MUTANTS = [
    Mutant(
        name="the documents that the teacher was trained on",
        file=FILE,
        find="    texts = town.pretraining_documents(seed + 1, count)",
        replace="    texts = town.pretraining_documents(seed, count)",
        why="seed 0 is the natural first seed",
        invariant="documents are new to the base",
    ),
    Mutant(
        name="one set of documents for all seeds",
        file=FILE,
        find="    texts = town.pretraining_documents(seed + 1, count)",
        replace="    texts = town.pretraining_documents(1, count)",
        why="only the order seems to need a seed",
        invariant="different for each seed",
    ),
    Mutant(
        name="the test set is learned too",
        file=FILE,
        find="        return parted(read_examples(options.data))",
        replace="        x = read_examples(options.data)\n        return x, parted(x)[1]",
        why="a slice forgotten",
        invariant="a part of the file is held out",
    ),
    Mutant(
        name="the stories' truth for the mix",
        file=FILE,
        find="    kind = town.mix()\n",
        replace=(
            "    from minipeft.town.documents import story_with_tail\n"
            "    from minipeft.town.documents import of\n\n"
            "    kind = of(town.WORLD, story_with_tail)\n"
            "    examples = [Example(completion=text) for text in town.held_out('story')]\n"
        ),
        why="stories are what one thinks of",
        invariant="the tables give the documents their true probability",
    ),
    Mutant(
        name="samples with one seed",
        file=FILE,
        find="        seed = options.seed * len(prompts) + i",
        replace="        seed = options.seed",
        why="the same call again, with the same prompts",
        invariant="sampled documents all differ",
    ),
    Mutant(
        name="samples where an answer is wanted",
        file=FILE,
        find='    how = {"num_beams": BEAMS} if answering else {}',
        replace="    how = {}",
        why="generate samples by default",
        invariant="the teacher's best answer to a prompt",
    ),
    Mutant(
        name="finished runs run again",
        file=FILE,
        find="        missing = [arm for arm in ARMS if (arm, seed) not in done]",
        replace="        missing = list(ARMS)",
        why="done is computed and not used",
        invariant="a study goes on where it was",
    ),
    Mutant(
        name="arms from different starts",
        file=FILE,
        find="        student = student_of(options, teacher, tokenizer, examples)\n        data,",
        replace=(
            "        student = student_of(options, teacher, tokenizer, examples)\n"
            "        if ARMS[arm] == 'hard':\n"
            "            student = GPT(student.config)\n        data,"
        ),
        why="the baseline is 'trained from scratch'",
        invariant="all arms start from the same student",
    ),
    Mutant(
        name="every arm learns from the teacher",
        file=FILE,
        find="labels=ARMS[arm], seed=seed",
        replace='labels="teacher", seed=seed',
        why="a constant left from trying out",
        invariant="three different results",
    ),
    Mutant(
        name="importances of the first layers for the last",
        file=FILE,
        find="least_important([importance[m] for m in chosen], options.neurons)",
        replace="least_important(importance[: options.layers], options.neurons)",
        why="layer k of the student is layer k of the teacher",
        invariant="the teacher's least important neurons of the layers taken over",
    ),
    Mutant(
        name="neurons ranked in the student",
        file=FILE,
        find='    importance = gate_importance(teacher, batches, "neurons")\n',
        replace=(
            '    importance = gate_importance(student, batches, "neurons")\n'
            "    importance = [importance[0]] * 3 + [importance[-1]]\n"
        ),
        why="the neurons that go are the student's",
        invariant="ranked where the model still works",
    ),
    Mutant(
        name="matching weights not passed on",
        file=FILE,
        find="{name: getattr(options, name) for name in SOFT}",
        replace="{n: getattr(options, n) for n in (*SOFT[:2], SOFT[-1])}",
        why="flags added later",
        invariant="layers are matched where asked",
    ),
    Mutant(
        name="options that do nothing",
        file=FILE,
        find="    check_uses(options)\n",
        replace="",
        why="they do no harm",
        invariant="an option that these labels do not use is named",
    ),
    Mutant(
        name="resumed with another lecture",
        file=FILE,
        find="    if options.resume and path.exists():\n",
        replace="    if options.resume and not path.parent.exists():\n",
        why="the checkpoint holds everything",
        invariant="a run goes on as it was or not at all",
    ),
    Mutant(
        name="the first lecture of a folder stays",
        file=FILE,
        find="        if step == 1:  # not",
        replace="        if step == 1 and not (options.out / LECTURE).exists():  # not",
        why="what is there is not overwritten",
        invariant="a new run in a folder is noted",
    ),
]
