r"""P-tuning (Liu et al., 2021, arXiv 2103.10385).

A prompt's words are learned, as in prompt tuning, but they may stand anywhere in a template, and
they are computed by a small encoder that ties them to each other while training.

    (P-tuning 1)   e_j = h_j where the input holds pseudo token j,  E[id] elsewhere   j = 0 .. n-1
    (P-tuning 2)   h   = MLP(E')                    W_3 relu(W_2 relu(W_1 E' + b_1) + b_2) + b_3
    (P-tuning 3)   h_j = [LSTM->(E'_0 .. E'_j); LSTM<-(E'_(n-1) .. E'_j)]       in R^(2 h)
    (P-tuning 4)   h_j = W_2 relu(W_1 [LSTM->; LSTM<-]_j + b_1) + b_2         the paper's encoder

E' in R^(n x D) are the encoder's inputs, one a pseudo token; the e_j replace the token's embedding,
positions are added as to any token. template=(n_0, n_1, ...) says how many pseudo tokens stand
before the text, between its segments, and at its end. The n_0 in front are put there by the model;
the others are ids V + j in the text (`lay_template` writes them), and a label that asks for one of
them is -100 (`labels_of`).

Trained parameters, with n pseudo tokens and hidden width h:

    table       n D
    mlp         n D + (D h + h) + (h h + h) + (h D + D)
    lstm        n D + 2 (4 h (D + h) + 8 h) + (layers - 1) 2 (4 h (3 h) + 8 h)        2 h = D
    lstm+mlp    lstm + (4 h h + 2 h) + (2 h D + D)

    E', table    N(0, 1)
    the rest     U(-1/sqrt(in), 1/sqrt(in)); the LSTM's U(-1/sqrt(h), 1/sqrt(h))

Reduces to: prompt tuning, with encoder="table" and all pseudo tokens in front. `flatten` turns any
encoder into the table it computes.

How this differs from peft: peft puts pseudo tokens in front only, calls (P-tuning 4) "LSTM", and
saves the table without the encoder, so that training cannot be resumed; our files keep it. The
authors' few-shot code trains the language model too: attach another technique for that.

Footguns: pseudo tokens left in the labels; ids V + j given to a model without this technique (the
embedding has no such row); a template whose later pseudo tokens never appear in the text, so that
with "mlp" or "table" nothing trains them; reading an LSTM's states in the wrong direction.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from minipeft import wrap
from minipeft.soft_prompt.prompt_tuning import PromptEmbedding, Table
from minipeft.technique import Technique

ENCODERS = ("table", "mlp", "lstm", "lstm+mlp")


# -- templates


def pseudo_ids(template, vocab_size):
    """The ids of the pseudo tokens, a list for each place: (2, 1) at V = 97 -> [[97, 98], [99]]."""
    ids = iter(range(vocab_size, vocab_size + sum(template)))
    return [[next(ids) for _ in range(count)] for count in template]


def lay_template(template, segments, vocab_size):
    """Put a text's segments (lists of ids) into the template; the pseudo tokens in front are left
    out, the model adds them itself. A template of k + 1 places takes k segments, of 1 place, 1.

    Raises ValueError for another number of segments.
    """
    expected = max(1, len(template) - 1)
    if len(segments) != expected:
        raise ValueError(f"template={template} takes {expected} segments, not {len(segments)}")
    _, *later = pseudo_ids(template, vocab_size)
    laid = []
    for n, segment in enumerate(segments):
        laid += [*segment, *(later[n] if later else ())]
    return laid


def labels_of(ids, vocab_size):
    """Aligned language-model labels of ids (B, T): the next token, and -100 at the end of the row
    and where the next one is a pseudo token.
    """
    following = F.pad(ids[:, 1:], (0, 1), value=-100)
    return following.masked_fill(following >= vocab_size, -100)


# -- encoders


def mlp(x, *layers):
    """Linear layers (weight, bias) with ReLU between: (n, in) -> (n, out). (P-tuning 2)"""
    *hidden, (weight, bias) = layers
    for w, b in hidden:
        x = F.linear(x, w, b).relu()
    return F.linear(x, weight, bias)


class Encoder(nn.Module):
    """Computes the pseudo tokens' embeddings: () -> (n, D)."""

    def __init__(self, count, width, hidden, lstm_layers=0, mlp_layers=0, dropout=0.0, **place):
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(count, width, **place).normal_())
        self.lstm, into = None, width
        if lstm_layers:
            settings = {"batch_first": True, "bidirectional": True, "dropout": dropout} | place
            self.lstm = nn.LSTM(width, hidden, lstm_layers, **settings)
            into = hidden = 2 * hidden  # both directions, side by side
        widths = [into, *[hidden] * (mlp_layers - 1), width]
        self.mlp = nn.ModuleList(nn.Linear(*widths[n : n + 2], **place) for n in range(mlp_layers))

    def forward(self):
        x = self.embedding
        if self.lstm is not None:
            x = self.lstm(x[None])[0][0]  # (1, n, D) -> (n, 2 h)  (P-tuning 3)
        if len(self.mlp):
            x = mlp(x, *((layer.weight, layer.bias) for layer in self.mlp))  # (P-tuning 4)
        return x


class PseudoTokens(wrap.Wrapper):
    """The token table with n more ids, V .. V + n - 1: (B, T) -> (B, T, D). (P-tuning 1)

    `place`: the PromptEmbedding that holds the encoder, so that it is registered once.
    """

    def __init__(self, inner, place, first, count):
        super().__init__(inner)
        self.place, self.first, self.many = (place,), first, count

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, ids):
        own = (ids >= self.first) & (ids < self.first + self.many)
        rows = self.place[0].prompt()[(ids - self.first).clamp(0, self.many - 1)]  # (B, T, D)
        return torch.where(own[..., None], rows, self.inner(ids.masked_fill(own, 0)))


@dataclass(frozen=True)
class PTuning(Technique):
    """Learned pseudo tokens in a template, computed by an encoder. (P-tuning 1)

    template: pseudo tokens before the text, between its segments and at its end; see lay_template.
    encoder: "lstm", "mlp", "lstm+mlp" (the paper's) or "table" (no encoder).
    hidden: h, the encoder's width; None means D for "mlp" and D / 2 for the LSTMs.
    layers: of the LSTM.
    dropout: between the LSTM's layers, in training.
    """

    template: tuple[int, ...] = (3, 3, 3)
    encoder: str = "lstm"
    hidden: int | None = None
    layers: int = 2
    dropout: float = 0.0

    cannot_merge: ClassVar[str | None] = "pseudo tokens are input, no weight could take them in"

    @property
    def learning_rate(self):
        """A table's rows need large steps, an encoder's weights small ones, an MLP's the least."""
        return {"table": 1e-1, "mlp": 1e-3}.get(self.encoder, 1e-2)

    @property
    def pseudo_tokens(self):
        """n, how many pseudo tokens the template has."""
        return sum(self.template)

    def width(self, config):
        """h, with the default filled in."""
        if self.hidden is not None:
            return self.hidden
        return config.d_model if self.encoder == "mlp" else max(1, config.d_model // 2)

    def check(self, config):
        if isinstance(self.template, int) or not self.template or min(self.template) < 0:
            raise ValueError(f"template={self.template!r}: give counts from 0 on, as in (3, 3, 3)")
        if not 1 <= self.pseudo_tokens < config.context_length:
            raise ValueError(
                f"template={self.template} has {self.pseudo_tokens} pseudo tokens; from 1 to "
                f"{config.context_length - 1} fit the context of {config.context_length}"
            )
        if self.encoder not in ENCODERS:
            raise ValueError(f"encoder={self.encoder!r}; choose from {', '.join(ENCODERS)}")
        if self.width(config) < 1 or self.layers < 1:
            raise ValueError(f"hidden={self.hidden} and layers={self.layers} must be positive")
        if self.encoder == "lstm" and 2 * self.width(config) != config.d_model:
            raise ValueError(
                f"the LSTM's two directions of hidden={self.width(config)} must make up "
                f'd_model={config.d_model}; use encoder="lstm+mlp" for another width'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not a probability in [0, 1)")

    def install(self, model, attachment):
        like = wrap.resolve(model, "embed.token.weight")
        encoder = self.build(model.config, device=like.device, dtype=like.dtype)
        first = model.config.vocab_size + model.embed.extra_ids
        place = PromptEmbedding(wrap.resolve(model, "embed"), encoder, self.template[0])
        place.own_extra_ids = self.pseudo_tokens
        attachment.wrap(model, "embed", place)
        table = wrap.resolve(model, "embed.token")
        pseudo = PseudoTokens(table, place, first, self.pseudo_tokens)
        attachment.wrap(model, "embed.token", pseudo)

    def build(self, config, **place):
        """The encoder, a module whose call gives (n, D)."""
        n, D = self.pseudo_tokens, config.d_model
        if self.encoder == "table":
            return Table(torch.empty(n, D, **place).normal_())
        lstm_layers = self.layers if "lstm" in self.encoder else 0
        mlp_layers = {"mlp": 3, "lstm": 0, "lstm+mlp": 2}[self.encoder]
        return Encoder(n, D, self.width(config), lstm_layers, mlp_layers, self.dropout, **place)

    def count(self, config):
        n, D, h = self.pseudo_tokens, config.d_model, self.width(config)
        if self.encoder == "table":
            return n * D
        if self.encoder == "mlp":
            return n * D + (D * h + h) + (h * h + h) + (h * D + D)
        lstm = 2 * (4 * h * (D + h) + 8 * h) + (self.layers - 1) * 2 * (4 * h * 3 * h + 8 * h)
        head = (4 * h * h + 2 * h) + (2 * h * D + D) if self.encoder == "lstm+mlp" else 0
        return n * D + lstm + head

    def flattened(self):
        """The technique without its encoder, or None when it has none."""
        return None if self.encoder == "table" else dataclasses.replace(self, encoder="table")
