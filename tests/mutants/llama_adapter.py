"""What goes wrong in LLaMA-Adapter."""

from tests.mutants import Mutant

FILE = "minipeft/additive/llama_adapter.py"
TESTS = [
    "tests/test_llama_adapter.py",
    "tests/test_unipelt.py",
    "tests/contract -k LLaMAAdapter",
]

MUTANTS = [
    Mutant(
        name="gate and prompt both zero",
        file=FILE,
        find="length, like.shape[0], **place).normal_()",
        replace="length, like.shape[0], **place).zero_()",
        why="zero-initialised is read as: everything starts at zero",
        invariant="prompts start at N(0, 1)",
    ),
    Mutant(
        name="gate at one",
        file=FILE,
        find="torch.zeros(gates, **place)",
        replace="torch.ones(gates, **place)",
        why="a gate is open at first",
        invariant="the start is the base, bitwise",
    ),
    Mutant(
        name="keys and values kept",
        file=FILE,
        find=(
            "        rows = self.prompt[None]\n"
            "        keys, values = (attn.split_heads(project(rows)) for project in "
            "(attn.k, attn.v))\n"
            "        return prompt_attention(q, keys, values)"
        ),
        replace=(
            "        rows = self.prompt[None]\n"
            '        if "kept" not in self.__dict__:\n'
            "            projections = (attn.k, attn.v)\n"
            "            pair = [attn.split_heads(project(rows)).detach() for project in "
            "projections]\n"
            '            self.__dict__["kept"] = pair\n'
            '        return prompt_attention(q, *self.__dict__["kept"])'
        ),
        why="the prompts do not depend on the text, so why compute them twice",
        invariant="the prompts learn",
    ),
    Mutant(
        name="prompts out of the graph",
        file=FILE,
        find="rows = self.prompt[None]",
        replace="rows = self.prompt[None].detach()",
        why="a cached tensor that was detached",
        invariant="the prompts learn",
    ),
    Mutant(
        name="scores not scaled",
        file=FILE,
        find=" / math.sqrt(q.shape[-1])",
        replace="",
        why="sqrt(d) forgotten",
        invariant="(LLaMA-Adapter 2)",
    ),
    Mutant(
        name="softmax over queries",
        file=FILE,
        find="scores.softmax(-1)",
        replace="scores.softmax(-2)",
        why="the wrong axis",
        invariant="(LLaMA-Adapter 2): weights over the prompts sum to 1",
    ),
    Mutant(
        name="keys for values",
        file=FILE,
        find="(attn.k, attn.v))",
        replace="(attn.k, attn.k))",
        why="copied line",
        invariant="(LLaMA-Adapter 1): V_a = W_v P + b_v",
    ),
    Mutant(
        name="keys and values swapped",
        file=FILE,
        find="(attn.k, attn.v))",
        replace="(attn.v, attn.k))",
        why="the order of a pair",
        invariant="(LLaMA-Adapter 1)",
    ),
    Mutant(
        name="one gate for all heads",
        file=FILE,
        find='PromptedCore, f"blocks.{n}.attn.core", attn.n_head',
        replace='PromptedCore, f"blocks.{n}.attn.core", 1',
        why="peft has one gate a layer",
        invariant="a gate a head; the count",
    ),
    Mutant(
        name="gate over the wrong axis",
        file=FILE,
        find="self.gate[:, None, None]",
        replace="self.gate[0]",
        why="broadcasting works for any shape",
        invariant="each head has its own gate",
    ),
    Mutant(
        name="text's attention gated too",
        file=FILE,
        find="return y + self.gate[:, None, None].to(y.dtype) * self.found(q)",
        replace=(
            "return (1 - self.gate[:, None, None]) * y + self.gate[:, None, None] * self.found(q)"
        ),
        why="a gate interpolates",
        invariant="(LLaMA-Adapter 3): the text's own attention is untouched",
    ),
    Mutant(
        name="the bottom layers",
        file=FILE,
        find="range(n_layer - (n_layer if self.layers is None else self.layers), n_layer)",
        replace="range(n_layer if self.layers is None else self.layers)",
        why="layers counted from 0",
        invariant="prompts stand in the upper layers",
    ),
    Mutant(
        name="peft's variant through the output projection",
        file=FILE,
        find="return y + self.gate.to(y.dtype) * a ",
        replace="return y + self.gate.to(y.dtype) * attn.o(a) ",
        why="what the paper does",
        invariant="(LLaMA-Adapter 4): without W_o",
    ),
    Mutant(
        name="tanh of the gate",
        file=FILE,
        find="return y + self.gate.to(y.dtype) * a ",
        replace="return y + self.gate.to(y.dtype).tanh() * a ",
        why="the training code of the authors has it",
        invariant="(LLaMA-Adapter 4)",
    ),
    Mutant(
        name="the frozen base's projections",
        file=FILE,
        find="keys, values = (attn.split_heads(project(rows)) for project in (attn.k, attn.v))",
        replace=(
            "keys, values = (\n"
            "            attn.split_heads(wrap.base_module(project)(rows)) for project "
            "in (attn.k, attn.v)\n"
            "        )"
        ),
        why="prompts should see the base",
        invariant="what stands on W_k and W_v counts, merged or not",
    ),
    Mutant(
        name="float32 whatever the model",
        file=FILE,
        find='place = {"device": like.device, "dtype": like.dtype}',
        replace='place = {"device": like.device}',
        why="new tensors take the default type",
        invariant="its tensors are in the model's precision",
    ),
    Mutant(
        name="prompts through gated projections",
        file=FILE,
        find='            check_calls(attn, f"blocks.{n}.attn")\n',
        replace="",
        why="q, k and v are functions of what they read",
        invariant="cached decoding equals uncached, or the two are not put together",
    ),
]
