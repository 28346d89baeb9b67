r"""The perfect teacher: the exact distribution of every next token, from the generator itself.

Distillation usually learns from a larger network's guesses. Here the true P(next token | text so
far) is known (Town 2), so a student's distance from the truth, and a network teacher's, can be told
apart.
"""

import torch

from minipeft.town import grammar


def soft_labels(tokenizer, kind, text: str) -> torch.Tensor:
    """(T, V) float32 rows that sum to 1: row t is the exact distribution of the t-th label of the
    document `text`.

    Aligned like all labels: ids = [eot] + tokens, and row t is about what follows ids[: t + 1]; the
    last row is about the end. `kind` is the document kind the teacher believes in, such as
    town.mix(). Raises ValueError for a text that kind cannot write, and for a word that is not one
    token of the tokenizer.
    """
    rows = grammar.next_words(kind, text)
    table = torch.zeros(len(rows), tokenizer.vocab_size)
    for t, row in enumerate(rows):
        for word, probability in row.items():
            table[t, _token(tokenizer, word, first=t == 0)] += probability
    return table


def _token(tokenizer, word, first):
    if word == grammar.END:
        return tokenizer.eot
    ids = tokenizer.encode(word if first else " " + word)
    if len(ids) != 1:
        raise ValueError(
            f"{word!r} is {len(ids)} tokens; the teacher needs a tokenizer in which words are "
            "tokens, such as the shipped one"
        )
    return ids[0]
