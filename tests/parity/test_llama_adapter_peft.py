"""LLaMA-Adapter against peft's adaption prompts: the forward on GPT-2, the files both ways, and for
the paper's variant, the form that peft has on LLaMA, through the output projection.

1e-6 of the largest logit in float32 is a few roundings; files are read at 1e-5.
"""

import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel, GPT2Model

import minipeft
from minipeft import GPT, LLaMAAdapter
from tests.tiny import close, randomize, tiny_ids, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was written by peft"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SINGLE, FILE = 1e-6, "adapter_model.safetensors"
PEFT = LLaMAAdapter(5, variant="peft_gpt2")


@pytest.fixture
def base(tmp_path):
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def ours(base):
    return GPT.from_pretrained(base).eval()


@pytest.fixture
def theirs(base):
    return GPT2LMHeadModel.from_pretrained(base).eval()


def in_peft(theirs, layers=2, length=5):
    """peft's model with adaption prompts and gates at random."""
    config = peft.AdaptionPromptConfig(
        adapter_len=length, adapter_layers=layers, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(theirs, config).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaption_gate" in name:
                parameter.normal_()
    return model


def logits(model):
    with torch.no_grad():
        out = model(tiny_ids())
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("layers", [1, 2])
def test_the_forward_is_peft_s(ours, theirs, layers):
    """(LLaMA-Adapter 4)"""
    there = in_peft(theirs, layers)
    LLaMAAdapter(5, layers, "peft_gpt2").attach(ours)
    tensors = {n: p for n, p in there.named_parameters() if "adaption_" in n}
    assert sum(p.numel() for p in tensors.values()) == minipeft.report(ours).trained
    before = logits(ours)
    with torch.no_grad():
        for name, tensor in tensors.items():
            n = int(name.split(".h.")[1].split(".")[0])
            wrapper = minipeft.wrap.resolve(ours, f"blocks.{n}.attn")
            mine = wrapper.gate if name.endswith("gate") else wrapper.prompt
            mine.copy_(tensor.view_as(mine))
    close(logits(ours), logits(there), SINGLE)
    assert (logits(ours) - before).abs().max() > 1e-2  # the prompts do something


def test_the_paper_s_variant_is_what_peft_does_on_llama(ours):
    """(LLaMA-Adapter 3) with one gate for all heads: output + o_proj(gate softmax(q k) v), which is
    how peft's layer for LLaMA has it; W_o is linear, so before and behind it are the same.
    """
    attn, x = ours.blocks[1].attn, torch.randn(2, 7, 32)
    plain = attn(x)
    LLaMAAdapter(5).attach(ours)
    layer = attn.core
    with torch.no_grad():
        layer.gate.fill_(0.7)
        q, k, v = (
            attn.split_heads(p(y))
            for p, y in ((attn.q, x), (attn.k, layer.prompt[None]), (attn.v, layer.prompt[None]))
        )
        scores = 0.7 * (q @ k.mT / math.sqrt(8)).softmax(-1)
        found = (scores @ v).transpose(1, 2).flatten(2)
        close(attn(x), plain + found @ attn.o.weight.T, SINGLE)


@pytest.mark.parametrize("layers", [None, 1])
def test_peft_opens_what_is_saved_here(ours, theirs, tmp_path, layers):
    randomize(LLaMAAdapter(5, layers, "peft_gpt2").attach(ours), 0.5)
    minipeft.save_adapter(ours, tmp_path / "adapter")
    there = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    close(logits(there), logits(ours), 1e-5)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "ADAPTION_PROMPT"
    assert config["adapter_layers"] == (layers or 2) and config["adapter_len"] == 5


@pytest.mark.parametrize("layers", [1, 2])
def test_what_peft_saves_opens_here_and_is_saved_again_byte_for_byte(
    ours, theirs, tmp_path, layers
):
    there = in_peft(theirs, layers)
    there.save_pretrained(tmp_path / "adapter")
    minipeft.load_adapter(ours, tmp_path / "adapter")
    assert ours.attachments[0].technique == LLaMAAdapter(5, {2: None}.get(layers, 1), "peft_gpt2")
    close(logits(ours), logits(there), 1e-5)
    minipeft.save_adapter(ours, tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_bytes() == (tmp_path / "adapter" / FILE).read_bytes()


def test_what_peft_saves_for_a_model_without_head_opens_here(ours, base, tmp_path):
    bare = GPT2Model.from_pretrained(base)
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=2)
    with torch.no_grad():
        there = peft.get_peft_model(bare, config).eval()
        for name, parameter in there.named_parameters():
            if "adaption_gate" in name:
                parameter.fill_(0.4)
        there.save_pretrained(tmp_path / "adapter")
        minipeft.load_adapter(ours, tmp_path / "adapter")
        close(ours.features(tiny_ids()), there(tiny_ids()).last_hidden_state, 1e-5)


def test_the_paper_s_variant_keeps_files_of_its_own(ours, tmp_path):
    randomize(LLaMAAdapter(5).attach(ours))
    minipeft.save_adapter(ours, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "peft_type" not in config and config["minipeft_type"] == "LLaMAAdapter"
    again = minipeft.load_adapter(tiny_model(dtype=torch.float32), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(ours))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_modules": "self_attn"}, "target_modules='self_attn'"),
        ({"adapter_len": None}, "adapter_len=None"),
        ({"adapter_layers": 0}, "adapter_layers=0"),
        ({"adapter_layers": True}, "adapter_layers=True"),
        ({"adapter_layers": 3}, "layers=3"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_a_setting_we_do_not_have_is_an_error_that_names_it(
    ours, theirs, tmp_path, change, message
):
    in_peft(theirs).save_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        minipeft.load_adapter(ours, tmp_path / "adapter")
    assert not ours.attachments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, n: t.pop(n), "missing"),
        (lambda t, n: t.update(more=torch.zeros(1)), "unknown more"),
        (
            lambda t, n: t.update({n: torch.zeros(5, 32)}),
            r"the config and the model need \(1, 5, 32\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_errors_that_name_them(ours, theirs, tmp_path, change, message):
    in_peft(theirs).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / FILE)
    change(tensors, next(n for n in tensors if n.endswith("prompt")))
    save_file(tensors, tmp_path / "adapter" / FILE, {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        minipeft.load_adapter(ours, tmp_path / "adapter")
    assert not ours.attachments
