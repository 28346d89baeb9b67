r"""The lottery ticket hypothesis (Frankle & Carbin, 2018, arXiv 1803.03635; rewinding: Frankle et
al., 2019, arXiv 1912.05671).

A network at its initialisation is said to hold a small one that, trained alone from those very
numbers, gets as far as the whole. It is found backwards: train, drop the smallest, put the rest
back to where it began, again.

    (Ticket 1)   m_0 = 1;   m_{r+1} = m_r without the floor(p k) smallest |w| of the k it keeps
    (Ticket 2)   sparsity after r rounds    1 - (1 - p)^r
    (Ticket 3)   round r trains from    m_r * theta_0      or m_r * theta_k: rewound to step k
    (Ticket 4)   random ticket    m' with the zeros of each matrix of m_r in random places
                 reinitialised    m_r * theta'_0, another initialisation

w are the weights after a round's training; p = 0.2 a round and matrix in the paper. Masks are
nested: what was dropped never comes back. The controls tell whether it is the places or the
starting numbers that win. Pruned are the projections, one by one.

Trained parameters: all that the mask keeps, and everything that is not pruned.

Reduces to: the dense initialisation at round 0.

How this differs from the authors' code: the number dropped is exact (there every weight as small
as the one at the cut goes too); their output layer is pruned at half the rate, ours is the
embedding, tied, and not pruned. An often copied repository freezes weights by `tensor < EPS`
without the absolute value, which freezes every negative one.

Footguns: rewinding to the trained weights; a fraction of all weights for a fraction of those
left; an optimizer that remembers the round before; a mask that is not held while training.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minipeft.compressed.magnitude_pruning import check_floats, count_of, hold, projections


@dataclass
class Ticket:
    """A round's result. masks: {path: bool (out, in)}; start: the state it trains from, before the
    mask; outcome: what `fit` returned for it.
    """

    round: int
    masks: dict
    start: dict
    outcome: object = None

    @property
    def sparsity(self):
        """Share of the projections' weights that are dropped. (Ticket 2)"""
        size = sum(m.numel() for m in self.masks.values())
        return 1 - sum(int(m.sum()) for m in self.masks.values()) / size


def full_masks(model):
    """m_0: {path: all True}. (Ticket 1) Raises ValueError for quantised or packed weights."""
    check_floats(model)
    return {
        path: torch.ones_like(linear.weight, dtype=torch.bool)
        for path, linear in projections(model).items()
    }


def shrink_masks(model, masks, rate=0.2):
    """m_{r+1} from m_r and the trained weights, {path: bool}. (Ticket 1)"""
    weights = {path: linear.weight.detach() for path, linear in projections(model).items()}
    return {path: drop_smallest(weights[path], mask, rate) for path, mask in masks.items()}


def drop_smallest(weight, mask, rate):
    """`mask` without the floor(rate k) smallest |weight| of the k it keeps."""
    places = mask.flatten().nonzero()[:, 0]
    size = weight.abs().flatten()[places]
    smaller = mask.flatten().clone()
    smaller[places[size.argsort(stable=True)[: count_of(rate, len(places))]]] = False
    return smaller.view_as(mask)


def random_masks(masks, seed):
    """The same number of weights kept in every matrix, in random places. (Ticket 4)"""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for path, mask in masks.items()
    }


def snapshot(model):
    """A copy of every tensor of the model, to rewind to."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@torch.no_grad()
def rewind(model, start, masks):
    """Put the model, in place, to m * theta. (Ticket 3)"""
    model.load_state_dict(start)
    hold(model, masks)()
    return model


def snapshot_at(step, into):
    """For a training loop: a function(model, step, steps) that appends the state after step
    `step` to the list `into`.
    """

    def act(model, now, _):
        if now == step:
            into.append(snapshot(model))

    return act


def find_tickets(model, fit, rounds, rate=0.2, rewind_to=0):
    """Iterative pruning: rounds + 1 Tickets, the dense one first.

    fit(model, after_step) trains the model in place and calls every function f(model, step,
    steps) of `after_step` after each optimizer step (training.train's parameter); it must begin
    with a new optimizer. rewind_to: the step of the dense run to rewind to; 0 for the
    initialisation. (Ticket 3) Raises ValueError for a rate outside (0, 1) or a step never reached.
    """
    if not 0 < rate < 1:
        raise ValueError(f"rate={rate} must be a share in (0, 1)")
    starts = [snapshot(model)]
    masks, tickets = full_masks(model), []
    for number in range(rounds + 1):
        start = starts[-1 if number else 0]
        rewind(model, start, masks)
        watch = [snapshot_at(rewind_to, starts)] if rewind_to and number == 0 else []
        tickets.append(Ticket(number, masks, start, fit(model, [hold(model, masks), *watch])))
        if rewind_to and len(starts) == 1:
            raise ValueError(f"rewind_to={rewind_to} is a step that the first round never reached")
        masks = shrink_masks(model, masks, rate)
    return tickets


def train_ticket(model, fit, start, masks):
    """Train from `start` under `masks`, a control or a ticket again; returns what `fit` does."""
    rewind(model, start, masks)
    return fit(model, [hold(model, masks)])
