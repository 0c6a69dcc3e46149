"""Is a folder this command wrote whole, and does it fit the base it was made for?"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from ..alignment.alignment import Alignment
from ..errors import InputRefused
from ..files.checkpoint import Checkpoint, check_finite
from ..files.headers import TensorRecord, if_inside, inside, read_header
from ..files.located import located
from ..files.result_folder import MANIFEST, differences, read_manifest
from ..models.base import Base
from ..models.geometry import Geometry
from ..models.loading import config_of
from ..updates.adapter import HEADS, PREFIX, Adapter
from .checks import read_geometry


def verify(folder: str | Path, *, target: str | None = None) -> list[str]:
    """Every fault of a folder, in words that name the file; empty when it is whole.

    Its files against the manifest, safetensors headers, NaN and Inf, and what the output is: a checkpoint's shapes
    against the target base and its own config, a delta's against the base, an adapter's modules and ranks, an
    alignment's maps. Several strengths side by side are verified one after the other.

    Args:
        target: where the target base is now, or None for where the manifest says.

    Raises:
        InputRefused: the folder holds no manifest, neither itself nor in folders of several strengths.
    """
    folder = Path(folder)
    if parts := parts_of(folder):
        return [f"{part.name}/{fault}" for part in parts for fault in verify(part, target=target)]
    manifest, faults = read_manifest(folder), differences(folder)
    sound = True
    for path in sorted(folder.glob("*.safetensors")):
        read = partial(_header, folder, path.name)
        sound &= not (found := _tried(path.name, read))
        faults += found
    told = manifest.get("metadata", {})
    outcome = told.get("outcome", {}) if isinstance(told, dict) else {}
    kind = outcome.get("kind") if isinstance(outcome, dict) else None
    check = {"checkpoint": _checkpoint, "delta": _delta, "adapter": _adapter, "alignment": _alignment}.get(str(kind))
    if check is None:
        return [*faults, f"{MANIFEST} does not tell what this is"]
    if not sound:
        return faults
    told_in = MANIFEST if check is not _alignment else "alignment.json"
    return faults + _tried(told_in, lambda: check(folder, target or _here(outcome["job"]["target"])))


def parts_of(folder: Path) -> list[Path]:
    """The folders of several strengths, where this is no output itself.

    Raises:
        InputRefused: it is neither.
    """
    if (folder / MANIFEST).is_file():
        return []
    found = sorted(part.parent for part in folder.glob(f"alpha-*/{MANIFEST}"))
    if not found:
        raise InputRefused(f"{folder} holds no {MANIFEST}; give a folder this command wrote")
    return found


def _tried(name: str, check: Callable[[], Any]) -> list[str]:
    """Faults a check returns; a refusal is one, and names the file where it does not say it itself."""
    try:
        found = check()
        return found if isinstance(found, list) else []
    except InputRefused as error:
        return [str(error) if name in str(error) else f"{name}: {error}"]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        return [f"{name}: {type(error).__name__}: {error}"]


def _files(folder: Path) -> dict[str, str]:
    """Tensor -> name of the file that holds it."""
    return {name: path.name for path in sorted(folder.glob("*.safetensors")) for name in _header(folder, path.name)}


def _header(folder: Path, name: str) -> dict[str, TensorRecord]:
    return read_header(inside(folder, name))


def _values(written: Checkpoint, files: dict[str, str]) -> list[str]:
    """Tensors with NaN or Inf."""
    return [
        fault
        for name in written
        for fault in _tried(files[name], lambda name=name: check_finite(name, written[name]))  # type: ignore[misc]
    ]


def _checkpoint(folder: Path, reference: str) -> list[str]:
    written, files = Checkpoint.open(folder), _files(folder)
    read_geometry("OUT", written)
    config_of(folder)
    return _values(written, files) + _against(written, files, _base(reference), whole=True)


def _delta(folder: Path, reference: str) -> list[str]:
    index, files = if_inside(folder, "delta.safetensors.index.json"), _files(folder)
    single = [] if index else [inside(folder, "delta.safetensors")]
    written = Checkpoint(folder, "checkpoint", single, index)
    return _values(written, files) + _against(written, files, _base(reference), whole=False)


def _against(written: Checkpoint, files: dict[str, str], base: Checkpoint, *, whole: bool) -> list[str]:
    """Tensors that the base does not have so, or (of a whole checkpoint) that are missing; a head may be the tune's."""
    geometry, faults = Geometry.of(base.config), []
    shapes = _named(geometry, base)
    ours = {geometry.family.canonical(name): name for name in written}
    for canonical, name in ours.items():
        shape, expected = written.shapes[name], shapes.get(canonical)
        if shape != expected and not _is_head(geometry, written, canonical):
            has = "is no tensor of {0}" if expected is None else f"is {list(shape)}, that of {{0}} is {list(expected)}"
            faults.append(f"{files[name]}: {name} {has.format(base.folder)}")
    needed = Base.of(base, geometry).slots if whole else {}
    lost = dict.fromkeys(slot.stored for slot in needed.values() if geometry.family.canonical(slot.stored) not in ours)
    classes, vocabulary = (f"{geometry.family.heads.get(kind)}.weight" for kind in ("classes", "vocabulary"))
    if classes in ours and vocabulary not in ours:  # a class with a head over classes has none over the vocabulary
        lost.pop(vocabulary, None)
    return faults + [f"{name} of {base.folder} is in no file" for name in lost]


def _named(geometry: Geometry, base: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name as stored; a tied head, which is kept in the embedding, under its own name too."""
    shapes = {geometry.family.canonical(name): shape for name, shape in base.shapes.items()}
    token, head = geometry.family.embedding("token"), geometry.family.heads.get("vocabulary")
    if geometry.tied and token and token.name in shapes:
        shapes[f"{head}.weight"] = shapes[token.name]
    return shapes


def _is_head(geometry: Geometry, written: Checkpoint, canonical: str) -> bool:
    """Whether a tensor is of a head over classes that fits the norm in front of it."""
    head, shape = geometry.family.heads.get("classes"), written.shapes
    weight = next((s for n, s in shape.items() if geometry.family.canonical(_plain(n)) == f"{head}.weight"), ())
    if len(weight) != 2 or weight[1] % geometry.width:
        return False
    own = next(s for n, s in shape.items() if geometry.family.canonical(_plain(n)) == canonical)
    return canonical in (f"{head}.weight", f"{head}.bias") and own[0] == weight[0]


def _plain(key: str) -> str:
    """A tensor's name in the model, of a checkpoint's or an adapter's key."""
    return key.removeprefix(PREFIX)


def _adapter(folder: Path, reference: str) -> list[str]:
    written, files, target = Checkpoint.open(folder), _files(folder), _base(reference)
    adapter, geometry = Adapter.of(written), Geometry.of(target.config)
    family, shapes, faults = geometry.family, _named(geometry, target), []
    for layer, (key_a, key_b) in adapter.layers().items():
        name, rank = family.canonical(layer), adapter.rank(layer)
        a, b, weight = written.shapes[key_a], written.shapes[key_b], shapes.get(f"{name}.weight")
        if weight and any(slot.transposed for slot in family.parts(name).values()):
            weight = weight[::-1]
        if weight is None:
            faults.append(f"{files[key_a]}: {layer} is no module of {target.folder}")
        elif (a, b) != ((rank, weight[1]), (weight[0], rank)):
            faults.append(
                f"{files[key_a]}: {layer} is {list(b)} x {list(a)} of rank {rank}, {target.folder} has {list(weight)}"
            )
        if not adapter.targets(layer):
            faults.append(f"adapter_config.json: target_modules do not name {layer}, so PEFT would not read it")
    whole = {family.canonical(name): (name, key) for name, key in adapter.whole().items()}
    for canonical, (name, key) in whole.items():
        expected = shapes.get(canonical)
        if written.shapes[key] != expected and not _is_head(geometry, written, canonical):
            faults.append(f"{files[key]}: {name} is {list(written.shapes[key])}, {target.folder} has {expected}")
        if adapter.saves(name) is None:
            faults.append(f"adapter_config.json: modules_to_save do not name {name}, so PEFT would not read it")
    for canonical in sorted(_asked(adapter, geometry, shapes) - whole.keys()):
        faults.append(f"adapter_config.json asks PEFT for {canonical}, which is in no file")
    return faults + _values(written, files)


def _asked(adapter: Adapter, geometry: Geometry, shapes: Iterable[str]) -> set[str]:
    """Canonical names of what PEFT wants to read whole; without one of them it does not load the adapter."""
    heads, token = geometry.family.heads, geometry.family.embedding("token")
    asked = {name for name in shapes if adapter.saves(name)}
    if heads.get("classes") and adapter.config.get("task_type") in HEADS:
        asked.add(f"{heads['classes']}.weight")
    ends = {token.name, f"{heads.get('vocabulary')}.weight"} if token and geometry.tied else set()
    if adapter.config.get("ensure_weight_tying") and asked & ends:
        asked |= ends
    return asked


def _alignment(folder: Path, reference: str) -> list[str]:
    Alignment.load(folder)
    return _values(Checkpoint.open(inside(folder, "maps.safetensors")), _files(folder))


def _here(reference: object) -> str:
    """The target base that a manifest names, if it is on this machine: on a manifest's word nothing is fetched."""
    try:
        return str(located(str(reference), download=False))
    except InputRefused as error:
        raise InputRefused(f"the target base cannot be compared with: {error}; name it with --target") from error


def _base(reference: object) -> Checkpoint:
    try:
        return Checkpoint.open(str(reference))
    except InputRefused as error:
        raise InputRefused(f"the target base cannot be compared with: {error}; name it with --target") from error
