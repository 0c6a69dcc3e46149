"""What the documents name exists, and what exists is named."""

import pkgutil
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_between_documents_lead_somewhere(name: str) -> None:
    text, place = (ROOT / name).read_text(), (ROOT / name).parent
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", text):
        target = place / path if path else ROOT / name
        assert target.exists(), f"{name}: {path}"
        heads = re.findall(r"^#+ (.*)", target.read_text(), re.M) if anchor else []
        assert not anchor or anchor in [head.lower().replace(" ", "-") for head in heads], f"{name}: {path}#{anchor}"


NAMED = re.compile(r"\btheseus_(?:transport|ext)(?:\.[A-Za-z]\w*)+")
TEXTS = (*DOCUMENTS, *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "python").rglob("*.py")))


@pytest.mark.parametrize("name", [name for name in TEXTS if NAMED.search((ROOT / name).read_text())])
def test_names_of_ours_in_documents_and_messages_lead_somewhere(name: str) -> None:
    for found in NAMED.findall((ROOT / name).read_text()):
        if not (ROOT / "python" / f"{found.replace('.', '/')}.py").exists():  # which may import what is not installed
            pkgutil.resolve_name(found)  # raises AttributeError or ModuleNotFoundError, which name it
