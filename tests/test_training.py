"""What training.py promises, measured on a model of a few hundred weights.

The expected update of a step is AdamW written out here, from the losses' definition.
"""

import copy
import dataclasses
import json
import math
import os
import re
import signal

import pytest
import torch

from minipeft import DiffPruning, Head, LoRA, PTuning
from minipeft.dataset import Encoded
from minipeft.quantized.qat import QAT
from minipeft.technique import attachment_of
from minipeft.training import (
    NonFiniteError,
    StopOnSignal,
    TrainingConfig,
    autocast,
    choose_device,
    has_bfloat16,
    learning_rate_scale,
    random_start,
    train,
)
from tests.tiny import CONFIG, tiny_model

DROPOUT = dataclasses.replace(CONFIG, dropout=0.2)


def rows(count=11, longest=9, prompt=True):
    """Documents of different lengths, every third with a prompt that does not count."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        tokens = torch.randint(97, (3 + i % longest,), generator=generator).tolist()
        labels = tokens[1:]
        if prompt and i % 3 == 0:
            labels[:1] = [-100]
        made.append(Encoded(tokens[:-1], labels))
    return made


def fit(model, data=None, folder=None, act=(), **settings):
    keys = ("loss_fn", "extra_losses", "evaluate", "floor", "resume", "make_optimizer", "show")
    options = {k: settings.pop(k) for k in keys if k in settings}
    config = TrainingConfig(**{"steps": 3, "batch_size": 4, "device": "cpu"} | settings)
    options = {"show": False} | options
    data = rows() if data is None else data
    return train(model, data, config, after_step=act, folder=folder, **options)


def parameters_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# -- the schedule: (Train 1) (Train 2)


def rates(**settings):
    config = TrainingConfig(**settings)
    return [learning_rate_scale(config, s) for s in range(config.steps)]


def test_the_learning_rate_rises_linearly_and_reaches_the_peak_at_the_end_of_the_warm_up():
    assert rates(steps=20, warmup=0.2)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_linear_decay_has_no_step_without_a_learning_rate():
    assert rates(steps=5, warmup=0) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_decay_follows_half_a_cosine_down_to_its_minimum():
    m = 0.1
    expected = [m + (1 - m) * 0.5 * (1 + math.cos(math.pi * s / 8)) for s in range(8)]
    assert rates(steps=8, warmup=0, schedule="cosine", min_lr_ratio=m) == pytest.approx(expected)


def test_constant_stays_at_the_peak():
    assert rates(steps=4, warmup=0.5, schedule="constant") == [0.5, 1, 1, 1]


def test_the_log_says_the_learning_rate_of_each_step(tmp_path):
    fit(tiny_model(), folder=tmp_path, steps=4, warmup=0, learning_rate=0.5)
    assert [x["learning_rate"] for x in log_of(tmp_path)] == pytest.approx(
        [0.5, 0.375, 0.25, 0.125]
    )


# -- one step, written out: (Train 3) (Train 4)


def gradients_written_out(model, data):
    """d/dp of the mean cross-entropy over all labels that count, one row at a time without
    padding.
    """
    total, count = 0.0, 0
    for row in data:
        logp = model(torch.tensor([row.ids]))[0].log_softmax(-1)
        for t, y in enumerate(row.labels):
            if y != -100:
                total, count = total - logp[t, y], count + 1
    loss = total / count
    return loss.item(), torch.autograd.grad(loss, list(model.parameters()))


def test_the_first_step_is_adamw_on_the_clipped_gradient_of_the_token_mean():
    model, expected = tiny_model(), tiny_model()
    data, lr, decay, clip = rows(4), 1e-2, 0.1, 0.05
    loss, gradients = gradients_written_out(expected, data)
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients))
    assert norm > clip
    with torch.no_grad():
        for p, g in zip(expected.parameters(), gradients):
            g = g * clip / norm
            if p.ndim >= 2:
                p.mul_(1 - lr * decay)
            # after one step both averages are bias-corrected back to g and g^2
            p.sub_(lr * g / (g.abs() + 1e-8))
    config = {"steps": 1, "warmup": 0, "learning_rate": lr, "weight_decay": decay, "clip": clip}
    result = fit(model, data, **config)
    assert result.losses == pytest.approx([loss], rel=1e-12)  # float64
    # 1e-8 beside |g| near 0: a gradient known to 1e-16 moves the quotient by up to 1e-8
    assert (parameters_of(model) - parameters_of(expected)).abs().max() < 1e-9


def test_the_gradient_norm_in_the_log_is_that_before_clipping(tmp_path):
    data = rows(4)
    _, gradients = gradients_written_out(tiny_model(), data)
    norm = math.sqrt(sum(g.pow(2).sum().item() for g in gradients))
    fit(tiny_model(), data, folder=tmp_path, steps=1, clip=0.01)
    assert log_of(tmp_path)[0]["gradient_norm"] == pytest.approx(norm, rel=1e-10)


def test_without_a_limit_gradients_are_not_clipped():
    def step(clip):
        model = tiny_model()
        optimizer = lambda groups: torch.optim.SGD(groups, lr=0)  # noqa: E731
        fit(model, steps=1, warmup=0, clip=clip, learning_rate=0.1, make_optimizer=optimizer)
        return parameters_of(model)

    assert (step(None) - step(1e9)).abs().max() == 0
    assert (step(None) - step(1e-3)).abs().max() > 0


@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulated_equals_one_big_batch(accumulate):
    """Micro-batches of different label counts, one of them without any label that counts."""
    data = [*rows(7), Encoded([5, 6], [-100, -100])]
    whole, cut = tiny_model(), tiny_model()
    expected = fit(whole, data, batch_size=8)
    found = fit(cut, data, batch_size=8, accumulate=accumulate)
    assert found.losses == pytest.approx(expected.losses, rel=1e-10)
    # float64 sums in another order, through AdamW's division by small numbers
    assert (parameters_of(whole) - parameters_of(cut)).abs().max() < 1e-8


def test_padding_never_counts():
    data = rows(8)
    padded = [Encoded(r.ids + [7] * 5, r.labels + [-100] * 5) for r in data]
    assert fit(tiny_model(), padded).losses == pytest.approx(
        fit(tiny_model(), data).losses, rel=1e-10
    )


def test_extra_losses_are_added_once_a_step_and_not_reported():
    pull = lambda model: 3 * model.head.weight.sum()  # noqa: E731

    def moved(extra, **settings):
        model = tiny_model()
        before = parameters_of(model)
        sgd = lambda groups: torch.optim.SGD(groups, lr=0)  # noqa: E731
        result = fit(
            model, batch_size=4, steps=1, warmup=0, clip=None, learning_rate=1.0,
            make_optimizer=sgd, extra_losses=extra, **settings,
        )  # fmt: skip
        return parameters_of(model) - before, result.losses

    plain, losses = moved([])
    for accumulate in (1, 4):
        pulled, same = moved([pull, lambda model: None], accumulate=accumulate)
        assert same == pytest.approx(losses, rel=1e-10)
        difference = (pulled - plain)[: 97 * 32]  # the tied embedding comes first
        assert (difference + 3).abs().max() < 1e-10  # d/dw 3 sum(w) = 3, once
        assert (pulled - plain)[97 * 32 :].abs().max() < 1e-10


def test_a_loss_of_the_users_own_replaces_the_models():
    seen = []

    def loss_fn(model, batch):
        seen.append((batch.ids.shape[0], batch.indices))
        return (model(batch.ids) ** 2).mean()

    result = fit(tiny_model(), loss_fn=loss_fn, steps=2)
    assert result.losses[1] < result.losses[0]
    assert [n for n, _ in seen] == [4, 4]
    assert all(len(set(indices)) == 4 for _, indices in seen)


def test_after_step_is_called_with_the_gradients_still_there():
    calls = []

    def act(model, step, steps):
        calls.append((step, steps, model.head.weight.grad is not None))

    model = tiny_model()
    fit(model, act=[act], steps=2)
    assert calls == [(1, 2, True), (2, 2, True)]
    assert all(p.grad is None for p in model.parameters())


def test_the_techniques_own_loss_and_step_are_called(monkeypatch):
    calls = []
    monkeypatch.setattr(
        LoRA, "after_step", lambda self, m, a, step, total: calls.append((step, total))
    )
    monkeypatch.setattr(LoRA, "extra_loss", lambda self, m, a: calls.append("loss"))
    fit(LoRA(rank=2).attach(tiny_model()), steps=2, accumulate=2)
    assert calls == ["loss", (1, 2), "loss", (2, 2)]


# -- what is trained, and how fast


def test_only_the_technique_is_trained_at_its_own_rate(tmp_path):
    model = tiny_model()
    base = {n: p.clone() for n, p in model.named_parameters()}
    LoRA(rank=2).attach(model)
    fit(model, folder=tmp_path, steps=2, warmup=0, schedule="constant")
    assert log_of(tmp_path)[0]["learning_rate"] == LoRA.learning_rate
    trained = model.attachments[0].parameters()
    assert all(not torch.equal(p, torch.zeros_like(p)) for p in trained.values())
    model = __import__("minipeft").detach(model)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_two_techniques_keep_their_own_rates_unless_one_is_given():
    groups = []

    def keep(made):
        groups.append({(len(g["params"]), g["lr"], g["weight_decay"]) for g in made})
        return torch.optim.AdamW(made)

    for rate in (None, 0.25):
        model = LoRA(rank=2, targets=("q",)).attach(Head(num_labels=3).attach(tiny_model()), "lora")
        data = [Encoded([1, 2], 0), Encoded([3], 2)]
        fit(model, data, batch_size=2, make_optimizer=keep, learning_rate=rate, weight_decay=0.1)
    lora, head = LoRA.learning_rate, Head.learning_rate
    # 2 blocks x (A, B) are matrices; the head has a matrix and a bias, which never decays
    parts = [(4, lora, 0.1), (1, head, 0.1), (1, head, 0.0)]
    by_rate = {}
    for count, rate, decay in parts:
        by_rate[rate, decay] = by_rate.get((rate, decay), 0) + count
    assert groups[0] == {(count, *key) for key, count in by_rate.items()}
    assert groups[1] == {(5, 0.25, 0.1), (1, 0.25, 0.0)}


def test_classes_are_learned_through_a_head():
    model = Head(num_labels=2).attach(tiny_model(dtype=torch.float32))
    data = [Encoded([5, 1 + i % 2, 9], i % 2) for i in range(8)]
    result = fit(model, data, steps=60, batch_size=8, learning_rate=3e-2)
    assert result.losses[0] == pytest.approx(math.log(2), abs=0.3)  # a small random head
    assert result.losses[-1] < 0.1


def test_nothing_to_train_and_no_examples_are_errors():
    frozen = tiny_model().requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in this model requires a gradient"):
        fit(frozen)
    with pytest.raises(ValueError, match="no examples"):
        fit(tiny_model(), [])


def test_data_of_another_tokenizer_or_too_long_is_named_before_the_first_step():
    with pytest.raises(ValueError, match=r"example 1 has ids from 3 to 97; .* vocabulary has 97"):
        fit(tiny_model(), [Encoded([3], [4]), Encoded([3, 97], [4, 5])])
    with pytest.raises(ValueError, match="example 0 has 65 tokens"):
        fit(tiny_model(), [Encoded([3] * 65, [3] * 65)])


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (Encoded([], []), "example 1 has no ids"),
        (Encoded([3, 4], [5]), "example 1 has 1 labels for 2 ids, .* decides at every id"),
        (Encoded([3, 4], 1), "example 1 has one label, .* decides at every id"),
        (Encoded([3, 4], [5, 97]), "example 1 has the label 97; .* among 97"),
        (Encoded([3, 4], [5, -1]), "example 1 has the label -1; .* among 97"),
    ],
)
def test_labels_that_do_not_suit_are_named_before_the_first_step(row, problem):
    with pytest.raises(ValueError, match=problem):
        fit(tiny_model(), [Encoded([3], [4]), row])


@pytest.mark.parametrize(
    ("per_token", "labels", "problem"),
    [
        (False, [1, 0], "2 labels for 2 ids, .* decides once a row"),
        (False, 3, "the label 3; .* among 3"),
        (True, [1, 96], "the label 96; .* among 3"),
        (True, 1, "one label, .* decides at every id"),
    ],
)
def test_labels_of_text_are_none_for_a_head(per_token, labels, problem):
    model = Head(3, per_token).attach(tiny_model())
    with pytest.raises(ValueError, match=problem):
        fit(model, [Encoded([3, 4], labels)])


def test_labels_are_looked_at_behind_a_wrapper_without_a_weight():
    """A sparse change wraps the head too, and holds no weight of its own."""
    model = DiffPruning().attach(tiny_model())
    assert fit(model).steps == 3
    with pytest.raises(ValueError, match=r"the label 97; .* among 97"):
        fit(model, [Encoded([3, 4], [5, 97])])


def test_a_loss_of_the_users_own_may_read_labels_as_it_likes():
    model, data = LoRA(rank=2).attach(tiny_model()), [Encoded([3, 4], 2000)] * 4
    result = fit(model, data, loss_fn=lambda m, b: m(b.ids).square().mean() * b.labels.sum())
    assert result.steps == 3


def test_steps_of_a_grid_do_not_decay():
    """QAT's sigma is (out, groups, 1), the logarithm of a scale: decay would pull the scale to 1.
    No label counts, so that nothing but decay moves anything.
    """
    model = QAT().attach(tiny_model())
    tensors = attachment_of(model).parameters()
    before = {name: t.detach().clone() for name, t in tensors.items()}
    fit(model, [Encoded([3, 4], [-100, -100])], weight_decay=0.5, batch_size=1)
    moved = {name for name, t in tensors.items() if not torch.equal(t, before[name])}
    assert moved == {name for name in tensors if name.endswith("weight")}


def test_learned_tokens_inside_the_text_are_ids_of_the_model():
    """P-tuning's pseudo tokens, ids 97 and 98 here; 99 is nobody's."""
    model = PTuning(template=(0, 2), encoder="table").attach(tiny_model())
    result = fit(model, [Encoded([3, 97, 98], [-100, -100, 5])], steps=2, batch_size=1)
    assert result.losses[1] < result.losses[0]
    with pytest.raises(ValueError, match=r"ids from 3 to 99; .* vocabulary has 99"):
        fit(model, [Encoded([3, 99], [4, 5])])


def test_a_batch_that_cannot_be_cut_is_named():
    with pytest.raises(ValueError, match=r"batch_size=4 cannot be cut into 5 parts"):
        fit(tiny_model(), accumulate=5)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"steps": 0}, "steps=0 must be positive"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001 must be positive"),
        ({"clip": 0}, "clip=0 must be positive"),
        ({"random_starts": -1}, "random_starts=-1 must be at least 0"),
        ({"warmup": 100}, "warmup=100 is not a share"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be positive"),
        ({"weight_decay": math.nan}, "weight_decay=nan must be at least 0"),
        ({"steps": 2.5}, "steps=2.5 must be a whole number"),
        ({"accumulate": 1.5}, "accumulate=1.5 must be a whole number"),
        ({"schedule": "cosin"}, "schedule='cosin' is none of"),
        ({"precision": "float16"}, "precision='float16' is none of"),
    ],
)
def test_settings_that_make_no_sense_are_named(settings, problem):
    with pytest.raises(ValueError, match=problem):
        TrainingConfig(**settings)


# -- determinism, starts, modes


def test_same_seed_same_bits_whatever_the_callers_random_state_and_another_seed_others():
    first, second, third = (tiny_model(DROPOUT) for _ in range(3))
    fit(first, seed=1)
    torch.manual_seed(99)
    fit(second, seed=1)
    fit(third, seed=2)
    assert torch.equal(parameters_of(first), parameters_of(second))
    assert not torch.equal(parameters_of(first), parameters_of(third))


def test_the_callers_random_state_modes_and_switches_are_left_as_they_were():
    model = tiny_model(DROPOUT)
    model.blocks[0].train()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    seen = []
    fit(model, act=[lambda m, *_: seen.append((m.training, m.gradient_checkpointing))],
        gradient_checkpointing=True)  # fmt: skip
    assert torch.equal(torch.get_rng_state(), before)
    assert [m.training for m in model.modules()] == modes
    assert seen == [(True, True)] * 3
    assert model.gradient_checkpointing is False


def test_gradient_checkpointing_changes_no_bit():
    models = [tiny_model(DROPOUT) for _ in range(2)]
    for model, switch in zip(models, (False, True)):
        fit(model, gradient_checkpointing=switch)
    assert torch.equal(*(parameters_of(m) for m in models))


def test_half_of_the_starts_are_zero_and_the_others_uniform():
    model, config = tiny_model(), TrainingConfig(random_starts=7)
    starts = [random_start(config, s, model, 10) for s in range(4000)]
    share = starts.count(0) / len(starts)
    # 1/2 + 1/2 x 1/8; 4 sigma of a share of 4,000 draws
    assert abs(share - 9 / 16) < 4 * math.sqrt(9 / 16 * 7 / 16 / 4000)
    for value in range(1, 8):
        assert abs(starts.count(value) / 4000 - 1 / 16) < 4 * math.sqrt(1 / 16 * 15 / 16 / 4000)


def test_starts_stop_where_the_context_ends_virtual_tokens_included():
    model, config = tiny_model(), TrainingConfig(random_starts=50)
    model.embed.position_shift = 4
    starts = {random_start(config, s, model, 50) for s in range(300)}
    assert max(starts) == 64 - 4 - 50
    assert {random_start(config, s, model, 60) for s in range(20)} == {0}


def test_the_models_loss_is_asked_at_the_start_drawn():
    seen, model = [], tiny_model()
    fit(
        model, steps=16, random_starts=20,
        loss_fn=lambda m, b: seen.append(b.start) or m.loss(b.ids, b.labels, start=b.start),
    )  # fmt: skip
    config = TrainingConfig(random_starts=20)
    assert len(set(seen)) > 2
    assert all(s == random_start(config, n, model, 10) for n, s in enumerate(seen))


# -- evaluation, log, result


def test_evaluation_runs_in_eval_mode_when_due_and_disturbs_nothing(tmp_path):
    calls = []

    def evaluate(model):
        calls.append((model.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"nats": 2.5}

    watched, plain = tiny_model(DROPOUT), tiny_model(DROPOUT)
    result = fit(watched, folder=tmp_path, evaluate=evaluate, floor=2.0, steps=5, eval_every=2)
    fit(plain, steps=5)
    assert calls == [(False, False)] * 4
    assert [step for step, _ in result.evaluations] == [0, 2, 4, 5]
    assert torch.equal(parameters_of(watched), parameters_of(plain))
    found = [x for x in log_of(tmp_path) if "evaluation" in x]
    assert found[-1] == {"step": 5, "evaluation": {"nats": 2.5}, "floor": 2.0}


def test_a_single_number_is_an_evaluation_too_and_the_last_step_has_one():
    assert fit(tiny_model(), evaluate=lambda m: 1).evaluations == [(3, {"value": 1.0})]


def test_values_of_an_evaluation_may_be_tensors(tmp_path):
    values = {"nats": torch.tensor(1.5), "hits": 2}
    result = fit(tiny_model(), folder=tmp_path, evaluate=lambda m: values)
    assert result.evaluations == [(3, {"nats": 1.5, "hits": 2.0})]
    assert log_of(tmp_path)[-1]["evaluation"] == {"nats": 1.5, "hits": 2.0}


def test_the_result_counts_steps_tokens_and_the_optimizers_bytes():
    model = LoRA(rank=2).attach(tiny_model(dtype=torch.float32))
    data = [Encoded([1, 2, 3], [2, 3, 4]), Encoded([1], [2])]
    result = fit(model, data, steps=4, batch_size=2)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tensors = sum(p.requires_grad for p in model.parameters())
    assert (result.steps, result.tokens, result.interrupted) == (4, 16, False)
    assert result.optimizer_bytes == 2 * 4 * trained + 4 * tensors  # two averages, a step count
    assert result.seconds == pytest.approx(sum(result.step_seconds))
    assert result.seconds > 0


def test_gradients_left_over_from_before_do_not_count():
    fresh, stale = tiny_model(), tiny_model()
    stale.loss(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).backward()
    fit(fresh)
    fit(stale)
    assert torch.equal(parameters_of(fresh), parameters_of(stale))


# -- what is not finite


def test_a_loss_that_is_not_finite_names_step_batch_and_gradients_and_changes_nothing():
    model, states = tiny_model(), []

    def loss_fn(model, batch):
        states.append(parameters_of(model))
        scale = math.nan if len(states) == 3 else 1.0
        return model.loss(batch.ids, batch.labels) * scale

    with pytest.raises(NonFiniteError, match=r"step 3: the loss is nan .*examples \[") as error:
        fit(model, loss_fn=loss_fn, steps=5)
    assert re.search(r"Largest gradients: \S+ nan, \S+ nan", str(error.value))
    assert torch.equal(parameters_of(model), states[2])


def test_a_gradient_that_is_not_finite_is_found_behind_a_finite_loss():
    model = tiny_model()
    handle = model.blocks[1].mlp.up.bias.register_hook(lambda g: g / 0)
    before = parameters_of(model)
    # the others are still what they were: clipping by an infinite norm would have made them 0
    expected = r"Largest gradients: blocks\.1\.mlp\.up\.bias inf, \S+ 0\.\d*[1-9]"
    with pytest.raises(NonFiniteError, match=expected):
        fit(model)
    handle.remove()
    assert torch.equal(parameters_of(model), before)


def test_the_last_good_checkpoint_is_kept(tmp_path):
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        return model.loss(batch.ids, batch.labels) * (math.nan if len(calls) == 4 else 1.0)

    with pytest.raises(NonFiniteError, match="step 4"):
        fit(tiny_model(), folder=tmp_path, loss_fn=loss_fn, steps=5, checkpoint_every=2)
    resumed, whole = tiny_model(), tiny_model()
    result = fit(resumed, folder=tmp_path, steps=5, checkpoint_every=2, resume=True)
    fit(whole, steps=5)
    assert result.steps == 5
    assert torch.equal(parameters_of(resumed), parameters_of(whole))


# -- Ctrl-C


def press_after(step, number=signal.SIGINT):
    def act(model, done, steps):
        if done == step:
            os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_resuming_gives_the_bits_of_never_stopping(tmp_path, number):
    start = LoRA(rank=2, dropout=0.1).attach(tiny_model(DROPOUT))
    whole, stopped, resumed = (copy.deepcopy(start) for _ in range(3))
    expected = fit(whole, steps=6)
    handlers = signal.getsignal(number)
    result = fit(stopped, folder=tmp_path, act=[press_after(2, number)], steps=6)
    assert result.interrupted
    # the step in which the signal came is finished, and one more at most
    assert 2 <= result.steps <= 3
    assert signal.getsignal(number) == handlers
    found = fit(resumed, folder=tmp_path, steps=6, resume=True)
    assert not found.interrupted
    assert found.losses == expected.losses
    assert torch.equal(parameters_of(resumed), parameters_of(whole))
    assert [x["step"] for x in log_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_run_that_was_resumed_and_finished_is_not_unfinished(tmp_path):
    """Without checkpoint_every nothing but Ctrl-C saves, and that says step 2 of 3."""
    assert fit(tiny_model(), folder=tmp_path, act=[press_after(1)]).interrupted
    result = fit(tiny_model(), folder=tmp_path, resume=True)
    assert fit(tiny_model(), folder=tmp_path, resume=True).losses == result.losses
    assert fit(tiny_model(), folder=tmp_path).steps == 3  # no "unfinished run" in the way


def test_a_second_ctrl_c_stops_at_once():
    with pytest.raises(KeyboardInterrupt), StopOnSignal(enabled=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_a_folder_ctrl_c_is_what_it_always_is():
    with pytest.raises(KeyboardInterrupt):
        fit(tiny_model(), act=[press_after(1)])


# -- where it runs


def test_a_device_that_is_not_there_is_named():
    for name in ("cuda", "mps"):
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[name]
        if not there:
            with pytest.raises(ValueError, match=f"device='{name}': torch finds none here"):
                choose_device(name)
    with pytest.raises(ValueError, match="device='gpu' is none of"):
        choose_device("gpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_auto_takes_cuda_before_mps_before_cpu(monkeypatch):
    for cuda, mps, expected in [(1, 1, "cuda"), (0, 1, "mps"), (0, 0, "cpu")]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: bool(cuda))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: bool(mps))
        assert choose_device("auto").type == expected


def test_bfloat16_is_refused_where_the_hardware_has_none(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr("minipeft.training.has_bfloat16", lambda device: False)
    with pytest.raises(ValueError, match="precision='bfloat16': this cpu has none"):
        autocast("bfloat16", cpu)
    with autocast("auto", cpu):
        assert not torch.is_autocast_enabled("cpu")


def test_auto_is_float32_on_a_cpu_even_with_bfloat16(monkeypatch):
    monkeypatch.setattr("minipeft.training.has_bfloat16", lambda device: True)
    with autocast("auto", torch.device("cpu")):
        assert not torch.is_autocast_enabled("cpu")
    with autocast("bfloat16", torch.device("cpu")):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_bfloat16_trains_close_to_float32(monkeypatch):
    monkeypatch.setattr(
        "minipeft.training.has_bfloat16", lambda device: True
    )  # emulated if need be
    losses = {}
    for precision in ("float32", "bfloat16"):
        losses[precision] = fit(tiny_model(dtype=torch.float32), precision=precision).losses
    assert losses["bfloat16"] != losses["float32"]
    # bfloat16 has 8 bits: each product is off by up to 0.4 %
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.02)


def test_has_bfloat16_answers_for_this_cpu():
    assert isinstance(has_bfloat16(torch.device("cpu")), bool)
