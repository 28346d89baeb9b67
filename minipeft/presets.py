"""The techniques as a comparison names them: settings that suit the shipped base, and their rates.

One learning rate a technique, the same on every task; they come from short sweeps on validation
examples. A technique's own default (`learning_rate`) serves its default settings; a preset with
other settings may carry another.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipeft.low_rank.lora import LoRA
from minipeft.selective.bitfit import BitFit
from minipeft.selective.full import FullFineTuning, TopLayers
from minipeft.selective.layer_norm import LayerNormTuning
from minipeft.technique import Technique

EVERY = ("q", "k", "v", "o", "up", "down")


@dataclass(frozen=True)
class Preset:
    """A technique and the peak learning rate to train it with (None: the technique's own)."""

    technique: Technique
    learning_rate: float | None = None

    @property
    def rate(self):
        return self.learning_rate or self.technique.learning_rate


PRESETS = {
    "full": Preset(FullFineTuning()),
    "top 2 layers": Preset(TopLayers(layers=2)),
    "BitFit": Preset(BitFit()),
    "LayerNorms": Preset(LayerNormTuning()),
    "LoRA": Preset(LoRA(rank=8, alpha=16)),
    "LoRA all": Preset(LoRA(rank=8, alpha=16, targets=EVERY), 3e-3),
}
