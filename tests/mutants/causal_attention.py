"""Bugs of attention whose probabilities are kept, and of the question when it may run."""

from tests.mutants import Mutant

FILE = "minipeft/causal_attention.py"
GPT = "minipeft/gpt.py"
TESTS = ["tests/test_causal_attention.py"]


def mutant(name, find, replace, why, invariant, file=FILE):
    return Mutant(name, file, find, replace, why, invariant)


MUTANTS = [
    mutant(
        "a query does not see itself",
        "-torch.inf).triu(1)",
        "-torch.inf).triu(0).index_fill_(0, torch.tensor(0), 0.0)",
        "off by one in the diagonal; the first query is spared, or there would be no number",
        "(CausalAttention 1): M is 0 where j <= i",
    ),
    mutant(
        "no causality within a block",
        "                p[:, :, first:].add_(M[: seen - first, : seen - first])\n",
        "",
        "the keys are cut off at the block's end, and that looks like the mask",
        "(CausalAttention 1)",
    ),
    mutant(
        "the mask at the block's beginning",
        "p[:, :, first:].add_",
        "p[:, :, : seen - first].add_",
        "right for the first block",
        "(CausalAttention 1) in the second block",
    ),
    mutant(
        "the scale forgotten where dQ is made",
        "ds, k_b[:, :seen], beta=0, alpha=s",
        "ds, k_b[:, :seen], beta=0, alpha=1",
        "the softmax's gradient feels like the scores' gradient",
        "(CausalAttention 4)",
    ),
    mutant(
        "the scale forgotten where dK is made",
        "keys, queries, beta=beta, alpha=s",
        "keys, queries, beta=beta",
        "one of two",
        "(CausalAttention 4)",
    ),
    mutant(
        "the scale of all heads together",
        "T, s, P = q.shape[2], q.shape[3] ** -0.5, []",
        "T, s, P = q.shape[2], (q.shape[1] * q.shape[3]) ** -0.5, []",
        "d is taken for D",
        "(CausalAttention 1): s = 1 / sqrt(d)",
    ),
    mutant(
        "the row sum left out of dS",
        "torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)",
        "ds.mul_(p)",
        "as for a function that works number by number",
        "(CausalAttention 3)",
    ),
    mutant(
        "dS along the queries",
        "torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)",
        "ds.sub_((ds * p).sum(-2, keepdim=True)).mul_(p)",
        "the transposed matrix is what one has in mind for dK",
        "(CausalAttention 3): a row's probabilities add up to 1",
    ),
    mutant(
        "each block overwrites the gradients of the keys",
        "beta = 0 if seen == q.shape[2] else 1",
        "beta = 0",
        "right for one block",
        "(CausalAttention 2) (CausalAttention 4): later blocks see the same keys",
    ),
    mutant(
        "added to memory that was never written",
        "beta = 0 if seen == q.shape[2] else 1",
        "beta = 1",
        "new memory is zero, most of the time",
        "no NaN from what was there",
    ),
    mutant(
        "blocks taken from the first to the last",
        "in reversed(blocks(q.shape[2])):",
        "in blocks(q.shape[2]):",
        "the order of the forward pass",
        "the block that sees every key writes first",
    ),
    mutant(
        "rows taken from the first to the last",
        "for b in reversed(range(len(q))):",
        "for b in range(len(q)):",
        "what is popped comes from the end",
        "a row has its own probabilities",
    ),
    mutant(
        "what is kept is overwritten",
        "torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=ds)",
        "ds = torch._softmax_backward_data(ds, p, -1, ds.dtype, grad_input=p)",
        "the probabilities are not needed any more, it seems",
        "twice backward gives twice the gradient",
    ),
    mutant(
        "the rest of the text left out",
        "min(first + BLOCK, T)) for first in range(0, T, BLOCK)]",
        "first + BLOCK) for first in range(0, T - BLOCK + 1, BLOCK)]",
        "whole blocks only",
        "any number of tokens",
    ),
    mutant(
        "every gradient is made",
        "empty_by_token(t) if w else None",
        "empty_by_token(t)",
        "one case less to think of",
        "only wanted gradients cost something",
    ),
    mutant(
        "dK only together with dQ",
        "if dq is None and dk is None:",
        "if dq is None:",
        "queries are what is trained",
        "LoRA on k alone",
    ),
    mutant(
        "the output lies head by head",
        "(T * H * d, d, H * d, 1)",
        "(T * H * d, T * d, d, 1)",
        "that is what contiguous means",
        "flatten copies nothing",
    ),
    mutant(
        "dropout is passed over",
        "whole = mask is None and not dropout and",
        "whole = mask is None and",
        "evaluation never drops anything",
        "where weights are dropped torch's kernel runs",
        GPT,
    ),
    mutant(
        "a mask is passed over",
        "whole = mask is None and not dropout and",
        "whole = not dropout and",
        "texts are causal",
        "where a mask is given torch's kernel runs",
        GPT,
    ),
    mutant(
        "kept where nothing is learned",
        "return whole and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))",
        "return whole",
        "it is as right there",
        "evaluation keeps nothing",
        GPT,
    ),
    mutant(
        "on any number of threads",
        "return torch.get_num_threads() == 1 and",
        "return",
        "it was measured to be faster",
        "with two threads torch's kernel shares its work out",
        GPT,
    ),
]
