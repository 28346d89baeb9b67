r"""Byte-pair encoding: train a vocabulary, save it, load it, use it (Sennrich et al. 2016,
arXiv:1508.07909; bytes as in GPT-2).

Text is cut into *pieces* by GPT-2's pattern (a word with the space before it, a run of digits, a
run of punctuation). A piece is a row of UTF-8 bytes; training joins, again and again, the two
neighbours that stand side by side most often:

    (BPE 1)  merge(a, b) = argmax over pairs of ( count(a, b), bytes(a) + bytes(b), bytes(a) )

The second and third entries only break ties, so the same texts give the same vocabulary everywhere,
in any order of the texts. The rank of a token is when it was made: the 256 single bytes come first
(ranks 0 to 255), so *any* text can be encoded and decoding is exact. Encoding joins the neighbours
of lowest rank first and is done by tiktoken, in Rust.

One more id stands behind the ranks: `eot`, the end-of-text mark. It is no text: `encode` never
returns it, whatever the text says, and `decode` leaves it out. Where it is not the id behind the
last rank (many vocabularies have it first), its characters and its id are one more row of the file.

How this differs from tiktoken's own loader: nothing is downloaded and nothing is cached. tiktoken's
`load_tiktoken_bpe` caches by the *path* in a shared temporary folder, so that a vocabulary trained
anew comes back as the old one.

Footguns
- A vocabulary without all 256 single bytes makes tiktoken panic in Rust, past every `except
  Exception`: refused at construction.
- Prompt and completion are encoded apart and put in a row. Cut at a space, and give the space to
  the second part, or the
  tokens at the seam are not the ones the whole text would have.
"""

import base64
import json
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex
import tiktoken

from minipeft.atomic import write_atomically

# GPT-2's pattern. Contractions, words, numbers, punctuation, and white space that does not lead a
# word.
PIECES = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
FILE_NAME = "tokenizer.tiktoken"
EOT = "<|endoftext|>"


# --------------------------------------------------------------------------------------------------
# ------------ Training ----------------------------------------------------------------------------
# ----------------------------------


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Ranks {token bytes: id} learned from `texts`: 256 bytes, then merges, `vocab_size` ids with
    the end-of-text mark.

    Stops early when no pair is left to merge, so the result may be smaller. Raises ValueError for a
    size below 257 and for a single string in place of a collection of texts.
    """
    if vocab_size < 257:
        raise ValueError(
            f"vocab_size is {vocab_size}: 256 bytes and the end-of-text mark need at least 257"
        )
    if isinstance(texts, str | bytes):
        raise ValueError("texts is one string; give a list of texts, such as [text]")
    pattern = regex.compile(PIECES)
    # Counting pieces first is what makes this fast: a corpus of millions of words has a few
    # thousand different ones.
    counts = Counter(piece for text in texts for piece in pattern.findall(text))
    pieces = [[bytes([b]) for b in piece.encode()] for piece in counts]
    return _merge(pieces, list(counts.values()), vocab_size - 1)


def _merge(pieces: list[list[bytes]], counts: list[int], size: int) -> dict[bytes, int]:
    """Run (BPE 1) on pieces that occur counts[i] times until there are `size` tokens or no pair is
    left."""
    ranks = {bytes([b]): b for b in range(256)}
    pairs, where = Counter(), defaultdict(set)
    for i, piece in enumerate(pieces):
        for pair in pairwise(piece):
            pairs[pair] += counts[i]
            where[pair].add(i)
    while len(ranks) < size:
        best = max(
            (p for p in pairs if pairs[p] > 0), key=lambda p: _priority(p, pairs), default=None
        )
        if best is None:
            break
        # Two pairs can spell the same bytes ("a"+"bc", "ab"+"c"): the token exists already and
        # keeps its rank.
        ranks.setdefault(best[0] + best[1], len(ranks))
        _join_everywhere(best, pieces, counts, pairs, where)
    return ranks


def _priority(pair: tuple[bytes, bytes], pairs: Counter) -> tuple:
    return pairs[pair], pair[0] + pair[1], pair[0]  # (BPE 1)


def _join_everywhere(pair, pieces, counts, pairs, where) -> None:
    """Replace `pair` by its union in each piece that holds it, and keep the counts of all pairs
    right."""
    for i in where.pop(pair):
        old = pieces[i]
        new = _join(old, pair)
        for p in pairwise(old):
            pairs[p] -= counts[i]
        for p in pairwise(new):
            pairs[p] += counts[i]
            where[p].add(i)
        pieces[i] = new
    del pairs[pair]


def _join(piece: Sequence[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    joined, i = [], 0
    while i < len(piece):
        if tuple(piece[i : i + 2]) == pair:
            joined.append(pair[0] + pair[1])
            i += 2
        else:
            joined.append(piece[i])
            i += 1
    return joined


# --------------------------------------------------------------------------------------------------
# ------------ Use ---------------------------------------------------------------------------------
# -----------------------------


class Tokenizer:
    """Text to ids and back over given ranks {token bytes: id}. `eot` is the end-of-text id,
    `vocab_size` counts it.

    Raises ValueError if a single byte is missing from the ranks, if an id is negative or used
    twice, or if `eot` is taken.
    """

    def __init__(self, ranks: dict[bytes, int], eot: int | None = None):
        missing = [b for b in range(256) if bytes([b]) not in ranks]
        if missing:
            raise ValueError(
                f"the ranks lack {len(missing)} of the 256 single bytes (the first is "
                f"{missing[0]:#04x}), so some text could not be encoded; start from "
                "{bytes([b]): b for b in range(256)} as train_bpe does"
            )
        wrong = [rank for rank in ranks.values() if not 0 <= rank < 2**31]
        if wrong:
            raise ValueError(f"{wrong[0]} is no id: they count from 0")
        if len(set(ranks.values())) != len(ranks):
            raise ValueError("two tokens share one id: the ranks must be a one-to-one table")
        self.ranks = dict(ranks)
        self.eot = max(ranks.values()) + 1 if eot is None else eot
        if self.eot in set(ranks.values()):
            raise ValueError(f"the end-of-text id {self.eot} is already the id of a token")
        self._encoding = tiktoken.Encoding(
            name="minipeft",
            pat_str=PIECES,
            mergeable_ranks=self.ranks,
            special_tokens={EOT: self.eot},
        )

    @property
    def vocab_size(self) -> int:
        """Rows the embedding needs: the largest id + 1."""
        return max(self.eot, max(self.ranks.values())) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. The characters `<|endoftext|>` in it are plain text, never the mark. str
        only (TypeError)."""
        if not isinstance(text, str):
            raise TypeError(
                f"encode takes a str, not {type(text).__name__}; "
                "decode bytes with .decode('utf-8') first"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text is not valid Unicode at character {error.start}: {error.reason}"
            ) from error
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, without end-of-text marks. Bytes that are no UTF-8 (a cut character)
        become U+FFFD."""
        ids = [int(i) for i in ids]
        unknown = [i for i in ids if i != self.eot and i not in self._known]
        if unknown:
            raise ValueError(f"id {unknown[0]} is no token of this vocabulary of {self.vocab_size}")
        return self._encoding.decode([i for i in ids if i != self.eot])

    @property
    def _known(self) -> set[int]:
        known = self.__dict__.get("_ids")
        if known is None:
            known = self.__dict__["_ids"] = set(self.ranks.values())
        return known

    def save(self, path: str | os.PathLike) -> Path:
        """Write the ranks in tiktoken's format (base64 token, space, id); a folder gets
        `tokenizer.tiktoken` in it."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        table = self.ranks
        if self.eot != max(table.values()) + 1:
            table = table | {EOT.encode(): self.eot}
        rows = sorted(table.items(), key=lambda item: item[1])
        text = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in rows)
        write_atomically(path, text.encode())
        return path

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """From a ranks file, or from a model folder that holds one (`tokenizer.tiktoken`) or
        GPT-2's own files."""
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME if (path / FILE_NAME).exists() else path
            if path.is_dir():
                return cls.from_gpt2_folder(path)
        if not path.exists():
            raise FileNotFoundError(
                f"no tokenizer at {path}: give a {FILE_NAME} file or a model folder that holds one"
            )
        ranks = _read_ranks(path)
        return cls(ranks, ranks.pop(EOT.encode(), None))

    @classmethod
    def from_gpt2_folder(cls, folder: str | os.PathLike) -> "Tokenizer":
        """GPT-2's own vocabulary from `vocab.json` (with `merges.txt`) or `tokenizer.json` in a
        checkpoint folder."""
        vocab, merges = _read_gpt2(Path(folder))
        to_byte = {char: byte for byte, char in _byte_characters().items()}
        eot = vocab.pop(EOT, None)
        try:
            ranks = {bytes(to_byte[c] for c in token): rank for token, rank in vocab.items()}
        except KeyError as error:
            raise ValueError(
                f"{folder}: {error} is no byte of GPT-2's alphabet; only byte-level BPE opens here"
            ) from error
        _check_merge_order(ranks, merges, to_byte, folder)
        return cls(ranks, eot)


def _read_ranks(path: Path) -> dict[bytes, int]:
    # Two lines instead of tiktoken's loader, which caches by the path's string and returns stale
    # ranks.
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: not 'base64-token rank' but {line[:60]!r}"
            ) from error
    return ranks


# --------------------------------------------------------------------------------------------------
# ------------ GPT-2's files -----------------------------------------------------------------------
# ---------------------------------------


def _byte_characters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte: itself where it is printable, else the next
    character from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + n) for n, b in enumerate(hidden)}


def _read_gpt2(folder: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges in order) from vocab.json and merges.txt, else from tokenizer.json."""
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [
            tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
        ]
        return _read_json(folder / "vocab.json"), merges
    if (folder / "tokenizer.json").exists():
        content = _read_json(folder / "tokenizer.json")
        model = content.get("model", {})
        if model.get("type", "BPE") != "BPE" or "vocab" not in model:
            raise ValueError(
                f"{folder / 'tokenizer.json'}: its model is {model.get('type')!r}; "
                "only BPE opens here"
            )
        vocab = model["vocab"] | {t["content"]: t["id"] for t in content.get("added_tokens", [])}
        return vocab, [
            tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]
        ]
    raise FileNotFoundError(
        f"{folder} has neither {FILE_NAME}, nor vocab.json with merges.txt, nor tokenizer.json"
    )


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error


def _check_merge_order(ranks, merges, to_byte, folder) -> None:
    # tiktoken merges by the rank of the *result*. That is the same as the order of merges only if
    # the results' ids rise with it, as GPT-2's do; a vocabulary where they do not would be encoded
    # differently, silently.
    results = [bytes(to_byte[c] for c in left + right) for left, right in merges]
    unknown = [r for r in results if r not in ranks]
    if unknown:
        raise ValueError(
            f"{folder}: the merges make {unknown[0]!r}, which the vocabulary lacks; "
            "the files do not match"
        )
    ids = [ranks[r] for r in results]
    if any(a > b for a, b in pairwise(ids)):
        raise ValueError(
            f"{folder}: ids do not rise in the order of the merges, "
            "so tiktoken would encode differently"
        )
