"""``loraplex adapters``: customers' adapters and their versions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from adapters.inspection.unused import ignored_unused
from server.cli import tables as show
from server.cli.arguments import Name, Tenant, Yes, confirm, json_objects
from server.cli.client import OWN, AdminClient, RemoteError
from server.cli.command import command, say
from server.cli.tables import Shown

Number = Annotated[int, typer.Argument(help="The version's number.", show_default=False)]

adapters = typer.Typer(no_args_is_help=True, help="Their adapters.")


@command(adapters, "list")
def list_adapters(server: AdminClient, tenant: Tenant) -> Shown:
    """A customer's adapters."""
    document = server.get("tenants", tenant, "adapters")
    page = document
    while page.get("next") is not None:
        page = server.get("tenants", tenant, "adapters", after=page["next"])
        document = {**document, "data": document["data"] + page["data"], "next": None}
    headings = ("adapter", "live", "versions", "tier", "default", "pinned", "rank", "since")
    return document, show.table(headings, map(show.adapter_cells, document["data"]))


@command(adapters, "show")
def show_adapter(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Whose coverage is shown; the live one's.")] = None,
) -> Shown:
    """An adapter's versions: probes, golden probes, warnings, and what the live one changes."""
    return show.adapter(server.get("tenants", tenant, "adapters", name), version)


@command(adapters, "find")
def find(
    server: AdminClient,
    q: Annotated[str | None, typer.Argument(help="A part of the customer's or the adapter's name.")] = None,
    tier: Annotated[str | None, typer.Option(help="gpu, host or disk.")] = None,
    has: Annotated[str | None, typer.Option(help="warning, quarantine or split.")] = None,
    after: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most adapters shown.")] = 50,
) -> Shown:
    """All customers' adapters, by name and state."""
    document = server.get("adapters", q=q, tier=tier, has=has, after=after, limit=limit)
    names = ("tenant", "name", "live", "versions", "tier", "default", "pinned", "warnings")
    return document, show.rows([{name: row[name] for name in names} for row in document["data"]])


@command(adapters, "uploads")
def uploads(server: AdminClient, tenant: Tenant, name: Name) -> Shown:
    """Uploads under way, and those that were refused, with the reason and what to do."""
    document = server.get("tenants", tenant, "adapters", name, "uploads")
    return document, show.rows([_upload(row) for row in document["data"]])


def _upload(row: dict[str, Any]) -> dict[str, Any]:
    from adapters.errors import CURES

    error = row.get("error") or {}
    words = (error.get("message"), CURES.get(error.get("code", "")))
    said = " ".join(str(word) for word in words if word)
    return {"at": row["created_at"], "state": row["state"], "code": error.get("code"), "why": said or None}


@command(adapters, "download")
def download(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Number,
    out: Annotated[
        Path | None, typer.Option(help="File to be written; NAME-VERSION.tar if not given.")
    ] = None,
) -> Shown:
    """Write a version's files as a tar, as they are served; it can be uploaded again."""
    file = out or Path(f"{name}-{version}.tar")
    server.download("tenants", tenant, "adapters", name, "versions", version, "download", to=file)
    return show.fields({"file": str(file), "bytes": file.stat().st_size})


@command(adapters, "note")
def note(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Number,
    text: Annotated[str, typer.Argument(help="For people; an empty one takes it away.", show_default=False)],
) -> Shown:
    """Keep a note with a version."""
    path = ("tenants", tenant, "adapters", name)
    server.patch(*path, "versions", version, body={"note": text})
    return show.adapter(server.get(*path))


@command(adapters, "push")
def push(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    folder: Annotated[Path, typer.Argument(help="What PEFT's save_pretrained wrote.", show_default=False)],
    allow_no_effect: Annotated[
        bool, typer.Option("--allow-no-effect", help="Though it changes nothing that the probe sees.")
    ] = False,
    allow_implausible: Annotated[
        bool, typer.Option("--allow-implausible", help="Though its size is implausible; operators only.")
    ] = False,
    ignore_field: Annotated[
        list[str] | None, typer.Option(help="A field of its config that does not matter; once for each.")
    ] = None,
    note: Annotated[str | None, typer.Option(help="Kept with the version, for people.")] = None,
    rollout: Annotated[
        bool, typer.Option("--rollout", help="It goes live by a standard rollout, not at once.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="A new version, though these files are one since today.")
    ] = False,
) -> Shown:
    """Upload a folder as the next version, and make it live; the same files again make nothing new."""
    from server.cli.push import Push

    given = {
        "ignore_fields": ",".join(ignore_field or ()),
        "note": note or "",
        "rollout": "standard" if rollout else "",
    }
    flags = {"allow_no_effect": allow_no_effect, "allow_implausible": allow_implausible}
    query = {name: value for name, value in given.items() if value}
    query |= {name: "true" for name, chosen in flags.items() if chosen}
    pushed = Push(folder, query)
    document, was_there = pushed.send(server, tenant, name, again=again)
    if unused := pushed.unused():
        say("yellow", "warning", ignored_unused(unused))
    report = document["report"]
    for note_ in report.get("conversions", ()):
        say("cyan", "converted", str(note_))
    for warning in report.get("warnings", ()):
        say("yellow", "warning", str(warning))
    if begun := document.get("rollout"):
        say("cyan", "rollout", f"{begun['id']}: {begun['state']} at {begun['share']} %")
    if was_there:
        text = f"these files are version {document['version']}; --again makes another of them"
        say("yellow", "nothing new", text)
    return document, show.table(
        ("adapter", "version", "live", "rank", "size", "digest"),
        [
            (
                name, document["version"], document["live"], report.get("rank"),
                show.size(report.get("size_bytes")), document["digest"][:12],
            )
        ],
    )  # fmt: skip


@command(adapters, "live")
def make_live(server: AdminClient, tenant: Tenant, name: Name, version: Number) -> Shown:
    """Answer with this version from now on."""
    return _change(server, tenant, name, live=version)


@command(adapters, "rollback")
def rollback(server: AdminClient, tenant: Tenant, name: Name) -> Shown:
    """Answer with the version before the live one."""
    found = server.get("tenants", tenant, "adapters", name)
    live = found["live"] or 0
    before = [v["version"] for v in found["versions"] if v["version"] < live]
    if not before:
        raise RemoteError("no_version", f"{name} has no version before {found['live']}; see `adapters show`.")
    return _change(server, tenant, name, live=max(before))


@command(adapters, "canary")
def canary(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    shares: Annotated[
        list[str] | None,
        typer.Argument(help="One for each; 100 in all.", metavar="VERSION=PERCENT", show_default=False),
    ] = None,
    off: Annotated[bool, typer.Option("--off", help="The live version answers alone again.")] = False,
) -> Shown:
    """Divide an adapter's requests between versions."""
    if "=" in name:  # a customer's own: there was no customer in front
        tenant, name, shares = OWN, tenant, [name, *(shares or ())]
    if off == bool(shares):
        raise typer.BadParameter("give shares such as 3=90 4=10, or --off", param_hint="VERSION=PERCENT")
    return _change(server, tenant, name, split=None if off else dict(map(_share, shares or ())))


@command(adapters, "verify")
def verify(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Another one than the live.")] = None,
) -> Shown:
    """Check a version against the probes that came with it."""
    query = {} if version is None else {"version": version}
    return show.fields(server.post("tenants", tenant, "adapters", name, "verify", body={}, **query))


@command(adapters, "quarantine")
def quarantine(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Number,
    reason: Annotated[str | None, typer.Option(help="Why, which its customers read.")] = None,
) -> Shown:
    """Take a version out of service at once, the only one too; `release` puts it back."""
    path = ("tenants", tenant, "adapters", name, "versions", version)
    server.patch(*path, body={"quarantined": True} | ({} if reason is None else {"reason": reason}))
    return show.adapter(server.get("tenants", tenant, "adapters", name))


@command(adapters, "release")
def release(server: AdminClient, tenant: Tenant, name: Name, version: Number) -> Shown:
    """Put a version that was taken out of service back into it."""
    path = ("tenants", tenant, "adapters", name, "versions", version)
    server.patch(*path, body={"quarantined": False})
    return show.adapter(server.get("tenants", tenant, "adapters", name))


@command(adapters, "default")
def make_default(server: AdminClient, tenant: Tenant, name: Name) -> Shown:
    """Answer requests that name no model."""
    return _change(server, tenant, name, default=True)


@command(adapters, "defaults")
def set_defaults(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    values: Annotated[
        str, typer.Argument(help="A JSON object, as the API takes it, or none.", metavar="JSON|none")
    ],
) -> Shown:
    """Set what requests that do not say get: temperature, max_tokens, a system prompt and others."""
    given = None if values == "none" else json_objects(defaults=values)["defaults"]
    return _change(server, tenant, name, defaults=given)


@command(adapters, "warm")
def warm(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Annotated[int | None, typer.Option(help="Another one than the live.")] = None,
    slot: Annotated[bool, typer.Option("--slot", help="Into a GPU slot too.")] = False,
) -> Shown:
    """Load a version before its first request; ends when it is there."""
    body = {"version": version, "slot": slot}
    return show.fields(server.post("tenants", tenant, "adapters", name, "warm", body=body))


@command(adapters, "pin")
def pin(server: AdminClient, tenant: Tenant, name: Name) -> Shown:
    """Keep the live version in memory."""
    return _change(server, tenant, name, pinned=True)


@command(adapters, "unpin")
def unpin(server: AdminClient, tenant: Tenant, name: Name) -> Shown:
    """Let it make room for others again."""
    return _change(server, tenant, name, pinned=False)


@command(adapters, "delete")
def delete_adapter(server: AdminClient, tenant: Tenant, name: Name, yes: Yes = False) -> Shown:
    """Remove an adapter with all versions."""
    confirm(yes, f"Delete {tenant}'s {name} with all versions?")
    server.delete("tenants", tenant, "adapters", name)
    return show.gone(name)


@command(adapters, "delete-version")
def delete_version(
    server: AdminClient, tenant: Tenant, name: Name, version: Number, yes: Yes = False
) -> Shown:
    """Remove one version."""
    confirm(yes, f"Delete version {version} of {tenant}'s {name}?")
    server.delete("tenants", tenant, "adapters", name, "versions", version)
    return show.gone(f"{name}@{version}")


def _change(server: AdminClient, tenant: str, name: str, **changes: Any) -> Shown:
    return show.adapter(server.patch("tenants", tenant, "adapters", name, body=changes))


def _share(text: str) -> tuple[str, int]:
    version, _, percent = text.partition("=")
    if not (version.isdecimal() and percent.isdecimal()):
        raise typer.BadParameter(f"{text!r} is not like 3=90", param_hint="VERSION=PERCENT")
    return version, int(percent)
