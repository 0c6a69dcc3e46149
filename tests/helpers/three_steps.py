"""A run of three steps that writes two folders, for the tests that interrupt, kill and resume it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from theseus_transport.files.journal import Work
from theseus_transport.files.writer import Ending, Output, Planned

STEPS = 3
KEY = {
    "source": {"files": {"model.safetensors": {"size": 10, "mtime_ns": 1, "header_blake2b": "aa"}}},
    "option --alpha": 1.0,
    "torch": "2.13",
}
OLD = {"old": torch.full((4,), 7.0)}
ROWS = (slice(0, 2), slice(2, 5))


class Loop:
    """A run of three steps. What it writes depends on its state, tensors and file of all steps before."""

    def __init__(self, out: Path, *, alphas: int = 2, dropped: tuple[str, ...] = (), hook: Callable = print) -> None:
        self.out, self.dropped, self.hook = out, dropped, hook
        self.total, self.count = torch.zeros(3, dtype=torch.float64), 0
        folders = [out] if alphas == 1 else [out / f"alpha-{i}" for i in range(alphas)]
        self.outputs = [Output(folder, self.plan(i + 1), {"config.json": "{}"}) for i, folder in enumerate(folders)]

    def plan(self, alpha: int) -> list[Planned]:
        def make(name: str, *shape: int) -> Callable[[slice | None], torch.Tensor]:
            def tensor(rows: slice | None) -> torch.Tensor:
                self.hook(f"make {name}")
                whole = torch.arange(5 * 3).reshape(5, 3) * self.total.float() * alpha
                return (whole if shape == (5, 3) else whole[: shape[0], 0]).to(torch.float32)[rows or slice(None)]

            return tensor

        planned = [Planned("embedding", (5, 3), torch.float32, make("embedding", 5, 3), ROWS)]
        for block in range(STEPS):
            planned += [
                Planned(f"{block}.w", (5, 3), torch.float32, make(f"{block}.w", 5, 3)),
                Planned(f"{block}.b", (2,), torch.float32, make(f"{block}.b", 2)),
            ]
        return planned

    def open(self, **options: object) -> Work:
        known = {"stem": "model", "key": KEY, "resume": False, "overwrite": False, "shard_size": 100}
        return Work.open(self.out, self.outputs, **(known | options))

    def run(self, **options: object) -> list[dict]:
        with self.open(**options) as work:
            self.hook("open")
            hidden = [work.folder / f"hidden-{i}" for i in range(2)]
            if work.step:
                self.total = work.tensors["total"]
                self.count = work.state["count"]
                assert int(hidden[work.step % 2].read_text()) == work.step, "the file of the last commit"
            for step in range(work.step, STEPS):
                self.total = self.total + 0.1 * (step + 1)
                self.count += step + 1
                for name in (f"{step}.w", f"{step}.b"):
                    work.write(name)
                    self.hook(f"wrote {name}")
                hidden[(step + 1) % 2].write_text(str(step + 1))
                work.commit({"count": self.count}, {"total": self.total}, files=[hidden[(step + 1) % 2]])
                self.hook(f"committed {step}")
            work.drop(self.dropped)
            for name in work.pending:
                work.write(name)
            self.hook("finish")
            return work.finish([self.ending] * len(self.outputs))

    @property
    def ending(self) -> Ending:
        return Ending({"README.md": f"total {self.total.tolist()}"}, {"count": self.count})


class Stop:
    """Raise at one of the places that a loop passes."""

    def __init__(self, place: str, error: BaseException) -> None:
        self.place, self.error = place, error

    def __call__(self, place: str) -> None:
        if place == self.place:
            raise self.error


def quiet(place: str) -> None: ...


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loop(out: Path, **options: object) -> Loop:
    return Loop(out, **({"hook": quiet} | options))


def interrupted(out: Path, place: str = "wrote 2.w", **options: object) -> Path:
    """A work folder with what a run committed before it was interrupted."""
    with pytest.raises(KeyboardInterrupt):
        Loop(out, hook=Stop(place, KeyboardInterrupt()), **options).run()
    return out.with_name(f".{out.name}.theseus")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
