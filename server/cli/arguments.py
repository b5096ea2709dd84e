"""Arguments and options that several commands have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
_TENANT = typer.Argument(
    help="The customer's id; also --tenant. Not with a customer's own key.", show_default=False
)
_NAME = typer.Argument(help="The adapter's name; also --name.", show_default=False)
Tenant = Annotated[str, _TENANT]
Name = Annotated[str, _NAME]
# Of a command that says something of all of them too.
SomeTenant = Annotated[str | None, _TENANT]
SomeName = Annotated[str | None, _NAME]
Document = Annotated[str | None, typer.Option(help="A JSON object, as the API takes it.", metavar="JSON")]


def named_folder(text: str) -> Path:
    """``text`` as a path. BadParameter where it is empty, as of a variable that is unset, which Python takes
    for the folder that a command is started in."""
    if not text.strip():
        raise typer.BadParameter("it is empty; say . for the folder that you are in")
    return Path(text)


def confirm(yes: bool, question: str) -> None:
    """Asks, unless ``yes``; ends the program where the answer is no."""
    if not yes:
        typer.confirm(question, abort=True, err=True)


def json_objects(**texts: str | None) -> dict[str, Any]:
    """The JSON objects among ``texts`` that were given; BadParameter for one that is none."""
    found = {}
    for field, text in texts.items():
        if text is not None:
            try:
                found[field] = json.loads(text)
            except ValueError as exc:
                raise typer.BadParameter(f"not JSON: {exc}", param_hint=f"--{field}") from exc
    return found
