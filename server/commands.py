"""``loraplex tenants``, ``keys``, ``adapters``, ``residency`` and ``top``: a running server, by its API.

Every command is a function from a ``Remote`` and its arguments to (document, what to show): people see the
second, ``--json`` prints the first. It ends with 1 and ``code: message`` when the server refuses.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from adapters.model import CONFIG_FILE, INITIAL_FILE, WEIGHTS_FILE
from server import show
from server.remote import Remote, RemoteError
from server.top import view, watch

Shown = show.Shown
_err = Console(stderr=True)
Url = Annotated[str, typer.Option("--url", envvar="LORAPLEX_URL", help="Where the server is.")]
Key = Annotated[
    str, typer.Option("--key", envvar="LORAPLEX_ADMIN_KEY", help="The admin key.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Tenant = Annotated[str, typer.Argument(help="The customer's id.", show_default=False)]
Name = Annotated[str, typer.Argument(help="The adapter's name.", show_default=False)]
Number = Annotated[int, typer.Argument(help="The version's number.", show_default=False)]
KeyId = Annotated[str, typer.Argument(help="As `keys list` shows it.", show_default=False)]
Weight = Annotated[float | None, typer.Option(help="Share of the engine, beside others' 1.")]
BaseAllowed = Annotated[
    bool | None, typer.Option("--base/--no-base", help="Whether the base model may be asked.")
]
Limit = Annotated[
    str | None, typer.Option(help="A number; `none` for the server's own.", metavar="NUMBER|none")
]
Command = Callable[..., Shown]

tenants = typer.Typer(no_args_is_help=True, help="Customers of a running server.")
keys = typer.Typer(no_args_is_help=True, help="Their keys.")
adapters = typer.Typer(no_args_is_help=True, help="Their adapters.")

_COMMON = {
    "url": (Url, "http://127.0.0.1:8000"),
    "key": (Key, ""),
    "as_json": (Json, False),
}


def _command(group: typer.Typer, name: str | None = None) -> Callable[[Command], Command]:
    """Adds ``run`` to ``group``, with the options that say which server and how to print."""

    def register(run: Command) -> Command:
        @functools.wraps(run)
        def command(*, url: str, key: str, as_json: bool, **given: Any) -> None:
            with connected(url, key) as server:
                document, shown = run(server, **given)
            if as_json:
                print(json.dumps(document, indent=2))
            else:
                Console().print(shown)

        signature = inspect.signature(run, eval_str=True)
        own = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "server"]
        added = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, annotation=a, default=d)
            for n, (a, d) in _COMMON.items()
        ]
        command.__signature__ = inspect.Signature([*own, *added])  # type: ignore[attr-defined]
        group.command(name)(command)
        return run

    return register


@contextmanager
def connected(url: str, key: str) -> Iterator[Remote]:
    """A Remote; whatever it refuses is printed, and ends the program with 1."""
    try:
        if not key:
            raise RemoteError("no_key", "Give the admin key with LORAPLEX_ADMIN_KEY or --key.")
        server = Remote(url, key)
        try:
            yield server
        finally:
            server.close()
    except RemoteError as exc:
        _err.print(f"[red]{escape(exc.code)}[/red]: {escape(str(exc))}", soft_wrap=True)
        raise SystemExit(1) from exc


# --- tenants ----------------------------------------------------------------------------------------


@_command(tenants, "list")
def list_tenants(server: Remote) -> Shown:
    """All of them."""
    document = server.get("tenants")
    headings = ("tenant", "name", "weight", "base", "max queued", "max running", "since")
    return document, show.table(headings, map(show.tenant_cells, document["data"]))


@_command(tenants, "show")
def show_tenant(server: Remote, tenant: Tenant) -> Shown:
    """One of them."""
    return show.fields(server.get("tenants", tenant))


@_command(tenants, "create")
def create_tenant(
    server: Remote,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    weight: Weight = None,
    base: BaseAllowed = None,
    max_queued: Limit = None,
    max_running: Limit = None,
) -> Shown:
    """Make a customer, who can do nothing without a key."""
    changes = _changes(name, weight, base, max_queued, max_running)
    return show.fields(server.post("tenants", body={"id": tenant} | changes))


@_command(tenants, "set")
def set_tenant(
    server: Remote,
    tenant: Tenant,
    name: Annotated[str | None, typer.Option(help="For people.")] = None,
    weight: Weight = None,
    base: BaseAllowed = None,
    max_queued: Limit = None,
    max_running: Limit = None,
) -> Shown:
    """Change what is named; everything else stays."""
    changes = _changes(name, weight, base, max_queued, max_running)
    return show.fields(server.patch("tenants", tenant, body=changes))


@_command(tenants, "delete")
def delete_tenant(server: Remote, tenant: Tenant, yes: Yes = False) -> Shown:
    """Remove a customer with all keys and adapters."""
    _sure(yes, f"Delete {tenant} with all keys and adapters?")
    server.delete("tenants", tenant)
    return show.gone(tenant)


# --- keys -------------------------------------------------------------------------------------------


@_command(keys, "list")
def list_keys(server: Remote, tenant: Tenant) -> Shown:
    """A customer's keys, without their secrets."""
    document = server.get("tenants", tenant, "keys")
    rows = ((key["id"], key["name"], show.when(key["created_at"])) for key in document["data"])
    return document, show.table(("id", "name", "since"), rows)


@_command(keys, "create")
def create_key(
    server: Remote, tenant: Tenant, name: Annotated[str | None, typer.Option(help="What it is for.")] = None
) -> Shown:
    """Make a key. It is shown this once."""
    return show.fields(server.post("tenants", tenant, "keys", body={} if name is None else {"name": name}))


@_command(keys, "revoke")
def revoke_key(server: Remote, tenant: Tenant, key_id: KeyId) -> Shown:
    """Refuse a key from now on."""
    server.delete("tenants", tenant, "keys", key_id)
    return show.gone(key_id)


# --- adapters ---------------------------------------------------------------------------------------


@_command(adapters, "list")
def list_adapters(server: Remote, tenant: Tenant) -> Shown:
    """A customer's adapters."""
    document = server.get("tenants", tenant, "adapters")
    headings = ("adapter", "live", "versions", "tier", "default", "pinned", "rank", "since")
    return document, show.table(headings, map(show.adapter_cells, document["data"]))


@_command(adapters, "show")
def show_adapter(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """An adapter's versions."""
    return show.adapter(server.get("tenants", tenant, "adapters", name))


@_command(adapters, "push")
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
        _err.print(f"[cyan]converted[/cyan] {escape(str(note))}")
    for warning in report.get("warnings", ()):
        _err.print(f"[yellow]warning[/yellow] {escape(str(warning))}")
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
    with Progress(console=_err, transient=True) as progress, ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        try:
            for file in (CONFIG_FILE, WEIGHTS_FILE, INITIAL_FILE):
                if file != INITIAL_FILE or (folder / file).exists():
                    opened = progress.open(folder / file, "rb", description=file)
                    files[file] = stack.enter_context(opened)
        except OSError as exc:
            reason = f"{folder} is not an adapter's folder: {exc.strerror or exc}: {exc.filename}"
            raise RemoteError("no_adapter", reason) from exc
        return server.upload("tenants", tenant, "adapters", name, "versions", files=files)


@_command(adapters, "live")
def make_live(server: Remote, tenant: Tenant, name: Name, version: Number) -> Shown:
    """Answer with this version from now on."""
    return _change(server, tenant, name, live=version)


@_command(adapters, "rollback")
def rollback(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Answer with the version before the live one."""
    found = server.get("tenants", tenant, "adapters", name)
    live = found["live"] or 0
    before = [v["version"] for v in found["versions"] if v["version"] < live]
    if not before:
        raise RemoteError("no_version", f"{name} has no version before {found['live']}; see `adapters show`.")
    return _change(server, tenant, name, live=max(before))


@_command(adapters, "default")
def make_default(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Answer requests that name no model."""
    return _change(server, tenant, name, default=True)


@_command(adapters, "pin")
def pin(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Keep the live version in memory."""
    return _change(server, tenant, name, pinned=True)


@_command(adapters, "unpin")
def unpin(server: Remote, tenant: Tenant, name: Name) -> Shown:
    """Let it make room for others again."""
    return _change(server, tenant, name, pinned=False)


@_command(adapters, "delete")
def delete_adapter(server: Remote, tenant: Tenant, name: Name, yes: Yes = False) -> Shown:
    """Remove an adapter with all versions."""
    _sure(yes, f"Delete {tenant}'s {name} with all versions?")
    server.delete("tenants", tenant, "adapters", name)
    return show.gone(name)


@_command(adapters, "delete-version")
def delete_version(server: Remote, tenant: Tenant, name: Name, version: Number, yes: Yes = False) -> Shown:
    """Remove one version."""
    _sure(yes, f"Delete version {version} of {tenant}'s {name}?")
    server.delete("tenants", tenant, "adapters", name, "versions", version)
    return show.gone(f"{name}@{version}")


def _change(server: Remote, tenant: str, name: str, **changes: Any) -> Shown:
    return show.adapter(server.patch("tenants", tenant, "adapters", name, body=changes))


# --- now --------------------------------------------------------------------------------------------


def add_to(cli: typer.Typer) -> None:
    """Adds all of this to the command line."""
    cli.add_typer(tenants, name="tenants")
    cli.add_typer(keys, name="keys")
    cli.add_typer(adapters, name="adapters")
    _command(cli, "residency")(residency)
    cli.command("top")(top)


def residency(server: Remote) -> Shown:
    """Slots, host memory and queues as they are now."""
    document = server.get("residency")
    return document, view(document)


def top(
    url: Url = "http://127.0.0.1:8000",
    key: Key = "",
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="Looks; until Ctrl-C if not given.")] = None,
) -> None:
    """Watch slots, queues and tokens per second."""
    with connected(url, key) as server:
        watch(server, interval=interval, count=count)


# --- arguments --------------------------------------------------------------------------------------


def _sure(yes: bool, question: str) -> None:
    if not yes:
        typer.confirm(question, abort=True, err=True)


def _changes(
    name: str | None, weight: float | None, base: bool | None, max_queued: str | None, max_running: str | None
) -> dict[str, Any]:
    """The fields that were given."""
    given = {"name": name, "weight": weight, "base_allowed": base}
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    for field, text in (("max_queued", max_queued), ("max_running", max_running)):
        if text is not None:
            try:
                changes[field] = None if text == "none" else int(text)
            except ValueError as exc:
                option = f"--{field.replace('_', '-')}"
                raise typer.BadParameter(f"{text!r} is neither a number nor none", param_hint=option) from exc
    return changes
