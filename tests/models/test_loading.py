"""What transformers loads from a model's folder: no code of it runs, nothing is asked, no link leads out."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
from helpers import tiny_models
from helpers.command import COHERENT, call
from theseus_transport.calibration.chat import ChatTemplate
from theseus_transport.calibration.text import Tokenizer
from theseus_transport.errors import InputRefused
from theseus_transport.files.checkpoint import Checkpoint
from theseus_transport.models.loading import config_of, model_of, tokenizer_of

CODE = """
from pathlib import Path
Path({mark!r}).write_text("ran")
from transformers import LlamaConfig, LlamaModel, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaModel): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""
MAP = {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel", "AutoTokenizer": ["own.OwnTokenizer", None]}


@pytest.fixture
def folder(models: Path, tmp_path: Path) -> Path:
    """A copy of a model with a tokenizer of its own."""
    folder = tmp_path / "model"
    shutil.copytree(models / "causal" / "source", folder)
    tiny_models.tokenizer(folder, 280)
    return folder


def edited(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_planted_code_never_runs_whatever_stdin_says(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asked = io.StringIO("y\n" * 100)  # what `yes |` gives
    monkeypatch.setattr(sys, "stdin", asked)
    (folder / "own.py").write_text(CODE.format(mark=str(tmp_path / "mark")))
    kind = {"model_type": "own"} if place == "config.json" else {"tokenizer_class": "OwnTokenizer"}
    edited(folder / place, auto_map=MAP, **kind)
    for load in (config_of, model_of, tokenizer_of) if place == "config.json" else (tokenizer_of,):
        try:
            load(folder)
        except InputRefused as refusal:
            assert str(folder) in str(refusal) and "trust_remote_code=True" not in str(refusal)
    assert not (tmp_path / "mark").exists() and asked.tell() == 0


def test_a_config_names_no_kernel(folder: Path) -> None:
    plain = model_of(folder).config._attn_implementation
    edited(folder / "config.json", attn_implementation="someone/kernels", _attn_implementation="someone/kernels")
    assert model_of(folder).config._attn_implementation == plain == "sdpa"


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json",
                                  "merges.txt", "additional_chat_templates/tool.jinja"])  # fmt: skip
def test_a_link_that_leads_out_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    (folder / name).parent.mkdir(exist_ok=True)
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(InputRefused, match=f"{name} links to .*secret, outside the model's folder"):
        tokenizer_of(folder)


def test_links_of_a_hub_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--o--m" / "snapshots" / "abc"
    blobs = tmp_path / "models--o--m" / "blobs"
    snapshot.mkdir(parents=True), blobs.mkdir()
    for path in folder.iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    assert tokenizer_of(snapshot)("the fox")["input_ids"] == tokenizer_of(folder)("the fox")["input_ids"]
    assert model_of(snapshot).config.hidden_size == Checkpoint.open(snapshot).config["hidden_size"]


MESSAGES = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}]
TEMPLATE = "{{ bos }}{% for m in messages %}<{{ m.role }}>{{ m['content'] | trim }}{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a %}{% endfor %}{% endfor %}"
LARGE = "{{ 'x' * 10 ** 10 if messages[0].role == 'user' else 'x' | center(10 ** 6) }}"


def test_a_template_says_what_transformers_says(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    own = Tokenizer(folder, "M", None)
    assert own.chat is not None
    assert (
        own.chat(MESSAGES) == own.chat(MESSAGES) == tokenizer_of(folder).apply_chat_template(MESSAGES, tokenize=False)
    )


def test_a_template_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("theseus_transport.calibration.chat.SECONDS", 0)  # and the one that is begun
    with pytest.raises(InputRefused, match="the chat template of M does not end within"):
        ChatTemplate(ENDLESS, {}, "M")(MESSAGES)


def test_a_template_that_makes_too_much_refuses_those_messages() -> None:
    fine = "fine on {{ strftime_now('%d %b %Y') }}"
    chat = ChatTemplate("{% if messages | length > 1 %}" + LARGE + "{% else %}" + fine + "{% endif %}", {}, "M")
    with pytest.raises(ValueError, match="refuses the messages: MemoryError"):
        chat(MESSAGES)
    with pytest.raises(ValueError, match="refuses the messages: it makes 1000000 characters"):
        chat(MESSAGES[::-1])
    assert chat(MESSAGES[:1]) == "fine on 26 Jul 2024", "whatever the day"


def test_what_a_file_names_is_not_fetched(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def fetch(name: str, *, local_files_only: bool = False, **_: object) -> str:
        asked.append(local_files_only)
        raise OSError("not within reach")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    source, lora, target = (models / name for name in ("causal/source", "lora", "causal/target"))
    ids = ("--calibration", models / "ids.safetensors", "--tokens", 64)
    assert call("align", source, target, tmp_path / "maps", *ids, *COHERENT).exit_code == 0
    assert call("apply", tmp_path / "maps", lora, tmp_path / "moved").exit_code == 0
    for name in ("maps/theseus.json", "maps/alignment.json", "moved/theseus.json"):
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace(str(target), "someone/listens"))
    said = call("apply", tmp_path / "maps", lora, tmp_path / "out").stderr
    assert "the target of" in said and "'someone/listens' is neither" in said and "or name it with --target" in said
    said = call("verify", tmp_path / "moved").stdout
    assert "the target base cannot be compared with: 'someone/listens'" in said and "name it with --target" in said
    assert call("inspect", tmp_path / "moved").exit_code == 0
    assert asked == [True, True]
