"""Lab: AdaLoRA's allocator."""

from __future__ import annotations

import torch

import minipeft
from minipeft.labs.engine.case import check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.low_rank import rank_allocator as allocator

SENSITIVITY = Hint(
    "(Allocator 1): the sensitivity is the absolute value of w times its gradient",
    "To first order, how much does the loss change when w becomes 0? Does its direction matter?",
    ("sensitivity",),
)
AVERAGE = Hint(
    "(Allocator 2): M is a moving average over steps",
    "What is left of the last step's M after this step, in a share of beta1?",
    ("smooth",),
)
UNCERTAINTY = Hint(
    "(Allocator 3): the uncertainty is measured from the new M",
    "There are two Ms on the right-hand sides. Which one stands in (Allocator 3)?",
    ("smooth",),
)
SCORE = Hint(
    "(Allocator 4): the value's score and the means over both vectors, added",
    "Would a matrix of twice the width get twice the score? Should it?",
    ("triplet_scores",),
)
BUDGET = Hint(
    "(Allocator 5): b_0 until t_i, a cubic slope, b_T from T - t_f on",
    "Draw b(t). Where are the two flat parts, and how steep is the slope at its beginning?",
    ("budget",),
)
CHOICE = Hint(
    "(Allocator 6): the b(t) best of all matrices together stay, of equal ones the earlier",
    "May one matrix keep everything and another nothing? Which end of the order stays?",
    ("show_work", "allocate"),
)
RETURN = Hint(
    "(Allocator 6): only E is set to 0 before the end, so that a triplet can come back",
    "With P and Q at 0, what is the gradient of E? And of P, with E at 0?",
    ("switch_off",),
)
SHARED = Hint(
    "(Allocator 4) with a shared Q: P is that of all layers of the group",
    "Which layers belong to one triplet when q, k and v share it? Whose P is scored?",
    ("scores_after_step",),
)
STATE = Hint(
    "(Allocator 2) (Allocator 3): the averages live in `state`, from step to step",
    "Where is the M of the last step when this step begins? Whose gradient is multiplied?",
    ("scores_after_step",),
)

LAB = Lab(
    title="AdaLoRA's allocator: one budget for all ranks",
    about="""
    After every step each triplet (a left vector, a value, a right vector) gets a score from its
    weights and their gradients; as many as the budget allows stay, whichever matrix they are in.

    Everything is in the header of `rank_allocator.py`, (Allocator 1) to (Allocator 6). `show_work`
    returns every intermediate by name: write it first, `allocate` follows from it. `groups_of` and
    `weights_of` are given and walk over a model.
    """,
    files=("minipeft/low_rank/rank_allocator.py",),
    blanks=(
        "sensitivity",
        "smooth",
        "averages",
        "triplet_scores",
        "budget",
        "show_work",
        "scores_after_step",
        "switch_off",
    ),
    minutes=90,
    mistakes="""
    The uncertainty from the old average; sums for means; a budget for each matrix; a linear slope;
    P and Q set to 0 along with E, after which nothing ever comes back.
    """,
    bugs=(
        Bug(
            "sensitivity without the size",
            "return (weight * gradient).abs()",
            "return weight * gradient",
            SENSITIVITY,
        ),
        Bug("no moving average", "    M = beta1 * M + (1 - beta1) * I\n", "    M = I\n", AVERAGE),
        Bug(
            "uncertainty from the old average",
            "return M, beta2 * U + (1 - beta2) * (I - M).abs()",
            "return M, beta2 * U + (1 - beta2) * (I - (M - (1 - beta1) * I) / beta1).abs()",
            UNCERTAINTY,
        ),
        Bug("score without the vectors", "return E + P.mean(0) + Q.mean(1)", "return E", SCORE),
        Bug("linear schedule", "(first - last) * left**3", "(first - last) * left", BUDGET),
        Bug(
            "the least important stay",
            "key=lambda triplet: -triplet[2]",
            "key=lambda triplet: triplet[2]",
            CHOICE,
        ),
        Bug(
            "a budget for each matrix",
            "    for path, i, _ in order[:keep]:\n        kept[path][i] = True\n",
            "    for path, row in scores.items():\n"
            "        kept[path][row.argsort(descending=True)[: keep // len(scores)]] = True\n",
            CHOICE,
        ),
        Bug("P and Q masked at once", "    if for_good:\n", "    if True:\n", RETURN),
        Bug(
            "sums for means",
            "return E + P.mean(0) + Q.mean(1)",
            "return E + P.sum(0) + Q.sum(1)",
            SCORE,
        ),
        Bug(
            "the budget falls at once",
            "    if step <= warm:\n        return first\n",
            "",
            BUDGET,
        ),
        Bug(
            "shared triplets scored without k and v",
            "triplet_scores(torch.cat(parts[:-2]), *parts[-2:])",
            "triplet_scores(parts[0], *parts[-2:])",
            SHARED,
        ),
        Bug(
            "averages forgotten between steps",
            '    state.update({f"{n}.{k}": t for n, pair in both.items() '
            'for k, t in zip("MU", pair)})\n',
            "",
            STATE,
        ),
    ),
)


@LAB.invariant(5)
def sensitivity_is_a_size(case):
    """(Allocator 1): I = |w dL/dw|, never negative."""
    shape = case.sizes(2, 2, 9)
    w, g = case.normal(*shape), case.normal(*shape)
    wanted = torch.maximum(w * g, -w * g)
    close(allocator.sensitivity(w, g), wanted, "sensitivity")


@LAB.invariant(4)
def sensitivity_is_averaged_over_steps(case):
    """(Allocator 2): M <- b1 M + (1 - b1) I."""
    shape, b1 = case.sizes(2, 2, 6), case.number(0.6, 0.95)
    M, U, wanted = (torch.zeros(*shape, dtype=torch.float64) for _ in range(3))
    for _ in range(3):
        I = case.normal(*shape).abs()
        M, U = allocator.smooth(M, U, I, b1, 0.8)
        wanted = wanted * b1 + I - b1 * I
        close(M, wanted, "the smoothed sensitivity M")


@LAB.invariant(4)
def uncertainty_is_measured_from_the_new_average(case):
    """(Allocator 3): U <- b2 U + (1 - b2) |I - M|, with the new M."""
    shape, b2 = case.sizes(2, 2, 6), case.number(0.5, 0.95)
    M, U, I = (case.normal(*shape).abs() for _ in range(3))
    new, given = allocator.smooth(M, U, I, case.number(0.6, 0.95), b2)
    close(given, b2 * U + (I - new).abs() - b2 * (I - new).abs(), "the uncertainty U")


@LAB.invariant(7)
def a_triplet_s_score_is_a_sum_of_means(case):
    """(Allocator 4): the value's score, plus the mean over its column of P and its row of Q."""
    out, into, r = case.sizes(3, 2, 9)
    P, E, Q = case.normal(out, r), case.normal(r), case.normal(r, into)
    ones = torch.ones(out, dtype=P.dtype) / out, torch.ones(into, dtype=P.dtype) / into
    close(allocator.triplet_scores(P, E, Q), E + ones[0] @ P + Q @ ones[1], "triplet_scores")


@LAB.invariant(9)
def the_budget_is_flat_then_cubic_then_flat(case):
    """(Allocator 5): b_0 up to t_i, b_T from T - t_f on, a cubic slope between, whole numbers."""
    warm, slope, final = case.size(3, 9), case.size(20, 40), case.size(3, 9)
    last = case.size(4, 20)
    first, total = last + case.size(20, 60), warm + slope + final
    given = [allocator.budget(t, total, warm, final, first, last) for t in range(1, total + 1)]
    check(all(isinstance(b, int) for b in given), "a budget is no whole number")
    equal(given[:warm], [first] * warm, "the budget up to t_i")
    equal(given[total - final - 1 :], [last] * (final + 1), "the budget from T - t_f on")
    for t in range(warm + 1, total - final):
        left = (total - final - t) / slope
        exact = last + (first - last) * left * left * left
        check(abs(given[t - 1] - exact) < 1 + 1e-9 and given[t - 1] <= exact + 1e-9, "the slope")


def drawn_scores(case):
    """{path: (r,) scores} of several matrices, with ties."""
    names = [f"blocks.{n}.attn.{p}" for n in range(case.size(2, 3)) for p in "qv"]
    r = case.size(3, 6)
    return {name: (case.normal(r) * case.number(0.3, 3)).round(decimals=1) for name in names}


@LAB.invariant(10)
def the_best_of_all_matrices_stay(case):
    """(Allocator 6): exactly as many as allowed stay, the best of all matrices together, of equal
    ones the earlier.
    """
    scores = drawn_scores(case)
    flat = [(s, -n) for n, s in enumerate(torch.cat(list(scores.values())).tolist())]
    keep = case.size(1, len(flat) - 1)
    best = {-n for _, n in sorted(flat, reverse=True)[:keep]}
    kept = allocator.allocate(scores, keep)
    equal(list(kept), list(scores), "the set of matrices")
    given = torch.cat([kept[path] for path in scores])
    equal(int(given.sum()), keep, "how many triplets stay")
    equal(set(given.nonzero()[:, 0].tolist()), best, "the set of triplets that stay")
    work = allocator.show_work(scores, keep)
    equal(sum(work["ranks"].values()), keep, "the sum of the ranks in show_work")


def adapted(case, shared):
    """A small GPT with AdaLoRA whose tensors are all random, its attachment, and ids."""
    model = case.model(n_head=2, d_model=6)
    targets = ("q", "k", "v") if shared else ("q", "down")
    minipeft.AdaLoRA(3, 2, alpha=5, targets=targets, share_qkv=shared).attach(model)
    attachment = model.attachments[0]
    case.stir(attachment.parameters().values())
    return model, attachment, case.ids(2, 7, 31)


@LAB.invariant(6)
def what_is_switched_off_can_come_back(case):
    """(Allocator 6): E is set to 0; P and Q stay, until it is for good."""
    _, attachment, _ = adapted(case, case.pick(True, False))
    layers = next(iter(allocator.groups_of(attachment).values()))
    kept = torch.tensor([True, False, True]).roll(case.size(0, 2))
    before = {n: getattr(layers[0], n).detach().clone() for n in "PEQ"}
    with torch.no_grad():
        allocator.switch_off(layers, kept, False)
    same(layers[0].E.detach(), before["E"] * kept, "E after switching off")
    same(layers[0].P.detach(), before["P"], "P after switching off")
    same(layers[0].Q.detach(), before["Q"], "Q after switching off")
    with torch.no_grad():
        allocator.switch_off(layers, kept, True)
    same(layers[0].P.detach(), before["P"] * kept, "P after switching off for good")
    same(layers[0].Q.detach(), before["Q"] * kept[:, None], "Q after switching off for good")
    for layer in layers:
        same(layer.kept, kept, "kept after switching off for good")


@LAB.invariant(3)
def scores_follow_the_training(case):
    """(Allocator 1) to (Allocator 4): the scores over two steps of a model, by the formulas."""
    trained_scores(case, False)


@LAB.invariant(2)
def a_shared_triplet_is_scored_whole(case):
    """(Allocator 4): where q, k and v share a triplet, P is all three."""
    trained_scores(case, True)


def trained_scores(case, shared):
    """Hold scores_after_step against the formulas over two steps of a model."""
    b1, b2 = 0.85, 0.7
    model, attachment, ids = adapted(case, shared)
    groups, state, wanted = allocator.groups_of(attachment), {}, {}
    for _ in range(2):
        model.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        with torch.no_grad():
            given = allocator.scores_after_step(state, groups, b1, b2)
        for path, layers in groups.items():
            tensors = (*(l.P for l in layers), layers[0].E, layers[0].Q)
            wanted[path] = [
                average(old, (w * w.grad).abs().detach(), b1, b2)
                for w, old in zip(tensors, wanted.get(path, [(0.0, 0.0)] * len(tensors)))
            ]
    for path, averages in wanted.items():
        *P, E, Q = [M * U for M, U in averages]
        score = E + torch.cat(P).mean(0) + Q.mean(1)
        close(given[path] / score, torch.ones_like(score), f"the scores of {path}", 1e-8)


def average(old, I, b1, b2):
    """(M, U) after a step."""
    M = b1 * old[0] + (1 - b1) * I
    return M, b2 * old[1] + (1 - b2) * (I - M).abs()
