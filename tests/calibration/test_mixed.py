"""Calibration mixed with general text by share of tokens, and what is said of calibration that is poor."""

import re
from pathlib import Path

import pytest
import torch
from helpers.calibration import TEXT, make_tokenizer, text_side
from safetensors.torch import save_file
from theseus_transport.calibration.advice import warning_of_general, warnings_of_rows
from theseus_transport.calibration.calibration import load_calibration
from theseus_transport.calibration.extent import extent
from theseus_transport.calibration.mixed import load_mixed
from theseus_transport.models.pair import Pair

LENGTH = 32


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folders = (
        make_tokenizer(tmp_path_factory.mktemp("source"), 270),
        make_tokenizer(tmp_path_factory.mktemp("target"), 330, begin=True),
    )
    return Pair(*(text_side(folder, name, max_positions=LENGTH) for folder, name in zip(folders, "AB", strict=True)))


def rows_of(batches: list) -> set:
    return {tuple(row.tolist()) for pair in batches for row in pair[0]["input_ids"]}


@pytest.mark.parametrize("mix", [0.2, 0.5, 0.9])
def test_the_share_of_general_text_is_as_asked(tmp_path: Path, sides: Pair, mix: float) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    how = {"tokens_wanted": 4000, "batch_size": 4, "hold_out": True}
    found = load_mixed(tmp_path / "a.txt", *sides, mix=mix, **how)
    own = load_calibration(
        tmp_path / "a.txt", *sides, tokens_wanted=round(4000 * (1 - mix)), batch_size=4, hold_out=True
    )
    general = load_calibration("builtin", *sides, tokens_wanted=round(4000 * mix), batch_size=4)
    assert rows_of(found.batches) == rows_of(own.batches) | rows_of(general.batches)
    share = general.tokens / found.tokens
    assert abs(share - mix) <= LENGTH / 4000 and abs(found.tokens - 4000) <= 2 * LENGTH, "to a row of each"
    assert found.held is not None and rows_of([found.held]) == rows_of([own.held]), "is of the task alone"
    assert f"{own.description}; mixed with {general.description}" == found.description


def test_how_much_there_will_be_is_foretold(tmp_path: Path, sides: Pair) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    one = Pair(sides.source, sides.source)
    known = extent(str(tmp_path / "a.txt"), one, wanted=2800, most=4, seed=0)
    known = known.with_(extent("builtin", one, wanted=1200, most=0, seed=0))
    found = load_mixed(tmp_path / "a.txt", *one, mix=0.3, tokens_wanted=4000, batch_size=4, hold_out=True)
    assert found.held is not None
    assert known.samples >= sum(len(pair[0]["input_ids"]) for pair in [*found.batches, found.held])
    tensors = {id(t): t.nbytes for pair in [*found.batches, found.held] for side in pair for t in side.values()}
    assert known.nbytes >= sum(tensors.values())


def test_both_kinds_alternate(tmp_path: Path, sides: Pair) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    one = (sides.source, sides.source)
    found = load_mixed(tmp_path / "a.txt", *one, mix=0.5, tokens_wanted=2000, batch_size=4)
    own = rows_of(load_calibration(tmp_path / "a.txt", *one, tokens_wanted=1000, batch_size=4).batches)
    kinds = [bool(rows_of([pair]) & own) for pair in found.batches]
    assert len(kinds) > 8 and all(a != b for a, b in zip(kinds, kinds[1:], strict=False))


def test_little_text_is_not_drowned_in_general_text(tmp_path: Path, sides: Pair, caplog) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:3000])
    found = load_mixed(tmp_path / "a.txt", *sides, mix=0.5, tokens_wanted=10**5, batch_size=4)
    own = load_calibration(tmp_path / "a.txt", *sides, tokens_wanted=10**5, batch_size=4)
    assert own.tokens <= found.tokens - own.tokens <= own.tokens + LENGTH
    assert f"has {own.tokens} tokens, 50000 were wanted" in caplog.text


def test_without_a_share_nothing_changes_and_the_share_is_in_the_fingerprint(tmp_path: Path, sides: Pair) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    how = {"tokens_wanted": 1000, "batch_size": 4}
    prints = [load_mixed(tmp_path / "a.txt", *sides, mix=mix, **how).fingerprint for mix in (0.0, 0.3, 0.3, 0.6)]
    assert prints[0] == load_calibration(tmp_path / "a.txt", *sides, **how).fingerprint
    assert prints[1] == prints[2] and len(set(prints)) == 3


def test_ready_ids_are_mixed_too(tmp_path: Path, sides: Pair) -> None:
    save_file({"input_ids": torch.randint(0, 270, (40, 20))}, tmp_path / "a.safetensors")
    side = sides.source
    found = load_mixed(tmp_path / "a.safetensors", side, side, mix=0.5, tokens_wanted=400, batch_size=4)
    assert {pair[0]["input_ids"].shape[1] for pair in found.batches} == {20, LENGTH}


ROWS = {
    "many": (4000, [512, 1000], []),
    "twice": (2000, [1000], []),
    "few": (1600, [512, 1000], ["1600 .* reads 1000 features are fewer than twice as many: give at least 4000"]),
    "near the widest": (1200, [1000], ["fewer than twice", "1200 .* about as many as the 1000 .*double descent"]),
    "near from below": (750, [1000], ["fewer than twice", "750 .* about as many as the 1000 features"]),
    "near a narrower": (600, [512, 2000], ["fewer than twice", "600 .* about as many as the 512 features"]),
    "far below": (100, [1000], ["100 .* fewer than twice"]),
    "nothing is fitted": (100, [], []),
}


@pytest.mark.parametrize("rows, widths, messages", ROWS.values(), ids=ROWS)
def test_rows_that_are_few_for_a_width_and_near_it_are_warned_of(rows: int, widths: list, messages: list) -> None:
    said = warnings_of_rows(rows, widths)
    assert len(said) == len(messages)
    assert all(re.search(message, text) for message, text in zip(messages, said, strict=True))


def test_general_text_alone_says_what_would_bring_more() -> None:
    assert "text of what the tune is for" in warning_of_general("builtin")
    assert warning_of_general("self") == warning_of_general("notes.txt") == ""
