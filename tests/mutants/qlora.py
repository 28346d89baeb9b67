"""What goes wrong in QLoRA."""

from tests.mutants import Mutant

FILE = "minipeft/quantized/qlora.py"
TESTS = ["tests/test_qlora.py", "tests/contract -k QLoRA"]

MUTANTS = [
    Mutant(
        name="only the targets are quantised",
        file=FILE,
        find="for n in range(len(model.blocks)) for target in PROJECTIONS]",
        replace='for n in range(len(model.blocks)) for target in ("q", "down")]',
        why="LoRA's targets and the quantised layers confused",
        invariant="every projection is quantised",
    ),
    Mutant(
        name="some weights are quantised before one is refused",
        file=FILE,
        find="            check_finite(weight.detach(), weight.detach().abs().amax(1).float())\n",
        replace="",
        why="quantize_nf4 checks anyway",
        invariant="all or nothing",
    ),
    Mutant(
        name="an NF4 layer of another block size is taken",
        file=FILE,
        find="if stored != (block_size, double_quant, compute_dtype or stored[2]):",
        replace="if stored[1] != double_quant:",
        why="quantised is quantised",
        invariant="other settings are an error that names them",
    ),
    Mutant(
        name="merging leaves the other projections packed",
        file=FILE,
        find="attachment.wrap(model, path, FloatAgain(wrap.resolve(model, path)))",
        replace="pass",
        why="only what has LoRA on it is merged",
        invariant="(QLoRA 2): the merged model is a plain GPT",
    ),
    Mutant(
        name="LayerNorms compute in half precision",
        file=FILE,
        find=".weight.dtype.itemsize == 2:",
        replace=".weight.dtype.itemsize == 1:",
        why="they are small",
        invariant="LayerNorms compute in float32",
    ),
    Mutant(
        name="a LayerNorm without its own epsilon",
        file=FILE,
        find="weight, bias, self.inner.eps)",
        replace="weight, bias, 1e-2)",
        why="a constant copied from elsewhere",
        invariant="the LayerNorm's own function",
    ),
    Mutant(
        name="LayerNorm's output stays float32",
        file=FILE,
        find="        return y.to(x.dtype)\n\n    def merged",
        replace="        return y\n\n    def merged",
        why="more bits cannot hurt",
        invariant="computed in float32, rounded once to the model's type",
    ),
    Mutant(
        name="the adapter does not note the floats it came from",
        file=FILE,
        find='attachment.state["base"] = fingerprint(model)',
        replace="fingerprint(model)",
        why="the quantised base's fingerprint is in the file already",
        invariant="an adapter opens on the floats, too",
    ),
    Mutant(
        name="double quantisation is not passed on",
        file=FILE,
        find="getattr(parent, name), self.block_size, self.double_quant, self.compute_dtype",
        replace="getattr(parent, name), self.block_size, True, self.compute_dtype",
        why="the default is what everybody uses",
        invariant="the settings are the layers'",
    ),
    Mutant(
        name="keep_original keeps nothing",
        file=FILE,
        find="            if self.keep_original:\n                attachment.wrap",
        replace="            if not self.keep_original:\n                attachment.wrap",
        why="the branches exchanged",
        invariant="detach gives the floats back, or the quantised base",
    ),
    Mutant(
        name="requantised with the defaults",
        file=FILE,
        find="(model, one.block_size, one.nested_absmax is not None, one.compute_dtype)",
        replace="(model)",
        why="nobody changes them",
        invariant="NF4 as before",
    ),
    Mutant(
        name="the reported error is against the old weights",
        file=FILE,
        find="again.double() - merged)",
        replace="again.double() - layer.weight)",
        why="three weights of one shape",
        invariant="requantized is what quantising the merged floats costs",
    ),
    Mutant(
        name="learned without the scale",
        file=FILE,
        find="total = total + module.scale * (module.B.double() @ module.A.double())",
        replace="total = total + module.B.double() @ module.A.double()",
        why="alpha / r forgotten",
        invariant="learned is s B A",
    ),
]
