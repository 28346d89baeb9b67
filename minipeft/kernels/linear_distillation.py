r"""Distillation loss of rows of logits and its gradient over the student's: twin of
linear_distillation.py's `rows_loss_and_gradient`.

A row has student logits s and teacher logits t in R^V, a label y, and the options T and alpha. The
divergence needs both normalisers and one sum that the teacher's probabilities weigh. All of them
are made online, in one pass over both rows, which the gradient reads once more. With m_s, m_t the
largest entries so far and b, c the next block of s and t:

    (KLRows 1)   Z_t = sum_v exp((t_v - m_t) / T)       Z_s = sum_v exp((s_v - m_s) / T)
    (KLRows 2)   D   = sum_v exp((t_v - m_t) / T) (t_v - s_v) / T
    (KLRows 3)   KL(p || q) = D / Z_t - (log Z_t + m_t / T) + (log Z_s + m_s / T)
    (KLRows 4)   g_v = alpha T (exp((s_v - m_s) / T) / Z_s - exp((t_v - m_t) / T) / Z_t)
                       + (1 - alpha) (exp(s_v - m_s) / H - [v = y])             written over s

H = sum_v exp(s_v - m_s) is the normaliser at temperature 1 of the hard part, left out at alpha = 1.
Each sum is scaled by exp of the change whenever a largest entry changes, as in cross_entropy.py.

One program does one row; offsets are 64 bits wide. The teacher's row is only read: the definition
overwrites it to save memory, the kernel has nothing to save it for.

Bytes: 5 V b a row: both rows twice, and the gradient. The floor is that over the memory's
bandwidth. Arithmetic: five exponentials an entry, six with a hard part; on GPUs that make 16 a
clock and multiprocessor that costs about as much as the bytes in half precision.

Should win: on GPUs, from a few rows on, by count: the definition passes over rows of V about twenty
times and needs a third tensor of their size. Not measured on one yet, so MINIPEFT_FAST_PATH=on
alone takes it.
Cannot win: on a few rows of few words; and inside the chunked loss the two products stay the larger
part, M V (D + D') multiplications forward and M V D, twice if the head learns, backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minipeft.kernels import AotCase

BLOCKS = ((1024, 1024, 4), (None, 2048, 8))  # V up to, block, warps: two rows at a time


@triton.jit
def distillation_rows_kernel(
    t_s, t_t, t_labels, t_loss, V, temperature, alpha,
    s_row, s_column, t_row, t_column, label_stride,
    HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row's loss (KLRows 1) to (KLRows 3) and gradient (KLRows 4)."""
    row = tl.program_id(0).to(tl.int64)  # row * stride may pass 2^31
    p_s, p_t = t_s + row * s_row, t_t + row * t_row
    columns = tl.arange(0, BLOCK)
    rate = 1.0 / temperature
    largest_s, largest_t = -3.0e38, -3.0e38  # not -inf, whose difference with itself is NaN
    total_s, total_t, weighted, total_hard = 0.0, 0.0, 0.0, 0.0
    for start in range(0, V, BLOCK):
        v = (start + columns).to(tl.int64)
        b_s = tl.load(p_s + v * s_column, mask=v < V, other=-float("inf")).to(tl.float32)
        b_t = tl.load(p_t + v * t_column, mask=v < V, other=-float("inf")).to(tl.float32)
        new_s = tl.maximum(largest_s, tl.max(b_s, 0))
        new_t = tl.maximum(largest_t, tl.max(b_t, 0))
        shrink = tl.exp((largest_t - new_t) * rate)
        b_p = tl.exp((b_t - new_t) * rate)
        b_difference = tl.where(v < V, (b_t - b_s) * rate, 0.0)
        total_t = total_t * shrink + tl.sum(b_p, 0)  # (KLRows 1)
        weighted = weighted * shrink + tl.sum(b_p * b_difference, 0)  # (KLRows 2)
        total_s *= tl.exp((largest_s - new_s) * rate)
        total_s += tl.sum(tl.exp((b_s - new_s) * rate), 0)
        if HARD:
            total_hard *= tl.exp(largest_s - new_s)
            total_hard += tl.sum(tl.exp(b_s - new_s), 0)
        largest_s, largest_t = new_s, new_t
    kl = weighted / total_t - tl.log(total_t) + tl.log(total_s)
    kl += (largest_s - largest_t) * rate  # (KLRows 3)
    loss = alpha * temperature * temperature * kl
    label = tl.load(t_labels + row * label_stride)
    if HARD:
        is_word = (label >= 0) & (label < V)  # else NaN, rather than somebody else's memory
        b_target = tl.load(p_s + label * s_column, mask=is_word, other=float("nan"))
        loss += (1 - alpha) * (tl.log(total_hard) + largest_s - b_target.to(tl.float32))
    tl.store(t_loss + row, loss)
    write_gradient(
        p_s, p_t, label, V, s_column, t_column, temperature, alpha,
        largest_s, total_s, largest_t, total_t, total_hard, HARD, BLOCK,
    )  # fmt: skip


@triton.jit
def write_gradient(
    p_s, p_t, label, V, s_column, t_column, temperature, alpha,
    largest_s, total_s, largest_t, total_t, total_hard,
    HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The second pass over a row: the student's logits become their gradient."""
    columns = tl.arange(0, BLOCK)
    rate = 1.0 / temperature
    for start in range(0, V, BLOCK):
        v = (start + columns).to(tl.int64)
        b_s = tl.load(p_s + v * s_column, mask=v < V, other=-float("inf")).to(tl.float32)
        b_t = tl.load(p_t + v * t_column, mask=v < V, other=-float("inf")).to(tl.float32)
        b_q = tl.exp((b_s - largest_s) * rate) / total_s
        b_p = tl.exp((b_t - largest_t) * rate) / total_t
        b_g = alpha * temperature * (b_q - b_p)  # (KLRows 4)
        if HARD:
            b_hard = tl.exp(b_s - largest_s) / total_hard - tl.where(v == label, 1.0, 0.0)
            b_g += (1 - alpha) * b_hard
        tl.store(p_s + v * s_column, b_g.to(p_s.dtype.element_ty), mask=v < V)


def rows_loss_and_gradient(s, t, labels, temperature, alpha):
    """Sum of the rows' losses, float32; s (m, V) becomes its gradient, t (m, V) stays. Both may be
    in half precision; labels (m,) int64, all of them counting. Logits must be finite.
    """
    loss = torch.empty(s.shape[0], dtype=torch.float32, device=s.device)
    if len(loss):
        strides = (*s.stride(), *t.stride(), labels.stride(0))
        block, warps = block_and_warps(s.shape[1])
        distillation_rows_kernel[(len(loss),)](
            s, t, labels, loss, s.shape[1], temperature, alpha, *strides,
            HARD=alpha < 1, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss.sum()


def block_and_warps(V):
    """Entries of a row that a program reads at once, and the warps it has."""
    return next((block, warps) for limit, block, warps in BLOCKS if limit is None or limit >= V)


def examples(device, dtype=torch.float32):
    """Odd sizes, one row, one word, more than one block; soft labels alone and mixed with hard."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, V, temperature, alpha):
        s, t = 3 * torch.randn(2, rows, V, generator=generator).to(device, dtype)
        labels = torch.randint(0, V, (rows,), generator=generator)
        return s, t.clone(), labels.to(device), temperature, alpha

    return [draw(5, 47, 2.0, 0.3), draw(1, 1025, 1.0, 1.0), draw(3, 1, 4.0, 0.5)]


EXAMPLES = {"rows_loss_and_gradient": examples}
SCRATCH = {"rows_loss_and_gradient": (1,)}  # the definition destroys the teacher's logits


def _case(dtype, hard, block, warps):
    signature = {"t_s": f"*{dtype}", "t_t": f"*{dtype}", "t_labels": "*i64", "t_loss": "*fp32"}
    signature |= {"V": "i32", "temperature": "fp32", "alpha": "fp32"}
    ones = dict.fromkeys(("s_column", "t_column", "label_stride"), 1)
    return AotCase(
        distillation_rows_kernel,
        signature | {"s_row": "i32", "t_row": "i32"},
        ones | {"HARD": hard, "BLOCK": block},
        aligned=("t_s", "t_t", "t_labels", "t_loss"),
        num_warps=warps,
    )


AOT = [_case("fp32", True, block, warps) for _, block, warps in BLOCKS]
AOT += [_case("fp32", False, *BLOCKS[-1][1:]), _case("bf16", True, *BLOCKS[-1][1:])]
