"""AdaLoRA against peft: its forward, its penalty, its budget, and its files both ways.

Logits agree to 1e-5 in float32: the same products, summed in another order (about 1e-6 is seen).
"""

import json
import warnings

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

import minipeft
from minipeft import GPT, AdaLoRA
from minipeft import technique as contract
from minipeft.low_rank import adalora, rank_allocator
from minipeft.low_rank.lora import lora_delta
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
        # peft says this of its own files too: its check for LoRA's patterns sees AdaLoRA's
        warnings.filterwarnings("ignore", "The following rank_pattern keys did not match")
        return peft.PeftModel.from_pretrained(
            GPT2LMHeadModel.from_pretrained(base).eval(), folder
        ).eval()


def new_peft(base, **config):
    defaults = {"total_step": 12, "init_r": 6, "target_r": 3, "task_type": "CAUSAL_LM"}
    config = peft.AdaLoraConfig(**defaults | {"target_modules": ["c_attn"]} | config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)


def trained_by_peft(base, folder, steps=12, **config):
    """AdaLoRA after peft's own steps and allocations, saved."""
    model = new_peft(base, **config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        ids = tiny_ids(seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return model.eval()


def opened(base, folder):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*was written by peft")
        return minipeft.load_adapter(ours(base), folder)


def trained_here(base, technique, steps=8):
    model = technique.attach(ours(base))
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=1e-2)
    contract.follow(optimizer, model, steps)
    for step in range(steps):
        ids = tiny_ids(seed=step)
        (model.loss(ids, ids.roll(-1, 1)) + contract.extra_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


# -- the math


def test_the_change_of_a_weight_is_pefts(base):
    """(AdaLoRA 1) (AdaLoRA 2): the same float32 products, to a rounding of the largest."""
    theirs = new_peft(base, lora_alpha=5)
    layer = theirs.base_model.model.transformer.h[0].attn.c_attn
    with torch.no_grad():
        layer.lora_E["default"].normal_()
    P, E, Q = layer.lora_B["default"], layer.lora_E["default"][:, 0], layer.lora_A["default"]
    delta = lora_delta(E[:, None] * Q, P, adalora.adalora_scale(5, 6))
    close(delta, layer.get_delta_weight("default").T, 1e-7)


def test_the_penalty_is_pefts(base):
    """(AdaLoRA 4): the loss with the penalty less the loss without it."""
    theirs = new_peft(base, orth_reg_weight=0.5).double()
    ids, layers = tiny_ids(), [b.attn.c_attn for b in theirs.base_model.model.transformer.h]
    triples = [
        (l.lora_B["default"], l.lora_A["default"], torch.ones(6, dtype=torch.bool)) for l in layers
    ]
    with_penalty = theirs(ids, labels=ids).loss
    theirs.peft_config["default"].orth_reg_weight = 0.0
    gap = with_penalty - theirs(ids, labels=ids).loss
    # transformers takes its loss in float32, about 5 here: two roundings of 2.4e-7 are in the gap
    close(gap, 0.5 * adalora.peft_penalty(triples), 1e-6)


@pytest.mark.parametrize("warm, final, total", [(3, 5, 20), (0, 0, 7), (10, 30, 100)])
def test_the_budget_is_pefts(base, warm, final, total):
    """(Allocator 5), at every step up to the end of its allocations."""
    theirs = new_peft(base, tinit=warm, tfinal=final, total_step=total)
    allocator = theirs.base_model.rankallocator
    assert isinstance(allocator, RankAllocator)
    for step in range(total - final):
        found = rank_allocator.budget(step, total, warm, final, 2 * 6, 2 * 3)
        assert found == allocator.budget_schedule(step)[0]


def test_the_choice_is_pefts_on_the_same_gradients(base):
    """(Allocator 1) to (Allocator 6): the same triplets are masked, step after step."""
    theirs = new_peft(base, tinit=2, tfinal=2, total_step=12).double()
    technique = AdaLoRA(6, 3, 8, targets=("q", "k", "v"), share_qkv=True, tinit=2, tfinal=2)
    model = technique.attach(ours(base).double())
    groups = list(rank_allocator.groups_of(contract.attachment_of(model)).values())
    blocks = [b.attn.c_attn for b in theirs.base_model.model.transformer.h]
    generator = torch.Generator().manual_seed(0)

    def noise(like):
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    masks = set()
    for step in range(1, 10):
        with torch.no_grad():
            for layers, block in zip(groups, blocks):
                A, B, E = (getattr(block, f"lora_{k}")["default"] for k in "ABE")
                for weight in (A, B, E):
                    weight.copy_(noise(weight))
                    weight.grad = noise(weight)
                for mine, there in ((layers[0].Q, A), (layers[0].E, E)):
                    mine.copy_(there.view_as(mine))
                    mine.grad = there.grad.view_as(mine).clone()
                for layer, rows, grad in zip(layers, B.chunk(3), B.grad.chunk(3)):
                    layer.P.copy_(rows)
                    layer.P.grad = grad.clone()
        theirs.base_model.update_and_allocate(step)
        contract.after_step(model, step, 12)
        for layers, block in zip(groups, blocks):
            assert torch.equal(layers[0].E != 0, block.lora_E["default"][:, 0] != 0), step
        masks.add(str([(layers[0].E != 0).tolist() for layers in groups]))
    assert len(masks) > 3, "nothing was ever masked"


# -- from here to there

WRITTEN = {
    "q, v": AdaLoRA(5, 3, 7),
    "one c_attn": AdaLoRA(4, 2, targets=("q", "k", "v"), share_qkv=True),
    "one c_attn and the rest": AdaLoRA(
        4, 2, targets=("q", "k", "v", "up", "o"), share_qkv=True, dropout=0.1
    ),
    "everything apart": AdaLoRA(3, 2, targets=("q", "k", "v", "o", "up", "down")),
    "k, down": AdaLoRA(4, 1, targets=("k", "down"), penalty="paper"),
    "nothing pruned": AdaLoRA(4, 4, targets=("up",)),
}


@pytest.mark.parametrize("technique", WRITTEN.values(), ids=WRITTEN)
def test_what_is_written_here_computes_the_same_in_peft_and_opens_bitwise(
    base, tmp_path, technique
):
    """(peft AdaLoRA 1) (peft AdaLoRA 2) (peft AdaLoRA 3), after an allocation."""
    model = trained_here(base, technique).eval()
    minipeft.save_adapter(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(FILES), "something was dropped"
    close(logits(in_peft(base, tmp_path)), logits(model), SAME)
    again = minipeft.load_adapter(ours(base), tmp_path)
    assert again.attachments[0].technique == technique
    assert torch.equal(logits(again), logits(model))
    ranks = rank_allocator.ranks(contract.attachment_of(model))
    tensors = load_file(tmp_path / FILES[0])
    held = sum(t.shape[0] for n, t in tensors.items() if n.endswith("lora_E"))
    assert held == sum(ranks.values()) == technique.target_rank * len(ranks)


def test_the_block_form_is_what_the_equations_say(base, tmp_path):
    """(peft AdaLoRA 1) (peft AdaLoRA 2) (peft AdaLoRA 3), written again."""
    model = randomize(AdaLoRA(5, 3, 7).attach(ours(base)))
    minipeft.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / FILES[0])
    config = json.loads((tmp_path / FILES[1]).read_text())
    name, q, v = "base_model.model.transformer.h.1.attn.c_attn", *qv(model)
    assert torch.equal(tensors[f"{name}.lora_A"], torch.cat([q.Q, v.Q]))
    assert torch.equal(tensors[f"{name}.lora_E"], torch.cat([q.E, v.E])[:, None])
    P = torch.zeros(96, 10)
    P[:32, :5], P[64:, 5:] = q.P.detach(), v.P.detach()
    assert torch.equal(tensors[f"{name}.lora_B"], P)
    assert config["init_r"] == 10 and config["rank_pattern"] is None
    assert abs(config["lora_alpha"] / (10 + 1e-5) - 7 / (5 + 1e-5)) < 1e-12


def qv(model):
    return model.blocks[1].attn.q, model.blocks[1].attn.v


def test_saved_before_the_choice_stands_training_can_go_on(base, tmp_path):
    """The averages are kept beside; the adapter's own file is all of its triplets."""
    model = AdaLoRA(4, 2, targets=("q", "k", "v"), share_qkv=True).attach(ours(base))
    ids = tiny_ids()
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=1e-2)
    for step in (1, 2):
        optimizer.zero_grad()
        model.loss(ids, ids).backward()
        optimizer.step()
        contract.after_step(model, step, 20)
    minipeft.save_adapter(model, tmp_path)
    close(logits(in_peft(base, tmp_path)), logits(model), SAME)
    again = contract.attachment_of(minipeft.load_adapter(ours(base), tmp_path))
    mine = contract.attachment_of(model)
    assert any(n.endswith(".U") for n in mine.state) and mine.state.keys() == again.state.keys()
    for name, value in mine.state.items():
        same = torch.equal(value, again.state[name]) if torch.is_tensor(value) else None
        assert same or value == again.state[name]


# -- from there to here

READ = {
    "c_attn": {},
    "with its end": {"tfinal": 4, "tinit": 1},
    "not over yet": {"steps": 3, "tinit": 8},
    "two modules": {"target_modules": ["c_attn", "mlp.c_proj"], "lora_alpha": 3},
    "no c_attn": {"target_modules": ["c_fc"], "lora_dropout": 0.1, "init_r": 4, "target_r": 1},
}


@pytest.mark.parametrize("config", READ.values(), ids=READ)
def test_what_peft_writes_computes_the_same_here_and_goes_back_byte_for_byte(
    base, tmp_path, config
):
    expected = logits(trained_by_peft(base, tmp_path / "theirs", **config))
    model = opened(base, tmp_path / "theirs").eval()
    close(logits(model), expected, SAME)
    minipeft.save_adapter(model, tmp_path / "ours")
    for file in FILES:
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes()
    close(logits(in_peft(base, tmp_path / "ours")), expected, SAME)


def test_without_an_alpha_the_model_that_was_trained_opens(base, tmp_path):
    """The scale is init_r / init_r then; peft itself reloads with the ranks that are left."""
    expected = logits(trained_by_peft(base, tmp_path, lora_alpha=0))
    close(logits(opened(base, tmp_path)), expected, SAME)


def test_the_count_is_pefts(base):
    technique = AdaLoRA(6, 3, targets=("q", "k", "v"), share_qkv=True)
    theirs = new_peft(base)
    count = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert count == technique.count(ours(base).config)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"target_modules": r".*\.1\.mlp\.c_proj"}, "mlp.c_proj in some layers"),
        ({"target_modules": ["nothing"]}, "names nothing of GPT-2's"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_a_config_that_has_no_counterpart_is_refused(base, config, message):
    from minipeft.interop.peft_adalora import adalora_from_config

    with pytest.raises(ValueError, match=message):
        adalora_from_config(
            {"peft_type": "ADALORA"} | config, ours(base).config, "base_model.model.transformer."
        )


def test_a_rank_pattern_that_does_not_fit_is_refused(base, tmp_path):
    trained_by_peft(base, tmp_path, tfinal=4)
    path = tmp_path / FILES[1]
    config = json.loads(path.read_text())
    config["rank_pattern"].popitem()
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rank_pattern has no list"):
        opened(base, tmp_path)
