r"""Prompt tuning (Lester, Al-Rfou and Constant, 2021, arXiv 2104.08691).

A prompt of p "words" that no dictionary holds: their embeddings are learned, everything else is
frozen.

    (Prompt 1)   x_0 = [P + pos(0 .. p-1);  E[ids] + pos(p .. p+T-1)]     P in R^(p x D)
    (Prompt 2)   vote = argmax_c #{m : argmax logits^m = c}               m = 1 .. N prompts

x_0 is what the first block reads, pos the frozen position table: the text moves by p positions. Of
the features only the last T are kept, so logits are those of the real tokens. (Prompt 2) is the
paper's ensemble: N prompts for one task share the frozen model, so one batch of N copies of the
text runs them all; ties go to the class with the larger summed probability.

Trained parameters: N p D (N = 1 unless asked for).

    init="random"    U(-1/2, 1/2)                                        the paper's
    init="vocab"     rows of E, drawn without replacement from `words`   (all ids if none are given)
    init="text"      the rows of E of the words of a text, repeated or cut to p
    init="labels"    each label word's row (mean of its pieces), the rest drawn as in "vocab"

Reduces to: initialised from a text of p tokens it is the base that reads the text first, exactly.

How this differs from peft: "vocab" draws without replacement, as the paper does; peft's random
start is N(0, 1), 3.5 times wider. Logits come back for the text alone, peft returns p + T of
them. Ensembling is not in peft.

Footguns: virtual tokens left in the loss; padding put between prompt and text (pad on the right);
a context that has no room for p more; a base that was trained only on texts starting at position 0;
a learning rate below 0.03, ten to a hundred times too small for this method.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from minipeft import wrap
from minipeft.technique import Technique, attachment_of

INITS = ("random", "vocab", "text", "labels")


def at_beginning(start):
    """Whether `ids` begin their rows, so that rows belong in front of them. `start` as in
    GPT.features.

    Raises ValueError for a (B,) tensor in which some rows begin and others go on.
    """
    if not isinstance(start, torch.Tensor):
        return start == 0
    first = start == 0
    if bool(first.any()) and not bool(first.all()):
        raise ValueError(
            f"start={start.tolist()}: some rows begin and others go on; virtual tokens stand in "
            "front of a row, so run the two kinds apart"
        )
    return bool(first.all())


def put_in_front(prompts, x):
    """prompts (N, p, D) before x (B, T, D) -> (B, p + T, D), each prompt for B / N rows in a row.
    (Prompt 1)
    """
    N, B = prompts.shape[0], x.shape[0]
    if B % N:
        raise ValueError(
            f"a batch of {B} rows cannot be shared by {N} prompts; repeat the text for each "
            "prompt: model(replicate(ids, members))"
        )
    return torch.cat([prompts.repeat_interleave(B // N, 0), x], 1)


class Table(nn.Module):
    """Rows that are trained as they are: calling it gives `weight`."""

    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(rows)

    def forward(self):
        return self.weight


class PromptEmbedding(wrap.EmbeddingWrapper):
    """The embedding with virtual rows in front at the start of a row: (B, T) -> (B, p + T, D).

    `prompt`: a module that, called without arguments, gives (p, D), or (N, p, D) for N prompts.
    `length`: p.
    """

    def __init__(self, inner, prompt, length):
        super().__init__(inner)
        self.prompt = prompt
        self.own_virtual_tokens = self.own_position_shift = length

    def forward(self, ids, start=0, shift=0):
        x = self.inner(ids, start, shift + self.own_position_shift)
        if self.own_virtual_tokens and at_beginning(start):
            x = put_in_front(self.rows(ids.device, shift), x)
        return x

    def rows(self, device, shift=0):
        """What stands in front, positions added: (N, p, D)."""
        base = wrap.base_module(self)
        where = torch.arange(self.own_virtual_tokens, device=device) + shift
        rows = self.prompt()[..., : self.own_virtual_tokens, :] + base.position(where)
        return base.drop(rows if rows.ndim == 3 else rows[None])

    def flatten(self):
        """Keep the rows that the prompt's encoder gives, drop the encoder."""
        self.prompt = Table(self.prompt().detach().clone())


def flatten(model, name=None):
    """Replace the encoder of a trained prompt or prefix by the table it computes, for inference
    and for peft's files; outputs stay the same. Returns the model. (Encoders are worth keeping
    where training may go on: save the adapter before.)

    Raises ValueError when the attachment has no encoder.
    """
    attachment = attachment_of(model, name)
    flattened = getattr(attachment.technique, "flattened", lambda: None)()
    if flattened is None:
        kind = type(attachment.technique).__name__
        raise ValueError(f"{kind} ({attachment.name!r}) has no encoder to flatten")
    for wrapper in attachment.wrappers():
        if hasattr(wrapper, "flatten"):
            wrapper.flatten()
    attachment.technique = flattened
    return model


# -- initialisation


def draw_words(count, words):
    """`count` of the ids `words` (1-d tensor), without replacement as long as there are enough."""
    rounds = -(-count // len(words))
    return torch.cat([words[torch.randperm(len(words))] for _ in range(rounds)])[:count]


def repeat_to(ids, length):
    """A text of ids, repeated or cut to `length`: [5, 9] -> [5, 9, 5] at 3."""
    return (list(ids) * -(-length // len(ids)))[:length]


def initial_rows(technique, embedding):
    """The (p, D) rows a prompt starts from, by the table in this file's header."""
    weight, p = embedding.detach(), technique.prompt_length
    if technique.init == "random":
        return torch.empty(p, weight.shape[1]).uniform_(-0.5, 0.5).to(weight)
    if technique.init == "text":
        return weight[repeat_to(technique.text, p)]
    words = torch.tensor(technique.words or range(len(weight)))
    labels = technique.labels if technique.init == "labels" else ()
    means = [weight[list(pieces)].mean(0, keepdim=True) for pieces in labels[:p]]
    drawn = draw_words(p - len(means), words) if p > len(means) else words[:0]
    return torch.cat([*means, weight[drawn.to(weight.device)]])


# -- ensembles


def replicate(ids, members):
    """ids (B, T) -> (N B, T): the batch once for each prompt, prompt by prompt."""
    return ids.repeat(members, 1)


def majority_vote(logits, members):
    """logits (N B, C) of a replicated batch -> (B,) classes. (Prompt 2)"""
    logits = logits.unflatten(0, (members, -1))  # (N, B, C)
    votes = nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).sum(0)  # (B, C)
    tied = votes == votes.max(-1, keepdim=True).values
    return logits.softmax(-1).sum(0).masked_fill(~tied, -1.0).argmax(-1)


def keep_member(model, index, name=None):
    """Turn an ensemble into its prompt number `index` alone. Returns the model.

    Raises ValueError when the attachment has no prompt of that number.
    """
    attachment = attachment_of(model, name)
    members = getattr(attachment.technique, "members", 1)
    if not 0 <= index < members or members == 1:
        raise ValueError(f"{attachment.name!r} has no prompt {index}: it holds {members}")
    (wrapper,) = attachment.wrappers()
    wrapper.prompt = Table(wrapper.prompt.weight.detach()[index].clone())
    attachment.technique = dataclasses.replace(attachment.technique, members=1)
    return model


@dataclass(frozen=True)
class PromptTuning(Technique):
    """Learned embeddings in front of the text. (Prompt 1)

    prompt_length: p, virtual tokens.
    init: "random", "vocab", "text" or "labels"; see the table in the file's header.
    text: token ids of the text that init="text" starts from.
    labels: for init="labels", the token ids of each label's word, a tuple a label.
    words: ids that "vocab" and "labels" draw from; empty means all. Leave out untrained tokens.
    members: N, prompts for one task in one batch; rows are shared out evenly, see replicate.
    """

    prompt_length: int = 20
    init: str = "vocab"
    text: tuple[int, ...] = ()
    labels: tuple[tuple[int, ...], ...] = ()
    words: tuple[int, ...] = ()
    members: int = 1

    learning_rate: ClassVar[float] = 1e-1
    cannot_merge: ClassVar[str | None] = "virtual tokens are input, no weight could take them in"

    def check(self, config):
        check_prompt_length("prompt_length", self.prompt_length, config)
        if self.members < 1:
            raise ValueError(f"members={self.members}: at least 1 prompt is needed")
        if self.init not in INITS:
            raise ValueError(f"init={self.init!r}; choose from {', '.join(INITS)}")
        needed = {"text": self.text, "labels": self.labels}.get(self.init, True)
        if not needed or not all(self.labels):
            raise ValueError(f"init={self.init!r} needs token ids in {self.init}=(...)")
        drawn = self.init == "random" or self.prompt_length > len(self.labels)
        if self.members > 1 and (self.init == "text" or not drawn):
            raise ValueError(
                f"members={self.members} with init={self.init!r} would start, and stay, all alike; "
                'choose init="vocab" or "random"'
            )
        check_words((*self.text, *self.words, *(i for word in self.labels for i in word)), config)

    def install(self, model, attachment):
        embedding = wrap.resolve(model, "embed.token.weight")
        rows = [initial_rows(self, embedding) for _ in range(self.members)]
        table = Table(rows[0] if self.members == 1 else torch.stack(rows))
        inner = wrap.resolve(model, "embed")
        attachment.wrap(model, "embed", PromptEmbedding(inner, table, self.prompt_length))

    def count(self, config):
        return self.members * self.prompt_length * config.d_model


def check_prompt_length(name, length, config):
    """Raise ValueError when p is no positive number or leaves no room for text."""
    if not 1 <= length < config.context_length:
        raise ValueError(
            f"{name}={length} must be from 1 to {config.context_length - 1}: virtual tokens share "
            f"the context of {config.context_length} with the text"
        )


def check_words(ids, config):
    """Raise ValueError for an id outside the vocabulary."""
    for i in ids:
        if not 0 <= i < config.vocab_size:
            raise ValueError(f"token id {i} is outside the vocabulary of {config.vocab_size}")
