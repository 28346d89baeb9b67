"""GPT-2 folders: what is written, what is read, and what is refused by name.

That transformers agrees with us is in tests/parity/test_gpt_hf.py.
"""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minipeft import wrap
from minipeft.gpt import GPT, GPTConfig
from minipeft.interop import hf_gpt2
from minipeft.low_rank.lora import LoRA
from tests.tiny import tiny_ids, tiny_model

SMALL = GPTConfig(vocab_size=47, context_length=13, n_layer=2, n_head=3, d_model=12, d_ff=31)


@pytest.fixture
def small():
    return tiny_model(SMALL, dtype=torch.float32)


@pytest.fixture
def folder(small, tmp_path):
    """A folder of ours, for tests that damage it."""
    small.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder, change):
    """Apply `change` to the dict of stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def same(a, b):
    states = a.state_dict(), b.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][name], states[1][name]) for name in states[0]
    )


# -- there and back


def test_saving_and_opening_is_bitwise(small, folder):
    opened = GPT.from_pretrained(folder)
    assert opened.config == small.config
    assert same(opened, small)
    assert opened.head.weight is opened.embed.token.weight
    assert all(p.requires_grad for p in opened.parameters())
    assert not opened.training


def test_every_field_of_the_configuration_survives(tmp_path):
    for config in (
        replace(SMALL, dropout=0.25, layer_norm_eps=1e-6),
        replace(SMALL, d_ff=None),
        replace(SMALL, n_head=4, n_layer=1),
    ):
        GPT(config).save_pretrained(tmp_path)
        assert GPT.from_pretrained(tmp_path).config == config


def test_stored_tensors_are_gpt2s(small, folder):
    """Names, Conv1D orientation (in, out), q beside k beside v, and no copy of the tied head."""
    stored = load_file(folder / "model.safetensors")
    attn, mlp = small.blocks[1].attn, small.blocks[1].mlp
    assert len(stored) == 2 + 12 * SMALL.n_layer + 2
    h = "transformer.h.1."
    joint = torch.cat([attn.q.weight, attn.k.weight, attn.v.weight]).T
    assert torch.equal(stored[h + "attn.c_attn.weight"], joint)
    assert stored[h + "attn.c_attn.weight"].shape == (12, 36)
    biases = torch.cat([attn.q.bias, attn.k.bias, attn.v.bias])
    assert torch.equal(stored[h + "attn.c_attn.bias"], biases)
    assert torch.equal(stored[h + "attn.c_proj.weight"], attn.o.weight.T)
    assert torch.equal(stored[h + "mlp.c_fc.weight"], mlp.up.weight.T)
    assert torch.equal(stored[h + "mlp.c_proj.weight"], mlp.down.weight.T)
    assert torch.equal(stored["transformer.wpe.weight"], small.embed.position.weight)
    assert not any("lm_head" in name for name in stored)
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


def test_saving_twice_writes_the_same_bytes(small, folder, tmp_path):
    GPT.from_pretrained(folder).save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_names_without_prefix_masks_and_a_copy_of_the_head_are_accepted(small, folder):
    def older(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for n in range(SMALL.n_layer):
            tensors[f"h.{n}.attn.bias"] = torch.ones(1, 1, 13, 13).tril().bool()
            tensors[f"h.{n}.attn.masked_bias"] = torch.tensor(-1e4)
        tensors["lm_head.weight"] = tensors["wte.weight"].clone()

    rewrite(folder, older)
    assert same(GPT.from_pretrained(folder), small)


def shard(folder):
    """Split the single file into two and an index."""
    tensors = load_file(folder / "model.safetensors")
    names, where = sorted(tensors), {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({n: tensors[n] for n in part}, folder / f"model-{i}.safetensors")
        where |= dict.fromkeys(part, f"model-{i}.safetensors")
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return where


def test_shards_are_put_together(small, folder):
    shard(folder)
    assert same(GPT.from_pretrained(folder), small)


@pytest.mark.parametrize(
    "stored, opened",
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_16_bit_files_open_exactly_in_float32_and_float64_stays(stored, opened, tmp_path):
    model = tiny_model(SMALL, dtype=stored)
    model.save_pretrained(tmp_path)
    back = GPT.from_pretrained(tmp_path)
    assert back.embed.token.weight.dtype == back.blocks[1].attn.v.bias.dtype == opened
    assert same(back, model.to(opened))


def test_opening_leaves_the_random_state_alone(folder):
    before = torch.get_rng_state()
    GPT.from_pretrained(folder)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_opened_model_does_not_hang_on_its_file(small, folder):
    """The file may be overwritten while the model is in use."""
    opened = GPT.from_pretrained(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        size = os.path.getsize(folder / "model.safetensors")
        file.write(b"\0" * size)
    assert same(opened, small)


def test_defaults_are_gpt2s_when_a_field_is_left_out(folder):
    """The oldest files have n_ctx instead of n_positions, and neither activation nor epsilon."""
    values = json.loads((folder / "config.json").read_text())
    for name in ("activation_function", "layer_norm_epsilon", "n_positions", "n_inner"):
        del values[name]
    for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
        del values[name]
    (folder / "config.json").write_text(json.dumps(values))
    config = hf_gpt2.read_config(folder)
    assert config == replace(SMALL, d_ff=None, dropout=0.1, layer_norm_eps=1e-5)


# -- refused: architectures we do not have


@pytest.mark.parametrize(
    "field, value, says",
    [
        ("model_type", "llama", "model_type='llama' is not 'gpt2'"),
        ("activation_function", "relu", "activation_function='relu'.*tanh GELU"),
        ("activation_function", "gelu", "activation_function='gelu'.*tanh GELU"),
        ("scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx=True"),
        ("scale_attn_weights", False, "scale_attn_weights=False"),
        ("add_cross_attention", True, "add_cross_attention=True means cross-attention"),
        ("pruned_heads", {"0": [1]}, "pruned_heads"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("attn_pdrop", 0.3, "embd_pdrop=0.0, attn_pdrop=0.3, resid_pdrop=0.0; GPT has one"),
        ("n_embd", 13, "d_model=13 is not a multiple of n_head=3"),
        ("n_layer", "two", "n_layer='two' is not a positive integer"),
        ("vocab_size", None, "vocab_size=None is not a positive integer"),
        ("tie_word_embeddings", False, "tie_word_embeddings is false"),
    ],
)
def test_a_config_that_asks_for_another_architecture_is_refused(folder, field, value, says):
    edit(folder, **{field: value})
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize("name", ["gelu_new", "gelu_pytorch_tanh", "gelu_fast"])
def test_the_three_names_of_the_tanh_gelu_are_one(small, folder, name):
    edit(folder, activation_function=name)
    assert same(GPT.from_pretrained(folder), small)


def test_a_head_of_its_own_is_refused(folder):
    def untie(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"] + 1e-3

    rewrite(folder, untie)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not wte\.weight.*tied"):
        GPT.from_pretrained(folder)


def test_a_head_of_another_shape_is_refused(folder):
    def cut(tensors):
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"][:-1].clone()

    rewrite(folder, cut)
    with pytest.raises(ValueError, match=r"lm_head\.weight is not wte\.weight"):
        GPT.from_pretrained(folder)


# -- refused: tensors that do not fit


def test_missing_unknown_and_misshapen_tensors_are_all_named(folder):
    def damage(tensors):
        del tensors["transformer.h.1.mlp.c_fc.bias"]
        tensors["score.weight"] = torch.zeros(2, 12)
        c_fc = "transformer.h.0.mlp.c_fc.weight"
        tensors[c_fc] = tensors[c_fc].T.contiguous()  # (out, in), as nn.Linear has it
        tensors["transformer.ln_f.bias"] = torch.zeros(12, dtype=torch.int32)

    rewrite(folder, damage)
    with pytest.raises(ValueError) as refused:
        GPT.from_pretrained(folder)
    text = str(refused.value)
    assert "missing h.1.mlp.c_fc.bias" in text
    assert "unknown score.weight" in text
    assert "h.0.mlp.c_fc.weight is (31, 12), config.json asks for (12, 31)" in text
    assert "ln_f.bias has dtype I32" in text


def test_a_layer_more_or_less_than_the_config_says_is_refused(folder):
    edit(folder, n_layer=1)
    with pytest.raises(ValueError, match=r"unknown h\.1\.attn\.c_attn\.bias"):
        GPT.from_pretrained(folder)
    edit(folder, n_layer=3)
    with pytest.raises(ValueError, match=r"missing h\.2\.attn\.c_attn\.bias.*and 4 more"):
        GPT.from_pretrained(folder)


def test_one_tensor_under_two_names_is_refused(folder):
    def twice(tensors):
        tensors["ln_f.bias"] = tensors["transformer.ln_f.bias"].clone()

    rewrite(folder, twice)
    with pytest.raises(ValueError, match=r"ln_f\.bias is there twice"):
        GPT.from_pretrained(folder)


# -- refused: files that are damaged or something else


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused_by_name_and_size(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors \([\d,]+ bytes\) is truncated"):
        GPT.from_pretrained(folder)


def test_a_foreign_file_is_refused(folder):
    (folder / "model.safetensors").write_bytes(b"PK\3\4 this is some other kind of file" * 9)
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        GPT.from_pretrained(folder)


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"a": 1,\n "b" 2}', "config.json, line 2, column 6"),
        (b"", "config.json, line 1"),
        (b"[1]", "holds a list"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_a_malformed_config_is_refused_with_its_place(folder, content, says):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        GPT.from_pretrained(folder)


def test_a_folder_without_the_files_is_refused_with_a_hint(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        GPT.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="load_adapter"):
        GPT.from_pretrained(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"\.bin files can run code"):
        GPT.from_pretrained(folder)


def test_shards_that_are_missing_or_lack_a_tensor_or_lie_elsewhere_are_refused(folder):
    where = shard(folder)
    index = folder / "model.safetensors.index.json"

    def point(name, shard):
        index.write_text(json.dumps({"weight_map": where | {name: shard}}))

    point("transformer.ln_f.bias", "model-3.safetensors")
    with pytest.raises(FileNotFoundError, match=r"names model-3\.safetensors, which is missing"):
        GPT.from_pretrained(folder)
    other = {"model-1.safetensors": "model-2.safetensors"}
    moved = other.get(where["transformer.ln_f.bias"], "model-1.safetensors")
    point("transformer.ln_f.bias", moved)
    with pytest.raises(ValueError, match=r"lacks what .* promises: transformer\.ln_f\.bias"):
        GPT.from_pretrained(folder)
    point("transformer.ln_f.bias", "../model.safetensors")
    with pytest.raises(ValueError, match=r"'\.\./model\.safetensors', not a file name"):
        GPT.from_pretrained(folder)
    index.write_text("{}")
    with pytest.raises(ValueError, match="has no weight_map"):
        GPT.from_pretrained(folder)


# -- saving


def test_a_model_with_techniques_on_it_is_not_saved_and_the_way_out_is_named(small, folder):
    before = (folder / "model.safetensors").read_bytes()
    LoRA(rank=2, alpha=4).attach(small, name="mine")
    with pytest.raises(ValueError, match=r"mine.*merge\(model\).*save_adapter\(model, folder\)"):
        small.save_pretrained(folder)
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_wrapper_put_in_by_hand_is_noticed_too(small, folder):
    small.blocks[1].mlp = wrap.Wrapper(small.blocks[1].mlp)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp.*merge"):
        small.save_pretrained(folder)


def test_what_the_layout_cannot_hold_is_not_saved(small, folder):
    small.blocks[1].mlp.up = torch.nn.Linear(12, 29)
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.up\.weight is \(29, 12\).*\(31, 12\)"):
        small.save_pretrained(folder)
    untied = tiny_model(SMALL)
    untied.head = torch.nn.Linear(12, 47, bias=False)
    with pytest.raises(ValueError, match="not tied"):
        untied.save_pretrained(folder)


def test_an_interrupted_save_leaves_the_old_model_whole(small, folder, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf_gpt2, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tiny_model(replace(SMALL, n_layer=1)).save_pretrained(folder)
    assert same(GPT.from_pretrained(folder), small)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_model_whole(small, folder):
    program = f"""
        import os, signal
        from minipeft.gpt import GPT, GPTConfig
        from minipeft.interop import hf_gpt2
        def killed(tensors, path, metadata):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        hf_gpt2.save_file = killed
        GPT(GPTConfig(n_layer=1, d_model=8)).save_pretrained({str(folder)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -9
    assert same(GPT.from_pretrained(folder), small)


def test_an_opened_model_trains_and_computes_as_the_saved_one(small, folder):
    ids = tiny_ids(2, 9, vocab=47)
    opened = GPT.from_pretrained(folder)
    assert torch.equal(opened(ids), small(ids))
    opened.loss(ids, ids).backward()
    small.loss(ids, ids).backward()
    assert torch.equal(opened.embed.token.weight.grad, small.embed.token.weight.grad)
