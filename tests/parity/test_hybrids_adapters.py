"""MAM and UniPELT against the library `adapters`, on GPT-2, in float32, tensors copied across.

The library's MAM adapter reads the residual stream before the LayerNorm, so its MAM is compared
with our prefix and that form of ours on top of it. Its UniPELT gates are means over the whole row,
which gate_over="sequence" has in every layer. It leaves positions at 0 behind a prefix, so it is
told ours. 1e-6 of the largest number is a few roundings; UniPELT's attention has twice the width
here, and so twice the roundings.
"""

import pytest
import torch

import minipeft
from minipeft import GPT, Adapter, GPTConfig, Head, MAMAdapter, PrefixTuning, UniPELT
from tests.tiny import close, randomize, tiny_ids

pytest.importorskip("adapters")
import adapters
from adapters import (
    LoRAConfig,
    MAMConfig,
    ParBnConfig,
    PrefixTuningConfig,
    SeqBnConfig,
    UniPELTConfig,
)
from transformers import GPT2LMHeadModel

CONFIG = GPTConfig(vocab_size=97, context_length=64, n_layer=2, n_head=4, d_model=32)
P, R, M = 4, 3, 2
SINGLE = 1e-6
UNIPELT = UniPELT(R, P, M, reparameterize=False, gate_over="sequence")


@pytest.fixture
def twins(tmp_path):
    """(our GPT, the library's GPT-2) with the same weights. Eager, because with fused attention the
    library's causal mask starts at the upper left, where the prefix is, and hides text.
    """
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    model.reset_parameters(std=0.08)
    model.save_pretrained(tmp_path)
    peer = GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    adapters.init(peer)
    return model, peer


def copy_bottleneck(mine, theirs):
    for linear, other in ((mine.down, theirs.adapter_down[0]), (mine.up, theirs.adapter_up)):
        other.weight.data.copy_(linear.weight.data)
        other.bias.data.copy_(linear.bias.data)


def copy_tables(model, peer):
    """The library keeps a flat prefix as (p, 2 L, heads, width): layer l's keys are block 2 l."""
    (prefix,) = peer.transformer.h[0].attn.prefix_tuning.pool.prefix_tunings["one"].values()
    tables = [minipeft.wrap.resolve(model, f"blocks.{n}.attn.core").table() for n in range(2)]
    prefix.control_trans.data.copy_(torch.cat(tables, 1).flatten())


def features(peer, ids):
    positions = torch.arange(P, P + ids.shape[1])
    return peer(ids, position_ids=positions, output_hidden_states=True).hidden_states[-1]


def test_mam_s_two_halves_together_are_those_of_adapters(twins):
    """(MAM 1), and (MAM 2) in the library's form."""
    (model, peer), ids = twins, tiny_ids(3, 13)
    plain = model(ids)
    PrefixTuning(P, reparameterize=False).attach(model, "prefix")
    adapter = Adapter("parallel", 8, 4.0, variant="adapters").attach(model, "adapter")
    randomize(adapter, 0.2)
    prefix = PrefixTuningConfig(flat=True, prefix_length=P)
    peer.add_adapter("one", config=MAMConfig(prefix, ParBnConfig(reduction_factor=4)))
    peer.set_active_adapters("one")
    copy_tables(model, peer)
    for n, block in enumerate(model.blocks):
        copy_bottleneck(block.adapter, peer.transformer.h[n].output_adapters.adapters["one"])
    with torch.no_grad():
        close(model.features(ids), features(peer, ids), SINGLE)
        assert (model(ids) - plain).abs().max() > 1e-2  # it does something
    count = MAMAdapter(P, 8, reparameterize=False).count(CONFIG)
    assert count == sum(p.numel() for n, p in peer.named_parameters() if ".one." in n)


def copy_gate(mine, theirs, row=0):
    theirs.weight.data[row].copy_(mine.weight.data[0])
    theirs.bias.data[row].copy_(mine.bias.data[0])


def copy_unipelt(model, peer):
    """All tensors of ours; the library's LoRA on q and v is one, with two gates."""
    copy_tables(model, peer)
    for n in range(2):
        block = peer.transformer.h[n]
        lora, where = block.attn.c_attn.loras["one"], f"blocks.{n}"
        for row, part in enumerate("qv"):
            mine = minipeft.wrap.resolve(model, f"{where}.attn.{part}")
            lora.lora_A.data[row * R : (row + 1) * R].copy_(mine.A.data)
            lora.lora_B.data[row * 32 : (row + 1) * 32].copy_(mine.B.data)
            copy_gate(mine.gate, lora.gate, row)
        gated = minipeft.wrap.resolve(model, f"{where}.attn")
        copy_gate(gated.gate, block.attn.prefix_tuning.prefix_gates["one"])
        mine = minipeft.wrap.resolve(model, f"{where}.mlp").adapter
        theirs = block.output_adapters.adapters["one"]
        copy_bottleneck(mine.adapter, theirs)
        copy_gate(mine.gate, theirs.gate)


def test_unipelt_is_that_of_adapters(twins):
    """(UniPELT 1) (UniPELT 2) (UniPELT 3) with the gates of (Gate 1) (Gate 3), and the count."""
    (model, peer), ids = twins, tiny_ids(3, 13)
    Head(2, per_token=True).attach(model, "classifier")
    plain = model.features(ids)
    randomize(UNIPELT.attach(model), 0.2)
    config = UniPELTConfig(
        PrefixTuningConfig(flat=True, prefix_length=P),
        SeqBnConfig(reduction_factor=32 / M, original_ln_before=False),
        LoRAConfig(r=R, attn_matrices=["q", "v"]),
    )
    peer.add_adapter("one", config=config)
    peer.set_active_adapters("one")
    copy_unipelt(model, peer)
    theirs = sum(p.numel() for n, p in peer.named_parameters() if ".one." in n)
    assert theirs == UNIPELT.count(CONFIG)
    with torch.no_grad():
        close(model.features(ids), features(peer, ids), 2 * SINGLE)
        assert (model.features(ids) - plain).abs().max() > 1e-2  # it does something
