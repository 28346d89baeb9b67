"""Lab: the paged optimizer."""

from __future__ import annotations

import torch

from minipeft.labs.engine.case import check, close, equal, same
from minipeft.labs.engine.lab import Bug, Hint, Lab
from minipeft.quantized import paged_adamw as paged

ADAMW = Hint(
    "(Paged 2): both moments are divided by their bias correction, eps stands outside the root",
    "Compute the very first step by hand, from m = v = 0. How long is it?",
    ("adamw_update",),
)
DECAY = Hint(
    "(Paged 2): weight decay shrinks w and never enters the moments",
    "With g = 0, what are m and v after a step? And w?",
    ("adamw_update",),
)
LOST = Hint(
    "(Paged 4): a page is written back before its frame is given away, both moments of it",
    "A page leaves and comes back. Where were its numbers in between, and are they the new ones?",
    ("Pager.evict", "Pager.write_back", "Pager.touch"),
)
ORDER = Hint(
    "(Paged 4): the page whose last use lies furthest back goes; a touch is a use",
    "Touch 0, 1, 0 with two frames, then 2. Who goes? Which end of the order do you look at?",
    ("Pager.touch", "Pager.evict"),
)
CLEAN = Hint(
    "only pages that were touched since they came are written back",
    "A page came in ahead of time and was never used. What is there to write?",
    ("Pager.write_back",),
)
PREFETCH = Hint(
    "`then` comes in while its predecessor is computed with",
    "Sweep over more pages than frames. Which of them does the device wait for?",
    ("Pager.touch",),
)
FLUSH = Hint(
    "flush: afterwards the host has everything, and pages stay where they are",
    "What stands in host memory after flush? And is the next touch a hit?",
    ("Pager.flush",),
)
PAPER = Hint(
    "(Paged 4), on paper: the least recently used is first in `resident`",
    "Walk through 0, 1, 0, 2 with two frames by hand. Which column of yours differs?",
    ("show_work",),
)

ADAMW_FILE = "minipeft/quantized/paged_adamw.py"

LAB = Lab(
    title="The pager: AdamW with its state elsewhere",
    about="""
    AdamW keeps two numbers for every weight. Here they live in host memory, and a few pages at a
    time visit the device. You write the step of AdamW and the pager: touch, load, evict, write
    back.

    (Paged 1) to (Paged 3) are in the header of `paged_adamw.py`, (Paged 4) in that of `pager.py`.
    Write `show_work` first: it is (Paged 4) on paper. `self.where` maps resident pages to frames,
    the least recently used first; `self.free` lists free frames, `self.dirty` pages that were
    written to; `self.copying()` is the stream to copy on; `self.record(kind, page)` notes a "hit",
    "fault", "prefetch" or "evict".
    `PagedAdamW`, which calls all this, is given.
    """,
    files=("minipeft/quantized/pager.py", ADAMW_FILE),
    blanks=(
        "show_work",
        "adamw_update",
        "Pager.home",
        "Pager.frame",
        "Pager.load",
        "Pager.evict",
        "Pager.write_back",
        "Pager.touch",
        "Pager.flush",
    ),
    minutes=90,
    mistakes="""
    State lost when a page is evicted; first in, first out for least recently used; only one of the
    two moments copied; weight decay put into the gradient, as Adam had it.
    """,
    bugs=(
        Bug(
            "no bias correction of the first moment",
            "value=-lr / (1 - b1**t))",
            "value=-lr)",
            ADAMW,
            ADAMW_FILE,
        ),
        Bug(
            "eps under the root",
            "denominator = (v.sqrt() / (1 - b2**t) ** 0.5).add_(eps)",
            "denominator = ((v + eps).sqrt() / (1 - b2**t) ** 0.5)",
            ADAMW,
            ADAMW_FILE,
        ),
        Bug(
            "weight decay inside the gradient",
            "w.mul_(1 - lr * weight_decay)",
            "g = g + weight_decay * w",
            DECAY,
            ADAMW_FILE,
        ),
        Bug(
            "state lost when a page is evicted",
            "        self.write_back(page)\n        self.record",
            "        self.record",
            LOST,
        ),
        Bug(
            "the page used most recently goes",
            "page = next(iter(self.where))",
            "page = next(reversed(self.where))",
            ORDER,
        ),
        Bug(
            "first in, first out",
            "self.where.move_to_end(page)",
            "self.where[page] = self.where[page]",
            ORDER,
        ),
        Bug(
            "only the first moment travels home",
            "                    home.copy_(row, non_blocking=True)",
            "                    home.copy_(row, non_blocking=True)\n                    break",
            LOST,
        ),
        Bug(
            "no page is fetched ahead",
            '            self.load(then, "prefetch")',
            "            pass",
            PREFETCH,
        ),
        Bug(
            "clean pages written back too",
            "        if page in self.dirty:\n",
            "        self.dirty.add(page)\n        if page in self.dirty:\n",
            CLEAN,
        ),
        Bug(
            "on paper the newest goes",
            "evicted = resident.pop(0)",
            "evicted = resident.pop()",
            PAPER,
        ),
        Bug(
            "flush writes one page",
            "        for page in list(self.where):\n            self.write_back(page)\n",
            "        for page in list(self.where)[:1]:\n            self.write_back(page)\n",
            FLUSH,
        ),
    ),
)

CPU = torch.device("cpu")


def pager(elements, size, frames, events):
    """A Pager that notes its events, its host memory full of numbers that tell where they are."""
    made = paged.Pager(elements, size, frames, CPU, torch.float64, lambda *e: events.append(e))
    with torch.no_grad():
        made.host[0] = torch.arange(elements)
        made.host[1] = -torch.arange(elements).double()
    return made


def walk(case):
    """(pages, frames, touches) that make some misses."""
    pages = case.size(4, 6)
    return pages, case.size(2, pages - 1), [case.size(0, pages - 1) for _ in range(30)]


def lru(touches, frames):
    """[(kind, page, evicted)] by ages instead of a queue."""
    last, out = {}, []
    for now, page in enumerate(touches):
        kind, gone = ("hit" if page in last else "fault"), None
        if kind == "fault" and len(last) == frames:
            gone = min(last, key=last.get)
            del last[gone]
        last[page] = now
        out.append((kind, page, gone))
    return out


def adamw(w, g, m, v, t, lr, betas, eps, decay):
    """(Paged 1) (Paged 2), written again; returns the new w, m, v."""
    b1, b2 = betas
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    size = (v / (1 - b2**t)).sqrt() + eps
    return w - lr * decay * w - lr * (m / (1 - b1**t)) / size, m, v


@LAB.invariant(8)
def the_step_is_adamw_s(case):
    """(Paged 1) (Paged 2): moments, bias corrections, eps outside the root."""
    n, betas = case.size(3, 9), (case.number(0.7, 0.95), case.number(0.9, 0.999))
    lr, eps = case.number(1e-3, 1e-1), case.number(1e-3, 1e-2)
    w, m, v = case.normal(n), torch.zeros(n).double(), torch.zeros(n).double()
    wanted = (w.clone(), m.clone(), v.clone())
    for t in (1, 2, 3):
        g = case.normal(n)
        paged.adamw_update(w, g, m, v, t, lr, betas, eps, 0.0)
        wanted = adamw(wanted[0], g, *wanted[1:], t, lr, betas, eps, 0.0)
        for name, given, right in zip("wmv", (w, m, v), wanted, strict=True):
            close(given, right, f"{name} after step {t}")


@LAB.invariant(4)
def decay_does_not_enter_the_moments(case):
    """(Paged 2): weight decay multiplies w by 1 - lr d, and leaves m and v alone."""
    n = case.size(3, 9)
    w, g = case.normal(n), case.normal(n)
    m, v = case.normal(n), case.normal(n).abs()
    settings = (case.size(1, 5), 0.02, (0.9, 0.99), 1e-8, case.number(0.5, 3))
    wanted = adamw(w.clone(), g, m.clone(), v.clone(), *settings)
    paged.adamw_update(w, g, m, v, *settings)
    close(m, wanted[1], "m with weight decay")
    close(w, wanted[0], "w with weight decay")


@LAB.invariant(10)
def paging_changes_no_bit(case):
    """At every page size and number of frames the weights are torch's AdamW's, bitwise."""
    shapes = [(case.size(2, 5), case.size(2, 4)), (case.size(3, 7),)]
    starts = [case.normal(*s, dtype=torch.float32) for s in shapes]
    gradients = [[case.normal(*s, dtype=torch.float32) for s in shapes] for _ in range(3)]
    settings = {"lr": 0.03, "weight_decay": 0.1}
    wanted = stepped(torch.optim.AdamW, starts, gradients, settings | {"foreach": False})
    size = case.size(2, 5)
    for frames in (1, 2, None):
        how = settings | {"page_size": size, "resident_pages": frames}
        given = stepped(paged.PagedAdamW, starts, gradients, how)
        for a, b in zip(given, wanted, strict=True):
            same(a, b, f"the weights with pages of {size}, {frames or 'all'} resident")


def stepped(optimizer, starts, gradients, settings):
    """The weights after steps with these gradients."""
    weights = [torch.nn.Parameter(s.clone()) for s in starts]
    made = optimizer(weights, **settings)
    for step in gradients:
        for weight, gradient in zip(weights, step, strict=True):
            weight.grad = gradient.clone()
        made.step()
    return [w.detach() for w in weights]


@LAB.invariant(8)
def the_least_recently_used_goes(case):
    """(Paged 4): hits, faults and evictions are those of least recently used."""
    pages, frames, touches = walk(case)
    events = []
    made = pager(pages * 3, 3, frames, events)
    for page in touches:
        made.touch(page)
    wanted = []
    for kind, page, gone in lru(touches, frames):
        wanted += [("evict", gone)] * (gone is not None) + [(kind, page)]
    equal(events, wanted, "the order of hits, faults and evictions")
    check(len(made.where) <= frames, "more pages are resident than there are frames")


@LAB.invariant(8)
def nothing_is_lost_on_the_way(case):
    """(Paged 4): what is written to a page is there when it comes back, for both moments."""
    pages, frames, touches = walk(case)
    last = case.size(1, 3)  # the last page is shorter
    elements = (pages - 1) * 3 + last
    made = pager(elements, 3, frames, [])
    wanted = made.host.clone()
    for page in touches:
        room = made.touch(page)
        place = slice(page * 3, page * 3 + 3)
        equal(tuple(room.shape), tuple(wanted[:, place].shape), f"the shape of page {page}")
        same(room, wanted[:, place], f"what stands on page {page} when it is touched")
        room += 0.5
        wanted[:, place] += 0.5
    for page in range(pages):
        same(made.touch(page), wanted[:, page * 3 : page * 3 + 3], f"page {page} at the end")


@LAB.invariant(3)
def flush_brings_everything_home(case):
    """After flush the host has all that was written, and the pages are still resident."""
    pages, frames, touches = walk(case)
    events = []
    made = pager(pages * 2, 2, frames, events)
    wanted = made.host.clone()
    for page in touches:
        room = made.touch(page)
        room += 1
        wanted[:, page * 2 : page * 2 + 2] += 1
    made.flush()
    same(made.host, wanted, "host memory after flush")
    made.touch(touches[-1])
    equal(events[-1], ("hit", touches[-1]), "the first touch after flush")


@LAB.invariant(3)
def the_next_page_comes_ahead(case):
    """`then` is fetched before it is needed; a page that was only fetched is not written back."""
    events = []
    frames = case.size(2, 3)
    made = pager(12, 2, frames, events)
    for page in range(5):
        made.touch(page, page + 1)
    faults = [page for kind, page in events if kind == "fault"]
    ahead = [page for kind, page in events if kind == "prefetch"]
    equal((faults, ahead), ([0], [1, 2, 3, 4, 5]), "what was waited for, and what came ahead")


@LAB.invariant(2)
def clean_pages_are_not_copied(case):
    """A page that was fetched and never touched is not written back."""
    made = pager(8, 2, 2, [])
    made.touch(0, 1)
    made.host[:, 2:4] = case.number(5, 9)  # somebody changed it at home; only a copy would undo it
    wanted = made.host[:, 2:4].clone()
    made.touch(0)
    made.touch(2)
    made.touch(3)
    made.flush()
    same(made.host[:, 2:4], wanted, "the home of a page that was never touched")


@LAB.invariant(4)
def the_work_is_shown(case):
    """show_work: page, hit or fault, who was evicted, who is resident, the oldest first."""
    _, frames, touches = walk(case)
    rows = paged.show_work(touches, frames)
    equal([(r["kind"], r["page"], r["evicted"]) for r in rows], lru(touches, frames), "show_work")
    ages = {}
    for now, row in enumerate(rows):
        ages[row["page"]] = now
        wanted = tuple(sorted(ages, key=ages.get)[-frames:])
        equal(tuple(row["resident"]), wanted, f"resident after touch {now + 1}")
