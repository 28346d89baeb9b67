"""Several LoRAs on one model: exact sums, rows that are alone, and a model left as it was."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import minipeft
from minipeft import IA3, LayerNormTuning, LoRA
from minipeft.low_rank.lora import LoRALinear
from minipeft.low_rank.multi_lora import RowsLinear, padded, rows_forward, stack_weighted
from minipeft.technique import attachment_of, trainable_parameters
from minipeft.wrap import resolve
from tests.tiny import close, randomize, tiny_ids, tiny_model

EXACT = 1e-12  # float64: sums of a few hundred roundings of 1e-16, in another order

A = LoRA(rank=3, alpha=5, targets=("q", "v"))
B = LoRA(rank=4, alpha=7, targets=("q", "k", "down"), rank_stabilized=True)
C = LoRA(rank=2, alpha=9, targets=("q", "k", "v", "up"), share_qkv=True)


def with_adapters(dtype=torch.float64, **techniques):
    """The tiny model with these adapters, all off their start; all of them are active."""
    model = tiny_model(dtype=dtype)
    for name, technique in techniques.items():
        technique.attach(model, name=name)
    return randomize(model, std=0.3)


def deltas(model, name):
    """Path -> s B A, written out."""
    found = {}
    for swap in attachment_of(model, name).swaps:
        layer, technique = swap.replacement, attachment_of(model, name).technique
        power = 0.5 if technique.rank_stabilized else 1.0
        alpha = dict(technique.alpha_pattern).get(swap.path, technique.alpha)
        found[swap.path] = alpha / layer.A.shape[0] ** power * layer.B @ layer.A
    return found


def logits(model, ids=None):
    with torch.no_grad():
        return model(tiny_ids() if ids is None else ids)


def alone(model, name, ids):
    """Logits with this adapter (None: none) and no other."""
    active = [a.name for a in model.attachments if a.active]
    minipeft.set_adapter(model, [] if name is None else name)
    y = logits(model, ids)
    minipeft.set_adapter(model, active)
    return y


# -- the weighted sum


def test_stacking_is_the_sum_of_the_products():
    """(MultiLoRA 1) (MultiLoRA 2) (MultiLoRA 3)"""
    parts = [
        (w, torch.randn(r, 9).double(), torch.randn(11, r).double(), s)
        for w, r, s in ((0.5, 2, 3.0), (-1.25, 3, 0.7))
    ]
    A, B = stack_weighted(parts)
    assert A.shape == (5, 9)
    assert B.shape == (11, 5)
    expected = sum(w * s * B @ A for w, A, B, s in parts)
    close(B @ A, expected, EXACT)


@pytest.mark.parametrize(("out", "into"), [(11, 4), (4, 11), (5, 5)])
def test_a_rank_beyond_the_width_falls_back_to_the_width(out, into):
    """(MultiLoRA 4)"""
    parts = [(1.5, torch.randn(3, into).double(), torch.randn(out, 3).double(), 2.0)] * 3
    A, B = stack_weighted(parts)
    assert A.shape[0] == min(out, into)
    close(B @ A, sum(w * s * B @ A for w, A, B, s in parts), EXACT)


@given(
    wa=st.floats(-2, 2, allow_subnormal=False),
    wb=st.floats(-2, 2, allow_subnormal=False),
    techniques=st.permutations([A, B, C]),
)
def test_combined_deltas_are_the_weighted_sum_for_any_weights_ranks_and_targets(wa, wb, techniques):
    model = with_adapters(a=techniques[0], b=techniques[1])
    minipeft.combine(model, {"a": wa, "b": wb}, name="ab")
    a, b, ab = (deltas(model, name) for name in ("a", "b", "ab"))
    assert ab.keys() == a.keys() | b.keys()
    for path, delta in ab.items():
        zero = torch.zeros_like(delta)
        close(delta, wa * a.get(path, zero) + wb * b.get(path, zero), EXACT)


def test_the_new_scale_is_exactly_one_also_after_rank_stabilised_sources():
    model = with_adapters(a=A, b=B, c=C)
    minipeft.combine(model, {"a": 0.3, "b": 0.3, "c": 0.3}, name="abc")
    layers = [swap.replacement for swap in attachment_of(model, "abc").swaps]
    assert all(layer.scale == 1.0 for layer in layers)
    assert resolve(model, "blocks.0.attn.q").A.shape[0] == 3 + 4 + 2


def test_the_combined_adapter_takes_the_place_of_its_sources():
    model = with_adapters(a=A, b=B)
    both = logits(model)  # two active adapters are their sum with weights 1
    minipeft.combine(model, {"a": 1, "b": 1}, name="ab")
    assert [a.name for a in model.attachments if a.active] == ["ab"]
    close(logits(model), both, EXACT)


def test_what_is_no_source_stays_as_it_was():
    model = with_adapters(a=A, b=B, norm=LayerNormTuning())
    minipeft.set_adapter(model, ["a", "norm"])
    before = logits(model)
    minipeft.combine(model, {"a": 1}, name="a again")
    assert [a.name for a in model.attachments if a.active] == ["norm", "a again"]
    close(logits(model), before, EXACT)


def test_sharing_adapters_give_a_sharing_adapter():
    model = with_adapters(a=C, b=C)
    minipeft.combine(model, {"a": 2, "b": -1}, name="ab")
    q, v = (resolve(model, f"blocks.1.attn.{t}") for t in "qv")
    assert q.A is v.A
    assert attachment_of(model, "ab").technique.share_qkv


def test_sixteen_adapters_of_more_rank_than_width_combine_exactly():
    model = with_adapters(**{f"t{n}": A for n in range(16)})  # 16 x rank 3 on a width of 32
    weights = {f"t{n}": (-1) ** n / (n + 1) for n in range(16)}
    minipeft.combine(model, weights, name="sum")
    q = resolve(model, "blocks.0.attn.q")
    assert q.A.shape == (32, 32)
    expected = sum(w * deltas(model, n)["blocks.0.attn.q"] for n, w in weights.items())
    close(q.delta(), expected, EXACT)


def test_a_combined_adapter_merges_trains_and_travels(tmp_path):
    model = with_adapters(a=A, b=B)
    minipeft.combine(model, {"a": 0.5, "b": -2}, name="ab")
    before = logits(model)
    assert all(p.requires_grad for p in attachment_of(model, "ab").parameters().values())
    minipeft.save_adapter(model, tmp_path, name="ab")
    assert torch.equal(logits(minipeft.load_adapter(tiny_model(), tmp_path)), before)
    with minipeft.merged(model):
        close(logits(model), before, EXACT)


def test_combining_draws_no_random_numbers():
    model = with_adapters(a=A)
    state = torch.get_rng_state()
    minipeft.combine(model, {"a": 1}, name="b")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("weights", "name", "message"),
    [
        ({}, "ab", "name at least one"),
        ({"a": math.nan}, "ab", "nan"),
        ({"a": "0.5"}, "ab", "the weight of 'a' is '0.5', not a finite number"),
        ({"a": 1, "z": 1}, "ab", "'z'"),
        ({"a": 1, "norm": 1}, "ab", "LayerNormTuning"),
        ({"a": 1}, "a", "'a' is taken"),
    ],
)
def test_bad_sums_are_errors_and_leave_the_model(weights, name, message):
    model = with_adapters(a=A, norm=LayerNormTuning())
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        minipeft.combine(model, weights, name=name)
    assert [a.name for a in model.attachments] == ["a", "norm"]
    assert torch.equal(logits(model), before)


# -- rows


def test_rows_forward_is_each_row_s_own_formula():
    """(MultiLoRA 5) (MultiLoRA 6)"""
    x, h = torch.randn(3, 5, 7).double(), torch.randn(3, 5, 4).double()
    A, B = torch.randn(3, 2, 7).double(), torch.randn(3, 4, 2).double()
    s = torch.tensor([2.0, 0.0, -1.5]).double().view(-1, 1, 1)
    expected = torch.stack([h[b] + s[b] * x[b] @ A[b].T @ B[b].T for b in range(3)])
    close(rows_forward(h, x, A, B, s), expected, EXACT)
    with torch.no_grad():
        close(rows_forward(h.clone(), x, A, B, s), expected, EXACT)


def test_padding_adds_nothing_to_the_product():
    A, B = torch.randn(2, 7).double(), torch.randn(4, 2).double()
    long_A, long_B = padded(A, B, 5)
    assert long_A.shape == (5, 7)
    assert long_B.shape == (4, 5)
    assert torch.equal(long_A[:2], A)
    close(long_B @ long_A, B @ A, EXACT)


@pytest.mark.parametrize("grad", [True, False])
def test_each_row_equals_its_single_adapter_run(grad):
    model, ids = with_adapters(a=A, b=B, c=C), tiny_ids(batch=5)
    rows = ["b", None, "a", "c", "a"]
    expected = torch.cat([alone(model, name, ids[n : n + 1]) for n, name in enumerate(rows)])
    with minipeft.use_adapters(model, rows=rows), torch.set_grad_enabled(grad):
        close(model(ids).detach(), expected, EXACT)


def test_rows_in_float32_agree_with_single_runs():
    model, ids = with_adapters(torch.float32, a=A, b=B), tiny_ids(batch=2)
    expected = torch.cat([alone(model, n, ids[i : i + 1]) for i, n in enumerate("ab")])
    with minipeft.use_adapters(model, rows=["a", "b"]):
        close(logits(model, ids), expected, 1e-5)  # float32: roundings of 6e-8 over two blocks


def test_rows_of_none_are_the_base_bitwise():
    model, ids = with_adapters(a=A, b=B), tiny_ids(batch=2)
    with minipeft.use_adapters(model, rows=[None, None]):
        assert torch.equal(logits(model, ids), alone(model, None, ids))


def test_the_model_is_the_same_afterwards_also_after_an_error():
    model, ids = with_adapters(a=A, b=B), tiny_ids(batch=2)
    minipeft.set_adapter(model, "b")
    before, modules = logits(model, ids), [id(m) for m in model.modules()]
    with minipeft.use_adapters(model, rows=["a", "b"]):
        pass
    with pytest.raises(RuntimeError), minipeft.use_adapters(model, rows=["a", "b"]):
        raise RuntimeError
    assert [id(m) for m in model.modules()] == modules
    assert [a.name for a in model.attachments if a.active] == ["b"]
    assert torch.equal(logits(model, ids), before)


def test_other_techniques_stay_on_and_keep_their_place():
    """IA3 around a LoRA scales its branch too; inside use_adapters it must go on doing so."""
    model, ids = tiny_model(), tiny_ids(batch=2)
    A.attach(model, name="a")
    IA3().attach(model, name="outer")
    randomize(model, std=0.3)
    expected = logits(model, ids)
    with minipeft.use_adapters(model, rows=["a", "a"]):
        close(logits(model, ids), expected, EXACT)


def test_gradients_reach_each_row_s_own_adapter():
    model, ids = with_adapters(a=A, b=A, c=A), tiny_ids(batch=2)
    with minipeft.use_adapters(model, rows=["a", "b"]):
        model.loss(ids, ids).backward()
    got = {n: [p.grad for p in attachment_of(model, n).parameters().values()] for n in "abc"}
    assert all(g is not None and g.abs().max() > 0 for n in "ab" for g in got[n])
    assert all(g is None for g in got["c"])
    model.zero_grad()
    minipeft.set_adapter(model, "a")
    mine = trainable_parameters(model)
    (model.loss(ids[:1], ids[:1]) / 2).backward()  # the mean over two rows halves each row's part
    for parameter, expected in zip(mine, got["a"]):
        close(parameter.grad, expected, EXACT)


def test_dropout_falls_on_the_rows_that_have_it_in_training_only():
    dropping = LoRA(rank=3, alpha=5, dropout=0.5)
    model, ids = with_adapters(a=A, b=dropping), tiny_ids(batch=2)
    with minipeft.use_adapters(model, rows=["a", "b"]):
        still = logits(model, ids)
        assert torch.equal(logits(model, ids), still)
        model.train()
        trained = logits(model, ids)
    close(trained[0], still[0], EXACT)
    assert not torch.allclose(trained[1], still[1])


def test_an_adapter_switched_on_after_eval_does_not_drop():
    model = with_adapters(a=A, b=LoRA(rank=3, alpha=5, dropout=0.5)).train()
    minipeft.set_adapter(model, "a")
    model.eval()
    minipeft.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_generate_as_if_alone_with_the_cache_and_under_beams(beams):
    model, ids = with_adapters(a=A, b=B), tiny_ids(batch=3, time=5)
    rows, options = ["a", None, "b"], {"max_new_tokens": 7, "temperature": 0, "num_beams": beams}
    expected = []
    for n, name in enumerate(rows):
        minipeft.set_adapter(model, [] if name is None else name)
        expected.append(minipeft.generate(model, ids[n : n + 1], **options))
    with minipeft.use_adapters(model, rows=rows, beams=beams):
        assert torch.equal(minipeft.generate(model, ids, **options), torch.cat(expected))


@pytest.mark.parametrize("rows", ["ab", [], ["a", "z"], ["norm"]])
def test_bad_rows_are_errors_before_anything_changes(rows):
    model = with_adapters(a=A, norm=LayerNormTuning())
    before = logits(model)
    message = pytest.raises(ValueError, match=r"rows=|'z'|LayerNormTuning")
    with message, minipeft.use_adapters(model, rows=rows):
        pass
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_a_batch_of_another_size_names_both_numbers(batch):
    model = with_adapters(a=A)
    message = pytest.raises(ValueError, match=f"2 adapters.*batch has {batch} row")
    with minipeft.use_adapters(model, rows=["a", None]), message:
        logits(model, tiny_ids(batch=batch))


def test_inside_disabled_is_the_base_and_merge_and_save_say_why_not(tmp_path):
    model, ids = with_adapters(a=A, b=B), tiny_ids(batch=2)
    base = alone(model, None, ids)
    with minipeft.use_adapters(model, rows=["a", "b"]):
        with minipeft.disabled(model):
            assert torch.equal(logits(model, ids), base)
        with pytest.raises(ValueError, match="different adapters"):
            minipeft.merge(model)
        with pytest.raises(ValueError, match="name the one to save"):
            minipeft.save_adapter(model, tmp_path, name="use_adapters")


def test_the_rows_own_no_parameters():
    model = with_adapters(a=A, b=B)
    with minipeft.use_adapters(model, rows=["a", "b"]):
        rows = [m for m in model.modules() if isinstance(m, RowsLinear)]
        assert len(rows) == 2 * 4  # q, k, v and down in two blocks
        assert not any(isinstance(m, LoRALinear) for m in model.modules())
        assert all(not m.own_parameters() for m in rows)


def test_bfloat16_autocast_runs_and_is_near():
    model, ids = with_adapters(torch.float32, a=A, b=B), tiny_ids(batch=2)
    with minipeft.use_adapters(model, rows=["a", "b"]):
        exact = logits(model, ids)
        with torch.autocast("cpu", torch.bfloat16):
            near = logits(model, ids).float()
    close(near, exact, 0.05)  # bfloat16 keeps 8 bits: 0.4 % a rounding, a dozen of them in a row
