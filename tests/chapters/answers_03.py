"""Chapter 03, full fine-tuning and forgetting."""

import math


def adamw(w, g, m, v, t, lr, decay):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    m, v = m / (1 - 0.9**t), v / (1 - 0.999**t)
    return w - lr * decay * w - lr * m / (math.sqrt(v) + 1e-8)


def uncorrected(w, g, m, v, t, lr, decay):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w - lr * decay * w - lr * m / (math.sqrt(v) + 1e-8)


def without_decay(w, g, m, v, t, lr, decay):
    return adamw(w, g, m, v, t, lr, 0.0)


def corrected_as_in_step_one(w, g, m, v, t, lr, decay):
    m, v = (0.9 * m + 0.1 * g) / 0.1, (0.999 * v + 0.001 * g * g) / 0.001
    return w - lr * decay * w - lr * m / (math.sqrt(v) + 1e-8)


def on_top(path, n_layer, layers):
    parts = path.split(".")
    return parts[0] == "blocks" and int(parts[1]) >= n_layer - layers


REFERENCE = {
    "03.1": adamw,
    "03.2": lambda total, trained: 4 * total + 12 * trained,
    "03.3": on_top,
}
WRONG = {
    "03.1": [uncorrected, without_decay, corrected_as_in_step_one],
    "03.2": [
        lambda total, trained: 16 * trained,
        lambda total, trained: 4 * total + 16 * trained,
        lambda total, trained: 16 * total,
    ],
    "03.3": [
        lambda path, n_layer, layers: path.startswith(f"blocks.{n_layer - layers}"),
        lambda path, n_layer, layers: path.split(".")[1] < str(layers),
        lambda path, n_layer, layers: not path.startswith("blocks.0"),
    ],
}
