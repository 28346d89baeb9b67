"""What resume.py promises: the same bits as never stopping, and a clear no to what does not fit."""

import copy
import dataclasses
import json

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minipeft import BitFit, LoRA, wrap
from minipeft.dataset import Encoded
from minipeft.quantized.adamw_8bit import AdamW8bit
from minipeft.resume import NAME, digest_of_base, digest_of_data, model_tensors
from minipeft.training import TrainingConfig, train
from tests.tiny import CONFIG, tiny_model

DROPOUT = dataclasses.replace(CONFIG, dropout=0.2)
DATA = [Encoded([i, i + 1, i + 2, i + 3][: 2 + i % 3], [5, 6, 7, 8][: 2 + i % 3]) for i in range(9)]


class Stop(Exception):
    pass


def fit(model, folder=None, stop=None, data=DATA, resume=False, after=(), **settings):
    """4 steps with a checkpoint after the second; `stop`: fail after that step, as a kill would."""

    def act(model, step, steps):
        if step == stop:
            raise Stop

    settings = {"steps": 4, "batch_size": 3, "device": "cpu", "checkpoint_every": 2} | settings
    config = TrainingConfig(**settings)
    acts = [*after, act]
    return train(model, data, config, after_step=acts, folder=folder, resume=resume, show=False)


def killed_and_resumed(model, folder, **options):
    """(a model trained without a stop, one killed after step 3 and resumed from step 2)."""
    whole, killed, resumed = (copy.deepcopy(model) for _ in range(3))
    expected = fit(whole, **options)
    with pytest.raises(Stop):
        fit(killed, folder, stop=3, **options)
    found = fit(resumed, folder, resume=True, **options)
    assert found.losses == expected.losses
    assert found.tokens == expected.tokens
    return whole, resumed


def same_bits(a, b):
    first, second = model_tensors(a), model_tensors(b)
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


# -- the same bits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_plain_model_resumes_bitwise_dropout_included(tmp_path, dtype):
    assert same_bits(*killed_and_resumed(tiny_model(DROPOUT, dtype), tmp_path))


def test_everything_at_once_resumes_bitwise(tmp_path):
    model = LoRA(rank=2, dropout=0.1).attach(tiny_model(DROPOUT))
    options = {
        "accumulate": 2,
        "pool": 2,
        "random_starts": 9,
        "schedule": "cosine",
        "batch_size": 4,
    }
    assert same_bits(*killed_and_resumed(model, tmp_path, **options))


class Averaging(wrap.Wrapper):
    """A wrapper with a buffer that moves in every forward pass, as quantization's observers do."""

    def __init__(self, inner):
        super().__init__(inner)
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.seen += x.detach().abs().mean()
        return self.inner(x) * (1 + 0.1 * self.seen.tanh())


def test_buffers_and_the_attachments_state_resume_too(tmp_path):
    model = LoRA(rank=2).attach(tiny_model())
    attachment = model.attachments[0]
    attachment.wrap(model, "blocks.0.attn.o", Averaging(wrap.resolve(model, "blocks.0.attn.o")))
    attachment.state |= {"updates": 0, "average": torch.zeros(3)}

    def act(model, step, steps):
        state = model.attachments[0].state
        state["updates"] += step
        state["average"] = 0.5 * state["average"] + step

    whole, resumed = killed_and_resumed(model, tmp_path, after=[act])
    assert same_bits(whole, resumed)
    assert resumed.attachments[0].state["updates"] == 1 + 2 + 3 + 4
    average = whole.attachments[0].state["average"]
    assert torch.equal(resumed.attachments[0].state["average"], average)


def test_an_optimizer_without_tensors_in_its_state_resumes_too(tmp_path):
    model, options = tiny_model(), {}

    class Counting(torch.optim.Optimizer):
        """SGD whose step shrinks with a count kept as a plain number."""

        def __init__(self, groups):
            super().__init__(groups, {})

        @torch.no_grad()
        def step(self):
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["count"] = self.state[p].get("count", 0) + 1
                    p -= group["lr"] / self.state[p]["count"] * p.grad

    def run(model, **more):
        config = TrainingConfig(steps=4, batch_size=3, device="cpu", checkpoint_every=2)
        train(model, DATA, config, make_optimizer=Counting, show=False, **more, **options)
        return model

    whole, killed, resumed = (copy.deepcopy(model) for _ in range(3))
    run(whole)
    with pytest.raises(Stop):
        run(killed, folder=tmp_path, after_step=[lambda m, step, _: stop_at(step, 3)])
    assert same_bits(whole, run(resumed, folder=tmp_path, resume=True))


def stop_at(step, last):
    if step == last:
        raise Stop


def test_a_finished_run_resumes_to_its_end_and_does_no_step(tmp_path):
    model, again = tiny_model(), tiny_model()
    done = fit(model, tmp_path)
    found = fit(again, tmp_path, resume=True)
    assert found.losses == done.losses
    assert found.optimizer_bytes == done.optimizer_bytes
    assert same_bits(model, again)


def test_frozen_tensors_are_not_in_the_file_and_nothing_in_it_is_a_pickle(tmp_path):
    model = LoRA(rank=2).attach(tiny_model())
    fit(model, tmp_path)
    with safe_open(tmp_path / NAME, "pt") as file:
        names = {n for n in file.keys() if n.startswith("model/")}  # noqa: SIM118
    trained = {f"model/{n}" for n, p in model.named_parameters() if p.requires_grad}
    assert names == trained
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "config.json", "log.jsonl"]


# -- what does not fit


def unfinished(folder, model=None):
    with pytest.raises(Stop):
        fit(model or tiny_model(), folder, stop=3)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 5}, "steps was 4 and is 5"),
        ({"learning_rate": 0.5}, "learning_rate was None and is 0.5"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"data": DATA[:-1]}, "the data is another one"),
    ],
)
def test_another_setting_or_other_data_is_refused_by_name(tmp_path, change, problem):
    unfinished(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be resumed: {problem}"):
        fit(tiny_model(), tmp_path, resume=True, **change)


def test_what_changes_no_bit_may_change(tmp_path):
    unfinished(tmp_path)
    whole, resumed = tiny_model(), tiny_model()
    fit(whole)
    fit(resumed, tmp_path, resume=True, eval_every=1, checkpoint_every=1, log_every=7)
    assert same_bits(whole, resumed)


def test_another_base_is_refused(tmp_path):
    start = LoRA(rank=2).attach(tiny_model())
    unfinished(tmp_path, start)
    other = LoRA(rank=2).attach(tiny_model(seed=5))
    with pytest.raises(ValueError, match="the base is another one"):
        fit(other, tmp_path, resume=True)


def test_another_technique_or_setting_of_it_is_refused_by_name(tmp_path):
    """alpha and the like leave no trace in the tensors' shapes."""
    unfinished(tmp_path, LoRA(rank=2).attach(tiny_model()))
    others = {
        "LoRA's alpha was 16 and is 8": LoRA(rank=2, alpha=8),
        "LoRA's rank was 2 and is 3": LoRA(rank=3),
        "the techniques were LoRA and are BitFit": BitFit(),
        "the techniques were LoRA and are none": None,
    }
    for problem, technique in others.items():
        model = tiny_model() if technique is None else technique.attach(tiny_model())
        before = {n: t.clone() for n, t in model_tensors(model).items()}
        with pytest.raises(ValueError, match=f"cannot be resumed: {problem}"):
            fit(model, tmp_path, resume=True)
        assert all(torch.equal(t, before[n]) for n, t in model_tensors(model).items())


def test_another_optimizer_is_refused_by_name(tmp_path):
    unfinished(tmp_path)
    with pytest.raises(ValueError, match="the optimizer was AdamW and is AdamW8bit"):
        resume_with(AdamW8bit, tmp_path)


def resume_with(optimizer, folder):
    config = TrainingConfig(steps=4, batch_size=3, device="cpu", checkpoint_every=2)
    train(
        tiny_model(), DATA, config, folder=folder, resume=True, show=False, make_optimizer=optimizer
    )


def test_what_no_checkpoint_can_hold_is_refused_before_the_first_step(tmp_path):
    """numpy's numbers are none of JSON's; the run would end at its first save."""
    calls = []
    with pytest.raises(ValueError, match=r"cannot be written to a checkpoint .*int64"):
        fit(tiny_model(), tmp_path, steps=numpy.int64(4), after=[lambda *_: calls.append(1)])
    assert not calls


def without_techniques(folder):
    """A checkpoint as it was written before techniques were noted."""
    with safe_open(folder / NAME, "pt") as file:
        tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
        header = json.loads(file.metadata()["run"])
    del header["techniques"]
    save_file(tensors, folder / NAME, {"run": json.dumps(header)})


def test_a_checkpoint_that_notes_no_techniques_is_known_by_its_shapes(tmp_path):
    unfinished(tmp_path, LoRA(rank=2).attach(tiny_model()))
    without_techniques(tmp_path)
    other = LoRA(rank=3).attach(tiny_model())
    before = {n: t.clone() for n, t in model_tensors(other).items()}
    with pytest.raises(
        ValueError, match=r"does not fit this model: .*A is \(2, 32\), not \(3, 32\)"
    ):
        fit(other, tmp_path, resume=True)
    assert all(torch.equal(t, before[n]) for n, t in model_tensors(other).items())


def test_a_technique_on_other_places_is_refused_by_name(tmp_path):
    unfinished(tmp_path, LoRA(rank=2, targets=("q",)).attach(tiny_model()))
    other = LoRA(rank=2, targets=("v",)).attach(tiny_model())
    with pytest.raises(ValueError, match=r"LoRA's targets was \['q'\] and is \['v'\]"):
        fit(other, tmp_path, resume=True)
    without_techniques(tmp_path)
    with pytest.raises(ValueError, match=r"missing model/blocks\.0\.attn\.v\.A"):
        fit(other, tmp_path, resume=True)


def test_nothing_to_resume_from_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint there to resume from"):
        fit(tiny_model(), tmp_path, resume=True)


def test_a_truncated_or_foreign_file_is_an_error(tmp_path):
    unfinished(tmp_path)
    path = tmp_path / NAME
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no checkpoint of a run, or truncated"):
        fit(tiny_model(), tmp_path, resume=True)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        fit(tiny_model(), tmp_path, resume=True)


def test_an_unfinished_run_is_not_overwritten_and_a_finished_one_is(tmp_path):
    unfinished(tmp_path)
    with pytest.raises(ValueError, match=r"unfinished run \(step 2 of 4\): go on with resume=True"):
        fit(tiny_model(), tmp_path)
    fit(tiny_model(), tmp_path, resume=True)
    assert fit(tiny_model(), tmp_path).steps == 4


def test_a_tensor_that_is_not_finite_is_never_saved(tmp_path):
    def poison(model, step, steps):
        if step == 4:
            with torch.no_grad():
                model.ln_f.bias[3] = float("inf")

    with pytest.raises(FloatingPointError, match=r"after step 4 .* model/ln_f\.bias"):
        fit(tiny_model(), tmp_path, after=[poison])
    whole, resumed = tiny_model(), tiny_model()
    fit(whole)
    fit(resumed, tmp_path, resume=True)
    assert same_bits(whole, resumed)


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    import minipeft.atomic as atomic

    write = atomic.fill

    def full(path, content):
        if NAME in path.name and full.saves:
            path.write_bytes(content[:50])
            raise OSError(28, "No space left on device")
        full.saves += NAME in path.name
        return write(path, content)

    full.saves = 0
    monkeypatch.setattr(atomic, "fill", full)
    with pytest.raises(OSError, match="No space left"):
        fit(tiny_model(), tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == [NAME, "config.json", "log.jsonl"]
    assert fit(tiny_model(), tmp_path, resume=True).steps == 4


# -- digests


def test_the_digests_see_every_change_of_a_frozen_tensor_and_of_the_data():
    model = LoRA(rank=2).attach(tiny_model())
    before = digest_of_base(model)
    with torch.no_grad():
        model.attachments[0].parameters()["blocks.0.attn.q.A"] += 1
    assert digest_of_base(model) == before  # trained: in the file, not in the base
    with torch.no_grad():
        model.ln_f.weight[0] += 1e-12
    assert digest_of_base(model) != before
    a, b = [Encoded([1, 2], [3, 4])], [Encoded([1, 2], [3, -100])]
    split = [Encoded([1], [2]), Encoded([3], [4])]
    digests = {digest_of_data(x) for x in (a, b, a + a, split, [Encoded([1, 2], 3)])}
    assert len(digests) == 5
