"""The command: ``theseus transport``, ``inspect``, ``doctor``, ``demo``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from . import __version__
from .errors import InputRefused, TheseusError
from .procrustes import FLOOR
from .report import console, record, report, warnings

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Move a fine-tune or a LoRA adapter from the model it was trained on to another, without training.",
)


class RecipeName(str, Enum):
    coherent = "coherent"
    paper = "paper"


class NullName(str, Enum):
    partial = "partial"
    completed = "completed"
    svd = "svd"


class OutputName(str, Enum):
    auto = "auto"
    adapter = "adapter"
    checkpoint = "checkpoint"
    delta = "delta"


JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def transport(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Base model the update was trained on: a folder or a hub id.")
    ],
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="The tune of SOURCE: a checkpoint or a PEFT LoRA adapter.")
    ],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="Base model to move it to: same family, same depth.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    calibration: Annotated[
        str, typer.Option(help="A .safetensors of ready tensors, a text file, or 'builtin' (text Python ships).")
    ] = "builtin",
    recipe: Annotated[RecipeName, typer.Option(help="How maps and scales are chosen.")] = RecipeName.coherent,
    alpha: Annotated[float, typer.Option(help="Strength of the update.")] = 1.0,
    null: Annotated[
        NullName, typer.Option(help="What fills directions the data does not determine.")
    ] = NullName.partial,
    floor: Annotated[
        float,
        typer.Option(help="Singular values below this share of the largest are undetermined (float64 models: 1e-12)."),
    ] = FLOOR,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N.")] = "cpu",
    output: Annotated[OutputName, typer.Option(help="What to write; auto writes what TUNED is.")] = OutputName.auto,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Calibration tokens.", show_default="4 x the widest space")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 8,
    seed: Annotated[int, typer.Option(help="Which calibration samples are drawn.")] = 0,
    leave: Annotated[list[str] | None, typer.Option(help="Glob of tensors to leave behind; may be repeated.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read .bin files (weights only).")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the coverage, write nothing.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Move the update TUNED - SOURCE to TARGET and write it to OUT."""
    with _errors(as_json):
        from .job import Job, Session
        from .recipes import Recipe

        job = Job(
            source=source,
            tuned=tuned,
            target=target,
            out=out,
            calibration=calibration,
            recipe=Recipe(name=recipe.value, null=null.value, floor=floor),
            alpha=alpha,
            output=output.value,
            device=device,
            tokens=tokens,
            batch_size=batch_size,
            seed=seed,
            leave=tuple(leave or ()),
            overwrite=overwrite,
            allow_pickle=allow_pickle,
        )
        session = Session(job)
        if dry_run:
            outcome = session.rehearse()
        else:
            with _progress() as progress:
                outcome = session.run(progress)
        _show(asdict(outcome), report(outcome), as_json)


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder this command wrote.")], as_json: JsonFlag = False
) -> None:
    """Show what a folder holds and how it was made; check its files against the manifest."""
    from .writer import MANIFEST, read_manifest, verify

    with _errors(as_json):
        if not (out / MANIFEST).is_file():
            raise InputRefused(f"{out} holds no {MANIFEST}; give a folder this command wrote")
        manifest = read_manifest(out)
        damaged = verify(out)
        if as_json:
            print(json.dumps({"damaged": damaged, **manifest}, indent=1))
        else:
            screen = console()
            try:
                screen.print(record(manifest["metadata"]["outcome"]))
            except (AttributeError, KeyError, TypeError, ValueError):
                screen.print(f"{MANIFEST} does not tell how this was made")
            screen.print(*warnings(damaged, "[red]damaged[/]"), sep="\n", end="\n" if damaged else "")
            if not damaged:
                screen.print(f"all {len(manifest['files'])} files are as written")
        if damaged:
            raise typer.Exit(3)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this installation can do, and run a small exact control."""
    from .doctor import examine

    with _errors(as_json):
        facts = examine()
        table = Table("what", "finding", title="theseus doctor", title_justify="left")
        for name, finding in facts.items():
            table.add_row(name, str(finding) or "none")
        _show(facts, table, as_json)
        if not facts["healthy"]:
            raise typer.Exit(5)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for demo.json and demo.png.")] = Path("theseus-demo"),
    seeds: Annotated[int, typer.Option(min=1, help="Independent repetitions.")] = 2,
    as_json: JsonFlag = False,
) -> None:
    """Move fine-tunes between two vision transformers trained here on scikit-learn's digits, and measure."""
    from .demo import DemoSettings, render_table, run_demo

    with _errors(as_json):
        with _progress() as progress:
            result = run_demo(DemoSettings(seeds=seeds), out, progress)
        _show(result.as_dict(), render_table(result), as_json)


@app.callback(invoke_without_command=True)
def main_options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")] = False,
) -> None:
    shown = logging.INFO if verbose else logging.ERROR  # warnings are part of the report
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(shown, console=console(stderr=True), show_path=False)],
    )
    if version:
        print(__version__)
        raise typer.Exit()


def main() -> None:
    """Entry point of the command."""
    app()


def _show(data: dict[str, Any], renderable: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(data, indent=1))
    else:
        console().print(renderable, crop=False)


@contextmanager
def _errors(as_json: bool) -> Iterator[None]:
    """Errors a user can act on become one message and an exit code."""
    try:
        yield
    except TheseusError as error:
        _fail(str(error), error.exit_code, as_json)
    except (MemoryError, RuntimeError) as error:
        from .checks import out_of_memory

        if not out_of_memory(error):
            raise
        _fail(f"out of memory: {error}; free some, lower --batch-size, or use smaller models", 4, as_json)
    except OSError as error:
        _fail(f"{error}; check the path, its permissions and the disk", 4, as_json)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written", 130, as_json)


def _fail(message: str, code: int, as_json: bool) -> NoReturn:
    if as_json:
        print(json.dumps({"error": message, "exit_code": code}))
    screen = console(stderr=True)
    screen.print("[bold red]error[/]", end=" ")
    screen.print(message, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], object]]]:
    """Progress bars with rate and time left on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty()) as bars:

        def stage(name: str, steps: int) -> Callable[[], object]:
            task = bars.add_task(name, total=steps)
            return lambda: bars.advance(task)

        yield stage
