"""Row mixings against the dense matrices they stand for, and against torch's own interpolation."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from theseus_transport import InputRefused
from theseus_transport.activations import row_mixing
from theseus_transport.activations.row_mixing import RowMixing

QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ROUNDING = dict(rtol=0, atol=1e-14)  # sums of a few products of order 1 in float64


def dense(mixing: RowMixing) -> torch.Tensor:
    """P [rows, tokens]."""
    return mixing(torch.eye(mixing.tokens, dtype=torch.float64))


def stochastic(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Random, about half of it zero, every row summing to one."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.rand(rows, columns, generator=generator, dtype=torch.float64)
    matrix *= torch.rand(rows, columns, generator=generator) < 0.5
    matrix[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] += 0.5
    return matrix / matrix.sum(1, keepdim=True)


MIXINGS = {
    "select": row_mixing.select(torch.tensor([True, False, True, True, False])),
    "mean": row_mixing.mean(5),
    "linear": row_mixing.linear(5, 8),
    "bilinear": row_mixing.bilinear((2, 2), (3, 3)),
    "sparse": row_mixing.from_dense(stochastic(4, 5, 0)),
    "one entry per row": RowMixing(torch.tensor([3, 1]), 5, torch.tensor([0, 1, 2])),
}


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_a_mixing_is_its_matrix(rows: int, columns: int, seed: int) -> None:
    matrix = stochastic(rows, columns, seed)
    mixing = row_mixing.from_dense(matrix)
    assert mixing.rows == rows and mixing.tokens == columns and len(mixing.column) == int((matrix != 0).sum())
    assert torch.equal(dense(mixing), matrix)
    x = torch.randn(columns, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mixing(x), matrix @ x, **ROUNDING)


@QUICK
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_mixing_commutes_with_a_linear_layer(rows: int, columns: int, seed: int) -> None:
    """Why rows must sum to one: the bias passes through."""
    generator = torch.Generator().manual_seed(seed)
    x, w, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((columns, 4), (3, 4), (3,)))
    mixing = row_mixing.from_dense(stochastic(rows, columns, seed))
    torch.testing.assert_close(mixing(x @ w.T + b), mixing(x) @ w.T + b, **ROUNDING)


@pytest.mark.parametrize("name", MIXINGS)
@pytest.mark.parametrize("samples", [1, 3])
def test_batched_mixes_every_sample_alone(name: str, samples: int) -> None:
    mixing = MIXINGS[name]
    x = torch.randn(samples, mixing.tokens, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    whole = mixing.batched(samples)
    assert whole.rows == samples * mixing.rows and whole.tokens == samples * mixing.tokens
    assert torch.equal(whole(x.flatten(0, 1)), torch.cat([mixing(one) for one in x]))


@pytest.mark.parametrize("name", MIXINGS)
@pytest.mark.parametrize("kept", [[0], [1, 2], []], ids=str)
def test_only_keeps_the_rows_that_are_asked_for(name: str, kept: list[int]) -> None:
    mixing = MIXINGS[name].batched(3)
    mask = torch.zeros(mixing.rows, dtype=torch.bool)
    mask[kept] = True
    assert torch.equal(dense(mixing.only(mask)), dense(mixing)[kept])
    assert torch.equal(mixing.leading, torch.stack([row.nonzero()[0, 0] for row in dense(mixing)]))


@pytest.mark.parametrize("name", MIXINGS)
def test_rows_sum_to_one_and_keep_the_dtype(name: str) -> None:
    mixing = MIXINGS[name]
    torch.testing.assert_close(dense(mixing).sum(1), torch.ones(mixing.rows, dtype=torch.float64), **ROUNDING)
    for dtype in (torch.float32, torch.bfloat16):
        assert mixing(torch.ones(mixing.tokens, 2, dtype=dtype)).dtype == dtype
    assert mixing.to(torch.device("cpu")).csr[1].equal(mixing.column)


def test_select_keeps_order_and_never_touches_masked_rows() -> None:
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    x = torch.arange(12.0).reshape(6, 2)
    x[mask.flatten() == 0] = torch.nan  # multiplied by 0 it would spread
    kept = row_mixing.select(mask)
    assert kept.row_ptr is None and kept.weight is None and kept.rows == 3
    assert torch.equal(kept(x), x[[0, 1, 4]])
    assert row_mixing.select(torch.zeros(4)).rows == 0


def test_mean() -> None:
    x = torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(row_mixing.mean(7)(x), x.mean(0, keepdim=True), **ROUNDING)


@pytest.mark.parametrize("size", [(5, 8), (8, 5), (6, 6), (1, 4), (7, 1), (50, 197)], ids=str)
def test_linear_is_torchs_interpolation(size: tuple[int, int]) -> None:
    x = torch.randn(size[0], 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = F.interpolate(x.T[None], size=size[1], mode="linear", align_corners=False)[0].T
    torch.testing.assert_close(row_mixing.linear(*size)(x), expected, **ROUNDING)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("grids", [((4, 4), (6, 6)), ((6, 6), (4, 4)), ((2, 5), (3, 4)), ((3, 3), (3, 3))], ids=str)
def test_bilinear_is_torchs_interpolation(grids: tuple[tuple[int, int], tuple[int, int]], prefix: int) -> None:
    (rows, columns), to = grids
    x = torch.randn(prefix + rows * columns, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    image = x[prefix:].T.reshape(1, 3, rows, columns)
    expected = F.interpolate(image, size=to, mode="bilinear", align_corners=False).reshape(3, -1).T
    mixed = row_mixing.bilinear((rows, columns), to, prefix=prefix)(x)
    assert torch.equal(mixed[:prefix], x[:prefix])
    torch.testing.assert_close(mixed[prefix:], expected, **ROUNDING)


def spans(cuts: list[int]) -> torch.Tensor:
    return torch.tensor([*zip(cuts[:-1], cuts[1:], strict=True)])


@QUICK
@given(st.sets(st.integers(1, 19), max_size=12), st.sets(st.integers(1, 19), max_size=12))
def test_overlap_shares_characters(source: set[int], target: set[int]) -> None:
    """Row of a target token: which share of its characters each source token holds. The text has 20 characters."""
    own, other = (spans([0, *sorted(cuts), 20]) for cuts in (source, target))
    mixing, kept = row_mixing.overlap(own, other)
    assert bool(kept.all())
    sets = [[set(range(*span)) for span in side.tolist()] for side in (own, other)]
    expected = torch.tensor([[len(s & t) / len(t) for s in sets[0]] for t in sets[1]], dtype=torch.float64)
    torch.testing.assert_close(dense(mixing), expected, **ROUNDING)


def test_overlap_leaves_out_what_shares_nothing() -> None:
    """Special tokens hold no characters; a gap of the source's leaves target tokens without a partner."""
    own = torch.tensor([[0, 0], [0, 4], [8, 10]])
    other = torch.tensor([[0, 0], [0, 2], [2, 9], [5, 7], [10, 10]])
    mixing, kept = row_mixing.overlap(own, other)
    assert kept.tolist() == [False, True, True, False, False]
    expected = torch.tensor([[0, 1, 0], [0, 2 / 3, 1 / 3]], dtype=torch.float64)
    torch.testing.assert_close(dense(mixing), expected, **ROUNDING)
    nothing, kept = row_mixing.overlap(own, other[[0, 3]])
    assert nothing.rows == 0 and not kept.any() and nothing(torch.ones(3, 2)).shape == (0, 2)


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(InputRefused, match=r"a row sums to 0\.75, but every row must sum to 1"):
        row_mixing.from_dense(torch.tensor([[0.5, 0.5], [0.75, 0.0]]))
    with pytest.raises(InputRefused, match=r"a row sums to 0, but every row must sum to 1"):
        row_mixing.from_dense(torch.tensor([[0.5, 0.5], [0.0, 0.0]]))
    with pytest.raises(InputRefused, match=r"without weights every row needs exactly one entry; pass weights"):
        RowMixing(torch.tensor([0, 1]), 2, torch.tensor([0, 2]))
