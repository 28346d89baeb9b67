r"""Documents as small probabilistic programs: one function both writes them and weighs them.

A kind of document is a Python function of two callbacks. `choose(options, weights)` makes one
random decision, `say(word, ...)` writes words, and `choose(options, weights, aloud=True)` says what
it chose:

    def weather(choose, say):
        mood = choose(("good", "bad"))
        say("The", "sky", "was")
        choose(SKIES, WEIGHTS[mood], aloud=True)
        say(".")

Given a random number generator, the callbacks sample. Given a text, they replay: at each decision
every option is tried, and a branch dies at the first word that is not the text's. What survives are
all the derivations d of the text x, hidden decisions such as the mood included, so these are exact
and not estimates:

    (Town 1)  P(x)         = sum over derivations d of x of  prod_i P(d_i | d_<i)
    (Town 2)  P(w | x_<t)  = P(x_<t w ...) / P(x_<t ...)     the perfect teacher's next word
    (Town 3)  H(x)         = -ln P(x), in nats               a model can reach its mean, no less

(Town 2) falls out of the same walk: a branch that dies at word t because it says w instead adds its
weight to row t.

Footgun: the replay starts over at every silent decision, the price of kinds that are plain code
without a rule of their own for parsing. A decision taken aloud costs nothing: the text tells which
option it was. Prefer `aloud`, and say things early.
"""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Sequence

END = "<end>"  # said once by every document, behind its last word
DocumentKind = Callable[[Callable, Callable], None]


def sample(kind: DocumentKind, rng: random.Random) -> str:
    """One document of this kind, its words joined by spaces."""
    words: list[str] = []

    def choose(options, weights=None, aloud=False):
        option = _draw(options, weights or [1] * len(options), rng)
        if aloud:
            words.append(option)
        return option

    kind(choose, lambda *said: words.extend(said))
    return " ".join(words)


def _draw(options, weights, rng):
    threshold = rng.random() * sum(weights)
    for option, weight in zip(options, weights, strict=True):
        threshold -= weight
        if threshold < 0:
            return option
    # rounding, at the very end: the last option that can be drawn
    return next(o for o, w in zip(reversed(options), reversed(weights), strict=True) if w)


def log_prob(kind: DocumentKind, text: str) -> float:
    """ln P(text) under this kind of document, hidden decisions summed out; -inf if it cannot be
    written. (Town 1)"""
    probability = sum(weight for _, weight in _derivations(kind, _words(text)))
    return math.log(probability) if probability > 0 else -math.inf


def nats(kind: DocumentKind, texts: Sequence[str]) -> float:
    """Mean of -ln P over the texts, nats a document: the floor of any model of this kind. (Town
    3)"""
    if not texts:
        raise ValueError("no texts to take the mean over")
    return -math.fsum(log_prob(kind, text) for text in texts) / len(texts)  # (Town 3)


def next_words(kind: DocumentKind, text: str) -> list[dict[str, float]]:
    """The perfect model's distribution of each word of `text` and of the END behind it, given the
    words before. (Town 2)

    Row t maps each word possible at place t to its probability. Raises ValueError where the text
    leaves this kind's support.
    """
    words = _words(text)
    table: list[dict[str, float]] = [defaultdict(float) for _ in words]
    for _ in _derivations(kind, words, table):
        pass
    for place, row in enumerate(table):
        if not row:
            before = " ".join(words[:place])
            raise ValueError(
                f"no document of this kind begins with {before!r}, so nothing follows it"
            )
    return [{w: p / math.fsum(row.values()) for w, p in row.items()} for row in table]


def enumerate_documents(kind: DocumentKind) -> dict[str, float]:
    """Every document of this kind with its probability. For small worlds: the number of derivations
    is a product."""
    found: dict[str, float] = defaultdict(float)
    for said, weight in _derivations(kind, None):
        found[" ".join(said[:-1])] += weight
    return dict(found)


def _words(text: str) -> list[str]:
    return [*text.split(" "), END]


class _Fork(Exception):
    """A decision that the path does not cover yet."""

    def __init__(self, probabilities):
        self.probabilities = probabilities


class _DeadEnd(Exception):
    """The replay said a word that is not the text's."""


def _derivations(kind, words, table=None):
    """Yield (words said, joint probability) of each derivation of `words`, or of everything if
    `words` is None."""
    paths = [((), 1.0)]  # decisions taken, as indices, and the product of their probabilities
    while paths:
        replay = _Replay(*paths.pop(), words, table)
        try:
            kind(replay.choose, replay.say)
            replay.say(END)
        except _DeadEnd:
            continue
        except _Fork as fork:
            paths += [
                (replay.path + (i,), replay.weight * p)
                for i, p in enumerate(fork.probabilities)
                if p > 0
            ]
            continue
        if words is None or len(replay.said) == len(words):
            yield replay.said, replay.weight


class _Replay:
    """Callbacks that follow `path`, go on as long as the text decides, and stop at the first
    decision it does not."""

    def __init__(self, path, weight, words, table):
        self.path, self.weight, self.words, self.table = path, weight, words, table
        self.taken, self.said = 0, []

    def choose(self, options, weights=None, aloud=False):
        if self.taken == len(self.path):
            total = len(options) if weights is None else sum(weights)
            probabilities = [(1 if weights is None else w) / total for w in weights or options]
            if not aloud or self.words is None:
                raise _Fork(probabilities)
            self._follow_the_text(options, probabilities)
        self.taken += 1
        option = options[self.path[self.taken - 1]]
        if aloud:
            self.said.append(option)
        return option

    def _follow_the_text(self, options, probabilities):
        place = len(self.said)
        if place >= len(self.words):
            raise _DeadEnd
        for option, p in zip(options, probabilities, strict=True):
            self._count(place, option, p)
        if self.words[place] not in options:
            raise _DeadEnd
        chosen = options.index(self.words[place])
        self.path += (chosen,)
        self.weight *= probabilities[chosen]
        if self.weight == 0:
            raise _DeadEnd

    def say(self, *said):
        for word in said:
            place = len(self.said)
            self.said.append(word)
            if self.words is None:
                continue
            # words before the last fork were counted by the replay that forked there
            if self.taken == len(self.path):
                self._count(place, word, 1.0)
            if place >= len(self.words) or word != self.words[place]:
                raise _DeadEnd

    def _count(self, place, word, probability):
        if self.table is not None and place < len(self.table) and probability > 0:
            self.table[place][word] += self.weight * probability
