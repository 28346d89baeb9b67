"""Decoding: the distribution of the next token, the cache, rows of different lengths, beams.

The small test model of tests/tiny.py in float64. That transformers gives the same tokens is in
tests/parity/test_decoding_hf.py.
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from torch import nn

from minipeft import wrap
from minipeft.decoding import (
    Cache,
    Text,
    draw,
    generate,
    no_repeated_ngram,
    probabilities,
    repetition_penalty,
    stream,
)
from minipeft.gpt import GPTConfig
from minipeft.head import Head
from tests.tiny import close, tiny_ids, tiny_model

EXACT = 1e-12  # float64, another order of a few hundred additions


# -- the slow way, written again


def reference_logits(model, row):
    """Logits after a list of tokens: everything is read again, nothing is cached."""
    return model(torch.tensor([row]))[0, -1]


@torch.no_grad()
def reference_greedy(model, row, steps, stop=None):
    row = list(row)
    for _ in range(steps):
        row.append(int(reference_logits(model, row).argmax()))
        if row[-1] == stop:
            break
    return row


def reference_distribution(z, temperature, k, top_p):
    """The distribution of one list of logits, sorted and filtered with plain Python floats."""
    weights = [math.exp(x / temperature) for x in z.tolist()]
    order = sorted(range(len(weights)), key=lambda i: -weights[i])
    kept = order[: k or len(order)]
    total, running, nucleus = sum(weights[i] for i in kept), 0.0, []
    for i in kept:
        if running >= top_p:
            break
        nucleus.append(i)
        running += weights[i] / total
    total = sum(weights[i] for i in nucleus)
    return [weights[i] / total if i in nucleus else 0.0 for i in range(len(weights))]


# -- wrappers as the techniques bring them


class PromptInFront(wrap.EmbeddingWrapper):
    """p virtual rows in front of the text, as prompt tuning adds them."""

    own_virtual_tokens = own_position_shift = 3

    def __init__(self, inner, d_model):
        super().__init__(inner)
        self.rows = nn.Parameter(torch.randn(3, d_model, dtype=torch.float64))

    def forward(self, ids, start=0, shift=0):
        x = self.inner(ids, start, shift + 3)
        if isinstance(start, int) and start == 0:
            x = torch.cat([self.rows.expand(len(ids), -1, -1), x], 1)
        return x


class KeysInFront(wrap.Wrapper):
    """p keys and values in front of the others, as prefix tuning adds them."""

    def __init__(self, inner, n_head, head_dim):
        super().__init__(inner)
        self.k = nn.Parameter(torch.randn(1, n_head, 5, head_dim, dtype=torch.float64))
        self.v = nn.Parameter(torch.randn(1, n_head, 5, head_dim, dtype=torch.float64))

    def forward(self, q, k, v, mask=None):
        B = len(q)
        if mask is not None:
            mask = torch.cat([mask.new_ones(*mask.shape[:3], 5), mask], 3)
        k = torch.cat([self.k.expand(B, -1, -1, -1), k], 2)
        return self.inner(q, k, torch.cat([self.v.expand(B, -1, -1, -1), v], 2), mask)


class RunningMean(wrap.Wrapper):
    """A sub-layer scaled by a gate over the mean of the inputs so far; its sum is in the cache."""

    def forward(self, x, cache=None):
        T, total = x.shape[1], x.cumsum(1)
        count = torch.arange(1.0, T + 1, dtype=x.dtype)[None].expand(len(x), T)
        if cache is not None and "sum" in cache.state:
            total = total + cache.state["sum"][:, None]
            count = count + cache.state["count"][:, None]
        if cache is not None:
            real = cache.cache.real
            last = torch.full((len(x),), T) if real is None else real
            rows = torch.arange(len(x))
            cache.state = {"sum": total[rows, last - 1], "count": count[rows, last - 1]}
        gate = torch.sigmoid((total / count[..., None]).mean(-1, keepdim=True) * 20)
        return gate * self.inner(x, cache)


def with_prompt(model):
    model.embed = PromptInFront(model.embed, model.config.d_model)
    return model


def with_prefix(model):
    for block in model.blocks:
        block.attn.core = KeysInFront(block.attn.core, block.attn.n_head, block.attn.head_dim)
    return model


def with_running_mean(model):
    for block in model.blocks:
        block.attn = RunningMean(block.attn)
    return model


def narrower(model):
    """Layer 1 keeps 1 of its 4 heads, as structured pruning leaves it."""
    attn = model.blocks[1].attn
    d = attn.head_dim
    for projection in (attn.q, attn.k, attn.v):
        projection.weight = nn.Parameter(projection.weight[d : 2 * d])
        projection.bias = nn.Parameter(projection.bias[d : 2 * d])
    attn.o.weight = nn.Parameter(attn.o.weight[:, d : 2 * d])
    attn.n_head = 1
    return model


def prompt_under_prefix(model):
    return with_prefix(with_prompt(model))


VARIANTS = [
    lambda model: model,
    with_prompt,
    with_prefix,
    prompt_under_prefix,
    with_running_mean,
    narrower,
]
variants = pytest.mark.parametrize(
    "change", VARIANTS, ids=["plain", "prompt", "prefix", "both", "running mean", "narrower"]
)


# -- the cache


@variants
@torch.no_grad()
def test_features_read_in_pieces_equal_features_read_at_once(model, change):
    model, ids = change(model), tiny_ids(3, 17)
    cache, pieces = Cache(model, 3, model.embed.virtual_tokens + 17), []
    for a, b in [(0, 5), (5, 6), (6, 7), (7, 13), (13, 17)]:
        pieces.append(model.features(ids[:, a:b], a, cache))
    close(torch.cat(pieces, 1), model.features(ids), EXACT)


@variants
@torch.no_grad()
def test_rows_of_different_lengths_read_in_pieces_equal_each_row_alone(model, change):
    """Right-padded prompts, then pieces of 1 and of 3 tokens behind each row's own end."""
    model, ids = change(model), tiny_ids(4, 20)
    lengths, p = torch.tensor([9, 1, 4, 8]), model.embed.virtual_tokens
    cache = Cache(model, 4, p + 20)
    prompt = ids[:, :9].clone()
    cache.real = p + lengths
    read = [model.features(prompt, 0, cache)]
    for step in (1, 3, 1):
        start = cache.length - p
        places = start[:, None] + torch.arange(step)
        read.append(model.features(ids.gather(1, places), start, cache))
    for row, length in enumerate(lengths.tolist()):
        ours = torch.cat([read[0][row, :length], *(r[row] for r in read[1:])])
        close(ours, model.features(ids[row : row + 1, : length + 5])[0], EXACT)


@torch.no_grad()
def test_reordering_the_cache_reorders_rows_and_states(model):
    model, ids = with_running_mean(model), tiny_ids(3, 6)
    rows = torch.tensor([2, 0, 0, 1, 2])
    for lengths in (None, torch.tensor([6, 2, 4])):
        cache = Cache(model, 3, 8)
        cache.real = lengths
        model.features(ids, 0, cache)
        cache.reorder(rows)
        start = 6 if lengths is None else lengths[rows]
        x = model.features(tiny_ids(5, 1, seed=5), start, cache)
        for i, row in enumerate(rows.tolist()):
            n = 6 if lengths is None else int(lengths[row])
            text = torch.cat([ids[row, :n], tiny_ids(5, 1, seed=5)[i]])
            close(x[i, -1:], model.features(text[None])[0, -1:], EXACT)


def test_a_cache_that_is_too_small_says_so(model, ids):
    cache = Cache(model, 3, 12)
    model.features(ids, 0, cache)
    with pytest.raises(ValueError, match=r"3 rows of 2 positions .* has 11 of 12 positions filled"):
        model.features(ids[:, :2], 11, cache)
    with pytest.raises(ValueError, match="2 rows of 11 positions do not fit a cache of 3 rows"):
        model.features(ids[:2], 0, Cache(model, 3, 12))


# -- the distribution of the next token


def test_penalty_divides_positive_and_multiplies_negative_logits():
    """(Decoding 1), once per token however often it is there; padding does not count."""
    z = torch.tensor([[2.0, -2.0, 3.0, -3.0, 0.0]]).double().repeat(2, 1)
    text = Text(torch.tensor([[0, 1, 1, 0], [4, 3, 2, 2]]), torch.tensor([4, 2]))
    expected = torch.tensor([[1.0, -4.0, 3.0, -3.0, 0.0], [2.0, -2.0, 3.0, -6.0, 0.0]])
    assert torch.equal(repetition_penalty(z, text, 2.0), expected.double())


def test_learned_prompt_ids_beyond_the_vocabulary_are_no_candidates():
    z = torch.ones(1, 3).double()
    text = Text(torch.tensor([[1, 3, 4, 3]]), 4)
    assert repetition_penalty(z, text, 2.0).tolist() == [[1.0, 0.5, 1.0]]
    assert torch.equal(no_repeated_ngram(z, text, 2), z)


def reference_banned(row, g):
    """Tokens that would complete a g-gram which the list has already."""
    tail = tuple(row[len(row) - g + 1 :]) if g > 1 else ()
    grams = [tuple(row[i : i + g]) for i in range(len(row) - g + 1)]
    return {gram[-1] for gram in grams if gram[:-1] == tail}


def test_exactly_the_tokens_that_would_repeat_an_ngram_are_ruled_out():
    """(Decoding 2) on short rows over 3 tokens, where n-grams come back all the time."""
    lengths = torch.tensor([7, 1, 2, 5, 7, 3])
    ids = tiny_ids(6, 7, vocab=3)
    for g, ragged in itertools.product(range(1, 9), (False, True)):
        text = Text(ids, lengths if ragged else 7)
        z = no_repeated_ngram(torch.zeros(6, 3), text, g)
        for row, out in enumerate(z.tolist()):
            length = int(lengths[row]) if ragged else 7
            banned = reference_banned(ids[row, :length].tolist(), g) if length >= g else set()
            assert {i for i, x in enumerate(out) if x == -math.inf} == banned, (g, row)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("k, top_p", [(None, 1.0), (4, 1.0), (None, 0.6), (9, 0.85), (1, 0.5)])
def test_the_distribution_is_its_definition(temperature, k, top_p):
    """(Decoding 3) (Decoding 4) (Decoding 5)"""
    z = 2 * torch.randn(20, 13, dtype=torch.float64)
    expected = [reference_distribution(row, temperature, k, top_p) for row in z]
    p = probabilities(z, temperature, k, top_p)
    close(p, torch.tensor(expected, dtype=torch.float64), EXACT)


def test_top_p_keeps_the_token_that_crosses_the_line():
    z = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    close(probabilities(z, top_p=0.6), torch.tensor([0.625, 0.375, 0.0]).double(), EXACT)
    close(probabilities(z, top_p=0.01), torch.tensor([1.0, 0.0, 0.0]).double(), EXACT)


def test_extreme_temperatures_stay_finite():
    z = torch.tensor([3.0, 1e4, -1e4, 1e4 - 1])
    assert torch.equal(probabilities(z, 1e-40), torch.tensor([0, 1, 0, 0]).double())
    close(probabilities(z, 1e30), torch.full((4,), 0.25).double(), EXACT)


def test_a_draw_inverts_the_distribution_function():
    """(Decoding 6); a token of probability 0 is never drawn, not even at the ends."""
    p = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).double().repeat(6, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-50], dtype=torch.float64)
    assert draw(p, u).tolist() == [1, 1, 3, 3, 4, 4]


# -- greedy and stopping


@variants
def test_greedy_is_the_most_probable_token_again_and_again(model, change):
    model, ids = change(model), tiny_ids(3, 7)
    out = generate(model, ids, 12, temperature=0)
    assert out.tolist() == [reference_greedy(model, row, 12) for row in ids.tolist()]


@variants
@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_comes_out_as_if_it_were_alone(model, change, beams):
    """Different lengths, whatever stands in the padding, with penalties and a stop token."""
    model, ids = change(model), tiny_ids(5, 9)
    lengths = [9, 1, 4, 9, 6]
    ids[torch.arange(9) >= torch.tensor(lengths)[:, None]] = -100
    greedy = reference_greedy(model, ids[2, :4].tolist(), 5)
    options = {"temperature": 0, "repetition_penalty": 1.2, "no_repeat_ngram": 3}
    for stop in (None, greedy[-1]):
        options |= {"num_beams": beams, "stop_token": stop}
        out = generate(model, ids, 12, lengths=torch.tensor(lengths), **options)
        for row, length in enumerate(lengths):
            alone = generate(model, ids[row : row + 1, :length], 12, **options)[0]
            assert torch.equal(out[row, : len(alone)], alone)
            assert (out[row, len(alone) :] == (0 if stop is None else stop)).all()


def test_a_row_that_meets_the_stop_token_ends_with_it(model):
    ids = tiny_ids(3, 5)
    free = [reference_greedy(model, row, 10) for row in ids.tolist()]
    stop = free[0][7]
    expected = [reference_greedy(model, row, 10, stop) for row in ids.tolist()]
    width = max(map(len, expected))
    expected = [row + [stop] * (width - len(row)) for row in expected]
    assert generate(model, ids, 10, temperature=0, stop_token=stop).tolist() == expected


def test_decoding_ends_when_all_rows_have(model):
    ids = tiny_ids(1, 5)
    stop = reference_greedy(model, ids[0].tolist(), 1)[-1]
    steps = []
    options = {"temperature": 0, "stop_token": stop, "on_token": steps.append}
    assert generate(model, ids, 50, **options).shape == (1, 6)
    assert steps == [[stop]]


def test_a_stop_token_in_the_prompt_does_not_end_a_row(model):
    ids = tiny_ids(1, 5)
    out = generate(model, ids, 4, temperature=0, stop_token=int(ids[0, 4]))
    assert out[0].tolist() == reference_greedy(model, ids[0].tolist(), 4, int(ids[0, 4]))


def test_no_new_tokens_gives_the_prompt(model, ids):
    assert torch.equal(generate(model, ids, 0), ids)
    assert torch.equal(generate(model, ids, 0, num_beams=2), ids)


def test_a_text_may_fill_the_context_and_not_more(model):
    """The model's context is 64, and 3 virtual tokens take part of it."""
    out = generate(model, tiny_ids(2, 14), 50, temperature=0)
    assert out.shape == (2, 64)
    model(out)
    with pytest.raises(
        ValueError, match=r"=64 is too short for T=14 prompt.*max_new_tokens=51 behind p=0"
    ):
        generate(model, tiny_ids(2, 14), 51)
    model = with_prompt(model)
    assert generate(model, tiny_ids(2, 14), 47, temperature=0).shape == (2, 61)
    with pytest.raises(ValueError, match="T=14 prompt tokens and max_new_tokens=48 behind p=3"):
        generate(model, tiny_ids(2, 14), 48)


# -- sampling


def test_sampled_frequencies_match_the_distribution(model):
    """4,000 rows of one prompt, two steps: chi-square over the pairs within 4 sigma of its mean."""
    prompt, R = tiny_ids(1, 4), 4000
    options = {"temperature": 1.5, "top_k": 4, "top_p": 0.95}
    out = generate(model, prompt.repeat(R, 1), 2, seed=11, **options)
    with torch.no_grad():
        first = probabilities(model(prompt)[0, -1], **{**options})
        expected = {}
        for a in first.nonzero()[:, 0].tolist():
            z = reference_logits(model, [*prompt[0].tolist(), a])
            for b, p in enumerate(reference_distribution(z, 1.5, 4, 0.95)):
                if p > 0:
                    expected[a, b] = R * p * float(first[a])
    counts = Counter(map(tuple, out[:, 4:].tolist()))
    assert counts.keys() <= expected.keys()
    common = [pair for pair, n in expected.items() if n >= 5]
    chi = sum((counts[pair] - expected[pair]) ** 2 / expected[pair] for pair in common)
    assert len(common) >= 6
    assert abs(chi - len(common)) < 4 * math.sqrt(2 * len(common))


def test_a_sampled_row_is_the_same_alone_in_any_batch_and_at_any_place(model):
    ids, lengths = tiny_ids(4, 6), torch.tensor([6, 3, 5, 6])
    out = generate(model, ids, 15, lengths=lengths, seed=3)
    for row, length in enumerate(lengths.tolist()):
        alone = generate(model, ids[row : row + 1, :length], 15, seed=3)
        assert torch.equal(out[row, : length + 15], alone[0])
    turned = generate(model, ids.flip(0), 15, lengths=lengths.flip(0), seed=3)
    assert torch.equal(turned.flip(0), out)


def test_equal_prompts_in_a_batch_get_different_texts(model):
    out = generate(model, tiny_ids(1, 4).repeat(8, 1), 12, temperature=3.0, seed=0)
    assert len(set(map(tuple, out.tolist()))) == 8


def test_a_shorter_text_is_the_beginning_of_a_longer_one(model, ids):
    longer = generate(model, ids, 20, seed=5)
    for steps in (1, 7, 16):
        assert torch.equal(generate(model, ids, steps, seed=5), longer[:, : 11 + steps])


def test_same_seed_same_text_and_other_seed_other_text(model, ids):
    a, b, c = (generate(model, ids, 20, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_without_a_seed_torchs_own_random_state_decides(model, ids):
    torch.manual_seed(4)
    a, b = generate(model, ids, 20), generate(model, ids, 20)
    torch.manual_seed(4)
    assert torch.equal(generate(model, ids, 20), a) and not torch.equal(a, b)


def test_low_temperature_one_candidate_and_a_small_nucleus_are_greedy(model, ids):
    greedy = generate(model, ids, 9, temperature=0)
    assert torch.equal(generate(model, ids, 9, temperature=1e-9), greedy)
    assert torch.equal(generate(model, ids, 9, top_k=1), greedy)
    assert torch.equal(generate(model, ids, 9, top_p=1e-9), greedy)


# -- beams


@torch.no_grad()
def test_beams_as_many_as_texts_find_the_best_text():
    """(Decoding 7) Vocabulary 4, three steps, so the 64 texts can be scored one by one."""
    model = tiny_model(GPTConfig(vocab_size=4, context_length=9, n_layer=1, n_head=1, d_model=8))
    for seed in range(5):
        ids = tiny_ids(1, 3, vocab=4, seed=seed)
        scores = {}
        for new in itertools.product(range(4), repeat=3):
            row = [*ids[0].tolist(), *new]
            log_p = model(torch.tensor([row]))[0].log_softmax(-1)
            scores[new] = sum(float(log_p[2 + i, token]) for i, token in enumerate(new))
        best = max(scores, key=scores.get)
        assert generate(model, ids, 3, num_beams=16)[0, 3:].tolist() == list(best)


@torch.no_grad()
def test_length_penalty_chooses_between_short_and_long():
    """(Decoding 7): with every text ended by token 0 at hand, the best sum / m^lambda wins."""
    model = tiny_model(GPTConfig(vocab_size=3, context_length=9, n_layer=1, n_head=1, d_model=8))
    found = set()
    for seed, penalty in itertools.product(range(6), (-2.0, 0.0, 3.0)):
        ids = tiny_ids(1, 3, vocab=3, seed=seed)
        scores = {}
        for m in (1, 2, 3):
            for new in itertools.product(range(3), repeat=m):
                if 0 in new[:-1] or (m < 3 and new[-1] != 0):
                    continue
                log_p = model(torch.tensor([[*ids[0].tolist(), *new]]))[0].log_softmax(-1)
                total = sum(float(log_p[2 + i, token]) for i, token in enumerate(new))
                scores[new] = total / m**penalty
        best = max(scores, key=scores.get)
        out = generate(model, ids, 3, num_beams=9, length_penalty=penalty, stop_token=0)
        assert out[0, 3:].tolist() == list(best), (seed, penalty)
        found.add(len(best))
    assert len(found) > 1  # short and long texts both won somewhere


def test_one_beam_is_greedy(model, ids):
    greedy = generate(model, ids, 9, temperature=0)
    assert torch.equal(generate(model, ids, 9, temperature=0, num_beams=1), greedy)


# -- the model is left as it was


def test_modes_come_back_and_dropout_is_off():
    config = GPTConfig(vocab_size=97, context_length=64, n_layer=2, n_head=4, d_model=32)
    plain = tiny_model(config)
    model = tiny_model(GPTConfig(**{**vars(config), "dropout": 0.5})).train()
    model.blocks[0].eval()
    before = [module.training for module in model.modules()]
    ids = tiny_ids(2, 5)
    out = generate(model, ids, 9, temperature=0)
    assert torch.equal(out, generate(plain, ids, 9, temperature=0))
    assert [module.training for module in model.modules()] == before
    with pytest.raises(RuntimeError, match="stop here"):
        generate(model, ids, 9, on_token=raiser)
    assert [module.training for module in model.modules()] == before


def raiser(tokens):
    raise RuntimeError("stop here")


def test_the_result_may_be_trained_on(model, ids):
    out = generate(model, ids, 5, seed=0)
    model.loss(out[:, :-1], out[:, 1:]).backward()  # tensors of inference mode would be refused
    assert out.dtype == torch.int64 and not out.is_inference()


def test_the_prompt_is_not_changed(model, ids):
    before = ids.clone()
    generate(model, ids, 5, seed=0, lengths=[3, 11, 7])
    assert torch.equal(ids, before)


# -- streaming


def test_on_token_sees_every_token_and_none_after_the_end(model):
    ids, seen = tiny_ids(3, 5), []
    stop = reference_greedy(model, ids[0].tolist(), 3)[-1]
    out = generate(model, ids, 8, temperature=0, stop_token=stop, on_token=seen.append)
    for row, told in enumerate(zip(*seen, strict=True)):
        expected = reference_greedy(model, ids[row].tolist(), 8, stop)[5:]
        assert list(told) == expected + [None] * (len(seen) - len(expected))
        assert out[row, 5 : 5 + len(expected)].tolist() == expected


class Bytes:
    """A tokenizer of single bytes for a vocabulary of 97; id 96 ends the text."""

    eot = 96
    table = "ab\u00e9\u20ac\U0001f600".encode()

    def encode(self, text):
        return [self.table.index(byte) for byte in text.encode()]

    def decode(self, ids):
        return bytes(self.table[i % len(self.table)] for i in ids if i != 96).decode(
            "utf-8", "replace"
        )


def test_stream_writes_the_text_in_pieces_and_never_half_a_character(model, monkeypatch):
    tokens = Bytes().encode("a\u00e9b\u20ac\U0001f600a")

    def in_order(model, ids, on_token, **options):
        assert ids.tolist() == [[0, 1]] and options["stop_token"] == 96
        for token in tokens:
            on_token([token])

    monkeypatch.setattr("minipeft.decoding.generate", in_order)
    written = []
    text = stream(model, Bytes(), "ab", write=written.append)
    assert text == "".join(written) == "aba\u00e9b\u20ac\U0001f600a"
    assert not any("\ufffd" in piece for piece in written)
    assert "\u20ac" in written


def test_streamed_text_is_the_generated_text(model, capsys):
    text = stream(model, Bytes(), "", max_new_tokens=20, seed=1)
    out = generate(model, torch.tensor([[96]]), 20, seed=1, stop_token=96)
    assert text == capsys.readouterr().out
    assert text.replace("\ufffd", "") == Bytes().decode(out[0].tolist()).replace("\ufffd", "")


# -- refused


@pytest.mark.parametrize(
    "option, value",
    [
        ("max_new_tokens", -1),
        ("max_new_tokens", 2.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", 0),
        ("top_k", -3),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_p", math.nan),
        ("repetition_penalty", 0),
        ("repetition_penalty", -1.0),
        ("no_repeat_ngram", -1),
        ("num_beams", 0),
        ("length_penalty", math.nan),
        ("stop_token", -1),
    ],
)
def test_a_bad_option_is_named_with_its_value(model, ids, option, value):
    with pytest.raises(ValueError, match=f"{option}={value!r} is not"):
        generate(model, ids, **{option: value})


@pytest.mark.parametrize(
    "option, says",
    [
        ({"stop_token": 97}, "token id 97 is outside the vocabulary"),
        ({"num_beams": 2, "temperature": 0.7}, "num_beams=2 searches.*temperature=0.7"),
        ({"num_beams": 2, "top_k": 5}, "top_k=5"),
        ({"num_beams": 2, "on_token": print}, "num_beams=2.*on_token"),
        ({"lengths": [3, 12, 4]}, "length 12 of a row is not between 1 and 11"),
        ({"lengths": [3, 0, 4]}, "length 0 of a row"),
        ({"lengths": [3, 4]}, "lengths must be 3 whole numbers"),
        ({"lengths": [1.0, 2.0, 3.0]}, "float32"),
        ({"no_repeat_ngram": 1, "max_new_tokens": 53, "temperature": 0}, None),
    ],
)
def test_options_that_do_not_go_together_are_refused(model, ids, option, says):
    if says is None:  # 97 tokens, 64 of them used at most: n = 1 goes on until the context is full
        assert generate(model, ids, **option).shape == (3, 64)
        return
    with pytest.raises(ValueError, match=says):
        generate(model, ids, **option)


def test_when_every_token_is_ruled_out_it_is_said():
    model = tiny_model(GPTConfig(vocab_size=5, context_length=64, n_layer=1, n_head=1, d_model=8))
    with pytest.raises(ValueError, match="no_repeat_ngram=1 has ruled out every token"):
        generate(model, tiny_ids(1, 2, vocab=5), 9, temperature=0, no_repeat_ngram=1)


def test_bad_prompts_are_refused(model):
    with pytest.raises(ValueError, match="token id 97 is outside the vocabulary"):
        generate(model, torch.tensor([[1, 97]]), 3)
    with pytest.raises(ValueError, match="token id -2 is outside"):
        generate(model, torch.tensor([[1, -2]]), 3)
    with pytest.raises(ValueError, match=r"ids of shape \(2, 0\).*at least one token"):
        generate(model, torch.zeros(2, 0, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="ids must be"):
        generate(model, torch.tensor([1, 2]), 3)


@pytest.mark.parametrize("rows", [1, 97])
def test_a_classifier_is_refused_whatever_the_number_of_rows(model, rows):
    """It has no time dimension: its rows are no words."""
    Head(num_labels=5).attach(model)
    with pytest.raises(ValueError, match="gives 5 labels, not the 97 tokens"):
        generate(model, torch.zeros(rows, 2, dtype=torch.int64), 3)


def test_a_model_that_does_not_give_words_is_refused(model, ids):
    model.head = nn.Linear(32, 4).double()
    with pytest.raises(ValueError, match="gives 4 labels, not the 97 tokens"):
        generate(model, ids, 3)


def test_weights_that_are_not_finite_are_reported(model, ids):
    with torch.no_grad():
        model.blocks[1].mlp.up.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        generate(model, ids, 3)
