"""What goes wrong in UniPELT's gates."""

from tests.mutants import Mutant

FILE = "minipeft/hybrid/gates.py"
TESTS = ["tests/test_gates.py", "tests/test_unipelt.py", "tests/contract -k UniPELT"]

MUTANTS = [
    Mutant(
        name="no sigmoid",
        file=FILE,
        find=".squeeze(-1).sigmoid()",
        replace=".squeeze(-1)",
        why="the linear layer is called gate",
        invariant="(Gate 1)",
    ),
    Mutant(
        name="tanh for sigmoid",
        file=FILE,
        find=".squeeze(-1).sigmoid()",
        replace=".squeeze(-1).tanh()",
        why="LLaMA-Adapter's",
        invariant="(Gate 1): in (0, 1)",
    ),
    Mutant(
        name="the future in the mean",
        file=FILE,
        find="return running_mean(g)[0]",
        replace="return sequence_mean(g)",
        why="the paper's formula",
        invariant="causality; (Gate 2)",
    ),
    Mutant(
        name="each token's own gate",
        file=FILE,
        find="return running_mean(g)[0]",
        replace="return g",
        why="the mean is smoothing",
        invariant="(Gate 2)",
    ),
    Mutant(
        name="sum for mean",
        file=FILE,
        find="return sums / (count +",
        replace="return sums / (1 + 0 * count + 0 *",
        why="the division forgotten",
        invariant="(Gate 2)",
    ),
    Mutant(
        name="divided by one less",
        file=FILE,
        find="torch.arange(1, g.shape[1] + 1, device=g.device)",
        replace="torch.arange(0, g.shape[1], device=g.device).clamp(min=1)",
        why="positions count from 0",
        invariant="(Gate 2): t tokens up to t",
    ),
    Mutant(
        name="the earlier sum forgotten",
        file=FILE,
        find="cache.state.get(key, 0.0), count)",
        replace="0.0, count)",
        why="each step starts anew",
        invariant="cached decoding equals uncached",
    ),
    Mutant(
        name="the earlier count forgotten",
        file=FILE,
        find="cache.state.get(key, 0.0), count)",
        replace="cache.state.get(key, 0.0))",
        why="the length of this part is at hand",
        invariant="cached decoding equals uncached",
    ),
    Mutant(
        name="padding in the sum",
        file=FILE,
        find="sums[:, -1:] if real is None else sums.gather(1, real[:, None] - 1)",
        replace="sums[:, -1:]",
        why="the last sum",
        invariant="a ragged row goes on from its last real token",
    ),
    Mutant(
        name="a sum one token late",
        file=FILE,
        find="sums.gather(1, real[:, None] - 1)",
        replace="sums.gather(1, (real[:, None]).clamp(max=sums.shape[1] - 1))",
        why="lengths used as indices",
        invariant="a ragged row goes on from its last real token",
    ),
    Mutant(
        name="the mean kept for the sum",
        file=FILE,
        find="cache.state[key] = sums[:, -1:] if",
        replace="cache.state[key] = G[:, -1:] if",
        why="the mean is what is needed",
        invariant="the cache keeps each gate's sum",
    ),
    Mutant(
        name="one sum for all gates",
        file=FILE,
        find="cache.state[key] = sums",
        replace='cache.state[key.partition("/")[0]] = sums',
        why="named after the attachment",
        invariant="each gate has a sum of its own",
    ),
    Mutant(
        name="the sum kept in the module",
        file=FILE,
        find="G, sums = running_mean(g, cache.state.get(key, 0.0), count)",
        replace=(
            "G, sums = running_mean(g, getattr(self, key, 0.0), count)\n"
            "        setattr(self, key, sums[:, -1:])"
        ),
        why="state lives where it is used",
        invariant="beams are reordered; no state leaks between batches",
    ),
    Mutant(
        name="padding in the row's mean",
        file=FILE,
        find="return ((g * inside).sum(1) / real)",
        replace="return ((g * inside).sum(1) / g.shape[1])",
        why="the mean over the whole tensor",
        invariant="(Gate 3): padding left out",
    ),
    Mutant(
        name="lengths unknown",
        file=FILE,
        find="return sequence_mean(g, self.real())",
        replace="return sequence_mean(g)",
        why="rows are equally long in the examples",
        invariant="(Gate 3): padding left out",
    ),
    Mutant(
        name="sums in half precision",
        file=FILE,
        find="g.to(torch.promote_types(g.dtype, torch.float32))",
        replace="g",
        why="it is fast",
        invariant="sums are kept in float32 at least",
    ),
    Mutant(
        name="weights at 1",
        file=FILE,
        find=".normal_(0.0, 0.02))",
        replace=".normal_(0.0, 1.0))",
        why="the usual normal",
        invariant="gates start near 1/2",
    ),
    Mutant(
        name="the pass is not forgotten",
        file=FILE,
        find="self.current.cache = self.current.prefix = None",
        replace="pass",
        why="the next pass overwrites it",
        invariant="a block forgets its pass",
    ),
    Mutant(
        name="not forgotten after an error",
        file=FILE,
        find=(
            "        try:\n"
            "            return self.inner(x, cache)\n"
            "        finally:\n"
            "            self.current.cache = self.current.prefix = None"
        ),
        replace=(
            "        y = self.inner(x, cache)\n"
            "        self.current.cache = self.current.prefix = None\n"
            "        return y"
        ),
        why="the usual order",
        invariant="a block forgets its pass, also after an error",
    ),
    Mutant(
        name="virtual tokens shown",
        file=FILE,
        find="G[:, -ids.shape[1] :]",
        replace="G",
        why="values for every position",
        invariant="only the text's gates are shown",
    ),
    Mutant(
        name="all attachments' gates",
        file=FILE,
        find='if g.key.startswith(f"{attachment.name}/")]',
        replace="]",
        why="walking the modules finds all of them",
        invariant="of two attachments each shows its own",
    ),
    Mutant(
        name="hooks stay on",
        file=FILE,
        find="hook.remove()",
        replace="pass",
        why="hooks are easy to forget",
        invariant="reading gates leaves no trace",
    ),
]
