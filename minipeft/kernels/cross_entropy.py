r"""Cross-entropy of rows of logits and its gradient over them: twin of cross_entropy.py's
`rows_loss_and_gradient`.

A row z in R^V with label y needs logsumexp(z) before any entry of its gradient is known, so it is
read twice; nothing else is kept. The sum under the logarithm is made online (Milakov & Gimelshein,
2018, arXiv 1805.02867): with m the largest entry so far and s the sum of exp(z_v - m) so far, a
block b of further entries gives

    (CERows 1)   m' = max(m, max b)        s' = s exp(m - m') + sum_v exp(b_v - m')
    (CERows 2)   l  = log s + m - z_y      when all blocks are seen
    (CERows 3)   g_v = exp(z_v - m) / s - [v = y]                  written over z

A row that does not count (label -100) has loss 0 and is overwritten with zeros, unread.

One program does one row. exp(m - m') is 1 in all but the few blocks that hold a new largest entry,
and the loop has no length that V could outgrow. A row's first address is row times stride, which
passes 2^31 elements at 42,730 rows of 50,257 logits: program ids are widened to 64 bits first.

Bytes: 3 V b a row, two reads and a write of b bytes an entry; V b without a gradient. The floor is
that over the memory's bandwidth; exponentials, two an entry, cost less on every GPU since sm_75.

Should win: on GPUs, from a few rows on, by count: the definition passes over V entries about seven
times, in about ten launches. Not measured on one yet, so MINIPEFT_FAST_PATH=on alone takes it.
Cannot win: on one or two rows of few words, where the launch costs more than the work.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minipeft.cross_entropy import IGNORE
from minipeft.kernels import AotCase

BLOCKS = ((1024, 1024, 4), (None, 4096, 8))  # V up to, block, warps


@triton.jit
def cross_entropy_rows_kernel(
    t_z, t_labels, t_loss,
    V, row_stride, column_stride, label_stride,
    IGNORED: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: one row's loss (CERows 1) (CERows 2) and gradient (CERows 3)."""
    row = tl.program_id(0).to(tl.int64)  # row * row_stride may pass 2^31
    p_row = t_z + row * row_stride
    label = tl.load(t_labels + row * label_stride)
    counts = label != IGNORED
    target = tl.where(counts, label, 0)
    is_word = (target >= 0) & (target < V)  # else NaN, rather than somebody else's memory
    b_target = tl.load(p_row + target * column_stride, mask=is_word, other=float("nan"))
    columns = tl.arange(0, BLOCK)
    length = tl.where(counts, V, 0)  # a row that does not count is not read
    largest, total = -3.0e38, 0.0  # not -inf, whose difference with itself is NaN
    for start in range(0, V, BLOCK):
        v = start + columns
        p_z = p_row + v.to(tl.int64) * column_stride
        b_z = tl.load(p_z, mask=v < length, other=-float("inf")).to(tl.float32)
        new = tl.maximum(largest, tl.max(b_z, 0))
        total = total * tl.exp(largest - new) + tl.sum(tl.exp(b_z - new), 0)  # (CERows 1)
        largest = new
    total = tl.where(counts, total, 1.0)
    loss = tl.log(total) + largest - b_target.to(tl.float32)  # (CERows 2)
    tl.store(t_loss + row, tl.where(counts, loss, 0.0))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            v = start + columns
            p_z = p_row + v.to(tl.int64) * column_stride
            b_z = tl.load(p_z, mask=v < length, other=-float("inf")).to(tl.float32)
            b_g = tl.exp(b_z - largest) / total - tl.where(v == target, 1.0, 0.0)  # (CERows 3)
            tl.store(p_z, tl.where(counts, b_g, 0.0).to(t_z.dtype.element_ty), mask=v < V)


def rows_loss_and_gradient(z, labels, gradient=True):
    """Sum of the rows' losses, float32; with `gradient`, z (m, V) becomes its gradient, 0 in rows
    that do not count. z may be in half precision; labels (m,) int64.
    """
    loss = torch.empty(z.shape[0], dtype=torch.float32, device=z.device)
    if len(loss):
        strides = (*z.stride(), labels.stride(0))
        block, warps = block_and_warps(z.shape[1])
        cross_entropy_rows_kernel[(len(loss),)](
            z, labels, loss, z.shape[1], *strides,
            IGNORED=IGNORE, GRADIENT=gradient, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return loss.sum()


def block_and_warps(V):
    """Entries a program reads at once and warps it has: 16 to 32 bytes a thread and load."""
    return next((block, warps) for limit, block, warps in BLOCKS if limit is None or limit >= V)


def examples(device, dtype=torch.float32):
    """Odd sizes, rows that do not count, one row, one word, more than one block."""
    generator = torch.Generator().manual_seed(0)

    def draw(rows, V):
        z = 4 * torch.randn(rows, V, generator=generator)
        labels = torch.randint(0, V, (rows,), generator=generator)
        labels[1::3] = IGNORE
        return z.to(device, dtype), labels.to(device)

    far = draw(2, 9)
    far[0][:, 4] = -float("inf")  # a word that is ruled out
    return [draw(7, 47), draw(1, 1025), draw(3, 1), (*draw(4, 65), False), far]


EXAMPLES = {"rows_loss_and_gradient": examples}


def _scratch(z, labels, gradient=True):
    return () if gradient else (0,)  # the definition then leaves an intermediate behind


SCRATCH = {"rows_loss_and_gradient": _scratch}


def _case(dtype, gradient, block, warps):
    signature = {"t_z": f"*{dtype}", "t_labels": "*i64", "t_loss": "*fp32", "V": "i32"}
    constants = {"column_stride": 1, "label_stride": 1, "IGNORED": IGNORE}
    return AotCase(
        cross_entropy_rows_kernel,
        signature | {"row_stride": "i32"},
        constants | {"GRADIENT": gradient, "BLOCK": block},
        aligned=("t_z", "t_labels", "t_loss"),  # 50,257 is no multiple of 16
        num_warps=warps,
    )


AOT = [_case("fp32", True, block, warps) for _, block, warps in BLOCKS]
AOT += [_case("bf16", True, *BLOCKS[-1][1:]), _case("fp32", False, *BLOCKS[-1][1:])]
