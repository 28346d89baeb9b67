r"""The faster twins of nf4.py's two loops over weights, in plain PyTorch: tables and counting.

    dequantise   a byte is two codes, so a table of 256 pairs of levels is asked once a byte; a pair
                 of float32 is carried as one number of eight bytes, which is looked up twice as
                 fast as two of four, and goes straight to its place in the result
    quantise     the code is the number of midpoints below the value: fifteen passes of a
                 comparison and an addition over bytes, faster than a search for each value

Both go tile by tile, so that a tile stays in a core's cache through all of its steps; on a GPU,
where nothing is gained by that, everything is one tile. Same bits as the definitions.

Bytes that must move, a weight: 0.5 for the codes, 4 / block_size for the constants, 4 for float32
values: 4.6 at blocks of 64, so dequantising is at best as fast as copying 2.3 bytes a weight.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minipeft.quantized.codebooks import CODEBOOKS, into_blocks, midpoints, scaled_to_one

CPU_TILE = 2**17  # weights worked on at once: what a core's cache holds


def tile_size(tensor, elements, block_size):
    """Elements to work on at once: whole blocks and whole bytes; on a GPU everything."""
    if tensor.device.type != "cpu":
        return 2 * block_size * -(-elements // block_size)
    return 2 * block_size * max(1, CPU_TILE // (2 * block_size))


def quantize_blocks(flat, kind, block_size):
    """(n,) float -> packed (ceil(n / 2),) uint8 and absmax (ceil(n / block_size),) float32."""
    n, tile = flat.numel(), tile_size(flat, flat.numel(), block_size)
    packed = torch.empty(-(-n // 2), dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-n // block_size), dtype=torch.float32, device=flat.device)
    for first in range(0, n, tile):
        blocks = into_blocks(flat[first : first + tile].float(), block_size)
        c = absmax[first // block_size :][: len(blocks)]
        torch.amax(blocks.abs(), 1, out=c)
        codes = count_midpoints(scaled_to_one(blocks, c), kind).view(-1)
        room = packed[first // 2 :][: tile // 2]
        codes = codes[: 2 * room.numel()]
        torch.bitwise_or(codes[0::2] << 4, codes[1::2], out=room)
    return packed, absmax


def count_midpoints(scaled, kind):
    """The code of the level nearest to each value, uint8; the lower one in a tie."""
    between, order = midpoints(kind)
    count = torch.zeros_like(scaled, dtype=torch.uint8)
    above = torch.empty_like(scaled, dtype=torch.bool)
    for midpoint in between.tolist():
        torch.gt(scaled, midpoint, out=above)
        count += above.view(torch.uint8)
    if order is None:
        return count
    return order.to(scaled.device, torch.uint8)[count.int()]


def dequantize_blocks(packed, absmax, numel, block_size, kind, dtype):
    """packed (ceil(n / 2),) uint8 and absmax (blocks,) float32 -> (n,) of `dtype`."""
    tile, pairs = tile_size(packed, numel, block_size), pair_table(kind, packed.device)
    size = max(len(absmax) * block_size, 2 * len(packed))  # whole blocks, and whole bytes
    out = torch.empty(size, dtype=dtype, device=packed.device)
    direct = dtype == torch.float32
    levels = out if direct else out.new_empty(min(tile, size), dtype=torch.float32)
    scratch = torch.empty(min(tile // 2, len(packed)), dtype=torch.int32, device=packed.device)
    for first in range(0, numel, tile):
        codes = packed[first // 2 :][: tile // 2]
        numbers = scratch[: len(codes)].copy_(codes)  # indices are whole words
        here = levels[first:] if direct else levels
        room = here[: 2 * len(numbers)].view(torch.int64)
        torch.index_select(pairs, 0, numbers, out=room)
        c = absmax[first // block_size :][: tile // block_size, None]
        n = c.numel() * block_size
        blocks = out[first : first + n].view(-1, block_size)
        torch.mul(here[:n].view(-1, block_size), c, out=blocks)
    return out[:numel]


def pair_table(kind, device):
    """Byte -> the two levels it stands for, (256,) int64: two float32 carried as one number."""
    levels = F.pad(CODEBOOKS[kind], (0, 16 - len(CODEBOOKS[kind])))
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], 1)
    return pairs.view(torch.int64).view(-1).to(device)


def weights(device):
    """Short last blocks, an odd end, one number, zeros, strided and expanded rows, halves."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(7, 130, generator=generator).to(device)
    views = drawn.view(-1), drawn[:, ::3][1], drawn[0, :1].expand(70), drawn[0, :1]
    return [*views, drawn[2].half(), torch.zeros(65, device=device)]


def quantize_examples(device):
    kinds = [("nf4", 64), ("fp4", 6), ("int4", 32)]
    return [(flat, *how) for flat in weights(device) for how in kinds]


def dequantize_examples(device):
    dtypes = [torch.float32, torch.float16]
    return [
        (*quantize_blocks(flat, kind, size), flat.numel(), size, kind, dtype)
        for flat, kind, size in quantize_examples(device)
        for dtype in dtypes
    ]


EXAMPLES = {"quantize_blocks": quantize_examples, "dequantize_blocks": dequantize_examples}
