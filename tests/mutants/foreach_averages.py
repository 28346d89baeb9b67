"""What goes wrong in averaging whole lists of tensors."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/foreach_averages.py"
TESTS = ["tests/test_foreach_averages.py"]

MUTANTS = [
    Mutant(
        name="no absolute value",
        file=FILE,
        find="    torch._foreach_abs_(sensitivities)\n",
        replace="",
        why="squares need none",
        invariant="(Allocator 1)",
    ),
    Mutant(
        name="signed uncertainty",
        file=FILE,
        find="    torch._foreach_abs_(uncertainties)\n",
        replace="",
        why="deviations average out",
        invariant="(Allocator 3)",
    ),
    Mutant(
        name="the uncertainty from the old M",
        file=FILE,
        find="uncertainties = torch._foreach_sub(sensitivities, new_M)",
        replace="uncertainties = torch._foreach_sub(sensitivities, Ms)",
        why="M is what was passed in",
        invariant="(Allocator 3): with the new M",
    ),
    Mutant(
        name="one beta for both",
        file=FILE,
        find="return new_M, moved(Us, uncertainties, beta2)",
        replace="return new_M, moved(Us, uncertainties, beta1)",
        why="both are 0.85 in the paper",
        invariant="(Allocator 3)",
    ),
    Mutant(
        name="the averages in place",
        file=FILE,
        find="    kept = torch._foreach_mul(averages, beta)\n",
        replace="    torch._foreach_mul_(averages, beta)\n    kept = list(averages)\n",
        why="the state is to change anyway",
        invariant="what was given is not written to",
    ),
    Mutant(
        name="the gradients in place",
        file=FILE,
        find="    sensitivities = torch._foreach_mul(weights, gradients)\n",
        replace="    torch._foreach_mul_(gradients, weights)\n    sensitivities = gradients\n",
        why="they are cleared afterwards",
        invariant="what was given is not written to",
    ),
    Mutant(
        name="one rounding",
        file=FILE,
        find="torch._foreach_add_(kept, torch._foreach_mul(values, 1 - beta))",
        replace="torch._foreach_add_(kept, values, alpha=1 - beta)",
        why="add takes a factor",
        invariant="the definition's bits",
    ),
    Mutant(
        name="weights exchanged",
        file=FILE,
        find="torch._foreach_mul(values, 1 - beta)",
        replace="torch._foreach_mul(values, beta)",
        why="beta on the new or on the old",
        invariant="(Allocator 2)",
    ),
    Mutant(
        name="taken where it loses",
        file="minipeft/low_rank/rank_allocator.py",
        find="return on_cpu and sum(t.numel() for t in tensors) <= 2048 * len(tensors)",
        replace="return on_cpu",
        why="fewer calls are fewer calls",
        invariant="it is taken for small tensors",
    ),
]
