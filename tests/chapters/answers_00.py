"""Chapter 00, start here."""

import re


def ids(text):
    return sorted(set(re.findall(r"\(([A-Z][\w-]* \d+)\)", text)))


def ids_each_time(text):
    return sorted(re.findall(r"\(([A-Z][\w-]* \d+)\)", text))


def ids_without_hyphens(text):
    return sorted(set(re.findall(r"\(([A-Z]\w* \d+)\)", text)))


def ids_of_anything(text):
    return sorted(set(re.findall(r"\(([\w-]+ \d+)\)", text)))


REFERENCE = {
    "00.1": "blocks.3.attn.v",
    "00.2": lambda family: min(family, key=lambda name: family[name][2]),
    "00.3": ids,
}
WRONG = {
    "00.1": ["blocks.0.attn.v", "blocks.4.attn.v", "blocks.3.attn.k", 3],
    "00.2": [lambda family: min(family), lambda family: max(family, key=lambda n: family[n][2])],
    "00.3": [ids_each_time, ids_without_hyphens, ids_of_anything],
}
