"""Greedy and beam decoding against transformers' generate, token for token."""

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.decoding import generate
from minipeft.gpt import GPTConfig
from tests.tiny import tiny_ids, tiny_model

transformers = pytest.importorskip("transformers")

CONFIG = GPTConfig(vocab_size=29, context_length=48, n_layer=2, n_head=3, d_model=24)
PAIRS = {}


def pair(seed):
    """(our model, theirs) with the same weights, float64 on both sides, so that no tie decides."""
    if seed not in PAIRS:
        model = tiny_model(CONFIG, torch.float64, seed)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            theirs = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float64)
        PAIRS[seed] = model, theirs.eval()
    return PAIRS[seed]


def theirs_generate(theirs, ids, steps, **options):
    """Their result for greedy or beams; `eos_token_id` pads as well, as our stop token does."""
    pad = options.get("eos_token_id", 0)
    return theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=steps,
        do_sample=False,
        pad_token_id=pad,
        **options,
    )


penalties = st.sampled_from([1.0, 1.3, 0.7])
ngrams = st.sampled_from([0, 1, 2, 3])
stops = st.none() | st.integers(0, CONFIG.vocab_size - 1)


@given(st.integers(0, 2), st.integers(0, 99), st.integers(1, 9), penalties, ngrams, stops)
def test_greedy_with_penalties_gives_their_tokens(seed, prompt, T, penalty, ngram, stop):
    model, theirs = pair(seed)
    ids = tiny_ids(3, T, CONFIG.vocab_size, prompt)
    options = {} if stop is None else {"eos_token_id": stop}
    expected = theirs_generate(
        theirs, ids, 12, repetition_penalty=penalty, no_repeat_ngram_size=ngram, **options
    )
    ours = generate(
        model, ids, 12, temperature=0, repetition_penalty=penalty, no_repeat_ngram=ngram,
        stop_token=stop,
    )  # fmt: skip
    assert torch.equal(ours, expected)


@settings(max_examples=60)
@given(
    st.integers(0, 2),
    st.integers(0, 99),
    st.integers(1, 6),
    st.integers(2, 5),
    st.sampled_from([1.0, 0.0, 2.0, -1.0, 0.5]),
    penalties,
    st.sampled_from([0, 2]),
    stops,
)
def test_beams_give_their_tokens(seed, prompt, T, beams, length, penalty, ngram, stop):
    model, theirs = pair(seed)
    ids = tiny_ids(2, T, CONFIG.vocab_size, prompt)
    options = {} if stop is None else {"eos_token_id": stop}
    expected = theirs_generate(
        theirs, ids, 9, num_beams=beams, length_penalty=length, repetition_penalty=penalty,
        no_repeat_ngram_size=ngram, **options,
    )  # fmt: skip
    ours = generate(
        model, ids, 9, num_beams=beams, length_penalty=length, repetition_penalty=penalty,
        no_repeat_ngram=ngram, stop_token=stop,
    )  # fmt: skip
    assert torch.equal(ours, expected)


def test_beams_that_end_early_give_their_tokens():
    """Every token is tried as the stop token, so that some beams end at once and some never."""
    widths = set()
    for seed, length in [(0, 1.0), (1, -1.0), (2, 0.0)]:
        model, theirs = pair(seed)
        ids = tiny_ids(2, 4, CONFIG.vocab_size, 7 + seed)
        for stop in range(0, CONFIG.vocab_size, 2):
            expected = theirs_generate(
                theirs, ids, 16, num_beams=4, length_penalty=length, eos_token_id=stop
            )
            ours = generate(model, ids, 16, num_beams=4, length_penalty=length, stop_token=stop)
            assert torch.equal(ours, expected), (seed, stop)
            widths.add(ours.shape[1])
    assert len(widths) > 4 and max(widths) == 20  # both kinds of ending were there


def test_rows_of_different_lengths_give_their_tokens_of_each_row_alone():
    model, theirs = pair(1)
    ids, lengths = tiny_ids(4, 8, CONFIG.vocab_size, 3), torch.tensor([8, 1, 5, 3])
    for beams in (1, 3):
        ours = generate(model, ids, 10, temperature=0, num_beams=beams, lengths=lengths)
        for row, length, out in zip(ids, lengths.tolist(), ours, strict=True):
            alone = theirs_generate(theirs, row[None, :length], 10, num_beams=beams)
            assert torch.equal(out[: length + 10], alone[0])


def test_the_sampled_distribution_is_theirs():
    """Their warpers, in the order their generate applies them."""
    from transformers.generation import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    from minipeft.decoding import probabilities

    z = 3 * torch.randn(50, 29, dtype=torch.float64)
    for temperature, k, top_p in [
        (0.7, 5, 0.8),
        (1.9, None, 0.35),
        (1.0, 11, 1.0),
        (1.3, 29, 0.99),
    ]:
        scores = TemperatureLogitsWarper(temperature)(None, z)
        scores = scores if k is None else TopKLogitsWarper(k)(None, scores)
        scores = scores if top_p == 1 else TopPLogitsWarper(top_p)(None, scores)
        # 1e-12: float64 softmax and sums over 29 numbers
        torch.testing.assert_close(
            probabilities(z, temperature, k, top_p), scores.softmax(-1), atol=1e-12, rtol=0
        )
