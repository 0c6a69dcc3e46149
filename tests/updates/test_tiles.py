"""Row tiles of large tables: the same update, read and made a few rows at a time; and what a move holds in memory."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from exact.families import GPT2
from exact.models import LLAMA, VIT, Draw, Spec, base, batches, tune
from test_presumed import CONFIG, Disk, bits, made
from theseus_transport import Alignment, Delta, Recipe, Update, align, transport
from theseus_transport.alignment.alignment import outline
from theseus_transport.models import tensors as tensors_module
from theseus_transport.models.base import Base
from theseus_transport.models.family import Slot
from theseus_transport.models.precision import Rounding
from theseus_transport.models.tensors import chunks_of_rows, part_of, row_tiles, rows_of, squares
from theseus_transport.recipes.maps import Dense, Factored, Heads, Identity
from theseus_transport.updates.adapter import PREFIX
from theseus_transport.updates.alpha import matched
from theseus_transport.updates.available import Available
from theseus_transport.updates.layer_moves import Carried, Move, move_bytes
from theseus_transport.updates.output import planned
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

ROUNDING = dict(rtol=1e-12, atol=1e-12)  # float64, sums of 24 products
ROWS = 7
WIDE = {"seed": 5, "width": 36}
UNTIED = partial(base, GPT2)
PAIRS: dict[str, tuple[Spec, Spec]] = {
    "llama": (base(LLAMA), base(LLAMA, **WIDE, intermediate_size=44)),
    "gpt2": (UNTIED(), UNTIED(**WIDE)),
    "vit": (base(VIT), base(VIT, **WIDE)),
}
EMBEDDING, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.gate_proj"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 7 rows of the target, pieces of 100 elements."""
    monkeypatch.setattr(tensors_module, "TILE", 8 * 36 * ROWS)
    monkeypatch.setattr(tensors_module, "PIECE", 100)


@cache
def aligned(pair: str) -> Alignment:
    source, target = PAIRS[pair]
    return align(source.build(), target.build(), batches(source, seed=3, count=1, shape=(8, 16)), recipe="coherent")


def moved(pair: str, **options: object) -> Update:
    source, target = PAIRS[pair]
    delta = Delta.between(Disk(source.state), Disk(tune(source, "everything").state))
    return transport(aligned(pair), delta, Disk(target.state), **options)


def moved_factors(pair: str, layer: str, **options: object) -> Update:
    source, target = PAIRS[pair]
    out, width = source.state[f"{layer}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((2, width), (out, 2)))
    tensors = {f"{PREFIX}{layer}.lora_A.weight": a, f"{PREFIX}{layer}.lora_B.weight": b}
    return transport(aligned(pair), Delta.from_lora(CONFIG, tensors, source.state), Disk(target.state), **options)


# --- rows of a tensor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 36), (7, 36), (8, 36), (1, 9000), (3, 36), (14, 36)], ids=str)
def test_tiles_are_all_rows_in_order(shape: tuple[int, int], small: None) -> None:
    tiles = row_tiles(shape)
    if 8 * shape[0] * shape[1] <= tensors_module.TILE:
        assert tiles == ()
        return
    rows = [row for tile in tiles for row in range(tile.start, tile.stop)]
    assert rows == list(range(shape[0]))
    assert all(8 * (t.stop - t.start) * shape[1] <= tensors_module.TILE or t.stop - t.start == 1 for t in tiles)


@pytest.mark.parametrize("shape", [(9000,), (), (0, 5), (40, 40, 40)], ids=str)
def test_what_is_no_large_matrix_has_no_tiles(shape: tuple[int, ...], small: None) -> None:
    assert row_tiles(shape) == ()


def test_a_tile_is_64_mebibytes_of_float64() -> None:
    first = row_tiles((151936, 1536))[0]
    assert first.stop * 1536 * 8 <= 64 << 20 < (first.stop + 1) * 1536 * 8


@pytest.mark.parametrize("shape", [(60, 36), (5, 300), (1000,), (), (0, 3), (2, 3, 40)], ids=str)
def test_pieces_are_all_of_a_tensor(shape: tuple[int, ...], small: None) -> None:
    tensor = torch.randn(shape)
    parts = chunks_of_rows(tensor)
    assert torch.equal(torch.cat(parts) if shape else parts[0], tensor)
    assert all(p.numel() <= 100 or len(p) == 1 for p in parts if p.ndim)
    assert squares(tensor) == pytest.approx(float(tensor.double().square().sum()), rel=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("part", range(3))
def test_rows_of_a_part_of_a_stored_tensor(part: int, transposed: bool) -> None:
    whole = torch.arange(48.0).view(12, 4)
    stored = Disk({"qkv": whole.T.contiguous() if transposed else whole})
    slot = Slot("qkv", part, 3, transposed)
    assert torch.equal(part_of(stored, slot, slice(1, 3)), slot.view(stored.tensors["qkv"])[1:3])
    assert transposed or stored.read == [("qkv", 4 * part + 1)]
    assert torch.equal(part_of(stored.tensors, slot, slice(1, 3)), part_of(stored, slot, None)[1:3])


# --- the same update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_tiles_make_the_update(pair: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = dict(moved(pair, alpha=0.7))
    strength = matched(moved(pair))
    monkeypatch.setattr(tensors_module, "TILE", 8 * 36 * ROWS if pair != "vit" else 8 * 36 * 2)
    update = moved(pair, alpha=0.7)
    tiled = [name for name in update if update.tiles(name)]
    expected = {
        "llama": [EMBEDDING, HEAD],
        "gpt2": ["transformer.wte.weight", "transformer.wpe.weight", HEAD],
        "vit": ["classifier.weight"],
    }
    assert sorted(tiled) == sorted(expected[pair])
    assert update.keys() == whole.keys()
    for name, value in update.items():
        torch.testing.assert_close(value, whole[name], **ROUNDING)
    for name in tiled:
        rows = torch.cat([rows_of(update, name, tile) for tile in update.tiles(name)])
        assert torch.equal(rows, update[name])
    assert matched(moved(pair)) == pytest.approx(strength, rel=1e-12)
    assert moved(pair).warnings == []


@pytest.mark.parametrize("layer", [LAYER, "lm_head"])
def test_tiles_make_the_product_of_factors(layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{layer}.weight"
    whole = moved_factors("llama", layer)[name]
    monkeypatch.setattr(tensors_module, "TILE", 8 * 36 * ROWS)
    update = moved_factors("llama", layer)
    assert len(update.tiles(name)) == -(-len(whole) // ROWS)
    torch.testing.assert_close(update[name], whole, **ROUNDING)
    assert matched(update) > 0


def test_only_a_tile_is_asked_for(small: None) -> None:
    update = moved("llama")
    with pytest.raises(ValueError, match=r"slice\(0, 3, None\) is no tile of lm_head.weight"):
        update.rows(HEAD, slice(0, 3))
    with pytest.raises(ValueError, match="is no tile of"):
        update.rows(f"{LAYER}.weight", slice(0, 7))


def test_tables_are_read_and_written_by_tiles(small: None) -> None:
    update = moved("llama")
    sides = update.source.tensors, update.delta.tuned, update.target.tensors
    entries = {entry.name: entry for entry in planned(update, "checkpoint", torch.float32)}
    for name in (EMBEDDING, HEAD):
        for side in sides:
            side.read.clear()
        entry = entries[name]
        assert entry.tiles == tuple(slice(i, min(i + ROWS, 60)) for i in range(0, 60, ROWS))
        written = made(entry)
        starts = [rows.start for rows in entry.tiles]
        for side in sides:
            assert [rows for n, rows in side.read if n == name] == starts
        assert written == bits((update.target.tensors.tensors[name] + update[name]).float())


def test_what_stays_is_copied_by_tiles(small: None) -> None:
    update = moved("llama", leave=["layers.*", "embed_tokens.*"])
    entries = {entry.name: entry for entry in planned(update, "checkpoint")}
    disk, name = update.target.tensors, f"{LAYER}.weight"
    disk.read.clear()
    for copied in (name, EMBEDDING):
        assert len(entries[copied].tiles) > 1 and made(entries[copied]) == bits(disk.tensors[copied])
        assert [rows for n, rows in disk.read if n == copied] == [rows.start for rows in entries[copied].tiles]


@pytest.mark.parametrize("name", [EMBEDDING, f"{LAYER}.weight"])
def test_rounding_adds_up_over_tiles(name: str, small: None) -> None:
    update, rounding = moved("llama"), Rounding()
    entry = next(e for e in planned(update, "checkpoint", torch.bfloat16, rounding) if e.name == name)
    made(entry)
    again = Rounding(json.loads(json.dumps(rounding.sums)))
    before, change = update.target.tensors.tensors[name], update[name]
    lost = (before + change).bfloat16().double() - before - change
    assert rounding.as_dict() == again.as_dict() and list(rounding.shares) == [name]
    assert again.total == pytest.approx(float(lost.norm() / change.norm()), rel=1e-12)


# --- bias changes that a head cannot take ----------------------------------------------------------------------------


def headed(mean: float) -> Update:
    """GPT-2's head has no bias, and reads a norm that has one; ``mean`` is sum(bias / gain) of the target's."""
    source, target = PAIRS["gpt2"]
    state = {n: v.clone() for n, v in target.state.items()}
    gain, bias = (state[f"transformer.ln_f.{part}"] for part in ("weight", "bias"))
    bias.copy_(bias - gain * ((bias / gain).mean() - mean / 36) if mean else 0 * bias)
    return transport(aligned("gpt2"), Delta.between(source.state, tune(source, "everything").state), state)


@pytest.mark.parametrize("mean, said", [(3.6e-3, "times the rest of its update"), (0.0, "is lost")])
def test_a_tiled_head_warns_once(mean: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = headed(mean)
    whole[HEAD]
    monkeypatch.setattr(tensors_module, "TILE", 8 * 36 * ROWS)
    tiled = headed(mean)
    for _ in range(2):
        tiled[HEAD]
    assert tiled.warnings == whole.warnings and len(tiled.warnings) == 1 and said in tiled.warnings[0]
    resumed = headed(mean)
    resumed.restore(json.loads(json.dumps(tiled.state())))
    assert resumed.warnings == tiled.warnings


# --- memory ----------------------------------------------------------------------------------------------------------


class Peak(TorchDispatchMode):
    """Bytes of the tensors made inside that are alive at once, at most."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.made, self.given = 0, {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in (a for a in args if isinstance(a, Tensor)):
            if (storage := tensor.untyped_storage())._cdata not in self.made:
                self.given[storage._cdata] = storage
        out = func(*args, **(kwargs or {}))
        for tensor in (t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)):
            if (storage := tensor.untyped_storage())._cdata not in self.given:
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return out


def big(norm: str, *, narrower: bool) -> Iterator[tuple[Move, dict[str, Tensor]]]:
    """Layers of a model whose matrices dwarf its vectors, with random maps of every kind; and a tuned model."""
    names = {"rms": LLAMA, "layer": VIT}[norm]
    sizes = ({"width": w, "head_dim": w // 4, "intermediate_size": m} for w, m in ((240, 400), (360, 900)))
    specs = [base(names, num_hidden_layers=1, **size) for size in sizes]
    sides = [Base.of(spec.build()) for spec in (reversed(specs) if narrower else specs)]
    own, into = (side.geometry for side in sides)
    alignment = outline(own, into, Recipe("coherent"))
    draw = Draw(3)
    own_sizes, into_sizes = own.weights(), into.weights()
    for role, ((out_s, in_s), (out_t, in_t)) in ((r, (own_sizes[r], into_sizes[r])) for r in own_sizes):
        kv = role in ("key", "value")
        count, fed = (own.kv_heads, into.kv_heads) if kv else (own.heads, into.heads)
        heads = Heads(torch.arange(fed) % count, draw.normal(fed, own.head_dim, into.head_dim), count)
        low = min(in_s, in_t) + 1
        factored = Factored(draw.normal(out_s, low), draw.normal(low, out_t))
        outputs = {"output": Dense, "contract": Dense, "expand": lambda _, f=factored: f}
        alignment.maps[f"{role}.in"] = heads if role == "output" else Dense(draw.normal(in_s, in_t))
        alignment.maps[f"{role}.out"] = outputs.get(role, lambda _, h=heads: h)(draw.normal(out_s, out_t))
    tuned = {name: sides[0].need(name) + 1 for name in sides[0].slots}
    for layer in (layer for layer in into.layers() if layer.role != "head"):
        rule = replace(alignment.rules[layer.name], input=f"{layer.role}.in", output=f"{layer.role}.out")
        alignment.rules[layer.name] = rule
        yield Move(own.counterpart(layer, 0), layer, Available.of(alignment), *sides, Carried()), tuned


@pytest.mark.parametrize("narrower", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_move_holds_what_is_predicted(norm: str, narrower: bool) -> None:
    """Bound: the 1.1 a plan allows its prediction."""
    for move, tuned in big(norm, narrower=narrower):
        names = f"{move.own.name}.weight", f"{move.into.name}.weight"
        predicted = move_bytes(move.source.shape(names[0]), move.target.shape(names[1]))
        with Peak() as seen:
            move.dense(tuned)
        assert 0.5 * predicted < seen.peak <= 1.1 * predicted, move.into.name


def test_a_move_leaves_its_inputs_alone() -> None:
    """Steps in place work on copies: of tensors that are in float64 already, and of maps that change nothing."""
    source, target = PAIRS["llama"]
    alignment = aligned("llama")
    alignment = replace(alignment, maps={name: Identity() for name in alignment.maps})
    before, after = source.state, tune(source, "everything").state
    copies = [{n: v.clone() for n, v in state.items()} for state in (before, after)]
    same = base(LLAMA, seed=5)
    update = transport(replace(alignment, target=alignment.source), Delta.between(before, after), same.state)
    assert len(dict(update)) == len(before) - 5  # norms are folded into their readers
    for state, copy in zip((before, after), copies, strict=True):
        assert all(torch.equal(state[n], v) for n, v in copy.items())
