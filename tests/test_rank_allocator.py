"""The allocator's averages, scores, schedule and choice, number by number; over a whole model it is
tested in test_adalora.py, against peft in parity/test_adalora_peft.py.
"""

import pytest
import torch

from minipeft.low_rank import rank_allocator

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few dozen roundings of numbers of order one


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- importance


def test_the_averages_against_a_loop():
    """(Allocator 1) (Allocator 2) (Allocator 3): four steps, number by number."""
    weights, gradients = normal(4, 3), normal(4, 3, seed=1)
    M = U = torch.zeros(3, dtype=torch.float64)
    m, u = [0.0] * 3, [0.0] * 3
    for t in range(4):
        M, U = rank_allocator.smooth(
            M, U, rank_allocator.sensitivity(weights[t], gradients[t]), 0.8, 0.9
        )
        for i in range(3):
            s = abs(float(weights[t, i]) * float(gradients[t, i]))
            m[i] = 0.8 * m[i] + (1 - 0.8) * s
            u[i] = 0.9 * u[i] + (1 - 0.9) * abs(s - m[i])
    torch.testing.assert_close(M, torch.tensor(m, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(U, torch.tensor(u, dtype=torch.float64), **EXACT)


def test_a_triplets_score_is_the_value_s_and_the_means_of_its_vectors():
    """(Allocator 4)"""
    P, E, Q = normal(7, 3), normal(3), normal(3, 5)
    scores = rank_allocator.triplet_scores(P, E, Q)
    for i in range(3):
        by_hand = E[i] + sum(P[o, i] for o in range(7)) / 7 + sum(Q[i, j] for j in range(5)) / 5
        torch.testing.assert_close(scores[i], by_hand, **EXACT)


# -- schedule and choice


def test_the_budget_is_cubic_between_its_ends():
    """(Allocator 5): worked out by hand for T = 20, t_i = 3, t_f = 5, from 12 to 8."""
    found = [rank_allocator.budget(t, 20, 3, 5, 12, 8) for t in range(21)]
    by_hand = [8 + 4 * (1 - (t - 3) / 12) ** 3 for t in range(4, 15)]
    assert found == [12] * 4 + [int(b) for b in by_hand] + [8] * 6
    assert found[:10] == [12, 12, 12, 12, 11, 10, 9, 9, 8, 8]


def test_the_budget_never_rises():
    """(Allocator 5)"""
    for warm, final in ((0, 0), (7, 11), (1, 0)):
        budgets = [rank_allocator.budget(t, 40, warm, final, 144, 96) for t in range(1, 41)]
        assert budgets == sorted(budgets, reverse=True) and budgets[-1] == 96


def test_the_best_of_all_matrices_stay():
    """(Allocator 6): the choice is global, and of equal triplets the earlier stays."""
    scores = {"a": torch.tensor([0.1, 0.9, 0.3]), "b": torch.tensor([0.8, 0.3, 0.7, 0.0])}
    kept = rank_allocator.allocate(scores, 4)
    assert kept["a"].tolist() == [False, True, True]
    assert kept["b"].tolist() == [True, False, True, False]


@pytest.mark.parametrize("keep", [0, 1, 6, 7])
def test_exactly_the_budget_stays_even_if_all_scores_are_equal(keep):
    """(Allocator 6)"""
    scores = {"a": torch.zeros(3), "b": torch.zeros(4)}
    assert sum(int(k.sum()) for k in rank_allocator.allocate(scores, keep).values()) == keep


def test_show_work_names_every_step_of_an_allocation():
    scores = {"a": torch.tensor([0.25, 1.0]), "b": torch.tensor([0.5])}
    work = rank_allocator.show_work(scores, 2)
    assert work["order"] == [("a", 1, 1.0), ("b", 0, 0.5), ("a", 0, 0.25)]
    assert work["threshold"] == 0.5
    assert work["switched_off"] == [("a", 0, 0.25)]
    assert work["ranks"] == {"a": 1, "b": 1}
    for path, mask in rank_allocator.allocate(scores, 2).items():
        assert torch.equal(work["kept"][path], mask)
