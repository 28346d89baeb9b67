"""Chapter 02, Tiny Town and its floor."""

import math


def entropy(weights):
    shares = [w / sum(weights) for w in weights]
    return -sum(p * math.log(p) for p in shares if p)


def posterior(words):
    bright, grey = words.count("bright"), words.count("grey")
    return 1 / (1 + 3.0 ** (grey - bright))


REFERENCE = {
    "02.1": entropy,
    "02.2": posterior,
    "02.3": lambda nats, text: nats / math.log(2) / len(text.encode()),
}
WRONG = {
    "02.1": [
        lambda weights: entropy(weights) / math.log(2),
        lambda weights: math.log(len([w for w in weights if w])),
        lambda weights: -math.log(max(weights) / sum(weights)),
    ],
    "02.2": [
        lambda words: 0.75 ** words.count("bright") * 0.25 ** words.count("grey"),
        lambda words: words.count("bright") / len(words) if words else 0.5,
    ],
    "02.3": [
        lambda nats, text: nats / math.log(2) / len(text),
        lambda nats, text: nats / len(text.encode()),
    ],
}
