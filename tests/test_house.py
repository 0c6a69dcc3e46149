"""The order of the house: folders and files as CONTRIBUTING lists them, each importing only what stands above it."""

import ast
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python/theseus_transport"
LAST = {"demo": "streaming", "integrations": "updates"}  # of what these may import
SCREEN = {"cli", "demo"}  # where rich and typer are imported

FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def rooms() -> list[str]:
    """Names of folders and files, in the order of CONTRIBUTING's list."""
    listed = (ROOT / "CONTRIBUTING.md").read_text().split("## Where things are\n")[1].split("\n## ")[0]
    return re.findall(r"^\* `(\w+)(?:/|\.py)`", listed, re.M)


def room(module: str) -> str:
    return module.split(".")[0]


def imported(module: str) -> Iterator[tuple[str, ast.ImportFrom]]:
    """What a file imports of this package, wherever in it, as the file's name."""
    inside = module.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            start = [*inside[: len(inside) + 1 - node.level], *(node.module or "").split(".")]
            for name in node.names:
                for parts in ([*start, name.name], start, [*start, "__init__"]):
                    found = ".".join(part for part in parts if part)
                    if found in FILES:
                        yield found, node
                        break
                else:
                    raise AssertionError(f"{module} imports {node.module}, which is no file")


def test_the_list_names_every_folder_and_file_once() -> None:
    there = {room(module) for module in FILES} - {"__init__"}
    assert sorted(rooms()) == sorted(there)


@pytest.mark.parametrize("module", sorted(FILES))
def test_a_file_imports_what_stands_above_its_folder(module: str) -> None:
    order = rooms()
    for other, node in imported(module):
        own, there = room(module), room(other)
        if module == "__init__" or own == there:
            continue
        above = order[: order.index(LAST[own]) + 1 if own in LAST else order.index(own)]
        assert there in above, f"{module} line {node.lineno} imports {other}, which does not stand above {own}"


def test_no_files_import_each_other() -> None:
    graph = {module: {other for other, _ in imported(module)} - {module} for module in FILES}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the files


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_is_imported_for_its_types_alone(module: str) -> None:
    text = FILES[module].read_text()
    assert "TYPE_CHECKING" not in text
    wide = {name for node in ast.walk(ast.parse(text)) for name in top_level(node)}
    assert room(module) in SCREEN or not wide & {"rich", "typer"}


def top_level(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {str(node.module).split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set()


@pytest.mark.parametrize("folder", sorted({room(m) for m in FILES if "." in m}))
def test_a_folder_says_what_it_is_and_imports_nothing(folder: str) -> None:
    tree = ast.parse(FILES[f"{folder}.__init__"].read_text())
    assert ast.get_docstring(tree)
    if folder not in ("cli", "integrations"):  # the entry point; the names users install
        assert len(tree.body) == 1
