"""AdapterFusion: the specification of additive/adapter_fusion.py and adapter_sources.py."""

import copy

import pytest
import torch

import minipeft
from minipeft import GPT, Adapter, AdapterDrop, AdapterFusion, GPTConfig, LoRA
from minipeft.additive.adapter_fusion import (
    FusionAttention,
    extract_knowledge,
    fuse,
    fusion_weights,
    fusion_weights_of,
    value_penalty,
)
from minipeft.technique import extra_loss, set_adapter
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same operations in another order
ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
PFEIFFER = Adapter(placement="pfeiffer", bottleneck=5)


def with_adapters(names=("a", "b", "c"), technique=PFEIFFER, config=CONFIG):
    """A model with trained-looking adapters of these names on it, all switched off."""
    model = tiny_model(config)
    tasks = {name: n for n, name in enumerate(names)}
    extract_knowledge(model, tasks, lambda m, seed: randomize(m, 0.3, seed), technique)
    return model


def fused(names=("a", "b", "c"), std=0.2, **settings):
    """The same with a fusion on it, away from its start."""
    model = with_adapters(names)
    AdapterFusion(adapters=list(names), **settings).attach(model, "fusion")
    return randomize(model, std)


def fusion_layers(model):
    return [w.adapter for w in model.attachments[-1].wrappers()]


# -- the math


def fuse_by_loops(x, Z, layer):
    """(AdapterFusion 2) and (AdapterFusion 3) for one token at a time, one adapter at a time."""
    Q, K, V = layer.query.weight, layer.key.weight, layer.value.weight
    y, p = torch.zeros_like(x), torch.zeros(Z.shape[:-1], dtype=x.dtype)
    for b, t in torch.cartesian_prod(*map(torch.arange, x.shape[:2])):
        q = Q @ x[b, t] + layer.query.bias
        scores = torch.stack([q @ (K @ z + layer.key.bias) for z in Z[b, t]])
        e = (scores - scores.max()).exp()
        p[b, t] = e / e.sum()
        y[b, t] = sum(weight * (V @ z) for weight, z in zip(p[b, t], Z[b, t]))
    return y, p


def test_fusion_is_attention_over_adapters_without_the_square_root():
    """(AdapterFusion 1), (AdapterFusion 2), (AdapterFusion 3) on odd sizes."""
    model = fused()
    layer = fusion_layers(model)[0]
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    Z = torch.stack([adapter(x) for adapter in layer.adapters], 2)
    y, p = fuse_by_loops(x, Z, layer)
    close(layer(x), y, EXACT)
    close(layer.weights(x), p, EXACT)
    close(fuse(x, Z, *layer.attention(), layer.value.weight), y, EXACT)
    close(fusion_weights_of(x, Z, *layer.attention()), p, EXACT)


def test_the_model_adds_the_fusion_to_the_sub_layer():
    """y = f + fusion, the query and the adapters reading f. (AdapterFusion 3)"""
    model, ids = fused(), tiny_ids()
    x = model.embed(ids)
    for block, layer in zip(model.blocks, fusion_layers(model)):
        x = x + block.attn(block.ln_1(x))
        f = block.mlp.inner(block.ln_2(x))
        x = x + f + fuse_by_loops(f, layer.outputs(f), layer)[0]
    close(model(ids), model.head(model.ln_f(x)), EXACT)


def test_values_are_the_adapters_without_their_inner_residual():
    """(AdapterFusion 1): z_n = A_n(x), not x + A_n(x)."""
    model = with_adapters(("a", "b"))
    tensors = [a.tensors() for a in model.attachments]
    AdapterFusion(adapters=["a", "b"]).attach(model)
    x = torch.randn(1, 2, 32, dtype=torch.float64)
    Z = fusion_layers(model)[1].outputs(x)
    for n, t in enumerate(tensors):
        W_1, b_1, W_2, b_2 = (
            t[f"blocks.1.mlp.adapter.{part}.{kind}"]
            for part in ("down", "up")
            for kind in ("weight", "bias")
        )
        close(Z[..., n, :], (x @ W_1.T + b_1).clamp(min=0) @ W_2.T + b_2, EXACT)


def test_parallel_adapters_are_fused_on_what_the_sub_layer_reads():
    model, ids = tiny_model(), tiny_ids()
    parallel = Adapter(placement="parallel", bottleneck=4, scale=3.0, init="normal")
    AdapterFusion(adapters=[parallel, parallel]).attach(model)
    randomize(model)
    x = model.embed(ids)
    for block, layer in zip(model.blocks, fusion_layers(model)):
        x = x + block.attn(block.ln_1(x))
        read = block.ln_2(x)
        x = x + block.mlp.inner(read) + fuse_by_loops(read, layer.outputs(read), layer)[0]
    close(model(ids), model.head(model.ln_f(x)), EXACT)


def test_the_penalty_pulls_the_value_matrix_to_the_identity():
    """(AdapterFusion 4): lambda ||V - I||_F^2, summed over the layers."""
    model = fused(penalty=0.3)
    expected = sum(
        0.3
        * sum((v - (i == j)) ** 2 for i, row in enumerate(V.tolist()) for j, v in enumerate(row))
        for V in (layer.value.weight for layer in fusion_layers(model))
    )
    assert extra_loss(model).item() == pytest.approx(expected, rel=1e-12)
    assert value_penalty(torch.eye(7)).item() == 0
    assert extra_loss(fused(penalty=0.0)) is None


def test_it_starts_as_the_mean_of_the_adapters_nearly():
    torch.manual_seed(1)
    layer = FusionAttention([], 64)
    for linear in (layer.query, layer.key):
        assert abs(linear.weight.std().item() - 0.02) < 1e-3 and not linear.bias.any()
    V = layer.value.weight
    assert torch.equal(V.diagonal(), torch.ones(64))
    assert torch.equal(V - torch.diag(V.diagonal()), 1e-6 * (1 - torch.eye(64)))
    assert layer.value.bias is None


# -- what it reduces to


def test_over_one_adapter_with_v_the_identity_it_is_that_adapter():
    model, ids = with_adapters(("a",)), tiny_ids()
    expected = set_adapter(model, "a")(ids)
    AdapterFusion(adapters=["a"]).attach(model, "fusion")
    # at the start V is 1e-6 away from I, so y is that far from A(f), of which logits see a few
    assert 0 < (model(ids) - expected).abs().max() < 1e-4
    for layer in fusion_layers(model):
        torch.nn.init.eye_(layer.value.weight)
    close(model(ids), expected, EXACT)


def test_over_adapters_that_give_nothing_it_is_the_base():
    base, ids = tiny_model()(tiny_ids()), tiny_ids()
    model = AdapterFusion(adapters=[PFEIFFER, PFEIFFER]).attach(tiny_model())  # W_2 = 0
    assert torch.equal(randomize(model)(ids), base)


def test_the_key_bias_changes_nothing():
    model, ids = fused(), tiny_ids()
    before = model(ids)
    for layer in fusion_layers(model):
        layer.key.bias.data += 3.0
    close(model(ids), before, EXACT)


def test_query_and_key_learn_nothing_over_one_adapter():
    model, ids = fused(("a",)), tiny_ids()
    model.loss(ids, ids).backward()
    for layer in fusion_layers(model):
        assert layer.query.weight.grad.abs().max() < 1e-14 < layer.value.weight.grad.abs().max()


# -- what is trained


@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_count_does_not_depend_on_the_number_of_adapters(n):
    technique = AdapterFusion(adapters=[PFEIFFER] * n)
    model = technique.attach(tiny_model(ODD))
    expected = 3 * (3 * 21 * 21 + 2 * 21)
    assert minipeft.report(model).trained == technique.count(ODD) == expected


def test_only_the_fusion_trains():
    model, ids = fused(), tiny_ids()
    frozen = {n: t.clone() for n, t in model.attachments[-1].tensors().items() if ".adapters." in n}
    singles = [{n: t.clone() for n, t in a.tensors().items()} for a in model.attachments[:-1]]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    model.loss(ids, ids).backward()
    optimizer.step()
    after = model.attachments[-1].tensors()
    assert len(frozen) == 2 * 3 * 4 and all(torch.equal(after[n], t) for n, t in frozen.items())
    for attachment, before in zip(model.attachments, singles):
        assert all(torch.equal(attachment.tensors()[n], t) for n, t in before.items())


def test_what_happens_to_the_single_adapters_later_does_not_reach_the_fusion():
    model, ids = fused(), tiny_ids()
    before = model(ids)
    for tensor in model.attachments[0].tensors().values():
        tensor.data.zero_()
    assert torch.equal(model(ids), before)


def test_knowledge_extraction_trains_each_adapter_alone():
    model, seen = tiny_model(), []

    def train(model, data):
        active = [a.name for a in model.attachments if a.active]
        trained = [row.name for row in minipeft.report(model).rows if row.trained]
        seen.append((data, active, len(trained)))
        randomize(model)

    names = extract_knowledge(model, {"a": "data of a", "b": "data of b"}, train)
    assert names == ["a", "b"]
    assert seen == [("data of a", ["a"], 8), ("data of b", ["b"], 8)]  # 2 layers of 4 tensors
    assert isinstance(model.attachments[0].technique, Adapter)
    assert torch.equal(model(tiny_ids()), tiny_model()(tiny_ids()))


def test_a_failing_task_leaves_the_others_switched_off():
    model = tiny_model()

    def train(model, data):
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        extract_knowledge(model, {"a": 0}, train)
    assert torch.equal(model(tiny_ids()), tiny_model()(tiny_ids()))


# -- weights to read


def test_fusion_weights_are_given_for_every_layer_and_token():
    model, ids = fused(), tiny_ids(2, 7)
    p = fusion_weights(model, ids)
    assert p.shape == (2, 2, 7, 3)  # layers, batch, time, adapters
    close(p.sum(-1), torch.ones(2, 2, 7, dtype=torch.float64), EXACT)
    x = model.embed(ids)
    for n, (block, layer) in enumerate(zip(model.blocks, fusion_layers(model))):
        x = x + block.attn(block.ln_1(x))
        f = block.mlp.inner(block.ln_2(x))
        fusion, expected = fuse_by_loops(f, layer.outputs(f), layer)
        close(p[n], expected, EXACT)
        x = x + f + fusion


def test_reading_the_weights_leaves_no_trace():
    model, ids = fused().train(), tiny_ids()
    fusion_weights(model, ids, "fusion")
    assert model.training and not any(layer._forward_hooks for layer in fusion_layers(model))


def test_weights_of_something_else_are_an_error():
    model = with_adapters(("a",))
    with pytest.raises(ValueError, match="'a' is no AdapterFusion"):
        fusion_weights(model, tiny_ids(), "a")


# -- where adapters come from


def test_attached_adapters_are_switched_off_and_on_again():
    model, ids = with_adapters(("a", "b")), tiny_ids()
    set_adapter(model, ["a", "b"])
    both = model(ids)
    AdapterFusion(adapters=["b", "a"]).attach(model, "fusion")
    assert [a.active for a in model.attachments] == [False, False, True]
    alone = AdapterFusion(adapters=["b", "a"])
    other = with_adapters(("a", "b"))
    torch.manual_seed(0)
    alone.attach(other, "fusion")
    model.attachments[-1].load(other.attachments[-1].tensors())
    assert torch.equal(model(ids), other(ids))
    minipeft.detach(model, "fusion")
    assert [a.active for a in model.attachments] == [True, True]
    assert torch.equal(model(ids), both)


def test_a_refused_fusion_leaves_everything_as_it_was():
    model, ids = with_adapters(("a", "b")), tiny_ids()
    set_adapter(model, ["a", "b"])
    both = model(ids)
    with pytest.raises(ValueError, match="'nobody' is neither attached"):
        AdapterFusion(adapters=["a", "nobody"]).attach(model, "fusion")
    assert [a.name for a in model.attachments if a.active] == ["a", "b"]
    assert torch.equal(model(ids), both)


def test_names_folders_and_tensors_give_the_same_fusion(tmp_path):
    model, ids = with_adapters(("a", "b")), tiny_ids()
    forms = {"names": ["a", "b"], "folders": [], "tensors": []}
    for attachment in list(model.attachments):
        set_adapter(model, attachment.name)
        minipeft.save_adapter(model, tmp_path / attachment.name, attachment.name)
        forms["folders"].append(str(tmp_path / attachment.name))
        tensors = {n: t.detach().clone() for n, t in attachment.tensors().items()}
        forms["tensors"].append(
            {"name": attachment.name, "technique": PFEIFFER, "tensors": tensors}
        )
    set_adapter(model, [])
    logits = {}
    for name, adapters in forms.items():
        fresh = copy.deepcopy(model) if name == "names" else tiny_model()
        torch.manual_seed(4)
        AdapterFusion(adapters=adapters).attach(fresh, "fusion")
        assert [s.name for s in fresh.attachments[-1].technique.adapters] == ["a", "b"]
        assert len(fresh.attachments) == (3 if name == "names" else 1)
        logits[name] = fresh(ids)
    assert torch.equal(logits["names"], logits["folders"])
    assert torch.equal(logits["names"], logits["tensors"])


def test_the_file_of_a_fusion_is_complete(tmp_path):
    model, ids = fused(), tiny_ids()
    minipeft.save_adapter(model, tmp_path, "fusion")
    again = minipeft.load_adapter(tiny_model(), tmp_path)
    assert torch.equal(again(ids), model(ids))
    assert [s.name for s in again.attachments[0].technique.adapters] == ["a", "b", "c"]
    assert torch.equal(fusion_weights(again, ids), fusion_weights(model, ids))


def test_adapters_of_adapter_drop_are_fused_where_they_are():
    model, ids = tiny_model(ODD), tiny_ids(vocab=47)
    drop = AdapterDrop(bottleneck=3, drop=1, init="normal")
    with pytest.raises(ValueError, match=r"nothing in layers \[0\]; fuse with leave_out=\(0,\)"):
        AdapterFusion(adapters=[drop, PFEIFFER]).attach(model)
    technique = AdapterFusion(adapters=[drop, PFEIFFER], leave_out=(0,))
    technique.attach(model)
    paths = [swap.path for swap in model.attachments[0].swaps]
    assert paths == ["blocks.1.mlp", "blocks.2.mlp"]
    assert minipeft.report(model).trained == technique.count(ODD)
    assert fusion_weights(model, ids).shape[0] == 2


def test_adapters_of_different_widths_activations_and_dropouts_fuse():
    wide = Adapter(placement="pfeiffer", bottleneck=9, activation="tanh", dropout=0.5, scale=2.0)
    model = AdapterFusion(adapters=[PFEIFFER, wide]).attach(tiny_model()).train()
    first, second = fusion_layers(model)[0].adapters
    assert first.down.weight.shape == (5, 32) and second.down.weight.shape == (9, 32)
    assert second.activation == "tanh" and second.scale == 2.0
    assert second.dropout == 0.0  # a frozen adapter gives the same in training as at inference


def test_a_fusion_is_made_on_the_meta_device_too():
    with torch.device("meta"):
        model = GPT(ODD)
        AdapterFusion(adapters=[PFEIFFER]).attach(model)
    assert all(t.is_meta for t in model.attachments[0].tensors().values())


def tensors_of(technique):
    return dict(technique.attach(tiny_model()).attachments[0].tensors())


@pytest.mark.parametrize(
    ("adapters", "settings", "message"),
    [
        ([], {}, "adapters=.. is empty"),
        ([PFEIFFER], {"penalty": -1.0}, "penalty=-1.0"),
        ([PFEIFFER], {"leave_out": (5,)}, "leave_out names layer 5"),
        ([3], {}, r"adapters\[0\] is int; give the name"),
        (["x"], {}, "'x' is neither attached to this model .* nor a folder"),
        ([Adapter(layer_norms=False)], {}, "placement='houlsby'"),
        ([Adapter(placement="pfeiffer", layer_norms=True)], {}, "layer_norms=True"),
        ([PFEIFFER, Adapter(placement="parallel")], {}, "'adapter1' and 'adapter0' do not stand"),
        (
            [PFEIFFER, Adapter(placement="pfeiffer", on="attn")],
            {},
            "do not stand at the same places",
        ),
        ([{"name": "a", "technique": PFEIFFER}] * 2, {}, "two of the adapters have one name"),
        ([{"technique": LoRA()}], {}, "only adapters can be fused, not LoRA"),
        (
            [{"name": "a", "technique": PFEIFFER, "tensors": {}}],
            {},
            "blocks.0.mlp.adapter.down.weight is missing, .5, 32. is needed",
        ),
        (
            [
                {
                    "technique": PFEIFFER,
                    "tensors": tensors_of(Adapter(placement="pfeiffer", bottleneck=4)),
                }
            ],
            {},
            r"down.weight is \(4, 32\), \(5, 32\) is needed",
        ),
    ],
)
def test_bad_input_is_named(adapters, settings, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        AdapterFusion(adapters=adapters, **settings).attach(model)
    assert not model.attachments


def test_attached_lora_cannot_be_fused():
    model = LoRA().attach(tiny_model(), "lora")
    with pytest.raises(ValueError, match="only adapters can be fused, not LoRA"):
        AdapterFusion(adapters=["lora"]).attach(model, "fusion")
    assert [a.active for a in model.attachments] == [True]


def test_it_cannot_be_merged_and_says_why():
    with pytest.raises(ValueError, match="weights of its own"):
        minipeft.merge(AdapterFusion(adapters=[PFEIFFER]).attach(tiny_model()))
