"""The help of each command ends with what people type, and what they type is understood."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from server.__main__ import cli
from server.cli.examples import EXAMPLES, PANELS, commands
from tests.support.commands import Commands

ROOT: Any = typer.main.get_command(cli)
LINES = [line for lines in EXAMPLES.values() for line in lines]


def test_every_command_has_examples_and_a_place() -> None:
    known = {path for path, _ in commands(cli)}
    assert known == EXAMPLES.keys()
    assert {path.partition(" ")[0] for path in known} == PANELS.keys()


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_parsed(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as the command that it names, with nothing missing and nothing left over."""
    (tmp_path / "keys.txt").touch()  # which has to be there
    monkeypatch.chdir(tmp_path)
    words = [word for word in shlex.split(line.partition("  #")[0]) if "LORAPLEX_" not in word]
    assert words.pop(0) == "loraplex"
    command, context = ROOT, None
    while hasattr(command, "commands"):
        name = words.pop(0)
        context, command = (
            command.make_context("loraplex", [], parent=context, resilient_parsing=True),
            (command.commands[name]),
        )
    command.make_context(command.name, words, parent=context)


def test_help_shows_them() -> None:
    shown = Commands().invoke(cli, ["adapters", "live", "--help"], env={"COLUMNS": "120"}).output
    assert "$ loraplex adapters live acme support 2" in shown
    top = Commands().invoke(cli, ["--help"], env={"COLUMNS": "120"}).output
    for panel in PANELS.values():
        assert panel in top
