"""MAM adapter: the specification of minipeft/hybrid/mam_adapter.py. Reference math in float64."""

import math

import pytest
import torch

import minipeft
from minipeft import GPT, Adapter, GPTConfig, MAMAdapter, PrefixTuning
from minipeft.hybrid.mam_adapter import placement_study
from minipeft.soft_prompt.prompt_tuning import flatten
from tests.tiny import CONFIG, close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: the same operations in another order
ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
MAM = MAMAdapter(prefix_length=4, bottleneck=5, prefix_bottleneck=6)


def attention_by_hand(q, k, v, P_k, P_v):
    """(MAM 1) for heads (B, H, T, d): learned keys and values in front, seen by every query."""
    p, T = P_k.shape[1], q.shape[2]
    k, v = (torch.cat([P.expand(len(q), -1, -1, -1), t], 2) for P, t in ((P_k, k), (P_v, v)))
    weights = (q @ k.mT / math.sqrt(q.shape[-1])).exp()
    weights = weights * torch.ones(T, p + T).double().tril(p)
    return weights / weights.sum(-1, keepdim=True) @ v


def by_hand(model, ids, scale):
    """Logits of MAM written out from its tensors."""
    tensors = model.attachments[-1].tensors()
    x = model.embed(ids)
    for n, block in enumerate(model.blocks):
        attn, u = block.attn, block.ln_1(x)
        table = attn.core.table()
        P = table.reshape(len(table), 2, attn.n_head, attn.head_dim).permute(1, 2, 0, 3)
        q, k, v = (attn.split_heads(p(u)) for p in (attn.q, attn.k, attn.v))
        y = attention_by_hand(q, k, v, P[0], P[1])
        x = x + attn.o(y.transpose(1, 2).flatten(2))
        u, f = block.ln_2(x), minipeft.wrap.base_module(block.mlp)(block.ln_2(x))
        names = ("down.weight", "down.bias", "up.weight", "up.bias")
        W_1, b_1, W_2, b_2 = (tensors[f"blocks.{n}.mlp.adapter.{name}"] for name in names)
        x = x + f + scale * ((u @ W_1.T + b_1).clamp(min=0) @ W_2.T + b_2)  # (MAM 2)
    return model.head(model.ln_f(x))


@pytest.mark.parametrize("scale", [4.0, 1.5])
@pytest.mark.parametrize("reparameterize", [True, False])
def test_the_model_is_the_formulas_written_out(scale, reparameterize):
    """(MAM 1) (MAM 2)"""
    model, ids = tiny_model(ODD), tiny_ids(2, 7, ODD.vocab_size)
    randomize(MAMAdapter(4, 5, scale, reparameterize, 6).attach(model), 0.3)
    with torch.no_grad():
        close(model(ids), by_hand(model, ids, scale), EXACT)


def test_without_a_prefix_it_starts_as_the_base(model, ids):
    before = model(ids)
    MAMAdapter(prefix_length=0, bottleneck=5).attach(model)
    assert torch.equal(model(ids), before)


def test_with_a_prefix_it_starts_as_the_prefix_alone(model, ids):
    torch.manual_seed(3)
    prefix = PrefixTuning(4, bottleneck=6).attach(tiny_model())
    torch.manual_seed(3)
    MAM.attach(model)
    assert torch.equal(model(ids), prefix(ids))


def test_the_papers_sizes_are_the_defaults():
    mam = MAMAdapter()
    assert (mam.prefix_length, mam.bottleneck, mam.scale) == (30, 512, 4.0)


def test_the_count_is_the_formula():
    D, L = ODD.d_model, ODD.n_layer
    adapters = L * (2 * D * 5 + 5 + D)
    for technique, prefix in (
        (MAM, 4 * D + D * 6 + 6 + 2 * L * D * (6 + 1)),
        (MAMAdapter(4, 5, reparameterize=False), 2 * 4 * L * D),
        (MAMAdapter(0, 5), 0),
    ):
        with torch.device("meta"):
            model = technique.attach(GPT(ODD))
        assert minipeft.report(model).trained == technique.count(ODD) == adapters + prefix


def test_dropout_acts_on_both_halves_in_training_alone(model, ids):
    randomize(MAMAdapter(4, 5, reparameterize=False, dropout=0.5).attach(model))
    assert torch.equal(model(ids), model(ids))
    assert not torch.equal(model.train()(ids), model(ids))
    wrappers = model.attachments[0].wrappers()
    assert {w.drop.p for w in wrappers if hasattr(w, "drop")} == {0.5}
    assert {w.adapter.dropout for w in wrappers if hasattr(w, "adapter")} == {0.5}


def test_a_flattened_prefix_computes_the_same(model, ids):
    randomize(MAM.attach(model))
    logits = model(ids)
    flatten(model)
    assert model.attachments[0].technique == MAMAdapter(4, 5, 4.0, False, 6)
    assert minipeft.report(model).trained == model.attachments[0].technique.count(CONFIG)
    close(model(ids), logits, EXACT)
    assert MAMAdapter(prefix_length=0, bottleneck=5).flattened() is None


def test_merging_is_an_error_that_says_why(model):
    MAM.attach(model)
    with pytest.raises(ValueError, match="activation between"):
        minipeft.merge(model)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prefix_length": -1}, "prefix_length=-1"),
        ({"prefix_length": 64}, "prefix_length=64"),
        ({"bottleneck": 0}, "bottleneck=0"),
        ({"prefix_bottleneck": 0}, "bottleneck=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_bad_hyperparameters_are_errors_that_name_them(model, settings, message):
    with pytest.raises(ValueError, match=message):
        MAMAdapter(**settings).attach(model)
    assert not model.attachments


# -- the study of placement


def test_the_study_crosses_form_and_place_at_one_size():
    """(MAM 3): every entry trains nearly the same number; biases make the difference."""
    study = placement_study(bottleneck=16)
    places = {(t.placement, t.on, t.scale) for t in study.values() if isinstance(t, Adapter)}
    assert places == {
        ("pfeiffer", "attn", 1.0),
        ("parallel", "attn", 1.0),
        ("pfeiffer", "mlp", 1.0),
        ("parallel", "mlp", 1.0),
        ("parallel", "mlp", 4.0),
    }
    config = GPTConfig(d_model=128, n_layer=4)
    counts = [t.count(config) for t in study.values()]
    assert max(counts) < 1.04 * min(counts)  # a bias of D + m beside 2 D m weights: 3.5 %


def test_sequential_and_parallel_in_the_study_differ_in_what_the_adapter_reads_only():
    """(MAM 3): same activation, same start, so that the place alone decides."""
    study = placement_study(bottleneck=8)
    shapes = {n: t.shape() for n, t in study.items() if isinstance(t, Adapter)}
    plain = [s for n, s in shapes.items() if "scaled" not in n]
    assert all(s == plain[0] for s in plain) and len(plain) == 4
    assert plain[0]["activation"] == "relu" and plain[0]["init"] == "lora"


def test_every_entry_of_the_study_is_as_its_name_says(ids):
    study = placement_study(bottleneck=8)
    assert all(
        ("feed-forward" in n) == (t.on == "mlp") for n, t in study.items() if isinstance(t, Adapter)
    )
    assert all(
        ("parallel" in n) == (t.placement == "parallel")
        for n, t in study.items()
        if isinstance(t, Adapter)
    )
    assert study["mix and match"] == MAMAdapter(2, 6, reparameterize=False)
    for technique in study.values():
        model = technique.attach(tiny_model())
        assert model(ids).isfinite().all()


@pytest.mark.parametrize("settings", [{"bottleneck": 3}, {"prefix_share": 1}])
def test_a_budget_too_small_to_share_is_an_error(settings):
    with pytest.raises(ValueError, match="prefix_share"):
        placement_study(**settings)
