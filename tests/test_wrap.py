"""The specification of wrap.py: around, through, off again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from minipeft import IA3, AdaLoRA, LoRA, ModeApproximation, wrap
from minipeft.quantized.qlora import quantize_model
from minipeft.wrap import EmbeddingWrapper, Swap, Wrapper


class Doubling(Wrapper):
    """Twice what is inside, with one tensor of each kind of its own."""

    def __init__(self, inner):
        super().__init__(inner)
        self.own = nn.Parameter(torch.ones(2))
        self.part = nn.Linear(2, 2)
        self.register_buffer("kept", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)

    def forward(self, x):
        return 2 * self.inner(x)


def put_on(model, path, wrapper=Doubling):
    swap = Swap(path, *wrap.locate(model, path), wrapper(wrap.resolve(model, path)))
    swap.install()
    return swap


def test_a_wrapper_passes_everything_on():
    class Inner(nn.Module):
        def forward(self, *args, **kwargs):
            return args, kwargs

    assert Wrapper(Inner())(1, 2, cache=3) == ((1, 2), {"cache": 3})


def test_resolve_finds_modules_and_parameters(model):
    assert wrap.resolve(model, "blocks.1.mlp.up") is model.blocks[1].mlp.up
    assert wrap.resolve(model, "blocks.0.attn.q.bias") is model.blocks[0].attn.q.bias
    assert wrap.resolve(model, "head") is model.head


def test_paths_do_not_change_however_many_wrappers_are_on(model):
    original = model.blocks[0].attn.q
    for _ in range(3):
        put_on(model, "blocks.0.attn.q")
    put_on(model, "blocks.0.attn", Wrapper)
    outermost = wrap.resolve(model, "blocks.0.attn.q")
    assert outermost.inner.inner.inner is original
    assert wrap.base_module(outermost) is original
    assert wrap.resolve(model, "blocks.0.attn.q.weight") is original.weight
    assert wrap.resolve(model, "blocks.0.attn") is model.blocks[0].attn


def test_locate_gives_the_innermost_module_that_holds_the_place(model):
    attention = model.blocks[0].attn
    put_on(model, "blocks.0.attn", Wrapper)
    assert wrap.locate(model, "blocks.0.attn.q") == (attention, "q")
    put_on(model, "blocks.0.attn.q")
    assert wrap.locate(model, "blocks.0.attn.q") == (attention, "q")


def test_logical_names_leave_the_wrappers_out():
    assert wrap.logical_name("blocks.0.attn.inner.q.inner.inner.weight") == "blocks.0.attn.q.weight"
    assert wrap.logical_name("embed.inner.table") == "embed.table"
    assert wrap.logical_name("winner.inner_product") == "winner.inner_product"


@pytest.mark.parametrize(
    ("path", "near"),
    [("blocks.0.attn.qq", "blocks.0.attn.q"), ("heads", "head"), ("block.0.mlp", "blocks.0.mlp")],
)
def test_an_unknown_path_is_an_error_that_names_the_nearest(path, near, model):
    with pytest.raises(ValueError, match=f"no module '{path}'; did you mean '{near}'"):
        wrap.resolve(model, path)


def test_a_wrapper_s_own_tensors_are_no_place_of_the_model(model):
    put_on(model, "blocks.0.attn.q")
    with pytest.raises(ValueError, match="no module"):
        wrap.resolve(model, "blocks.0.attn.q.own")


def test_swaps_undo_last_in_first_out(model, ids):
    before, logits = list(model.modules()), model(ids)
    swaps = [put_on(model, "blocks.0.attn.q") for _ in range(2)] + [put_on(model, "blocks.1.mlp")]
    assert not torch.equal(model(ids), logits)
    swaps[1].uninstall()
    assert model.blocks[0].attn.q is swaps[0].replacement
    for swap in (swaps[2], swaps[0]):
        swap.uninstall()
    assert [id(m) for m in model.modules()] == [id(m) for m in before]
    assert torch.equal(model(ids), logits)


def test_a_swap_put_on_again_wraps_what_is_there_now(model):
    """Off, something else on, on again: the wrapper goes around the newcomer."""
    first = put_on(model, "blocks.0.attn.q")
    first.uninstall()
    second = put_on(model, "blocks.0.attn.q")
    first.install()
    assert model.blocks[0].attn.q is first.replacement
    assert first.replacement.inner is second.replacement


def test_a_parameter_is_swapped_for_another(model):
    original = model.blocks[0].attn.q.bias
    clone = nn.Parameter(original.detach().clone())
    put_on(model, "blocks.0.attn.q")
    swap = Swap("blocks.0.attn.q.bias", *wrap.locate(model, "blocks.0.attn.q.bias"), clone)
    swap.install()
    assert wrap.resolve(model, "blocks.0.attn.q.bias") is clone
    swap.uninstall()
    assert wrap.resolve(model, "blocks.0.attn.q.bias") is original


def test_own_tensors_are_those_the_wrapper_added():
    outer = Doubling(Doubling(nn.Linear(2, 2)))
    assert [n for n, _ in outer.own_parameters()] == ["own", "part.weight", "part.bias"]
    assert outer.own_parameters()[0][1] is outer.own
    assert [n for n, _ in outer.own_buffers()] == ["kept"]


def test_what_cannot_be_merged_says_its_name():
    with pytest.raises(NotImplementedError, match="Doubling cannot be merged"):
        Doubling(nn.Linear(2, 2)).merged(nn.Linear(2, 2))


def test_counts_of_virtual_tokens_add_up(model):
    class Rows(EmbeddingWrapper):
        own_virtual_tokens, own_position_shift, own_extra_ids = 3, 5, 2

    embed = Rows(Rows(model.embed))
    assert (embed.virtual_tokens, embed.position_shift, embed.extra_ids) == (6, 10, 4)
    plain = EmbeddingWrapper(model.embed)
    assert (plain.virtual_tokens, plain.position_shift, plain.extra_ids) == (0, 0, 0)


@pytest.mark.parametrize("compute_dtype", [None, "float64"])
@pytest.mark.parametrize(
    "technique",
    [
        AdaLoRA(init_rank=3, target_rank=2),
        IA3(),
        LoRA(rank=3),
        ModeApproximation(rank=3),
    ],
    ids=lambda t: type(t).__name__,
)
def test_what_stands_beside_a_quantised_projection_has_the_floats_type(
    technique, compute_dtype, model, ids
):
    """The packed bytes have none of their own: float32 beside float64 failed at the first use."""
    quantize_model(model, block_size=32, compute_dtype=compute_dtype)
    before = model(ids)
    technique.attach(model)
    assert {p.dtype for p in model.attachments[0].parameters().values()} == {torch.float64}
    assert torch.equal(model(ids), before)


def test_wrappers_are_found_from_the_outermost_in(model):
    LoRA(rank=2).attach(model, name="a")
    IA3(targets=("q",)).attach(model, name="b")
    outer = wrap.resolve(model, "blocks.0.attn.q")
    assert list(wrap.around(outer)) == [outer, outer.inner]
    assert list(wrap.around(wrap.base_module(outer))) == []
