"""Folders of images: preprocessed as transformers would, and refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from theseus_transport.activations.inputs import SideInfo
from theseus_transport.calibration import images
from theseus_transport.calibration.calibration import load_calibration
from theseus_transport.calibration.images import Preprocessor, find_images, read_images
from theseus_transport.errors import InputRefused
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil


def picture(path, size=(23, 17), mode="RGB", seed=0):
    """Random pixels, width x height."""
    shape = (size[1], size[0], 3) if mode == "RGB" else (size[1], size[0])
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def side(folder, image=8, **more):
    return SideInfo(folder, "vision", "V", channels=3, image_size=image, tokens_per_image=5, **more)


PROCESSORS = {
    "vit": (ViTImageProcessorPil, {"size": {"height": 8, "width": 8}}),
    "vit bicubic": (
        ViTImageProcessorPil,
        {"size": {"height": 8, "width": 8}, "resample": 3, "image_mean": [0.1, 0.2, 0.3]},
    ),
    "vit as stored": (ViTImageProcessorPil, {"size": {"height": 8, "width": 8}, "do_normalize": False}),
    "clip": (CLIPImageProcessorPil, {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}),
    "clip larger": (CLIPImageProcessorPil, {"size": {"shortest_edge": 11}, "crop_size": {"height": 8, "width": 8}}),
    "clip padded": (CLIPImageProcessorPil, {"size": {"shortest_edge": 5}, "crop_size": {"height": 8, "width": 8}}),
}


@pytest.mark.parametrize("kind", PROCESSORS)
@pytest.mark.parametrize("size", [(23, 17), (9, 31), (8, 8)])
def test_pixels_are_those_of_transformers(tmp_path, kind, size):
    make, options = PROCESSORS[kind]
    processor = make(**options)
    processor.save_pretrained(tmp_path)
    with Image.open(picture(tmp_path / "a.png", size)) as image:
        wanted = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        found = Preprocessor.of(tmp_path, "V", (8, 8), 3)(image)
    assert found.shape == (3, 8, 8)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5)  # float32 rounding of values up to 3


COLOURS = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
GREY = COLOURS[..., 0].astype(np.float32)
GREY[0, :2] = 0, 255


def pixels_of(image, channels=3):
    """What a model sees that wants pixels of this size between 0 and 255 as they are."""
    same = (0.0,) * channels, (1.0,) * channels
    return Preprocessor(None, None, 2, 1.0, *same)(image).permute(1, 2, 0).numpy()


def grey(mode, values):
    """A PIL image of a mode of numbers, written byte by byte."""
    kind = {"I;16B": ">u2", "I": "<i4", "F": "<f4"}.get(mode, "<u2")
    return Image.frombytes(mode, (8, 8), values.astype(kind).tobytes())


GREYS = {
    "I;16": ("I;16", 257 * GREY, GREY),
    "I;16L": ("I;16L", 257 * GREY, GREY),
    "I;16B": ("I;16B", 257 * GREY, GREY),
    "I;16 dark": ("I;16", GREY, GREY / 257),  # its white is 65535 whatever it shows
    "I of 8 bits": ("I", GREY, GREY),
    "I of 16 bits": ("I", 257 * GREY, GREY),
    "I of 31 bits": ("I", 2**20 * (GREY + 100), GREY),
    "I below 0": ("I", GREY - 300, GREY),
    "F within 1": ("F", GREY / 255, GREY),
    "F of 8 bits": ("F", GREY, GREY),
    "F of 16 bits": ("F", 257 * GREY, GREY),
    "F below 0": ("F", GREY / 255 - 0.5, GREY),
    "F huge": ("F", 1e30 * (GREY - 100), GREY),
    "F black": ("F", 0 * GREY, 0 * GREY),
    "F all the same": ("F", 0 * GREY - 7, 0 * GREY),
}


@pytest.mark.parametrize("name", GREYS)
def test_numbers_of_any_depth_are_scaled(name):
    mode, values, wanted = GREYS[name]
    found = pixels_of(grey(mode, values))
    assert np.abs(found - wanted[..., None]).max() <= 0.51  # rounded to 8 bits
    assert np.array_equal(found[..., :1], pixels_of(grey(mode, values), 1))


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_floats_that_have_no_scale(value):
    with pytest.raises(ValueError, match="not all values are finite"):
        pixels_of(grey("F", np.where(GREY > 100, value, -value)))


@pytest.mark.parametrize("mode, error", [("RGB", 0), ("RGBX", 0), ("CMYK", 0), ("YCbCr", 3), ("HSV", 9), ("LAB", 9)])
@pytest.mark.filterwarnings("error")
def test_colours_of_any_mode(mode, error):
    """As they were before, up to the rounding of 8 bits in that mode."""
    image = Image.fromarray((COLOURS // 64 * 16 + 100) if mode == "LAB" else COLOURS)  # a screen shows no more of LAB
    found = pixels_of(image.convert(mode))
    assert np.abs(found - np.asarray(image)).max() <= error
    assert np.abs(pixels_of(image.convert(mode), 1)[..., 0] - np.asarray(image.convert("L"))).max() <= error


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGBA", "RGBa"])
@pytest.mark.filterwarnings("error")
def test_transparency_is_dropped(mode):
    shown, alpha = np.where(GREY > 127, 255, 0).astype(np.uint8), np.where(GREY > 60, 255, 0).astype(np.uint8)
    if mode in ("1", "L", "P"):
        image = Image.fromarray(shown).convert(mode)
    else:
        image = Image.merge("LA", [Image.fromarray(shown), Image.fromarray(alpha)])
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(mode, mode)).convert(mode)
    if mode in ("La", "RGBa"):  # colours times alpha: what is transparent has none
        shown = np.where(alpha, shown, 0)
    if mode == "P":
        image.info["transparency"] = bytes(range(256))  # an alpha for each colour of the palette
    assert np.array_equal(pixels_of(image), np.repeat(shown[..., None], 3, axis=2))
    assert np.array_equal(pixels_of(image, 1)[..., 0], shown)
    assert pixels_of(image, 4).shape == (8, 8, 4)


def test_16_bits_through_a_file(tmp_path, caplog):
    grey("I;16", 257 * GREY).save(tmp_path / "a.png")
    grey("F", GREY / 255).save(tmp_path / "b.tiff")
    as_read = [Preprocessor.of(tmp_path, "V", (8, 8), 3)]
    ((found,), _) = read_images(find_images(tmp_path), as_read, wanted=9, skip_bad=False)
    assert torch.equal(found[0], found[1]) and torch.allclose(found[0][0], torch.from_numpy(GREY) / 127.5 - 1)


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "webp"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats(tmp_path, suffix, mode):
    picture(tmp_path / f"a.{suffix}", mode=mode)
    ((pixels,), _) = read_images(
        find_images(tmp_path), [Preprocessor.of(tmp_path, "V", (8, 8), 3)], wanted=9, skip_bad=False
    )
    assert pixels.shape == (1, 3, 8, 8) and pixels.abs().max() <= 1 and pixels.std() > 0.1


def test_each_model_has_its_own_size_and_the_same_images(tmp_path, caplog):
    for i in range(12):
        (tmp_path / "data" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (20 * i, 0, 0)).save(tmp_path / "data" / str(i % 2) / f"{i}.png")
    found = load_calibration(
        tmp_path / "data", side(tmp_path), side(tmp_path, 12), tokens_wanted=20, batch_size=2, hold_out=True
    )
    assert [len(own["pixel_values"]) for own, _ in found.batches] == [2, 2] and len(found.held[0]["pixel_values"]) == 2
    assert found.tokens == 20 and "no preprocessor_config.json" in caplog.text
    for own, other in (*found.batches, found.held):
        assert own["pixel_values"].shape[2:] == (8, 8) and other["pixel_values"].shape[2:] == (12, 12)
        assert torch.equal(own["pixel_values"][:, 0, 0, 0], other["pixel_values"][:, 0, 0, 0])  # one colour each
    again = load_calibration(tmp_path / "data", side(tmp_path), side(tmp_path), tokens_wanted=20, batch_size=2, seed=1)
    assert again.fingerprint != found.fingerprint and again.batches[0][0] is again.batches[0][1] and again.held is None


def test_a_corrupt_image_is_named_or_counted(tmp_path, caplog):
    good = picture(tmp_path / "good.png", (100, 100))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(good.read_bytes()[:2000])
    options = {"tokens_wanted": 100, "batch_size": 2}
    with pytest.raises(InputRefused, match=r"(text|cut)\.png is no readable image .*--skip-bad-inputs"):
        load_calibration(tmp_path, side(tmp_path), side(tmp_path), **options)
    found = load_calibration(tmp_path, side(tmp_path), side(tmp_path), **options, skip_bad=True)
    assert len(found.batches[0][0]["pixel_values"]) == 1 and "2 images cannot be read" in caplog.text
    assert f"{tmp_path.name} (1 of 3 images, 2 skipped): 1 rows" in found.description
    good.unlink()
    with pytest.raises(InputRefused, match="none of 2 images can be read"):
        load_calibration(tmp_path, side(tmp_path), side(tmp_path), **options, skip_bad=True)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"size": {"height": 9, "width": 9}}, r"makes images of \(9, 9\) pixels, V reads 8 x 8"),
        ({"size": 9, "do_center_crop": True, "crop_size": 9}, 'set crop_size to {"height": 8, "width": 8}'),
        ({"size": {"shortest_edge": 8}}, "makes images of 8 pixels"),
        ({"size": {"longest_edge": 8}}, "is not understood"),
        ({"size": 8, "image_std": [0.5, 0.0, 0.5]}, "std"),
        ({"size": 8, "image_mean": [0.5]}, "V reads 3 channels"),
        ({"size": 8, "resample": "x"}, r"preprocessor_config.json is not understood \(resample is 'x', expected a wh"),
        ({"size": 8, "resample": 6}, "resample is '6', expected a whole number from 0 to 5"),
        ({"size": "8"}, "size is '8', expected a whole number"),
        ({"size": {"height": 8, "width": 10**9}}, "width is '1000000000', expected a whole number"),
        ({"size": {"height": True, "width": 8}}, "height is 'True'"),
        ({"size": {"shortest_edge": [8]}}, r"shortest_edge is '\[8\]'"),
        ({"size": 8, "do_resize": "no"}, "do_resize is 'no', expected true or false"),
        ({"size": 8, "rescale_factor": 1e999}, "rescale_factor is 'inf'"),
        ({"size": 8, "image_mean": [0.5, float("nan"), 0.5]}, "image_mean is 'nan', expected a number"),
        ({"size": 8, "image_std": {"r": 1}}, "image_std is .*expected a number"),
    ],
)
def test_preprocessors_that_do_not_fit(tmp_path, config, message):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused, match=message):
        Preprocessor.of(tmp_path, "V", (8, 8), 3)


@pytest.mark.parametrize("channels", [2, 5])
def test_channels_that_no_image_has(tmp_path, channels):
    with pytest.raises(InputRefused, match=f"V reads {channels} channels, .*give a .safetensors of pixel_values"):
        Preprocessor.of(tmp_path, "V", (8, 8), channels)


def test_folders_that_hold_no_image(tmp_path):
    with pytest.raises(InputRefused, match="holds no image"):
        load_calibration(tmp_path, side(tmp_path), side(tmp_path), tokens_wanted=1, batch_size=1)
    text = SideInfo(Path("."), "text", "T", vocab_size=3)
    with pytest.raises(InputRefused, match="is a folder, T is a text model"):
        load_calibration(tmp_path, text, text, tokens_wanted=1, batch_size=1)


def test_null_is_what_the_class_has(tmp_path):
    """Newer versions write every setting, null where it is not set."""
    settings = {"size": 8, "crop_size": None, "do_rescale": None, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    made = Preprocessor.of(tmp_path, "V", (8, 8), 3)
    assert (made.resize, made.crop, made.scale, made.resample) == ((8, 8), None, 1 / 255, 3)


def test_large_images_are_halved_on_the_way_or_refused_unread(tmp_path, monkeypatch):
    """The limit is on what is decoded: pixels that a header claims cost nothing."""
    monkeypatch.setattr(images, "MAX_PIXELS", 40 * 40)
    grey = Image.new("L", (100, 90), 128)
    for name in ("large.jpg", "large.png"):
        grey.save(tmp_path / name)
    one = Preprocessor.of(tmp_path, "V", (8, 8), 1)
    ((pixels,), _) = read_images([tmp_path / "large.jpg"], [one], wanted=1, skip_bad=False)
    assert torch.allclose(pixels, torch.full((1, 1, 8, 8), 128 / 255 / 0.5 - 1), atol=0.02)
    with pytest.raises(InputRefused, match="large.png .*100 x 90 pixels are more than the 1600 .*--skip-bad-inputs"):
        read_images([tmp_path / "large.png"], [one], wanted=1, skip_bad=False)
    Image.new("L", (1000, 1), 128).save(tmp_path / "long.png")
    with pytest.raises(InputRefused, match="1000 x 1 pixels would become 8000 x 8"):
        read_images([tmp_path / "long.png"], [one], wanted=1, skip_bad=False)


def test_the_limit_is_of_a_planned_size_and_a_bomb_is_beyond_it():
    assert images.MAX_PIXELS * 4 == 128 << 20 and 6000 * 4000 < images.MAX_PIXELS < 12000 * 12000


def test_other_formats_under_an_image_s_name_start_nothing(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) show\n%%EOF\n")
    with pytest.raises(InputRefused, match="a.png is no readable image"):
        read_images([tmp_path / "a.png"], [Preprocessor.of(tmp_path, "V", (8, 8), 1)], wanted=1, skip_bad=False)
