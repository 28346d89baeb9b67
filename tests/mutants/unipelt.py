"""What goes wrong in UniPELT."""

from tests.mutants import Mutant

FILE = "minipeft/hybrid/unipelt.py"
TESTS = ["tests/test_unipelt.py", "tests/test_gates.py", "tests/contract -k UniPELT"]

MUTANTS = [
    Mutant(
        name="the plain prefix core",
        file=FILE,
        find="*shape, core=GatedPrefixCore)",
        replace="*shape)",
        why="an argument forgotten: it runs, ungated",
        invariant="every technique has a gate; the prefix's has a gradient",
    ),
    Mutant(
        name="alpha over rank on top of the gate",
        file=FILE,
        find=(
            "super().__init__(inner, rank, 1.0)\n"
            "        self.gate = gate\n"
            "\n"
            "    def forward(self, x):\n"
            "        return gated_lora(self.inner(x), x, self.A, self.B, self.gate(x))"
        ),
        replace=(
            "super().__init__(inner, rank, 1.0)\n"
            "        self.gate = gate\n"
            "\n"
            "    def forward(self, x):\n"
            "        return gated_lora(self.inner(x), x, self.A, self.B, 16 / "
            "self.A.shape[0] * self.gate(x))"
        ),
        why="LoRA has a scale",
        invariant="the gate stands where alpha / r stood",
    ),
    Mutant(
        name="gate on all of the projection",
        file=FILE,
        find="return h + gate[..., None].to(h.dtype) * F.linear(F.linear(x, A), B)",
        replace="return gate[..., None].to(h.dtype) * (h + F.linear(F.linear(x, A), B))",
        why="brackets",
        invariant="(UniPELT 1): the base is not gated",
    ),
    Mutant(
        name="1 - gate",
        file=FILE,
        find="return h + gate[..., None].to(h.dtype) *",
        replace="return h + (1 - gate[..., None].to(h.dtype)) *",
        why="a forget gate's habit",
        invariant="(UniPELT 1)",
    ),
    Mutant(
        name="no sqrt(2)",
        file=FILE,
        find="q = 2**0.5 * torch.cat([q, gate * q], -1)",
        replace="q = torch.cat([q, gate * q], -1)",
        why="attention divides by sqrt(2 d) now",
        invariant="(UniPELT 4): scores are those of width d",
    ),
    Mutant(
        name="keys of the prefix not gated",
        file=FILE,
        find="torch.cat([q, gate * q], -1)",
        replace="torch.cat([q, q], -1)",
        why="values are gated, that seems enough",
        invariant="(UniPELT 2): G P_k",
    ),
    Mutant(
        name="values of the prefix not gated",
        file=FILE,
        find="return own + gate * prefixed",
        replace="return own + prefixed",
        why="keys are gated, that seems enough",
        invariant="(UniPELT 2): G P_v",
    ),
    Mutant(
        name="the text gated as well",
        file=FILE,
        find="return own + gate * prefixed",
        replace="return gate * (own + prefixed)",
        why="brackets",
        invariant="(UniPELT 2): the text's values are not gated",
    ),
    Mutant(
        name="text and prefix in one half",
        file=FILE,
        find="F.pad(prefix, (d, 0)), F.pad(k, (0, d))",
        replace="F.pad(prefix, (0, d)), F.pad(k, (0, d))",
        why="the padding of one copied to the other",
        invariant="(UniPELT 4)",
    ),
    Mutant(
        name="the adapter reads past its gate",
        file=FILE,
        find="return self.gate(f)[..., None].to(y.dtype) * y",
        replace="return self.gate(y)[..., None].to(y.dtype) * y",
        why="the gate looks at what it scales",
        invariant="(UniPELT 3): the gate reads f",
    ),
    Mutant(
        name="the adapter not gated",
        file=FILE,
        find='layer.adapter = GatedAdapter(layer.adapter, gate(n, "adapter"))',
        replace="pass",
        why="it already works",
        invariant="every technique has a gate of its own; the count",
    ),
    Mutant(
        name="one gate for q and v",
        file=FILE,
        find=(
            'for part in "qv" if self.rank else "":\n'
            '                wrapped(f"blocks.{n}.attn.{part}", GatedLoRALinear, '
            "self.rank, gate(n, part))"
        ),
        replace=(
            'both = gate(n, "q") if self.rank else None\n'
            '            for part in "qv" if self.rank else "":\n'
            '                wrapped(f"blocks.{n}.attn.{part}", GatedLoRALinear, '
            "self.rank, both)"
        ),
        why="LoRA is one technique",
        invariant="q and v have a gate each; the count",
    ),
    Mutant(
        name="LoRA on q and k",
        file=FILE,
        find='for part in "qv" if self.rank else "":',
        replace='for part in "qk" if self.rank else "":',
        why="the first two",
        invariant="LoRA on q and v",
    ),
    Mutant(
        name="the first block's pass for all",
        file=FILE,
        find="core.current = passes[n]",
        replace="core.current = passes[0]",
        why="an index",
        invariant="each block has its own gates",
    ),
    Mutant(
        name="parallel adapters",
        file=FILE,
        find='return Adapter("pfeiffer", self.bottleneck)',
        replace='return Adapter("parallel", self.bottleneck)',
        why="as in MAM",
        invariant="(UniPELT 3): A reads f",
    ),
    Mutant(
        name="gates not counted",
        file=FILE,
        find="return L * (lora + gates) +",
        replace="return L * lora +",
        why="gates are small",
        invariant="the count is the formula",
    ),
    Mutant(
        name="whole-row gates in a language model",
        file=FILE,
        find='if self.gate_over == "sequence" and not hasattr(model.head, "pools"):',
        replace="if False:",
        why="as the paper has it",
        invariant="a language model must not see the future",
    ),
    Mutant(
        name="a prefix over another",
        file=FILE,
        find="if isinstance(core, wrap.Wrapper):",
        replace="if False:",
        why="techniques stack",
        invariant="a core that has a wrapper is an error",
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
        name="the gate over the sequence is ignored",
        file=FILE,
        find="passes = [BlockPass(self.gate_over) for _ in model.blocks]",
        replace='passes = [BlockPass("past") for _ in model.blocks]',
        why="a field that is not passed on",
        invariant="(Gate 3) for classifiers",
    ),
    Mutant(
        name="gates in the order of the layers",
        file=FILE,
        find="zip(layers_with_heads(model) if cores else (), cores)",
        replace="enumerate(cores)",
        why="a core a layer",
        invariant="a layer without heads has no prefix, and no gate for one",
    ),
    Mutant(
        name="gates over another's prompts",
        file=FILE,
        find='getattr(wrapper, "calls_again", False)',
        replace="False",
        why="every wrapper calls its inner once",
        invariant="a gate counts what is text, once",
    ),
]
