"""``loraplex keys``: what customers authenticate with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli import tables as show
from server.cli.arguments import Document, Tenant, json_objects
from server.cli.client import AdminClient
from server.cli.command import command
from server.cli.tables import Shown

KeyId = Annotated[str, typer.Argument(help="As `keys list` shows it.", show_default=False)]

keys = typer.Typer(no_args_is_help=True, help="Their keys.")


@command(keys, "list")
def list_keys(server: AdminClient, tenant: Tenant) -> Shown:
    """A customer's keys, without their secrets."""
    document = server.get("tenants", tenant, "keys")
    headings = ("id", "name", "scopes", "limits", "since", "expires", "last used")
    return document, show.table(headings, map(show.key_cells, document["data"]))


def _fields(
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference (default), adapters:write, usage:read, keys:write; once for each."),
    ] = None,
    expires_at: Annotated[str | None, typer.Option(help="ISO 8601, with its zone.")] = None,
    limits: Document = None,
) -> dict[str, Any]:
    """The fields of a key that were given."""
    given = {"name": name, "scopes": scope, "expires_at": expires_at}
    return {field: value for field, value in given.items() if value is not None} | json_objects(limits=limits)


@command(keys, "create", fields=_fields)
def create_key(server: AdminClient, tenant: Tenant, fields: dict[str, Any]) -> Shown:
    """Make a key. It is shown this once."""
    return show.fields(server.post("tenants", tenant, "keys", body=fields))


@command(keys, "set", fields=_fields)
def set_key(server: AdminClient, tenant: Tenant, key_id: KeyId, fields: dict[str, Any]) -> Shown:
    """Change what is named of a key, from the next request on; everything else stays."""
    return show.fields(server.patch("tenants", tenant, "keys", key_id, body=fields))


@command(keys, "rotate")
def rotate_key(
    server: AdminClient,
    tenant: Tenant,
    key_id: KeyId,
    overlap: Annotated[int, typer.Option(min=0, help="Seconds for which the old one goes on.")] = 0,
) -> Shown:
    """Make a key in the place of another. It is shown this once."""
    document = server.post("tenants", tenant, "keys", key_id, "rotate", body={"overlap_seconds": overlap})
    shown = {name: value for name, value in document.items() if name != "replaces"}
    return document, show.fields(shown)[1]


@command(keys, "revoke")
def revoke_key(server: AdminClient, tenant: Tenant, key_id: KeyId) -> Shown:
    """Refuse a key from now on."""
    server.delete("tenants", tenant, "keys", key_id)
    return show.gone(key_id)
