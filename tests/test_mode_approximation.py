"""Shared CP factors against the paper's sum, and SVD, CP and Tucker against what defines them."""

import copy
import itertools

import pytest
import torch

import minipeft
from minipeft import technique as contract
from minipeft import wrap
from minipeft.low_rank import mode_approximation as mode
from minipeft.low_rank.mode_approximation import ModeApproximation
from tests.tiny import CONFIG, randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}  # float64: a few hundred roundings of numbers of order one
SETTLED = {"rtol": 0, "atol": 1e-6}  # where an iteration stops short of its limit


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def model():
    return tiny_model()


def adapted(model, **settings):
    """The model with random factors on it, and its layers by path."""
    torch.manual_seed(1)
    randomize(ModeApproximation(**settings).attach(model))
    return {s.path: s.replacement for s in contract.attachment_of(model).swaps}


# -- the technique


def test_the_start_is_the_base(model):
    before = model(tiny_ids())
    assert torch.equal(ModeApproximation(rank=7).attach(model)(tiny_ids()), before)


def test_the_change_is_the_papers_sum(model):
    """(Mode 1), entry by entry: the sum over r of v_or lambda_r p_kr u_ir."""
    layers = adapted(model, rank=3, targets=("q", "v"))
    factors = next(iter(layers.values())).factors
    for layer in layers.values():
        expected = torch.zeros(32, 32, dtype=torch.float64)
        for r in range(3):
            outer = torch.outer(factors.V[:, r], factors.U[:, r])
            expected += factors.scale[r] * layer.p[r] * outer
        torch.testing.assert_close(layer.delta(), expected, **EXACT)


def test_the_output_is_that_of_the_changed_matrix(model):
    """(Mode 2), with up, which is not square."""
    layers = adapted(model, rank=5, targets=("up",))
    x = normal(2, 3, 32)
    for layer in layers.values():
        f = layer.shared[0]
        h = x @ layer.inner.weight.T + layer.inner.bias
        expected = h + (f.scale * layer.p * (x @ f.U)) @ f.V.T
        torch.testing.assert_close(layer(x), expected, **EXACT)
        torch.testing.assert_close(layer.merged(layer.inner)(x), expected, **EXACT)


def test_the_pile_of_changes_is_a_cp_of_that_rank(model):
    """(Mode 3): rank R in each unfolding, and the factors rebuild it."""
    layers = adapted(model, rank=3, targets=("q", "k", "v"))
    pile = torch.stack([layer.delta().detach() for layer in layers.values()], -1)
    assert pile.shape == (32, 32, 6)
    factors = next(iter(layers.values())).factors
    p = torch.stack([layer.p for layer in layers.values()])
    rebuilt = mode.cp_tensor(factors.scale, [factors.V, factors.U, p])
    torch.testing.assert_close(pile, rebuilt.detach(), **EXACT)
    for axis in range(3):
        assert torch.linalg.matrix_rank(mode.unfold(pile, axis)) == 3


def test_the_factors_are_registered_once_and_shared_by_all(model):
    layers = adapted(model, rank=3)
    owners = [layer for layer in layers.values() if "factors" in layer._modules]
    assert len(owners) == 1
    assert all(layer.shared[0] is owners[0].factors for layer in layers.values())
    names = contract.attachment_of(model).tensors()
    assert sum(name.endswith(".U") for name in names) == 1
    assert len(names) == 3 + len(layers)


def test_copies_and_casts_keep_the_factors_shared(model):
    before = model(tiny_ids())
    layers = adapted(model, rank=3)
    twin = copy.deepcopy(model)
    theirs = contract.attachment_of(twin).wrappers()
    factors = theirs[0].factors
    assert factors is not next(iter(layers.values())).factors
    assert all(layer.shared[0] is factors for layer in theirs)
    with torch.no_grad():
        factors.V.zero_()
    assert torch.equal(twin(tiny_ids()), before)
    assert not torch.equal(model(tiny_ids()), before)
    single = copy.deepcopy(model).to(torch.float32)
    for layer in contract.attachment_of(single).wrappers():
        assert layer.shared[0].U.dtype == torch.float32
        assert layer.delta().dtype == torch.float32


def test_every_tensor_learns_within_two_steps(model):
    torch.manual_seed(0)
    ModeApproximation(rank=3).attach(model)
    parameters = contract.attachment_of(model).parameters()
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    seen = set()
    for step in range(2):
        optimizer.zero_grad()
        model.loss(tiny_ids(seed=step), tiny_ids(seed=9)).backward()
        seen |= {n for n, p in parameters.items() if p.grad.abs().max() > 0}
        if step == 0:  # V is 0, and everything else is seen through it
            assert seen == {"blocks.0.attn.q.factors.V"}
        optimizer.step()
    assert seen == set(parameters)


def test_merged_and_unmerged_agree(model):
    layers = adapted(model, rank=4, targets=("q", "o"))
    before = model(tiny_ids())
    plain = minipeft.merge(model)
    torch.testing.assert_close(plain(tiny_ids()), before, **EXACT)
    assert layers and not any(isinstance(m, wrap.Wrapper) for m in plain.modules())


@pytest.mark.parametrize(
    "targets, expected",
    [
        (("q", "k", "v"), 5 * (32 + 32) + 5 + 5 * 2 * 3),
        (("down",), 5 * (128 + 32) + 5 + 5 * 2),
        (("up",), 5 * (32 + 128) + 5 + 5 * 2),
    ],
)
def test_the_count_of_trained_parameters(model, targets, expected):
    technique = ModeApproximation(rank=5, targets=targets)
    assert technique.count(CONFIG) == expected
    assert minipeft.report(technique.attach(model)).trained == expected


def test_the_initial_values(model):
    torch.manual_seed(0)
    ModeApproximation(rank=64, targets=("q", "k", "v", "o")).attach(model)
    layers = contract.attachment_of(model).wrappers()
    factors = layers[0].factors
    assert factors.V.abs().max() == 0 and torch.equal(factors.scale, torch.ones(64).double())
    assert 0.98 * 32**-0.5 < factors.U.abs().max() <= 32**-0.5  # 2048 draws come near the end
    p = torch.stack([layer.p for layer in layers])  # 512 draws, deviation to 5 standard errors
    assert abs(p.std() / (2 / (64 + 8)) ** 0.5 - 1) < 5 / (2 * 512) ** 0.5


@pytest.mark.parametrize(
    "technique, message",
    [
        (ModeApproximation(targets=("q", "up")), "need one shape"),
        (ModeApproximation(rank=0), "rank=0"),
        (ModeApproximation(targets=("w",)), "unknown target 'w'"),
    ],
)
def test_bad_hyperparameters_are_named(model, technique, message):
    with pytest.raises(ValueError, match=message):
        technique.attach(model)


def test_layers_of_different_widths_are_refused(model):
    """Where heads are gone from one of them; the model is then as it was."""
    minipeft.prune_heads(model, {1: [0]})
    with pytest.raises(ValueError, match=r"\(24, 32\) on a pile of \(32, 32\)"):
        ModeApproximation().attach(model)
    assert type(model.blocks[0].attn.q) is torch.nn.Linear
    minipeft.prune_heads(model, {0: [2]})
    assert torch.equal(ModeApproximation().attach(model)(tiny_ids()), model(tiny_ids()))


# -- SVD, CP, Tucker


@pytest.mark.parametrize("shape", [(7, 5), (4, 9)])
def test_the_svd_is_the_best_matrix_of_its_rank(shape):
    """(Mode 4): the error is the rest of the spectrum (Eckart and Young)."""
    W = normal(*shape)
    spectrum = torch.linalg.svdvals(W)
    for rank in range(1, min(shape) + 1):
        U, s, V = mode.truncated_svd(W, rank)
        assert U.shape == (shape[0], rank) and V.shape == (shape[1], rank)
        error = (W - U @ torch.diag(s) @ V.T).norm()
        torch.testing.assert_close(error, spectrum[rank:].norm(), **EXACT)


def test_unfolding_and_mode_products_by_index():
    T, M = normal(3, 4, 5), normal(2, 4, seed=1)
    for i in range(3):
        for j in range(4):
            for k in range(5):
                assert mode.unfold(T, 0)[i, j * 5 + k] == T[i, j, k]
                assert mode.unfold(T, 1)[j, i * 5 + k] == T[i, j, k]
                assert mode.unfold(T, 2)[k, i * 4 + j] == T[i, j, k]
    by_index = torch.einsum("mj,ijk->imk", M, T)
    torch.testing.assert_close(mode.mode_product(T, M, 1), by_index, **EXACT)
    kron = torch.stack([torch.kron(normal(3, 2)[:, r], normal(4, 2)[:, r]) for r in range(2)], 1)
    torch.testing.assert_close(mode.khatri_rao(normal(3, 2), normal(4, 2)), kron, **EXACT)


def test_cp_rebuilds_a_tensor_of_its_rank():
    """(Mode 3) (Mode 5)"""
    a, b, c = normal(5, 3), normal(7, 3, seed=1), normal(4, 3, seed=2)
    T = sum(torch.einsum("i,j,k->ijk", a[:, r], b[:, r], c[:, r]) for r in range(3))
    weights, factors = mode.cp(T, 3, steps=300)
    torch.testing.assert_close(mode.cp_tensor(weights, factors), T, **SETTLED)
    for factor in factors:
        norms = factor.norm(dim=0)
        torch.testing.assert_close(norms, torch.ones_like(norms), **EXACT)


def test_the_error_of_cp_never_grows():
    """(Mode 5): every step is a least-squares solution with the others held fixed."""
    T = normal(5, 6, 4)
    errors = [float((mode.cp_tensor(*mode.cp(T, 3, steps=n)) - T).norm()) for n in (1, 2, 5, 20)]
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.95 * errors[0]


def test_cp_of_a_single_matrix_is_its_svd():
    """(Mode 4) (Mode 5): with one slice the best sum of R outer products is the SVD's."""
    W = normal(6, 5)
    U, s, V = mode.truncated_svd(W, 2)
    found = mode.cp_tensor(*mode.cp(W[..., None], 2, steps=500))[..., 0]
    torch.testing.assert_close(found, U @ torch.diag(s) @ V.T, **SETTLED)


def test_tucker_rebuilds_a_tensor_of_its_ranks():
    """(Mode 6)"""
    core, factors = normal(2, 3, 2), [normal(5, 2), normal(6, 3, seed=1), normal(4, 2, seed=2)]
    T = torch.einsum("abc,ia,jb,kc->ijk", core, *factors)
    core, factors = mode.tucker(T, (2, 3, 2))
    torch.testing.assert_close(mode.tucker_tensor(core, factors), T, **EXACT)
    for factor in factors:
        eye = torch.eye(factor.shape[1], dtype=torch.float64)
        torch.testing.assert_close(factor.T @ factor, eye, **EXACT)


def test_tucker_keeps_what_its_core_holds():
    """(Mode 6): the factors are orthonormal, so |T|^2 = |G|^2 + error^2."""
    T = normal(5, 6, 4)
    core, factors = mode.tucker(T, (3, 2, 2))
    error = (T - mode.tucker_tensor(core, factors)).norm()
    torch.testing.assert_close(error**2 + core.norm() ** 2, T.norm() ** 2, rtol=1e-12, atol=0)
    first = [mode.leading(mode.unfold(T, m), r) for m, r in enumerate((3, 2, 2))]
    start = torch.einsum("ijk,ia,jb,kc->abc", T, *first)
    assert core.norm() > start.norm() * (1 + 1e-4), "the iteration gained nothing"


@pytest.mark.parametrize(
    "action",
    [
        lambda: mode.truncated_svd(normal(3, 4), 4),
        lambda: mode.cp(normal(2, 2, 2), 0),
        lambda: mode.tucker(normal(3, 3, 3), (2, 4, 1)),
    ],
)
def test_a_rank_that_does_not_fit_is_named(action):
    with pytest.raises(ValueError, match=r"rank=[04]"):
        action()
