"""The choices that decide how much memory a run needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Choice:
    """How a run is carried out; batch size, method, the place of maps and tiles change its rounding, the rest nothing.

    Attributes:
        batch_size: samples per forward pass.
        ahead: blocks are read while the ones before them run.
        resident: hidden states stay in memory, rather than in files.
        method: of decompositions (``linalg/procrustes.py``): ``auto`` is fast, ``iterate`` needs less memory.
        polar: where maps are decomposed, ``device`` or ``cpu``.
        tiles: of columns in which moments are added up on a device, each by a pass of its own through the blocks.
        halves: attention and MLP of a block run one after the other, each with its own weights alone.
    """

    batch_size: int
    ahead: bool = True
    resident: bool = True
    method: Literal["auto", "iterate"] = "auto"
    polar: Literal["device", "cpu"] = "device"
    tiles: int = 1
    halves: bool = False

    @property
    def rounding(self) -> dict[str, Any]:
        """The fields that decide how results round, as JSON; a resumed run goes on with those it was begun with."""
        return {"batch size": self.batch_size, "maps by": self.method, "maps on": self.polar, "tiles": self.tiles}

    @property
    def words(self) -> str:
        reads = "the next blocks read ahead" if self.ahead else "one pair of blocks at a time"
        where = "in memory" if self.resident else "in files"
        how = ", maps by iteration" if self.method == "iterate" else ""
        cpu = ", maps made on the CPU" if self.polar == "cpu" else ""
        passes = f", moments in {self.tiles} passes" if self.tiles > 1 else ""
        halves = ", attention and MLP one after the other" if self.halves else ""
        return f"{self.batch_size} samples a pass, {reads}, hidden states {where}{how}{cpu}{passes}{halves}"
