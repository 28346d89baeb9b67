"""What goes wrong in the command that quantises a model, and in its comparisons."""

from tests.mutants import Mutant

FILE = "minipeft/quantize.py"
STUDY = "minipeft/quantize_study.py"
TESTS = ["tests/test_quantize.py"]


def bug(name, find, replace, why, invariant, file=FILE):
    return Mutant(name, file, find, replace, why, invariant)


MUTANTS = [
    bug(
        "size without what stays",
        "before - floats + stored,  # (Quantise 1)",
        "stored,",
        "the projections are the model, nearly",
        "(Quantise 1)",
    ),
    bug(
        "mean of relative errors",
        "math.sqrt(changed / whole),  # (Quantise 2)",
        "changed / whole,",
        "the root forgotten",
        "(Quantise 2)",
    ),
    bug(
        "the original is changed",
        "    small = copy.deepcopy(model)\n    batches ",
        "    small = model\n    batches ",
        "a copy costs memory",
        "a report leaves the model alone",
    ),
    bug(
        "bits in bytes",
        "        8 * stored / count,",
        "        stored / count,",
        "bytes a weight",
        "a report counts what is stored",
    ),
    bug(
        "only returned",
        "weight.copy_(restore(done[path]))",
        "restore(done[path])",
        "the result is in the dictionary",
        "what is put in place is what is returned",
    ),
    bug(
        "always double",
        "return nf4.quantize(weight, kind, settings.block_size, bool(double))",
        "return nf4.quantize(weight, kind, settings.block_size, True)",
        "QLoRA's default",
        "bits of a model are those of its format",
    ),
    bug(
        "the block size forgotten",
        "return nf4.quantize(weight, kind, settings.block_size, bool(double))",
        "return nf4.quantize(weight, kind, double_quant=bool(double))",
        "64 is what everybody takes",
        "bits of a model are those of its format",
    ),
    bug(
        "gptq in one grid a row",
        'names = ("bits", "group_size", "symmetric", "act_order")',
        'names = ("bits", "symmetric", "act_order")',
        "a setting not passed on",
        "bits of a model are those of its format",
    ),
    bug(
        "rtn always at four bits",
        "return gptq.round_to_nearest(weight, settings.bits, settings.group_size, "
        "settings.symmetric)",
        "return gptq.round_to_nearest(weight, 4, settings.group_size, settings.symmetric)",
        "the default written out",
        "bits of a model are those of its format",
    ),
    bug(
        "the loss of the base twice",
        "settings, before, nats(small, test, tokenizer))",
        "settings, before, nats(model, test, tokenizer))",
        "a line copied",
        "the loss afterwards is another",
    ),
    bug(
        "double quantisation asked of the block size",
        'settings.format == "nf4-double")',
        "settings.block_size == 64)",
        "what QLoRA does at 64",
        "an NF4 file holds what was measured",
    ),
    bug(
        "what is not quantised in float32",
        "bytes_stored = 2 * sum(p.numel() for p in small.parameters())",
        "bytes_stored = 4 * sum(p.numel() for p in small.parameters())",
        "the model in memory is float32",
        "the comparison of sizes counts every byte",
        STUDY,
    ),
    bug(
        "affine constants for free",
        'rows.append(row("affine int4", name, bits, error,',
        'rows.append(row("affine int4", name, 4.0, error,',
        "int4 is four bits",
        "formats are compared at equal bits",
        STUDY,
    ),
    bug(
        "drift of the padding, too",
        "real = torch.arange(batch.ids.shape[1]) < batch.lengths[:, None]",
        "real = torch.ones_like(batch.ids, dtype=torch.bool)",
        "a batch is a rectangle",
        "drift is of real tokens alone",
        STUDY,
    ),
    bug(
        "drift the wrong way round",
        "total += (p.exp() * (p - q))",
        "total += (q.exp() * (q - p))",
        "a divergence is a distance",
        "KL(float || quantised)",
        STUDY,
    ),
    bug(
        "drift of a batch",
        "return total / sum(len(batch.ids) for batch in batches)",
        "return total / len(batches)",
        "one mean too few",
        "nats a document",
        STUDY,
    ),
]
