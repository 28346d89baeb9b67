"""Where one technique is another: each reduction of the field's family tree, as an equality.

Everything is float64 and exact to 1e-12, a few hundred roundings of numbers of order one, unless a
test says otherwise.
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import minipeft
from minipeft import (
    IA3,
    AdaLoRA,
    Adapter,
    AdapterDrop,
    AdapterFusion,
    BitFit,
    DiffPruning,
    FullFineTuning,
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
    dispatch,
    wrap,
)
from minipeft import technique as contract
from minipeft.additive.adapter_drop import dropped
from minipeft.additive.bottleneck import bottleneck
from minipeft.compressed.distillation import distillation_loss
from minipeft.compressed.importance import gated
from minipeft.compressed.lottery_ticket import find_tickets
from minipeft.compressed.sparsegpt import sparsegpt
from minipeft.compressed.wanda import wanda_mask, wanda_scores
from minipeft.gpt import AttentionCore, attention_written_out
from minipeft.low_rank.lora import PROJECTIONS
from minipeft.quantized.adamw_8bit import AdamW8bit
from minipeft.quantized.gptq import dequantize_group, gptq, round_to_nearest
from minipeft.quantized.nf4 import dequantize_nf4, quantize_nf4
from minipeft.quantized.paged_adamw import PagedAdamW
from minipeft.quantized.qlora import dequantize_model, quantize_model
from minipeft.selective.diff_pruning import FIXED, changes_of
from minipeft.soft_prompt.prefix_tuning import PrefixCore
from minipeft.soft_prompt.prompt_tuning import Table, flatten
from tests.tiny import randomize, tiny_ids, tiny_model

EXACT = {"rtol": 0, "atol": 1e-12}


@pytest.fixture
def model():
    return tiny_model()


def layers_of(model):
    """{path: wrapper} of the last attachment."""
    return {s.path: s.replacement for s in contract.attachment_of(model).swaps}


# -- IA3


def test_ia3_at_ones_is_the_base(model):
    before = model(tiny_ids())
    assert torch.equal(IA3().attach(model)(tiny_ids()), before)


def test_ia3_is_a_diagonal_matrix_in_front_of_or_behind_a_projection(model):
    """W' = diag(l) W and b' = l * b for k and v; W_down diag(l) for the feed-forward layer."""
    by_hand = copy.deepcopy(model)
    randomize(IA3().attach(model))
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            linear = minipeft.wrap.resolve(by_hand, path)
            diagonal = torch.diag(layer.l)
            if path.endswith("down"):
                linear.weight.copy_(linear.weight @ diagonal)
            else:
                linear.weight.copy_(diagonal @ linear.weight)
                linear.bias.mul_(layer.l)
    torch.testing.assert_close(model(tiny_ids()), by_hand(tiny_ids()), **EXACT)


# -- AdaLoRA and mode approximation


def test_adalora_with_nothing_switched_off_is_lora(model):
    """B = P, A = diag(E) Q, and alpha / r_0 without the 1e-5 that keeps the ratio finite."""
    lora = LoRA(rank=5, alpha=7 * 5 / (5 + 1e-5)).attach(copy.deepcopy(model))
    randomize(AdaLoRA(init_rank=5, target_rank=5, alpha=7).attach(model))
    with torch.no_grad():
        for path, layer in layers_of(model).items():
            other = layers_of(lora)[path]
            other.B.copy_(layer.P)
            other.A.copy_(layer.E[:, None] * layer.Q)
    torch.testing.assert_close(model(tiny_ids()), lora(tiny_ids()), **EXACT)


def test_adalora_with_the_budget_met_has_exactly_its_target_rank(model):
    technique = AdaLoRA(init_rank=6, target_rank=2, targets=("q", "v", "up", "down"))
    randomize(technique.attach(model))
    ids, steps = tiny_ids(), 6
    for step in range(1, steps + 1):
        model.zero_grad()
        model.loss(ids, ids.roll(-1, 1)).backward()
        contract.after_step(model, step, steps)
    ranks = [int(torch.linalg.matrix_rank(layer.delta())) for layer in layers_of(model).values()]
    assert sum(ranks) == 2 * len(ranks)


def test_mode_approximation_of_a_single_matrix_is_lora():
    """With K = 1: A = U^T and B = V diag(lambda * p)."""
    from minipeft.low_rank.lora import LoRALinear
    from minipeft.low_rank.mode_approximation import ModeLinear

    torch.manual_seed(0)
    linear = torch.nn.Linear(7, 5).double()
    mode, lora = ModeLinear(linear, 3, 1), LoRALinear(linear, 3, 1.0)
    with torch.no_grad():
        mode.factors.V.normal_()
        mode.factors.scale.normal_()
        lora.A.copy_(mode.factors.U.T)
        lora.B.copy_(mode.factors.V * mode.factors.scale * mode.p)
    x = torch.randn(2, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(mode(x), lora(x), **EXACT)


def test_mode_approximation_with_disjoint_mixtures_is_lora_in_every_matrix(model):
    """R = K r outer products, of which each matrix uses its own r."""
    rank, paths = 2, [f"blocks.{n}.attn.{t}" for n in range(2) for t in ("q", "v")]
    lora = randomize(LoRA(rank=rank, alpha=rank).attach(copy.deepcopy(model)))
    ModeApproximation(rank=rank * len(paths), targets=("q", "v")).attach(model)
    factors = layers_of(model)[paths[0]].factors
    with torch.no_grad():
        for k, path in enumerate(paths):
            mine = slice(rank * k, rank * (k + 1))
            factors.U[:, mine] = layers_of(lora)[path].A.T
            factors.V[:, mine] = layers_of(lora)[path].B
            layers_of(model)[path].p.zero_()
            layers_of(model)[path].p[mine] = 1
    torch.testing.assert_close(model(tiny_ids()), lora(tiny_ids()), **EXACT)


# -- diff pruning


@pytest.mark.parametrize("which", ["gate", "group"])
def test_diff_pruning_with_every_gate_shut_is_the_base(model, which):
    before = model(tiny_ids())
    randomize(DiffPruning().attach(model))
    assert not torch.equal(model(tiny_ids()), before)
    with torch.no_grad():
        for change in changes_of(contract.attachment_of(model)).values():
            getattr(change, which).fill_(-FIXED / change.speed)
    assert torch.equal(model(tiny_ids()), before)


def test_diff_pruning_with_every_gate_open_is_full_fine_tuning_of_the_change(model):
    full = randomize(FullFineTuning().attach(copy.deepcopy(model)))
    base = dict(model.named_parameters())
    changed = {n: p.detach() - base[n].detach() for n, p in full.named_parameters()}
    DiffPruning().attach(model)
    with torch.no_grad():
        for path, change in changes_of(contract.attachment_of(model)).items():
            change.w.copy_(changed[path.replace(".change.", ".")])
    torch.testing.assert_close(model(tiny_ids()), full(tiny_ids()), **EXACT)


def test_t_few_of_one_choice_is_the_language_model_loss(model):
    from minipeft.additive.t_few import Example, rows_of, t_few_losses

    rows = rows_of([Example((5, 6, 7), ((8, 9),))])
    total = sum(t_few_losses(model, rows).values())
    torch.testing.assert_close(total, model.loss(rows.ids, rows.labels), **EXACT)


# -- adapters, their fusion, and leaving them out


PFEIFFER = Adapter(placement="pfeiffer", bottleneck=5)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_an_adapter_with_a_zero_up_projection_is_the_base(model, placement):
    before = model(tiny_ids())
    Adapter(placement=placement, bottleneck=5, init="lora").attach(model)
    assert torch.equal(model(tiny_ids()), before)


def test_pfeiffer_is_a_houlsby_pair_without_the_first(model):
    pair = Adapter(bottleneck=5, activation="relu", layer_norms=False).attach(copy.deepcopy(model))
    single = layers_of(randomize(PFEIFFER.attach(model)))
    with torch.no_grad():
        for path, layer in layers_of(randomize(pair)).items():
            if path.endswith("attn"):
                layer.adapter.up.weight.zero_(), layer.adapter.up.bias.zero_()
            else:
                layer.adapter.load_state_dict(single[path].adapter.state_dict())
    torch.testing.assert_close(pair(tiny_ids()), model(tiny_ids()), **EXACT)


def test_lora_is_a_parallel_adapter_on_a_projection_with_nothing_in_between(model):
    by_hand = copy.deepcopy(model)
    lora = randomize(LoRA(rank=3, alpha=5, targets=("q", "down")).attach(model))
    for path, layer in layers_of(lora).items():
        no_bias = torch.zeros(3).double(), torch.zeros(layer.B.shape[0]).double()
        linear = minipeft.wrap.resolve(by_hand, path)
        linear.register_forward_hook(
            lambda module, args, h, layer=layer, no_bias=no_bias: (
                h + bottleneck(args[0], layer.A, no_bias[0], layer.B, no_bias[1], "identity", 5 / 3)
            )
        )
    torch.testing.assert_close(lora(tiny_ids()), by_hand(tiny_ids()), **EXACT)


def test_fusion_over_one_adapter_with_v_the_identity_is_that_adapter(model):
    randomize(PFEIFFER.attach(model, "one"))
    alone = model(tiny_ids())
    AdapterFusion(adapters=["one"]).attach(model, "fusion")
    randomize(model)
    for layer in layers_of(model).values():
        torch.nn.init.eye_(layer.adapter.value.weight)
    torch.testing.assert_close(model(tiny_ids()), alone, **EXACT)


def test_fusion_over_equal_adapters_with_v_the_identity_is_that_adapter(model):
    """Weights that sum to 1 over equal values."""
    randomize(PFEIFFER.attach(model, "one"))
    alone, tensors = model(tiny_ids()), dict(model.attachments[0].tensors())
    minipeft.detach(model)
    three = [{"name": n, "technique": PFEIFFER, "tensors": tensors} for n in "abc"]
    randomize(AdapterFusion(adapters=three).attach(model))
    for layer in layers_of(model).values():
        torch.nn.init.eye_(layer.adapter.value.weight)
    torch.testing.assert_close(model(tiny_ids()), alone, **EXACT)


def test_adapter_drop_of_no_layer_is_the_adapter_and_of_all_layers_is_the_base(model):
    before, ids = model(tiny_ids()), tiny_ids()
    adapter = randomize(PFEIFFER.attach(copy.deepcopy(model)))
    for robust in (False, True):
        none = AdapterDrop(bottleneck=5, drop=0, robust=robust).attach(copy.deepcopy(model))
        none.attachments[0].load(adapter.attachments[0].tensors())
        assert torch.equal(none(ids), adapter(ids))
    with dropped(adapter, 2):
        assert torch.equal(adapter(ids), before)
    assert torch.equal(AdapterDrop(drop=2).attach(model)(ids), before)


# -- soft prompts


def same(a, b):
    torch.testing.assert_close(a, b, **EXACT)


def tables_of(model):
    return [block.attn.core.table.weight for block in model.blocks]


def test_prefix_tuning_is_a_gated_sum_of_two_attentions():
    """attn(q; [P_k; K], [P_v; V]) = (1 - lambda) attn(q; K, V) + lambda attn(q; P_k, P_v), with
    lambda the softmax mass on the prefix. (Prefix 1) (Prefix 3)
    """
    q, K, V = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (1, 7, 7))
    P_k, P_v = torch.randn(2, 2, 3, 5, 4, dtype=torch.float64)
    attn = attention_written_out
    joint = attn(q, torch.cat([P_k, K], 2), torch.cat([P_v, V], 2))
    mass = ((q @ P_k.mT) / 2).exp().sum(-1, keepdim=True)
    mass = mass / (mass + ((q @ K.mT) / 2).exp().sum(-1, keepdim=True))
    same(joint, (1 - mass) * attn(q, K, V) + mass * attn(q, P_k, P_v))
    rows = torch.cat([P_k[0], P_v[0]]).transpose(0, 1).flatten(1)  # (p, 2 H d)
    core = PrefixCore(AttentionCore(), Table(rows), n_head=3)
    same(core(q[:1], K[:1], V[:1]), joint[:1])


def test_a_prefix_of_a_text_s_activations_is_the_base_reading_the_text_first(model):
    """What a text leaves in every layer is a prefix. (Prefix 1)"""
    text = torch.tensor([[5, 17, 3, 41]]).expand(3, -1)
    whole = model(torch.cat([text, tiny_ids()], 1))[:, 4:]
    PrefixTuning(4, reparameterize=False, init="text", text=(5, 17, 3, 41)).attach(model)
    same(model(tiny_ids()), whole)


def test_p_tuning_v2_is_prefix_tuning_without_the_mlp(model):
    """(P-tuning v2 1) is (Prefix 1)."""
    PTuningV2(5).attach(model)
    logits, rows = model(tiny_ids()), [t.detach().clone() for t in tables_of(model)]
    minipeft.detach(model)
    PrefixTuning(5, reparameterize=False).attach(model)
    with torch.no_grad():
        for table, row in zip(tables_of(model), rows, strict=True):
            table.copy_(row)
    same(model(tiny_ids()), logits)


def test_a_trained_reparameterised_prefix_is_its_flattened_table(model):
    """W_l tanh(W' E' + b') + b_l is a table. (Prefix 2)"""
    randomize(PrefixTuning(5, bottleneck=7).attach(model))
    logits = model(tiny_ids())
    flatten(model)
    assert minipeft.report(model).trained == 5 * 2 * 2 * 32
    same(model(tiny_ids()), logits)


def test_prompt_tuning_from_a_text_is_the_base_reading_the_text_first(model):
    """(Prompt 1)"""
    text = torch.tensor([[5, 17, 3, 41]]).expand(3, -1)
    whole = model(torch.cat([text, tiny_ids()], 1))[:, 4:]
    PromptTuning(4, init="text", text=(5, 17, 3, 41)).attach(model)
    same(model(tiny_ids()), whole)


def test_p_tuning_with_a_table_in_front_is_prompt_tuning(model):
    """(P-tuning 1) is (Prompt 1) where all pseudo tokens stand in front."""
    PTuning(template=(5,), encoder="table").attach(model)
    logits, rows = model(tiny_ids()), model.embed.prompt.weight.detach().clone()
    minipeft.detach(model)
    PromptTuning(5).attach(model)
    with torch.no_grad():
        model.embed.prompt.weight.copy_(rows)
    same(model(tiny_ids()), logits)


def test_a_flattened_p_tuning_is_prompt_tuning(model):
    """Whatever encoder it had. (P-tuning 4)"""
    randomize(PTuning(template=(5,), encoder="lstm+mlp", hidden=7).attach(model))
    logits = model(tiny_ids())
    flatten(model)
    rows = model.embed.prompt.weight.detach().clone()
    minipeft.detach(model)
    PromptTuning(5).attach(model)
    with torch.no_grad():
        model.embed.prompt.weight.copy_(rows)
    same(model(tiny_ids()), logits)


# -- LoRA, BitFit, LayerNorms and full fine-tuning


def test_lora_at_b_zero_is_the_base(model):
    before = model(tiny_ids())
    adapted = LoRA(rank=3, targets=("q", "k", "v", "o", "up", "down")).attach(model)
    assert torch.equal(adapted(tiny_ids()), before)


@pytest.mark.parametrize("target", ["q", "up", "down"])
def test_lora_at_full_rank_represents_any_change(model, target):
    """A delta of rank min(in, out), fitted exactly by its singular vectors."""
    LoRA(rank=32, alpha=48, targets=(target,)).attach(model)
    for path, layer in layers_of(model).items():
        wanted = torch.randn(layer.inner.weight.shape, dtype=torch.float64)
        U, S, V = torch.linalg.svd(wanted, full_matrices=False)
        with torch.no_grad():
            layer.B.copy_(U * S / layer.scale)
            layer.A.copy_(V)
        # 32 products of singular vectors up to 10 long
        torch.testing.assert_close(layer.delta(), wanted, rtol=0, atol=1e-12, msg=path)


def test_rank_stabilized_lora_is_lora_at_another_alpha(model):
    """alpha / sqrt(r) is (alpha sqrt(r)) / r."""
    torch.manual_seed(1)
    one = randomize(LoRA(rank=9, alpha=4, rank_stabilized=True).attach(tiny_model()))
    torch.manual_seed(1)
    other = randomize(LoRA(rank=9, alpha=12).attach(tiny_model()))
    torch.testing.assert_close(one(tiny_ids()), other(tiny_ids()), **EXACT)


def test_bitfit_is_a_constant_after_every_projection_and_layer_norm(model):
    """The delta of each bias, added from outside by a hook on an untouched model."""
    plain = tiny_model()
    originals = {n: p.detach().clone() for n, p in model.named_parameters()}
    randomize(BitFit().attach(model), std=0.3)
    for name, parameter in model.attachments[0].parameters().items():
        place, delta = name.removesuffix(".bias"), parameter.detach() - originals[name]
        wrap.resolve(plain, place).register_forward_hook(lambda m, x, y, d=delta: y + d)
    torch.testing.assert_close(model(tiny_ids()), plain(tiny_ids()), **EXACT)


def test_the_biases_of_layer_norm_tuning_are_bitfit_s(model):
    """Gains left at the base's, the same shifts: the same model."""
    norms = LayerNormTuning().attach(tiny_model())
    biases = BitFit(biases=("ln_1", "ln_2", "ln_f")).attach(model)
    shifts = biases.attachments[0].parameters()
    randomize(biases, std=0.3)
    with torch.no_grad():
        for name, parameter in norms.attachments[0].parameters().items():
            if name in shifts:
                parameter.copy_(shifts[name])
    assert torch.equal(norms(tiny_ids()), biases(tiny_ids()))


def test_a_gain_is_a_diagonal_matrix_in_front_of_what_reads_the_layer_norm(model):
    """With gains g' = l g and shifts at 0: W diag(l) for q, k and v behind ln_1."""
    for block in model.blocks:
        torch.nn.init.zeros_(block.ln_1.bias)
    by_hand = copy.deepcopy(model)
    LayerNormTuning().attach(model)
    for block, plain in zip(model.blocks, by_hand.blocks):
        l = 1 + torch.rand(32, dtype=torch.float64)
        with torch.no_grad():
            block.ln_1.weight.mul_(l)
            for name in "qkv":
                getattr(plain.attn, name).weight.mul_(l)
    torch.testing.assert_close(model(tiny_ids()), by_hand(tiny_ids()), **EXACT)


def test_all_top_layers_are_full_fine_tuning_without_the_ends(model):
    """The same tensors but for the embeddings and the last LayerNorm."""
    top = TopLayers(layers=2).attach(tiny_model()).attachments[0].parameters()
    full = FullFineTuning().attach(model).attachments[0].parameters()
    assert set(full) - set(top) == {
        "embed.token.weight",
        "embed.position.weight",
        "ln_f.weight",
        "ln_f.bias",
    }
    assert set(top) < set(full)


def test_concatenated_weighted_loras_are_the_weighted_sum_of_their_deltas(model):
    for seed, (name, rank) in enumerate({"a": 2, "b": 5}.items()):
        LoRA(rank=rank, alpha=3, targets=("q", "down")).attach(model, name=name)
        randomize(model, seed=seed)
    deltas = {name: {} for name in "ab"}
    for attachment in model.attachments:
        for swap in attachment.swaps:
            deltas[attachment.name][swap.path] = swap.replacement.delta().detach()
    minipeft.combine(model, {"a": 0.7, "b": -1.3}, name="ab")
    for swap in contract.attachment_of(model, "ab").swaps:
        wanted = 0.7 * deltas["a"][swap.path] - 1.3 * deltas["b"][swap.path]
        torch.testing.assert_close(swap.replacement.delta(), wanted, **EXACT)


def test_each_row_of_a_mixed_batch_is_its_single_adapter_run(model):
    for seed, name in enumerate("ab"):
        LoRA(rank=2 + seed, targets=("k", "up")).attach(model, name=name)
        randomize(model, seed=seed)
    rows = ["b", None, "a"]
    with minipeft.use_adapters(model, rows=rows):
        mixed = model(tiny_ids())
    for row, name in enumerate(rows):
        minipeft.set_adapter(model, [] if name is None else name)
        alone = model(tiny_ids()[row : row + 1])
        torch.testing.assert_close(mixed[row : row + 1], alone, **EXACT)


# -- LLaMA-Adapter


@pytest.mark.parametrize("variant", ["paper", "peft_gpt2"])
def test_llama_adapter_with_its_gates_at_0_is_the_base_and_only_they_have_a_gradient(
    model, variant
):
    """(LLaMA-Adapter 2) times 0, whatever the prompts are."""
    before = model(tiny_ids())
    randomize(LLaMAAdapter(5, variant=variant).attach(model), 2.0)
    with torch.no_grad():
        for layer in layers_of(model).values():
            layer.gate.zero_()
    assert torch.equal(model(tiny_ids()), before)
    model.loss(tiny_ids(), tiny_ids(seed=2)).backward()
    for layer in layers_of(model).values():
        assert layer.gate.grad.abs().min() > 0
        assert torch.equal(layer.prompt.grad, torch.zeros_like(layer.prompt))


# -- the hybrids


def test_mam_without_a_prefix_is_the_scaled_parallel_adapter(model):
    """(MAM 2) is (Adapter 4)."""
    other = Adapter(placement="parallel", bottleneck=5, scale=4.0).attach(copy.deepcopy(model))
    randomize(MAMAdapter(prefix_length=0, bottleneck=5).attach(model))
    other.attachments[0].load(model.attachments[0].tensors())
    assert torch.equal(model(tiny_ids()), other(tiny_ids()))


def test_mam_with_its_adapter_at_0_is_prefix_tuning(model):
    """(MAM 1) is (Prefix 1), with and without the MLP."""
    for flat in (False, True):
        one, other = copy.deepcopy(model), copy.deepcopy(model)
        randomize(MAMAdapter(4, 5, 4.0, not flat, 6).attach(one))
        PrefixTuning(4, not flat, 6).attach(other)
        tensors = one.attachments[0].tensors()
        other.attachments[0].load({n: t for n, t in tensors.items() if ".adapter." not in n})
        for block in one.blocks:
            torch.nn.init.zeros_(block.mlp.adapter.up.weight)
            torch.nn.init.zeros_(block.mlp.adapter.up.bias)
        assert torch.equal(one(tiny_ids()), other(tiny_ids()))


def set_gates(model, **values):
    """Set every gate of a UniPELT by the name of its part: 1 open, 0 shut, both exactly."""
    for wrapper in model.attachments[-1].wrappers():
        for module in wrapper.modules():
            part = getattr(module, "key", "").rpartition("/")[2]
            if part in values:
                torch.nn.init.zeros_(module.weight)  # the sigmoid of +-1000 is 1 or 0, all bits
                torch.nn.init.constant_(module.bias, 2000.0 * values[part] - 1000.0)


def test_unipelt_with_lora_open_and_the_rest_shut_is_lora_at_alpha_rank(model):
    """(UniPELT 1) is (LoRA 1) with s = 1."""
    lora = LoRA(rank=3, alpha=3).attach(copy.deepcopy(model))
    randomize(UniPELT(rank=3, prefix_length=0, bottleneck=5).attach(model))
    tensors = model.attachments[0].tensors()
    lora.attachments[0].load({n: t for n, t in tensors.items() if n.endswith((".A", ".B"))})
    set_gates(model, q=1, v=1, adapter=0)
    same(model(tiny_ids()), lora(tiny_ids()))


def test_unipelt_with_its_prefix_open_and_the_rest_shut_is_prefix_tuning(model):
    """(UniPELT 2) is (Prefix 1)."""
    prefix = PrefixTuning(4, bottleneck=6).attach(copy.deepcopy(model))
    randomize(UniPELT(3, 4, 5, prefix_bottleneck=6).attach(model))
    tensors = model.attachments[0].tensors()
    prefix.attachments[0].load({n: t for n, t in tensors.items() if ".core.table." in n})
    set_gates(model, q=0, v=0, adapter=0, prefix=1)
    same(model(tiny_ids()), prefix(tiny_ids()))


def test_unipelt_with_its_adapter_open_is_a_pfeiffer_adapter(model):
    """(UniPELT 3) is (Adapter 3)."""
    adapter = PFEIFFER.attach(copy.deepcopy(model))
    randomize(UniPELT(rank=3, prefix_length=0, bottleneck=5).attach(model))
    for path, layer in layers_of(adapter).items():
        layer.adapter.load_state_dict(layers_of(model)[path].adapter.adapter.state_dict())
    set_gates(model, q=0, v=0, adapter=1)
    same(model(tiny_ids()), adapter(tiny_ids()))


def test_unipelt_with_every_gate_shut_is_a_prefix_of_zeros_and_not_the_base(model):
    """p zero keys take softmax mass: lambda = p / (p + sum_j exp(q . K_j / sqrt(d))). (Prefix 3)"""
    before = model(tiny_ids())
    zeros = PrefixTuning(4, reparameterize=False, init="zero").attach(copy.deepcopy(model))
    randomize(UniPELT(3, 4, 5, prefix_bottleneck=6).attach(model))
    set_gates(model, q=0, v=0, adapter=0, prefix=0)
    same(model(tiny_ids()), zeros(tiny_ids()))
    assert (model(tiny_ids()) - before).abs().max() > 1e-3


# -- optimizers with less memory


def trained_tensors(optimizer, size, steps=9):
    """A LoRA's worth of tensors after some steps of an optimizer made by `optimizer(tensors)`."""
    generator = torch.Generator().manual_seed(5)
    shapes = [(size, 7), (7, 47), (3,)]
    tensors = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    stepper = optimizer(tensors)
    for _ in range(steps):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator)
        stepper.step()
    return tensors


@pytest.mark.parametrize("resident_pages", [1, 2, 3, 7, None])
def test_paged_adamw_is_adamw_at_every_budget_of_pages(resident_pages):
    """Bitwise, its default and unfused path. 679 elements are 7 pages of 100."""
    expected = trained_tensors(lambda t: torch.optim.AdamW(t, 0.01), 49)
    found = trained_tensors(
        lambda t: PagedAdamW(t, 0.01, page_size=100, resident_pages=resident_pages), 49
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_8_bit_adamw_at_32_bits_is_adamw():
    """Bitwise: below `min_8bit_size` the moments stay in float32. At 8 bits it is not."""
    expected = trained_tensors(lambda t: torch.optim.AdamW(t, 0.01), 49)
    found = trained_tensors(lambda t: AdamW8bit(t, 0.01, min_8bit_size=1000), 49)
    rounded = trained_tensors(lambda t: AdamW8bit(t, 0.01, min_8bit_size=0), 49)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert not any(torch.equal(a, b) for a, b in zip(rounded[:2], expected))


# -- GPTQ


@pytest.mark.parametrize("group_size", [None, 4])
def test_gptq_with_equal_independent_inputs_is_round_to_nearest(group_size):
    """H proportional to I, at any scale of it. (GPTQ 2) (GPTQ 3)"""
    weight = torch.randn(7, 12, dtype=torch.float64)
    for size in (1e-3, 5.0):
        clever = gptq(weight, size * torch.eye(12).double(), 3, group_size, act_order=True)
        nearest = round_to_nearest(weight, 3, group_size)
        assert torch.equal(dequantize_group(clever), dequantize_group(nearest))


def test_gptq_s_lazy_blocks_are_one_column_at_a_time():
    """(GPTQ 4)"""
    weight, x = torch.randn(7, 12).double(), torch.randn(40, 12).double()
    x = x @ torch.randn(12, 12).double()
    blocks = [
        dequantize_group(gptq(weight, x.T @ x, 3, block_size=n, scale_dtype=torch.float64))
        for n in (1, 5, 12)
    ]
    same(blocks[0], blocks[1]), same(blocks[0], blocks[2])


# -- QLoRA and NF4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_qlora_on_weights_that_are_nf4_already_is_lora(dtype):
    """Bitwise, gradients and training included: levels times an absmax lose nothing. LoRA is taken
    as defined; its faster twin adds in another order.
    """
    targets = tuple(PROJECTIONS)
    base = dequantize_model(quantize_model(tiny_model(dtype=dtype), double_quant=False))
    runs = []
    for technique in (LoRA(rank=3, targets=targets), QLoRA(rank=3, double_quant=False)):
        torch.manual_seed(0)
        model = technique.attach(copy.deepcopy(base)).train()
        optimizer = torch.optim.AdamW(contract.trainable_parameters(model), 0.01)
        for step in range(3):
            optimizer.zero_grad()
            with dispatch.forced("off"):
                model.loss(tiny_ids(seed=step), tiny_ids(seed=step).roll(-1, 1)).backward()
            optimizer.step()
        with dispatch.forced("off"):
            runs.append([*contract.trainable_parameters(model), model(tiny_ids())])
    assert len(runs[0]) == len(runs[1]) == 2 * 12 + 1
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_quantising_what_was_dequantised_is_quantising_once():
    weight = torch.randn(37, 50, generator=torch.Generator().manual_seed(0))
    once = quantize_nf4(weight)
    again = quantize_nf4(dequantize_nf4(once))
    assert torch.equal(once.packed, again.packed) and torch.equal(once.absmax, again.absmax)


def test_constants_cost_half_a_bit_or_an_eighth():
    weight = torch.ones(64, 64 * 256)
    assert quantize_nf4(weight).bits_per_parameter == 4 + 32 / 64 == 4.5
    double = quantize_nf4(weight, double_quant=True).bits_per_parameter
    assert double == 4 + 8 / 64 + 32 / (64 * 256) == 4.126953125


# -- pruning


def test_sparsegpt_with_inputs_alike_is_magnitude_pruning_block_by_block():
    """H proportional to I: every weight costs its square and nothing else need move."""
    generator = torch.Generator().manual_seed(7)
    W = torch.randn(7, 24, generator=generator, dtype=torch.float64)
    pruned, keep = sparsegpt(W, 3.7 * torch.eye(24, dtype=torch.float64), 0.5, block=8)
    for first in (0, 8, 16):
        size = W[:, first : first + 8].abs()
        wanted = size > size.flatten().sort().values[28 - 1]  # half of 7 x 8 go; no two are equal
        assert torch.equal(keep[:, first : first + 8], wanted)
    assert torch.equal(pruned, W * keep)


def test_wanda_with_unit_activations_is_magnitude_pruning_row_by_row():
    generator = torch.Generator().manual_seed(8)
    W = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    mask = wanda_mask(wanda_scores(W, torch.ones(12, dtype=torch.float64)), 0.25)
    for row, kept in zip(W, mask):
        assert torch.equal(kept, row.abs() > row.abs().sort().values[3 - 1])


def test_a_structurally_pruned_model_is_the_masked_model(model):
    gates = {0: torch.tensor([0.0, 1, 1, 0], dtype=torch.float64)}
    neurons = {1: (torch.arange(128) % 2).double()}
    with gated(model, "heads", gates), gated(model, "neurons", neurons):
        masked = model(tiny_ids())
    minipeft.prune_heads(model, {0: [0, 3]})
    minipeft.prune_neurons(model, {1: range(0, 128, 2)})
    torch.testing.assert_close(model(tiny_ids()), masked, **EXACT)


def test_a_lottery_ticket_at_round_0_is_the_dense_initialisation_and_masks_are_nested(model):
    start = copy.deepcopy(model.state_dict())

    def fit(model, after_step):
        began = copy.deepcopy(model.state_dict())
        randomize(model)
        for act in after_step:
            act(model, 1, 1)
        return began

    tickets = find_tickets(model, fit, rounds=2, rate=0.5)
    assert all(torch.equal(tickets[0].outcome[name], start[name]) for name in start)
    for path, mask in tickets[2].masks.items():
        assert torch.equal(mask & tickets[1].masks[path], mask)


# -- distillation


def distilling():
    """(student logits, teacher logits, labels): 5 tokens over 7 words, one label not counting."""
    s, t = torch.randn(2, 5, 7, dtype=torch.float64)
    return s.requires_grad_(), t, torch.tensor([3, -100, 0, 6, 1])


def test_distillation_without_its_soft_part_is_cross_entropy():
    s, t, labels = distilling()
    loss = distillation_loss(s, t, labels, 4.0, 0.0)
    assert torch.equal(loss, F.cross_entropy(s, labels, reduction="sum") / 4)


def test_distillation_from_a_one_hot_teacher_is_cross_entropy():
    """At alpha = 1 and T = 1; a one-hot teacher's logits are 0 and -inf."""
    s, t, labels = distilling()
    right = F.one_hot(labels.clamp(min=0), 7)
    one_hot = torch.zeros_like(t).masked_fill(right == 0, -torch.inf)
    loss = distillation_loss(s, one_hot, labels, 1.0, 1.0)
    torch.testing.assert_close(loss, F.cross_entropy(s, labels), **EXACT)


def test_the_soft_part_s_gradient_is_t_times_the_difference_of_probabilities():
    s, t, labels = distilling()
    (gradient,) = torch.autograd.grad(distillation_loss(s, t, labels, 3.0, 1.0), s)
    wanted = 3 * ((s / 3).softmax(-1) - (t / 3).softmax(-1)) / 4
    wanted[1] = 0
    torch.testing.assert_close(gradient, wanted.detach(), **EXACT)


def test_at_high_temperature_distillation_matches_centred_logits():
    """The distance shrinks as 1 / T: ten times the temperature, a tenth of the error (within a
    tenth, for the next order is another 1 / T smaller).
    """
    s, t, labels = distilling()
    difference = (s - t - (s - t).mean(-1, keepdim=True)).detach() / 7 / 4
    difference[1] = 0
    errors = []
    for temperature in (1e3, 1e4):
        (gradient,) = torch.autograd.grad(distillation_loss(s, t, labels, temperature, 1.0), s)
        errors.append((gradient - difference).abs().max().item())
    assert errors[0] < 1e-3 and errors[0] / errors[1] == pytest.approx(10, rel=0.1)
