"""What tokenizer.py promises: the same vocabulary everywhere, exact text back, no network, readable
errors.
"""

import json
import random
import socket
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipeft.tokenizer import FILE_NAME, PIECES, Tokenizer, train_bpe

TEXTS = ["low lower lowest", "new newer newest", "wide wider widest low low new", "héllo wörld 42"]
RANKS = train_bpe(TEXTS, 300)
TOKENIZER = Tokenizer(RANKS)


def naive_bpe(texts, size):
    """(BPE 1) with every count made anew at every merge, and no bookkeeping to get wrong."""
    import regex

    pieces = Counter(p for text in texts for p in regex.findall(PIECES, text))
    split = {p: [bytes([b]) for b in p.encode()] for p in pieces}
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size - 1:
        pairs = Counter()
        for p, parts in split.items():
            for a, b in pairwise(parts):
                pairs[a, b] += pieces[p]
        if not pairs:
            break
        a, b = max(pairs, key=lambda pair: (pairs[pair], pair[0] + pair[1], pair[0]))
        ranks.setdefault(a + b, len(ranks))
        for p, parts in split.items():
            joined = []
            for part in parts:
                if joined and joined[-1] == a and part == b:
                    joined[-1] = a + b
                else:
                    joined.append(part)
            split[p] = joined
    return ranks


# -- training


def test_bytes_come_first_and_ranks_count_on():
    assert [RANKS[bytes([b])] for b in range(256)] == list(range(256))
    assert sorted(RANKS.values()) == list(range(len(RANKS)))


def test_bpe_1_merges_the_commonest_pair_and_breaks_ties_by_bytes():
    # ab twice, cd twice: a tie that bytes decide; then the only pair left
    assert list(train_bpe(["ab cd", "ab", "cd"], 259))[256:] == [b"cd", b"ab"]


@given(st.lists(st.text("abc é", max_size=12), min_size=1, max_size=6), st.integers(257, 290))
def test_bpe_1_equals_the_definition(texts, size):
    assert train_bpe(texts, size) == naive_bpe(texts, size)


def test_overlapping_repeats_are_merged_from_the_left():
    texts = ["aaaaa aaa", "aaaa baab"]
    assert train_bpe(texts, 262) == naive_bpe(texts, 262)


def test_the_order_of_the_texts_does_not_matter():
    shuffled = TEXTS[:]
    random.Random(3).shuffle(shuffled)
    assert list(train_bpe(shuffled, 300).items()) == list(RANKS.items())


def test_vocabulary_size_counts_the_end_of_text_mark():
    assert Tokenizer(train_bpe(TEXTS, 270)).vocab_size == 270


def test_training_stops_when_nothing_is_left_to_merge():
    ranks = train_bpe(["ab"], 10_000)
    assert len(ranks) == 257 and ranks[b"ab"] == 256


@pytest.mark.parametrize("size", [0, 256])
def test_a_vocabulary_too_small_for_the_bytes_is_refused(size):
    with pytest.raises(ValueError, match=f"{size}: 256 bytes"):
        train_bpe(TEXTS, size)


def test_one_string_in_place_of_texts_is_refused():
    with pytest.raises(ValueError, match="list of texts"):
        train_bpe("low lower", 300)


# -- use


@given(st.text())
def test_decode_undoes_encode_for_any_text(text):
    if "\ud800" <= max(text, default=" ") <= "\udfff":
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_ids_follow_the_ranks():
    assert TOKENIZER.encode(" low") == [RANKS[b" low"]]


def test_the_end_of_text_mark_is_no_text():
    ids = TOKENIZER.encode("low<|endoftext|>new")
    assert TOKENIZER.eot not in ids
    assert TOKENIZER.decode(ids) == "low<|endoftext|>new"
    assert TOKENIZER.decode([TOKENIZER.eot, *TOKENIZER.encode("low"), TOKENIZER.eot]) == "low"


def test_eot_is_the_last_id():
    assert TOKENIZER.eot == len(RANKS) == TOKENIZER.vocab_size - 1


def test_half_a_character_decodes_to_the_replacement_mark():
    assert TOKENIZER.decode([RANKS[bytes([0xC3])]]) == "\ufffd"


def test_missing_bytes_are_named_before_rust_panics():
    ranks = {k: v for k, v in RANKS.items() if k != b"\x41"}
    with pytest.raises(ValueError, match=r"lack 1 of the 256 single bytes.*0x41"):
        Tokenizer(ranks)


def test_an_id_used_twice_is_refused():
    with pytest.raises(ValueError, match="share one id"):
        Tokenizer(RANKS | {b"zzz": 0})


@pytest.mark.parametrize("rank", [-1, 2**40])
def test_a_number_that_is_no_id_is_named(rank):
    with pytest.raises(ValueError, match=f"{rank} is no id"):
        Tokenizer(RANKS | {b"no such token": rank})


def test_an_end_of_text_id_that_is_taken_is_refused():
    with pytest.raises(ValueError, match="end-of-text id 7"):
        Tokenizer(RANKS, eot=7)


def test_unknown_ids_are_named():
    with pytest.raises(ValueError, match="id 5000 is no token"):
        TOKENIZER.decode([1, 5000])


def test_only_valid_text_is_encoded():
    with pytest.raises(TypeError, match="not bytes"):
        TOKENIZER.encode(b"low")
    with pytest.raises(ValueError, match="not valid Unicode at character 1"):
        TOKENIZER.encode("a\ud800")


# -- files


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    path = TOKENIZER.save(tmp_path)  # a folder
    assert path == tmp_path / FILE_NAME
    for source in (path, tmp_path):
        assert Tokenizer.load(source).ranks == RANKS
    assert [p.name for p in tmp_path.iterdir()] == [FILE_NAME]  # no temporary file stays


def test_a_file_written_anew_is_read_anew(tmp_path):
    # tiktoken's own loader caches by path and would return the first one
    path = TOKENIZER.save(tmp_path / "ranks.tiktoken")
    assert Tokenizer.load(path).ranks == RANKS
    other = train_bpe(["something else entirely"], 262)
    Tokenizer(other).save(path)
    assert Tokenizer.load(path).ranks == other


@pytest.mark.parametrize("eot", [0, 1000])
def test_a_mark_that_is_not_the_last_id_is_saved_too(tmp_path, eot):
    ranks = {token: rank + 1 for token, rank in RANKS.items()}  # as with the mark at 0
    opened = Tokenizer.load(Tokenizer(ranks, eot).save(tmp_path))
    assert (opened.ranks, opened.eot) == (ranks, eot)
    assert eot not in opened.encode("<|endoftext|>")


def test_tiktokens_own_loader_reads_our_file(tmp_path):
    from tiktoken.load import load_tiktoken_bpe

    assert load_tiktoken_bpe(str(TOKENIZER.save(tmp_path / "for_tiktoken"))) == RANKS


def test_a_broken_line_is_named(tmp_path):
    path = TOKENIZER.save(tmp_path)
    path.write_text(path.read_text() + "no base64 here at all\n")
    with pytest.raises(ValueError, match=f"line {len(RANKS) + 1}: not 'base64-token rank'"):
        Tokenizer.load(path)


def test_a_binary_file_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * 3)
    with pytest.raises(ValueError, match="line 1"):
        Tokenizer.load(path)


def test_a_missing_file_says_what_to_give(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at"):
        Tokenizer.load(tmp_path / "nothing.tiktoken")
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer.tiktoken, nor vocab.json"):
        Tokenizer.load(tmp_path)


# -- GPT-2's files


def gpt2_alphabet():
    """Byte -> printable character, from the rule: printable Latin-1 stays, the rest moves up."""
    keep = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    table, free = {b: chr(b) for b in keep}, 256
    for b in range(256):
        if b not in table:
            table[b], free = chr(free), free + 1
    return table


def write_gpt2_files(folder, ranks, merges, eot, form):
    table = gpt2_alphabet()

    def spell(token):
        return "".join(table[b] for b in token)

    vocab = {spell(t): r for t, r in ranks.items()}
    pairs = [f"{spell(a)} {spell(b)}" for a, b in merges]
    if form == "two files":
        vocab["<|endoftext|>"] = eot
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    else:
        content = {"model": {"type": "BPE", "vocab": vocab, "merges": pairs}}
        content["added_tokens"] = [{"id": eot, "content": "<|endoftext|>"}]
        (folder / "tokenizer.json").write_text(json.dumps(content))


GPT2_RANKS = {bytes([b]): i for i, b in enumerate(reversed(range(256)))}
GPT2_MERGES = [(b"l", b"o"), (b"lo", b"w"), (b" ", b"low"), (b"e", b"r"), (b"\xc3", b"\xa9")]
for _a, _b in GPT2_MERGES:
    GPT2_RANKS[_a + _b] = len(GPT2_RANKS)


@pytest.mark.parametrize("form", ["two files", "one file"])
def test_gpt2_files_open_with_their_own_ids(tmp_path, form):
    write_gpt2_files(tmp_path, GPT2_RANKS, GPT2_MERGES, 261, form)
    tokenizer = Tokenizer.from_gpt2_folder(tmp_path)
    assert tokenizer.ranks == GPT2_RANKS
    assert (tokenizer.eot, tokenizer.vocab_size) == (261, 262)
    expected = [GPT2_RANKS[t] for t in (b"low", b"er", b" low", b"\xc3\xa9")]
    assert tokenizer.encode("lower lowé") == expected
    assert Tokenizer.load(tmp_path).ranks == GPT2_RANKS


def test_transformers_reads_the_same_ids_from_gpt2_files(tmp_path):
    from transformers import GPT2Tokenizer

    write_gpt2_files(tmp_path, GPT2_RANKS, GPT2_MERGES, 261, "two files")
    theirs = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = Tokenizer.from_gpt2_folder(tmp_path)
    for text in ("lower lowé, it's 42!", "  two  spaces\n\nand\tlines ", "low's löw"):
        assert ours.encode(text) == theirs.encode(text)


def test_merges_in_another_order_than_the_ids_are_refused(tmp_path):
    write_gpt2_files(tmp_path, GPT2_RANKS, GPT2_MERGES[::-1], 261, "two files")
    with pytest.raises(ValueError, match="do not rise in the order of the merges"):
        Tokenizer.from_gpt2_folder(tmp_path)


def test_merges_of_another_vocabulary_are_refused(tmp_path):
    write_gpt2_files(tmp_path, GPT2_RANKS, [*GPT2_MERGES, (b"q", b"q")], 261, "two files")
    with pytest.raises(ValueError, match="which the vocabulary lacks"):
        Tokenizer.from_gpt2_folder(tmp_path)


def test_foreign_tokenizers_are_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": []}}))
    with pytest.raises(ValueError, match="'Unigram'"):
        Tokenizer.load(tmp_path)
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"▁low": 0}, "merges": []}}))
    with pytest.raises(ValueError, match="no byte of GPT-2's alphabet"):
        Tokenizer.load(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no valid JSON"):
        Tokenizer.load(tmp_path)


def test_no_socket_is_ever_opened(tmp_path, monkeypatch):
    def forbidden(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", forbidden)
    monkeypatch.setattr(socket, "create_connection", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    tokenizer = Tokenizer.load(Tokenizer(train_bpe(TEXTS, 280)).save(tmp_path))
    assert tokenizer.decode(tokenizer.encode("low newer")) == "low newer"
    write_gpt2_files(tmp_path, GPT2_RANKS, GPT2_MERGES, 261, "one file")
    assert Tokenizer.from_gpt2_folder(tmp_path).encode("low")
