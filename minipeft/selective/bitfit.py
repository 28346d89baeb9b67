r"""BitFit: train the biases and nothing else (Ben Zaken et al., 2021, arXiv 2106.10199).

    (BitFit 1)   h = W x + (b + delta_b)                        delta_b in R^out, W frozen
    (BitFit 2)   LN(x) = g * (x - mean) / std + (c + delta_c)   delta_c in R^D, g frozen

so what is learned is a constant vector after each projection and each LayerNorm: the same one for
every token and every input.

Trained parameters, with d_ff = 4 D: 11 D a block (q, k, v, o 4 D; up 4 D; down D; two LayerNorms
2 D) and D for the last LayerNorm, 11 D L + D in all. The subset of the paper's section 4, the
query's and the intermediate layer's, is 5 D L.

    every bias    a clone of the base's, so the model at the start is the base, bitwise

Reduces to: adding a constant vector at each of these places. There is nothing to merge: the trained
bias simply is the bias.

How this differs: peft has no BitFit; LoRA with bias="all" comes closest and changes the base. The
authors also train the classification head; here that is `Head`, which composes.

Footguns: the key's bias gets no gradient at all, because it adds the same number to every score
of a query and softmax ignores it (behind a prefix, whose keys carry no bias, it has one); a
learning rate fit for full fine-tuning is 10 times too small; LLaMA-like models have no biases to
train.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from minipeft.selective.full import train_parameters
from minipeft.technique import Technique

PLACES = {  # name of a bias -> where it stands in a block
    "ln_1": "ln_1.bias",
    "query": "attn.q.bias",
    "key": "attn.k.bias",
    "value": "attn.v.bias",
    "attention_output": "attn.o.bias",
    "ln_2": "ln_2.bias",
    "intermediate": "mlp.up.bias",
    "output": "mlp.down.bias",
}
FINAL = "ln_f"  # the one bias outside the blocks


@dataclass(frozen=True)
class BitFit(Technique):
    """Train biases. (BitFit 1) (BitFit 2)

    biases: "all", or a tuple of some of ln_1, query, key, value, attention_output, ln_2,
        intermediate, output, ln_f. The paper's small variant is ("query", "intermediate").
    """

    biases: str | tuple[str, ...] = "all"

    learning_rate: ClassVar[float] = 1.5e-2

    def chosen(self):
        """The names asked for, "all" spelled out."""
        return (*PLACES, FINAL) if self.biases == "all" else self.biases

    def check(self, config):
        names = self.chosen()
        if isinstance(names, str) or not names:
            raise ValueError(
                f'biases={names!r}: give "all" or a tuple of {", ".join(PLACES)}, ln_f'
            )
        for name in names:
            if name not in PLACES and name != FINAL:
                raise ValueError(f"unknown bias {name!r}; choose from {', '.join(PLACES)}, {FINAL}")

    def install(self, model, attachment):
        names = self.chosen()
        wanted = {
            f"blocks.{n}.{PLACES[name]}"
            for n in range(len(model.blocks))
            for name in names
            if name in PLACES
        }
        if FINAL in names:
            wanted.add("ln_f.bias")
        train_parameters(model, attachment, wanted.__contains__)

    def count(self, config):
        names, D = set(self.chosen()), config.d_model
        per_block = sum(config.ff_width if n == "intermediate" else D for n in names - {FINAL})
        return config.n_layer * per_block + (D if FINAL in names else 0)
