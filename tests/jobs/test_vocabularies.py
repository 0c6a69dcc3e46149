"""Tables of a vocabulary with other rows in base, tune and target: padded, resized, with added tokens."""

import copy
import json

import pytest
import torch
from helpers import tiny_models
from helpers.ended import EMBEDDING, EXACT, HEAD, IDS, adapter, build, error, fates, logits, move, saved, with_adapter
from safetensors.torch import load_file
from theseus_transport.jobs.verify import verify
from transformers import AutoModelForCausalLM


def padded(folder, model, rows, added=()):
    """A copy of a model with other rows in its tables, and a tokenizer."""
    model = copy.deepcopy(model)
    torch.manual_seed(rows)
    model.resize_token_embeddings(rows, mean_resizing=False)
    model.save_pretrained(folder)
    tokenizer(folder, added)
    return model


def tokenizer(folder, added=()):
    tiny_models.tokenizer(folder, 280)
    if added:
        path = folder / "tokenizer.json"
        known = json.loads(path.read_text())
        known["added_tokens"] = [
            {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True} for i, token in added
        ]  # fmt: skip
        path.write_text(json.dumps(known))


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Models of one tokenizer with 300 rows, and with more; tunes with the base's rows, more and fewer."""
    root = build(tmp_path_factory.mktemp("rows"))
    base = AutoModelForCausalLM.from_pretrained(root / "untied")
    torch.manual_seed(2)
    tune = tiny_models.tuned(base)
    padded(root / "rows-300", base, 300)
    padded(root / "rows-320", base, 320)
    for rows in (290, 300, 304):
        padded(root / f"tune-{rows}", tune, rows, added=[(301, "<|a|>"), (302, "<|b|>")] if rows == 304 else ())
    return root


@pytest.mark.parametrize("source, target", [(300, 320), (320, 300), (300, 300)])
@pytest.mark.parametrize("rows", [290, 300, 304])
def test_common_rows_move_and_pads_stay(tables, tmp_path, source, target, rows):
    outcome = move(tables, tmp_path / "out", f"rows-{source}", tables / f"tune-{rows}", f"rows-{target}")
    common = min(source, target, rows)
    before, after = (load_file(p / "model.safetensors") for p in (tables / f"rows-{target}", tmp_path / "out"))
    for name in (HEAD, EMBEDDING):
        assert torch.equal(after[name][common:], before[name][common:]) and len(after[name]) == target
        assert fates(outcome)[name.removeprefix("model.")][0] == "transported"
    found = [
        logits(AutoModelForCausalLM.from_pretrained(place), IDS % 290)[..., :290]
        for place in (tmp_path / "out", tables / f"tune-{rows}", tables / "rows-300")
    ]
    assert error(*found) < EXACT
    if rows > source:
        added = f"{rows - source} rows added"
        assert added in fates(outcome)["embed_tokens.weight"][1] and added in fates(outcome)[HEAD][1]
        assert any(f"{added} to embed_tokens.weight and lm_head.weight" in text for text in outcome.warnings)


def test_tokens_a_tune_adds_are_named(tables, tmp_path):
    outcome = move(tables, tmp_path / "out", "rows-300", tables / "tune-304", "rows-320")
    (said,) = [text for text in outcome.warnings if text.startswith("TUNED adds")]
    assert said.startswith("TUNED adds 2 tokens, '<|a|>' (301), '<|b|>' (302); TARGET's tokenizer lacks")
    has = tmp_path / "has"
    padded(has, AutoModelForCausalLM.from_pretrained(tables / "rows-300"), 320, added=[(310, "<|a|>"), (302, "<|b|>")])
    said = [w for w in move(tables, tmp_path / "two", "rows-300", tables / "tune-304", has).warnings if "adds" in w]
    assert said == ["TUNED adds 2 tokens, '<|a|>' (301), '<|b|>' (302); TARGET has '<|a|>' (310): its own rows stay"]


def test_added_tokens_are_compared_as_the_rest(tables, tmp_path):
    """Row 299 is one token in the tune and another in the target."""
    for name, token in (("rows-300", "<|other|>"), ("tune-300", "<|chat|>")):
        padded(tmp_path / name, AutoModelForCausalLM.from_pretrained(tables / name), 300, added=[(299, token)])
    outcome = move(tables, tmp_path / "out", "rows-300", tmp_path / "tune-300", tmp_path / "rows-300")
    assert any("'<|chat|>' is 299 in TUNED, where TARGET has '<|other|>'" in text for text in outcome.warnings)


@pytest.mark.parametrize("options, whole", [({"modules_to_save": ["embed_tokens", "lm_head"]}, True), ({}, False)])
def test_an_adapter_with_other_rows(tables, tmp_path, options, whole):
    """Tables PEFT saved for their size alone are not written; those it trained are, with the target's rows."""
    given = adapter(tmp_path / "given", tables / "rows-320", **({"target_modules": ["q_proj", "lm_head"]} | options))
    outcome = move(tables, tmp_path / "out", "rows-320", given, "rows-300")
    base = logits(AutoModelForCausalLM.from_pretrained(tables / "rows-300"))
    tuned = with_adapter(tables / "rows-320", given)[..., :300]
    assert error(with_adapter(tables / "rows-300", tmp_path / "out"), tuned, base) < EXACT
    assert saved(tmp_path / "out") == ([HEAD, EMBEDDING] if whole else []) and verify(tmp_path / "out") == []
    assert not any("added" in text for text in outcome.warnings)


def test_vocabularies_of_two_tokenizers_stay(tables, tmp_path):
    """Without one tokenizer on both sides nothing says which rows correspond."""
    outcome = move(tables, tmp_path / "out", "untied", tables / "tune-300", "rows-320")
    assert fates(outcome)["embed_tokens.weight"][0] == fates(outcome)[HEAD][0] == "left"
