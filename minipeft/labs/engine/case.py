"""What an invariant gets: a source of shapes and numbers, and ways to say that they are wrong.

A Case is made from a seed. The visible seeds are fixed; the instructor's seed gives others, so
that code which fits the visible shapes alone is found out. Messages tell how wrong something is,
never what would be right.
"""

from __future__ import annotations

import math
import random

import torch


class Wrong(AssertionError):
    """An invariant does not hold; the message is for the student."""


class Case:
    """Shapes, dtypes and tensors drawn from one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))

    def size(self, low, high):
        """An integer from low to high."""
        return self.random.randint(low, high)

    def sizes(self, count, low, high):
        """Different integers, so that an exchange of two axes shows."""
        return self.random.sample(range(low, high + 1), count)

    def pick(self, *options):
        """One of them."""
        return self.random.choice(options)

    def number(self, low, high):
        """A float from low to high."""
        return self.random.uniform(low, high)

    def normal(self, *shape, dtype=torch.float64, std=1.0):
        """N(0, std^2)."""
        return std * torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def ids(self, batch, time, vocab):
        """Token ids (batch, time)."""
        return torch.randint(vocab, (batch, time), generator=self.generator)

    def config(self, **fixed):
        """A small GPTConfig; widths, heads and layers differ from case to case."""
        from minipeft.gpt import GPTConfig

        heads, width = self.pick((2, 3), (3, 4), (4, 2), (1, 6), (2, 5))
        drawn = {
            "vocab_size": self.size(31, 61),
            "context_length": self.size(24, 32),
            "n_layer": self.size(2, 3),
            "n_head": heads,
            "d_model": heads * width,
            "d_ff": self.size(9, 23),
        }
        return GPTConfig(**drawn | fixed)

    def model(self, dtype=torch.float64, **fixed):
        """A GPT of that config in eval mode whose weights, biases and gains are all random."""
        from minipeft.gpt import GPT

        model = GPT(self.config(**fixed))
        with torch.no_grad():
            for parameter in model.parameters():
                at = 1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0
                parameter.copy_(at + self.normal(*parameter.shape, std=0.2))
        return model.to(dtype).eval()

    def stir(self, parameters, std=0.3):
        """Add noise to parameters, so that none is at its start."""
        with torch.no_grad():
            for parameter in parameters:
                parameter += self.normal(*parameter.shape, dtype=parameter.dtype, std=std)


def check(holds, message):
    """Raise Wrong with the message unless it holds."""
    if not holds:
        raise Wrong(message)


def close(given, expected, what, tolerance=1e-10):
    """Two tensors (or numbers) agree to `tolerance` of the largest value; else say how far off."""
    if not isinstance(given, torch.Tensor):
        check(isinstance(given, int | float), f"{what} is a {type(given).__name__}, not a number")
        given = torch.tensor(given, dtype=torch.float64)
    if not isinstance(expected, torch.Tensor):
        expected = torch.tensor(expected, dtype=torch.float64)
    check(
        given.shape == expected.shape,
        f"{what}: shape {tuple(given.shape)}, not {tuple(expected.shape)}",
    )
    if not given.numel():
        return
    given, expected = given.detach().double(), expected.detach().double()
    check(bool(given.isfinite().all()), f"{what}: NaN or infinity")
    error = (given - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    check(
        error <= tolerance * scale,
        f"{what}: off by about 1e{math.floor(math.log10(max(error, 1e-300))):+03d} "
        f"({tolerance * scale:.0e} would be rounding)",
    )


def same(given, expected, what):
    """Two tensors agree in every bit."""
    check(
        given.shape == expected.shape,
        f"{what}: shape {tuple(given.shape)}, not {tuple(expected.shape)}",
    )
    check(given.dtype == expected.dtype, f"{what}: {given.dtype}, not {expected.dtype}")
    wrong = int((given != expected).sum())
    check(not wrong, f"{what}: {wrong} of {given.numel()} entries are wrong")


def equal(given, expected, what):
    """Two plain values are equal."""
    check(given == expected, f"{what}: wrong")


def refuses(call, what, kind=ValueError):
    """The call raises `kind`."""
    try:
        call()
    except kind:
        return
    raise Wrong(f"{what} should raise {kind.__name__}")
