"""Prompts for text that a tune says: lines, records of training data without their answers, chats by a template."""

import json
from pathlib import Path

import pytest
from theseus_transport.calibration.chat import ChatTemplate
from theseus_transport.calibration.prompts import Prompt, read_prompts
from theseus_transport.errors import InputRefused

TEMPLATE = ChatTemplate(
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    {},
    "A",
)
ASK, ANSWER = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
TOLD = Prompt("<|user|>why?<|end|><|assistant|>", told=True)
RECORDS = {
    "a chat that asks": ({"messages": [ASK]}, TOLD),
    "a chat with its answer": ({"messages": [ASK, ANSWER]}, TOLD),
    "an answer in the middle": (
        {"messages": [ASK, ANSWER, ASK, ANSWER]},
        Prompt("<|user|>why?<|end|><|assistant|>because<|end|><|user|>why?<|end|><|assistant|>", told=True),
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}, TOLD),
    "Alpaca": ({"instruction": "why?", "output": "because"}, TOLD),
    "an instruction alone": ({"instruction": "why?"}, TOLD),
    "prompt and completion": ({"prompt": "why? ", "completion": "because"}, Prompt("why? ")),
    "a prompt alone": ({"prompt": "why? "}, Prompt("why? ")),
    "turns as a prompt": ({"prompt": [ASK], "chosen": [ANSWER], "rejected": [ANSWER]}, TOLD),
    "a text": ({"text": "Once upon"}, Prompt("Once upon")),
}


@pytest.mark.parametrize("record, prompt", RECORDS.values(), ids=RECORDS)
def test_a_record_asks_and_its_answer_is_left_out(tmp_path: Path, record: dict, prompt: Prompt) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n\n")
    assert read_prompts(path, TEMPLATE) == [prompt]


def test_without_a_template_a_chat_is_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [ASK, ANSWER]}))
    assert read_prompts(tmp_path / "a.jsonl", None) == [Prompt("user: why?\nassistant:")]


def test_each_line_of_a_text_is_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffÄpfel und\r\n\n  \nBirnen \u2028 sind".encode())
    assert read_prompts(tmp_path / "a.txt", TEMPLATE) == [Prompt("Äpfel und"), Prompt("Birnen \u2028 sind")]


BAD = {
    "no file": ("absent.txt", None, r"--prompts .*absent.txt is no file; give a text, a prompt a line, or"),
    "empty": ("a.txt", b"\n \n", r"--prompts .*a.txt holds no prompt; give a text"),
    "no utf-8": ("a.txt", b"ab\xff", r"--prompts .*a.txt is no utf-8 text \(byte 2\); convert it"),
    "no JSON": ("a.jsonl", b"\n{", r"a.jsonl line 2: .*mend it, or --skip-bad-inputs"),
    "no question": ("a.jsonl", json.dumps({"messages": [ANSWER]}).encode(), "line 1: it has no turn that asks for an"),
    "other": ("a.jsonl", b'{"labels": 3}', "line 1: expected an object with either text"),
    "half a character": ("a.jsonl", rb'{"text": "\ud800"}', "line 1: .*surrogates not allowed"),
    "csv": ("a.csv", b"text\nhello", "is csv; make lines of records of it"),
}


@pytest.mark.parametrize("name, content, message", BAD.values(), ids=BAD)
def test_files_that_are_refused(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputRefused, match=message):
        read_prompts(tmp_path / name, TEMPLATE)


def test_bad_lines_are_left_out_and_counted_on_request(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{\n{"prompt": "why?"}\n[]\n')
    assert read_prompts(tmp_path / "a.jsonl", None, skip_bad=True) == [Prompt("why?")]
    assert "2 lines of a.jsonl cannot be read and were left out, first line 1" in caplog.text
