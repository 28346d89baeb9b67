"""The specification of minipeft/compressed/lottery_ticket.py."""

import itertools

import pytest
import torch

from minipeft.compressed.lottery_ticket import (
    drop_smallest,
    find_tickets,
    full_masks,
    random_masks,
    rewind,
    snapshot,
    train_ticket,
)
from minipeft.compressed.magnitude_pruning import projections, sparsity_of
from minipeft.quantized.qlora import quantize_model
from tests.tiny import tiny_ids, tiny_model


def fit(model, after_step, steps=4, log=None):
    """A few steps of AdamW; returns the weights it began and ended with."""
    began = snapshot(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    for step in range(1, steps + 1):
        model.loss(tiny_ids()[:, :-1], tiny_ids()[:, 1:].contiguous()).backward()
        optimizer.step()
        for act in after_step:
            act(model, step, steps)
        optimizer.zero_grad()
        if log is not None:
            log.append((step, snapshot(model), sparsity_of(model)))
    return began, snapshot(model)


def test_a_share_of_what_is_left_is_dropped_the_smallest_first():
    # (Ticket 1)
    weight = torch.tensor([[0.5, -4, 3, 0.1], [-0.2, 1, -0.3, 2]])
    mask = torch.tensor([[True, True, True, False], [True, True, True, False]])
    assert drop_smallest(weight, mask, 0.4).int().tolist() == [[1, 1, 1, 0], [0, 1, 0, 0]]


def test_the_sparsity_follows_the_rounds():
    # (Ticket 2), up to the rounding down in each matrix
    tickets = find_tickets(tiny_model(), fit, rounds=3, rate=0.2)
    for r, ticket in enumerate(tickets):
        assert ticket.sparsity == pytest.approx(1 - 0.8**r, abs=3e-3)
    left = tickets[0].masks["blocks.0.attn.q"].numel()
    for ticket in tickets:
        assert int(ticket.masks["blocks.0.attn.q"].sum()) == left
        left -= int(0.2 * left + 1e-9)


def test_round_zero_is_the_dense_initialisation():
    model, first = tiny_model(), snapshot(tiny_model())
    ticket = find_tickets(model, fit, rounds=0)[0]
    assert ticket.sparsity == 0
    assert all(torch.equal(ticket.outcome[0][n], t) for n, t in first.items())


def test_masks_are_nested_and_made_of_the_trained_weights():
    tickets = find_tickets(tiny_model(), fit, rounds=2, rate=0.3)
    for before, after in itertools.pairwise(tickets):
        for path, mask in after.masks.items():
            assert not (mask & ~before.masks[path]).any()
            trained = before.outcome[1][f"{path}.weight"].abs()
            gone = before.masks[path] & ~mask
            assert trained[gone].max() <= trained[mask].min()


def test_every_round_starts_from_the_initialisation_under_its_mask():
    # (Ticket 3)
    first = snapshot(tiny_model())
    for ticket in find_tickets(tiny_model(), fit, rounds=2):
        for name, tensor in ticket.outcome[0].items():
            mask = ticket.masks.get(name.removesuffix(".weight"))
            assert torch.equal(tensor, first[name] if mask is None else first[name] * mask)


def test_rewinding_goes_to_the_dense_run_s_step():
    log = []
    tickets = find_tickets(
        tiny_model(), lambda m, acts: fit(m, acts, log=log), rounds=2, rewind_to=2
    )
    early = log[1][1]  # the dense run after step 2
    for ticket in tickets[1:]:
        for name, tensor in ticket.outcome[0].items():
            mask = ticket.masks.get(name.removesuffix(".weight"))
            assert torch.equal(tensor, early[name] if mask is None else early[name] * mask)
    dense = snapshot(tiny_model())
    assert all(torch.equal(tickets[0].outcome[0][n], t) for n, t in dense.items())


def test_the_mask_holds_in_every_step():
    log = []
    tickets = find_tickets(tiny_model(), lambda m, acts: fit(m, acts, log=log), rounds=2)
    for i, (_, _, sparsity) in enumerate(log):
        assert sparsity == pytest.approx(tickets[i // 4].sparsity, abs=1e-15)


def test_a_random_ticket_keeps_as_many_in_each_matrix_elsewhere():
    # (Ticket 4)
    masks = find_tickets(tiny_model(), fit, rounds=2, rate=0.4)[-1].masks
    random = random_masks(masks, seed=1)
    again, other = random_masks(masks, seed=1), random_masks(masks, seed=2)
    for path, mask in masks.items():
        assert int(random[path].sum()) == int(mask.sum())
        assert torch.equal(random[path], again[path])
        assert not torch.equal(random[path], mask) and not torch.equal(random[path], other[path])
    # places are drawn evenly: about as much is kept of what the ticket keeps as of what it drops
    kept = random["blocks.0.mlp.up"][masks["blocks.0.mlp.up"]].double().mean()
    share = masks["blocks.0.mlp.up"].double().mean()
    assert abs(kept - share) < 0.06  # 4 sigma of 1,475 draws


def test_a_control_trains_from_any_start_under_any_mask():
    model, other = tiny_model(), snapshot(tiny_model(seed=9))
    masks = random_masks(
        {p: torch.rand(m.shape) > 0.5 for p, m in full_masks(model).items()}, seed=3
    )
    began, ended = train_ticket(model, fit, other, masks)
    for path in projections(model):
        assert torch.equal(began[f"{path}.weight"], other[f"{path}.weight"] * masks[path])
        assert not ended[f"{path}.weight"][~masks[path]].any()


def test_snapshots_are_copies():
    model = tiny_model()
    kept = snapshot(model)
    fit(model, [])
    rewind(model, kept, full_masks(model))
    assert torch.equal(model(tiny_ids()), tiny_model()(tiny_ids()))
    assert model.head.weight is model.embed.token.weight


def test_bad_requests_are_named():
    with pytest.raises(ValueError, match="NF4Linear"):
        find_tickets(quantize_model(tiny_model(dtype=torch.float32)), fit, 1)
    with pytest.raises(ValueError, match="rate=1"):
        find_tickets(tiny_model(), fit, 1, rate=1)
    with pytest.raises(ValueError, match="rewind_to=9"):
        find_tickets(tiny_model(), fit, 1, rewind_to=9)
