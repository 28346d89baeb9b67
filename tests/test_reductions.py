"""Where one technique is another: each reduction of the field's family tree, as an equality.

Everything is float64 and exact to 1e-12, a few hundred roundings of numbers of order one, unless a
test says otherwise.
"""

import copy

import pytest
import torch

import minipeft
from minipeft import IA3, AdaLoRA, DiffPruning, FullFineTuning, LoRA, ModeApproximation
from minipeft import technique as contract
from minipeft.selective.diff_pruning import FIXED, changes_of
from tests.tiny import randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def model():
    return tiny_model()


def layers_of(model):
    """{path: wrapper} of the last attachment."""
    return {s.path: s.replacement for s in contract.attachment_of(model).swaps}


# -- IA3


def test_ia3_at_ones_is_the_base(model):
    before = model(tiny_ids())
    assert torch.equal(IA3().attach(model)(tiny_ids()), before)


def test_ia3_is_a_diagonal_matrix_in_front_of_or_behind_a_projection(model):
    """W' = diag(l) W and b' = l * b for k and v; W_down diag(l) for the feed-forward layer."""
    by_hand = copy.deepcopy(model)
    randomize(IA3().attach(model))
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            linear = minipeft.wrap.resolve(by_hand, path)
            diagonal = torch.diag(layer.l)
            if path.endswith("down"):
                linear.weight.copy_(linear.weight @ diagonal)
            else:
                linear.weight.copy_(diagonal @ linear.weight)
                linear.bias.mul_(layer.l)
    torch.testing.assert_close(model(tiny_ids()), by_hand(tiny_ids()), **EXACT)


# -- AdaLoRA and mode approximation


def test_adalora_with_nothing_switched_off_is_lora(model):
    """B = P, A = diag(E) Q, and alpha / r_0 without the 1e-5 that keeps the ratio finite."""
    lora = LoRA(rank=5, alpha=7 * 5 / (5 + 1e-5)).attach(copy.deepcopy(model))
    randomize(AdaLoRA(init_rank=5, target_rank=5, alpha=7).attach(model))
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            other = layers_of(lora)[path]
            other.B.copy_(layer.P)
            other.A.copy_(layer.E[:, None] * layer.Q)
    torch.testing.assert_close(model(tiny_ids()), lora(tiny_ids()), **EXACT)


def test_adalora_with_the_budget_met_has_exactly_its_target_rank(model):
    technique = AdaLoRA(init_rank=6, target_rank=2, targets=("q", "v", "up", "down"))
    randomize(technique.attach(model))
    ids, steps = tiny_ids(), 6
    for step in range(1, steps + 1):
        model.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        contract.after_step(model, step, steps)
    ranks = [int(torch.linalg.matrix_rank(layer.delta())) for layer in layers_of(model).values()]
    assert sum(ranks) == 2 * len(ranks)


def test_mode_approximation_of_a_single_matrix_is_lora():
    """With K = 1: A = U^T and B = V diag(lambda * p)."""
    from minipeft.low_rank.lora import LoRALinear
    from minipeft.low_rank.mode_approximation import ModeLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5).double()
    mode, lora = ModeLinear(linear, 3, 1), LoRALinear(linear, 3, 1.0)
    with torch.no_grad():
        mode.factors.V.normal_()
        mode.factors.scale.normal_()
        lora.A.copy_(mode.factors.U.T)
        lora.B.copy_(mode.factors.V * mode.factors.scale * mode.p)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(mode(x), lora(x), **EXACT)


def test_mode_approximation_with_disjoint_mixtures_is_lora_in_every_matrix(model):
    """R = K r outer products, of which each matrix uses its own r."""
    rank, paths = 2, [f"blocks.{n}.attn.{t}" for n in range(2) for t in ("q", "v")]
    lora = randomize(LoRA(rank=rank, alpha=rank).attach(copy.deepcopy(model)))
    ModeApproximation(rank=rank * len(paths), targets=("q", "v")).attach(model)
    factors = layers_of(model)[paths[0]].factors
    with torch.no_grad():
        for k, path in enumerate(paths):
            mine = slice(rank * k, rank * (k + 1))
            factors.U[:, mine] = layers_of(lora)[path].A.T
            factors.V[:, mine] = layers_of(lora)[path].B
            layers_of(model)[path].p.zero_()
            layers_of(model)[path].p[mine] = 1
    torch.testing.assert_close(model(tiny_ids()), lora(tiny_ids()), **EXACT)


# -- diff pruning


@pytest.mark.parametrize("which", ["gate", "group"])
def test_diff_pruning_with_every_gate_shut_is_the_base(model, which):
    before = model(tiny_ids())
    randomize(DiffPruning().attach(model))
    assert not torch.equal(model(tiny_ids()), before)
    with torch.no_grad():
        for change in changes_of(contract.attachment_of(model)).values():
            getattr(change, which).fill_(-FIXED / change.speed)
    assert torch.equal(model(tiny_ids()), before)


def test_diff_pruning_with_every_gate_open_is_full_fine_tuning_of_the_change(model):
    full = randomize(FullFineTuning().attach(copy.deepcopy(model)))
    base = dict(model.named_parameters())
    changed = {n: p.detach() - base[n].detach() for n, p in full.named_parameters()}
    DiffPruning().attach(model)
    with torch.no_grad():
        for path, change in changes_of(contract.attachment_of(model)).items():
            change.w.copy_(changed[path.replace(".change.", ".")])
    torch.testing.assert_close(model(tiny_ids()), full(tiny_ids()), **EXACT)


def test_t_few_of_one_choice_is_the_language_model_loss(model):
    from minipeft.additive.t_few import Example, rows_of, t_few_losses

    rows = rows_of([Example((5, 6, 7), ((8, 9),))])
    total = sum(t_few_losses(model, rows).values())
    torch.testing.assert_close(total, model.loss(rows.ids, rows.labels), **EXACT)
