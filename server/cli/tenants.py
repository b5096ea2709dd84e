"""``loraplex tenants``: a running server's customers."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli import tables as show
from server.cli.arguments import Document, Tenant, Yes, confirm, json_objects
from server.cli.client import AdminClient
from server.cli.command import command
from server.cli.tables import Shown

Limit = Annotated[
    str | None, typer.Option(help="A number; `none` for the server's own.", metavar="NUMBER|none")
]

tenants = typer.Typer(no_args_is_help=True, help="Customers of a running server.")


@command(tenants, "list")
def list_tenants(server: AdminClient) -> Shown:
    """All of them, and what each of them stores."""
    document = server.get("tenants", stored="true")
    headings = ("tenant", "name", "weight", "base", "max queued", "max running", "stored", "since")
    return document, show.table(headings, map(show.tenant_cells, document["data"]))


@command(tenants, "show")
def show_tenant(server: AdminClient, tenant: Tenant) -> Shown:
    """One of them."""
    return show.fields(server.get("tenants", tenant))


def _fields(
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    weight: Annotated[float | None, typer.Option(help="Share of the engine, beside others' 1.")] = None,
    priority: Annotated[
        str | None, typer.Option(help="interactive, standard or batch.", show_default=False)
    ] = None,
    base: Annotated[
        bool | None, typer.Option("--base/--no-base", help="Whether the base model may be asked.")
    ] = None,
    max_queued: Limit = None,
    max_running: Limit = None,
    limits: Document = None,
    budgets: Document = None,
    sample_prompts: Annotated[
        bool | None,
        typer.Option(
            "--sample-prompts/--no-sample-prompts",
            help="Whether rollouts may keep some prompts, encrypted, to replay them.",
        ),
    ] = None,
) -> dict[str, Any]:
    """The fields of a customer that were given."""
    given = {
        "name": name,
        "weight": weight,
        "priority": priority,
        "base_allowed": base,
        "sample_prompts": sample_prompts,
    }
    bounds = {"max_queued": max_queued, "max_running": max_running}
    return _changes(given, bounds) | json_objects(limits=limits, budgets=budgets)


@command(tenants, "create", fields=_fields)
def create_tenant(server: AdminClient, tenant: Tenant, fields: dict[str, Any]) -> Shown:
    """Make a customer, who can do nothing without a key."""
    return show.fields(server.post("tenants", body={"id": tenant} | fields))


@command(tenants, "set", fields=_fields)
def set_tenant(server: AdminClient, tenant: Tenant, fields: dict[str, Any]) -> Shown:
    """Change what is named; everything else stays."""
    return show.fields(server.patch("tenants", tenant, body=fields))


@command(tenants, "limits")
def tenant_limits(server: AdminClient, tenant: Tenant) -> Shown:
    """What is used of each limit and budget, what is left, and when it comes back."""
    document = server.get("tenants", tenant, "limits")
    found = [
        {"limit": row["limit"].replace("_", " "), "of": row["of"]} | _used(row) for row in document["limits"]
    ]
    found += [
        {"limit": f"{row['unit']} a {row['period']}", "of": "tenant"} | _used(row)
        for row in document["budgets"]
    ]
    return document, show.rows(found)


def _used(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in ("allowed", "used", "remaining", "resets_at")}


@command(tenants, "suspend")
def suspend(server: AdminClient, tenant: Tenant, yes: Yes = False) -> Shown:
    """Refuse a customer's calls until `tenants resume`; nothing is removed."""
    confirm(yes, f"Refuse all calls of {tenant}?")
    return show.fields(server.patch("tenants", tenant, body={"suspended": True}))


@command(tenants, "resume")
def resume(server: AdminClient, tenant: Tenant) -> Shown:
    """Answer a suspended customer again."""
    return show.fields(server.patch("tenants", tenant, body={"suspended": False}))


@command(tenants, "delete")
def delete_tenant(server: AdminClient, tenant: Tenant, yes: Yes = False) -> Shown:
    """Remove a customer with all keys and adapters."""
    confirm(yes, f"Delete {tenant} with all keys and adapters?")
    server.delete("tenants", tenant)
    return show.gone(tenant)


def _changes(given: dict[str, Any], bounds: dict[str, str | None]) -> dict[str, Any]:
    """The fields that were given. A bound is a number, or ``none``."""
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    for field, text in bounds.items():
        if text is not None:
            try:
                changes[field] = None if text == "none" else int(text)
            except ValueError as exc:
                option = f"--{field.replace('_', '-')}"
                raise typer.BadParameter(f"{text!r} is neither a number nor none", param_hint=option) from exc
    return changes
