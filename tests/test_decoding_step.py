"""The specification of decoding_step.py: the same logits, fewer products, nothing stale."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import minipeft
from minipeft import GPT, GPTConfig, LoRA, generate
from minipeft.compressed.structured_pruning import prune_heads, prune_neurons
from minipeft.decoding import Cache, next_token_logits
from minipeft.decoding_step import Ready, product, way_to_read
from minipeft.dispatch import forced
from minipeft.head import Head
from minipeft.low_rank.multi_lora import use_adapters

WRAPPED = {
    "nothing": None,
    "q alone": LoRA(rank=2, targets=("q",)),
    "o and up": LoRA(rank=2, targets=("o", "up")),
    "every projection": LoRA(rank=2, targets=("q", "k", "v", "o", "up", "down")),
    "sub-layers": minipeft.Adapter(bottleneck=3),
    "blocks": minipeft.Adapter(placement="parallel", bottleneck=3),
    "the core": minipeft.PrefixTuning(prefix_length=3, reparameterize=False),
    "the embedding": minipeft.PromptTuning(prompt_length=3),
    "LayerNorms": minipeft.LayerNormTuning(),
    "biases": minipeft.BitFit(),
    "IA3": minipeft.IA3(),
    "gates": minipeft.UniPELT(prefix_length=2, bottleneck=3, rank=2),
}


def model_with(technique=None, dtype=torch.float64, **shape):
    """A small odd model, every number of what the technique adds drawn at random."""
    torch.manual_seed(0)
    sizes = {"n_layer": 2, "n_head": 3, "d_model": 21, "context_length": 40} | shape
    model = GPT(GPTConfig(vocab_size=13, **sizes)).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)  # no bias is zero
    if technique is not None:
        technique.attach(model)
        for p in model.attachments[-1].parameters().values():
            torch.nn.init.normal_(p, 0.0, 0.3)
    return model.eval()


def steps(model, path, batch=2, tokens=9, lengths=None, prompt=4):
    """Logits (tokens, B, V) of tokens read one by one behind a prompt, by one of the two."""
    ids = torch.randint(0, 13, (batch, prompt + tokens), generator=torch.Generator().manual_seed(1))
    virtual = model.embed.virtual_tokens
    cache, found = Cache(model, batch, virtual + prompt + tokens, tokens), []
    start = prompt
    if lengths is not None:
        start = torch.tensor(lengths)
        cache.real = start + virtual
    with torch.no_grad(), forced(path):
        model.features(ids[:, :prompt], 0, cache)
        for n in range(tokens):
            last = ids[:, prompt + n : prompt + n + 1]
            found.append(next_token_logits(last, model, start + n, cache))
    assert (cache.ready is not None) == (path == "on")
    return torch.stack(found)


@pytest.mark.parametrize("technique", WRAPPED.values(), ids=WRAPPED)
def test_the_logits_are_the_definition_s(technique):
    """Whatever is wrapped; batches, a single row, and rows of unequal length."""
    model = model_with(technique)
    for case in ({}, {"batch": 1}, {"batch": 3, "lengths": (4, 1, 3)}):
        # float64: other orders of summation over 84 numbers at most
        torch.testing.assert_close(
            steps(model, "on", **case), steps(model, "off", **case), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_too(dtype):
    model = model_with(dtype=dtype)
    # float32: as above; bfloat16 rounds every product's result to 8 bits, here in two orders
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(
        steps(model, "on"), steps(model, "off"), rtol=tolerance, atol=tolerance
    )


def test_pruned_heads_and_models_without_biases_are_read_right():
    model = model_with()
    prune_heads(model, {0: [1], 1: [0, 2]})
    model.blocks[0].attn.q.bias = None
    model.blocks[1].attn.v.bias = None
    model.blocks[1].mlp.up.bias = None
    torch.testing.assert_close(steps(model, "on"), steps(model, "off"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2])
def test_layers_without_heads_or_neurons_are_read(batch):
    """Nothing but biases is left of them."""
    model = model_with()
    prune_heads(model, {0: [0, 1, 2]})
    prune_neurons(model, {1: range(84)})
    torch.testing.assert_close(
        steps(model, "on", batch), steps(model, "off", batch), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("inside", ["IA3", "QAT"])
def test_a_change_of_the_base_below_other_wrappers_is_not_folded_above_them(inside):
    """IA3 rescales what was changed, QAT reads a weight of its own: neither is W' + change."""
    model = model_with({"IA3": minipeft.IA3(), "QAT": minipeft.QAT()}[inside])
    minipeft.DiffPruning().attach(model, "diff")
    for p in model.attachments[-1].parameters().values():
        torch.nn.init.normal_(p, 0.0, 0.3)
    torch.testing.assert_close(steps(model, "on"), steps(model, "off"), rtol=1e-12, atol=1e-12)


def test_another_head_is_called_as_it_is():
    model = Head(num_labels=5, per_token=True).attach(model_with())
    torch.testing.assert_close(steps(model, "on"), steps(model, "off"), rtol=1e-12, atol=1e-12)


def test_hooked_modules_are_called():
    """A forward hook on any module sees every token and may change the result."""
    model, seen = model_with(), []
    for path in ("blocks.0", "blocks.1.attn", "blocks.1.mlp", "blocks.0.attn.k", "blocks.0.ln_1"):
        module = minipeft.wrap.resolve(model, path)
        module.register_forward_hook(lambda m, a, y, path=path: (seen.append(path), 1.1 * y)[1])
    fast = steps(model, "on")
    assert set(seen) == {
        "blocks.0",
        "blocks.1.attn",
        "blocks.1.mlp",
        "blocks.0.attn.k",
        "blocks.0.ln_1",
    }
    torch.testing.assert_close(fast, steps(model, "off"), rtol=1e-12, atol=1e-12)


class Products(TorchDispatchMode):
    """Shapes of the weights in every matrix product."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm"):
            self.shapes.append(tuple(args[-1].shape))
        return function(*args, **kwargs or {})


class Unmergeable(minipeft.wrap.Wrapper):
    """A wrapper that changes nothing and cannot be merged."""


@pytest.mark.parametrize("wrapped", ["not", "LoRA", "LoRA in halves", "otherwise"])
def test_q_k_and_v_are_one_product_where_none_is_wrapped_for_good(wrapped):
    """A wrapper that can be merged is folded into the copy, in float32 and better."""
    technique = LoRA(rank=2, targets=("v",)) if "LoRA" in wrapped else None
    dtype = torch.bfloat16 if "halves" in wrapped else torch.float64
    model = model_with(technique, dtype, n_layer=1)
    if wrapped == "otherwise":
        model.blocks[0].attn.v = Unmergeable(model.blocks[0].attn.v)
    cache, ids = Cache(model, 1, 9, 9), torch.tensor([[3]])
    with torch.no_grad():
        model.features(ids, 0, cache)
        ready = Ready(model, 1)
        with Products() as products:
            ready(ids, 1, cache)
    joined = wrapped in ("not", "LoRA")
    assert [s for s in products.shapes if s == (21, 63)] == joined * [(21, 63)]
    count = {"LoRA in halves": 9, "otherwise": 7}.get(
        wrapped, 5
    )  # q, k, v (A, B); o, up, down, head
    assert len(products.shapes) == count


def test_folding_changes_no_weight_and_looks_at_hooks():
    model = model_with(LoRA(rank=2))
    q, seen = model.blocks[0].attn.q, []
    before = q.inner.weight.clone()
    q.register_forward_hook(lambda *call: seen.append("q"))
    model.blocks[1].attn.v.inner.register_forward_hook(lambda *call: seen.append("inside v"))
    steps(model, "on", tokens=1, prompt=1)
    assert seen == ["q", "inside v"] * 2, "once in the prompt, once in the token"
    assert torch.equal(q.inner.weight, before)


def test_rows_and_tokens_decide_how_weights_are_read():
    ways = {(1, 255): "vector", (1, 256): "columns", (2, 999): "rows", (3, 999): "rows"}
    ways |= {(4, 63): "rows", (4, 64): "columns", (11, 64): "columns", (12, 8): "left"}
    for dtype in (torch.float32, torch.float64):
        assert {case: way_to_read(*case, torch.empty(0, dtype=dtype)) for case in ways} == ways
    for other in (torch.empty(0, dtype=torch.bfloat16), torch.empty(0, device="meta")):
        assert {way_to_read(*case, other) for case in ways} == {"rows"}


@pytest.mark.parametrize("way", ["vector", "rows", "columns", "left"])
def test_every_way_is_the_same_product_and_copies_what_it_must(way):
    """A single layer: its weight is copied for columns alone. Where it writes can be given."""
    mlp = model_with().blocks[0].mlp
    first = torch.randn(5, 21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = first[0] if way == "vector" else first
    mlp.down.bias = None
    for linear, x in ((mlp.up, first), (mlp.down, mlp.up(first).detach())):
        with torch.no_grad(), Weights(linear.weight) as weights:
            read, expected = product([linear], way), linear(x)
            weights.read.clear()
            found, place = read(x), torch.empty_like(expected)
            read(x, place)
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(place, expected, rtol=1e-12, atol=1e-12)
        assert found.is_contiguous()
        assert weights.read == 2 * [way != "columns"]


@pytest.mark.parametrize("way", ["vector", "rows"])
def test_joined_weights_are_read_side_by_side(way):
    """A vector reads them transposed: the copy is made anyway."""
    attn = model_with().blocks[0].attn
    x = torch.randn(21, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x if way == "vector" else x[None]
    with torch.no_grad():
        expected = torch.cat([m(x) for m in (attn.q, attn.k, attn.v)], -1)
        found = product([attn.q, attn.k, attn.v], way)(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_halves_are_read_as_they_are():
    """By each of the 15 tokens behind the first, which the prompt gives."""
    model = model_with(dtype=torch.bfloat16)
    with Weights(model.blocks[0].mlp.up.weight) as weights:
        generate(model, torch.zeros(1, 2, dtype=torch.int64), 16, temperature=0)
    assert sum(weights.read) == 15


class Weights(TorchDispatchMode):
    """For every matrix product, whether it reads this tensor's own memory."""

    def __init__(self, weight):
        super().__init__()
        self.place, self.read = weight.data_ptr(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in ("mm", "addmm", "mv", "addmv"):
            self.read.append(self.place in [a.data_ptr() for a in args])
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("batch", [1, 2, 4, 12])
def test_generate_reads_as_its_rows_and_tokens_want(batch, monkeypatch):
    ways, init = [], Ready.__init__

    def note(self, model, batch, way):
        ways.append((batch, way))
        init(self, model, batch, way)

    monkeypatch.setattr(Ready, "__init__", note)
    model = model_with(context_length=80)
    ids = torch.arange(2 * batch).view(batch, 2) % 13
    found = generate(model, ids, 64, temperature=0)
    generate(model, ids, 64, num_beams=2)
    like = next(model.parameters())
    assert ways == [(rows, way_to_read(rows, 64, like)) for rows in (batch, 2 * batch)]
    with forced("off"):
        assert torch.equal(found, generate(model, ids, 64, temperature=0))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_rows_with_an_adapter_each_are_one_product_and_their_branches(options):
    """Of different ranks, on all projections and on some, and a row without."""
    model = model_with()
    adapters = {
        "a": LoRA(rank=2),
        "b": LoRA(rank=3, targets=("q", "k", "v"), share_qkv=True),
        "c": LoRA(rank=2, targets=("q", "k", "v", "o", "up", "down")),
    }
    for name, technique in adapters.items():
        technique.attach(model, name)
        for p in model.attachments[-1].parameters().values():
            torch.nn.init.normal_(p, 0.0, 0.3)
    rows, ids = ["c", None, "a", "b"], torch.arange(12).view(4, 3)
    with use_adapters(model, rows, beams=options.get("num_beams", 1)):
        found = generate(model, ids, 16, **({"temperature": 0} | options))
        with forced("off"):
            expected = generate(model, ids, 16, **({"temperature": 0} | options))
    assert torch.equal(found, expected)
    with use_adapters(model, rows):
        torch.testing.assert_close(
            steps(model, "on", batch=4), steps(model, "off", batch=4), rtol=1e-12, atol=1e-12
        )
        with torch.no_grad(), Products() as products:
            ready = Ready(model, 4)
            cache = Cache(model, 4, 9, 9)
            model.features(ids[:, :1], 0, cache)
            products.shapes.clear()
            ready(ids[:, :1], 1, cache)
        assert len(products.shapes) == 9, (
            "q, k and v in one, o, up and down in two layers; the head"
        )
        with pytest.raises(ValueError, match="3 rows; give one name"):
            Ready(model, 3)
    with use_adapters(model, ["c"]):
        torch.testing.assert_close(
            steps(model, "on", batch=1), steps(model, "off", batch=1), rtol=1e-12, atol=1e-12
        )


def test_another_number_of_rows_is_put_in_order_anew():
    """What is ready is cut to its rows; other rows in other places are no reason."""
    model, ids = model_with(), torch.tensor([[1, 2], [3, 4]])
    cache = Cache(model, 2, 9, 9)
    with torch.no_grad(), forced("on"):
        model.features(ids, 0, cache)
        next_token_logits(ids[:, :1], model, 2, cache)
        ready = cache.ready
        cache.reorder(torch.tensor([1, 0]))
        assert cache.ready is ready is not None
        cache.reorder(torch.tensor([1, 0, 1]))
        assert cache.ready is None
        again = ids[[1, 0, 1], 1:]
        found = next_token_logits(again, model, 3, cache)
    torch.testing.assert_close(found[0], found[2], rtol=1e-12, atol=1e-12)


OPTIONS = {
    "greedy": {"temperature": 0},
    "sampled": {"seed": 3, "top_p": 0.9},
    "beams": {"num_beams": 3},
    "stopped": {"temperature": 0, "stop_token": 2},
    "ragged": {"temperature": 0, "lengths": [4, 2]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_generate_gives_the_same_tokens_either_way(options):
    model = model_with()
    ids = torch.randint(0, 13, (2, 4), generator=torch.Generator().manual_seed(2))
    with forced("off"):
        expected = generate(model, ids, max_new_tokens=16, **options)
    assert torch.equal(generate(model, ids, max_new_tokens=16, **options), expected)


def made(monkeypatch):
    """A list of weak references to every Ready that is made."""
    there, init = [], Ready.__init__

    def note(self, *args):
        there.append(weakref.ref(self))
        init(self, *args)

    monkeypatch.setattr(Ready, "__init__", note)
    return there


def test_weights_are_put_in_order_once_and_forgotten_afterwards(monkeypatch):
    there, model = made(monkeypatch), model_with()
    for calls in (1, 2):
        generate(model, torch.zeros(1, 2, dtype=torch.int64), 16, temperature=0)
        gc.collect()
        assert len(there) == calls and all(reference() is None for reference in there)
    steps(model, "on", tokens=3)  # by the function that chooses, too
    assert len(there) == 3


def test_weights_that_changed_between_two_calls_are_seen():
    """In place, as an optimizer changes them, and by another tensor."""
    model, ids = model_with(), torch.zeros(2, 3, dtype=torch.int64)
    generate(model, ids, 16, temperature=0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in model.blocks.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
    model.blocks[0].attn.q.weight = torch.nn.Parameter(-model.blocks[0].attn.k.weight.detach())
    found = generate(model, ids, 16, temperature=0)
    with forced("off"):
        assert torch.equal(found, generate(model, ids, 16, temperature=0))


def test_an_adapter_switched_off_between_two_calls_is_seen():
    model, ids = model_with(LoRA(rank=2)), torch.zeros(2, 3, dtype=torch.int64)
    with_it = generate(model, ids, 16, temperature=0)
    with minipeft.disabled(model):
        without = generate(model, ids, 16, temperature=0)
    plain = model_with()
    assert torch.equal(without, generate(plain, ids, 16, temperature=0))
    assert not torch.equal(without, with_it)


class Scaled(GPT):
    """A model of somebody's own."""

    def features(self, *args, **kwargs):
        return 2 * super().features(*args, **kwargs)


OTHERWISE = ["few tokens", "off", "autocast", "a cache of one's own", "a model of one's own"]


@pytest.mark.parametrize("why", OTHERWISE)
def test_otherwise_the_definition_runs(why, monkeypatch):
    there, model, ids = made(monkeypatch), model_with(dtype=torch.float32), torch.tensor([[1, 2]])
    if why == "few tokens":
        generate(model, ids, 15, temperature=0)
    elif why == "off":
        with forced("off"):
            generate(model, ids, 20, temperature=0)
    elif why == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            generate(model, ids, 20, temperature=0)
    elif why == "a model of one's own":
        generate(Scaled(model.config), ids, 20, temperature=0)
    else:
        cache = Cache(model, 1, 9)
        with torch.no_grad():
            model.features(ids, 0, cache)
            next_token_logits(ids[:, :1], model, 2, cache)
    assert not there
    generate(model, ids, 16, temperature=0)
    assert len(there) == 1


def test_the_cache_counts_what_was_read_and_refuses_more():
    model, ids = model_with(), torch.tensor([[1, 2]])
    cache = Cache(model, 1, 3, 8)
    with torch.no_grad():
        model.features(ids, 0, cache)
        next_token_logits(ids[:, :1], model, 2, cache)
        assert cache.length == cache.longest == 3
        with pytest.raises(ValueError, match="3 of 3 positions"):
            next_token_logits(ids[:, :1], model, 3, cache)
