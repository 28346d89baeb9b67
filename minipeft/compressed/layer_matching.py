r"""Distillation inside the network: layers taken over, hidden states and attention held to the
teacher's.

Sanh et al., "DistilBERT", 2019, arXiv 1910.01108 (layers taken over, the cosine); Jiao et al.,
"TinyBERT", 2019, arXiv 1909.10351 (a projection between widths, a layer map); Wang et al.,
"MiniLM", 2020, arXiv 2002.10957 (KL between attentions). What a network computes on the way to its
answer is a signal too, and a richer one: D numbers a token at every layer.

The student has K layers, the teacher L; layer k learns from layer m(k):

    (Match 1)   m(k)   = k (L - 1) / (K - 1)  rounded, halves up        first to first, last to last
    (Match 2)   hidden = mean over k, tokens, D_t of (R_k h^s_k - h^t_m(k))^2
    (Match 3)   cosine = mean over k, tokens of 1 - cos(R_k h^s_k, h^t_m(k))
    (Match 4)   attn   = mean over k, heads, queries of KL(A^t_m(k) || A^s_k)

h_k in R^D is block k's output (the residual stream), A the attention probabilities of one query.
R_k in R^(D_t x D_s) is learned where the widths differ and is the identity where they do not. Means
are over tokens whose label counts. DistilBERT's six of twelve layers, 0 2 4 7 9 11, are (Match 1).

Trained parameters: the student's, and K D_s D_t for the R_k, which are thrown away afterwards.

    student    layer k = the teacher's layer m(k); embeddings and last LayerNorm = the teacher's
    R_k        N(0, 1 / D_s)

Reduces to: with all layers taken, the student is the teacher and the three losses are zero.

How this differs: the cosine is DistilBERT's for the last layer, here for each; TinyBERT compares
attention scores by squared error, here probabilities by KL, as in MiniLM, so a student may scale
its scores as it likes. Attention is computed a second time from the recorded q and k, because the
core's fast form never holds it.

Footguns: comparing layer k with layer k; hidden states after the last LayerNorm on one side and
before on the other; heads of different number (no pairing exists: an error); recording a model in
train mode, where dropout is part of what is matched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.compressed.distillation import forward_kl
from minipeft.compressed.structured_pruning import check_plain, widths, with_widths
from minipeft.cross_entropy import IGNORE
from minipeft.gpt import causal_mask


def layer_map(student_layers, teacher_layers):
    """The teacher's layer for each of the student's, a tuple of indices from 0; a student of one
    layer gets the last. (Match 1)
    """
    K, L = student_layers, teacher_layers
    if not 1 <= K <= L:
        raise ValueError(f"a student of {K} layers from a teacher of {L}: take 1 to {L}")
    if K == 1:
        return (L - 1,)
    return tuple((2 * k * (L - 1) + K - 1) // (2 * (K - 1)) for k in range(K))  # (Match 1)


def check_layers(layers, student, teacher):
    """The layer map to use: `layers`, or (Match 1) for None. Raises ValueError if it does not
    fit the two models.
    """
    K, L = len(student.blocks), len(teacher.blocks)
    if layers is None:
        return layer_map(K, L)
    if len(layers) != K or not all(0 <= m < L for m in layers):
        raise ValueError(
            f"layers={tuple(layers)}: give one teacher's layer, 0 to {L - 1}, for each of the "
            f"student's {K}"
        )
    return tuple(layers)


def student_from(teacher, layers):
    """A new GPT made of copies of the teacher's layers, in the order of `layers` (an int takes
    that many by (Match 1)).

    Layers that lost heads or neurons are copied as they are. Raises ValueError for layers that do
    not exist, for a teacher with a technique on it, and for one that is quantised or packed.
    """
    check_plain(teacher)
    L = len(teacher.blocks)
    chosen = layer_map(layers, L) if isinstance(layers, int) else tuple(layers)
    if not chosen or not all(0 <= m < L for m in chosen):
        raise ValueError(f"layers={chosen}: choose among the teacher's layers 0 to {L - 1}")
    like = teacher.embed.token.weight
    config = dataclasses.replace(teacher.config, n_layer=len(chosen))
    layers = [widths(teacher)[m] for m in chosen]
    student = with_widths(config, layers).to(like.device, like.dtype).train(teacher.training)
    for name in ("embed", "ln_f"):
        getattr(student, name).load_state_dict(getattr(teacher, name).state_dict())
    for block, m in zip(student.blocks, chosen):
        block.load_state_dict(teacher.blocks[m].state_dict())
    return student


# -- looking inside


@dataclasses.dataclass
class Record:
    """What a forward pass computed: layer -> block output (B, T, D); layer -> (q, k, mask)."""

    hidden: dict = dataclasses.field(default_factory=dict)
    core: dict = dataclasses.field(default_factory=dict)

    def scores(self, layer):
        """Attention scores, (B, H, T, S), -inf where a query may not look."""
        q, k, mask = self.core[layer]
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        allowed = causal_mask(*scores.shape[-2:], q.device) if mask is None else mask
        return scores.masked_fill(~allowed, -math.inf)


@contextlib.contextmanager
def recording(model, layers):
    """Inside the `with`, forward passes of `model` leave a Record of these layers."""
    record, handles = Record(), []

    def watch(layer):
        def hidden(module, args, output):
            record.hidden[layer] = output

        def core(module, args):
            q, k, _, *rest = args
            record.core[layer] = (q, k, rest[0] if rest else None)

        block = wrap.resolve(model, f"blocks.{layer}")
        handles.append(block.register_forward_hook(hidden))
        innermost = wrap.base_module(wrap.resolve(model, f"blocks.{layer}.attn.core"))
        handles.append(innermost.register_forward_pre_hook(core))

    try:
        for layer in layers:
            watch(layer)
        yield record
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def projections(student, teacher):
    """Inside the `with` the student has `matching`, the R_k as bias-free nn.Linear, or nothing
    where the widths are equal. They are among its parameters, so that they are trained with it.
    """
    inside, outside = student.config.d_model, teacher.config.d_model
    if inside == outside:
        yield student
        return
    like = student.embed.token.weight
    student.matching = nn.ModuleList(
        nn.Linear(inside, outside, bias=False, device=like.device, dtype=like.dtype)
        for _ in student.blocks
    )
    for projection in student.matching:
        nn.init.normal_(projection.weight, 0.0, inside**-0.5)
    try:
        yield student
    finally:
        del student.matching


# -- the losses


def hidden_loss(student, teacher):
    """Mean squared difference of two lists of (n, D) hidden states, a pair a layer. (Match 2)"""
    return torch.stack([F.mse_loss(s, t) for s, t in _pairs(student, teacher)]).mean()  # (Match 2)


def cosine_loss(student, teacher):
    """1 - cos of the angle between two lists of (n, D) hidden states, the mean. (Match 3)"""
    pairs = _pairs(student, teacher)
    return torch.stack([(1 - F.cosine_similarity(s, t, -1)).mean() for s, t in pairs]).mean()


def attention_loss(student, teacher):
    """KL of two lists of attention scores (n, H, S), -inf where masked, the mean. (Match 4)"""
    found = [forward_kl(s, t) for s, t in _pairs(student, teacher)]
    means = [kl.sum() / max(1, kl.numel()) for kl in found]  # 0 where no head is left
    return torch.stack(means).mean()  # (Match 4)


def _pairs(student, teacher):
    """(ours, the teacher's) of every layer in float32 or better, the teacher's without gradient."""
    for s, t in zip(student, teacher, strict=True):
        if s.shape != t.shape:
            what = "heads or keys" if s.ndim == 3 else "widths"
            raise ValueError(
                f"{what} differ: student {tuple(s.shape)}, teacher {tuple(t.shape)}; "
                + ("match hidden states instead" if s.ndim == 3 else "use `projections`")
            )
    pairs = [(s, t.detach()) for s, t in zip(student, teacher)]
    dtypes = [torch.promote_types(s.dtype, t.dtype) for s, t in pairs]
    dtypes = [torch.promote_types(dtype, torch.float32) for dtype in dtypes]
    return [(s.to(dtype), t.to(dtype)) for (s, t), dtype in zip(pairs, dtypes)]


def matching_loss(student, seen, teacher_seen, layers, labels, weights):
    """Weighted sum of the three losses from two Records. labels (B, T): tokens whose label is -100
    are left out. weights: {"hidden" | "cosine" | "attention": float}; 0 if no label counts.
    """
    counts, T = labels != IGNORE, labels.shape[1]
    total = student.embed.token.weight.new_zeros(())
    if not counts.any():
        return total
    losses = {"hidden": hidden_loss, "cosine": cosine_loss, "attention": attention_loss}
    for name, weight in weights.items():
        if not weight:
            continue
        if name == "attention":
            sides = [
                [_real(r.scores(m).transpose(1, 2), T)[counts] for m in chosen]
                for r, chosen in ((seen, range(len(layers))), (teacher_seen, layers))
            ]
        else:
            ours = [_real(seen.hidden[k], T)[counts] for k in range(len(layers))]
            if hasattr(student, "matching"):
                ours = [R(h) for R, h in zip(student.matching, ours)]
            sides = [ours, [_real(teacher_seen.hidden[m], T)[counts] for m in layers]]
        total = total + weight * losses[name](*sides)
    return total


def _real(x, T):
    """The last T positions of (B, p + T, ...): virtual tokens stand in front."""
    return x[:, x.shape[1] - T :]
