"""Gates: the specification of minipeft/hybrid/gates.py. Reference math in float64, in loops."""

import copy
import math

import pytest
import torch

import minipeft
from minipeft import GPTConfig, Head, LoRA, PromptTuning, UniPELT
from minipeft.decoding import Cache
from minipeft.hybrid.gates import (
    BlockPass,
    Gate,
    gate_values,
    running_mean,
    sequence_mean,
    token_gates,
)
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same sums, in another order
ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
FULL = UniPELT(rank=3, prefix_length=4, bottleneck=5, prefix_bottleneck=6)


def gates_by_hand(x, gate):
    """(Gate 1), token by token."""
    weight, bias = gate.weight.detach(), gate.bias.item()
    return torch.tensor(
        [
            [1 / (1 + math.exp(-sum(a * b for a, b in zip(row, weight[0])) - bias)) for row in rows]
            for rows in x.detach()
        ],
        dtype=torch.float64,
    )


def means_by_hand(g):
    """(Gate 2), one position after the other."""
    means = [g[:, : t + 1].sum(1) / (t + 1) for t in range(g.shape[1])]
    return torch.stack(means, 1)


def random_gate(over="past", width=7):
    gate = Gate(BlockPass(over), "case/q", width, dtype=torch.float64)
    with torch.no_grad():
        gate.weight.normal_()
        gate.bias.normal_()
    return gate


# -- the math


def test_a_token_s_gate_is_a_sigmoid_of_what_is_read():
    """(Gate 1)"""
    gate, x = random_gate(), torch.randn(2, 5, 7).double()
    close(token_gates(x, gate.weight, gate.bias), gates_by_hand(x, gate), EXACT)


def test_the_gate_is_the_mean_over_the_text_so_far():
    """(Gate 2)"""
    gate, x = random_gate(), torch.randn(3, 6, 7).double()
    close(gate(x), means_by_hand(gates_by_hand(x, gate)), EXACT)


def test_means_go_on_where_an_earlier_part_stopped():
    """(Gate 2), also when rows are not equally long."""
    g = torch.rand(2, 9).double()
    before = torch.tensor([[3], [5]])
    total = torch.stack([g[0, :3].sum(), g[1, :5].sum()])[:, None]
    part = torch.stack([g[0, 3:7], g[1, 5:9]])
    G, sums = running_mean(part, total, before)
    expected = means_by_hand(g)
    close(G, torch.stack([expected[0, 3:7], expected[1, 5:9]]), EXACT)
    close(sums[:, -1], torch.stack([g[0, :7].sum(), g[1, :9].sum()]), EXACT)


def test_the_whole_row_s_mean_leaves_padding_out():
    """(Gate 3)"""
    g = torch.rand(3, 5).double()
    real = torch.tensor([5, 2, 1])
    expected = torch.stack([row[:n].mean() for row, n in zip(g, real.tolist())])
    close(sequence_mean(g, real), expected[:, None].expand(3, 5), EXACT)
    close(sequence_mean(g), g.mean(1)[:, None].expand(3, 5), EXACT)


def test_at_the_last_token_both_means_are_the_same():
    g = torch.rand(2, 8).double()
    close(running_mean(g)[0][:, -1], sequence_mean(g)[:, -1], EXACT)


def test_sums_are_kept_in_float32_at_least():
    """In bfloat16 a sum of thousands has 8 bits, and the mean an error of up to 0.4 %."""
    gate = Gate(BlockPass("past"), "case/q", 3, dtype=torch.bfloat16)
    torch.nn.init.ones_(gate.bias)
    G = gate(torch.zeros(1, 3000, 3, dtype=torch.bfloat16))
    expected = torch.tensor(1.0).sigmoid().bfloat16().float()
    assert (G - expected).abs().max() < 1e-4  # 3,000 additions in float32: 3,000 x 6e-8 at most


def test_a_new_gate_is_near_one_half():
    torch.manual_seed(0)
    gate = Gate(BlockPass("past"), "case/q", 4000)
    assert torch.equal(gate.bias, torch.zeros(1))
    assert 0.018 < gate.weight.std() < 0.022  # 4000 samples: the standard error is 0.0002
    assert abs(gate(torch.randn(1, 1, 4000) / 10).item() - 0.5) < 0.1
    assert sum(p.numel() for p in gate.parameters()) == 4001


# -- inside a model


def test_the_gates_of_every_layer_can_be_read_out():
    """Recomputed from what q's projection and the adapter read."""
    model, ids = tiny_model(ODD), tiny_ids(2, 7, ODD.vocab_size)
    randomize(FULL.attach(model))
    read = {}
    for n in range(ODD.n_layer):
        for part in ("q", "v"):
            module = minipeft.wrap.resolve(model, f"blocks.{n}.attn.{part}")
            module.register_forward_pre_hook(
                lambda m, args, key=(part, n): read.__setitem__(key, (args[0], m.gate))
            )
        attn = minipeft.wrap.resolve(model, f"blocks.{n}.attn")
        attn.register_forward_pre_hook(
            lambda m, args, n=n: read.__setitem__(("prefix", n), (args[0], m.gate))
        )
        adapter = minipeft.wrap.resolve(model, f"blocks.{n}.mlp").adapter
        adapter.register_forward_pre_hook(
            lambda m, args, n=n: read.__setitem__(("adapter", n), (args[0], m.gate))
        )
    values = gate_values(model, ids)
    assert set(values) == {"q", "v", "prefix", "adapter"}
    for part, layers in values.items():
        assert layers.shape == (ODD.n_layer, 2, 7)
        for n, G in enumerate(layers):
            close(G, means_by_hand(gates_by_hand(*read[part, n])), EXACT)


def test_reading_gates_leaves_no_trace(model, ids):
    randomize(FULL.attach(model)).train()
    gate_values(model, ids)
    assert model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_only_unipelt_has_gates(model, ids):
    LoRA().attach(model)
    with pytest.raises(ValueError, match="'default' is no UniPELT"):
        gate_values(model, ids)


def test_of_two_attachments_each_shows_its_own_gates(model, ids):
    UniPELT(rank=2, prefix_length=0, bottleneck=0).attach(model, "one")
    UniPELT(rank=0, prefix_length=0, bottleneck=3).attach(model, "two")
    assert set(gate_values(model, ids, name="one")) == {"q", "v"}
    assert set(gate_values(model, ids, name="two")) == {"adapter"}


def test_virtual_tokens_in_front_count(model, ids):
    """They pass the same layers, so the mean is over them as well; only the text's are shown."""
    randomize(PromptTuning(4).attach(model, "prompt"))
    randomize(UniPELT(rank=2, prefix_length=0, bottleneck=0).attach(model))
    gate = minipeft.wrap.resolve(model, "blocks.0.attn.q").gate
    x = minipeft.wrap.base_module(model.blocks[0]).ln_1(model.embed(ids))
    assert x.shape[1] == ids.shape[1] + 4
    expected = means_by_hand(gates_by_hand(x, gate))[:, 4:]
    close(gate_values(model, ids)["q"][0], expected, EXACT)


# -- decoding


def sums_of(cache):
    return [layer.state["default/q"] for layer in cache.layers]


def test_the_cache_keeps_each_gate_s_sum(model):
    ids = tiny_ids(2, 9)
    randomize(FULL.attach(model))
    cache, values = Cache(model, 2, 9), gate_values(model, ids)["q"]
    with torch.no_grad():
        for a, b in ((0, 4), (4, 5), (5, 9)):
            model.features(ids[:, a:b], a, cache)
            for sums, G in zip(sums_of(cache), values, strict=True):
                close(sums[:, 0], G[:, b - 1] * b, EXACT)


def test_padding_stays_out_of_the_sums(model):
    """(Gate 2): a right-padded row goes on from its last real token."""
    ids = tiny_ids(3, 9)
    lengths = torch.tensor([9, 4, 1])
    randomize(FULL.attach(model))
    cache = Cache(model, 3, 9)
    cache.real = lengths
    with torch.no_grad():
        model.features(ids, 0, cache)
    for row, length in enumerate(lengths.tolist()):
        alone = Cache(model, 1, 9)
        with torch.no_grad():
            model.features(ids[row : row + 1, :length], 0, alone)
        for together, single in zip(sums_of(cache), sums_of(alone), strict=True):
            close(together[row : row + 1], single, EXACT)


@pytest.mark.parametrize("prompt", [False, True])
def test_decoding_unequal_rows_is_decoding_each_alone(model, prompt):
    if prompt:
        randomize(PromptTuning(3).attach(model, "prompt"))
    randomize(FULL.attach(model), 0.5)
    ids, lengths = tiny_ids(3, 8), torch.tensor([3, 8, 1])
    together = minipeft.generate(model, ids, 6, temperature=0, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = minipeft.generate(model, ids[row : row + 1, :length], 6, temperature=0)
        assert torch.equal(together[row, : length + 6], alone[0])


def test_sums_follow_the_beams(model):
    """Reordered rows go on as whole passes over their texts would."""
    randomize(FULL.attach(model), 0.5)
    ids = tiny_ids(2, 5)
    cache = Cache(model, 2, 8)
    with torch.no_grad():
        model.features(ids, 0, cache)
        order = torch.tensor([1, 0, 1])
        cache.reorder(order)
        rows = torch.cat([ids[order], torch.tensor([[3], [9], [27]])], 1)
        close(model.features(rows[:, 5:], 5, cache), model.features(rows)[:, 5:], EXACT)


def test_two_attachments_keep_their_sums_apart(model):
    ids = tiny_ids(2, 7)
    for name in ("one", "two"):
        UniPELT(rank=2, prefix_length=0, bottleneck=3).attach(model, name)
    for seed, attachment in enumerate(model.attachments):
        with torch.no_grad():
            for parameter in attachment.parameters().values():
                parameter += 0.3 * torch.randn(parameter.shape).double() * (seed + 1)
    cache = Cache(model, 2, 7)
    with torch.no_grad():
        parts = [model.features(ids[:, a : a + 1], a, cache) for a in range(7)]
        close(torch.cat(parts, 1), model.features(ids), EXACT)


def test_a_block_forgets_its_pass(model, ids):
    """Nothing of a pass stays behind, not even after an error: copies stay possible."""
    FULL.attach(model)
    model.loss(ids, ids)
    cache = Cache(model, 3, 2)
    with pytest.raises(ValueError, match="do not fit"):
        model.features(ids, 0, cache)
    for block in model.blocks:
        assert block.current.cache is None and block.current.prefix is None
    copy.deepcopy(model)


def test_a_gate_over_the_whole_row_refuses_a_cache(model, ids):
    Head(2).attach(model, "classifier")
    UniPELT(rank=2, prefix_length=0, bottleneck=0, gate_over="sequence").attach(model)
    with pytest.raises(ValueError, match="gate_over"):
        model.features(ids, 0, Cache(model, 3, ids.shape[1]))


def test_virtual_tokens_are_real_in_the_whole_row_s_mean(model):
    """(Gate 3): lengths count text; a prompt in front is no padding either."""
    ids, lengths = tiny_ids(2, 6), torch.tensor([6, 2])
    Head(2).attach(model, "classifier")
    randomize(PromptTuning(3).attach(model, "prompt"))
    randomize(UniPELT(2, 0, 0, gate_over="sequence").attach(model))
    gate = minipeft.wrap.resolve(model, "blocks.0.attn.q").gate
    x = minipeft.wrap.base_module(model.blocks[0]).ln_1(model.embed(ids))
    g = gates_by_hand(x, gate)
    values = gate_values(model, ids, lengths)["q"][0]
    close(values[0], g[0].mean().expand(6), EXACT)
    close(values[1], g[1, :5].mean().expand(6), EXACT)
    assert CONFIG.d_model == gate.weight.shape[1]
