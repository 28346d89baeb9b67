r"""Full fine-tuning, and its oldest economy: train the top layers only.

Every other technique in this folder of techniques is measured against the first of these two.

    (Full 1)   theta' = theta + delta,   delta in R^|theta|         every parameter moves
    (Full 2)   delta_i = 0 for every block below the last n         transfer learning

Full fine-tuning trains V D + C D + L (12 D^2 + 13 D) + 2 D parameters (d_ff = 4 D), and AdamW keeps
two more numbers for each: weights, gradients and optimizer take 16 bytes a parameter in float32.
The top n layers are n (12 D^2 + 13 D); the embedding, the head and the final LayerNorm stay.

Initialisation: the trained tensors start as clones of the base's, so the model at the start is the
base, bitwise. The originals are kept (4 bytes a parameter more), which is what makes `detach`
exact; `keep_original=False` trains the base itself, and then `detach` is an error that says so.

Reduces to: TopLayers(n_layer) is full fine-tuning without the embeddings and the last LayerNorm.
Diff pruning with every gate open is full fine-tuning.

How this differs from the libraries: they set requires_grad and change the base for good.

Footguns: the head shares the embedding's weight, so one clone must stand in both places; a
learning rate that suits LoRA ruins full fine-tuning (and the other way round).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minipeft import wrap
from minipeft.technique import Technique


def train_parameters(model, attachment, chosen, keep_original=True):
    """Put trainable clones in place of the base parameters for which chosen(logical name) holds.

    A parameter that stands in several places (the tied head) gets one clone for all of them.
    """
    clones = {}
    if not keep_original:
        from minipeft.checkpoint import fingerprint

        attachment.state["cannot_detach"] = "it trained the base itself (keep_original=False)"
        attachment.state["base"] = fingerprint(model)  # afterwards nobody can tell any more
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        path = wrap.logical_name(name)
        if not chosen(path) or not is_base_parameter(model, path, parameter):
            continue
        if not keep_original:
            clones[parameter] = parameter
            attachment.thaw(parameter)
        if parameter in clones:
            attachment.replace(model, path, clones[parameter])
        else:
            clones[parameter] = attachment.replace(model, path)


def is_base_parameter(model, path, parameter):
    """Whether a parameter belongs to the base at this path, and not to a wrapper on it."""
    try:
        return wrap.resolve(model, path) is parameter
    except ValueError:
        return False


def block_size(config):
    """Parameters of one block."""
    D, W = config.d_model, config.ff_width
    return 4 * (D * D + D) + (D * W + W) + (W * D + D) + 4 * D


@dataclass(frozen=True)
class FullFineTuning(Technique):
    """Train every parameter. (Full 1)

    keep_original: keep the base beside the trained clones, so that `detach` can give it back.
    """

    keep_original: bool = True

    learning_rate: ClassVar[float] = 1e-3

    def install(self, model, attachment):
        train_parameters(model, attachment, lambda path: True, self.keep_original)

    def count(self, config):
        D = config.d_model
        embeddings = (config.vocab_size + config.context_length) * D
        return embeddings + config.n_layer * block_size(config) + 2 * D


@dataclass(frozen=True)
class TopLayers(Technique):
    """Train the last `layers` blocks and nothing else: transfer learning. (Full 2)

    layers: how many blocks, counted from the head.
    """

    layers: int = 2

    learning_rate: ClassVar[float] = 1e-3

    def check(self, config):
        if not 1 <= self.layers <= config.n_layer:
            raise ValueError(f"layers={self.layers} must be from 1 to n_layer={config.n_layer}")

    def install(self, model, attachment):
        first = len(model.blocks) - self.layers
        top = tuple(f"blocks.{n}." for n in range(first, len(model.blocks)))
        train_parameters(model, attachment, lambda path: path.startswith(top))

    def count(self, config):
        return self.layers * block_size(config)
