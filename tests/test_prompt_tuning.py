"""Prompt tuning: the base over concatenated embeddings, every initialisation, ensembles."""

import copy

import pytest
import torch

import minipeft
from minipeft import GPTConfig, PromptTuning
from minipeft.soft_prompt.prompt_tuning import (
    at_beginning,
    flatten,
    initial_rows,
    keep_member,
    majority_vote,
    put_in_front,
    repeat_to,
    replicate,
)
from tests.tiny import close, randomize, tiny_model

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16


def prompt_of(model, name=None):
    return minipeft.technique.attachment_of(model, name).wrappers()[0].prompt.weight


def over_rows(model, rows, start=0):
    """The bare model's logits on embeddings (B, S, D), positions from `start` on. (Prompt 1)"""
    base = minipeft.detach(model)
    x = rows + base.embed.position.weight[start : start + rows.shape[1]]
    for block in base.blocks:
        x = block(x)
    return base.ln_f(x) @ base.embed.token.weight.T


def test_it_is_the_base_over_concatenated_embeddings(model, ids):
    """(Prompt 1)"""
    randomize(PromptTuning(prompt_length=5).attach(model))
    logits, P = model(ids), prompt_of(model)
    text = model.embed.inner.token.weight[ids]
    whole = over_rows(model, torch.cat([P.expand(3, -1, -1), text], 1))
    close(logits, whole[:, 5:], EXACT)


def test_only_the_prompt_has_a_gradient(model, ids):
    PromptTuning(prompt_length=5).attach(model)
    model.loss(ids, ids).backward()
    with_gradient = [n for n, p in model.named_parameters() if p.grad is not None]
    assert with_gradient == ["embed.prompt.weight"]
    assert (prompt_of(model).grad.abs().sum(1) > 0).all(), "a virtual token is not trained"


def test_a_text_prompt_is_the_base_reading_the_text_first(model, ids):
    text = torch.tensor([[5, 17, 3, 41]]).expand(3, -1)
    whole = model(torch.cat([text, ids], 1))[:, 4:]
    PromptTuning(prompt_length=4, init="text", text=(5, 17, 3, 41)).attach(model)
    assert torch.equal(model(ids), whole)


def test_a_text_is_repeated_or_cut_to_the_prompt_s_length():
    assert repeat_to((5, 9, 2), 7) == [5, 9, 2, 5, 9, 2, 5]
    assert repeat_to((5, 9, 2), 2) == [5, 9]


def test_the_random_start_is_uniform_on_half_a_unit_each_side(model):
    rows = initial_rows(PromptTuning(60, "random"), model.embed.token.weight)
    assert rows.shape == (60, 32) and rows.dtype == torch.float64
    assert -0.5 <= rows.min() < -0.49 and 0.49 < rows.max() <= 0.5
    # 1,920 draws: the mean is within 4 standard errors of 0, the deviation within 5 % of 1/sqrt 12
    assert abs(rows.mean()) < 4 / 12**0.5 / 1920**0.5
    assert abs(rows.std() * 12**0.5 - 1) < 0.05


def row_numbers(rows, table):
    """Which row of the table each row is."""
    distance = (rows[:, None] - table[None]).abs().sum(-1)
    assert (distance.min(1).values == 0).all(), "a row is no row of the table"
    return distance.argmin(1).tolist()


def test_vocabulary_rows_are_drawn_without_replacement(model):
    table = model.embed.token.weight
    drawn = row_numbers(initial_rows(PromptTuning(63, "vocab"), table), table)
    assert len(set(drawn)) == 63
    other = row_numbers(initial_rows(PromptTuning(63, "vocab"), table), table)
    assert drawn != other and max(drawn) > 63, "drawn anew, from the whole vocabulary"


def test_rows_come_from_the_words_given(model):
    table = model.embed.token.weight
    technique = PromptTuning(7, "vocab", words=(4, 9, 60))
    drawn = row_numbers(initial_rows(technique, table), table)
    assert sorted(drawn[:3]) == sorted(drawn[3:6]) == [4, 9, 60], "all of them before any again"


def test_a_label_word_starts_at_the_mean_of_its_pieces(model):
    table = model.embed.token.weight
    technique = PromptTuning(5, "labels", labels=((3, 8, 20), (9,)), words=(30, 31, 32, 33))
    rows = initial_rows(technique, table)
    close(rows[0], (table[3] + table[8] + table[20]) / 3, EXACT)
    assert torch.equal(rows[1], table[9])
    assert set(row_numbers(rows[2:], table)) <= {30, 31, 32, 33}
    assert initial_rows(PromptTuning(1, "labels", labels=((3,), (9,))), table).shape == (1, 32)


@pytest.mark.parametrize("init", ["vocab", "text"])
def test_training_the_prompt_leaves_the_table_it_came_from_alone(model, init):
    before = model.embed.token.weight.clone()
    PromptTuning(4, init, text=(5, 17, 3, 41)).attach(model)
    with torch.no_grad():
        prompt_of(model).add_(1.0)
    assert torch.equal(minipeft.detach(model).embed.token.weight, before)


def test_text_goes_on_at_its_shifted_position(model, ids):
    """With start > 0 nothing is put in front, and the positions are those behind the prompt."""
    PromptTuning(5).attach(model)
    x = model.embed(ids, 7)
    base = model.embed.inner
    assert torch.equal(x, base.token.weight[ids] + base.position.weight[12 : 12 + 11])
    per_row = model.embed(ids, torch.tensor([7, 2, 9]))
    assert torch.equal(per_row[0], x[0])
    assert torch.equal(per_row[1], base.token.weight[ids[1]] + base.position.weight[7:18])


def test_a_row_that_is_moved_takes_its_prompt_along(model, ids):
    """Without a cache nothing came before: random starts in training keep the prompt. (Prompt 1)"""
    randomize(PromptTuning(5).attach(model))
    logits, P = model(ids, start=7), prompt_of(model)
    text = model.embed.inner.token.weight[ids]
    whole = over_rows(model, torch.cat([P.expand(3, -1, -1), text], 1), start=7)
    close(logits, whole[:, 5:], EXACT)


def test_rows_that_all_begin_may_say_so_in_a_tensor(model, ids):
    PromptTuning(5).attach(model)
    assert torch.equal(model(ids, torch.zeros(3, dtype=torch.int64)), model(ids))
    assert not at_beginning(torch.tensor([4, 1]))
    with pytest.raises(ValueError, match=r"start=\[0, 4\].*apart"):
        at_beginning(torch.tensor([0, 4]))


def test_two_prompts_stand_one_before_the_other(model, ids):
    """The one attached last is in front."""
    PromptTuning(2).attach(model, "inner")
    PromptTuning(3).attach(model, "outer")
    logits, inner, outer = model(ids), prompt_of(model, "inner"), prompt_of(model, "outer")
    minipeft.detach(model)
    text = model.embed.token.weight[ids]
    rows = torch.cat([outer.expand(3, -1, -1), inner.expand(3, -1, -1), text], 1)
    close(logits, over_rows(model, rows)[:, 5:], EXACT)


def test_the_model_s_dropout_falls_on_the_prompt_too():
    model = tiny_model(GPTConfig(97, 64, n_layer=1, n_head=2, d_model=20, dropout=0.5))
    PromptTuning(6, "random").attach(model)
    rows = model.train().embed.rows(device=None)
    dropped = (rows == 0).double().mean()
    assert 0.2 < dropped < 0.8, "120 draws at one half"
    assert (model.eval().embed.rows(device=None) != 0).all()


def test_a_full_context_is_an_error_that_names_both_lengths(model):
    PromptTuning(5).attach(model)
    model(torch.zeros(1, 59, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"context_length=64.*T=60.*p=5"):
        model(torch.zeros(1, 60, dtype=torch.int64))


# -- ensembles


def test_each_member_of_an_ensemble_runs_as_if_alone(model, ids):
    technique = PromptTuning(4, members=3)
    technique.attach(model)
    assert minipeft.report(model).trained == 3 * 4 * 32 == technique.count(model.config)
    together = model(replicate(ids, 3)).unflatten(0, (3, 3))
    prompts = prompt_of(model).detach().clone()
    for m in range(3):
        minipeft.detach(model)
        PromptTuning(4).attach(model)
        with torch.no_grad():
            prompt_of(model).copy_(prompts[m])
        assert torch.equal(model(ids), together[m]), f"member {m}"


def test_members_of_an_ensemble_start_apart(model):
    PromptTuning(4, members=3).attach(model)
    first, second, third = prompt_of(model)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_one_loss_trains_all_members_each_by_its_own_rows(model, ids):
    PromptTuning(4, members=3).attach(model)
    labels = ids.roll(-1, 1)
    model.loss(replicate(ids, 3), replicate(labels, 3)).backward()
    together = prompt_of(model).grad.clone()
    for m in range(3):
        keep = keep_member(tiny_copy(model), m)
        keep.loss(ids, labels).backward()
        # The mean over three times the rows: a third of the gradient alone.
        close(together[m], prompt_of(keep).grad / 3, EXACT)


def tiny_copy(model):
    model.zero_grad()
    return copy.deepcopy(model)


def test_a_member_kept_is_an_ordinary_prompt(model, ids):
    PromptTuning(4, members=2).attach(model)
    second = model(replicate(ids, 2))[3:]
    keep_member(model, 1)
    assert torch.equal(model(ids), second)
    assert minipeft.technique.attachment_of(model).technique == PromptTuning(4)
    with pytest.raises(ValueError, match="no prompt 1: it holds 1"):
        keep_member(model, 1)


def test_a_batch_that_cannot_be_shared_out_is_an_error(model, ids):
    PromptTuning(4, members=2).attach(model)
    with pytest.raises(ValueError, match="3 rows cannot be shared by 2 prompts"):
        model(ids)


def test_the_vote_is_the_majority_s():
    """(Prompt 2), by counting."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(5 * 47, 3, generator=generator, dtype=torch.float64)
    won = majority_vote(logits, 5)
    assert won.shape == (47,)
    for b in range(47):
        ballots = [int(logits[m * 47 + b].argmax()) for m in range(5)]
        votes = [ballots.count(c) for c in range(3)]
        tied = [c for c in range(3) if votes[c] == max(votes)]
        mass = {c: sum(logits[m * 47 + b].softmax(0)[c].item() for m in range(5)) for c in tied}
        assert int(won[b]) == max(tied, key=mass.get)


def test_a_majority_beats_one_loud_member():
    logits = torch.tensor([[0.0, 0.1], [0.0, 0.1], [9.0, 0.0]])
    assert majority_vote(logits, 3).tolist() == [1]


def test_prompts_are_handed_out_in_blocks_of_rows():
    x, prompts = torch.zeros(4, 2, 3), torch.arange(1.0, 3.0)[:, None, None].expand(2, 5, 3)
    assert put_in_front(prompts, x)[:, 0, 0].tolist() == [1, 1, 2, 2]


# -- errors


@pytest.mark.parametrize(
    "technique, message",
    [
        (PromptTuning(0), "prompt_length=0"),
        (PromptTuning(64), "prompt_length=64 must be from 1 to 63"),
        (PromptTuning(4, "guess"), "init='guess'; choose from random, vocab"),
        (PromptTuning(4, "text"), "needs token ids in text="),
        (PromptTuning(4, "labels"), "needs token ids in labels="),
        (PromptTuning(4, "labels", labels=((3,), ())), "needs token ids in labels="),
        (PromptTuning(4, "text", text=(3, 97)), "token id 97 is outside"),
        (PromptTuning(4, words=(-1,)), "token id -1 is outside"),
        (PromptTuning(4, members=0), "members=0"),
        (PromptTuning(2, "text", text=(3, 4), members=2), "stay, all alike"),
        (PromptTuning(1, "labels", labels=((3,),), members=2), "stay, all alike"),
    ],
)
def test_settings_that_make_no_sense_are_named(model, technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(model)
    assert not model.attachments


def test_there_is_no_encoder_to_flatten(model):
    PromptTuning(4).attach(model)
    with pytest.raises(ValueError, match=r"PromptTuning.*no encoder"):
        flatten(model)
