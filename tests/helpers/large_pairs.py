"""Random models of the bench's geometries on disk, and jobs that move them, for tests of memory and of abuse."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from theseus_transport.cli.main import main
from theseus_transport.jobs.settings import Job
from theseus_transport.recipes.recipe import Recipe
from theseus_transport.streaming import passage

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
from random_checkpoint import ModelSizes, write_random  # noqa: E402

TINY = ModelSizes("llama", 24, 32, 3, 4, 2, 300), ModelSizes("llama", 40, 48, 3, 5, 5, 300)
MIDDLE = ModelSizes("llama", 512, 1408, 2, 8, 4, 1000), ModelSizes("llama", 768, 2048, 2, 12, 4, 1000)
COMMIT = passage.Passage._commit


def written(
    root: Path, pair: tuple[ModelSizes, ModelSizes], *, samples: int, length: int, dtype: torch.dtype = torch.float32
) -> Path:
    """A pair of random models, a shard a block, a tune of the first, and token ids [samples, length]."""
    write_random(root / "source", pair[0], dtype=dtype)
    write_random(root / "tuned", pair[0], dtype=dtype, tune=0.1)
    write_random(root / "target", pair[1], dtype=dtype, seed=1)
    ids = torch.randint(0, pair[0].vocab_size, (samples, length), generator=torch.Generator().manual_seed(0))
    save_file({"input_ids": ids}, root / "ids.safetensors")
    return root


def job_of(root: Path, out: str = "out", **options: object) -> Job:
    folders = (str(root / name) for name in ("source", "tuned", "target"))
    return Job(
        *folders,
        root / out,
        str(root / "ids.safetensors"),
        **{"tokens": 192, "batch_size": 4, "recipe": Recipe("coherent"), **options},
    )


def arguments(root: Path, out: str = "out") -> tuple[object, ...]:
    """The same job as the command's arguments."""
    options = ("--calibration", root / "ids.safetensors", "--tokens", 192, "--batch-size", 4, "--recipe", "coherent")
    return ("transport", *(root / name for name in ("source", "tuned", "target", out)), *options)


def command(folder: Path, call: list[object], change: Callable[[], None] = lambda: None) -> None:
    """The command as it is called, in a process of its own, printing into files; ``change``: before it starts."""
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = ["theseus", *map(str, call)]
    change()
    main()
