"""Several tasks in one pass: the specification of minipeft/additive/shared_trunk.py."""

import pytest
import torch

from minipeft import Adapter, AdapterDrop, AdapterFusion, Head, LoRA, PromptTuning, UniPELT
from minipeft.additive.adapter_drop import dropped
from minipeft.additive.shared_trunk import measure_sharing, tasks_at_once
from minipeft.technique import set_adapter
from tests.test_adapter_drop import FIVE, ids_of_five
from tests.tiny import close, randomize, tiny_model

EXACT = 1e-12  # float64: batched products round differently
TASKS = {
    "a": AdapterDrop(bottleneck=4, drop=2),
    "b": AdapterDrop(bottleneck=7, drop=3, activation="tanh", scale=2.0),
    "c": Adapter(placement="houlsby", leave_out=(0, 1), layer_norms=False, bottleneck=3),
    "d": Adapter(placement="parallel", leave_out=(0, 1, 4), bottleneck=5),
}


def with_tasks(tasks=TASKS, model=None):
    """A model with these attachments, trained-looking, all switched off; and each one's logits."""
    model = model or tiny_model(FIVE)
    kept = [a.name for a in model.attachments]
    alone = {}
    for seed, (name, technique) in enumerate(tasks.items()):
        randomize(technique.attach(model, name), 0.2, seed)
        alone[name] = model(ids_of_five())
        set_adapter(model, kept)
    return model, alone


def test_every_task_gets_what_it_gets_alone():
    """(SharedTrunk 2), adapters of different placements, widths and layers side by side."""
    model, alone = with_tasks()
    together = tasks_at_once(model, ids_of_five(), list(TASKS))
    assert together.shape == (4, 3, 9, 47)
    for n, name in enumerate(TASKS):
        close(together[n], alone[name], EXACT)


def test_the_order_of_the_tasks_is_the_order_asked_for():
    model, alone = with_tasks()
    together = tasks_at_once(model, ids_of_five(), ["d", "a"])
    close(together, torch.stack([alone["d"], alone["a"]]), EXACT)


def test_below_the_first_adapter_one_copy_runs_and_above_it_one_for_each_task():
    """(SharedTrunk 1)"""
    model, _ = with_tasks()
    rows = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: rows.append(y.shape[0]))
    tasks_at_once(model, ids_of_five(3), list(TASKS))
    assert rows == [3, 3, 12, 12, 12]
    rows.clear()
    tasks_at_once(model, ids_of_five(3), ["b", "b"])
    assert rows == [3, 3, 3, 6, 6]


def test_what_was_on_stays_on():
    model, alone = with_tasks()
    set_adapter(model, "b")
    for _ in range(2):
        tasks_at_once(model, ids_of_five(), ["a", "b"])
        assert torch.equal(model(ids_of_five()), alone["b"])
    with pytest.raises(ValueError, match="context_length=31"):
        tasks_at_once(model, ids_of_five(1, 40), ["a"])
    assert torch.equal(model(ids_of_five()), alone["b"])


def test_gradients_reach_every_task():
    model, _ = with_tasks()
    tasks_at_once(model, ids_of_five(), ["a", "b"])[1].square().mean().backward()
    grads = {
        a.name: [p.grad is not None and bool(p.grad.any()) for p in a.parameters().values()]
        for a in model.attachments
    }
    assert all(grads["b"]) and not any(grads["a"])


def test_tasks_share_a_prompt_lora_and_a_head():
    model = tiny_model(FIVE)
    for seed, technique in enumerate((PromptTuning(prompt_length=3), LoRA(rank=2), Head(4))):
        randomize(technique.attach(model, f"shared{seed}"), 0.2, seed)
    model, _ = with_tasks(model=model)
    lengths = torch.tensor([9, 2, 5])
    ids = ids_of_five()
    shared = [f"shared{n}" for n in range(3)]
    together = tasks_at_once(model, ids, ["a", "c"], lengths=lengths)
    for n, name in enumerate("ac"):
        set_adapter(model, [*shared, name])
        close(together[n], model(ids, lengths=lengths), EXACT)


def test_fusions_are_tasks_too():
    model, alone = with_tasks()
    pfeiffer = Adapter(placement="pfeiffer", init="normal", bottleneck=3)
    AdapterFusion(adapters=[pfeiffer, pfeiffer], leave_out=(0,)).attach(model, "fusion")
    expected = randomize(model)(ids_of_five())
    together = tasks_at_once(model, ids_of_five(), ["fusion", "a"])
    close(together[0], expected, EXACT)
    close(together[1], alone["a"], EXACT)


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (Adapter(), "'x' .Adapter. has no adapters, or trains more"),
        (LoRA(), "'x' .LoRA."),
        (AdapterDrop(drop=5), "'x' .AdapterDrop. has no adapters"),
    ],
)
def test_attachments_without_a_common_trunk_are_named(technique, message):
    model = technique.attach(tiny_model(FIVE), "x")
    with pytest.raises(ValueError, match=message):
        tasks_at_once(model, ids_of_five(), ["x"])
    with pytest.raises(ValueError, match="no attachment is called 'y'"):
        tasks_at_once(model, ids_of_five(), ["y"])


def test_sharing_is_measured_and_leaves_the_model_as_it_was():
    model, alone = with_tasks()
    set_adapter(model, "a")
    apart, together = measure_sharing(model, ids_of_five(), ["a", "b"], rounds=2)
    assert apart > 0 and together > 0
    assert torch.equal(model(ids_of_five()), alone["a"])


def test_a_start_and_lengths_are_what_they_are_for_one_task():
    """Virtual tokens in front of a text that begins later; gates over rows with padding."""
    model, ids = tiny_model(FIVE), ids_of_five()
    PromptTuning(3).attach(model, "prompt")
    Head(3).attach(model, "classifier")
    UniPELT(0, 0, 2, gate_over="sequence").attach(model, "gates")
    randomize(model)
    with_tasks({"a": TASKS["a"], "b": TASKS["b"]}, model)
    lengths = torch.tensor([9, 4, 1])
    together = tasks_at_once(model, ids, ["a", "b"], start=2, lengths=lengths)
    for n, name in enumerate("ab"):
        set_adapter(model, ["prompt", "classifier", "gates", name])
        close(together[n], model(ids, start=2, lengths=lengths), EXACT)


def test_adapters_that_are_left_out_stay_out():
    model, alone = with_tasks()
    with dropped(model, 4):
        together = tasks_at_once(model, ids_of_five(), list(TASKS))
        for n, name in enumerate(TASKS):
            set_adapter(model, name)
            assert not torch.equal(model(ids_of_five()), alone[name])
            close(together[n], model(ids_of_five()), EXACT)
