"""What goes wrong in AdaLoRA."""

from tests.mutants import Mutant

FILE = "minipeft/low_rank/adalora.py"
TESTS = ["tests/test_adalora.py", "tests/parity/test_adalora_peft.py", "tests/contract -k AdaLoRA"]

MUTANTS = [
    Mutant(
        name='alpha not divided',
        file=FILE,
        find='return alpha / (init_rank + 1e-5)',
        replace='return alpha',
        why='alpha taken as the scale',
        invariant='(AdaLoRA 2)',
    ),
    Mutant(
        name='the values start at random',
        file=FILE,
        find=(
            'nn.Parameter(torch.zeros(rank, **place)) if shared is None else shared.E'
        ),
        replace=(
            'nn.Parameter(torch.randn(rank, **place)) if shared is None else shared.E'
        ),
        why='all three factors drawn alike',
        invariant='point 1: the start is the base',
    ),
    Mutant(
        name='penalty on the wrong side',
        file=FILE,
        find='return P.T @ P - eye, Q @ Q.T - eye',
        replace='return P.T @ P - eye, Q @ Q.T - P.T @ P',
        why='a slip while copying the line',
        invariant='(AdaLoRA 3) (AdaLoRA 4)',
    ),
    Mutant(
        name='norms squared in the mean',
        file=FILE,
        find='return sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)',
        replace='return sum(gap.square().sum() for gap in gaps) / len(gaps)',
        why='the paper squares them',
        invariant="(AdaLoRA 4) is peft's",
    ),
    Mutant(
        name='penalty summed, not averaged',
        file=FILE,
        find='return sum(torch.linalg.norm(gap) for gap in gaps) / len(gaps)',
        replace='return sum(torch.linalg.norm(gap) for gap in gaps)',
        why='the paper sums them',
        invariant='(AdaLoRA 4) is a mean',
    ),
    Mutant(
        name='sensitivity without the size',
        file=FILE,
        find='return (weight * gradient).abs()',
        replace='return weight * gradient',
        why='the bars around w dL/dw overlooked',
        invariant='(AdaLoRA 5)',
    ),
    Mutant(
        name='no moving average',
        file=FILE,
        find='    M = beta1 * M + (1 - beta1) * I\n',
        replace='    M = I\n',
        why='the sensitivity of this step is at hand',
        invariant='(AdaLoRA 6)',
    ),
    Mutant(
        name='uncertainty from the old average',
        file=FILE,
        find='return M, beta2 * U + (1 - beta2) * (I - M).abs()',
        replace=(
            'return M, beta2 * U + (1 - beta2) * (I - (M - (1 - beta1) * I) / '
            'beta1).abs()'
        ),
        why='both averages computed side by side',
        invariant='(AdaLoRA 7): with the new M',
    ),
    Mutant(
        name='score without the vectors',
        file=FILE,
        find='return E + P.mean(0) + Q.mean(1)',
        replace='return E',
        why='the singular value alone decides in an SVD',
        invariant='(AdaLoRA 8)',
    ),
    Mutant(
        name='sums for means',
        file=FILE,
        find='return E + P.mean(0) + Q.mean(1)',
        replace='return E + P.sum(0) + Q.sum(1)',
        why='a mean forgotten',
        invariant='(AdaLoRA 8)',
    ),
    Mutant(
        name='linear schedule',
        file=FILE,
        find='(first - last) * left**3',
        replace='(first - last) * left',
        why='linear for cubic',
        invariant='(AdaLoRA 9)',
    ),
    Mutant(
        name='the budget starts to fall at once',
        file=FILE,
        find='    if step <= warm:\n        return first\n',
        replace='',
        why='the warm-up forgotten',
        invariant='(AdaLoRA 9)',
    ),
    Mutant(
        name='the least important stay',
        file=FILE,
        find='key=lambda triplet: -triplet[2]',
        replace='key=lambda triplet: triplet[2]',
        why='sorted the wrong way round',
        invariant='(AdaLoRA 10)',
    ),
    Mutant(
        name='a budget for each matrix',
        file=FILE,
        find='    for path, i, _ in order[:keep]:\n        kept[path][i] = True\n',
        replace=(
            '    for path, row in scores.items():\n'
            '        kept[path][row.argsort(descending=True)[: keep // len(scores)]] '
            '= True\n'
        ),
        why='per matrix for global',
        invariant='(AdaLoRA 10): the best of all matrices stay',
    ),
    Mutant(
        name='P and Q masked from the start',
        file=FILE,
        find='    if for_good:\n',
        replace='    if True:\n',
        why='a triplet that is off is off',
        invariant='a switched-off triplet can come back',
    ),
    Mutant(
        name='never fixed',
        file=FILE,
        find='                switch_off(layers, kept[path], last)\n',
        replace='                switch_off(layers, kept[path], False)\n',
        why='the last phase looks like the others',
        invariant='the file holds the final ranks only',
    ),
    Mutant(
        name='momentum revives after the end',
        file=FILE,
        find=(
            '        if not all(layers[0].kept.all() for layers in groups.values()): '
            ' # the choice stands\n'
            '            for layers in groups.values():\n'
            '                switch_off(layers, layers[0].kept, True)\n'
            '            return\n'
        ),
        replace=(
            '        if not all(layers[0].kept.all() for layers in groups.values()):\n'
            '            return\n'
        ),
        why='once masked, always masked',
        invariant='the ranks at the end are exactly the budget',
    ),
    Mutant(
        name='the trap never springs',
        file=FILE,
        find='        if trained and not attachment.state.get("allocator_steps"):',
        replace='        if False:',
        why='the check is in the way',
        invariant='training without the allocator is an error',
    ),
    Mutant(
        name='the trap is lost in a copy',
        file=FILE,
        find=(
            "    def __setstate__(self, state):  # a deep copy's tensors have no "
            'hooks\n'
            '        super().__setstate__(state)\n'
            '        self.watch()\n'
        ),
        replace='',
        why='hooks are thought to be copied',
        invariant='the trap holds in a copy trained later',
    ),
    Mutant(
        name='shared triplets scored without k and v',
        file=FILE,
        find='triplet_scores(torch.cat(parts[:-2]), *parts[-2:])',
        replace='triplet_scores(parts[0], *parts[-2:])',
        why='only the first wrapper of the group looked at',
        invariant='(AdaLoRA 8) with P the three blocks',
    ),
    Mutant(
        name='dropout in eval',
        file=FILE,
        find='self.inner(x), self.drop(x), self.right()',
        replace=(
            'self.inner(x), torch.nn.functional.dropout(x, self.drop.p), self.right()'
        ),
        why='the functional form drops always',
        invariant='dropout falls in training only',
    ),
]
