"""Chapter 13, mode approximation."""

from __future__ import annotations

import torch


def exercise_1(answer):
    U, V = torch.randn(5, 3).double(), torch.randn(7, 3).double()
    scale, P = torch.randn(3).double(), torch.randn(4, 3).double()
    for k in (0, 3):
        delta = answer(U, V, scale, P, k)
        assert delta.shape == (7, 5), (
            f"(out, in) is (7, 5), not {tuple(delta.shape)}"
        )
        wanted = sum(
            scale[r] * P[k, r] * torch.outer(V[:, r], U[:, r])
            for r in range(3)
        )
        assert not close(delta, V @ U.T), "lambda and p_k are missing"
        assert not close(delta, (V * P[k]) @ U.T), "lambda is missing"
        assert not close(delta, (V * scale) @ U.T), "p_k is missing"
        assert close(delta, wanted), f"not (Mode 1) for matrix {k}"


def exercise_2(answer):
    for shape, rank in [((6, 4), 2), ((3, 9), 1), ((5, 5), 5)]:
        W = torch.randn(shape).double()
        got = torch.as_tensor(answer(W, rank))
        U, s, Vh = torch.linalg.svd(W, full_matrices=False)
        best = U[:, :rank] * s[:rank] @ Vh[:rank]
        error = (W - best).square().sum()
        assert got.ndim == 0, f"one number, not a shape {tuple(got.shape)}"
        assert rank == 5 or not close(got, error.sqrt()), (
            "that is the error, and its square was asked for"
        )
        assert close(got, error), (
            f"at rank {rank} of {shape}: which singular values does the best matrix lack?"
        )


def exercise_3(answer):
    a, b, c = (torch.randn(n, 2).double() for n in (6, 5, 4))
    exact = torch.einsum("ir,jr,kr->ijk", a, b, c)
    got = answer(exact, b, c)
    assert got.shape == (6, 2), f"a is (I, R), not {tuple(got.shape)}"
    assert close(got, a), (
        "a tensor made from a, b and c must give back a: the Gram matrix of the joined factors is "
        "the elementwise product of two"
    )
    T = exact + torch.randn_like(exact)
    joined = torch.einsum("jr,kr->jkr", b, c).reshape(20, 2)
    wanted = torch.linalg.lstsq(joined, T.reshape(6, 20).T).solution.T
    assert close(answer(T, b, c), wanted), "not the least-squares solution"


def close(a, b):
    return torch.allclose(a, b, rtol=1e-8, atol=1e-8)
