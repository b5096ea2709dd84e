"""``loraplex tenants``, ``keys`` and ``adapters``: a running server's customers, by its admin API."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.markup import escape
from rich.progress import Progress

from adapters.model import CONFIG_FILE, INITIAL_FILE, PROBES_FILE, WEIGHTS_FILE
from server.cli import reports as records
from server.cli import tables as show
from server.cli.client import Remote, RemoteError
from server.cli.command import command, err
from server.cli.tables import Shown

Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Tenant = Annotated[str, typer.Argument(help="The customer's id.", show_default=False)]
Name = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
Number = Annotated[int, typer.Argument(help="The version's number.", show_default=False)]
KeyId = Annotated[str, typer.Argument(help="As `keys list` shows it.", show_default=False)]
Weight = Annotated[float | None, typer.Option(help="Share of the engine, beside others' 1.")]
PriorityOf = Annotated[
    str | None, typer.Option("--priority", help="interactive, standard or batch.", show_default=False)
]
BaseAllowed = Annotated[
    bool | None, typer.Option("--base/--no-base", help="Whether the base model may be asked.")
]
Limit = Annotated[
    str | None, typer.Option(help="A number; `none` for the server's own.", metavar="NUMBER|none")
]
Document = Annotated[str | None, typer.Option(help="A JSON object, as the API takes it.", metavar="JSON")]

tenants = typer.Typer(no_args_is_help=True, help="Customers of a running server.")
keys = typer.Typer(no_args_is_help=True, help="Their keys.")
adapters = typer.Typer(no_args_is_help=True, help="Their adapters.")


# --- tenants ----------------------------------------------------------------------------------------


@command(tenants, "list")
def list_tenants(server: Remote) -> Shown:
    """All of them."""
    document = server.get("tenants")
    headings = ("tenant", "name", "weight", "base", "max queued", "max running", "since")
    return document, show.table(headings, map(show.tenant_cells, document["data"]))


@command(tenants, "show")
def show_tenant(server: Remote, tenant: Tenant) -> Shown:
    """One of them."""
    return show.fields(server.get("tenants", tenant))


@command(tenants, "create")
def create_tenant(
    server: Remote,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    weight: Weight = None,
    priority: PriorityOf = None,
    base: BaseAllowed = None,
    max_queued: Limit = None,
    max_running: Limit = None,
    limits: Document = None,
    budgets: Document = None,
) -> Shown:
    """Make a customer, who can do nothing without a key."""
    given = {"name": name, "weight": weight, "priority": priority, "base_allowed": base}
    bounds = {"max_queued": max_queued, "max_running": max_running}
    changes = _changes(given, bounds) | _objects(limits=limits, budgets=budgets)
    return show.fields(server.post("tenants", body={"id": tenant} | changes))


@command(tenants, "set")
def set_tenant(
    server: Remote,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    weight: Weight = None,
    priority: PriorityOf = None,
    base: BaseAllowed = None,
    max_queued: Limit = None,
    max_running: Limit = None,
    limits: Document = None,
    budgets: Document = None,
) -> Shown:
    """Change what is named; everything else stays."""
    given = {"name": name, "weight": weight, "priority": priority, "base_allowed": base}
    bounds = {"max_queued": max_queued, "max_running": max_running}
    changes = _changes(given, bounds) | _objects(limits=limits, budgets=budgets)
    return show.fields(server.patch("tenants", tenant, body=changes))


@command(tenants, "delete")
def delete_tenant(server: Remote, tenant: Tenant, yes: Yes = False) -> Shown:
    """Remove a customer with all keys and adapters."""
    _sure(yes, f"Delete {tenant} with all keys and adapters?")
    server.delete("tenants", tenant)
    return show.gone(tenant)


# --- keys -------------------------------------------------------------------------------------------


@command(keys, "list")
def list_keys(server: Remote, tenant: Tenant) -> Shown:
    """A customer's keys, without their secrets."""
    document = server.get("tenants", tenant, "keys")
    headings = ("id", "name", "scopes", "since", "expires", "last used")
    return document, show.table(headings, map(show.key_cells, document["data"]))


@command(keys, "create")
def create_key(
    server: Remote,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="What it is for.")] = None,
    scope: Annotated[
        list[str] | None, typer.Option(help="inference (default), adapters:write, usage:read; once for each.")
    ] = None,
    expires_at: Annotated[str | None, typer.Option(help="ISO 8601, with its zone.")] = None,
    limits: Document = None,
) -> Shown:
    """Make a key. It is shown this once."""
    given = {"name": name, "scopes": scope, "expires_at": expires_at}
    body = {field: value for field, value in given.items() if value is not None}
    return show.fields(server.post("tenants", tenant, "keys", body=body | _objects(limits=limits)))


@command(keys, "rotate")
def rotate_key(
    server: Remote,
    tenant: Tenant,
    key_id: KeyId,
    overlap: Annotated[int, typer.Option(min=0, help="Seconds for which the old one goes on.")] = 0,
) -> Shown:
    """Make a key in the place of another. It is shown this once."""
    document = server.post("tenants", tenant, "keys", key_id, "rotate", body={"overlap_seconds": overlap})
    shown = {name: value for name, value in document.items() if name != "replaces"}
    return document, show.fields(shown)[1]


@command(keys, "revoke")
def revoke_key(server: Remote, tenant: Tenant, key_id: KeyId) -> Shown:
    """Refuse a key from now on."""
    server.delete("tenants", tenant, "keys", key_id)
    return show.gone(key_id)


# --- adapters ---------------------------------------------------------------------------------------


@command(adapters, "list")
def list_adapters(server: Remote, tenant: Tenant) -> Shown:
    """A customer's adapters."""
    document = server.get("tenants", tenant, "adapters")
    headings = ("adapter", "live", "versions", "tier", "default", "pinned", "rank", "since")
    return document, show.table(headings, map(show.adapter_cells, document["data"]))


@command(adapters, "show")
def show_adapter(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """An adapter's versions."""
    return show.adapter(server.get("tenants", tenant, "adapters", name))


@command(adapters, "push")
def push(
    server: Remote,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.", show_default=False)],
    tenant: Annotated[str, typer.Option(help="The customer's id.", show_default=False)],
    name: Annotated[str, typer.Option(help="The adapter's name.", show_default=False)],
) -> Shown:
    """Upload a folder as the next version, and make it live."""
    document = _push(server, folder, tenant, name)
    report = document["report"]
    for note in report.get("conversions", ()):
        err.print(f"[cyan]converted[/cyan] {escape(str(note))}")
    for warning in report.get("warnings", ()):
        err.print(f"[yellow]warning[/yellow] {escape(str(warning))}")
    return document, show.table(
        ("adapter", "version", "live", "rank", "size", "digest"),
        [
            (
                name, document["version"], document["live"], report.get("rank"),
                show.size(report.get("size_bytes")), document["digest"][:12],
            )
        ],
    )  # fmt: skip


def _push(server: Remote, folder: Path, tenant: str, name: str) -> Any:
    with Progress(console=err, transient=True) as progress, ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        try:
            for file in (CONFIG_FILE, WEIGHTS_FILE, INITIAL_FILE, PROBES_FILE):
                if file in (CONFIG_FILE, WEIGHTS_FILE) or (folder / file).exists():
                    opened = progress.open(folder / file, "rb", description=file)
                    files[file] = stack.enter_context(opened)
        except OSError as exc:
            reason = f"{folder} is not an adapter's folder: {exc.strerror or exc}: {exc.filename}"
            raise RemoteError("no_adapter", reason) from exc
        return server.upload("tenants", tenant, "adapters", name, "versions", files=files)


@command(adapters, "live")
def make_live(server: Remote, tenant: Tenant, name: Name, version: Number) -> Shown:
    """Answer with this version from now on."""
    return _change(server, tenant, name, live=version)


@command(adapters, "rollback")
def rollback(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Answer with the version before the live one."""
    found = server.get("tenants", tenant, "adapters", name)
    live = found["live"] or 0
    before = [v["version"] for v in found["versions"] if v["version"] < live]
    if not before:
        raise RemoteError("no_version", f"{name} has no version before {found['live']}; see `adapters show`.")
    return _change(server, tenant, name, live=max(before))


@command(adapters, "canary")
def canary(
    server: Remote,
    tenant: Tenant,
    name: Name,
    shares: Annotated[
        list[str] | None,
        typer.Argument(help="One for each; 100 in all.", metavar="VERSION=PERCENT", show_default=False),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="The live version answers alone again.")] = False,
) -> Shown:
    """Divide an adapter's requests between versions."""
    if off == bool(shares):
        raise typer.BadParameter("give shares such as 3=90 4=10, or --off", param_hint="VERSION=PERCENT")
    return _change(server, tenant, name, split=None if off else dict(map(_share, shares or ())))


@command(adapters, "verify")
def verify(
    server: Remote,
    tenant: Tenant,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Another one than the live.")] = None,
) -> Shown:
    """Check a version against the probes that came with it."""
    query = {} if version is None else {"version": version}
    return show.fields(server.post("tenants", tenant, "adapters", name, "verify", body={}, **query))


@command(adapters, "default")
def make_default(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Answer requests that name no model."""
    return _change(server, tenant, name, default=True)


@command(adapters, "warm")
def warm(
    server: Remote,
    tenant: Tenant,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Another one than the live.")] = None,
    slot: Annotated[bool, typer.Option("--slot", help="Into a GPU slot too.")] = False,
) -> Shown:
    """Load a version before its first request; ends when it is there."""
    body = {"version": version, "slot": slot}
    return show.fields(server.post("tenants", tenant, "adapters", name, "warm", body=body))


@command(adapters, "pin")
def pin(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Keep the live version in memory."""
    return _change(server, tenant, name, pinned=True)


@command(adapters, "unpin")
def unpin(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Let it make room for others again."""
    return _change(server, tenant, name, pinned=False)


@command(adapters, "delete")
def delete_adapter(server: Remote, tenant: Tenant, name: Name, yes: Yes = False) -> Shown:
    """Remove an adapter with all versions."""
    _sure(yes, f"Delete {tenant}'s {name} with all versions?")
    server.delete("tenants", tenant, "adapters", name)
    return show.gone(name)


@command(adapters, "delete-version")
def delete_version(server: Remote, tenant: Tenant, name: Name, version: Number, yes: Yes = False) -> Shown:
    """Remove one version."""
    _sure(yes, f"Delete version {version} of {tenant}'s {name}?")
    server.delete("tenants", tenant, "adapters", name, "versions", version)
    return show.gone(f"{name}@{version}")


def _change(server: Remote, tenant: str, name: str, **changes: Any) -> Shown:
    return show.adapter(server.patch("tenants", tenant, "adapters", name, body=changes))


# --- all of it ---------------------------------------------------------------------------------------


def add_to(cli: typer.Typer) -> None:
    """Adds all of this to the command line."""
    cli.add_typer(tenants, name="tenants")
    cli.add_typer(keys, name="keys")
    cli.add_typer(adapters, name="adapters")
    records.add_to(cli)


# --- arguments --------------------------------------------------------------------------------------


def _sure(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True, err=True)


def _share(text: str) -> tuple[str, int]:
    version, _, percent = text.partition("=")
    if not (version.isdecimal() and percent.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not like 3=90", param_hint="VERSION=PERCENT")
    return version, int(percent)


def _objects(**texts: str | None) -> dict[str, Any]:
    """The JSON objects that were given."""
    found = {}
    for field, text in texts.items():
        if text is not None:
            try:
                found[field] = json.loads(text)
            except ValueError as exc:
                raise typer.BadParameter(f"not JSON: {exc}", param_hint=f"--{field}") from exc
    return found


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
