"""Adapters: the specification of minipeft/additive/adapter.py. Reference math in float64."""

import pytest
import torch

import minipeft
from minipeft import GPT, Adapter, GPTConfig
from minipeft.additive.adapter import ParallelAdapter, SequentialAdapter, install_bottlenecks
from minipeft.additive.bottleneck import Bottleneck
from minipeft.technique import Attachment
from tests.adapter_counts import recount
from tests.test_bottleneck import written_out
from tests.tiny import close, randomize, tiny_ids, tiny_model

ODD = GPTConfig(vocab_size=47, context_length=31, n_layer=3, n_head=3, d_model=21, d_ff=50)
EXACT = 1e-12  # float64: the same operations in another order


def by_hand(model, ids, technique, activation):
    """Logits with the adapters put in by hand, block by block: what each placement means."""
    bare = [wrap_free(block) for block in model.blocks]
    x = model.embed(ids)
    for block, (attn, mlp) in zip(model.blocks, bare):
        core = minipeft.wrap.base_module(block)
        at = {part: adapter_at(block, part) for part in ("attn", "mlp", "block")}
        f = attn(core.ln_1(x))
        x = x + combined(f, core.ln_1(x), at["attn"], technique, activation)
        f = mlp(core.ln_2(x))
        if at["block"] is None:
            x = x + combined(f, core.ln_2(x), at["mlp"], technique, activation)
        elif technique.placement == "parallel":  # (Adapter 6): reads the residual stream h
            x = x + f + written_out(x, at["block"].adapter, activation, technique.scale)
        else:  # (Adapter 5): reads h + f
            x = x + f + written_out(x + f, at["block"].adapter, activation, technique.scale)
    return model.head(model.ln_f(x))


def wrap_free(block):
    core = minipeft.wrap.base_module(block)
    return minipeft.wrap.base_module(core.attn), minipeft.wrap.base_module(core.mlp)


def adapter_at(block, part):
    module = block if part == "block" else getattr(minipeft.wrap.base_module(block), part)
    return module if isinstance(module, minipeft.wrap.Wrapper) else None


def combined(f, x, wrapper, technique, activation):
    """f + A(f), or f + A(x) in parallel, or f where there is no adapter."""
    if wrapper is None:
        return f
    read = x if technique.placement == "parallel" else f  # (Adapter 4) against (Adapter 2, 3)
    return f + written_out(read, wrapper.adapter, activation, technique.scale)


SETTINGS = {  # name -> (technique, the activation it must come out with)
    "houlsby (Adapter 2)": (Adapter(bottleneck=5, scale=0.7, layer_norms=False), "gelu"),
    "houlsby with LayerNorms": (Adapter(bottleneck=4), "gelu"),
    "pfeiffer (Adapter 3)": (Adapter(placement="pfeiffer", bottleneck=5, scale=1.3), "relu"),
    "pfeiffer on attention": (Adapter(placement="pfeiffer", bottleneck=5, on="attn"), "relu"),
    "parallel (Adapter 4)": (Adapter(placement="parallel", bottleneck=7, scale=4.0), "relu"),
    "parallel on attention": (Adapter(placement="parallel", bottleneck=3, on="attn"), "relu"),
    "houlsby of adapters": (Adapter(bottleneck=5, variant="adapters"), "swish"),
    "pfeiffer of adapters (Adapter 5)": (
        Adapter(placement="pfeiffer", bottleneck=5, variant="adapters", scale=0.5),
        "relu",
    ),
    "parallel of adapters (Adapter 6)": (
        Adapter(placement="parallel", bottleneck=5, variant="adapters", scale=4.0),
        "relu",
    ),
    "a layer left out": (Adapter(placement="pfeiffer", bottleneck=2, leave_out=(1,)), "relu"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_every_placement_computes_its_equation(name):
    technique, activation = SETTINGS[name]
    model = randomize(technique.attach(tiny_model(ODD)))
    ids = tiny_ids(2, 9, vocab=47)
    close(model(ids), by_hand(model, ids, technique, activation), EXACT)


# -- initialisation


def test_the_papers_initialisations_are_the_defaults():
    assert Adapter().shape()["init"] == "truncated"
    for placement in ("pfeiffer", "parallel"):
        assert Adapter(placement=placement).shape()["init"] == "lora"
    assert Adapter(placement="pfeiffer", variant="adapters").shape()["init"] == "normal"
    assert Adapter(placement="parallel", variant="adapters").shape()["init"] == "lora"


def test_houlsby_starts_near_the_base():
    base, ids = tiny_model(), tiny_ids()
    model = Adapter(bottleneck=16).attach(tiny_model())
    gap = (model(ids) - base(ids)).abs().max().item()
    # four adapters of 1e-3 * 1e-3 * sqrt(32 * 16) * |f|: about 1e-4 of logits around 10
    assert 0 < gap < 1e-3


@pytest.mark.parametrize("variant", ["paper", "adapters"])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_with_the_up_projection_at_zero_it_is_the_base_bitwise(placement, variant):
    model, ids = tiny_model(dtype=torch.float32), tiny_ids()
    base = model(ids)
    Adapter(placement=placement, variant=variant, bottleneck=6, init="lora").attach(model)
    assert torch.equal(model(ids), base)


def test_same_seed_same_bits_and_each_adapter_its_own():
    draws = []
    for _ in range(2):
        torch.manual_seed(5)
        draws.append(Adapter(bottleneck=6).attach(tiny_model()).attachments[0].tensors())
    assert all(torch.equal(draws[0][n], draws[1][n]) for n in draws[0])
    first, second = (draws[0][f"blocks.{n}.mlp.adapter.down.weight"] for n in (0, 1))
    assert not torch.equal(first, second)


# -- what is trained


@pytest.mark.parametrize(
    ("technique", "expected"),
    [  # D = 21, L = 3; one adapter of m = 4: 2*21*4 + 4 + 21 = 193
        (Adapter(bottleneck=4), 6 * 193 + 3 * 4 * 21 + 2 * 21),
        (Adapter(bottleneck=4, layer_norms=False), 6 * 193),
        (Adapter(placement="pfeiffer", bottleneck=4), 3 * 193),
        (Adapter(placement="pfeiffer", bottleneck=4, leave_out=(0, 2)), 193),
        (Adapter(placement="parallel", bottleneck=4, own_norm=True), 3 * (193 + 42)),
        (Adapter(bottleneck=4, leave_out=(1,)), 4 * 193 + 2 * 4 * 21 + 2 * 21),
        (Adapter(bottleneck=4, leave_out=(0, 1, 2)), 0),
    ],
)
def test_trained_parameters_are_the_formula(technique, expected):
    model = technique.attach(tiny_model(ODD))
    assert minipeft.report(model).trained == technique.count(ODD) == expected


def test_houlsby_trains_the_layer_norms_and_nothing_else_of_the_base():
    model = Adapter(bottleneck=4).attach(tiny_model())
    trained = {row.name for row in minipeft.report(model).rows if row.trained}
    norms = {n for n in trained if ".adapter." not in n}
    wanted = {f"blocks.{n}.ln_{i}" for n in (0, 1) for i in (1, 2)} | {"ln_f"}
    assert norms == {f"{n}.{kind}" for n in wanted for kind in ("weight", "bias")}


def test_only_the_asked_sub_layers_have_adapters():
    places = {
        "mlp": Adapter(placement="pfeiffer"),
        "attn": Adapter(placement="parallel", on="attn"),
    }
    for sub_layer, technique in places.items():
        swaps = technique.attach(tiny_model()).attachments[0].swaps
        assert [s.path for s in swaps] == [f"blocks.{n}.{sub_layer}" for n in (0, 1)]


def test_adapters_stack_on_other_techniques():
    model, ids = tiny_model(), tiny_ids()
    for n, technique in enumerate(
        (
            Adapter(placement="pfeiffer", variant="adapters", bottleneck=3),
            Adapter(placement="parallel", variant="adapters", bottleneck=4, scale=2.0),
            Adapter(placement="parallel", bottleneck=2),
        )
    ):
        randomize(technique.attach(model, f"a{n}"), seed=n)
    outer, inner = model.blocks[0], model.blocks[0].inner
    block = inner.inner
    x = model.embed(ids)
    h = x + block.attn(block.ln_1(x))
    y = h + block.mlp(block.ln_2(h))
    y = y + inner.adapter(y)
    close(outer(x), y + outer.adapter(h), EXACT)
    minipeft.detach(model)
    assert torch.equal(model(ids), tiny_model()(ids))


def test_install_bottlenecks_serves_other_techniques():
    model = tiny_model()
    attachment = Attachment("mine", None)
    sites = [("blocks.0.attn", ParallelAdapter), ("blocks.1.mlp", SequentialAdapter)]
    made = install_bottlenecks(model, attachment, sites, bottleneck=3, scale=2.0, activation="tanh")
    assert [type(w) for w in made] == [ParallelAdapter, SequentialAdapter]
    assert model.blocks[0].attn is made[0] and made[0].adapter.down.weight.shape == (3, 32)
    assert made[1].adapter.scale == 2.0 and made[1].adapter.activation == "tanh"
    assert made[0].adapter.up.weight.dtype == torch.float64


def test_adapters_are_made_on_the_models_dtype_and_device():
    model = Adapter(placement="pfeiffer").attach(tiny_model(dtype=torch.bfloat16))
    assert {t.dtype for t in model.attachments[0].tensors().values()} == {torch.bfloat16}
    with torch.device("meta"):
        meta = GPT(ODD)
    Adapter(placement="parallel", bottleneck=2).attach(meta)
    assert all(t.is_meta for t in meta.attachments[0].tensors().values())


def test_the_gradient_passes_through_and_around_the_adapter():
    """dy/df = I + W_2 diag(sigma') W_1 for the sequential form: at W_2 = 0 the identity."""
    wrapper = SequentialAdapter(torch.nn.Identity(), Bottleneck(5, 3, dtype=torch.float64))
    x = torch.randn(5, dtype=torch.float64)
    assert torch.equal(torch.autograd.functional.jacobian(wrapper, x), torch.eye(5).double())
    randomize(wrapper_model := torch.nn.ModuleList([wrapper]))
    a = wrapper_model[0].adapter
    open_ = (a.down(x) > 0).double()
    expected = torch.eye(5).double() + a.up.weight @ (open_[:, None] * a.down.weight)
    close(torch.autograd.functional.jacobian(wrapper, x), expected, EXACT)


# -- errors


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (Adapter(placement="serial"), "placement='serial'.*houlsby"),
        (Adapter(variant="mine"), "variant='mine'.*adapters"),
        (Adapter(placement="pfeiffer", on="ffn"), "on='ffn'.*mlp"),
        (Adapter(on="mlp"), "on='mlp' is for.*houlsby"),
        (Adapter(placement="parallel", variant="adapters", on="attn"), "has its own places"),
        (Adapter(activation="selu"), "activation='selu'.*swish"),
        (Adapter(init="zeros"), "init='zeros'.*truncated"),
        (Adapter(bottleneck=0), "bottleneck=0"),
        (Adapter(bottleneck=2.5), "bottleneck=2.5"),
        (Adapter(dropout=1.0), "dropout=1.0"),
        (Adapter(leave_out=(2,)), "leave_out names layer 2; the model has 0 to 1"),
        (Adapter(leave_out=(1, 1)), "twice"),
    ],
)
def test_bad_settings_are_named(technique, message):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        technique.attach(model)
    assert not model.attachments and all(p.requires_grad for p in model.parameters())


def test_it_cannot_be_merged_and_says_why():
    model = Adapter().attach(tiny_model())
    with pytest.raises(ValueError, match="activation between"):
        minipeft.merge(model)


def test_lora_is_a_parallel_adapter_without_activation():
    """h + s B A x: a parallel adapter on a projection, sigma the identity, biases at 0."""
    model, ids = tiny_model(), tiny_ids()
    minipeft.LoRA(rank=3, alpha=5, targets=("q",)).attach(model)
    randomize(model)
    expected = model(ids)
    tensors = model.attachments[0].tensors()
    minipeft.detach(model)
    attachment = Attachment("parallel", None)
    sites = [(f"blocks.{n}.attn.q", ParallelAdapter) for n in (0, 1)]
    for n, wrapper in enumerate(
        install_bottlenecks(
            model, attachment, sites, bottleneck=3, scale=5 / 3, activation="identity"
        )
    ):
        wrapper.adapter.down.weight.data.copy_(tensors[f"blocks.{n}.attn.q.A"])
        wrapper.adapter.up.weight.data.copy_(tensors[f"blocks.{n}.attn.q.B"])
    close(model(ids), expected, EXACT)


@pytest.mark.parametrize(
    ("row", "expected"),
    [  # Houlsby et al.'s BERT-large, AdapterHub's BERT-base, LoRA's tables for GPT-2 and GPT-3
        ("houlsby-bertlarge-64", 6_343_680),
        ("pfeiffer-bert-base-rf16", 894_528),
        ("adapterL-medium-r224", 11_089_152),
        ("adapterH-gpt3-r8", 40_109_568),
        ("fusion-bert-base", 21_252_096),
        ("tfew-adapter", 12_934_144),
    ],
)
def test_published_counts_come_out(row, expected):
    assert recount(row) == expected
