"""peft's config rules and its refusals: minimal files, defaults, and what we do not have."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

import minipeft
from minipeft.interop.peft import FORMATS, lora_from_config
from tests.tiny import CONFIG, close, tiny_ids, tiny_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*was written by peft"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # peft mends the minimal configs aloud
]


def tensors(rank=4, modules=("attn.c_attn",), D=32):
    """A LoRA file's tensors, in peft's names."""
    generator = torch.Generator().manual_seed(3)
    sides = {"attn.c_attn": (3 * D, D), "attn.c_proj": (D, D)}
    sides |= {"mlp.c_fc": (4 * D, D), "mlp.c_proj": (D, 4 * D)}
    made = {}
    for n in range(2):
        for module in modules:
            out, into = sides[module]
            name = f"base_model.model.transformer.h.{n}.{module}"
            made[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=generator) / 5
            made[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 5
    return made


def write(folder, config, content):
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"} | config))
    save_file(content, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def load(folder, seed=0):
    return minipeft.load_adapter(tiny_model(dtype=torch.float32, seed=seed), folder)


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({"r": 4, "lora_alpha": 8, "target_modules": ["c_attn"]}, 4, 2.0),
        ({"r": 4, "target_modules": ["c_attn"]}, 4, 2.0),  # no lora_alpha means 8
        ({"lora_alpha": 4}, 8, 0.5),  # no r means 8, no target_modules c_attn
        ({"r": 4, "lora_alpha": None, "use_rslora": True}, 4, 4.0),
    ],
)
def test_minimal_configs_mean_what_they_mean_in_peft(tmp_path, config, rank, scale):
    write(tmp_path / "adapter", config, tensors(rank))
    model = load(tmp_path / "adapter")
    technique = model.attachments[0].technique
    assert (technique.rank, technique.scale) == (rank, scale)
    if "lora_alpha" in config and config["lora_alpha"] is None:
        return  # peft itself cannot divide None
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path)
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    with torch.no_grad():  # float32, sums in another order
        close(model(tiny_ids()), theirs(tiny_ids()).logits, 1e-5)


def test_the_first_format_is_there_and_names_its_technique():
    assert FORMATS["LORA"].technique == "LoRA"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["weight"]}, "target_parameters"),
        ({"init_lora_weights": "pissa"}, "'pissa' changes the base"),
        ({"init_lora_weights": "olora"}, "'olora' changes the base"),
        ({"init_lora_weights": "loftq"}, "'loftq' changes the base"),
        ({"a_switch_of_tomorrow": True}, "a_switch_of_tomorrow"),
        ({"r": "four"}, "r='four'"),
        ({"r": True}, "r=True"),
        ({"target_modules": ["q_proj"]}, "q_proj"),
        ({"peft_type": "LOHA"}, "LOHA.*LORA"),
        ({"r": 33}, "rank=33"),
        ({"lora_dropout": 1.5}, "dropout=1.5"),
    ],
)
def test_what_we_do_not_have_is_named(tmp_path, change, message):
    folder = write(tmp_path, {"r": 4, "target_modules": ["c_attn"]} | change, tensors(4))
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=message) as error:
        minipeft.load_adapter(model, folder)
    assert str(folder) in str(error.value)
    assert not model.attachments


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(next(iter(t))), "missing .*h.0.attn.c_attn.lora_A"),
        (lambda t: t.update(surplus=torch.zeros(1)), "unknown surplus"),
        (
            lambda t: t.update(
                {"base_model.model.transformer.h.1.attn.c_attn.lora_B.weight": torch.zeros(95, 4)}
            ),
            r"h.1.attn.c_attn.lora_B.weight is \(95, 4\), .* need \(96, 4\)",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)}),
            "unknown .*lm_head",
        ),
        (
            lambda t: t.update(
                {"base_model.model.transformer.h.2.attn.c_attn.lora_A.weight": torch.zeros(4, 32)}
            ),
            r"unknown .*h\.2\.",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, edit, message):
    content = tensors(4)
    edit(content)
    folder = write(tmp_path, {"r": 4}, content)
    model = tiny_model(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        minipeft.load_adapter(model, folder)
    assert not model.attachments


def test_another_rank_in_the_config_than_in_the_tensors_is_an_error(tmp_path):
    folder = write(tmp_path, {"r": 8}, tensors(4))
    with pytest.raises(ValueError, match=r"lora_A.weight is \(4, 32\), .* need \(8, 32\)"):
        load(folder)


def test_every_key_of_peft_s_own_config_is_either_read_or_harmless_at_its_default():
    config = peft.LoraConfig(target_modules=["c_attn"]).to_dict()
    config = {k: list(v) if isinstance(v, set) else v for k, v in config.items()}
    technique = lora_from_config(config, CONFIG)
    assert (technique.rank, technique.alpha, technique.share_qkv) == (8, 8, True)


def test_the_first_pattern_that_matches_counts_as_in_peft():
    patterns = {"mlp.c_proj": 3, "c_proj": 2, r"h\.1\.attn\.c_proj": 1}
    config = {"target_modules": ["c_proj"], "r": 5, "rank_pattern": patterns}
    technique = lora_from_config(config, CONFIG)
    ranks = {path: rank for path, _, rank, _ in technique.places(2)}
    assert ranks == {
        f"blocks.{n}.{p}": r for n in (0, 1) for p, r in (("attn.o", 2), ("mlp.down", 3))
    }


def test_16_bit_files_open_in_the_model_s_precision(tmp_path):
    content = {n: t.bfloat16() for n, t in tensors(4).items()}
    model = load(write(tmp_path / "in", {"r": 4}, content))
    assert {p.dtype for p in model.attachments[0].parameters().values()} == {torch.float32}
    minipeft.save_adapter(model, tmp_path / "out")
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(saved[n], t.float()) for n, t in content.items())


def test_a_file_of_peft_s_says_once_that_its_base_is_unknown(tmp_path):
    folder = write(tmp_path, {"r": 4}, tensors(4))
    with pytest.warns(UserWarning, match="does not note the base") as seen:
        load(folder)
    assert len(seen) == 1
    assert seen[0].filename == __file__  # points at the caller, not into the library
