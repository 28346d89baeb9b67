r"""AdamW with its moments in 8 bits (Dettmers et al., 2021, arXiv 2110.02861).

Between two steps each moment is one byte a weight; a step turns a stretch of them back into
float32, does AdamW's arithmetic there, and rounds again.

    (Adam8 1)   n_b   = max |x_i|  over block b of 256 elements
    (Adam8 2)   c_i   = argmin_j |q_j - x_i / n_b|          of two equally near the lower
    (Adam8 3)   x'_i  = n_b q_{c_i}
    (Adam8 4)   q     = {0, 1} and, for e = 0 .. 6, the middles of equal parts of [0.1, 1], times
                10^(e - 6): 2^e parts and their negatives (m), 2^(e + 1) parts (v, never negative)
    (Adam8 5)   m, v, w  by AdamW (paged_adamw.py) from m', v'

x is one moment of one tensor, laid out flat; n in R^(ceil(N / 256)), c in {0 .. 255}^N. The map q
is dynamic: seven decades, each with twice the values of the one below, so that a small element next
to a large one keeps its size. A constant is a maximum of its own block, so an outlier spoils 255
neighbours and no more.

Bytes: 2 (1 + 4/256) = 2.03125 a weight for both moments, instead of 8. Trained parameters: none of
its own. Initialisation: m = v = 0, since every n_b is 0.

Reduces to: AdamW, bitwise, on tensors below `min_8bit_size`, which stay in float32.

How this differs from bitsandbytes: it moves the code of a quantised m by one when m and the code
differ in sign, skips gradients that are not finite, and on CUDA decays weights after the step.

Footguns: a linear map (most of v becomes 0, and m / sqrt(v) explodes); a signed map for v (half of
the codes are never used); one maximum for a whole tensor; `Optimizer.load_state_dict`, which casts
the codes to the parameter's dtype, undone here; embeddings, whose rows differ so much in size that
they are better left in float32 (a group with `min_8bit_size` of its own).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never
from minipeft.quantized.nf4 import dynamic_map
from minipeft.quantized.paged_adamw import adamw_update, check_adamw, check_trainable

BLOCK = 256  # elements that share a maximum
STRETCH = 2**20  # elements in float32 at a time; a multiple of BLOCK
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # name -> whether it has a sign
MAPS = {signed: dynamic_map(signed) for signed in (True, False)}  # (Adam8 4)


def quantize_blocks(x, signed):
    """x (N,) float32 -> codes (N,) uint8, absmax (ceil(N / 256),) float32. (Adam8 1) (Adam8 2)"""
    work = show_work(x, signed)
    return work["codes"], work["absmax"]


def show_work(x, signed):
    """`quantize_blocks` with every intermediate: absmax (Adam8 1), scaled (x over its block's
    maximum), thresholds (halfway between neighbours of the map), codes (Adam8 2).
    """
    q = MAPS[signed].to(x.device)
    padded = F.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    absmax = padded.abs().amax(1)  # (Adam8 1)
    scaled = padded / absmax.where(absmax > 0, 1)[:, None]  # a block of zeros stays one
    thresholds = (q[1:] + q[:-1]) / 2
    codes = torch.bucketize(scaled.flatten()[: len(x)], thresholds)  # (Adam8 2)
    codes = codes.to(torch.uint8)
    return {"absmax": absmax, "scaled": scaled, "thresholds": thresholds, "codes": codes}


def dequantize_blocks(codes, absmax, signed):
    """codes (N,), absmax (ceil(N / 256),) -> x (N,) float32. (Adam8 3)"""
    q = MAPS[signed].to(codes.device)
    return q[codes.int()] * absmax.repeat_interleave(BLOCK)[: len(codes)]


@fast_path(
    "minipeft.kernels.adamw_8bit",
    capability=(7, 5),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    wins=never,  # not measured on a GPU yet
)
def adamw_8bit_step(
    w, g, m_codes, m_absmax, v_codes, v_absmax, t, lr, betas, eps, weight_decay
):  # fmt: skip
    """One step in place on w (n,), the moments' codes (n,) and absmax (ceil(n / 256),), from the
    gradient g (n,): dequantise, AdamW in float32, quantise again. (Adam8 5)
    """
    moments = [dequantize_blocks(m_codes, m_absmax, True)]
    moments += [dequantize_blocks(v_codes, v_absmax, False)]
    exact = w.to(torch.promote_types(w.dtype, torch.float32))
    adamw_update(exact, g.float(), *moments, t, lr, betas, eps, weight_decay)
    w.copy_(exact)
    places = ((m_codes, m_absmax), (v_codes, v_absmax))
    for (codes, absmax), moment, signed in zip(places, moments, MOMENTS.values()):
        new_codes, new_absmax = quantize_blocks(moment, signed)
        codes.copy_(new_codes)
        absmax.copy_(new_absmax)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with block-wise 8-bit moments for tensors of at least `min_8bit_size` elements.

    State of a large tensor: `step`, and for each moment `..._codes` (N,) uint8 and `..._absmax`
    (ceil(N / 256),) float32; of a small one `exp_avg` and `exp_avg_sq`, as in torch. Raises
    ValueError for values that make no sense.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=1e-2,
        min_8bit_size=4096,
    ):
        check_adamw(lr, betas, eps, weight_decay)
        if min_8bit_size < 0:
            raise ValueError(f"min_8bit_size={min_8bit_size} must be at least 0")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"min_8bit_size": min_8bit_size})
        for parameter in (p for group in self.param_groups for p in group["params"]):
            check_trainable(parameter)

    @torch.no_grad()
    def step(self, closure=None):
        """One step on every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    check_trainable(parameter)
                    self.update(parameter, group)
        return loss

    def update(self, parameter, group):
        """AdamW on one tensor: whole if its state is in float32, else a stretch at a time."""
        state = self.state[parameter]
        if not state:
            state.update(self.fresh(parameter, group["min_8bit_size"]))
        state["step"] += 1
        values = [group[name] for name in ("lr", "betas", "eps", "weight_decay")]
        t = state["step"].item()
        if "exp_avg" in state:
            adamw_update(
                parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], t, *values
            )
            return
        w, g = parameter.detach().flatten(), parameter.grad.flatten()  # views, mostly
        for start in range(0, len(w), STRETCH):
            part = slice(start, min(start + STRETCH, len(w)))
            blocks = slice(start // BLOCK, -(-part.stop // BLOCK))
            moments = [
                state[f"{name}_{kind}"][where]
                for name in MOMENTS
                for kind, where in (("codes", part), ("absmax", blocks))
            ]
            adamw_8bit_step(w[part], g[part], *moments, t, *values)
        if not parameter.is_contiguous():
            parameter.copy_(w.view_as(parameter))

    def fresh(self, parameter, min_8bit_size):
        """The state before the first step: both moments 0."""
        state, N = {"step": torch.tensor(0.0)}, parameter.numel()
        for name in MOMENTS:
            if parameter.numel() < min_8bit_size:
                state[name] = torch.zeros_like(parameter)
            else:
                where = {"device": parameter.device}
                state[f"{name}_codes"] = torch.zeros(N, dtype=torch.uint8, **where)
                state[f"{name}_absmax"] = torch.zeros(-(-N // BLOCK), **where)
        return state

    def load_state_dict(self, state_dict):
        """As torch's, but codes stay bytes and maxima float32 whatever the parameter's dtype."""
        super().load_state_dict(state_dict)
        places = [n for group in state_dict["param_groups"] for n in group["params"]]
        mine = [p for group in self.param_groups for p in group["params"]]
        for parameter, number in zip(mine, places):
            for name, value in state_dict["state"].get(number, {}).items():
                if name.endswith(("_codes", "_absmax")):
                    copied = torch.empty_like(value, device=parameter.device).copy_(value)
                    self.state[parameter][name] = copied
