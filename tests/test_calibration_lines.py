"""Calibration from .jsonl: lines of text, chats, and lines that are refused or counted."""

import json
from pathlib import Path

import pytest
import torch
from calibrated import load, make_tokenizer, text_side
from theseus_transport.errors import InputRefused

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("small"), 270)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("large"), 330, begin=True)


def lines(folder: Path, *records: object) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return path


def decoded(found, folder: Path) -> str:
    from transformers import AutoTokenizer

    ids = [own["input_ids"][own["attention_mask"] == 1] for own, _ in found.batches]
    return AutoTokenizer.from_pretrained(folder).decode(torch.cat(ids))


def test_lines_of_text(tmp_path: Path, small: Path) -> None:
    path = lines(tmp_path, {"text": "The quick brown fox.", "id": 1}, "", {"text": "Äpfel und Birnen"})
    found = load(path, text_side(small), tokens_wanted=9)
    assert decoded(found, small) == "The quick brown fox.\nÄpfel und Birnen\n" and "data.jsonl" in found.description


def test_chats_through_the_template_or_by_role(tmp_path: Path, small: Path, large: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "over the lazy dog"}, {"role": "assistant", "content": "naps"}]}
    path = lines(tmp_path, chat)
    assert decoded(load(path, text_side(small)), small) == "user: over the lazy dog\nassistant: naps\n"
    with_chat = make_tokenizer(tmp_path / "chat", 270)
    (with_chat / "chat_template.jinja").write_text(CHAT)
    for sides in ((with_chat, small), (small, with_chat)):  # the template of either: both read the same text
        found = load(path, *(text_side(folder) for folder in sides))
        assert decoded(found, small) == "<user>over the lazy dog\n<assistant>naps\n"
    two = load(path, text_side(with_chat), text_side(large, "B"))
    assert "offsets" in two.batches[0][1]


BAD_LINES = {
    "no JSON": ("{", "line 2: Expecting"),
    "no object": ('"text"', "expected an object with either text or messages"),
    "neither": ({"content": "x"}, "expected an object with either"),
    "both": ({"text": "x", "messages": []}, "expected an object with either"),
    "number": ({"text": 3}, "text is a int, expected a string"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "parts": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages must be a list"),
}


@pytest.mark.parametrize("record, message", BAD_LINES.values(), ids=BAD_LINES)
def test_bad_lines_are_named_or_counted(
    tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture, record: object, message: str
) -> None:
    path = lines(tmp_path, {"text": "The quick"}, record, {"text": "brown fox"})
    with pytest.raises(InputRefused, match=f"line 2: .*{message.removeprefix('line 2: ')}.*--skip-bad-inputs"):
        load(path, text_side(small))
    found = load(path, text_side(small), skip_bad=True)
    assert decoded(found, small) == "The quick\nbrown fox\n" and "1 lines of data.jsonl cannot be read" in caplog.text


def test_a_template_that_refuses_is_a_bad_line(tmp_path: Path) -> None:
    strict = make_tokenizer(tmp_path / "strict", 270)
    (strict / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    path = lines(tmp_path, {"messages": [{"role": "user", "content": "x"}]})
    with pytest.raises(InputRefused, match="line 1: the chat template refuses the messages: roles must alternate"):
        load(path, text_side(strict))
    path.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(InputRefused, match="line 1: .*utf-8"):
        load(path, text_side(strict))
    path.write_text("\n\n")
    with pytest.raises(InputRefused, match="holds no text"):
        load(path, text_side(strict))
