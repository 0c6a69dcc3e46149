"""Seeded cases of hostile input for every verb: each ends with a known exit code, soon, and writes nothing elsewhere.

`make fuzz CASES=2500 SEED=7` runs fresh ones and prints what it finds, `PYTHONPATH=tests python -m helpers.fuzz
--only 12` one of them, in full.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from theseus_transport.cli.main import app
from theseus_transport.cli.options import ALL, _recipe_options
from theseus_transport.streaming.passage import Passage
from typer.testing import CliRunner

from helpers import mutations, tiny_models

CODES = {0, 2, 3, 4, 5}  # of the command; 1 is a traceback
HANG = 120  # seconds; the longest good case takes about one
RAW = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]")  # must not reach a terminal
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


class World:
    """Models, tunes, data and results on disk; `renewed` before every case.

    Attributes:
        root: where cases find it; verbs: name -> arguments of a call that works.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.kept = root / "world", root / "kept"
        self.root.mkdir(parents=True)
        torch.manual_seed(0)
        self._models()
        self._data()
        text, image = ("source", "lora", "target"), ("vit/source", "vit/tuned", "vit/target")
        ids, small = ("--calibration", "ids.safetensors"), ("--tokens", "64")
        options = (*ids, *small)
        self.verbs: dict[str, tuple[str, ...]] = {
            "lora": ("transport", *text, "out", *options),
            "full": ("transport", "source", "tuned", "target", "out", *options, "--output", "delta"),
            "checkpoint": ("transport", "source", "tuned", "target", "out", *options, "--alpha", "match"),
            "text": ("transport", *text, "out", "--calibration", "text.txt", *small),
            "lines": ("transport", *text, "out", "--calibration", "lines.jsonl", *small, "--skip-bad-inputs"),
            "chats": ("transport", *text, "out", "--calibration", "chats.jsonl", *small, "--dry-run"),
            "images": ("transport", *image, "out", "--calibration", "images", *small),
            "config": ("transport", *text, "out", "--config", "options.yaml", *options),
            "align": ("align", "source", "target", "out", *options),
            "apply": ("apply", "maps", "lora", "out"),
            "apply full": ("apply", "maps", "tuned", "out", "--verify-inputs"),
            "plan": ("plan", *text, "out", *options),
            "rehearse": ("transport", *text, "out", *options, "--dry-run"),
            "resume": ("transport", *text, "begun", *options, "--resume"),
            "offload": ("transport", *text, "out", *options, "--offload-folder", "offload"),
            "inspect adapter": ("inspect", "adapter"),
            "inspect maps": ("inspect", "maps"),
            "verify adapter": ("verify", "adapter"),
            "verify checkpoint": ("verify", "moved"),
            "verify maps": ("verify", "maps"),
        }
        with within(self.root):
            for arguments in (
                ("align", "source", "target", "maps", *options),
                ("apply", "maps", "lora", "adapter"),
                ("apply", "maps", "tuned", "moved"),
            ):
                assert (result := called(arguments)).exit_code == 0, result.output
            with patch.object(Passage, "_visit", _interrupted(Passage._visit)):
                assert called(("transport", *text, "begun", *options)).exit_code == 130
        shutil.copytree(self.root, self.kept, symlinks=True)

    def _models(self) -> None:
        for side in tiny_models.SIZES:
            model = tiny_models.llama(side, depth=1)
            model.save_pretrained(self.root / side)
            tiny_models.tokenizer(self.root / side, 280)
            (self.root / side / "chat_template.jinja").write_text(CHAT)
            image = tiny_models.vit(side)
            image.save_pretrained(self.root / "vit" / side)
            settings = (
                '{"size": {"height": 8, "width": 8}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.4, 0.3]}'
            )
            (self.root / "vit" / side / "preprocessor_config.json").write_text(settings)
            if side == "source":
                tiny_models.tuned(model).save_pretrained(self.root / "tuned")
                tiny_models.adapter(self.root / "lora", model, target_modules=["q_proj", "down_proj"])
                tiny_models.tuned(image).save_pretrained(self.root / "vit" / "tuned")

    def _data(self) -> None:
        save_file({"input_ids": torch.randint(0, 300, (12, 16))}, self.root / "ids.safetensors")
        (self.root / "text.txt").write_text(tiny_models.TEXT * 20)
        (self.root / "lines.jsonl").write_text('{"text": "the quick brown fox jumps over"}\n' * 40)
        chat = (
            '{"messages": [{"role": "user", "content": "the quick brown"}, {"role": "assistant", "content": "fox"}]}\n'
        )
        (self.root / "chats.jsonl").write_text(chat * 40)
        (self.root / "options.yaml").write_text("alpha: 0.5\nseed: 1\nleave: ['*.o_proj']\nrecipe: coherent\n")
        (self.root / "images").mkdir()
        for i, mode in enumerate(("RGB", "L", "RGBA", "RGB", "RGB", "P")):
            pixels = np.random.default_rng(i).integers(0, 255, (10, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(self.root / "images" / f"{i}.png")
        (self.root / "outside").mkdir()
        (self.root / "outside" / "secret").write_text("secret")

    def renewed(self) -> None:
        """All as it was; times too, which fingerprints tell."""
        shutil.rmtree(self.root)
        shutil.copytree(self.kept, self.root, symlinks=True)

    def seen(self) -> dict[str, tuple[int, ...]]:
        """What lies there, by name: everything but what a case may write."""
        ours = re.compile(r"^\.{0,2}(out|begun|offload)(\W|$)")
        return {
            str(path.relative_to(self.root)): (stat.st_mode, stat.st_size, S_ISDIR(stat.st_mode) or stat.st_mtime_ns)
            for path in self.root.rglob("*")
            if not ours.match(path.relative_to(self.root).parts[0])
            for stat in (path.lstat(),)
        }


def _interrupted(visit: Callable[..., None]) -> Callable[..., None]:
    def once(self: Passage, *arguments: object) -> None:
        if self.work.step:
            raise KeyboardInterrupt
        visit(self, *arguments)

    return once


@contextmanager
def within(folder: Path) -> Iterator[None]:
    here = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def called(arguments: tuple[str, ...]):  # noqa: ANN201
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "1000"}, catch_exceptions=True)


class Case(NamedTuple):
    """What was broken, what was called, what was wrong with the answer; empty where nothing was."""

    broken: str
    arguments: tuple[str, ...]
    fault: str
    output: str


def prepared(world: World, chance: random.Random) -> tuple[str, tuple[str, ...]]:
    """A world with something broken, and the call that meets it."""
    verb = chance.choice(sorted(world.verbs))
    arguments = world.verbs[verb]
    folders = [world.root / name for name in arguments[1:] if (world.root / name).is_dir()]
    folders += [world.root / ".begun.theseus"] * (2 if verb == "resume" else 0)
    folders += [world.root / name for name in ("source", "target") if verb.startswith(("apply", "verify"))][:1]
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    files += [world.root / name for name in arguments if (world.root / name).is_file()] * 4
    files += [path for path in files if path.suffix in (".json", ".yaml")]
    said = []
    for _ in range(chance.choice((1, 1, 1, 2))):
        path = chance.choice(files)
        if path.is_symlink() or not path.is_file():
            continue
        if path.suffix == ".yaml" and chance.random() < 0.8:
            path.write_text(text := _settings(chance))
            said.append(f"{path.name} holds {text[:60]!r}")
        else:
            said.append(f"{path.parent.name}/{mutations.broken(path, chance)}")
    return f"{verb}: {'; '.join(said)}", arguments + ("--json",) * (chance.random() < 0.3)


def _settings(chance: random.Random) -> str:
    """A config file: something odd, or an option of any value."""
    if chance.random() < 0.5:
        return chance.choice(mutations.YAMLS)
    keys = chance.sample(sorted(ALL | _recipe_options()), chance.choice((1, 1, 2)))
    return "".join(f"{key}: {json.dumps(chance.choice(mutations.VALUES))}\n" for key in keys)


def run(world: World, seed: int, number: int) -> Case:
    """One case, always the same for its numbers."""
    chance = random.Random(f"{seed} {number}")
    world.renewed()
    broken, arguments = prepared(world, chance)
    before = world.seen()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(HANG)
    try:
        with within(world.root):
            result = called(arguments)
    finally:
        signal.alarm(0)
    fault = ""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        fault = "".join(traceback.format_exception(result.exception)[-3:])
    elif result.exit_code not in CODES:
        fault = f"exit {result.exit_code}"
    elif (after := world.seen()) != before:
        fault = f"wrote {sorted(before.items() ^ after.items())[:3]}"
    elif raw := RAW.search(result.output):
        fault = f"raw {raw[0]!r} on the screen"
    return Case(broken, arguments, fault, result.output)


def _hang(*_: object) -> None:
    raise TimeoutError(f"still running after {HANG} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--cases", type=int, default=2500)
    parser.add_argument("--only", type=int)
    chosen = parser.parse_args()
    found = 0
    with tempfile.TemporaryDirectory() as place:
        world = World(Path(place))
        for number in [chosen.only] if chosen.only is not None else range(chosen.cases):
            case = run(world, chosen.seed, number)
            if case.fault or chosen.only is not None:
                print(
                    f"--- {chosen.seed} {number}: {case.broken!r}\n    {' '.join(case.arguments)}\n{case.fault}",
                    flush=True,
                )
            if chosen.only is not None:
                print(repr(case.output))
            found += bool(case.fault)
            if number % 100 == 99:
                print(f"{number + 1} cases", file=sys.stderr, flush=True)
    print(f"seed {chosen.seed}: {found} of {chosen.cases} cases found something")
    raise SystemExit(bool(found))


if __name__ == "__main__":
    main()
