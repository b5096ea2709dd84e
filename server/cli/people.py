"""``loraplex people``: who has an admin key of their own."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli import tables as show
from server.cli.arguments import Yes, confirm
from server.cli.client import AdminClient
from server.cli.command import command
from server.cli.tables import Shown

people = typer.Typer(no_args_is_help=True, help="People with admin keys of their own.")

Person = Annotated[str, typer.Argument(help="Whose key it is.", show_default=False)]


@command(people, "list")
def list_people(server: AdminClient) -> Shown:
    """All of them, without their keys."""
    document = server.get("people")
    return document, show.rows([_row(person) for person in document["data"]])


def _row(person: dict[str, Any]) -> dict[str, Any]:
    return {name: person[name] for name in ("name", "role", "created_at", "expires_at", "last_used_at")}


@command(people, "create")
def create_person(
    server: AdminClient,
    name: Person,
    role: Annotated[str, typer.Option(help="viewer (looks), operator (changes) or admin.")] = "operator",
    expires_at: Annotated[str | None, typer.Option(help="ISO 8601, with its zone.")] = None,
) -> Shown:
    """Make a key for somebody. It is shown this once."""
    body = {"name": name, "role": role} | ({"expires_at": expires_at} if expires_at else {})
    document = server.post("people", body=body)
    return document, show.fields(_row(document) | {"key": document["key"]})[1]


@command(people, "delete")
def delete_person(server: AdminClient, name: Person, yes: Yes = False) -> Shown:
    """Refuse somebody's key from now on."""
    confirm(yes, f"Refuse {name}'s key from now on?")
    (found,) = [p["id"] for p in server.get("people")["data"] if p["name"] == name] or [name]
    server.delete("people", found)
    return show.gone(name)
