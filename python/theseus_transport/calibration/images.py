"""A folder of images as calibration data: each model sees them as its own preprocessor would show them."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputRefused
from ..files.headers import if_inside, open_regular, read_json

log = logging.getLogger(__name__)
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")  # of PIL's, some of which start other programs
MAX_PIXELS = 1 << 25  # of an image as it is decoded: 128 MiB
Size = tuple[int, int]  # height, width in pixels
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
ON_THE_WAY = {"P": "RGBA", "PA": "RGBA", "La": "LA", "LAB": "RGB"}  # modes that PIL converts, or converts quietly, so
WHITE = {"F": (1, 255, 65535), "I": (255, 65535)}  # of modes that say nothing: the least that no value exceeds
BILINEAR = 2  # PIL's numbers, which preprocessor_config.json uses


@dataclass(frozen=True)
class Preprocessor:
    """How a model wants its images: `resize` to a size or a shortest edge, centre `crop`, scale, normalise."""

    resize: Size | int | None
    crop: Size | None
    resample: int
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, folder: Path, name: str, image: Size, channels: int) -> Preprocessor:
        """Read preprocessor_config.json of a folder; without one the shortest edge fits, means and deviations are 0.5.

        Raises InputRefused if it makes images of another size or number of channels than the model reads.
        """
        if channels not in MODES:
            raise InputRefused(
                f"{name} reads {channels} channels, images have 1, 3 or 4; give a .safetensors of pixel_values"
            )
        path = folder / "preprocessor_config.json"
        given = read_json(path) if if_inside(folder, path.name) else {}
        if not given:
            log.warning("%s has no preprocessor_config.json: images become %d x %d, mean and std 0.5", name, *image)
            return cls(min(image), image, BILINEAR, 1 / 255, (0.5,) * channels, (0.5,) * channels)
        try:
            given = {key: value for key, value in given.items() if value is not None}  # null: as the class has it
            size, crops = given.get("size", image), _flag(given, "do_center_crop", False)
            size = size if crops and type(size) is int else _size(size)  # one number before a crop: the shortest edge
            cropped = _size(given.get("crop_size", image)) if crops else None
            rescales, normal = _flag(given, "do_rescale", True), _flag(given, "do_normalize", True)
            found = cls(
                resize=size if _flag(given, "do_resize", True) else None,
                crop=(cropped, cropped) if isinstance(cropped, int) else cropped,
                resample=_whole(given.get("resample", BILINEAR), "resample", range(6)),
                scale=_number(given.get("rescale_factor", 1 / 255), "rescale_factor") if rescales else 1.0,
                mean=_vector(given.get("image_mean", 0.5) if normal else 0.0, "image_mean", channels),
                std=_vector(given.get("image_std", 0.5) if normal else 1.0, "image_std", channels),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputRefused(f"{path} is not understood ({error}); was it edited?") from error
        if (made := found.crop or found.resize) != image:
            raise InputRefused(
                f"{path} makes images of {made} pixels, {name} reads {image[0]} x {image[1]} by its config; set "
                f'{"crop_size" if crops else "size"} to {{"height": {image[0]}, "width": {image[1]}}} in a copy, '
                "also where the model would interpolate positions"
            )
        if not len(found.mean) == len(found.std) == channels or not all(found.std):
            raise InputRefused(f"{path} has mean {found.mean} and std {found.std}, {name} reads {channels} channels")
        return found

    def __call__(self, picture: Any) -> torch.Tensor:
        """A PIL image of any mode as floats [channels, height, width].

        Alpha is dropped where the model reads none, as transformers does; integers of more than 8 bits and floats are
        brought to 8 bits as :func:`_eight_bits` says, where PIL would clip them at 255.

        Raises ValueError if a value is not finite.
        """
        picture = _eight_bits(picture) if picture.mode[0] in "IF" else picture
        picture = picture.convert(ON_THE_WAY.get(picture.mode, picture.mode)).convert(MODES[len(self.mean)])
        if self.resize is not None:
            height, width = self.resize if isinstance(self.resize, tuple) else _shortest(picture.size, self.resize)
            if height * width > MAX_PIXELS:
                raise ValueError(f"{picture.width} x {picture.height} pixels would become {width} x {height}")
            picture = picture.resize((width, height), self.resample)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        if self.crop is not None:
            pixels = _centre(pixels, self.crop)
        return (pixels * self.scale - torch.tensor(self.mean)[:, None, None]) / torch.tensor(self.std)[:, None, None]


def find_images(folder: Path) -> list[Path]:
    """Every image of a folder and those within it, by name."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise InputRefused(f"calibration {folder} holds no image ({', '.join(SUFFIXES)})")
    return found


def largest(paths: Sequence[Path]) -> int:
    """Pixels of the largest image, by their headers, as it is decoded; those that cannot be read have none."""
    try:
        from PIL import Image
    except ImportError:
        return 0
    most, unread = 0, suppress(InputRefused, OSError, ValueError, SyntaxError, Image.DecompressionBombError)
    for path in paths:
        with unread, open_regular(path) as file, Image.open(file, formats=FORMATS) as picture:
            most = max(most, picture.width * picture.height)
    return min(most, MAX_PIXELS)


def read_images(
    paths: Sequence[Path], preprocessors: Sequence[Preprocessor], *, wanted: int, skip_bad: bool
) -> tuple[list[torch.Tensor], int]:
    """The first `wanted` readable images, [n, channels, height, width] for each preprocessor, and how many are not.

    Raises InputRefused, naming the file, for one that cannot be read; with `skip_bad` it is left out, and counted.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise InputRefused("images need Pillow: pip install pillow, or give a .safetensors of pixel_values") from error
    made: list[torch.Tensor] = []
    bad: list[Path] = []
    count, most = 0, min(wanted, len(paths))
    for path in paths:
        if count == most:
            break
        try:
            with open_regular(path) as file, Image.open(file, formats=FORMATS) as picture:
                _keep_small(picture)
                pixels = [each(picture) for each in preprocessors]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's ways to say broken
            if not skip_bad:
                raise InputRefused(f"{path} is no readable image ({error}); remove it, or --skip-bad-inputs") from error
            bad.append(path)
            continue
        made = made or [each.new_empty(most, *each.shape) for each in pixels]
        for all_of_it, one in zip(made, pixels, strict=True):
            all_of_it[count] = one
        count += 1
    if bad:
        log.warning("%d images cannot be read and were left out, first %s", len(bad), bad[0])
    if not made:
        raise InputRefused(f"none of {len(paths)} images can be read, first {paths[0]}")
    return [side[:count] for side in made], len(bad)


def _keep_small(picture: Any) -> None:
    """Have a JPEG of more than MAX_PIXELS halved while it is decoded, until it is small enough.

    Raises ValueError where the format has no such way: decoding it would take memory that nobody planned.
    """
    width, height = picture.size
    part = next((n for n in (1, 2, 4, 8) if width * height <= MAX_PIXELS * n * n), 1)
    if part > 1:
        picture.draft(None, (width // part, height // part))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels are more than the {MAX_PIXELS} that are read; make it smaller")


def _eight_bits(picture: Any) -> Any:
    """A grey image of integers or floats as one of mode L.

    16 bits: white is 65535. Modes I and F do not say what white is: it is 1 where no value exceeds that (F alone), else
    255, else 65535. With values below 0 or above 65535 the least becomes black and the largest white.
    """
    from PIL import Image

    values = np.asarray(picture).astype(np.float32)
    black, white = float(values.min()), float(values.max())
    if not white - black <= float(np.finfo(np.float32).max):
        raise ValueError(f"mode {picture.mode}, and not all values are finite")
    scales = WHITE.get(picture.mode, (65535,))
    if black >= 0 and white <= scales[-1]:
        black, white = 0, next(scale for scale in scales if white <= scale)
    values -= black
    values *= 255 / ((white - black) or 1)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _size(given: Any) -> Size | int:
    """Of a `size`: one number or [height, width] as given in old files, height and width, or shortest_edge."""
    if isinstance(given, dict) and "shortest_edge" in given:
        return _whole(given["shortest_edge"], "shortest_edge")
    if isinstance(given, dict):
        return _whole(given["height"], "height"), _whole(given["width"], "width")
    height, width = given if isinstance(given, (list, tuple)) else (given, given)
    return _whole(height, "size"), _whole(width, "size")


def _vector(given: Any, key: str, channels: int) -> tuple[float, ...]:
    return tuple(_number(x, key) for x in (given if isinstance(given, list) else [given] * channels))


def _number(value: Any, key: str) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{key} is {str(value)[:80]!r}, expected a number")
    return float(value)


def _whole(value: Any, key: str, allowed: range = range(1, 1 << 16)) -> int:
    if type(value) is not int or value not in allowed:
        raise ValueError(f"{key} is {str(value)[:80]!r}, expected a whole number from {allowed[0]} to {allowed[-1]}")
    return value


def _flag(given: Mapping[str, Any], key: str, default: bool) -> bool:
    if type(value := given.get(key, default)) is not bool:
        raise ValueError(f"{key} is {str(value)[:80]!r}, expected true or false")
    return value


def _shortest(size: tuple[int, int], edge: int) -> Size:
    """(height, width) whose shorter side is `edge`, of a PIL size (width, height)."""
    width, height = size
    return (edge, int(edge * width / height)) if height <= width else (int(edge * height / width), edge)


def _centre(pixels: torch.Tensor, crop: Size) -> torch.Tensor:
    """The middle of [channels, height, width], zeros where the image is smaller."""
    out = pixels.new_zeros(len(pixels), *crop)
    ours, theirs = [], []
    for have, want in zip(pixels.shape[1:], crop, strict=True):
        start = (have - want) // 2 if have >= want else 0
        place = (want - have + 1) // 2 if want > have else 0
        span = min(have, want)
        ours.append(slice(start, start + span))
        theirs.append(slice(place, place + span))
    out[:, theirs[0], theirs[1]] = pixels[:, ours[0], ours[1]]
    return out
