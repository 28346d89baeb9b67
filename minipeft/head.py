r"""A head that classifies: one linear layer in place of the language-model head.

    (Head 1)   logits = W x_last + b        W in R^(C x D), x_last: features of the last real token
    (Head 2)   logits_t = W x_t + b         per token: one decision for every position (tagging)

A causal model's last token is the only one that has read everything, so it stands where BERT's
[CLS] stands. `Head` composes with any technique: attach it before or after, it trains beside it.

Trained parameters: C D + C.

    W    N(0, 0.02^2)        b    0

Reduces to: with W the rows of the label words in the embedding and b = 0, it is the language-model
head restricted to those words.

How this differs: transformers' GPT2ForSequenceClassification finds the last real token by looking
for the padding id and has no bias; here the lengths are given, so any id may pad.

Footguns: the last position of a padded row is padding: read the last *real* token (`lengths`); a
frozen base below a new head needs a larger learning rate than full fine-tuning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.technique import Technique


class ClassificationHead(wrap.Wrapper):
    """Features (B, T, D) -> logits (B, C) at each row's last real token, or (B, T, C) per token."""

    def __init__(self, inner, num_labels, per_token=False):
        super().__init__(inner)
        like = wrap.base_module(inner).weight
        place = {"device": like.device, "dtype": like.dtype}
        self.weight = nn.Parameter(torch.empty(num_labels, like.shape[1], **place))
        self.bias = nn.Parameter(torch.zeros(num_labels, **place))
        self.pools = not per_token
        nn.init.normal_(self.weight, 0.0, 0.02)

    def forward(self, x, lengths=None):
        """`lengths` (B,): real tokens in each right-padded row; None means no row is padded."""
        if self.pools:
            last = -1 if lengths is None else lengths - 1
            x = x[torch.arange(x.shape[0], device=x.device), last]  # (B, D)
        return nn.functional.linear(x, self.weight, self.bias)  # (Head 1) (Head 2)


@dataclass(frozen=True)
class Head(Technique):
    """Replace the language-model head by a classifier.

    num_labels: C, how many classes.
    per_token: a decision for every token (tagging) instead of one for the row.
    """

    num_labels: int = 2
    per_token: bool = False

    learning_rate: ClassVar[float] = 1e-2
    cannot_merge: ClassVar[str | None] = "a classifier is no language-model head"

    def check(self, config):
        if self.num_labels < 2:
            raise ValueError(f"num_labels={self.num_labels}: a classifier needs at least 2 classes")

    def install(self, model, attachment):
        head = ClassificationHead(wrap.resolve(model, "head"), self.num_labels, self.per_token)
        attachment.wrap(model, "head", head)

    def count(self, config):
        return self.num_labels * (config.d_model + 1)
