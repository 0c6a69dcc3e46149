"""Presumed changes, rules that come late, tensors in any order: the same bytes and fates as comparing at once."""

import json
from collections.abc import Mapping, Sequence
from functools import cache, partial

import pytest
import torch
from exact.families import DINO_CLASSIFIER, GPT2, GPT2_TIED
from exact.models import LLAMA, LLAMA_TIED, VIT, Draw, Spec, base, batches, tune
from safetensors.torch import load_file
from theseus_transport import Alignment, Delta, Update, align, transport
from theseus_transport.alignment.alignment import outline
from theseus_transport.files.writer import Planned
from theseus_transport.models import tensors as tensors_module
from theseus_transport.models.precision import Rounding
from theseus_transport.updates.adapter import PREFIX
from theseus_transport.updates.alpha import matched
from theseus_transport.updates.changes import first_change
from theseus_transport.updates.output import Kind, Written, at_alphas, planned, write_updates
from torch import Tensor

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["q_proj"]}
ALPHAS = (1.0, -0.3)
UNTIED, TIED = partial(base, GPT2), partial(base, GPT2_TIED)
BIASED = partial(base, LLAMA, attention_bias=True)
WIDE = {"seed": 5, "width": 36, "intermediate_size": 44}
PAIRS: dict[str, tuple[Spec, Spec]] = {
    "llama": (base(LLAMA), base(LLAMA, **WIDE)),
    "deeper": (base(LLAMA), base(LLAMA, **WIDE, num_hidden_layers=3)),
    "tied": (base(LLAMA_TIED, tie_word_embeddings=True), base(LLAMA_TIED, tie_word_embeddings=True, **WIDE)),
    "untying": (base(LLAMA_TIED, tie_word_embeddings=True), base(LLAMA, **WIDE)),
    "biased": (BIASED(), BIASED(**WIDE)),
    "no-bias": (BIASED(), base(LLAMA, **WIDE)),
    "gpt2": (UNTIED(), UNTIED(seed=5, width=36)),
    "gpt2-tied": (TIED(), TIED(seed=5, width=36)),
    "vit": (base(VIT), base(VIT, seed=5, width=36, image_size=12)),
    "dino": (base(DINO_CLASSIFIER), base(DINO_CLASSIFIER, seed=5, width=36, intermediate_size=72)),
}


@pytest.fixture(params=["whole", "tiles"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Tables in one piece, or in tiles of 7 target rows; and elementwise steps in pieces of 100."""
    if request.param == "tiles":
        monkeypatch.setattr(tensors_module, "TILE", 8 * 36 * 7)
        monkeypatch.setattr(tensors_module, "PIECE", 100)
    return str(request.param)


@cache
def aligned(pair: str, recipe: str = "coherent") -> Alignment:
    source, target = PAIRS[pair]
    own = batches(source, seed=3, count=1, shape=(8, 16))
    return align(source.build(), target.build(), [(batch, target.seen(batch)) for batch in own], recipe=recipe)


@cache
def tuned(pair: str, every: int) -> dict[str, Tensor]:
    """The source tuned in every so many of its parts; of fused tensors only some parts change."""
    spec = PAIRS[pair][0]
    whole, parts = tune(spec, "everything").parts, dict(spec.parts)
    parts |= {name: whole[name] for i, name in enumerate(sorted(whole)) if i % every == 0}
    return spec.names.pack(parts, spec.layers)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def made(tensor: Planned) -> bytes:
    return b"".join(bits(tensor.make(rows)) for rows in tensor.tiles or (None,))


def late(alignment: Alignment) -> Alignment:
    """What is known before anything is computed, of these bases and this pairing of blocks."""
    return outline(alignment.source, alignment.target, alignment.recipe, alignment.blocks)


def streamed(
    alignment: Alignment, delta: Delta, target: Mapping[str, Tensor], kind: Kind, **options: object
) -> tuple[list[dict[str, bytes]], Update, list[Rounding]]:
    """Written as a loop over blocks does: rules come one after another, tensors as soon as theirs are there."""
    update = transport(late(alignment), delta, target, presumed=True, **options)
    first_change(update)
    update.restore(json.loads(json.dumps(update.state())))
    roundings = [Rounding() for _ in ALPHAS]
    views = at_alphas(update, ALPHAS)
    plans = [planned(view, kind, torch.float32, r) for view, r in zip(views, roundings, strict=True)]
    waiting = {entries[0].name: entries for entries in zip(*plans, strict=True)}
    live = update.available
    live.rules, live.vectors, live.maps = {}, {}, {}
    written: list[dict[str, bytes]] = [{} for _ in ALPHAS]
    for known in [{}, *({n: r} for n, r in {**alignment.rules, **alignment.vectors}.items())]:
        for name, rule in known.items():
            (live.rules if name in alignment.rules else live.vectors)[name] = rule
            live.maps.update({m: alignment.maps[m] for m in (rule.input, rule.output)})
        for name in [n for n, e in waiting.items() if e[0].needs <= live.rules.keys() | live.vectors.keys()]:
            entries = waiting.pop(name)
            update.compare(update.sources(name))
            if kind == "delta" and name not in update:
                continue
            for store, entry in zip(written, entries, strict=True):
                store[name] = made(entry)
    assert not waiting
    update.settled()
    return written, update, roundings


def eager(
    alignment: Alignment, delta: Delta, target: Mapping[str, Tensor], kind: Kind, folder: object, **options: object
) -> tuple[list[dict[str, bytes]], Update, list[Rounding]]:
    update = transport(alignment, delta, target, **options)
    outputs = [Written(folder / f"{alpha}", alpha) for alpha in ALPHAS]
    write_updates(update, outputs, kind, dtype=torch.float32)
    files = [next(out.folder.glob("*.safetensors")) for out in outputs]
    found = [{name: bits(t) for name, t in load_file(file).items()} for file in files]
    return found, update, [out.rounding for out in outputs]


def assert_alike(first: tuple, second: tuple) -> None:
    (files, update, roundings), (others, other, more) = first, second
    assert files == others
    assert update.coverage == other.coverage and update.moved == other.moved and list(update) == list(other)
    assert [r.as_dict() for r in roundings] == [r.as_dict() for r in more]
    assert sorted(update.warnings) == sorted(other.warnings)


@pytest.mark.parametrize("kind", ["checkpoint", "delta"])
@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("pair", PAIRS)
def test_presuming_changes_nothing(pair: str, every: int, kind: Kind, tiled: str, tmp_path) -> None:
    delta = Delta.between(PAIRS[pair][0].state, tuned(pair, every))
    alignment, target = aligned(pair), PAIRS[pair][1].state
    ours = streamed(alignment, delta, target, kind)
    assert_alike(ours, eager(alignment, delta, target, kind, tmp_path))
    assert len({row.fate for row in ours[1].coverage}) > 1 or every == 1  # else nothing was presumed wrongly


@pytest.mark.parametrize("pair", ["llama", "gpt2", "vit"])
def test_presuming_changes_nothing_of_paper(pair: str, tiled: str, tmp_path) -> None:
    alignment, target = aligned(pair, "paper"), PAIRS[pair][1].state
    delta = Delta.between(PAIRS[pair][0].state, tuned(pair, 3))
    ours = streamed(alignment, delta, target, "checkpoint", leave=["*.1.*"])
    assert_alike(ours, eager(alignment, delta, target, "checkpoint", tmp_path, leave=["*.1.*"]))


def lora(pair: str, layers: Sequence[str]) -> Delta:
    draw, state, tensors = Draw(4), PAIRS[pair][0].state, {}
    for layer in layers:
        shape = state[f"{layer}.weight"].shape
        out, width = reversed(shape) if "c_" in layer else shape
        tensors[f"{PREFIX}{layer}.lora_A.weight"] = draw.normal(2, width)
        tensors[f"{PREFIX}{layer}.lora_B.weight"] = draw.normal(out, 2)
    return Delta.from_lora(CONFIG, tensors, state)


@pytest.mark.parametrize("kind", ["adapter", "checkpoint", "delta"])
@pytest.mark.parametrize(
    "pair, layers",
    [
        ("llama", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "lm_head"]),
        ("gpt2", ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"]),
    ],
)
def test_adapters_move_by_late_rules(pair: str, layers: list[str], kind: Kind, tiled: str, tmp_path) -> None:
    alignment, target, delta = aligned(pair), PAIRS[pair][1].state, lora(pair, layers)
    ours = streamed(alignment, delta, target, kind)
    assert_alike(ours, eager(alignment, delta, target, kind, tmp_path))
    rules = alignment.rules.keys()
    assert all(entry.needs <= rules for entry in planned(ours[1], kind))
    if kind == "adapter":
        assert all(entry.needs for entry in planned(ours[1], kind))


@pytest.mark.parametrize("presumed", [False, True])
def test_what_does_not_move_keeps_its_bits(presumed: bool, tmp_path) -> None:
    source, target = PAIRS["llama"]
    name, moving = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"
    state = {n: v.float() for n, v in target.state.items()}
    state[name][3, 5] = -0.0
    delta = Delta.between(source.state, {**source.state, moving: source.state[moving] + 1})
    write = partial(streamed) if presumed else partial(eager, folder=tmp_path)
    for file in write(aligned("llama"), delta, state, "checkpoint")[0]:
        assert file[name] == bits(state[name]) and file[moving] != bits(state[moving])
        assert {n for n in file if file[n] != bits(state[n])} == {moving}


def test_a_part_of_a_fused_tensor_that_does_not_move_keeps_its_bits(tmp_path) -> None:
    (source, target), name = PAIRS["gpt2"], "transformer.h.0.attn.c_attn.weight"
    change = torch.zeros(24, 3 * 24).double()
    change[:, :24] = 1  # of the queries
    state = {n: v.float() for n, v in target.state.items()}
    state[name][:, 40] = -0.0
    delta = Delta.between(source.state, {**source.state, name: source.state[name] + change})
    for file in eager(aligned("gpt2"), delta, state, "checkpoint", tmp_path)[0]:
        written = torch.frombuffer(bytearray(file[name]), dtype=torch.float32).view(36, 3, 36)
        before = state[name].view(36, 3, 36)
        assert not torch.equal(written[:, 0], before[:, 0]) and bits(written[:, 1:]) == bits(before[:, 1:])


@pytest.mark.parametrize("every", [1, 3])
def test_matched_strength_of_presumed_changes(every: int, tiled: str) -> None:
    alignment, target = aligned("gpt2"), PAIRS["gpt2"][1].state
    delta = Delta.between(PAIRS["gpt2"][0].state, tuned("gpt2", every))
    update = transport(alignment, delta, target, presumed=True)
    assert matched(update) == matched(transport(alignment, delta, target))


class Disk(Mapping[str, Tensor]):
    """Tensors whose shapes are known unread; it remembers what was read, and which rows."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.read = tensors, []
        self.shapes = {name: t.shape for name, t in tensors.items()}
        self.dtypes = {name: t.dtype for name, t in tensors.items()}

    def __getitem__(self, name: str) -> Tensor:
        self.read.append((name, None))
        return self.tensors[name]

    def rows(self, name: str, rows: slice) -> Tensor:
        self.read.append((name, rows.start))
        return self.tensors[name][rows]

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)
