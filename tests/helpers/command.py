"""Calling the command in tests, and looking at what it wrote."""

import re
from pathlib import Path

from safetensors.torch import load_file
from theseus_transport.cli.main import app
from theseus_transport.files.result_folder import read_manifest
from typer.testing import CliRunner

FAST = ("--tokens", "128")
COHERENT = (*FAST, "--recipe", "coherent")  # whose maps alone decide what is written


def call(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "1000"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return result


def invoke(*arguments):
    """A call that must succeed."""
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return result


def refused(message, *arguments, code=3):
    result = call(*arguments)
    assert result.exit_code == code and re.search(message, result.stderr), result.output


def aligned(root, out):
    """An alignment of the causal pair by ``coherent``, as ``theseus align`` writes it."""
    sides = (root / "causal/source", root / "causal/target")
    invoke("align", *sides, out, "--calibration", root / "ids.safetensors", *COHERENT)
    return out


def held(folder):
    """All tensors of a folder."""
    return {k: v for path in Path(folder).glob("*.safetensors") for k, v in load_file(path).items()}


def identical(first, second):
    """Whether the weight files of two folders are the same bytes."""
    files = [{p.name: p.read_bytes() for p in Path(f).glob("*.safetensors")} for f in (first, second)]
    return bool(files[0]) and files[0] == files[1]


def outcome_of(folder):
    return read_manifest(folder)["metadata"]["outcome"]
