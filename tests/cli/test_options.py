"""The command's options: configuration files, recipes, and calibration from images and lines."""

import json
from dataclasses import fields

import numpy as np
import pytest
import yaml
from helpers import tiny_models
from helpers.broken_inputs import edited
from helpers.command import FAST, aligned, call, invoke, refused
from PIL import Image
from theseus_transport import Alignment
from theseus_transport.cli.main import app
from theseus_transport.cli.options import names_of, values
from theseus_transport.jobs.settings import Aligning, AlignJob, Job, Running
from theseus_transport.recipes.recipe import Recipe
from typer.main import get_command


@pytest.fixture(scope="module")
def root(models):
    return models


@pytest.fixture(scope="module")
def maps(root, tmp_path_factory):
    return aligned(root, tmp_path_factory.mktemp("alignments") / "maps")


def test_a_config_has_the_options_and_the_command_line_wins(root, maps, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({
        "source": str(root / "causal/source"), "tuned": str(root / "causal/tuned"),
        "target": str(root / "causal/target"), "out": str(tmp_path / "out"),
        "calibration": str(root / "ids.safetensors"),
        "tokens": 128, "batch-size": 4, "out_dtype": "float16", "alpha": [0.5, 2], "recipe": "paper", "null": "svd",
        "leave": ["lm_head*", "norm*"], "held-out": False, "json": True,
    }))  # fmt: skip
    outcome = json.loads(call("transport", "--config", path, "--null", "partial", "--out-dtype", "auto").stdout)
    job = outcome["job"]
    assert (job["alpha"], job["batch_size"], job["out_dtype"], job["leave"]) == (
        [0.5, 2.0],
        4,
        "auto",
        ["lm_head*", "norm*"],
    )
    assert (job["recipe"]["name"], job["recipe"]["null"]) == ("paper", "partial") and outcome["quality"] == []
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["alpha-0.5", "alpha-2"]
    path.write_text(yaml.safe_dump({"maps": str(maps), "tuned": str(root / "lora"), "out": "x", "alpha": "match"}))
    refused("overlaps the input", "apply", "--config", path, maps, root / "lora", maps / "inside")
    path.write_text(yaml.safe_dump({"calibration": str(root / "ids.safetensors"), "tokens": 64, "dry_run": True}))
    invoke("align", root / "causal/source", root / "causal/target", tmp_path / "maps", "--config", path)
    assert not (tmp_path / "maps").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ("tokns: 3", "'tokns' is no option of apply; nearest is '.*'"),
        ("aplha: 3", "'aplha' is no option of apply; nearest is 'alpha'"),
        ("depth: relative", "'depth' is no option of apply"),
        ("out-dtype: float32\nout_dtype: float16", "gives 'out_dtype' twice"),
        ("alpha:", "'alpha' is None; give a value"),
        ("- alpha", "holds list, expected keys and values"),
        ("alpha: [1", "no readable YAML"),
        ("alpha: 1\nalpha: 2", "gives 'alpha' twice; keep one"),
        ("alpha: {a: 1}", "'alpha' is {'a': 1}; give a value"),
        ("leave: [[a]]", r"'leave' is \[\['a'\]\]; give a value, or several"),
        ("leave: []", r"'leave' is \[\]; give a value"),
        ("alpha: 2020-01-01", r"'alpha' is datetime.date\(2020, 1, 1\)|'alpha' is 2020-01-01; give a value"),
        (f"alpha: 0x{'f' * 5000}", "'alpha' is a number of 20000 bits; give less"),
        (f"alpha: {'9' * 5000}", "no readable YAML"),
        (
            "\n".join(["a: &a x", *(f"{b}: &{b} [*{a}, *{a}]" for a, b in zip("abcdefgh", "bcdefghi", strict=True))]),
            r"it has the alias \*a; write its value out",
        ),
        ("a: &a\n  - *a", "it has the alias"),
        ("#" * (1 << 20) + "\nalpha: 1", "more than the 1048576 that are read"),
        ("alpha: 2026-02-30", "no readable YAML: day is out of range"),
        ("alpha: !!bool perhaps", "no readable YAML"),
        ("[" * 10**4, "no readable YAML"),
        ("a: !!python/object/apply:os.system [true]", "no readable YAML"),
    ],
)
def test_configs_that_are_refused(maps, root, tmp_path, content, message):
    path = tmp_path / "job.yaml"
    path.write_text(content)
    refused(message, "apply", maps, root / "lora", tmp_path / "out", "--config", path)
    refused("no readable YAML", "apply", maps, root / "lora", tmp_path / "out", "--config", tmp_path / "absent.yaml")


@pytest.mark.parametrize("place", [0, 2])
def test_a_refused_config_is_told_as_json_asks(maps, root, tmp_path, place):
    path = tmp_path / "job.yaml"
    path.write_text("alpha: [1")
    options = ["--config", path]
    options.insert(place, "--json")
    said = call("apply", maps, root / "lora", tmp_path / "out", *options)
    assert said.exit_code == 3 and "no readable YAML" in json.loads(said.stdout)["error"]


def test_a_value_of_another_kind_is_a_usage_error(maps, root, tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("out-dtype: float8")
    refused("--out-dtype", "apply", maps, root / "lora", tmp_path / "out", "--config", path, code=2)


def test_every_field_of_the_recipe_is_an_option():
    for command in ("transport", "align"):
        said = call(command, "--help").stdout
        for field in fields(Recipe):
            assert ("--recipe" if field.name == "name" else "--" + field.name.replace("_", "-")) in said, field.name
    assert "--null" not in call("apply", "--help").stdout


@pytest.mark.parametrize("command, job", [("transport", Job), ("apply", Job), ("align", AlignJob)])
def test_an_option_is_declared_once(command, job):
    """Its default in Python is the command's, read as the command reads it; both jobs inherit what they share."""
    parameters = {p.name: p for p in get_command(app).commands[command].params}
    declared = {field.name: field for field in fields(job) if field.name in names_of(job)}
    there = parameters.keys() & declared.keys()
    assert there >= {*names_of(Running), *(() if command == "apply" else names_of(Aligning))}
    assert values({name: parameters[name].default for name in there}) == {n: declared[n].default for n in there}
    assert all(parameters[name].help == declared[name].metadata["help"] for name in there)
    own = {name for kind in (Job, AlignJob) for name in kind.__annotations__ if name in names_of(kind)}
    assert own == {"calibration", "verify_inputs"}


def test_from_python(root, maps, tmp_path):
    job = Job.of_maps(str(maps), str(root / "lora"), tmp_path / "out", alpha=0.5)
    assert job.source == str(root / "causal/source") and job.recipe == Alignment.load(maps).recipe


def test_images_through_the_command(root, tmp_path):
    for i in range(40):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    sides = [root / "image" / name for name in ("source", "tuned", "target")]  # 8 x 8 pixels, and 12 x 12
    command = ("transport", *sides, tmp_path.with_name("moved"), "--calibration", tmp_path, "--batch-size", 4)
    told = json.loads(call(*command, "--json").stdout)
    assert told["calibration"].endswith("4 rows held out") and {row["space"] for row in told["quality"]} >= {"final"}
    invoke("verify", tmp_path.with_name("moved"))
    (tmp_path / "0.png").write_text("no image")
    refused(r"0\.png is no readable image", *command, "--overwrite", "--tokens", 10**4)
    again = json.loads(call(*command, "--overwrite", "--json", "--tokens", 10**4, "--skip-bad-inputs").stdout)
    assert any("1 images cannot be read" in warning for warning in again["warnings"])


def test_lines_through_the_command(root, tmp_path):
    for side in ("source", "target"):
        edited(tmp_path / side, root / "causal" / side)
        tiny_models.tokenizer(tmp_path / side, 280)
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({"text": tiny_models.TEXT}) + "\n" + json.dumps({"messages": [
        {"role": "user", "content": tiny_models.TEXT * 30}]}) + "\n{\n")  # fmt: skip
    command = ("align", tmp_path / "source", tmp_path / "target", tmp_path / "maps", "--calibration", path, *FAST)
    refused("data.jsonl line 3: .*--skip-bad-inputs", *command)
    told = json.loads(call(*command, "--json", "--skip-bad-inputs").stdout)
    assert any("1 lines of data.jsonl cannot be read" in warning for warning in told["warnings"])
    invoke("verify", tmp_path / "maps")
