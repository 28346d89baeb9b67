"""Hard-concrete gates, the choice of the mask, and what a fixed sparse change keeps."""

import copy
import math

import pytest
import torch

import minipeft
from minipeft import DiffPruning, Head, PrefixTuning, PromptTuning, PTuning
from minipeft import technique as contract
from minipeft.selective import diff_pruning as diff
from minipeft.selective.diff_pruning import SparseChange, changes_of
from tests.tiny import CONFIG, randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few hundred roundings of numbers of order one
SIZE = sum(p.numel() for p in tiny_model().parameters())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attachment(model):
    return contract.attachment_of(model)


def changes(model):
    return changes_of(attachment(model))


def train(model, steps, lr=1e-3, decay=0.0):
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=lr, weight_decay=decay)
    contract.follow(optimizer, model, steps)
    model.train()
    for step in range(steps):
        ids = tiny_ids(seed=step)
        (model.loss(ids, ids.roll(-1, 1)) + (contract.extra_loss(model) or 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture
def model():
    return tiny_model()


# -- gates


def test_drawn_gates_by_the_formula():
    """(Diff 2) (Diff 3), number by number, the ends of u included."""
    alpha, u = normal(50) * 3, uniform(50, seed=1)
    u[0], u[1] = 0.0, 1.0
    for a, coin, z in zip(alpha.tolist(), u.tolist(), diff.drawn_gates(alpha, u).tolist()):
        coin = min(max(coin, 1e-4), 0.9999)
        s = 1 / (1 + math.exp(-(math.log(coin) - math.log(1 - coin) + a)))
        assert math.isclose(z, min(1.0, max(0.0, 3 * s - 1.5)), abs_tol=1e-12)


def test_expected_gates_by_the_formula():
    """(Diff 4)"""
    for a in (-9.0, -0.4, 0.0, 0.3, 5.0):
        by_hand = min(1.0, max(0.0, 3 / (1 + math.exp(-a)) - 1.5))
        found = diff.expected_gates(torch.tensor(a, dtype=torch.float64))
        assert math.isclose(found.item(), by_hand, abs_tol=1e-12)


@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.3])
def test_the_open_probability_is_the_share_of_draws_above_zero(alpha):
    """(Diff 5): 40,000 draws; 5 standard errors of a share are at most 5 * 0.5 / 200 = 0.0125."""
    drawn = diff.drawn_gates(torch.full((40_000,), alpha, dtype=torch.float64), uniform(40_000))
    share = (drawn > 0).double().mean()
    expected = diff.open_probability(torch.tensor(alpha, dtype=torch.float64))
    assert abs(share - expected) < 0.0125
    assert math.isclose(expected, 1 / (1 + math.exp(-(alpha - math.log(1.5 / 1.5)))))


def test_gates_of_decided_alphas_do_not_depend_on_the_coin():
    u = torch.tensor([0.0, 1e-9, 0.3, 1.0], dtype=torch.float64)
    for sign, gate in ((1, 1.0), (-1, 0.0)):
        alpha = torch.full_like(u, sign * diff.FIXED)
        assert torch.equal(diff.drawn_gates(alpha, u), torch.full_like(u, gate))


def test_gates_pass_gradcheck_between_their_kinks():
    """(Diff 2) (Diff 3) (Diff 4): gates strictly inside (0, 1), and the probability."""
    alpha = torch.tensor([-0.3, 0.1, 0.6], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.6, 0.55, 0.52], dtype=torch.float64)
    assert ((diff.drawn_gates(alpha, u) > 0) & (diff.drawn_gates(alpha, u) < 1)).all()
    assert torch.autograd.gradcheck(lambda a: diff.drawn_gates(a, u), alpha)
    assert torch.autograd.gradcheck(diff.expected_gates, alpha.detach().abs().requires_grad_())
    assert torch.autograd.gradcheck(diff.open_probability, alpha)


def random_change(structured=True, shape=(3, 5)):
    change = SparseChange(torch.zeros(shape, dtype=torch.float64), 10.0, structured)
    with torch.no_grad():
        change.w.copy_(normal(*shape))
        change.gate.copy_(normal(*shape, seed=1) / 10)
        if structured:
            change.group.fill_(0.06)
    return change


def test_a_structured_gate_is_the_product_of_its_own_and_its_groups():
    """(Diff 1) (Diff 7)"""
    change = random_change()
    own = (3 * torch.sigmoid(10 * change.gate) - 1.5).clamp(0, 1)
    group = 3 / (1 + math.exp(-0.6)) - 1.5
    torch.testing.assert_close(change.eval()(), own * group * change.w, **EXACT)
    probability = torch.sigmoid(10 * change.gate).sum() / (1 + math.exp(-0.6))
    torch.testing.assert_close(change.expected_open(), probability, **EXACT)


def test_an_unstructured_gate_stands_alone():
    change = random_change(structured=False)
    own = (3 * torch.sigmoid(10 * change.gate) - 1.5).clamp(0, 1)
    torch.testing.assert_close(change.eval()(), own * change.w, **EXACT)
    torch.testing.assert_close(
        change.expected_open(), torch.sigmoid(10 * change.gate).sum(), **EXACT
    )


def test_coins_fall_in_training_only():
    change = random_change().train()
    assert not torch.equal(change(), change())
    assert torch.equal(change.settled(), change.settled())
    assert torch.equal(change.eval()(), change.settled())
    torch.manual_seed(0)
    own = diff.drawn_gates(10 * change.gate, torch.rand(3, 5, dtype=torch.float64))
    group = diff.drawn_gates(10 * change.group, torch.rand((), dtype=torch.float64))
    torch.manual_seed(0)
    torch.testing.assert_close(change.train()(), own * group * change.w, **EXACT)


# -- the mask


def test_the_largest_changes_of_all_tensors_are_kept():
    """(Diff 8): by size, whatever the sign and the tensor, and exactly as many as asked for."""
    tensors = [torch.tensor([[0.1, -0.9], [0.4, 0.0]]), torch.tensor([0.5, -0.6, 0.2])]
    first, second = diff.largest(tensors, 3 / 7)
    assert first.tolist() == [[False, True], [False, False]]
    assert second.tolist() == [True, True, False]
    for share in (0.01, 0.2, 0.5, 1.0):
        kept = diff.largest([normal(7, 9), normal(5, seed=1)], share)
        assert sum(int(mask.sum()) for mask in kept) == int(share * 68)
    assert sum(int(m.sum()) for m in diff.largest([torch.zeros(6), torch.zeros(4)], 0.3)) == 3


def test_the_mask_keeps_the_share_and_the_size_of_the_gated_change(model):
    """(Diff 8) on a model: w is replaced by z * w, and the largest of them stay."""
    randomize(DiffPruning(sparsity=0.02).attach(model))
    settled = {p: c.settled().detach().clone() for p, c in changes(model).items()}
    contract.after_step(model, 1, 2)
    flat = torch.cat([s.abs().flatten() for s in settled.values()])
    threshold = flat.sort(descending=True).values[int(0.02 * SIZE) - 1]
    for path, change in changes(model).items():
        expected = torch.where(settled[path].abs() >= threshold, settled[path], 0.0)
        assert torch.equal(change.w, expected)
        assert torch.equal(change.eval()(), expected)


def test_after_the_mask_is_fixed_exactly_the_share_moves(model):
    train(DiffPruning(sparsity=0.01, fix_at=0.5).attach(model), 8, decay=0.1)
    moved = torch.cat([c().flatten() for c in changes(model).values()])
    assert len(moved) == SIZE and int((moved != 0).sum()) == int(0.01 * SIZE)
    for change in changes(model).values():
        assert torch.equal(change.w != 0, change.gate > 0)
        assert set(change.gate.abs().unique().tolist()) == {
            0.2
        }  # FIXED / gate_speed, momentum undone


def test_what_is_in_the_mask_goes_on_learning(model):
    DiffPruning(sparsity=0.05, fix_at=0.25).attach(model)
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=1e-2)
    model.train()
    seen = []
    for step in range(1, 9):
        ids = tiny_ids(seed=step)
        (model.loss(ids, ids.roll(-1, 1)) + (contract.extra_loss(model) or 0)).backward()
        optimizer.step()
        contract.after_step(model, step, 8)
        optimizer.zero_grad()
        seen.append({p: c.w.detach().clone() for p, c in changes(model).items()})
    masks = [{p: w != 0 for p, w in state.items()} for state in seen[1:]]
    for path in masks[0]:
        assert all(torch.equal(mask[path], masks[0][path]) for mask in masks[1:])
    assert any(not torch.equal(seen[1][p], seen[-1][p]) for p in seen[1])


@pytest.mark.parametrize("fix_at, steps, when", [(0.5, 8, 4), (1.0, 5, 5), (0.01, 8, 1)])
def test_the_mask_is_fixed_at_its_share_of_the_steps(model, fix_at, steps, when):
    randomize(DiffPruning(fix_at=fix_at).attach(model))
    fixed = []
    for step in range(1, steps + 1):
        contract.after_step(model, step, steps)
        fixed.append(bool(attachment(model).state.get("fixed")))
    assert fixed == [step >= when for step in range(1, steps + 1)]


# -- the penalty


@pytest.mark.parametrize("structured", [True, False])
def test_the_penalty_is_the_share_of_gates_expected_to_be_open(model, structured):
    """(Diff 5) (Diff 6) (Diff 7)"""
    randomize(DiffPruning(l0_weight=3.0, structured=structured).attach(model))
    total = 0.0
    for change in changes(model).values():
        open_ = torch.sigmoid(100 * change.gate)
        total += (open_ * torch.sigmoid(100 * change.group) if structured else open_).sum()
    torch.testing.assert_close(contract.extra_loss(model), 3.0 * total / SIZE, **EXACT)


def test_the_penalty_ends_when_the_mask_is_fixed_and_shuts_gates_before(model):
    DiffPruning(fix_at=1.0).attach(model)
    before = contract.extra_loss(model)
    train(model, 6, lr=1e-2)
    assert contract.extra_loss(model) is None
    assert 42.0 * 0.98 < before < 42.0  # sigmoid(5)^2 = 0.987 of the gates
    assert contract.extra_loss(DiffPruning(l0_weight=0).attach(tiny_model())) is None


def test_the_papers_weight_a_gate_is_ours_a_share():
    """1.25e-7 for each of BERT-large's 335,141,888 parameters."""
    assert round(1.25e-7 * 335_141_888) == DiffPruning().l0_weight


# -- the model


def test_the_start_is_the_base_with_any_coins(model):
    before = model(tiny_ids())
    DiffPruning().attach(model).train()
    assert torch.equal(model(tiny_ids()), before)


def test_every_parameter_of_the_base_has_one_change(model):
    shapes = sorted(tuple(p.shape) for p in model.parameters())
    DiffPruning().attach(model)
    assert sorted(tuple(c.w.shape) for c in changes(model).values()) == shapes


def test_the_changes_are_added_to_the_tensors_of_the_base(model):
    """(Diff 1): the same logits as a base whose tensors were moved by hand."""
    moved = copy.deepcopy(model)
    randomize(DiffPruning().attach(model))
    by_name = dict(moved.named_parameters())
    with torch.no_grad():
        for path, change in changes(model).items():
            by_name[path.replace(".change.", ".")] += change()
    torch.testing.assert_close(model(tiny_ids()), moved(tiny_ids()), **EXACT)
    ids = tiny_ids()
    torch.testing.assert_close(model.loss(ids, ids), moved.loss(ids, ids), **EXACT)


@pytest.mark.parametrize("mode", [True, False])
def test_merged_and_unmerged_agree_and_the_head_stays_tied(model, mode):
    randomize(DiffPruning().attach(model))
    before = model(tiny_ids())
    with minipeft.merged(model.train(mode)):  # no coins in what is merged, in any mode
        torch.testing.assert_close(model.eval()(tiny_ids()), before, **EXACT)
        assert model.head.weight is model.embed.token.weight
    assert torch.equal(model.eval()(tiny_ids()), before)
    minipeft.merge(model)
    assert model.head.weight is model.embed.token.weight
    torch.testing.assert_close(model(tiny_ids()), before, **EXACT)


@pytest.mark.parametrize("inside", [minipeft.IA3(), minipeft.QAT()], ids=["IA3", "QAT"])
def test_it_moves_the_base_below_what_was_there_before_when_it_is_merged_too(model, inside):
    """IA3 rescales the moved weight, QAT has one of its own."""
    randomize(inside.attach(model, "inside"))
    randomize(DiffPruning().attach(model, "diff"))
    randomize(minipeft.BitFit().attach(model, "biases"))  # whose biases are moved as well
    before = model.eval()(tiny_ids())
    torch.testing.assert_close(minipeft.merge(model)(tiny_ids()), before, **EXACT)


def test_it_stacks_on_another_technique_and_on_itself(model):
    torch.manual_seed(0)
    minipeft.LoRA(rank=2).attach(model, "lora")
    randomize(model)
    DiffPruning().attach(model, "one")
    randomize(model)
    DiffPruning(structured=False).attach(model, "two")
    randomize(model, seed=5)
    before = model(tiny_ids())
    torch.testing.assert_close(minipeft.merge(model)(tiny_ids()), before, **EXACT)
    assert model.head.weight is model.embed.token.weight


def test_a_classifier_stays_dense(model):
    DiffPruning().attach(Head(num_labels=3).attach(model, "head"))
    assert not any(path.startswith("head") for path in changes(model))
    assert model(tiny_ids()).shape == (3, 3)


@pytest.mark.parametrize("structured, groups", [(True, 2 * 16 + 4), (False, 0)])
def test_the_count_of_trained_parameters(model, structured, groups):
    technique = DiffPruning(structured=structured)
    assert technique.count(CONFIG) == 2 * SIZE + groups
    assert minipeft.report(technique.attach(model)).trained == 2 * SIZE + groups


# -- files


def test_the_file_holds_the_share_of_values_and_their_places(model, tmp_path):
    technique = DiffPruning(sparsity=0.01)
    train(technique.attach(model), 4)
    exported = technique.export(attachment(model))
    values = [t for n, t in exported.items() if n.endswith(".values")]
    indices = [t for n, t in exported.items() if n.endswith(".indices")]
    assert len(values) + len(indices) == len(exported)
    assert sum(v.numel() for v in values) == int(0.01 * SIZE)
    assert all(i.dtype == torch.int32 for i in indices)
    minipeft.save_adapter(model, tmp_path)
    again = minipeft.load_adapter(tiny_model(), tmp_path).eval()
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    assert torch.equal(again.train()(tiny_ids()), model(tiny_ids()))  # decided gates need no coin
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    full = attachment(model).tensors()
    assert all(torch.equal(t, full[n]) for n, t in attachment(again).tensors().items())


def test_what_was_loaded_can_be_tuned_on_under_its_mask(model):
    technique = DiffPruning(sparsity=0.01)
    train(technique.attach(model), 4)
    again = technique.attach(tiny_model())
    technique.restore(attachment(again), technique.export(attachment(model)))
    masks = {p: c.gate > 0 for p, c in changes(again).items()}
    train(again, 3, lr=1e-2)
    for path, change in changes(again).items():
        assert torch.equal(change.gate > 0, masks[path])
        assert not change.w[~masks[path]].any()


@pytest.mark.parametrize("bad", [torch.tensor([-1]), torch.tensor([10**6]), torch.tensor([1, 2])])
def test_indices_that_do_not_fit_are_refused(model, bad):
    technique = DiffPruning(sparsity=0.01)
    train(technique.attach(model), 2)
    tensors = technique.export(attachment(model))
    name = "blocks.0.attn.q.change.weight"
    tensors |= {f"{name}.indices": bad.int(), f"{name}.values": torch.ones(1).double()}
    again = technique.attach(tiny_model())
    before = {n: t.clone() for n, t in attachment(again).tensors().items()}
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q\.change\.weight"):
        technique.restore(attachment(again), tensors)
    assert all(torch.equal(t, before[n]) for n, t in attachment(again).tensors().items())


def test_before_the_mask_is_fixed_the_file_is_dense(model):
    technique = DiffPruning()
    randomize(technique.attach(model))
    tensors = technique.export(attachment(model))
    again = technique.attach(tiny_model())
    technique.restore(attachment(again), tensors)
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    assert not attachment(again).state["fixed"]


@pytest.mark.parametrize(
    "technique, message",
    [
        (DiffPruning(sparsity=0), "sparsity=0 must be a share"),
        (DiffPruning(sparsity=1.5), "sparsity=1.5"),
        (DiffPruning(sparsity=1e-7), "keeps none"),
        (DiffPruning(fix_at=0), "fix_at=0"),
        (DiffPruning(l0_weight=-1), "l0_weight=-1"),
        (DiffPruning(gate_speed=0), "gate_speed=0"),
    ],
)
def test_bad_hyperparameters_are_named(model, technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(model)


@pytest.mark.parametrize("soft", [PromptTuning(3), PTuning((2, 1)), PrefixTuning(3, False)])
def test_soft_prompts_stack_on_a_changed_embedding(soft, model):
    """They look at the token table for their start and its dtype, through whatever is on it."""
    DiffPruning().attach(model, "diff")
    soft.attach(model, "soft")
    randomize(model)
    ids = tiny_ids()
    assert model(ids).shape == (3, 11, 97)
    minipeft.detach(model)
    assert torch.equal(model(ids), tiny_model()(ids))
