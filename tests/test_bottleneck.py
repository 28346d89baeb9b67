"""The specification of minipeft/additive/bottleneck.py. Reference math in float64."""

import math

import pytest
import torch

from minipeft.additive.bottleneck import ACTIVATIONS, Bottleneck, add_bottleneck, bottleneck
from tests.tiny import close

EXACT = 1e-12  # float64: the same operations in another order


def written_out(x, a, activation, scale):
    """(Adapter 1), which is (Bottleneck 1), by hand: s [W_2 sigma(W_1 x + b_1) + b_2]."""
    u = x @ a.down.weight.T + a.down.bias
    sigma = {
        "relu": lambda u: u.clamp(min=0),
        "gelu": lambda u: u * 0.5 * (1 + torch.erf(u / math.sqrt(2))),
        "swish": lambda u: u / (1 + torch.exp(-u)),
        "tanh": lambda u: (u.exp() - (-u).exp()) / (u.exp() + (-u).exp()),
        "identity": lambda u: u,
        "gelu_tanh": lambda u: (
            u * 0.5 * (1 + torch.tanh((u + 0.044715 * u**3) * (2 / math.pi) ** 0.5))
        ),
    }[activation]
    return scale * (sigma(u) @ a.up.weight.T + a.up.bias)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_bottleneck_is_its_equation_for_every_activation(activation):
    torch.manual_seed(1)
    module = Bottleneck(7, 3, 1.7, activation, "normal", dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    x = torch.randn(2, 5, 7, dtype=torch.float64)
    expected = written_out(x, module, activation, 1.7)
    close(module(x), expected, EXACT)
    weights = module.down.weight, module.down.bias, module.up.weight, module.up.bias
    close(bottleneck(x, *weights, activation, 1.7), expected, EXACT)


def test_the_scale_multiplies_the_bias_too():
    module = Bottleneck(4, 2, 3.0, dtype=torch.float64)
    torch.nn.init.ones_(module.up.bias)
    assert torch.equal(module(torch.zeros(1, 4).double()), torch.full((1, 4), 3.0).double())


def test_own_norm_normalises_what_the_adapter_reads():
    module = Bottleneck(9, 4, own_norm=True, init="normal", dtype=torch.float64)
    x = 5 + 3 * torch.randn(2, 9, dtype=torch.float64)
    n = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    close(module(x), written_out(n, module, "relu", 1.0), EXACT)


def test_dropout_is_on_in_training_only_and_keeps_the_mean():
    module = Bottleneck(6, 4000, init="normal", dropout=0.5, activation="identity").double()
    x = torch.randn(1, 6, dtype=torch.float64)
    still = module.eval()(x)
    assert torch.equal(module(x), still)
    module.train()
    mean = torch.stack([module(x) for _ in range(300)]).mean(0)
    assert not torch.equal(module(x), module(x))
    # one draw's deviation is sqrt(4000) * |x W_1| * 0.02 = 0.06 at most; the mean of 300: 0.004
    assert (mean - still).abs().max() < 0.02


# -- initialisation


def test_lora_initialisation_is_kaiming_below_and_zero_above():
    module = Bottleneck(400, 100, init="lora")
    W_1 = module.down.weight
    assert W_1.abs().max() <= 400**-0.5 and W_1.abs().max() > 0.99 * 400**-0.5
    # uniform on (-a, a): standard deviation a / sqrt(3); 40,000 draws give it to about 0.3 %
    assert abs(W_1.std().item() / (400**-0.5 / math.sqrt(3)) - 1) < 0.02
    assert not module.up.weight.any() and not module.up.bias.any() and not module.down.bias.any()


def test_truncated_initialisation_is_cut_at_two_deviations():
    module = Bottleneck(300, 200, init="truncated")
    for weight in (module.down.weight, module.up.weight):
        assert weight.abs().max() <= 2e-3
        # a normal cut at two deviations has 0.8796 of the deviation; 60,000 draws: 0.3 %
        assert abs(weight.std().item() / 0.8796e-3 - 1) < 0.02
    assert not module.up.bias.any() and not module.down.bias.any()


def test_normal_initialisation_has_deviation_one_fiftieth():
    module = Bottleneck(300, 200, init="normal")
    for weight in (module.down.weight, module.up.weight):
        assert abs(weight.std().item() / 0.02 - 1) < 0.02 and weight.abs().max() > 0.06


# -- the sum


def made(own_norm=False, dropout=0.0):
    module = Bottleneck(7, 3, 1.7, "gelu", "normal", own_norm, dropout, dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_()
    return module, *torch.randn(2, 2, 5, 7, dtype=torch.float64)


@pytest.mark.parametrize("own_norm", [False, True])
def test_the_sum_is_f_plus_what_the_bottleneck_gives(own_norm):
    """(Bottleneck 2), bit for bit: the models that exist compute what they did."""
    module, f, x = made(own_norm)
    assert torch.equal(module.add_to(f, x), f + module(x))
    w = module.weights()
    assert torch.equal(add_bottleneck(f, x, *w), f + bottleneck(x, *w))


def test_dropout_reaches_the_sum_in_training_alone():
    module, f, x = made(dropout=0.5)
    torch.manual_seed(3)
    dropped = module.add_to(f, x)
    torch.manual_seed(3)
    assert torch.equal(dropped, f + module(x))
    assert not torch.equal(dropped, module.eval().add_to(f, x))


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_on_the_bottleneck_still_fires(register):
    module, f, x = made()
    seen = []
    getattr(module, register)(lambda *_: seen.append(1))
    close(module.add_to(f, x), f + written_out(x, module, "gelu", 1.7), EXACT)
    assert seen == [1]


@pytest.mark.parametrize("case", ["wide", "autocast", "two dtypes", "two shapes", "in double"])
def test_what_the_twin_does_not_take_the_definition_computes(case, monkeypatch):
    def refuse(*_):
        raise AssertionError("the twin ran")

    twin = add_bottleneck.twin
    monkeypatch.setattr(twin, "loaded", refuse)
    monkeypatch.setattr(twin, "devices", ("cpu",))
    monkeypatch.setenv("MINIPEFT_FAST_PATH", "on")
    f, x = torch.randn(2, 5, 7)
    weights = Bottleneck(7, 128).weights()
    with pytest.raises(AssertionError, match="the twin ran"):
        add_bottleneck(f, x, *weights)
    if case == "wide":
        add_bottleneck(f, x, *Bottleneck(7, 129).weights())
    elif case == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            add_bottleneck(f, x, *weights)
    elif case == "two dtypes":
        add_bottleneck(f.bfloat16(), x, *weights)
    elif case == "two shapes":
        add_bottleneck(f[:1], x, *weights)
    else:
        add_bottleneck(f.double(), x.double(), *Bottleneck(7, 128).double().weights())


def test_a_kernel_to_learn_from_is_not_chosen_by_default(monkeypatch):
    monkeypatch.delenv("MINIPEFT_FAST_PATH", raising=False)
    f, x = torch.randn(2, 5, 7)
    weights = Bottleneck(7, 16).weights()
    assert "not measured" in add_bottleneck.twin._argument_refusal((f, x, *weights), {}, "auto")
