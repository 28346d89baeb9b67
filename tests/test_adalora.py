"""AdaLoRA's branch, averages, scores, schedule and allocator against loops in float64, and what is
saved and refused.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import minipeft
from minipeft import technique as contract
from minipeft.low_rank import adalora, rank_allocator
from minipeft.low_rank.adalora import AdaLoRA
from minipeft.low_rank.triplets import AdaLoRALinear
from tests.tiny import CONFIG, randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few hundred roundings of numbers of order one
SMALL = AdaLoRA(init_rank=5, target_rank=3, alpha=7, targets=("q", "v", "down"))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def attachment(model):
    return contract.attachment_of(model)


def train(model, steps=10, follow=True, lr=1e-2):
    """Steps of a user's own loop, the allocator called by the optimizer."""
    optimizer = torch.optim.AdamW(contract.trainable_parameters(model), lr=lr)
    if follow:
        contract.follow(optimizer, model, steps)
    for step in range(steps):
        ids = tiny_ids(seed=step)
        (model.loss(ids, ids.roll(-1, 1)) + (contract.extra_loss(model) or 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def model():
    return tiny_model()


# -- the branch


def test_the_branch_is_p_e_q():
    """(AdaLoRA 1) (AdaLoRA 2), one triplet after the other."""
    inner = torch.nn.Linear(7, 5).double()
    layer = randomize_layer(AdaLoRALinear(inner, 3, adalora.adalora_scale(8, 3)))
    x = normal(2, 4, 7)
    expected = x @ inner.weight.T + inner.bias
    for i in range(3):
        value = (x @ layer.Q[i])[..., None] * layer.P[:, i] * layer.E[i]
        expected = expected + 8 / (3 + 1e-5) * value
    torch.testing.assert_close(layer(x), expected, **EXACT)
    torch.testing.assert_close(layer.merged(inner)(x), expected, **EXACT)
    written = 8 / (3 + 1e-5) * layer.P @ torch.diag(layer.E) @ layer.Q
    torch.testing.assert_close(layer.delta(), written, **EXACT)


def randomize_layer(layer):
    with torch.no_grad():
        for seed, weight in enumerate((layer.P, layer.E, layer.Q)):
            weight.copy_(normal(*weight.shape, seed=seed + 1))
    return layer


def test_the_scale_is_alpha_over_the_rank_at_the_start():
    """(AdaLoRA 2)"""
    assert SMALL.scale == 7 / (5 + 1e-5)


def test_the_start_is_the_base_and_e_alone_is_zero(model):
    before = model(tiny_ids())
    torch.manual_seed(0)
    AdaLoRA().attach(model)
    assert torch.equal(model(tiny_ids()), before)
    for layer in attachment(model).wrappers():
        assert torch.equal(layer.E, torch.zeros(12).double())
        # 32 x 12 draws: their deviation is 0.02 within 5 standard errors, 0.02 / sqrt(2 n)
        for weight in (layer.P, layer.Q):
            assert abs(weight.std() - 0.02) < 5 * 0.02 / (2 * weight.numel()) ** 0.5


# -- the penalties


def test_the_penalties_by_hand():
    """(AdaLoRA 3) and (AdaLoRA 4) over two matrices of different shapes."""
    pairs = [(normal(7, 3), normal(3, 5, seed=1)), (normal(4, 2, seed=2), normal(2, 9, seed=3))]
    norms = []
    for P, Q in pairs:
        r = Q.shape[0]
        for gram in (P.T @ P, Q @ Q.T):
            norms.append(sum((gram[i, j] - int(i == j)) ** 2 for i in range(r) for j in range(r)))
    triples = [(P, Q, torch.ones(Q.shape[0], dtype=torch.bool)) for P, Q in pairs]
    torch.testing.assert_close(adalora.paper_penalty(triples), sum(norms), **EXACT)
    expected = sum(n.sqrt() for n in norms) / 4
    torch.testing.assert_close(adalora.peft_penalty(triples), expected, **EXACT)


def test_the_penalty_of_orthonormal_factors_is_zero():
    """(AdaLoRA 3) (AdaLoRA 4)"""
    P, Q = torch.linalg.qr(normal(9, 4))[0], torch.linalg.qr(normal(7, 4))[0].T
    for penalty in adalora.PENALTIES.values():
        assert penalty([(P, Q, torch.ones(4, dtype=torch.bool))]) < 1e-12


def test_removed_triplets_do_not_count_in_the_penalty():
    P, Q, kept = normal(9, 4), normal(4, 7), torch.tensor([True, False, True, False])
    P[:, ~kept], Q[~kept] = 0, 0
    left = (P[:, kept], Q[kept], torch.ones(2, dtype=torch.bool))
    for penalty in adalora.PENALTIES.values():
        torch.testing.assert_close(penalty([(P, Q, kept)]), penalty([left]), **EXACT)


def test_the_penalty_joins_the_loss_with_its_weight(model):
    AdaLoRA(init_rank=3, target_rank=2, gamma=0.3).attach(model)
    layers = attachment(model).wrappers()
    norms = []
    for layer in layers:
        eye = torch.eye(3).double()
        norms += [(layer.P.T @ layer.P - eye).norm(), (layer.Q @ layer.Q.T - eye).norm()]
    expected = 0.3 * sum(norms) / len(norms)
    torch.testing.assert_close(contract.extra_loss(model), expected, **EXACT)
    minipeft.detach(model)
    assert contract.extra_loss(AdaLoRA(gamma=0).attach(model)) is None
    minipeft.detach(model)
    paper = contract.extra_loss(AdaLoRA(penalty="paper", gamma=1).attach(model))
    # every Gram matrix at the start is nearly 0, so each of 8 is about 12 away from the identity
    assert 8 * 12 * 0.9 < paper < 8 * 12 * 1.1


# -- the allocator over a model


def reference_run(parameters, gradients, technique, total):
    """The whole allocator written again, triplet by triplet: yields {path: set of kept} a step.

    parameters, gradients: per step {path: {"P", "E", "Q"}} after the optimizer's step.
    """
    M, U = {}, {}
    warm, final = int(technique.tinit * total), int(technique.tfinal * total)
    for t, (weights, grads) in enumerate(zip(parameters, gradients), 1):
        scores = []
        for path in weights:
            parts = {}
            for k in "PEQ":
                s = (weights[path][k] * grads[path][k]).abs()
                key, zero = (path, k), torch.zeros_like(s)
                M[key] = technique.beta1 * M.get(key, zero) + (1 - technique.beta1) * s
                spread = (s - M[key]).abs()
                U[key] = technique.beta2 * U.get(key, zero) + (1 - technique.beta2) * spread
                parts[k] = M[key] * U[key]
            for i in range(len(parts["E"])):
                score = parts["E"][i] + parts["P"][:, i].mean() + parts["Q"][i].mean()
                scores.append((float(score), path, i))
        n, r0, rT = len(weights), technique.init_rank, technique.target_rank
        if t <= warm:
            b = n * r0
        elif t >= total - final:
            b = n * rT
        else:
            b = int(n * rT + n * (r0 - rT) * (1 - (t - warm) / (total - warm - final)) ** 3)
        best = sorted(scores, reverse=True)[:b]
        yield {path: {i for _, p, i in best if p == path} for path in weights}


def snapshot(layer, what):
    return {letter: what(getattr(layer, letter)).clone() for letter in "PEQ"}


def test_the_allocator_against_a_loop_on_fixed_gradients(model):
    """(Allocator 1) to (Allocator 6) over all matrices: exactly the same triplets at every step."""
    technique = AdaLoRA(init_rank=4, target_rank=2, targets=("q", "up"), tinit=0.2, tfinal=0.3)
    randomize(technique.attach(model))
    layers = {s.path: s.replacement for s in attachment(model).swaps}
    total, seen, grads, chosen = 10, [], [], []
    for step in range(1, total + 1):
        for i, layer in enumerate(layers.values()):
            for j, weight in enumerate((layer.P, layer.E, layer.Q)):
                weight.grad = normal(*weight.shape, seed=100 * step + 10 * i + j)
                with torch.no_grad():  # the optimizer's step
                    weight -= 0.05 * weight.grad
        seen.append(
            {p: {k: getattr(l, k).detach().clone() for k in "PEQ"} for p, l in layers.items()}
        )
        grads.append({p: {k: getattr(l, k).grad.clone() for k in "PEQ"} for p, l in layers.items()})
        contract.after_step(model, step, total)
        chosen.append({p: set(l.E.nonzero()[:, 0].tolist()) for p, l in layers.items()})
    for step, expected in enumerate(reference_run(seen, grads, technique, total), 1):
        if step <= 7:  # later the choice stands
            assert chosen[step - 1] == expected, f"step {step}"
    assert chosen[7:] == [chosen[6]] * 3
    assert len({str(c) for c in chosen}) > 3, "the schedule was never at work"


def test_a_switched_off_triplet_can_come_back_until_the_choice_stands(model):
    SMALL.attach(model)
    layers = attachment(model).wrappers()
    randomize(model)
    mask = torch.tensor([True, False, True, True, True])
    with torch.no_grad():
        rank_allocator.switch_off([layers[0]], mask, for_good=False)
    assert layers[0].E[1] == 0 and layers[0].P[:, 1].abs().max() > 0
    model.loss(tiny_ids(), tiny_ids()).backward()
    assert layers[0].E.grad[1] != 0
    with torch.no_grad():
        rank_allocator.switch_off([layers[0]], mask, for_good=True)
    assert layers[0].P[:, 1].abs().max() == layers[0].Q[1].abs().max() == 0
    assert torch.equal(layers[0].kept, mask)


def test_at_the_end_the_active_ranks_are_exactly_the_budget(model):
    train(SMALL.attach(model))
    ranks = rank_allocator.ranks(attachment(model))
    assert sum(ranks.values()) == 3 * len(ranks)
    assert len(set(ranks.values())) > 1, "every matrix got the same rank; nothing was allocated"


def test_the_allocation_happens_every_delta_t_steps(model):
    technique = AdaLoRA(4, 2, targets=("q",), tinit=0, tfinal=0.2, delta_t=3)
    randomize(technique.attach(model))
    active = []
    for step in range(1, 11):
        model.loss(tiny_ids(seed=step), tiny_ids()).backward()
        contract.after_step(model, step, 10)
        active.append(sum(rank_allocator.ranks(attachment(model)).values()))
    assert active[:2] == [8, 8] and active[2] == active[3] == active[4] < 8
    assert active[7] == 4  # T - t_f = 8, whether 3 divides it or not


def test_our_loop_and_a_users_optimizer_allocate_the_same(model):
    ours, theirs = copy.deepcopy(model), model
    torch.manual_seed(0)
    SMALL.attach(ours)
    torch.manual_seed(0)
    SMALL.attach(theirs)
    train(theirs)
    optimizer = torch.optim.AdamW(contract.trainable_parameters(ours), lr=1e-2)
    for step in range(10):
        ids = tiny_ids(seed=step)
        (ours.loss(ids, ids.roll(-1, 1)) + contract.extra_loss(ours)).backward()
        optimizer.step()
        contract.after_step(ours, step + 1, 10)
        optimizer.zero_grad()
    for a, b in zip(attachment(ours).tensors().values(), attachment(theirs).tensors().values()):
        assert torch.equal(a, b)


def test_halves_are_scored_in_float32(model):
    """A weight times its gradient, and that times its uncertainty, are 0 in float16: then the
    first triplets would stay, whatever they are worth.
    """
    randomize(AdaLoRA(4, 2).attach(model.half()))
    groups, state = rank_allocator.groups_of(attachment(model)), {}
    weights = [w for g in groups.values() for _, w in rank_allocator.weights_of("", g)]
    generator = torch.Generator().manual_seed(0)
    for w in weights:
        w.grad = (1e-4 * torch.randn(w.shape, generator=generator)).half()
    with torch.no_grad():
        found = rank_allocator.scores_after_step(state, groups, 0.85, 0.85)
        assert {t.dtype for t in state.values()} == {torch.float32}
        for w in weights:
            gradient, w.grad = w.grad, None
            w.data, w.grad = w.data.double(), gradient.double()
        wanted = rank_allocator.scores_after_step({}, groups, 0.85, 0.85)
    for path, scores in found.items():
        # a dozen roundings of float32
        torch.testing.assert_close(scores.double(), wanted[path], rtol=1e-5, atol=0)


def test_shared_qkv_is_scored_as_one_matrix(model):
    """(Allocator 4) with P the three blocks on top of each other."""
    technique = AdaLoRA(4, 2, targets=("q", "k", "v"), share_qkv=True)
    randomize(technique.attach(model))
    groups = rank_allocator.groups_of(attachment(model))
    assert list(groups) == ["blocks.0.attn.q", "blocks.1.attn.q"]
    model.loss(tiny_ids(), tiny_ids()).backward()
    scores = rank_allocator.scores_after_step({}, groups, 0.85, 0.85)
    q, k, v = groups["blocks.0.attn.q"]
    assert q.Q is k.Q is v.Q and q.E is k.E is v.E
    P, gP = torch.cat([q.P, k.P, v.P]), torch.cat([q.P.grad, k.P.grad, v.P.grad])

    def first(w, g):  # M U after one step from zero
        s = (w * g).abs()
        return 0.15 * s * 0.15 * (s - 0.15 * s)

    expected = first(q.E, q.E.grad) + first(P, gP).mean(0) + first(q.Q, q.Q.grad).mean(1)
    torch.testing.assert_close(scores["blocks.0.attn.q"], expected, **EXACT)
    contract.after_step(model, 1, 1)
    for layers in groups.values():
        assert torch.equal(layers[0].kept, layers[1].kept)
        assert torch.equal(layers[0].kept, layers[2].kept)
        for layer in layers:
            assert layer.P[:, ~layer.kept].abs().max() == 0
    assert sum(rank_allocator.ranks(attachment(model)).values()) == 4


# -- counts


@pytest.mark.parametrize("targets, share", [(("q", "v"), False), (("q", "k", "v", "up"), True)])
def test_the_count_of_trained_parameters(model, targets, share):
    technique = AdaLoRA(6, 3, targets=targets, share_qkv=share)
    D = 32
    triplet = {"q": D + D + 1, "k": D + D + 1, "v": D + D + 1, "up": D + 128 + 1}
    expected = 2 * 6 * sum(triplet[t] for t in targets)
    if share:  # two of the three Q and E are the first one's
        expected -= 2 * 6 * 2 * (D + 1)
    assert technique.count(CONFIG) == expected
    assert minipeft.report(technique.attach(model)).trained == expected


# -- files, and what is refused


def test_the_file_holds_the_final_ranks_only(model, tmp_path):
    train(SMALL.attach(model))
    exported = SMALL.export(attachment(model))
    ranks = rank_allocator.ranks(attachment(model))
    assert min(ranks.values()) < 5
    for path, rank in ranks.items():
        assert exported[f"{path}.P"].shape[1] == rank
        assert exported[f"{path}.E"].shape == (rank,)
        assert exported[f"{path}.Q"].shape[0] == rank
    again = SMALL.attach(tiny_model())
    SMALL.restore(attachment(again), exported)
    assert torch.equal(again(tiny_ids()), model(tiny_ids()))
    for name, tensor in attachment(model).tensors().items():
        assert torch.equal(attachment(again).tensors()[name], tensor)


def test_a_file_that_does_not_fit_is_refused_and_nothing_is_loaded(model):
    train(SMALL.attach(model))
    good = SMALL.export(attachment(model))
    fresh = SMALL.attach(tiny_model())
    before = {n: t.clone() for n, t in attachment(fresh).tensors().items()}
    name = "blocks.0.attn.q.Q"
    for wrong in (
        {n: t for n, t in good.items() if n != name},
        {n: t for n, t in good.items() if n != "blocks.0.attn.q.kept"},
        good | {name: torch.zeros(2, 99).double()},
    ):
        with pytest.raises(ValueError, match=r"blocks\.0\.attn\.q"):
            SMALL.restore(attachment(fresh), wrong)
        for n, t in attachment(fresh).tensors().items():
            assert torch.equal(t, before[n])


@pytest.mark.parametrize("copied", [False, True])
def test_training_without_the_allocator_is_an_error_when_saving_or_merging(model, copied):
    train(SMALL.attach(model), steps=2, follow=False)
    model = copy.deepcopy(model) if copied else model
    for leave in (
        lambda: SMALL.export(attachment(model)),
        lambda: minipeft.merge(model),
        lambda: minipeft.merged(model).__enter__(),
    ):
        with pytest.raises(ValueError, match="allocator never ran"):
            leave()
    assert attachment(model).active and model.attachments  # the refused merge changed nothing


def test_an_untrained_or_loaded_adapter_may_be_saved_and_merged(model):
    SMALL.attach(model)
    tensors = SMALL.export(attachment(model))
    randomize(model)
    SMALL.restore(attachment(model), tensors)
    minipeft.merge(model)


def test_the_trap_holds_in_a_copy_trained_later(model):
    model = copy.deepcopy(SMALL.attach(model))
    train(model, steps=1, follow=False)
    with pytest.raises(ValueError, match="allocator never ran"):
        minipeft.merge(model)


def test_cleared_gradients_are_an_error(model):
    SMALL.attach(model)
    with pytest.raises(ValueError, match=r"before zero_grad"):
        contract.after_step(model, 1, 10)


def test_a_window_without_a_step_is_an_error(model):
    technique = AdaLoRA(tinit=5, tfinal=5)
    assert technique.window(11) == (5, 5)
    with pytest.raises(ValueError, match="of 10 in all"):
        technique.window(10)
    assert AdaLoRA(tinit=0.25, tfinal=3).window(20) == (5, 3)


@pytest.mark.parametrize(
    "technique, message",
    [
        (AdaLoRA(init_rank=4, target_rank=5), "target_rank=5 must be from 1 to init_rank=4"),
        (AdaLoRA(target_rank=0), "target_rank=0"),
        (AdaLoRA(init_rank=33, target_rank=8), "init_rank=33 must be from 1 to 32"),
        (AdaLoRA(beta1=1.0), "beta1=1.0"),
        (AdaLoRA(beta2=0), "beta2=0"),
        (AdaLoRA(penalty="l2"), "penalty='l2'"),
        (AdaLoRA(delta_t=0), "delta_t=0"),
        (AdaLoRA(gamma=-1), "gamma=-1"),
        (AdaLoRA(targets=("x",)), "unknown target 'x'"),
        (AdaLoRA(dropout=1.0), "dropout=1.0"),
        (AdaLoRA(targets=("q", "v"), share_qkv=True), "share_qkv needs"),
    ],
)
def test_bad_hyperparameters_are_named(model, technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(model)


def test_dropout_falls_on_what_q_reads_and_only_in_training():
    inner = torch.nn.Linear(6, 4).double()
    layer = randomize_layer(AdaLoRALinear(inner, 2, 1.0, dropout=0.5))
    x = normal(3, 6)
    torch.manual_seed(0)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(0)
    expected = inner(x) + dropped @ layer.delta().T
    torch.testing.assert_close(layer.train()(x), expected, **EXACT)
    torch.testing.assert_close(layer.eval()(x), inner(x) + x @ layer.delta().T, **EXACT)
