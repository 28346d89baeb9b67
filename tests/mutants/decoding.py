"""What goes wrong in decoding."""

from tests.mutants import Mutant

FILE = "minipeft/decoding.py"
TESTS = [
    "tests/test_decoding.py",
    "tests/test_decoding_step.py",
    "tests/parity/test_decoding_hf.py",
]

MUTANTS = [
    Mutant(
        name="penalty always divides",
        file=FILE,
        find="torch.where(z > 0, z / theta, z * theta)",
        replace="z / theta",
        why="the formula for positive logits alone",
        invariant="(Decoding 1): a penalised token never becomes likelier",
    ),
    Mutant(
        name="padding is penalised",
        file=FILE,
        find="seen = marked(text.ids[:, :N], real_positions(text, N), z.shape[-1])",
        replace="seen = marked(text.ids[:, :N], text.ids[:, :N] >= 0, z.shape[-1])",
        why="rows of one length have no padding",
        invariant="(Decoding 1) in a ragged batch",
    ),
    Mutant(
        name="n-gram one token short",
        file=FILE,
        find="tail = text.ends()[:, None] - (g - 1) + torch",
        replace="tail = text.ends()[:, None] - g + torch",
        why="off by one",
        invariant="(Decoding 2)",
    ),
    Mutant(
        name="n-grams of the padding count",
        file=FILE,
        find=(
            "again = (grams[..., :-1] == tail[:, None]).all(-1) & real_positions(text, "
            "N)[:, g - 1 :]"
        ),
        replace="again = (grams[..., :-1] == tail[:, None]).all(-1)",
        why="rows of one length have no padding",
        invariant="(Decoding 2) in a ragged batch",
    ),
    Mutant(
        name="temperature multiplies",
        file=FILE,
        find=") / temperature).softmax(-1)",
        replace=") * temperature).softmax(-1)",
        why="inverse temperature mixed up with temperature",
        invariant="(Decoding 3)",
    ),
    Mutant(
        name="top-k keeps one fewer",
        file=FILE,
        find="p = p * (p >= p.topk(top_k)[0][..., -1:])",
        replace="p = p * (p > p.topk(top_k)[0][..., -1:])",
        why="strict comparison",
        invariant="(Decoding 4)",
    ),
    Mutant(
        name="top-k not renormalised",
        file=FILE,
        find=(
            "        p = p * (p >= p.topk(top_k)[0][..., -1:])  # (Decoding 4)\n        "
            "p = p / p.sum(-1, keepdim=True)\n"
        ),
        replace="        p = p * (p >= p.topk(top_k)[0][..., -1:])  # (Decoding 4)\n",
        why="sampling does not need a sum of 1",
        invariant="(Decoding 4): the nucleus is taken of the k that are left",
    ),
    Mutant(
        name="top-p drops the token that crosses the line",
        file=FILE,
        find="before = ordered.cumsum(-1) - ordered",
        replace="before = ordered.cumsum(-1)",
        why="the running sum includes the token itself",
        invariant="(Decoding 5): at least top_p is kept",
    ),
    Mutant(
        name="top-p keeps the unlikely ones",
        file=FILE,
        find="p.sort(dim=-1, descending=True, stable=True)",
        replace="p.sort(dim=-1, descending=False, stable=True)",
        why="sort's default order",
        invariant="(Decoding 5)",
    ),
    Mutant(
        name="draw from the left",
        file=FILE,
        find="u[:, None] * F[:, -1:], right=True)[:, 0]",
        replace="u[:, None] * F[:, -1:], right=False)[:, 0]",
        why="searchsorted's default",
        invariant="(Decoding 6): a token of probability 0 is never drawn",
    ),
    Mutant(
        name="same number at every step",
        file=FILE,
        find="u[:, step])",
        replace="u[:, 0])",
        why="a constant index left from a first try",
        invariant="(Decoding 6): steps are independent",
    ),
    Mutant(
        name="all rows draw alike",
        file=FILE,
        find="repr((seed, prompt, copy))",
        replace="repr(seed)",
        why="one generator per batch is copied to the rows",
        invariant="equal prompts in a batch get different texts",
    ),
    Mutant(
        name="numbers depend on the place in the batch",
        file=FILE,
        find="repr((seed, prompt, copy))",
        replace="repr((seed, len(rows)))",
        why="seed + row is the obvious rule",
        invariant="a row alone equals the row in any batch",
    ),
    Mutant(
        name="seed ignored",
        file=FILE,
        find="digest = hashlib.sha256(repr((seed, prompt, copy)).encode()).digest()",
        replace="digest = hashlib.sha256(repr((prompt, copy)).encode()).digest()",
        why="the prompt alone looks random enough",
        invariant="another seed gives another text",
    ),
    Mutant(
        name="cache not reordered",
        file=FILE,
        find="        cache.reorder(beam.gather(1, kept).flatten())\n",
        replace="",
        why="the texts are reordered, the keys forgotten",
        invariant="beams find the best text",
    ),
    Mutant(
        name="states not reordered",
        file=FILE,
        find=("        self.state = {name: tensor[rows] for name, tensor in self.state.items()}\n"),
        replace="",
        why="only keys and values come to mind",
        invariant="a wrapper's running state follows its row",
    ),
    Mutant(
        name="lengths not reordered",
        file=FILE,
        find="            self.length = self.length[rows]\n",
        replace=(
            "            self.length = self.length.repeat_interleave(len(rows) // "
            "len(self.length))\n"
        ),
        why="right for the first expansion only",
        invariant="a ragged cache can be reordered at will",
    ),
    Mutant(
        name="score not divided by the length",
        file=FILE,
        find="results.offer(candidates, total / step**options.length_penalty, ended)",
        replace="results.offer(candidates, total, ended)",
        why="the penalty is applied at the end, to nothing",
        invariant="(Decoding 7)",
    ),
    Mutant(
        name="penalty with the wrong sign",
        file=FILE,
        find="results.offer(candidates, total / step**options.length_penalty, ended)",
        replace="results.offer(candidates, total * step**options.length_penalty, ended)",
        why="a penalty is multiplied",
        invariant="(Decoding 7)",
    ),
    Mutant(
        name="all beams start equal",
        file=FILE,
        find=(
            "    score[:, 1:] = WORST  # at first a row's beams are the same: only one "
            "may be continued\n"
        ),
        replace="",
        why="the prompt is the same for all",
        invariant="K different beams",
    ),
    Mutant(
        name="ended beams go on",
        file=FILE,
        find="score, kept = (total + ended * WORST).topk(K)",
        replace="score, kept = total.topk(K)",
        why="the best are the best",
        invariant="a beam that ended is not continued",
    ),
    Mutant(
        name="only K candidates",
        file=FILE,
        find="offered = torch.where(ended & self.open[:, None], scores, WORST)[:, :K]",
        replace="offered = torch.where(ended & self.open[:, None], scores, WORST)",
        why="2 K were looked at, so 2 K may end",
        invariant="token for token with transformers",
    ),
    Mutant(
        name="beams stop at the first result",
        file=FILE,
        find="self.open = self.open & ((worst == WORST) | (best_open > worst))",
        replace="self.open = self.open & (self.scores[:, 0] == WORST)",
        why="the first one to end is taken for the best",
        invariant="token for token with transformers",
    ),
    Mutant(
        name="position of the longest row for all",
        file=FILE,
        find="cache.real = text.length + p",
        replace="cache.real = None",
        why="padding is thought to be masked anyway",
        invariant="a row comes out as if it were alone",
    ),
    Mutant(
        name="virtual tokens forgotten in a ragged cache",
        file=FILE,
        find="cache.real = text.length + p",
        replace="cache.real = text.length",
        why="start counts real tokens, so lengths might too",
        invariant="a row comes out as if it were alone, with a prompt in front",
    ),
    Mutant(
        name="last column for every row",
        file=FILE,
        find=(
            "x = x[torch.arange(len(x), device=x.device), text.length - 1][:, None] if "
            "ragged else x[:, -1:]"
        ),
        replace="x = x[:, -1:]",
        why="the logits after the padding",
        invariant="a row comes out as if it were alone",
    ),
    Mutant(
        name="mask one key short",
        file=FILE,
        find="self._mask = (keys <= last[..., None])[:, None]",
        replace="self._mask = (keys < last[..., None])[:, None]",
        why="lengths and last positions mixed up",
        invariant="a token sees itself",
    ),
    Mutant(
        name="no mask for ragged rows",
        file=FILE,
        find="        self._mask = None\n\n    def advance",
        replace=(
            "        self._mask = None\n        self.mask = lambda T: torch.ones(1, 1, "
            "T, self.longest + T, dtype=torch.bool)\n\n    def advance"
        ),
        why="unused keys are zero, so they seem harmless",
        invariant="a zero key still takes its share of the softmax",
    ),
    Mutant(
        name="mask kept from the step before",
        file=FILE,
        find="self.real = self._mask = None",
        replace="self.real = None",
        why="it is made once, for all layers",
        invariant="a ragged row reads on",
    ),
    Mutant(
        name="stop token left out of the row",
        file=FILE,
        find="ends = ends + 1 if stop is None else ends + (~ended).long()",
        replace=(
            "ends = ends + 1 if stop is None else ends + (~(ended | (tokens == stop))).long()"
        ),
        why="the stop token is thought not to be text",
        invariant="a row ends with its stop token",
    ),
    Mutant(
        name="ended rows go on writing",
        file=FILE,
        find="            tokens = tokens.masked_fill(ended, stop)\n",
        replace="            pass\n",
        why="the caller can cut them",
        invariant="behind a row's end stands the stop token",
    ),
    Mutant(
        name="decoding goes on when all have ended",
        file=FILE,
        find="            if bool(ended.all()):\n                break\n",
        replace="",
        why="the padding hides it",
        invariant="the batch ends with its longest row",
    ),
    Mutant(
        name="training mode left on",
        file=FILE,
        find="    model.eval()\n",
        replace="",
        why="the model is in eval mode anyway",
        invariant="dropout is off while decoding",
    ),
    Mutant(
        name="everything in training mode afterwards",
        file=FILE,
        find="            module.training = True\n",
        replace="            model.train()\n",
        why="the usual way back",
        invariant="each module is in the mode it was in",
    ),
    Mutant(
        name="context checked without the virtual tokens",
        file=FILE,
        find=(
            "longest, p = T if lengths is None else int(lengths.max()), model.embed.position_shift"
        ),
        replace="longest, p = T if lengths is None else int(lengths.max()), 0",
        why="the plain model has none",
        invariant="a text that cannot fit is refused before it starts",
    ),
    Mutant(
        name="half characters written",
        file=FILE,
        find='if force or not piece.endswith("\\ufffd") or len(pending) >= 8:',
        replace="if True:",
        why="one token, one piece",
        invariant="a character is written once it is complete",
    ),
    Mutant(
        name="joined keys and values of ragged rows in one place",
        file=FILE,
        find="if self.kv is None or isinstance(self.cache.length, torch.Tensor):",
        replace="if self.kv is None:",
        why="rows of one length have one place",
        invariant="ragged rows read one token fast as each alone",
    ),
    Mutant(
        name="put in order for a few tokens",
        file=FILE,
        find="wins=lambda ids, model, start, cache: cache.tokens >= 16,",
        replace="wins=lambda ids, model, start, cache: cache.tokens >= 1,",
        why="fast is fast",
        invariant="the copies pay from some tokens on",
    ),
    Mutant(
        name="autocast passed by",
        file=FILE,
        find="cache.tokens > 0 and not torch.is_autocast_enabled(ids.device.type)",
        replace="cache.tokens > 0",
        why="nobody generates under autocast",
        invariant="otherwise the definition runs",
    ),
    Mutant(
        name="a classifier's rows are words",
        file=FILE,
        find="logits = model.read_out(x)  #",
        replace="logits = model.read_out(x)[:, -1:].view(len(x), 1, -1)  #",
        why="the last one is taken as from other heads",
        invariant="a classifier is refused and its labels counted",
    ),
]
