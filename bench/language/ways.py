"""Ways of bringing a tune to the target, each as the logits it gives at a strength alpha."""

from __future__ import annotations

import copy
import shlex
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from official import official
from pairs import BASE, Cell
from safetensors.torch import save_file
from theseus_transport.cli import app
from theseus_transport.recipes.registry import SOLVERS
from torch import Tensor
from torch.func import functional_call
from train import ROW, Steps, descend, load
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

Forward = Callable[[Tensor], Tensor]  # token ids [rows, tokens] -> logits [rows, tokens, vocabulary]
HELD_OUT = 8  # rows the command holds out by itself, of its default batch


@dataclass
class Task:
    """A cell with the models in memory, and the calibration: unlabelled rows of token ids [rows, `ROW`]."""

    cell: Cell
    rows: Tensor
    folder: Path  # for what the command reads and writes

    @cached_property
    def source(self) -> LlamaForCausalLM:
        return load(self.cell.source)

    @cached_property
    def tuned(self) -> LlamaForCausalLM:
        return load(self.cell.tune, self.cell.source)

    @cached_property
    def target(self) -> LlamaForCausalLM:
        return load(self.cell.target)

    @cached_property
    def ceiling(self) -> LlamaForCausalLM:
        return load(self.cell.ceiling, self.cell.target)

    def logits(self, name: str) -> Forward:
        """Of one of the models."""
        model = getattr(self, name)
        return lambda ids: model(input_ids=ids).logits


Way = Callable[[Task], Callable[[float], Forward]]


def at_strength(model: LlamaForCausalLM, update: dict[str, Tensor]) -> Callable[[float], Forward]:
    """The model with ``alpha`` times the update."""
    state = {name: p.detach() for name, p in model.named_parameters()}

    def at(alpha: float) -> Forward:
        moved = state | {name: state[name] + alpha * value for name, value in update.items()}
        return lambda ids: functional_call(model, moved, (), {"input_ids": ids}).logits

    return at


def difference(model: LlamaForCausalLM, base: LlamaForCausalLM) -> dict[str, Tensor]:
    """Parameter name -> how far ``model`` is from ``base``."""
    start = dict(base.named_parameters())
    return {name: (p - start[name]).detach() for name, p in model.named_parameters()}


def by_command(task: Task, *options: str) -> dict[str, Tensor]:
    """What ``theseus transport`` writes with these options, as an update of the target."""
    shutil.rmtree(task.folder, ignore_errors=True)
    task.folder.mkdir(parents=True)
    data, out = task.folder / "rows.safetensors", task.folder / "moved"
    save_file({"input_ids": task.rows.contiguous()}, data)
    tokens = (len(task.rows) - HELD_OUT) * ROW
    files = (task.cell.source, task.cell.tune, task.cell.target, out)
    wanted = ["transport", *map(str, files), "--calibration", str(data), "--tokens", str(tokens), *options]
    result = CliRunner().invoke(app, wanted)
    if result.exit_code:
        raise RuntimeError(f"theseus {shlex.join(wanted)}: {result.output}") from result.exception
    return difference(load(out, task.cell.target), task.target)


def random_update(like: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Gaussian tensors of the same norms."""
    draw = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(value.shape, generator=draw) for name, value in like.items()}
    return {name: noise[name] * (like[name].norm() / noise[name].norm()) for name in like}


def proxy(task: Task) -> Callable[[float], Forward]:
    """Proxy tuning: three models at inference, logits T + alpha (S+ - S)."""

    def at(alpha: float) -> Forward:
        target, tuned, source = map(task.logits, ("target", "tuned", "source"))
        return lambda ids: target(ids) + alpha * (tuned(ids) - source(ids))

    return at


@torch.no_grad()
def head_alone(task: Task, rho: float = 1e-2) -> dict[str, Tensor]:
    """Only the target's head, by ridge from what it reads to the source's change of logits; rho in units of the mean of
    the diagonal of G. What moves a representation has to be better than this."""
    read = task.target.model(input_ids=task.rows).last_hidden_state.flatten(0, 1).double()
    change = (task.logits("tuned")(task.rows) - task.logits("source")(task.rows)).flatten(0, 1).double()
    gram = read.T @ read
    gram.diagonal().add_(rho * gram.diagonal().mean())
    return {"lm_head.weight": torch.linalg.solve(gram, read.T @ change).T.float()}


def few_steps(task: Task, steps: int) -> dict[str, Tensor]:
    """The target trained for a few steps on the calibration, which needs a gradient; all its parameters."""
    model = copy.deepcopy(task.target).train()
    descend(model, task.rows.flatten(), Steps(steps, BASE.rate / 3, BASE.rows, task.cell.seed))
    return difference(model, task.target)


def way(text: str) -> Way:
    """A way by what it is called: a recipe with options of the command, as ``effect --rank 16``, or one of these."""
    name, *options = shlex.split(text)
    if name in SOLVERS:
        return lambda task: at_strength(task.target, by_command(task, "--recipe", name, *options))
    others: dict[str, Way] = {
        "random": lambda task: at_strength(task.target, random_update(by_command(task, *options), task.cell.seed)),
        "official": lambda task: at_strength(
            task.target, official(task.source, task.tuned, task.target, task.rows.split(16))
        ),
        "head": lambda task: at_strength(task.target, head_alone(task)),
        "steps": lambda task: at_strength(task.target, few_steps(task, int(options[0]))),
        "proxy": proxy,
    }
    if name not in others:
        raise SystemExit(f"{name!r} is no way; give a recipe ({', '.join(SOLVERS)}) or one of {', '.join(others)}")
    return others[name]
