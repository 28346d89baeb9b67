"""P-tuning v2: deep prompts without the MLP, classifiers, several tasks sharing one prompt."""

import copy
from collections import Counter
from itertools import pairwise

import pytest
import torch

import minipeft
from minipeft import Head, PrefixTuning, PTuningV2
from minipeft.soft_prompt.p_tuning_v2 import (
    Task,
    adapt,
    attach_tasks,
    classification_loss,
    select_task,
    task_order,
    train_together,
)
from tests.published_soft_prompts import p_tuning_v2_of_bert
from tests.tiny import close, randomize, tiny_model

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16
TASKS = {"mood": Task(2, prompt_length=3), "tags": Task(5, per_token=True, prompt_length=7)}


def tables_of(model):
    return [b.attn.core.table.weight for b in model.blocks if hasattr(b.attn.core, "table")]


def test_it_is_prefix_tuning_without_the_mlp(model, ids):
    """(P-tuning v2 1) is (Prefix 1)."""
    torch.manual_seed(5)
    PTuningV2(prompt_length=4).attach(model)
    logits, rows = model(ids), [t.detach().clone() for t in tables_of(model)]
    minipeft.detach(model)
    torch.manual_seed(5)
    PrefixTuning(prefix_length=4, reparameterize=False).attach(model)
    assert all(torch.equal(t, r) for t, r in zip(tables_of(model), rows, strict=True))
    assert torch.equal(model(ids), logits)


def test_prompts_can_be_on_some_layers_only(model, ids):
    base = model.blocks[0](model.embed.token(ids))
    technique = PTuningV2(prompt_length=4, layers=(1,))
    technique.attach(model)
    assert [tuple(t.shape) for t in tables_of(model)] == [(4, 64)]
    token = minipeft.wrap.resolve(model, "embed.token")
    assert torch.equal(model.blocks[0](token(ids)), base)
    assert technique.count(model.config) == 4 * 64


def test_a_row_s_class_is_read_at_its_last_real_token(model, ids):
    """(P-tuning v2 2)"""
    PTuningV2(prompt_length=4).attach(model, "prompt")
    Head(3).attach(model, "head")
    lengths = torch.tensor([11, 4, 7])
    logits, x = model(ids, lengths=lengths), model.features(ids)
    W, b = model.head.weight, model.head.bias
    for row, n in enumerate(lengths.tolist()):
        close(logits[row], W @ x[row, n - 1] + b, EXACT)


def test_tags_are_read_at_every_token(model, ids):
    """(P-tuning v2 2), second form; -100 is not counted."""
    PTuningV2(prompt_length=4).attach(model, "prompt")
    Head(3, per_token=True).attach(model, "head")
    logits = model(ids)
    close(logits, model.features(ids) @ model.head.weight.T + model.head.bias, EXACT)
    labels = ids % 3
    labels[:, 5:] = -100
    logp = logits.log_softmax(-1)
    own = [-logp[b, t, labels[b, t]] for b in range(3) for t in range(5)]
    close(classification_loss(logits, labels), sum(own) / 15, EXACT)


def test_prompt_and_head_are_trained_together_and_nothing_else(model, ids):
    PTuningV2(prompt_length=4).attach(model, "prompt")
    Head(3).attach(model, "head")
    classification_loss(model(ids), torch.tensor([0, 2, 1])).backward()
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    tables = {f"blocks.{n}.attn.core.table.weight" for n in (0, 1)}
    assert trained == tables | {"head.weight", "head.bias"}


def test_the_authors_constant_for_bert_is_reproduced():
    """THUDM/P-tuning-v2 notes 9,860,105: with the MLP, which PrefixTuning has, and the head."""
    assert p_tuning_v2_of_bert() == 9_860_105


# -- several tasks


def test_each_task_has_a_prompt_of_its_own_length(model, ids):
    attach_tasks(model, TASKS)
    assert [t.shape[0] for t in tables_of(model)] == [3, 3], "the first task is selected"
    assert model(ids).shape == (3, 2)
    select_task(model, "tags")
    assert [t.shape[0] for t in tables_of(model)] == [7, 7]
    assert model(ids).shape == (3, 11, 5) and model.embed.position_shift == 7


def test_training_one_task_leaves_another_s_prompt_and_head_alone(model, ids):
    attach_tasks(model, TASKS)
    before = {a.name: [p.clone() for p in a.parameters().values()] for a in model.attachments}
    batch = {"mood": (ids, torch.tensor([0, 1, 1]), None)}
    train_together(model, batch.__getitem__, {"mood": 1}, steps=3)
    changed = {
        a.name: not all(map(torch.equal, a.parameters().values(), before[a.name]))
        for a in model.attachments
    }
    assert changed == {"mood": True, "mood head": True, "tags": False, "tags head": False}


def test_a_shared_prompt_serves_every_head(model, ids):
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    tables = tables_of(model)
    select_task(model, "tags")
    assert all(a is b for a, b in zip(tables, tables_of(model), strict=True))
    assert model(ids).shape == (3, 11, 5)


def test_tasks_are_drawn_in_proportion_to_their_size():
    """(P-tuning v2 3)"""
    order = task_order({"small": 100, "large": 300}, 4000, seed=3)
    # 4,000 draws at 1/4: 4 standard deviations of 27.4
    assert abs(Counter(order)["small"] - 1000) < 4 * 27.4
    assert order == task_order({"small": 100, "large": 300}, 4000, seed=3)
    assert order != task_order({"small": 100, "large": 300}, 4000, seed=4)


def test_training_together_learns_both_tasks(ids):
    """(P-tuning v2 3): the first token decides one task, every token's parity the other."""
    model = tiny_model(dtype=torch.float32)
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    batch = {
        "mood": (ids, ids[:, 0] % 2, None),
        "tags": (ids, ids % 2, torch.tensor([11, 11, 11])),
    }
    history = train_together(model, batch.__getitem__, {"mood": 1, "tags": 1}, steps=80)
    for task in TASKS:
        losses = [loss for name, loss in history if name == task]
        assert losses[-1] < 0.5 * losses[0], f"{task}: {losses[0]:.3f} to {losses[-1]:.3f}"
    assert not model.training


def test_a_head_moves_in_its_own_task_s_steps_alone(model, ids):
    """AdamW would move a parameter whose gradient is 0, by its momentum."""
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    seen = []

    def batch(task):
        heads = {a.name: a for a in model.attachments[1:]}
        seen.append((task, {n: a.tensors()["head.weight"].clone() for n, a in heads.items()}))
        return ids, ids[:, 0] % 2 if task == "mood" else ids % 2, None

    train_together(model, batch, {"mood": 1, "tags": 1}, steps=12)
    assert {task for task, _ in seen[:-1]} == set(TASKS)
    for (task, before), (_, after) in pairwise(seen):
        moved = {n for n in before if not torch.equal(before[n], after[n])}
        assert moved == {f"{task} head"}


def test_the_loss_reads_each_row_at_its_last_real_token(model, ids):
    """(P-tuning v2 2) with rows of different lengths."""
    attach_tasks(model, {"mood": Task(2, prompt_length=3)})
    lengths, labels = torch.tensor([11, 4, 7]), torch.tensor([0, 1, 1])
    logits = torch.stack([model(ids[b : b + 1, :n])[0] for b, n in enumerate(lengths.tolist())])
    expected = -logits.log_softmax(-1)[torch.arange(3), labels].mean().item()
    batch = {"mood": (ids, labels, lengths)}
    ((_, loss),) = train_together(model, batch.__getitem__, {"mood": 1}, steps=1)
    assert abs(loss - expected) < EXACT


def test_dropout_falls_on_the_prompts(model):
    PTuningV2(20, dropout=0.5).attach(model)
    assert all(block.attn.core.drop.p == 0.5 for block in model.blocks)


def test_adapting_goes_on_from_the_shared_prompt_with_one_task(model, ids):
    base = model(ids)
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    randomize(select_task(model, "tags"))
    before = model(ids)
    adapt(model, "tags")
    assert torch.equal(model(ids), before)
    assert [a.name for a in model.attachments] == ["tags", "tags head"]
    names = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in names) == 2 * 4 * 2 * 32 + 5 * 33
    assert torch.equal(minipeft.detach(model)(ids), base)


def test_an_adapted_task_does_not_change_a_copy_s_shared_prompt(model, ids):
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    twin = adapt(copy.deepcopy(model), "mood")
    before = model(ids)
    randomize(twin)
    assert torch.equal(model(ids), before)


def test_adapting_to_an_unknown_task_is_an_error(model):
    attach_tasks(model, TASKS, shared=PTuningV2(4))
    with pytest.raises(ValueError, match="'weather head'"):
        adapt(model, "weather")
    assert len(model.attachments) == 3


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prompt_length": 0}, "prompt_length=0 must be from 1 to 63"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"layers": ()}, r"layers=\(\)"),
        ({"layers": (0, 2)}, r"layers=\(0, 2\): give some of 0 to 1"),
        ({"layers": (1, 1)}, "each once"),
    ],
)
def test_settings_that_make_no_sense_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        PTuningV2(**settings).attach(model)
    assert not model.attachments
