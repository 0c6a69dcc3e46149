"""Names and messages of others on the screen and in the model card: seen, not obeyed."""

import io
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from helpers.command import call, outcome_of
from rich.logging import RichHandler
from rich.table import Table
from safetensors.torch import load_file, save_file
from theseus_transport.cli.terminal import Terminal, console
from theseus_transport.jobs.model_card import model_card
from theseus_transport.jobs.outcome import Outcome
from theseus_transport.shown import COMMANDS, in_page, percent, visible

EVIL = "\x1b[2J\x1b]0;title\x07a\rb\x08\x9b31m\u202egpj\u200b\u2028\ud800\x00\t"


def test_every_command_becomes_visible_and_nothing_else_changes() -> None:
    assert visible("a\nÄ 漢字 🙂 é [bold] -> \\x1b") == "a\nÄ 漢字 🙂 é [bold] -> \\x1b"
    assert visible(EVIL) == ("\\x1b[2J\\x1b]0;title\\x07a\\rb\\x08\\x9b31m\\u202egpj\\u200b\\u2028\\ud800\\x00\\t")
    assert visible(EVIL).encode() and visible(visible(EVIL)) == visible(EVIL)


def test_all_that_a_console_prints_or_logs_is_visible(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("a\x1b[1m", title=EVIL.replace("\ud800", ""))
    table.add_row(EVIL)
    console().print(table)
    console().print(EVIL, markup=False, highlight=False, soft_wrap=True)
    handler = RichHandler(console=console(), show_path=False)
    handler.handle(logging.makeLogRecord({"msg": EVIL, "levelno": 30, "levelname": "WARNING"}))
    said = capsys.readouterr().out
    assert said.count("\\x1b") >= 8 and not COMMANDS.search(said)


def test_colours_of_its_own_stay() -> None:
    shown = io.StringIO()
    Terminal(file=shown, force_terminal=True, color_system="standard").print("[red]x\x07y[/]", highlight=False)
    assert shown.getvalue() == "\x1b[31mxy\x1b[0m\n"  # rich drops the bell by itself, not escape sequences


@pytest.mark.parametrize("verb", ["inspect", "verify"])
def test_a_hostile_folder_commands_no_terminal(models: Path, tmp_path: Path, verb: str) -> None:
    out = tmp_path / "out"
    sides = [models / name for name in ("causal/source", "lora", "causal/target")]
    assert call("transport", *sides, out, "--calibration", models / "ids.safetensors", "--tokens", 64).exit_code == 0
    manifest = json.loads((out / "theseus.json").read_text())
    told = manifest["metadata"]["outcome"]
    told["warnings"], told["calibration"] = [EVIL], EVIL
    told["job"]["tuned"] = told["job"]["source"] = EVIL
    told["coverage"][0]["tensor"], told["coverage"][0]["note"] = EVIL, EVIL
    manifest["files"][EVIL] = {"size": 1, "blake2b": EVIL}
    (out / "theseus.json").write_text(json.dumps(manifest))
    (out / "\x1b[2Jname").write_text("")
    tensors = load_file(out / "adapter_model.safetensors")
    save_file({f"{name}\x1b[31m": tensor for name, tensor in tensors.items()}, out / "adapter_model.safetensors")
    for options in ((), ("--json",)):
        result = call(verb, out, *options)
        assert result.exit_code == 3 and not COMMANDS.search(result.output), result.output


def test_a_model_whose_names_are_evil_is_told_visibly(models: Path, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    shutil.copytree(models / "causal/tuned", tuned)
    tensors = load_file(tuned / "model.safetensors")
    save_file({**tensors, "\x1b[2Jevil\x07": tensors["lm_head.weight"].clone()}, tuned / "model.safetensors")
    sides = (models / "causal/source", tuned, models / "causal/target")
    options = ("--calibration", models / "ids.safetensors", "--tokens", 64)
    result = call("transport", *sides, tmp_path / "out", *options)
    assert "x1b[2Jevil" in result.output and not COMMANDS.search(result.output)


PAGE = "a`<script>alert(1)</script> | [click](http://x)\n---\n# title\n" + EVIL


def test_a_page_is_one_line_that_opens_nothing() -> None:
    line = in_page(PAGE)
    assert not COMMANDS.search(line) and "\n" not in line and "`" not in line and "<" not in line and "](" not in line
    assert line.startswith("a'&lt;script>alert(1)&lt;/script> \\| [click]\\(http://x) --- # title ")
    assert in_page("rounding swallows 12% of q_proj [4, 3] -> x") == "rounding swallows 12% of q_proj [4, 3] -> x"


def test_a_card_takes_no_name_raw(models: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sides = [models / name for name in ("causal/source", "lora", "causal/target")]
    assert call("transport", *sides, out, "--calibration", models / "ids.safetensors", "--tokens", 64).exit_code == 0
    plain = (out / "README.md").read_text()
    outcome = Outcome(**outcome_of(out))
    told = asdict(outcome)
    told["job"] |= {"source": PAGE, "tuned": PAGE, "target": PAGE, "alpha": PAGE}
    told |= {"calibration": PAGE, "warnings": [PAGE]}
    card = model_card(Outcome(**told))
    front, _, page = card.removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["base_model"] == PAGE
    assert not COMMANDS.search(card) and "<script" not in card and page.count("](http") == 1
    heads = [line for line in page.splitlines() if line.startswith("#")]
    assert heads == ["# Moved LoRA adapter", "## Warnings"]
    assert page.count("`") == plain.count("`") == 6


def test_the_next_line_holds_no_code_of_a_model(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    shutil.copytree(models / "causal/target", target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "architectures": ["M;import os;os.system('x')#"]}))
    options = ("--calibration", models / "ids.safetensors", "--tokens", 64)
    result = call("transport", models / "causal/source", models / "lora", target, tmp_path / "out", *options)
    assert result.exit_code == 0 and "model = AutoModel.from_pretrained(" in result.output
    assert "os.system" not in result.output and "os.system" not in (tmp_path / "out" / "README.md").read_text()


def test_a_share_never_fills_the_screen():
    assert [percent(x) for x in (0.0, 0.126, 1.0, 10.0, 10.1, 1e150)] == ["0%", "13%", "100%", "1000%"] + 2 * [
        "over 1000%"
    ]
    assert percent(0.1261, 1) == "12.6%"
