"""Chapter 21, side by side."""


def beaten(a, b):
    """Whether b is at most as large as a, at least as good, and not the same."""
    return b[0] <= a[0] and b[1] >= a[1] and b != a


def front(points):
    return {n for n, p in points.items() if not any(beaten(p, q) for q in points.values())}


def in_the_order_given(points):
    best, found = -1.0, set()
    for name, (_, gain) in points.items():
        if gain > best:
            best = gain
            found.add(name)
    return found


REFERENCE = {
    "21.1": lambda quality, base, full: (quality - base) / (full - base),
    "21.2": front,
}
WRONG = {
    "21.1": [
        lambda quality, base, full: quality / full,
        lambda quality, base, full: abs(quality - full) / abs(base - full),
        lambda quality, base, full: min(1.0, (quality - base) / (full - base)),
    ],
    "21.2": [
        in_the_order_given,
        lambda points: {
            n for n, (_, g) in points.items() if g == max(p[1] for p in points.values())
        },
        lambda points: set(points),
    ],
}
