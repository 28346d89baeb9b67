r"""What training costs in memory: by formula, and measured.

With M = B T tokens, D, W = d_ff, H, L, V as in gpt.py, N base parameters, n trained ones, s bytes a
number:

    (Memory 1)   weights      s (N + n); 4.127/8 bytes instead of s for a quantised projection
    (Memory 2)   gradients    s n
    (Memory 3)   optimizer    2 s n (AdamW), 2.03 n (8 bit; small tensors 2 s n), 2 s F P (paged)
    (Memory 4)   a block      s (6 M D + M W) + 4 (4 M + M H)    even if nothing in it is trained:
                              inputs of two LayerNorms and of the GELU; q, k, v and the output of
                              attention; means and standard deviations; log-sum-exps, or on one
                              core, where it pays (causal_attention.py), s M H (T + 64) / 2 for
                              probabilities, T a multiple of 64, and no output unless W_o's input
                              is kept
                 and          M D for q, k, v;  M D for up;  M W for down:  the input of projections
                              whose weight is trained or that have a LoRA;  M r for each LoRA
    (Memory 5)   logits       a chunk of 256 rows, 256 V s, or 3 M V s all at once; in chunks
                              also 2 M D s: what the head reads, and its gradient; in half
                              precision the chunk at work costs s + 4, for its float32 copy
    (Memory 6)   working      s (M D + 2 M W) in the backward pass of a feed-forward layer, on a CPU
                              s (M D + 2,048 W) where it runs in chunks (feed_forward.py) and M is
                              more; two copies of the largest tensor while AdamW steps

Added weights are the technique's, or clones of what it trains. The fullest moment is one of five:
the loss (everything kept, and logits); the backward pass at its beginning, at the first block, and
at the embedding (all gradients there; the head's part, the embedding's own, and their sum); the
optimizer's step. With checkpointing a block keeps its input, M D, and one block at a time all of
(Memory 4).

On n devices, each with B rows of its own:

    (Memory 7)   DDP      everything, and the gradients once more, in buckets
                 ZeRO-1   optimizer / n           ZeRO-2   and gradients / n
                 FSDP     and weights / n (ZeRO-3), and the largest unit (a block, or the embedding)
                          gathered

For techniques without a line in (Memory 4), and for LoRA where the blocks differ (rank_pattern),
activations are counted instead: one forward pass on tensors that have shapes and no memory
(`count_activations`). A whole step can be run like that too (`simulate`), for models far too large
for the machine.

Measured: on CUDA the allocator knows its peak. On a CPU nobody does, so `PeakMemory` watches: a
dispatch mode sees every tensor that any operation returns, counts each storage once, and takes it
off again when the storage dies. Scratch space inside a single kernel is not seen; everything
autograd keeps is.

Footguns: counting 4 bits for a quantised model's embeddings; forgetting that a frozen layer still
keeps what the layers below need; taking the trained share for the memory's share: activations and
frozen weights stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minipeft import causal_attention, feed_forward
from minipeft.cross_entropy import CHUNK, linear_cross_entropy_written_out
from minipeft.dispatch import forced
from minipeft.gpt import GPT, MANY, keeping_pays
from minipeft.quantized.nf4_tables import CPU_TILE
from minipeft.technique import technique_class, trainable_parameters

OPTIMIZERS = ("adamw", "adamw_8bit", "paged")
EVERY = ("q", "k", "v", "o", "up", "down")


class PeakMemory(TorchDispatchMode):
    """Bytes of live tensor storages inside a `with`: `now`, and `peak`, the most at once.

    Storages that existed before count only if handed to `watch`. Slow (every operation calls back
    into Python), so never time what runs inside.
    """

    def __init__(self):
        super().__init__()
        self.sizes = {}  # id of a live storage -> bytes
        self.now = self.peak = 0

    def watch(self, *tensors):
        """Count these tensors' storages too: weights, optimizer state, anything made before."""
        for tensor in tensors:
            if tensor.is_meta:  # a shape without bytes
                continue
            storage = tensor.untyped_storage()
            if id(storage) not in self.sizes:
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, id(storage))

    def ignore(self, *tensors):
        """Never count these tensors' storages: they stand for another device's memory."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self.sizes[id(storage)] = 0
            weakref.finalize(storage, self._gone, id(storage))

    def _gone(self, key):
        self.now -= self.sizes.pop(key, 0)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.watch(*(t for t in tree_leaves(result) if isinstance(t, torch.Tensor)))
        return result


def model_tensors(model):
    """Every parameter, gradient and buffer of a model, what its attachments set aside included."""
    tensors = [*model.parameters(), *model.buffers()]
    for attachment in model.attachments:
        for swap in attachment.swaps:
            if isinstance(swap.original, torch.Tensor):
                tensors.append(swap.original)
    return tensors + [t.grad for t in tensors if t.grad is not None]


def optimizer_bytes(optimizer):
    """Bytes of the tensors an optimizer keeps between steps."""
    state = [t for s in optimizer.state.values() for t in s.values()]
    return sum(t.numel() * t.element_size() for t in state if isinstance(t, torch.Tensor))


def state_tensors(optimizer):
    """What an optimizer keeps on the device: of a paged one the frames, not the pages at home."""
    if optimizer is None:
        return []
    if getattr(optimizer, "paged", False):
        return [pager.frames for pager in optimizer.pagers]
    values = [v for state in optimizer.state.values() for v in state.values()]
    return [v for v in values if isinstance(v, torch.Tensor)]


def measure_peak(step, model, optimizer=None):
    """Bytes at the fullest moment of `step()`, weights, gradients and optimizer state included.

    Run one step before, so that the optimizer's state exists. On CUDA it is the allocator's peak.
    """
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with PeakMemory() as memory:
        memory.watch(*model_tensors(model))
        memory.watch(*state_tensors(optimizer))
        memory.ignore(*(pager.host for pager in getattr(optimizer, "pagers", ())))
        step()
    return memory.peak


# -- by formula


@dataclass(frozen=True)
class Run:
    """What is to be trained, and how. Raises ValueError for values that make no sense.

    config: the model's. technique: what is attached. batch, time: rows and tokens a row of one
    backward pass. dtype: of weights and computation. optimizer: adamw, adamw_8bit or paged, with
    `page_size` and `resident_pages`. checkpointing: of every block. full_logits: not in chunks.
    device: cpu, where `measure` runs, or cuda: their faster twins differ.
    """

    config: object
    technique: object
    batch: int = 1
    time: int = 128
    dtype: torch.dtype = torch.float32
    optimizer: str = "adamw"
    checkpointing: bool = False
    full_logits: bool = False
    page_size: int = 2**16
    resident_pages: int = 16
    device: str = "cpu"

    def __post_init__(self):
        for name in ("batch", "time", "page_size", "resident_pages"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.time > self.config.context_length:
            raise ValueError(
                f"time={self.time} is more than context_length={self.config.context_length}"
            )
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer={self.optimizer!r} is none of {', '.join(OPTIMIZERS)}")
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device={self.device!r} is none of cpu, cuda")
        self.technique.check(self.config)

    @property
    def kind(self):
        return type(self.technique).__name__

    @property
    def trained(self):
        return self.technique.count(self.config)


@dataclass(frozen=True)
class Costs:
    """Bytes at one moment of a step."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    working: float

    @property
    def total(self):
        return sum(dataclasses.astuple(self))


def estimate(run):
    """The fullest of the `moments` of a Run, as Costs."""
    return max(moments(run).values(), key=lambda costs: costs.total)


def moments(run):
    """{moment: Costs}: where a step can be fullest, by formula. (Memory 1) to (Memory 6)"""
    c, s, M = run.config, run.dtype.itemsize, run.batch * run.time
    D = s * M * c.d_model
    weights, optimizer = weight_bytes(run), optimizer_state(run)
    gradients = s * run.trained  # (Memory 2)
    head = s * c.vocab_size * c.d_model if trains_embedding(run) else 0
    kept, block = kept_activations(run)
    each = s if s >= 4 else s + 4  # half precision, and its float32 copy
    chunks = c.vocab_size * min(M, CHUNK) * each + 2 * D
    all_at_once = 3 * M * c.vocab_size * max(s, 4)
    logits = all_at_once if run.full_logits else chunks  # (Memory 5)
    again = block - D if run.checkpointing else 0  # its input is kept already
    first, top = (gradients - head) / c.n_layer, D + 8 * M  # top: what ln_f kept, gone by then
    working = D + feed_forward_working(run)  # (Memory 6)
    return {
        "loss": Costs(weights, head, optimizer, kept, logits, 0),
        "backward begins": Costs(weights, head, optimizer, kept + again - top, 0, working),
        "first block": Costs(weights, gradients - first, optimizer, block, 0, working),
        "embedding": Costs(weights, gradients + 2 * head, optimizer, 0, 0, 2 * D),
        "step": Costs(weights, gradients, optimizer, 0, 0, 2 * step_bytes(run)),
    }


def feed_forward_working(run):
    """What the backward pass of a feed-forward layer holds beside what was kept. (Memory 6)

    The gradients before and behind the GELU; where `down` kept its input, that is gone by then.
    """
    c, s = run.config, run.dtype.itemsize
    W, size = s * run.batch * run.time * c.ff_width, c.d_model * c.ff_width
    reads = reads_of(run)
    if run.kind == "QLoRA":  # gradients of base and branch, or one weight as floats and a tile
        tile = (2 if s == 4 else 6) * min(size, CPU_TILE)
        return max(2 * W, W + s * size + tile)
    if run.kind == "IA3" and "down" in run.technique.targets:
        return 3 * W  # l * h: the product whose sum is l's gradient
    if in_chunks(run):
        return 2 * min(W, s * feed_forward.CHUNK * c.ff_width)  # forward: u and gelu(u)
    trained = s * size if reads == EVERY and run.kind in ("FullFineTuning", "TopLayers") else 0
    return (1 if "down" in reads else 2) * W + trained


def in_chunks(run):
    """Whether the feed-forward layers are frozen, unwrapped, and large enough for their twin."""
    trained = run.kind in ("FullFineTuning", "TopLayers", "BitFit", "DiffPruning")
    wrapped = run.kind == "QLoRA" or {"up", "down"} & set(getattr(run.technique, "targets", ()))
    large = run.batch * run.time * run.config.ff_width >= MANY
    return run.device == "cpu" and run.dtype == torch.float32 and large and not (trained or wrapped)


def keeps_probabilities(run):
    """Whether attention keeps its probabilities and forms nothing twice, as on one thread here."""
    c = run.config
    plain = run.device == "cpu" and run.dtype == torch.float32 and not c.dropout
    return plain and keeping_pays(run.time, c.d_model)


def base_parameters(config):
    """Parameters of the model without a technique."""
    return technique_class("FullFineTuning")().count(config)


def weight_bytes(run):
    """Weights of base and technique, and what is set aside. (Memory 1)"""
    c, s = run.config, run.dtype.itemsize
    total = base_parameters(c)
    if run.kind == "QLoRA":
        quantised = c.n_layer * (4 * c.d_model**2 + 2 * c.d_model * c.ff_width)
        total -= quantised * (1 - bits_of(run.technique) / 8 / s)
        total += quantised * run.technique.keep_original
    keeps = getattr(run.technique, "keep_original", True) or run.kind == "QLoRA"
    return s * (total + (run.trained if keeps else 0))


def bits_of(technique):
    """Bits a weight of QLoRA's storage. (NF4 7)"""
    size = technique.block_size
    return 4 + (8 / size + 32 / (size * 256) if technique.double_quant else 32 / size)


def trains_embedding(run):
    """Whether the embedding, and with it the head, is trained."""
    return run.kind == "FullFineTuning"


def largest_trained(run):
    """Elements of the largest trained tensor."""
    return max(trained_shapes(run))


@functools.lru_cache(maxsize=32)
def shapes_of(config, technique):
    """Sizes of the trained tensors, from a model on the meta device."""
    with torch.device("meta"):
        model = technique.attach(GPT(config))
    return tuple(p.numel() for p in trainable_parameters(model))


def trained_shapes(run):
    return shapes_of(run.config, run.technique)


def step_bytes(run):
    """Float tensors that AdamW makes, of the size of what it works on: a tensor, a page, or a
    stretch.
    """
    largest, s = largest_trained(run), run.dtype.itemsize
    if run.optimizer == "paged":
        return s * min(run.page_size, largest)
    if run.optimizer == "adamw_8bit" and largest >= 4096:
        return 4 * 3 * min(2**20, largest)  # both moments, and what quantising them needs
    return s * largest


def optimizer_state(run):
    """Bytes of the optimizer's state on the device. (Memory 3)"""
    s, sizes = run.dtype.itemsize, trained_shapes(run)
    if run.optimizer == "adamw":
        return 2 * s * run.trained
    if run.optimizer == "paged":  # the rest is in host memory
        pages = -(-run.trained // run.page_size)
        return 2 * s * min(run.page_size, run.trained) * min(run.resident_pages, pages)
    return sum(2 * n + 8 * -(-n // 256) if n >= 4096 else 2 * s * n for n in sizes)


def kept_activations(run):
    """(bytes kept in all when the loss is reached, bytes of one block in full). (Memory 4)"""
    c, s, M = run.config, run.dtype.itemsize, run.batch * run.time
    D, stats = s * M * c.d_model, 4 * 2 * M
    blocks = run.technique.layers if run.kind == "TopLayers" else c.n_layer
    alike = run.kind in READS and not getattr(run.technique, "rank_pattern", ())
    if alike:
        block = block_activations(run)
        kept = blocks * block - (before_the_first(run) if READS[run.kind] is None else 0)
    else:
        kept = count_activations(dataclasses.replace(run, checkpointing=False)) - D - stats
        block = kept / blocks
    return (blocks * D if run.checkpointing else kept) + D + stats, block


READS = {  # technique -> projections that keep their input; None: the technique's targets
    "FullFineTuning": EVERY,
    "TopLayers": EVERY,
    "BitFit": (),
    "LayerNormTuning": (),
    "LoRA": None,
    "QLoRA": None,
}


def reads_of(run):
    """Projections that keep their input for the backward pass."""
    reads = READS.get(run.kind, ())
    return run.technique.targets if reads is None else reads


def block_activations(run):
    """Bytes that one block keeps for its backward pass. (Memory 4)"""
    c, s, M = run.config, run.dtype.itemsize, run.batch * run.time
    D, W, reads = s * M * c.d_model, s * M * c.ff_width, reads_of(run)
    total = 2 * D + W + 4 * 4 * M + attention_activations(run)
    if run.kind == "QLoRA" and s == 2:
        total += 2 * (4 - s) * M * c.d_model  # the inputs of both LayerNorms, in float32
    if READS[run.kind] is None:
        total += s * M * sum(rank for _, _, rank, _ in run.technique.places(1))
    total += D * bool({"q", "k", "v"} & set(reads))
    return total + D * ("up" in reads) + W * ("down" in reads)


def attention_activations(run):
    """q, k, v, and the output with log-sum-exps; or probabilities, and the output only where it is
    also the input of a projection that keeps its input. (Memory 4)
    """
    c, s, M = run.config, run.dtype.itemsize, run.batch * run.time
    D = s * M * c.d_model
    if keeps_probabilities(run):
        kept = run.batch * c.n_head * causal_attention.kept(run.time)
        return 3 * D + s * kept + D * ("o" in reads_of(run))
    return 4 * D + 4 * M * c.n_head


def before_the_first(run):
    """What the first block does not keep: nothing is trained in front of its first LoRA."""
    c, s, M, targets = run.config, run.dtype.itemsize, run.batch * run.time, set(reads_of(run))
    D, stats = s * M * c.d_model, 4 * 2 * M
    spared = D + stats
    if not targets & {"q", "k", "v"}:
        spared += attention_activations(run) - D * ("o" in targets)
        if "o" not in targets:
            spared += D + stats
            spared += s * M * c.ff_width * ("up" not in targets)
    return spared


def sharded(run, devices):
    """{how: bytes a device} at the fullest moment, for one device, DDP, ZeRO-1, ZeRO-2 and FSDP.
    (Memory 7)
    """
    if devices < 1:
        raise ValueError(f"devices={devices} must be at least 1")
    c, n = run.config, devices
    unit = max(weight_bytes(run) / c.n_layer, run.dtype.itemsize * c.vocab_size * c.d_model)
    shares = {  # weights, gradients, optimizer: divided by; what comes on top
        "one device": (1, 1, 1, 0),
        "DDP": (1, 1, 1, run.dtype.itemsize * run.trained),
        "ZeRO-1": (1, 1, n, 0),
        "ZeRO-2": (1, n, n, 0),
        "FSDP": (n, n, n, unit if n > 1 else 0),
    }
    return {
        how: max(
            costs.total
            - costs.weights * (1 - 1 / w)
            - costs.gradients * (1 - 1 / g)
            - costs.optimizer * (1 - 1 / o)
            + extra
            for costs in moments(run).values()
        )
        for how, (w, g, o, extra) in shares.items()
    }


# -- by running on shapes, and by running


def build(run):
    """(model, a function that makes one training step, optimizer) of a Run."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(run.dtype)
    try:
        model = GPT(run.config)
    finally:
        torch.set_default_dtype(usual)
    run.technique.attach(model).train()
    model.gradient_checkpointing = run.checkpointing
    optimizer = make_optimizer(run, trainable_parameters(model))
    ids = torch.zeros(run.batch, run.time, dtype=torch.int64)

    def step():
        loss_of(run, model, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    return model, step, optimizer


def loss_of(run, model, ids):
    if run.full_logits:
        x = model.features(ids).flatten(0, 1)
        return linear_cross_entropy_written_out(x, model.head.weight, ids.flatten())
    return model.loss(ids, ids)


def make_optimizer(run, parameters):
    if run.optimizer == "adamw":
        return torch.optim.AdamW(parameters, foreach=False)
    if run.optimizer == "paged":
        from minipeft.quantized.paged_adamw import PagedAdamW

        sizes = {"page_size": run.page_size, "resident_pages": run.resident_pages}
        return PagedAdamW(parameters, **sizes)
    from minipeft.quantized.adamw_8bit import AdamW8bit

    return AdamW8bit(parameters)


def measure(run):
    """Bytes at the fullest moment of the second step of a Run, on this machine's CPU."""
    with torch.random.fork_rng(devices=[]):
        model, step, optimizer = build(run)
        step()
        return measure_peak(step, model, optimizer)


def simulate(run):
    """`measure` on tensors that have shapes and no memory: the same number, at any size."""
    if run.kind == "QLoRA":
        raise ValueError("quantising looks at the weights' values; use measure, or the formula")
    with shapes_only():
        return measure(run)


@contextlib.contextmanager
def shapes_only():
    """Inside, tensors have shapes and no memory, and nothing may depend on a value."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # slow to import, seldom needed

    usual = torch.nn.init.trunc_normal_  # draws again until all values fit
    torch.nn.init.trunc_normal_ = lambda tensor, *_, **__: tensor
    try:
        with torch.random.fork_rng(devices=[]), FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        torch.nn.init.trunc_normal_ = usual


def count_activations(run):
    """Bytes that autograd keeps for the backward pass of the features, counted on shapes."""
    kept, sizes = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        if id(storage) not in kept:
            kept[id(storage)] = storage  # held, so that its id is not given away again
            sizes.append(storage.nbytes())
        return tensor

    with shapes_only(), forced("off") if run.device == "cuda" else contextlib.nullcontext():
        model, *_ = build(run)
        for tensor in model_tensors(model):
            keep(tensor)
        own = sum(sizes)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            x = model.features(torch.zeros(run.batch, run.time, dtype=torch.int64))
        del x
    return sum(sizes) - own


# -- printed


def table(run, devices=8):
    """The answer for people: the moments, the fullest of them, and a device's share, in GiB."""
    rows = moments(run)
    names = [f.name for f in dataclasses.fields(Costs)]
    dtype = str(run.dtype).removeprefix("torch.")
    lines = [
        f"{run.kind}: {run.trained:,} trained of {base_parameters(run.config):,} parameters, "
        f"{run.batch} x {run.time} tokens, {dtype}, {run.optimizer}",
        "GiB".ljust(17) + "".join(f"{name[:11]:>12}" for name in [*names, "total"]),
    ]
    for moment, costs in rows.items():
        values = [*dataclasses.astuple(costs), costs.total]
        lines.append(f"{moment:17}" + "".join(f"{v / 2**30:12.3f}" for v in values))
    shares = sharded(run, devices)
    lines.append(f"on {devices} devices, GiB on each:")
    lines.append("  " + ", ".join(f"{how} {size / 2**30:.3f}" for how, size in shares.items()))
    return "\n".join(lines)


def verdict(run, gigabytes):
    """One line: whether a Run fits a device of so many GB (2^30 bytes)."""
    need = estimate(run).total / 2**30
    word = "fits" if need <= gigabytes else "does not fit"
    return f"{need:.2f} GB at the fullest moment: {word} {gigabytes:g} GB"
