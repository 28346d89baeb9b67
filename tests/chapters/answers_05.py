"""Chapter 05, adapters."""


def adapted(f, W_1, b_1, W_2, b_2, s):
    return f + s * ((f @ W_1.T + b_1).relu() @ W_2.T + b_2)


def without_residual(f, W_1, b_1, W_2, b_2, s):
    return s * ((f @ W_1.T + b_1).relu() @ W_2.T + b_2)


def bias_not_scaled(f, W_1, b_1, W_2, b_2, s):
    return f + s * ((f @ W_1.T + b_1).relu() @ W_2.T) + b_2


def not_bent(f, W_1, b_1, W_2, b_2, s):
    return f + s * ((f @ W_1.T + b_1) @ W_2.T + b_2)


def weights(x, Z, Q, b_q, K, b_k):
    return ((Z @ K.T + b_k) @ (Q @ x + b_q)).softmax(0)


def divided(x, Z, Q, b_q, K, b_k):
    return ((Z @ K.T + b_k) @ (Q @ x + b_q) / len(x) ** 0.5).softmax(0)


def without_biases(x, Z, Q, b_q, K, b_k):
    return (Z @ K.T @ (Q @ x)).softmax(0)


def not_normalised(x, Z, Q, b_q, K, b_k):
    return (Z @ K.T + b_k) @ (Q @ x + b_q)


REFERENCE = {
    "05.1": adapted,
    "05.2": lambda budget, D, L: max(0, (budget // L - D) // (2 * D + 1)),
    "05.3": weights,
}
WRONG = {
    "05.1": [without_residual, bias_not_scaled, not_bent],
    "05.2": [
        lambda budget, D, L: budget // (L * 2 * D),
        lambda budget, D, L: max(0, (budget // L - D) // (2 * D + 1)) + 1,
        lambda budget, D, L: max(0, (budget // L - D) // (2 * D + 1) - 1),
    ],
    "05.3": [divided, without_biases, not_normalised],
}
