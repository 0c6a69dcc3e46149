"""Parity of the ``paper`` recipe with outputs of the official code (tests/data/README.md).

The official code fills null spaces with what rounding left, so updates are compared on the directions the reference's
own float64 cross determines; finding fewer directions than it is a failure, not a smaller comparison.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from theseus_transport import Recipe, tokens
from theseus_transport.maps import Dense, Map
from theseus_transport.moments import CrossMoment
from theseus_transport.paper import output_map
from theseus_transport.procrustes import FLOOR, procrustes

DATA = Path(__file__).parent / "data"
CASES = ("widen_interpolate2d", "narrow_same_tokens", "widen_centered")
OBSERVED = 1e-6  # float32 `expected` rounds at 6e-8, amplified by a polar factor of condition up to 1e4
DERIVED = 2e-5  # float32 weights and activations agree with their own products to 6e-8, amplified likewise
LINEAR = ("attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj")
LAYERS = [f"transformer.resblocks.{b}.{layer}" for b in (0, 1) for layer in LINEAR]


@cache
def case(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    path = DATA / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return load_file(path), {k: json.loads(metadata[k]) for k in ("geometry", "options")}


def centred(name: str) -> bool:
    return bool(case(name)[1]["options"].get("center_acts"))


def moment(name: str, tap: str, *, raw: bool = False) -> CrossMoment:
    """Of one tap, source tokens interpolated to the target's grid; centred where the case is, unless ``raw``."""
    tensors, facts = case(name)
    source, target = (tensors[f"activations/{side}/{tap}"].double() for side in ("source", "target"))
    mixing = None
    if source.ndim == 3 and source.shape[1] != target.shape[1]:
        sides = (facts["geometry"][side] for side in ("source", "target"))
        grids = [(side["image"] // side["patch"],) * 2 for side in sides]
        mixing = tokens.bilinear(*grids).batched(len(source))
    found = CrossMoment.zeros(source.shape[-1], target.shape[-1])
    found.update(source.flatten(0, -2), target.flatten(0, -2), mixing)
    return found.centred() if centred(name) and not raw else found


def part(name: str, group: str, layer: str, kind: str) -> torch.Tensor:
    """Weight or bias of a layer from `delta`, `expected`, `source` or `target`; q, k, v cut out of the fused one."""
    tensors, stem = case(name)[0], f"{group}/visual.{layer}"
    if layer.endswith(("q_proj", "k_proj", "v_proj")):
        fused = tensors[f"{stem.rsplit('.', 1)[0]}.in_proj_{kind}"]
        return fused.chunk(3)["qkv".index(layer[-6])].double()
    return tensors[f"{stem}.{kind}"].double()


def reference_map(cross: torch.Tensor) -> torch.Tensor:
    """The polar factor on the directions the reference determined."""
    u, s, vh = torch.linalg.svd(cross, full_matrices=False)
    rank = int((s > FLOOR * s[0]).sum())
    return u[:, :rank] @ vh[:rank]


def difference(ours: torch.Tensor, expected: torch.Tensor, *sides: torch.Tensor | None) -> float:
    """Relative, on the target directions the maps ``sides`` (rows, columns) determine."""
    for axis, t in enumerate(sides):
        if t is not None:
            expected = torch.tensordot(expected, t.T @ t, dims=([axis], [0])).movedim(-1, axis)
    return float((ours - expected).norm() / expected.norm())


def rows_of(t: Map, matrix: torch.Tensor) -> torch.Tensor:
    return t(matrix.T).T


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_linear_layer_with_observed_outputs(name: str, layer: str) -> None:
    inside, outside = (moment(name, f"{tap}.{side}").cross for tap, side in ((_reads(layer), "in"), (layer, "out")))
    t_in, t_out = procrustes(inside), procrustes(outside)
    kept_in, kept_out = reference_map(inside), reference_map(outside)
    assert int(t_in.rank) >= torch.linalg.matrix_rank(kept_in) and int(t_out.rank) >= torch.linalg.matrix_rank(kept_out)
    moved = rows_of(Dense(t_out.map), Dense(t_in.map)(part(name, "delta", layer, "weight")))
    assert difference(moved, part(name, "expected", layer, "weight"), kept_out, kept_in) <= OBSERVED
    bias = part(name, "delta", layer, "bias") @ t_out.map
    assert difference(bias, part(name, "expected", layer, "bias"), kept_out) <= OBSERVED


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("layer", LAYERS)
def test_linear_layer_with_derived_outputs(name: str, layer: str) -> None:
    """The outputs' moment follows from the inputs' and the weights; expanding layers stay factored."""
    seen = moment(name, f"{_reads(layer)}.in", raw=True)
    weights = [
        torch.cat([part(name, s, layer, "weight"), part(name, s, layer, "bias")[:, None]], 1)
        for s in ("source", "target")
    ]
    polar, t_out = output_map(seen, weights[0], weights[1], recipe=Recipe(name="paper", center=centred(name)))
    kept_in, kept_out = (reference_map(moment(name, tap).cross) for tap in (f"{_reads(layer)}.in", f"{layer}.out"))
    assert int(polar.rank) >= torch.linalg.matrix_rank(kept_out)
    moved = rows_of(
        t_out, Dense(procrustes(moment(name, f"{_reads(layer)}.in").cross).map)(part(name, "delta", layer, "weight"))
    )
    assert difference(moved, part(name, "expected", layer, "weight"), kept_out, kept_in) <= DERIVED


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_norm_vectors(name: str, kind: str) -> None:
    cross = moment(name, "ln_post.out").cross
    moved = part(name, "delta", "ln_post", kind) @ procrustes(cross).map
    assert difference(moved, part(name, "expected", "ln_post", kind), reference_map(cross)) <= OBSERVED


@pytest.mark.parametrize("name", CASES)
def test_projection_to_the_output(name: str) -> None:
    """``proj`` is stored [width, output]; eight images determine eight directions of its output."""
    inside, outside = moment(name, "ln_post.out").cross, moment(name, "root.out").cross
    tensors = case(name)[0]
    moved = procrustes(inside).map.T @ tensors["delta/visual.proj"].double() @ procrustes(outside).map
    kept = reference_map(inside), reference_map(outside)
    assert difference(moved, tensors["expected/visual.proj"].double(), *kept) <= OBSERVED


def test_most_of_the_official_expansion_lies_in_the_null_space() -> None:
    """Why comparisons need the determined subspace: 86 % of an official up-projection is what rounding left."""
    layer = LAYERS[4]
    expected = part("widen_interpolate2d", "expected", layer, "weight")
    kept = reference_map(moment("widen_interpolate2d", f"{layer}.out").cross)
    assert float((expected - kept.T @ kept @ expected).norm() / expected.norm()) > 0.8


def _reads(layer: str) -> str:
    """The stored tap of a layer's input: q, k and v read one."""
    return layer[: -len("q_proj")] + "q_proj" if layer.endswith(("k_proj", "v_proj")) else layer
