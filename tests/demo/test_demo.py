"""The demo at its smallest: every step runs, and what it writes has the shape it promises. No accuracy is asserted."""

import copy
import io
import json
import math

import pytest
import torch
from rich.console import Console
from theseus_transport import InputRefused
from theseus_transport.demo import experiment as demo
from theseus_transport.demo.data import SHIFTS, generator_of, jitter, warp
from theseus_transport.demo.experiment import run_demo
from theseus_transport.demo.models import build, random_like, random_tune, refitted
from theseus_transport.demo.report import render_table
from theseus_transport.demo.results import RIVALS, WAYS, Cell, DemoSettings, gain, interval, lead


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    steps = []
    folder = tmp_path_factory.mktemp("demo")

    def progress(name, total):
        steps.append([name, total, 0])
        mine = steps[-1]

        def advance():
            mine[2] += 1

        return advance

    settings = DemoSettings.quick()
    before = torch.get_rng_state()
    result = run_demo(settings, folder, progress)
    assert torch.equal(before, torch.get_rng_state()), "the demo changed the caller's random state"
    return settings, result, folder, steps


def test_every_cell_is_measured_once(run):
    settings, result, _, steps = run
    keys = [(c.seed, c.source, c.target, c.shift, c.update) for c in result.cells]
    assert len(keys) == len(set(keys)) == settings.seeds * 2 * len(settings.shifts) * 2
    assert all(0 <= getattr(c, way) <= 100 for c in result.cells for way in ("zero_shot", *WAYS))
    assert [name for name, _, _ in steps] == ["pretraining", "fine-tuning", "moving"]
    assert all(total == done for _, total, done in steps)


def test_ceiling_and_zero_shot_belong_to_the_target(run):
    _, result, _, _ = run
    for c in result.cells:
        same = [o for o in result.cells if (o.seed, o.target, o.shift) == (c.seed, c.target, c.shift)]
        assert {o.zero_shot for o in same} == {c.zero_shot}
        assert {o.ceiling for o in same if o.update == c.update} == {c.ceiling}


def test_json(run):
    settings, result, folder, _ = run
    record = json.loads((folder / "demo.json").read_text())
    assert record == json.loads(json.dumps(result.as_dict())) and record["format"] == 2
    assert record["settings"]["widths"] == list(settings.widths)
    assert [g["update"] for g in record["gains"]] == ["full", "lora"]
    assert all(set(WAYS) < set(g) and g["cells"] == 4 and set(g["effect_over"]) == set(RIVALS) for g in record["gains"])
    assert len(record["cells"]) == len(result.cells)


def test_plot_and_table(run):
    _, result, folder, _ = run
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(result))
    text = console.export_text()
    assert all(label in text for label in (*WAYS.values(), *RIVALS.values(), "LoRA"))


def cell(seed, **scores):
    return Cell(seed, 8, 16, "rotation", "full", **{way: 50.0 for way in ("zero_shot", *WAYS)} | scores)


def test_an_interval_counts_seeds_not_cells():
    """Cells of one seed share models: two that agree say no more than one."""
    cells = [cell(1, effect=60.0), cell(1, effect=62.0), cell(2, effect=64.0), cell(2, effect=66.0, coherent=62.0)]
    assert gain(cells, "effect") == interval([11.0, 15.0])
    assert lead(cells, "coherent") == interval([11.0, 9.0])


def test_a_refitted_classifier_shows_the_change_of_logits_that_features_can_tell():
    """Source and target one model, the tune a change of its classifier: the refit is that change, up to its penalty."""
    torch.manual_seed(1)
    source = build(16, depth=1, heads=2).eval()
    tuned, images = copy.deepcopy(source), torch.rand(200, 1, 8, 8)
    tuned.classifier.weight.data += 0.1 * torch.randn(10, 16)
    update = refitted(source, tuned, source, images)
    with torch.no_grad():
        wanted = tuned(pixel_values=images).logits - source(pixel_values=images).logits
        source.classifier.weight += update["classifier.weight"]
        source.classifier.bias += update["classifier.bias"]
        missing = tuned(pixel_values=images).logits - source(pixel_values=images).logits
    assert missing.norm() < 0.1 * wanted.norm()


def test_missing_package_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputRefused, match=r"pip install theseus-transport\[demo\]"):
        run_demo(DemoSettings.quick(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", SHIFTS)
def test_shift_is_repeatable_and_changes_the_images(name):
    images = torch.rand(5, 1, 8, 8, generator=generator_of("images"))
    first, second = (SHIFTS[name](images, generator_of(name)) for _ in range(2))
    assert first.shape == images.shape and torch.equal(first, second) and not torch.equal(first, images)


def test_warp():
    images = torch.rand(3, 1, 8, 8, generator=generator_of("images"))
    still = dict(scale=torch.ones(3), offset=torch.zeros(3, 2))
    assert torch.allclose(warp(images, angle=torch.zeros(3), **still), images, atol=1e-6)
    quarter = warp(images, angle=torch.full((3,), 90.0), **still)
    assert torch.allclose(quarter, torch.rot90(images, -1, (2, 3)), atol=1e-5) or torch.allclose(
        quarter, torch.rot90(images, 1, (2, 3)), atol=1e-5
    )
    assert jitter(images, generator_of("jitter")).shape == images.shape


def test_random_update_has_the_norm_of_the_update():
    update = {"a": torch.randn(3, 4, dtype=torch.float64), "b": torch.zeros(2)}
    drawn = random_like(update, generator_of("drawn"))
    assert torch.isclose(drawn["a"].norm(), update["a"].norm()) and not torch.allclose(drawn["a"], update["a"])
    assert torch.equal(drawn["b"], update["b"])


def test_random_tune_changes_what_the_tune_changed_by_as_much():
    torch.manual_seed(2)
    base = build(8, depth=1, heads=2)
    tuned = copy.deepcopy(base)
    tuned.classifier.weight.data += 1
    drawn = random_tune(base, tuned, generator_of("drawn"))
    changed = {
        n for (n, p), q in zip(drawn.named_parameters(), base.parameters(), strict=True) if not torch.equal(p, q)
    }
    assert changed == {"classifier.weight"}
    change = drawn.classifier.weight - base.classifier.weight
    assert torch.isclose(change.norm(), torch.tensor(80.0).sqrt()) and not torch.allclose(change, torch.ones(()))


def test_interval():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and math.isclose(found.half, 4.302652729911275 / math.sqrt(3))  # t(0.975, 2), spread 1
    assert math.isnan(interval([1.0]).half) and str(interval([1.0])) == "+1.0"
