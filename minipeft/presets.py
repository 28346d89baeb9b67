"""The techniques as a comparison names them: settings that suit the shipped base, and their rates.

One learning rate a technique, the same on every task; they come from short sweeps on validation
examples. A technique's own default (`learning_rate`) serves its default settings; a preset with
other settings may carry another. Sizes are chosen near one another where the technique has a size:
bottlenecks and prefixes of 16, rank 8.

AdapterFusion is missing because it needs adapters trained on other tasks first; its comparison with
the best single adapter is a study of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from minipeft.additive.adapter import Adapter
from minipeft.additive.adapter_drop import AdapterDrop
from minipeft.additive.ia3 import IA3
from minipeft.additive.llama_adapter import LLaMAAdapter
from minipeft.hybrid.mam_adapter import MAMAdapter
from minipeft.hybrid.unipelt import UniPELT
from minipeft.low_rank.adalora import AdaLoRA
from minipeft.low_rank.lora import LoRA
from minipeft.low_rank.mode_approximation import ModeApproximation
from minipeft.selective.bitfit import BitFit
from minipeft.selective.diff_pruning import DiffPruning
from minipeft.selective.full import FullFineTuning, TopLayers
from minipeft.selective.layer_norm import LayerNormTuning
from minipeft.soft_prompt.p_tuning import PTuning
from minipeft.soft_prompt.p_tuning_v2 import PTuningV2
from minipeft.soft_prompt.prefix_tuning import PrefixTuning
from minipeft.soft_prompt.prompt_tuning import PromptTuning
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
    "diff pruning": Preset(DiffPruning(sparsity=0.005)),
    "LoRA": Preset(LoRA(rank=8, alpha=16)),
    "LoRA all": Preset(LoRA(rank=8, alpha=16, targets=EVERY), 3e-3),
    "AdaLoRA": Preset(AdaLoRA(init_rank=12, target_rank=8)),
    "mode approximation": Preset(ModeApproximation(rank=32)),
    "Houlsby": Preset(Adapter(placement="houlsby", bottleneck=16)),
    "Pfeiffer": Preset(Adapter(placement="pfeiffer", bottleneck=16)),
    "parallel": Preset(Adapter(placement="parallel", bottleneck=16, scale=4.0)),
    "AdapterDrop": Preset(AdapterDrop(drop=1, bottleneck=16)),
    "IA3": Preset(IA3()),
    "LLaMA-Adapter": Preset(LLaMAAdapter(prompt_length=10)),
    "prompt": Preset(PromptTuning(prompt_length=16)),
    "P-tuning": Preset(PTuning(template=(16, 0, 0))),
    "prefix flat": Preset(PrefixTuning(prefix_length=16, reparameterize=False)),
    "prefix MLP": Preset(PrefixTuning(prefix_length=16, bottleneck=256)),
    "P-tuning v2": Preset(PTuningV2(prompt_length=16)),
    "MAM": Preset(MAMAdapter(prefix_length=16, bottleneck=64, prefix_bottleneck=256)),
    "UniPELT": Preset(UniPELT(prefix_length=10, bottleneck=16, prefix_bottleneck=256)),
}
