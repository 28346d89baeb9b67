"""The specification of minipeft/kernels/lora.py; test_twins.py holds it against its definition."""

import pytest
import torch

from minipeft import LoRA
from minipeft.kernels.lora import TILES, lora_linear, lora_product
from minipeft.low_rank import lora as defined
from tests.kernels.formulas import DOT_DTYPES, both, check_model, draw, wanting
from tests.kernels.harness import Traffic, close, far_rows, interpreted_only, nbytes


def formula(x, W, b, A, B, s):
    """(LoRAKernel 1); autograd makes (LoRAKernel 2) and (LoRAKernel 3)."""
    return s * ((x @ A.mT) @ B.mT) + x @ W.mT + (0 if b is None else b)


def layer(N, K, r, dtype=torch.float32, bias=True):
    """W, b, A, B: the two that train want a gradient."""
    W, b = draw(N, K, dtype=dtype, like=K**-0.5), draw(N, dtype=dtype)
    A, B = wanting(draw(r, K, dtype=dtype, like=K**-0.5), draw(N, r, dtype=dtype, like=r**-0.5))
    return W, b if bias else None, A, B


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize("sizes", ["one", "below a tile", "a tile", "above a tile"])
def test_result_and_gradients(sizes, dtype):
    """(LoRAKernel 1) (LoRAKernel 2) (LoRAKernel 3), M, N, K and r around the tile's."""
    block_m, block_n, block_k = TILES[dtype.itemsize]
    M, N, K, r = {
        "one": (1, 1, 1, 1),
        "below a tile": (block_m - 1, block_n - 1, block_k - 1, 15),
        "a tile": (block_m, block_n, block_k, 16),
        "above a tile": (block_m + 1, block_n + 1, block_k + 1, 17),
    }[sizes]
    (x,) = wanting(draw(M, K, dtype=dtype))
    both(lora_linear, formula, [x, *layer(N, K, r, dtype, bias=sizes != "a tile"), 1.5])


def test_a_frozen_input_wants_no_gradient():
    both(lora_linear, formula, [draw(2, 5, 7), *layer(11, 7, 3), 0.5])


def test_with_b_zero_it_is_the_base():
    x = draw(5, 7)
    W, b, A, B = layer(11, 7, 3)
    close(lora_linear(x, W, b, A, torch.zeros_like(B), 2.0).detach(), x @ W.T + b)


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided", "weights transposed"])
def test_memory_may_lie_anyhow(layout):
    x, g = draw(4, 5, 7), draw(4, 5, 11)
    W, b, A, B = layer(11, 7, 3)
    if layout == "expanded":
        x, g = draw(1, 1, 7).expand(4, 5, 7), torch.ones((), device=x.device).expand(4, 5, 11)
    elif layout == "transposed":
        x, g = draw(5, 4, 7).transpose(0, 1), draw(11, 5, 4).permute(2, 1, 0)
    elif layout == "strided":
        x, g, b = draw(4, 5, 14)[..., ::2], draw(4, 5, 22)[..., 1::2], draw(22)[::2]
    else:
        W, (A, B) = draw(7, 11).T, wanting(draw(7, 3).T, draw(3, 11).T)
    both(lora_linear, formula, [*wanting(x), W, b, A, B, 1.0], g)


@interpreted_only
@pytest.mark.parametrize("which", ["x", "weight", "u", "B"])
@pytest.mark.parametrize("turned", [False, True])
def test_offsets_past_32_bits(which, turned):
    """Rows, or columns, 2^30 elements apart."""
    x, W, u, B = tensors = [draw(3, 3) for _ in range(4)]
    expected = x @ W.T + 0.5 * (u @ B.T)
    i = ["x", "weight", "u", "B"].index(which)
    tensors[i] = far_rows(tensors[i].T).T if turned else far_rows(tensors[i])
    x, W, u, B = tensors
    close(lora_product(x, W, None, u, B, 0.5), expected)


@interpreted_only
def test_the_result_is_written_once_and_never_read():
    block_m, block_n, _ = TILES[4]
    M, N, K, r = block_m + 3, 2 * block_n + 1, 37, 5
    x, W, b, u, B = draw(M, K), draw(N, K), draw(N), draw(M, r), draw(N, r)
    with Traffic() as traffic:
        lora_product(x, W, b, u, B, 1.0)
    assert traffic.stored["t_h"] == 4 * M * N and not traffic.loaded["t_h"]
    for name, tensor, tiles in (("t_x", x, 3), ("t_u", u, 3), ("t_w", W, 2), ("t_b", B, 2)):
        assert traffic.loaded[name] == tiles * nbytes(tensor), name


def test_a_model_trains_as_without_it(monkeypatch):
    check_model(LoRA(rank=3, targets=("q", "down")), defined.lora_linear, monkeypatch)
