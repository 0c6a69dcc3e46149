"""The Python API: arguments that cannot be what their names say are refused before anything runs; reprs are short."""

from collections import UserDict
from dataclasses import replace

import numpy as np
import pytest
import torch
from exact.models import LLAMA, VIT, base, batches, tune
from theseus_transport import Delta, InputRefused, Recipe, align, transport
from theseus_transport.jobs.settings import Job
from theseus_transport.jobs.transport_job import Session
from theseus_transport.updates.alpha import matched

SOURCE, TARGET = base(LLAMA), base(LLAMA, seed=5, width=36, num_attention_heads=6, num_key_value_heads=3)
TUNED = tune(SOURCE, "linear")
PICTURES = base(VIT), base(VIT, seed=5, width=36, image_size=12, num_attention_heads=2)
IDS, MASK = torch.zeros(2, 5, dtype=torch.int64), torch.ones(2, 5, dtype=torch.int64)
PIXELS = torch.zeros(2, 3, 8, 8)


@pytest.fixture(scope="module")
def alignment():
    return align(SOURCE.build(), TARGET.build(), batches(SOURCE, seed=3))


def never(*_: object, **__: object) -> None:
    raise AssertionError("a model ran")


def text(**changes: object) -> dict:
    return {"input_ids": IDS, "attention_mask": MASK} | changes


GOOD = text()
BAD = {
    "one dict": (GOOD, r"batches is a dict, and must be a list .* give \[batch\]"),
    "a tensor": (IDS, r"batches is a Tensor, .* give \[batch\]"),
    "a string": ("builtin", "batches is a str"),
    "None": (None, "batches is a NoneType"),
    "none": ([], "no calibration batches were given"),
    "ids alone": ([GOOD, IDS], r"batch 1 of the source is a Tensor; give a dict .*as \{'input_ids': ...\}"),
    "a list": ([[IDS, MASK]], "batch 0 of the source is a list of 2; give a dict"),
    "three": ([(GOOD, GOOD, GOOD)], "batch 0 of the source is a tuple of 3; .* or a pair"),
    "half a pair": ([(GOOD, None)], "batch 0 of the target is a NoneType"),
    "nothing in it": ([{}], "batch 0 of the source has no input_ids, only nothing; the source is a text model"),
    "images": ([{"pixel_values": PIXELS}], "has no input_ids, only pixel_values"),
    "ragged": ([{"input_ids": [[1, 2], [3]]}], r"input_ids is a list of 2; give a tensor \[n, tokens\], shorter rows"),
    "numpy": ([{"input_ids": np.zeros((2, 5), dtype=int)}], "input_ids is a ndarray; give a tensor"),
    "no ids": ([text(input_ids=None)], "input_ids is None; give a tensor"),
    "a list as mask": ([text(attention_mask=[1, 1])], "attention_mask is a list of 2; give a tensor"),
    "one row": ([{"input_ids": IDS[0]}], r"input_ids is \[5\], one row of ids .* ids\[None\]"),
    "three axes": ([{"input_ids": IDS[None]}], r"input_ids is \[1, 2, 5\], expected .*\(\[n, tokens\]\)"),
    "floats": ([{"input_ids": IDS.float()}], "input_ids is torch.float32, expected integers"),
    "bytes": ([{"input_ids": IDS.byte()}], r"input_ids is torch.uint8, .* give ids.long\(\)"),
    "empty": ([GOOD, {"input_ids": IDS[:0]}], r"batch 1 of the source: input_ids \[0, 5\] is empty"),
    "no tokens": ([{"input_ids": IDS[:, :0]}], r"input_ids \[2, 0\] is empty"),
    "id too large": ([{"input_ids": IDS + 10**6}], "holds ids 1000000 to 1000000, the source has a vocabulary of "),
    "of the target": ([(GOOD, {"input_ids": IDS + 10**6})], "batch 0 of the target: .*, the target has a vocabulary"),
    "negative id": ([{"input_ids": IDS - 1}], "holds ids -1 to -1"),
    "mask of other shape": ([text(attention_mask=MASK[:, :3])], r"attention_mask is \[2, 3\], expected \[2, 5\]"),
    "mask of 4 axes": ([text(attention_mask=MASK[:, None, None])], "attention_mask is .*1, 1, 5.*expected"),
    "mask of 2": ([text(attention_mask=2 * MASK)], "attention_mask must hold 0 and 1 only"),
    "float mask": ([text(attention_mask=MASK.float())], "attention_mask is torch.float32, expected integers"),
    "samples differ": ([(GOOD, {"input_ids": IDS[:1]})], "batch 0: the source batch has 2 samples, the target batch 1"),
    "tokens differ": ([(text(), {"input_ids": IDS[:, :3]})], r"source input_ids are \[2, 5\], .*or both hold offsets"),
    "masks differ": ([GOOD, (GOOD, text(attention_mask=MASK.tril()))], "batch 1: the attention masks of source and"),
    "a mask on one side": ([(GOOD, {"input_ids": IDS})], "the attention masks of source and target differ"),
    "offsets on one side": ([(text(offsets=torch.zeros(2, 5, 2).long()), GOOD)], "offsets on one side only"),
    "offsets of ids": ([text(offsets=IDS)], r"offsets is \[2, 5\], expected \[2, 5, 2\]"),
    "too long": ([{"input_ids": IDS.repeat(1, 10**4)}], "rows of 50000 tokens, the source reads at most"),
}  # fmt: skip


@pytest.mark.parametrize("given, message", BAD.values(), ids=BAD)
def test_batches_are_refused_before_a_model_runs(monkeypatch, given, message):
    source, target = SOURCE.build(), TARGET.build()
    for model in (source, target):
        monkeypatch.setattr(model, "forward", never)
    with pytest.raises(InputRefused, match=message):
        align(source, target, given)


IMAGES = {
    "one image": (PIXELS[0], r"pixel_values is \[3, 8, 8\] torch.float32, the source reads floats \[n, 3, 8, 8\]"),
    "of the target": ((PIXELS, PIXELS), r"batch 0 of the target: pixel_values is \[2, 3, 8, 8\].*\[n, 3, 12, 12\]"),
    "bytes": (PIXELS.byte(), "torch.uint8, the source reads floats"),
    "empty": (PIXELS[:0], r"pixel_values \[0, 3, 8, 8\] is empty"),
    "a list": ([PIXELS[0], PIXELS[1]], r"pixel_values is a list of 2; give a tensor \[n, channels, height, width\]"),
    "samples differ": ((PIXELS, torch.zeros(3, 3, 12, 12)), "source batch has 2 samples, the target batch 3"),
}  # fmt: skip


@pytest.mark.parametrize("given, message", IMAGES.values(), ids=IMAGES)
def test_images_are_refused_before_a_model_runs(monkeypatch, given, message):
    models = [spec.build() for spec in PICTURES]
    for model in models:
        monkeypatch.setattr(model, "forward", never)
    pair = tuple({"pixel_values": side} for side in given) if isinstance(given, tuple) else {"pixel_values": given}
    with pytest.raises(InputRefused, match=message):
        align(*models, [pair])


def test_any_mapping_and_any_iterable_will_do(alignment):
    each = (UserDict(batch) for batch in batches(SOURCE, seed=3))
    again = align(SOURCE.build(), TARGET.build(), each)
    assert again.rules == alignment.rules and again.provenance == alignment.provenance


@pytest.mark.parametrize(
    "options, message",
    [
        ({"recipe": "best"}, "recipe name is 'best'; choose one of effect, coherent, paper"),
        ({"recipe": 3}, "recipe name is 3; choose one of"),
        ({"null": "best"}, "null is 'best'; choose one of"),
        ({"floor": "low"}, "floor is 'low'; give a number"),
        ({"recipe": Recipe("paper"), "floor": True}, "floor is True; give a number"),
        ({"device": "gpu"}, "device is 'gpu'; give cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is 'meta'; only cpu, cuda and cuda:N are supported"),
        ({"device": torch.device("mps")}, "device is 'mps'; only cpu, cuda"),
    ],
)
def test_options_of_align(monkeypatch, options, message):
    source = SOURCE.build()
    monkeypatch.setattr(source, "forward", never)
    with pytest.raises(InputRefused, match=message):
        align(source, TARGET.build(), [GOOD], **options)


def test_models_are_models():
    with pytest.raises(InputRefused, match="source is a str; give a model, as AutoModel.from_pretrained"):
        align("llama-small", TARGET.build(), [GOOD])
    with pytest.raises(InputRefused, match=r"a model is given as a str \('small'\); give a torch module, a state dict"):
        Delta.between("small", "tuned")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"alpha": "match"}, "alpha is 'match', which needs the update first; give alpha=.*matched"),
        ({"alpha": "0.5"}, "alpha is '0.5'; give a finite number"),
        ({"alpha": float("nan")}, "alpha is nan; give a finite number"),
        ({"alpha": None}, "alpha is None; give a finite number"),
        ({"alpha": True}, "alpha is True; give a finite number"),
        ({"leave": "layers.1*"}, r"leave is 'layers.1\*'; give a list of glob patterns, as leave=\['layers.1\*'\]"),
        ({"leave": None}, "leave is None; give a list"),
        ({"leave": [3]}, r"leave is \[3\]; give a list"),
        ({"device": "gpu"}, "device is 'gpu'; give cpu, cuda or cuda:N"),
    ],
)
def test_options_of_transport(alignment, options, message):
    with pytest.raises(InputRefused, match=message):
        transport(alignment, Delta.between(SOURCE.state, TUNED.state), TARGET.state, **options)


def test_the_cure_for_match_works(alignment):
    delta = Delta.between(SOURCE.state, TUNED.state)
    alpha = matched(transport(alignment, delta, TARGET.state))
    assert transport(alignment, delta, TARGET.state, alpha=np.float32(alpha)).alpha == pytest.approx(alpha, rel=1e-6)


def test_a_job_takes_no_string_to_leave(models, tmp_path):
    places = [str(models / "bare" / name) for name in ("source", "tuned", "target")]
    with pytest.raises(InputRefused, match=r"leave is 'embed\*'; give a list of glob patterns"):
        Session(Job(*places, tmp_path / "out", calibration=str(models / "ids.safetensors"), leave="embed*"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": 0}, r"tokens is 0; give a whole number from 1 to 2\^63 - 1"),
        ({"tokens": "many"}, "tokens is 'many'; give a whole number from 1"),
        ({"batch_size": 0}, "batch_size is 0; give a whole number from 1"),
        ({"batch_size": 1.5}, "batch_size is 1.5; give a whole number"),
        ({"seed": -1}, "seed is -1; give a whole number from 0"),
        ({"seed": None}, "seed is None; give a whole number from 0"),
        ({"seed": 2**63}, "seed is 9223372036854775808; give a whole number"),
        ({"device": 3}, "device is '3'; give cpu, cuda or cuda:N"),
        ({"alpha": "1"}, "alpha is 1; give a finite number other than 0, match or auto"),
    ],
)
def test_numbers_of_a_job(models, tmp_path, options, message):
    places = [str(models / "bare" / name) for name in ("source", "tuned", "target")]
    with pytest.raises(InputRefused, match=message):
        Session(Job(*places, tmp_path / "out", calibration=str(models / "ids.safetensors"), **options))


def test_arguments_that_changed_places(alignment):
    delta = Delta.between(SOURCE.state, TUNED.state)
    with pytest.raises(InputRefused, match="alignment is a Delta, expected Alignment"):
        transport(delta, alignment, TARGET.state)
    with pytest.raises(InputRefused, match="delta is a dict, expected Delta"):
        transport(alignment, TUNED.state, TARGET.state)
    with pytest.raises(InputRefused, match=r"was the right base given\?"):
        transport(alignment, delta, SOURCE.state)
    with pytest.raises(InputRefused, match=r"was the right base given\?"):
        transport(alignment, Delta.between(TARGET.state, SOURCE.state), TARGET.state)
    with pytest.raises(InputRefused, match=r"is \[.*\] in the tuned model|the tuned model's"):
        transport(alignment, Delta.between(SOURCE.state, TARGET.state), TARGET.state)


def test_a_delta_the_wrong_way_round(alignment, tmp_path):
    loaded = type(alignment).load(alignment.save(tmp_path / "maps"))
    for known in (alignment, loaded):
        with pytest.raises(InputRefused, match=r"is the source that was aligned; give Delta.between\(base, tuned\)"):
            transport(known, Delta.between(TUNED.state, SOURCE.state), TARGET.state)
    assert transport(replace(alignment, provenance=[]), Delta.between(SOURCE.state, TUNED.state), TARGET.state)
    other = tune(SOURCE, "everything")  # from one tune to another is a delta too
    assert transport(alignment, Delta.between(TUNED.state, other.state), TARGET.state)


def test_reprs_are_for_people(alignment):
    delta = Delta.between(SOURCE.state, TUNED.state)
    update = transport(alignment, delta, TARGET.state, alpha=0.5)
    layers = len([row for row in update.coverage if row.fate == "fitted"])
    assert repr(update).startswith(f"Update(llama of {SOURCE.build().config.num_hidden_layers} blocks, ")
    assert f"-> llama of 2 blocks, 36 wide, alpha 0.5: {layers} fitted" in repr(update)
    assert repr(alignment).endswith(f"36 wide, recipe effect, {len(alignment.maps)} maps)")
    assert repr(delta) == f"Delta(full tune, {len(TUNED.state)} tensors)"
    assert all(len(repr(each)) < 160 for each in (update, alignment, delta))
    assert isinstance(repr(Recipe()), str)
