"""Calibration "self": the tune, whole in memory for once, and the text that it says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from ..budget.plan import RUNTIME
from ..calibration.prompts import Prompt, read_prompts
from ..calibration.sampling import TEXTS, sampled_batches
from ..calibration.text import Tokenizer
from ..errors import InputRefused, ResourceError
from ..files.checkpoint import Checkpoint
from ..files.companions import GENERATION, has_tokenizer
from ..files.headers import if_inside, read_json
from ..machine import available_memory, free_device_memory, resident_memory
from ..models.base import BELONG
from ..models.geometry import Geometry
from ..models.loading import language_model_of
from ..updates.adapter import Adapter
from ..updates.merged import Merged
from .settings import AlignJob

OF_PROMPT = 16  # bytes while prompts are read, for each of them as stored
ELSEWHERE = "sample elsewhere, and give --calibration the text as a file"


@dataclass(frozen=True)
class SelfText:
    """The tune of a job as a model that writes text.

    Attributes:
        source, geometry: the base it is a tune of.
        tuned: as it lies on disk; tensors: of the tuned model.
        head: the name of its vocabulary head among them; None: that is its token embedding.
        length: tokens of a text at most.
    """

    job: AlignJob
    source: Checkpoint
    geometry: Geometry
    device: torch.device
    tuned: Checkpoint
    tensors: Checkpoint | Merged
    head: str | None
    length: int

    @classmethod
    def of(cls, job: AlignJob, source: Checkpoint, geometry: Geometry, device: torch.device, length: int) -> SelfText:
        """Headers are read alone.

        Raises:
            InputRefused: the tune is no language model.
        """
        assert job.tuned
        tuned, family = Checkpoint.open(job.tuned, allow_pickle=job.allow_pickle), geometry.family
        whole, name = tuned.kind == "checkpoint", f"{family.heads.get('vocabulary')}.weight"
        tensors = tuned if whole else Merged(source, Adapter.of(tuned), family)
        tied = Geometry.of(tuned.config).tied if tuned.config else geometry.tied
        head = family.spelled(tensors).get(name)
        if tied and not (isinstance(tensors, Merged) and head in tensors.changed):
            return cls(job, source, geometry, device, tuned, tensors, None, length)
        if head is None:
            raise InputRefused(f"--calibration self: TUNED {tuned.folder} has no vocabulary head to write text with; "
                               "give --calibration text of what it is for")  # fmt: skip
        return cls(job, source, geometry, device, tuned, tensors, head, length)

    @property
    def nbytes(self) -> int:
        """Bytes of the model while it writes: weights, keys and values of all texts, logits, and one step's states."""
        g, size, wide = self.geometry, self._dtype.itemsize, max(self.geometry.middle, self.geometry.width)
        weights = size * sum(prod(shape) for shape in self.tensors.shapes.values())
        cache = 2 * g.depth * g.kv_heads * g.head_dim * self.length * TEXTS * size
        logits = 4 * 4 * TEXTS * (g.vocabulary or 0)
        states = 8 * TEXTS * (self.length if self.job.prompts else 1) * wide * size
        return weights + self._largest + 2 * cache + logits + states  # a longer cache is a copy

    @property
    def loading(self) -> int:
        """Of these, bytes in the host's memory.

        Raises:
            ResourceError: the model does not fit.
        """
        job, gpu = self.job, self.device.type == "cuda"
        free = available_memory()
        ram = job.max_ram or (free and free + resident_memory())
        memory = job.max_memory or free_device_memory(self.device)
        host = self._largest if gpu else self.nbytes
        for needed, limit, option in ((RUNTIME + host, ram, "--max-ram"), (self.nbytes, memory, "--max-memory")):
            if (gpu or option == "--max-ram") and limit is not None and needed > limit:
                raise ResourceError(
                    f"--calibration self holds TUNED whole once: {needed} bytes, and {limit} is what the run may take "
                    f"({option}); {ELSEWHERE}"
                )
        return host + (OF_PROMPT * self._file.stat().st_size if self._file else 0)

    def batches(self, tokens: int) -> Iterator[list[str]]:
        """Texts, batch by batch, without an end; the model is loaded with the first, and gone with this iterator.

        Args:
            tokens: about as many are wanted.
        """
        folder = self.tuned.folder if has_tokenizer(self.tuned.folder) else self.source.folder
        tokenizer = Tokenizer(folder, f"TUNED {self.tuned.folder.name}", None)
        given, model, many = self._prompts(tokenizer), self._model(), min(TEXTS, -(-tokens // self.length))
        how = {"seed": self.job.seed, "length": self.length, "batch_size": many}
        for texts, _ in sampled_batches(model, tokenizer.plain, prompts=given, **how):
            yield texts

    def _prompts(self, tokenizer: Tokenizer) -> list[Prompt]:
        if self._file is None:
            return []
        template, base = tokenizer.chat, self.source.folder
        if template is None and has_tokenizer(base):
            template = Tokenizer(base, f"SOURCE {base.name}", None).chat
        return read_prompts(self._file, template, skip_bad=self.job.skip_bad_inputs)

    def _model(self) -> Any:
        folder = self._folder
        with init_empty_weights(include_buffers=False):
            model = language_model_of(folder, tied=self.head is None, dtype=self._dtype)
        stored = self.geometry.family.spelled(self.tensors)
        head = model.get_output_embeddings()
        for name, parameter in list(model.named_parameters()):
            place, _, own = name.rpartition(".")
            module = model.get_submodule(place)
            if module is head and self.head is None:
                continue
            if (found := stored.get(self.geometry.family.canonical(name))) is None:
                raise InputRefused(f"TUNED {self.tuned.folder} lacks {name}; is it complete?")
            if self.tensors.shapes[found] != tuple(parameter.shape):
                said = f"{found} is {list(self.tensors.shapes[found])}, config.json asks for {list(parameter.shape)}"
                raise InputRefused(f"TUNED {self.tuned.folder}: {said}; {BELONG}")
            tensor = self.tensors[found].to(self.device, self._dtype)
            module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        if self.head is None:
            head.weight = model.get_input_embeddings().weight
        ends = _ends(folder)
        if ends is not None:
            model.generation_config.eos_token_id = ends
        return model.to(self.device).eval()

    @property
    def _file(self) -> Path | None:
        """Of prompts."""
        return self.job.prompts and self.job.prompts.expanduser()

    @property
    def _folder(self) -> Path:
        """Which holds the configuration."""
        return self.tuned.folder if self.tuned.config else self.source.folder

    @property
    def _dtype(self) -> torch.dtype:
        """Of weights in memory: on a GPU as most are stored; else that of forward passes."""
        if self.device.type == "cpu":
            return self.tensors.compute_dtype
        kept = [self.source.dtypes[name] for name in self.source if self.source.dtypes[name].is_floating_point]
        return max(set(kept), key=kept.count)

    @property
    def _largest(self) -> int:
        """Bytes of a tensor while it is read, at most."""
        each = (prod(shape) * self.tensors.dtypes[name].itemsize for name, shape in self.tensors.shapes.items())
        return 2 * max(each)


def _ends(folder: Path) -> int | list[int] | None:
    """The tokens that end a text by generation_config.json, which for chats are more than the tokenizer's."""
    path = if_inside(folder, GENERATION)
    given = read_json(path).get("eos_token_id") if path else None
    return given if isinstance(given, (int, list)) else None
