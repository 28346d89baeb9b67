"""The specification of dispatch.py, and the walk that holds every twin against its definition."""

from __future__ import annotations

import contextlib
import copy
import importlib
import logging
import sys
import types

import pytest
import torch

from minipeft import dispatch
from minipeft.dispatch import TWINS, fast_path, forced

KERNELS = "minipeft.kernels.of_this_test"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    """No mode from outside, no memory of what was said, no twins of other tests."""
    monkeypatch.delenv("MINIPEFT_FAST_PATH", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_said", set())
    before = dict(TWINS)
    yield
    TWINS.clear()
    TWINS.update(before)


@pytest.fixture
def kernels(monkeypatch):
    """A module whose twin computes what the definition does, and can be told apart."""
    module = types.ModuleType(KERNELS)
    module.calls = []

    def triple(x, times=3):
        module.calls.append(tuple(x.shape))
        return x + x + x if times == 3 else times * x

    module.triple = triple
    module.EXAMPLES = {"triple": lambda device: [(torch.randn(5, device=device),)]}
    monkeypatch.setitem(sys.modules, KERNELS, module)
    return module


def defined(**settings):
    """A definition with a twin on the CPU unless told otherwise."""

    @fast_path(KERNELS, **({"devices": ("cpu",)} | settings))
    def triple(x, times=3):
        """Three times x."""
        return times * x

    return triple


def runs_twin(function, kernels, *args, **kwargs):
    kernels.calls.clear()
    result = function(*args, **kwargs)
    torch.testing.assert_close(result, args[0] * kwargs.get("times", 3))
    return bool(kernels.calls)


def test_the_twin_runs_where_all_conditions_hold(kernels):
    assert runs_twin(defined(), kernels, torch.randn(4))
    assert runs_twin(defined(), kernels, torch.randn(4), times=5)


def test_the_definition_keeps_its_name_and_docstring(kernels):
    function = defined()
    assert function.__name__ == "triple" and function.__doc__ == "Three times x."
    assert function.twin.definition.__doc__ == "Three times x."


def test_of_two_twins_the_upper_one_that_may_runs(kernels, monkeypatch):
    """Two decorators: a kernel for sizes where it wins, a second form for others, the definition
    for what neither takes. None of them is the definition of another.
    """
    second = types.ModuleType(f"{KERNELS}_too")
    second.triple = lambda x, times=3: second.calls.append(1) or times * x
    second.calls = []
    monkeypatch.setitem(sys.modules, second.__name__, second)

    @fast_path(KERNELS, devices=("cpu",), wins=lambda x, times=3: x.numel() > 5)
    @fast_path(second.__name__, devices=("cpu",), dtypes=(torch.float32,))
    def triple(x, times=3):
        return times * x

    for x, chosen in (
        (torch.ones(9), (1, 0)),
        (torch.ones(3), (0, 1)),
        (torch.ones(2).double(), (0, 0)),
    ):
        kernels.calls.clear(), second.calls.clear()
        assert torch.equal(triple(x), 3 * x)
        assert (len(kernels.calls), len(second.calls)) == chosen
    modules = [t.module for t in TWINS.values() if t.name == triple.twin.name]
    assert sorted(modules) == [KERNELS, second.__name__] == sorted(t.module for t in triple.twins)
    assert len({t.definition for t in triple.twins}) == 1
    assert not hasattr(triple.twin.definition, "twin"), "the definition itself"


def test_another_device_takes_the_definition(kernels):
    assert not runs_twin(defined(devices=("cuda",)), kernels, torch.randn(4))


def test_an_older_gpu_takes_the_definition(kernels, monkeypatch):
    class OnGPU(torch.Tensor):
        device = torch.device("cuda", 0)

    tensor = torch.randn(2).as_subclass(OnGPU)
    twin = defined(devices=("cuda",), capability=(8, 0)).twin
    for capability, refused in {(7, 5): True, (8, 0): False, (9, 0): False}.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda d, c=capability: c)
        assert bool(twin.refusal((tensor,), {}, "auto")) == refused


def on_gpu(number):
    """A tensor that says it is on this GPU."""

    class OnGPU(torch.Tensor):
        device = torch.device("cuda", number)

    return torch.ones(2).as_subclass(OnGPU)


@pytest.fixture
def current(monkeypatch):
    """GPUs as the program sees them: entered and left, newest last; GPU 0 is the current one."""
    entered = [torch.device("cuda", 0)]

    @contextlib.contextmanager
    def enter(device):
        entered.append(device)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return entered


def test_a_kernel_is_launched_where_its_tensors_are(kernels, current):
    def triple(x, times=3):
        kernels.calls.append(str(current[-1]))
        return 3 * x

    kernels.triple = triple
    function = defined(devices=("cuda", "cpu"))
    function(on_gpu(1)), function(x=on_gpu(2)), function(torch.ones(2))
    assert kernels.calls == ["cuda:1", "cuda:2", "cuda:0"]
    assert len(current) == 1, "afterwards the current GPU is what it was"


def test_tensors_on_several_gpus_take_the_definition(kernels, current):
    @fast_path(KERNELS)
    def triple(x, more):
        return "the definition"

    kernels.triple = lambda x, more: "the twin"
    assert triple(on_gpu(1), on_gpu(1)) == "the twin"
    assert triple(on_gpu(1), on_gpu(0)) == "the definition"
    assert triple(on_gpu(1), [on_gpu(1), on_gpu(0)]) == "the definition"
    refusal = triple.twin.refusal((on_gpu(1), on_gpu(0)), {}, "auto")
    assert refusal == "tensors on several GPUs"


def test_another_dtype_takes_the_definition(kernels):
    function = defined(dtypes=(torch.float32,))
    assert runs_twin(function, kernels, torch.randn(4))
    assert not runs_twin(function, kernels, torch.randn(4, dtype=torch.float64))
    assert runs_twin(function, kernels, torch.arange(4)), "integers are codes, not values"


def test_a_tensor_given_by_name_counts_too(kernels):
    function = defined(dtypes=(torch.float32,))
    assert torch.equal(
        function(x=torch.ones(2, dtype=torch.float64)), torch.full((2,), 3.0).double()
    )
    assert not kernels.calls
    function(x=torch.ones(2))
    assert kernels.calls


def test_tensors_in_lists_count_too(kernels):
    @fast_path(KERNELS, devices=("cpu",), dtypes=(torch.float32,))
    def triple(many):
        return [3 * x for x in many]

    kernels.triple = lambda many: kernels.calls.append(1) or [3 * x for x in many]
    assert len(triple([torch.ones(2), torch.ones(3)])) == 2 and kernels.calls == [1]
    triple([torch.ones(2), torch.ones(3).double()]), triple([torch.ones(2, device="meta")])
    assert kernels.calls == [1]


def test_an_unsupported_shape_takes_the_definition(kernels):
    function = defined(supports=lambda x, times=3: x.numel() % 4 == 0)
    assert runs_twin(function, kernels, torch.randn(8))
    assert not runs_twin(function, kernels, torch.randn(7))
    with forced("on"):
        assert not runs_twin(function, kernels, torch.randn(7))


def test_what_was_measured_to_lose_runs_only_when_forced(kernels):
    function = defined(wins=lambda x, times=3: x.numel() > 100)
    assert runs_twin(function, kernels, torch.randn(101))
    assert not runs_twin(function, kernels, torch.randn(100))
    with forced("on"):
        assert runs_twin(function, kernels, torch.randn(100))


def test_inside_torch_func_the_definition_runs(kernels):
    """A hand-written gradient has no rule for vmap, or for a gradient of gradients."""
    triple, x = defined(), torch.randn(5)
    assert torch.equal(torch.func.grad(lambda x: triple(x).sum())(x), torch.full((5,), 3.0))
    torch.func.vmap(triple)(x)
    assert not kernels.calls
    assert runs_twin(triple, kernels, x)


def test_off_means_off(kernels, monkeypatch):
    monkeypatch.setenv("MINIPEFT_FAST_PATH", "off")
    function = defined()
    assert not runs_twin(function, kernels, torch.randn(4))
    with forced("on"):
        assert runs_twin(function, kernels, torch.randn(4))
    assert not runs_twin(function, kernels, torch.randn(4))


def test_another_word_is_an_error_that_names_it(kernels, monkeypatch):
    monkeypatch.setenv("MINIPEFT_FAST_PATH", "fast")
    with pytest.raises(ValueError, match="'fast' is none of auto, off, on"):
        defined()(torch.randn(4))
    with pytest.raises(ValueError, match="'yes'"), forced("yes"):
        pass
    monkeypatch.delenv("MINIPEFT_FAST_PATH")
    assert dispatch.mode() == "auto"


def test_the_interpreter_stands_in_for_the_gpu_only_when_forced(kernels, monkeypatch):
    function = defined(devices=("cuda",))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not runs_twin(function, kernels, torch.randn(4))
    with forced("on"):
        assert runs_twin(function, kernels, torch.randn(4))
    monkeypatch.delenv("TRITON_INTERPRET")
    with forced("on"):
        assert not runs_twin(function, kernels, torch.randn(4))


def test_a_missing_module_falls_back_and_is_tried_once(monkeypatch):
    tried = []

    def refuse(name):
        tried.append(name)
        raise ModuleNotFoundError("No module named 'triton'")

    monkeypatch.setattr(importlib, "import_module", refuse)
    function = defined()
    for _ in range(3):
        assert torch.equal(function(torch.ones(2)), torch.full((2,), 3.0))
    assert tried == [KERNELS]


def test_a_twin_s_own_error_is_seen(kernels):
    kernels.triple = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        defined()(torch.ones(2))


def test_an_error_in_the_kernel_s_module_is_seen(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        defined()(torch.ones(2))


def test_nothing_is_imported_before_the_twin_may_run(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: 1 / 0)
    with forced("off"):
        defined()(torch.ones(2))
    defined(devices=("cuda",))(torch.ones(2))


def test_which_path_runs_is_said_once_for_each_reason(kernels, caplog):
    caplog.set_level(logging.INFO, "minipeft.dispatch")
    function = defined(dtypes=(torch.float32,))
    for _ in range(3):
        function(torch.randn(4))
        function(torch.randn(4).double())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].endswith(f"runs as {KERNELS}")
    assert said[1].endswith(f"runs not as {KERNELS}: no twin for torch.float64")
    assert all("triple" in line for line in said)


@pytest.mark.parametrize(
    ("choice", "called_before", "sum_in_graph"),
    [("auto", True, True), ("auto", False, False), ("off", True, False)],
)
def test_it_traces_in_one_graph_and_says_nothing(
    choice, called_before, sum_in_graph, kernels, caplog
):
    """The twin adds, the definition multiplies: the graph tells which of the two was traced."""
    kernels.triple = lambda x, times=3: x + x + x
    function, graphs = defined(), []
    if called_before:
        function(torch.randn(2))
    caplog.set_level(logging.INFO, "minipeft.dispatch")
    caplog.clear()

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    with forced(choice):
        compiled = torch.compile(lambda x: function(x).cos(), backend=keep, fullgraph=True)
        x = torch.randn(5)
        torch.testing.assert_close(compiled(x), (3 * x).cos())
    assert len(graphs) == 1
    assert ("+" in graphs[0]) == sum_in_graph
    assert not [r for r in caplog.records if r.name == "minipeft.dispatch"]


def stands(twin):
    return dispatch.standing(twin, ["cpu"])


def test_whether_a_twin_is_in_use_and_why(kernels, monkeypatch):
    assert stands(defined().twin) == (True, "on cpu")
    assert stands(defined(wins=lambda *args: True).twin)[0]
    assert "measured to be faster" in stands(defined(wins=lambda *args: False).twin)[1]
    used, why = stands(defined(wins=dispatch.never).twin)
    assert not used and "no measurement" in why
    with forced("on"):
        assert stands(defined(wins=dispatch.never).twin) == (True, "on cpu")
    assert stands(defined(devices=("cuda",)).twin) == (
        False,
        "runs on cuda, which this machine has not",
    )
    assert stands(defined(dtypes=(torch.float16,)).twin) == (False, "no twin for torch.float32")
    with forced("off"):
        assert stands(defined().twin) == (False, "MINIPEFT_FAST_PATH=off")
    monkeypatch.delitem(sys.modules, KERNELS)
    used, why = stands(defined().twin)
    assert not used and "cannot be imported" in why


def check_twin(twin, device, tolerance=1e-5):
    """Hold a twin against its definition on its module's examples; returns how many there were."""
    examples = importlib.import_module(twin.module).EXAMPLES[twin.definition.__name__](device)
    for arguments in examples:
        mine = copy.deepcopy(arguments)  # some write into what they are given
        torch.testing.assert_close(
            twin.load()(*mine), twin.definition(*arguments), rtol=tolerance, atol=tolerance
        )
    return len(examples)


def test_the_walk_tells_a_wrong_twin_from_a_right_one(kernels):
    assert check_twin(defined().twin, "cpu") == 1
    kernels.triple = lambda x: 3.001 * x
    with pytest.raises(AssertionError):
        check_twin(defined().twin, "cpu")


def plain_twins():
    """Twins in plain PyTorch; all modules are imported, so that every decorated function is known.
    Triton's are held against their definitions in tests/kernels.
    """
    return [t for t in dispatch.every_twin() if not t.module.startswith("minipeft.kernels.")]


@pytest.mark.parametrize("twin", plain_twins(), ids=lambda t: f"{t.definition.__name__}-{t.module}")
def test_every_twin_computes_its_definition(twin):
    assert check_twin(twin, "cpu") > 0
