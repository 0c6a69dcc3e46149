"""Predictions of memory and time: flops as torch counts them, and what the command prints of them."""

import ast
import json
from dataclasses import replace
from pathlib import Path

import pytest
import theseus_transport
import torch
from exact.models import LLAMA, base, batches, tune
from helpers.tiny_models import adapter
from theseus_transport import Delta, Recipe, align, machine, transport
from theseus_transport.activations.links import Pairs
from theseus_transport.budget import time as time_module
from theseus_transport.budget.choice import Choice
from theseus_transport.budget.time import Effort, decompositions, forward, move_flops, polar_flops
from theseus_transport.calibration.extent import Extent
from theseus_transport.cli.main import app
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.machine import rate
from theseus_transport.models.geometry import Geometry
from theseus_transport.models.pair import SIDES, Pair
from theseus_transport.updates.alpha import matched
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaModel, ViTModel
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def root(models):
    return models


def matrix_products(run):
    """Flops of the plain matrix products in a function, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if str(op) in ("aten.mm", "aten.addmm"))


@pytest.mark.parametrize("name, cls, tokens", [("bare", LlamaModel, 2 * 16), ("vision", ViTModel, 2 * 5)])
def test_flops_of_a_forward_pass(root, name, cls, tokens):
    folder = root / name / "source"
    options = {} if name == "bare" else {"add_pooling_layer": False}
    model = cls.from_pretrained(folder, **options)
    data = (
        {"input_ids": torch.ones(2, 16, dtype=torch.int64)}
        if name == "bare"
        else {"pixel_values": torch.ones(2, 3, 8, 8)}
    )
    checkpoint = Checkpoint.open(folder)
    assert forward(checkpoint, Geometry.of(checkpoint.config), tokens) == matrix_products(lambda: model(**data))


def test_flops_of_a_move(root):
    """Dense maps on both sides are two products per layer; a LoRA moves through its factors."""
    source, target = (Checkpoint.open(root / "bare" / side) for side in ("source", "target"))
    models = [LlamaModel.from_pretrained(root / "bare" / side).double() for side in ("source", "target")]
    recipe = Recipe("paper", null="svd")  # which keeps every map dense
    alignment = align(*models, [{"input_ids": torch.randint(0, 300, (8, 16))}], recipe=recipe)
    full = Delta.between(source, Checkpoint.open(root / "bare" / "tuned"))
    update = transport(alignment, full, target)
    counted = matrix_products(lambda: dict(update))
    assert move_flops(update) <= counted <= 1.05 * move_flops(update)  # norms and biases are vectors
    lora = Delta.from_adapter(root / "lora", Checkpoint.open(root / "causal" / "source"))
    moved = transport(alignment, lora, Checkpoint.open(root / "causal" / "target"))
    (q,) = {(24, 24, 40, 40)}  # q_proj: out_S, in_S, out_T, in_T; v_proj has kv heads: 12 and 40 wide
    by_hand = sum(2 * 4 * (in_s * in_t + out_s * out_t) for out_s, in_s, out_t, in_t in (q, (12, 24, 40, 40)))
    assert move_flops(moved) == 2 * by_hand  # two blocks, rank 4


def test_flops_of_decompositions(root):
    """24 m k^2 + 9 k^3 for every map: two norms, middle, queries and context in each of two blocks, and final."""
    geometries = SIDES.map(lambda side: Geometry.of(Checkpoint.open(root / "bare" / side).config))
    assert polar_flops(768, 1024) == polar_flops(1024, 768) == 24 * 1024 * 768**2 + 9 * 768**3
    residual, middle = polar_flops(24, 40), polar_flops(32, 48)
    heads = 2 * 5 * polar_flops(6, 8)  # queries and context, per kv head of the target
    assert (
        decompositions(Pairs.by_position(*geometries), Recipe("coherent"))
        == 2 * (2 * residual + middle + heads) + residual
    )


def test_a_bias_that_only_the_target_has_costs_nothing_and_counts_nowhere():
    source, target = base(LLAMA), base(LLAMA, attention_bias=True, seed=5)
    delta = Delta.between(source.state, tune(source, "linear").state)
    update = transport(
        align(source.build(), target.build(), batches(source, seed=3), recipe="coherent"), delta, target.state
    )
    flops, alpha = move_flops(update), matched(update)
    update.moved["layers.0.self_attn.q_proj.bias"] = "layers.0.self_attn.q_proj.bias"
    assert "layers.0.self_attn.q_proj.bias" not in update.source
    assert (move_flops(update), matched(update)) == (flops, alpha)


def test_the_rate_is_of_this_machine(monkeypatch):
    monkeypatch.setattr(machine, "TRIAL", 768)  # as a user's job measures it
    slow, fast = rate(torch.float64), rate(torch.float32)
    assert 1e7 < slow < 1e15 and 1e7 < fast < 1e16  # from a microcontroller to more than any accelerator


def test_predicted_beside_used(root, tmp_path):
    sides = [str(root / "causal" / name) for name in ("source", "tuned", "target")]
    command = [
        "transport",
        *sides,
        str(tmp_path / "o"),
        "--calibration",
        str(root / "ids.safetensors"),
        "--tokens",
        "64",
        "--alpha",
        "1",
    ]
    dry = json.loads(CliRunner().invoke(app, [*command, "--dry-run", "--json"]).stdout)
    assert set(dry["predicted_seconds"]) == {
        "forward",
        "cross-moments",
        "decompositions",
        "held-out quality",
        "fits",
        "move",
    }
    assert all(seconds > 0 for seconds in dry["predicted_seconds"].values()) and dry["seconds"] == {}
    said = " ".join(CliRunner().invoke(app, command, env={"COLUMNS": "200"}).stdout.split())
    for expected in (
        "MiB predicted",
        "MiB used",
        "s in all, forward",
        "by flops and this machine's rate",
        "time used",
    ):
        assert expected in said, expected


@pytest.fixture(scope="module")
def of_queries(root, tmp_path_factory):
    """A LoRA on the queries of the first of two blocks, and a job that moves it."""
    folder = tmp_path_factory.mktemp("queries")
    model = AutoModelForCausalLM.from_pretrained(root / "causal" / "source")
    adapter(folder / "lora", model, target_modules=["q_proj"], layers_to_transform=[0])
    sides = str(root / "causal" / "source"), str(folder / "lora"), str(root / "causal" / "target")
    return Job(*sides, folder / "out", calibration=str(root / "ids.safetensors"), recipe=Recipe("coherent"))


def test_a_job_predicts_what_it_needs_alone(of_queries, root, monkeypatch):
    """Of queries in the first block: one block of each model, the space they read, and heads."""
    monkeypatch.setattr(time_module, "rate", lambda dtype, device: 1.0)  # seconds are flops
    session = Session(of_queries)
    sides = [Checkpoint.open(root / "causal" / side) for side in ("source", "target")]
    geometries = [Geometry.of(side.config) for side in sides]
    assert session.fitted.tokens == 4 * 40  # heads' outputs; the MLP's middle has 48
    rows, held = 10 + 5, 5  # of 16 tokens; a third of all is held out
    assert (session.fitted.extent.samples, session.fitted.extent.held) == (rows, held)
    both = list(zip(sides, geometries, strict=True))
    blocks = [forward(*side, 16 * rows, {0}) for side in both]
    assert session.seconds["forward"] == sum(blocks) == sum(forward(*s, 16 * rows) for s in both) / 2
    heads = 2 * 5 * polar_flops(6, 8)
    assert session.seconds["decompositions"] == polar_flops(24, 40) + heads
    compared = 24 * 40 + 24 * 40 + 40 * 40  # what queries read, the context, and the target's with itself
    assert session.seconds["cross-moments"] == 2 * 160 * compared
    assert session.seconds["held-out quality"] == 4 * held * 16 * (24 * 40 + 24 * 40 // 5)
    outcome = session.run()
    assert outcome.skipped.startswith("1 of 2 blocks were not run")
    assert {row["space"] for row in outcome.maps} == {"0.attention", "0.context", "0.query"}
    assert not any("calibration tokens" in warning for warning in outcome.warnings), "160 are enough for these"


def test_a_lora_of_queries_is_a_small_part_of_a_full_tune(of_queries, root, tmp_path, monkeypatch):
    monkeypatch.setattr(time_module, "rate", lambda dtype, device: 1.0)
    full = replace(of_queries, tuned=str(root / "causal" / "tuned"))
    known = [Session(replace(job, tokens=128, out=tmp_path / "out")).seconds for job in (of_queries, full)]
    assert all(few < part / 2 + 1 for few, part in zip(*(known[i].values() for i in (0, 1)), strict=True))


def test_other_depths_and_completed_maps_take_passes_more(root):
    sides = SIDES.map(lambda side: Checkpoint.open(root / "causal" / side))
    geometries = sides.map(lambda side: Geometry.of(side.config))
    there = Extent(4, Pair(16, 16), 0, expected=4, held=1)
    (layer,) = (layer for layer in geometries[1].layers() if layer.name == "layers.1.mlp.down_proj")

    def passes(geometries, recipe, choice):
        effort = Effort.of(sides, geometries, recipe, {layer.name}, there, 1000, choice)
        return effort.passes, effort.whole, effort.tokens, effort.held, effort.rows

    assert passes(geometries, Recipe("coherent"), Choice(8)) == (1, 0, 48, 16, (64, 64))
    assert passes(geometries, Recipe("coherent", null="completed"), Choice(8, tiles=4))[:2] == (4, 1)
    assert passes(Pair(replace(geometries[0], depth=1), geometries[1]), Recipe("coherent"), Choice(8))[:2] == (1, 1)


def test_the_library_prints_nothing():
    """Only the command speaks, and the process of a chat template, which answers so; the library logs."""
    package, speaking = Path(theseus_transport.__file__).parent, []
    for path in package.rglob("*.py"):
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        if any(isinstance(f, ast.Name) and f.id == "print" for f in calls):
            speaking.append(path.relative_to(package).as_posix())
    assert sorted(speaking) == ["calibration/chat_process.py", "cli/main.py", "cli/terminal.py"]
