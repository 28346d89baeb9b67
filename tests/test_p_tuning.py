"""P-tuning: pseudo tokens in a template, the encoders written out, flattening."""

import pytest
import torch

import minipeft
from minipeft import GPTConfig, PTuning
from minipeft.soft_prompt.p_tuning import labels_of, lay_template, pseudo_ids
from minipeft.soft_prompt.prompt_tuning import flatten
from tests.tiny import close, randomize, tiny_model

EXACT = 1e-12  # float64, relative: a few hundred roundings of 1e-16
V = 97


def encoder_of(model):
    return minipeft.technique.attachment_of(model).wrappers()[0].prompt


def laid(technique, ids, cut=4):
    rows = [lay_template(technique.template, [r[:cut], r[cut:]], V) for r in ids.tolist()]
    return torch.tensor(rows)


def test_it_is_the_base_over_concatenated_embeddings(model, ids):
    """(P-tuning 1): e_j = h_j at pseudo token j, in front and inside the text."""
    technique = PTuning((2, 3, 1), encoder="mlp", hidden=7)
    randomize(technique.attach(model))
    logits, h = model(laid(technique, ids)), encoder_of(model)().detach()
    base = minipeft.detach(model)
    E = base.embed.token.weight
    front, middle, end = (part.expand(3, -1, -1) for part in h.split([2, 3, 1]))
    x = torch.cat([front, E[ids[:, :4]], middle, E[ids[:, 4:]], end], 1)
    x = x + base.embed.position.weight[: x.shape[1]]
    for block in base.blocks:
        x = block(x)
    close(logits, (base.ln_f(x) @ E.T)[:, 2:], EXACT)


def test_pseudo_tokens_may_stand_anywhere_and_more_than_once(model, ids):
    technique = PTuning((0, 2), encoder="table")
    technique.attach(model)
    mixed = ids.clone()
    mixed[0, 0] = mixed[0, 7] = V + 1
    mixed[2, 10] = V
    x, base, rows = model.embed(mixed), minipeft.wrap.base_module(model.embed), encoder_of(model)()
    position = base.position.weight[:11]
    assert torch.equal(x[0, 0], rows[1] + position[0])
    assert torch.equal(x[0, 7], rows[1] + position[7])
    assert torch.equal(x[2, 10], rows[0] + position[10])
    assert torch.equal(x[1], base.token(ids[1]) + position)


def lstm_written_out(lstm, x, layer, suffix):
    """One direction of one layer, step by step; the gates in PyTorch's order i, f, g, o."""
    W, U, b, c = (
        getattr(lstm, f"{name}_l{layer}{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    h = torch.zeros(U.shape[1], dtype=x.dtype)
    cell, out = h, []
    for row in x:
        i, f, g, o = (W @ row + b + U @ h + c).chunk(4)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        h = o.sigmoid() * cell.tanh()
        out.append(h)
    return torch.stack(out)


@pytest.mark.parametrize("layers", [1, 2])
def test_the_lstm_reads_the_pseudo_tokens_from_both_sides(model, layers):
    """(P-tuning 3)"""
    PTuning((3, 1, 3), encoder="lstm", layers=layers).attach(model)
    encoder = encoder_of(model)
    x = encoder.embedding
    for n in range(layers):
        forward = lstm_written_out(encoder.lstm, x, n, "")
        backward = lstm_written_out(encoder.lstm, x.flip(0), n, "_reverse").flip(0)
        x = torch.cat([forward, backward], 1)
    close(encoder(), x, EXACT)


def test_the_paper_s_encoder_puts_an_mlp_on_the_lstm(model):
    """(P-tuning 4)"""
    PTuning((3, 4), encoder="lstm+mlp", hidden=5).attach(model)
    encoder = encoder_of(model)
    states = encoder.lstm(encoder.embedding[None])[0][0]
    assert states.shape == (7, 10)
    first, second = encoder.mlp
    hidden = (states @ first.weight.T + first.bias).clamp(min=0)
    assert hidden.shape == (7, 10)
    close(encoder(), hidden @ second.weight.T + second.bias, EXACT)


def test_the_mlp_has_three_layers(model):
    """(P-tuning 2)"""
    PTuning((3, 4), encoder="mlp", hidden=5).attach(model)
    x, (one, two, three) = encoder_of(model).embedding, encoder_of(model).mlp
    x = (x @ one.weight.T + one.bias).clamp(min=0)
    x = (x @ two.weight.T + two.bias).clamp(min=0)
    close(encoder_of(model)(), x @ three.weight.T + three.bias, EXACT)


def test_widths_have_defaults(config):
    assert PTuning(encoder="lstm").width(config) == PTuning(encoder="lstm+mlp").width(config) == 16
    assert PTuning(encoder="mlp").width(config) == 32
    assert PTuning(encoder="mlp", hidden=9).width(config) == 9


def test_every_pseudo_token_is_trained_even_when_only_the_front_stands_in_the_text(model, ids):
    """An LSTM ties them together: all nine inputs have a gradient."""
    PTuning((3, 3, 3)).attach(model)
    model.loss(ids, ids).backward()
    assert (encoder_of(model).embedding.grad.abs().sum(1) > 0).all()


def test_the_encoder_is_registered_once(model):
    PTuning((2, 3)).attach(model)
    names = list(minipeft.technique.attachment_of(model).parameters())
    assert len(names) == 17 and all(n.startswith("embed.prompt.") for n in names)


# -- templates


def test_ids_of_pseudo_tokens_follow_the_vocabulary():
    assert pseudo_ids((2, 0, 1), 97) == [[97, 98], [], [99]]


def test_a_template_is_laid_around_segments():
    assert lay_template((2, 3, 1), [[5, 6], [7]], 97) == [5, 6, 99, 100, 101, 7, 102]
    assert lay_template((0, 1, 1), [[5, 6], [7]], 97) == [5, 6, 97, 7, 98]
    assert lay_template((2, 1), [[5, 6]], 97) == [5, 6, 99]
    assert lay_template((4,), [[5, 6]], 97) == [5, 6]


@pytest.mark.parametrize("template, wanted", [((2, 3, 1), 2), ((2, 1), 1), ((3,), 1)])
def test_a_wrong_number_of_segments_is_an_error(template, wanted):
    with pytest.raises(ValueError, match=f"takes {wanted} segments, not 3"):
        lay_template(template, [[1], [2], [3]], 97)


def test_labels_never_ask_for_a_pseudo_token():
    ids = torch.tensor([[5, 99, 100, 7, 8], [6, 7, 96, 97, 1]])
    expected = [[-100, -100, 7, 8, -100], [7, 96, -100, 1, -100]]
    assert labels_of(ids, 97).tolist() == expected


def test_ids_of_pseudo_tokens_are_accepted_and_no_others(model):
    PTuning((2, 3)).attach(model)
    model.check_ids(torch.tensor([[96, 97, 101]]))
    with pytest.raises(ValueError, match="token id 102 is outside the vocabulary, 0 to 101"):
        model.check_ids(torch.tensor([[102]]))
    minipeft.detach(model)
    with pytest.raises(ValueError, match="token id 97 is outside"):
        model.check_ids(torch.tensor([[97]]))


def test_two_templates_have_ids_of_their_own(model, ids):
    """The second one's begin where the first one's end."""
    PTuning((0, 2), encoder="table").attach(model, "first")
    PTuning((0, 3), encoder="table").attach(model, "second")
    first, second = (a.wrappers()[0].prompt() for a in model.attachments)
    base = minipeft.wrap.base_module(model.embed)
    x = model.embed(torch.tensor([[97, 98, 99, 101]])) - base.position.weight[:4]
    close(x[0], torch.stack([first[0], first[1], second[0], second[2]]), EXACT)


def test_generated_text_goes_on_behind_a_template(model, ids):
    """Greedy decoding with the cache, against whole forward passes."""
    technique = PTuning((2, 3, 1))
    randomize(technique.attach(model))
    text = laid(technique, ids)
    made = minipeft.generate(model, text, max_new_tokens=4, temperature=0, repetition_penalty=1.0)
    for _ in range(4):
        text = torch.cat([text, model(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, text)
    penalised = minipeft.generate(
        model, laid(technique, ids), max_new_tokens=4, temperature=0, repetition_penalty=1.5
    )
    assert penalised[:, -4:].max() < V, "a pseudo token is never written"


# -- after training


@pytest.mark.parametrize("encoder", ["lstm", "mlp", "lstm+mlp"])
def test_flattening_drops_the_encoder_and_changes_nothing(model, ids, encoder):
    technique = PTuning((2, 3, 1), encoder=encoder)
    randomize(technique.attach(model))
    text = laid(technique, ids)
    before = model(text)
    flatten(model)
    assert torch.equal(model(text), before)
    attachment = minipeft.technique.attachment_of(model)
    assert attachment.technique == PTuning((2, 3, 1), encoder="table")
    assert {n: tuple(p.shape) for n, p in attachment.parameters().items()} == {
        "embed.prompt.weight": (6, 32)
    }
    with pytest.raises(ValueError, match="no encoder"):
        flatten(model)


def test_the_encoder_s_dropout_acts_in_training_alone(model):
    PTuning((2, 3), encoder="lstm", dropout=0.5).attach(model)
    encoder = encoder_of(model)
    assert torch.equal(encoder(), encoder())
    encoder.train()
    assert not torch.equal(encoder(), encoder())


def test_learning_rates_differ_a_lot():
    """A table learns nothing at an encoder's rate."""
    table, lstm, mlp = (PTuning(encoder=e).learning_rate for e in ("table", "lstm", "mlp"))
    assert table >= 10 * lstm and lstm > mlp


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"template": ()}, r"template=\(\)"),
        ({"template": 9}, "template=9: give counts"),
        ({"template": (3, -1)}, r"template=\(3, -1\): give counts"),
        ({"template": (0, 0)}, "has 0 pseudo tokens"),
        ({"template": (60, 4)}, "has 64 pseudo tokens; from 1 to 63"),
        ({"encoder": "gru"}, "encoder='gru'; choose from table, mlp"),
        ({"hidden": 5}, "hidden=5.*must make up d_model=32"),
        ({"encoder": "mlp", "hidden": 0}, "hidden=0"),
        ({"layers": 0}, "layers=0"),
        ({"dropout": 1.0}, "dropout=1.0"),
    ],
)
def test_settings_that_make_no_sense_are_named(model, settings, message):
    with pytest.raises(ValueError, match=message):
        PTuning(**settings).attach(model)
    assert not model.attachments


def test_an_odd_width_has_no_two_halves():
    model = tiny_model(GPTConfig(97, 64, n_layer=1, n_head=3, d_model=21))
    with pytest.raises(ValueError, match=r"hidden=10 must make up d_model=21; use .*lstm\+mlp"):
        PTuning().attach(model)
    PTuning(encoder="lstm+mlp").attach(model)
