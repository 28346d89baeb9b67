"""What dataset.py promises: tokens, labels, padding, the order of examples, and readable errors."""

import json
from collections import Counter
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minipeft import GPT, GPTConfig
from minipeft.dataset import (
    BatchOrder,
    Encoded,
    Example,
    collate,
    encode,
    encode_all,
    encode_all_for_head,
    encode_class,
    encode_tags,
    parted,
    read_examples,
    token_tags,
)


class Bytes:
    """A tokenizer whose tokens are bytes."""

    eot, vocab_size = 256, 257

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i != self.eot).decode()


BYTES = Bytes()


def small_model(context_length=12):
    torch.manual_seed(0)
    return GPT(GPTConfig(257, context_length, n_layer=1, n_head=1, d_model=8))


# -- encode: (Data 1) (Data 2) (Data 3)


def test_a_document_counts_from_its_first_token_to_the_final_eot():
    assert encode(Example(completion="abc"), BYTES) == Encoded([256, 97, 98, 99], [97, 98, 99, 256])


def test_a_prompt_is_read_and_not_learned():
    assert encode(Example("ab", "cd"), BYTES) == Encoded(
        [256, 97, 98, 99, 100], [-100, -100, 99, 100, 256]
    )


def test_an_empty_completion_leaves_only_the_eot_to_learn():
    assert encode(Example("ab"), BYTES).labels == [-100, -100, 256]


@given(st.text(max_size=9), st.text(max_size=9))
def test_labels_are_the_next_ids_wherever_they_count(prompt, completion):
    row = encode(Example(prompt, completion), BYTES)
    tokens = [256, *prompt.encode(), *completion.encode(), 256]
    assert row.ids == tokens[:-1]
    assert all(y in (-100, tokens[t + 1]) for t, y in enumerate(row.labels))
    assert row.count == len(completion.encode()) + 1 == sum(y != -100 for y in row.labels)


# -- heads


def test_a_class_is_read_off_the_prompt_without_the_answer():
    row = encode_class(Example("ab", " good", label="good"), BYTES, ["bad", "good"])
    assert row == Encoded([256, 97, 98], 1)
    assert row.count == 1


def test_a_class_of_a_document_without_prompt_reads_the_document():
    assert encode_class(Example("", "ab", label="x"), BYTES, ["x", "y"]).ids == [256, 97, 98]


def test_tags_stand_at_the_token_they_describe():
    row = encode_tags(Example("abc", tags=("A", "", "B")), BYTES, ["A", "B"])
    assert row == Encoded([256, 97, 98, 99], [-100, 0, -100, 1])
    assert row.count == 2


def test_tags_of_the_answer_are_not_the_heads_business():
    assert encode_tags(Example("a", "b", tags=("A", "B")), BYTES, ["A", "B"]).labels == [-100, 0]


def test_tags_of_the_prompt_alone_leave_the_answer_untagged():
    assert token_tags(Example("a", "bc", tags=("A",)), BYTES) == ("A", "", "")


def test_an_unknown_label_and_a_wrong_number_of_tags_name_the_example():
    good = Example("a", label="x")
    with pytest.raises(ValueError, match=r"example 1: label 'z' is none of \['x', 'y'\]"):
        encode_all_for_head([good, Example("a", label="z")], BYTES, ["x", "y"])
    with pytest.raises(ValueError, match=r"example 0: 2 tags for 3 tokens"):
        encode_all_for_head([Example("abc", tags=("A", "A"))], BYTES, ["A"], per_token=True)


# -- length


def test_a_text_that_exactly_fills_the_context_fits():
    assert len(encode_all([Example(completion="a" * 11)], BYTES, small_model(12))[0].ids) == 12


def test_a_text_too_long_names_the_example_and_all_lengths():
    model = small_model(12)
    model.embed.position_shift = 3
    with pytest.raises(ValueError, match=r"example 1 has 10 tokens; with 3 virtual .*=12"):
        encode_all([Example(completion="a" * 8), Example(completion="a" * 9)], BYTES, model)


def test_truncation_keeps_eot_the_end_of_the_prompt_and_the_answer():
    (row,) = encode_all([Example("abcdefghijklm", "XY")], BYTES, small_model(6), "truncate")
    assert row.ids == [256, *b"klmXY"]
    assert row.labels == [-100, -100, -100, *b"XY", 256]


def test_truncation_of_a_document_keeps_its_beginning():
    (row,) = encode_all([Example(completion="abcdefgh")], BYTES, small_model(4), "truncate")
    assert (row.ids, row.labels) == ([256, *b"abc"], [*b"abcd"])


def test_an_answer_longer_than_the_context_is_cut_at_its_end():
    (row,) = encode_all([Example("p", "abcdefgh")], BYTES, small_model(4), "truncate")
    assert row.ids == [256, *b"abc"]
    assert row.labels == [*b"abcd"]


def test_windows_keep_every_label_once():
    text = "abcdefghijk"
    rows = encode_all([Example(completion=text)], BYTES, small_model(5), "window")
    assert [y for r in rows for y in r.labels] == [*text.encode(), 256]
    assert [i for r in rows for i in r.ids] == [256, *text.encode()]
    assert all(len(r.ids) <= 5 for r in rows)


def test_an_unknown_way_with_long_texts_is_named():
    with pytest.raises(ValueError, match="too_long='drop'"):
        encode_all([], BYTES, small_model(), "drop")


# -- batches


def test_rows_are_padded_on_the_right_with_eot_and_labels_that_do_not_count():
    rows = [Encoded([9, 1, 2, 3], [1, 2, 3, 9]), Encoded([9, 4], [4, 9])]
    batch = collate(rows, start=4, indices=[5, 7])
    assert batch.ids.tolist() == [[9, 1, 2, 3], [9, 4, 9, 9]]
    assert batch.labels.tolist() == [[1, 2, 3, 9], [4, 9, -100, -100]]
    assert batch.lengths.tolist() == [4, 2]
    assert (batch.start, batch.indices, batch.ids.dtype) == (4, (5, 7), torch.int64)


def test_classes_are_one_label_a_row():
    assert collate([Encoded([9, 1], 2), Encoded([9], 0)]).labels.tolist() == [2, 0]


def test_moving_a_batch_keeps_what_is_no_tensor():
    batch = collate([Encoded([9], [9])], start=3, indices=[1]).to("cpu")
    assert (batch.start, batch.indices) == (3, (1,))


# -- the order: (Data 4) (Data 5)


def taken(order, steps):
    return [order.batch(s) for s in range(steps)]


def test_every_epoch_has_every_example_once_without_a_gap_between_epochs():
    order = BatchOrder([1] * 7, batch_size=3, seed=0)
    stream = [i for batch in taken(order, 7) for i in batch]
    for epoch in range(3):
        assert sorted(stream[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert stream[:7] != stream[7:14]


def test_the_order_depends_on_seed_and_step_alone():
    lengths = list(range(1, 24))
    forward = taken(BatchOrder(lengths, 3, seed=5, pool=4), 20)
    other = BatchOrder(lengths, 3, seed=5, pool=4)
    assert [other.batch(s) for s in reversed(range(20))] == forward[::-1]
    for pool in (1, 4):
        first, other = (BatchOrder(lengths, 3, seed, pool) for seed in (5, 6))
        assert taken(first, 20) != taken(other, 20)


def test_pooling_takes_the_same_examples_and_pads_less():
    lengths = [(37 * i) % 50 + 1 for i in range(64)]

    def padding(batches):
        return sum(
            max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches
        )

    plain = taken(BatchOrder(lengths, 8, seed=1), 8)
    pooled = taken(BatchOrder(lengths, 8, seed=1, pool=4), 8)
    for half in (slice(0, 4), slice(4, 8)):
        assert sorted(chain(*plain[half])) == sorted(chain(*pooled[half]))
    assert padding(pooled) < 0.5 * padding(plain)  # four batches by length: a quarter of the spread


def test_pooled_batches_do_not_come_sorted_by_length():
    lengths = list(range(1, 81))
    first = [lengths[b[0]] for b in taken(BatchOrder(lengths, 8, seed=0, pool=10), 10)]
    assert first != sorted(first)


def test_more_rows_than_examples_repeat_them():
    assert Counter(BatchOrder([1, 1], 6).batch(0)) == {0: 3, 1: 3}


def test_impossible_orders_are_named():
    with pytest.raises(ValueError, match="no examples"):
        BatchOrder([], 4)
    with pytest.raises(ValueError, match="batch_size=0"):
        BatchOrder([1], 0)
    with pytest.raises(ValueError, match="pool=-1"):
        BatchOrder([1], 1, pool=-1)


# -- files


def written(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_text_is_split_at_blank_lines(tmp_path):
    path = written(tmp_path, "a.txt", "one\ntwo\n\n  \nthree\n")
    assert read_examples(path) == [Example(completion="one\ntwo"), Example(completion="three")]


def test_windows_line_ends_and_a_byte_order_mark_are_no_text(tmp_path):
    path = written(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert [x.completion for x in read_examples(path)] == ["one", "two"]


def test_the_three_kinds_of_json_lines(tmp_path):
    lines = [
        {"text": "a\u2028b"},
        {"text": "story", "label": "good"},
        {"prompt": "p", "completion": "c"},
    ]
    text = "\n".join(json.dumps(x, ensure_ascii=False) for x in lines) + "\n\n"
    assert read_examples(written(tmp_path, "a.JSONL", text)) == [
        Example(completion="a\u2028b"),
        Example("story", " good", label="good"),
        Example("p", "c"),
    ]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file_is_named(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}: the file is empty"):
        read_examples(written(tmp_path, name, " \n\n"))


def test_invalid_utf8_names_the_byte_and_its_offset(tmp_path):
    with pytest.raises(ValueError, match="byte 0xff at offset 3 is not UTF-8"):
        read_examples(written(tmp_path, "a.txt", b"abc\xffd"))


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": ', "line 2: not JSON"),
        ("[1]", "line 2: list instead of an object"),
        ('{"prompt": "a"}', r"line 2: keys \['prompt'\]"),
        ('{"text": "a", "lable": "b"}', r"line 2: keys \['lable', 'text'\]"),
        ('{"text": 3}', "line 2: 'text' is 3, not a string"),
        ('{"text": ""}', "line 2: the text is empty"),
        ('{"prompt": "a", "completion": ""}', "line 2: the text is empty"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, problem):
    with pytest.raises(ValueError, match=problem):
        read_examples(written(tmp_path, "a.jsonl", '{"text": "fine"}\n' + line + "\n"))


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 40])
def test_every_tenth_example_is_held_out(count):
    """Whatever the file is sorted by, and so that nothing is learned that is tested on."""
    learned, held = parted(list(range(count)))
    assert held == list(range(0, count, 10))
    assert learned == ([n for n in range(count) if n % 10] or held)
