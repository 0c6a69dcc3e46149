"""What an alignment's files say is not trusted: pairing, rules, maps and reports have to fit the two models."""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from exact.families import CLIP, DINO_REGISTERS, GPT2_TIED, LLAMA_SCORE, OPEN_CLIP, QWEN3, SIGLIP_CLASSIFIER, Names
from exact.models import LLAMA, base, batches
from safetensors.torch import load_file, save_file
from theseus_transport import Alignment, InputRefused, align
from theseus_transport.alignment.stored_maps import Stamp, stamp

SOURCE, TARGET = base(LLAMA), base(LLAMA, seed=5, width=36, num_attention_heads=6, num_key_value_heads=3)
LAYER = "layers.0.self_attn.q_proj"
ROW = {"space": "final", "held": 0.5, "shifted": 0.1, "near_chance": False}


@cache
def made() -> Alignment:
    data = batches(SOURCE, seed=3, count=1, shape=(8, 12))
    return align(SOURCE.build(), TARGET.build(), data, provenance={"quality": [ROW], "warnings": ["few"]})


def edited(folder: Path, *path: object, value: object) -> Path:
    """A saved alignment with one entry of its record replaced."""
    record = json.loads((made().save(folder) / "alignment.json").read_text())
    place = record
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (folder / "alignment.json").write_text(json.dumps(record))
    return folder


DEPTH, HEADS = made().source.depth, made().target.heads
WRONG: dict[str, tuple[tuple[object, ...], object, str]] = {
    "blocks beyond the depth": (("blocks", 0), 7, f"blocks names block 7 of the source, which has {DEPTH}"),
    "a negative block": (("blocks", 0), -1, "names block -1 of"),
    "a block of text": (("blocks", 0), "0", "names block 0 of"),
    "a true block": (("blocks", 0), True, "names block True of"),
    "too many blocks": (("blocks",), [0] * (DEPTH + 1), f"expected {DEPTH} entries, one a block of the target"),
    "no blocks": (("blocks",), [None] * DEPTH, "pairs no block at all"),
    "another pairing": (("blocks",), [None, 0], "expected None"),
    "a pairing that turns back": (("blocks",), [1, 0], r"blocks is \[1, 0\], which turns back at 0"),
    "one block for two": (("blocks",), [0, 0], "which turns back at 0"),
    "heads beyond the source's": (("heads", "0", 0), 99, "heads of block 0 are .99, .* of the source's 4"),
    "heads of text": (("heads", "0"), "x", f"expected {HEADS} heads of"),
    "too few heads": (("heads", "0"), [0], f"expected {HEADS} heads of"),
    "heads of no block": (("heads", "9"), [0] * HEADS, "heads names block 9, which no block of the source feeds"),
    "lost heads of no head": (("lost", "0"), [-1], "lost of block 0"),
    "a rule of another layer": (("rules", LAYER, "source"), "layers.1.self_attn.q_proj", f"feed '{LAYER}', expected"),
    "a rule of no layer": (("rules", "nowhere"), {"source": "a", "input": "identity", "output": "identity"}, "do not"),
    "a map that is not there": (("rules", LAYER, "input"), "gone", "through the map 'gone', which is not there"),
    "a map of another size": (("rules", LAYER, "output"), "0.middle", "which maps .40, 40., expected .32, 48"),
    "patches of text": (("source", "patch"), 1, "patch is .1, 1., which no text model has"),
    "a tie that is none": (("source", "tied"), "yes", "tied is yes, expected bool"),
    "a vector's map of another size": (("vectors", "embed_tokens.weight", "output"), "0.middle", "expected .24, 36."),
    "a scale beyond numbers": (("rules", LAYER, "scale_out"), 10**30, "and 1000000"),
    "a scale of nothing": (("rules", LAYER, "scale_in"), 0.0, "has scales 0.0 and"),
    "a scale of text": (("rules", LAYER, "scale_out"), "1", "and '1'"),
    "an endless scale": (("rules", LAYER, "scale_out"), float("inf"), "and inf"),
    "a gain for a table": (("vectors", "embed_tokens.weight", "kind"), "gain", "feed 'embed_tokens.weight', expected"),
    "a report of text": (("reports", 0, "rank"), "9", "has rank 9"),
    "quality of nothing": (("provenance", "quality", 0), {}, "quality has the row {}, expected space"),
    "a warning that is none": (("provenance", "warnings"), [1], "the warning 1, expected text"),
    "provenance of a list": (("provenance",), [], "provenance is a list"),
    "a depth of text": (("source", "depth"), "2", "depth is '2', expected a positive integer"),
    "an endless depth": (("source", "depth"), 10**9, "no model has more than"),
    "another width": (("source", "width"), 25, "maps.safetensors: .* expected"),
    "more heads": (("source", "heads"), 8, "expected|reads heads"),
    "a map of another kind": (("maps", "0.attention", "kind"), "Heads", "lacks 0.attention/blocks"),
    "a map of no kind": (("maps", "0.attention", "kind"), "Sparse", "holds no readable alignment"),
    "a map without a digest": (("maps", "0.attention"), {"kind": "Dense"}, "holds no readable alignment"),
}  # fmt: skip


KINDS: dict[str, tuple[Names, dict]] = {
    "score": (LLAMA_SCORE, {"width": 36}),
    "q and k norms": (QWEN3, {"width": 36}),
    "positions, tied": (GPT2_TIED, {"width": 36, "tie_word_embeddings": True}),
    "registers": (DINO_REGISTERS, {}),
    "a norm behind the embeddings": (CLIP, {"width": 36}),
    "a pooled norm": (OPEN_CLIP, {"width": 36}),
    "no class token": (SIGLIP_CLASSIFIER, {"width": 36}),
}


@pytest.mark.parametrize("recipe", ["coherent", "paper"])
@pytest.mark.parametrize("names, config", KINDS.values(), ids=KINDS)
def test_what_was_saved_loads_again(tmp_path: Path, names: Names, config: dict, recipe: str) -> None:
    source = base(names, **{k: v for k, v in config.items() if k != "width"})
    target = base(names, **{"seed": 5, "num_hidden_layers": 3, **config})
    kept = align(source.build(), target.build(), batches(source, seed=3, count=1), recipe=recipe)
    loaded = Alignment.load(kept.save(tmp_path / "maps"))
    assert {n: stamp(m) for n, m in loaded.maps.items()} == {n: stamp(m) for n, m in kept.maps.items()}
    assert (loaded.rules, loaded.vectors, loaded.blocks) == (kept.rules, kept.vectors, kept.blocks)


@pytest.mark.parametrize("path, value, said", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused(tmp_path: Path, path: tuple[object, ...], value: object, said: str) -> None:
    with pytest.raises(InputRefused, match=said):
        list(Alignment.load(edited(tmp_path / "maps", *path, value=value)).maps.values())


@pytest.mark.parametrize("name", ["0.attention/matrix", "0.context/blocks", "1.value/source_head"])
def test_a_map_that_was_changed_is_refused_when_it_is_read(tmp_path: Path, name: str) -> None:
    folder = made().save(tmp_path / "maps")
    held = load_file(folder / "maps.safetensors")
    held[name].view(-1)[0] += 1
    save_file(held, folder / "maps.safetensors")
    loaded, of = Alignment.load(folder), name.rpartition("/")[0]
    with pytest.raises(InputRefused, match=f"maps.safetensors: the map {of} is not what was written; align again"):
        loaded.maps[of]
    assert all(loaded.maps[other] for other in loaded.maps if other != of)


@pytest.mark.parametrize("head", [-1, 4])
def test_a_map_of_heads_that_are_not_there_is_refused(tmp_path: Path, head: int) -> None:
    """Even where its digest was forged."""
    folder = made().save(tmp_path / "maps")
    held, record = load_file(folder / "maps.safetensors"), json.loads((folder / "alignment.json").read_text())
    held["0.query/source_head"][0] = head
    save_file(held, folder / "maps.safetensors")
    forged = made().maps["0.query"]
    forged = type(forged)(held["0.query/source_head"], forged.blocks, forged.heads)
    record["maps"]["0.query"] = stamp(forged)._asdict()
    (folder / "alignment.json").write_text(json.dumps(record))
    with pytest.raises(InputRefused, match=r"the map 0.query reads heads \[.*\] of 4, the source has 4; align again"):
        Alignment.load(folder).maps["0.query"]


def test_a_digest_tells_shapes_and_dtypes_apart() -> None:
    from theseus_transport.recipes.maps import Dense

    ones = torch.ones(2, 3, dtype=torch.float64)
    found = {stamp(Dense(m)) for m in (ones, ones.T, ones.float(), torch.zeros(2, 3, dtype=torch.float64))}
    assert len(found) == 4 and stamp(Dense(ones)) == Stamp("Dense", stamp(Dense(ones.clone())).blake2b)
