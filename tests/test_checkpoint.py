"""Adapter files: all or nothing on the disk and on the model, and every bad file is named."""

import errno
import hashlib
import json
import os
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minipeft
from minipeft import IA3, Adapter, BitFit, FullFineTuning, Head, LayerNormTuning, LoRA, checkpoint
from minipeft.checkpoint import fingerprint
from minipeft.technique import attachment_of
from tests.tiny import randomize, tiny_ids, tiny_model

CONFIG_FILE, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
RESUME = "minipeft_resume.safetensors"
KEPT = LoRA(rank=3, alpha=7, alpha_pattern=(("v", 3),))  # writes all three files
SHARED = LoRA(rank=4, alpha=7, targets=("q", "k", "v"), share_qkv=True)


def with_adapter(technique=None, seed=2, dtype=torch.float64):
    return randomize((technique or LoRA(rank=3)).attach(tiny_model(dtype=dtype)), seed=seed)


def saved(folder, technique=None, seed=2):
    """The folder, after an adapter was written to it; and the model."""
    model = with_adapter(technique, seed)
    minipeft.save_adapter(model, folder)
    return model


def output(model):
    with torch.no_grad():
        return model(tiny_ids())


def refused(folder, message, error=ValueError, model=None):
    """load_adapter raises `error` with `message`, and the model is what it was, bit for bit."""
    model = tiny_model() if model is None else model
    before = {n: (p, p.clone(), p.requires_grad) for n, p in model.named_parameters()}
    names, random = [a.name for a in model.attachments], torch.get_rng_state()
    with pytest.raises(error, match=message):
        minipeft.load_adapter(model, folder)
    assert [a.name for a in model.attachments] == names
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, (parameter, value, trained) in before.items():
        assert after[name] is parameter
        assert torch.equal(parameter, value)
        assert parameter.requires_grad == trained
    assert torch.equal(torch.get_rng_state(), random)


def retouch(folder, edit):
    """Read the tensors' file, edit the dict of tensors, write it with the header it had."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, header)


# -- what is in the files


@pytest.mark.parametrize(
    "technique",
    [LoRA(rank=3), SHARED, IA3(), BitFit(), LayerNormTuning(), Head(num_labels=3)],
    ids=lambda t: type(t).__name__,
)
def test_loaded_it_computes_the_same_bitwise(tmp_path, technique):
    model = saved(tmp_path, technique)
    again = minipeft.load_adapter(tiny_model(), tmp_path, name="other")
    assert torch.equal(output(again), output(model))
    assert attachment_of(again, "other").technique == technique
    mine, other = (a.attachments[0].tensors() for a in (model, again))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[n], other[n]) for n in mine)


def test_what_peft_does_not_know_keeps_the_two_file_names(tmp_path):
    model = saved(tmp_path, LayerNormTuning())
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS]
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["minipeft_type"] == "LayerNormTuning"
    assert config["base"] == fingerprint(model)
    assert load_file(tmp_path / WEIGHTS).keys() == model.attachments[0].tensors().keys()


def test_one_of_several_adapters_is_saved_by_its_name(tmp_path):
    model = with_adapter()
    LoRA(rank=2, targets=("o",)).attach(model, name="second")
    minipeft.save_adapter(model, tmp_path, name="default")
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 6
    minipeft.save_adapter(model, tmp_path)  # the last one, over the first
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["r"] == 2
    assert torch.equal(
        minipeft.load_adapter(tiny_model(), tmp_path).attachments[0].tensors()["blocks.0.attn.o.A"],
        attachment_of(model, "second").tensors()["blocks.0.attn.o.A"],
    )


def test_an_inactive_adapter_is_saved_like_an_active_one(tmp_path):
    model = with_adapter(SHARED)
    expected = output(model)
    minipeft.set_adapter(model, [])
    minipeft.save_adapter(model, tmp_path)
    assert torch.equal(output(minipeft.load_adapter(tiny_model(), tmp_path)), expected)


def test_the_same_adapter_gives_the_same_bytes_every_time(tmp_path):
    """safetensors keeps metadata in a hash map, whose order changes from file to file."""
    model, seen = with_adapter(KEPT), set()
    for n in range(6):
        minipeft.save_adapter(model, tmp_path / str(n))
        files = (tmp_path / str(n) / file for file in (WEIGHTS, RESUME, CONFIG_FILE))
        seen.add(tuple(file.read_bytes() for file in files))
    assert len(seen) == 1


def test_state_comes_back_numbers_strings_and_tensors(tmp_path):
    model = with_adapter(LayerNormTuning())
    state = {"step": 7, "note": "é", "average": torch.randn(3), "rng": torch.get_rng_state()}
    model.attachments[0].state |= state
    minipeft.save_adapter(model, tmp_path)
    again = minipeft.load_adapter(tiny_model(), tmp_path).attachments[0].state
    assert (again["step"], again["note"]) == (7, "é")
    assert torch.equal(again["average"], state["average"])
    assert torch.equal(again["rng"], state["rng"])
    assert state.keys() == again.keys()


def test_what_the_format_drops_is_kept_beside_and_comes_back_bitwise(tmp_path):
    """c_attn has one scale: q's and v's ratio of 3/7 is folded into B and would not come back."""
    technique = LoRA(rank=3, alpha=7, alpha_pattern=(("v", 3),))
    model = saved(tmp_path, technique)
    assert (tmp_path / RESUME).exists()
    again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert torch.equal(output(again), output(model))
    (tmp_path / RESUME).unlink()  # only the two files travelled
    with pytest.warns(UserWarning, match=RESUME):
        again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert (output(again) - output(model)).abs().max() < 1e-12  # float64: one rounding of B


def test_the_header_says_what_peft_has_no_word_for(tmp_path):
    """(Files 2)"""
    model = saved(tmp_path, LoRA(rank=3, alpha=5))
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        header = json.loads(file.metadata()["minipeft"])
    assert header["minipeft_type"] == "LoRA"
    assert header["settings"]["rank"] == 3
    assert header["base"] == fingerprint(model)
    assert (header["state"], header["resume"], header["format"]) == ({}, False, 1)
    said = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert header["config"] == checkpoint.digest_of_config(said)


def test_an_older_adapter_s_resume_file_does_not_stay(tmp_path):
    saved(tmp_path, LoRA(rank=3, alpha=7, alpha_pattern=(("v", 3),)))
    saved(tmp_path, LoRA(rank=3))
    assert sorted(os.listdir(tmp_path)) == [CONFIG_FILE, WEIGHTS]


def test_state_that_json_cannot_hold_is_an_error_before_anything_is_written(tmp_path):
    model = with_adapter()
    model.attachments[0].state["what"] = {1, 2}
    with pytest.raises(ValueError, match="what"):
        minipeft.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_loading_draws_no_random_numbers_and_keeps_the_mode(tmp_path):
    saved(tmp_path)
    state, model = torch.get_rng_state(), tiny_model().train()
    minipeft.load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.training for m in model.modules())


# -- the fingerprint


def test_the_fingerprint_is_the_hash_of_names_types_shapes_and_bytes():
    """(Files 1), written again."""
    model, digest = tiny_model(), hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} torch.float64 {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().numpy().tobytes())
    assert fingerprint(model) == digest.hexdigest()


def test_the_fingerprint_does_not_see_what_is_attached_or_trained():
    model = tiny_model()
    before = fingerprint(model)
    for name, technique in (("a", FullFineTuning()), ("b", SHARED), ("c", Head())):
        technique.attach(model, name=name)
        randomize(model)
        assert fingerprint(model) == before
    minipeft.detach(model)
    assert fingerprint(model) == before


def test_in_place_full_fine_tuning_remembers_the_base_it_trained_away(tmp_path):
    model = tiny_model()
    before = fingerprint(model)
    FullFineTuning(keep_original=False).attach(model)
    randomize(model)
    assert fingerprint(model) == before
    minipeft.save_adapter(model, tmp_path)
    again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert torch.equal(output(again), output(model))
    refused(tmp_path, "another base", model=tiny_model(seed=4))


@pytest.mark.parametrize("name", ["blocks.1.mlp.down.bias", "embed.position.weight", "ln_f.weight"])
def test_one_changed_number_is_another_base(name):
    model = tiny_model()
    before = fingerprint(model)
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[-1] += 1e-9
    assert fingerprint(model) != before


def test_another_precision_is_another_base():
    assert fingerprint(tiny_model()) != fingerprint(tiny_model().float())


def test_another_base_is_refused_and_both_fingerprints_are_named(tmp_path):
    for folder, technique in ((tmp_path / "1", LoRA(rank=3)), (tmp_path / "2", BitFit())):
        base = fingerprint(saved(folder, technique))[:16]
        other = fingerprint(tiny_model(seed=4))[:16]
        refused(folder, f"{folder}.*another base.*{base}.*{other}", model=tiny_model(seed=4))


# -- bad files


@pytest.mark.parametrize("technique", [LoRA(rank=3), LayerNormTuning()], ids=["peft's", "ours"])
class TestBadFiles:
    @pytest.fixture
    def folder(self, tmp_path, technique):
        saved(tmp_path / "adapter", technique)
        return tmp_path / "adapter"

    def test_a_missing_tensor(self, folder):
        name = sorted(load_file(folder / WEIGHTS))[-1]
        retouch(folder, lambda tensors: tensors.pop(name))
        refused(folder, f"{folder}.*missing {name}")

    def test_an_unknown_tensor(self, folder):
        retouch(folder, lambda tensors: tensors.update({"blocks.7.surprise": torch.zeros(2)}))
        refused(folder, "unknown blocks.7.surprise")

    def test_a_wrong_shape(self, folder):
        name = sorted(load_file(folder / WEIGHTS))[0]
        retouch(folder, lambda tensors: tensors.update({name: torch.zeros(5, 5)}))
        refused(folder, rf"{name} is \(5, 5\)")

    @pytest.mark.parametrize("keep", [0, 5, 100, -1])
    def test_a_truncated_file(self, folder, keep):
        path = folder / WEIGHTS
        path.write_bytes(path.read_bytes()[:keep])
        refused(folder, f"{path} is truncated or no safetensors file")

    def test_a_file_of_something_else(self, folder):
        (folder / WEIGHTS).write_text("The quick brown fox jumps over the lazy dog.")
        refused(folder, "truncated or no safetensors file")

    def test_a_tensors_file_of_another_program(self, folder):
        save_file({"transformer.wte.weight": torch.zeros(3)}, folder / WEIGHTS)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*was written by peft")
            refused(folder, r"unknown transformer\.wte\.weight")

    @pytest.mark.parametrize("text", ["{", "", "[1]", "null", '{"r": 4}', "\x00"])
    def test_a_broken_config(self, folder, text):
        (folder / CONFIG_FILE).write_text(text)
        refused(folder, f"{CONFIG_FILE} (is not JSON|describes no adapter)")

    def test_a_config_that_is_not_utf_8(self, folder):
        (folder / CONFIG_FILE).write_bytes(b'{"peft_type": "\xff"}')
        refused(folder, "is not JSON")

    def test_the_config_of_another_adapter(self, folder, tmp_path):
        saved(tmp_path / "other", LoRA(rank=2))
        (folder / CONFIG_FILE).write_bytes((tmp_path / "other" / CONFIG_FILE).read_bytes())
        refused(folder, f"{CONFIG_FILE} is not the config that {WEIGHTS} was saved with")

    def test_a_missing_config(self, folder):
        (folder / CONFIG_FILE).unlink()
        refused(folder, f"there is no .*{CONFIG_FILE}", FileNotFoundError)

    def test_a_missing_tensors_file(self, folder):
        (folder / WEIGHTS).unlink()
        refused(folder, f"has no {WEIGHTS}", FileNotFoundError)

    def test_a_pickle_is_never_opened(self, folder):
        (folder / WEIGHTS).rename(folder / "adapter_model.bin")
        refused(folder, "pickle, which can run code", FileNotFoundError)

    def test_a_name_that_is_taken(self, folder):
        refused(folder, "'default' is taken", model=with_adapter(IA3()))

    def test_a_newer_format(self, folder, monkeypatch):
        monkeypatch.setattr(checkpoint, "FORMAT", 2)
        saved(folder)
        monkeypatch.undo()
        refused(folder, "format 2; this minipeft reads 1")


def test_no_folder_a_model_and_a_folder_of_adapters_are_told_apart(tmp_path):
    refused(tmp_path / "nothing", "there is no folder", FileNotFoundError)
    tiny_model().save_pretrained(tmp_path / "model")
    refused(tmp_path / "model", "a model, not an adapter", FileNotFoundError)
    saved(tmp_path / "many" / "one")
    refused(tmp_path / "many", r"\['one'\]", FileNotFoundError)


def test_an_unknown_technique_or_setting_is_named(tmp_path):
    saved(tmp_path, LayerNormTuning())
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(tensors, tmp_path / WEIGHTS)  # without our header the config counts
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"minipeft_type": "Foo"}))
    refused(tmp_path, "no technique is called 'Foo'")
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"settings": {"depth": 3}}))
    refused(tmp_path, "LayerNormTuning has no setting.*depth")
    del config["base"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    refused(tmp_path, "does not say its base")


def test_a_note_on_where_the_base_lies_may_be_edited(tmp_path):
    model = saved(tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    config["base_model_name_or_path"] = "my/gpt2"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    assert torch.equal(output(minipeft.load_adapter(tiny_model(), tmp_path)), output(model))


def test_nothing_attached_and_a_file_in_the_way_are_errors(tmp_path):
    with pytest.raises(ValueError, match="nothing is attached"):
        minipeft.save_adapter(tiny_model(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        minipeft.save_adapter(with_adapter(), tmp_path / "file")


# -- interrupted saves

OLD, NEW = KEPT, LoRA(rank=4, alpha=7, alpha_pattern=(("v", 3),))


def one_or_the_other(folder, old, new):
    """Whether the folder holds the new adapter; it must be the old or the new one, whole."""
    now = output(minipeft.load_adapter(tiny_model(), folder))
    assert torch.equal(now, old) or torch.equal(now, new)
    return torch.equal(now, new)


@pytest.mark.parametrize("at", range(3))
def test_a_full_disk_leaves_the_old_adapter_and_no_litter(tmp_path, monkeypatch, at):
    old, writes, fsync = output(saved(tmp_path, OLD)), iter(range(9)), os.fsync

    def full(handle):
        if next(writes) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        saved(tmp_path, NEW)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files
    assert torch.equal(output(minipeft.load_adapter(tiny_model(), tmp_path)), old)


@pytest.mark.parametrize("at", range(3))
def test_a_rename_that_fails_puts_the_old_files_back(tmp_path, monkeypatch, at):
    saved(tmp_path, OLD)
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    renames, replace = iter(range(9)), os.replace

    def fails(source, target):
        if next(renames) == at:
            raise PermissionError(errno.EACCES, "the file is open elsewhere")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(PermissionError):
        saved(tmp_path, NEW)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def killed_at_rename(number, folder, model):
    """Save in a forked child that dies at this rename: os._exit is a kill, nothing cleans up."""
    child = os.fork()
    if child == 0:
        renames, replace = iter(range(9)), os.replace
        os.replace = lambda a, b: os._exit(9) if next(renames) == number else replace(a, b)
        try:
            minipeft.save_adapter(model, folder)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a child that can be killed")
@pytest.mark.parametrize("first", [False, True], ids=["over an old one", "into nothing"])
@pytest.mark.parametrize("at", range(4))
def test_a_kill_between_two_renames_leaves_one_whole_adapter(tmp_path, at, first):
    old, new = None if first else output(saved(tmp_path, OLD)), with_adapter(NEW, seed=5)
    assert killed_at_rename(at, tmp_path, new) == (at < 3)
    if first and at == 0:
        refused(tmp_path, f"has no {WEIGHTS}", FileNotFoundError)
        return
    new = output(new)
    assert one_or_the_other(tmp_path, new if first else old, new) == (at > 0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_modules": 5},
        {"target_modules": "(("},
        {"rank_pattern": {"c_attn(": 4}},
        {"rank_pattern": [1]},
        {"alpha_pattern": {"c_attn": "x"}},
        {"lora_dropout": "x"},
        {"layers_to_transform": "x"},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_in_a_config_is_named_with_its_folder(tmp_path, wrong):
    """Somebody else's config may hold anything; the model is then as it was."""
    minipeft.save_adapter(LoRA(rank=2).attach(tiny_model()), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights)  # as peft writes it: without our header
    config.write_text(json.dumps(json.loads(config.read_text()) | wrong))
    model = tiny_model()
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=str(tmp_path)):
        minipeft.load_adapter(model, tmp_path)
    assert not model.attachments


def test_a_setting_of_the_wrong_kind_in_our_own_config_is_named_with_its_folder(tmp_path):
    minipeft.save_adapter(Adapter("pfeiffer", 3).attach(tiny_model()), tmp_path)
    weights, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file(load_file(weights), weights)
    said = json.loads(config.read_text())
    said["settings"]["leave_out"] = 3
    config.write_text(json.dumps(said))
    with pytest.raises(ValueError, match=f"{tmp_path}.*wrong kind"):
        minipeft.load_adapter(tiny_model(), tmp_path)
