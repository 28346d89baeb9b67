"""What goes wrong in reading one token fast."""

from tests.mutants import Mutant

FILE = "minipeft/decoding_step.py"
TESTS = ["tests/test_decoding_step.py"]

MUTANTS = [
    Mutant(
        name="k before q",
        file=FILE,
        find="qkv, o = Product([attn.q, attn.k, attn.v]), ready_linear(attn.o)",
        replace="qkv, o = Product([attn.k, attn.q, attn.v]), ready_linear(attn.o)",
        why="the order in which they were joined is forgotten",
        invariant="the logits are the definition's",
    ),
    Mutant(
        name="joined though one of them is wrapped",
        file=FILE,
        find="all(plain(m, nn.Linear) for m in (attn.q, attn.k, attn.v))",
        replace="all(plain(m, nn.Linear) for m in (attn.q, attn.k))",
        why="LoRA was tried on q",
        invariant="q, k and v are one product where none is wrapped",
    ),
    Mutant(
        name="hooks are not looked for",
        file="minipeft/gpt.py",
        find="hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks",
        replace="hooks = False",
        why="the class seems to say it all",
        invariant="hooked modules are called",
    ),
    Mutant(
        name="subclasses count as plain",
        file="minipeft/gpt.py",
        find="return type(module) is kind and not hooks",
        replace="return isinstance(getattr(module, 'inner', module), kind) and not hooks",
        why="a wrapper is seen through",
        invariant="what is wrapped is called",
    ),
    Mutant(
        name="heads interleaved",
        file=FILE,
        find="parts = qkv(x).view(-1, 3, H, 1, d).transpose(0, 1)",
        replace="parts = qkv(x).view(-1, H, 3, 1, d).permute(2, 0, 1, 3, 4)",
        why="as in models that store q, k, v head by head",
        invariant="the logits are the definition's",
    ),
    Mutant(
        name="kept for the next call",
        file=FILE,
        find="        cache.ready = Ready(model)",
        replace=(
            '        cache.ready = model.__dict__.get("_ready") or Ready(model)\n'
            '        model.__dict__["_ready"] = cache.ready'
        ),
        why="the weights rarely change",
        invariant="weights that changed between two calls are seen",
    ),
    Mutant(
        name="in order for every token",
        file=FILE,
        find="    if cache.ready is None:\n        cache.ready",
        replace="    if True:\n        cache.ready",
        why="nothing can be stale then",
        invariant="weights are put in order once",
    ),
    Mutant(
        name="the last LayerNorm forgotten",
        file=FILE,
        find="        x = self.norm(x)\n",
        replace="",
        why="it is not in a block",
        invariant="the logits are the definition's",
    ),
    Mutant(
        name="no bias if the first has none",
        file=FILE,
        find="if any(bias is not None for bias in biases):",
        replace="if biases[0] is not None:",
        why="all three are alike",
        invariant="models without biases are read right",
    ),
    Mutant(
        name="the wrapped core is passed by",
        file=FILE,
        find="core = F.scaled_dot_product_attention if bare else attn.core",
        replace="core = F.scaled_dot_product_attention",
        why="the core has no weights",
        invariant="the logits are the definition's, with a prefix too",
    ),
    Mutant(
        name="exact GELU",
        file=FILE,
        find='down(F.gelu(up(x), approximate="tanh"))',
        replace="down(F.gelu(up(x)))",
        why="torch's default",
        invariant="the logits are the definition's",
    ),
    Mutant(
        name="no residual around the MLP",
        file=FILE,
        find="return x + feed(norm_2(x))",
        replace="return feed(norm_2(x))",
        why="a sum overlooked in the rewrite",
        invariant="the logits are the definition's",
    ),
    Mutant(
        name="deep weights transposed too",
        file=FILE,
        find='turn = weight.shape[0] >= weight.shape[1] and weight.device.type == "cpu"',
        replace='turn = weight.device.type == "cpu"',
        why="transposed is faster, so transpose",
        invariant="weights with more outputs than inputs are kept transposed, others not",
    ),
    Mutant(
        name="the cache is not advanced",
        file=FILE,
        find="        cache.advance(1)\n",
        replace="        cache.advance(1 if cache.longest < 5 else 0)\n",
        why="each layer has its own part",
        invariant="the cache counts what was read",
    ),
]
