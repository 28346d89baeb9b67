"""What goes wrong in measuring what pruning costs."""

from tests.mutants import Mutant

FILE = "minipeft/prune_study.py"
TESTS = ['tests/test_prune_study.py -k "not committed"']

MUTANTS = [
    Mutant(
        name="the base is pruned in place",
        file=FILE,
        find="            model = copy.deepcopy(bench.base)\n            if act is None",
        replace="            model = bench.base\n            if act is None",
        why="a copy costs memory",
        invariant="every arm starts from the base",
    ),
    Mutant(
        name="one text for all seeds",
        file=FILE,
        find="town.pretraining_documents(seed + 1, count)",
        replace="town.pretraining_documents(1, count)",
        why="the seed is for training",
        invariant="the seed draws the text",
    ),
    Mutant(
        name="measured again",
        file=FILE,
        find="            if (name, seed) in done:\n",
        replace="            if (name, seed, 0) in done:\n",
        why="results are cheap",
        invariant="what is there is not measured again",
    ),
    Mutant(
        name="another plan goes on",
        file=FILE,
        find='        if results["plan"] != plan.settings():',
        replace='        if results["plan"] is None:',
        why="the folder is the user's",
        invariant="results of another plan are refused",
    ),
    Mutant(
        name="the dense round left out",
        file=FILE,
        find=(
            '        found["winning ticket"][kept] = ticket.outcome\n'
            "        if ticket.round == 0:\n"
            "            continue\n"
        ),
        replace=(
            "        if ticket.round == 0:\n"
            "            continue\n"
            '        found["winning ticket"][kept] = ticket.outcome\n'
        ),
        why="the dense model is no ticket",
        invariant="the dense run is part of the curve",
    ),
    Mutant(
        name="tickets lose a fifth",
        file=FILE,
        find="plan.rounds, rate=0.5)",
        replace="plan.rounds, rate=0.2)",
        why="the paper's rate",
        invariant="halved each round",
    ),
    Mutant(
        name="the other start is the same",
        file=FILE,
        find="torch.manual_seed(seed)\n        return GPT",
        replace="torch.manual_seed(0)\n        return GPT",
        why="seeds are for texts",
        invariant="another start is another",
    ),
    Mutant(
        name="spread of one over n",
        file=FILE,
        find="statistics.stdev(numbers)",
        replace="statistics.pstdev(numbers)",
        why="the other standard deviation",
        invariant="mean and spread over seeds",
    ),
    Mutant(
        name="the best seed for the mean",
        file=FILE,
        find='return f"{statistics.mean(numbers):.3f} ±',
        replace='return f"{min(numbers):.3f} ±',
        why="the best run is shown",
        invariant="mean and spread over seeds",
    ),
    Mutant(
        name="2:4 is half",
        file=FILE,
        find='"2:4": {"pattern": (2, 4)}',
        replace='"2:4": {"sparsity": 0.5}',
        why="the same number of zeros",
        invariant="six different arms",
    ),
    Mutant(
        name="SparseGPT is Wanda",
        file=FILE,
        find='"SparseGPT": prune_sparsegpt}',
        replace='"SparseGPT": prune_wanda}',
        why="a line copied",
        invariant="six different arms",
    ),
    Mutant(
        name="pieces of the same size as the goal",
        file=FILE,
        find='rounds = round(share / plan.piece) if route == "again" else 1',
        replace="rounds = 1",
        why="one round is quicker",
        invariant="a piece at a time",
    ),
    Mutant(
        name="neurons only",
        file=FILE,
        find="shrink_anywhere(model, share, share,",
        replace="shrink_anywhere(model, 0, share,",
        why="heads are few",
        invariant="exactly the share of heads and of neurons",
    ),
    Mutant(
        name="the same text again and again",
        file=FILE,
        find="self.rows[: plan.steps * plan.batch_size]",
        replace="self.rows[: plan.batch_size]",
        why="an epoch is an epoch",
        invariant="training on reads every document once",
    ),
    Mutant(
        name="speed upside down",
        file=FILE,
        find="first['seconds'] / s['seconds']",
        replace="s['seconds'] / first['seconds']",
        why="time for speed",
        invariant="speed against the base",
    ),
    Mutant(
        name="one sparsity for two",
        file=FILE,
        find="MagnitudePruning(sparsity, gradual=on_schedule)",
        replace="MagnitudePruning(bench.plan.sparsities[0], gradual=on_schedule)",
        why="a constant left from one sparsity",
        invariant="four different arms",
    ),
    Mutant(
        name="the base's share forgotten in the curve",
        file=FILE,
        find='statistics.mean(numbers) - results["base"])\n        for',
        replace="statistics.mean(numbers))\n        for",
        why="nats are nats",
        invariant="above the base",
    ),
]
