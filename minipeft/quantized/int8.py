r"""Eight bits: absmax, zero-point, and LLM.int8() (Dettmers et al., 2022, arXiv 2208.07339).

A row of a matrix is stored as whole numbers from -128 to 127 and one scale; two such matrices can
be multiplied in integers and scaled afterwards.

    (Int8 1)   s_i = max_j |w_ij| / 127,   q_ij = round(w_ij / s_i),   w' = s q          absmax
    (Int8 2)   s_i = (max - min) / 255,    z_i = round(-min / s_i) - 128                 zero-point
    (Int8 3)   q_ij = clamp(round(w_ij / s_i) + z_i, -128, 127),       w' = s (q - z)
    (Int8 4)   Y_ij = s^x_i s^w_j (Q_x Q_w^T)_ij      vector-wise: a scale a row of X, a row of W
    (Int8 5)   O    = {k: some |x_ik| >= 6},   Y = X_O W'_O^T + (Int8 4) over the columns not in O
    (Int8 6)   bits = 8 + 32 / in, with a zero-point 8 + 40 / in             a weight

W in R^(out x in), X in R^(n x in), rounding half to even. In (Int8 2) max and min are taken over
the row and 0, so that 0 is stored exactly and z fits in eight bits. O are the outlier columns: a
few features of a large model are ten times the rest, and one of them would take the whole range of
its row.

Trained parameters: none, this is storage and a way to multiply. |w - w'| <= s / 2.

Reduces to: the exact product where X and W are integers up to 127 in size with a 127 in each row;
without outliers (Int8 5) is (Int8 4), with threshold 0 (every column one) it is X W'^T.

How this differs from bitsandbytes: the same codes, scales and outlier columns; X stays in its own
dtype (there float16 only), and the sum over k runs in float64, which holds it exactly, where a GPU
uses integer units. Its `absmax` is our 127 s.

Footguns: a scale a tensor where it is one a row; scales multiplied twice by 1/127; the outlier
columns left in the row's absmax; outliers found over a batch tie a row's result to its neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

OUTLIER = 6.0  # the paper's threshold


@dataclass(frozen=True, eq=False)
class Int8:
    """A matrix in eight bits. codes: (..., out, in) int8. scale: (..., out, 1) float32 (float64 for
    a float64 matrix). zero: (..., out, 1) int8, or None for absmax. dtype: the matrix's.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    dtype: torch.dtype

    @property
    def shape(self):
        return tuple(self.codes.shape)

    @property
    def nbytes(self):
        """Codes, four bytes a scale, one a zero-point."""
        return self.codes.numel() + self.scale.numel() * (4 if self.zero is None else 5)

    @property
    def bits_per_parameter(self):
        """Exact, scales included. (Int8 6)"""
        return 8 * self.nbytes / self.codes.numel()


@torch.no_grad()
def quantize_absmax(weight):
    """Rows (..., in) of floats -> Int8, symmetric about 0. (Int8 1)

    Raises ValueError for NaN, infinity, integers and tensors without rows.
    """
    w = checked(weight)
    largest = w.abs().amax(-1, keepdim=True)
    q = (w * safe_ratio(127, largest)).round()  # (Int8 1)
    return Int8(q.to(torch.int8), largest / 127, None, weight.dtype)


@torch.no_grad()
def quantize_zero_point(weight):
    """Rows (..., in) of floats -> Int8 that uses the whole range of a lopsided row. (Int8 2)

    Raises ValueError as quantize_absmax does.
    """
    w = checked(weight)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    inverse = safe_ratio(255, high - low)
    zero = (-low * inverse).round() - 128  # (Int8 2)
    q = ((w * inverse).round() + zero).clamp(-128, 127)  # (Int8 3)
    return Int8(q.to(torch.int8), scale, zero.to(torch.int8), weight.dtype)


def checked(weight):
    """The weight in float32 (float64 stays). Raises ValueError for what cannot be quantised."""
    if not weight.is_floating_point() or weight.ndim == 0 or not weight.numel():
        raise ValueError(
            f"only rows of floats can be quantised, not {tuple(weight.shape)} of {weight.dtype}"
        )
    w = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if not w.isfinite().all():
        raise ValueError("the weights hold NaN or infinity, which no code stands for")
    return w


def safe_ratio(top, size):
    """top / size, and 0 where that is infinite: a row of (nearly) zeros."""
    ratio = top / size
    return torch.where(ratio.isfinite(), ratio, torch.zeros_like(ratio))


@torch.no_grad()
def dequantize_int8(quantized, dtype=None):
    """An Int8 as floats again, in its dtype or the one given. (Int8 1) (Int8 3)"""
    q = quantized.codes.to(quantized.scale.dtype)
    if quantized.zero is not None:
        q = q - quantized.zero
    return (quantized.scale * q).to(dtype or quantized.dtype)


# -- multiplying


@torch.no_grad()
def vector_wise_product(x, weight, threshold=OUTLIER):
    """X W^T for floats x (..., in) and an absmax Int8 (out, in) -> (..., out), in x's dtype.

    Columns of x with a value of at least `threshold` are multiplied in floating point; None looks
    for none. Raises ValueError for a weight with zero-points or widths that differ. (Int8 5)
    """
    if weight.zero is not None or x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} needs absmax rows as wide, not {weight.shape}")
    rows = checked(x).flatten(0, -2)
    outlier = torch.zeros(rows.shape[1], dtype=torch.bool, device=x.device)
    if threshold is not None:
        outlier = (rows.abs() >= threshold).any(0)
    y = integer_product(quantize_absmax(rows.masked_fill(outlier, 0)), weight)
    if outlier.any():
        w = dequantize_int8(weight, rows.dtype)
        y = y + rows[:, outlier] @ w[:, outlier].T  # (Int8 5)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def integer_product(x, w):
    """Two absmax Int8 (n, in), (out, in) -> (n, out): integers first, scales after. (Int8 4)

    float64 holds every sum of products of codes exactly, up to 2^53 / 127^2 columns.
    """
    sums = x.codes.double() @ w.codes.double().T
    return sums.to(x.scale.dtype) * (x.scale * w.scale.T.to(x.scale.dtype))  # (Int8 4)


class Int8Linear(nn.Module):
    """A linear layer kept in eight bits that also multiplies in them. (..., in) -> (..., out)

    Made from an nn.Linear; for inference: nothing in it is trained.
    """

    def __init__(self, linear, threshold=OUTLIER):
        super().__init__()
        quantized = quantize_absmax(linear.weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.threshold, self.dtype = threshold, linear.weight.dtype
        self.register_buffer("codes", quantized.codes)
        self.register_buffer("scale", quantized.scale)
        self.register_buffer("shift", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def quantized(self):
        """The weight, an Int8."""
        return Int8(self.codes, self.scale, None, self.dtype)

    def forward(self, x):
        y = vector_wise_product(x, self.quantized, self.threshold)
        return y if self.shift is None else y + self.shift
