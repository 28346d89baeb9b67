r"""Mode approximation, called Aurora (Wang et al., 2023, arXiv 2305.08381).

One set of factors for all matrices: their changes, laid on a pile, are one tensor of three modes
(row, column, matrix); it is approximated by a sum of R outer products, so all layers share their
directions and each matrix only chooses how much of each.

    (Mode 1)   dW_k = V diag(lambda * p_k) U^T         U in R^(in x R), V in R^(out x R)
    (Mode 2)   h    = W_k x + b_k + V (lambda * p_k * (U^T x))      lambda, p_k in R^R, k = 1 .. K
    (Mode 3)   T    = sum over r of lambda_r v_r o u_r o p_r        T_oik = dW_k[o, i]: CP of rank R
    (Mode 4)   W    = sum over r of s_r u_r v_r^T                   SVD: the best matrix of rank R
    (Mode 5)   a_r  = unfold(T, 0) (b (x) c) ((b^T b) * (c^T c))^+  alternating least squares for CP
    (Mode 6)   T    = G x_0 A x_1 B x_2 C,   G = T x_0 A^T x_1 B^T x_2 C^T        Tucker

`o` is the outer product, `(x)` the column-wise Kronecker product, `^+` the pseudo-inverse, `x_n`
the product with mode n. The matrices must share one shape, so the targets are some of q, k, v, o,
or up alone, or down alone. The paper writes x W with W (in, out), so U diag(lambda * p_k) V^T.

Trained parameters: R (in + out) + R + R K with K = L |targets|; the paper counts U and V alone.

    U         U(-1/sqrt(in), 1/sqrt(in))
    V         0                               so the model at the start is the base, bitwise
    lambda    1
    p_k       N(0, 2 / (R + K))               Xavier on the R x K factor

Reduces to: for a single matrix it is LoRA of rank R with A = U^T and B = V diag(lambda * p). With
R = K r and disjoint p_k it is LoRA of rank r in every matrix.

How this differs: the authors' code puts a full core of R x R x R between the factors (a Tucker
form, R^3 parameters more: more than U and V together from R = 40 on, at width 768), factors that
scale and shift, and dropout. This file has the paper's formula. peft and adapters have no Aurora.

Footguns: U and V both 0, or p_k 0 and V 0 (no gradient, ever); shared factors registered twice (the
optimizer then steps twice); CP is unique where SVD is not, but its best approximation of rank R
need not exist, and alternating least squares may stop at a poor one: try several seeds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.low_rank.lora import (
    PROJECTIONS,
    check_targets,
    linear_with,
    lora_delta,
    lora_forward,
    projection_shape,
)
from minipeft.technique import Technique

# -- the factorisations that the method is explained with


def truncated_svd(W, rank):
    """U (m, R), s (R,), V (n, R) with U diag(s) V^T the nearest matrix of that rank. (Mode 4)"""
    check_rank(rank, min(W.shape))
    U, s, Vt = torch.linalg.svd(W, full_matrices=False)
    return U[:, :rank], s[:rank], Vt[:rank].T


def unfold(T, mode):
    """A tensor as a matrix (n_mode, the rest), the other modes in order, the last one fastest."""
    return T.movedim(mode, 0).flatten(1)


def mode_product(T, M, mode):
    """T x_mode M: the matrix M (m, n_mode) applied to every fibre of that mode. (Mode 6)"""
    return torch.tensordot(M, T, ([1], [mode])).movedim(0, mode)


def khatri_rao(B, C):
    """Column-wise Kronecker product of (J, R) and (K, R): (J K, R). (Mode 5)"""
    return (B[:, None] * C).flatten(0, 1)


def cp(T, rank, steps=200, seed=0):
    """CP by alternating least squares: lambda (R,) and unit factors (I, R), (J, R), (K, R) of a
    tensor (I, J, K). Each step solves for one factor exactly, so the error never grows. (Mode 5)
    """
    check_rank(rank, T.numel())
    generator = torch.Generator().manual_seed(seed)
    factors = [torch.randn(n, rank, generator=generator).to(T) for n in T.shape]
    for _ in range(steps):
        for mode in range(3):
            B, C = (factors[m] for m in range(3) if m != mode)
            gram = (B.T @ B) * (C.T @ C)
            factors[mode] = unfold(T, mode) @ khatri_rao(B, C) @ torch.linalg.pinv(gram)
            weights = torch.linalg.vector_norm(factors[mode], dim=0)
            factors[mode] = factors[mode] / weights.clamp_min(torch.finfo(T.dtype).tiny)
    return weights, factors


def cp_tensor(weights, factors):
    """The tensor (I, J, K) of a CP: sum of lambda_r a_r o b_r o c_r. (Mode 3)"""
    return torch.einsum("r,ir,jr,kr->ijk", weights, *factors)


def tucker(T, ranks, steps=20):
    """Tucker by higher-order orthogonal iteration: core (R0, R1, R2) and orthonormal factors
    (I, R0), (J, R1), (K, R2) of a tensor (I, J, K). (Mode 6)
    """
    for rank, size in zip(ranks, T.shape):
        check_rank(rank, size)
    factors = [leading(unfold(T, mode), rank) for mode, rank in enumerate(ranks)]
    for _ in range(steps):
        for mode, rank in enumerate(ranks):
            others = T
            for m in range(3):
                others = mode_product(others, factors[m].T, m) if m != mode else others
            factors[mode] = leading(unfold(others, mode), rank)
    core = T
    for mode in range(3):
        core = mode_product(core, factors[mode].T, mode)
    return core, factors


def tucker_tensor(core, factors):
    """The tensor (I, J, K) of a Tucker form. (Mode 6)"""
    for mode, factor in enumerate(factors):
        core = mode_product(core, factor, mode)
    return core


def leading(M, rank):
    """The first `rank` left singular vectors of a matrix (m, n): (m, R)."""
    return torch.linalg.svd(M, full_matrices=False)[0][:, :rank]


def check_rank(rank, limit):
    if not 1 <= rank <= limit:
        raise ValueError(f"rank={rank} must be from 1 to {limit} for a tensor of this shape")


# -- the technique


class Factors(nn.Module):
    """What all matrices share: U (in, R), V (out, R), lambda (R,)."""

    def __init__(self, into, out, rank, place):
        super().__init__()
        self.U = nn.Parameter(torch.empty(into, rank, **place))
        self.V = nn.Parameter(torch.zeros(out, rank, **place))
        self.scale = nn.Parameter(torch.ones(rank, **place))  # lambda
        nn.init.uniform_(self.U, -(into**-0.5), into**-0.5)


class ModeLinear(wrap.Wrapper):
    """A projection that takes its own mixture p of the shared factors. (..., in) -> (..., out)

    factors: those of the first wrapper, or None to make and own them; matrices: K.
    """

    def __init__(self, inner, rank, matrices, factors=None):
        super().__init__(inner)
        base = wrap.base_module(inner)
        place = wrap.float_place(base)
        if factors is None:
            factors = self.factors = Factors(base.in_features, base.out_features, rank, place)
        shape, pile = (base.out_features, base.in_features), (len(factors.V), len(factors.U))
        if shape != pile:
            raise ValueError(
                f"a projection of {shape} on a pile of {pile}: matrices on one pile need one "
                "shape, which layers that lost heads or neurons may not have"
            )
        self.shared = (factors,)  # in a tuple, so that nn.Module registers it only at its owner
        self.p = nn.Parameter(torch.empty(rank, **place))
        nn.init.normal_(self.p, 0.0, (2 / (rank + matrices)) ** 0.5)

    def pair(self):
        """A (R, in) and B (out, R) with B A the change of the weight. (Mode 1)"""
        factors = self.shared[0]
        return (factors.scale * self.p)[:, None] * factors.U.T, factors.V

    def forward(self, x):
        return lora_forward(self.inner(x), x, *self.pair(), 1.0)  # (Mode 2)

    def delta(self):
        """dW_k, (out, in). (Mode 1)"""
        return lora_delta(*self.pair(), 1.0)

    def merged(self, inner):
        return linear_with(inner, inner.weight + self.delta(), inner.bias)


@dataclass(frozen=True)
class ModeApproximation(Technique):
    """Aurora's shared CP factors over the chosen projections of all blocks. (Mode 1)

    rank: R, how many outer products in all.
    targets: projections of one shape: some of q, k, v, o, or up alone, or down alone.
    """

    rank: int = 32
    targets: tuple[str, ...] = ("q", "k", "v")

    learning_rate: ClassVar[float] = 2e-2

    def check(self, config):
        check_targets(self.targets)
        shapes = {target: projection_shape(config, target) for target in self.targets}
        if len(set(shapes.values())) > 1:
            raise ValueError(
                f"targets={self.targets} have the shapes {shapes}, and matrices on one pile need "
                "one shape: take some of q, k, v, o, or up alone, or down alone"
            )
        if self.rank < 1:
            raise ValueError(f"rank={self.rank} must be at least 1")

    def install(self, model, attachment):
        blocks, first = len(model.blocks), None
        for n in range(blocks):
            for target in self.targets:
                path = f"blocks.{n}.{PROJECTIONS[target]}"
                inner, factors = wrap.resolve(model, path), first and first.shared[0]
                layer = ModeLinear(inner, self.rank, blocks * len(self.targets), factors)
                attachment.wrap(model, path, layer)
                first = first or layer

    def count(self, config):
        out, into = projection_shape(config, self.targets[0])
        return self.rank * (into + out + 1 + config.n_layer * len(self.targets))
