"""A block run in two halves shows what the whole block does, bit for bit, each half with its own weights alone."""

import pytest
import torch
from helpers import tiny_models
from test_loop import PAIRS, calibration
from theseus_transport.activations.links import Pairs
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import Pair
from theseus_transport.streaming.half_blocks import HALVES, of_half
from theseus_transport.streaming.loop import Loop
from theseus_transport.streaming.schedule import schedule
from theseus_transport.streaming.window import Window


def opened(name, folder):
    torch.manual_seed(0)
    for side, model in enumerate(PAIRS[name]()):
        tiny_models.randomised(model).save_pretrained(folder / str(side))
    checkpoints = [Checkpoint.open(folder / str(side)) for side in range(2)]
    return checkpoints, Pair(*(Geometry.of(checkpoint.config, checkpoint) for checkpoint in checkpoints))


@pytest.mark.parametrize("name", PAIRS)
def test_halves_show_what_whole_blocks_do(name, tmp_path):
    """Moments, energies and rows held out, of blocks that pair up and others, in files or in memory, by tiles too."""
    checkpoints, geometries = opened(name, tmp_path)
    batches = [(batch, batch) for batch in calibration(geometries[0].family.modality)]
    how = {"held": 2, "device": torch.device("cpu"), "folder": tmp_path / "hidden"}
    cases = [([None, 0, 1], False, 1), *([([0, 1, None], True, 1), ([0, None, 1], True, 2)] if name == "llama" else [])]
    for blocks, resident, tiles in cases:
        pairs = Pairs(*geometries, blocks)
        links = {*pairs.moments, *pairs.class_rows, *pairs.energies}
        grams = {name: (0, 1) if ".context" not in name else (1,) for name in {**pairs.moments, **pairs.class_rows}}
        seen, states = {}, {}
        for halves in (False, True):
            windows = Pair(*map(Window, checkpoints))
            how |= {"resident": resident, "tiles": tiles, "grams": grams, "halves": halves}
            loop, found = Loop(windows, geometries, batches, **how), seen.setdefault(halves, {})
            for k, visit in enumerate(schedule(pairs, links)):
                got = loop.visit(visit, first=k == 0)
                assert (
                    list(got.links) == [*visit.moments, *visit.outputs] or halves and set(got.links) == {*visit.links}
                )
                for link, moment in got.moments.items():
                    for part, value in vars(moment).items():
                        found[link, part] = torch.as_tensor(value)
                    assert tuple(got.grams[link]) == grams[link]
                    for side, gram in got.grams[link].items():
                        assert gram.cross.shape == (len(gram.source_energy),) * 2
                        found[link, "gram", side] = gram.cross
                for link, e in got.energies.items():
                    found[link, "energy"] = torch.cat([e.source, e.target, e.source.new_tensor(e.centred)])
                for link, rows in got.kept.items():
                    found[link, "kept"] = torch.cat([side.flatten() for side in rows])
            states[halves] = [side.hidden[i] for side in loop.sides for i in range(len(batches))]
        assert seen[True].keys() == seen[False].keys()
        assert {key[1] for key in seen[True]} >= {"cross", "energy", "kept"}
        assert all(torch.equal(seen[True][key], value) for key, value in seen[False].items())
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(states[True], states[False], strict=True))


@pytest.mark.parametrize("name", PAIRS)
def test_each_half_has_the_weights_of_its_layers_alone(name, tmp_path):
    """The matrices of both halves are those of the block, each in one of them."""
    checkpoints, geometries = opened(name, tmp_path)
    for checkpoint, geometry in zip(checkpoints, geometries, strict=True):
        names = geometry.family.by_block(checkpoint)[0]
        assert of_half(geometry, names, None) == names
        matrices = [{n for n in of_half(geometry, names, half) if len(checkpoint.shapes[n]) > 1} for half in HALVES]
        assert not matrices[0] & matrices[1]
        assert matrices[0] | matrices[1] == {n for n in names if len(checkpoint.shapes[n]) > 1}
        inside = {geometry.family.canonical(n).removesuffix(".weight") for n in matrices[1]}
        assert inside == {geometry.block(0, n) for n in (*geometry.family.expand, geometry.family.contract)}
        windows = Pair(*[Window(checkpoint)] * 2)
        loop = Loop(windows, Pair(geometry, geometry), [(b, b) for b in calibration(geometry.family.modality)],
                    held=None, grams={}, device=torch.device("cpu"), folder=tmp_path, resident=True)  # fmt: skip
        skeleton = loop.sides[0].skeleton
        for half, own in zip(HALVES, matrices, strict=True):
            with skeleton.filled(0, half):
                there = {n for n, p in skeleton.model.named_parameters() if not p.is_meta and p.ndim > 1}
            assert {geometry.family.canonical(n) for n in there} == {geometry.family.canonical(n) for n in own}
