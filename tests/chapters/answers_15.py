"""Chapter 15, NF4."""


def pack(codes):
    return [16 * a + b for a, b in zip(codes[::2], codes[1::2])]


def low_nibble_first(codes):
    return [a + 16 * b for a, b in zip(codes[::2], codes[1::2])]


def bits(block, group=None):
    return 4 + (32 / block if group is None else 8 / block + 32 / (block * group))


def without_second_level(block, group=None):
    return 4 + (32 / block if group is None else 8 / block)


def group_is_256(block, group=None):
    return 4 + (32 / block if group is None else 8 / block + 32 / (block * 256))


REFERENCE = {
    "15.1": pack,
    "15.2": bits,
    "15.3": lambda codes, constants, levels: levels[codes] * constants[:, None],
}
WRONG = {
    "15.1": [
        low_nibble_first,
        lambda codes: [16 * k for k in codes],  # a byte a code
        lambda codes: [15 * a + b for a, b in zip(codes[::2], codes[1::2])],
    ],
    "15.2": [without_second_level, group_is_256, lambda block, group=None: 4 + 8 / block],
    "15.3": [
        lambda codes, constants, levels: levels[codes] * constants.max(),
        lambda codes, constants, levels: levels[codes],
        lambda codes, constants, levels: (levels[codes] * constants[:, None]).abs(),
    ],
}
