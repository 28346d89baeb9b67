"""What goes wrong in byte-pair encoding."""

from tests.mutants import Mutant

FILE = "minipeft/tokenizer.py"
TESTS = ["tests/test_tokenizer.py"]

MUTANTS = [
    Mutant(
        name="ties left to the order of a dictionary",
        file=FILE,
        find="return pairs[pair], pair[0] + pair[1], pair[0]  # (BPE 1)",
        replace="return pairs[pair]",
        why="max returns something, and it works on one machine",
        invariant="(BPE 1): the same vocabulary for any order of the texts",
    ),
    Mutant(
        name="counts of pieces forgotten",
        file=FILE,
        find="pairs[pair] += counts[i]",
        replace="pairs[pair] += 1",
        why="each different piece is seen once in the loop",
        invariant="(BPE 1): pairs count as often as their piece occurs",
    ),
    Mutant(
        name="old pairs keep their counts",
        file=FILE,
        find="pairs[p] -= counts[i]",
        replace="pairs[p] -= 0",
        why="only new neighbours seem to change",
        invariant="(BPE 1)",
    ),
    Mutant(
        name="new pairs are not found again",
        file=FILE,
        find="            where[p].add(i)",
        replace="            where[p]",
        why="the counts are kept, and the index of places looks like a cache of them",
        invariant="(BPE 1): a pair that a merge made is merged where it stands",
    ),
    Mutant(
        name="overlapping pairs merged twice",
        file=FILE,
        find="            i += 2\n",
        replace="            i += 1\n",
        why="one index step per turn",
        invariant="decoding gives the text back",
        hangs=True,
    ),
    Mutant(
        name="the vocabulary forgets the end-of-text mark",
        file=FILE,
        find="return _merge(pieces, list(counts.values()), vocab_size - 1)",
        replace="return _merge(pieces, list(counts.values()), vocab_size)",
        why="the mark is added elsewhere",
        invariant="vocab_size counts the mark",
    ),
    Mutant(
        name="special tokens inside text",
        file=FILE,
        find="return self._encoding.encode_ordinary(text)",
        replace='return self._encoding.encode(text, allowed_special="all")',
        why="encode raises on the mark, and this makes it stop",
        invariant="text is never the mark",
    ),
    Mutant(
        name="the mark is decoded",
        file=FILE,
        find="return self._encoding.decode([i for i in ids if i != self.eot])",
        replace="return self._encoding.decode(ids)",
        why="tiktoken can spell it",
        invariant="decode leaves marks out",
    ),
    Mutant(
        name="tiktoken's caching loader",
        file=FILE,
        find="        ranks = _read_ranks(path)",
        replace=(
            "        from tiktoken.load import load_tiktoken_bpe\n"
            "        ranks = load_tiktoken_bpe(str(path))"
        ),
        why="it is there, and reads the same format",
        invariant="a file written anew is read anew",
    ),
    Mutant(
        name="the mark's own id is not saved",
        file=FILE,
        find="        if self.eot != max(table.values()) + 1:",
        replace="        if False:",
        why="tiktoken's format has rows for tokens only, and usually the mark comes behind them",
        invariant="a vocabulary with the mark at another id is saved and loaded as it is",
    ),
    Mutant(
        name="the mark's row read as a token",
        file=FILE,
        find="        return cls(ranks, ranks.pop(EOT.encode(), None))",
        replace="        return cls(ranks)",
        why="every row of the file looks like a token",
        invariant="a vocabulary with the mark at another id is saved and loaded as it is",
    ),
    Mutant(
        name="GPT-2's letters taken as UTF-8",
        file=FILE,
        find="ranks = {bytes(to_byte[c] for c in token): rank for token, rank in vocab.items()}",
        replace="ranks = {t.replace(chr(0x120), ' ').encode(): r for t, r in vocab.items()}",
        why="only the space looks special",
        invariant="GPT-2's bytes come back",
    ),
    Mutant(
        name="any order of merges",
        file=FILE,
        find="if any(a > b for a, b in pairwise(ids)):",
        replace="if False and any(a > b for a, b in pairwise(ids)):",
        why="tiktoken never complains",
        invariant="a vocabulary that would be encoded differently is refused",
    ),
]
