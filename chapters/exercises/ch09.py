"""Chapter 09, LoRA."""

from __future__ import annotations

import torch


def exercise_1(answer):
    torch.manual_seed(1)
    W, b = torch.randn(5, 3).double(), torch.randn(5).double()
    A, B = torch.randn(2, 3).double(), torch.randn(5, 2).double()
    x = torch.randn(4, 7, 3).double()
    h = answer(x, W, b, A, B, 6.0)
    assert h.shape == (4, 7, 5), f"h has shape {tuple(h.shape)}, not (4, 7, 5)"
    silent = answer(x, W, b, A, torch.zeros_like(B), 6.0)
    base = torch.einsum("oi,...i->...o", W, x) + b
    assert close(silent, base), "with B = 0 it must be the projection itself"
    branch = torch.einsum("or,ri,...i->...o", B, A, x)
    ratio = ((h - base) / branch).flatten()
    assert close(ratio, ratio[:1]), "what is added is not a multiple of B A x"
    assert close(ratio[:1], torch.tensor([3.0]).double()), (
        "the right direction, the wrong length: which scale does (LoRA 2) give for this rank?"
    )


def exercise_2(answer):
    for d_in, d_out in [(128, 128), (128, 512), (7, 3), (2, 2), (6, 3)]:
        r = answer(d_in, d_out)
        assert r == int(r), (
            f"for {d_in} x {d_out} you say {r}, which is no whole number"
        )
        assert r * (d_in + d_out) < d_in * d_out, (
            f"for {d_in} x {d_out} rank {r} does not train fewer numbers than the matrix has"
        )
        assert (r + 1) * (d_in + d_out) >= d_in * d_out, (
            f"for {d_in} x {d_out} a larger rank than {r} would still do"
        )


def exercise_3(answer):
    for rank, shape in [(1, (6, 9)), (3, (11, 7)), (5, (8, 8))]:
        delta = torch.randn(shape).double()
        A, B = answer(delta, rank)
        assert A.shape == (rank, shape[1]), f"A has shape {tuple(A.shape)}"
        assert B.shape == (shape[0], rank), f"B has shape {tuple(B.shape)}"
        left = (
            torch.linalg.svdvals(delta)[rank:].square().sum()
        )  # Eckart and Young, 1936
        error = (delta - B @ A).square().sum()
        assert error <= left * (1 + 1e-9), (
            f"at rank {rank} there is a closer product"
        )


def close(a, b):
    return torch.allclose(a, b, rtol=1e-9, atol=1e-9)
