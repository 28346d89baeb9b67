"""The specification of minipeft/kernels/multi_lora.py; test_twins.py holds it against its
definition in all dtypes and layouts.
"""

import pytest
import torch

import minipeft
from minipeft import LoRA
from minipeft.dispatch import forced
from minipeft.kernels import multi_lora as kernels
from minipeft.kernels.multi_lora import (
    RANKS,
    STEP,
    TILE,
    expand_kernel,
    rows_branches,
    shrink_kernel,
    table_of,
)
from minipeft.low_rank import multi_lora as defined
from minipeft.low_rank.lora import LoRALinear
from tests.kernels import harness
from tests.kernels.harness import (
    DEVICE,
    Traffic,
    close,
    interpreted_only,
    layouts,
    nbytes,
    programs_from,
    reached,
    untouched,
)
from tests.tiny import tiny_ids, tiny_model


def draw(*shape):
    return torch.randn(*shape).to(DEVICE)


def adapters(ranks, into, out):
    """As, Bs, scales; a rank of 0 is a row without adapter."""
    As = [draw(r, into) if r else None for r in ranks]
    Bs = [draw(out, r) if r else None for r in ranks]
    return As, Bs, [float(n + 1) if r else 0.0 for n, r in enumerate(ranks)]


def launch(h, x, As, Bs, scales):
    with reached(*(t for t in (*As, *Bs) if t is not None)):
        return rows_branches(h, x, As, Bs, scales)


@pytest.mark.parametrize("ranks", [[1], [3, 0, 8], [RANKS + 1, 2, 64], [0, 0, 5]])
@pytest.mark.parametrize(("into", "out"), [(5, 7), (STEP + 3, TILE // 8 + 1), (STEP, 33)])
def test_each_row_has_its_own_branch(ranks, into, out):
    """h_b + s_b (x_b A_b^T) B_b^T in float64, two tokens a row; a row without adapter keeps h."""
    h, x = draw(len(ranks), 2, out), draw(len(ranks), 2, into)
    As, Bs, scales = adapters(ranks, into, out)
    expected = h.double()
    for b, s in enumerate(scales):
        if As[b] is not None:
            expected[b] += s * x[b].double() @ As[b].double().T @ Bs[b].double().T
    close(launch(h, x, As, Bs, scales), expected.float())


def test_without_gradients_the_result_is_h_itself():
    """As in the definition; with gradients on, h stays what it was. h may have gaps."""
    As, Bs, scales = adapters([2, 3], 5, 4)
    x = draw(2, 3, 5)
    for h in (draw(2, 3, 4), draw(2, 3, 8)[..., ::2]):
        before = h.clone()
        result = launch(h, x, As, Bs, scales)
        assert torch.equal(h, before) and not torch.equal(result, before)
        with torch.no_grad():
            again = launch(h, x, As, Bs, scales)
        assert again.data_ptr() == h.data_ptr() and torch.equal(h, result)


def test_adapters_may_have_gaps(monkeypatch):
    """Their addresses go into the table, so it must be that of a copy."""
    real, allowed = kernels.in_place, []

    def watched(tensors):
        allowed.extend(real(tensors))
        return allowed[-len(tensors) :]

    monkeypatch.setattr(kernels, "in_place", watched)
    monkeypatch.setattr(harness, "REACHED", allowed)
    h, x, (As, Bs, scales) = draw(2, 1, 4), draw(2, 1, 5), adapters([2, 3], 5, 4)
    As_wide, Bs_wide = ([layouts(t)["strided"] for t in ts] for ts in (As, Bs))
    expected = rows_branches(h, x, As, Bs, scales)
    assert torch.equal(rows_branches(h, x, As_wide, Bs_wide, scales), expected)


def test_adapters_begin_at_multiples_of_16_bytes():
    """As the kernel was told; those that do are not copied."""
    whole, shifted = draw(2, 4), draw(9)[1:].view(2, 4)
    assert shifted.data_ptr() % 16
    same, copy, none = kernels.in_place([whole, shifted, None])
    assert same is whole and none is None
    assert copy.data_ptr() % 16 == 0 and torch.equal(copy, shifted)


def test_the_table_keeps_every_bit_of_a_scale():
    """A half, a third, a negative one: float64 in, float32 in the kernel."""
    A, B, x = torch.ones(1, 1), torch.ones(1, 1), torch.ones(4, 1, 1)
    scales = [0.5, 1 / 3, -7.25, 1e-30]
    A, B, x = A.to(DEVICE), B.to(DEVICE), x.to(DEVICE)
    found = launch(torch.zeros_like(x), x, [A] * 4, [B] * 4, scales)
    assert torch.equal(found.view(-1).cpu(), torch.tensor(scales))
    table, largest = table_of([A, None], [B, None], [2.0, 0.0], x.device)
    assert table[:3].tolist() == [[A.data_ptr(), 0], [B.data_ptr(), 0], [1, 0]] and largest == 1


def test_where_a_gradient_is_wanted_the_definition_runs():
    h, x, (As, Bs, scales) = draw(2, 1, 4), draw(2, 1, 5), adapters([2, 0], 5, 4)
    refusal = defined.rows_branches.twin.refusal
    assert not refusal((h, x, As, Bs, scales), {}, "on")
    As[0].requires_grad_()
    assert refusal((h, x, As, Bs, scales), {}, "on")
    with torch.no_grad():
        assert not refusal((h, x, As, Bs, scales), {}, "on")
        assert refusal((h, x, [As[0].half(), None], Bs, scales), {}, "on"), "two dtypes"
        assert refusal((h, x, [None] * 2, [None] * 2, scales), {}, "on"), "nobody has one"


def test_a_model_s_rows_use_it_and_agree():
    """use_adapters with different ranks, a row without, and a shared one."""
    model = tiny_model(dtype=torch.float32).to(DEVICE)
    for name, rank in (("a", 2), ("b", 5)):
        LoRA(rank=rank, alpha=3, targets=("q", "down")).attach(model, name)
    tensors = []
    for module in model.modules():
        if isinstance(module, LoRALinear):
            torch.nn.init.normal_(module.B)
            tensors += [module.A, module.B]
    ids, rows = tiny_ids()[[0, 1, 2, 0]].to(DEVICE), ["a", None, "b", "a"]
    found = []
    for choice in ("on", "off"):
        served = minipeft.use_adapters(model.eval(), rows)
        with forced(choice), reached(*tensors), torch.no_grad(), served:
            found.append(model(ids))
    close(*found)
    with forced("off"), torch.no_grad(), minipeft.disabled(model):
        same = (model(ids) == found[1]).all(-1).all(-1)
    assert same.tolist() == [name is None for name in rows]


@interpreted_only
def test_adapters_are_read_where_they_lie():
    """h read and written once, x once for each RANKS of the largest rank, the adapters once a
    token; a row without adapter has no u.
    """
    tokens, into, out, ranks = 2, STEP, 24, [8, 0, 3]
    h, x, (As, Bs, scales) = draw(3, tokens, out), draw(3, tokens, into), adapters(ranks, into, out)
    given = [t for t in (*As, *Bs) if t is not None]
    with Traffic() as traffic:
        result = launch(h, x, As, Bs, scales)
    assert traffic.loaded["reached"] == tokens * nbytes(*given)
    assert traffic.loaded["t_h"] == nbytes(h) and traffic.stored["t_out"] == nbytes(result)
    assert traffic.loaded["t_x"] == nbytes(x)
    assert traffic.stored["t_u"] == traffic.loaded["t_u"] == 4 * tokens * sum(ranks)


@interpreted_only
def test_a_batch_may_have_more_than_two_billion_numbers():
    """Only the last token's programs run; where they read lies past int32."""
    width, rank = 2**16, 2
    m = 2**31 // width
    given, result = (untouched((m + 1) * width, torch.float16) for _ in range(2))
    As, Bs, scales = [torch.randn(rank, width).half()], [torch.randn(width, rank).half()], [1.0]
    given[m * width :] = x = torch.randn(width).half()
    u, how = torch.zeros(m + 1, rank), (1, m + 1, width, rank)
    table, _ = table_of(As, Bs, scales, x.device)
    with programs_from(m), reached(*As, *Bs):
        shrink_kernel[(1, 1)](given, table, u, *how, RANKS=RANKS, STEP=2**13)
        expand_kernel[(1, 8)](given, u, table, result, *how, RANK=rank, OUTPUTS=2**13)
    expected = x.float() @ As[0].float().T
    close(u[m], expected)
    close(result[m * width :], (x.float() + expected @ Bs[0].float().T).half())
