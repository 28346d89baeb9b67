"""Chapter 04, BitFit."""

REFERENCE = {
    "04.1": lambda D, F, L: (7 * D + F) * L + D,
    "04.2": lambda W, delta_c: W @ delta_c,
    "04.3": lambda W_o, b_o, b_v: b_o + W_o @ b_v,
}
WRONG = {
    "04.1": [
        lambda D, F, L: 11 * D * L + D,
        lambda D, F, L: (7 * D + F) * L,
        lambda D, F, L: (7 * D + F + D) * L,
    ],
    "04.2": [
        lambda W, delta_c: W.T @ delta_c if len(set(W.shape)) == 1 else W @ delta_c,
        lambda W, delta_c: W.sum(1),
        lambda W, delta_c: delta_c,
    ],
    "04.3": [
        lambda W_o, b_o, b_v: b_o + b_v,
        lambda W_o, b_o, b_v: b_o + W_o.T @ b_v,
        lambda W_o, b_o, b_v: W_o @ b_v,
    ],
}
