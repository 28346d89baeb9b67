"""The specification of minipeft/quantized/paged_adamw.py."""

import copy
import math

import pytest
import torch

from minipeft import LoRA, figures
from minipeft.quantized.paged_adamw import PagedAdamW, Pager, adamw_update, show_work
from minipeft.technique import trainable_parameters
from minipeft.training import TrainingConfig, train
from tests.test_resume import DATA, same_bits
from tests.tiny import tiny_model

SHAPES = [(7, 47), (3,), (1,), (5, 2, 9), ()]  # 329 + 3 + 1 + 90 + 1 = 424 elements
SETTINGS = {"lr": 3e-3, "betas": (0.8, 0.97), "eps": 1e-6, "weight_decay": 0.1}


def tensors(dtype=torch.float32, seed=0, shapes=SHAPES):
    """Parameters whose memory nobody shares."""
    generator = torch.Generator().manual_seed(seed)
    made = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    return [torch.nn.Parameter(t.to(dtype)) for t in made]


def give_gradients(parameters, step):
    """The same gradients for the same step; now and then a tensor gets none."""
    generator = torch.Generator().manual_seed(100 + step)
    for n, p in enumerate(parameters):
        g = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 5 - 2)
        p.grad = None if (step + n) % 7 == 3 else g.to(p.dtype)


def run(optimizer, parameters, steps, first=0):
    for step in range(first, first + steps):
        give_gradients(parameters, step)
        optimizer.step()
    return parameters


def reference(dtype=torch.float32, steps=50, **settings):
    parameters = tensors(dtype)
    optimizer = torch.optim.AdamW(parameters, foreach=False, fused=False, **SETTINGS | settings)
    return run(optimizer, parameters, steps), optimizer


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# -- the same bits as torch


@pytest.mark.parametrize("page_size", [1, 16, 50, 424, 10**6])
@pytest.mark.parametrize("budget", [1, 2, 5, None])
def test_every_page_size_and_budget_gives_torch_s_bits_over_50_steps(page_size, budget):
    steps = 50 if page_size > 1 else 6  # single elements are slow
    parameters = tensors()
    paged = PagedAdamW(parameters, **SETTINGS, page_size=page_size, resident_pages=budget)
    expected, torchs = reference(steps=steps)
    assert same(run(paged, parameters, steps), expected)
    mine, theirs = paged.state_dict()["state"], torchs.state_dict()["state"]
    assert mine.keys() == theirs.keys()
    for n in theirs:
        assert mine[n].keys() == theirs[n].keys()
        assert all(torch.equal(mine[n][k], theirs[n][k]) for k in theirs[n])


@pytest.mark.parametrize("budget", range(1, 10))
def test_every_budget_from_one_page_to_all(budget):
    parameters = tensors()
    paged = PagedAdamW(parameters, **SETTINGS, page_size=50, resident_pages=budget)
    assert same(run(paged, parameters, 50), reference()[0])
    assert len(paged.pagers[0].frames) == budget  # 424 elements are 9 pages of 50


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_too(dtype):
    parameters = tensors(dtype)
    paged = PagedAdamW(parameters, **SETTINGS, page_size=33, resident_pages=2)
    assert same(run(paged, parameters, 20), reference(dtype, 20)[0])


def test_two_dtypes_at_once_have_a_pager_each():
    mixed = [*tensors(), *tensors(torch.float64)]
    twins = copy.deepcopy(mixed)
    paged = PagedAdamW(mixed, **SETTINGS, page_size=33, resident_pages=2)
    plain = torch.optim.AdamW(twins, foreach=False, **SETTINGS)
    assert same(run(paged, mixed, 9), run(plain, twins, 9))
    assert [p.host.dtype for p in paged.pagers] == [torch.float32, torch.float64]


def test_groups_keep_their_own_settings_even_on_one_page():
    groups = {}
    for kind in (PagedAdamW, torch.optim.AdamW):
        a, b, c, d, e = tensors()
        options = {"page_size": 1000} if kind is PagedAdamW else {"foreach": False}
        optimizer = kind(
            [
                {"params": [a, b], "lr": 1e-2, "weight_decay": 0.0},
                {"params": [c, d, e], "betas": (0.5, 0.6), "eps": 1e-3},
            ],
            **SETTINGS,
            **options,
        )
        groups[kind] = run(optimizer, [a, b, c, d, e], 8)
    assert same(*groups.values())


def test_a_learning_rate_that_changes_is_followed():
    results = []
    for kind, options in ((PagedAdamW, {"page_size": 40, "resident_pages": 1}), (None, {})):
        parameters = tensors()
        optimizer = (kind or torch.optim.AdamW)(parameters, **SETTINGS, **options)
        for step in range(6):
            optimizer.param_groups[0]["lr"] = 0.01 * (step + 1)
            run(optimizer, parameters, 1, step)
        results.append(parameters)
    assert same(*results)


def test_parameters_that_are_not_contiguous():
    results = []
    for kind, options in ((PagedAdamW, {"page_size": 40, "resident_pages": 1}), (None, {})):
        parameters = [torch.nn.Parameter(p.T.detach()) for p in tensors(shapes=[(7, 47), (3, 5)])]
        assert not parameters[0].is_contiguous()
        optimizer = (kind or torch.optim.AdamW)(parameters, **SETTINGS, **options)
        results.append(run(optimizer, parameters, 9))
    assert same(*results)


def test_a_group_added_later_keeps_what_was_there():
    results = []
    for kind, options in ((PagedAdamW, {"page_size": 40, "resident_pages": 2}), (None, {})):
        parameters = tensors()
        optimizer = (kind or torch.optim.AdamW)(parameters[:2], **SETTINGS, **options)
        run(optimizer, parameters[:2], 5)
        optimizer.add_param_group({"params": parameters[2:], "lr": 1e-2})
        results.append(run(optimizer, parameters, 5, 5))
    assert same(*results)


def test_the_update_is_adamw_s_formula():
    """(Paged 1) (Paged 2), written out in float64."""
    w, g, m, v = (torch.rand(47, dtype=torch.float64) - 0.3 for _ in range(4))
    v = v.abs()
    lr, (b1, b2), eps, decay, t = 0.01, (0.8, 0.97), 1e-3, 0.1, 3
    m1, v1 = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    step = lr * (m1 / (1 - b1**t)) / ((v1 / (1 - b2**t)).sqrt() + eps)
    w1 = w - lr * decay * w - step
    adamw_update(w, g, m, v, t, lr, (b1, b2), eps, decay)
    for mine, theirs in ((w, w1), (m, m1), (v, v1)):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-15)  # a few roundings


def test_a_closure_is_called_with_gradients_on():
    w = torch.nn.Parameter(torch.tensor([2.0]))
    optimizer = PagedAdamW([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 4.0
    assert w.item() < 2.0


# -- saving and resuming in the middle


def test_a_state_dict_resumes_bitwise_with_other_pages():
    parameters = tensors()
    paged = PagedAdamW(parameters, **SETTINGS, page_size=50, resident_pages=2)
    run(paged, parameters, 20)
    saved = copy.deepcopy(paged.state_dict())
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    other = PagedAdamW(fresh, **SETTINGS, page_size=7, resident_pages=3)
    other.load_state_dict(saved)
    assert same(run(other, fresh, 30, 20), reference()[0])


def test_state_moves_from_torch_s_adamw_and_back():
    first, torchs = reference(steps=20)
    fresh = [torch.nn.Parameter(p.detach().clone()) for p in first]
    paged = PagedAdamW(fresh, **SETTINGS, page_size=50, resident_pages=1)
    paged.load_state_dict(copy.deepcopy(torchs.state_dict()))
    run(paged, fresh, 15, 20)
    last = [torch.nn.Parameter(p.detach().clone()) for p in fresh]
    plain = torch.optim.AdamW(last, foreach=False, **SETTINGS)
    plain.load_state_dict(copy.deepcopy(paged.state_dict()))
    assert same(run(plain, last, 15, 35), reference()[0])


@pytest.mark.parametrize("rule", ["amsgrad", "maximize"])
def test_the_state_of_another_rule_is_refused(rule):
    parameters = tensors()
    other = torch.optim.AdamW(parameters, **{rule: True})
    paged = PagedAdamW(parameters, **SETTINGS)
    with pytest.raises(ValueError, match=f"{rule}=True"):
        paged.load_state_dict(other.state_dict())
    assert rule not in paged.param_groups[0]


def test_loading_into_a_running_optimizer_forgets_its_pages():
    parameters = tensors()
    paged = PagedAdamW(parameters, **SETTINGS, page_size=50, resident_pages=4)
    run(paged, parameters, 20)
    saved = copy.deepcopy(paged.state_dict())
    kept = [p.detach().clone() for p in parameters]
    run(paged, parameters, 3, 70)  # astray
    paged.load_state_dict(saved)
    with torch.no_grad():
        for p, k in zip(parameters, kept):
            p.copy_(k)
    assert same(run(paged, parameters, 30, 20), reference()[0])


def test_a_copy_goes_its_own_way():
    parameters = tensors()
    paged = PagedAdamW(parameters, **SETTINGS, page_size=50, resident_pages=2)
    run(paged, parameters, 20)
    twins, twin = copy.deepcopy((parameters, paged))
    run(paged, parameters, 30, 20)
    assert same(run(twin, twins, 30, 20), parameters)
    assert same(parameters, reference()[0])
    assert twin.pagers[0].host.data_ptr() != paged.pagers[0].host.data_ptr()


class Stop(Exception):
    pass


def test_a_training_run_killed_and_resumed_is_the_run_that_was_not(tmp_path):
    base = LoRA(rank=2).attach(tiny_model(dtype=torch.float32))

    def fit(folder=None, stop=None, resume=False, kind="paged"):
        def act(model, step, steps):
            if step == stop:
                raise Stop

        def optimizer(groups):
            if kind == "torch":
                return torch.optim.AdamW(groups, foreach=False)
            return PagedAdamW(groups, page_size=100, resident_pages=2)

        model = copy.deepcopy(base)
        config = TrainingConfig(steps=6, batch_size=3, device="cpu", checkpoint_every=2)
        options = {"folder": folder, "resume": resume, "show": False, "after_step": [act]}
        train(model, DATA, config, make_optimizer=optimizer, **options)
        return model

    with pytest.raises(Stop):
        fit(tmp_path, stop=3)
    resumed = fit(tmp_path, resume=True)
    assert same_bits(resumed, fit())
    assert same_bits(resumed, fit(kind="torch"))


# -- pages


def events(optimizer, kind):
    return [e.page for e in optimizer.trace if e.kind == kind]


def pager(pages=5, frames=2, page_size=3):
    trace = []

    def record(kind, page):
        trace.append((kind, page))

    cpu = torch.device("cpu")
    made = Pager(pages * page_size - 1, page_size, frames, cpu, torch.float32, record)
    return made, trace


def test_elements_lie_end_to_end_whatever_the_tensors():
    """(Paged 3)"""
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=50)
    run(paged, parameters, 1)
    where, first = {}, 0
    for n, p in enumerate(parameters):
        for i in range(p.numel()):
            where[(n, i)] = divmod(first + i, 50)
        first += p.numel()
    found = {}
    for page, parts in paged.pieces[0].items():
        for parameter, part, place in parts:
            n = next(n for n, p in enumerate(parameters) if p is parameter)
            inside = range(part.start, part.stop), range(place.start, place.stop)
            found |= {(n, i): (page, j) for i, j in zip(*inside)}
    assert found == where


def test_the_least_recently_used_page_makes_room():
    """(Paged 4)"""
    touches = [0, 1, 2, 0, 3, 0, 4, 1, 1, 0, 2, 4]
    for frames in range(1, 6):
        made, trace = pager(frames=frames)
        resident = []
        for page in touches:
            made.touch(page)
            resident.append(tuple(made.where))
        work = show_work(touches, frames)
        assert resident == [row["resident"] for row in work]
        shown = [(r["kind"], r["page"]) for r in work]
        assert [e for e in trace if e[0] != "evict"] == shown
        evicted = [r["evicted"] for r in work if r["evicted"] is not None]
        assert [page for kind, page in trace if kind == "evict"] == evicted


def test_least_recently_used_by_hand():
    """0 and 1 fill two frames; 0 is used again, so 2 takes 1's."""
    rows = show_work([0, 1, 0, 2], 2)
    assert [r["kind"] for r in rows] == ["fault", "fault", "hit", "fault"]
    assert [r["evicted"] for r in rows] == [None, None, None, 1]
    assert rows[-1]["resident"] == (0, 2)


def test_nothing_is_lost_under_pressure():
    """Random touches, each adding 1 to its page: at the end every page knows how many it had."""
    generator = torch.Generator().manual_seed(0)
    for frames in (1, 2, 3):
        made, _ = pager(frames=frames)
        touches = torch.randint(5, (200, 2), generator=generator).tolist()
        for page, then in touches:
            frame = made.touch(page, then)
            frame[0] += 1
            frame[1] += 2
            assert len(made.where) <= frames
        made.flush()
        for page in range(5):
            times = sum(p == page for p, _ in touches)
            assert torch.all(made.home(page)[0] == times)
            assert torch.all(made.home(page)[1] == 2 * times)


def test_the_last_page_is_as_long_as_what_is_left():
    made, _ = pager()
    assert made.touch(3).shape == (2, 3)
    assert made.touch(4).shape == (2, 2)


def test_the_next_page_is_fetched_before_it_is_needed():
    made, trace = pager(frames=2)
    for page in (0, 1, 2):
        made.touch(page, then=page + 1)
    expected = [("fault", 0), ("prefetch", 1), ("hit", 1), ("evict", 0), ("prefetch", 2)]
    assert trace == [*expected, ("hit", 2), ("evict", 1), ("prefetch", 3)]


def test_one_frame_leaves_no_room_to_prefetch():
    made, trace = pager(frames=1)
    made.touch(0, then=1)
    assert trace == [("fault", 0)]


def test_a_page_that_was_only_fetched_is_not_written_back():
    made, _ = pager(frames=2)
    made.touch(0, then=1)
    made.home(1)[:] = 9  # had page 1 been written back, it would be 0 again
    made.frame(1)[:] = 0
    made.touch(2)
    made.touch(3)
    assert torch.all(made.home(1) == 9)


def test_a_sweep_faults_once_and_is_prefetched_ever_after():
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=50, resident_pages=2)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        paged.step()
    assert events(paged, "fault") == [0]
    assert events(paged, "prefetch") == [*range(1, 9), *range(9), *range(9), 0]
    assert {e.step for e in paged.trace} == {1, 2, 3}


def test_with_all_pages_resident_nothing_moves_after_the_first_step():
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=50)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.ones_like(p)
        paged.step()
    assert not events(paged, "evict")
    assert all(e.kind == "hit" for e in paged.trace if e.step > 1)


def test_one_frame_too_few_makes_every_touch_of_a_sweep_a_miss():
    pages = list(range(9)) * 3
    assert all(row["kind"] == "fault" for row in show_work(pages, 8))
    assert sum(row["kind"] == "fault" for row in show_work(pages, 9)) == 9


def test_the_device_holds_the_frames_and_the_host_both_moments():
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=50, resident_pages=3)
    run(paged, parameters, 1)
    (only,) = paged.pagers
    assert only.frames.shape == (3, 2, 50)
    assert only.host.shape == (2, sum(math.prod(s) for s in SHAPES))


def test_a_tensor_without_a_gradient_is_left_alone():
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=3, resident_pages=1)
    parameters[1].grad = torch.ones(3)
    before = [p.detach().clone() for p in parameters]
    paged.step()
    moved = [not torch.equal(p, b) for p, b in zip(parameters, before)]
    assert moved == [False, True, False, False, False]
    assert list(paged.state) == [parameters[1]]
    assert {e.page for e in paged.trace} <= {109, 110}  # elements 329, 330 and 331


def test_the_trace_can_be_drawn(tmp_path):
    parameters = tensors()
    paged = PagedAdamW(parameters, page_size=50, resident_pages=3)
    run(paged, parameters, 4)
    path, alt = figures.paging(tmp_path / "p.png", paged.trace, "Paged AdamW")
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for kind, name in (("fault", "faults"), ("prefetch", "prefetches"), ("evict", "evictions")):
        assert f"{len(events(paged, kind))} {name}" in alt
    assert "in 4 steps" in alt


# -- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"betas": (0.9,)}, "betas"),
        ({"page_size": 0}, "page_size=0"),
        ({"resident_pages": 0}, "resident_pages=0"),
    ],
)
def test_values_that_make_no_sense(options, words):
    with pytest.raises(ValueError, match=words):
        PagedAdamW(tensors(), **options)


def test_sparse_gradients_and_integers_are_refused():
    table = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = PagedAdamW(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()
    with pytest.raises(ValueError, match="int64"):
        PagedAdamW([torch.nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)])


def test_a_whole_model_trains_as_with_torch():
    models = [tiny_model(dtype=torch.float32).train() for _ in range(2)]
    ids = torch.arange(22).view(2, 11)
    for model, kind in zip(models, (PagedAdamW, torch.optim.AdamW)):
        options = {"page_size": 999, "resident_pages": 3} if kind is PagedAdamW else {}
        optimizer = kind(trainable_parameters(model), lr=1e-3, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model.loss(ids, ids).backward()
            optimizer.step()
    assert same(list(models[0].parameters()), list(models[1].parameters()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [1, 2, 5, None])
def test_on_cuda_pages_are_pinned_and_the_bits_are_torch_s(budget):
    parameters, twins = ([p.detach().cuda() for p in tensors()] for _ in range(2))
    parameters, twins = ([torch.nn.Parameter(p) for p in ps] for ps in (parameters, twins))
    paged = PagedAdamW(parameters, **SETTINGS, page_size=50, resident_pages=budget)
    plain = torch.optim.AdamW(twins, foreach=False, **SETTINGS)
    for step in range(50):
        for ps, optimizer in ((parameters, paged), (twins, plain)):
            drawn = tensors(seed=step)
            for p, g in zip(ps, drawn):
                p.grad = g.detach().to(p.device)
            optimizer.step()
    assert same(parameters, twins)
    assert paged.pagers[0].host.is_pinned() and paged.pagers[0].frames.is_cuda
