"""``loraplex usage``, ``requests``, ``audit``, ``residency``, ``top``: what a running server did and does."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from server.cli import tables as show
from server.cli.client import AdminClient
from server.cli.command import LOCAL, Key, Url, command, connected
from server.cli.tables import Shown

OfTenant = Annotated[str | None, typer.Option("--tenant", help="Of this customer only.")]
OfReplica = Annotated[str | None, typer.Option(help="Of a fleet: this replica's alone, by its id.")]
From = Annotated[str | None, typer.Option("--from", help="ISO 8601; UTC where it has no zone.")]
To = Annotated[str | None, typer.Option("--to", help="The first moment that does not count.")]


def add_to(cli: typer.Typer) -> None:
    """Adds these commands to the command line."""
    command(cli, "usage")(usage)
    command(cli, "requests")(requests)
    command(cli, "audit")(audit)
    command(cli, "server")(about)
    command(cli, "residency")(residency)
    command(cli, "replicas")(replicas)
    cli.command("top")(top)


def usage(
    server: AdminClient,
    tenant: OfTenant = None,
    adapter: Annotated[str | None, typer.Option(help="Of this adapter only.")] = None,
    by: Annotated[
        str, typer.Option(help="hour, day, tenant, adapter, version, key, endpoint, outcome; with commas.")
    ] = "tenant",
    start: From = None,
    end: To = None,
    percentiles: Annotated[
        bool, typer.Option("--percentiles", help="Also seconds that 50, 95, 99 % did not exceed.")
    ] = False,
) -> Shown:
    """Sum up what was used."""
    asked = {"tenant": tenant, "adapter": adapter, "by": by, "from": start, "to": end}
    document = server.get("usage", **asked, percentiles="true" if percentiles else None)
    return document, show.rows([_tokens(row) for row in document["data"]])


def _tokens(row: dict[str, Any]) -> dict[str, Any]:
    """What fits a terminal: requests, tokens, costs and percentiles; sums of times are in the document."""
    fit = {n.removesuffix("_tokens"): value for n, value in row.items() if not n.endswith("seconds")}
    return {name.replace("_seconds_", " "): value for name, value in fit.items()}


def requests(
    server: AdminClient,
    tenant: OfTenant = None,
    adapter: Annotated[str | None, typer.Option(help="Of this adapter only.")] = None,
    version: Annotated[int | None, typer.Option(min=1, help="Of this version only.")] = None,
    outcome: Annotated[
        str | None, typer.Option(help="completed, refused, unavailable, failed, cut …")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="The server's id or the client's.")] = None,
    slower_than: Annotated[float | None, typer.Option(min=0, help="Seconds in all.")] = None,
    start: From = None,
    end: To = None,
    after: Annotated[int | None, typer.Option(min=0, help="`next` of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most requests shown.")] = 30,
) -> Shown:
    """Show single requests, newest first: how they ended, and where the time went (in seconds)."""
    document = server.get(
        "requests", tenant=tenant, adapter=adapter, version=version, outcome=outcome, request_id=id_,
        slower_than=slower_than, after=after, limit=limit, **{"from": start, "to": end},
    )  # fmt: skip
    return document, show.rows([_request(row) for row in document["data"]])


# How the codes begin of refusals of the model that a request named, which its row may not have.
_OF_MODEL = ("model_", "adapter_")


def _request(row: dict[str, Any]) -> dict[str, Any]:
    model = None if (row["code"] or "").startswith(_OF_MODEL) else "base"
    if row["adapter"]:
        model = f"{row['adapter']}@{row['version']}"
    return {
        "at": row["at"],
        "tenant": row["tenant"],
        "model": model,
        "outcome": f"{row['outcome']} ({row['code']})" if row["code"] else row["outcome"],
        "prompt": row["prompt_tokens"],
        "output": row["output_tokens"],
        "queue": row["queue_seconds"],
        "load": row["load_seconds"] if row["cold"] else None,
        "first": row["first_token_seconds"],
        "total": row["seconds"],
        "id": row["request_id"],
    }


def audit(
    server: AdminClient,
    tenant: OfTenant = None,
    actor: Annotated[str | None, typer.Option(help="Changes by this one only.")] = None,
    action: Annotated[str | None, typer.Option(help="Changes of this kind only.")] = None,
    start: From = None,
    end: To = None,
    after: Annotated[int | None, typer.Option(min=0, help="Changes after the one with this id.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most changes shown.")] = 100,
) -> Shown:
    """Show what was changed, and by whom, newest first; what came after an id, oldest first."""
    asked = {"tenant": tenant, "actor": actor, "action": action, "from": start, "to": end}
    asked["order"] = "newest" if after is None else "oldest"
    document = server.get("audit", **asked, after=after, limit=limit)
    names = ("id", "at", "actor", "action", "tenant", "target")
    rows = [
        {name: entry[name] for name in names} | {"change": show.change(entry["before"], entry["after"])}
        for entry in document["data"]
    ]
    return document, show.rows(rows)


def replicas(server: AdminClient) -> Shown:
    """Show the fleet's replicas: where, how they are, and what they have to do."""
    document = server.get("replicas")
    names = (
        *("id", "url", "state", "running", "queued", "backlog_seconds", "pressure", "max_running"),
        *("gpu_slots", "engine", "beat_at"),
    )
    found = [
        {name: row[name] for name in names} | {"in_slots": len(row["in_slots"])} for row in document["data"]
    ]
    return document, show.rows(found)


def about(server: AdminClient) -> Shown:
    """Show what a server is: versions, base model, capacity, disk, and its settings without secrets."""
    document = server.get("server")
    shown = {name: value for name, value in document.items() if name != "settings"}
    flat: dict[str, Any] = {}
    for name, value in shown.items():
        inner = value if isinstance(value, dict) else None
        flat |= {f"{name} {n}": v for n, v in inner.items()} if inner else {name: value}
    return document, show.fields(flat)[1]


def residency(
    server: AdminClient,
    replica: OfReplica = None,
    events: Annotated[int, typer.Option(min=0, help="The scheduler's last so many events instead.")] = 0,
) -> Shown:
    """Slots, host memory and queues as they are now."""
    from server.cli.top import view

    document = server.get("residency", replica=replica, events=events or None)
    if not events:
        return document, view(document)
    return document, show.rows(document["events"])


def top(
    url: Url = LOCAL,
    key: Key = "",
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="Looks; until Ctrl-C if not given.")] = None,
    replica: OfReplica = None,
) -> None:
    """Watch slots, queues and tokens per second."""
    from server.cli.top import watch

    with connected(url, key) as server:
        watch(server, interval=interval, count=count, replica=replica)
