"""The specification of minipeft/causal_attention.py: attention whose probabilities are kept."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import LoRA, causal_attention, gpt
from minipeft.dispatch import forced
from minipeft.gpt import GPTConfig, attention_written_out
from tests.tiny import check_fifty_steps, randomize, tiny_ids, tiny_model

PLAIN = gpt.attention.twin.definition


def inputs(B=2, H=3, T=11, d=5, dtype=torch.float64, wanted="qkv"):
    """q, k, v; those named in `wanted` want gradients."""
    return [torch.randn(B, H, T, d, dtype=dtype).requires_grad_(n in wanted) for n in "qkv"]


def with_gradients(function, tensors, weights):
    """[output, gradients of those that want one] of sum(weights * function(q, k, v))."""
    y = function(*tensors)
    return [y, *torch.autograd.grad((y * weights).sum(), [t for t in tensors if t.requires_grad])]


def agree(tensors, reference=attention_written_out, tolerance=1e-12):
    """float64, sums of a few hundred terms: a few units of its 16th digit."""
    weights = torch.randn_like(tensors[0])
    ours, theirs = (
        with_gradients(function, tensors, weights)
        for function in (causal_attention.attention, reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


class Products(TorchDispatchMode):
    """Counts batched products."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += "bmm" in str(operation)
        return operation(*args, **(kwargs or {}))


@pytest.fixture(params=[1, 3, 4, 64])
def block(request, monkeypatch):
    monkeypatch.setattr(causal_attention, "BLOCK", request.param)


@pytest.mark.parametrize("shape", [(2, 3, 11, 5), (1, 1, 12, 1), (3, 1, 2, 7), (1, 4, 47, 2)])
def test_output_and_gradients_are_the_written_out_ones(shape, block):
    """(CausalAttention 1) (CausalAttention 2) (CausalAttention 3) (CausalAttention 4), in blocks
    that end anywhere.
    """
    agree(inputs(*shape))


def test_the_gradients_are_the_formulas():
    """(CausalAttention 2) (CausalAttention 3) (CausalAttention 4), entry by entry."""
    q, k, v = inputs(1, 1, 6, 3)
    weights = torch.randn(1, 1, 6, 3, dtype=torch.float64)
    _, *ours = with_gradients(causal_attention.attention, (q, k, v), weights)
    Q, K, V, G = (t.detach()[0, 0] for t in (q, k, v, weights))
    P = torch.zeros(6, 6, dtype=torch.float64)
    for i in range(6):
        e = torch.exp(K[: i + 1] @ Q[i] / math.sqrt(3))
        P[i, : i + 1] = e / e.sum()
    dP = G @ V.T
    dS = P * (dP - (P * dP).sum(1, keepdim=True))
    expected = (dS @ K / math.sqrt(3), dS.T @ Q / math.sqrt(3), P.T @ G)
    for found, wanted in zip(ours, expected):
        torch.testing.assert_close(found[0, 0], wanted, rtol=1e-12, atol=1e-12)  # sums of 6 terms


def test_gradcheck(block):
    assert torch.autograd.gradcheck(causal_attention.attention, inputs(2, 1, 5, 2))


@pytest.mark.parametrize("T", [2, 63, 64, 65, 128, 200])
def test_in_float32_it_is_as_near_as_torch_s_kernel(T):
    """Against float64: softmax weights and sums of T of them are right to 1e-5 of their size."""
    tensors = inputs(2, 2, T, 64, dtype=torch.float32)
    weights = torch.randn(2, 2, T, 64)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = with_gradients(attention_written_out, exact, weights.double())
    for function in (causal_attention.attention, PLAIN):
        for found, wanted in zip(with_gradients(function, tensors, weights), truth):
            assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv"])
def test_only_wanted_gradients_are_made(wanted, block, monkeypatch):
    """LoRA on q and v trains nothing in front of the first block's k. One product a gradient,
    and one for dP, which dq and dk share.
    """
    tensors = inputs(wanted=wanted)
    agree(tensors)
    y, made, empty = causal_attention.attention(*tensors), [], causal_attention.empty_by_token
    monkeypatch.setattr(
        causal_attention, "empty_by_token", lambda x: made.append(1) or empty(x).fill_(math.nan)
    )
    blocks = 2 * len(causal_attention.blocks(11))  # of two rows
    with Products() as products:
        y.sum().backward()
    assert len(made) == len(wanted)
    assert products.count == blocks * (len(wanted) + bool({"q", "k"} & set(wanted)))


@pytest.mark.parametrize("view", ["heads", "strided", "expanded", "one for all rows"])
def test_any_strides_are_taken(view, block):
    def made():
        x = torch.randn(2, 11, 6, 5, dtype=torch.float64)
        views = {
            "heads": x[:, :, :3].transpose(1, 2),
            "strided": x[:, :, ::2].permute(0, 2, 1, 3),
            "expanded": x[:, :, :1].transpose(1, 2).expand(2, 3, 11, 5),
            "one for all rows": x[:1, :, :3].transpose(1, 2).expand(2, 3, 11, 5),
        }
        return views[view].detach().requires_grad_()

    agree([made() for _ in range(3)])


@pytest.mark.parametrize("kind", ["expanded", "by token", "transposed"])
def test_any_gradient_is_taken(kind, block):
    tensors = inputs()
    y = causal_attention.attention(*tensors)
    g = torch.randn(2, 11, 3, 5, dtype=torch.float64).transpose(1, 2)
    if kind == "expanded":
        g = torch.ones((), dtype=torch.float64).expand_as(y)
    elif kind == "transposed":
        g = torch.randn(2, 3, 5, 11, dtype=torch.float64).transpose(2, 3)
    ours = torch.autograd.grad(y, tensors, g)
    theirs = torch.autograd.grad(attention_written_out(*tensors), tensors, g.contiguous())
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_memory_that_was_never_written_reaches_no_result(monkeypatch, block):
    """Everything empty is full of NaN here."""
    empty = causal_attention.empty_by_token
    monkeypatch.setattr(causal_attention, "empty_by_token", lambda x: empty(x).fill_(math.nan))
    agree(inputs())


def test_scores_of_any_size_give_probabilities():
    """e^1000 is no number; the softmax takes the largest score away first."""
    q, k, v = inputs(1, 2, 9, 4, dtype=torch.float32)
    tensors = [(300 * q).detach().requires_grad_(), (300 * k).detach().requires_grad_(), v]
    found = with_gradients(causal_attention.attention, tensors, torch.randn(1, 2, 9, 4))
    assert all(t.isfinite().all() for t in found)


def test_output_and_gradients_lie_as_the_projections_read_them():
    """(B, T, H, d), so that flatten costs no copy."""
    tensors = inputs()
    y = causal_attention.attention(*tensors)
    for t in (y, *torch.autograd.grad(y.sum(), tensors)):
        assert t.transpose(1, 2).is_contiguous()


def test_twice_backward_gives_twice_the_gradient():
    """What is kept is not overwritten."""
    tensors = inputs()
    y = causal_attention.attention(*tensors).square().sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in tensors]
    y.backward()
    assert all(torch.equal(t.grad, 2 * g) for t, g in zip(tensors, once))


def test_inputs_and_gradient_are_not_changed():
    tensors = inputs()
    y = causal_attention.attention(*tensors)
    g = torch.randn_like(y)
    before = [t.detach().clone() for t in (*tensors, g)]
    torch.autograd.grad(y, tensors, g)
    assert all(torch.equal(a, b) for a, b in zip(before, (*tensors, g)))


def test_the_output_may_be_changed_in_place():
    """As a technique around the core may do, and as with torch's kernel."""
    tensors = inputs()
    causal_attention.attention(*tensors).mul_(2).sum().backward()
    doubled = torch.autograd.grad(2 * attention_written_out(*tensors).sum(), tensors)
    torch.testing.assert_close([t.grad for t in tensors], list(doubled), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", [11, 64, 150])
def test_what_is_kept_are_the_probabilities_of_blocks(T):
    """T (T + 64) / 2 a row and head where T is a multiple of 64; not the output."""
    numbers = 0

    def pack(tensor):
        nonlocal numbers
        numbers += tensor.numel()
        return tensor

    tensors = inputs(2, 3, T, 5)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        causal_attention.attention(*tensors)
    assert numbers == 2 * 3 * (3 * T * 5 + causal_attention.kept(T))
    assert T % 64 or causal_attention.kept(T) == T * (T + 64) // 2


# -- when it is chosen


def text(T=128, d=64, H=4, **options):
    return inputs(1, H, T, d, **({"dtype": torch.float32} | options))


@pytest.fixture
def chosen(monkeypatch):
    """Whether gpt.attention takes the twin for these arguments."""

    def ask(*arguments, **options):
        ran = []
        monkeypatch.setattr(gpt.attention.twin, "loaded", lambda *a, **k: ran.append(1) or a[0])
        gpt.attention(*arguments, **options)
        return bool(ran)

    return ask


def test_it_runs_where_a_text_is_learned_on_one_thread(chosen):
    assert chosen(*text()) and chosen(*text(512)) and chosen(*text(H=2, d=128))
    assert all(chosen(*text(wanted=name)) for name in "qkv")


@pytest.mark.parametrize("T", [2, 127, 513])
def test_at_lengths_where_it_does_not_pay_it_runs_only_when_asked(T, chosen):
    assert not chosen(*text(T))
    with forced("on"):
        assert chosen(*text(T))


def test_narrow_models_and_more_threads_are_left_to_torch(chosen):
    assert not chosen(*text(d=63)) and not chosen(*text(H=3)) and not chosen(*text(d=1, H=99))
    try:
        torch.set_num_threads(2)
        assert not chosen(*text())
    finally:
        torch.set_num_threads(1)
    assert chosen(*text())


def test_where_it_cannot_serve_torch_s_kernel_runs(chosen):
    q, k, v = text()
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool)
    longer = torch.cat([k, k], 2), torch.cat([v, v], 2)
    with forced("on"):
        assert not chosen(q, k, v, mask) and not chosen(q, k, v, mask=mask)
        assert not chosen(q, k, v, None, 0.1) and not chosen(q, k, v, dropout=0.1)
        assert not chosen(q, *longer) and not chosen(q[:, :, :1], k[:, :, :1], v[:, :, :1])
        assert not chosen(q, k, v[..., :8]) and not chosen(*text(wanted=""))
        assert not chosen(*text(dtype=torch.float64)) and not chosen(*text(dtype=torch.bfloat16))
        with torch.no_grad():
            assert not chosen(q, k, v)
        with torch.autocast("cpu", torch.bfloat16):
            assert not chosen(q, k, v)
        assert chosen(q, k, v)


def test_the_compiler_gets_torch_s_kernel():
    """It knows that one, and would unroll the loop."""
    seen = []

    def keep(graph, examples):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    causal = torch.compile(lambda q, k, v: gpt.attention(q, k, v).cos(), backend=keep)
    tensors = text()
    with forced("on"):
        gpt.attention(*tensors)  # loads the twin
        causal(*tensors)
    assert any("scaled_dot_product_attention" in name for name in seen)
    assert not any("baddbmm" in name for name in seen)


def test_the_core_takes_it_and_drops_nothing_in_evaluation(monkeypatch):
    monkeypatch.setattr(gpt.attention.twin, "loaded", lambda *a, **k: "the twin")
    core = gpt.AttentionCore(dropout=0.5)
    assert core.eval()(*text()) == "the twin"
    assert torch.is_tensor(core.train()(*text()))


# -- in the model

MODEL = GPTConfig(vocab_size=97, context_length=160, n_layer=2, n_head=4, d_model=256)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_s_loss_and_gradients_are_those_of_the_definition(checkpointing, monkeypatch):
    calls = []
    twin = causal_attention.attention
    monkeypatch.setattr(
        gpt.attention.twin, "loaded", lambda *a, **k: calls.append(1) or twin(*a, **k)
    )
    found = {}
    for mode in ("auto", "off"):
        torch.manual_seed(0)
        model = tiny_model(MODEL, torch.float32).train()
        randomize(LoRA(rank=2).attach(model))
        model.gradient_checkpointing = checkpointing
        trained = [p for p in model.parameters() if p.requires_grad]
        ids = tiny_ids(2, 151)
        with forced(mode):
            loss = model.loss(ids[:, :-1], ids[:, 1:].contiguous())
            found[mode] = [loss, *torch.autograd.grad(loss, trained)]
    assert len(calls) == (4 if checkpointing else 2)
    for ours, theirs in zip(found["auto"], found["off"]):
        # float32 through two blocks
        assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_fifty_steps_give_the_losses_of_the_definition(monkeypatch):
    check_fifty_steps(gpt.attention, monkeypatch, calls=2)  # two layers
