"""The ablations of prefix tuning: rows before the first block only, an infix, the length."""

from itertools import pairwise

import pytest
import torch

import minipeft
from minipeft import PrefixTuning, PromptTuning
from minipeft.decoding import Cache
from minipeft.soft_prompt.prefix_ablations import (
    Point,
    infix_after,
    infix_mask,
    sweep_prefix_length,
)
from tests.tiny import CONFIG, close, randomize

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16


def infix(after):
    return PrefixTuning(3, reparameterize=False, placement="infix", infix_after=after)


def tables_of(model):
    return [block.attn.core.table.weight for block in model.blocks]


def test_rows_without_the_mlp_are_prompt_tuning(model, ids):
    """(Ablation 1)"""
    PrefixTuning(3, reparameterize=False, placement="embedding").attach(model)
    logits, rows = model(ids), model.embed.prompt.weight.detach().clone()
    minipeft.detach(model)
    PromptTuning(3).attach(model)
    with torch.no_grad():
        model.embed.prompt.weight.copy_(rows)
    assert torch.equal(model(ids), logits)


def test_rows_from_the_mlp_flatten_to_prompt_tuning(model, ids):
    """(Ablation 1) with (Prefix 2)."""
    randomize(PrefixTuning(3, bottleneck=5, placement="embedding").attach(model))
    before = model(ids)
    table = model.embed.prompt
    E, down, up = table.trunk.embedding, table.trunk.down, table.up
    rows = torch.tanh(E @ down.weight.T + down.bias) @ up.weight.T + up.bias
    close(table(), rows, EXACT)
    minipeft.soft_prompt.prompt_tuning.flatten(model)
    assert torch.equal(model(ids), before) and minipeft.report(model).trained == 3 * 32


def test_an_infix_after_no_token_is_a_prefix(model, ids):
    """(Ablation 2) at n = 0."""
    infix(0).attach(model)
    logits, rows = model(ids), [t.detach().clone() for t in tables_of(model)]
    minipeft.detach(model)
    PrefixTuning(3, reparameterize=False).attach(model)
    with torch.no_grad():
        for table, row in zip(tables_of(model), rows, strict=True):
            table.copy_(row)
    close(model(ids), logits, EXACT)


def test_what_stands_before_an_infix_does_not_notice_it(model, ids):
    """(Ablation 2)"""
    base = model(ids)
    infix(4).attach(model)
    close(model(ids)[:, :4], base[:, :4], EXACT)
    difference = (model(ids) - base).abs().amax(-1)
    assert (difference[:, 4:] > 1e-3).all(), "every later token sees it"


def test_positions_jump_where_the_infix_stands(model, ids):
    infix(4).attach(model)
    base = model.embed.inner
    where = torch.tensor([0, 1, 2, 3, 7, 8, 9, 10, 11, 12, 13])
    assert torch.equal(model.embed(ids), base.token.weight[ids] + base.position.weight[where])
    later = base.token.weight[ids] + base.position.weight[where.max() + 1 + torch.arange(11)]
    assert torch.equal(model.embed(ids, 11), later)


def test_the_mask_opens_behind_n_tokens():
    """(Ablation 2), entry by entry, with earlier keys in a cache."""
    mask = infix_mask(T=4, S=7, length=2, after=5)
    for t in range(4):
        for s in range(9):
            seen = 3 + t >= 5 if s < 2 else s - 2 <= 3 + t
            assert bool(mask[t, s]) == seen


def test_each_row_can_have_its_own_place(model, ids):
    randomize(infix(4).attach(model))
    lengths = torch.tensor([2, 9, 5])
    with infix_after(model, lengths):
        together = model(ids)
    for row, n in enumerate(lengths.tolist()):
        with infix_after(model, torch.tensor([n])):
            close(together[row], model(ids[row : row + 1])[0], EXACT)
    assert torch.equal(model(ids), model(ids)) and model.embed.after == 4, "put back afterwards"


def test_decoding_with_a_cache_sees_the_same_infix(model, ids):
    randomize(infix(4).attach(model))
    lengths = torch.tensor([2, 9, 5])
    with torch.no_grad(), infix_after(model, lengths):
        whole, cache = model.features(ids), Cache(model, 3, 11)
        cuts = [0, 3, 4, 7, 11]
        parts = [model.features(ids[:, a:b], a, cache) for a, b in pairwise(cuts)]
    close(torch.cat(parts, 1), whole, EXACT)


def test_an_infix_does_not_count_virtual_tokens_as_text(model, ids):
    PromptTuning(2).attach(model)
    with pytest.raises(ValueError, match="without prompts"):
        infix(4).attach(model, "infix")
    minipeft.detach(model)
    infix(4).attach(model, "infix")
    PromptTuning(2).attach(model, "prompt")
    with pytest.raises(ValueError, match="behind nothing else"):
        model(ids)


def test_setting_the_place_of_no_infix_is_an_error(model):
    PrefixTuning(3, reparameterize=False).attach(model)
    with pytest.raises(ValueError, match="no infix"), infix_after(model, torch.tensor([1])):
        pass


def test_a_sweep_trains_every_length_once():
    """(Ablation 3)"""
    seen = []

    def run(technique):
        seen.append(technique)
        return -technique.prefix_length

    flat = PrefixTuning(reparameterize=False)
    points = sweep_prefix_length(run, CONFIG, lengths=(1, 7, 30), technique=flat)
    assert points == [Point(1, 128, -1), Point(7, 896, -7), Point(30, 3840, -30)]
    assert [t.prefix_length for t in seen] == [1, 7, 30]
    assert not any(t.reparameterize for t in seen)


def test_a_sweep_refuses_a_length_before_it_trains_any():
    with pytest.raises(ValueError, match="prefix_length=64"):
        sweep_prefix_length(lambda technique: 1 / 0, CONFIG, lengths=(1, 64))
