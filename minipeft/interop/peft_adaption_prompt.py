r"""LLaMA-Adapter in peft's format, where it is called adaption prompt.

    h.N.attn.adaption_prompt    (1, p, D)    blocks.N.attn.prompt (p, D)
    h.N.attn.adaption_gate      (1,)         blocks.N.attn.gate   (1,)

for the N of the `adapter_layers` upper layers. Only variant="peft_gpt2" computes what peft computes
on GPT-2; the paper's variant keeps the files of minipeft's own.

How this differs from peft: a missing layer or an unknown tensor is an error that names it.

Footguns: `adapter_layers` counts from the top, the N in the tensors' names from the bottom.
"""

from __future__ import annotations

from minipeft.additive.llama_adapter import LLaMAAdapter

PROMPT, GATE = "attn.adaption_prompt", "attn.adaption_gate"
SETTINGS = {"adapter_len", "adapter_layers", "target_modules"}


def llama_adapter_to_peft(attachment, model):
    """(config, tensors); None for the paper's variant."""
    from minipeft.interop import peft  # which lists this file's functions

    technique = attachment.technique
    if technique.variant != "peft_gpt2":
        return None
    config = {
        "peft_type": "ADAPTION_PROMPT",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": "attn",
        "adapter_len": technique.prompt_length,
        "adapter_layers": len(technique.numbers(len(model.blocks))),
    }
    tensors = {}
    for swap in attachment.swaps:
        start = f"{peft.WITH_HEAD}h.{swap.path.split('.')[1]}."
        tensors[start + PROMPT] = swap.replacement.prompt.detach()[None]
        tensors[start + GATE] = swap.replacement.gate.detach()
    return config, tensors


def llama_adapter_from_peft(config, tensors, model, technique=None):
    """The technique, in peft's variant, and its tensors."""
    from minipeft.interop import peft

    technique = technique or llama_adapter_from_config(config, model.config)
    technique.check(model.config)
    prefix, p, D = peft.prefix_of(tensors), technique.prompt_length, model.config.d_model
    layers = technique.numbers(model.config.n_layer)
    shapes = {f"{prefix}h.{n}.{PROMPT}": (1, p, D) for n in layers}
    shapes |= {f"{prefix}h.{n}.{GATE}": (1,) for n in layers}
    peft.check_tensors(tensors, shapes)
    logical = {}
    for n in layers:
        logical[f"blocks.{n}.attn.prompt"] = tensors[f"{prefix}h.{n}.{PROMPT}"][0]
        logical[f"blocks.{n}.attn.gate"] = tensors[f"{prefix}h.{n}.{GATE}"]
    return technique, logical


def llama_adapter_from_config(config, shape):
    """The LLaMAAdapter that a config of peft's asks for on a GPT of this `shape` (a GPTConfig).

    Raises ValueError naming a setting that is missing or that we do not have.
    """
    from minipeft.interop import peft

    for key, value in config.items():
        if key not in peft.DESCRIPTIVE | SETTINGS and value:
            raise ValueError(f"{key}={value!r} is not supported here")
    if config.get("target_modules") not in (None, "attn"):
        raise ValueError(
            f"target_modules={config['target_modules']!r}: adaption prompts go to GPT-2's 'attn'"
        )
    for key in ("adapter_len", "adapter_layers"):
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{key}={value!r} in the config is no positive number")
    layers = config["adapter_layers"]
    layers = None if layers == shape.n_layer else layers
    return LLaMAAdapter(config["adapter_len"], layers, "peft_gpt2")
