"""What lies beside the tensors: one list says what is copied, what is downloaded, and what makes a tokenizer."""

from pathlib import Path

import pytest
import torch
from helpers.broken_inputs import edited
from helpers.command import FAST, invoke, refused
from safetensors.torch import save_file
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.files.companions import (
    COMPANIONS,
    PATTERNS,
    VOCABULARIES,
    companions,
    has_tokenizer,
    tokenizer_files,
)
from theseus_transport.files.result_folder import differences, read_manifest

TEMPLATES = ("additional_chat_templates/rag.jinja", "additional_chat_templates/tool_use.jinja")
STRAYS = ("trainer_state.json", "tokenization_own.py", "optimizer.pt", "additional_chat_templates/code.py", "x.model")


def filled(folder: Path) -> Path:
    """Every companion there is, and what is none."""
    for name in (*COMPANIONS, *TEMPLATES, *STRAYS):
        (folder / name).parent.mkdir(exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("tuned, output", [("causal/tuned", "checkpoint"), ("lora", "delta")])
def test_every_file_of_the_target_is_copied_and_no_other(models, tmp_path, tuned, output):
    target = filled(edited(tmp_path / "target", models / "causal/target"))
    sides = (models / "causal/source", models / tuned, target)
    ids = ("--calibration", models / "ids.safetensors", *FAST, "--leave", "*embed*", "--leave", "lm_head*")
    invoke("transport", *sides, out := tmp_path / "out", *ids, "--output", output)
    names = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    assert names - set(Path(n).name for n in held(out)) == {*COMPANIONS, *TEMPLATES, "config.json", "README.md",
                                                            "theseus.json"}  # fmt: skip
    assert all((out / name).read_bytes() == (target / name).read_bytes() for name in (*COMPANIONS, *TEMPLATES))
    assert differences(out) == [] and set(TEMPLATES) < read_manifest(out)["files"].keys()
    (out / TEMPLATES[0]).write_text("changed")
    (out / "additional_chat_templates/stray.jinja").write_text("")
    (out / "empty").mkdir()
    assert [fault.partition(" has ")[0] for fault in differences(out)] == [
        TEMPLATES[0], "additional_chat_templates/stray.jinja is not in the manifest", "empty is not in the manifest"
    ]  # fmt: skip


def held(out):
    return out.glob("*.safetensors*")


@pytest.mark.parametrize("name", ["merges.txt", "generation_config.json", TEMPLATES[0], "preprocessor_config.json"])
def test_a_link_that_leads_out_is_refused(models, tmp_path, name):
    target, secret = filled(edited(tmp_path / "target", models / "causal/target")), tmp_path / "secret"
    secret.write_text("secret")
    (target / name).unlink()
    (target / name).symlink_to(secret)
    sides = (models / "causal/source", models / "causal/tuned", target)
    ids = ("--calibration", models / "ids.safetensors", "--leave", "*embed*", "--leave", "lm_head*")
    refused(f"{name} links to .*secret, outside", "transport", *sides, tmp_path / "out", *ids, *FAST)
    assert not (tmp_path / "out").exists()


def test_what_makes_a_tokenizer(tmp_path):
    for name in COMPANIONS:
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("{}")
        assert has_tokenizer(folder) == (name in VOCABULARIES) and list(companions(folder)) == [name]
        assert bool(tokenizer_files(folder)) == (name not in COMPANIONS[-4:])  # processors and generation


def test_all_of_it_is_downloaded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **how: asked.append(how) or str(tmp_path))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    Checkpoint.open("me/tiny")
    (how,) = asked
    assert {*PATTERNS, "config.json", "adapter_config.json", "model*.safetensors.index.json"} <= {
        *how["allow_patterns"]
    }
    assert not any(pattern.startswith("*") for pattern in how["allow_patterns"])  # nothing of other folders
