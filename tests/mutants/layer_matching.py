"""What people get wrong in matching layers."""

from tests.mutants import Mutant

FILE = "minipeft/compressed/layer_matching.py"
TESTS = ["tests/test_layer_matching.py"]

MUTANTS = [
    Mutant(
        name="the first K layers",
        file=FILE,
        find="    return tuple((2 * k * (L - 1) + K - 1) // (2 * (K - 1)) for k in range(K))",
        replace="    return tuple(range(K))",
        why="layer k learns from layer k",
        invariant="(Match 1): first to first, last to last",
    ),
    Mutant(
        name="every second layer, the last left out",
        file=FILE,
        find="    return tuple((2 * k * (L - 1) + K - 1) // (2 * (K - 1)) for k in range(K))",
        replace="    return tuple(k * L // K for k in range(K))",
        why="'every other layer' begins at 0",
        invariant="(Match 1): the last to the last",
    ),
    Mutant(
        name="layers copied without their map",
        file=FILE,
        find="        block.load_state_dict(teacher.blocks[m].state_dict())",
        replace="        block.load_state_dict(teacher.blocks[0].state_dict())",
        why="the loop's variable is not used",
        invariant="a student's layers are the chosen ones",
    ),
    Mutant(
        name="the last LayerNorm stays new",
        file=FILE,
        find='    for name in ("embed", "ln_f"):',
        replace='    for name in ("embed",):',
        why="only layers and embeddings come to mind",
        invariant="a student of all layers is the teacher",
    ),
    Mutant(
        name="the blocks are the teacher's own",
        file=FILE,
        find="        block.load_state_dict(teacher.blocks[m].state_dict())",
        replace=(
            "        for path, p in teacher.blocks[m].named_parameters():\n"
            "            block.get_parameter(path).data = p.data"
        ),
        why="assignment in place of a copy: training the student changes the teacher",
        invariant="copies",
    ),
    Mutant(
        name="scores not divided by sqrt(d)",
        file=FILE,
        find="        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])",
        replace="        scores = q @ k.transpose(-1, -2)",
        why="the division happens inside the core",
        invariant="recorded scores are those of attention",
    ),
    Mutant(
        name="attention to the future",
        file=FILE,
        find="        return scores.masked_fill(~allowed, -math.inf)",
        replace="        return scores",
        why="the core is causal by itself, so the mask is None",
        invariant="a query does not see later keys",
    ),
    Mutant(
        name="hooks that stay",
        file=FILE,
        find="        for handle in handles:\n            handle.remove()\n",
        replace="        pass\n",
        why="nothing looks different",
        invariant="nothing is left behind",
    ),
    Mutant(
        name="the sum over layers",
        file=FILE,
        find="F.mse_loss(s, t) for s, t in _pairs(student, teacher)]).mean()",
        replace="F.mse_loss(s, t) for s, t in _pairs(student, teacher)]).sum()",
        why="losses are added up",
        invariant="(Match 2): the mean over layers",
    ),
    Mutant(
        name="the cosine itself",
        file=FILE,
        find="(1 - F.cosine_similarity(s, t, -1)).mean()",
        replace="F.cosine_similarity(s, t, -1).mean()",
        why="similarity taken for distance",
        invariant="(Match 3): 1 - cos",
    ),
    Mutant(
        name="attention's KL exchanged",
        file=FILE,
        find="[forward_kl(s, t) for s, t in _pairs(student, teacher)]",
        replace="[forward_kl(t, s) for s, t in _pairs(student, teacher)]",
        why="which of the two is the target",
        invariant="(Match 4): KL(A^t || A^s)",
    ),
    Mutant(
        name="the teacher follows the student",
        file=FILE,
        find="    pairs = [(s, t.detach()) for s, t in zip(student, teacher)]",
        replace="    pairs = [(s, t) for s, t in zip(student, teacher)]",
        why="no_grad is somebody else's business",
        invariant="the teacher gets no gradient",
    ),
    Mutant(
        name="padding matched",
        file=FILE,
        find="            ours = [_real(seen.hidden[k], T)[counts] for k in range(len(layers))]",
        replace=(
            "            counts = counts | True\n"
            "            ours = [_real(seen.hidden[k], T)[counts] for k in range(len(layers))]"
        ),
        why="hidden states have no labels",
        invariant="tokens whose label counts",
    ),
    Mutant(
        name="the first T positions",
        file=FILE,
        find="    return x[:, x.shape[1] - T :]",
        replace="    return x[:, :T]",
        why="virtual tokens are in front, not behind",
        invariant="virtual tokens are not compared",
    ),
    Mutant(
        name="one projection for all layers",
        file=FILE,
        find="                ours = [R(h) for R, h in zip(student.matching, ours)]",
        replace="                ours = [student.matching[0](h) for h in ours]",
        why="TinyBERT's W_h has no index in its formula",
        invariant="(Match 2): R_k",
    ),
    Mutant(
        name="a projection that swells",
        file=FILE,
        find="        nn.init.normal_(projection.weight, 0.0, inside**-0.5)",
        replace="        nn.init.normal_(projection.weight, 0.0, 1.0)",
        why="randn and be done",
        invariant="R ~ N(0, 1 / D_s)",
    ),
    Mutant(
        name="the widths of the config",
        file=FILE,
        find="    layers = [widths(teacher)[m] for m in chosen]\n",
        replace="    layers = widths(teacher)[: len(chosen)]\n",
        why="all layers are alike",
        invariant="layers that lost heads or neurons are copied as they are",
    ),
    Mutant(
        name="the mean over no heads",
        file=FILE,
        find="    means = [kl.sum() / max(1, kl.numel()) for kl in found]",
        replace="    means = [kl.mean() for kl in found]",
        why="mean is sum over number",
        invariant="a layer without heads has nothing to match",
    ),
    Mutant(
        name="means in half precision",
        file=FILE,
        find="    return [(s.to(dtype), t.to(dtype)) for (s, t), dtype in zip(pairs, dtypes)]\n",
        replace="    return pairs\n",
        why="a mean is a mean",
        invariant="sums are in float32 or better",
    ),
]
