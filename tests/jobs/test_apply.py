"""One alignment, many tunes: align and apply, several strengths, dtypes, and what is refused."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers import tiny_models
from helpers.broken_inputs import edited
from helpers.command import COHERENT, aligned, call, held, identical, invoke, outcome_of, refused
from safetensors.torch import save_file
from theseus_transport import Alignment, InputRefused
from theseus_transport.cli.main import app
from theseus_transport.files.result_folder import differences
from theseus_transport.updates.alpha import chosen, folders
from theseus_transport.updates.layer_moves import Move
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from typer.testing import CliRunner


@pytest.fixture(scope="module")
def root(models):
    return models


@pytest.fixture(scope="module")
def maps(root, tmp_path_factory):
    return aligned(root, tmp_path_factory.mktemp("alignments") / "maps")


@pytest.mark.parametrize("tuned", ["causal/tuned", "lora"])
def test_apply_is_transport_to_the_byte(root, maps, tmp_path, tuned):
    ends = ("--alpha", "0.7")
    ids = root / "ids.safetensors"
    sides = (root / "causal/source", root / tuned, root / "causal/target")
    invoke("transport", *sides, tmp_path / "whole", "--calibration", ids, *COHERENT, *ends)
    invoke("apply", maps, root / tuned, tmp_path / "parts", *ends)
    assert identical(tmp_path / "whole", tmp_path / "parts")
    assert (
        outcome_of(tmp_path / "parts")["job"]["fingerprints"] == outcome_of(tmp_path / "whole")["job"]["fingerprints"]
    )


def test_what_an_alignment_records(root, maps):
    assert differences(maps) == []
    known = Alignment.load(maps).provenance
    assert known["source"]["reference"] == str(root / "causal/source") and known["tokens"] == 128
    assert {len(known[side][kind]) for side in ("source", "target") for kind in ("header_hash", "content_hash")} == {64}
    assert {row["space"] for row in known["quality"]} >= {"0.attention", "1.middle", "final"}
    assert "held out" in call("inspect", maps).stdout and "alignment of" in call("inspect", maps).stdout
    invoke("verify", maps)


def test_apply_tells_what_align_warned_of(root, maps, tmp_path):
    """On screen, to programs, in the manifest and in the card; what transport would have said."""
    sides, ids = (root / "causal/source", root / "causal/tuned", root / "causal/target"), root / "ids.safetensors"
    warned = Alignment.load(maps).provenance["warnings"]
    assert warned == outcome_of(maps)["warnings"] and any("calibration tokens for a widest space" in w for w in warned)
    for alpha in ("1", "match"):  # match aligns first
        own = ("transport", *sides, tmp_path / f"transport-{alpha}", "--calibration", ids, *COHERENT, "--alpha", alpha)
        for call_of in (own, ("apply", maps, root / "causal/tuned", tmp_path / f"apply-{alpha}", "--alpha", alpha)):
            told = json.loads(call(*call_of, "--json").stdout)
            assert [w for w in told["warnings"] if w in warned] == warned
            card, screen = (Path(told["written"]) / "README.md").read_text(), call(*call_of, "--overwrite").stdout
            assert outcome_of(told["written"])["warnings"] == told["warnings"]
            assert "## Warnings" in card and all(f"- {w}" in card and f"warning {w}" in screen for w in warned)
    dry = json.loads(call("apply", maps, root / "causal/tuned", tmp_path / "dry", "--dry-run", "--json").stdout)
    assert dry["warnings"] == told["warnings"]


def test_moved_and_changed_bases(root, maps, tmp_path):
    """A base may lie elsewhere; another base is refused, by headers or, with the same headers, by content."""
    moved = edited(tmp_path / "moved", root / "causal/source")
    invoke("apply", maps, root / "lora", tmp_path / "out", "--source", moved, "--verify-inputs")
    refused(
        "was made for the source .*causal/source .*bare/source.* was given; name the right one with --source",
        "apply", maps, root / "lora", tmp_path / "no", "--source", root / "bare/source",
    )  # fmt: skip
    tweaked = edited(tmp_path / "config", root / "causal/source", config={"rms_norm_eps": 1e-4})
    refused("header_hash .*config .*was given", "apply", maps, root / "lora", tmp_path / "no", "--source", tweaked)
    nudged = edited(tmp_path / "nudged", root / "causal/target", tensors=lambda t: t["model.norm.weight"].mul_(2))
    invoke("apply", maps, root / "lora", tmp_path / "unseen", "--target", nudged)
    whole = ("apply", maps, root / "lora", tmp_path / "no", "--target", nudged, "--verify-inputs")
    refused("target .*causal/target .content_hash .*nudged", *whole)
    assert not (tmp_path / "no").exists()


def test_alignments_that_cannot_be_applied(root, maps, tmp_path):
    refused("holds no readable alignment", "apply", root / "lora", root / "lora", tmp_path / "out")
    damaged = tmp_path / "damaged"
    edited(damaged, maps, config={"provenance": {}}, file="alignment.json")
    refused("does not say which source", "apply", damaged, root / "lora", tmp_path / "out")
    bases = ("--source", root / "causal/source", "--target", root / "causal/target")
    refused(
        "does not say which source it was made for; align", "apply", damaged, root / "lora", tmp_path / "out", *bases
    )
    refused("damaged: alignment.json", "apply", damaged, root / "lora", tmp_path / "out", *bases, "--verify-inputs")
    refused("overlaps the input", "apply", maps, root / "lora", maps, "--overwrite")


def test_align_refuses_and_leaves_nothing(root, maps, tmp_path, monkeypatch):
    ids = ("--calibration", root / "ids.safetensors")
    sides = (root / "causal/source", root / "causal/target")
    refused("is not empty; .* --overwrite", "align", *sides, maps, *ids)
    refused("SOURCE .* is an adapter", "align", root / "lora", sides[1], tmp_path / "out", *ids)
    refused("overlaps the input", "align", *sides, root / "causal/source/maps", *ids)
    whole = edited(tmp_path / "whole", root / "causal/target", tensors=lambda held: held.update(
        {"model.norm.weight": held["model.norm.weight"].int()}))  # fmt: skip
    refused("torch.int32, not floating point", "align", sides[0], whole, tmp_path / "out", *ids)
    monkeypatch.setattr(Alignment, "record", lambda *_, **__: 1 / 0)  # what is written last
    with pytest.raises(ZeroDivisionError):
        CliRunner().invoke(
            app, [str(a) for a in ("align", *sides, tmp_path / "out", *ids, *COHERENT)], catch_exceptions=False
        )
    assert list(tmp_path.iterdir()) == [whole]


def test_a_dry_run_of_each_command_writes_nothing(root, maps, tmp_path):
    for arguments in (
        (
            "align",
            root / "causal/source",
            root / "causal/target",
            tmp_path / "o",
            "--calibration",
            root / "ids.safetensors",
        ),
        ("apply", maps, root / "lora", tmp_path / "o"),
    ):
        said = call(*arguments, "--dry-run").stdout
        assert "time predicted" in said and "(--dry-run)" in said and list(tmp_path.iterdir()) == []


def test_several_strengths_are_what_each_alone_is(root, maps, tmp_path):
    for tuned in ("causal/tuned", "lora"):
        out = tmp_path / Path(tuned).name
        result = call("apply", maps, root / tuned, out, "--alpha", "0.5,1, match", "--json")
        told = json.loads(result.stdout)["alphas"]
        assert [row["asked"] for row in told] == [0.5, 1.0, "match"]
        assert [Path(row["written"]).name for row in told] == ["alpha-0.5", "alpha-1", "alpha-match"]
        for row in told:
            single = tmp_path / f"{Path(tuned).name}-{row['asked']}"
            invoke("apply", maps, root / tuned, single, "--alpha", row["asked"])
            assert identical(row["written"], single) and differences(row["written"]) == []
            assert outcome_of(row["written"])["job"]["alpha"] == row["alpha"] == outcome_of(single)["job"]["alpha"]
        invoke("verify", out)
        assert call("inspect", out).stdout.count("files are as written") == 3
        refused("is not empty", "apply", maps, root / tuned, out, "--alpha", "1,2")
        said = call("apply", maps, root / tuned, out, "--alpha", "1,2", "--overwrite").stdout.partition("next\n")[2]
        first, second = (f"'{out}/alpha-{alpha}'" for alpha in (1, 2))
        loads = f"model = LlamaForCausalLM.from_pretrained({first})    # or {second}\n"
        if tuned == "lora":
            loads = f"model = LlamaForCausalLM.from_pretrained('{root / 'causal/target'}')\n"
            loads += f"  model = PeftModel.from_pretrained(model, {first})    # or {second}\n"
        assert said == f"  {loads}  measure {out}/alpha-1\n  measure {out}/alpha-2\n"


@pytest.mark.parametrize("tuned", ["causal/tuned", "lora"])
def test_several_strengths_move_each_layer_once(root, maps, tmp_path, monkeypatch, tuned):
    calls = []
    for name in ("dense", "factors"):
        original = getattr(Move, name)
        monkeypatch.setattr(Move, name, lambda *a, f=original, **k: calls.append(a[0].into.name) or f(*a, **k))
    invoke("apply", maps, root / tuned, tmp_path / "out", "--alpha", "0.5,1,2")
    assert calls and len(calls) == len(set(calls))


@pytest.mark.parametrize("tuned", ["causal/tuned", "lora"])
def test_matched_strength_moves_the_target_as_far_as_the_source(root, maps, tmp_path, tuned):
    invoke("apply", maps, root / tuned, tmp_path / "out", "--output", "delta", "--alpha", "match")
    moved, base_t, base_s = held(tmp_path / "out"), held(root / "causal/target"), held(root / "causal/source")
    names = [n for n in moved if moved[n].ndim > 1]
    if tuned == "lora":
        q = held(root / "lora")
        prefix = "base_model.model."
        pairs = {n: (q[f"{prefix}{n[:-7]}.lora_B.weight"], q[f"{prefix}{n[:-7]}.lora_A.weight"]) for n in names}
        change = {n: 2 * b.double() @ a.double() for n, (b, a) in pairs.items()}  # lora_alpha 8 over rank 4
    else:
        tune = held(root / tuned)
        change = {n: tune[n].double() - base_s[n].double() for n in names}

    def norm(tensors):
        return sum(float(tensors[n].double().square().sum()) for n in names) ** 0.5

    assert norm(moved) / norm(base_t) == pytest.approx(norm(change) / norm(base_s), rel=1e-6)  # float32 output


def test_matched_strength_of_a_tied_source(root, tmp_path):
    """The head that an untied target gets from a tied source's embedding is no weight of the source's own."""
    sides = (root / "tied/source", root / "tied/tuned", root / "causal/target")
    invoke(
        "transport", *sides, tmp_path / "out", "--calibration", root / "ids.safetensors", *COHERENT, "--alpha", "match"
    )
    assert 0 < outcome_of(tmp_path / "out")["job"]["alpha"] < 100


def test_a_family_that_keeps_layers_fused_and_transposed(tmp_path):
    """GPT-2: qkv in one stored matrix [in, out]; its adapters and checkpoints are verified by the same shapes."""
    sizes = {"n_layer": 2, "vocab_size": 300, "n_positions": 64}
    for side, width, heads in (("source", 24, 4), ("target", 40, 5)):
        model = tiny_models.randomised(GPT2LMHeadModel(GPT2Config(n_embd=width, n_head=heads, **sizes)))
        model.save_pretrained(tmp_path / side)
        if side == "source":
            tiny_models.tuned(model).save_pretrained(tmp_path / "tuned")
            tiny_models.adapter(tmp_path / "lora", model, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    save_file({"input_ids": torch.randint(0, 300, (24, 16))}, tmp_path / "ids.safetensors")
    data = ("--calibration", tmp_path / "ids.safetensors", *COHERENT)
    invoke("align", tmp_path / "source", tmp_path / "target", tmp_path / "maps", *data)
    for tuned in ("lora", "tuned"):
        sides = (tmp_path / "source", tmp_path / tuned, tmp_path / "target")
        invoke("transport", *sides, tmp_path / f"{tuned}-whole", *data, "--alpha", "match")
        invoke("apply", tmp_path / "maps", tmp_path / tuned, tmp_path / f"{tuned}-parts", "--alpha", "match")
        assert identical(tmp_path / f"{tuned}-whole", tmp_path / f"{tuned}-parts")
        invoke("verify", tmp_path / f"{tuned}-parts")


def test_strengths_that_are_none():
    for alpha, message in (((1, 1.0), "given twice"), (0.0, "finite number other than 0"), ((), "no alpha"),
                           (10**400, "finite"), ("x", "match or auto"), (float("inf"), "finite")):  # fmt: skip
        with pytest.raises(InputRefused, match=message):
            chosen(alpha)
    names = [p.name for p in folders(Path("nowhere"), chosen((1e-7, -2, 0.1 + 0.2, 0.3)))]
    assert names == ["alpha-1e-07", "alpha--2", "alpha-0.30000000000000004", "alpha-0.3"]


def test_alpha_is_refused_by_name(root, maps, tmp_path):
    refused("alpha is 'strong'; give numbers", "apply", maps, root / "lora", tmp_path / "out", "--alpha", "1,strong")


DTYPES = [("causal/tuned", "checkpoint"), ("causal/tuned", "delta"), ("lora", "adapter"), ("lora", "checkpoint")]


@pytest.mark.parametrize("tuned, output", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_out_dtype(root, maps, tmp_path, tuned, output, dtype):
    name = str(dtype).removeprefix("torch.")
    for out in ("auto", name):
        invoke("apply", maps, root / tuned, tmp_path / out, "--output", output, "--out-dtype", out)
    wide, narrow = held(tmp_path / "auto"), held(tmp_path / name)
    assert wide.keys() == narrow.keys() and {t.dtype for t in wide.values()} == {torch.float32}
    for key, value in narrow.items():
        assert value.dtype is dtype and torch.equal(value, wide[key].to(dtype)), key
    if output == "checkpoint":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype is dtype
    invoke("verify", tmp_path / name)


def test_rounding_is_measured_and_named(root, tmp_path):
    """bf16 has 8 bits: an update 1e-5 of the weights' size is swallowed whole; float32 and a delta keep it."""
    base = AutoModelForCausalLM.from_pretrained(root / "bf16/source", dtype=torch.float32)
    tiny_models.tuned(base, 1e-5).save_pretrained(tmp_path / "tuned")
    sides = (root / "bf16/source", tmp_path / "tuned", root / "bf16/target")
    ids = ("--calibration", root / "ids.safetensors", *COHERENT)
    first = call("transport", *sides, tmp_path / "out", *ids)
    assert "--out-dtype float32 or --output delta keeps it" in first.stdout
    rounding = outcome_of(tmp_path / "out")["alphas"][0]["rounding"]
    invoke("transport", *sides, tmp_path / "delta", *ids, "--output", "delta")
    start, end, delta = held(root / "bf16/target"), held(tmp_path / "out"), held(tmp_path / "delta")
    lost = {n: (end[n].double() - start[n].double() - d.double()).norm() for n, d in delta.items()}
    for name, share in rounding["tensors"].items():
        assert share == pytest.approx(float(lost[name] / delta[name].double().norm()), rel=1e-6), name
    whole = sum(x**2 for x in lost.values()) / sum(d.double().square().sum() for d in delta.values())
    assert rounding["total"] == pytest.approx(float(whole) ** 0.5, rel=1e-6) and rounding["total"] > 0.5
    worst = max(rounding["tensors"], key=rounding["tensors"].get)
    assert f"worst {worst} " in first.stdout.replace("\n", "")
    assert all(len(digits) < 5 for digits in re.findall(r"(\d+)%", first.stdout)), first.stdout
    again = call("transport", *sides, tmp_path / "wide", *ids, "--out-dtype", "float32")
    assert "swallows" not in again.stdout and outcome_of(tmp_path / "wide")["alphas"][0]["rounding"]["total"] < 0.05
