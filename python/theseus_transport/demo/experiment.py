"""The demo: fine-tunes on real images move between two small vision transformers, both ways, and are measured.

Two ViTs of unlike width are pretrained independently on scikit-learn's digits. Each is fine-tuned, classifier frozen,
on shifted images; every fine-tune is moved to the other model and compared with that model as it was (zero-shot), with
updates that know nothing of the tune, with its classifier refitted, and with its own fine-tune (ceiling).
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..alignment.align import align
from ..errors import InputRefused
from ..streaming.whole_models import transport
from ..updates.delta import Delta
from .data import SHIFTS, Split, generator_of, jitter, load_splits, pixels, shifted
from .models import accuracy, build, fit, random_like, random_tune, refitted
from .report import plot
from .results import Cell, DemoResult, DemoSettings, write_json
from .work import workers, workshop

RECIPES = ("paper", "coherent", "effect")
UPDATES = ("full", "lora")
T = TypeVar("T")
Progress = Callable[[str, int], Callable[[], object]]  # stage and its number of steps -> call after every step


def _folder(root: Path, seed: int, width: int, shift: str = "", update: str = "base") -> Path:
    path = root / "-".join(filter(None, (str(seed), str(width), shift, update)))
    path.mkdir(exist_ok=True)
    return path


def _build(settings: DemoSettings, width: int) -> nn.Module:
    return build(width, depth=settings.depth, heads=settings.heads)


def _load(settings: DemoSettings, width: int, path: Path) -> nn.Module:
    model = _build(settings, width).eval()
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model


def _splits(settings: DemoSettings, seed: int) -> dict[str, Split]:
    return load_splits(seed, train=settings.train)


def pretrain(settings: DemoSettings, root: Path, seed: int, width: int) -> float:
    """Train one model on jittered images, save it, and return its test accuracy."""
    splits, generator = _splits(settings, seed), generator_of("pretrain", seed, width)
    torch.manual_seed(generator.initial_seed())
    model = _build(settings, width)
    change = partial(jitter, generator=generator, strength=2.0)
    fit(model, splits["train"], change, generator, steps=settings.pretrain_steps, batch=settings.batch, rate=3e-3)
    save_file(model.state_dict(), _folder(root, seed, width) / "model.safetensors")
    return accuracy(model, splits["test"])


def tune(settings: DemoSettings, root: Path, seed: int, width: int, shift: str, update: str) -> float:
    """Fine-tune one model on one shift, classifier frozen, save it (LoRA: a PEFT adapter); return its test accuracy."""
    splits, generator = _splits(settings, seed), generator_of("tune", seed, width, shift, update)
    model: Any = _load(settings, width, _folder(root, seed, width))
    if update == "lora":
        model = _with_lora(model, settings.rank, seed=generator.initial_seed())
    steps = {"full": settings.full_steps, "lora": settings.lora_steps}[update]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and "classifier" not in name)
    change = lambda images: SHIFTS[shift](jitter(images, generator), generator)  # noqa: E731
    fit(model, splits["train"], change, generator, steps=steps, batch=settings.batch, rate=1e-3)
    path = _folder(root, seed, width, shift, update)
    if update == "lora":
        model.save_pretrained(path / "adapter")
        model = model.merge_and_unload()
    save_file(model.state_dict(), path / "model.safetensors")
    return accuracy(model, shifted(splits, "test", seed, shift))


def _with_lora(model: nn.Module, rank: int, *, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers under an old name
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers))


def move(settings: DemoSettings, root: Path, seed: int, source: int, target: int) -> list[Cell]:
    """Move all of the source's fine-tunes to the target, by every recipe; the ceiling is filled in by the caller.

    Calibration is label-free: half of the training images as they are, the other half under the shift.
    """
    splits, ahead = _splits(settings, seed), settings.train // 2
    bases = {width: _load(settings, width, _folder(root, seed, width)) for width in (source, target)}
    base, updates = bases[target], dict[tuple[str, str], dict[str, dict[str, Tensor]]]()
    for shift in settings.shifts:
        seen = shifted(splits, "train", seed, shift).images[ahead:]
        images = pixels(torch.cat([splits["train"].images[:ahead], seen]))
        batches = [{"pixel_values": batch} for batch in images.split(300)]
        alignments = {recipe: align(bases[source], base, batches, recipe=recipe) for recipe in RECIPES}
        for kind in UPDATES:
            folder = _folder(root, seed, source, shift, kind)
            tuned = _load(settings, source, folder)
            if kind == "lora":
                delta = Delta.from_adapter(folder / "adapter", bases[source])
            else:
                delta = Delta.between(bases[source], tuned)
            found = {recipe: dict(transport(alignment, delta, base)) for recipe, alignment in alignments.items()}
            found["refitted"] = refitted(bases[source], tuned, base, images)
            found["random"] = random_like(found["effect"], generator_of("random", seed, source, shift, kind))
            drawn = random_tune(bases[source], tuned, generator_of("random tune", seed, source, shift, kind))
            found["random_tune"] = dict(transport(alignments["effect"], Delta.between(bases[source], drawn), base))
            updates[shift, kind] = found
    cells = []
    for (shift, kind), found in updates.items():
        test = shifted(splits, "test", seed, shift)
        other = settings.shifts[settings.shifts.index(shift) - 1]
        found["wrong"] = updates[other, kind]["effect"]
        scores = {way: accuracy(base, test, update) for way, update in found.items()}
        cells.append(Cell(seed, source, target, shift, kind, accuracy(base, test), **scores, ceiling=math.nan))
    return cells


def run_demo(settings: DemoSettings, out: Path, progress: Progress | None = None) -> DemoResult:
    """Run the experiment and write ``demo.json`` and ``demo.png`` into ``out`` (created).

    Args:
        progress: told of every stage and step (pretraining, fine-tuning, moving), or None for silence.

    Raises:
        InputRefused: scikit-learn or matplotlib is not installed, or ``out`` cannot be written.
    """
    for module in ("sklearn", "matplotlib"):
        if importlib.util.find_spec(module) is None:
            raise InputRefused(f"the demo needs {module}; pip install theseus-transport[demo]")
    started = time.monotonic()
    seeds, directions = range(1, settings.seeds + 1), (settings.widths, settings.widths[::-1])
    models = [(s, w) for w in sorted(settings.widths, reverse=True) for s in seeds]  # the slowest first
    tunes = [(s, w, shift, kind) for s, w in models for shift in settings.shifts for kind in UPDATES]
    moves = [(s, *d) for s in seeds for d in directions]
    with torch.random.fork_rng(), workshop(out) as folder:
        with workers(settings.workers) as run:

            def stage(label: str, job: Callable[..., T], keys: Sequence[tuple[Any, ...]]) -> dict[tuple[Any, ...], T]:
                advance, results = progress(label, len(keys)) if progress else lambda: None, {}
                for key, result in run(partial(job, settings, folder), keys):
                    results[key] = result
                    advance()
                return results

            pretrained = stage("pretraining", pretrain, models)
            ceilings = stage("fine-tuning", tune, tunes)
            moved = stage("moving", move, moves)
        cells = [replace(c, ceiling=ceilings[c.seed, c.target, c.shift, c.update]) for key in moves for c in moved[key]]
        result = DemoResult(settings, tuple(cells), pretrained, time.monotonic() - started)
        made = write_json(result, folder / "demo.json"), plot(result, folder / "demo.png")
        out.mkdir(parents=True, exist_ok=True)
        for path in made:
            os.replace(path, out / path.name)
    return result
