"""What a job refuses before anything heavy runs: inputs that cannot be what their names say."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from contextlib import suppress
from fnmatch import fnmatchcase

from ..errors import InputRefused
from ..files.checkpoint import Checkpoint, check_finite
from ..models.base import Base, canonical_shapes, check_shapes
from ..models.family import unwrapped
from ..models.geometry import Geometry
from ..models.tensors import row_tiles, rows_of
from ..updates.fates import TensorFate
from ..updates.trained_on import UNRELATED, cosine, doubt_of_base

log = logging.getLogger(__name__)


def read_geometry(name: str, checkpoint: Checkpoint) -> Geometry:
    """The geometry a base model's config promises and its tensors have."""
    if not checkpoint.config:
        raise InputRefused(f"{name} {checkpoint.folder} has no config.json; give a model's folder")
    if Checkpoint.open(checkpoint.folder, allow_pickle=True).files != checkpoint.files:
        raise InputRefused(f"{name} {checkpoint.files[0]} is not what its folder loads as; give it a folder of its own")
    if name != "SOURCE" and (wrapped := next((n for n in checkpoint if unwrapped(n) != n), None)):
        raise InputRefused(
            f"{name} {checkpoint.folder} has names as torch.compile or data parallelism wraps them ({wrapped}), "
            f"which transformers does not load; save them under their own names ({unwrapped(wrapped)})"
        )
    try:
        geometry = Geometry.of(checkpoint.config, checkpoint)
        check_shapes(geometry, canonical_shapes(geometry, checkpoint))
    except InputRefused as error:
        raise InputRefused(f"{name} {checkpoint.folder}: {error}") from error
    return geometry


def check_dtypes(*checkpoints: Checkpoint) -> None:
    """Refuse weights of integers, which only a quantised model has."""
    for checkpoint in checkpoints:
        for name, dtype in checkpoint.dtypes.items():
            if name.endswith("weight") and not dtype.is_floating_point:
                raise InputRefused(f"{name} of {checkpoint.folder} is {dtype}, not floating point; dequantise it first")


def check_values(*checkpoints: Checkpoint) -> None:
    """Refuse NaN and Inf; reads everything."""
    for checkpoint in checkpoints:
        for name in checkpoint:
            for rows in row_tiles(checkpoint.shapes[name]) or (None,):
                check_finite(f"{name} of {checkpoint.folder}", rows_of(checkpoint, name, rows))


def check_tune(source: Checkpoint, tuned: Checkpoint, geometry: Geometry) -> None:
    """Refuse a TUNED of another base than SOURCE: other sizes, uncorrelated weights, or what an adapter records."""
    if tuned.kind == "adapter":
        doubt_of_base(tuned, source, geometry)
        return
    trained = f"was {tuned.folder.name} trained from {source.folder.name}?"
    if tuned.config:
        other = Geometry.of(tuned.config)
        sizes = ("depth", "width", "heads", "kv_heads", "head_dim", "middle")
        for what, ours, theirs in ((k, getattr(geometry, k), getattr(other, k)) for k in sizes):
            if ours != theirs:
                raise InputRefused(f"{what} is {theirs} in TUNED and {ours} in SOURCE; {trained}")
    agreement = cosine(Base.of(source, geometry), Base.of(tuned, geometry))
    if agreement is not None and agreement < UNRELATED:  # where no shape agrees, the plan says which
        raise InputRefused(
            f"the weights of TUNED and SOURCE have cosine {agreement:.3f}, but a tune stays near 1: {trained}"
        )


def check_left(patterns: Sequence[str], coverage: Sequence[TensorFate], source: Checkpoint, tuned: Checkpoint) -> None:
    """Refuse a pattern of --leave that matches no tensor (for an adapter: no layer) at all."""
    names = {told.tensor for told in coverage}
    if tuned.kind == "adapter":
        family = Geometry.of(source.config).family
        for name in map(family.canonical, source):
            names |= {name, name.removesuffix(".weight")}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputRefused(f"--leave {pattern!r} matches nothing; names read like {coverage[0].tensor!r}")


def trim_memory() -> None:
    """Give back what was freed in small blocks: large vocabularies leave ten times their file's size behind."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
