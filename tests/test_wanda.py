"""The specification of minipeft/compressed/wanda.py."""

import pytest
import torch

from minipeft.compressed.magnitude_pruning import projections, sparsity_of
from minipeft.compressed.wanda import prune_wanda, wanda_mask, wanda_scores
from tests.test_calibration import inputs_of
from tests.tiny import tiny_ids, tiny_model

RANDOM = torch.Generator().manual_seed(4)


def mask_by_definition(W, X, sparsity):
    """(Wanda 1) (Wanda 2) one weight at a time. W (out, in), X (tokens, in)."""
    keep = torch.ones_like(W, dtype=torch.bool)
    for i in range(W.shape[0]):
        scores = [
            abs(float(W[i, j])) * float((X[:, j] ** 2).sum()) ** 0.5 for j in range(len(W[i]))
        ]
        for j in sorted(range(len(scores)), key=lambda j: scores[j])[: int(sparsity * len(scores))]:
            keep[i, j] = False
    return keep


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_the_mask_is_the_definition_s(sparsity):
    W = torch.randn(7, 13, generator=RANDOM, dtype=torch.float64)
    X = torch.randn(29, 13, generator=RANDOM, dtype=torch.float64) * torch.arange(13)
    mask = wanda_mask(wanda_scores(W, X.norm(dim=0)), sparsity)
    assert torch.equal(mask, mask_by_definition(W, X, sparsity))
    assert (mask.sum(1) == 13 - int(sparsity * 13)).all()


def test_a_loud_input_saves_a_small_weight():
    W, norms = torch.tensor([[0.1, -1.0]]), torch.tensor([20.0, 1.0])
    assert wanda_mask(wanda_scores(W, norms), 0.5).tolist() == [[True, False]]


def test_a_model_is_pruned_on_its_own_inputs_and_nothing_is_updated():
    model, before = tiny_model(), tiny_model()
    assert prune_wanda(model, [tiny_ids()], 0.5) is model
    assert sparsity_of(model) == 0.5
    for path, linear in projections(model).items():
        was = before.get_submodule(path).weight
        kept = linear.weight != 0
        assert torch.equal(linear.weight[kept], was[kept])
        # block 1 reads what the pruned block 0 gives; inside a block, the block as it was
        if path.endswith(("attn.q", "attn.k", "attn.v")):
            X = inputs_of(model, path, tiny_ids())
            assert torch.equal(kept, mask_by_definition(was.detach(), X, 0.5))


def test_two_of_four_on_scores():
    model = prune_wanda(tiny_model(), [tiny_ids()], pattern=(2, 4))
    assert sparsity_of(model) == 0.5
    X = inputs_of(model, "blocks.0.attn.q", tiny_ids())
    scores = tiny_model().blocks[0].attn.q.weight.detach().abs() * (X**2).sum(0).sqrt()
    kept = (model.blocks[0].attn.q.weight != 0).unflatten(1, (-1, 4))
    groups = scores.unflatten(1, (-1, 4))
    assert (kept.sum(-1) == 2).all()
    worst_kept = groups.masked_fill(~kept, float("inf")).amin(-1)
    best_gone = groups.masked_fill(kept, 0).amax(-1)
    assert (worst_kept > best_gone).all()


def test_bad_requests_leave_the_model_alone():
    model, before = tiny_model(), tiny_model()
    for settings in ({"sparsity": 1.2}, {"pattern": (2, 5)}, {"pattern": (0, 4)}):
        with pytest.raises(ValueError, match=r"sparsity=1.2|multiple of 5|pattern=0:4"):
            prune_wanda(model, [tiny_ids()], **settings)
    assert torch.equal(model(tiny_ids()), before(tiny_ids()))
