"""Soft prompts against peft: the same functions, and the same files in both directions."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, GPT2LMHeadModel

import minipeft
from minipeft import PrefixTuning, PromptTuning, PTuning, PTuningV2
from tests.tiny import close, randomize, tiny_ids, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was written by peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
P, D, L = 5, 32, 2
SINGLE = 1e-6  # float32, relative to the largest logit: the same sums, in another order
FILE = "adapter_model.safetensors"


@pytest.fixture
def ours(tmp_path):
    return tiny_model(dtype=torch.float32)


@pytest.fixture
def theirs(ours, tmp_path):
    ours.save_pretrained(tmp_path / "base")
    return GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()


def peft_model(theirs, kind, **settings):
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=P, **settings)
    return peft.get_peft_model(theirs, config).eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(ids).logits[:, -ids.shape[1] :]


def out(model, ids):
    with torch.no_grad():
        return model(ids)


def encoder_of(model):
    return model.attachments[0].wrappers()[0].prompt


def copy_linear(linear, theirs):
    linear.weight.copy_(theirs.weight)
    linear.bias.copy_(theirs.bias)


# -- the same functions


def test_prompt_tuning_is_peft_s(ours, theirs):
    """(Prompt 1)"""
    PromptTuning(P).attach(ours)
    there = peft_model(theirs, "PromptTuningConfig")
    with torch.no_grad():
        ours.embed.prompt.weight.copy_(there.prompt_encoder["default"].embedding.weight)
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), SINGLE)


def test_p_tuning_with_an_mlp_is_peft_s(ours, theirs):
    """(P-tuning 2)"""
    PTuning((P,), encoder="mlp", hidden=7).attach(ours)
    there = peft_model(theirs, "PromptEncoderConfig", encoder_hidden_size=7)
    encoder = there.prompt_encoder["default"]
    with torch.no_grad():
        encoder_of(ours).embedding.copy_(encoder.embedding.weight)
        for linear, other in zip(encoder_of(ours).mlp, encoder.mlp_head[::2], strict=True):
            copy_linear(linear, other)
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), SINGLE)


def test_p_tuning_with_an_lstm_is_peft_s(ours, theirs):
    """(P-tuning 4): what peft calls LSTM is the LSTM with an MLP on it."""
    PTuning((P,), encoder="lstm+mlp", hidden=7).attach(ours)
    settings = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7}
    there = peft_model(theirs, "PromptEncoderConfig", **settings)
    encoder = there.prompt_encoder["default"]
    with torch.no_grad():
        encoder_of(ours).embedding.copy_(encoder.embedding.weight)
        encoder_of(ours).lstm.load_state_dict(encoder.lstm_head.state_dict())
        for linear, other in zip(encoder_of(ours).mlp, encoder.mlp_head[::2], strict=True):
            copy_linear(linear, other)
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), SINGLE)


def load_tables(model, table):
    """peft's (p, 2 L D): layer l's keys and values are column blocks 2 l and 2 l + 1."""
    with torch.no_grad():
        for n, block in enumerate(model.blocks):
            block.attn.core.table.weight.copy_(table[:, 2 * n * D : 2 * (n + 1) * D])


@pytest.mark.parametrize("technique", [PrefixTuning(P, False), PTuningV2(P)], ids=["prefix", "v2"])
def test_a_flat_prefix_is_peft_s(ours, theirs, technique):
    """(Prefix 1) and (P-tuning v2 1)"""
    technique.attach(ours)
    there = peft_model(theirs, "PrefixTuningConfig")
    load_tables(ours, there.prompt_encoder["default"].embedding.weight)
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), SINGLE)


def test_the_prefix_mlp_is_peft_s_projection(ours, theirs):
    """(Prefix 2): our W_l are the row blocks of peft's one large matrix."""
    PrefixTuning(P, bottleneck=7).attach(ours)
    settings = {"prefix_projection": True, "encoder_hidden_size": 7}
    there = peft_model(theirs, "PrefixTuningConfig", **settings)
    encoder = there.prompt_encoder["default"]
    down, _, up = encoder.transform
    with torch.no_grad():
        tables = [block.attn.core.table for block in ours.blocks]
        tables[0].trunk.embedding.copy_(encoder.embedding.weight)
        copy_linear(tables[0].trunk.down, down)
        for table, weight, bias in zip(tables, up.weight.chunk(L), up.bias.chunk(L), strict=True):
            table.up.weight.copy_(weight)
            table.up.bias.copy_(bias)
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), SINGLE)


def test_a_prefix_is_hugging_face_s_past_key_values(ours, theirs):
    """(Prefix 1): keys and values in the cache, positions from p on."""
    PrefixTuning(P, False).attach(ours)
    past = DynamicCache()
    for n, block in enumerate(ours.blocks):
        keys, values = block.attn.core.prefix(3).detach()
        past.update(keys.contiguous(), values.contiguous(), n)
    with torch.no_grad():
        expected = theirs(tiny_ids(), past_key_values=past).logits
    close(out(ours, tiny_ids()), expected, SINGLE)


def test_a_prefix_from_a_text_is_the_cache_after_reading_it(ours, theirs):
    PrefixTuning(4, False, init="text", text=(5, 17, 3, 41)).attach(ours)
    with torch.no_grad():
        text = torch.tensor([[5, 17, 3, 41]]).expand(3, -1)
        expected = theirs(torch.cat([text, tiny_ids()], 1)).logits[:, 4:]
    close(out(ours, tiny_ids()), expected, SINGLE)


# -- the same files

OURS = {
    "prompt": PromptTuning(P),
    "prefix": PrefixTuning(P, reparameterize=False),
    "prefix mlp": PrefixTuning(P, bottleneck=7),
    "p-tuning table": PTuning((P,), encoder="table"),
    "p-tuning mlp": PTuning((P, 0), encoder="mlp", hidden=7),
    "p-tuning lstm": PTuning((P,), encoder="lstm", layers=1),
    "p-tuning lstm+mlp": PTuning((P,), encoder="lstm+mlp", hidden=7),
}
THEIRS = {
    "prompt": ("PromptTuningConfig", {}),
    "prefix": ("PrefixTuningConfig", {}),
    "prefix projection": (
        "PrefixTuningConfig",
        {"prefix_projection": True, "encoder_hidden_size": 7},
    ),
    "p-tuning mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 7}),
    "p-tuning lstm": (
        "PromptEncoderConfig",
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7},
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_peft_opens_what_is_saved_here(ours, theirs, tmp_path, name):
    randomize(OURS[name].attach(ours))
    minipeft.save_adapter(ours, tmp_path / "adapter")
    there = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    close(logits_of(there, tiny_ids()), out(ours, tiny_ids()), 1e-5)
    assert list(load_file(tmp_path / "adapter" / FILE)) == ["prompt_embeddings"]


@pytest.mark.parametrize("name", OURS)
def test_what_is_saved_here_opens_here_and_can_be_trained_on(ours, tmp_path, name):
    """The encoder is kept beside peft's table, every bit of it."""
    randomize(OURS[name].attach(ours))
    minipeft.save_adapter(ours, tmp_path / "adapter")
    again = minipeft.load_adapter(tiny_model(dtype=torch.float32), tmp_path / "adapter")
    assert again.attachments[0].technique == OURS[name]
    mine, loaded = (m.attachments[0].tensors() for m in (ours, again))
    assert mine.keys() == loaded.keys()
    assert all(torch.equal(mine[n], loaded[n]) for n in mine)


@pytest.mark.parametrize("name", ["prefix mlp", "p-tuning lstm+mlp"])
def test_without_the_encoder_beside_it_the_table_opens(ours, tmp_path, name):
    randomize(OURS[name].attach(ours))
    minipeft.save_adapter(ours, tmp_path / "adapter")
    (tmp_path / "adapter" / "minipeft_resume.safetensors").unlink()
    again = minipeft.load_adapter(tiny_model(dtype=torch.float32), tmp_path / "adapter")
    assert again.attachments[0].technique == OURS[name].flattened()
    close(out(again, tiny_ids()), out(ours, tiny_ids()), SINGLE)


@pytest.mark.parametrize("name", THEIRS)
def test_what_peft_saves_opens_here_and_is_saved_again_byte_for_byte(ours, theirs, tmp_path, name):
    kind, settings = THEIRS[name]
    there = peft_model(theirs, kind, **settings)
    there.save_pretrained(tmp_path / "adapter")
    minipeft.load_adapter(ours, tmp_path / "adapter")
    close(out(ours, tiny_ids()), logits_of(there, tiny_ids()), 1e-5)
    minipeft.save_adapter(ours, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "adapter" / FILE).read_bytes()


@pytest.mark.parametrize(
    "technique",
    [
        PromptTuning(P, members=2),
        PTuning((3, 2)),
        PrefixTuning(P, bottleneck=7, placement="infix"),
        PrefixTuning(P, bottleneck=7, placement="embedding"),
        PTuningV2(P),
    ],
    ids=str,
)
def test_what_peft_does_not_know_keeps_files_of_our_own(ours, tmp_path, technique):
    technique.attach(ours)
    minipeft.save_adapter(ours, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["minipeft_type"] == type(technique).__name__ and "peft_type" not in config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None"),
        ({"num_virtual_tokens": 4}, r"prompt_embeddings is \(5, 32\)"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules=2: a GPT has one"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "PREFIX_TUNING"}, r"need \(5, 128\)"),
        ({"num_soft_words": 3}, "num_soft_words=3 is not supported"),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(ours, theirs, tmp_path, change, message):
    peft_model(theirs, "PromptTuningConfig").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        minipeft.load_adapter(ours, tmp_path)
    assert not ours.attachments


def test_a_missing_tensor_is_named(ours, theirs, tmp_path):
    peft_model(theirs, "PromptTuningConfig").save_pretrained(tmp_path)
    save_file({"rows": torch.zeros(P, D)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="missing prompt_embeddings; unknown rows"):
        minipeft.load_adapter(ours, tmp_path)


def test_a_copied_folder_is_as_good(ours, tmp_path):
    randomize(PrefixTuning(P, bottleneck=7).attach(ours))
    minipeft.save_adapter(ours, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = minipeft.load_adapter(tiny_model(dtype=torch.float32), tmp_path / "b")
    assert torch.equal(out(again, tiny_ids()), out(ours, tiny_ids()))
