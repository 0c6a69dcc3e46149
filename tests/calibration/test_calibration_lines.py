"""Calibration from .jsonl: lines of text, chats, and lines that are refused or counted."""

import gzip
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import hostile_folders
from helpers.calibration import load, make_tokenizer, text_side
from theseus_transport.calibration.formats import read_example
from theseus_transport.errors import InputRefused
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from transformers.utils.chat_template_utils import render_jinja_template

CHAT = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("small"), 270)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("large"), 330, begin=True)


@pytest.mark.parametrize("name", ["/dev/zero", "pipe", "pipe.jsonl", "pipe.safetensors", "socket", "loop"])
def test_only_files_are_read(tmp_path: Path, name: str) -> None:
    """None is waited for, and none is read without end."""
    path = tmp_path / name  # an absolute name is itself
    if name.startswith("pipe"):
        os.mkfifo(path)
    if name == "socket":
        hostile_folders.socket(path)
    if name == "loop":
        path.symlink_to(path)
    with pytest.raises(InputRefused, match=f"calibration '.*{name}' is no file; give a .safetensors, a text file"):
        load(path, text_side(tmp_path))


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
    "no JSON": ("{", "line 2: Expecting property name .* at character "),
    "no object": ('"text"', "expected an object, found a str"),
    "neither": ({"content": "x"}, "expected an object with either"),
    "both": ({"text": "x", "messages": []}, "expected an object with either"),
    "number": ({"text": 3}, "text is a int, expected a string"),
    "no messages": ({"messages": []}, "messages must be a list"),
    "no role": ({"messages": [{"content": "x"}]}, "messages must be a list of objects with role and content"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "a part of type 'image'; only text"),
    "no content": ({"messages": [{"role": "user", "content": None}]}, "content of messages is a NoneType"),
    "calls": ({"messages": [{"role": "a", "content": "", "tool_calls": ["f"]}]}, "tool_calls of messages is a list"),
    "value": ({"conversations": [{"from": "human", "value": 3}]}, "value of conversations is a int"),
    "output": ({"instruction": "x", "output": None}, "output is a NoneType, expected a string"),
    "history": ({"instruction": "x", "output": "y", "history": ["z"]}, "history must be a list of pairs"),
    "completion": ({"prompt": "x", "completion": 3}, "completion must be a list of objects"),
    "flat ids": (
        {"input_ids": [1, 2, 3]},
        r"give the text, or a .safetensors with input_ids \[n, tokens\]",
    ),
    "half a character": ({"text": "\ud800"}, "surrogates not allowed"),
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


USER, REPLY = {"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}
CALL = {"id": "1", "type": "function", "function": {"name": "seek", "arguments": '{"what": "fox"}'}}
PARTS = [{"type": "text", "text": "The quick"}, {"type": "text", "text": "brown fox"}]
ASKED = "<user>Where?\n<assistant>Here.\n"
FORMATS = {
    "OpenAI": ({"messages": [USER, REPLY]}, "messages", ASKED),
    "parts": ({"messages": [{"role": "user", "content": PARTS}]}, "messages", "<user>The quick\nbrown fox\n"),
    "tool calls": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [{"name": "seek"}]},
        "messages",
        "tools seek\n<user>Where?\n<assistant>[seek fox]\n",
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "Here."}], "system": "Be."},
        "ShareGPT",
        "<system>Be.\n" + ASKED,
    ),
    "ShareGPT in roles": ({"conversations": [USER, REPLY]}, "ShareGPT", ASKED),
    "Alpaca": ({"instruction": "Where?", "input": "Fox", "output": "Here."}, "Alpaca",
               "<user>Where?\n\nFox\n<assistant>Here.\n"),
    "Alpaca alone": ({"instruction": "Where?", "input": "", "output": "Here."}, "Alpaca", ASKED),
    "Alpaca with more": ({"instruction": "Where?", "output": "Here.", "history": [["a", "b"]], "system": "Be."},
                         "Alpaca", "<system>Be.\n<user>a\n<assistant>b\n" + ASKED),
    "completion": ({"prompt": "The ", "completion": "brown fox"}, "prompt and completion", "The brown fox\n"),
    "turns": ({"prompt": [USER], "completion": [REPLY]}, "prompt and completion", ASKED),
    "chosen": ({"prompt": "The ", "chosen": "fox", "rejected": "dog"}, "prompt and chosen", "The fox\n"),
    "chosen turns": ({"prompt": "Where?", "chosen": [USER, REPLY], "rejected": []}, "prompt and chosen", ASKED),
    "chosen alone": ({"chosen": "The fox", "rejected": "dog"}, "prompt and chosen", "The fox\n"),
    "prompt of messages": ({"prompt": "x", "messages": [USER, REPLY]}, "messages", ASKED),
}  # fmt: skip
TOOLS = """{% for tool in tools or [] %}tools {{ tool.name }}{{ '\n' }}{% endfor %}
{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}
{%- for call in m.tool_calls or [] %}[{{ call.function.name }} {{ call.function.arguments['what'] }}]{% endfor %}
{{ '\n' }}{% endfor %}"""


@pytest.mark.parametrize("record, name, said", FORMATS.values(), ids=FORMATS)
def test_formats_of_training_data(record: dict, name: str, said: str) -> None:
    def template(messages: list, tools: object) -> str:
        return render_jinja_template([messages], tools=tools, chat_template=TOOLS)[0][0]

    example = read_example(record)
    assert example.format == name and example.text(template).rstrip() + "\n" == said


def test_all_formats_in_one_file(tmp_path: Path) -> None:
    folder = make_tokenizer(tmp_path / "chatting", 270)
    (folder / "chat_template.jinja").write_text(TOOLS)
    found = load(
        lines(tmp_path, *(record for record, _, _ in FORMATS.values())), text_side(folder), tokens_wanted=10**6
    )
    assert decoded(found, folder) == "".join(said for _, _, said in FORMATS.values())
    names = "Alpaca, ShareGPT, messages, prompt and chosen, prompt and completion"
    assert f"data.jsonl ({names}: {len(FORMATS)} of {len(FORMATS)} records): 1 rows" in found.description


def test_tools_without_a_template(tmp_path: Path, small: Path) -> None:
    found = load(lines(tmp_path, FORMATS["tool calls"][0]), text_side(small))
    call = '{"name": "seek", "arguments": {"what": "fox"}}'
    assert decoded(found, small) == f'tools: [{{"name": "seek"}}]\nuser: Where?\nassistant: {call}\n'


def test_the_report_counts_records_used_and_skipped(tmp_path: Path, small: Path) -> None:
    texts = [{"text": f"{i} " * 500} for i in range(40)]
    path = lines(tmp_path, *texts, "{", {"messages": [USER, REPLY]})
    told = load(path, text_side(small, max_positions=64), skip_bad=True, tokens_wanted=600).description
    used = int(told.partition(": ")[2].partition(" of 41 records, 1 skipped): ")[0])
    assert 1 <= used <= 8 and told.startswith("data.jsonl (text")  # one draw of pieces holds enough
    everything = load(path, text_side(small), skip_bad=True, tokens_wanted=10**6).description
    assert everything.startswith("data.jsonl (messages, text: 41 of 41 records, 1 skipped): ")


def test_a_long_record_is_used_in_pieces_and_a_mark_of_bytes_is_no_text(tmp_path: Path, small: Path) -> None:
    said = "The quick brown fox. " * 4000
    path = tmp_path / "data.jsonl"
    path.write_text("\ufeff" + json.dumps({"text": said}) + "\n\n", encoding="utf-8")
    found = load(path, text_side(small, max_positions=8), tokens_wanted=10**6)
    assert decoded(found, small) in said.rstrip() + "\n" and found.tokens > 15_000
    some = load(path, text_side(small, max_positions=8), tokens_wanted=100)
    assert some.tokens < 200


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


ROWS = [{"text": 'The quick, "brown"\tfox'}, {"text": "Äpfel und Birnen"}]
OTHER_FILES = {
    "x y.json": json.dumps(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "list.jsonl": json.dumps(ROWS),
    "rows.csv": 'text,id\n"The quick, ""brown""\tfox",1\nÄpfel und Birnen,2\n',
    "rows.tsv": 'text\tid\n"The quick, ""brown""\tfox"\t1\nÄpfel und Birnen\t2\n',
    "rows.jsonl.gz": gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()),
}


@pytest.mark.parametrize("name", OTHER_FILES)
def test_other_files_are_refused_by_name_and_the_cure_works(tmp_path: Path, small: Path, name: str) -> None:
    path, content = tmp_path / name, OTHER_FILES[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputRefused) as refused:
        load(path, text_side(small))
    told = str(refused.value)
    assert told.startswith(f"calibration {path} is ") and "\n" not in told
    command = told.partition(": ")[2]
    subprocess.run(["bash", "-c", command], check=True)
    made = Path(shlex.split(command)[-1])
    assert made.suffix == ".jsonl" and made != path
    assert decoded(load(made, text_side(small)), small) == 'The quick, "brown"\tfox\nÄpfel und Birnen\n'


@pytest.mark.parametrize(
    "name, said",
    [
        ("x.parquet", "is parquet; .*pandas.read_parquet"),
        ("x.arrow", "is arrow; .*pyarrow"),
        (
            "x.npy",
            r"is npy, of which only .safetensors is read; .*'input_ids': ids.*ids int64 \[n, tokens\]",
        ),
        ("x.json", "is one JSON object over many lines"),
    ],
)
def test_what_no_line_of_the_standard_library_reads(tmp_path: Path, small: Path, name: str, said: str) -> None:
    (tmp_path / name).write_bytes(b'{\n "text": "x"\n}')
    with pytest.raises(InputRefused, match=said):
        load(tmp_path / name, text_side(small))


def test_a_plan_refuses_them_too(models: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("text\nfox\n")
    places = [str(models / "bare" / name) for name in ("source", "tuned", "target")]
    with pytest.raises(InputRefused, match="rows.csv is csv; make lines of records of it: python3 -c"):
        Session(Job(*places, tmp_path / "out", calibration=str(tmp_path / "rows.csv")))


def test_lines_of_records_may_be_called_json(tmp_path: Path, small: Path) -> None:
    path = lines(tmp_path, {"text": "The quick"}).rename(tmp_path / "data.json")
    assert decoded(load(path, text_side(small)), small) == "The quick\n"
