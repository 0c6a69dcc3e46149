"""The command: what it refuses and how it says so, and what its screens tell."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import tiny_models
from helpers.broken_inputs import adapter, config, data, index, pickled, poisoned, tensors, text, without
from safetensors.torch import load_file
from theseus_transport import __version__
from theseus_transport.cli import doctor as doctor_module
from theseus_transport.cli.main import app
from theseus_transport.streaming.passage import Passage
from typer.testing import CliRunner

Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.fixture(scope="module")
def root(models, tmp_path_factory):
    root = tmp_path_factory.mktemp("more")
    shutil.copytree(models, root, dirs_exist_ok=True)
    torch.manual_seed(0)
    tiny_models.llama("target", depth=3).save_pretrained(root / "deep")
    tiny_models.llama("source").save_pretrained(root / "stranger")
    return root


def invoke(*arguments, columns=80):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": str(columns)})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def files(*places):
    """What lies there, and when it was last written."""
    return {path: path.stat().st_mtime_ns for place in places for path in place.rglob("*")}


def arguments(root, out, *options, **changed):
    chosen = {"source": "causal/source", "tuned": "causal/tuned", "target": "causal/target"} | changed
    paths = [root / chosen[side] for side in ("source", "tuned", "target")]
    return ["transport", *paths, out, "--calibration", root / chosen.get("calibration", "ids.safetensors"), *options]


def case(name, message, *options, code=3, out=None, **changed):
    """One broken input: what replaces the good arguments, or how to make it, and what the command must say."""
    return pytest.param(message, options, code, out, changed, id=name)


IDS = torch.randint(0, 300, (6, 16), generator=torch.Generator().manual_seed(0))
BF16 = {"tuned": "bf16/tuned", "target": "bf16/target"}
IMAGE = {"source": "vision/source", "tuned": "vision/tuned", "target": "vision/target"}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
CASES = [
    case("missing folder", "is neither a folder, .* hub id", source="nowhere/at/all"),
    case("no model", "models in folders of their own; give .*causal/source or", source="causal"),
    case("no config", "has no config.json", source=without("causal/source", "config.json")),
    case("config is no JSON", "no valid JSON", source=text("causal/source", "config.json", "{")),
    case("other family", "model_type is 'gpt9'; supported", source=config("causal/source", model_type="gpt9")),
    case("width is text", "hidden_size is '24', expected a positive", source=config("causal/source", hidden_size="24")),
    case("no heads", "num_attention_heads is 0", target=config("causal/target", num_attention_heads=0)),
    case("heads do not divide", "7 attention heads .* divide", source=config("causal/source", num_attention_heads=7)),
    case("no MLP size", "intermediate_size is None", source=config("causal/source", intermediate_size=None)),
    case("endless depth", "says 1000000000 blocks, .* of 2", source=config("causal/source", num_hidden_layers=10**9)),
    case("endless vocabulary", r"config.json asks for \[1000000000", source=config("causal/source", vocab_size=10**9)),
    case("nonsense elsewhere", "cannot load .*rms_norm_eps", source=config("causal/source", rms_norm_eps="x")),
    case("unread tensors", "no place for .*attention.key.bias", calibration="images.safetensors",
         **IMAGE | {"source": config("vision/source", qkv_bias=False)}),
    case("quantised", r"quantised \(gptq\); dequantise", source=config("causal/source", quantization_config={
        "quant_method": "gptq"})),
    case("integers", "torch.int8, not floating point", source=tensors("causal/source", lambda t: t.update(
        {WEIGHT: t[WEIGHT].char()}))),
    case("family", "source is llama, which reads text, target is vit, which reads vision", target="vision/target"),
    case("base of other width", "width is 24 in TUNED and 40 in SOURCE", source="causal/target"),
    case("unrelated base", r"cosine -?0\.0\d+, but a tune", source="stranger"),
    case("no change", "no tensor differs from the base", tuned="causal/source"),
    case("NaN in source", "1 NaN and 0 Inf of 576", source=poisoned("causal/source", WEIGHT, float("nan"))),
    case("Inf in target", "0 NaN and 1 Inf of 1600", target=poisoned("causal/target", WEIGHT, float("inf"))),
    case("NaN in tuned", "1 NaN", tuned=poisoned("causal/tuned", WEIGHT, float("nan"))),
    case("NaN in tuned, matched", "1 NaN", "--alpha", "match",
         tuned=poisoned("causal/tuned", WEIGHT, float("nan"))),
    case("NaN in adapter", "1 NaN", tuned=poisoned("lora", Q + "A.weight", float("nan"))),
    case("traversal", "out of the folder", source=index(lambda m, d: m.update({WEIGHT: "../a.safetensors"})), **BF16),
    case("absolute path", "out of the folder", source=index(lambda m, d: m.update({WEIGHT: "/x.safetensors"})), **BF16),
    case("truncated shard", "truncated; download", source=index(lambda m, d: os.truncate(d / m[WEIGHT], 5000)), **BF16),
    case("missing shard", "is missing", source=index(lambda m, d: (d / m[WEIGHT]).unlink()), **BF16),
    case("pickle", "a pickle; convert it to safetensors, or --allow-pickle", source=pickled),
    case("adapter as source", "SOURCE .* is an adapter; give the base it was trained on, which", source="lora"),
    case("adapter of another base", r"is \[24, 24\], the base's \[40, 40\]", source="causal/target", tuned="lora"),
    case("adapter without config", "has no adapter_config.json", tuned=without("lora", "adapter_config.json")),
    case("adapter config no JSON", "no valid JSON", tuned=text("lora", "adapter_config.json", "[")),
    case("DoRA", "holds DoRA, which .*; --output checkpoint", tuned=adapter(use_dora=True)),
    case("PiSSA", "initialised by pissa.*: python -c", tuned=adapter(init_lora_weights="pissa")),
    case("biases", "holds trained biases .*; --output checkpoint", tuned=adapter(bias="all")),
    case("half an adapter", "lora_B alone", tuned=tensors("lora", lambda t: t.pop(Q + "A.weight"))),
    case("adapter beyond the model", "layers.7.* has 2 blocks; give the base", tuned=tensors("lora", lambda t: t.update(
        {Q.replace(".0.", ".7.") + f"{f}.weight": torch.ones(s) for f, s in (("A", (4, 24)), ("B", (24, 4)))}))),
    case("rank of a checkpoint", "rank 4 is of an adapter, a checkpoint has none; add --output adapter", "--rank", "4"),
    case("out is an input", "overlaps the input", "--overwrite", out="causal/tuned"),
    case("out in an input", "overlaps the input", out="causal/source/out"),
    case("out holds the calibration", "overlaps the input", "--overwrite", out="."),
    case("out not empty", "is not empty; .* --overwrite", out="stranger"),
    case("alpha 0", "alpha is 0.0; give a finite", "--alpha", "0"),
    case("alpha nan", "alpha is nan", "--alpha", "nan"),
    case("floor", r"floor is 2.0; it must be", "--floor", "2"),
    case("leave misspelt", "--leave 'norm' matches nothing; names read like", "--leave", "norm"),
    case("unknown device", "device is 'tpu'; give cpu, cuda", "--device", "tpu"),
    case("seed", "seed is -1; give", "--seed", "-1"),
    case("overflow", "came out with 0 NaN and [0-9]+ Inf in torch.float16", "--alpha", "1e8", "--out-dtype", "float16",
         code=5),
    case("overflow of the update", r"holds NaN or Inf in torch.float32 at alpha 1e\+300", "--alpha", "1e300", code=5),
    case("unknown recipe", "--recipe", "--recipe", "best", code=2),
    case("no tokens", "--tokens", "--tokens", "0", code=2),
    case("no calibration", "is no file; give a .safetensors", calibration="absent.safetensors"),
    case("unknown key", "'foo' is not known; names are input_ids", calibration=data(foo=IDS)),
    case("foreign ids", "vocabulary of 300; was it made", calibration=data(input_ids=IDS + 300)),
    case("empty", r"input_ids \[0, 16\] is empty", calibration=data(input_ids=IDS[:0])),
    case("no tokenizer", "has no tokenizer; copy", calibration="text.txt"),
    case("image size", r"reads floats \[n, 3, 8, 8\]", **IMAGE, calibration=data(pixel_values=torch.ones(1, 3, 9, 9))),
    case("NaN in images", "192 NaN", **IMAGE, calibration=data(pixel_values=torch.full((1, 3, 8, 8), float("nan")))),
    case("text for images", "reads images", **IMAGE, calibration="text.txt"),
]  # fmt: skip


@pytest.mark.parametrize("message, options, code, out, changed", CASES)
def test_refused_with_one_message(root, tmp_path, message, options, code, out, changed):
    changed = {side: make(root, tmp_path / side) if callable(make) else make for side, make in changed.items()}
    before = files(root, tmp_path)
    result = invoke(*arguments(root, root / out if out else tmp_path / "out", *options, **changed), columns=1000)
    assert result.exit_code == code, result.output
    assert re.search(message, result.stderr), result.stderr
    assert code == 2 or result.stderr.startswith("error ") and result.stderr.count("\n") == 1  # one line, no traceback
    assert result.stdout == ""
    assert files(root, tmp_path) == before


def test_dry_run_checks_everything_and_writes_nothing(root, tmp_path):
    before = files(root)
    result = invoke(*arguments(root, tmp_path / "out", "--dry-run"))
    assert result.exit_code == 0 and files(root) == before and files(tmp_path) == {}
    assert re.search(r"layers\.\*\.post_attention_layernorm +2 +folded +into its readers", result.stdout)
    assert "(--dry-run)" in result.stdout and "ids.safetensors: 12 rows, 192 tokens" in result.stdout
    result = invoke(*arguments(root, tmp_path / "out", "--dry-run", calibration="images.safetensors"))
    assert result.exit_code == 3 and "pixel_values" in result.stderr


TOLD = {
    "coherent": ("2 transported as factors", "source heads"),
    "effect": ("by its effect on what the residual's writers add", "of the tune's effect on predictions arrived"),
}


@pytest.mark.parametrize("recipe", TOLD)
def test_the_screen_is_readable_at_80_columns(root, tmp_path, recipe):
    out = tmp_path / "a rather long name of a folder [/x]" / "that does not fit into one line of a terminal"
    result = invoke(*arguments(root, out, "--recipe", recipe, tuned="lora"))
    lines = result.stdout.splitlines()
    code = [line.strip() for line in lines if "from_pretrained" in line]
    assert code == [
        f"model = LlamaForCausalLM.from_pretrained('{root / 'causal' / 'target'}')",
        f"model = PeftModel.from_pretrained(model, '{out}')",  # whole, to be copied
    ]
    assert all(len(line) <= 80 for line in lines if "from_pretrained" not in line) and "…" not in result.stdout
    said = " ".join(result.stdout.split())
    for expected in (*TOLD[recipe], "24 of 24", "MiB predicted", "MiB used", "adapter, "):
        assert expected in said, expected


@pytest.mark.parametrize("tuned", ["causal/tuned", "patterns"])
def test_json_is_one_object_on_stdout(root, tmp_path, tuned):
    result = invoke(*arguments(root, tmp_path / "out", "--json", tuned=tuned))
    outcome = json.loads(result.stdout)
    assert outcome["written"] == str(tmp_path / "out") and outcome["used_bytes"] > 0
    expected = ("near chance", "on predictions arrived")  # of random models little does
    assert all(any(said in warning for said in expected) for warning in outcome["warnings"])
    assert outcome["kind"] == ("adapter" if tuned == "patterns" else "checkpoint") and result.stderr == ""
    refused = invoke(*arguments(root, tmp_path / "out", "--json", tuned=tuned))
    assert json.loads(refused.stdout) == {"error": refused.stderr.removeprefix("error ").strip(), "exit_code": 3}


def test_pickle_where_it_is_allowed(root, tmp_path):
    source = pickled(root, tmp_path / "source")
    assert invoke(*arguments(root, tmp_path / "out", "--allow-pickle", source=source)).exit_code == 0
    assert load_file(tmp_path / "out" / "model.safetensors")


def test_inspect_tells_how_a_folder_was_made_and_what_is_damaged(root, tmp_path):
    out = tmp_path / "out"
    invoke(*arguments(root, out, "--alpha", "0.5", "--recipe", "coherent", tuned="lora"))
    whole = invoke("inspect", out, columns=1000)
    assert whole.exit_code == 0 and "all 3 files are as written" in whole.stdout
    assert f"adapter of {root / 'lora'}, moved from {root / 'causal' / 'source'} to" in whole.stdout
    assert (
        "recipe coherent, null partial, floor 1e-06, " in whole.stdout
        and "; alpha 0.5, " in whole.stdout
        and "as factors" in whole.stdout
    )
    weights = out / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    (out / "README.md").unlink()
    (out / "new.txt").write_text("")
    damaged = invoke("inspect", out, columns=1000)
    assert damaged.exit_code == 3 and damaged.stdout.count("damaged ") == 3
    told = json.loads(invoke("inspect", out, "--json").stdout)["damaged"]
    for fault, expected in zip(
        told, ("README.md is missing", "BLAKE2b", "new.txt is not in the manifest"), strict=True
    ):
        assert expected in fault


@pytest.mark.parametrize("told", ["[]", '{"outcome": 1}', '{"outcome": {"job": {"tuned": "[/x]", "recipe": []}}}'])
def test_inspect_of_an_edited_manifest(tmp_path, told):
    (tmp_path / "theseus.json").write_text(f'{{"files": {{}}, "metadata": {told}}}')
    result = invoke("inspect", tmp_path)
    assert result.exit_code == 0 and "does not tell how this was made" in result.stdout


def test_inspect_of_another_folder(root):
    result = invoke("inspect", root / "causal" / "source", columns=1000)
    assert result.exit_code == 3 and "holds no theseus.json; give a folder this command wrote" in result.stderr


def test_doctor(monkeypatch):
    facts = json.loads(invoke("doctor", "--json").stdout)
    assert facts["healthy"] is True and facts["torch"] == torch.__version__
    assert "exact control" in invoke("doctor").stdout
    monkeypatch.setattr(doctor_module, "permuted_control", lambda: 0.5)
    assert invoke("doctor").exit_code == 5


HOST = "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


@pytest.mark.parametrize(
    "error, code, message",
    [
        (KeyboardInterrupt(), 130, "interrupted; nothing was written"),
        (MemoryError("9 bytes"), 4, "out of memory: 9 bytes; free some"),
        (RuntimeError(HOST), 4, "tried to allocate 9 bytes; free some"),
        (torch.OutOfMemoryError("CUDA out of memory"), 4, "lower --batch-size"),
        (PermissionError(13, "Permission denied", "/locked"), 4, "Permission denied: '/locked'; check the path"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_what_happens_on_the_way_has_an_exit_code(root, tmp_path, monkeypatch, error, code, message):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Passage, "run", fail)
    result = invoke(*arguments(root, tmp_path / "out"), columns=1000)
    assert result.exit_code == code and message in result.stderr and files(tmp_path) == {}


def test_usage():
    assert invoke("--version").stdout.strip() == __version__
    assert invoke().exit_code == 2 and invoke("transport").exit_code == 2
    assert "4 x the widest space" in re.sub(r"[\s│]+", " ", invoke("transport", "--help").stdout)


def test_a_real_process_warns_in_its_report(root, tmp_path):
    """Where no test framework has set up logging: warnings are part of the report, not of stderr."""
    few = data(input_ids=IDS[:1, :4])(root, tmp_path / "few")
    command = [sys.executable, "-c", "from theseus_transport.cli.main import main; main()"]
    options = [str(a) for a in arguments(root, tmp_path / "out", "--json", calibration=few)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command + options, capture_output=True, text=True, env=environment, check=True)
    warnings = json.loads(done.stdout)["warnings"]
    assert any("4 calibration tokens" in w for w in warnings) and any("half their rank" in w for w in warnings)
    assert "calibration" not in done.stderr
