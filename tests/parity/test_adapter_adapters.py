"""Adapters and AdapterFusion against the library `adapters`, on GPT-2, tensors copied across.

Everything is compared on logits in float32. 1e-6 of the largest logit is a few roundings; this
model's largest are about 3.
"""

import pytest
import torch

from minipeft import GPT, Adapter, AdapterFusion, GPTConfig
from minipeft.additive.adapter_fusion import extract_knowledge, fusion_weights
from minipeft.technique import extra_loss, set_adapter
from tests.tiny import close, randomize, tiny_ids

pytest.importorskip("adapters")
import adapters
from adapters import DoubleSeqBnConfig, ParBnConfig, SeqBnConfig
from adapters.composition import Fuse
from transformers import GPT2LMHeadModel

SINGLE = 1e-6
CONFIG = GPTConfig(vocab_size=97, context_length=64, n_layer=2, n_head=4, d_model=32)

PAIRS = {  # name -> (ours, theirs); theirs with its defaults unless the name says otherwise
    "houlsby": (Adapter(variant="adapters", bottleneck=2), DoubleSeqBnConfig()),
    "pfeiffer": (Adapter(placement="pfeiffer", variant="adapters", bottleneck=2), SeqBnConfig()),
    "pfeiffer on f alone": (
        Adapter(placement="pfeiffer", bottleneck=2),
        SeqBnConfig(original_ln_before=False),
    ),
    "parallel": (
        Adapter(placement="parallel", variant="adapters", bottleneck=16, scale=4.0),
        ParBnConfig(),
    ),
    "houlsby as in the paper": (
        Adapter(bottleneck=8, layer_norms=False),
        DoubleSeqBnConfig(non_linearity="gelu", reduction_factor=4),
    ),
    "pfeiffer, scaled, swish": (
        Adapter(placement="pfeiffer", bottleneck=4, scale=2.5, activation="swish"),
        SeqBnConfig(
            original_ln_before=False, scaling=2.5, non_linearity="swish", reduction_factor=8
        ),
    ),
    "with a LayerNorm of its own": (
        Adapter(placement="pfeiffer", bottleneck=2, own_norm=True),
        SeqBnConfig(original_ln_before=False, ln_before=True),
    ),
    "a layer left out": (
        Adapter(placement="pfeiffer", bottleneck=2, leave_out=(0,)),
        SeqBnConfig(original_ln_before=False, leave_out=[0]),
    ),
}


@pytest.fixture
def twins(tmp_path):
    """(our GPT, the library's GPT-2) with the same weights."""
    torch.manual_seed(0)
    model = GPT(CONFIG).eval()
    model.reset_parameters(std=0.08)
    model.save_pretrained(tmp_path)
    peer = GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    adapters.init(peer)
    return model, peer


def their_name(name, adapter):
    """(transformer.h.0.output_adapters.adapters.A.adapter_up, weight) for a name of ours."""
    block, tail = name.split(".adapter.")
    n, place = block.split(".")[1], block.split(".")[2:]
    where = "attention_adapters" if place == ["attn"] else "output_adapters"
    part, kind = tail.split(".")
    part = {"up": "adapter_up", "down": "adapter_down", "norm": "adapter_norm_before"}[part]
    return f"transformer.h.{n}.{where}.adapters.{adapter}.{part}", kind


def copy_adapter(attachment, peer, adapter):
    """Our tensors into the library's adapter of that name; all of theirs must be covered."""
    modules, done = dict(peer.named_modules()), set()
    for name, tensor in attachment.tensors().items():
        stem, kind = their_name(name, adapter)
        module = modules[stem]
        if isinstance(module, torch.nn.Sequential):  # [LayerNorm,] Linear, activation
            module = next(m for m in module if isinstance(m, torch.nn.Linear))
        getattr(module, kind).data.copy_(tensor.data)
        done.add(id(getattr(module, kind)))
    named = peer.named_parameters()
    assert {id(p) for n, p in named if f".adapters.{adapter}." in n} == done


@pytest.mark.parametrize("name", PAIRS)
def test_logits_are_those_of_adapters(twins, name):
    (model, peer), (ours, theirs), ids = twins, PAIRS[name], tiny_ids(3, 13)
    plain = model(ids)
    randomize(ours.attach(model), 0.2)
    peer.add_adapter("one", config=theirs)
    peer.set_active_adapters("one")
    copy_adapter(model.attachments[0], peer, "one")
    with torch.no_grad():
        close(model(ids), peer(ids).logits, SINGLE)
        assert (model(ids) - plain).abs().max() > 1e-2  # the adapters do something


@pytest.mark.parametrize("name", ["houlsby", "pfeiffer", "parallel"])
def test_counts_are_those_of_adapters(twins, name):
    (_, peer), (ours, theirs) = twins, PAIRS[name]
    peer.add_adapter("one", config=theirs)
    count = sum(p.numel() for n, p in peer.named_parameters() if ".adapters.one." in n)
    assert ours.count(CONFIG) == count


def test_gradients_are_those_of_adapters(twins):
    (model, peer), (ours, theirs), ids = twins, PAIRS["pfeiffer"], tiny_ids(3, 13)
    randomize(ours.attach(model), 0.2)
    peer.add_adapter("one", config=theirs)
    peer.train_adapter("one")
    copy_adapter(model.attachments[0], peer, "one")
    labels = torch.full_like(ids, -100)
    labels[:, :-1] = ids[:, 1:]
    model.loss(ids, labels).backward()
    peer.eval()(input_ids=ids, labels=ids).loss.backward()
    for layer in (0, 1):
        mine = model.blocks[layer].adapter
        other = peer.transformer.h[layer].output_adapters.adapters["one"]
        close(mine.down.weight.grad, other.adapter_down[0].weight.grad, SINGLE)
        close(mine.up.bias.grad, other.adapter_up.bias.grad, SINGLE)


FUSIONS = {
    "pfeiffer": (
        Adapter(placement="pfeiffer", variant="adapters", bottleneck=2),
        SeqBnConfig(),
    ),
    "pfeiffer on f alone": (
        Adapter(placement="pfeiffer", bottleneck=2),
        SeqBnConfig(original_ln_before=False),
    ),
}


@pytest.mark.parametrize("name", FUSIONS)
def test_fusion_is_that_of_adapters(twins, name):
    """Logits, weights per layer and token, the penalty on V, and the count."""
    (model, peer), (ours, theirs), ids = twins, FUSIONS[name], tiny_ids(3, 13)
    names = ["a", "b", "c"]
    seeds = {n: seed for seed, n in enumerate(names)}
    extract_knowledge(model, seeds, lambda m, seed: randomize(m, 0.2, seed), ours)
    for adapter, attachment in zip(names, model.attachments):
        peer.add_adapter(adapter, config=theirs)
        copy_adapter(attachment, peer, adapter)
    technique = AdapterFusion(adapters=names)
    randomize(technique.attach(model, "fusion"), 0.2)
    peer.add_adapter_fusion(Fuse(*names))
    peer.train_adapter_fusion(Fuse(*names))
    copied = copy_fusion(model, peer, "a,b,c")
    assert copied == technique.count(CONFIG)
    with torch.no_grad():
        output = peer.eval()(input_ids=ids, output_adapter_fusion_attentions=True)
        close(model(ids), output.logits, SINGLE)
        weights = output.adapter_fusion_attentions["a,b,c"]
        theirs_p = torch.stack([torch.as_tensor(weights[n]["output_adapter"]) for n in range(2)])
        close(fusion_weights(model, ids), theirs_p.reshape(2, 3, 13, 3), SINGLE)
    close(
        extra_loss(model), peer.base_model.get_fusion_regularization_loss(), 1e-5
    )  # 2,048 squares
    set_adapter(model, "b")
    peer.set_active_adapters("b")
    with torch.no_grad():
        close(model(ids), peer(ids).logits, SINGLE)


def copy_fusion(model, peer, name):
    """Our fusion's tensors into the library's; returns how many numbers that were."""
    count = 0
    for layer, wrapper in enumerate(model.attachments[-1].wrappers()):
        theirs = peer.transformer.h[layer].output_adapters.adapter_fusion_layer[name]
        for part in ("query", "key", "value"):
            mine, other = getattr(wrapper.adapter, part), getattr(theirs, part)
            other.weight.data.copy_(mine.weight.data)
            count += other.weight.numel()
            if mine.bias is not None:
                other.bias.data.copy_(mine.bias.data)
                count += other.bias.numel()
    return count


def test_fusion_starts_as_that_of_adapters_does(twins):
    (model, peer), (ours, theirs) = twins, FUSIONS["pfeiffer"]
    for n in "ab":
        peer.add_adapter(n, config=theirs)
    peer.add_adapter_fusion(Fuse("a", "b"))
    AdapterFusion(adapters=[ours, ours]).attach(model)
    mine = model.attachments[0].wrappers()[0].adapter
    other = peer.transformer.h[0].output_adapters.adapter_fusion_layer["a,b"]
    assert torch.equal(mine.value.weight, other.value.weight)
    for part in ("query", "key"):
        ratio = getattr(mine, part).weight.std() / getattr(other, part).weight.std()
        assert 0.8 < ratio < 1.25  # two samples of 1,024 numbers each


def test_with_parallel_adapters_the_library_adds_the_residual_twice(twins):
    """The one place where we do not follow it: y = h + f + fusion here, 2 h + f + fusion there."""
    (model, peer), ids = twins, tiny_ids(3, 13)
    ours, theirs = PAIRS["parallel"]
    extract_knowledge(model, {"a": 1, "b": 2}, lambda m, seed: randomize(m, 0.2, seed), ours)
    for adapter, attachment in zip("ab", model.attachments):
        peer.add_adapter(adapter, config=theirs)
        copy_adapter(attachment, peer, adapter)
    randomize(AdapterFusion(adapters=["a", "b"]).attach(model, "fusion"), 0.2)
    peer.add_adapter_fusion(Fuse("a", "b"))
    peer.set_active_adapters(Fuse("a", "b"))
    copy_fusion(model, peer, "a,b")
    with torch.no_grad():
        x = model.embed(ids)
        for block in model.blocks:
            inside = block.inner
            h = x + inside.attn(inside.ln_1(x))
            x = block(x) + h
        close(model.head(model.ln_f(x)), peer(ids).logits, SINGLE)
