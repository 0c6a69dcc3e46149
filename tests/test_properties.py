"""Laws that hold for every input: of moments, mixings, maps, the polar factor, and of moving an update."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache

import pytest
import theseus_transport as tt
import torch
from helpers import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from theseus_transport.activations.moments import CrossMoment
from theseus_transport.activations.row_mixing import RowMixing, from_dense
from theseus_transport.linalg.procrustes import procrustes
from theseus_transport.recipes.maps import Dense, Factored, Heads, Identity, Map, from_tensors
from torch import Tensor, nn

LAWS = settings(max_examples=20, deadline=None, derandomize=True, database=None)
SEED, TOKENS, WIDTH = st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 9)
TENTHS = st.integers(-20, 20).map(lambda n: n / 10)
ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64 sums of up to 40 products of order 1, taken in another order


class Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def turn(self, width: int) -> Tensor:
        return torch.linalg.qr(self(width, width))[0]


def moment(x: Tensor, y: Tensor, *mixings: RowMixing | None) -> CrossMoment:
    found = CrossMoment.zeros(x.shape[1], y.shape[1])
    found.update(x, y, *mixings)
    return found


def assert_same(ours: CrossMoment, expected: CrossMoment, **bounds: float) -> None:
    assert ours.count == expected.count
    for name in (f.name for f in fields(CrossMoment) if f.name != "count"):
        torch.testing.assert_close(getattr(ours, name), getattr(expected, name), **(bounds or ROUNDING))


# --- moments ---------------------------------------------------------------------------------------------------------


@LAWS
@given(SEED, WIDTH, WIDTH, st.lists(st.integers(0, 20), max_size=6), st.sampled_from([torch.float64, torch.float32]))
def test_any_split_equals_the_whole(seed: int, own: int, other: int, counts: list[int], dtype: torch.dtype) -> None:
    draw = Draw(seed)
    x, y = (draw(sum(counts), width).to(dtype) for width in (own, other))
    parts = [moment(a, b) for a, b in zip(x.split(counts), y.split(counts), strict=True)]
    running = CrossMoment.zeros(own, other)
    for a, b in zip(x.split(counts), y.split(counts), strict=True):
        running.update(a, b)
    # each product of n rows of float32 numbers of order 1 rounds to n eps, and two such sums are compared
    eps = 1e-12 if dtype is torch.float64 else 2 * 120 * torch.finfo(dtype).eps
    for split in (running, sum(parts, start=CrossMoment.zeros(own, other))):
        assert_same(split, moment(x, y), rtol=eps, atol=eps)


@LAWS
@given(SEED, TOKENS, TOKENS, TOKENS)
def test_merge_is_associative_and_commutes(seed: int, first: int, second: int, third: int) -> None:
    draw = Draw(seed)
    a, b, c = (moment(draw(n, 3), draw(n, 5)) for n in (first, second, third))
    assert_same((a + b) + c, a + (b + c))
    ours, swapped = a + b, b + a
    for f in fields(CrossMoment):
        assert torch.equal(torch.as_tensor(getattr(ours, f.name)), torch.as_tensor(getattr(swapped, f.name)))


@LAWS
@given(SEED, TOKENS, WIDTH, WIDTH)
def test_swapping_the_sides_transposes(seed: int, count: int, own: int, other: int) -> None:
    draw = Draw(seed)
    x, y = draw(count, own), draw(count, other)
    ours, swapped = moment(x, y), moment(y, x)
    torch.testing.assert_close(ours.cross, swapped.cross.T, **ROUNDING)
    for name in ("sum", "energy"):
        assert torch.equal(getattr(ours, f"source_{name}"), getattr(swapped, f"target_{name}"))


def stochastic(draw: Draw, rows: int, tokens: int) -> Tensor:
    """A sparse P [rows, tokens] whose rows sum to one."""
    weights = draw(rows, tokens).abs() * (draw(rows, tokens) > 0.5)
    weights[:, 0] += 0.1
    return weights / weights.sum(1, keepdim=True)


@LAWS
@given(SEED, TOKENS, TOKENS, TOKENS)
def test_mixing_composes_and_changes_sides(seed: int, first: int, second: int, rows: int) -> None:
    draw = Draw(seed)
    p, q, x, y = stochastic(draw, rows, second), stochastic(draw, second, first), draw(first, 4), draw(rows, 5)
    mixed = moment(x, y, from_dense(p @ q))
    assert_same(moment(from_dense(q)(x), y, from_dense(p)), mixed)  # (P Q) x = P (Q x)
    torch.testing.assert_close(mixed.cross, x.T @ ((p @ q).T @ y), **ROUNDING)  # (P x)^T y = x^T (P^T y)
    assert_same(moment(y, x, None, from_dense(p @ q)), moment(y, p @ q @ x))


# --- maps ------------------------------------------------------------------------------------------------------------


def some_maps(draw: Draw) -> list[tuple[Map, int]]:
    """Every kind of map, with the width it reads."""
    heads = Heads(torch.tensor([1, 0, 1]), draw(3, 4, 5), heads=2)
    return [(Identity(), 6), (Dense(draw(6, 9)), 6), (Factored(draw(7, 2), draw(2, 11)), 7), (heads, 8)]


@LAWS
@given(SEED, st.integers(0, 5), TENTHS)
def test_a_map_is_its_matrix(seed: int, rows: int, by: float) -> None:
    draw = Draw(seed)
    for kind, width in some_maps(draw):
        x, y, matrix = draw(rows, width), draw(rows, width), kind(torch.eye(width, dtype=torch.float64))
        torch.testing.assert_close(kind(x), x @ matrix, **ROUNDING)
        torch.testing.assert_close(kind(x + by * y), kind(x) + by * kind(y), **ROUNDING)
        torch.testing.assert_close(kind(x[None])[0], kind(x), **ROUNDING)
        stored = from_tensors(type(kind).__name__, kind.tensors())
        assert torch.equal(stored(x), kind(x))


@LAWS
@given(SEED, st.integers(1, 9))
def test_maps_compose(seed: int, width: int) -> None:
    """Through a rotated copy of a model one arrives where one goes directly: T_AC = T_AB T_BC."""
    draw = Draw(seed)
    a = draw(4 * width, width)
    b, c = a @ draw.turn(width), draw(4 * width, width + 2)
    direct, there, onward = (procrustes(moment(x, y).cross).map for x, y in ((a, c), (a, b), (b, c)))
    through = Dense(onward)(Dense(there)(torch.eye(width, dtype=torch.float64)))
    torch.testing.assert_close(through, direct, rtol=0, atol=1e-9)  # eps over a smallest singular value of 1e-6


# --- the polar factor ------------------------------------------------------------------------------------------------


@LAWS
@given(SEED, WIDTH, WIDTH, st.integers(0, 9), st.integers(-30, 30))
def test_polar_follows_rotations_scale_and_transposition(seed: int, own: int, other: int, rank: int, ten: int) -> None:
    draw = Draw(seed)
    u, v = draw.turn(own), draw.turn(other)
    values = torch.linspace(1, 0.1, min(own, other, rank), dtype=torch.float64)  # far above the floor: rank is certain
    c = (u[:, : len(values)] * values) @ v[:, : len(values)].T
    polar, q, r = procrustes(c), draw.turn(own), draw.turn(other)
    bound = dict(rtol=0, atol=1e-12)  # eps times 9 over the smallest value, 0.1, with room
    assert int(polar.rank) == len(values)
    torch.testing.assert_close(procrustes(q @ c @ r).map, q @ polar.map @ r, **bound)
    torch.testing.assert_close(procrustes(c * 10.0**ten).map, polar.map, **bound)
    torch.testing.assert_close(procrustes(-c).map, -polar.map, **bound)
    torch.testing.assert_close(procrustes(c.T).map, polar.map.T, **bound)
    torch.testing.assert_close(procrustes(polar.map).map, polar.map, **bound)


# --- transport -------------------------------------------------------------------------------------------------------


@cache
def pair(name: str) -> tuple[nn.Module, nn.Module, tt.Alignment]:
    """(source, target, alignment) of tiny models in float64."""
    torch.manual_seed(0)
    make = {"llama": tiny_models.llama, "vit": tiny_models.vit}[name]
    source, target = (make(side).double() for side in tiny_models.SIZES)
    if name == "llama":
        batches = [{"input_ids": torch.randint(0, tiny_models.VOCABULARY, (8, 16))} for _ in range(2)]
    else:
        batches = [{"pixel_values": torch.randn(40, 3, 8, 8, dtype=torch.float64)}]
    return source, target, tt.align(source, target, batches, recipe="coherent")  # maps, whose moves have laws


def tuned(name: str, *changes: tuple[float, int]) -> dict[str, Tensor]:
    """The source's tensors plus factor times a random change by seed; not of norms, whose gains multiply readers."""
    state = dict(pair(name)[0].state_dict())
    for factor, seed in changes:
        draw = Draw(seed)
        for key in (key for key in state if "norm" not in key):
            state[key] = state[key] + factor * 0.01 * draw(*state[key].shape)
    return state


def moved(name: str, state: Mapping[str, Tensor], **options: float) -> tt.Update:
    source, target, alignment = pair(name)
    return tt.transport(alignment, tt.Delta.between(source, state), target, **options)


def assert_close(ours: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(expected) and len(ours) > 10
    for key in expected:  # float64, sums of 48 products, divided by gains around 1 and by scales; updates are near 0.1
        torch.testing.assert_close(ours[key], expected[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "vit"])
@settings(LAWS, max_examples=4)
@given(by=st.tuples(TENTHS.filter(bool), TENTHS.filter(bool)), seed=SEED)
def test_transport_is_linear(name: str, by: tuple[float, float], seed: int) -> None:
    first, second = (moved(name, tuned(name, (1.0, seed + i))) for i in range(2))
    both = moved(name, tuned(name, (by[0], seed), (by[1], seed + 1)))
    assert_close(both, {key: by[0] * first[key] + by[1] * second[key] for key in first})
    assert_close(moved(name, tuned(name, (1.0, seed)), alpha=by[0]), {key: by[0] * first[key] for key in first})


@settings(LAWS, max_examples=6)
@given(seed=SEED, rank=st.integers(1, 5), alpha=st.integers(1, 16), layer=st.sampled_from(
    ["self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]))  # fmt: skip
def test_lora_equals_its_dense_product(seed: int, rank: int, alpha: int, layer: str) -> None:
    source, target, alignment = pair("llama")
    draw, name = Draw(seed), f"model.layers.1.{layer}"
    out, width = source.get_submodule(name).weight.shape
    a, b = draw(rank, width), draw(out, rank)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": [layer.split(".")[-1]]}
    factors = {f"base_model.model.{name}.lora_{part}.weight": tensor for part, tensor in (("A", a), ("B", b))}
    ours = tt.transport(alignment, tt.Delta.from_lora(config, factors, source), target)
    state = dict(source.state_dict())
    state[f"{name}.weight"] = state[f"{name}.weight"] + alpha / rank * (b @ a)
    dense = tt.transport(alignment, tt.Delta.between(source, state), target)
    key = f"{name}.weight"
    assert float(dense[key].norm()) > 0.1
    torch.testing.assert_close(ours[key], dense[key], rtol=1e-9, atol=1e-9)  # dense: a difference of tensors of order 1
