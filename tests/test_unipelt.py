"""UniPELT: the specification of minipeft/hybrid/unipelt.py. Reference math in float64."""

import copy
import math

import pytest
import torch

import minipeft
from minipeft import GPT, GPTConfig, Head, LLaMAAdapter, LoRA, PrefixTuning, UniPELT
from minipeft.compressed.structured_pruning import prune_heads
from minipeft.decoding import Cache
from minipeft.gpt import attention_written_out
from minipeft.hybrid.gates import gate_values
from minipeft.hybrid.unipelt import doubled, gated_lora, halves
from minipeft.soft_prompt.prompt_tuning import flatten
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same operations in another order
ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
FULL = UniPELT(rank=3, prefix_length=4, bottleneck=5, prefix_bottleneck=6)


def gated_attention(q, k, v, P_k, P_v, G):
    """(UniPELT 2) for one row and head, query by query: the prefix is scaled by the query's gate
    before anything else happens to it.
    """
    rows = []
    for t in range(q.shape[0]):
        seen = k.shape[0] - q.shape[0] + t + 1
        keys = torch.cat([G[t] * P_k, k[:seen]])
        values = torch.cat([G[t] * P_v, v[:seen]])
        weights = (keys @ q[t] / math.sqrt(q.shape[1])).exp()
        rows.append(weights @ values / weights.sum())
    return torch.stack(rows)


def by_hand(model, ids, gates):
    """Logits of a UniPELT, written out layer by layer from its tensors and its gates."""
    tensors = model.attachments[-1].tensors()
    p = model.attachments[-1].technique.prefix_length
    x = model.embed(ids)
    for n, block in enumerate(minipeft.wrap.base_module(b) for b in model.blocks):
        attn = minipeft.wrap.base_module(block.attn)
        mine = {k.removeprefix(f"blocks.{n}."): v for k, v in tensors.items()}
        u, heads = block.ln_1(x), {}
        for part in "qkv":
            linear = minipeft.wrap.base_module(getattr(attn, part))
            h = u @ linear.weight.T + linear.bias
            if part in "qv":  # (UniPELT 1)
                BA = mine[f"attn.{part}.B"] @ mine[f"attn.{part}.A"]
                h = h + gates[part][n][..., None] * (u @ BA.T)
            heads[part] = attn.split_heads(h)
        prefix = minipeft.wrap.resolve(model, f"blocks.{n}.attn.core").table()
        P = prefix.reshape(p, 2, attn.n_head, attn.head_dim)
        y = torch.stack(
            [
                torch.stack(
                    [
                        gated_attention(
                            *(heads[part][b, h] for part in "qkv"),
                            P[:, 0, h],
                            P[:, 1, h],
                            gates["prefix"][n][b],
                        )
                        for h in range(attn.n_head)
                    ]
                )
                for b in range(len(ids))
            ]
        )
        x = x + attn.o(y.transpose(1, 2).flatten(2))
        f = minipeft.wrap.base_module(block.mlp)(block.ln_2(x))
        names = ("down.weight", "down.bias", "up.weight", "up.bias")
        W_1, b_1, W_2, b_2 = (mine[f"mlp.adapter.adapter.{name}"] for name in names)
        A = (f @ W_1.T + b_1).clamp(min=0) @ W_2.T + b_2
        x = x + f + gates["adapter"][n][..., None] * A  # (UniPELT 3)
    return model.head(model.ln_f(x))


def set_gate(model, part, value):
    """Open (1) or shut (0) all gates of a part, exactly."""
    for wrapper in model.attachments[-1].wrappers():
        for module in wrapper.modules():
            if getattr(module, "key", "").endswith(f"/{part}"):
                with torch.no_grad():
                    module.weight.zero_()
                    module.bias.fill_(1000.0 if value else -1000.0)


# -- the math


def test_lora_is_scaled_token_by_token():
    """(UniPELT 1)"""
    x, A, B = torch.randn(2, 3, 5), torch.randn(2, 5), torch.randn(4, 2)
    h, G = torch.randn(2, 3, 4), torch.rand(2, 3)
    x, A, B, h, G = (t.double() for t in (x, A, B, h, G))
    expected = h.clone()
    for b in range(2):
        for t in range(3):
            expected[b, t] += G[b, t] * (B @ (A @ x[b, t]))
    close(gated_lora(h, x, A, B, G), expected, EXACT)


@pytest.mark.parametrize("earlier", [0, 4])
def test_vectors_of_twice_the_width_give_every_query_its_own_prefix(earlier):
    """(UniPELT 4) computes (UniPELT 2), also behind cached keys."""
    q = torch.randn(2, 3, 5, 4).double()
    k, v = torch.randn(2, 2, 3, 5 + earlier, 4).double()
    prefix = torch.randn(2, 2, 3, 6, 4).double()
    G = torch.rand(2, 1, 5, 1).double()
    y = halves(attention_written_out(*doubled(q, k, v, prefix, G)), G)
    for b in range(2):
        for h in range(3):
            parts = q[b, h], k[b, h], v[b, h], prefix[0, b, h], prefix[1, b, h], G[b, 0, :, 0]
            close(y[b, h], gated_attention(*parts), EXACT)


def test_the_model_is_the_formulas_written_out():
    """(UniPELT 1) (UniPELT 2) (UniPELT 3) with what the gates say."""
    model, ids = tiny_model(ODD), tiny_ids(2, 6, ODD.vocab_size)
    randomize(FULL.attach(model), 0.3)
    with torch.no_grad():
        close(model(ids), by_hand(model, ids, gate_values(model, ids)), EXACT)


# -- the start, the count, the hyperparameters


def test_without_a_prefix_it_starts_as_the_base(model, ids):
    before = model(ids)
    UniPELT(rank=3, prefix_length=0, bottleneck=5).attach(model)
    assert torch.equal(model(ids), before)


def test_with_a_prefix_it_starts_as_that_prefix_half_open(model, ids):
    """LoRA and adapter are zero; the gates are near 1/2."""
    FULL.attach(model)
    values = gate_values(model, ids)["prefix"]
    assert ((values - 0.5).abs() < 0.1).all()  # |x| is about 6, w 0.02: 0.12 / 4 = 0.03
    start = model(ids)
    for n in range(2):
        with torch.no_grad():
            minipeft.wrap.resolve(model, f"blocks.{n}.attn.q").A.normal_()
            minipeft.wrap.resolve(model, f"blocks.{n}.mlp").adapter.adapter.down.weight.normal_()
    assert torch.equal(model(ids), start)


@pytest.mark.parametrize(
    "technique",
    [
        UniPELT(),
        UniPELT(reparameterize=False),
        UniPELT(rank=0),
        UniPELT(prefix_length=0),
        UniPELT(bottleneck=0),
        UniPELT(rank=2, prefix_length=0, bottleneck=0),
    ],
)
def test_the_count_is_the_formula(technique):
    D, L = ODD.d_model, ODD.n_layer
    r, p, m, n = (
        getattr(technique, f) for f in ("rank", "prefix_length", "bottleneck", "prefix_bottleneck")
    )
    expected = L * (4 * D * r + 2 * (D + 1)) if r else 0
    expected += L * (2 * D * m + m + D + D + 1) if m else 0
    if p:
        mlp = p * D + D * n + n + 2 * L * D * (n + 1)
        expected += L * (D + 1) + (mlp if technique.reparameterize else 2 * p * L * D)
    with torch.device("meta"):
        model = technique.attach(GPT(ODD))
    assert minipeft.report(model).trained == technique.count(ODD) == expected


def test_a_size_of_0_leaves_a_technique_out(model):
    UniPELT(rank=0, prefix_length=0, bottleneck=3).attach(model)
    assert {s.path for s in model.attachments[0].swaps} == {
        *(f"blocks.{n}" for n in range(2)),
        *(f"blocks.{n}.mlp" for n in range(2)),
    }


def test_the_papers_sizes_are_the_defaults():
    assert (UniPELT().rank, UniPELT().prefix_length, UniPELT().bottleneck) == (8, 10, 48)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0, "prefix_length": 0, "bottleneck": 0}, "nothing is left"),
        ({"rank": 33}, "rank=33"),
        ({"rank": -1}, "rank=-1"),
        ({"prefix_length": -2}, "prefix_length=-2"),
        ({"prefix_length": 64}, "prefix_length=64"),
        ({"bottleneck": -1}, "bottleneck=-1"),
        ({"prefix_bottleneck": 0}, "bottleneck=0"),
        ({"gate_over": "all"}, "gate_over='all'"),
    ],
)
def test_bad_hyperparameters_are_errors_that_name_them(model, settings, message):
    with pytest.raises(ValueError, match=message):
        UniPELT(**settings).attach(model)
    assert not model.attachments


def test_a_core_that_already_has_a_wrapper_is_an_error(model, ids):
    PrefixTuning(3, reparameterize=False).attach(model)
    before = model(ids)
    with pytest.raises(ValueError, match="PrefixCore"):
        FULL.attach(model, "unipelt")
    assert torch.equal(model(ids), before)
    UniPELT(rank=2, prefix_length=0, bottleneck=2).attach(model, "without a prefix")


def test_a_prefix_may_be_put_on_top(model):
    """A prefix outside stands in front of the text and of UniPELT's own prefix alike."""
    ids = tiny_ids(3, 9)
    randomize(FULL.attach(model))
    PrefixTuning(3, reparameterize=False).attach(model, "on top")
    assert torch.equal(model(ids[:, :4]), model(ids[:, :4]))
    close(model(ids)[:, :4], model(ids[:, :4]), EXACT)


def test_merging_is_an_error_that_says_why(model, ids):
    Head(3).attach(model, "classifier")
    UniPELT(2, 3, 4, False, gate_over="sequence").attach(model)
    logits = model(ids)
    with pytest.raises(ValueError, match="cannot be merged"):
        minipeft.merge(model)
    assert torch.equal(model(ids), logits)
    assert "gates" in UniPELT.cannot_merge


# -- what the gates do


def test_the_gate_stands_where_alpha_over_rank_stood(model, ids):
    """With its gate at 1 LoRA has scale 1, whatever its rank."""
    plain = LoRA(rank=5, alpha=5).attach(copy.deepcopy(model))
    UniPELT(rank=5, prefix_length=0, bottleneck=0).attach(model)
    randomize(plain)
    for path in (f"blocks.{n}.attn.{p}" for n in range(2) for p in "qv"):
        mine, other = (minipeft.wrap.resolve(m, path) for m in (model, plain))
        with torch.no_grad():
            mine.A.copy_(other.A)
            mine.B.copy_(other.B)
    set_gate(model, "q", 1)
    set_gate(model, "v", 1)
    close(model(ids), plain(ids), EXACT)


@pytest.mark.parametrize("part", ["q", "v", "prefix", "adapter"])
def test_every_technique_has_a_gate_of_its_own(model, ids, part):
    """Opening one gate changes the values of that gate alone, in the first layer."""
    randomize(FULL.attach(model))
    before, logits = gate_values(model, ids), model(ids)
    set_gate(model, part, 1)
    after = gate_values(model, ids)
    assert (after[part] == 1).all()
    assert not torch.equal(model(ids), logits)
    read_before_it = {"q", "v", "prefix"} - {part}
    for other in read_before_it:
        assert torch.equal(after[other][0], before[other][0])


def test_a_shut_prefix_gate_is_a_prefix_of_zeros(model, ids):
    """Not the base: p zero keys take exp(0) each of the softmax mass and give zero values."""
    UniPELT(0, 3, 0, reparameterize=False).attach(model)
    set_gate(model, "prefix", 0)
    zeros = PrefixTuning(3, reparameterize=False, init="zero").attach(tiny_model())
    close(model(ids), zeros(ids), EXACT)
    assert (model(ids) - tiny_model()(ids)).abs().max() > 1e-3


def test_a_flattened_prefix_computes_the_same(model, ids):
    randomize(FULL.attach(model))
    logits = model(ids)
    flatten(model)
    technique = model.attachments[0].technique
    assert technique == UniPELT(3, 4, 5, reparameterize=False, prefix_bottleneck=6)
    assert minipeft.report(model).trained == technique.count(CONFIG)
    close(model(ids), logits, EXACT)
    with pytest.raises(ValueError, match="no encoder"):
        flatten(model)


# -- gates over the whole row


def test_the_whole_row_gate_needs_a_classifier(model, ids):
    """In a language model it would see the future; below a classifier it may, and does."""
    technique = UniPELT(2, 3, 4, False, gate_over="sequence")
    with pytest.raises(ValueError, match="gate_over"):
        technique.attach(model)
    Head(3, per_token=True).attach(model, "classifier")
    randomize(technique.attach(model))
    other = ids.clone()
    other[:, -1] = (ids[:, -1] + 1) % CONFIG.vocab_size
    assert not torch.equal(model(other)[:, 0], model(ids)[:, 0])


def test_a_padded_row_has_the_whole_row_gate_it_has_alone(model):
    ids, lengths = tiny_ids(4, 13), torch.tensor([13, 5, 9, 1])
    Head(3).attach(model, "classifier")
    randomize(UniPELT(2, 3, 4, False, gate_over="sequence").attach(model))
    batch = model(ids, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        close(batch[row : row + 1], model(ids[row : row + 1, :length]), EXACT)


def test_the_loss_knows_the_rows_lengths_too(model):
    ids, lengths = tiny_ids(2, 7), torch.tensor([7, 3])
    Head(3).attach(model, "classifier")
    randomize(UniPELT(2, 3, 4, False, gate_over="sequence").attach(model))
    labels = torch.tensor([0, 2])
    alone = model.loss(ids[1:, :3], labels[1:]) + model.loss(ids[:1], labels[:1])
    close(2 * model.loss(ids, labels, lengths=lengths), alone, EXACT)


def test_below_a_classifier_of_rows_both_gates_agree_in_a_model_of_one_layer(ids):
    """The last token's running mean is the row's mean; its query is all that a prefix touches."""
    config = GPTConfig(vocab_size=97, context_length=64, n_layer=1, n_head=4, d_model=32)
    outputs = []
    for over in ("past", "sequence"):
        model = tiny_model(config)
        torch.manual_seed(5)
        Head(3).attach(model, "classifier")
        randomize(UniPELT(0, 3, 0, False, gate_over=over).attach(model))
        outputs.append(model(ids))
    close(*outputs, EXACT)


def test_a_layer_without_heads_keeps_its_gates_apart(ids):
    """The prefix's gates belong to the layers that have a prefix."""
    model = prune_heads(tiny_model(), {0: range(4)})
    randomize(UniPELT(2, 3, 4, False).attach(model))
    names = model.attachments[0].tensors()
    assert "blocks.1.attn.gate.weight" in names and "blocks.0.attn.gate.weight" not in names
    both = torch.cat([cached(model, ids[:, :5], ids[:, 5:]), model(ids)])
    close(*both.chunk(2), EXACT)


def cached(model, first, rest):
    """Logits of two parts, the second read token by token behind the first."""
    cache = Cache(model, len(first), 30)
    parts = [model.features(first, cache=cache)]
    for n in range(rest.shape[1]):
        parts.append(model.features(rest[:, n : n + 1], first.shape[1] + n, cache=cache))
    return model.read_out(torch.cat(parts, 1))


@pytest.mark.parametrize("variant", ["paper", "peft_gpt2"])
def test_prompts_that_go_through_gated_projections_are_refused(variant, model, ids):
    """LLaMA-Adapter calls q, k and v once more, which gates with a cache would count as text."""
    prompts = LLaMAAdapter(3, variant=variant)
    UniPELT(2, 3, 4, False).attach(model, "gated")
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q has a gate"):
        prompts.attach(model, "prompts")
    minipeft.detach(model)
    prompts.attach(model, "prompts")
    with pytest.raises(ValueError, match=r"use rank=0"):
        UniPELT(2, 0, 4, False).attach(model, "gated")
    randomize(UniPELT(0, 0, 4, False).attach(model, "gated"))  # no gate in a projection
    close(cached(model, ids[:, :5], ids[:, 5:]), model(ids), EXACT)
