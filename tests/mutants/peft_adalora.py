"""What goes wrong between AdaLoRA and peft's files."""

from tests.mutants import Mutant

FILE = "minipeft/interop/peft_adalora.py"
TESTS = ["tests/parity/test_adalora_peft.py"]

MUTANTS = [
    Mutant(
        name="alpha unchanged in the joint form",
        file=FILE,
        find="alpha = alpha * (init_r + 1e-5) / (technique.init_rank + 1e-5)",
        replace="alpha = alpha * 1",
        why="the scale is thought to be alpha",
        invariant="(peft AdaLoRA 3)",
    ),
    Mutant(
        name="E as a vector",
        file=FILE,
        find="return P, E[:, None], Q,",
        replace="return P, E[None], Q,",
        why="a row for a column",
        invariant="peft opens the file",
    ),
    Mutant(
        name="blocks on top of each other",
        file=FILE,
        find="            column += 0 if shared else part.shape[1]",
        replace="            column += 0",
        why="every projection starts at the first column",
        invariant="(peft AdaLoRA 2)",
    ),
    Mutant(
        name="removed triplets are written",
        file=FILE,
        find=(
            '    Q, E = (torch.cat([getattr(l, k)[l.kept] for l in own]).detach() for k in "QE")'
        ),
        replace=('    Q, E = (torch.cat([getattr(l, k) for l in own]).detach() for k in "QE")'),
        why="E is 0 there anyway",
        invariant="the file holds the kept triplets alone",
    ),
    Mutant(
        name="no pattern is written",
        file=FILE,
        find="None if whole else kept), tensors",
        replace="None), tensors",
        why="the tensors have their ranks",
        invariant="peft opens pruned files",
    ),
    Mutant(
        name="patterns of their own length",
        file=FILE,
        find="mask.tolist() + [False] * (init_r - len(mask))",
        replace="mask.tolist()",
        why="each module has its own rank",
        invariant="one init_r for all modules",
    ),
    Mutant(
        name="the pattern is not read",
        file=FILE,
        find='    pattern = config.get("rank_pattern")\n',
        replace="    pattern = None\n",
        why="the tensors have their ranks",
        invariant="a pruned file of peft's opens",
    ),
    Mutant(
        name="P cut without its columns",
        file=FILE,
        find='parts |= {f"{path}.P": rows[:, columns]',
        replace='parts |= {f"{path}.P": rows',
        why="right where q, k and v share",
        invariant="(peft AdaLoRA 2) backwards",
    ),
    Mutant(
        name="each target reads the first truths",
        file=FILE,
        find="            start, column = start + r, columns.stop",
        replace="            start, column = start, columns.stop",
        why="the list is thought to be one a projection",
        invariant="(peft AdaLoRA 1) backwards",
    ),
    Mutant(
        name="r for init_r",
        file=FILE,
        find='peft.number(config, "init_r", 12), peft',
        replace='peft.number(config, "r", 12), peft',
        why="LoRA has it there",
        invariant="r means nothing in AdaLoRA",
    ),
    Mutant(
        name="alpha 0 is a scale of 0",
        file=FILE,
        find="alpha=alpha if alpha > 0 else init_r",
        replace="alpha=alpha",
        why="the number is there",
        invariant="without an alpha the scale is 1",
    ),
    Mutant(
        name="E of the scale forgotten",
        file=FILE,
        find="            out, into = projection_shape(model.config, targets[0])",
        replace="            into, out = projection_shape(model.config, targets[0])",
        why="in and out confused, which square projections hide",
        invariant="up and down open",
    ),
]
