"""Chat template, stop tokens and generation settings of a tune: carried where tokenizers agree, told where not."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny_models
from helpers.broken_inputs import edited
from helpers.command import FAST, call, invoke, outcome_of
from theseus_transport import InputRefused
from theseus_transport.files.companions import GENERATION, SETTINGS, TEMPLATE
from theseus_transport.files.result_folder import differences
from theseus_transport.jobs.behaviour import behaviour_of
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from transformers import AutoTokenizer

CHAT = "{% for m in messages %}<turn>{{ m.role }}: {{ m.content }}</turn>{% endfor %}"
SIZE = 300  # of the models' vocabulary; the tokenizers know 280


def wrote(folder: Path, **files: object) -> Path:
    """JSON or text by name, where __ is a point and ___ a slash."""
    for name, content in files.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def told_in(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture
def sides(tmp_path: Path) -> dict[str, Path]:
    """Three folders with one tokenizer."""
    made = {name: tmp_path / name for name in ("source", "tuned", "target")}
    for folder in made.values():
        tiny_models.tokenizer(folder, 280)
    return made


def found(sides: dict[str, Path], **config: dict):
    names = ("source", "tuned", "target")
    config = {name: {"vocab_size": SIZE, **config.get(name, {})} for name in names}
    return behaviour_of(*(SimpleNamespace(folder=sides[n], config=config[n]) for n in names))


def written(sides: dict[str, Path], **config: dict) -> Path:
    """What lies beside the moved tensors, in a folder."""
    out = sides["target"].with_name("out")
    for name, content in found(sides, **config).beside(sides["target"]).items():
        (out / name).parent.mkdir(exist_ok=True, parents=True)
        (out / name).write_bytes(content.read_bytes() if isinstance(content, Path) else content.encode())
    return out


KEPT = {
    "a file": {"chat_template__jinja": CHAT},
    "in the settings": {"settings": CHAT},
    "a list in the settings": {"settings": [{"name": "default", "template": CHAT}]},
    "the older file": {"chat_template__json": {"chat_template": CHAT}},
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
@pytest.mark.parametrize("own", [{}, *KEPT.values()], ids=["none", *KEPT])
def test_the_template_of_the_tune_replaces_the_targets(sides, kept, own):
    def keep(folder, files):
        if settings := files.get("settings"):
            files = {SETTINGS: {**told_in(folder, SETTINGS), "chat_template": settings}}
        wrote(folder, **files)

    keep(sides["tuned"], kept)
    keep(sides["target"], json.loads(json.dumps(own).replace("<turn>", "<other>")))
    assert found(sides).carried == ["chat template"] and found(sides).warnings == []
    assert AutoTokenizer.from_pretrained(written(sides)).chat_template == CHAT


def test_further_templates_go_along_and_the_targets_do_not_mix_in(sides):
    wrote(sides["tuned"], chat_template__jinja=CHAT, additional_chat_templates___tool_use__jinja="{{ tools }}")
    wrote(sides["target"], additional_chat_templates___rag__jinja="{{ documents }}")
    assert found(sides).carried == ["chat template", "chat template tool_use"]
    assert AutoTokenizer.from_pretrained(written(sides)).chat_template == {"default": CHAT, "tool_use": "{{ tools }}"}


def test_what_is_the_same_in_the_target_is_no_news(sides):
    for folder in sides.values():
        wrote(folder, chat_template__jinja=CHAT, generation_config__json={"eos_token_id": 3, "temperature": 0.5})
    wrote(sides["tuned"], generation_config__json={"eos_token_id": 3, "temperature": None, "use_cache": True,
                                                   "transformers_version": "9"})  # fmt: skip
    one = found(sides, tuned={"eos_token_id": 3}, target={"eos_token_id": 3})
    assert (one.files, one.config, one.carried, one.warnings) == ({}, {}, [], [])


def test_what_the_tune_has_of_its_base_goes_along_too(sides):
    """A tune of a chat model, moved to a base that has no template, or another."""
    for name in ("source", "tuned"):
        wrote(sides[name], chat_template__jinja=CHAT, generation_config__json={"eos_token_id": [3, 4]})
    assert found(sides).carried == ["chat template", "eos_token_id [3, 4]"]
    wrote(sides["target"], chat_template__jinja="own", generation_config__json={"eos_token_id": 9})
    assert AutoTokenizer.from_pretrained(written(sides)).chat_template == CHAT


def test_stop_tokens_and_generation_settings_go_along(sides):
    tuned = AutoTokenizer.from_pretrained(sides["tuned"])
    tuned.eos_token, tuned.pad_token = "z", {"content": "y"}["content"]
    tuned.save_pretrained(sides["tuned"])
    wrote(sides["tuned"], generation_config__json={"eos_token_id": [3, 4], "top_p": 0.8, "bad_words_ids": [[5]]})
    wrote(sides["target"], generation_config__json={"eos_token_id": 9, "max_length": 7},
          special_tokens_map__json={"eos_token": "a"})  # fmt: skip
    one = found(sides, tuned={"eos_token_id": [3, 4]}, target={"eos_token_id": 9})
    assert one.carried == ["eos_token 'z'", "pad_token 'y'", "eos_token_id [3, 4]", "top_p 0.8", "bad_words_ids [[5]]"]
    assert one.config == {"eos_token_id": [3, 4]} and not one.warnings
    out = written(sides, tuned={"eos_token_id": [3, 4]})
    assert told_in(out, GENERATION) == {"eos_token_id": [3, 4], "max_length": 7, "top_p": 0.8, "bad_words_ids": [[5]]}
    assert AutoTokenizer.from_pretrained(out).special_tokens_map == {"eos_token": "z", "pad_token": "y"}
    assert told_in(out, "special_tokens_map.json") == {"eos_token": "z", "pad_token": "y"}
    assert told_in(out, SETTINGS)["model_max_length"] == told_in(sides["target"], SETTINGS)["model_max_length"] > 10**29


def test_tokens_that_the_target_lacks_keep_what_names_them(sides):
    """Of what the tune added, only what is used decides: a padding token does not keep a template that lacks it."""
    tuned = AutoTokenizer.from_pretrained(sides["tuned"])
    tuned.add_tokens(["<turn>", "</turn>"])
    tuned.eos_token = "</turn>"
    tuned.save_pretrained(sides["tuned"])
    wrote(sides["tuned"], chat_template__jinja=CHAT, generation_config__json={"eos_token_id": [3, 281], "top_k": 5})
    one = found(sides)
    assert one.left == ["chat template", "eos_token '</turn>'", "eos_token_id [3, 281]"] and one.carried == ["top_k 5"]
    assert one.warnings == [
        "chat template, eos_token '</turn>', eos_token_id [3, 281] of TUNED stay behind, TARGET keeps its own: "
        "TARGET's tokenizer has no '<turn>' at 280"
    ]
    assert TEMPLATE not in one.files and set(one.files) == {GENERATION}
    wrote(sides["tuned"], chat_template__jinja="{{ messages[0].content }}")
    assert "chat template" in found(sides).carried and "eos_token '</turn>'" in found(sides).left


def test_other_tokenizers_keep_all_that_names_tokens(sides):
    path = sides["target"] / "tokenizer.json"
    tokens = json.loads(path.read_text())
    vocabulary = tokens["model"]["vocab"]
    tokens["model"]["vocab"] = {token: len(vocabulary) - 1 - i for token, i in vocabulary.items()}
    path.write_text(json.dumps(tokens))
    wrote(sides["tuned"], chat_template__jinja=CHAT, generation_config__json={"eos_token_id": 3, "top_p": 0.8})
    one = found(sides)
    assert one.left == ["chat template", "eos_token_id 3"] and one.carried == ["top_p 0.8"]
    assert "TARGET keeps its own: the tokenizers differ, '!' is 0 in TUNED, where TARGET has " in one.warnings[0]
    wrote(sides["source"], chat_template__jinja=CHAT, generation_config__json={"eos_token_id": 3})
    assert found(sides).left == ["chat template"]  # that a stop token of the base stays goes without saying


def test_tokenizers_without_tokens_by_id_agree_where_their_files_do(sides):
    for folder in sides.values():
        for path in list(folder.iterdir()):
            path.unlink()
        (folder / "tokenizer.model").write_bytes(b"pieces")
    wrote(sides["tuned"], chat_template__jinja=CHAT)
    assert found(sides).carried == ["chat template"]
    (sides["target"] / "tokenizer.model").write_bytes(b"others")
    assert "by id, so they cannot be compared" in found(sides).warnings[0]
    (sides["tuned"] / "tokenizer.model").unlink()  # the tune has its base's
    (sides["target"] / "tokenizer.model").write_bytes(b"pieces")
    assert found(sides).carried == ["chat template"]


@pytest.mark.parametrize("value", [SIZE, -1, "3", True, [3, [SIZE]]])
def test_ids_that_are_none_stay(sides, value):
    wrote(sides["tuned"], generation_config__json={"eos_token_id": value})
    assert (
        found(sides).left == [f"eos_token_id {value}"] and "is no id of TARGET's vocabulary of 300" in found(sides).why
    )


@pytest.mark.parametrize("files, said", [
    ({"chat_template__json": {"chat_template": 5}}, "chat template '' is '5'"),
    ({"tokenizer_config__json": {"chat_template": {"../x": "a"}}}, "chat template '../x'"),
    ({"tokenizer_config__json": {"chat_template": [{"template": "a"}]}}, "chat template 'None'"),
    ({"tokenizer_config__json": {"eos_token": [1]}}, "eos_token is '.1.', expected a token"),
    ({"generation_config__json": []}, "holds a JSON list, expected an object"),
    ({"tokenizer_config__json": "{"}, "no valid JSON"),
    ({"additional_chat_templates___a b__jinja": "x"}, "chat template 'a b'"),
])  # fmt: skip
def test_files_that_hold_something_else_are_refused(sides, files, said):
    with pytest.raises(InputRefused, match=said):
        found({**sides, "tuned": wrote(sides["tuned"], **files)})


# --- whole jobs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(models: Path, tmp_path: Path) -> Job:
    """A tune with a chat template, chats to calibrate on, and a job that leaves no rows behind."""
    for name in ("source", "target", "tuned"):
        tiny_models.tokenizer(edited(tmp_path / name, models / "causal" / name), 280)
    tiny_models.tokenizer(edited(tmp_path / "lora", models / "lora"), 280)
    for name in ("tuned", "lora"):
        wrote(tmp_path / name, chat_template__jinja=CHAT, generation_config__json={"eos_token_id": [3, 4]})
    messages = [{"role": "user", "content": tiny_models.TEXT}, {"role": "assistant", "content": "yes"}]
    (tmp_path / "chats.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 20)
    sides = (str(tmp_path / name) for name in ("source", "tuned", "target"))
    return Job(*sides, tmp_path / "out", str(tmp_path / "chats.jsonl"), tokens=128)


@pytest.mark.parametrize("tuned", ["tuned", "lora"])
def test_a_tune_brings_its_behaviour_along(job, tmp_path, tuned):
    sides = (job.source, tmp_path / tuned, job.target)
    said = call("transport", *sides, job.out, "--calibration", job.calibration, *FAST).stdout
    assert AutoTokenizer.from_pretrained(job.out).chat_template == CHAT and told_in(job.out, GENERATION)["eos_token_id"]
    assert "chat template, eos_token_id [3, 4]" in said and differences(job.out) == []
    assert "| from the tune | chat template, eos_token_id" in (job.out / "README.md").read_text()
    assert outcome_of(job.out)["carried"] == ["chat template", "eos_token_id [3, 4]"]
    invoke("verify", job.out)


def test_chats_are_told_by_the_tunes_own_template(job):
    wrote(Path(job.source), chat_template__jinja="{{ messages[0].role }}")
    assert job.alignment.tuned == job.tuned  # also where all is aligned before anything moves
    ids = Session(job).fitted.calibration().batches[0][0]["input_ids"]
    assert "<turn>user: the q" in AutoTokenizer.from_pretrained(job.source).decode(ids[0])


@pytest.mark.parametrize("name, told", [("rag", "user: the q"), ("default", "<turn>user: the q")])
def test_a_template_that_has_to_be_asked_for_tells_nothing(job, name, told):
    """Of several templates by name, transformers uses `default` unasked; without one it uses none."""
    (Path(job.tuned) / TEMPLATE).unlink()
    settings = {**told_in(Path(job.tuned), SETTINGS), "chat_template": [{"name": name, "template": CHAT}]}
    wrote(Path(job.tuned), **{SETTINGS: settings})
    ids = Session(job).fitted.calibration().batches[0][0]["input_ids"]
    text = AutoTokenizer.from_pretrained(job.source).decode(ids[0])
    assert told in text and ("<turn>" in text) == (name == "default")
