r"""Several LoRAs on one model: switching, an exact weighted sum, a batch whose rows differ.

Punica (Chen et al., 2023, arXiv 2310.18547) and S-LoRA (Sheng et al., 2023, arXiv 2311.03285) serve
many adapters with one base; weighted sums are LoraHub's (Huang et al., 2023, arXiv 2307.13269).

Adapter i has A_i in R^(r_i x in), B_i in R^(out x r_i) and the scale s_i. `combine` stacks:

    (MultiLoRA 1)   A  = [A_1; A_2; ...]                       in R^(R x in), R = sum r_i
    (MultiLoRA 2)   B  = [w_1 s_1 B_1, w_2 s_2 B_2, ...]       in R^(out x R)
    (MultiLoRA 3)   B A = sum_i w_i s_i B_i A_i                exactly, with alpha = R: scale 1
    (MultiLoRA 4)   A = I, B = the sum (in <= out), or A = the sum, B = I, where R > min(in, out)

`use_adapters` gives row b of a batch the adapter i(b), all rows in two batched products:

    (MultiLoRA 5)   u_b = s_i(b) x_b A_i(b)^T                  (rows, T, in) x (rows, in, r)
    (MultiLoRA 6)   h_b = W x_b + b + u_b B_i(b)^T             (rows, T, r) x (rows, r, out)

with r the largest rank in the batch: smaller ones are padded with zeros, which add nothing, and so
is a row without adapter.

Trained parameters: `combine` gives a LoRA of rank R, R (in + out) a place; `use_adapters` adds
none, and gradients reach each row's own adapter. Initialisation: none, the tensors are others'.

Reduces to: one adapter of weight 1 is that adapter; rows that all name it are `set_adapter`; rows
of None are the base. Two adapters active at once are their sum with weights 1.

How this differs from peft: its add_weighted_adapter truncates by default (svd) or has cross terms
(linear: the product of sums is not the sum of products), and its new adapter of rank R under
rank-stabilised scaling gets the scale sqrt(R) instead of 1. Its mixed batch loops over adapters,
cuts the batch up and copies the results back, and works in eval mode only.

Footguns: averaging A and B apart; folding the weight into A and B both (it is then squared); a
negative weight under a square root; a combined adapter active beside its sources.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

import torch
from torch import nn

from minipeft import technique as contract
from minipeft import wrap
from minipeft.dispatch import fast_path, never
from minipeft.low_rank.lora import PROJECTIONS, LoRA, LoRALinear, path_of
from minipeft.technique import Attachment, Technique, attachment_of

# -- the weighted sum


def stack_weighted(parts):
    """[(w, A, B, s), ...] -> A (R, in), B (out, R), B A = sum w s B_i A_i. (MultiLoRA 3)"""
    A = torch.cat([A for _, A, _, _ in parts])  # (MultiLoRA 1)
    B = torch.cat([weight * scale * B for weight, _, B, scale in parts], dim=1)  # (MultiLoRA 2)
    return (A, B) if A.shape[0] <= min(A.shape[1], B.shape[0]) else full_rank(A, B)


def full_rank(A, B):
    """The same product with the smaller side for its rank, which is always enough. (MultiLoRA 4)"""
    delta, place = B @ A, {"dtype": A.dtype, "device": A.device}
    if A.shape[1] <= B.shape[0]:
        return torch.eye(A.shape[1], **place), delta
    return delta, torch.eye(B.shape[0], **place)


def combine(model, weights, name):
    """Attach the weighted sum of LoRAs as a new LoRA called `name`; returns the model.

    weights: {adapter's name: number, of any sign}. The sum is exact (MultiLoRA 3), whatever the
    adapters' ranks, scales and targets. It takes the place of its sources, which are switched off
    and stay on the model; other attachments stay as they are. Raises ValueError for no weights, a
    weight that is not finite, an adapter that is missing or no LoRA, and a name that is taken.
    """
    if not weights:
        raise ValueError("weights={}: name at least one adapter, as {'a': 0.5, 'b': 0.5}")
    for source, weight in weights.items():
        lora_of(model, source)
        if isinstance(weight, bool) or not isinstance(weight, Real) or not math.isfinite(weight):
            raise ValueError(f"the weight of {source!r} is {weight!r}, not a finite number")
    with torch.no_grad():
        tensors, share = weighted_tensors(model, weights)
    active = [a.name for a in model.attachments if a.active and a.name not in weights]
    with torch.random.fork_rng(devices=[]):  # the initial values are overwritten: draw them apart
        lora_for(tensors, share, len(model.blocks)).attach(model, name)
    attachment_of(model, name).load(tensors)
    return contract.set_adapter(model, [*active, name])


def weighted_tensors(model, weights):
    """(logical name -> tensor of the sum, whether q, k and v share one A)."""
    sources = [(w, lora_of(model, n)) for n, w in weights.items()]
    share = all(a.technique.share_qkv for _, a in sources)
    parts = {}  # path -> [(w, A, B, s), ...]
    for weight, attachment in sources:
        for path, layer in layers_of(attachment).items():
            parts.setdefault(path, []).append((weight, layer.A, layer.B, layer.scale))
    tensors = {}
    for path in sorted(parts):
        A, B = stack_weighted(parts[path])
        if not (share and path.endswith((".k", ".v"))):
            tensors[f"{path}.A"] = A
        tensors[f"{path}.B"] = B
    return tensors, share


def lora_for(tensors, share, n_layer):
    """The LoRA that has these tensors, with alpha = rank everywhere, so that its scale is 1."""
    ranks = {n.removesuffix(".B"): B.shape[1] for n, B in tensors.items() if n.endswith(".B")}
    targets = tuple(t for t, end in PROJECTIONS.items() if any(p.endswith(end) for p in ranks))
    rank = max(ranks.values(), key=list(ranks.values()).count)
    places = [path_of(n, t) for n in range(n_layer) for t in targets]
    pattern = tuple((p, ranks.get(p, 0)) for p in places if ranks.get(p, 0) != rank)
    return LoRA(
        rank=rank,
        alpha=rank,  # (MultiLoRA 3)
        targets=targets,
        share_qkv=share,
        rank_pattern=pattern,
        alpha_pattern=tuple((p, r) for p, r in pattern if r),
    )


def lora_of(model, name):
    """The attachment called `name`. Raises ValueError when it is missing or no LoRA."""
    attachment = attachment_of(model, name)
    if not isinstance(attachment.technique, LoRA):
        kind = type(attachment.technique).__name__
        raise ValueError(f"{name!r} is a {kind}; only LoRA adapters can share a batch or be summed")
    return attachment


def layers_of(attachment):
    """Logical path -> LoRALinear."""
    swaps = attachment.swaps
    return {s.path: s.replacement for s in swaps if isinstance(s.replacement, LoRALinear)}


# -- each row its own adapter


def rows_forward(h, x, A, B, scale):
    """h (rows, T, out) and each row's A (rows, r, in), B (rows, out, r), scale (rows, 1, 1)."""
    u = (torch.bmm(x, A.transpose(1, 2)) * scale).to(h.dtype)  # (MultiLoRA 5), (rows, T, r)
    B = B.to(h.dtype).transpose(1, 2)
    if torch.is_grad_enabled():
        return torch.baddbmm(h, u, B)  # (MultiLoRA 6)
    return h.baddbmm_(u, B)  # the same into h, which nobody else holds


def served(h, x, As, Bs, scales):
    """Whether the kernel takes these rows: no gradient is wanted, of one dtype, ranks up to 256."""
    tensors = [h, x, *(t for t in (*As, *Bs) if t is not None)]
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    ranks = [A.shape[0] for A in As if A is not None]
    fits = x.numel() > 0 and 0 < max(ranks, default=0) <= 256
    return fits and not recorded and len({t.dtype for t in tensors}) == 1


@fast_path(
    "minipeft.kernels.multi_lora",
    capability=(7, 5),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    supports=served,
    wins=never,  # not measured on a GPU yet
)
def rows_branches(h, x, As, Bs, scales):
    """h (rows, T, out) and each row's branch on x (rows, T, in): As[b] (r_b, in), Bs[b] (out, r_b)
    and the number scales[b], or None, None and 0. Overwrites h where no gradients are recorded.
    """
    return rows_forward(h, x, *stacked(As, Bs, scales))


def stacked(As, Bs, scales):
    """A (rows, r, in), B (rows, out, r), scale (rows, 1, 1), padded with zeros up to r.

    They are the parameters as they are now, made anew each time: nothing goes stale, and gradients
    find their way.
    """
    first = next(b for b in range(len(As)) if As[b] is not None)
    rank = max(A.shape[0] for A in As if A is not None)
    none = As[first].new_zeros(rank, As[first].shape[1]), Bs[first].new_zeros(len(Bs[first]), rank)
    pairs = [none if A is None else padded(A, B, rank) for A, B in zip(As, Bs)]
    scale = torch.tensor(scales, dtype=torch.float64).to(As[first].device, As[first].dtype)
    A, B = torch.stack([A for A, _ in pairs]), torch.stack([B for _, B in pairs])
    return A, B, scale.view(-1, 1, 1)


class RowsLinear(wrap.Wrapper):
    """A projection whose row b has the branch layers[b] or None. (rows, T, in -> out)"""

    def __init__(self, inner, layers, beams=1):
        super().__init__(inner)
        self.layers, self.beams = tuple(layers), beams  # a tuple: their parameters are not its own

    def forward(self, x):
        layers = self.layers_for(x.shape[0])
        if x.ndim != 3:
            raise ValueError(f"x has the shape {tuple(x.shape)}, not (rows, T, in)")
        h = self.inner(x)
        if self.training:
            chances = [0.0 if layer is None else layer.drop.p for layer in layers]
            x = torch.stack([nn.functional.dropout(row, p) for row, p in zip(x, chances)])
        return rows_branches(h, x, *tensors_of(layers))

    def branch(self, batch):
        """For one position of every row, with adapters that stay as they are: a function (h (batch,
        out), x (batch, in)) that adds the rows' branches to h in place and returns it.
        """
        A, B, scale = stacked(*tensors_of(self.layers_for(batch)))
        A, B = (A * scale).transpose(1, 2).contiguous(), B.transpose(1, 2).contiguous()

        def add(h, x):
            h.unsqueeze(1).baddbmm_(torch.bmm(x.unsqueeze(1), A), B)  # (MultiLoRA 5, 6)
            return h

        return add

    def layers_for(self, batch):
        """The rows' layers, each as often as it has beams, which stand side by side. Raises
        ValueError for another number of rows.
        """
        layers = self.layers
        if batch == len(layers) * self.beams:
            layers = [layer for layer in layers for _ in range(self.beams)]
        if batch != len(layers):
            raise ValueError(
                f"rows names {len(self.layers)} adapters (beams={self.beams}), but the batch has "
                f"{batch} rows; give one name for each row"
            )
        return layers


def tensors_of(layers):
    """([A or None, ...], [B or None, ...], [scale or 0, ...]) of LoRALinears or None."""
    none = None, None, 0.0
    return zip(*(none if m is None else (m.A, m.B, m.scale) for m in layers))


def padded(A, B, rank):
    """A (rank, in) and B (out, rank), filled up with zeros, which add nothing to B A."""
    missing = rank - A.shape[0]
    if not missing:
        return A, B
    return nn.functional.pad(A, (0, 0, 0, missing)), nn.functional.pad(B, (0, missing))


@dataclass(frozen=True)
class Rows(Technique):
    """What `use_adapters` puts on a model inside the `with`; nobody attaches it by hand."""

    cannot_merge: ClassVar[str | None] = (
        "its rows have different adapters; leave use_adapters first"
    )

    def check_ready(self, attachment):
        raise ValueError("the rows of use_adapters are not an adapter; name the one to save")


@contextlib.contextmanager
def use_adapters(model, rows, beams=1):
    """Inside the `with`, row b of every batch uses the LoRA called rows[b], or none for None.

    rows: one name or None for each row; every other LoRA is off inside, other techniques stay on.
    beams: inside, `generate(..., num_beams=beams)` may multiply the rows. The model is what it was
    afterwards. Raises ValueError for rows that name no LoRA on the model, and, in the forward
    pass, for a batch with another number of rows.
    """
    if isinstance(rows, str) or not len(rows):
        raise ValueError(f"rows={rows!r}: give a list with one adapter's name or None for each row")
    named = {name: lora_of(model, name) for name in rows if name is not None}
    was = {a: a.active for a in model.attachments}
    places = [n for n, a in enumerate(model.attachments) if a in named.values()]
    rows_on = Attachment("use_adapters", Rows())
    with contract._all_off(model, reinstall=False):
        for attachment in was:
            attachment.active &= not isinstance(attachment.technique, LoRA)
        model.attachments.insert(min(places, default=0), rows_on)
    try:
        for attachment in model.attachments:
            if attachment is rows_on:
                install_rows(model, rows_on, [named.get(name) for name in rows], beams)
            elif attachment.active:
                attachment.install()
        yield model
    finally:
        with contract._all_off(model, reinstall=False):
            model.attachments = [a for a in model.attachments if a is not rows_on]
            for attachment, active in was.items():
                attachment.active = active
        for attachment in model.attachments:
            if attachment.active:
                attachment.install()


def install_rows(model, rows_on, attachments, beams):
    """Wrap every place where one of the rows' adapters (None: no adapter) has a branch."""
    layers = [{} if a is None else layers_of(a) for a in attachments]
    for path in dict.fromkeys(path for mine in layers for path in mine):
        inner = wrap.resolve(model, path)
        rows_on.wrap(model, path, RowsLinear(inner, [mine.get(path) for mine in layers], beams))
