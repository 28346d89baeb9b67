"""LLaMA-Adapter: the specification of minipeft/additive/llama_adapter.py. Math in float64."""

import math

import pytest
import torch

import minipeft
from minipeft import GPT, GPTConfig, LLaMAAdapter, LoRA
from minipeft.additive.llama_adapter import prompt_attention
from minipeft.technique import trainable_parameters
from tests.tiny import close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same operations in another order
ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
VARIANTS = ("paper", "peft_gpt2")


def softmax_by_hand(scores):
    e = scores.exp()
    return e / e.sum(-1, keepdim=True)


def by_hand(model, ids):
    """Logits written out: the text's own attention, and the prompts' beside it."""
    technique, tensors = model.attachments[-1].technique, model.attachments[-1].tensors()
    x = model.embed(ids)
    for n, block in enumerate(model.blocks):
        attn = minipeft.wrap.base_module(block.attn)
        u = block.ln_1(x)
        q, k, v = (u @ p.weight.T + p.bias for p in (attn.q, attn.k, attn.v))
        where = "attn.core" if technique.variant == "paper" else "attn"
        P = tensors.get(f"blocks.{n}.{where}.prompt")
        g = tensors.get(f"blocks.{n}.{where}.gate")
        own, found = torch.zeros_like(q), torch.zeros_like(q)
        for h in range(attn.n_head):
            mine = slice(h * attn.head_dim, (h + 1) * attn.head_dim)
            scores = q[..., mine] @ k[..., mine].mT / math.sqrt(attn.head_dim)
            future = torch.ones(scores.shape[-2:]).triu(1).bool()
            own[..., mine] = softmax_by_hand(scores.masked_fill(future, -math.inf)) @ v[..., mine]
            if P is None:
                continue
            K_a = (P @ attn.k.weight.T + attn.k.bias)[:, mine]  # (LLaMA-Adapter 1)
            V_a = (P @ attn.v.weight.T + attn.v.bias)[:, mine]
            weights = softmax_by_hand(q[..., mine] @ K_a.T / math.sqrt(attn.head_dim))
            gate = g[h] if technique.variant == "paper" else g[0]
            found[..., mine] = gate * (weights @ V_a)  # (LLaMA-Adapter 2)
        if technique.variant == "paper":  # (LLaMA-Adapter 3)
            x = x + (own + found) @ attn.o.weight.T + attn.o.bias
        else:  # (LLaMA-Adapter 4)
            x = x + own @ attn.o.weight.T + attn.o.bias + found
        x = x + block.mlp(block.ln_2(x))
    return model.head(model.ln_f(x))


# -- the math


def test_a_query_finds_a_softmax_mean_of_the_prompts_values():
    """(LLaMA-Adapter 2)"""
    q, keys, values = torch.randn(2, 3, 5, 4), torch.randn(1, 3, 7, 4), torch.randn(1, 3, 7, 4)
    q, keys, values = q.double(), keys.double(), values.double()
    expected = torch.zeros(2, 3, 5, 4).double()
    for b in range(2):
        for h in range(3):
            for t in range(5):
                weights = softmax_by_hand(keys[0, h] @ q[b, h, t] / 2)
                expected[b, h, t] = weights @ values[0, h]
    close(prompt_attention(q, keys, values), expected, EXACT)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", [None, 2])
def test_the_model_is_the_formulas_written_out(variant, layers):
    """(LLaMA-Adapter 3), and peft's (LLaMA-Adapter 4)"""
    model, ids = tiny_model(ODD), tiny_ids(2, 7, ODD.vocab_size)
    randomize(LLaMAAdapter(5, layers, variant).attach(model), 0.4)
    with torch.no_grad():
        close(model(ids), by_hand(model, ids), EXACT)


# -- the start


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_starts_as_the_base_and_the_prompts_are_normal(variant):
    model, ids = tiny_model(), tiny_ids()
    before = model(ids)
    torch.manual_seed(0)
    LLaMAAdapter(100, variant=variant).attach(model)
    assert torch.equal(model(ids), before)
    for name, tensor in model.attachments[0].tensors().items():
        if name.endswith("gate"):
            assert torch.equal(tensor, torch.zeros_like(tensor))
        else:  # 3,200 samples: standard errors of 0.018 and 0.0125, 4 of each allowed
            assert abs(tensor.mean()) < 0.072 and abs(tensor.std() - 1) < 0.05


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_prompts_learn(variant):
    """In the first step the gates alone have a gradient, from the second on the prompts too; they
    move, and moving them is what changes the output.
    """
    model, ids = tiny_model(), tiny_ids()
    LLaMAAdapter(5, variant=variant).attach(model)
    start = {n: t.detach().clone() for n, t in model.attachments[0].tensors().items()}
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2, weight_decay=0.0)
    losses = []
    for step in range(6):
        optimizer.zero_grad()
        loss = model.loss(ids, ids.roll(-1, 1))
        loss.backward()
        for name, p in model.attachments[0].parameters().items():
            alive = p.grad.abs().max() > 0
            assert alive == (step > 0 or name.endswith("gate")), (step, name)
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    for name, tensor in model.attachments[0].tensors().items():
        assert (tensor - start[name]).abs().max() > 1e-3, f"{name} has not moved"
    trained = model(ids)
    with torch.no_grad():
        for name, tensor in model.attachments[0].tensors().items():
            if name.endswith("prompt"):
                tensor.copy_(start[name])
    assert (model(ids) - trained).abs().max() > 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_learned_is_kept_from_an_earlier_pass(variant):
    """Keys and values of the prompts are computed anew, in training and in evaluation."""
    model, ids = tiny_model(), tiny_ids()
    randomize(LLaMAAdapter(3, variant=variant).attach(model))
    for training in (False, True, False):
        first = model.train(training)(ids)
        randomize(model, seed=5 + training)
        assert not torch.equal(model(ids), first)


# -- the technique


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layers", [None, 1, 2])
def test_the_count_is_the_formula(variant, layers):
    technique = LLaMAAdapter(7, layers, variant)
    gates = ODD.n_head if variant == "paper" else 1
    expected = (layers or ODD.n_layer) * (7 * ODD.d_model + gates)
    with torch.device("meta"):
        model = technique.attach(GPT(ODD))
    assert minipeft.report(model).trained == technique.count(ODD) == expected


def test_prompts_stand_in_the_upper_layers():
    model = LLaMAAdapter(3, layers=2).attach(tiny_model(ODD))
    assert [s.path for s in model.attachments[0].swaps] == [
        "blocks.1.attn.core",
        "blocks.2.attn.core",
    ]


def test_lora_under_it_changes_the_prompts_keys_and_values_as_merged_lora_does(model, ids):
    """W_k and W_v are the model's as it is: what stands on them counts."""
    randomize(LoRA(rank=3, targets=("k", "v")).attach(model, "lora"))
    randomize(LLaMAAdapter(4).attach(model, "prompts"), 0.5)
    logits, tensors = model(ids), model.attachments[1].tensors()
    minipeft.detach(model, "prompts")
    minipeft.merge(model)
    LLaMAAdapter(4).attach(model, "prompts").attachments[0].load(tensors)
    close(model(ids), logits, EXACT)


def test_the_prompts_are_seen_by_every_query_alike(model):
    """A text cut short sees the same prompts, and cached decoding does."""
    ids = tiny_ids(2, 9)
    randomize(LLaMAAdapter(4).attach(model), 0.5)
    close(model(ids)[:, :4], model(ids[:, :4]), EXACT)
    made = minipeft.generate(model, ids, 5, temperature=0)
    for t in range(9, 14):
        assert torch.equal(made[:, t], model(made[:, :t])[:, -1].argmax(-1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_half_precision_its_tensors_and_outputs_are_in_half_precision(variant):
    model = tiny_model(dtype=torch.bfloat16)
    LLaMAAdapter(3, variant=variant).attach(model)
    assert {t.dtype for t in model.attachments[0].tensors().values()} == {torch.bfloat16}
    assert model(tiny_ids()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_length": 0}, "prompt_length=0"),
        ({"prompt_length": 2.0}, "prompt_length=2.0"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 3}, "layers=3"),
        ({"variant": "peft"}, "variant='peft'"),
    ],
)
def test_bad_hyperparameters_are_errors_that_name_them(model, settings, message):
    with pytest.raises(ValueError, match=message):
        LLaMAAdapter(**settings).attach(model)
    assert not model.attachments


def test_peft_s_variant_needs_all_heads(model):
    """Pruned heads leave fewer columns than D; in front of the output projection that is fine."""
    attn = model.blocks[0].attn
    attn.n_head = 3
    for name in "qkv":
        setattr(attn, name, torch.nn.Linear(32, 24).double())
    attn.o = torch.nn.Linear(24, 32).double()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn has 3 heads of 8"):
        LLaMAAdapter(variant="peft_gpt2").attach(model)
    LLaMAAdapter().attach(model)
    assert model(tiny_ids()).shape == (3, 11, 97)
    assert model.attachments[0].tensors()["blocks.0.attn.core.gate"].shape == (3,)
