"""The specification of minipeft/compressed/sparsegpt.py."""

import pytest
import torch

from minipeft import prune_heads, prune_neurons
from minipeft.compressed.magnitude_pruning import projections, prune_magnitude, sparsity_of
from minipeft.compressed.sparsegpt import inverse_factor, prune_sparsegpt, sparsegpt
from minipeft.compressed.wanda import prune_wanda
from tests.tiny import tiny_ids, tiny_model

RANDOM = torch.Generator().manual_seed(5)


def problem(out=5, into=12, tokens=40):
    mix = torch.randn(into, into, generator=RANDOM, dtype=torch.float64)
    X = torch.randn(tokens, into, generator=RANDOM, dtype=torch.float64) @ mix
    return torch.randn(out, into, generator=RANDOM, dtype=torch.float64), X.T @ X


def by_definition(W, G, sparsity, block, damping=0.01):
    """Optimal brain surgery with a fresh inverse for every column. (SparseGPT 1) (SparseGPT 3)"""
    W, into = W.clone(), W.shape[1]
    H = G + damping * G.diagonal().mean() * torch.eye(into, dtype=W.dtype)
    keep = torch.ones_like(W, dtype=torch.bool)
    done = 0
    for first in range(0, into, block):
        last = min(first + block, into)
        found = []
        for j in range(first, last):
            cost = torch.linalg.inv(H[j:, j:])[0, 0]  # of the columns still free
            found += [(float(W[i, j] ** 2 / cost), i, j) for i in range(len(W))]
        due = int(sparsity * len(W) * last + 1e-9) - done  # (SparseGPT 4)
        done += due
        for _, i, j in sorted(found)[:due]:
            keep[i, j] = False
        for j in range(first, last):
            inverse = torch.linalg.inv(H[j:, j:])
            for i in range(len(W)):
                if not keep[i, j]:
                    W[i, j:] -= W[i, j] / inverse[0, 0] * inverse[0]  # (SparseGPT 5)
    return W.masked_fill(~keep, 0), keep


@pytest.mark.parametrize("block", [12, 5, 1])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_it_is_optimal_brain_surgery_column_by_column(block, sparsity):
    W, G = problem()
    mine, keep = sparsegpt(W, G, sparsity, block=block)
    wanted, mask = by_definition(W, G, sparsity, block)
    assert torch.equal(keep, mask)
    # float64; the inverses of a matrix of condition 1e4 lose a few digits
    torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-10)
    assert int((~keep).sum()) == int(sparsity * 60)


def test_one_cut_costs_what_the_formula_says():
    # w_q^2 / (2 [H^-1]_qq) is the least error of all updates with w_q = 0
    W, G = problem(out=1, into=6)
    mine, keep = sparsegpt(W, G, sparsity=1 / 6, block=6)
    (q,) = (~keep[0]).nonzero()[:, 0].tolist()
    H = G + 0.01 * G.diagonal().mean() * torch.eye(6, dtype=W.dtype)
    free = torch.linalg.inv(H[q:, q:])
    delta = (mine - W)[0]
    torch.testing.assert_close(0.5 * delta @ H @ delta, W[0, q] ** 2 / (2 * free[0, 0]))


def test_the_factor_is_of_the_inverse():
    # (SparseGPT 2)
    _, G = problem()
    U = inverse_factor(G)
    H = G + 0.01 * G.diagonal().mean() * torch.eye(12, dtype=G.dtype)
    torch.testing.assert_close(U.T @ U @ H, torch.eye(12, dtype=G.dtype), rtol=0, atol=1e-9)
    assert torch.equal(U, U.triu())


def test_the_output_suffers_less_than_from_the_mask_alone():
    W, G = problem(out=20, into=24, tokens=60)
    mine, keep = sparsegpt(W, G, 0.5)

    def error(other):
        return float(((other - W) @ G * (other - W)).sum())

    assert error(mine) < 0.8 * error(W * keep)


def test_a_pattern_has_its_zeros_and_is_chosen_on_moved_weights():
    W, G = problem(out=6, into=16)
    mine, keep = sparsegpt(W, G, pattern=(2, 4))
    assert (keep.unflatten(1, (-1, 4)).sum(-1) == 2).all()
    assert torch.equal(mine == 0, ~keep)
    U = inverse_factor(G).diagonal()
    first = (W[:, :4] / U[:4]).abs()
    assert (first.masked_fill(~keep[:, :4], 9e9).amin(1) > (first * ~keep[:, :4]).amax(1)).all()
    fixed = (W / U).abs().unflatten(1, (-1, 4))  # as if nothing moved
    lowest = fixed.argsort(-1)[..., :2]
    assert not torch.equal(
        keep, torch.ones_like(fixed, dtype=torch.bool).scatter(-1, lowest, False).flatten(1)
    )


def test_an_input_that_is_always_zero_is_pruned_first():
    W, G = problem()
    G[3], G[:, 3] = 0, 0
    mine, keep = sparsegpt(W, G, sparsity=5 / 60, block=12)
    assert not keep[:, 3].any() and keep[:, [0, 1, 2, 4, 5]].all()
    torch.testing.assert_close(mine[:, 4:], W[:, 4:])


def test_a_model_is_pruned_exactly():
    model = prune_sparsegpt(tiny_model(), [tiny_ids()], 0.5)
    assert sparsity_of(model) == 0.5
    for linear in projections(prune_sparsegpt(tiny_model(), [tiny_ids()], pattern=(2, 4))).values():
        assert ((linear.weight != 0).unflatten(1, (-1, 4)).sum(-1) == 2).all()


def test_layers_without_heads_or_neurons_are_left_alone():
    for model in (
        prune_heads(tiny_model(), {0: range(4)}),
        prune_neurons(tiny_model(), {1: range(128)}),
    ):
        assert sparsity_of(prune_sparsegpt(model, [tiny_ids()], 0.5)) == 0.5


def test_on_its_own_text_it_is_nearer_to_the_model_than_magnitude():
    ids = tiny_ids(24, 30)
    wanted = tiny_model()(ids).detach()

    def error(model):
        return float((model(ids).detach() - wanted).square().mean())

    sparse = error(prune_sparsegpt(tiny_model(), [ids], 0.5))
    assert sparse < error(prune_wanda(tiny_model(), [ids], 0.5))
    assert sparse < error(prune_magnitude(tiny_model(), 0.5))


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match=r"sparsity=1\.0"):
        prune_sparsegpt(tiny_model(), [tiny_ids()], 1.0)
