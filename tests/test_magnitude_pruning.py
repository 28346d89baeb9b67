"""The specification of minipeft/compressed/magnitude_pruning.py."""

import contextlib
import copy

import pytest
import torch

from minipeft import technique as contract
from minipeft.checkpoint import save_adapter
from minipeft.compressed import magnitude_pruning as magnitude
from minipeft.compressed.magnitude_pruning import (
    KeepZeros,
    MagnitudePruning,
    count_of,
    cubic_sparsity,
    keep_largest,
    keep_largest_of_all,
    keep_pattern,
    projections,
    prune_magnitude,
    sparsity_of,
)
from minipeft.compressed.semi_structured import pack_model
from minipeft.compressed.structured_pruning import prune_neurons
from minipeft.dataset import Encoded
from minipeft.gpt import GPT, GPTConfig
from minipeft.quantized.qlora import quantize_model
from minipeft.training import TrainingConfig, train
from tests.tiny import CONFIG, tiny_ids, tiny_model

RANDOM = torch.Generator().manual_seed(3)


def weights_of(model):
    return {path: linear.weight.detach() for path, linear in projections(model).items()}


def by_definition(scores, count):
    """(Magnitude 1), written out: drop one smallest at a time."""
    values, keep = [float(x) for x in scores.flatten()], torch.ones(scores.numel()).bool()
    for i in sorted(range(len(values)), key=lambda i: values[i])[:count]:
        keep[i] = False
    return keep.view_as(scores)


def steps(model, number, total=None, lr=0.05, first=1):
    """Plain AdamW steps with the techniques' own after_step."""
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=lr)
    ids = tiny_ids()
    for step in range(first, first + number):
        model.loss(ids[:, :-1], ids[:, 1:].contiguous()).backward()
        optimizer.step()
        contract.after_step(model, step, total or number)
        optimizer.zero_grad()
        yield step


# -- masks


@pytest.mark.parametrize("sparsity", [0, 0.29, 0.5, 0.93])
def test_the_smallest_go_and_exactly_so_many(sparsity):
    # (Magnitude 1), an odd shape; 0.29 * 100 is 28.999... in floating point
    scores = torch.rand(10, 10, generator=RANDOM, dtype=torch.float64)
    count = round(sparsity * 100)
    assert torch.equal(keep_largest(scores, sparsity), by_definition(scores, count))
    odd = torch.rand(7, 47, generator=RANDOM, dtype=torch.float64)
    assert int((~keep_largest(odd, 0.5)).sum()) == 7 * 47 // 2


def test_the_number_is_exact_at_any_size():
    for n in (100, 10**4, 10**8, 10**10):  # 0.29 n is a little less than that in floating point
        assert count_of(0.29, n) == 29 * n // 100
    assert count_of(1 - 1e-9, 1) == 0 and count_of(1 / 3, 10) == 3


def test_equal_scores_are_pruned_one_by_one():
    assert keep_largest(torch.ones(6), 0.5).tolist() == [False] * 3 + [True] * 3


def test_global_compares_over_all_tensors():
    parts = [torch.tensor([[1.0, 9.0]]), torch.tensor([2.0, 3.0, 4.0, 8.0])]
    kept = keep_largest_of_all(parts, 0.5)
    assert [k.tolist() for k in kept] == [[[False, True]], [False, False, True, True]]


def test_a_pattern_leaves_the_largest_of_every_group_in_a_row():
    # (Magnitude 4)
    scores = torch.tensor([[4.0, 1, 3, 2, 0, 0, 0, 1], [1, 2, 3, 4, 8, 7, 6, 5]])
    kept = keep_pattern(scores, 2, 4).int().tolist()
    assert kept == [[1, 0, 1, 0, 0, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0]]
    three = keep_pattern(torch.rand(5, 15, generator=RANDOM), 1, 3)
    assert (three.unflatten(-1, (5, 3)).sum(-1) == 2).all()


def test_the_cubic_schedule():
    # (Magnitude 3) with s = 0.9 over 10 steps: values worked out from the formula, 4 digits
    found = [cubic_sparsity(t, 0, 10, 0.9) for t in range(11)]
    known = [0, 0.2439, 0.4392, 0.5913, 0.7056, 0.7875, 0.8424, 0.8757, 0.8928, 0.8991, 0.9]
    assert found == pytest.approx(known, abs=5e-5)
    assert cubic_sparsity(3, 5, 10, 0.9) == 0 and cubic_sparsity(99, 5, 10, 0.9) == 0.9
    assert cubic_sparsity(7.5, 5, 10, 0.8) == pytest.approx(0.8 * (1 - 0.5**3))


# -- a model, once


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_pruning_is_exact_and_leaves_the_rest_alone(scope):
    model, before = tiny_model(), weights_of(tiny_model())
    others = {n: p.clone() for n, p in model.named_parameters() if p.ndim == 1 or "embed" in n}
    assert prune_magnitude(model, 0.3, scope) is model
    after = weights_of(model)
    scores = [w.abs() for w in before.values()]
    if scope == "layer":
        masks = [by_definition(s, int(0.3 * s.numel())) for s in scores]
    else:
        joint = torch.cat([s.flatten() for s in scores])
        threshold = joint.sort().values[int(0.3 * len(joint))]  # no two are equal
        masks = [s >= threshold for s in scores]
    for (path, w), mask in zip(after.items(), masks):
        assert torch.equal(w, before[path] * mask)
    for name, tensor in others.items():
        assert torch.equal(dict(model.named_parameters())[name], tensor)


def test_sparsity_is_the_share_of_zeros():
    assert sparsity_of(tiny_model()) == 0
    size = sum(w.numel() for w in weights_of(tiny_model()).values())
    assert sparsity_of(prune_magnitude(tiny_model(), 0.37, "global")) == int(0.37 * size) / size
    assert sparsity_of(prune_magnitude(tiny_model(), pattern=(2, 4))) == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sparsity": 1.0}, "sparsity=1.0"),
        ({"sparsity": -0.1}, "sparsity=-0.1"),
        ({"scope": "local"}, "scope='local'"),
        ({"pattern": (4, 4)}, "pattern=4:4"),
        ({"pattern": (2, 5)}, "multiple of 5, not 32"),
        ({"pattern": (2, 4, 8)}, r"pattern=\(2, 4, 8\) is no \(zeros, group\)"),
        ({"pattern": (2.0, 4.0)}, "such as"),
        ({"pattern": (2, 4), "gradual": True}, "gradual"),
        ({"begin": 0.8, "end": 0.5}, "begin=0.8"),
        ({"every": 0}, "every=0"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        MagnitudePruning(**settings).attach(tiny_model())


def test_a_pattern_is_asked_of_the_rows_there_are():
    """Not of those that the config tells of: neurons may have been taken out."""
    config = GPTConfig(vocab_size=11, context_length=8, n_layer=1, n_head=3, d_model=12, d_ff=10)
    model = prune_neurons(GPT(config), {0: [2, 7]})
    assert sparsity_of(prune_magnitude(model, pattern=(2, 4))) == 0.5
    MagnitudePruning(pattern=(2, 4)).attach(model)
    with pytest.raises(ValueError, match="multiple of 4, not 7"):
        prune_magnitude(prune_neurons(GPT(config), {0: [2, 7, 9]}), pattern=(2, 4))


@pytest.mark.parametrize(
    "prune",
    [prune_magnitude, MagnitudePruning(0.5).attach, KeepZeros().attach],
    ids=["once", "in training", "zeros kept"],
)
def test_weights_that_are_no_floats_are_refused(prune):
    """What is written into a weight that is made anew at each reading would be lost."""
    quantised = quantize_model(tiny_model(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q is a NF4Linear"):
        prune(quantised)
    packed = pack_model(prune_magnitude(tiny_model(), pattern=(2, 4)))
    with pytest.raises(ValueError, match="SemiStructuredLinear"):
        prune(packed)
    assert not quantised.attachments and sparsity_of(packed) == 0.5


# -- a model in training


def test_zeros_stay_zero_through_training_and_the_rest_moves():
    # (Magnitude 2): AdamW moves masked weights by momentum and decay, so the mask must return
    model = MagnitudePruning(0.5).attach(tiny_model())
    start = {p: w.clone() for p, w in weights_of(model).items()}
    for _ in steps(model, 3):
        assert sparsity_of(model) == 0.5
    for path, w in weights_of(model).items():
        assert torch.equal(w == 0, start[path] == 0)
        assert (w != start[path]).any()


def test_a_weight_that_adam_pushes_off_zero_comes_back():
    model = MagnitudePruning(0.5).attach(tiny_model())
    with torch.no_grad():
        for w in weights_of(model).values():
            w += 1
    assert sparsity_of(model) == 0
    contract.after_step(model, 1, 10)
    assert sparsity_of(model) == 0.5


def test_gradual_pruning_follows_the_schedule_with_nested_masks():
    technique = MagnitudePruning(0.8, gradual=True, begin=0.1, end=0.7, every=2)
    model = technique.attach(tiny_model())
    sizes = [w.numel() for w in weights_of(model).values()]
    before = {p: torch.ones_like(w, dtype=torch.bool) for p, w in weights_of(model).items()}
    due = 0.0
    for step in steps(model, 20, lr=0.01):
        if step <= 14 and step % 2 == 0:
            u = min(1, max(0, (step - 2) / 12))
            due = 0.8 * (1 - (1 - u) ** 3)
        wanted = sum(int(due * n + 1e-9) for n in sizes) / sum(sizes)
        assert sparsity_of(model) == wanted
        for path, w in weights_of(model).items():
            assert not ((w != 0) & ~before[path]).any()  # what is pruned does not come back
            before[path] = w != 0
    assert due == 0.8


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_large_steps_do_not_prune_more_than_the_schedule_says(scope):
    """The optimizer moves pruned weights as far as the others, here by as much as a weight is
    large; they are put back before the next ones are chosen. (Magnitude 2)"""
    model = tiny_model()
    model.reset_parameters(std=0.02)
    MagnitudePruning(0.8, scope, gradual=True, every=1).attach(model)
    sizes = [w.numel() for w in weights_of(model).values()]
    for step in steps(model, 8, total=60, lr=0.02):
        due = 0.8 * (1 - (1 - step / 42) ** 3)
        counted = sizes if scope == "layer" else [sum(sizes)]
        assert sparsity_of(model) == sum(int(due * n + 1e-9) for n in counted) / sum(sizes)


def test_gradual_with_a_global_scope_is_exact_over_all_matrices():
    model = MagnitudePruning(0.6, "global", gradual=True, every=1).attach(tiny_model())
    list(steps(model, 4))
    size = sum(w.numel() for w in weights_of(model).values())
    assert sparsity_of(model) == int(0.6 * size) / size


def test_gradual_begins_as_the_base_and_one_shot_with_its_zeros():
    base = tiny_model()
    expected = base(tiny_ids())
    assert torch.equal(MagnitudePruning(0.9, gradual=True).attach(base)(tiny_ids()), expected)
    once = MagnitudePruning(0.4).attach(tiny_model())
    assert torch.equal(once(tiny_ids()), prune_magnitude(tiny_model(), 0.4)(tiny_ids()))


def test_detaching_gives_the_base_back_and_merging_keeps_the_zeros():
    model, before = tiny_model(), copy.deepcopy(tiny_model().state_dict())
    MagnitudePruning(0.5).attach(model)
    list(steps(model, 2))
    trained = model(tiny_ids())
    merged = contract.merge(copy.deepcopy(model))
    assert type(merged.blocks[0].attn.q) is torch.nn.Linear
    assert torch.equal(merged(tiny_ids()), trained)
    assert sparsity_of(merged) == 0.5
    contract.detach(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_every_parameter_is_trained_and_counted():
    model = MagnitudePruning(0.5).attach(tiny_model())
    trained = sum(p.numel() for p in contract.trainable_parameters(model))
    assert MagnitudePruning().count(CONFIG) == trained == KeepZeros().count(CONFIG)
    assert trained == sum(p.numel() for p in tiny_model().parameters())


def test_a_global_mask_of_a_model_with_one_loud_layer_prunes_the_quiet_ones():
    model = tiny_model()
    with torch.no_grad():
        model.blocks[1].mlp.up.weight.mul_(100)
    prune_magnitude(model, 0.5, "global")
    assert (model.blocks[1].mlp.up.weight != 0).float().mean() > 0.99


def test_keep_zeros_holds_whatever_is_zero():
    model = prune_magnitude(tiny_model(), pattern=(2, 4))
    where = {path: w == 0 for path, w in weights_of(model).items()}
    KeepZeros().attach(model)
    list(steps(model, 2))
    for path, w in weights_of(model).items():
        assert torch.equal(w == 0, where[path])


def test_masks_travel_with_the_attachment():
    model = MagnitudePruning(0.5).attach(tiny_model())
    tensors = model.attachments[0].tensors()
    assert tensors["blocks.0.attn.q.mask"].dtype == torch.bool
    assert torch.equal(tensors["blocks.0.attn.q.mask"], model.blocks[0].attn.q.inner.weight != 0)


def test_hold_needs_no_attachment():
    model = tiny_model()
    masks = {"blocks.1.mlp.down": torch.rand(32, 128, generator=RANDOM) > 0.5}
    magnitude.hold(model, masks)(model, 1, 1)
    assert torch.equal(model.blocks[1].mlp.down.weight != 0, masks["blocks.1.mlp.down"])
    assert (model.blocks[0].mlp.down.weight != 0).all()


def test_it_runs_at_an_odd_size():
    model = GPT(GPTConfig(vocab_size=11, context_length=8, n_layer=1, n_head=1, d_model=7, d_ff=5))
    assert sparsity_of(prune_magnitude(model, 0.5)) == (4 * 24 + 2 * 17) / (4 * 49 + 2 * 35)


def test_a_run_that_was_stopped_goes_on_with_the_same_masks(tmp_path):
    rows = [Encoded(ids[:-1], ids[1:]) for ids in tiny_ids(8).tolist()]
    technique = MagnitudePruning(0.7, gradual=True, every=1)

    def run(steps_until, folder, resume=False):
        model = technique.attach(tiny_model())

        def stop(_, step, __):
            if step == steps_until:
                raise KeyboardInterrupt

        config = TrainingConfig(steps=6, batch_size=4, device="cpu", checkpoint_every=2)
        with contextlib.suppress(KeyboardInterrupt):
            train(model, rows, config, folder=folder, resume=resume, after_step=(stop,), show=False)
        return model

    whole = run(99, tmp_path / "whole")
    run(3, tmp_path / "parts")  # the checkpoint is of step 2, in the middle of the schedule
    again = run(99, tmp_path / "parts", resume=True)
    assert torch.equal(again(tiny_ids()), whole(tiny_ids()))
    assert sparsity_of(again) == pytest.approx(0.7, abs=1e-3)


def test_there_is_no_adapter_to_save_and_the_way_out_is_named(tmp_path):
    model = MagnitudePruning(0.5).attach(tiny_model(dtype=torch.float32))
    with pytest.raises(ValueError, match=r"merge\(model\).*save_pretrained"):
        save_adapter(model, tmp_path / "adapter")
    contract.merge(model).save_pretrained(tmp_path / "model")
    assert sparsity_of(GPT.from_pretrained(tmp_path / "model")) == 0.5
