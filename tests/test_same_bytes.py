"""Same inputs, device and thread count: the same bytes, of whole jobs, wherever their memory happens to lie."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import identical
from helpers.forked import apart
from helpers.large_pairs import ModelSizes, job_of, written
from theseus_transport import Recipe
from theseus_transport.jobs.transport_job import Session

# Wide enough for BLAS and LAPACK to use several threads, heads of a width that aligns nothing.
PAIR = ModelSizes("llama", 136, 300, 1, 4, 2, 300), ModelSizes("llama", 210, 500, 1, 5, 5, 300)
RECIPES = {
    "completed": Recipe("coherent", null="completed"),
    "paper": Recipe("paper", whiten_power=0.25),
    "effect": Recipe("effect", prior="coherent"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("pair"), PAIR, samples=40, length=16)


def run(root: Path, out: str, threads: int, shift: int, recipe: Recipe) -> list[int]:
    """A job on so many threads, in a process that has ``shift`` bytes more on its heap; where its heap goes on."""
    torch.set_num_threads(threads)
    held = [bytearray(1000 + shift) for _ in range(100 * bool(shift))]
    places = [np.empty(size, dtype=np.uint8) for size in range(1000, 9000, 1000)]
    Session(job_of(root, out, tokens=640, recipe=recipe)).run()
    assert len(held) == 100 * bool(shift)
    return [place.ctypes.data % 64 for place in places]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("name", RECIPES)
def test_a_job_writes_the_same_bytes_again(name: str, threads: int, root: Path) -> None:
    outs = [f"{name}-{threads}-{i}" for i in range(2)]
    places = [apart(run, root, out, threads, 24 * i, RECIPES[name]) for i, out in enumerate(outs)]
    assert places[0] != places[1], "the second run's heap lies as the first's: nothing is shown"
    assert identical(*(root / out for out in outs))
