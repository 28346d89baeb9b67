"""What the contract is checked on. To add a technique:

1. CASES: one line per interesting setting, `"Name variant": Name(...)`. The tiny model has 2
   blocks, 4 heads, width 32, 97 words, context 64 (tests/tiny.py). Test names contain the case
   name: `pytest tests/contract -k "LoRA"`.
2. GRADCHECKS: for every differentiable function of the file, `"file.function": lambda: (function,
   inputs)` with small float64 inputs; only inputs with requires_grad are differentiated.
3. EXEMPTIONS / DEAD_TENSORS: only where a point cannot hold; with the reason and the test that
   stands in for it. A test fails when an exemption is not needed or its test does not exist.
4. PREPARE: for a case that needs something on the model before it is attached.
"""

from __future__ import annotations

import torch

from minipeft import BitFit, FullFineTuning, Head, LayerNormTuning, LoRA, TopLayers
from minipeft.low_rank import lora

CASES = {
    "FullFineTuning": FullFineTuning(),
    "FullFineTuning in place": FullFineTuning(keep_original=False),
    "TopLayers": TopLayers(layers=1),
    "BitFit": BitFit(),
    "BitFit query intermediate": BitFit(biases=("query", "intermediate")),
    "LayerNormTuning": LayerNormTuning(),
    "LoRA": LoRA(rank=3, alpha=5, targets=("q", "v")),
    "LoRA all": LoRA(rank=4, alpha=6, targets=("q", "k", "v", "o", "up", "down")),
    "LoRA shared qkv": LoRA(rank=4, alpha=7, targets=("q", "k", "v", "up"), share_qkv=True),
    "LoRA rank stabilized": LoRA(rank=5, alpha=6, targets=("v", "down"), rank_stabilized=True),
    "LoRA dropout": LoRA(rank=3, alpha=6, dropout=0.2, targets=("q", "up")),
    "Head": Head(num_labels=5),
    "Head per token": Head(num_labels=5, per_token=True),
}

# Case name -> function(model) that runs before the technique is attached.
PREPARE = {}

# (technique or case, point) -> (why it cannot hold, the test that stands in for it)
EXEMPTIONS = {
    ("FullFineTuning in place", 2): (
        "told not to keep the original, it trains the base itself",
        "tests/test_full.py::test_without_the_original_the_base_itself_is_trained",
    ),
    ("FullFineTuning in place", 5): (
        "there is no original to give back; detach and disabled are errors that say so",
        "tests/test_full.py::test_without_the_original_detach_is_an_error_that_says_so",
    ),
    ("Head", 1): (
        "a classifier replaces the language-model head; what it reads is unchanged",
        "tests/test_head.py::test_the_features_are_the_base_s",
    ),
}

# technique or case -> (ending of the tensor's name, why it gets no gradient, what shows it)
DEAD_TENSORS = {
    "FullFineTuning": (
        "attn.k.bias",
        "the key's bias adds one number to every score of a query; softmax ignores it",
        "tests/test_bitfit.py::test_the_key_bias_changes_nothing",
    ),
    "TopLayers": (
        "attn.k.bias",
        "as in full fine-tuning",
        "tests/test_bitfit.py::test_the_key_bias_changes_nothing",
    ),
    "BitFit": (
        "attn.k.bias",
        "as in full fine-tuning",
        "tests/test_bitfit.py::test_the_key_bias_changes_nothing",
    ),
}


def normal(*shape, seed=0):
    """A float64 input that is differentiated."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


GRADCHECKS = {
    "lora.lora_delta": lambda: (lora.lora_delta, (normal(2, 3), normal(4, 2), 0.7)),
    "lora.lora_forward": lambda: (
        lora.lora_forward,
        (normal(2, 3, 5), normal(2, 3, 4), normal(2, 4), normal(5, 2), 1.3),
    ),
}

# File -> why it has no differentiable function of its own to put into GRADCHECKS.
NO_FUNCTIONS = {
    "full": "it trains the model's own tensors",
    "bitfit": "it trains the model's own tensors",
    "layer_norm": "it trains the model's own tensors",
    "head": "one nn.Linear's arithmetic, checked as part of the model by point 9",
}
