"""The command: ``theseus transport``, ``align``, ``apply``, ``plan``, ``inspect``, ``verify``, ``doctor``, ``demo``."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from ..files.result_folder import MANIFEST
from ..jobs.settings import Aligning, AlignJob, Job, Moving, Running
from ..recipes.recipe import Recipe
from ..version import __version__
from .failures import deaf, errors
from .options import names_of, options, values
from .report import plan_table, record, report, warnings
from .terminal import console, say, standard_streams

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Move a fine-tune or a LoRA adapter from the model it was trained on to another, without training.",
)

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
ALIGNED = ("calibration", *names_of(Aligning))
RUN_AGAIN = tuple(name for name in ALIGNED if name != "depth")  # of an alignment that is there, its blocks are paired
MOVED = names_of(Moving)
COMMON = (*names_of(Running), "dry_run")


@app.command()
@options("source", "tuned", "target", "out", *ALIGNED, *MOVED, *COMMON, recipe=True)
def transport(dry_run: bool, as_json: bool, recipe: dict[str, Any], **given: Any) -> None:
    """Move the update TUNED - SOURCE to TARGET and write it to OUT: align and apply in one go."""
    with errors(as_json):
        from ..jobs.transport_job import Session

        _run(Session(Job(recipe=Recipe(**recipe), **values(given))), dry_run, as_json)


@app.command()
@options("source", "target", "maps", *ALIGNED, *COMMON, recipe=True)
def align(dry_run: bool, as_json: bool, recipe: dict[str, Any], maps: str, **given: Any) -> None:
    """Align SOURCE and TARGET once; `theseus apply` then moves any tune of SOURCE through MAPS."""
    with errors(as_json):
        from ..jobs.align_job import AlignSession

        _run(AlignSession(AlignJob(recipe=Recipe(**recipe), out=Path(maps), **values(given))), dry_run, as_json)


@app.command()
@options("source", "tuned", "target", "out", *ALIGNED, *MOVED, *COMMON, recipe=True)
def plan(dry_run: bool, as_json: bool, recipe: dict[str, Any], **given: Any) -> None:
    """Show how `theseus transport` with these arguments would fit the memory it may take, stage by stage."""
    with errors(as_json):
        from ..jobs.transport_job import Session

        session = Session(Job(recipe=Recipe(**recipe), **values(given)))
        _show(session.plan.as_dict(session.seconds), plan_table(session.plan, session.seconds), as_json)


@app.command()
@options("maps", "tuned", "out", "other_source", "other_target", *MOVED, *RUN_AGAIN, "verify_inputs", *COMMON)
def apply(dry_run: bool, as_json: bool, other_source: str | None, other_target: str | None, **given: Any) -> None:
    """Move the update of TUNED through an alignment and write it to OUT.

    Where its recipe fits the effect of a tune, both models run again, on --calibration; else that is not read.
    """
    with errors(as_json):
        from ..jobs.transport_job import Session

        job = Job.of_maps(source=other_source, target=other_target, **values(given))
        _run(Session(job), dry_run, as_json)


@app.command()
def inspect(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder this command wrote.")], as_json: JsonFlag = False
) -> None:
    """Show what a folder holds and how it was made; check its files against the manifest."""
    from ..files.result_folder import differences, read_manifest
    from ..jobs.verify import parts_of

    with errors(as_json):
        manifests = {part: read_manifest(part) for part in parts_of(out) or [out]}
        faults = {part: differences(part) for part in manifests}
        told = [{"damaged": faults[part], **manifest} for part, manifest in manifests.items()]
        parts: list[Any] = []
        for part, manifest in manifests.items():
            try:
                parts.append(record(manifest["metadata"]["outcome"]))
            except (AttributeError, KeyError, TypeError, ValueError):
                parts.append(f"{MANIFEST} does not tell how this was made")
            parts.append(_verdict(faults[part], f"all {len(manifest['files'])} files are as written"))
        _show(told[0] if len(told) == 1 else {"folders": told}, Group(*parts), as_json)
        if any(faults.values()):
            raise typer.Exit(3)


@app.command()
def verify(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder this command wrote.")],
    target: Annotated[str | None, typer.Option(help="Where the target base is now.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check a folder in full: files, headers, values, and that it fits the target base."""
    from ..jobs.verify import verify as faults_of

    with errors(as_json):
        faults = faults_of(out, target=target)
        _show({"damaged": faults}, _verdict(faults, f"{out} is whole, finite, and fits the target base"), as_json)
        if faults:
            raise typer.Exit(3)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what this installation can do, and run a small exact control."""
    from .doctor import examine

    with errors(as_json):
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
    seeds: Annotated[int, typer.Option(min=1, help="Independent repetitions.")] = 4,
    as_json: JsonFlag = False,
) -> None:
    """Move fine-tunes between two vision transformers trained here on scikit-learn's digits, and measure."""
    from ..demo.experiment import run_demo
    from ..demo.report import render_table
    from ..demo.results import DemoSettings

    with errors(as_json):
        with _progress() as progress:
            result = run_demo(DemoSettings(seeds=seeds), out, progress)
        with _known_whole(out):
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
    """The command, once it is imported; it starts in ``theseus_command``."""
    with standard_streams():
        try:
            app()
        finally:
            deaf()


def _run(session: Any, dry_run: bool, as_json: bool) -> None:
    from ..machine import return_freed_memory

    return_freed_memory()
    with _known_whole(session.job.out, lambda: session.done):
        if dry_run:
            outcome = session.rehearse()
        else:
            with _progress() as progress:
                outcome = session.run(progress)
        _show(asdict(outcome), report(outcome), as_json)


@contextmanager
def _known_whole(out: Path, done: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """An interrupt that comes when all is done says so."""
    try:
        yield
    except KeyboardInterrupt as error:
        if error.args or not done():
            raise
        raise type(error)(f"interrupted; {out} is whole") from error


def _verdict(faults: list[str], whole: str) -> Any:
    return Group(*warnings(faults, "[red]damaged[/]")) if faults else Text(whole)


def _show(data: dict[str, Any], renderable: Any, as_json: bool) -> None:
    say(data if as_json else renderable)


class Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


@contextmanager
def _progress() -> Iterator[Callable[[str, int], Callable[[], object]]]:
    """Progress bars with rate and time left on a terminal, nothing elsewhere."""
    columns = (
        TextColumn("{task.description:>6}"),
        BarColumn(),
        MofNCompleteColumn(),
        Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console(stderr=True), disable=not sys.stderr.isatty()) as bars:

        def stage(name: str, steps: int) -> Callable[[], object]:
            task = bars.add_task(name, total=steps)
            return lambda: bars.advance(task)

        yield stage
