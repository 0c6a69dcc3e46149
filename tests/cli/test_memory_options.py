"""The options of memory and resuming through the command: sizes, plans, budgets, interrupts."""

import json

import pytest
from helpers.command import FAST, call, identical, invoke, outcome_of, refused
from theseus_transport.cli.options import parse_size
from theseus_transport.errors import InputRefused
from theseus_transport.streaming.passage import Passage


@pytest.fixture(scope="module")
def root(models):
    return models


def transport(root, out, *options, tuned="causal/tuned", command="transport"):
    folders = (root / "causal/source", root / tuned, root / "causal/target", out)
    return (command, *folders, "--calibration", root / "ids.safetensors", *FAST, *options)


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("8g", 8 << 30), ("500MiB", 500 << 20), ("1.5g", 3 << 29),
        ("2t", 2 << 40),
        (" 3 kib ", 3 << 10), ("4096", 4096), ("7b", 7), (None, None),
    ],
)  # fmt: skip
def test_sizes(text, nbytes):
    assert parse_size(text, "--max-ram") == nbytes


@pytest.mark.parametrize("text", ["", "8x", "GiB", "8i", "-1g", "0", "0.1", "nan", "1e9", "1,5g", "8GiBs"])
def test_sizes_that_are_none(text):
    for option in ("--max-ram", "--max-memory"):
        with pytest.raises(InputRefused, match=rf"^{option} is '.*'; give a size like 8GiB or 500MiB$"):
            parse_size(text, option)


@pytest.mark.parametrize("option", ["--max-ram", "--max-memory"])
@pytest.mark.parametrize("command", ["transport", "plan"])
def test_a_size_that_is_none_is_refused_by_option(root, tmp_path, command, option):
    refused(f"{option} is 'much'; give a size", *transport(root, tmp_path / "out", option, "much", command=command))
    assert list(tmp_path.iterdir()) == []


def test_a_plan_is_shown_and_nothing_is_done(root, tmp_path):
    """As a table and as JSON; its peak is a budget that does."""
    given = transport(root, tmp_path / "out", command="plan")
    said = call(*given)
    assert said.exit_code == 0 and list(tmp_path.iterdir()) == []
    told = json.loads(call(*given, "--json").stdout)
    assert told["peak"] == max(told["host"].values()) and told["device"] == {} and told["batch_size"] == 8
    shown = " ".join(said.stdout.split())
    for stage, nbytes in told["host"].items():
        assert f"{stage} {nbytes / 2**20:.1f} MiB" in shown
    assert f"peak {told['peak'] / 2**20:.1f} MiB" in shown and "8 samples a pass" in shown
    assert json.loads(call(*given, "--json", "--max-ram", told["peak"]).stdout)["host"] == told["host"]
    assert json.loads(call(*given, "--json", "--offload-folder", tmp_path / "offload").stdout)["resident"] is False
    assert list(tmp_path.iterdir()) == []


def test_a_budget_below_the_least_is_refused_with_the_least_that_does(root, tmp_path):
    """Of both commands that run both models, before anything runs; the number it gives is taken."""
    sides = (root / "causal/source", root / "causal/target")
    align = ("align", *sides, tmp_path / "maps", "--calibration", root / "ids.safetensors", *FAST)
    for given in (transport(root, tmp_path / "out"), transport(root, tmp_path / "out", command="plan"), align):
        said = call(*given, "--max-ram", "100MiB", "--json")
        told = json.loads(said.stdout)
        assert said.exit_code == told["exit_code"] == 4 and list(tmp_path.iterdir()) == []
        least = told["error"].partition("--max-ram is 100MiB, and ")[2].partition(" is the least that would do")[0]
        enough = call(*given, "--max-ram", least, "--dry-run")
        assert enough.exit_code == 0, enough.output


def test_hidden_states_in_files_change_no_byte(root, tmp_path):
    once = call(*transport(root, tmp_path / "once"), "--json")
    files = call(*transport(root, tmp_path / "files", "--offload-folder", tmp_path / "offload"), "--json")
    assert identical(tmp_path / "once", tmp_path / "files")
    assert ["in files" in json.loads(result.stdout)["plan"] for result in (once, files)] == [False, True]
    assert not [path for path in (tmp_path / "offload").rglob("*") if path.is_file()]


@pytest.fixture
def interrupts(monkeypatch):
    """Ctrl-C behind the next commits, so many times."""
    left, commit = [], Passage._commit

    def committed(self, loop):
        commit(self, loop)
        if left:
            raise left.pop()

    monkeypatch.setattr(Passage, "_commit", committed)
    return lambda times: left.extend([KeyboardInterrupt()] * times)


UNFINISHED = {  # what is moved, or made -> what lies there once it is interrupted, and how it is asked for
    "causal/tuned": ("..out.update.theseus", ()),
    "lora": ("..out.update.theseus", ()),
    "maps": (".out.theseus", ()),
    "at 1": (".out.theseus", ("--alpha", 1)),
    "match": ("..out.update.theseus", ("--alpha", "match")),
    "match by maps": ("..out.maps.theseus", ("--alpha", "match", "--recipe", "coherent")),
}


@pytest.mark.parametrize("what", UNFINISHED)
def test_an_interrupted_command_goes_on_with_resume(root, tmp_path, interrupts, what):
    out = tmp_path / "out"
    unfinished, options = UNFINISHED[what]
    tuned = "lora" if what == "lora" else "causal/tuned"
    given, once = (transport(root, place, *options, tuned=tuned) for place in (out, tmp_path / "once"))
    if what == "maps":
        given, once = (("align", *g[1:2], *g[3:]) for g in (given, once))
    invoke(*once)
    interrupts(1)
    said = call(*given)
    assert said.exit_code == 130 and "run again with --resume to go on after step 1, or remove" in said.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"once", unfinished}
    refused("an unfinished run lies in", *given)
    interrupts(1)
    assert call(*given, "--resume").exit_code == 130
    invoke(*given, "--resume")
    assert identical(out, tmp_path / "once") and {p.name for p in tmp_path.iterdir()} == {"out", "once"}
    told = [{**outcome_of(folder), "job": {}, "alphas": []} for folder in (out, tmp_path / "once")]
    assert told[0] == told[1]


@pytest.mark.parametrize("alpha, was", [("1", r"\[1.0\]"), ("match", r"\[\"match\"\]")])
def test_a_whole_folder_needs_no_resume(root, tmp_path, alpha, was):
    """Said without an error, for a script that always resumes; a folder made otherwise is none to go on with."""
    given = transport(root, tmp_path / "out", "--alpha", alpha, tuned="lora")
    invoke(*given, "--resume")  # nothing is there: it begins
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    said = call(*given, "--resume")
    assert said.exit_code == 0 and said.stderr == ""
    whole = f"{tmp_path / 'out'} is whole already, made from the same inputs with the same options"
    assert said.stdout.strip() == whole
    assert json.loads(call(*given, "--resume", "--json").stdout) == {"done": whole}
    said = rf"out was made otherwise: alphas is \[2.0\], was {was}; name another folder, or --overwrite"
    refused(said, *given, "--resume", "--alpha", 2)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
