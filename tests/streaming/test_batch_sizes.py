"""Another batch size is another rounding, and no more."""

import shutil

import torch
from helpers.large_pairs import TINY, job_of, written
from safetensors.torch import save_file
from theseus_transport.activations.links import Pairs
from theseus_transport.alignment.alignment import Alignment
from theseus_transport.calibration.calibration import batches_of
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.align_job import AlignSession
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from theseus_transport.recipes.maps import Heads
from theseus_transport.streaming.loop import Loop
from theseus_transport.streaming.schedule import schedule
from theseus_transport.streaming.window import Window

SIZES = 1, 3, 12


def moments(folders, data, batch_size, hidden):
    opened = [Checkpoint.open(folder) for folder in folders]
    geometries = Pair(*(Geometry.of(checkpoint.config) for checkpoint in opened))
    pairs, found = Pairs(*geometries, range(TINY[1].num_hidden_layers)), {}
    how = {"held": None, "grams": {}, "device": torch.device("cpu"), "folder": hidden, "resident": True}
    loop = Loop(Pair(*map(Window, opened)), geometries, batches_of({"input_ids": data}, batch_size=batch_size), **how)
    for k, visit in enumerate(schedule(pairs, {*pairs.moments, *pairs.energies})):
        found |= loop.visit(visit, first=k == 0).moments
    return found


def test_moments_and_maps_of_all_batch_sizes(tmp_path):
    """Moments are off float64 at most twice as far as one float32 product of all rows is; maps reach as much."""
    root = written(tmp_path, TINY, samples=12, length=16)
    for side in ("source", "target"):
        checkpoint, place = Checkpoint.open(root / side), tmp_path / f"double-{side}"
        place.mkdir()
        shutil.copy(root / side / "config.json", place)
        save_file({name: tensor.double() for name, tensor in checkpoint.items()}, place / "model.safetensors")
    data = Checkpoint.open(root / "ids.safetensors")["input_ids"]
    true = moments([tmp_path / "double-source", tmp_path / "double-target"], data, 12, tmp_path / "hidden")
    found = {n: moments([root / "source", root / "target"], data, n, tmp_path / "hidden") for n in SIZES}
    for name, exact in true.items():
        size = (exact.source_energy.sum() * exact.target_energy.sum()).sqrt()
        errors = [float((found[n][name].cross - exact.cross).norm() / size) for n in SIZES]
        assert max(errors) <= 2 * errors[-1], (name, errors)
    reached = {}
    for n in SIZES:
        job = job_of(root, f"maps-{n}", tokens=192, batch_size=n, held_out=False).alignment
        AlignSession(job).run()
        maps = Alignment.load(job.out).maps
        reached[n] = {
            name: float(maps[name](true[name].cross.T).trace())
            for name in true
            if name in maps and not isinstance(maps[name], Heads)
        }
    for name, best in reached[12].items():
        assert all(abs(reached[n][name] - best) <= 1e-5 * abs(best) for n in SIZES), (name, reached)
    assert len(reached[12]) > 6
