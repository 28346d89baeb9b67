r"""2:4 sparsity, stored: of every four neighbours in a row two are zero, and only the others are
kept (Mishra et al., 2021, arXiv 2104.08378).

    (Semi 1)   w = (0, a, 0, b)   ->   values (a, b), indices (1, 3)      two bits an index
    (Semi 2)   byte = i_0 + 4 i_1 + 16 i_2 + 64 i_3                       two groups of four a byte
    (Semi 3)   bytes = n b / 2 + n / 8         n weights of b bytes: 0.5625 of dense at b = 2

What stays is any two of four, in increasing order of place; a group with more than two zeros keeps
zeros, so that every group is alike. A GPU with sparse tensor cores (capability 8.0 and up)
multiplies from this form at up to twice the rate of dense; `torch_sparse` hands it over. On a CPU
the weight is unpacked in every forward pass: the file and the memory are smaller, not the time.

How this differs from torch.sparse.to_sparse_semi_structured: its indices are laid out for one
kernel and exist on a GPU only; these are in reading order, and travel in a file.

Footguns: groups along the outputs (the kernel wants them along the inputs); first index in the
high bits; indices that count from the row's beginning.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from minipeft.dispatch import fast_path, never

SHIFTS = (0, 2, 4, 6)
KERNEL = {
    "capability": (7, 5),
    "dtypes": (torch.float32, torch.float16, torch.bfloat16),
    "wins": never,  # not measured on a GPU; the sparse product needs no unpacking
}


def wants_gradient(tensor):
    return tensor.requires_grad and torch.is_grad_enabled()


@fast_path(
    "minipeft.kernels.semi_structured",
    **KERNEL,
    supports=lambda w: w.dim() == 2 and w.shape[1] % 8 == 0 < w.numel() and not wants_gradient(w),
)
def pack_2_4(weight):
    """(values (out, in / 2), indices (out, in / 8) uint8) of a weight (out, in) in 2:4 form.
    (Semi 1) (Semi 2)

    Raises ValueError when a row is no multiple of 8 or a group of four has more than two nonzeros.
    """
    groups = check_2_4(weight)
    # nonzeros first, in order; zeros fill up
    places = (groups == 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :2].sort(-1)[0]
    values = groups.gather(-1, places).flatten(-2)
    four = places.flatten(-2).unflatten(-1, (-1, 4))  # (out, in / 8, 4)
    return values, sum(four[..., n] << s for n, s in enumerate(SHIFTS)).to(torch.uint8)  # (Semi 2)


def check_2_4(weight):
    """A weight's groups, (out, in / 4, 4). Raises ValueError as `pack_2_4` does."""
    if weight.shape[-1] % 8:
        raise ValueError(f"rows of {weight.shape[-1]} weights: 2:4 packing needs a multiple of 8")
    groups = weight.unflatten(-1, (-1, 4))
    full = ((groups != 0).sum(-1) > 2).nonzero()
    if len(full):
        raise too_full(*full[0].tolist())
    return groups


def too_full(row, group):
    """The error for a group of four with more than two nonzeros."""
    return ValueError(
        f"row {row} has more than 2 nonzeros in columns {4 * group} to {4 * group + 3}: "
        "prune with pattern=(2, 4) first"
    )


@fast_path(
    "minipeft.kernels.semi_structured",
    **KERNEL,
    supports=lambda v, indices: v.dim() == 2 and indices.numel() > 0 and not wants_gradient(v),
)
def unpack_2_4(values, indices):
    """The dense weight (out, in) of `pack_2_4`'s two tensors."""
    places = torch.stack([indices >> s & 3 for s in SHIFTS], -1).flatten(-2)  # (Semi 2)
    pairs = places.unflatten(-1, (-1, 2)).long()  # (out, in / 4, 2)
    dense = values.new_zeros(*pairs.shape[:-1], 4)
    return dense.scatter(-1, pairs, values.unflatten(-1, (-1, 2))).flatten(-2)  # (Semi 1)


def packed_bytes(shape, element_size):
    """Bytes of a packed weight of this dense shape. (Semi 3)"""
    n = shape[0] * shape[1]
    return n * element_size // 2 + n // 8


class SemiStructuredLinear(nn.Module):
    """A projection whose 2:4 weight is kept packed. (..., in) -> (..., out)"""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        values, indices = pack_2_4(linear.weight.detach())
        self.register_buffer("values", values)
        self.register_buffer("indices", indices)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self):
        """The dense weight, unpacked anew."""
        return unpack_2_4(self.values, self.indices)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


def pack_model(model):
    """Put SemiStructuredLinear in place of every projection, in place; returns the model.

    Raises ValueError naming the first projection that is not 2:4, and for techniques on the model,
    which would be lost; the model is then as it was.
    """
    from minipeft import wrap
    from minipeft.compressed.magnitude_pruning import projections
    from minipeft.technique import check_bare

    check_bare(model, "pack it before attaching")
    packed = {}
    for path, linear in projections(model).items():
        try:
            packed[path] = SemiStructuredLinear(linear)
        except ValueError as problem:
            raise ValueError(f"{path}: {problem}") from None
    for path, module in packed.items():
        parent, name = wrap.locate(model, path)
        setattr(parent, name, module)
    return model


def torch_sparse(linear):
    """An nn.Linear on the GPU's sparse kernel, from a (packed or dense) linear whose weight is
    2:4, float16 or bfloat16, on CUDA.

    Raises ValueError where there is no such kernel: no CUDA, capability below 8.0, float32; and for
    a weight that is not 2:4, of which torch would keep some numbers and drop others unasked.
    """
    weight = linear.weight.detach()
    check_2_4(weight)
    if weight.device.type != "cuda":
        raise ValueError(f"the sparse kernel runs on CUDA; this weight is on {weight.device}")
    if torch.cuda.get_device_capability(weight.device) < (8, 0):
        raise ValueError("the sparse kernel needs a GPU of capability 8.0 or more")
    if weight.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"the sparse kernel takes float16 or bfloat16, not {weight.dtype}")
    fast = nn.Linear(linear.in_features, linear.out_features, device="meta")
    fast.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(weight), requires_grad=False)
    bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    fast.bias = bias
    return fast
