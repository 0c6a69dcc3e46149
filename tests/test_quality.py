"""How good an alignment is on rows it has not seen, and what is predicted of a job."""

import math

import pytest
import tiny
import torch
from theseus_transport import align
from theseus_transport.maps import Dense, Heads
from theseus_transport.moments import CrossMoment
from theseus_transport.procrustes import procrustes
from theseus_transport.quality import Quality, Twin, matched, measure, quality
from theseus_transport.tokens import select


def moment_of(source, target):
    moment = CrossMoment.zeros(source.shape[1], target.shape[1])
    moment.update(source, target)
    return moment


def rotated(rows=4000, width=6, wide=8, noise=0.0):
    """Rows x, and x in other axes of a wider space with noise, in float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    q = torch.linalg.qr(torch.randn(wide, width, generator=generator, dtype=torch.float64))[0].T
    return x, x @ q + noise * torch.randn(rows, wide, generator=generator, dtype=torch.float64)


def test_the_formula(caplog):
    """Exact for a rotation; with noise sqrt(signal / energy), and 1 / sqrt(rows) for rows that do not pair."""
    for noise in (0.0, 1.0, 3.0):
        x, y = rotated(noise=noise)
        t = Dense(procrustes(moment_of(x[:2000], y[:2000]).cross).map)
        held = moment_of(x[2000:], y[2000:])
        wanted = math.sqrt(6 / (6 + 8 * noise**2))  # energies: 6 of signal, 8 noise^2 of noise
        assert matched(t, held) == pytest.approx(wanted, abs=1e-12 if noise == 0 else 5 / math.sqrt(2000))
        direct = (x[2000:] @ t.matrix * y[2000:]).sum() / (x[2000:].norm() * y[2000:].norm())
        assert matched(t, held) == pytest.approx(float(direct), rel=1e-12)
        shifted = moment_of(x[2000:], y[2000:].roll(-1, 0))
        (row,) = quality({"a": t}, {"a": held, "no map": held}, {"a": shifted, "no map": held})
        assert abs(row.shifted) < 5 / math.sqrt(2000) and not row.near_chance
    assert not caplog.messages
    (row,) = quality({"a": t}, {"a": shifted}, {"a": held})
    assert row.near_chance and "1 of 1 maps are near chance on held-out data, first a" in caplog.text
    assert Quality("a", float("nan"), 0.0).near_chance and Quality("a", 0.97, 0.96).near_chance is False
    assert Quality("a", 0.961, 0.96).near_chance


def test_scales_and_copies_of_heads_do_not_count():
    """Two source heads of 3, in other axes at scales 5 and 0.2, the first feeding two target heads: a perfect match."""
    x, _ = rotated(width=6)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    y = torch.cat([x[:, :3] @ q * 5, x[:, 3:] @ q * 5, x[:, :3] @ q * 5], 1)
    heads = Heads(torch.tensor([0, 1, 0]), torch.stack([q * 5, q * 0.2, q]), 2)
    assert matched(heads, moment_of(x, y)) == pytest.approx(1, rel=1e-12)
    assert matched(heads, moment_of(0 * x, y)) == 0


@pytest.mark.parametrize("samples, step", [(5, 4), (1, 10)])
def test_shifted_rows(samples, step):
    x, y = rotated(rows=20)
    twin = Twin(CrossMoment.zeros(6, 8), samples)
    twin.update(x, y)
    assert torch.equal(twin.held.cross, moment_of(x, y).cross)
    assert torch.allclose(twin.shifted.cross, x.T @ y.roll(-step, 0), rtol=0, atol=1e-12)
    kept = torch.zeros(20, dtype=torch.bool)
    kept[:10] = True
    masked = Twin(CrossMoment.zeros(6, 8), 1)
    masked.update(x, y, select(kept[None]), select(kept[None]))
    assert torch.allclose(masked.shifted.cross, x[:10].T @ y[:10].roll(-5, 0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("recipe", ["coherent", "paper"])
@pytest.mark.parametrize("make", [tiny.llama, tiny.vit])
def test_a_model_and_itself_match_and_shifted_rows_do_not(recipe, make):
    torch.manual_seed(0)
    model = make("source").double()
    text = make is tiny.llama
    key = "input_ids" if text else "pixel_values"
    data = torch.randint(0, 300, (24, 16)) if text else torch.randn(64, 3, 8, 8, dtype=torch.float64)
    alignment = align(model, model, [{key: data[:16]}], recipe=recipe)
    rows = measure(alignment, model, model, ({key: data[16:]}, {key: data[16:]}))
    spaces = {f"{b}.{part}" for b in (0, 1) for part in ("attention", "context", "mlp", "middle")} | {"final"}
    assert {row.space for row in rows} == spaces
    for row in rows:
        assert row.held == pytest.approx(1, abs=1e-6), row  # of what 256 tokens determine: all, in float64
        assert row.shifted < 0.99 and not row.near_chance, row
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
