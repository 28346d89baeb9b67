"""IA3 against peft: its forward, its count, and its files both ways.

Logits agree to 1e-5 in float32: the same products, summed in another order (about 1e-6 is seen).
"""

import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, GPT2Model

import minipeft
from minipeft import GPT, IA3
from tests.tiny import close, randomize, tiny_ids, tiny_model

SAME = 1e-5
FILES = ("adapter_model.safetensors", "adapter_config.json")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a small GPT-2 that both libraries open."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


def ours(base):
    return GPT.from_pretrained(base).eval()


def logits(model):
    with torch.no_grad():
        out = model(tiny_ids())
    return out if isinstance(out, torch.Tensor) else out.logits


def in_peft(base, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(
            GPT2LMHeadModel.from_pretrained(base).eval(), folder
        ).eval()


def from_peft(base, folder, kind=GPT2LMHeadModel, **config):
    """Train (at random) an IA3 in peft and save it; returns peft's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(kind.from_pretrained(base), peft.IA3Config(**config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def opened(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was written by peft")
        return minipeft.load_adapter(ours(base), folder)


WRITTEN = {
    "the paper's": IA3(),
    "peft's": IA3(targets=("q", "k", "v", "down")),
    "the adapters library's": IA3(targets=("k", "v", "up")),
    "everything": IA3(targets=("q", "k", "v", "o", "up", "down"), feedforward=("up", "down")),
    "attention's output read": IA3(targets=("o",), feedforward=("o",)),
    "down written": IA3(targets=("down",), feedforward=()),
}


@pytest.mark.parametrize("technique", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_here_computes_the_same_in_peft_and_opens_bitwise(
    base, tmp_path, technique
):
    """(peft IA3 1)"""
    model = randomize(technique.attach(ours(base)), std=0.3)
    minipeft.save_adapter(model, tmp_path)
    theirs = in_peft(base, tmp_path)
    close(logits(theirs), logits(model), SAME)
    close(logits(theirs.merge_and_unload()), logits(model), SAME)
    again = minipeft.load_adapter(ours(base), tmp_path)
    assert again.attachments[0].technique == technique
    assert torch.equal(logits(again), logits(model))


def test_the_joint_vector_has_ones_where_nothing_is_scaled(base, tmp_path):
    """(peft IA3 1)"""
    model = randomize(IA3().attach(ours(base)))
    minipeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILES[0])
    attn = model.blocks[1].attn
    joint = torch.cat([torch.ones(32), attn.k.l.detach(), attn.v.l.detach()])[:, None]
    assert torch.equal(tensors["base_model.model.transformer.h.1.attn.c_attn.ia3_l"], joint)
    down = tensors["base_model.model.transformer.h.0.mlp.c_proj.ia3_l"]
    assert torch.equal(down, model.blocks[0].mlp.down.l.detach()[None])


def test_what_peft_cannot_say_keeps_our_own_files(base, tmp_path):
    technique = IA3(targets=("k", "v"), feedforward=("v",))
    model = randomize(technique.attach(ours(base)))
    minipeft.save_adapter(model, tmp_path)
    assert "minipeft_type" in (tmp_path / FILES[1]).read_text()
    assert torch.equal(logits(minipeft.load_adapter(ours(base), tmp_path)), logits(model))


READ = {
    "default": {},
    "k, q, v alone": {"target_modules": ["c_attn"], "feedforward_modules": []},
    "both c_proj read": {"target_modules": ["c_proj"], "feedforward_modules": ["c_proj"]},
    "c_fc read": {"target_modules": ["c_fc", "c_attn"], "feedforward_modules": ["c_fc"]},
    "c_fc written": {"target_modules": ["c_fc"], "feedforward_modules": []},
    "expressions": {
        "target_modules": r".*\.(attn|mlp)\.c_proj",
        "feedforward_modules": r".*mlp\.c_proj",
    },
    "names": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2"},
}


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, GPT2Model])
@pytest.mark.parametrize("config", READ.values(), ids=READ)
def test_what_peft_writes_computes_the_same_here_and_goes_back_byte_for_byte(
    base, tmp_path, config, kind
):
    if kind is GPT2Model:  # which has no head to generate with
        config = {k: v for k, v in config.items() if k != "task_type"}
    their_model = from_peft(base, tmp_path / "theirs", kind, **config)
    model = opened(base, tmp_path / "theirs")
    if kind is GPT2LMHeadModel:
        expected = logits(their_model)
    else:
        with torch.no_grad():
            expected = model.head(their_model(tiny_ids()).last_hidden_state)
    close(logits(model), expected, SAME)
    minipeft.save_adapter(model, tmp_path / "ours")
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()


def test_the_count_is_pefts(base):
    for config, technique in (
        ({}, IA3(targets=("q", "k", "v", "down"))),
        ({"target_modules": ["c_fc"], "feedforward_modules": []}, IA3(targets=("up",))),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.get_peft_model(
                GPT2LMHeadModel.from_pretrained(base), peft.IA3Config(**config)
            )
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert count == technique.count(ours(base).config)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"target_modules": r".*\.1\.mlp\.c_proj"}, "mlp.c_proj in some layers"),
        ({"target_modules": ["nothing"]}, "names nothing of GPT-2's"),
        ({"modules_to_save": ["ln_f"]}, "modules_to_save"),
    ],
)
def test_a_config_that_has_no_counterpart_is_refused(base, config, message):
    from minipeft.interop.peft_ia3 import ia3_from_config

    with pytest.raises(ValueError, match=message):
        ia3_from_config({"peft_type": "IA3"} | config, ours(base).config, "base_model.model.")


def test_a_config_without_modules_means_pefts_own_for_gpt2(base):
    from minipeft.interop.peft_ia3 import ia3_from_config

    found = ia3_from_config({"peft_type": "IA3"}, ours(base).config, "base_model.model.")
    assert found.targets == ("q", "k", "v", "down")
    assert found.feedforward == ("down",)
