"""A kernel beside its formula, written out in float64: results, and gradients of what wants one."""

import torch

from tests.interpreter import INTERPRETED
from tests.kernels.harness import DEVICE, TOLERANCE

# bfloat16 products are wrong in the interpreter: it multiplies bit patterns.
DOT_DTYPES = (torch.float32, torch.float16, *(() if INTERPRETED else (torch.bfloat16,)))
ALL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape, dtype=torch.float32, like=1.0):
    """Normal numbers of deviation `like`, without a gradient yet."""
    return (like * torch.randn(*shape)).to(DEVICE, dtype)


def wanting(*tensors):
    """Leaves that want a gradient, in the memory that they lie in."""
    return [t.detach().requires_grad_() for t in tensors]


def both(kernel, formula, arguments, incoming=None):
    """Hold kernel(*arguments) and its gradients against formula's in float64. `incoming` is the
    gradient at the result, random if not given.

    An error counts relative to the largest entry: a sum whose terms cancel has the rounding of its
    terms, and what a kernel keeps between two products in half precision is rounded once more.
    """
    y = kernel(*arguments)
    incoming = draw(*y.shape, dtype=y.dtype) if incoming is None else incoming
    exact = {id(a): a.detach().double() for a in arguments if isinstance(a, torch.Tensor)}
    for a in arguments:
        if isinstance(a, torch.Tensor) and a.requires_grad:
            exact[id(a)].requires_grad_()
    expected = formula(*(exact.get(id(a), a) for a in arguments))
    leaves = {id(a): a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad}
    mine = torch.autograd.grad(y, list(leaves.values()), incoming)
    theirs = torch.autograd.grad(expected, [exact[i] for i in leaves], incoming.double())
    for a, e in zip((y.detach(), *mine), (expected.detach(), *theirs)):
        assert a.shape == e.shape and a.isfinite().all()
        gap, allowed = (a.double() - e).abs().max(), TOLERANCE[a.dtype] * e.abs().max()
        assert gap <= allowed, f"{tuple(a.shape)}: {gap:.2g} off, {allowed:.2g} allowed"


def loss_and_gradients(model, ids, choice):
    """[loss, gradients of what the model trains] with the seam forced to `choice`."""
    from minipeft.dispatch import forced

    with forced(choice):
        parameters = [p for p in model.parameters() if p.requires_grad]
        loss = model.loss(ids[:, :-1], ids[:, 1:])
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def check_model(technique, function, monkeypatch):
    """A technique's loss and gradients on a model are the same with the kernel, and it runs.

    function: the decorated definition that the kernel twins.
    """
    from tests.tiny import randomize, tiny_ids, tiny_model

    model = randomize(technique.attach(tiny_model(dtype=torch.float32))).to(DEVICE)
    twin = next(t for t in function.twins if t.module.startswith("minipeft.kernels."))
    calls, launch = [], twin.load()
    monkeypatch.setattr(twin, "loaded", lambda *args: calls.append(1) or launch(*args))
    ids = tiny_ids(2, 9).to(DEVICE)
    mine, theirs = (loss_and_gradients(model, ids, choice) for choice in ("on", "off"))
    assert calls, "the kernel did not run"
    for a, e in zip(mine, theirs):
        # float32 through two blocks: a few roundings of the largest
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()) + 1e-9)
