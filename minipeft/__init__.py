"""minipeft: parameter-efficient fine-tuning and compression of a GPT, one readable file per technique."""

from minipeft.gpt import GPT, GPTConfig

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "__version__"]
