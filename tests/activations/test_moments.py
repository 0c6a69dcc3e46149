"""Cross-moments: they add, and follow mixings, linear layers and norms exactly as the data would."""

from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from helpers.no_waiting import NoHost
from hypothesis import given, settings
from hypothesis import strategies as st
from theseus_transport import InputRefused
from theseus_transport.activations import row_mixing
from theseus_transport.activations.moments import CrossMoment, Energy, add_energies, affine, update_together
from theseus_transport.activations.row_mixing import RowMixing

QUICK = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64 sums of up to 50 products of order 1, taken in another order
SEED, TOKENS, WIDTH = st.integers(0, 10**6), st.integers(2, 50), st.integers(1, 8)


class Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator) + 0.3


def moment(
    source: torch.Tensor,
    target: torch.Tensor,
    source_mixing: RowMixing | None = None,
    target_mixing: RowMixing | None = None,
) -> CrossMoment:
    found = CrossMoment.zeros(source.shape[1], target.shape[1])
    found.update(source, target, source_mixing, target_mixing)
    return found


def assert_same(ours: CrossMoment, expected: CrossMoment, *, energies: bool = True) -> None:
    assert ours.count == expected.count
    for name in ("cross", "source_sum", "target_sum", *(("source_energy", "target_energy") if energies else ())):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), **ROUNDING)


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH)
def test_a_moment_is_its_sums(seed: int, count: int, own: int, other: int) -> None:
    draw = Draw(seed)
    x, y = draw(count, own), draw(count, other)
    expected = CrossMoment(x.T @ y, x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), count)
    assert_same(moment(x, y), expected)
    ones = torch.ones(count, 1, dtype=torch.float64)
    torch.testing.assert_close(moment(x, y).augmented, torch.cat([x, ones], 1).T @ torch.cat([y, ones], 1), **ROUNDING)


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH, st.floats(0, 1))
def test_merge_is_the_union_and_commutes(seed: int, count: int, own: int, other: int, share: float) -> None:
    draw, cut = Draw(seed), int(share * count)
    x, y = draw(count, own), draw(count, other)
    first, second = moment(x[:cut], y[:cut]), moment(x[cut:], y[cut:])
    assert_same(first + second, moment(x, y))
    for f in fields(CrossMoment):
        assert torch.equal(*(torch.as_tensor(getattr(m, f.name)) for m in (first + second, second + first)))
    assert_same(first + CrossMoment.zeros(own, other), first)


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH, WIDTH, WIDTH)
def test_derive_is_the_moment_of_the_outputs(
    seed: int, count: int, own: int, other: int, out_s: int, out_t: int
) -> None:
    draw = Draw(seed)
    x, y, layers = draw(count, own), draw(count, other), (draw(out_s, own + 1), draw(out_t, other + 1))
    outputs = [z @ w[:, :-1].T + w[:, -1] for z, w in zip((x, y), layers, strict=True)]
    derived = moment(x, y).derive(*layers)
    assert_same(derived, moment(*outputs), energies=False)
    assert derived.source_energy.isnan().all() and derived.target_energy.isnan().all()  # unknown, not zero
    assert affine(layers[0])[-1].tolist() == [0] * own + [1]


def test_derive_passes_through_a_row_mixing() -> None:
    """Rows sum to one, so a mixed moment follows a layer with a bias like any other; its count is the rows'."""
    draw = Draw(0)
    x, y, layers = draw(12, 4), draw(8, 5), (draw(3, 5), draw(6, 6))
    mixing = row_mixing.linear(12, 8)
    outputs = [z @ w[:, :-1].T + w[:, -1] for z, w in zip((x, y), layers, strict=True)]
    assert_same(moment(x, y, mixing).derive(*layers), moment(*outputs, mixing), energies=False)
    selected = row_mixing.select(torch.arange(8) % 2)
    assert moment(x, y, row_mixing.linear(12, 4), selected).count == 4


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH)
def test_unfold_inverts_a_norms_gain_and_bias(seed: int, count: int, own: int, other: int) -> None:
    draw = Draw(seed)
    z = draw(count, own), draw(count, other)
    norms = [(draw(d).abs() + 0.3, draw(d)) for d in (own, other)]
    behind = [side * gain + bias for side, (gain, bias) in zip(z, norms, strict=True)]
    ours, expected = moment(*behind).unfold(*norms), moment(*z)
    assert ours.count == expected.count
    for f in fields(CrossMoment)[:-1]:  # gains down to 0.3 amplify rounding, by up to 10 in cross and energies
        torch.testing.assert_close(getattr(ours, f.name), getattr(expected, f.name), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("side", ["source", "target"])
def test_unfold_refuses_a_zero_gain(side: str) -> None:
    draw = Draw(0)
    norms = {s: (torch.ones(6), torch.zeros(6)) for s in ("source", "target")}
    norms[side][0][4] = 0
    with pytest.raises(InputRefused, match=f"of the {side} has gain 0 at feature 4"):
        moment(draw(9, 6), draw(9, 6)).unfold(norms["source"], norms["target"])


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH)
def test_centred_is_the_moment_about_the_means(seed: int, count: int, own: int, other: int) -> None:
    draw = Draw(seed)
    x, y = draw(count, own), draw(count, other)
    ours, expected = moment(x, y).centred(), moment(x - x.mean(0), y - y.mean(0))
    assert not ours.source_sum.any() and not ours.target_sum.any()
    assert_same(ours, replace(expected, source_sum=0 * expected.source_sum, target_sum=0 * expected.target_sum))
    assert torch.equal(CrossMoment.zeros(own, other).centred().cross, torch.zeros(own, other, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sides", ["source", "target", "both"])
def test_mixing_on_either_side(sides: str, dtype: torch.dtype) -> None:
    draw = Draw(1)
    mixings = [row_mixing.linear(20, 9) if sides in (side, "both") else None for side in ("source", "target")]
    x, y = (draw(9 if m is None else 20, d).to(dtype) for m, d in zip(mixings, (4, 5), strict=True))
    mixed = [z.double() if m is None else m(z.double()) for z, m in zip((x, y), mixings, strict=True)]
    ours, expected = moment(x, y, *mixings), moment(*mixed)
    assert ours.count == 9
    rounding = 1e-12 if dtype == torch.float64 else 9 * 1e-6  # products and sums of 9 rows in float32
    for f in fields(CrossMoment)[:-1]:
        torch.testing.assert_close(getattr(ours, f.name), getattr(expected, f.name), rtol=rounding, atol=rounding)


def test_save_and_load(tmp_path: Path) -> None:
    draw = Draw(2)
    seen = moment(draw(9, 4), draw(9, 5))
    for i, kept in enumerate((seen, seen.derive(draw(3, 5), draw(6, 6)))):  # the second holds NaN energies
        kept.save(tmp_path / f"{i}.safetensors")
        loaded = CrossMoment.load(tmp_path / f"{i}.safetensors")
        assert loaded.count == kept.count and isinstance(loaded.count, int)
        for f in fields(CrossMoment)[:-1]:
            torch.testing.assert_close(getattr(loaded, f.name), getattr(kept, f.name), rtol=0, atol=0, equal_nan=True)


def test_merge_refuses_other_widths() -> None:
    with pytest.raises(InputRefused, match=r"cannot merge a moment \[4, 5\] with \[4, 6\]"):
        CrossMoment.zeros(4, 5) + CrossMoment.zeros(4, 6)


@QUICK
@given(SEED, TOKENS, WIDTH, WIDTH)
def test_energies(seed: int, count: int, own: int, other: int) -> None:
    """Per feature, and in total with every token's mean over features removed; they add over any split."""
    draw, cut = Draw(seed), count // 3
    sides = draw(count, own), draw(count, other)
    whole, parts = Energy.zeros(own, other), [Energy.zeros(own, other) for _ in range(2)]
    whole.update(*sides)
    for part, rows in zip(parts, (slice(cut), slice(cut, None)), strict=True):
        part.update(*(x[rows] for x in sides))
    for found in (whole, parts[0] + parts[1]):
        for x, energy, centred in zip(sides, (found.source, found.target), found.centred, strict=True):
            torch.testing.assert_close(energy, x.square().sum(0), **ROUNDING)
            assert centred == pytest.approx(float((x - x.mean(1, keepdim=True)).square().sum()), rel=1e-12, abs=1e-11)


def test_energies_of_mixed_rows_and_of_several_chunks() -> None:
    draw = Draw(3)
    rows = 4096 + 7  # more than cross_moment_ multiplies at once
    x, y = draw(rows, 4), draw(11, 5)
    found = Energy.zeros(4, 5)
    mixing = row_mixing.linear(11, rows)
    found.update(x.float(), y, None, mixing)
    torch.testing.assert_close(found.source, x.float().double().square().sum(0), **ROUNDING)
    torch.testing.assert_close(found.target, mixing(y).square().sum(0), **ROUNDING)
    own = mixing(y) - mixing(y).mean(1, keepdim=True)
    assert found.centred[1] == pytest.approx(float(own.square().sum()), rel=1e-12)


def test_nothing_waits_for_a_device_while_tokens_are_added() -> None:
    """Of several outputs and spaces at once; what is added is what each alone would be."""
    draw, mixing = Draw(5), row_mixing.linear(9, 14)
    rows = [draw(9, width) for width in (4, 7)]
    alone = [Energy.zeros(x.shape[1], 2) for x in rows]
    for energy, x in zip(alone, rows, strict=True):
        energy.add(0, x, mixing)
    energies, moments = [Energy.zeros(x.shape[1], 2) for x in rows], [CrossMoment.zeros(x.shape[1], 4) for x in rows]
    with NoHost():
        add_energies(energies, 0, rows, mixing)
        update_together(moments, [(x, rows[0]) for x in rows], (mixing, mixing))
    for one, other in zip(energies, alone, strict=True):
        assert torch.equal(one.source, other.source) and one.centred == other.centred and one.centred[0] > 0
