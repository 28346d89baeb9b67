"""The model and its files against transformers' GPT2LMHeadModel, over random configurations."""

import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minipeft.gpt import GPT, GPTConfig
from tests.tiny import tiny_ids, tiny_model

transformers = pytest.importorskip("transformers")

# Two float32 programs that add in another order: a few hundred roundings of 6e-8 on logits of
# order 1 to 10. The bound is the promise; what is reached is about 1e-6.
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@st.composite
def configs(draw):
    """Widths 8 to 192, odd sizes everywhere, feed-forward widths that are not 4 D."""
    n_head = draw(st.sampled_from([1, 2, 3, 4, 6]))
    head_dim = draw(st.integers(-(-8 // n_head), 192 // n_head))
    return GPTConfig(
        vocab_size=draw(st.integers(2, 300)),
        context_length=draw(st.integers(2, 40)),
        n_layer=draw(st.integers(1, 3)),
        n_head=n_head,
        d_model=n_head * head_dim,
        d_ff=draw(st.none() | st.integers(1, 200)),
        dropout=draw(st.sampled_from([0.0, 0.1])),
        layer_norm_eps=draw(st.sampled_from([1e-5, 1e-6, 1e-3])),
    )


def hf_config(config):
    return transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.context_length,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_embd=config.d_model,
        n_inner=config.d_ff,
        layer_norm_epsilon=config.layer_norm_eps,
        embd_pdrop=config.dropout,
        attn_pdrop=config.dropout,
        resid_pdrop=config.dropout,
        initializer_range=0.15,  # large enough for attention to be far from uniform
    )


@given(configs(), st.integers(0, 2**31))
def test_transformers_opens_our_files_with_the_same_logits(config, seed):
    model = tiny_model(config, torch.float32, seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs, info = transformers.GPT2LMHeadModel.from_pretrained(
            folder, output_loading_info=True
        )
    assert not any(info.values()), info
    ids = tiny_ids(2, config.context_length, config.vocab_size, seed)
    with torch.no_grad():
        torch.testing.assert_close(theirs.eval()(ids).logits, model(ids), **CLOSE)


@given(configs(), st.integers(0, 2**31), st.sampled_from(["whole", "sharded", "no prefix"]))
def test_we_open_their_files_with_the_same_logits(config, seed, form):
    torch.manual_seed(seed)
    theirs = transformers.GPT2LMHeadModel(hf_config(config)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
    with tempfile.TemporaryDirectory() as folder:
        if form == "no prefix":
            theirs.transformer.save_pretrained(folder)
        else:
            size = "2KB" if form == "sharded" else "5GB"
            theirs.save_pretrained(folder, max_shard_size=size)
        model = GPT.from_pretrained(folder)
    assert model.config == config
    ids = tiny_ids(2, config.context_length, config.vocab_size, seed)
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits, **CLOSE)


@settings(max_examples=5)
@given(configs(), st.integers(0, 2**31))
def test_theirs_through_us_comes_back_with_the_same_bits(config, seed):
    torch.manual_seed(seed)
    theirs = transformers.GPT2LMHeadModel(hf_config(config))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        GPT.from_pretrained(folder).save_pretrained(folder)
        again = transformers.GPT2LMHeadModel.from_pretrained(folder)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_the_loss_and_its_gradients_are_theirs():
    """Their labels are shifted inside the loss, ours are aligned: ids[1:] against labels[:-1]."""
    config = GPTConfig(vocab_size=61, context_length=19, n_layer=2, n_head=2, d_model=24)
    model = tiny_model(config, torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    ids = tiny_ids(3, 19, 61)
    labels = ids.clone()
    labels[0, 4:9] = -100
    loss = theirs(ids, labels=labels).loss
    ours = model.loss(ids[:, :-1], labels[:, 1:])
    torch.testing.assert_close(ours, loss, **CLOSE)
    loss.backward()
    ours.backward()
    torch.testing.assert_close(
        model.embed.token.weight.grad, theirs.transformer.wte.weight.grad, **CLOSE
    )
    c_attn = theirs.transformer.h[1].attn.c_attn.weight.grad
    attn = model.blocks[1].attn
    joint = torch.cat([attn.q.weight.grad, attn.k.weight.grad, attn.v.weight.grad]).T
    torch.testing.assert_close(joint, c_attn, **CLOSE)
