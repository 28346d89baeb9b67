"""The specification of minipeft/kernels/adapter.py; test_twins.py holds it against its
definition.
"""

import math

import pytest
import torch

from minipeft import Adapter
from minipeft.additive import bottleneck as defined
from minipeft.kernels.adapter import WIDEST, add_bottleneck, tiles
from tests.kernels.formulas import DOT_DTYPES, both, check_model, draw, wanting
from tests.kernels.harness import Traffic, far_rows, interpreted_only, nbytes

SIGMAS = {
    "relu": lambda z: z.clamp(min=0),
    "gelu": lambda z: z * 0.5 * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        z * 0.5 * (1 + torch.tanh((z + 0.044715 * z**3) * math.sqrt(2 / math.pi)))
    ),
    "swish": lambda z: z / (1 + torch.exp(-z)),
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


def formula(f, x, W_1, b_1, W_2, b_2, activation, scale):
    """(AdapterKernel 1) (AdapterKernel 2); autograd makes the gradients."""
    return f + scale * (SIGMAS[activation](x @ W_1.mT + b_1) @ W_2.mT + b_2)


def weights(D, m, dtype=torch.float32):
    W_1, b_1 = draw(m, D, dtype=dtype, like=D**-0.5), draw(m, dtype=dtype)
    W_2, b_2 = draw(D, m, dtype=dtype, like=m**-0.5), draw(D, dtype=dtype)
    return wanting(W_1, b_1, W_2, b_2)


@pytest.mark.parametrize("activation", SIGMAS)
def test_every_activation_and_its_slope(activation):
    """(AdapterKernel 1) (AdapterKernel 3), from -6 to 6 and far out, where tanh's exp overflows."""
    z = torch.cat([torch.linspace(-6, 6, 61), torch.tensor([-100.0, 100.0, 1e4])])
    x, f, b_2 = z[:, None], torch.zeros(len(z), 1), torch.zeros(1)
    one, b_1 = torch.ones(1, 1), torch.zeros(1)
    tensors = wanting(*(t.to(draw(1).device) for t in (f, x, one, b_1, one.clone(), b_2)))
    both(add_bottleneck, formula, [*tensors, activation, 1.0])


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    ("M", "D", "m"), [(1, 1, 1), (63, 31, 15), (32, 32, 16), (65, 33, 17), (3, 40, WIDEST)]
)
@pytest.mark.parametrize("together", [False, True], ids=["x beside f", "x is f"])
def test_result_and_gradients(M, D, m, together, dtype):
    """(AdapterKernel 2) (AdapterKernel 4) (AdapterKernel 5), sizes around the blocks'."""
    f, x = wanting(draw(M, D, dtype=dtype), draw(M, D, dtype=dtype))
    both(add_bottleneck, formula, [f, f if together else x, *weights(D, m, dtype), "swish", 1.5])


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_memory_may_lie_anyhow(layout):
    f, x, g = draw(4, 5, 7), draw(4, 5, 7), draw(4, 5, 7)
    if layout == "expanded":
        x, g = draw(1, 1, 7).expand(4, 5, 7), torch.ones((), device=x.device).expand(4, 5, 7)
    elif layout == "transposed":
        f, x, g = (draw(7, 5, 4).permute(2, 1, 0) for _ in range(3))
    else:
        f, x, g = (draw(4, 5, 14)[..., ::2] for _ in range(3))
    both(add_bottleneck, formula, [*wanting(f, x), *weights(7, 3), "gelu", 0.5], g)


def test_weights_may_be_transposed():
    f, x = wanting(draw(5, 7), draw(5, 7))
    W_1, b_1, W_2, b_2 = wanting(draw(7, 3).T, draw(6)[::2], draw(3, 7).T, draw(14)[::2])
    both(add_bottleneck, formula, [f, x, W_1, b_1, W_2, b_2, "relu", 1.0])


@interpreted_only
@pytest.mark.parametrize("which", ["f", "x", "g"])
@pytest.mark.parametrize("turned", [False, True])
def test_offsets_past_32_bits(which, turned):
    """Rows, or columns, 2^30 elements apart."""
    far = far_rows(draw(3, 3))
    given = {name: draw(3, 3) for name in "fxg"} | {which: far.T if turned else far}
    leaves = wanting(given["f"], given["x"])
    both(add_bottleneck, formula, [*leaves, *weights(3, 2), "tanh", 1.0], given["g"])


@interpreted_only
def test_each_number_is_read_and_written_once():
    """Forward and backward; the weights once for each block of rows."""
    M, D, m = 2 * tiles(draw(1), 3)[0] + 1, 37, 3
    f, x = wanting(draw(M, D), draw(M, D))
    W_1, b_1, W_2, b_2 = weights(D, m)
    with Traffic() as traffic:
        y = add_bottleneck(f, x, W_1, b_1, W_2, b_2, "relu", 1.0)
    assert traffic.loaded["t_x"] == traffic.loaded["t_f"] == traffic.stored["t_y"] == nbytes(x)
    assert traffic.loaded["t_w1"] == traffic.loaded["t_w2"] == 3 * nbytes(W_1)
    assert traffic.stored.keys() == {"t_y"}, "nothing in between is written"
    with Traffic() as traffic:
        torch.autograd.grad(y, [x], torch.ones_like(x))
    assert traffic.loaded["t_g"] == traffic.loaded["t_x"] == traffic.stored["t_dx"] == nbytes(x)
    assert traffic.stored["t_u"] == traffic.stored["t_dz"] == 4 * M * m
    assert traffic.loaded["t_w1"] == 2 * traffic.loaded["t_w2"] == 6 * nbytes(W_1)


@pytest.mark.parametrize("placement", ["houlsby", "parallel"])
def test_a_model_trains_as_without_it(placement, monkeypatch):
    technique = Adapter(placement=placement, bottleneck=3, layer_norms=False)
    check_model(technique, defined.add_bottleneck, monkeypatch)
