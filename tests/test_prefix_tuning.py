"""Prefix tuning: attention over concatenated keys and values, the MLP, the activations of texts."""

import copy
import math

import pytest
import torch

import minipeft
from minipeft import PrefixTuning, PTuningV2
from minipeft.compressed.structured_pruning import prune_heads
from minipeft.gpt import AttentionCore
from minipeft.soft_prompt.prefix_attention import with_prefix
from minipeft.soft_prompt.prefix_tuning import (
    PrefixCore,
    activations,
    install_prefix,
    prefix_mass,
    prefix_mlp,
    split_prefix,
)
from minipeft.soft_prompt.prompt_tuning import Table, flatten
from minipeft.technique import Attachment
from tests.tiny import CONFIG, close, randomize, tiny_model

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16
FLAT = PrefixTuning(prefix_length=5, reparameterize=False)
MLP = PrefixTuning(prefix_length=5, bottleneck=7)


def cores_of(model):
    return [block.attn.core for block in model.blocks]


def written_out(base, ids, tables, p):
    """Logits of a bare model behind flat tables (p, 2 H d), head by head, query by query."""
    x = base.embed.token.weight[ids] + base.embed.position.weight[p : p + ids.shape[1]]
    for block, table in zip(base.blocks, tables, strict=True):
        x = x + attend(block.attn, block.ln_1(x), table, p)
        x = x + block.mlp(block.ln_2(x))
    return base.ln_f(x) @ base.embed.token.weight.T


def attend(attn, x, table, p):
    H, d, width = attn.n_head, attn.head_dim, attn.n_head * attn.head_dim
    out = torch.zeros(*x.shape[:2], width, dtype=x.dtype)
    for h in range(H):
        own = slice(h * d, (h + 1) * d)
        keys, values = table[:, :width][:, own], table[:, width:][:, own]
        q, k, v = (f(x)[..., own] for f in (attn.q, attn.k, attn.v))
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                K = torch.cat([keys, k[b, : t + 1]])
                V = torch.cat([values, v[b, : t + 1]])
                out[b, t, own] = (K @ q[b, t] / math.sqrt(d)).softmax(0) @ V
    return attn.o(out)


@pytest.mark.parametrize("technique", [FLAT, MLP], ids=["flat", "mlp"])
def test_the_model_is_attention_over_concatenated_keys_and_values(model, ids, technique):
    """(Prefix 1), with positions from p on."""
    technique.attach(model)
    logits, tables = model(ids), [core.table() for core in cores_of(model)]
    minipeft.detach(model)
    close(logits, written_out(model, ids, tables, p=5), EXACT)


def test_the_mlp_computes_each_layer_s_rows(model):
    """(Prefix 2), entry by entry."""
    MLP.attach(model)
    trunk = copy.deepcopy(cores_of(model)[0].table.trunk).requires_grad_(False)
    for core in cores_of(model):
        up, rows = core.table.up, core.table().detach()
        up.requires_grad_(False)
        assert rows.shape == (5, 2 * 32) and trunk.down.weight.shape == (7, 32)
        for i in (0, 3):
            down = trunk.down
            a = [
                math.tanh(sum(down.weight[j] * trunk.embedding[i]) + down.bias[j]) for j in range(7)
            ]
            for c in (0, 41, 63):
                expected = sum(up.weight[c, j] * a[j] for j in range(7)) + up.bias[c]
                assert abs(rows[i, c] - expected) < EXACT


def test_the_trunk_is_trained_once_and_shared_by_all_layers(model, ids):
    MLP.attach(model)
    names = list(minipeft.technique.attachment_of(model).parameters())
    assert sum("trunk" in n for n in names) == 3, "embedding, weight and bias of the first linear"
    first, second = (core.table.shared[0] for core in cores_of(model))
    assert first is second
    before = cores_of(model)[1].table().clone()
    with torch.no_grad():
        first.embedding.add_(0.5)
    assert not torch.equal(cores_of(model)[1].table(), before)


def test_copies_and_moves_take_the_trunk_along(model, ids):
    MLP.attach(model)
    twin = copy.deepcopy(model)
    trunks = {id(core.table.shared[0]) for core in cores_of(twin)}
    assert len(trunks) == 1 and trunks != {id(cores_of(model)[0].table.trunk)}
    single = twin.to(torch.float32)
    assert {core.table().dtype for core in cores_of(single)} == {torch.float32}
    # float32 against float64: 1e-7 a rounding, some dozen deep
    close(single(ids).double(), model(ids), 1e-4)


def test_attention_with_a_prefix_is_a_gated_sum_of_two_attentions():
    """(Prefix 3); lambda is the softmax mass on the prefix."""
    q, k, v = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3))
    pk, pv = (torch.randn(2, 3, 5, 4, dtype=torch.float64) for _ in range(2))
    core = AttentionCore()
    for t in (0, 6):  # the query alone, over the keys it may see
        one, K, V = q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1]
        joint = core(one, *with_prefix(torch.stack([pk, pv]), K, V))
        on_prefix = (one @ pk.mT / 2).exp().sum(-1, keepdim=True)
        on_text = (one @ K.mT / 2).exp().sum(-1, keepdim=True)
        mass = on_prefix / (on_prefix + on_text)
        close(prefix_mass(one, K, pk), mass, EXACT)
        close(joint, (1 - mass) * core(one, K, V) + mass * core(one, pk, pv), EXACT)


def test_keys_come_before_values_and_heads_stay_apart():
    table = torch.arange(3 * 12.0).view(3, 12)  # p = 3, H = 2, d = 3
    keys, values = split_prefix(table, 2)
    assert keys.shape == (2, 3, 3)
    assert keys[0, 1].tolist() == [12, 13, 14] and keys[1, 1].tolist() == [15, 16, 17]
    assert values[0, 2].tolist() == [30, 31, 32] and values[1, 0].tolist() == [9, 10, 11]


@pytest.mark.parametrize("T", [1, 2, 6])
def test_a_given_mask_still_shows_the_whole_prefix(T):
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind(0)
    core = PrefixCore(AttentionCore(), Table(torch.randn(5, 16, dtype=torch.float64)), 2)
    causal = torch.ones(6, 6, dtype=torch.bool).tril()[None, None, -T:]
    close(core(q[:, :, -T:], k, v, causal), core(q[:, :, -T:], k, v), EXACT)


def test_a_zero_prefix_is_not_the_base():
    """Its p zero keys score 0 and so take the mass p / (p + sum of exp) with zero values."""
    q, k, v = torch.randn(3, 1, 2, 6, 4, dtype=torch.float64).unbind(0)
    core = PrefixCore(AttentionCore(), Table(torch.zeros(5, 16, dtype=torch.float64)), 2)
    Z = (q @ k.mT / 2).exp().tril().sum(-1, keepdim=True)
    close(core(q, k, v), AttentionCore()(q, k, v) * Z / (Z + 5), EXACT)


def test_zero_init_is_zero_and_random_is_standard_normal(model):
    PrefixTuning(5, False, init="zero").attach(model)
    assert all((core.table.weight == 0).all() for core in cores_of(model))
    minipeft.detach(model)
    PrefixTuning(50, False).attach(model)
    rows = torch.cat([core.table.weight.flatten() for core in cores_of(model)])
    # 6,400 draws: 4 standard errors of the mean, and of the deviation
    assert abs(rows.mean()) < 4 / 80 and abs(rows.std() - 1) < 4 / 113


def test_the_prefix_is_expanded_over_the_batch_and_not_copied(model):
    FLAT.attach(model)
    prefix = cores_of(model)[0].prefix(batch=9)
    assert prefix.shape == (2, 9, 4, 5, 8) and prefix.stride(1) == 0


def test_dropout_falls_on_the_prefix_in_training_alone(model, ids):
    PrefixTuning(20, False, dropout=0.5).attach(model)
    core = cores_of(model)[0]
    assert (core.prefix(2) != 0).all()
    dropped = core.train().prefix(2)
    assert 0.4 < (dropped == 0).double().mean() < 0.6, "2,560 draws at one half"
    assert not torch.equal(dropped[:, 0], dropped[:, 1]), "each row draws its own"


# -- a real text


def test_a_text_s_activations_are_the_base_reading_the_text_first(model, ids):
    text = torch.tensor([[5, 17, 3, 41]]).expand(3, -1)
    whole = model(torch.cat([text, ids], 1))[:, 4:]
    PrefixTuning(4, False, init="text", text=(5, 17, 3, 41)).attach(model)
    close(model(ids), whole, EXACT)


def test_reading_activations_leaves_no_trace(model, ids):
    model.train()
    model.blocks[1].mlp.eval()
    before = model(ids)
    rows = activations(model, [5, 17, 3])
    assert [r.shape for r in rows] == [(3, 64)] * 2 and not rows[0].requires_grad
    assert model.training and not model.blocks[1].mlp.training
    assert not any(core._forward_pre_hooks for core in cores_of(model))
    assert torch.equal(model(ids), before)


def test_activations_do_not_depend_on_dropout():
    model = tiny_model(type(CONFIG)(97, 64, n_layer=1, n_head=2, d_model=20, dropout=0.5)).train()
    assert torch.equal(activations(model, [5, 17])[0], activations(model, [5, 17])[0])


def test_activations_are_the_text_s_also_behind_a_prompt(model):
    whole = activations(model, [8, 9, 5, 17, 3])
    minipeft.PromptTuning(2, "text", text=(8, 9)).attach(model)
    for rows, row in zip(activations(model, [5, 17, 3]), whole, strict=True):
        close(rows, row[2:], EXACT)


def test_a_short_text_is_repeated_before_it_is_read(model):
    once = activations(model, [5, 17, 5, 17, 5])
    PrefixTuning(5, False, init="text", text=(5, 17)).attach(model)
    assert all(torch.equal(c.table.weight, r) for c, r in zip(cores_of(model), once, strict=True))


# -- after training


def test_flattening_drops_the_mlp_and_changes_nothing(model, ids):
    randomize(MLP.attach(model))
    before = model(ids)
    flatten(model)
    assert torch.equal(model(ids), before)
    attachment = minipeft.technique.attachment_of(model)
    assert attachment.technique == PrefixTuning(5, reparameterize=False, bottleneck=7)
    shapes = {n: tuple(p.shape) for n, p in attachment.parameters().items()}
    assert shapes == {f"blocks.{n}.attn.core.table.weight": (5, 64) for n in (0, 1)}
    assert minipeft.report(model).trained == attachment.technique.count(CONFIG) == 5 * 2 * 2 * 32
    model.loss(ids, ids).backward()
    assert all(p.grad is not None for p in attachment.parameters().values())


def test_a_flattened_prefix_has_nothing_more_to_flatten(model):
    flatten(MLP.attach(model))
    with pytest.raises(ValueError, match="no encoder"):
        flatten(model)


def test_a_prefix_of_length_0_installs_nothing(model, ids):
    before, attachment = model(ids), Attachment("empty", FLAT)
    assert install_prefix(model, attachment, 0) == [] and not attachment.swaps
    assert torch.equal(model(ids), before)


def without_heads(layers):
    """(a model whose layers lost all their heads, the model whose heads there write nothing)."""
    pruned, silent = tiny_model(), tiny_model()
    prune_heads(pruned, {n: range(4) for n in layers})
    with torch.no_grad():
        for n in layers:
            silent.blocks[n].attn.o.weight.zero_()
    return pruned, silent


@pytest.mark.parametrize("technique", [FLAT, MLP, PrefixTuning(5, False, placement="infix")])
def test_a_layer_without_heads_has_no_prefix(technique, ids):
    """Nothing would read it; the other layers' does what it does beside heads that write 0."""
    pruned, silent = without_heads([0])
    randomize(technique.attach(pruned))
    assert {p.split(".")[1] for p in pruned.attachments[0].tensors() if "core" in p} == {"1"}
    PrefixTuning(5, False, placement=technique.placement).attach(silent)
    with torch.no_grad():
        rows = pruned.blocks[1].attn.core.table()
        silent.blocks[1].attn.core.table.weight.copy_(rows)
    close(pruned(ids), silent(ids), 1e-12)


def test_a_prefix_that_no_head_would_read_is_refused():
    pruned, _ = without_heads([0, 1])
    with pytest.raises(ValueError, match=r"layers \[0, 1\] have lost all their heads"):
        FLAT.attach(pruned)
    with pytest.raises(ValueError, match=r"layers \[0\] have lost all their heads"):
        PTuningV2(layers=(0,)).attach(without_heads([0])[0])
    assert not pruned.attachments and not pruned.embed.position_shift


def test_each_layer_reads_its_own_rows(model, ids):
    """Changing the second layer's prefix leaves the first layer's output alone."""
    FLAT.attach(model)
    first = model.blocks[0](model.embed(ids))
    before = model(ids)
    with torch.no_grad():
        cores_of(model)[1].table.weight.add_(1.0)
    assert torch.equal(model.blocks[0](model.embed(ids)), first)
    assert not torch.equal(model(ids), before)


def test_positions_move_by_p_and_no_row_is_put_in_front(model, ids):
    FLAT.attach(model)
    assert (model.embed.virtual_tokens, model.embed.position_shift) == (0, 5)
    base = model.embed.inner
    assert torch.equal(
        model.embed(ids, 2), base.token.weight[ids] + base.position.weight[7 : 7 + 11]
    )
    with pytest.raises(ValueError, match=r"T=60.*p=5"):
        model(torch.zeros(1, 60, dtype=torch.int64))


def test_a_prefix_before_a_prompt_leaves_the_prompt_at_the_text_s_beginning(model, ids):
    """Prompt rows come at positions p .., the text behind them."""
    minipeft.PromptTuning(2).attach(model, "prompt")
    FLAT.attach(model, "prefix")
    x = model.embed(ids)
    base = minipeft.wrap.base_module(model.embed)
    prompt = model.embed.inner.prompt.weight
    assert torch.equal(x[0, :2], prompt + base.position.weight[5:7])
    assert torch.equal(x[:, 2:], base.token.weight[ids] + base.position.weight[7:18])


def test_learning_rates_differ_a_lot():
    """The flat table learns nothing at the MLP's rate."""
    assert FLAT.learning_rate >= 10 * MLP.learning_rate


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"prefix_length": 0}, "prefix_length=0 must be from 1 to 63"),
        ({"prefix_length": 64}, "prefix_length=64"),
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"placement": "suffix"}, "placement='suffix'; choose prefix, infix or embedding"),
        ({"init": "gold"}, "init='gold'; choose random, zero or text"),
        ({"init": "zero"}, "flat prefix .reparameterize=False."),
        ({"init": "text", "reparameterize": False}, "needs token ids in text="),
        ({"init": "text", "reparameterize": False, "text": (97,)}, "token id 97 is outside"),
        ({"placement": "infix", "infix_after": -1}, "infix_after=-1"),
        ({"placement": "embedding", "dropout": 0.1}, "dropout=0"),
        ({"placement": "embedding", "reparameterize": False, "init": "zero"}, "init='zero'"),
    ],
)
def test_settings_that_make_no_sense_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        PrefixTuning(**settings).attach(model)
    assert not model.attachments


def test_the_mlp_of_one_row_is_the_formula():
    E, W1, b1, W2, b2 = (
        torch.randn(s, dtype=torch.float64) for s in ((1, 3), (2, 3), 2, (4, 2), 4)
    )
    expected = W2 @ torch.tanh(W1 @ E[0] + b1) + b2
    close(prefix_mlp(E, W1, b1, W2, b2)[0], expected, EXACT)
