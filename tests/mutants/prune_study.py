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
        find="town.pretraining_documents(seed + 1, plan.documents)",
        replace="town.pretraining_documents(1, plan.documents)",
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
        find='        if results["plan"] != asdict(plan):',
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
]
