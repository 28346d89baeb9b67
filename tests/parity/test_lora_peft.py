"""LoRA files of both libraries: what is written here computes the same in peft, and the other way.

Logits agree to 1e-5 in float32: the same products, summed in another order (about 1e-6 is seen).
"""

import json
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, GPT2Model

import minipeft
from minipeft import GPT, LoRA
from minipeft.technique import attachment_of
from minipeft.wrap import resolve
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


def theirs(base):
    return GPT2LMHeadModel.from_pretrained(base).eval()


def logits(model):
    with torch.no_grad():
        out = model(tiny_ids())
    return out if isinstance(out, torch.Tensor) else out.logits


def in_peft(base, folder):
    """peft's model with the adapter in `folder`; a warning of peft's is an error here."""
    model = theirs(base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return peft.PeftModel.from_pretrained(model, folder).eval()


def from_peft(base, folder, **config):
    """Train (at random) a LoRA in peft and save it; returns peft's model."""
    config = {"fan_in_fan_out": True, "target_modules": ["c_attn"]} | config
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(**config))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model.eval()


def opened(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was written by peft")
        return minipeft.load_adapter(ours(base), folder)


# -- from here to there

WRITTEN = {
    "q, v": LoRA(rank=3, alpha=5),
    "v alone": LoRA(rank=3, alpha=5, targets=("v",)),
    "rank-stabilised": LoRA(rank=5, alpha=6, targets=("k", "v"), rank_stabilized=True),
    "q, v, o: another rank for c_attn": LoRA(rank=2, alpha=3, targets=("q", "v", "o")),
    "everything": LoRA(rank=4, alpha=6, targets=("q", "k", "v", "o", "up", "down")),
    "feed-forward": LoRA(rank=4, alpha=1, targets=("up", "down"), rank_stabilized=True),
    "one A": LoRA(rank=4, alpha=7, targets=("q", "k", "v", "down"), share_qkv=True),
    "patterns": LoRA(
        rank=5,
        alpha=6,
        targets=("k", "v", "o", "down"),
        rank_pattern=(("o", 2), ("blocks.1.attn.k", 3), ("blocks.0.mlp.down", 0)),
        alpha_pattern=(("v", 9),),
    ),
}


@pytest.mark.parametrize("technique", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_here_computes_the_same_in_peft_and_opens_bitwise(
    base, tmp_path, technique
):
    """(Peft 1) (Peft 2) (Peft 3)"""
    model = randomize(technique.attach(ours(base)), std=0.3)
    minipeft.save_adapter(model, tmp_path)
    close(logits(in_peft(base, tmp_path)), logits(model), SAME)
    again = minipeft.load_adapter(ours(base), tmp_path)
    assert again.attachments[0].technique == technique
    assert torch.equal(logits(again), logits(model))


@settings(max_examples=12)
@given(
    rank=st.integers(1, 7),
    alpha=st.one_of(st.integers(1, 33), st.floats(0.1, 20)),
    targets=st.lists(st.sampled_from(["q", "k", "v", "o", "up", "down"]), min_size=1, unique=True),
    stabilised=st.booleans(),
)
def test_any_lora_computes_the_same_in_peft(
    base, tmp_path_factory, rank, alpha, targets, stabilised
):
    technique = LoRA(rank, alpha, targets=tuple(targets), rank_stabilized=stabilised)
    model = randomize(technique.attach(ours(base)), std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    minipeft.save_adapter(model, folder)
    close(logits(in_peft(base, folder)), logits(model), SAME)


def test_the_block_form_is_what_the_equations_say(base, tmp_path):
    """(Peft 1) (Peft 2) (Peft 3), written again."""
    model = randomize(LoRA(rank=3, alpha=5).attach(ours(base)))
    minipeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILES[0])
    config = json.loads((tmp_path / FILES[1]).read_text())
    q, v = resolve(model, "blocks.1.attn.q"), resolve(model, "blocks.1.attn.v")
    name, D = "base_model.model.transformer.h.1.attn.c_attn", 32
    assert torch.equal(tensors[f"{name}.lora_A.weight"], torch.cat([q.A, v.A]))
    B = torch.zeros(3 * D, 6)
    B[:D, :3], B[2 * D :, 3:] = q.B.detach(), v.B.detach()
    assert torch.equal(tensors[f"{name}.lora_B.weight"], B)
    assert (config["r"], config["lora_alpha"]) == (6, 10)


def test_the_rank_stabilised_alpha_grows_with_the_root(base, tmp_path):
    """(Peft 3): the scale alpha / sqrt(r) must not change when q and v become one adapter."""
    technique = LoRA(rank=3, alpha=5, rank_stabilized=True)
    minipeft.save_adapter(technique.attach(ours(base)), tmp_path)
    config = json.loads((tmp_path / FILES[1]).read_text())
    assert config["r"] == 6
    close(torch.tensor(config["lora_alpha"] / 6**0.5), torch.tensor(technique.scale), 1e-6)


# -- from there to here

READ = {
    "c_attn": {"r": 4, "lora_alpha": 8},
    "rank-stabilised": {"r": 5, "lora_alpha": 3, "use_rslora": True},
    "all modules": {"r": 3, "target_modules": "all-linear"},
    "c_proj names two": {"r": 3, "target_modules": ["c_proj", "c_attn"], "lora_dropout": 0.1},
    "no c_attn": {"r": 3, "target_modules": ["c_fc"], "init_lora_weights": "gaussian"},
    "one layer": {"r": 3, "layers_to_transform": [1]},
    "a layer by its pattern": {"r": 3, "layers_to_transform": 0, "layers_pattern": "h"},
    "a regular expression": {"r": 2, "target_modules": r".*\.1\.(attn|mlp)\.c_proj"},
    "excluded": {"r": 2, "target_modules": ["c_proj"], "exclude_modules": ["mlp.c_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": ["c_attn", "c_fc"],
        "rank_pattern": {"h.0.attn.c_attn": 2, "c_fc": 6},
        "alpha_pattern": {r"h\.\d.mlp.c_fc": 3},
    },
    "names": {"task_type": "CAUSAL_LM", "base_model_name_or_path": "gpt2", "revision": "main"},
}


@pytest.mark.parametrize("config", READ.values(), ids=READ)
def test_what_peft_writes_computes_the_same_here_and_goes_back_byte_for_byte(
    base, tmp_path, config
):
    expected = logits(from_peft(base, tmp_path / "theirs", **config))
    model = opened(base, tmp_path / "theirs")
    close(logits(model), expected, SAME)
    minipeft.save_adapter(model, tmp_path / "ours")
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    close(logits(in_peft(base, tmp_path / "ours")), expected, SAME)


def test_a_joint_adapter_opens_with_one_a_for_q_k_and_v(base, tmp_path):
    from_peft(base, tmp_path, r=4)
    model = opened(base, tmp_path)
    q, k, v = (resolve(model, f"blocks.0.attn.{t}") for t in "qkv")
    assert q.A is k.A is v.A
    assert attachment_of(model).technique == LoRA(4, 8, 0.0, ("q", "k", "v"), False, True)
    minipeft.detach(model)


def test_trained_here_it_keeps_its_form_and_rank_and_gets_a_fingerprint(base, tmp_path):
    from_peft(base, tmp_path / "theirs", r=4, target_modules=["c_attn", "c_fc"])
    model = randomize(opened(base, tmp_path / "theirs"))
    for n in range(3):  # however often it travels
        minipeft.save_adapter(model, tmp_path / str(n))
        tensors = load_file(tmp_path / str(n) / FILES[0])
        assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {4}
        theirs_again = in_peft(base, tmp_path / str(n))
        close(logits(theirs_again), logits(model), SAME)
        again = minipeft.load_adapter(ours(base), tmp_path / str(n))
        assert torch.equal(logits(again), logits(model))
        model = randomize(again, std=0.01)
    with pytest.raises(ValueError, match="another base"):
        minipeft.load_adapter(tiny_model(dtype=torch.float32, seed=9), tmp_path / "0")


def test_what_peft_saves_again_after_us_opens_here(base, tmp_path):
    """Separate adapters, written here, trained on and saved by peft: it is then a joint one."""
    model = randomize(LoRA(rank=3, alpha=5).attach(ours(base)))
    minipeft.save_adapter(model, tmp_path / "ours")
    in_peft(base, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    again = opened(base, tmp_path / "theirs")
    assert attachment_of(again).technique.share_qkv
    close(logits(again), logits(model), SAME)


def test_a_file_for_the_model_without_its_head_opens_and_goes_back(base, tmp_path):
    model = peft.get_peft_model(
        GPT2Model.from_pretrained(base), peft.LoraConfig(r=2, fan_in_fan_out=True)
    )
    model.save_pretrained(tmp_path / "theirs")
    minipeft.save_adapter(opened(base, tmp_path / "theirs"), tmp_path / "ours")
    mine, other = (load_file(tmp_path / f / FILES[0]) for f in ("ours", "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[n], other[n]) for n in mine)


def test_a_weighted_sum_is_the_one_peft_computes_with_cat(base, tmp_path):
    one = from_peft(base, tmp_path / "a", r=3)
    two = from_peft(base, tmp_path / "b", r=2, lora_alpha=5)
    del two
    one.load_adapter(tmp_path / "b", "b")
    one.add_weighted_adapter(["default", "b"], [0.7, -0.4], "ab", combination_type="cat")
    one.set_adapter("ab")
    model = opened(base, tmp_path / "a")
    with pytest.warns(UserWarning, match="written by peft"):
        minipeft.load_adapter(model, tmp_path / "b", name="b")
    minipeft.combine(model, {"default": 0.7, "b": -0.4}, name="ab")
    close(logits(model), logits(one), SAME)


def test_a_mixed_batch_is_the_one_of_peft(base, tmp_path):
    one = from_peft(base, tmp_path / "a", r=3)
    from_peft(base, tmp_path / "b", r=2, lora_alpha=5)
    one.load_adapter(tmp_path / "b", "b")
    with torch.no_grad():
        names = ["b", "__base__", "default"]
        expected = one(tiny_ids(), adapter_names=names).logits
    model = opened(base, tmp_path / "a")
    with pytest.warns(UserWarning, match="written by peft"):
        minipeft.load_adapter(model, tmp_path / "b", name="b")
    with minipeft.use_adapters(model, rows=["b", None, "default"]):
        close(logits(model), expected, SAME)
