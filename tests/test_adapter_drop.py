"""AdapterDrop: the specification of minipeft/additive/adapter_drop.py."""

import copy

import pytest
import torch

import minipeft
from minipeft import Adapter, AdapterDrop, AdapterFusion, GPTConfig, PromptTuning
from minipeft.additive.adapter_drop import (
    draw_depth,
    dropped,
    measure_savings,
)
from minipeft.additive.adapter_pruning import adapters_of
from tests.tiny import randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same operations in another order
FIVE = GPTConfig(vocab_size=47, context_length=31, n_layer=5, n_head=3, d_model=21, d_ff=50)
PFEIFFER = Adapter(placement="pfeiffer", bottleneck=4, init="normal")


def five(technique, seed=2):
    """A model of five layers with a trained-looking technique on it."""
    torch.manual_seed(3)
    return randomize(technique.attach(tiny_model(FIVE)), 0.2, seed)


def ids_of_five(batch=3, time=9):
    return tiny_ids(batch, time, vocab=47)


def without(model, layers):
    """Logits with the adapters of these layers taken out by hand: their outputs zeroed."""
    model = copy.deepcopy(model)
    for layer, wrapper in adapters_of(model.attachments[-1]):
        if layer in layers:
            for part in (wrapper.adapter.up.weight, wrapper.adapter.up.bias):
                part.data.zero_()
    return model.eval()(ids_of_five())


# -- which layers have adapters


@pytest.mark.parametrize("drop", range(6))
def test_the_first_layers_have_no_adapter(drop):
    """(AdapterDrop 1)"""
    technique = AdapterDrop(bottleneck=4, drop=drop)
    model = technique.attach(tiny_model(FIVE))
    paths = [swap.path for swap in model.attachments[0].swaps]
    assert paths == [f"blocks.{n}.mlp" for n in range(drop, 5)]
    expected = (5 - drop) * (2 * 21 * 4 + 4 + 21)
    assert minipeft.report(model).trained == technique.count(FIVE) == expected


def test_dropping_no_layer_is_the_adapter_and_dropping_all_is_the_base():
    ids, base = ids_of_five(), tiny_model(FIVE)
    plain, none, all_ = five(PFEIFFER), five(AdapterDrop(bottleneck=4, drop=0, init="normal")), None
    assert torch.equal(none(ids), plain(ids))
    all_ = AdapterDrop(bottleneck=4, drop=5, init="normal").attach(tiny_model(FIVE))
    assert torch.equal(all_(ids), base(ids))


def test_every_placement_can_be_dropped():
    for placement, per_layer in (("houlsby", 2), ("parallel", 1), ("pfeiffer", 1)):
        technique = AdapterDrop(placement=placement, drop=2, layer_norms=False)
        attachment = technique.attach(tiny_model(FIVE)).attachments[0]
        assert len(attachment.swaps) == 3 * per_layer
        assert {layer for layer, _ in adapters_of(attachment)} == {2, 3, 4}


def test_nothing_below_the_first_adapter_asks_for_a_gradient():
    model = five(AdapterDrop(bottleneck=4, drop=3))
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda m, args, y: seen.append(y.requires_grad))
    model.train()(ids_of_five())
    assert seen == [False, False, False, True, True]


# -- robust


def test_the_depth_is_drawn_uniformly_from_0_to_drop():
    """(AdapterDrop 2)"""
    counts = torch.bincount(torch.tensor([draw_depth(3) for _ in range(4000)]), minlength=4)
    # 4,000 draws over 4 values: 1,000 each, standard deviation sqrt(4000 * 3/16) = 27; 5 of them
    assert len(counts) == 4 and (counts - 1000).abs().max() < 137


def test_robust_leaves_out_the_first_layers_of_each_batch_and_none_at_evaluation():
    model, ids = five(AdapterDrop(bottleneck=4, drop=4, robust=True)), ids_of_five()
    possible = [without(model, range(n)) for n in range(5)]
    model.train()
    drawn = set()
    for _ in range(40):
        y = model(ids)
        near = [n for n in range(5) if torch.allclose(y, possible[n], rtol=0, atol=1e-10)]
        assert len(near) == 1, "a training pass is none of the five depths"
        drawn |= set(near)
    assert drawn == {0, 1, 2, 3, 4}  # each is missed by 40 draws with probability 1e-4
    model.eval()
    assert all(torch.equal(model(ids), possible[0]) for _ in range(5))


def test_evaluation_draws_no_random_number():
    model = five(AdapterDrop(bottleneck=4, drop=4, robust=True))
    before = torch.get_rng_state()
    model(ids_of_five())
    assert torch.equal(torch.get_rng_state(), before)
    model.train()(ids_of_five())
    assert not torch.equal(torch.get_rng_state(), before)


def test_robust_with_drop_0_is_the_plain_adapter_also_in_training():
    robust = five(AdapterDrop(bottleneck=4, drop=0, robust=True, init="normal")).train()
    plain = five(PFEIFFER).train()
    assert torch.equal(robust(ids_of_five()), plain(ids_of_five()))


def test_robust_gives_every_adapter_a_gradient_in_time():
    technique = AdapterDrop(bottleneck=4, drop=4, robust=True)
    model, ids = five(technique).train(), ids_of_five()
    assert minipeft.report(model).trained == technique.count(FIVE) == 5 * (2 * 21 * 4 + 4 + 21)
    peaks = {}
    for _ in range(12):
        model.zero_grad()
        model.loss(ids, ids).backward()
        for name, p in model.attachments[0].parameters().items():
            peak = 0.0 if p.grad is None else p.grad.abs().max().item()
            peaks[name] = max(peak, peaks.get(name, 0.0))
    assert len(peaks) == 20 and min(peaks.values()) > 1e-8 * max(peaks.values())


def test_robust_draws_repeat_with_the_seed_and_survive_a_copy():
    model, ids = five(AdapterDrop(bottleneck=4, drop=4, robust=True)).train(), ids_of_five()
    twin = copy.deepcopy(model)
    runs = []
    for one in (model, model, twin):
        torch.manual_seed(11)
        runs.append(torch.stack([one(ids) for _ in range(6)]))
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert len({y[0, 0, 0].item() for y in runs[0]}) > 1
    for _, wrapper in adapters_of(twin.attachments[0]):
        wrapper.drawn_out = None  # the copy's draws must reach the copy's adapters
    twin(ids)
    assert all(w.drawn_out is not None for _, w in adapters_of(twin.attachments[0]))
    assert all(w.drawn_out is not None for _, w in adapters_of(model.attachments[0]))


def test_robust_stands_behind_a_soft_prompt_too():
    model, ids = tiny_model(FIVE), ids_of_five()
    PromptTuning(prompt_length=4).attach(model, "prompt")
    before = model(ids)
    AdapterDrop(bottleneck=3, robust=True).attach(model, "drop")
    assert torch.equal(model(ids), before) and model.embed.virtual_tokens == 4
    assert model.train()(ids).shape == before.shape


# -- at inference


@pytest.mark.parametrize("n", range(6))
def test_dropped_leaves_out_the_first_n_layers_inside_the_with(n):
    for technique in (PFEIFFER, AdapterDrop(bottleneck=4, drop=3, robust=True)):
        model, ids = five(technique), ids_of_five()
        full, expected = model(ids), without(model, range(n))
        with dropped(model, n, "default"):
            assert torch.equal(model(ids), expected)
        assert torch.equal(model(ids), full)


def test_dropped_of_all_layers_is_the_base():
    model, ids = five(PFEIFFER), ids_of_five()
    with dropped(model, 5):
        assert torch.equal(model(ids), tiny_model(FIVE)(ids))


def test_dropped_takes_fusions_too_and_restores_after_an_error():
    model, ids = five(AdapterFusion(adapters=[PFEIFFER, PFEIFFER])), ids_of_five()
    full = model(ids)
    with pytest.raises(RuntimeError), dropped(model, 5):
        assert torch.equal(model(ids), tiny_model(FIVE)(ids))
        raise RuntimeError
    assert torch.equal(model(ids), full)


# -- bad settings


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (AdapterDrop(drop=6), "drop=6 must be from 0 to n_layer=5"),
        (AdapterDrop(drop=-1), "drop=-1"),
        (AdapterDrop(drop=1.5), "drop=1.5"),
        (AdapterDrop(placement="none"), "placement='none'"),
    ],
)
def test_bad_settings_are_named(technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(tiny_model(FIVE))


def test_a_bad_depth_is_named():
    model, message = five(PFEIFFER), "n=6 must be from 0 to the model's 5 layers"
    with pytest.raises(ValueError, match=message), dropped(model, 6):
        pass


# -- what it saves


def test_savings_are_measured_and_the_model_is_left_as_it_was():
    model, ids = tiny_model(FIVE, torch.float32), ids_of_five(4, 20)
    before = model(ids)
    savings = measure_savings(model, ids, ids, AdapterDrop(bottleneck=8), rounds=3)
    assert [s.drop for s in savings] == [0, 1, 2, 3, 4, 5]
    assert [s.trained for s in savings] == [(5 - n) * (2 * 21 * 8 + 8 + 21) for n in range(6)]
    assert all(s.training > 0 and s.inference > 0 for s in savings)  # how fast is no unit test's
    assert torch.equal(model(ids), before) and not model.attachments
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
