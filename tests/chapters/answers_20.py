"""Chapter 20, Triton kernels on a laptop."""

import math


def online(m, s, block):
    new = max(m, *block)
    return new, s * math.exp(m - new) + sum(math.exp(b - new) for b in block)


def not_scaled(m, s, block):
    new = max(m, *block)
    return new, s + sum(math.exp(b - new) for b in block)


def block_alone(m, s, block):
    new = max(block)
    return new, s * math.exp(min(0.0, m - new)) + sum(math.exp(b - new) for b in block)


def touched(pid, BLOCK, n):
    lanes = range(pid * BLOCK, (pid + 1) * BLOCK)
    return [i for i in lanes if i < n], -(-n // BLOCK)


def without_a_mask(pid, BLOCK, n):
    return list(range(pid * BLOCK, (pid + 1) * BLOCK)), -(-n // BLOCK)


REFERENCE = {
    "20.1": online,
    "20.2": touched,
    "20.3": lambda rows, V, b, beta, start: max(start, 3 * rows * V * b / beta * 1e6),
}
WRONG = {
    "20.1": [not_scaled, block_alone],
    "20.2": [
        without_a_mask,
        lambda pid, BLOCK, n: (touched(pid, BLOCK, n)[0], n // BLOCK),
        lambda pid, BLOCK, n: (touched(pid, BLOCK, n)[0], n // BLOCK + 1),
    ],
    "20.3": [
        lambda rows, V, b, beta, start: 3 * rows * V * b / beta * 1e6,
        lambda rows, V, b, beta, start: max(start, 2 * rows * V * b / beta * 1e6),
        lambda rows, V, b, beta, start: start + 3 * rows * V * b / beta * 1e6,
    ],
}
