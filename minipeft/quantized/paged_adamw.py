r"""Paged AdamW: AdamW whose two moments live in pages (Dettmers et al., 2023, arXiv 2305.14314).

The optimizer's state is in host memory; a few pages of it at a time visit the device, the least
recently used making room, as an operating system does with a program's memory.

    (Paged 1)   m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    (Paged 2)   w = (1 - lr d) w - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
    (Paged 3)   element i of all tensors laid end to end is on page floor(i / P), at i mod P;
                pages come and go as (Paged 4) in pager.py says

w, g, m, v in R^N: weights, gradients, the two moments; d the weight decay, t the step, P the page
size. A page holds P elements of both moments, 2 P numbers. On the device are F frames, 8 F P bytes
in float32 instead of 8 N. While one page is computed with, the next comes in on a side stream.

Trained parameters: none of its own. Initialisation: m = v = 0.

Reduces to: torch.optim.AdamW (unfused), bitwise, for every P and F, since no operation mixes
elements. State dicts of the two open in each other.

How this differs from bitsandbytes: it has no pager. It allocates the moments in CUDA's unified
memory, where an address is valid on both sides and the driver moves a page of 4 KB to 2 MB when the
GPU touches one that is not there, evicting by its own rule; it pages only tensors of 100,000
elements and more, and on a CPU not at all. Here every copy is explicit, so that it can be seen,
counted and drawn, and on a CPU the same code pages between two pools.

Footguns: state read while some of it is only on the device; loaded state covered by old pages; one
step counter for tensors that do not all have a gradient. `load_state_dict` is torch's own and moves
the state it is given through the device; a run's checkpoint (resume.py) does not.
"""

from __future__ import annotations

from collections import deque

import torch

from minipeft.quantized.pager import Event, Pager, show_work

__all__ = ["Event", "PagedAdamW", "Pager", "adamw_update", "show_work"]
TRACE = 100_000  # events kept; older ones are forgotten


def adamw_update(w, g, m, v, t, lr, betas, eps, weight_decay):
    """One step on w, m and v (n,) in place, from the gradient g (n,); t counts from 1.

    Operation for operation what torch's unfused AdamW does, so that the bits agree.
    """
    b1, b2 = betas
    if weight_decay:
        w.mul_(1 - lr * weight_decay)  # before the moments move, and not part of them
    m.lerp_(g, 1 - b1)  # (Paged 1)
    v.mul_(b2).addcmul_(g, g, value=1 - b2)
    denominator = (v.sqrt() / (1 - b2**t) ** 0.5).add_(eps)
    w.addcdiv_(m, denominator, value=-lr / (1 - b1**t))  # (Paged 2)


def check_adamw(lr, betas, eps, weight_decay):
    """Raise ValueError naming a hyperparameter that makes no sense."""
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be at least 0")
    if len(betas) != 2 or not all(0 <= b < 1 for b in betas):
        raise ValueError(f"betas={betas} must be two numbers in [0, 1)")


def check_trainable(parameter):
    """Raise ValueError for a parameter or gradient that AdamW cannot update."""
    if not parameter.is_floating_point():
        raise ValueError(f"a parameter of {parameter.dtype} cannot be trained; use a float dtype")
    if parameter.grad is not None and parameter.grad.is_sparse:
        raise ValueError(
            f"the gradient of a {tuple(parameter.shape)} parameter is sparse; "
            "use a dense embedding, or torch.optim.SparseAdam"
        )


def check_plain(state_dict):
    """Raise ValueError for the state of an AdamW with a rule that is not (Paged 1) (Paged 2)."""
    for group in state_dict["param_groups"]:
        other = [name for name in ("amsgrad", "maximize") if group.get(name)]
        if other:
            raise ValueError(f"this state is of an AdamW with {other[0]}=True, which is not here")


class PagedAdamW(torch.optim.Optimizer):
    """AdamW with `resident_pages` pages of `page_size` elements on the device (None: all of them).

    The frames are for each device and dtype among the parameters. `trace` lists Events;
    `figures.paging` draws it. State: `step`, `exp_avg`, `exp_avg_sq`, the last two in host memory;
    call `flush` before reading them (`state_dict` does). Raises ValueError for values that make no
    sense.
    """

    paged = True  # its state belongs in host memory, wherever the parameters are

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        page_size=2**16,
        resident_pages=None,
    ):
        check_adamw(lr, betas, eps, weight_decay)
        if page_size < 1:
            raise ValueError(f"page_size={page_size}: a page holds at least 1 element")
        if resident_pages is not None and resident_pages < 1:
            raise ValueError(f"resident_pages={resident_pages}: at least 1 page must fit")
        self.page_size, self.resident_pages = page_size, resident_pages
        self.trace, self.steps = deque(maxlen=TRACE), 0
        self.pagers, self.pieces, self.homes = [], [], {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        for parameter in self.parameters():
            check_trainable(parameter)

    def parameters(self):
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient, page by page."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.settle()
        self.steps += 1
        live = {p: g for g in self.param_groups for p in g["params"] if p.grad is not None}
        for parameter in live:
            check_trainable(parameter)
            self.begin(parameter)
        flat = {p: (p.detach().flatten(), p.grad.flatten()) for p in live}  # views, mostly
        for pager, pieces in zip(self.pagers, self.pieces):
            self.sweep(pager, pieces, live, flat)
        for parameter, (weight, _) in flat.items():
            if not parameter.is_contiguous():
                parameter.copy_(weight.view_as(parameter))
        return loss

    def sweep(self, pager, pieces, live, flat):
        """Touch the pages in order, and update the parts of tensors that lie on each."""
        pages = [page for page, parts in pieces.items() if any(p in live for p, _, _ in parts)]
        for page, then in zip(pages, [*pages[1:], *pages[:1]]):
            m, v = pager.touch(page, then)
            for parameter, part, place in pieces[page]:
                if parameter in live:
                    w, g = (tensor[part] for tensor in flat[parameter])
                    group = live[parameter]
                    values = (group[k] for k in ("lr", "betas", "eps", "weight_decay"))
                    t = self.state[parameter]["step"].item()
                    adamw_update(w, g, m[place], v[place], t, *values)

    # -- where everything is

    def settle(self):
        """Give new parameters their places, and take in state that came from elsewhere (a
        checkpoint).
        """
        if any(p not in self.homes for p in self.parameters()):
            self.flush()
            self.lay_out()
        foreign = [p for p in self.homes if p in self.state and not self.at_home(p)]
        if foreign:
            self.flush()
            for parameter in foreign:
                for name, home in self.homes[parameter].items():
                    home.copy_(self.state[parameter][name])
                self.state[parameter] |= self.homes[parameter]
            for pager in self.pagers:
                pager.forget()

    def at_home(self, parameter):
        return all(self.state[parameter].get(n) is h for n, h in self.homes[parameter].items())

    def lay_out(self):
        """One pager for each device and dtype; its tensors end to end, cut in pages. (Paged 3)"""
        spaces, self.pagers, self.pieces = {}, [], []
        for parameter in self.parameters():
            spaces.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        first, P = 0, self.page_size
        for place, members in spaces.items():
            N, record = sum(p.numel() for p in members), self.recorder(first)
            pager = Pager(max(1, N), P, self.resident_pages, *place, record)
            pieces, start = {}, 0
            for parameter in members:
                stop = start + parameter.numel()
                for page in range(start // P, -(-stop // P)):
                    a, b = max(start, page * P), min(stop, (page + 1) * P)
                    parts = (slice(a - start, b - start), slice(a - page * P, b - page * P))
                    pieces.setdefault(page, []).append((parameter, *parts))
                views = (row[start:stop].view(parameter.shape) for row in pager.host)
                self.homes[parameter] = dict(zip(("exp_avg", "exp_avg_sq"), views))
                start = stop
            self.pagers.append(pager)
            self.pieces.append(pieces)
            first += len(pieces)

    def recorder(self, first):
        """What a pager whose pages count from `first` on calls to add to the trace."""
        return lambda kind, page: self.trace.append(Event(self.steps, kind, first + page))

    def begin(self, parameter):
        """Count the step; a parameter's first gradient gives it a state, as in torch."""
        state = self.state[parameter]
        if not state:
            state.update({"step": torch.tensor(0.0)} | self.homes[parameter])
        state["step"] += 1

    def flush(self):
        """Write what changed on the device back to host memory, where `state` is."""
        for pager in self.pagers:
            pager.flush()

    def state_dict(self):
        """As torch.optim.AdamW's, and exchangeable with it."""
        self.flush()
        return super().state_dict()

    def load_state_dict(self, state_dict):
        """As torch's. Raises ValueError for amsgrad and maximize, which would be ignored."""
        check_plain(state_dict)
        super().load_state_dict(state_dict)

    def __getstate__(self):
        self.flush()
        kept = ("page_size", "resident_pages", "trace", "steps")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state):
        super().__setstate__(state)
        if "pagers" not in self.__dict__:  # a copy: it makes frames of its own at its next step
            self.pagers, self.pieces, self.homes = [], [], {}
