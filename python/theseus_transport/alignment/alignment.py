"""The alignment of two base models: every map and scale between them, made once and reused."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file
from torch import nn

from ..activations.links import Pairs
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint
from ..files.headers import inside, read_json
from ..files.result_folder import new_folder
from ..models.forward import Batch
from ..models.geometry import Geometry
from ..models.pair import SIDES, Pair
from ..recipes import maps
from ..recipes.maps import Map, PlannedMap
from ..recipes.recipe import Recipe
from ..recipes.ruleset import MapReport, Rule, Ruleset
from .restored import Restored, check_blocks, check_restored
from .stored_maps import MAPS, Stamp, StoredMaps, stamp

log = logging.getLogger(__name__)


class Running(NamedTuple):
    """Two models without weights, and the batches they were aligned on: enough to run them, whatever their weights.

    Attributes:
        models: source and target, parameters on the meta device.
        batches: pairs of batches.
    """

    models: Pair[nn.Module]
    batches: list[Pair[Batch]]


FORMAT = 3
RECORD = "alignment.json"


@dataclass(frozen=True)
class Alignment:
    """All that is needed to move updates from one base to another.

    Attributes:
        source, target: geometry of the two bases.
        recipe: the choices it was made with.
        maps: by name; ``x_S @ T``. Those of a loaded alignment are read from its folder when asked for.
        rules: canonical layer name -> maps and scales of its update.
        vectors: canonical name of an embedding (or, in ``paper``, a norm's own vector) -> its rule.
        reports: rank and gap of every map.
        blocks: for every target block the source block that feeds it, or None.
        heads: per target block, the source head of every target head.
        lost: per block, the source heads that feed no target head.
        draft: nothing was computed, and where depths differ ``blocks`` is a guess.
        provenance: what it was made from (references, fingerprints, calibration); free-form, JSON.
        running: what the two models are run with once more, to fit an effect; not stored.
    """

    source: Geometry
    target: Geometry
    recipe: Recipe
    maps: Mapping[str, Map]
    rules: Mapping[str, Rule]
    vectors: Mapping[str, Rule]
    reports: list[MapReport]
    blocks: list[int | None]
    heads: dict[int, list[int]]
    lost: dict[int, list[int]]
    provenance: dict[str, Any] = field(default_factory=dict)
    draft: bool = False
    running: Running | None = field(default=None, repr=False, compare=False)

    @property
    def ruleset(self) -> Ruleset:
        """Its maps, rules and vectors as a solver that finished has them."""
        maps: Any = self.maps
        return Ruleset(maps, dict(self.rules), dict(self.vectors), self.reports)

    @property
    def pairs(self) -> Pairs:
        """What of the two models corresponds, block by block, by :attr:`blocks`."""
        return Pairs(self.source, self.target, self.blocks)

    @property
    def planned_maps(self) -> list[PlannedMap]:
        """(name/part, shape, dtype) of all tensors that its maps may hold."""
        return self.recipe.solver.planned_maps(self.pairs, self.recipe)

    def __repr__(self) -> str:
        sides = f"{self.source.words} -> {self.target.words}"
        return f"Alignment({sides}, recipe {self.recipe.name}, {len(self.maps)} maps)"

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        metadata: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write ``alignment.json``, ``maps.safetensors`` and a manifest as ``folder``: all of it or, on error, nothing.

        Args:
            overwrite: replace a folder that is not empty.
            metadata: what the manifest should record.
        """
        tensors = {f"{name}/{part}": t for name, m in self.maps.items() for part, t in m.tensors().items()}
        nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
        with new_folder(folder, nbytes=nbytes, metadata=metadata, overwrite=overwrite) as place:
            save_file({name: t.cpu().contiguous().clone() for name, t in tensors.items()}, place / MAPS)
            stored = {name: stamp(m) for name, m in self.maps.items()}
            (place / RECORD).write_text(json.dumps(self.record(stored), indent=1))
        return Path(folder)

    def filled(self, ruleset: Ruleset, *, tokens: int, provenance: dict[str, Any]) -> Alignment:
        """The alignment this is the outline of, once a solver has finished; warns of what is poor in it.

        Args:
            tokens: it was made from.
        """
        last = max((own for own in self.blocks if own is not None), default=-1)
        seen = range(last) if self.recipe.fits else ()  # their effect is there behind later blocks, which are fitted
        if lost := sorted(set(range(self.source.depth)) - {*self.blocks, *seen}):
            log.warning("no block of the target takes source blocks %s: their updates stay", ", ".join(map(str, lost)))
        widest = max((max(report.source, report.target) for report in ruleset.reports), default=0)
        if tokens < 4 * widest:
            log.warning("%d calibration tokens for a widest space of %d: give at least %d", tokens, widest, 4 * widest)
        if weak := [r.space for r in ruleset.reports if r.weak]:
            text = "%d of %d maps have less than half their rank, first %s: give more, and more varied, calibration"
            log.warning(text, len(weak), len(ruleset.reports), weak[0])
        return replace(
            self,
            maps=ruleset.maps,
            rules=ruleset.rules,
            vectors=ruleset.vectors,
            reports=ruleset.reports,
            heads={b: p.query.tolist() for b, p in ruleset.pairings.items()},
            lost={b: p.lost for b, p in ruleset.pairings.items() if p.lost},
            provenance=provenance,
            draft=False,
        )

    def record(self, stored: Mapping[str, Stamp]) -> dict[str, Any]:
        """What ``alignment.json`` holds; ``stored`` tells the class and digest of every map that was made."""
        return {
            "format": FORMAT,
            **{side: getattr(self, side).plain() for side in SIDES},
            "recipe": dataclasses.asdict(self.recipe),
            **{n: {k: dataclasses.asdict(r) for k, r in getattr(self, n).items()} for n in ("rules", "vectors")},
            "maps": {name: one._asdict() for name, one in stored.items()},
            "reports": [dataclasses.asdict(r) for r in self.reports],
            "blocks": self.blocks,
            "heads": self.heads,
            "lost": self.lost,
            "provenance": self.provenance,
        }

    @classmethod
    def load(cls, folder: str | Path) -> Alignment:
        """Open what :meth:`save` wrote; maps are read when asked for, and compared with their digests then.

        Raises:
            InputRefused: the folder holds no alignment, one of another format, or one that does not fit itself.
        """
        path = Path(folder)
        try:
            return cls._read(path)
        except InputRefused as error:
            raise InputRefused(f"{path} holds no readable alignment: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputRefused(f"{path} holds no readable alignment ({type(error).__name__}: {error})") from error

    @classmethod
    def _read(cls, path: Path) -> Alignment:
        record = read_json(inside(path, RECORD))
        if record.get("format") != FORMAT:
            raise InputRefused(
                f"{path} has alignment format {record.get('format')}, this version reads {FORMAT}; align again"
            )
        sides = SIDES.map(lambda side: Geometry.restored(record[side]))
        recipe, blocks = Recipe(**record["recipe"]), check_blocks(record["blocks"], sides.map(lambda side: side.depth))
        drawn = outline(*sides, recipe, blocks)
        restored = Restored(
            source=sides.source,
            target=sides.target,
            blocks=blocks,
            maps=StoredMaps(Checkpoint.open(inside(path, MAPS)), record["maps"], drawn.pairs, recipe),
            rules={k: Rule(**r) for k, r in record["rules"].items()},
            vectors={k: Rule(**r) for k, r in record["vectors"].items()},
            reports=[MapReport(**r) for r in record["reports"]],
            heads={int(b): h for b, h in record["heads"].items()},
            lost={int(b): h for b, h in record["lost"].items()},
            provenance=record["provenance"],
        )
        check_restored(restored, {"rules": drawn.rules, "vectors": drawn.vectors})
        return replace(drawn, **restored._asdict())


def check_pair(source: Geometry, target: Geometry, recipe: Recipe) -> None:
    """Refuse pairs this version cannot align.

    Raises:
        InputRefused: the two families do not compute the same kind of block, or not one the recipe can map.
    """
    shared = next((la.family.model_type for la in (source, target) if la.heads != la.kv_heads), None)
    if recipe.heads == "dense" and shared:
        raise InputRefused(f"heads=dense needs plain heads, but the {shared} shares keys among heads; use heads=pair")
    if why := misfit(source, target, alone=recipe.solver.alone):
        raise InputRefused(why)


def misfit(source: Geometry, target: Geometry, *, alone: bool = False) -> str | None:
    """Why no maps of this version lead from one model to the other, or None.

    Args:
        alone: maps of the residual are enough.
    """
    families = source.family, target.family
    told: dict[str, list[str]] = {"which reads {}": [str(f.modality) for f in families]}
    if not alone:
        told["whose norms are of kind {}"] = [str(f.norm) for f in families]
        told["whose MLPs have {} expanding layers"] = [str(len(f.expand)) for f in families]
    for what, values in told.items():
        if values[0] != values[1]:
            said = [f"{f.model_type}, {what.format(value)}" for f, value in zip(families, values, strict=True)]
            return f"source is {said[0]}, target is {said[1]}; an update moves between models of one kind"
    return None


def outline(
    source: Geometry, target: Geometry, recipe: Recipe, blocks: Sequence[int | None] | None = None
) -> Alignment:
    """An alignment before any map is computed: enough to decide the fate of every tensor, not to move one.

    Args:
        blocks: for every target block the source block that feeds it; None is a guess where depths differ.
    """
    check_pair(source, target, recipe)
    pairs = Pairs.by_position(source, target) if blocks is None else Pairs(source, target, blocks)
    fold, places = recipe.solver.folds, [None] if recipe.solver.alone else pairs.places
    layers = [pair for place in places for pair in pairs.layers(place)]
    embeddings = pairs.embeddings() if recipe.moves_embeddings else ()
    vectors = {into: Rule(own, "identity", "identity") for own, into in embeddings}
    for own, into, name in (norm for place in places for norm in (pairs.unread if fold else pairs.norms)(place)):
        for part, kind in (("weight", "gain"), ("bias", "linear" if name == "embedding" else "shift")):
            rule = Rule(f"{own}.{part}", "identity", "identity", kind=kind if fold else "linear")  # type: ignore[arg-type]
            vectors[f"{into}.{part}"] = rule
    return Alignment(
        source=source,
        target=target,
        recipe=recipe,
        maps={"identity": maps.Identity()},
        rules={
            into.name: Rule(own.name, "identity", "identity", fold=fold)
            for own, into in layers
            if into.role != "head" or recipe.head == "move"
        },
        vectors=vectors,
        reports=[],
        blocks=list(pairs.blocks),
        heads={},
        lost={},
        draft=blocks is None,
    )
