"""minipeft: parameter-efficient fine-tuning and compression of a GPT.

One readable file per technique; README.md says in which order to read them. Names are looked up
when they are first used, so that `import minipeft` is quick.
"""

import importlib

from minipeft.technique import WHERE as _TECHNIQUES

__version__ = "0.1.0"

_NAMES = _TECHNIQUES | {
    "GPT": "minipeft.gpt",
    "GPTConfig": "minipeft.gpt",
    "Tokenizer": "minipeft.tokenizer",
    "generate": "minipeft.decoding",
    "save_adapter": "minipeft.checkpoint",
    "load_adapter": "minipeft.checkpoint",
    "combine": "minipeft.low_rank.multi_lora",
    "use_adapters": "minipeft.low_rank.multi_lora",
    "after_step": "minipeft.technique",
    "detach": "minipeft.technique",
    "disabled": "minipeft.technique",
    "extra_loss": "minipeft.technique",
    "follow": "minipeft.technique",
    "merge": "minipeft.technique",
    "merged": "minipeft.technique",
    "prune_heads": "minipeft.compressed.structured_pruning",
    "prune_neurons": "minipeft.compressed.structured_pruning",
    "report": "minipeft.technique",
    "set_adapter": "minipeft.technique",
}

__all__ = ["__version__", *_NAMES]


def __getattr__(name):
    if name not in _NAMES:
        raise AttributeError(f"module 'minipeft' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)


def __dir__():
    return __all__
