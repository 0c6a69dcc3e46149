"""The command's options: those of a job as its fields declare them; a config file has the same keys."""

from __future__ import annotations

import difflib
import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import typer
import yaml

from ..errors import InputRefused
from ..files.headers import read_file
from ..jobs.settings import Job
from ..recipes.choices import RecipeChoices
from ..recipes.recipe import Recipe
from ..recipes.registry import SOLVERS
from ..updates.alpha import Alpha
from .failures import errors

Function = TypeVar("Function", bound=Callable[..., Any])
RECIPE = {field.name: "recipe" if field.name == "name" else field.name for field in fields(Recipe)}  # field -> option
MAX_CONFIG = 1 << 20  # bytes
REFUSED = f"{__name__}.refused"  # in a context's meta: why --config was


def options(*names: str, recipe: bool = False) -> Callable[[Function], Function]:
    """Gives a command the arguments and options of these names, in this order; it receives them as keywords.

    Args:
        names: keys of :data:`ALL`, which holds every option of a job.
        recipe: every field of :class:`Recipe` too; they arrive as one keyword ``recipe``, of those that were given.
    """

    def dress(function: Function) -> Function:
        known = ALL | (_recipe_options() if recipe else {})
        chosen = {name: known[name] for name in (*names, *(RECIPE.values() if recipe else ()), "config", "as_json")}
        signature = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, (annotation, default) in chosen.items()
        ]

        def command(**given: Any) -> None:
            given.pop("config")
            if recipe:
                read = {field: given.pop(option) for field, option in RECIPE.items()}
                given["recipe"] = {field: value for field, value in read.items() if value is not None}
            function(**given)

        command.__doc__, command.__name__ = function.__doc__, function.__name__
        command.__signature__ = inspect.Signature(signature)  # type: ignore[attr-defined]
        command.__annotations__ = {name: annotation for name, (annotation, _) in chosen.items()}
        return command  # type: ignore[return-value]

    return dress


def _configured(context: typer.Context, path: Path | None) -> Path | None:
    """Before anything else of a command is read: what stands on the command line then wins."""
    if path is not None:
        try:
            context.default_map = read_config(path, context.command)
        except InputRefused as error:
            context.meta[REFUSED] = error
        if "as_json" in context.params:
            _refuse(context, context.params["as_json"])
    return path


def _refuse(context: typer.Context, as_json: bool) -> bool:
    """Once both --config and --json are read, in whichever order: a refused file is told as --json asks."""
    with errors(as_json):
        if refused := context.meta.get(REFUSED):
            raise refused
    return as_json


def read_config(path: Path, command: Any) -> dict[str, Any]:
    """The values a YAML file gives the parameters of a command, by parameter; its keys are the options' names.

    Raises:
        InputRefused: it is no such file, or a key is no option, with the nearest that is.
    """
    try:
        text = read_file(path, most=MAX_CONFIG)
        aliases = [event.anchor for event in yaml.parse(text) if isinstance(event, yaml.AliasEvent)]
        if aliases:  # a few lines of them could fill any memory
            raise ValueError(f"it has the alias *{aliases[0]}; write its value out")
        node = yaml.compose(text)
        keys = (
            Counter(str(key.value) for key, _ in node.value) if isinstance(node, yaml.MappingNode) else Counter[str]()
        )
        held = yaml.safe_load(text)
    except (InputRefused, yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise InputRefused(f"--config {path} is no readable YAML: {' '.join(str(error).split())[:1000]}") from None
    if not isinstance(held, dict):
        raise InputRefused(f"--config {path} holds {type(held).__name__}, expected keys and values, like `alpha: 0.5`")
    known = {_key(spelling): p for p in command.params for spelling in (*p.opts, *p.secondary_opts)}
    known = {key: p for key, p in known.items() if p.name not in ("config", "help") and not key.startswith("no_")}
    found: dict[str, Any] = {}
    for spelled, value in held.items():
        parameter = known.get(_key(str(spelled)))
        if parameter is None:
            near = difflib.get_close_matches(_key(str(spelled)), known, n=1, cutoff=0)
            raise InputRefused(f"--config {path}: {spelled!r} is no option of {command.name}; nearest is {near[0]!r}")
        assert parameter.name is not None
        if parameter.name in found or keys[str(spelled)] > 1:
            raise InputRefused(f"--config {path} gives {_key(str(spelled))!r} twice; keep one")
        given = value if isinstance(value, list) else [value]
        if large := [each for each in given if isinstance(each, int) and abs(each) >= 2**63]:
            raise InputRefused(f"--config {path}: {spelled!r} is a number of {large[0].bit_length()} bits; give less")
        if not given or not all(isinstance(each, (str, int, float)) for each in given):
            raise InputRefused(f"--config {path}: {spelled!r} is {str(value)[:200]}; give a value, or several")
        if parameter.name == "leave":
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        found[parameter.name] = value
    return found


def parse_alpha(text: str | None) -> tuple[Alpha, ...] | None:
    """The strengths that ``--alpha`` lists: numbers, ``match`` and ``auto``, separated by commas."""
    if text is None:
        return None
    found: list[Alpha] = []
    for part in (piece.strip() for piece in str(text).split(",")):
        try:
            found.append("match" if part == "match" else "auto" if part == "auto" else float(part))
        except ValueError:
            raise InputRefused(f"alpha is {part!r}; give numbers separated by commas, match or auto") from None
    return tuple(found)


def parse_size(text: str | None, option: str) -> int | None:
    """Bytes of a size like 8GiB, 8GB, 500MiB or 1.5g; a unit without i counts in thousands, a bare letter in 1024."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([kmgt]?)(i?)(b?)\s*", str(text).lower())
    nbytes = 0
    if match and not (match[3] and not match[4]):
        nbytes = int(float(match[1]) * (1000 if match[4] and not match[3] else 1024) ** " kmgt".index(match[2] or " "))
    if nbytes <= 0:
        raise InputRefused(f"{option} is {text!r}; give a size like 8GiB or 500MiB")
    return nbytes


READ: dict[str, Callable[[Any], Any]] = {  # field of a job that the command line gives as text -> how it is read
    "alpha": parse_alpha,
    "leave": lambda patterns: tuple(patterns or ()),
    "max_ram": partial(parse_size, option="--max-ram"),
    "max_memory": partial(parse_size, option="--max-memory"),
}
TEXTS: dict[str, Any] = {"leave": list[str] | None}  # what typer takes for it; else str | None
KINDS = get_type_hints(Job)


def values(given: dict[str, Any]) -> dict[str, Any]:
    """Fields of a job from what typer took for them."""
    return {name: READ[name](value) if name in READ else value for name, value in given.items()}


def _key(spelling: str) -> str:
    return spelling.lstrip("-").replace("-", "_").lower()


def _recipe_options() -> dict[str, tuple[Any, Any]]:
    """An option for every choice of a recipe, described by its docstring; unset means the recipe's own default."""
    described = inspect.cleandoc(RecipeChoices.__doc__ or "").partition("Attributes:")[2]
    texts = {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^ {4}(\w+): ((?:.|\n {5,})+)", described, re.M)}
    hints, found = get_type_hints(Recipe) | {"name": Literal[tuple(SOLVERS)]}, {}
    for field in fields(Recipe):
        text = re.sub(r":\w+:|`", "", texts.get(field.name, ""))
        default = field.default if not isinstance(field.default, bool) else ("no", "yes")[field.default]
        spelled = RECIPE[field.name].replace("_", "-")
        names = (f"--{spelled}/--no-{spelled}",) if hints[field.name] is bool else (f"--{spelled}",)
        option = typer.Option(*names, help=text[:1].upper() + text[1:], show_default=str(default))
        found[RECIPE[field.name]] = (Annotated[hints[field.name] | None, option], None)
    return found


def _argument(name: str, text: str, kind: Any = str) -> tuple[Any, Any]:
    return Annotated[kind, typer.Argument(metavar=name.upper(), help=text)], inspect.Parameter.empty


def _option(kind: Any, default: Any, *names: str, **more: Any) -> tuple[Any, Any]:
    return Annotated[kind, typer.Option(*names, **more)], default


def names_of(settings: type) -> tuple[str, ...]:
    """The options among a class's fields."""
    return tuple(field.name for field in fields(settings) if "help" in field.metadata)


def _declared(field: Field[Any], kind: Any) -> tuple[Any, Any]:
    """The option that a job's field is; what is read from text has its default as text too."""
    default, told = field.default, field.metadata
    names: tuple[str, ...] = ()
    if field.name in READ:
        kind, default = TEXTS.get(field.name, str | None), f"{default:g}" if default else None
    if kind is bool:
        spelled = field.name.replace("_", "-")
        names = (f"--{spelled}/--no-{spelled}" if default else f"--{spelled}",)
    shown = told.get("unset", True)
    return _option(kind, default, *names, help=told["help"], min=told.get("least"), show_default=shown)


ALL: dict[str, tuple[Any, Any]] = {
    "source": _argument("source", "Base model the update was trained on: a folder or a hub id."),
    "tuned": _argument("tuned", "The tune of SOURCE: a checkpoint or a PEFT LoRA adapter."),
    "target": _argument("target", "Base model to move it to."),
    "maps": _argument("maps", "Folder of an alignment: what `theseus align` writes, and `theseus apply` reads."),
    "out": _argument("out", "Folder to write.", Path),
    "other_source": _option(
        str | None, None, "--source", help="Where SOURCE is now.", show_default="as recorded in MAPS"
    ),
    "other_target": _option(
        str | None, None, "--target", help="Where TARGET is now.", show_default="as recorded in MAPS"
    ),
    **{field.name: _declared(field, KINDS[field.name]) for field in fields(Job) if "help" in field.metadata},
    "dry_run": _option(
        bool, False, "--dry-run", help="Check everything, print coverage and predictions, write nothing."
    ),
    "as_json": _option(
        bool, False, "--json", callback=_refuse, is_eager=True, help="Print one JSON object instead of tables."
    ),
    "config": _option(
        Path | None, None, callback=_configured, is_eager=True, help="YAML with the same keys; options here win."
    ),
}
