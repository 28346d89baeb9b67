r"""GPTQ: post-training quantisation that knows the inputs (Frantar et al., 2022, arXiv 2210.17323).

A weight matrix is rounded column by column; what a column loses is made up for by the columns not
yet rounded, as well as the layer's inputs on some text allow.

    (GPTQ 1)   H  = (2 / n) sum over inputs of x x^T,   H_ii += 0.01 mean(diag H)
    (GPTQ 2)   U  = the upper Cholesky factor of H^-1:  H^-1 = U^T U
    (GPTQ 3)   e  = (W_:i - Q_:i) / U_ii,    W_:j -= e U_ij  for every j > i
    (GPTQ 4)   lazy blocks: inside a block as above, then W_rest -= E U_block,rest in one product
    (GPTQ 5)   s  = (max - min) / (2^b - 1),   z = round(-min / s)             the grid of a group
    (GPTQ 6)   k  = clamp(round(w / s) + z, 0, 2^b - 1),   Q = s (k - z)       round to nearest
    (GPTQ 7)   loss = sum over inputs of |(W - Q) x|^2 / n = tr((W - Q) H (W - Q)^T) / 2
    (GPTQ 8)   bits = b + (16 + b) / group;  symmetric b + 16 / group;  act-order + 32 / out

W in R^(out x in), x in R^in the layer's inputs, H in R^(in x in). max and min are taken over the
group and 0; symmetric grids take max = -min and z = 2^(b-1). A group is `group_size` columns of one
row (None: the whole row); its grid is found when its first column is reached, from the weights as
they then are. act-order takes the columns in the order of falling H_ii, so that the inputs that
matter most are rounded while most can still be made up for. An input that was always 0 (H_ii = 0)
gets the weight 0.

Trained parameters: none; but it needs text, and one matrix in x in a layer at a time.

Reduces to: round-to-nearest (`round_to_nearest`) when H is proportional to I, for then U has
nothing off its diagonal. Blocks of any size give the same as one column at a time.

How this differs from the authors' code: a block never ends inside a group, so that groups of any
size see up-to-date weights (there only multiples of 128 do); H counts tokens, not texts, which only
scales it; padding is left out of H; scales are rounded to float16 before they are used, not after.

Footguns: an inverse without damping; U lower for upper; dividing by U_ii^2; compensating the
columns before i; all layers' H from the unquantised model (here each layer sees what it will see);
forgetting to undo act-order's permutation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class GroupQuantized:
    """A matrix on grids of 2^bits points, one grid a group.

    packed: the codes, row-major, `bits` bits each without gaps, uint8. scale: (out, groups).
    zero: (out, groups) uint8, or None for symmetric grids. group_of: (in,), the group of each
    column, or None when groups are runs of columns. shape and dtype: the matrix's.
    """

    packed: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor | None
    bits: int
    shape: tuple[int, int]
    dtype: torch.dtype
    group_of: torch.Tensor | None = None

    @property
    def codes(self):
        """(out, in) uint8."""
        return unpack_bits(self.packed, self.bits, self.shape[0] * self.shape[1]).view(self.shape)

    @property
    def bits_per_parameter(self):
        """Exact for grids in float16; zero-points count `bits` each. (GPTQ 8)"""
        grids = self.scale.numel() * (16 if self.zero is None else 16 + self.bits)
        order = 0 if self.group_of is None else 32 * self.shape[1]
        return self.bits + (grids + order) / (self.shape[0] * self.shape[1])

    @property
    def nbytes(self):
        return round(self.bits_per_parameter * self.shape[0] * self.shape[1] / 8)


def pack_bits(codes, bits):
    """Codes (n,) uint8 below 2^bits -> ceil(n bits / 8) bytes, filled from the lowest bit up."""
    places = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes[:, None] >> places) & 1).flatten()
    stream = torch.nn.functional.pad(stream, (0, -len(stream) % 8)).view(-1, 8)
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    return (stream << places).sum(1).to(torch.uint8)


def unpack_bits(packed, bits, count):
    """The way back: (bytes,) uint8 -> (count,) uint8."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed[:, None] >> places) & 1).flatten()[: count * bits].view(count, bits)
    places = torch.arange(bits, device=packed.device, dtype=torch.uint8)
    return (stream << places).sum(1).to(torch.uint8)


# -- grids


def find_grid(group, bits, symmetric=False, scale_dtype=torch.float16):
    """Weights (out, size) -> scale (out, 1), rounded to scale_dtype, and zero (out, 1). (GPTQ 5)"""
    low, high = group.amin(1, keepdim=True).clamp(max=0), group.amax(1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(high, -low)
        low = -high
    empty = high == low
    high, low = torch.where(empty, 1.0, high), torch.where(empty, -1.0, low)
    scale = (high - low) / (2**bits - 1)  # (GPTQ 5)
    scale = scale.to(scale_dtype).clamp(min=torch.finfo(scale_dtype).tiny).to(group.dtype)
    middle = torch.full_like(scale, 2.0 ** (bits - 1))
    return scale, middle if symmetric else (-low / scale).round().clamp(0, 2**bits - 1)


def to_grid(w, scale, zero, bits):
    """The nearest codes, as floats. (GPTQ 6)"""
    return ((w / scale).round() + zero).clamp(0, 2**bits - 1)


def dequantize_group(quantized, dtype=None):
    """A GroupQuantized as a matrix, in its dtype or the one given. (GPTQ 6)"""
    group_of = quantized.group_of
    if group_of is None:
        width, groups = quantized.shape[1], quantized.scale.shape[1]
        group_of = torch.arange(width, device=quantized.scale.device) // -(-width // groups)
    scale = quantized.scale.to(torch.promote_types(quantized.dtype, torch.float32))
    zero = quantized.zero
    zero = 2.0 ** (quantized.bits - 1) if zero is None else zero[:, group_of.long()].to(scale)
    values = scale[:, group_of.long()] * (quantized.codes - zero)  # (GPTQ 6)
    return values.to(dtype or quantized.dtype)


def check(weight, bits, group_size):
    """Raise ValueError for settings no grid can be made of."""
    if bits not in range(2, 9):
        raise ValueError(f"bits={bits!r} must be from 2 to 8")
    if weight.ndim != 2 or not weight.is_floating_point():
        raise ValueError(f"a matrix of floats is needed, not {tuple(weight.shape)} {weight.dtype}")
    if group_size is not None and (group_size < 1 or weight.shape[1] % group_size):
        raise ValueError(f"group_size={group_size} does not divide the {weight.shape[1]} columns")
    if not weight.isfinite().all():
        raise ValueError("the weights hold NaN or infinity, which no code stands for")


# -- rounding


def round_to_nearest(weight, bits=4, group_size=None, symmetric=False, scale_dtype=torch.float16):
    """Every weight (out, in) to the nearest point of its group's grid. (GPTQ 6)

    Returns a GroupQuantized. Raises ValueError for a group size that does not divide, other bits
    than 2 to 8, NaN or infinity.
    """
    identity = torch.eye(weight.shape[-1], dtype=weight.dtype, device=weight.device)
    settings = {"damping": 0.0, "block_size": weight.shape[-1], "scale_dtype": scale_dtype}
    return gptq(weight, identity, bits, group_size, symmetric, **settings)


@torch.no_grad()
def gptq(
    weight,
    hessian,
    bits=4,
    group_size=None,
    symmetric=False,
    act_order=False,
    damping=0.01,
    block_size=128,
    scale_dtype=torch.float16,
):
    """Round `weight` (out, in) so that its outputs on the inputs behind `hessian` change little.

    Returns a GroupQuantized. Raises ValueError as round_to_nearest does, and for a Hessian of
    another size or one that is not positive definite after damping.
    """
    check(weight, bits, group_size)
    W = weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
    H, order = prepared(hessian, W, act_order, damping)
    W, U = W[:, order], inverse_factor(H)
    size = W.shape[1] if group_size is None else group_size
    step = block_size if group_size is None else size * max(1, block_size // size)
    codes, scales, zeros = torch.empty_like(W), [], []
    for start in range(0, W.shape[1], step):
        stop = min(start + step, W.shape[1])
        E = torch.empty_like(W[:, start:stop])
        for i in range(start, stop):
            if i % size == 0:
                scale, zero = find_grid(W[:, i : i + size], bits, symmetric, scale_dtype)
                scales.append(scale), zeros.append(zero)
            codes[:, i : i + 1] = k = to_grid(W[:, i : i + 1], scale, zero, bits)
            E[:, i - start] = e = (W[:, i] - (scale * (k - zero))[:, 0]) / U[i, i]  # (GPTQ 3)
            W[:, i:stop] -= e[:, None] * U[i, i:stop]
        W[:, stop:] -= E @ U[start:stop, stop:]  # (GPTQ 4)
    back = order.argsort()
    return GroupQuantized(
        pack_bits(codes[:, back].flatten().to(torch.uint8), bits),
        torch.cat(scales, 1).to(scale_dtype),
        None if symmetric else torch.cat(zeros, 1).to(torch.uint8),
        bits,
        tuple(weight.shape),
        weight.dtype,
        (back // size).int() if act_order and group_size is not None else None,
    )


def prepared(hessian, W, act_order, damping):
    """(H in the order of columns to take, damped; that order). W's dead columns become 0.

    (GPTQ 1)
    """
    if hessian.shape != (W.shape[1], W.shape[1]):
        raise ValueError(f"a Hessian of {tuple(hessian.shape)} does not fit weights {W.shape}")
    H = hessian.to(W, copy=True)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    W[:, dead] = 0
    order = torch.arange(len(H), device=H.device)
    if act_order:
        order = H.diagonal().argsort(descending=True, stable=True)
    H = H[order][:, order]
    H.diagonal().add_(damping * H.diagonal().mean())  # (GPTQ 1)
    return H, order


def inverse_factor(H):
    """U of (GPTQ 2), (in, in). Raises ValueError when H is not positive definite."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        return torch.linalg.cholesky(inverse, upper=True)  # (GPTQ 2)
    except torch.linalg.LinAlgError:
        raise ValueError("the Hessian is singular; raise damping or use more text") from None


def output_loss(weight, restored, hessian):
    """Mean squared change of the outputs, summed over them, a float. (GPTQ 7)"""
    D = (weight - restored).double()
    return (D @ hessian.double() * D).sum().item() / 2
