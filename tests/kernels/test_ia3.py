"""The specification of minipeft/kernels/ia3.py; test_twins.py holds it against its definition."""

import pytest
import torch

from minipeft import IA3
from minipeft.additive import ia3 as defined
from minipeft.kernels.ia3 import BLOCK_M, BLOCK_N, ROWS, rescale
from tests.kernels.formulas import ALL_DTYPES, both, check_model, draw, wanting
from tests.kernels.harness import DEVICE, Traffic, far_rows, interpreted_only, nbytes


def formula(h, l):
    """(IA3Kernel 1), coordinate by coordinate; autograd makes (IA3Kernel 2) and (IA3Kernel 3)."""
    return torch.stack([h[..., n] * l[n] for n in range(len(l))], -1)


@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(
    ("M", "N"),
    [(1, 1), (BLOCK_M - 1, 5), (BLOCK_M, BLOCK_N), (BLOCK_M + 1, BLOCK_N + 1), (ROWS + 3, 3)],
)
def test_result_and_gradients(M, N, dtype):
    """(IA3Kernel 1) (IA3Kernel 2) (IA3Kernel 3), sizes around the block's and the group's."""
    both(rescale, formula, wanting(draw(M, N, dtype=dtype), draw(N, dtype=dtype)))


@pytest.mark.parametrize("wants", ["h", "l"])
def test_one_of_the_two_may_be_frozen(wants):
    h, l = draw(2, 5, 7), draw(7)
    (h if wants == "h" else l).requires_grad_()
    both(rescale, formula, [h, l])


def test_the_gradient_s_sum_is_made_in_float32():
    """4,095 products of 1 and 1.001, added up in float16, would stop at 2,048; their sum is 4,099,
    which float16 does not have.
    """
    h, l = torch.full((4095, 2), 1.001, dtype=torch.float16, device=DEVICE), draw(2)
    (dl,) = torch.autograd.grad(rescale(h, l.requires_grad_()).sum(), [l])
    # float16 says 1.00098; its sum has 24 bits
    torch.testing.assert_close(dl, h.float().sum(0), rtol=1e-6, atol=0)


def test_a_vector_of_another_dtype_is_cast_as_the_definition_casts_it():
    h, l = draw(3, 7, dtype=torch.float16), draw(7).requires_grad_()
    y = rescale(h, l)
    assert y.dtype == torch.float16 and torch.equal(y, h * l.half())
    assert torch.autograd.grad(y.sum(), [l])[0].dtype == torch.float32


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "of a sum"])
def test_memory_may_lie_anyhow(layout):
    h, l = draw(6, 5, 7), draw(7)
    incoming = draw(6, 5, 7)
    if layout == "expanded":
        h = draw(1, 1, 7).expand(6, 5, 7)
    elif layout == "transposed":
        h, incoming = draw(5, 6, 7).transpose(0, 1), draw(7, 5, 6).permute(2, 1, 0)
    elif layout == "strided":
        h, incoming = draw(6, 5, 14)[..., 1::2], draw(6, 5, 21)[..., ::3]
    else:
        incoming = torch.ones((), device=DEVICE).expand(6, 5, 7)
    both(rescale, formula, wanting(h, l), incoming)


@interpreted_only
@pytest.mark.parametrize("which", ["rows of h", "columns of h", "rows of g", "columns of g"])
def test_offsets_past_32_bits(which):
    far = far_rows(draw(3, 3))
    far = far.T if which.startswith("columns") else far
    h, g = (far, draw(3, 3)) if which.endswith("h") else (draw(3, 3), far)
    both(rescale, formula, wanting(h, draw(3)), g)


@interpreted_only
def test_each_number_is_read_and_written_once():
    h, l = wanting(draw(ROWS + 2, BLOCK_N + 2), draw(BLOCK_N + 2))
    with Traffic() as traffic:
        y = rescale(h, l)
    assert traffic.loaded["t_h"] == traffic.stored["t_y"] == nbytes(h)
    assert traffic.total <= 1.07 * 2 * nbytes(h)  # l once for each of BLOCK_M rows: 1 / 32 more
    with Traffic() as traffic:
        torch.autograd.grad(y, [h, l], torch.ones_like(h))
    assert traffic.loaded["t_g"] == traffic.loaded["t_h"] == traffic.stored["t_dh"] == nbytes(h)
    assert traffic.stored["t_parts"] == 2 * nbytes(l)  # two groups of rows
    assert traffic.total <= 1.02 * 3 * nbytes(h)


@interpreted_only
def test_a_frozen_input_s_gradient_is_not_written():
    h, l = draw(9, 7), draw(7).requires_grad_()
    y = rescale(h, l)
    with Traffic() as traffic:
        torch.autograd.grad(y, [l], torch.ones_like(h))
    assert not traffic.stored["t_dh"]


def test_a_model_trains_as_without_it(monkeypatch):
    check_model(IA3(), defined.rescale, monkeypatch)
