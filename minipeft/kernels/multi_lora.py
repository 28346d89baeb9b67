r"""A batch whose rows have different LoRAs, in two launches: every row reads its adapter in place.

Twin of multi_lora.py's `rows_branches`; after Punica's BGMV (Chen et al., 2023, arXiv 2310.18547).
Row b has A_b in R^(r_b x in), B_b in R^(out x r_b), the scale s_b, or none; T tokens a row.

    shrink   u_m = s_b A_b x_m             one program: RANKS of u, all of x_m       u float32
    expand   h_m = h_m + B_b u_m           one program: OUTPUTS of h, all of u_m

A table of one column a row, in one small copy to the GPU, holds the addresses of A_b and B_b, r_b,
and s_b (the bits of a float64): nothing is stacked, gathered or padded, adapters may have different
ranks, and rows may share one. A row without adapter has rank 0: every lane of its loads is masked.
Sums in float32, u included, where the definition rounds u to the type of h.

Bytes that must move, M = rows T tokens, D the distinct adapters in the batch, b bytes a number:

    b (sum over D of r (in + out) + M (in + 2 out)) + 8 M r

x read, h read and written, u written and read. Asked for is more: x_m once for each RANKS of its
rank, A_b and B_b once a token of the row, from the cache. The definition first stacks a copy of an
adapter for each row, D or not: 2 b rows r (in + out) on top.

Where it wins: decoding (T = 1) with more rows than one, where the definition is a dozen launches
and its copies. Where not: long rows, T of 16 and more, where the two batched products (tensor
cores) do the work of all tokens at once and read an adapter once; the definition runs there. It has
no backward pass: such a batch is served, not trained, and where a gradient is wanted the definition
runs. No tl.dot, so it compiles for sm_75. Not chosen by default before it was measured on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minipeft.kernels import AotCase

RANKS = 8  # of u, in a program of shrink: sixteen rows of rank 8 are sixteen programs
STEP = 256  # inputs in a step of shrink
TILE = 2048  # numbers of B in a program of expand
WARPS = 4


@triton.jit
def shrink_kernel(
    t_x,  # (M, width) any float
    t_table,  # (4, rows) int64: A's address, B's, the rank, the scale's bits
    t_u,  # (M, u_stride) float32, out
    rows,
    tokens,  # of a row
    width,
    u_stride,
    RANKS: tl.constexpr,
    STEP: tl.constexpr,
):
    """RANKS numbers of u for one token."""
    m = tl.program_id(0).to(tl.int64)
    p_table = t_table + m // tokens
    t_A = tl.load(p_table).to(tl.pointer_type(t_x.dtype.element_ty))
    t_A = tl.multiple_of(t_A, 16)  # `in_place` sees to it: loads of 16 bytes
    rank = tl.load(p_table + 2 * rows).to(tl.int32)
    scale = tl.load(p_table + 3 * rows).to(tl.float64, bitcast=True).to(tl.float32)
    r = tl.program_id(1) * RANKS + tl.arange(0, RANKS)
    b_u = tl.zeros([RANKS, STEP], tl.float32)
    for start in range(0, width, STEP):
        k = start + tl.arange(0, STEP)
        b_x = tl.load(t_x + m * width + k, mask=k < width, other=0.0).to(tl.float32)
        p_A = t_A + r.to(tl.int64)[:, None] * width + k[None, :]
        inside = (r < rank)[:, None] & (k < width)[None, :]
        b_u += tl.load(p_A, mask=inside, other=0.0).to(tl.float32) * b_x[None, :]
    tl.store(t_u + m * u_stride + r, scale * tl.sum(b_u, 1), mask=r < rank)


@triton.jit
def expand_kernel(
    t_h,  # (M, width) any float
    t_u,  # (M, u_stride) float32
    t_table,  # (4, rows) int64: A's address, B's, the rank, the scale's bits
    t_out,  # (M, width), out; may be t_h
    rows,
    tokens,
    width,
    u_stride,
    RANK: tl.constexpr,  # the largest rank in the batch, rounded up to a power of two
    OUTPUTS: tl.constexpr,
):
    """OUTPUTS numbers of h for one token."""
    m = tl.program_id(0).to(tl.int64)
    p_table = t_table + m // tokens
    t_B = tl.load(p_table + rows).to(tl.pointer_type(t_h.dtype.element_ty))
    rank = tl.load(p_table + 2 * rows).to(tl.int32)
    n, r = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, RANK)
    b_u = tl.load(t_u + m * u_stride + r, mask=r < rank, other=0.0)
    p_B = t_B + n.to(tl.int64)[:, None] * rank + r[None, :]
    inside = (n < width)[:, None] & (r < rank)[None, :]
    b_B = tl.load(p_B, mask=inside, other=0.0).to(tl.float32)
    b_h = tl.load(t_h + m * width + n, mask=n < width, other=0.0).to(tl.float32)
    tl.store(t_out + m * width + n, b_h + tl.sum(b_B * b_u[None, :], 1), mask=n < width)


def rows_branches(h, x, As, Bs, scales):
    """h (rows, T, out) plus each row's branch, x (rows, T, in): As[b] (r_b, in), Bs[b] (out, r_b),
    scales[b], or None, None and 0. Overwrites h where no gradients are recorded.
    """
    (rows, tokens, width), outputs = x.shape, h.shape[2]
    As, Bs = in_place(As), in_place(Bs)
    table, largest = table_of(As, Bs, scales, x.device)
    u = torch.empty(rows * tokens, largest, dtype=torch.float32, device=x.device)
    shrink_kernel[(rows * tokens, triton.cdiv(largest, RANKS))](
        x.contiguous(), table, u, rows, tokens, width, largest,
        RANKS=RANKS, STEP=STEP, num_warps=WARPS,
    )  # fmt: skip
    given = h.contiguous()
    out = torch.empty_like(given) if torch.is_grad_enabled() else given
    shape = expand_tile(largest)
    expand_kernel[(rows * tokens, triton.cdiv(outputs, shape["OUTPUTS"]))](
        given, u, table, out, rows, tokens, outputs, largest, **shape, num_warps=WARPS
    )
    return out if torch.is_grad_enabled() or out is h else h.copy_(out)


def in_place(tensors):
    """The tensors whose addresses the table gets: contiguous, at multiples of 16 bytes (a tensor
    mapped from a file need not be). Only what is not so is copied; None stays None.
    """
    found = [None if t is None else t.contiguous() for t in tensors]
    return [t.clone() if t is not None and t.data_ptr() % 16 else t for t in found]


def table_of(As, Bs, scales, device):
    """((4, rows) int64 on the device, the largest rank): the addresses, ranks and scales."""
    ranks = [0 if A is None else A.shape[0] for A in As]
    addresses = [[0 if t is None else t.data_ptr() for t in ts] for ts in (As, Bs)]
    bits = torch.tensor(scales, dtype=torch.float64).view(torch.int64)
    return torch.cat([torch.tensor([*addresses, ranks]), bits[None]]).to(device), max(ranks)


def expand_tile(largest):
    """The tile of `expand_kernel` for ranks up to `largest`."""
    rank = triton.next_power_of_2(largest)
    return {"RANK": rank, "OUTPUTS": max(16, TILE // rank)}


def examples(device, dtype=torch.float32):
    """Different ranks, two rows with one adapter, a row without, one row, rank above a program's,
    widths above a step's and a tile's.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    def case(chosen, tokens, into, out, ranks):
        As = [draw(r, into) / into**0.5 for r in ranks] + [None]
        Bs = [draw(out, r) for r in ranks] + [None]
        h, x = draw(len(chosen), tokens, out), draw(len(chosen), tokens, into)
        scales = [2.0, 0.5, -1.0][: len(ranks)] + [0.0]
        return h, x, *([ts[i] for i in chosen] for ts in (As, Bs, scales))

    return [
        case([0, -1, 1, 0], 1, 7, 11, [3, 1]),
        case([2, 1], 3, 300, 5, [1, 9, 17]),
        case([0], 2, 5, 2050, [1]),
    ]


EXAMPLES = {"rows_branches": examples}


def _case(kernel, values, dtype, contains=(), **constants):
    signature = dict.fromkeys(values, f"*{dtype}") | {"t_table": "*i64", "t_u": "*fp32"}
    signature |= dict.fromkeys(("rows", "tokens", "width", "u_stride"), "i32")
    aligned = (*values, "t_table", "t_u", "width")
    wide = {"contains": contains, "num_warps": WARPS}
    return AotCase(kernel, signature, constants, aligned, **wide)


AOT = [
    case
    for dtype in ("fp32", "bf16")
    for case in (
        _case(shrink_kernel, ("t_x",), dtype, ("ld.global.v4.b32",), RANKS=RANKS, STEP=STEP),
        _case(expand_kernel, ("t_h", "t_out"), dtype, **expand_tile(8)),
        _case(expand_kernel, ("t_h", "t_out"), dtype, **expand_tile(256)),
    )
]
