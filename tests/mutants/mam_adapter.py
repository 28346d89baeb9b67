"""What goes wrong in MAM."""

from tests.mutants import Mutant

FILE = "minipeft/hybrid/mam_adapter.py"
TESTS = ["tests/test_mam_adapter.py", "tests/contract -k MAMAdapter"]

MUTANTS = [
    Mutant(
        name="adapter behind the feed-forward layer",
        file=FILE,
        find='return Adapter("parallel", self.bottleneck',
        replace='return Adapter("pfeiffer", self.bottleneck',
        why="adapters are usually sequential",
        invariant="(MAM 2): it reads what the sub-layer reads",
    ),
    Mutant(
        name="scale left out",
        file=FILE,
        find="self.bottleneck, self.scale, dropout=self.dropout)",
        replace="self.bottleneck, dropout=self.dropout)",
        why="the default of the adapter is 1",
        invariant="(MAM 2): s",
    ),
    Mutant(
        name="scale of one",
        file=FILE,
        find=("scale: float = 4.0\n    reparam"),
        replace=("scale: float = 1.0\n    reparam"),
        why="a neutral default",
        invariant="the paper's s is 4",
    ),
    Mutant(
        name="flat for MLP",
        file=FILE,
        find="width = self.prefix_bottleneck if self.reparameterize else None",
        replace="width = None if self.reparameterize else self.prefix_bottleneck",
        why="a condition turned round",
        invariant="the count; the MLP is used while training",
    ),
    Mutant(
        name="the adapter's width for the prefix's MLP",
        file=FILE,
        find="width = self.prefix_bottleneck if",
        replace="width = self.bottleneck if",
        why="two bottlenecks, one name",
        invariant="the count",
    ),
    Mutant(
        name="dropout on the prefix only",
        file=FILE,
        find="self.scale, dropout=self.dropout)",
        replace="self.scale)",
        why="one of two halves forgotten",
        invariant="dropout acts on both halves",
    ),
    Mutant(
        name="dropout on the adapter only",
        file=FILE,
        find="install_prefix(model, attachment, self.prefix_length, width, self.dropout)",
        replace="install_prefix(model, attachment, self.prefix_length, width)",
        why="one of two halves forgotten",
        invariant="dropout acts on both halves",
    ),
    Mutant(
        name="adapters on attention",
        file=FILE,
        find="sites = self.adapter.sites(len(model.blocks))",
        replace=(
            "sites = [(p.replace('mlp', 'attn'), f) for p, f in "
            "self.adapter.sites(len(model.blocks))]"
        ),
        why="the prefix is there as well",
        invariant="(MAM 2): on the feed-forward layer",
    ),
    Mutant(
        name="the prefix not counted",
        file=FILE,
        find=(
            "return sum(half.count(config) for half in filter(None, (self.prefix, self.adapter)))"
        ),
        replace="return self.adapter.count(config)",
        why="one of two halves forgotten",
        invariant="the count is the formula",
    ),
    Mutant(
        name="unchecked prefix",
        file=FILE,
        find="for half in filter(None, (self.prefix, self.adapter)):",
        replace="for half in (self.adapter,):",
        why="only the adapter is checked",
        invariant="bad lengths are errors that name them",
    ),
    Mutant(
        name="still re-parameterised after flattening",
        file=FILE,
        find="return dataclasses.replace(self, reparameterize=False) if has_one else None",
        replace="return self if has_one else None",
        why="the technique is not told that its MLP is gone",
        invariant="after flatten the count is the flat one",
    ),
    Mutant(
        name="flattening what is flat",
        file=FILE,
        find="has_one = self.prefix_length and self.reparameterize",
        replace="has_one = self.reparameterize",
        why="a prefix of length 0 has no MLP",
        invariant="nothing to flatten without a prefix",
    ),
    Mutant(
        name="the study's places swapped",
        file=FILE,
        find='(("attention", "attn"), ("feed-forward", "mlp"))',
        replace='(("attention", "mlp"), ("feed-forward", "attn"))',
        why="a table read across",
        invariant="(MAM 3): names and places agree",
    ),
    Mutant(
        name="the study's forms swapped",
        file=FILE,
        find='(("sequential", "pfeiffer"), ("parallel", "parallel"))',
        replace='(("sequential", "parallel"), ("parallel", "pfeiffer"))',
        why="a table read across",
        invariant="(MAM 3): names and forms agree",
    ),
    Mutant(
        name="MAM gets the whole budget twice",
        file=FILE,
        find="MAMAdapter(p, bottleneck - p, scale",
        replace="MAMAdapter(p, bottleneck, scale",
        why="the prefix is small, leave it out of the sum",
        invariant="(MAM 3): the same number of parameters",
    ),
    Mutant(
        name="the study's scaled adapter is not scaled",
        file=FILE,
        find='Adapter("parallel", on="mlp", scale=scale, **one)',
        replace='Adapter("parallel", on="mlp", **one)',
        why="an argument lost",
        invariant="(MAM 3): s = 4",
    ),
    Mutant(
        name="each paper's own activation in the study",
        file=FILE,
        find='one = {"bottleneck": bottleneck, "init": "lora", "activation": "relu"}',
        replace='one = {"bottleneck": bottleneck, "init": "truncated", "activation": "relu"}',
        why="defaults of another paper",
        invariant="(MAM 3): the place alone differs; the start is the base",
    ),
]
