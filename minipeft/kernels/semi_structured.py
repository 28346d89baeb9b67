r"""2:4 sparsity, packed and unpacked in one pass: values and two-bit indices.

Twin of semi_structured.py's `pack_2_4` and `unpack_2_4`; same bits.

A program takes BYTES bytes of indices, that is a tile (BYTES, 8) of weights, two groups of four a
byte. Which two of four places stay needs no sort. With z_j = 1 where w_j is zero and n the group's
nonzeros, a zero stays if there is room, 2 - n, for it and for the zeros before it:

    keep_j = [w_j != 0] or [z_0 + .. + z_{j-1} < 2 - n]
    i_0    = 0 if keep_0, 1 if keep_1, else 2          the first that stays
    i_1    = 3 if keep_3, 2 if keep_2, else 1          the last
    byte   = sum over the two groups of (i_0 + 4 i_1) 16^group

and back, w_j = v_0 if i_0 = j, v_1 if i_1 = j, else 0. The tile is read as it lies in memory and
taken apart in registers (reshape, split); nothing is gathered or scattered.

A group with three nonzeros is an error of the definition. Here each program that meets one takes
the minimum of its number and of what is in memory, atomically, and the launcher looks once, after:
the first bad group is named whatever the order of programs.

Bytes that must move, a weight of b bytes: b read, b / 2 + 1 / 8 written (unpacked: the other way
round), so 3.1 in bfloat16. The definition sorts: int64 places alone are 8 bytes a group's place.

Where it wins: nowhere that a user waits. Packing happens once a file. Unpacking happens in each
forward pass of `SemiStructuredLinear`, before a product that reads the dense weight again; whoever
has sparse tensor cores (`torch_sparse`) does not unpack, and gains 1.1 to 1.9 times on products of
4096 and more (less than nothing at one token). So it is here to teach the format, and not chosen by
default before a measurement shows a win.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from minipeft.compressed.semi_structured import too_full
from minipeft.kernels import AotCase

BYTES = 256  # bytes of indices a program works on: 2048 weights, 16 a thread
WARPS = 4
NONE = tl.constexpr(2**62)  # no bad group found


@triton.jit
def pack_kernel(
    t_weight,  # (rows, 8 * bytes_a_row) any float, out of memory in any order
    t_values,  # (rows, 4 * bytes_a_row), out
    t_indices,  # (rows, bytes_a_row) uint8, out
    t_bad,  # (1,) int64, the first group with more than two nonzeros, out
    n_bytes,
    bytes_a_row,
    row_stride,
    column_stride,
    BYTES: tl.constexpr,
):
    """BYTES bytes of indices and their values."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte[:, None] < n_bytes
    row, column = byte // bytes_a_row, byte % bytes_a_row * 8
    corner = row * row_stride + column * column_stride
    p_weight = t_weight + corner[:, None] + tl.arange(0, 8)[None, :].to(tl.int64) * column_stride
    b_weight = tl.load(p_weight, mask=inside, other=0.0)

    b_groups = tl.reshape(b_weight, [BYTES, 2, 2, 2])
    b_02, b_13 = tl.split(b_groups)  # (BYTES, 2, 2): places 0 and 2, 1 and 3
    b_0, b_2 = tl.split(b_02)  # (BYTES, 2)
    b_1, b_3 = tl.split(b_13)
    n0, n1 = (b_0.to(tl.float32) != 0).to(tl.int32), (b_1.to(tl.float32) != 0).to(tl.int32)
    n2, n3 = (b_2.to(tl.float32) != 0).to(tl.int32), (b_3.to(tl.float32) != 0).to(tl.int32)
    nonzeros = n0 + n1 + n2 + n3
    room = 2 - nonzeros
    keep0 = (n0 == 1) | (room > 0)
    keep1 = (n1 == 1) | (1 - n0 < room)
    keep2 = (n2 == 1) | (2 - n0 - n1 < room)
    keep3 = (n3 == 1) | (3 - n0 - n1 - n2 < room)
    b_first = tl.where(keep0, 0, tl.where(keep1, 1, 2))
    b_last = tl.where(keep3, 3, tl.where(keep2, 2, 1))

    b_value0 = tl.where(keep0, b_0, tl.where(keep1, b_1, b_2))
    b_value1 = tl.where(keep3, b_3, tl.where(keep2, b_2, b_1))
    b_values = tl.reshape(tl.join(b_value0, b_value1), [BYTES, 4])
    tl.store(t_values + byte[:, None] * 4 + tl.arange(0, 4)[None, :], b_values, mask=inside)
    b_low, b_high = tl.split(b_first + 4 * b_last)  # (BYTES,): the first group, the second
    tl.store(t_indices + byte, (b_low + 16 * b_high).to(tl.uint8), mask=byte < n_bytes)

    group = byte[:, None] * 2 + tl.arange(0, 2)[None, :]
    first_bad = tl.min(tl.min(tl.where(nonzeros > 2, group, NONE), 1), 0)
    if first_bad < NONE:
        tl.atomic_min(t_bad, first_bad)


@triton.jit
def unpack_kernel(
    t_values,  # (4 * n_bytes,) any float
    t_indices,  # (n_bytes,) uint8
    t_weight,  # (8 * n_bytes,), out
    n_bytes,
    BYTES: tl.constexpr,
):
    """The weights of BYTES bytes of indices."""
    byte = tl.program_id(0).to(tl.int64) * BYTES + tl.arange(0, BYTES)
    inside = byte[:, None] < n_bytes
    p_values = t_values + byte[:, None] * 4 + tl.arange(0, 4)[None, :]
    b_values = tl.reshape(tl.load(p_values, mask=inside, other=0.0), [BYTES, 2, 2])
    b_value0, b_value1 = tl.split(b_values)  # (BYTES, 2)
    b_byte = tl.load(t_indices + byte, mask=byte < n_bytes, other=0).to(tl.int32)
    b_four = tl.join(b_byte & 15, b_byte >> 4)  # (BYTES, 2): a group's four bits
    b_first, b_last = (b_four & 3)[:, :, None], (b_four >> 2)[:, :, None]

    place = tl.arange(0, 4)[None, None, :]
    zero = tl.zeros([BYTES, 2, 4], t_values.dtype.element_ty)
    b_weight = tl.where(b_last == place, b_value1[:, :, None], zero)
    b_weight = tl.where(b_first == place, b_value0[:, :, None], b_weight)
    p_weight = t_weight + byte[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(p_weight, tl.reshape(b_weight, [BYTES, 8]), mask=inside)


def pack_2_4(weight):
    """(values (out, in / 2), indices (out, in / 8) uint8) of a weight (out, in) in 2:4 form.

    Raises ValueError when a group of four has more than two nonzeros.
    """
    rows, columns = weight.shape
    values = weight.new_empty(rows, columns // 2)
    indices = weight.new_empty(rows, columns // 8, dtype=torch.uint8)
    bad = torch.full((1,), NONE.value, dtype=torch.int64, device=weight.device)
    pack_kernel[(triton.cdiv(indices.numel(), BYTES),)](
        weight,
        values,
        indices,
        bad,
        indices.numel(),
        columns // 8,
        *weight.stride(),
        BYTES=BYTES,
        num_warps=WARPS,
    )
    group = bad.item()
    if group != NONE.value:
        raise too_full(*divmod(group, columns // 4))
    return values, indices


def unpack_2_4(values, indices):
    """The dense weight (out, in) of `pack_2_4`'s two tensors."""
    rows, columns = indices.shape
    weight = values.new_empty(rows, 8 * columns)
    unpack_kernel[(triton.cdiv(indices.numel(), BYTES),)](
        values.contiguous(),
        indices.contiguous(),
        weight,
        indices.numel(),
        BYTES=BYTES,
        num_warps=WARPS,
    )
    return weight


def sparse(shape, generator):
    """Random 2:4 weights of which some groups have fewer than two nonzeros, and -0 among them."""
    groups = torch.randn(shape[0], shape[1] // 4, 4, generator=generator)
    out = torch.rand(groups.shape, generator=generator).argsort(-1) < 2
    out |= torch.rand(groups.shape, generator=generator) < 0.3
    return (groups * ~out).flatten(-2)  # a negative number times 0 is -0


def pack_examples(device, dtype=torch.float32):
    """Odd numbers of rows, one byte, more bytes than a program takes, transposed, expanded."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 40), (1, 8), (5, 8 * 67)
    found = [sparse(shape, generator).to(device, dtype) for shape in shapes]
    return [(w,) for w in (*found, found[0].T.contiguous().T, found[0][:1].expand(4, 40))]


def unpack_examples(device, dtype=torch.float32):
    """What pack_examples come to."""
    return [pack_2_4(weight) for (weight,) in pack_examples(device, dtype)]


EXAMPLES = {"pack_2_4": pack_examples, "unpack_2_4": unpack_examples}


def _pack_case(dtype):
    signature = {"t_weight": f"*{dtype}", "t_values": f"*{dtype}", "t_indices": "*u8"}
    signature |= {"t_bad": "*i64", "n_bytes": "i32", "bytes_a_row": "i32", "row_stride": "i32"}
    constants = {"column_stride": 1, "BYTES": BYTES}
    wide = {"contains": ("ld.global.v4.b32",), "num_warps": WARPS}
    return AotCase(pack_kernel, signature, constants, tuple(signature), **wide)


def _unpack_case(dtype):
    signature = {"t_values": f"*{dtype}", "t_indices": "*u8", "t_weight": f"*{dtype}"}
    signature |= {"n_bytes": "i32"}
    wide = {"contains": ("st.global.v4.b32",), "num_warps": WARPS}
    return AotCase(unpack_kernel, signature, {"BYTES": BYTES}, tuple(signature), **wide)


AOT = [case(dtype) for case in (_pack_case, _unpack_case) for dtype in ("fp32", "bf16")]
