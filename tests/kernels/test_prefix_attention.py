"""The specification of minipeft/kernels/prefix_attention.py; test_twins.py holds it against its
definition.
"""

import pytest
import torch

from minipeft import PrefixTuning
from minipeft.kernels.prefix_attention import prefix_attention, tiles
from minipeft.soft_prompt import prefix_attention as defined
from tests.kernels.formulas import DOT_DTYPES, both, check_model, draw, wanting
from tests.kernels.harness import DEVICE, Traffic, far_rows, interpreted_only, nbytes


def formula(q, k, v, prefix):
    """(PrefixKernel 1) (PrefixKernel 2) (PrefixKernel 4), all scores at once; autograd makes
    (PrefixKernel 5) and (PrefixKernel 6).
    """
    (T, d), S, p = q.shape[2:], k.shape[2], prefix.shape[3]
    scores = q @ torch.cat([prefix[0], k], 2).mT / d**0.5
    t, j = torch.arange(T, device=DEVICE)[:, None], torch.arange(p + S, device=DEVICE)
    scores = scores.masked_fill((j >= p) & (j - p > t + S - T), -torch.inf)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return weights @ torch.cat([prefix[1], v], 2)


def tensors(B, H, T, S, p, d, dtype=torch.float32):
    shapes = (B, H, T, d), (B, H, S, d), (B, H, S, d), (2, B, H, p, d)
    return wanting(*(draw(*shape, dtype=dtype) for shape in shapes))


@pytest.mark.parametrize("dtype", DOT_DTYPES)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 1, 1, 1),
        (2, 3, 5, 5, 2, 4),
        (1, 1, 31, 31, 31, 15),
        (1, 1, 16, 16, 64, 16),
        (1, 1, 33, 33, 17, 17),
        (2, 1, 1, 70, 3, 8),
        (1, 2, 3, 34, 4, 33),
    ],
    ids=str,
)
def test_result_and_gradients(sizes, dtype):
    """(PrefixKernel 3) at sizes around the block's, and with keys from a cache (S > T)."""
    both(prefix_attention, formula, tensors(*sizes, dtype=dtype))


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.float32), (128, torch.float16)])
def test_heads_as_wide_as_they_may_be(d, dtype):
    both(prefix_attention, formula, tensors(1, 1, 17, 17, 5, d, dtype))


def test_scores_that_grow_from_block_to_block():
    """(PrefixKernel 3): each block holds a new largest score, or only tiny ones. exp would
    overflow without the largest taken off.
    """
    q, k, v, prefix = tensors(1, 1, 2, 50, 20, 1)
    q.data.fill_(1.0)
    k.data[0, 0, :, 0] = torch.linspace(100, 300, 50)
    prefix.data[0, 0, 0, :, 0] = torch.linspace(-200, 90, 20)
    rising = prefix_attention(q, k, v, prefix)
    torch.testing.assert_close(rising[0, 0, 1], sorted_by_hand(q, k, v, prefix), rtol=1e-4, atol=0)
    k.data.neg_()
    falling = prefix_attention(q, k, v, prefix)
    torch.testing.assert_close(falling[0, 0, 1], sorted_by_hand(q, k, v, prefix), rtol=1e-4, atol=0)


def sorted_by_hand(q, k, v, prefix):
    """The last query's o; float32 scores of a few hundred, so 1e-5 of them in the exponent."""
    keys, values = (torch.cat(pair, 2)[0, 0].double() for pair in ((prefix[0], k), (prefix[1], v)))
    return ((q[0, 0, -1].double() @ keys.T).softmax(-1) @ values).float().detach()


def test_one_prefix_serves_the_batch_and_gets_the_sum_of_its_gradients():
    q, k, v, _ = tensors(3, 2, 5, 5, 1, 4)
    (rows,) = wanting(draw(2, 1, 2, 4, 4))

    def shared(function):
        return lambda q, k, v, rows: function(q, k, v, rows.expand(-1, 3, -1, -1, -1))

    both(shared(prefix_attention), shared(formula), [q, k, v, rows])


@pytest.mark.parametrize("layout", ["as a model splits heads", "strided", "transposed", "expanded"])
def test_memory_may_lie_anyhow(layout):
    B, H, T, p, d, g = 2, 3, 5, 4, 6, None
    if layout == "as a model splits heads":
        q, k, v = (draw(B, T, H, d).transpose(1, 2) for _ in range(3))
        prefix = draw(p, 2 * H * d).unflatten(1, (2, H, d)).permute(1, 2, 0, 3)
        prefix, g = prefix[:, None].expand(-1, B, -1, -1, -1), draw(B, T, H, d).transpose(1, 2)
    elif layout == "strided":
        q, k, v, g = (draw(B, H, T, 2 * d)[..., ::2] for _ in range(4))
        prefix = draw(2, B, H, p, 2 * d)[..., ::2]
    elif layout == "transposed":
        q, k, v, g = (draw(d, T, B, H).permute(2, 3, 1, 0) for _ in range(4))
        prefix = draw(2, B, H, d, p).mT
    else:
        q, k, v = (draw(1, 1, 1, d).expand(B, H, T, d) for _ in range(3))
        prefix = draw(2, 1, 1, 1, d).expand(-1, B, H, p, d)
        g = torch.ones((), device=DEVICE).expand(B, H, T, d)
    both(prefix_attention, formula, wanting(q, k, v, prefix), g)


@interpreted_only
@pytest.mark.parametrize("which", ["q", "k", "v", "prefix", "g"])
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "heads", "rows"])
def test_offsets_past_32_bits(which, dimension):
    """The third row of the batch, head or row lies 2^31 elements from the first."""
    shape = [3 if i == dimension else 1 for i in range(3)]

    def far(x):
        order = [dimension, *(i for i in range(3) if i != dimension), 3]
        back = [order.index(i) for i in range(4)]
        apart = far_rows(x.permute(order).reshape(3, -1))
        return apart.view(3, 1, 1, -1).permute(back)

    given = {name: draw(*shape, 2) for name in "qkvg"}
    prefix = draw(2, *shape, 2)
    if which == "prefix":  # keys and values are two calls' worth apart; the far one is enough
        flat = far_rows(draw(3, 4))
        order = [dimension, *(i for i in range(3) if i != dimension)]
        apart = flat.view(3, 1, 1, 2, 2).permute(3, *(order.index(i) for i in range(3)), 4)
        prefix = apart
    else:
        given[which] = far(given[which])
    leaves = wanting(given["q"], given["k"], given["v"], prefix)
    both(prefix_attention, formula, leaves, given["g"])


@interpreted_only
def test_nothing_is_joined_and_what_lies_ahead_is_not_read():
    """Each program reads its queries once, the prefix once, and the text up to its last query."""
    B, H, p, d = 2, 1, 3, 16
    T = 2 * tiles(draw(d))[0]  # two programs; BLOCK_N is as large
    q, k, v, _ = tensors(B, H, T, T, 1, d)
    rows = draw(2, 1, H, p, d)
    with Traffic() as traffic:
        o = prefix_attention(q, k, v, rows.expand(-1, B, -1, -1, -1))
    programs = 2 * B * H
    assert traffic.loaded["t_q"] == traffic.stored["t_o"] == nbytes(o)
    assert traffic.loaded["t_pk"] == traffic.loaded["t_pv"] == programs * nbytes(rows[0])
    assert traffic.loaded["t_k"] == traffic.loaded["t_v"] == 1.5 * nbytes(k)
    assert sum(traffic.stored.values()) == nbytes(o) + 4 * B * H * T, "o and lse, nothing else"
    with Traffic() as traffic:
        torch.autograd.grad(o, [q, k, v], torch.ones_like(o))
    keys = nbytes(k) * 2.5 + B * nbytes(rows[0])  # walked over for dq, then owned; the prefix too
    assert traffic.loaded["t_k"] + traffic.loaded["t_pk"] == keys + programs * nbytes(rows[0])
    assert traffic.stored["t_dq"] == nbytes(q)


def test_a_model_trains_as_without_it(monkeypatch):
    technique = PrefixTuning(3, reparameterize=False)
    check_model(technique, defined.prefix_attention, monkeypatch)
