"""What is imported is declared in pyproject.toml, and so is the oldest version of it."""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"PIL": "pillow", "yaml": "pyyaml", "sklearn": "scikit-learn"}  # imported by another name than installed
OWN = {"theseus_ext", "theseus_transport", "theseus_command", *(path.name for path in (ROOT / "tests").iterdir())}


def imported(folders: Iterable[str]) -> dict[str, str]:
    """Packages, each with a file that imports it; not the standard library's, nor what stands beside."""
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    found = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            found |= {name.partition(".")[0]: str(path.relative_to(ROOT)) for name in names}
    beside = {path.stem for path in files} | OWN | sys.stdlib_module_names
    return {PACKAGES.get(name, name): path for name, path in found.items() if name not in beside}


@pytest.mark.parametrize(
    "folders, groups", [(("theseus_ext", "python"), ["demo"]), (("tests", "bench"), ["demo", "dev"])]
)
def test_what_is_imported_is_declared(folders: tuple[str, ...], groups: list[str]) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [
        *project["dependencies"],
        *(line for group in groups for line in project["optional-dependencies"][group]),
    ]
    assert all(">=" in line for line in project["dependencies"]), "an oldest version each"
    names = {re.split("[<>=]", line)[0] for line in declared}
    assert {name: path for name, path in imported(folders).items() if name not in names} == {}
