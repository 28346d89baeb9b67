"""The specification of technique.py: attach, detach, stack, switch, merge, report."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import minipeft
from minipeft import (
    IA3,
    AdapterDrop,
    BitFit,
    DiffPruning,
    FullFineTuning,
    Head,
    LoRA,
    PromptTuning,
    PTuningV2,
    TopLayers,
    technique,
    wrap,
)
from minipeft.technique import (
    WHERE,
    Technique,
    all_techniques,
    attachment_of,
    technique_class,
    trainable_parameters,
)
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model


def on(technique, model, name="default", seed=2):
    """Attached, its tensors (and nobody else's) away from their start."""
    torch.manual_seed(seed)
    technique.attach(model, name=name)
    with torch.no_grad():
        for parameter in attachment_of(model, name).parameters().values():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def flags(model):
    return {n: p.requires_grad for n, p in model.named_parameters(remove_duplicate=False)}


# -- attaching


def test_attach_works_in_place_and_returns_the_model(model):
    assert LoRA().attach(model) is model
    assert [a.name for a in model.attachments] == ["default"]


def test_attach_freezes_the_base(model):
    LoRA(rank=2).attach(model)
    mine = {id(p) for p in model.attachments[0].parameters().values()}
    assert {id(p) for p in trainable_parameters(model)} == mine


def test_attach_keeps_earlier_techniques_trainable(model):
    """Composition: MAM is a prefix and an adapter, and both are trained."""
    LoRA(rank=2).attach(model, name="a")
    BitFit().attach(model, name="b")
    count = sum(p.numel() for p in trainable_parameters(model))
    assert count == LoRA(rank=2).count(CONFIG) + BitFit().count(CONFIG)


def test_attach_takes_over_the_mode(model):
    LoRA(rank=2).attach(model.eval())
    assert not any(m.training for m in model.modules())
    other = LoRA(rank=2).attach(tiny_model().train())
    assert all(m.training for m in other.modules())


def test_a_name_is_taken_once(model):
    LoRA(rank=2).attach(model, name="a")
    with pytest.raises(ValueError, match="'a' is taken"):
        BitFit().attach(model, name="a")
    assert len(model.attachments) == 1


def test_a_failing_install_leaves_the_model_as_it_was(model, ids):
    """Half of it is on when the error comes; all of it must be off again."""

    @dataclasses.dataclass(frozen=True)
    class Broken(Technique):
        def install(self, model, attachment):
            for n in (0, 1):
                attachment.wrap(model, "blocks.0.attn.q", wrap.Wrapper(model.blocks[n].attn.q))
            attachment.replace(model, "ln_f.weight")
            raise MemoryError("half-way")

    modules, before, logits = list(model.modules()), flags(model), model(ids)
    with pytest.raises(MemoryError):
        Broken().attach(model)
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert flags(model) == before and not model.attachments
    assert torch.equal(model(ids), logits)


def test_one_technique_object_serves_many_models(ids):
    shared = LoRA(rank=2)
    first, second = shared.attach(tiny_model()), shared.attach(tiny_model())
    randomize(first)
    base = tiny_model()(ids)
    assert torch.equal(second(ids), base) and not torch.equal(first(ids), base)


def test_a_deep_copy_is_a_model_of_its_own(model, ids):
    """Its attachments point into the copy, so what is done to one is not done to the other."""
    on(LoRA(rank=2), model)
    logits = model(ids)
    twin = copy.deepcopy(model)
    minipeft.detach(twin)
    assert torch.equal(twin(ids), tiny_model()(ids))
    assert torch.equal(model(ids), logits)
    minipeft.detach(model)
    assert torch.equal(model(ids), twin(ids))


@pytest.mark.parametrize(
    "given, kept",
    [
        (LoRA(targets=["q", "v"]), LoRA(targets=("q", "v"))),
        (LoRA(rank=np.int64(4), alpha=np.float32(8)), LoRA(rank=4, alpha=8.0)),
        (LoRA(rank_pattern={"q": 4}), LoRA(rank_pattern=(("q", 4),))),
        (PromptTuning(init="text", text=torch.tensor([5, 9])), PromptTuning(20, "text", (5, 9))),
        (
            PromptTuning(init="labels", labels=[[1], [2, 3]]),
            PromptTuning(init="labels", labels=((1,), (2, 3))),
        ),
        (PTuningV2(layers=range(2)), PTuningV2(layers=(0, 1))),
        (AdapterDrop(leave_out=[1]), AdapterDrop(leave_out=(1,))),
    ],
)
def test_settings_are_what_a_file_gives_back(given, kept, model, ids, tmp_path):
    """Lists, arrays and NumPy's numbers once failed in the save, after the training."""
    assert given == kept and hash(given) == hash(kept)
    assert all(type(v) is type(w) for v, w in zip(vars(given).values(), vars(kept).values()))
    logits = on(given, model)(ids)
    minipeft.save_adapter(model, tmp_path)
    again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert torch.equal(again(ids), logits)
    assert again.attachments[0].technique == kept


def test_settings_are_the_fields():
    assert LoRA(rank=3).settings()["rank"] == 3
    assert LoRA(**LoRA(rank=3, targets=("k",)).settings()) == LoRA(rank=3, targets=("k",))


# -- off again


def test_detach_gives_back_objects_bits_and_flags(model, ids):
    model.ln_f.bias.requires_grad_(False)  # frozen by somebody before
    before, modules, logits = flags(model), list(model.modules()), model(ids)
    for n, kind in enumerate([LoRA(rank=2), BitFit(), Head(num_labels=3)]):
        on(kind, model, name=str(n))
    assert minipeft.detach(model) is model
    assert [id(m) for m in model.modules()] == [id(m) for m in modules]
    assert flags(model) == before
    assert torch.equal(model(ids), logits)


def test_detach_takes_the_last_one_by_name(model, ids):
    on(LoRA(rank=2), model, name="a")
    logits = model(ids)
    on(LoRA(rank=2), model, name="b", seed=3)
    with pytest.raises(ValueError, match="'a' is not the last attachment; detach 'b' first"):
        minipeft.detach(model, "a")
    minipeft.detach(model, "b")
    assert torch.equal(model(ids), logits)
    assert [a.name for a in model.attachments] == ["a"]
    assert {id(p) for p in trainable_parameters(model)} == {
        id(p) for p in model.attachments[0].parameters().values()
    }


def test_detaching_with_some_switched_off(model, ids):
    """Switched off in the middle of the stack, then all taken off: the base again."""
    base = model(ids)
    for n, name in enumerate("abc"):
        on(LoRA(rank=2), model, name=name, seed=n)
    minipeft.set_adapter(model, "b")
    minipeft.detach(model, "c")
    minipeft.detach(model)
    assert torch.equal(model(ids), base)


def test_disabled_is_the_base_and_comes_back_after_an_error(model, ids):
    base = model(ids)
    adapted = on(LoRA(rank=2), model)(ids)
    with pytest.raises(RuntimeError, match="inside"), minipeft.disabled(model) as off:
        assert torch.equal(off(ids), base)
        raise RuntimeError("inside")
    assert torch.equal(model(ids), adapted)


def test_disabled_inside_disabled_and_a_save_inside_it(model, ids, tmp_path):
    """A save takes the base's fingerprint, which switches off what is off already."""
    base = model(ids)
    adapted = on(LoRA(rank=2), model)(ids)
    with minipeft.disabled(model):
        with minipeft.disabled(model):
            assert torch.equal(model(ids), base)
        assert torch.equal(model(ids), base)
        minipeft.save_adapter(model, tmp_path)
        assert torch.equal(model(ids), base)
    assert torch.equal(model(ids), adapted)
    again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert torch.equal(again(ids), adapted)


CHANGES = {
    "attach": lambda m: LoRA(rank=2).attach(m, name="new"),
    "detach": lambda m: minipeft.detach(m, "b"),
    "set_adapter": lambda m: minipeft.set_adapter(m, "a"),
    "merge": minipeft.merge,
}


@pytest.mark.parametrize("off", [minipeft.disabled, minipeft.merged])
@pytest.mark.parametrize("change", CHANGES)
def test_nothing_changes_while_techniques_are_off(off, change, model, ids):
    """The end of the `with` would put back half of it, and lose what was attached inside."""
    on(LoRA(rank=2), model, name="a")
    adapted = on(LoRA(rank=2), model, name="b", seed=3)(ids)
    with off(model), pytest.raises(ValueError, match="leave the `with` first"):
        CHANGES[change](model)
    assert [a.name for a in model.attachments] == ["a", "b"]
    assert torch.equal(model(ids), adapted)


def test_merged_weights_are_not_taken_for_the_base(model, ids):
    on(LoRA(rank=2), model)
    with minipeft.merged(model), pytest.raises(ValueError, match="leave the `with` first"):
        minipeft.disabled(model).__enter__()


def test_a_copy_made_inside_merged_is_a_plain_model(model, ids):
    adapted = on(LoRA(rank=2), model)(ids)
    with minipeft.merged(model):
        twin = copy.deepcopy(model)
    close(twin(ids), adapted, 1e-12)
    on(LoRA(rank=2), twin)
    assert torch.equal(model(ids), adapted)


def test_set_adapter_switches(model, ids):
    singles = {}
    for seed, name in enumerate("ab"):
        singles[name] = on(LoRA(rank=2), tiny_model(), name, seed)(ids)
        on(LoRA(rank=2), model, name, seed)
    both = model(ids)
    for name in "ab":
        minipeft.set_adapter(model, name)
        close(model(ids), singles[name], 1e-12)
    minipeft.set_adapter(model, [])
    assert torch.equal(model(ids), tiny_model()(ids))
    minipeft.set_adapter(model, ["a", "b"])
    assert torch.equal(model(ids), both)
    with pytest.raises(ValueError, match=r"no attachment is called 'c'; there are \['a', 'b'\]"):
        minipeft.set_adapter(model, "c")


def test_attachment_of_names_what_there_is(model):
    with pytest.raises(ValueError, match="nothing is attached"):
        attachment_of(model)
    LoRA(rank=2).attach(model, name="a")
    BitFit().attach(model, name="b")
    assert attachment_of(model).name == "b"
    assert attachment_of(model, "a") is model.attachments[0]


# -- merging


def test_merge_folds_everything_and_makes_it_trainable(model, ids):
    on(LoRA(rank=2), model, name="a")
    on(BitFit(), model, name="b")
    logits = model(ids)
    merged = minipeft.merge(model)
    assert merged is model and not merged.attachments
    close(merged(ids), logits, 1e-12)
    assert all(p.requires_grad for p in merged.parameters())
    assert merged.state_dict().keys() == tiny_model().state_dict().keys()


@pytest.mark.parametrize(
    "first, second",
    [
        (LoRA(rank=2), FullFineTuning()),
        (LoRA(rank=2), TopLayers(layers=1)),
        (IA3(), BitFit()),
        (DiffPruning(), BitFit()),
    ],
    ids=lambda t: type(t).__name__,
)
def test_what_trains_base_tensors_merges_below_wrappers_that_came_first(first, second, model, ids):
    """A LoRA around a weight that was trained afterwards: W' + s B A, not W' alone."""
    on(first, model, name="first")
    logits = on(second, model, name="second")(ids)
    with minipeft.merged(model):
        close(model(ids), logits, 1e-12)
    assert torch.equal(model(ids), logits)
    close(minipeft.merge(model)(ids), logits, 1e-12)


def test_merge_takes_the_active_ones_only(model, ids):
    on(LoRA(rank=2), model, name="a")
    on(LoRA(rank=2), model, name="b", seed=3)
    minipeft.set_adapter(model, "a")
    logits = model(ids)
    close(minipeft.merge(model)(ids), logits, 1e-12)


def test_merged_restores_after_an_error(model, ids):
    on(LoRA(rank=2, targets=("q", "down")), model)
    logits, tensors = model(ids), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), minipeft.merged(model) as plain:
        assert not plain.attachments
        raise RuntimeError("inside")
    assert torch.equal(model(ids), logits)
    assert all(torch.equal(t, tensors[n]) for n, t in model.state_dict().items())


def test_a_merge_that_fails_half_way_changes_nothing(model, ids, monkeypatch):
    on(LoRA(rank=2), model)
    logits, modules = model(ids), list(model.modules())
    wrapper = wrap.resolve(model, "blocks.1.attn.v")
    monkeypatch.setattr(wrapper, "merged", lambda inner: 1 / 0)
    for attempt in (minipeft.merge, lambda m: minipeft.merged(m).__enter__()):
        with pytest.raises(ZeroDivisionError):
            attempt(model)
        assert [id(m) for m in model.modules()] == [id(m) for m in modules]
        assert torch.equal(model(ids), logits)


def test_gradients_flow_inside_merged(model, ids):
    on(LoRA(rank=2), model)
    with minipeft.merged(model) as plain:
        assert torch.is_grad_enabled()
        assert plain(ids).shape == (3, 11, 97)


def test_one_that_cannot_be_merged_stops_the_whole_merge(model, ids):
    on(LoRA(rank=2), model, name="a")
    on(Head(num_labels=3), model, name="b")
    logits = model(ids)
    with pytest.raises(ValueError, match=r"Head \('b'\) cannot be merged: a classifier"):
        minipeft.merge(model)
    assert torch.equal(model(ids), logits)


def test_nothing_to_merge_is_said(model):
    with pytest.raises(ValueError, match="nothing to merge"):
        minipeft.merge(model)


# -- tensors


def test_tensors_have_logical_names_each_once(model):
    LoRA(rank=2, targets=("q",)).attach(model, name="a")
    LoRA(rank=2, targets=("q", "k", "v"), share_qkv=True).attach(model, name="b")
    assert set(model.attachments[0].tensors()) == {
        f"blocks.{n}.attn.q.{t}" for n in (0, 1) for t in "AB"
    }
    shared = {f"blocks.{n}.attn.{t}.B" for n in (0, 1) for t in "qkv"}
    assert set(model.attachments[1].tensors()) == shared | {f"blocks.{n}.attn.q.A" for n in (0, 1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blocks.0.attn.q.A"), "missing blocks.0.attn.q.A"),
        (lambda t: t.update(other=torch.zeros(1)), "unknown other"),
        (
            lambda t: t.update({"blocks.0.attn.q.B": torch.zeros(3, 7)}),
            r"blocks.0.attn.q.B is \(3, 7\), the model needs \(32, 2\)",
        ),
    ],
)
def test_load_names_what_is_wrong_and_touches_nothing(change, message, model):
    attachment = LoRA(rank=2).attach(model).attachments[0]
    before = {n: t.detach().clone() for n, t in attachment.tensors().items()}
    tensors = {n: t + 1 for n, t in before.items()}
    change(tensors)
    with pytest.raises(ValueError, match=message):
        attachment.load(tensors)
    assert all(torch.equal(t, before[n]) for n, t in attachment.tensors().items())


def test_load_copies_into_the_tensors_that_are_there(model):
    attachment = LoRA(rank=2).attach(model).attachments[0]
    parameters = attachment.parameters()
    attachment.load({n: torch.full_like(p, 0.5) for n, p in parameters.items()})
    assert all((p == 0.5).all() for p in parameters.values())
    assert all(p is parameters[n] for n, p in attachment.parameters().items())


def test_moving_the_model_moves_what_is_off_the_tree(model, ids):
    """Originals that are replaced and adapters that are switched off change dtype too."""
    base = tiny_model(dtype=torch.float32)(ids)
    on(FullFineTuning(), model, name="a")
    on(LoRA(rank=2), model, name="b")
    minipeft.set_adapter(model, "a")
    model.float()
    minipeft.set_adapter(model, ["a", "b"])
    assert model(ids).dtype == torch.float32
    minipeft.detach(model)
    assert torch.equal(model(ids), base)


# -- in training


def test_extra_losses_are_summed_and_after_step_reaches_the_active_ones(model):
    @dataclasses.dataclass(frozen=True)
    class Acting(LoRA):
        term: float = 0.0

        def extra_loss(self, model, attachment):
            return torch.tensor(self.term) if self.term else None

        def after_step(self, model, attachment, step, total_steps):
            attachment.state["seen"] = (step, total_steps)

    Acting(rank=2).attach(model, name="a")
    assert technique.extra_loss(model) is None
    Acting(rank=2, term=1.5).attach(model, name="b")
    Acting(rank=2, term=2.0).attach(model, name="c")
    assert technique.extra_loss(model).item() == 3.5
    minipeft.set_adapter(model, ["a", "b"])
    assert technique.extra_loss(model).item() == 1.5
    technique.after_step(model, 4, 9)
    assert [a.state.get("seen") for a in model.attachments] == [(4, 9), (4, 9), None]


def test_follow_calls_after_step_with_gradients_still_there(model):
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Watching(LoRA):
        def after_step(self, model, attachment, step, total_steps):
            seen.append((step, total_steps, trainable_parameters(model)[0].grad is not None))

    Watching(rank=2).attach(model)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    handle = minipeft.follow(optimizer, model, total_steps=2)
    ids = tiny_ids()
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(ids, ids).backward()
        optimizer.step()
    handle.remove()
    optimizer.step()
    assert seen == [(1, 2, True), (2, 2, True)]


# -- registry and report


@pytest.mark.parametrize("spelling", ["LoRA", "lora", "LORA"])
def test_techniques_are_found_in_any_spelling(spelling):
    assert technique_class(spelling) is LoRA
    assert technique_class("top-layers") is TopLayers
    assert technique_class("full_fine_tuning") is FullFineTuning


def test_an_unknown_technique_is_named_with_those_there_are():
    with pytest.raises(ValueError, match=r"'lorra'; there are .*LoRA"):
        technique_class("lorra")


@pytest.mark.parametrize("name", WHERE)
def test_every_technique_keeps_the_rules(name):
    """A frozen dataclass that needs no arguments, is exported and explains each field."""
    kind = all_techniques()[name]
    assert issubclass(kind, Technique) and kind.__name__ == name
    assert kind.__dataclass_params__.frozen
    assert getattr(minipeft, name) is kind
    text = "".join(k.__doc__ for k in kind.__mro__ if dataclasses.is_dataclass(k))
    undocumented = [f.name for f in dataclasses.fields(kind) if f"{f.name}:" not in text]
    assert not undocumented, f"the docstring of {name} does not explain {undocumented}"
    assert hash(kind()) == hash(kind())


def test_the_report_names_every_tensor_and_why(model):
    LoRA(rank=2, targets=("q",)).attach(model, name="mine")
    report = minipeft.report(model)
    rows = {row.name: row for row in report.rows}
    A = rows["blocks.0.attn.q.A"]
    assert (A.shape, A.dtype, A.trained, A.why, A.bytes) == (
        (2, 32),
        torch.float64,
        True,
        "LoRA (mine)",
        2 * 32 * 8,
    )
    frozen = rows["blocks.0.attn.q.weight"]
    assert (frozen.trained, frozen.why) == (False, "base, frozen by LoRA (mine)")
    assert len(rows) == len(report.rows)
    assert not any("inner" in name for name in rows)


def test_the_report_s_totals_are_those_of_the_model(model):
    bare = minipeft.report(model)
    assert bare.trained == bare.total == sum(p.numel() for p in model.parameters())
    assert {row.why for row in bare.rows} == {"base"}
    LoRA(rank=2).attach(model)
    report = minipeft.report(model)
    assert report.total == bare.total + LoRA(rank=2).count(CONFIG)
    share = 100 * report.trained / report.total
    assert str(report).endswith(
        f"trained {report.trained:,} of {report.total:,} parameters ({share:.3f} %)"
    )


def test_a_report_of_scalars_can_be_printed(model):
    class Gate(wrap.Wrapper):
        def __init__(self, inner):
            super().__init__(inner)
            self.gate = nn.Parameter(torch.zeros(()))

    @dataclasses.dataclass(frozen=True)
    class Gated(Technique):
        def install(self, model, attachment):
            attachment.wrap(model, "head", Gate(wrap.resolve(model, "head")))

    report = minipeft.report(Gated().attach(model))
    assert report.trained == 1
    assert "scalar" in str(report)
