"""What goes wrong in a frozen four-bit layer."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/nf4_linear.py"
TESTS = ["tests/test_nf4_linear.py", "tests/test_qlora.py", "tests/test_bitsandbytes.py"]

MUTANTS = [
    Mutant(
        name="the float weight kept for the backward pass",
        file=FILE,
        find="""        ctx.quantized = quantized
        return frozen_product(x, quantized, bias)""",
        replace="""        ctx.quantized = quantized
        ctx.weight = dequantize_nf4(quantized, x.dtype)
        return F.linear(x, ctx.weight, bias)""",
        why="why compute it twice",
        invariant="(Frozen 2): between the passes only packed bytes",
    ),
    Mutant(
        name="the weight not transposed in the gradient",
        file=FILE,
        find="dx = g @ dequantize_nf4(ctx.quantized, g.dtype)",
        replace="dx = (g.flatten(0, -2) @ dequantize_nf4(ctx.quantized, g.dtype).flip(0)).view("
        "*g.shape[:-1], -1)",
        why="rows in another order than in the forward pass",
        invariant="gradcheck",
    ),
    Mutant(
        name="no gradient through the frozen layer",
        file=FILE,
        find="dx = g @ dequantize_nf4(ctx.quantized, g.dtype)",
        replace="dx = torch.zeros_like(g @ dequantize_nf4(ctx.quantized, g.dtype))",
        why="a frozen layer needs no gradient",
        invariant="(Frozen 2): frozen weights still pass gradients on",
    ),
    Mutant(
        name="the bias's gradient is its mean",
        file=FILE,
        find="db = g.flatten(0, -2).sum(0)",
        replace="db = g.flatten(0, -2).mean(0)",
        why="losses are means, so are gradients",
        invariant="the gradient of a bias",
    ),
    Mutant(
        name="dequantised without need",
        file=FILE,
        find="if ctx.needs_input_grad[0]:",
        replace="if True:",
        why="the check looks superfluous",
        invariant="no input gradient, no dequantising",
    ),
    Mutant(
        name="half() casts the constants",
        file=FILE,
        find="if now is not None and now.dtype != before[name].dtype:",
        replace="if now is None and now != before[name]:",
        why="nn.Module converts buffers by itself",
        invariant="the constants stay float32",
    ),
    Mutant(
        name="the dtype does not follow the model's",
        file=FILE,
        find="self.dtype = fn(torch.empty(0, **self.place)).dtype",
        replace="fn(torch.empty(0, **self.place))",
        why="the stored dtype is thought to be the weight's for ever",
        invariant="after .half() the weight gives halves",
    ),
    Mutant(
        name="the compute type's output is not cast back",
        file=FILE,
        find="return y if self.compute_dtype is None else y.to(x.dtype)",
        replace="return y",
        why="the next layer will cast it",
        invariant="the input's type comes back",
    ),
    Mutant(
        name="the compute type is read and not used",
        file=FILE,
        find="return getattr(torch, self.compute_dtype)",
        replace="return x.dtype",
        why="the input's type is what a layer computes in",
        invariant="the product is in the compute type",
    ),
    Mutant(
        name="the mean of the constants is left behind",
        file=FILE,
        find='self.register_buffer("nested_offset", constants.offset if double else None)',
        replace='self.register_buffer("nested_offset", constants.offset * 0 if double else None)',
        why="the offset is one small number",
        invariant="(Frozen 1): the weight is the quantised one",
    ),
    Mutant(
        name="the compute type is dropped",
        file=FILE,
        find="return NF4Linear(quantized, bias, compute_dtype)",
        replace="return NF4Linear(quantized, bias)",
        why="an argument passed on through three functions",
        invariant="compute_dtype is what the layer computes in",
    ),
]
