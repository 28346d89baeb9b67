"""The specification of minipeft/kernels/adamw_8bit.py; test_twins.py holds it against its
definition in all dtypes and layouts.
"""

import pytest
import torch

from minipeft.dispatch import forced
from minipeft.kernels.adamw_8bit import BLOCKS, adamw_8bit_step, tables
from minipeft.quantized import adamw_8bit as defined
from minipeft.quantized.adamw_8bit import BLOCK, MAPS, AdamW8bit, quantize_blocks
from tests.kernels.harness import DEVICE, Traffic, close, interpreted_only

OPTIONS = (1e-2, (0.9, 0.99), 1e-8, 0.1)  # lr, betas, eps, weight decay
SIZES = [1, 255, 256, 257, BLOCKS * BLOCK + 3]


def draw(n):
    """w, g, and moments of mixed magnitudes, quantised."""
    w, g, m = torch.randn(3, n) * torch.logspace(-2, 1, n)
    v = torch.rand(n) * torch.logspace(-4, 2, n)
    moments = [x.to(DEVICE) for x in (*quantize_blocks(m, True), *quantize_blocks(v, False))]
    return w.to(DEVICE), g.to(DEVICE), *moments


def moments_after(g, m_codes, m_absmax, v_codes, v_absmax, betas):
    """Both moments before they are rounded, float64."""
    for new, codes, absmax, signed, b in (
        (g, m_codes, m_absmax, True, betas[0]),
        (g * g, v_codes, v_absmax, False, betas[1]),
    ):
        old = MAPS[signed].double().to(DEVICE)[codes.long()]
        old = old * absmax.double().repeat_interleave(BLOCK)[: len(codes)]
        yield b * old + (1 - b) * new.double()


def distance_to_threshold(moment, signed):
    """How far each x / n is from the nearest midpoint of the map, relative to it."""
    padded = torch.nn.functional.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
    scaled = (padded / padded.abs().amax(1, keepdim=True)).flatten()[: len(moment)]
    q = MAPS[signed].double().to(DEVICE)
    middle = (q[1:] + q[:-1]) / 2
    return ((scaled[:, None] - middle) / middle).abs().amin(1)


@pytest.mark.parametrize("n", SIZES)
def test_a_step_in_the_middle_of_training(n):
    """(Adam8Rows 1) (Adam8Rows 2) (Adam8Rows 3) (Adam8Rows 4), in float64. A code may differ from
    that of exact arithmetic by one where a float32 rounding decides.
    """
    w, g, *state = draw(n)
    t, (lr, betas, eps, decay) = 7.0, OPTIONS
    m, v = moments_after(g, *state, betas)
    step = lr / (1 - betas[0] ** t) * m / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    expected = (1 - lr * decay) * w.double() - step
    adamw_8bit_step(w, g, *state, t, *OPTIONS)
    close(w, expected.float())
    for (codes, absmax), moment, signed in zip((state[:2], state[2:]), (m, v), (True, False)):
        right, maxima = quantize_blocks(moment.float(), signed)
        close(absmax, maxima)
        off = (codes.int() - right.int()).abs()
        assert off.max() <= 1
        assert (distance_to_threshold(moment, signed)[off > 0] < 1e-5).all()


@pytest.mark.parametrize("n", [255, 300])
def test_missing_elements_of_the_last_block_are_zeros(n):
    """Code 0 of the signed map stands for -0.99: taken for an element, it is the maximum."""
    w, g, *state = draw(n)
    for codes in (state[0], state[2]):
        codes.fill_(int((MAPS[codes is state[0]] == 0).nonzero()))  # all moments are 0
    state[1].fill_(1e3)
    g.fill_(2.0**-9)
    adamw_8bit_step(w, g, *state, 1.0, 1e-2, (0.5, 0.5), 1e-8, 0.0)
    assert state[1].tolist() == [2.0**-10] * len(state[1])
    assert state[3].tolist() == [2.0**-19] * len(state[3])


def test_nothing_happens_to_moments_of_zero_without_a_gradient():
    w, g, *state = draw(300)
    before, zero = w.clone(), torch.zeros(2, device=DEVICE)
    state[1].copy_(zero)
    state[3].copy_(zero)
    adamw_8bit_step(w, torch.zeros_like(g), *state, 1.0, 1e-2, (0.9, 0.99), 1e-8, 0.0)
    assert torch.equal(w, before) and torch.equal(state[1], zero) and torch.equal(state[3], zero)
    for codes, signed in ((state[0], True), (state[2], False)):
        assert (MAPS[signed][codes.cpu().int()] == 0).all()


def test_of_two_equally_near_values_the_lower():
    """(Adam8Rows 4): moments that are midpoints of the map to the last bit."""
    w, _, *state = draw(255)
    middles = tables(torch.device(DEVICE))[1][:255]
    g = torch.cat([torch.ones(1, device=DEVICE), middles[1:]]) * 2
    state[1].zero_()
    state[3].zero_()
    adamw_8bit_step(w, g, *state, 1.0, 1e-2, (0.5, 0.5), 1e-8, 0.0)
    assert state[1] == 1 and state[0].tolist() == [255, *range(1, 255)]


def test_no_elements():
    adamw_8bit_step(*draw(1)[:2], *draw(1)[2:], 1.0, *OPTIONS)
    empty = [x[:0] for x in draw(1)]
    adamw_8bit_step(*empty, 1.0, *OPTIONS)


def test_the_tables_are_the_maps_and_their_midpoints():
    table = tables(torch.device(DEVICE)).cpu()
    for row, signed in ((0, True), (2, False)):
        q = MAPS[signed]
        assert torch.equal(table[row], q)
        assert torch.equal(table[row + 1, :255], (q[1:] + q[:-1]) / 2)


@interpreted_only
def test_sixteen_bytes_an_element():
    """And the tables, which stay in the first-level cache: two look-ups and two times eight
    thresholds of 4 bytes an element.
    """
    n = BLOCKS * BLOCK
    arguments = draw(n)
    with Traffic() as traffic:
        adamw_8bit_step(*arguments, 1.0, *OPTIONS)
    tables_ = traffic.loaded.pop("t_tables")
    assert tables_ <= 2 * 9 * 4 * n
    assert traffic.total <= (16 + 16 / BLOCK) * n


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
)
def test_the_optimizer_uses_it_and_agrees(dtype):
    """Ten steps of AdamW8bit on a tensor and its transpose, with the kernel and without."""
    start, gradients = torch.randn(9, 60), torch.randn(10, 9, 60)
    found = []
    for choice in ("on", "off"):
        p = torch.nn.Parameter(start.to(DEVICE, dtype).mT.contiguous().mT)
        optimizer = AdamW8bit([p], lr=1e-2, min_8bit_size=0)
        with forced(choice):
            for g in gradients:
                p.grad = g.to(DEVICE, dtype)
                optimizer.step()
        found.append(p.detach().float())
    # ten steps of 1e-2; a code that moved by one moves a moment by a few percent. A rounding of w
    # that falls to the other side, once or twice in ten steps, is twice an epsilon.
    torch.testing.assert_close(*found, rtol=4 * torch.finfo(dtype).eps, atol=1e-3)


def test_the_definition_still_computes_what_it_says():
    """The function behind the seam, without its twin, is dequantise, AdamW, quantise."""
    w, g, *state = draw(300)
    m, v = moments_after(g, *state, OPTIONS[1])
    with forced("off"):
        defined.adamw_8bit_step(w, g, *state, 7.0, *OPTIONS)
    close(state[1], quantize_blocks(m.float(), True)[1])
    close(state[3], quantize_blocks(v.float(), False)[1])
