"""The specification of minipeft/compressed/layer_matching.py.

float64; 1e-12 covers a few hundred roundings of numbers of order one.
"""

import dataclasses
import math

import pytest
import torch

from minipeft import LoRA, PrefixTuning, prune_heads, prune_neurons
from minipeft.compressed.layer_matching import (
    attention_loss,
    check_layers,
    cosine_loss,
    hidden_loss,
    layer_map,
    matching_loss,
    projections,
    recording,
    student_from,
)
from minipeft.compressed.structured_pruning import widths
from minipeft.quantized.qlora import quantize_model
from tests.tiny import CONFIG, randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}
DEEP = dataclasses.replace(CONFIG, n_layer=4)


@pytest.fixture
def teacher():
    return tiny_model(DEEP)


@pytest.fixture
def student():
    return tiny_model(dataclasses.replace(CONFIG, n_layer=2), seed=5)


def test_the_map_takes_distilbert_s_layers():
    """(Match 1): DistilBERT took 0, 2, 4, 7, 9, 11 of BERT's twelve."""
    assert layer_map(6, 12) == (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize(
    ("sizes", "wanted"),
    [
        ((2, 4), (0, 3)),
        ((3, 4), (0, 2, 3)),
        ((3, 3), (0, 1, 2)),
        ((1, 5), (4,)),
        ((3, 6), (0, 3, 5)),
    ],
)
def test_the_map_goes_from_first_to_last_with_halves_up(sizes, wanted):
    assert layer_map(*sizes) == wanted


@pytest.mark.parametrize("sizes", [(0, 4), (5, 4)])
def test_a_student_has_at_least_one_and_no_more_layers_than_its_teacher(sizes):
    with pytest.raises(ValueError, match=f"student of {sizes[0]} layers"):
        layer_map(*sizes)


def test_a_student_of_all_layers_is_the_teacher(teacher):
    copy = student_from(teacher, 4)
    assert torch.equal(copy(tiny_ids()), teacher(tiny_ids()))


def test_a_student_s_layers_are_the_chosen_ones_and_are_copies(teacher):
    student = student_from(teacher, (0, 3))
    names = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        origin = names[name.replace("blocks.1.", "blocks.3.")]
        assert torch.equal(parameter, origin) and parameter is not origin
        assert parameter.data_ptr() != origin.data_ptr()
    assert student.head.weight is student.embed.token.weight
    assert student.config.n_layer == len(student.blocks) == 2
    assert student.embed.token.weight.dtype == torch.float64 and not student.training


@pytest.mark.parametrize("layers", [(0, 4), (-1, 2), ()])
def test_layers_that_do_not_exist_are_named(teacher, layers):
    with pytest.raises(ValueError, match="layers"):
        student_from(teacher, layers)


def test_a_teacher_with_a_technique_on_it_is_refused(teacher):
    LoRA(rank=2).attach(teacher)
    with pytest.raises(ValueError, match="merge or detach"):
        student_from(teacher, 2)


def test_layers_that_lost_heads_and_neurons_are_copied_as_they_are(teacher):
    prune_neurons(prune_heads(teacher, {0: [1], 3: range(4)}), {3: range(0, 128, 2)})
    student = student_from(teacher, 2)
    assert widths(student) == [widths(teacher)[0], widths(teacher)[3]]
    assert [w["n_head"] for w in widths(student)] == [3, 0]
    whole = student_from(teacher, 4)
    assert torch.equal(whole(tiny_ids()), teacher(tiny_ids()))


def test_a_quantised_teacher_is_refused(teacher):
    with pytest.raises(ValueError, match="NF4Linear"):
        student_from(quantize_model(teacher.float()), 2)


def test_a_map_of_the_user_s_must_fit(student, teacher):
    assert check_layers(None, student, teacher) == (0, 3)
    assert check_layers([3, 1], student, teacher) == (3, 1)
    for wrong in ((0,), (0, 4), (0, 1, 2)):
        with pytest.raises(ValueError, match="layers="):
            check_layers(wrong, student, teacher)


# -- looking inside


def test_a_record_holds_what_the_blocks_computed(teacher):
    with recording(teacher, (1, 3)) as seen:
        features = teacher.features(tiny_ids())
    assert set(seen.hidden) == {1, 3}
    assert torch.equal(teacher.ln_f(seen.hidden[3]), features)


def test_recorded_scores_are_those_of_attention(teacher):
    """softmax(scores) v, projected, is what the attention sub-layer returns."""
    attention, caught = teacher.blocks[2].attn, {}
    handle = attention.register_forward_hook(lambda m, a, out: caught.update(x=a[0], y=out))
    with recording(teacher, (2,)) as seen:
        teacher(tiny_ids())
    handle.remove()
    v = attention.split_heads(attention.v(caught["x"]))
    y = attention.o((seen.scores(2).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(y, caught["y"], **EXACT)
    assert (seen.scores(2)[..., 0, 1:] == -math.inf).all()  # the first query sees one key


def test_nothing_is_left_behind_even_after_an_error(teacher):
    with pytest.raises(RuntimeError), recording(teacher, (0, 1)):
        raise RuntimeError
    for module in teacher.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_recording_changes_no_bit(teacher):
    before = teacher(tiny_ids())
    with recording(teacher, range(4)):
        assert torch.equal(teacher(tiny_ids()), before)


def test_a_wrapped_teacher_is_seen_through_its_wrappers(teacher):
    PrefixTuning(prefix_length=3).attach(teacher)
    randomize(teacher)
    ids = tiny_ids()
    with recording(teacher, (0,)) as seen:
        teacher(ids)
    assert seen.scores(0).shape == (3, 4, 11, 3 + 11)


# -- the losses


def layers_of_numbers(count=2, n=5, width=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, n, width, generator=generator, dtype=torch.float64))


def test_hidden_loss_is_the_mean_square():
    """(Match 2)"""
    a, b = layers_of_numbers(), layers_of_numbers(seed=1)
    wanted = sum(((s - t) ** 2).sum() / (5 * 7) for s, t in zip(a, b)) / 2
    torch.testing.assert_close(hidden_loss(a, b), wanted, **EXACT)


def test_cosine_loss_is_one_minus_the_cosine():
    """(Match 3)"""
    a, b = layers_of_numbers(), layers_of_numbers(seed=1)
    total = 0.0
    for s, t in zip(torch.cat(a), torch.cat(b)):
        total += 1 - (s @ t) / ((s @ s).sqrt() * (t @ t).sqrt())
    torch.testing.assert_close(cosine_loss(a, b), total / 10, **EXACT)
    scaled = [3 * s for s in a]
    torch.testing.assert_close(cosine_loss(scaled, b), cosine_loss(a, b), **EXACT)


def test_attention_loss_is_the_mean_kl_from_the_teacher():
    """(Match 4), with keys that a query may not see."""
    s, t = (torch.stack(layers_of_numbers(4, 3, 5, seed)) for seed in (0, 1))
    for x in (s, t):
        x[:, 0, 2:] = -math.inf
    p, q = t.softmax(-1), s.softmax(-1)
    kl = torch.where(p > 0, p * (p / q).log(), 0).sum(-1)
    ours = attention_loss([s[:2], s[2:]], [t[:2], t[2:]])
    torch.testing.assert_close(ours, kl.mean(), **EXACT)


@pytest.mark.parametrize("loss", (hidden_loss, cosine_loss))
def test_the_teacher_gets_no_gradient(loss):
    a, b = layers_of_numbers(), layers_of_numbers(seed=1)
    for x in (*a, *b):
        x.requires_grad_()
    loss(a, b).backward()
    assert all(x.grad is not None for x in a) and all(x.grad is None for x in b)


@pytest.mark.parametrize("loss", (hidden_loss, cosine_loss, attention_loss))
def test_sums_are_in_float32_or_better(loss):
    shape = (4, 3, 5) if loss is attention_loss else (40, 7)
    ours, theirs = ([t.bfloat16() for t in layers_of_numbers(*shape, seed=s)] for s in (0, 1))
    exact = loss([t.double() for t in ours], [t.double() for t in theirs])
    found = loss(ours, theirs)
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=1e-5)  # some hundred float32 roundings


def test_layers_without_heads_have_no_attention_to_match():
    some, none = (
        torch.rand(3, 2, 5, generator=torch.Generator().manual_seed(0)),
        torch.zeros(3, 0, 5),
    )
    alone = attention_loss([some], [some.flip(2)])
    assert attention_loss([none], [none]) == 0
    torch.testing.assert_close(attention_loss([some, none], [some.flip(2), none]), alone / 2)


def test_what_cannot_be_paired_is_named():
    with pytest.raises(ValueError, match="projections"):
        hidden_loss(layers_of_numbers(width=7), layers_of_numbers(width=8))
    with pytest.raises(ValueError, match="heads"):
        attention_loss(*([torch.zeros(3, heads, 5)] for heads in (2, 4)))


ALL = {"hidden": 2.0, "cosine": 0.5, "attention": 3.0}


def matched(student, teacher, labels, weights, layers=(0, 3)):
    with recording(student, (0, 1)) as seen:
        student(tiny_ids())
    with torch.no_grad(), recording(teacher, layers) as teacher_seen:
        teacher(tiny_ids())
    loss = matching_loss(student, seen, teacher_seen, layers, labels, weights)
    return loss, seen, teacher_seen


@pytest.fixture
def labels():
    found = torch.zeros(3, 11, dtype=torch.int64)
    found[0, 6:] = found[1, :4] = -100
    return found


def test_the_parts_are_weighed_over_the_tokens_that_count(student, teacher, labels):
    loss, seen, other = matched(student, teacher, labels, ALL)
    counts, wanted = labels != -100, 0.0
    for k, m in ((0, 0), (1, 3)):
        s, t = seen.hidden[k][counts], other.hidden[m][counts]
        p, q = (r.scores(n).softmax(-1).transpose(1, 2)[counts] for r, n in ((other, m), (seen, k)))
        kl = torch.where(p > 0, p * (p / q).log(), 0).sum(-1).mean()
        cosine = 1 - (s * t).sum(-1) / (s.norm(dim=-1) * t.norm(dim=-1))
        wanted += (2 * ((s - t) ** 2).mean() + 0.5 * cosine.mean() + 3 * kl) / 2
    torch.testing.assert_close(loss, wanted, **EXACT)
    loss.backward()
    assert student.blocks[0].attn.q.weight.grad.abs().max() > 0


def test_the_teacher_s_own_copy_has_nothing_to_learn(teacher, labels):
    copy = student_from(teacher, (0, 1, 2, 3))
    with recording(copy, range(4)) as seen:
        copy(tiny_ids())
    with recording(teacher, range(4)) as other:
        teacher(tiny_ids())
    loss = matching_loss(copy, seen, other, range(4), labels, ALL)
    assert 0 <= loss.item() < 1e-14  # the cosine of a vector with itself, rounded


def test_no_label_that_counts_gives_zero(student, teacher, labels):
    loss, *_ = matched(student, teacher, torch.full_like(labels, -100), ALL)
    assert loss.item() == 0


def test_virtual_tokens_in_front_are_not_compared(student, teacher, labels):
    from minipeft import PromptTuning

    PromptTuning(prompt_length=2).attach(teacher)
    loss, seen, other = matched(student, teacher, labels, {"hidden": 1.0})
    assert other.hidden[0].shape[1] == 11 + 2
    counts = labels != -100
    pairs = ((0, 0), (1, 3))
    squares = [(seen.hidden[k] - other.hidden[m][:, 2:])[counts] ** 2 for k, m in pairs]
    torch.testing.assert_close(loss, torch.stack(squares).mean(), **EXACT)


def test_widths_that_differ_are_bridged_by_learned_projections(teacher, labels):
    narrow = tiny_model(dataclasses.replace(CONFIG, n_layer=2, d_model=20))
    before = set(narrow.state_dict())
    with projections(narrow, teacher):
        added = set(narrow.state_dict()) - before
        assert added == {"matching.0.weight", "matching.1.weight"}
        loss, seen, other = matched(narrow, teacher, labels, {"hidden": 1.0})
        counts, R = labels != -100, [r.weight for r in narrow.matching]
        wanted = [
            (seen.hidden[k][counts] @ R[k].T - other.hidden[m][counts]) ** 2
            for k, m in ((0, 0), (1, 3))
        ]
        torch.testing.assert_close(loss, torch.stack(wanted).mean(), **EXACT)
        loss.backward()
        assert all(r.grad.abs().max() > 0 for r in R)
    assert set(narrow.state_dict()) == before


def test_equal_widths_need_no_projection(student, teacher):
    before = set(student.state_dict())
    with projections(student, teacher):
        assert set(student.state_dict()) == before


def test_a_projection_keeps_a_vector_s_size(teacher):
    """R ~ N(0, 1 / D_s): |R x| / sqrt(D_t) is |x| / sqrt(D_s) on average, here within a tenth."""
    narrow = tiny_model(dataclasses.replace(CONFIG, n_layer=2, d_model=20))
    with projections(narrow, teacher):
        spread = torch.cat([r.weight.flatten() for r in narrow.matching]).std() * math.sqrt(20)
    assert spread.item() == pytest.approx(1, abs=0.1)  # 1,280 draws: three standard errors are 0.06
