"""Parity of minipeft/quantized/adamw_8bit.py with bitsandbytes, on a CPU."""

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")

from bitsandbytes import functional  # noqa: E402

from minipeft.quantized.adamw_8bit import (  # noqa: E402
    MAPS,
    AdamW8bit,
    dequantize_blocks,
    quantize_blocks,
)


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_theirs(signed):
    theirs = functional.create_dynamic_map(signed=signed)
    # they scale by a power of ten in double precision, once more rounded: one part in 2^23
    torch.testing.assert_close(MAPS[signed], theirs, rtol=2.4e-7, atol=0)


def test_blocks_agree_with_theirs_but_for_their_rounded_table():
    x = torch.randn(64, 256)
    codes, absmax = quantize_blocks(x.flatten(), True)
    theirs, state = functional.quantize_blockwise(x, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    different = codes != theirs.flatten()
    assert different.float().mean() < 0.003  # their CPU path looks levels up in a rounded table
    off = codes.int() - theirs.flatten().int()
    assert off.abs().max() <= 1
    back = functional.dequantize_blockwise(theirs, state).flatten()
    mine = dequantize_blocks(codes, absmax, True)
    torch.testing.assert_close(mine[~different], back[~different], rtol=2.4e-7, atol=0)


def test_twenty_steps_move_as_theirs_do():
    """Not bitwise: they shift codes whose sign is off, and choose a few codes differently."""
    ours, theirs, exact = (torch.nn.Parameter(torch.ones(64, 128)) for _ in range(3))
    settings = {"lr": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1}
    optimizers = [
        AdamW8bit([ours], **settings),
        bitsandbytes.optim.AdamW8bit([theirs], **settings),
        torch.optim.AdamW([exact], foreach=False, **settings),
    ]
    for step in range(20):
        g = torch.randn(64, 128, generator=torch.Generator().manual_seed(step)) + 0.5
        for parameter, optimizer in zip((ours, theirs, exact), optimizers):
            parameter.grad = g.clone()
            optimizer.step()
    moved = (exact - 1).norm()
    apart = (ours - theirs).norm() / moved
    mine, other = ((p - exact).norm() / moved for p in (ours, theirs))
    assert mine < 0.03 and other < 0.03  # the noise of rounding to 8 bits
    assert apart < 0.03 and mine < 1.5 * other
