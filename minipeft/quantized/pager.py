r"""The pager behind the paged optimizer: more memory on the host than there is room on the device.

    (Paged 4)   a page that is needed goes to a free frame, else to the frame of the page whose
                last use lies furthest back, once that page is written back

A page is 2 P numbers, P elements of each moment of AdamW (paged_adamw.py); F frames are what the
device has room for. While one page is computed with, the next comes in on a side stream.

Footguns: a page taken away before it is written back (its last step is lost); a copy that starts
before the computation on that frame has ended, or a computation before its copy; pageable host
memory, for which the "asynchronous" copy waits; LRU on a sweep in one direction: with one frame too
few every touch of a page is a miss.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from typing import NamedTuple

import torch


class Event(NamedTuple):
    """What the pager did: `kind` is hit, fault (waited for), prefetch or evict."""

    step: int
    kind: str
    page: int


def show_work(touches, resident_pages):
    """(Paged 4) on paper: what happens when these pages are touched in turn, nothing prefetched.

    A list of dicts: page, kind ("hit" or "fault"), evicted (a page or None), resident (pages, the
    least recently used first).
    """
    resident, rows = [], []
    for page in touches:
        kind, evicted = ("hit" if page in resident else "fault"), None
        if page in resident:
            resident.remove(page)
        elif len(resident) == resident_pages:
            evicted = resident.pop(0)
        resident.append(page)
        rows.append({"page": page, "kind": kind, "evicted": evicted, "resident": tuple(resident)})
    return rows


class Pager:
    """`elements` numbers of both moments: all of them in `host` (2, elements), some in `frames`.

    On CUDA the host side is pinned and copies run on a stream of their own; that stream waits for
    the computations so far before it takes a frame, and they wait for it before they use one.
    """

    def __init__(self, elements, page_size, resident_pages, device, dtype, record):
        pages, cuda = -(-elements // page_size), device.type == "cuda"
        self.page_size, self.record = page_size, record
        self.host = torch.zeros(2, elements, dtype=dtype, pin_memory=cuda)
        shape = (min(resident_pages or pages, pages), 2, min(page_size, elements))
        self.frames = torch.empty(shape, device=device, dtype=dtype)
        self.side = torch.cuda.Stream(device) if cuda else None
        self.forget()

    def touch(self, page, then=None):
        """The frame of `page`, (2, n), to compute with and write to. Meanwhile `then` comes in."""
        if page in self.where:
            self.record("hit", page)
        else:
            self.load(page, "fault")
        self.where.move_to_end(page)  # the most recently used
        self.dirty.add(page)
        if self.side is not None:
            torch.cuda.current_stream(self.frames.device).wait_stream(self.side)
        if then is not None and then not in self.where and len(self.frames) > 1:
            self.load(then, "prefetch")
        return self.frame(page)

    def load(self, page, kind):
        """Bring a page in; makes room if there is none. (Paged 4)"""
        self.where[page] = self.free.pop() if self.free else self.evict()
        with self.copying():
            for row, home in zip(self.frame(page), self.home(page)):
                row.copy_(home, non_blocking=True)
        self.record(kind, page)

    def evict(self):
        """Write back the page used least recently, and give its frame. (Paged 4)"""
        page = next(iter(self.where))
        self.write_back(page)
        self.record("evict", page)
        return self.where.pop(page)

    def write_back(self, page):
        if page in self.dirty:
            with self.copying():
                for row, home in zip(self.frame(page), self.home(page)):
                    home.copy_(row, non_blocking=True)
            self.dirty.remove(page)

    def flush(self):
        """Afterwards the host has everything; the pages stay where they are."""
        for page in list(self.where):
            self.write_back(page)
        if self.side is not None:
            self.side.synchronize()

    def forget(self):
        """Empty every frame without writing anything back."""
        self.where = OrderedDict()  # resident page -> frame, the least recently used first
        self.free, self.dirty = list(range(len(self.frames)))[::-1], set()

    def home(self, page):
        """The page in host memory, (2, n)."""
        return self.host[:, page * self.page_size : (page + 1) * self.page_size]

    def frame(self, page):
        """The page on the device, (2, n); n is the page size but for the last page."""
        return self.frames[self.where[page], :, : self.home(page).shape[1]]

    @contextlib.contextmanager
    def copying(self):
        if self.side is None:
            yield
            return
        # The frame may still be computed with, on the main stream.
        self.side.wait_stream(torch.cuda.current_stream(self.frames.device))
        with torch.cuda.stream(self.side):
            yield
