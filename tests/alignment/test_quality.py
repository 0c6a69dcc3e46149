"""How good an alignment is on rows it has not seen, beside what chance would give."""

import math

import pytest
import torch
from helpers import tiny_models
from theseus_transport import align
from theseus_transport.activations.capture import capture
from theseus_transport.activations.links import Pairs
from theseus_transport.alignment.quality import Quality, matched, quality, warn
from theseus_transport.linalg.procrustes import procrustes
from theseus_transport.models.base import Base
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from theseus_transport.recipes.maps import Dense, Heads


def moment_of(source, target):
    return source.T @ target


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
        t = Dense(procrustes(moment_of(x[:2000], y[:2000])).map)
        wanted = math.sqrt(6 / (6 + 8 * noise**2))  # energies: 6 of signal, 8 noise^2 of noise
        held = x[2000:], y[2000:]
        assert matched(t, *held) == pytest.approx(wanted, abs=1e-12 if noise == 0 else 5 / math.sqrt(2000))
        direct = (held[0] @ t.matrix * held[1]).sum() / (held[0].norm() * held[1].norm())
        assert matched(t, *held) == pytest.approx(float(direct), rel=1e-12)
        row = Quality("a", *quality(t, held, 2000))
        assert abs(row.shifted) < 5 / math.sqrt(2000) and not row.near_chance
        warn([row])
    assert not caplog.messages
    poor = Quality("a", *quality(t, (held[0], held[1].roll(-1, 0)), 2000))
    warn([poor])
    assert poor.near_chance and "1 of 1 maps are near chance on held-out data, first a" in caplog.text
    assert Quality("a", float("nan"), 0.0).near_chance and Quality("a", 0.97, 0.96).near_chance is False
    assert Quality("a", 0.961, 0.96).near_chance


def test_scales_and_copies_of_heads_do_not_count():
    """Two source heads of 3, in other axes at scales 5 and 0.2, the first feeding two target heads: a perfect match."""
    x, _ = rotated(width=6)
    q = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    y = torch.cat([x[:, :3] @ q * 5, x[:, 3:] @ q * 5, x[:, :3] @ q * 5], 1)
    heads = Heads(torch.tensor([0, 1, 0]), torch.stack([q * 5, q * 0.2, q]), 2)
    assert matched(heads, x, y) == pytest.approx(1, rel=1e-12)
    assert matched(heads, 0 * x, y) == 0


@pytest.mark.parametrize("samples, step", [(5, 4), (1, 10)])
def test_shifted_rows(samples, step):
    """Another sample's rows, or of one sample those half of it away; a map is measured by the same rows either way."""
    x, y = rotated(rows=20)
    t = Dense(torch.eye(6, 8, dtype=torch.float64))
    held, shifted = quality(t, (x, y), samples)
    assert held == matched(t, x, y) != shifted
    assert shifted == pytest.approx(matched(t, x, y.roll(-step, 0)), rel=1e-12)


def test_masked_tokens_are_no_rows():
    """What is kept of a batch is what pairs: rows of its tokens through the mask."""
    torch.manual_seed(0)
    model = tiny_models.llama("source").double()
    ids, mask = torch.randint(0, 300, (2, 8)), torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    with capture(model, model, Pairs.by_position(*[Geometry.of(model)] * 2)) as seen:
        seen.kept = {}
        seen.run(*[{"input_ids": ids, "attention_mask": mask}] * 2)
    assert {len(rows) for kept in seen.kept.values() for rows in kept} == {13}
    assert not any(moment.count for moment in seen.moments.values())
    assert not any(float(energy.source.sum()) for energy in seen.energies.values())


@pytest.mark.parametrize("recipe", ["coherent", "paper"])
@pytest.mark.parametrize("make", [tiny_models.llama, tiny_models.vit])
def test_a_model_and_itself_match_and_shifted_rows_do_not(recipe, make):
    torch.manual_seed(0)
    model = make("source").double()
    text = make is tiny_models.llama
    key = "input_ids" if text else "pixel_values"
    data = torch.randint(0, 300, (24, 16)) if text else torch.randn(64, 3, 8, 8, dtype=torch.float64)
    alignment = align(model, model, [{key: data[:16]}], recipe=recipe)
    with capture(model, model, alignment.pairs, energies=False) as seen:
        seen.kept = {}
        seen.run(*[{key: data[16:]}] * 2)
    bases, samples = Pair(*[Base.of(model, alignment.source)] * 2), len(data) - 16
    maps = {name: alignment.maps[name] for name in seen.kept if name in alignment.maps}
    solver = alignment.recipe.solver(*bases, alignment.blocks, alignment.recipe)
    mapped = {name: solver.as_mapped(seen.kept[name], seen.links[name]) for name in maps}
    rows = [Quality(name, *quality(t, mapped[name], samples)) for name, t in maps.items()]
    spaces = {f"{b}.{part}" for b in (0, 1) for part in ("attention", "context", "mlp", "middle")} | {"final"}
    assert {row.space for row in rows} == spaces
    for row in rows:
        assert row.held == pytest.approx(1, abs=1e-6), row  # of what 256 tokens determine: all, in float64
        assert row.shifted < 0.99 and not row.near_chance, row
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
