r"""LayerNorm tuning: train the LayerNorms and nothing else (Zhao et al., 2023, arXiv 2312.11420).

    (LayerNorm 1)   LN(x) = (g + delta_g) * (x - mean(x)) / std(x) + (c + delta_c)     g, c in R^D

A gain rescales each coordinate of what a sub-layer reads, a bias shifts it: BitFit's delta_c and a
diagonal rescaling in front of q, k, v and up at once.

Trained parameters: two LayerNorms a block and one at the end, 2 D each: 4 D L + 2 D.

    gains, biases    clones of the base's, so the model at the start is the base, bitwise

Reduces to: with the biases alone, the LayerNorm part of BitFit. With the gains alone, a diagonal
matrix in front of each projection that reads the LayerNorm (IA3 scales behind k and v instead).

How this differs from peft's LN_TUNING: the same tensors; there the base is copied per module.

Footguns: weight decay pulls gains to 0, where they should be pulled to 1: leave it off.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minipeft.selective.full import train_parameters
from minipeft.technique import Technique


@dataclass(frozen=True)
class LayerNormTuning(Technique):
    """Train every LayerNorm's gain and bias. (LayerNorm 1)"""

    learning_rate: ClassVar[float] = 1.5e-2

    def install(self, model, attachment):
        train_parameters(model, attachment, lambda path: path.split(".")[-2].startswith("ln_"))

    def count(self, config):
        return 4 * config.d_model * config.n_layer + 2 * config.d_model
