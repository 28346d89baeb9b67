"""The contract: thirteen points that hold for every technique. Adding a technique to cases.py is
joining it.

Each point is one function `point_NN(case)` that raises AssertionError where the point does not
hold, so the table of exemptions can be checked too: an exemption that is not needed is an error.
"""

from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import minipeft
from minipeft import technique as contract
from minipeft import wrap
from minipeft.dataset import Encoded
from minipeft.decoding import Cache
from minipeft.gpt import GPT, GPTConfig
from minipeft.technique import trainable_parameters
from minipeft.training import TrainingConfig, train
from tests.contract.cases import (
    CASES,
    DEAD_TENSORS,
    EXEMPTIONS,
    GRADCHECKS,
    NO_FUNCTIONS,
    PREPARE,
)
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

ROOT = Path(__file__).parents[2]
EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16 on values around 1
SINGLE = 1e-5  # float32, the same with roundings of 6e-8


# -- what the points are made of


def prepared(case, dtype=torch.float64, config=CONFIG):
    """The model as the case finds it: tiny, plus what PREPARE puts on it."""
    return prepare(case, tiny_model(config, dtype))


def prepare(case, model):
    """What PREPARE puts on it is random, too, and the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        PREPARE.get(case, lambda model: None)(model)
    return model


def attached(case, dtype=torch.float64, config=CONFIG, seed=3):
    """The tiny model with the case's technique on it, at its start, in eval mode."""
    model = prepared(case, dtype, config)
    torch.manual_seed(seed)
    return CASES[case].attach(model, name="case")


def trained(case, dtype=torch.float64, steps=3):
    """The same after a few steps, all of its tensors away from their start."""
    model = randomize(attached(case, dtype))
    train_steps(model, steps)
    return model.eval()


def last(model):
    return contract.attachment_of(model, "case")


def output(model, ids, lengths=None):
    with torch.no_grad():
        return model(ids, lengths=lengths)


def loss_of(model, ids, lengths=None, extra=True):
    """The training loss, with the technique's own term, for any head."""
    classes = CONFIG.vocab_size
    if not isinstance(model.head, torch.nn.Linear) and hasattr(model.head, "pools"):
        classes = model.head.bias.numel()
    labels = ids.roll(-1, 1) % classes
    labels = labels[:, 0] if getattr(model.head, "pools", False) else labels
    loss = model.loss(ids, labels, lengths=lengths)
    own = contract.extra_loss(model) if extra else None
    return loss if own is None else loss + own


def gradients(model, ids, seed=5):
    """Name -> gradient of every trained tensor; the same random numbers on every call."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss_of(model, ids).backward()
    named = last(model).parameters().items()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named}


def train_steps(model, steps, learning_rate=1e-2):
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=learning_rate)
    model.train()
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss_of(model, tiny_ids(seed=10 + step)).backward()
        optimizer.step()
        contract.after_step(model, step, steps)
    return model


def snapshot(model):
    """The tensors themselves, by identity, with copies of their bits and their flags."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {n: (t, t.detach().clone(), t.requires_grad) for n, t in tensors.items()}


def assert_untouched(before):
    for name, (tensor, bits, _) in before.items():
        assert torch.equal(tensor, bits), f"{name} of the base has changed"


def raises(message, action):
    """Assert that `action` raises a ValueError and that the message matches."""
    try:
        action()
    except ValueError as error:
        assert re.search(message, str(error)), f"{message!r} is not in {str(error)!r}"
    else:
        raise AssertionError(f"no error, where one with {message!r} was due")


# -- the thirteen points


def point_01(case):
    """At initialisation the model computes what the base computes, bitwise on one thread."""
    for dtype in (torch.float64, torch.float32):
        ids = tiny_ids()
        for mode in (True, False):
            base = output(prepared(case, dtype).train(mode), ids)
            model = attached(case, dtype).train(mode)
            torch.manual_seed(0)
            assert torch.equal(output(model, ids), base), f"not the base in {dtype}, train={mode}"


def point_02(case):
    """Only what is declared is trained; after some steps the base is bitwise unchanged."""
    model = prepared(case)
    before = snapshot(model)
    torch.manual_seed(3)
    CASES[case].attach(model, name="case")
    declared = {id(p) for p in last(model).parameters().values()}
    receiving = {id(p) for p in model.parameters() if p.requires_grad}
    assert receiving <= declared, "a tensor is trained that the technique does not declare"
    assert not receiving & {id(t) for t, _, _ in before.values()}, "a base tensor is trained"
    train_steps(model, 3)
    assert_untouched(before)
    assert all(t.grad is None for t, _, _ in before.values()), "a base tensor has a gradient"


def point_03(case):
    """The trained count is the closed formula's, also at other shapes and on the meta device."""
    shapes = {
        "tiny": CONFIG,
        "odd": GPTConfig(
            vocab_size=101, context_length=64, n_layer=3, n_head=4, d_model=36, d_ff=52
        ),
        "GPT-2": GPTConfig(
            vocab_size=50257, context_length=1024, n_layer=12, n_head=12, d_model=768
        ),
    }
    for name, config in shapes.items():
        with torch.device("meta"):
            model = GPT(config)
            CASES[case].attach(prepare(case, model), name="case")
        assert all(p.is_meta for p in model.parameters()), "something was made off the meta device"
        count = sum(p.numel() for p in trainable_parameters(model))
        assert count == CASES[case].count(config), f"{name}: {count} trained, not the formula's"
        assert count == minipeft.report(model).trained


def point_04(case):
    """Every trained tensor has a gradient above 1e-8 of the largest within two steps."""
    largest = gradient_peaks(case)
    top = max(largest.values())
    dead = {name for name, peak in largest.items() if not peak > 1e-8 * top}
    exempt = {name for name in largest if name.endswith(dead_ending(case))}
    assert dead <= exempt, f"no gradient for {sorted(dead - exempt)}"
    assert exempt <= dead, f"exempted, but alive: {sorted(exempt - dead)}"


def gradient_peaks(case):
    """Name -> largest absolute gradient in two steps."""
    model, peaks = attached(case).train(), {}
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    for step in (1, 2):
        for name, gradient in gradients(model, tiny_ids(seed=20 + step)).items():
            peaks[name] = max(peaks.get(name, 0.0), gradient.abs().max().item())
        optimizer.step()
    return peaks


def dead_ending(case):
    entry = DEAD_TENSORS.get(case) or DEAD_TENSORS.get(type(CASES[case]).__name__)
    return entry[0] if entry else "(no tensor)"


def point_05(case):
    """`detach` gives the base back bitwise and leaves no module behind; `disabled` inside."""
    model, bare, ids = prepared(case), prepared(case), tiny_ids()
    if bare.attachments:  # `disabled` switches off what the case found on the model, too
        contract.detach(bare)
    before, modules = snapshot(model), list(model.modules())
    base = output(model, ids)
    CASES[case].attach(model, name="case")
    train_steps(randomize(model), 2).eval()
    adapted = output(model, ids)
    assert adapted.shape != base.shape or not torch.equal(adapted, base)
    with contract.disabled(model):
        assert torch.equal(output(model, ids), output(bare, ids)), "disabled is not the base"
    assert torch.equal(output(model, ids), adapted), "disabled has left something behind"
    contract.detach(model, "case")
    assert torch.equal(output(model, ids), base), "detached, the model is not the base"
    assert [id(m) for m in model.modules()] == [id(m) for m in modules], "other modules than before"
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (tensor, _, flag) in before.items():
        assert after[name][0] is tensor, f"{name} is another object than before"
        assert tensor.requires_grad == flag, f"{name}.requires_grad was not given back"
    assert_untouched(before)


def point_06(case, folder):
    """save, load: bitwise; the file holds the technique's tensors alone; bad files are errors."""
    model, ids = trained(case), tiny_ids()
    minipeft.save_adapter(model, folder, name="case")
    again = prepared(case)
    again = minipeft.load_adapter(again, folder, name="case").eval()
    assert torch.equal(output(again, ids), output(model, ids)), "loaded, it computes otherwise"
    mine = last(model).tensors()
    loaded = last(again).tensors()
    assert mine.keys() == loaded.keys()
    assert all(torch.equal(mine[n], loaded[n]) for n in mine)
    base = {n for n, _ in tiny_model().named_parameters()} - set(CASES[case].export(last(model)))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        assert not base & set(file.keys()), "the file holds base tensors"
    bad_adapter_files(case, folder)


def bad_adapter_files(case, folder):
    """Another base, and tensors that are missing, unknown or wrongly shaped: nothing is loaded."""
    refused(prepare(case, tiny_model(seed=9)), folder, "base")
    path = folder / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        about = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(n for n in tensors if tensors[n].ndim)
    for resume in folder.glob("*resume*"):  # it would vouch for the old tensors
        resume.unlink()
    for wrong, changed in {
        name: {n: t for n, t in tensors.items() if n != name},
        "blocks.7.nothing": tensors | {"blocks.7.nothing": torch.zeros(1)},
        "shape|7, 7, 7": tensors | {name: torch.zeros(7, 7, 7)},
    }.items():
        if changed:
            save_file(changed, path, about)
            refused(prepared(case), folder, wrong if "|" in wrong else re.escape(wrong))


def refused(model, folder, message):
    names = [a.name for a in model.attachments]
    before = snapshot(model)
    raises(message, lambda: minipeft.load_adapter(model, folder, name="case"))
    assert [a.name for a in model.attachments] == names, "half an adapter was left on the model"
    assert_untouched(before)


def point_07(case):
    """eval, train, eval: the same outputs; no state leaks between steps, modes, batches, copies."""
    model, ids, other = trained(case), tiny_ids(), tiny_ids(batch=2, time=17, seed=4)
    first = output(model, ids)
    loss_of(model.train(), other).backward()
    model.zero_grad()
    assert torch.equal(output(model.eval(), ids), first), "a training pass has left a trace"
    output(model, other)
    assert torch.equal(output(model, ids), first), "another batch has left a trace"
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin, ids), first), "a deep copy computes otherwise"
    randomize(twin, seed=8)
    changed = output(twin, ids)
    assert not torch.equal(changed, first), "changing every trained tensor changes nothing"
    assert torch.equal(output(model, ids), first), "a deep copy shares tensors with the model"
    fresh = attached(case)
    last(fresh).load(last(twin).tensors())
    assert torch.equal(output(fresh, ids), changed), "learned state is cached across steps"


def point_08(case):
    """`merge` computes the same, or is an error with the reason; a name taken twice is an error."""
    model = trained(case)
    raises("'case' is taken", lambda: CASES[case].attach(model, name="case"))
    reasons = [a.technique.cannot_merge for a in model.attachments if a.technique.cannot_merge]
    if reasons:
        logits = output(model, tiny_ids())
        raises("|".join(map(re.escape, reasons)), lambda: minipeft.merge(model))
        assert torch.equal(output(model, tiny_ids()), logits), "a refused merge changed the model"
        return
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        merges_to_the_same(trained(case, dtype), tiny_ids(), tolerance)


def merges_to_the_same(model, ids, tolerance):
    before = output(model, ids)
    tensors = {n: t.detach().clone() for n, t in last(model).tensors().items()}
    with minipeft.merged(model):
        close(output(model, ids), before, tolerance)
        assert not any(isinstance(m, wrap.Wrapper) for m in model.modules())
    assert torch.equal(output(model, ids), before), "leaving `merged` does not restore every bit"
    assert all(torch.equal(tensors[n], t) for n, t in last(model).tensors().items())
    plain = minipeft.merge(model)
    close(output(plain, ids), before, tolerance)
    assert not any(isinstance(m, wrap.Wrapper) for m in plain.modules()) and not plain.attachments
    raises("nothing", lambda: minipeft.merge(plain))


def point_09(case):
    """The gradient along a random direction is the central difference of the loss."""
    model, ids = randomize(attached(case)).train(), tiny_ids()
    parameters = last(model).parameters()
    grads = gradients(model, ids)
    generator = torch.Generator().manual_seed(6)
    step = {n: torch.randn(p.shape, generator=generator) for n, p in parameters.items()}
    slope = sum((grads[n] * step[n]).sum().item() for n in grads)
    size, sides = 1e-5, []
    for side in (size, -2 * size):
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter += side * step[name].to(parameter.dtype)
            torch.manual_seed(5)
            sides.append(loss_of(model, ids).item())
    difference = (sides[0] - sides[1]) / (2 * size)
    # The difference errs by size^2 times a third derivative, and by 1e-16 / size of rounding.
    assert math.isclose(difference, slope, rel_tol=1e-5, abs_tol=1e-8), (difference, slope)


def point_10(case):
    """A row alone equals the row in any batch; cached decoding equals uncached decoding."""
    ids, lengths = tiny_ids(batch=4, time=13), torch.tensor([13, 5, 9, 1])
    for dtype, tolerance in ((torch.float64, EXACT), (torch.float32, SINGLE)):
        model = trained(case, dtype)
        batch = output(model, ids, lengths)
        for row, length in enumerate(lengths.tolist()):
            alone = output(model, ids[row : row + 1, :length])
            together = batch[row : row + 1]
            close(together if alone.ndim == 2 else together[:, :length], alone, tolerance)
        cached_equals_uncached(model, ids, tolerance)
        if not hasattr(model.head, "pools"):
            ragged_decoding_equals_uncached(model, ids, lengths)


def cached_equals_uncached(model, ids, tolerance):
    """A prompt at once, then token by token, then several at a time."""
    with torch.no_grad():
        whole = model.features(ids)
        cache = Cache(model, ids.shape[0], ids.shape[1] + model.embed.virtual_tokens)
        cuts = [0, 5, 6, 7, 10, ids.shape[1]]
        parts = [model.features(ids[:, a:b], a, cache) for a, b in pairwise(cuts)]
    close(torch.cat(parts, 1), whole, tolerance)


def ragged_decoding_equals_uncached(model, ids, lengths):
    """Greedy tokens after right-padded prompts of different lengths, against whole forward passes
    over each row alone.
    """
    new = 4
    made = minipeft.generate(model, ids, max_new_tokens=new, temperature=0, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        text = ids[row : row + 1, :length]
        for _ in range(new):
            text = torch.cat([text, output(model, text)[:, -1:].argmax(-1)], 1)
        assert torch.equal(made[row, : length + new], text[0]), f"row {row} of a ragged batch"


def point_11(case, folder):
    """Same seed, same bits; stopping, saving and resuming gives the bits of never stopping."""
    first, second = (run_of_steps(case) for _ in range(2))
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} differs between equal runs"
    whole = through_training(case, folder / "whole")
    with pytest.raises(InterruptedError):
        through_training(case, folder / "cut", act=interrupt_after_step_3)
    resumed = through_training(case, folder / "cut", resume=True)
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), f"{name} differs after resuming"


def interrupt_after_step_3(model, step, steps):
    if step == 3:
        raise InterruptedError


def through_training(case, folder, act=None, resume=False):
    """The technique's tensors after 4 steps of the training loop, checkpointed after the second."""
    model = attached(case, config=replace(CONFIG, dropout=0.1))
    ids = [row.tolist() for row in tiny_ids(batch=7, time=9, seed=40)]
    train(
        model,
        [Encoded(row[:-1], row[1:]) for row in ids],
        TrainingConfig(steps=4, batch_size=3, checkpoint_every=2, device="cpu"),
        loss_fn=lambda model, batch: loss_of(model, batch.ids, batch.lengths, extra=False),
        after_step=[act] if act else [],
        folder=folder,
        resume=resume,
        show=False,
    )
    return last(model).tensors()


def run_of_steps(case):
    torch.manual_seed(12)
    model = CASES[case].attach(prepared(case), name="case")
    return last(train_steps(model, 3)).tensors()


def point_12(case):
    """bfloat16 autocast runs near float32; gradient checkpointing gives the same gradients."""
    model, ids = trained(case, torch.float32), tiny_ids()
    exact = output(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        rough = output(model, ids).float()
        loss = loss_of(model.train(), ids)
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    # bfloat16 keeps 8 bits: 0.4 % a rounding, a dozen roundings deep.
    assert (rough - exact).abs().max() <= 0.05 * exact.abs().max(), "bfloat16 is far from float32"
    model = attached(case, config=replace(CONFIG, dropout=0.1))
    randomize(model).train()
    plain = gradients(model, ids)
    model.gradient_checkpointing = True
    for name, gradient in gradients(model, ids).items():
        close(gradient, plain[name], EXACT)


def point_13(case):
    """Changing tokens after t leaves everything up to t unchanged."""
    model, ids = trained(case), tiny_ids(time=12)
    for t in (0, 4, 10):
        other = ids.clone()
        other[:, t + 1 :] = (ids[:, t + 1 :] + 1) % CONFIG.vocab_size
        with torch.no_grad():
            close(model.features(other)[:, : t + 1], model.features(ids)[:, : t + 1], EXACT)
            lengths = torch.full((ids.shape[0],), t + 1)
            a, b = (model(x, lengths=lengths) for x in (other, ids))
        close(*((a, b) if a.ndim == 2 else (a[:, : t + 1], b[:, : t + 1])), EXACT)


# -- running them


def exempt(case, point):
    return (case, point) in EXEMPTIONS or (type(CASES[case]).__name__, point) in EXEMPTIONS


def bound_by(point):
    """Decorator: all cases that are not exempt from a point."""
    return pytest.mark.parametrize("case", [c for c in CASES if not exempt(c, point)])


@bound_by(1)
def test_point_01_starts_as_the_base(case):
    point_01(case)


@bound_by(2)
def test_point_02_trains_only_what_it_declares(case):
    point_02(case)


@bound_by(3)
def test_point_03_count_is_the_formula(case):
    point_03(case)


@bound_by(4)
def test_point_04_every_tensor_has_a_gradient(case):
    point_04(case)


@bound_by(5)
def test_point_05_detach_and_disabled_give_the_base(case):
    point_05(case)


@bound_by(6)
def test_point_06_save_and_load(case, tmp_path):
    point_06(case, tmp_path)


@bound_by(7)
def test_point_07_no_state_leaks(case):
    point_07(case)


@bound_by(8)
def test_point_08_merge(case):
    point_08(case)


@bound_by(9)
def test_point_09_gradient_is_the_difference_quotient(case):
    point_09(case)


@bound_by(10)
def test_point_10_rows_and_cache(case):
    point_10(case)


@bound_by(11)
def test_point_11_same_seed_same_bits(case, tmp_path):
    point_11(case, tmp_path)


@bound_by(12)
def test_point_12_autocast_and_checkpointing(case):
    point_12(case)


@bound_by(13)
def test_point_13_causality(case):
    point_13(case)


@pytest.mark.parametrize("name", GRADCHECKS)
def test_point_09_functions(name):
    """gradcheck in float64 on the differentiable functions of the technique files."""
    function, inputs = GRADCHECKS[name]()
    assert torch.autograd.gradcheck(function, inputs)


def test_every_file_has_its_functions_checked():
    files = {module.rpartition(".")[2] for module in contract.WHERE.values()}
    checked = {name.partition(".")[0] for name in GRADCHECKS} | set(NO_FUNCTIONS)
    assert files <= checked, f"add to GRADCHECKS or NO_FUNCTIONS: {sorted(files - checked)}"


def test_every_registered_technique_has_a_case():
    missing = set(contract.WHERE) - {type(t).__name__ for t in CASES.values()}
    assert not missing, f"add to CASES: {sorted(missing)}"


def exempted_cases():
    for (name, point), _ in EXEMPTIONS.items():
        cases = [c for c in CASES if name in (c, type(CASES[c]).__name__)]
        yield pytest.param(cases, point, id=f"{name}-{point}")


@pytest.mark.parametrize(("cases", "point"), list(exempted_cases()))
def test_every_exemption_is_needed(cases, point, tmp_path):
    assert cases, "an exemption for a case that is not there"
    check = globals()[f"point_{point:02}"]
    for case in cases:
        try:
            check(case, *((tmp_path,) if point in (6, 11) else ()))
        except (AssertionError, ValueError):
            return
    raise AssertionError("the point holds without the exemption")


@pytest.mark.parametrize(
    "test", sorted({entry[-1] for entry in (*EXEMPTIONS.values(), *DEAD_TENSORS.values())})
)
def test_what_stands_in_for_a_point_exists(test):
    path, _, name = test.partition("::")
    assert f"def {name}(" in (ROOT / path).read_text(), f"{test} does not exist"
