r"""Decoding: text from a model, one token at a time, with a preallocated key-value cache.

With z in R^V the logits of the next token, y_1 .. y_n the row so far (prompt included):

    (Decoding 1)  z_i <- z_i / theta if z_i > 0 else z_i theta,  i in y     repetition penalty theta
    (Decoding 2)  z_i <- -inf if (y_{n-g+2} .. y_n, i) is already in y          no repeated g-gram
    (Decoding 3)  p = softmax(z / tau)                                          temperature tau
    (Decoding 4)  p_i <- 0 if p_i is below the k-th largest, then p / sum p     top-k
    (Decoding 5)  p_i <- 0 if the more probable tokens have total p >= top_p    top-p, or nucleus
                  already, then p / sum p
    (Decoding 6)  y_{n+1} = min { i : F(i) > u F(V) },  u ~ U[0, 1)             F running sum of p
    (Decoding 7)  score(beam) = sum_t log p(y_t | y_<t) / m^lambda              m new tokens in all

Sources: (1) Keskar et al. 2019, arXiv 1909.05858; (2) Paulus et al. 2017, arXiv 1705.04304; (4) Fan
et al. 2018, arXiv 1805.04833; (5) Holtzman et al. 2019, arXiv 1904.09751; (7) Wu et al. 2016, arXiv
1609.08144, in the simple form that transformers uses.

Reductions: tau -> 0 and k = 1 are greedy; one beam is greedy; theta = 1, g = 0, k = V, top_p = 1 do
nothing.

Rows. Each row of a batch comes out as if it were alone. Prompts of different lengths are
right-padded and told apart by `lengths`; a row's new tokens follow its last real one, then comes
padding: the stop token, or 0 if there is none. A row draws its random numbers from a generator of
its own, seeded by (seed, the row's prompt, how many rows above have the same prompt), one number
per step, so neither its neighbours nor max_new_tokens change them.

Cost: with the cache a step reads one token, N multiplications for N parameters plus attention over
what is there; without it step n reads n tokens again. The cache holds 2 L D numbers per position.

How this differs from transformers: keys are written into one buffer of the final size instead of
being joined to a longer one at every step; padding stands on the right, so positions need no
correction; sampling inverts the distribution function in float64. Greedy and beams, with the
penalties, give the same tokens (tests/parity/test_decoding_hf.py). Beams stop as with its
`early_stopping=False`: once the best open beam, at its present length, is no better than the worst
of K finished ones.

Footguns: softmax before the temperature; a top-p that drops the token crossing the line; the cache
not reordered with the beams; a padded row's position counted from the longest prompt; `is_causal`
with one query and many keys; NaN in unused cache rows, which a mask does not hide (0 x NaN is NaN).
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import sys
from dataclasses import dataclass

import torch

from minipeft.dispatch import fast_path
from minipeft.gpt import GPT

WORST = -1e9  # the score of a beam that must not be chosen; finite, so that sums of it stay ordered


# -- what a user calls


def generate(
    model,
    ids,
    max_new_tokens=64,
    temperature=1.0,
    top_k=None,
    top_p=1.0,
    repetition_penalty=1.0,
    no_repeat_ngram=0,
    num_beams=1,
    length_penalty=1.0,
    stop_token=None,
    lengths=None,
    seed=None,
    on_token=None,
):
    """Continue prompts `ids` (B, T) by up to `max_new_tokens`; returns both, (B, time) int64.

    temperature: 0 is greedy. top_k: None is off. num_beams > 1 searches for the most probable text
    instead of sampling; only there `length_penalty` acts (larger favours longer texts). stop_token:
    ends a row and is part of the result. lengths (B,): real tokens in each right-padded row; what
    follows them may be anything. seed: same seed, same text; None takes one from torch's global
    generator. on_token: called after every step with a list of B tokens, None for rows that ended.

    The model runs in eval mode, without gradients, and is put back as it was. Raises ValueError,
    naming the value, for bad options, ids outside the vocabulary, and a text that would not fit the
    context.
    """
    options = Options(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, no_repeat_ngram,
        num_beams, length_penalty, stop_token,
    )  # fmt: skip
    if on_token is not None and num_beams > 1:
        raise ValueError(f"num_beams={num_beams} change until the end, so on_token cannot act")
    text = start_text(model, ids, lengths, options)
    with evaluating(model), torch.inference_mode():
        if max_new_tokens == 0:
            ends = text.length
        elif num_beams > 1:
            text, ends = search_beams(model, text, options)
        else:
            ends = extend(model, text, options, seed, on_token)
    width = int(ends.max()) if isinstance(ends, torch.Tensor) else ends
    return text.ids[:, :width].clone()  # outside inference mode: a plain tensor


def stream(model, tokenizer, prompt, write=None, **options):
    """Continue the text `prompt` and write it piece by piece as it comes; returns the whole text.

    tokenizer: has `encode`, `decode`, and an `eot` that ends the text and stands for no prompt.
    write: takes a str; None prints. options: as in `generate`. A character whose bytes are spread
    over several tokens is written once it is complete.
    """
    write = write or (lambda piece: print(piece, end="", flush=True, file=sys.stdout))
    options.setdefault("stop_token", tokenizer.eot)
    pending, pieces = [], []

    def flush(force=False):
        piece = tokenizer.decode(pending)
        if force or not piece.endswith("\ufffd") or len(pending) >= 8:
            write(piece)
            pieces.append(piece)
            pending.clear()

    def on_token(tokens):
        pending.extend(tokens)
        flush()

    ids = torch.tensor([tokenizer.encode(prompt) or [tokenizer.eot]], device=device_of(model))
    write(prompt)
    generate(model, ids, on_token=on_token, **options)
    flush(force=True)
    return prompt + "".join(pieces)


@dataclass(frozen=True)
class Options:
    """The checked options of `generate`. Raises ValueError naming the value that makes no sense."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    stop_token: int | None = None

    def __post_init__(self):
        require_whole(self, "max_new_tokens", 0)
        require_whole(self, "no_repeat_ngram", 0)
        require_whole(self, "num_beams", 1)
        require_whole(self, "top_k", 1, or_none=True)
        require_whole(self, "stop_token", 0, or_none=True)
        require(self, "temperature", lambda t: 0 <= t < math.inf, "0 (greedy) or a positive number")
        require(self, "top_p", lambda p: 0 < p <= 1, "a number in (0, 1]")
        require(self, "repetition_penalty", lambda p: 0 < p < math.inf, "a positive number")
        require(self, "length_penalty", math.isfinite, "a finite number")
        if self.num_beams > 1 and (self.temperature not in (0, 1) or self.top_k or self.top_p < 1):
            raise ValueError(
                f"num_beams={self.num_beams} searches and does not sample: leave "
                f"temperature={self.temperature} at 1 or 0, top_k={self.top_k} at None and "
                f"top_p={self.top_p} at 1"
            )


def require(options, name, holds, what):
    value = getattr(options, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not holds(value):
        raise ValueError(f"{name}={value!r} is not {what}")


def require_whole(options, name, least, or_none=False):
    value = getattr(options, name)
    if (value is None and or_none) or (type(value) is int and value >= least):
        return
    raise ValueError(f"{name}={value!r} is not a whole number of at least {least}")


@contextlib.contextmanager
def evaluating(model):
    """Inside the `with` every module is in eval mode; afterwards each is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model):
    return next(model.parameters()).device


# -- the cache


class Cache:
    """Keys and values of what was read, in buffers of the final size, one LayerCache per block.

    batch rows, room for `capacity` positions (virtual tokens in front included). Heads, widths and
    dtype are those of the keys that arrive, so pruned layers are narrower here too.

    length   positions filled, an int, or (B,) int64 once the rows differ
    real     set before a call whose rows are right-padded: (B,), how many of that call's positions
             (virtual tokens included) are real in each row; `advance` clears it. A wrapper that
             keeps a running state has to leave the others out of it.
    tokens   how many tokens will be read one by one, by weights that stay as they are; 0 if unknown
    ready    those weights in the order of use by so many rows, once decoding_step.py has made them
    """

    def __init__(self, model, batch, capacity, tokens=0):
        self.batch, self.capacity = batch, capacity
        self.tokens, self.ready = tokens, None
        self.length = 0
        self.longest = 0  # of the rows; an int, so that slicing waits for no device
        self.real = None
        self.layers = [LayerCache(self) for _ in model.blocks]
        self._mask = None

    def advance(self, T):
        """Count the T positions that every layer has just appended."""
        if self.real is None:
            self.length, self.longest = self.length + T, self.longest + T
        else:
            self.length = self.length + self.real
            self.longest = int(self.length.max())
        self.real = self._mask = None

    def mask(self, T):
        """(B, 1, T, S) bool: row b's query t sees keys up to length[b] + t. Made once a step."""
        if self._mask is None:
            last = self.length[:, None] + torch.arange(T, device=self.length.device)
            keys = torch.arange(self.longest + T, device=self.length.device)
            self._mask = (keys <= last[..., None])[:, None]
        return self._mask

    def reorder(self, rows):
        """Make row i what row rows[i] was, states too. rows (B',) int64, B' may differ from B."""
        if len(rows) != self.batch:
            self.batch, self.ready = len(rows), None
        for layer in self.layers:
            layer.reorder(rows)
        if isinstance(self.length, torch.Tensor):
            self.length = self.length[rows]


class LayerCache:
    """One layer's part of a Cache.

    state: for wrappers that carry something from step to step, name -> tensor, rows first.
    """

    def __init__(self, cache):
        self.cache, self.state = cache, {}
        self.kv = None  # (2, B, H, capacity, d)

    def append(self, k, v):
        """Take k, v (B, H, T, d) of T new positions; returns all k, v (B, H, S, d), and the mask.

        The mask is None, for plain causality, as long as all rows are equally long. Raises
        ValueError when the new ones do not fit.
        """
        cache, T = self.cache, k.shape[2]
        end = self.make_room(k.shape[0], T)
        if self.kv is None:  # zeros: what a mask hides must still be finite
            self.kv = k.new_zeros(2, *k.shape[:2], cache.capacity, k.shape[3])
        if not isinstance(cache.length, torch.Tensor):
            self.kv[0, :, :, end - T : end] = k
            self.kv[1, :, :, end - T : end] = v
            return *self.kv[:, :, :, :end], None
        rows = torch.arange(cache.batch, device=k.device)[:, None]
        places = cache.length[:, None] + torch.arange(T, device=k.device)  # (B, T)
        self.kv[0][rows, :, places] = k.transpose(1, 2)
        self.kv[1][rows, :, places] = v.transpose(1, 2)
        return *self.kv[:, :, :, :end], cache.mask(T)

    def append_joined(self, kv):
        """`append` for one position of every row, its k and v in one tensor (2, B, H, 1, d)."""
        if self.kv is None or isinstance(self.cache.length, torch.Tensor):
            return self.append(*kv)
        end = self.make_room(kv.shape[1], 1)
        self.kv.narrow(3, end - 1, 1).copy_(kv)
        return *self.kv.narrow(3, 0, end).unbind(), None

    def make_room(self, rows, T):
        """Where the longest row will end after T more positions. Raises ValueError when they do
        not fit.
        """
        cache = self.cache
        end = cache.longest + T
        if end > cache.capacity or rows != cache.batch:
            raise ValueError(
                f"{rows} rows of {T} positions do not fit a cache of {cache.batch} rows that "
                f"has {cache.longest} of {cache.capacity} positions filled"
            )
        return end

    def reorder(self, rows):
        if self.kv is not None:
            self.kv = self.kv[:, rows]
        self.state = {name: tensor[rows] for name, tensor in self.state.items()}


# -- the text so far


class Text:
    """Rows that grow: ids (R, W) with room at the right; `length` an int, or (R,) if unequal."""

    def __init__(self, ids, length):
        self.ids, self.length = ids, length

    def append(self, tokens):
        """Put one token (R,) behind each row."""
        if isinstance(self.length, int):
            self.ids.select(1, self.length).copy_(tokens)
        else:
            self.ids.scatter_(1, self.length[:, None], tokens[:, None])
        self.length = self.length + 1

    def select(self, rows):
        """The text whose row i is row rows[i] of this one."""
        same = isinstance(self.length, int)
        return Text(self.ids[rows], self.length if same else self.length[rows])

    def ends(self):
        """Length of every row, (R,)."""
        return torch.zeros_like(self.ids[:, 0]) + self.length


def start_text(model, ids, lengths, options):
    """Check the prompts and put them into a Text with room for what is to come."""
    model.check_length(ids)
    B, T = ids.shape
    if T == 0 or B == 0:
        raise ValueError(f"ids of shape {(B, T)}: a prompt needs at least one token")
    lengths = None if lengths is None else check_lengths(lengths, ids)
    fill = 0 if options.stop_token is None else options.stop_token
    room = torch.full((B, T + options.max_new_tokens), fill, dtype=torch.int64, device=ids.device)
    room[:, :T] = ids
    if lengths is not None:
        room[:, :T].masked_fill_(torch.arange(T, device=ids.device) >= lengths[:, None], fill)
        if bool((lengths == lengths[0]).all()):
            T = int(lengths[0])
            room = room[:, : T + options.max_new_tokens]
            lengths = None
    model.check_ids(room)  # the stop token too
    longest, p = T if lengths is None else int(lengths.max()), model.embed.position_shift
    if longest + options.max_new_tokens + p > model.config.context_length:
        raise ValueError(
            f"context_length={model.config.context_length} is too short for T={longest} prompt "
            f"tokens and max_new_tokens={options.max_new_tokens} behind p={p} virtual tokens; "
            f"shorten the prompt or ask for fewer"
        )
    return Text(room, T if lengths is None else lengths)


def check_lengths(lengths, ids):
    """lengths as (B,) int64 on the ids' device. Raises ValueError naming an impossible one."""
    lengths = torch.as_tensor(lengths, device=ids.device)
    if lengths.shape != ids.shape[:1] or lengths.is_floating_point():
        raise ValueError(
            f"lengths must be {ids.shape[0]} whole numbers, one per row, not "
            f"{tuple(lengths.shape)} {lengths.dtype}"
        )
    for length in lengths.tolist():
        if not 1 <= length <= ids.shape[1]:
            raise ValueError(f"length {length} of a row is not between 1 and {ids.shape[1]}")
    return lengths.long()


# -- reading


def read_prompt(model, text, new_tokens):
    """Read all prompts at once; returns the logits (R, V) after each row's end, and the cache."""
    ragged = isinstance(text.length, torch.Tensor)
    T = int(text.length.max()) if ragged else text.length
    p = model.embed.virtual_tokens
    cache = Cache(model, len(text.ids), p + T + new_tokens, new_tokens)
    if ragged:
        cache.real = text.length + p
    x = model.features(text.ids[:, :T], 0, cache)
    x = x[torch.arange(len(x), device=x.device), text.length - 1][:, None] if ragged else x[:, -1:]
    logits = model.read_out(x)  # (R, 1, V); of a head that pools over a row (R, labels)
    if logits.ndim != 3 or logits.shape[-1] != model.config.vocab_size:
        raise ValueError(
            f"the model's head gives {logits.shape[-1]} labels, not the {model.config.vocab_size} "
            f"tokens of a language model"
        )
    if not bool(torch.isfinite(logits).all()):
        raise ValueError("the logits after the prompt are not finite: the weights hold NaN or inf")
    return logits[:, -1], cache


def read_last(model, text, cache):
    """Read each row's last token; returns the logits (R, V) of the next one."""
    if isinstance(text.length, int):
        last = text.ids.narrow(1, text.length - 1, 1)
    else:
        last = text.ids.gather(1, text.length[:, None] - 1)
    if cache.ready is not None:  # chosen at the first token: a choice costs more than a LayerNorm
        return cache.ready(last, text.length - 1, cache)
    return next_token_logits(last, model, text.length - 1, cache)


def read_as_gpt(ids, model, start, cache):
    """Whether all tokens to come are read with the weights as they are, and by GPT's own methods: a
    subclass may have others.
    """
    own = [getattr(getattr(model, n), "__func__", None) for n in ("features", "read_out")]
    known = cache.tokens > 0 and not torch.is_autocast_enabled(ids.device.type)
    return known and own == [GPT.features, GPT.read_out]


@fast_path(
    "minipeft.decoding_step",
    devices=("cpu", "cuda", "mps"),
    capability=(0, 0),
    supports=read_as_gpt,
    wins=lambda ids, model, start, cache: cache.tokens >= 16,  # it puts the weights in order first
)
def next_token_logits(ids, model, start, cache):
    """ids (B, 1), the last token of every row, `start` tokens behind its beginning -> (B, V)."""
    return model.read_out(model.features(ids, start, cache))[:, -1]


# -- the distribution of the next token


def penalised(z, text, options):
    """Logits (or log-probabilities) z (R, V) with the penalties that depend on the text so far."""
    if options.repetition_penalty != 1:
        z = repetition_penalty(z, text, options.repetition_penalty)
    if options.no_repeat_ngram:
        z = no_repeated_ngram(z, text, options.no_repeat_ngram)
        if bool(z.isneginf().all(-1).any()):
            raise ValueError(
                f"no_repeat_ngram={options.no_repeat_ngram} has ruled out every token; raise it or "
                f"generate less"
            )
    return z


def repetition_penalty(z, text, theta):
    """(Decoding 1): z (R, V) with every token of the row made less likely (theta > 1)."""
    N = longest(text)
    seen = marked(text.ids[:, :N], real_positions(text, N), z.shape[-1])
    return torch.where(seen, torch.where(z > 0, z / theta, z * theta), z)


def no_repeated_ngram(z, text, g):
    """(Decoding 2): z (R, V), -inf where the token would complete a g-gram the row already has."""
    N = longest(text)
    if g > N:  # no g-gram is there yet
        return z
    tail = text.ends()[:, None] - (g - 1) + torch.arange(g - 1, device=z.device)  # (R, g - 1)
    tail = text.ids.gather(1, tail.clamp(min=0))
    grams = text.ids[:, :N].unfold(1, g, 1)  # (R, N - g + 1, g)
    again = (grams[..., :-1] == tail[:, None]).all(-1) & real_positions(text, N)[:, g - 1 :]
    return z.masked_fill(marked(grams[..., -1], again, z.shape[-1]), -math.inf)


def longest(text):
    return text.length if isinstance(text.length, int) else int(text.length.max())


def real_positions(text, N):
    """(R, N) bool, True at each row's real tokens."""
    return torch.arange(N, device=text.ids.device) < text.ends()[:, None]


def marked(tokens, where, V):
    """(R, V) bool, True for the tokens (R, N) whose `where` (R, N) is True."""
    found = torch.zeros(len(tokens), V + 1, dtype=torch.bool, device=tokens.device)
    where = where & (tokens < V)  # learned tokens have ids from V on and are never written
    return found.scatter_(1, tokens.where(where, V), True)[:, :V]  # column V takes the others


def probabilities(z, temperature=1.0, top_k=None, top_p=1.0):
    """Logits z (..., V) -> the distribution (..., V) to draw from, in float64. temperature > 0."""
    z = z.to(precise(z.device))
    p = ((z - z.amax(-1, keepdim=True)) / temperature).softmax(-1)  # (Decoding 3)
    if top_k is not None and top_k < p.shape[-1]:
        p = p * (p >= p.topk(top_k)[0][..., -1:])  # (Decoding 4)
        p = p / p.sum(-1, keepdim=True)
    if top_p < 1:
        ordered, token = p.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered
        p = p * torch.zeros_like(p).scatter(-1, token, (before < top_p).to(p.dtype))  # (Decoding 5)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(p, u):
    """Tokens (R,) drawn from p (R, V) by uniform numbers u (R,) in [0, 1). (Decoding 6)"""
    F = p.cumsum(-1)
    return torch.searchsorted(F, u[:, None] * F[:, -1:], right=True)[:, 0]


def precise(device):
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64


def uniforms(text, steps, seed):
    """(R, steps) uniform numbers in [0, 1), each row's from its own generator (see the header)."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    lengths, copies, rows = text.ends().tolist(), {}, []
    for row, length in zip(text.ids.tolist(), lengths, strict=True):
        prompt = tuple(row[:length])
        copies[prompt] = copy = copies.get(prompt, -1) + 1
        digest = hashlib.sha256(repr((seed, prompt, copy)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    u = torch.stack(rows) * (1 - 2**-50)  # u F(V) must stay below F(V) after rounding
    return u.to(text.ids.device, precise(text.ids.device))


# -- one row, one text


def extend(model, text, options, seed, on_token):
    """Append tokens to `text` until all rows have ended; returns their lengths, an int or (R,)."""
    steps, stop = options.max_new_tokens, options.stop_token
    u = None if options.temperature == 0 else uniforms(text, steps, seed)
    logits, cache = read_prompt(model, text, steps)
    ended = torch.zeros(len(text.ids), dtype=torch.bool, device=text.ids.device)
    ends = text.length
    for step in range(steps):
        if step:
            logits = read_last(model, text, cache)
        tokens = choose(penalised(logits, text, options), options, u, step)
        if stop is not None:
            tokens = tokens.masked_fill(ended, stop)
        text.append(tokens)
        ends = ends + 1 if stop is None else ends + (~ended).long()
        if on_token is not None:
            told = zip(tokens.tolist(), ended.tolist(), strict=True)
            on_token([None if over else token for token, over in told])
        if stop is not None:
            ended = ended | (tokens == stop)
            if bool(ended.all()):
                break
    return ends


def choose(z, options, u, step):
    """The next tokens (R,) by greedy choice or sampling from logits z (R, V)."""
    if options.temperature == 0:
        return z.argmax(-1)
    return draw(probabilities(z, options.temperature, options.top_k, options.top_p), u[:, step])


# -- beams


def search_beams(model, text, options):
    """Beam search; returns the best Text of every row and its lengths (R,).

    K beams are open per row. A step looks at the 2 K best continuations of all of them, so that K
    stay open even if K end; one that ends is a result if it was among the K best of its step.
    """
    K, steps, B = options.num_beams, options.max_new_tokens, len(text.ids)
    logits, cache = read_prompt(model, text, steps)
    V, row = logits.shape[-1], torch.arange(B, device=logits.device)[:, None]
    beams = row.expand(B, K).flatten()  # row r has the beams r K .. r K + K - 1
    cache.reorder(beams)
    text, logits = text.select(beams), logits[beams]
    score = torch.zeros(B, K, dtype=at_least_float32(logits), device=logits.device)
    score[:, 1:] = WORST  # at first a row's beams are the same: only one may be continued
    results = Results(text, score)
    for step in range(1, steps + 1):
        if step > 1:
            logits = read_last(model, text, cache)
        log_p = penalised(logits.to(score.dtype).log_softmax(-1), text, options)
        total, index = (log_p.view(B, K, V) + score[:, :, None]).flatten(1).topk(2 * K)
        beam, token = index // V + row * K, index % V  # (B, 2 K), best first
        ended = torch.full_like(token, step == steps, dtype=torch.bool)
        if options.stop_token is not None:
            ended |= token == options.stop_token
        candidates = text.select(beam.flatten())
        candidates.append(token.flatten())
        results.offer(candidates, total / step**options.length_penalty, ended)  # (Decoding 7)
        score, kept = (total + ended * WORST).topk(K)
        if step == steps or not results.may_improve(score[:, 0] / step**options.length_penalty):
            break
        text = candidates.select((kept + row * 2 * K).flatten())
        cache.reorder(beam.gather(1, kept).flatten())
    return Text(results.ids, results.ends), results.ends


def at_least_float32(z):
    return torch.promote_types(z.dtype, torch.float32)


class Results:
    """What beam search has finished: per row the best text, and the K best scores, best first."""

    def __init__(self, text, score):
        B, K = score.shape
        self.ids, self.ends = text.ids[::K], text.ends()[::K]
        self.scores = torch.full_like(score, WORST)  # (B, K)
        self.open = torch.ones(B, dtype=torch.bool, device=score.device)

    def offer(self, candidates, scores, ended):
        """Take those of a row's K best candidates that ended. candidates B 2K; others (B, 2K)."""
        B, K = self.scores.shape
        offered = torch.where(ended & self.open[:, None], scores, WORST)[:, :K]
        best, which = offered.max(1)
        rows = which + 2 * K * torch.arange(B, device=which.device)
        better = best > self.scores[:, 0]
        self.ids = torch.where(better[:, None], candidates.ids[rows], self.ids)
        self.ends = torch.where(better, candidates.ends()[rows], self.ends)
        self.scores = torch.cat([self.scores, offered], 1).topk(K)[0]

    def may_improve(self, best_open):
        """Whether in some row the best open beam's score (B,) still beats one of the K results."""
        worst = self.scores[:, -1]
        self.open = self.open & ((worst == WORST) | (best_open > worst))
        return bool(self.open.any())
