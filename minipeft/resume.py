r"""A checkpoint of a run: everything the next step depends on, in one safetensors file.

    model/NAME            every trained tensor and persistent buffer, by its place in the tree
    attachment/I/KEY      tensors in attachment I's state (numbers and strings: in the header)
    optimizer/I/KEY       the optimizer's state of parameter I, in the order of its groups
    random/cpu/R          torch's random state of process R; random/device/R its GPU's
    header                step, what the run measured, settings, techniques with theirs, the
                          optimizer's class, digests of base and data

Frozen parameters are not in the file: the base is on the disk already. Their digest is, so that a
run cannot go on from another base. (Weights in four bits are buffers, and those are in it.) One
file, because one rename is atomic and two are not: a kill leaves the old checkpoint or the new one,
never a mixture. Nothing in it executes; torch.save would pickle.

What is not saved, because it is a function of the step: the order of the data, the learning rate,
start positions.

Footguns: saving the weights without AdamW's averages (the loss jumps); without the random state
(dropout differs from the first step on); resuming with another number of steps (another learning
rate from the first step on).
"""

from __future__ import annotations

import hashlib
import json
from array import array
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from minipeft.atomic import write_atomically
from minipeft.settings import encode
from minipeft.wrap import logical_name

NAME = "checkpoint.safetensors"
FREE = {"eval_every", "checkpoint_every", "log_every", "device"}  # may differ when resuming


class Keeper:
    """Saves a run to `folder` and takes it up again. Raises ValueError at construction when its
    settings are nothing that JSON can hold.
    """

    def __init__(self, folder, run):
        self.path, self.run = Path(folder) / NAME, run
        self.digests = {"base": digest_of_base(run.model), "data": digest_of_data(run.data)}
        try:
            json.dumps(run_header(run, self.digests))
        except TypeError as problem:  # better now than at the first save
            raise ValueError(
                f"the run's settings cannot be written to a checkpoint ({problem}); give Python's "
                "own numbers, strings and tuples"
            ) from None

    def begin(self, resume):
        """Load the checkpoint for `resume`.

        Raises ValueError when there is none, or one that a new run would overwrite.
        """
        if resume:
            load_run(self.path, self.run, self.digests)
        elif self.path.exists():
            header = read_header(self.path)
            if header["step"] < header["settings"]["steps"]:
                raise ValueError(
                    f"{self.path} holds an unfinished run (step {header['step']} of "
                    f"{header['settings']['steps']}): "
                    f"go on with resume=True, or delete it, or choose another folder"
                )

    def save(self):
        """Write the checkpoint.

        Raises FloatingPointError, keeping the old one, when a tensor is not finite.
        """
        save_run(self.path, self.run, self.digests)


def save_run(path, run, digests):
    """Write everything the next step depends on; all processes take part, the first one writes."""
    tensors = run_tensors(run) | {
        f"random/{kind}/{rank}": state
        for kind, mine in random_states(run.world.device).items()
        for rank, state in enumerate(run.world.gather(mine))
    }
    bad = [n for n, t in tensors.items() if n.startswith("model/") and not all_finite(t)]
    if bad:
        raise FloatingPointError(
            f"after step {run.result.steps} these tensors are not finite: {', '.join(bad[:5])}. "
            f"The last good checkpoint was kept; try a smaller learning rate"
        )
    if run.world.rank == 0:
        copies = {n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()}
        header = {"run": json.dumps(run_header(run, digests))}
        write_atomically(path, save(copies, metadata=header))


def load_run(path, run, digests):
    """Bring a run to where the checkpoint left it.

    Raises ValueError, before anything changes, when it does not fit.
    """
    header = read_header(path)
    check_header(path, header, run, digests)
    with safetensors.safe_open(path, "pt") as file:
        # clones: what get_tensor gives may be a view of the file, which the next save replaces
        saved = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    check_tensors(path, saved, run)
    with torch.no_grad():
        for name, tensor in model_tensors(run.model).items():
            tensor.copy_(saved[f"model/{name}"])
    load_attachments(run.model, header["attachments"], saved)
    load_optimizer(run.optimizer, header["optimizer"], saved)
    result, kept = run.result, header["result"]
    result.losses, result.step_seconds = kept["losses"], kept["step_seconds"]
    result.evaluations = [(step, values) for step, values in kept["evaluations"]]
    result.tokens, result.seconds = kept["tokens"], kept["seconds"]
    result.optimizer_bytes = kept["optimizer_bytes"]
    set_random_states(run.world, saved)


# -- what a run consists of


def model_tensors(model):
    """Place in the module tree -> every tensor that training may change:
    trained parameters, persistent buffers.
    """
    persistent = model.state_dict(keep_vars=True)
    found = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return found | {n: b for n, b in model.named_buffers() if n in persistent}


def run_tensors(run):
    """Name in the file -> tensor, the random states left out."""
    tensors = {f"model/{n}": t for n, t in model_tensors(run.model).items()}
    for i, attachment in enumerate(run.model.attachments):
        tensors |= tensors_of(attachment.state, f"attachment/{i}")
    for i, state in enumerate(optimizer_states(run.optimizer)):
        tensors |= tensors_of(state, f"optimizer/{i}")
    return tensors


def tensors_of(state, prefix):
    return {f"{prefix}/{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}


def plain_of(state):
    return {k: v for k, v in state.items() if not isinstance(v, torch.Tensor)}


def optimizer_states(optimizer):
    """The state of every parameter, in the order of the groups."""
    if hasattr(optimizer, "flush"):
        optimizer.flush()  # a paged optimizer's newest values are on the device
    return [optimizer.state.get(p, {}) for g in optimizer.param_groups for p in g["params"]]


def run_header(run, digests):
    result = run.result
    keep = ("losses", "step_seconds", "evaluations", "tokens", "seconds", "optimizer_bytes")
    return {
        "step": result.steps,
        "result": {name: getattr(result, name) for name in keep},
        "settings": run.config.settings(),
        "techniques": techniques_of(run.model),
        "optimizer_type": type(run.optimizer).__name__,
        "processes": run.world.size,
        "digests": digests,
        "attachments": [plain_of(a.state) for a in run.model.attachments],
        "optimizer": [plain_of(s) for s in optimizer_states(run.optimizer)],
    }


def techniques_of(model):
    """Every attached technique's class and settings, as JSON gives them back."""
    return json.loads(json.dumps([encode(a.technique) for a in model.attachments]))


def digest_of_base(model):
    """sha256 over the names and bytes of every frozen parameter."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            where = logical_name(name)  # wherever wrappers stand, the base is the same
            digest.update(f"{where} {parameter.dtype} {tuple(parameter.shape)}".encode())
            raw = parameter.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def digest_of_data(data):
    """sha256 over every example's ids and labels."""
    digest = hashlib.sha256()
    for row in data:
        labels = row.labels if isinstance(row.labels, list) else [row.labels]
        digest.update(array("q", [len(row.ids), *row.ids, *labels]).tobytes())
    return digest.hexdigest()


def all_finite(tensor):
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def random_states(device):
    """torch's random state here, and the GPU's where there is one, as uint8 tensors."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["device"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["device"] = torch.mps.get_rng_state()
    return states


def set_random_states(world, saved):
    torch.set_rng_state(saved[f"random/cpu/{world.rank}"])
    state = saved.get(f"random/device/{world.rank}")
    if state is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(state, world.device)
    elif state is not None and world.device.type == "mps":
        torch.mps.set_rng_state(state)


# -- reading and checking


def read_header(path):
    """The header of a checkpoint.

    Raises ValueError for a file that is missing, truncated or of another kind.
    """
    if not path.exists():
        raise ValueError(f"{path}: no checkpoint there to resume from")
    try:
        with safetensors.safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})["run"])
    except (safetensors.SafetensorError, KeyError, ValueError) as problem:
        raise ValueError(f"{path} is no checkpoint of a run, or truncated ({problem})") from None


def check_header(path, header, run, digests):
    """Raise ValueError naming every setting, and base or data, that differs."""
    mine, theirs = run.config.settings(), header["settings"]
    wrong = [
        f"{name} was {theirs.get(name)!r} and is {mine[name]!r}"
        for name in mine
        if name not in FREE and mine[name] != theirs.get(name)
    ]
    wrong += other_techniques(techniques_of(run.model), header.get("techniques"))
    kind = type(run.optimizer).__name__
    before = header.get("optimizer_type", kind)
    wrong += [f"the optimizer was {before} and is {kind}"] if before != kind else []
    old = header["digests"]
    wrong += [f"the {name} is another one" for name in digests if digests[name] != old[name]]
    if header["processes"] != run.world.size:
        wrong.append(f"processes were {header['processes']} and are {run.world.size}")
    if wrong:
        raise ValueError(f"{path} cannot be resumed: " + "; ".join(wrong))


def other_techniques(mine, theirs):
    """What differs, in words; nothing if the checkpoint is from before they were noted (None)."""
    theirs = mine if theirs is None else theirs
    old, new = (", ".join(t["minipeft_type"] for t in side) or "none" for side in (theirs, mine))
    if old != new:
        return [f"the techniques were {old} and are {new}"]
    return [
        f"{new['minipeft_type']}'s {name} was {old.get(name)!r} and is {new[name]!r}"
        for new, old in zip(mine, theirs)
        for name in new
        if new[name] != old.get(name)
    ]


def check_tensors(path, saved, run):
    """Raise ValueError naming every model tensor that is missing, unknown or of another shape."""
    mine = {f"model/{n}": t for n, t in model_tensors(run.model).items()}
    theirs = {n: t for n, t in saved.items() if n.startswith("model/")}
    wrong = [f"missing {n}" for n in mine if n not in theirs]
    wrong += [f"unknown {n}" for n in theirs if n not in mine]
    wrong += [
        f"{n} is {tuple(theirs[n].shape)}, not {tuple(mine[n].shape)}"
        for n in mine
        if n in theirs and theirs[n].shape != mine[n].shape
    ]
    if wrong:
        raise ValueError(f"{path} does not fit this model: " + "; ".join(wrong[:5]))


def load_attachments(model, plain, saved):
    device = next(model.parameters()).device
    for i, attachment in enumerate(model.attachments):
        attachment.state = dict(plain[i]) | _under(saved, f"attachment/{i}/", device)


def load_optimizer(optimizer, plain, saved):
    """Put the state back as it was. Not `load_state_dict`:
    it casts every tensor to the parameter's dtype, 8-bit codes too.
    """
    places = [(g, p) for g in optimizer.param_groups for p in g["params"]]
    for i, (group, parameter) in enumerate(places):
        device = "cpu" if getattr(optimizer, "paged", False) else parameter.device
        tensors = _under(saved, f"optimizer/{i}/", device)
        if "step" in tensors and not (group.get("fused") or group.get("capturable")):
            tensors["step"] = tensors["step"].cpu()  # where the plain AdamW counts
        if tensors or plain[i]:
            optimizer.state[parameter] = dict(plain[i]) | tensors


def _under(saved, prefix, device):
    return {n.removeprefix(prefix): t.to(device) for n, t in saved.items() if n.startswith(prefix)}
