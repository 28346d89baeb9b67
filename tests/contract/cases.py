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

from dataclasses import replace

import torch

from minipeft import (
    IA3,
    QAT,
    AdaLoRA,
    Adapter,
    AdapterDrop,
    AdapterFusion,
    BitFit,
    DiffPruning,
    FullFineTuning,
    Head,
    LayerNormTuning,
    LLaMAAdapter,
    LoRA,
    MAMAdapter,
    ModeApproximation,
    PrefixTuning,
    PromptTuning,
    PTuning,
    PTuningV2,
    QLoRA,
    TopLayers,
    UniPELT,
)
from minipeft.additive import adapter_fusion, bottleneck, ia3, llama_adapter
from minipeft.hybrid import gates, unipelt
from minipeft.low_rank import adalora, lora, mode_approximation, rank_allocator
from minipeft.quantized import nf4, nf4_linear, qlora
from minipeft.selective import diff_pruning
from minipeft.soft_prompt import p_tuning, prefix_attention, prefix_tuning, prompt_tuning

# A fusion of adapters whose up-projections are zero would have nothing to choose from.
FRESH_ADAPTER = Adapter(placement="pfeiffer", bottleneck=4, init="normal")

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
    "QLoRA": QLoRA(rank=4, alpha=7),
    "QLoRA on floats": QLoRA(rank=3, targets=("q", "down"), double_quant=False, block_size=32),
    "QLoRA keeping floats": QLoRA(rank=3, dropout=0.2, share_qkv=True, keep_original=True),
    "Adapter houlsby": Adapter(bottleneck=5),
    "Adapter pfeiffer": Adapter(placement="pfeiffer", bottleneck=5, activation="swish"),
    "Adapter parallel": Adapter(placement="parallel", bottleneck=5, scale=4.0),
    "Adapter parallel attention": Adapter(
        placement="parallel", on="attn", bottleneck=5, own_norm=True, dropout=0.1
    ),
    "Adapter houlsby of adapters": Adapter(variant="adapters", bottleneck=5),
    "Adapter pfeiffer of adapters": Adapter(
        placement="pfeiffer", variant="adapters", bottleneck=5, init="lora"
    ),
    "Adapter parallel of adapters": Adapter(
        placement="parallel", variant="adapters", bottleneck=5, scale=4.0
    ),
    "AdapterFusion": AdapterFusion(
        adapters=[FRESH_ADAPTER, replace(FRESH_ADAPTER, bottleneck=3, activation="swish")]
    ),
    "AdapterFusion parallel": AdapterFusion(
        adapters=[replace(FRESH_ADAPTER, placement="parallel", scale=2.0)] * 3, penalty=0.0
    ),
    "AdapterDrop": AdapterDrop(bottleneck=5, drop=1),
    "AdapterDrop robust": AdapterDrop(bottleneck=5, drop=1, robust=True),
    "IA3": IA3(),
    "IA3 all": IA3(targets=("q", "k", "v", "o", "up", "down"), feedforward=("up", "down")),
    "LLaMAAdapter": LLaMAAdapter(prompt_length=5),
    "LLaMAAdapter upper layer": LLaMAAdapter(prompt_length=1, layers=1),
    "LLaMAAdapter of peft": LLaMAAdapter(prompt_length=5, variant="peft_gpt2"),
    "AdaLoRA": AdaLoRA(init_rank=5, target_rank=3, alpha=7, targets=("q", "v", "down")),
    "AdaLoRA shared qkv": AdaLoRA(
        init_rank=4, target_rank=2, targets=("q", "k", "v", "up"), share_qkv=True, penalty="paper"
    ),
    "AdaLoRA dropout": AdaLoRA(init_rank=3, target_rank=3, targets=("k", "o"), dropout=0.2),
    "ModeApproximation": ModeApproximation(rank=5),
    "ModeApproximation down": ModeApproximation(rank=33, targets=("down",)),
    "DiffPruning": DiffPruning(sparsity=0.05, gate_speed=1.0),
    "DiffPruning unstructured": DiffPruning(
        sparsity=0.1, structured=False, fix_at=1.0, gate_speed=1.0
    ),
    "QAT": QAT(bits=4),
    "QAT groups": QAT(bits=3, group_size=4, targets=("q", "down"), learn_scale=False),
    "Head": Head(num_labels=5),
    "Head per token": Head(num_labels=5, per_token=True),
    "PromptTuning": PromptTuning(prompt_length=5),
    "PromptTuning text": PromptTuning(prompt_length=4, init="text", text=(7, 11, 13)),
    "PromptTuning labels": PromptTuning(prompt_length=5, init="labels", labels=((3, 8), (9,))),
    "PromptTuning random": PromptTuning(prompt_length=1, init="random", words=(1, 5)),
    "PTuning": PTuning(template=(3, 3, 3), encoder="lstm"),
    "PTuning mlp": PTuning(template=(4,), encoder="mlp", hidden=7),
    "PTuning lstm+mlp": PTuning(template=(2, 0, 3), encoder="lstm+mlp", hidden=5, layers=1),
    "PTuning table": PTuning(template=(3, 1), encoder="table"),
    "PrefixTuning": PrefixTuning(prefix_length=5, bottleneck=7),
    "PrefixTuning flat": PrefixTuning(prefix_length=3, reparameterize=False, dropout=0.1),
    "PrefixTuning zero": PrefixTuning(prefix_length=3, reparameterize=False, init="zero"),
    "PrefixTuning text": PrefixTuning(
        prefix_length=4, reparameterize=False, init="text", text=(7, 11, 13)
    ),
    "PrefixTuning infix": PrefixTuning(
        prefix_length=3, bottleneck=6, placement="infix", infix_after=4
    ),
    "PrefixTuning embedding": PrefixTuning(prefix_length=3, bottleneck=6, placement="embedding"),
    "PTuningV2": PTuningV2(prompt_length=5),
    "PTuningV2 one layer": PTuningV2(prompt_length=3, layers=(1,), dropout=0.1),
    "MAMAdapter": MAMAdapter(prefix_length=3, bottleneck=5, prefix_bottleneck=6),
    "MAMAdapter flat": MAMAdapter(
        prefix_length=3, bottleneck=4, scale=2.0, reparameterize=False, dropout=0.1
    ),
    "MAMAdapter without prefix": MAMAdapter(prefix_length=0, bottleneck=5),
    "UniPELT": UniPELT(rank=3, prefix_length=4, bottleneck=5, prefix_bottleneck=6),
    "UniPELT flat": UniPELT(rank=0, prefix_length=3, bottleneck=4, reparameterize=False),
    "UniPELT without prefix": UniPELT(rank=3, prefix_length=0, bottleneck=5),
    "UniPELT sequence": UniPELT(
        rank=2, prefix_length=3, bottleneck=4, prefix_bottleneck=5, gate_over="sequence"
    ),
}


def frozen_classifier(model):
    """A classifier that is part of the base, as far as the case is concerned: always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        Head(num_labels=5).attach(model, name="classifier")
    model.head.requires_grad_(False)


# Case name -> function(model) that runs before the technique is attached.
PREPARE = {"QLoRA": qlora.quantize_model, "UniPELT sequence": frozen_classifier}

# (technique or case, point) -> (why it cannot hold, the test that stands in for it)
EXEMPTIONS = {
    ("Adapter houlsby", 1): (
        "Houlsby's adapters start near 0, not at 0: truncated normal weights of 1e-3",
        "tests/test_adapter.py::test_houlsby_starts_near_the_base",
    ),
    ("Adapter houlsby of adapters", 1): (
        "that library's weights start at N(0, 0.02^2)",
        "tests/test_adapter.py::test_with_the_up_projection_at_zero_it_is_the_base_bitwise",
    ),
    ("AdapterFusion", 1): (
        "it starts as the mean of its adapters, not as the base",
        "tests/test_adapter_fusion.py::test_over_adapters_that_give_nothing_it_is_the_base",
    ),
    ("AdapterDrop robust", 4): (
        "an adapter that is left out of the two steps has no gradient in them",
        "tests/test_adapter_drop.py::test_robust_gives_every_adapter_a_gradient_in_time",
    ),
    ("FullFineTuning in place", 2): (
        "told not to keep the original, it trains the base itself",
        "tests/test_full.py::test_without_the_original_the_base_itself_is_trained",
    ),
    ("FullFineTuning in place", 5): (
        "there is no original to give back; detach and disabled are errors that say so",
        "tests/test_full.py::test_without_the_original_detach_is_an_error_that_says_so",
    ),
    ("QLoRA on floats", 1): (
        "attaching quantises: its base is the quantised model",
        "tests/test_qlora.py::test_it_starts_as_the_quantised_base_bitwise",
    ),
    ("QLoRA keeping floats", 1): (
        "as above",
        "tests/test_qlora.py::test_it_starts_as_the_quantised_base_bitwise",
    ),
    ("QLoRA on floats", 5): (
        "the floats are gone; what it gives back is the quantised base",
        "tests/test_qlora.py::test_detach_and_disabled_give_the_quantised_base",
    ),
    ("QAT", 1): (
        "it starts as the base rounded to few bits",
        "tests/test_qat.py::test_it_starts_as_the_rounded_base",
    ),
    ("QAT", 9): (
        "a straight-through gradient is not the derivative of a staircase, which is 0",
        "tests/test_qat.py::test_value_and_gradient_are_torch_s_bitwise",
    ),
    ("Head", 1): (
        "a classifier replaces the language-model head; what it reads is unchanged",
        "tests/test_head.py::test_the_features_are_the_base_s",
    ),
    ("PromptTuning", 1): (
        "its rows are input the base has not had; it is the base behind these rows",
        "tests/test_prompt_tuning.py::test_it_is_the_base_over_concatenated_embeddings",
    ),
    ("PTuning", 1): (
        "as prompt tuning",
        "tests/test_p_tuning.py::test_it_is_the_base_over_concatenated_embeddings",
    ),
    ("PrefixTuning", 1): (
        "the prefix takes part of the attention, also when it is zero",
        "tests/test_prefix_tuning.py::test_the_model_is_attention_over_concatenated_keys_and_values",
    ),
    ("MAMAdapter", 1): (
        "its prefix takes part of the attention; without one it starts as the base",
        "tests/test_mam_adapter.py::test_without_a_prefix_it_starts_as_the_base",
    ),
    ("UniPELT", 1): (
        "its prefix takes part of the attention; without one it starts as the base",
        "tests/test_unipelt.py::test_without_a_prefix_it_starts_as_the_base",
    ),
    ("UniPELT sequence", 10): (
        "a gate over the whole row cannot be known token by token, so a cache is an error",
        "tests/test_unipelt.py::test_a_padded_row_has_the_whole_row_gate_it_has_alone",
    ),
    ("UniPELT sequence", 13): (
        "that gate is for classifiers, and sees the whole row on purpose",
        "tests/test_unipelt.py::test_the_whole_row_gate_needs_a_classifier",
    ),
    ("PTuningV2", 1): (
        "as prefix tuning",
        "tests/test_p_tuning_v2.py::test_it_is_prefix_tuning_without_the_mlp",
    ),
}

# technique or case -> (ending of the tensor's name, why it gets no gradient, what shows it)
DEAD_TENSORS = {
    "AdapterFusion": (
        "adapter.key.bias",
        "it adds one number to the scores of all adapters; softmax ignores it",
        "tests/test_adapter_fusion.py::test_the_key_bias_changes_nothing",
    ),
    "FullFineTuning": (
        "attn.k.bias",
        "the key's bias adds one number to every score of a query; softmax ignores it",
        "tests/test_bitfit.py::test_the_key_bias_changes_nothing",
    ),
    "DiffPruning": (
        "attn.k.change.bias.w",
        "as in full fine-tuning",
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
    "diff_pruning.drawn_gates": lambda: (  # between the kinks of the clamp
        diff_pruning.drawn_gates,
        (0.2 * normal(5), torch.linspace(0.35, 0.6, 5, dtype=torch.float64)),
    ),
    "diff_pruning.expected_gates": lambda: (
        diff_pruning.expected_gates,
        ((0.1 * normal(5)).abs().add(0.1),),
    ),
    "diff_pruning.open_probability": lambda: (diff_pruning.open_probability, (normal(5),)),
    "ia3.rescale": lambda: (ia3.rescale, (normal(2, 3, 5), normal(5, seed=1))),
    "ia3.rescaled_rows": lambda: (
        ia3.rescaled_rows,
        (normal(4, 3), normal(4, seed=1), normal(4, seed=2)),
    ),
    "ia3.rescaled_columns": lambda: (
        ia3.rescaled_columns,
        (normal(4, 3), normal(4, seed=1), normal(3, seed=2)),
    ),
    "adalora.paper_penalty": lambda: (
        lambda P, Q: adalora.paper_penalty([(P, Q, torch.ones(3, dtype=torch.bool))]),
        (normal(5, 3), normal(3, 4)),
    ),
    "adalora.peft_penalty": lambda: (
        lambda P, Q: adalora.peft_penalty([(P, Q, torch.tensor([True, False, True]))]),
        (normal(5, 3), normal(3, 4)),
    ),
    "rank_allocator.triplet_scores": lambda: (
        rank_allocator.triplet_scores,
        (normal(5, 3), normal(3), normal(3, 4)),
    ),
    "rank_allocator.sensitivity": lambda: (
        rank_allocator.sensitivity,
        (normal(3, 2), normal(3, 2, seed=1)),
    ),
    "mode_approximation.cp_tensor": lambda: (
        lambda weights, *factors: mode_approximation.cp_tensor(weights, factors),
        (normal(2), normal(3, 2, seed=1), normal(4, 2, seed=2), normal(2, 2, seed=3)),
    ),
    "mode_approximation.tucker_tensor": lambda: (
        lambda core, *factors: mode_approximation.tucker_tensor(core, factors),
        (normal(2, 1, 2), normal(3, 2, seed=1), normal(4, 1, seed=2), normal(2, 2, seed=3)),
    ),
    "mode_approximation.mode_product": lambda: (
        lambda T, M: mode_approximation.mode_product(T, M, 1),
        (normal(2, 3, 4), normal(5, 3, seed=1)),
    ),
    "mode_approximation.khatri_rao": lambda: (
        mode_approximation.khatri_rao,
        (normal(2, 3), normal(4, 3, seed=1)),
    ),
    "rank_allocator.smooth": lambda: (
        rank_allocator.smooth,
        (normal(4), normal(4, seed=1), normal(4, seed=2), 0.8, 0.9),
    ),
    "bottleneck.add_bottleneck": lambda: (
        lambda *inputs: bottleneck.add_bottleneck(*inputs, activation="gelu", scale=1.7),
        (normal(2, 5, seed=1), normal(2, 5), normal(3, 5), normal(3), normal(5, 3), normal(5)),
    ),
    "llama_adapter.prompt_attention": lambda: (
        llama_adapter.prompt_attention,
        (normal(2, 2, 3, 4), normal(1, 2, 5, 4, seed=1), normal(1, 2, 5, 4, seed=2)),
    ),
    "gates.token_gates": lambda: (
        gates.token_gates,
        (normal(2, 3, 4), normal(1, 4), normal(1, seed=1)),
    ),
    "gates.running_mean": lambda: (
        lambda g, total: gates.running_mean(g, total, 4),
        (normal(2, 3), normal(2, 1, seed=1)),
    ),
    "gates.sequence_mean": lambda: (
        gates.sequence_mean,
        (normal(2, 3), torch.tensor([2, 3])),
    ),
    "unipelt.gated_lora": lambda: (
        unipelt.gated_lora,
        (normal(2, 3, 5), normal(2, 3, 4), normal(2, 4), normal(5, 2), normal(2, 3)),
    ),
    "unipelt.doubled": lambda: (
        unipelt.doubled,
        (
            *(normal(1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)),
            *(normal(2, 1, 2, 2, 4, seed=2), normal(1, 1, 3, 1, seed=3)),
        ),
    ),
    "unipelt.halves": lambda: (unipelt.halves, (normal(1, 2, 3, 8), normal(1, 1, 3, 1))),
    "adapter_fusion.fuse": lambda: (
        adapter_fusion.fuse,
        (
            *(normal(2, 4), normal(2, 3, 4), normal(4, 4), normal(4), normal(4, 4, seed=1)),
            *(normal(4, seed=2), normal(4, 4, seed=3)),
        ),
    ),
    "adapter_fusion.value_penalty": lambda: (adapter_fusion.value_penalty, (normal(4, 4),)),
    "nf4_linear.frozen_linear": lambda: (
        lambda x, b: nf4_linear.frozen_linear(x, nf4.quantize_nf4(normal(5, 8, seed=3), 16), b),
        (normal(2, 3, 8), normal(5, seed=1)),
    ),
    "lora.lora_delta": lambda: (lora.lora_delta, (normal(2, 3), normal(4, 2), 0.7)),
    "lora.lora_forward": lambda: (
        lora.lora_forward,
        (normal(2, 3, 5), normal(2, 3, 4), normal(2, 4), normal(5, 2), 1.3),
    ),
    "prompt_tuning.put_in_front": lambda: (
        prompt_tuning.put_in_front,
        (normal(2, 3, 4), normal(4, 5, 4)),
    ),
    "p_tuning.mlp": lambda: (
        lambda x, v, a, w, b: p_tuning.mlp(x, (v, a), (w, b)),
        (normal(3, 4), normal(5, 4), normal(5, seed=1), normal(2, 5), normal(2, seed=2)),
    ),
    "prefix_tuning.prefix_mlp": lambda: (
        prefix_tuning.prefix_mlp,
        (normal(3, 4), normal(5, 4), normal(5, seed=1), normal(12, 5), normal(12, seed=2)),
    ),
    "prefix_tuning.split_prefix": lambda: (
        lambda table: prefix_tuning.split_prefix(table, 2),
        (normal(3, 12),),
    ),
    "prefix_attention.with_prefix": lambda: (
        prefix_attention.with_prefix,
        (normal(2, 1, 2, 3, 4), normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1)),
    ),
    "prefix_attention.prefix_attention": lambda: (
        prefix_attention.prefix_attention,
        (
            *(normal(1, 2, 5, 4), normal(1, 2, 5, 4, seed=1), normal(1, 2, 5, 4, seed=2)),
            normal(2, 1, 2, 3, 4, seed=3),
        ),
    ),
    "prefix_tuning.prefix_mass": lambda: (
        prefix_tuning.prefix_mass,
        (normal(3, 4), normal(5, 4, seed=1), normal(2, 4, seed=2)),
    ),
}

# File -> why it has no differentiable function of its own to put into GRADCHECKS.
NO_FUNCTIONS = {
    "adapter": "what it computes is bottleneck's",
    "adapter_drop": "what it computes is adapter's",
    "full": "it trains the model's own tensors",
    "bitfit": "it trains the model's own tensors",
    "layer_norm": "it trains the model's own tensors",
    "qat": "its gradient is by design not its derivative; torch's own is the oracle",
    "head": "one nn.Linear's arithmetic, checked as part of the model by point 9",
    "qlora": "its product is nf4_linear's, its branch lora's",
    "mam_adapter": "its halves are prefix_tuning's and adapter's",
    "p_tuning_v2": "its attention is prefix tuning's, its classifier Head's",
}
