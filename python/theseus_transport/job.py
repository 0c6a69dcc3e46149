"""Jobs from files to files: check everything, align or read an alignment, move, write; what the command runs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from .alignment import Alignment, by_position, check_pair, outline
from .bases import AlignJob, Bases, Progress, content_hash, quiet, recorded_base
from .checkpoint import Checkpoint
from .checks import check_left, check_rows, check_tune, check_values
from .delta import Adapter, Delta
from .errors import InputRefused
from .folder import check_writable, differences
from .links import moment_links
from .outcome import Clock, Outcome, collected_warnings, describe
from .output import Kind, Written, check_output, planned, write_updates
from .predict import Prediction, move_flops
from .recipes import Recipe
from .report import model_card
from .strength import Alpha, chosen, folders
from .transport import transport
from .update import Update

DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


@dataclass(frozen=True)
class Job:
    """What to move, from where to where; the fields that :class:`AlignJob` has too mean the same there.

    Attributes:
        source, target: folders or hub ids of the base models.
        tuned: folder of a tune of the source: a checkpoint or a LoRA adapter.
        out: folder to write.
        alpha: strength, ``match``, or several of these, which fill ``out/alpha-...``.
        output: ``auto`` writes an adapter for an adapter and a checkpoint for a checkpoint.
        out_dtype: of what is written.
        maps: folder of an alignment to apply, or None to align first; see :meth:`of_maps`.
        verify_inputs: compare the whole content of both bases with the alignment's, not headers only.
    """

    source: str
    tuned: str
    target: str
    out: Path
    calibration: str = "builtin"
    recipe: Recipe = field(default_factory=Recipe)
    alpha: Alpha | tuple[Alpha, ...] = 1.0
    output: Literal["auto", "adapter", "checkpoint", "delta"] = "auto"
    out_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str = "cpu"
    tokens: int | None = None
    batch_size: int = 8
    seed: int = 0
    held_out: bool = True
    skip_bad_inputs: bool = False
    leave: tuple[str, ...] = ()
    overwrite: bool = False
    allow_pickle: bool = False
    maps: str | None = None
    verify_inputs: bool = False

    @classmethod
    def of_maps(
        cls, maps: str, tuned: str, out: Path, *, source: str | None = None, target: str | None = None, **more: Any
    ) -> Job:
        """Apply the alignment in ``maps``, to the bases it records unless others are named."""
        recorded = Alignment.load(maps)
        places = [source, target]
        for i, side in enumerate(("source", "target")):
            places[i] = places[i] or recorded_base(recorded, side).get("reference")
            if not isinstance(places[i], str):
                raise InputRefused(f"{maps} does not say which {side} it was made for; give --{side}")
        return cls(str(places[0]), tuned, str(places[1]), out, recipe=recorded.recipe, maps=maps, **more)

    @property
    def alignment(self) -> AlignJob:
        """The part that aligns."""
        shared = {name: getattr(self, name) for name in AlignJob.__dataclass_fields__}
        return AlignJob(**shared)


class AlignSession:
    """The checked inputs of an :class:`AlignJob`; opening it refuses what cannot work, before anything heavy runs."""

    def __init__(self, job: AlignJob) -> None:
        self.job, self.bases = job, Bases(job)
        check_pair(*self.bases.layouts, job.recipe)
        check_values(*self.bases.checkpoints)
        self.prediction = self.bases.prediction()
        links = moment_links(*self.bases.layouts, by_position(*self.bases.layouts)).values()
        self.bytes_out = sum(8 * link.source.width * link.target.width for link in links)
        check_writable(job.out, self.bytes_out, overwrite=job.overwrite, inputs=self.bases.inputs)
        self.bases.check_memory(self.prediction.nbytes)

    def outcome(self, **known: Any) -> Outcome:
        return _outcome(self, kind="alignment", job=describe(self.job, *self.bases.checkpoints), **known)

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do; nothing is computed or written."""
        with collected_warnings() as warnings:
            data = self.bases.calibration()
        return self.outcome(calibration=data.description, tokens=data.tokens, warnings=warnings)

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align and save, with fingerprints of both bases.

        Raises:
            InputRefused, ResourceError, NumericalError: nothing is left behind.
        """
        job, clock = self.job, Clock()
        with collected_warnings() as warnings:
            alignment = self.bases.align(progress, clock.lap)
            for side, checkpoint in zip(("source", "target"), self.bases.checkpoints, strict=True):
                alignment.provenance[side]["content_hash"] = content_hash(checkpoint)
            outcome = self.outcome(**_told(alignment), warnings=warnings)
            outcome.job["recipe"] = asdict(alignment.recipe)
            record = {"outcome": asdict(outcome)}
            alignment.save(job.out, overwrite=job.overwrite, metadata=record, inputs=self.bases.inputs)
            clock.lap("write")
        return clock.finish(outcome, job.out)


class Session:
    """The checked inputs of a job; opening it refuses what cannot work, before anything heavy runs."""

    def __init__(self, job: Job) -> None:
        self.job, self.alphas = job, chosen(job.alpha)
        self.bases = Bases(job.alignment)
        source, target = self.bases.checkpoints
        self.tuned = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle)
        if self.tuned.kind == "adapter":
            self.delta = Delta(source, adapter=Adapter.of(self.tuned))
        else:
            self.delta = Delta.between(source, self.tuned)
        self.kind: Kind = _kind(job, self.tuned)
        self.dtype = DTYPES[job.out_dtype]
        self.inputs = [*self.bases.inputs, self.tuned.folder, *([Path(job.maps)] if job.maps else [])]
        check_values(source, target, self.tuned)
        if self.tuned.kind == "checkpoint":
            check_tune(source, self.tuned, self.bases.layouts[0])
        self.alignment = self._opened() if job.maps else None
        draft = self.transport(self.alignment or outline(*self.bases.layouts, job.recipe))
        self.coverage = draft.coverage
        check_left(job.leave, self.coverage, source, self.tuned)
        self.places = folders(job.out, self.alphas, overwrite=job.overwrite)
        self.bytes_out = check_output(
            draft, self.places, self.kind, dtype=self.dtype, overwrite=job.overwrite, inputs=self.inputs
        )
        self.steps, flops = len(planned(draft, self.kind)), move_flops(draft)
        if self.alignment:
            self.prediction = Prediction.of_moving(self.alignment, draft, flops)
        else:
            self.prediction = self.bases.prediction(move=flops)
        self.bases.check_memory(self.prediction.nbytes)

    def transport(self, alignment: Alignment) -> Update:
        return transport(alignment, self.delta, self.bases.target, leave=self.job.leave)

    def outcome(self, **known: Any) -> Outcome:
        job = describe(self.job, *self.bases.checkpoints, self.tuned)
        return _outcome(self, kind=self.kind, job=job, coverage=[asdict(row) for row in self.coverage], **known)

    def rehearse(self) -> Outcome:
        """What :meth:`run` would do, calibration data included; nothing is computed or written."""
        with collected_warnings() as warnings:
            told = _told(self.alignment) if self.alignment else {}
            if not self.alignment:
                data = self.bases.calibration()
                told = {"calibration": data.description, "tokens": data.tokens}
            check_rows(self.coverage, *self.bases.checkpoints)
        return self.outcome(**told, warnings=warnings)

    def run(self, progress: Progress = quiet) -> Outcome:
        """Align unless an alignment is applied, move and write.

        Raises:
            InputRefused, ResourceError, NumericalError: nothing is left behind.
        """
        clock = Clock()
        with collected_warnings() as warnings:
            check_rows(self.coverage, *self.bases.checkpoints)
            alignment = self.alignment or self.bases.align(progress, clock.lap)
            update = self.transport(alignment)
            self.coverage = update.coverage  # a draft may have guessed
            alphas = [a.resolved(update) for a in self.alphas]
            outcome = self.outcome(**_told(alignment), warnings=warnings)
            outcome.job["recipe"] = asdict(alignment.recipe)  # its floor follows the models' precision
            outcome.alphas = [
                {"asked": a.asked, "alpha": value, "written": str(place)}
                for a, value, place in zip(self.alphas, alphas, self.places, strict=True)
            ]
            outputs = [self._written(place, alpha) for place, alpha in zip(self.places, alphas, strict=True)]

            def known(i: int) -> Outcome:
                """The outcome as one folder tells it, once its tensors are written."""
                outcome.alphas[i]["rounding"] = outputs[i].rounding.as_dict()
                said = [*warnings, *update.warnings, *outputs[i].rounding.warnings()]
                job = {**outcome.job, "alpha": alphas[i]}
                return replace(outcome, job=job, alphas=[outcome.alphas[i]], warnings=said)

            for i, out in enumerate(outputs):
                out.files = {**(out.files or {}), "README.md": lambda i=i: model_card(known(i))}  # type: ignore[misc]
                out.metadata = lambda i=i: {"outcome": asdict(known(i)), "provenance": alignment.provenance}
            write_updates(
                update,
                outputs,
                self.kind,
                dtype=self.dtype,
                base_name=self.job.target,
                overwrite=self.job.overwrite,
                inputs=self.inputs,
                progress=progress("write", self.steps),
            )
            clock.lap("move and write")
            rounded = [text for out in outputs for text in out.rounding.warnings()]
            outcome.warnings = [*warnings, *dict.fromkeys(update.warnings), *rounded]
        return clock.finish(outcome, self.job.out)

    def _opened(self) -> Alignment:
        assert self.job.maps
        whole = self.job.verify_inputs
        if whole and (damaged := differences(self.job.maps)):
            raise InputRefused(f"{self.job.maps} is damaged: {'; '.join(damaged)}; align again")
        alignment = Alignment.load(self.job.maps)
        self.bases.check_identity(alignment, self.job.maps, whole=whole)
        return alignment

    def _written(self, place: Path, alpha: float) -> Written:
        files: dict[str, Any] = {}
        if self.kind != "adapter":
            target = self.bases.target
            config = {k: v for k, v in target.config.items() if k != "torch_dtype"} if self.dtype else target.config
            if self.dtype and self.kind == "checkpoint":
                config = {**config, "dtype": self.job.out_dtype}
            files["config.json"] = json.dumps(config, indent=2)
            files |= {n: target.folder / n for n in TOKENIZER_FILES if (target.folder / n).is_file()}
        return Written(place, alpha, files)


def _outcome(session: Session | AlignSession, **known: Any) -> Outcome:
    start: dict[str, Any] = {
        "coverage": [],
        "warnings": [],
        "calibration": session.job.calibration,
        "tokens": session.bases.tokens_wanted,
        "bytes_out": session.bytes_out,
        "predicted_bytes": session.prediction.nbytes,
        "predicted_seconds": session.prediction.seconds,
    }
    return Outcome(**{**start, **known})


def _told(alignment: Alignment) -> dict[str, Any]:
    """What an alignment says of itself."""
    known = alignment.provenance
    return {
        "maps": [asdict(r) for r in alignment.reports],
        "blocks": alignment.blocks,
        "lost_heads": alignment.lost,
        "quality": known.get("quality", []),
        "calibration": known.get("calibration", "unknown"),
        "tokens": known.get("tokens", 0),
    }


def _kind(job: Job, tuned: Checkpoint) -> Kind:
    if job.output == "auto":
        return "adapter" if tuned.kind == "adapter" else "checkpoint"
    if job.output == "adapter" and tuned.kind != "adapter":
        raise InputRefused(f"TUNED {tuned.folder} is a full checkpoint; write it as --output checkpoint or delta")
    return job.output
