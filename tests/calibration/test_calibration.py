"""Calibration data: ready tensors, text with one or two tokenizers, the built-in text, and every refusal."""

from pathlib import Path

import pytest
import torch
from helpers.calibration import TEXT, load, make_tokenizer, text_side
from safetensors.torch import save_file
from theseus_transport.activations.inputs import SideInfo
from theseus_transport.calibration.calibration import batches_of
from theseus_transport.errors import InputRefused
from tokenizers import Tokenizer as Engine


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("small"), 270)


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("large"), 330, begin=True)


def vision_side(name: str = "V", image_size: int | tuple[int, int] = 4, tokens: int = 5) -> SideInfo:
    return SideInfo(
        folder=Path("."), kind="vision", name=name, channels=3, image_size=image_size, tokens_per_image=tokens
    )


def stored(folder: Path, **tensors: torch.Tensor) -> Path:
    save_file(
        {
            name.replace("__", "."): value.clone(memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        },
        folder / "data.safetensors",
    )
    return folder / "data.safetensors"


def test_ready_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids, mask = torch.arange(60, dtype=torch.int32).view(10, 6), torch.ones(10, 6, dtype=torch.bool)
    mask[:, 4:] = False
    path = stored(tmp_path, input_ids=ids, attention_mask=mask)
    found = load(path, text_side(tmp_path), text_side(tmp_path, "B"), tokens_wanted=1000)
    assert found.tokens == 40 and [len(pair[0]["input_ids"]) for pair in found.batches] == [4, 4, 2]
    source, target = found.batches[0]
    assert source is target and source["input_ids"].dtype is source["attention_mask"].dtype is torch.int64
    assert torch.equal(torch.cat([pair[0]["input_ids"] for pair in found.batches]), ids.long())
    assert "40 tokens, 1000 were wanted" in caplog.text and "data.safetensors: 10 rows" in found.description


def test_sample_of_rows_follows_the_seed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = stored(tmp_path, input_ids=torch.arange(300).view(100, 3))
    first, again, other = (load(path, text_side(tmp_path), tokens_wanted=31, seed=seed) for seed in (0, 0, 1))
    rows = [torch.cat([pair[0]["input_ids"] for pair in found.batches]) for found in (first, again, other)]
    assert first.tokens == 33 and len(rows[0]) == 11 and (rows[0][:, 0].diff() > 0).all(), "in their order"
    assert torch.equal(rows[0], rows[1]) and first.fingerprint == again.fingerprint
    assert not torch.equal(rows[0], rows[2]) and first.fingerprint != other.fingerprint
    assert not caplog.records


def test_ready_ids_per_side(tmp_path: Path) -> None:
    a, b = torch.randint(0, 9, (6, 5)), torch.randint(10, 19, (6, 5))
    path = stored(tmp_path, source__input_ids=a, target__input_ids=b)
    pair = load(path, text_side(tmp_path, vocab_size=9), text_side(tmp_path, vocab_size=19), tokens_wanted=99).batches[
        0
    ]
    assert torch.equal(pair[0]["input_ids"], a[:4]) and torch.equal(pair[1]["input_ids"], b[:4])
    assert "offsets" not in pair[0] and "offsets" not in pair[1]
    offsets = {"source__offsets": torch.ones(6, 5, 2).int(), "target__offsets": torch.ones(6, 7, 2).int()}
    path = stored(tmp_path, source__input_ids=a, target__input_ids=torch.ones(6, 7).int(), **offsets)
    pair = load(path, text_side(tmp_path), tokens_wanted=99).batches[1]
    assert pair[0]["offsets"].shape == (2, 5, 2) and pair[1]["offsets"].shape == (2, 7, 2)
    assert set(pair[0]) == {"input_ids", "attention_mask", "offsets"}


def test_images(tmp_path: Path) -> None:
    path = stored(tmp_path, pixel_values=torch.randn(6, 3, 4, 4))
    found = load(path, vision_side(tokens=5), vision_side("W", (4, 4), tokens=17), tokens_wanted=25)
    assert found.tokens == 25 and [tuple(pair[1]["pixel_values"].shape) for pair in found.batches] == [
        (4, 3, 4, 4),
        (1, 3, 4, 4),
    ]
    path = stored(
        tmp_path, source__pixel_values=torch.randn(2, 3, 4, 4), target__pixel_values=torch.randn(2, 3, 8, 6).half()
    )
    assert len(load(path, vision_side(), vision_side("W", (8, 6)), tokens_wanted=10).batches) == 1


ids, ones = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 3, dtype=torch.int64)
TWO_SIDES = {"source__input_ids": ids, "target__input_ids": ids}
REVERSED = torch.tensor([2, 1]).expand(2, 3, 2)
BAD_TEXT = {
    "unknown name": ({"labels": ids}, "'labels' is not known; names are input_ids"),
    "unknown side": ({"third__input_ids": ids}, "'third.input_ids' is not known"),
    "one side": ({"source__input_ids": ids}, "give both source"),
    "mixed": ({"input_ids": ids, "target__input_ids": ids}, "give both source"),
    "no ids": ({"attention_mask": ones}, "A is a text model and needs input_ids"),
    "images": ({"pixel_values": torch.ones(2, 3, 4, 4)}, "A is a text model and needs input_ids"),
    "offsets for one side": ({"input_ids": ids, "offsets": torch.zeros(2, 3, 2).long()}, "needs input_ids"),
    "id too large": ({"input_ids": ids + 10}, "ids 10 to 10, A has a vocabulary of 10; was it made with"),
    "negative id": ({"input_ids": ids - 1}, "ids -1 to -1"),
    "float ids": ({"input_ids": ids.float()}, r"input_ids is torch.float32, expected integers"),
    "bool ids": ({"input_ids": ids.bool()}, "input_ids is torch.bool"),
    "flat ids": ({"input_ids": ids[0]}, r"input_ids is \[3\], one row .* give \[n, tokens\], a text a row: ids"),
    "mask of other shape": ({"input_ids": ids, "attention_mask": ones[:, :2]}, r"mask is \[2, 2\], expected \[2, 3\]"),
    "mask of 2": ({"input_ids": ids, "attention_mask": ones * 2}, "must hold 0 and 1 only"),
    "row all masked": ({"input_ids": ids, "attention_mask": ones.tril(-1)}, "a 1 in every row"),
    "empty": ({"input_ids": ids[:0]}, r"input_ids \[0, 3\] is empty"),
    "too long": ({"input_ids": torch.zeros(2, 9).long()}, "input_ids has rows of 9 tokens, A reads at most 8;"),
    "rows differ": ({"source__input_ids": ids, "target__input_ids": ids[:1]}, "2 source rows and 1 target rows"),
    "tokens differ": ({"source__input_ids": ids, "target__input_ids": ids[:, :2]}, "one to one; add source.offsets"),
    "masks differ": (TWO_SIDES | {"target__attention_mask": ones.tril()}, "shape or mask"),
    "offsets on one side": (TWO_SIDES | {"source__offsets": REVERSED.flip(-1)}, "offsets on one side only"),
    "offsets reversed": (TWO_SIDES | {"source__offsets": REVERSED, "target__offsets": REVERSED}, "0 <= start <= stop"),
}  # fmt: skip


@pytest.mark.parametrize("tensors, message", BAD_TEXT.values(), ids=BAD_TEXT)
def test_bad_text_tensors(tmp_path: Path, tensors: dict, message: str) -> None:
    path = stored(tmp_path, **tensors)
    with pytest.raises(InputRefused, match=message):
        load(path, text_side(tmp_path, vocab_size=10, max_positions=8))


NAN = torch.full((2, 3, 4, 4), float("nan"))
BAD_IMAGES = {
    "channels": (
        torch.ones(2, 1, 4, 4),
        r"pixel_values is \[2, 1, 4, 4\] torch.float32, V reads floats \[n, 3, 4, 4\]",
    ),
    "size": (torch.ones(2, 3, 4, 5), r"is \[2, 3, 4, 5\]"),
    "bytes": (torch.ones(2, 3, 4, 4).byte(), "torch.uint8, V reads floats"),
    "no batch": (torch.ones(3, 4, 4), r"is \[3, 4, 4\]"),
    "NaN": (NAN, "96 NaN and 0 Inf"),
}


@pytest.mark.parametrize("images, message", BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_bad_images(tmp_path: Path, images: torch.Tensor, message: str) -> None:
    with pytest.raises(InputRefused, match=message):
        load(stored(tmp_path, pixel_values=images), vision_side())


def test_the_target_is_checked_as_well(tmp_path: Path) -> None:
    path = stored(tmp_path, input_ids=torch.full((2, 3), 50))
    with pytest.raises(InputRefused, match="B has a vocabulary of 40"):
        load(path, text_side(tmp_path, "A", 60), text_side(tmp_path, "B", 40))


def test_references_and_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="'nowhere.txt' is no file"):
        load("nowhere.txt", text_side(tmp_path))
    with pytest.raises(InputRefused, match="A is a text model, V a vision model"):
        load("builtin", text_side(tmp_path), vision_side())
    (tmp_path / "a.txt").write_text("hello")
    for reference in ("builtin", tmp_path / "a.txt"):
        with pytest.raises(
            InputRefused, match=r"V reads images.*give --calibration a folder of images, or a .safetensors with pixel"
        ):
            load(reference, vision_side())
        with pytest.raises(InputRefused, match=r"A: .* has no tokenizer; .*a .safetensors of input_ids"):
            load(reference, text_side(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputRefused, match="does not load"):
        load("builtin", text_side(tmp_path))
    with pytest.raises(InputRefused, match="batch size is 0"):
        batches_of({"input_ids": ids}, batch_size=0)


@pytest.mark.parametrize("content, message", [(b"\xff\xfe", r"no utf-8 text \(byte 0\)"), (b" \n", "holds no text")])
def test_bad_text_file(tmp_path: Path, small: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(InputRefused, match=message):
        load(tmp_path / "a.txt", text_side(small))


def test_text_with_one_tokenizer(tmp_path: Path, large: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = load(tmp_path / "a.txt", text_side(large, max_positions=32), text_side(large, "B"), tokens_wanted=200)
    assert found.tokens == 224 and all(pair[0] is pair[1] for pair in found.batches)
    rows = torch.cat([pair[0]["input_ids"] for pair in found.batches])
    assert rows.shape == (7, 32) and (rows[:, 0] == 0).all() and (rows[:, 1:] != 0).all(), "<s> begins every row"
    engine = Engine.from_file(str(large / "tokenizer.json"))
    assert all(engine.decode(row[1:].tolist()).strip("�") in TEXT for row in rows)
    short = load(tmp_path / "a.txt", text_side(large, max_positions=8), tokens_wanted=20)
    assert short.batches[0][0]["input_ids"].shape == (3, 8)
    with pytest.raises(InputRefused, match="the tokenizer of B holds ids 0 to .* B has a vocabulary of 20"):
        load(tmp_path / "a.txt", text_side(large), text_side(large, "B", 20))
    with pytest.raises(InputRefused, match="sequence length 1 leaves no room"):
        load(tmp_path / "a.txt", text_side(large, max_positions=1))


def test_text_shorter_than_a_row(tmp_path: Path, small: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("The quick")
    found = load(tmp_path / "a.txt", text_side(small, max_positions=64), tokens_wanted=100)
    assert found.tokens == found.batches[0][0]["input_ids"].numel() < 10 and caplog.records


def test_equal_tokenizers_in_two_folders(tmp_path: Path, small: Path) -> None:
    twin = make_tokenizer(tmp_path / "twin", 270)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = load(tmp_path / "a.txt", text_side(small, max_positions=16), text_side(twin, "B"), tokens_wanted=100)
    assert all(pair[0] is pair[1] and "offsets" not in pair[0] for pair in found.batches)


def test_text_with_two_tokenizers(tmp_path: Path, small: Path, large: Path) -> None:
    """Row i is the same text on both sides, and the offsets say where in it each token lies."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = load(tmp_path / "a.txt", text_side(small, max_positions=24), text_side(large, "B"), tokens_wanted=300)
    assert 300 <= found.tokens < 300 + 24
    engines = [Engine.from_file(str(folder / "tokenizer.json")) for folder in (small, large)]
    for pair in found.batches:
        both = zip(pair, (pair[0]["offsets"], pair[1]["offsets"]), engines, strict=True)
        decoded, reached = [], []
        for side, offsets, engine in both:
            mask, tokens = side["attention_mask"].bool(), side["input_ids"]
            assert tokens.shape[1] <= 24 and offsets.shape == (*tokens.shape, 2)
            assert (offsets[~mask] == 0).all()
            texts = [engine.decode(row[keep].tolist()) for row, keep in zip(tokens, mask, strict=True)]
            for row, span, text in zip(tokens, offsets, texts, strict=True):
                for token, (start, stop) in zip(row.tolist(), span.tolist(), strict=True):
                    word = engine.decode([token])
                    assert token == 0 or stop <= start or "�" in word or text[start:stop] == word
            decoded.append(texts)
            reached.append(offsets[..., 1].max(dim=1).values.tolist())
        assert decoded[0] == decoded[1] and all(text in TEXT for text in decoded[0])
        assert reached[0] == reached[1] == [len(text) for text in decoded[0]]
        assert (pair[1]["input_ids"][:, 0] == 0).all() and (pair[1]["offsets"][:, 0] == 0).all()


def test_rows_of_two_tokenizers_cover_the_text(tmp_path: Path, small: Path, large: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    found = load(tmp_path / "a.txt", text_side(small, max_positions=50), text_side(large, "B"), tokens_wanted=10**6)
    for side in (0, 1):
        assert sum(int(pair[side]["offsets"][..., 1].amax(dim=1).sum()) for pair in found.batches) == len(TEXT)


def test_tokenizers_that_differ_only_in_specials(tmp_path: Path, small: Path) -> None:
    begins = make_tokenizer(tmp_path / "begins", 270, begin=True)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    pair = load(tmp_path / "a.txt", text_side(small, max_positions=16), text_side(begins, "B")).batches[0]
    assert torch.equal(pair[0]["input_ids"], pair[1]["input_ids"][:, 1:]) and (pair[1]["input_ids"][:, 0] == 0).all()
    assert torch.equal(pair[0]["offsets"], pair[1]["offsets"][:, 1:])


def test_builtin(small: Path, large: Path) -> None:
    found = load("builtin", text_side(small, max_positions=64), tokens_wanted=500)
    assert 500 <= found.tokens < 564 and found.description.startswith("text of Python 3.")
    again, other = (load("builtin", text_side(small, max_positions=64), tokens_wanted=500, seed=s) for s in (0, 1))
    assert found.fingerprint == again.fingerprint != other.fingerprint
    apart = load("builtin", text_side(small, max_positions=64), text_side(large, "B"), tokens_wanted=500)
    assert "offsets" in apart.batches[0][0]


def test_a_batch_is_held_out_where_that_leaves_two(tmp_path: Path) -> None:
    path = stored(tmp_path, input_ids=torch.arange(300).view(100, 3))
    for wanted, fit, held in ((30, 10, 4), (10**6, 96, 4)):
        found = load(path, text_side(tmp_path), tokens_wanted=wanted, hold_out=True)
        assert sum(len(own["input_ids"]) for own, _ in found.batches) == fit and found.tokens == 3 * fit
        assert (
            found.held is not None
            and len(found.held[0]["input_ids"]) == held
            and "4 rows held out" in found.description
        )


@pytest.mark.parametrize("batch_size", [1, 4, 8, 100])
def test_what_is_held_out_is_a_third_at_most_and_no_more_than_a_batch(tmp_path: Path, batch_size: int) -> None:
    for rows in (1, 2, 3, 8, 10, 30, 100):
        path = stored(tmp_path, input_ids=torch.arange(3 * rows).view(rows, 3))
        for wanted in (3, 12, 27, 10**6):
            found = load(path, text_side(tmp_path), hold_out=True, tokens_wanted=wanted, batch_size=batch_size)
            fit = torch.cat([own["input_ids"] for own, _ in found.batches])
            held = found.held[0]["input_ids"] if found.held else fit[:0]
            assert len(held) == min(batch_size, (len(fit) + len(held)) // 3)
            assert len(fit) == min(wanted // 3, rows - len(held))
            assert not {*fit[:, 0].tolist()} & {*held[:, 0].tolist()}
            assert all((part[:, 0].diff() > 0).all() for part in (fit, held)), "in their order"


def test_what_is_held_out_is_from_everywhere(tmp_path: Path) -> None:
    """The end of a text may be of another kind than the rest."""
    path = stored(tmp_path, input_ids=torch.arange(300).view(100, 3))
    found = load(path, text_side(tmp_path), hold_out=True, tokens_wanted=10**6, batch_size=8)
    assert found.held is not None and (found.held[0]["input_ids"][:, 0] < 150).any()
