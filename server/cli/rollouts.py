"""``loraplex rollouts``: new versions that are judged on real requests."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from server.cli import tables as show
from server.cli.adapters import Number
from server.cli.arguments import Document, Name, SomeName, SomeTenant, Tenant, json_objects
from server.cli.client import OWN, AdminClient
from server.cli.command import command
from server.cli.looks import looks
from server.cli.tables import Shown

Rollout = Annotated[
    str | None, typer.Option("--rollout", help="Its id; the newest if not given.", show_default=False)
]
_ENDED = ("completed", "rolled_back")

rollouts = typer.Typer(no_args_is_help=True, help="New versions, judged on real requests.")


@command(rollouts, "start")
def start(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    version: Number,
    steps: Annotated[str | None, typer.Option(help="Percent, as in 5,25,100.")] = None,
    hold: Annotated[str | None, typer.Option(help="How long at least at each step, as in 10m.")] = None,
    guards: Document = None,
) -> Shown:
    """Give a version a growing share of its adapter's requests."""
    body: dict[str, Any] = {"version": version, **json_objects(guards=guards)}
    if steps is not None:
        try:
            body["steps"] = [int(step) for step in steps.split(",")]
        except ValueError as exc:
            raise typer.BadParameter("say percents, as in 5,25,100", param_hint="--steps") from exc
    if hold is not None:
        body["hold"] = hold
    document = server.post(*_path(tenant, name), body=body)
    return document, view(document)


@command(rollouts, "list")
def list_rollouts(
    server: AdminClient,
    tenant: SomeTenant = None,
    name: SomeName = None,
    state: Annotated[
        str | None,
        typer.Option(
            help="running, held, completed or rolled_back; if not given, those that have not ended."
        ),
    ] = None,
    after: Annotated[str | None, typer.Option(help="`next` of the page before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Most rollouts shown.")] = 50,
) -> Shown:
    """An adapter's rollouts, newest first; without an adapter those of all customers, or of one."""
    if name is None and (tenant is None or server.me() is None):
        asked = {"state": state or "active", "after": after, "limit": limit}
        return _of_all(server.get("rollouts", tenant=tenant, **asked))
    if state is not None or after is not None:
        raise typer.BadParameter("leave --state and --after out for one adapter", param_hint="the options")
    owner, adapter = (OWN, tenant) if name is None else (tenant or OWN, name)
    document = server.get(*_path(owner, adapter or ""), limit=min(limit, 100))
    headings = ("rollout", "version", "state", "share", "begun", "reason")
    rows = [
        (one["id"], one["version"], one["state"], f"{one['share']} %", one["created_at"], one["reason"])
        for one in document["data"]
    ]
    return document, show.table(headings, rows)


def _of_all(document: Any) -> Shown:
    headings = ("tenant", "adapter", "version", "beside", "state", "share", "held by", "updated", "reason")
    names = ("tenant", "adapter", "version", "live", "state")
    rows = [
        (
            *(one[name] for name in names),
            f"{one['share']} %",
            one["held_by"],
            show.when(one["updated_at"]),
            one["reason"],
        )
        for one in document["data"]
    ]
    return document, show.table(headings, rows) if rows else "none"


@command(rollouts, "show")
def show_rollout(server: AdminClient, tenant: Tenant, name: Name, rollout: Rollout = None) -> Shown:
    """What was decided so far, and with which numbers."""
    document = _found(server, tenant, name, rollout)
    return document, view(document)


@command(rollouts, "watch")
def watch(
    server: AdminClient,
    tenant: Tenant,
    name: Name,
    rollout: Rollout = None,
    interval: Annotated[float, typer.Option(min=0.2, help="Seconds between two looks.")] = 2.0,
    count: Annotated[int | None, typer.Option(min=1, help="Looks; until it has ended if not given.")] = None,
) -> Shown:
    """Look at a rollout again and again, until it has ended.

    On a terminal each look takes the place of the one before, elsewhere each is printed as it comes.
    """
    from rich.console import Console

    document = _found(server, tenant, name, rollout)
    with looks(Console(stderr=True), transient=True) as show_look:
        try:
            while document["state"] not in _ENDED and (count is None or count > 1):
                show_look(view(document))
                time.sleep(interval)
                count = None if count is None else count - 1
                document = server.get(*_path(tenant, name), document["id"])
        except KeyboardInterrupt:
            pass
    return document, view(document)


@command(rollouts, "pause")
def pause(server: AdminClient, tenant: Tenant, name: Name, rollout: Rollout = None) -> Shown:
    """Keep the share as it is."""
    return _act(server, tenant, name, rollout, "pause")


@command(rollouts, "resume")
def resume(server: AdminClient, tenant: Tenant, name: Name, rollout: Rollout = None) -> Shown:
    """Let it go on."""
    return _act(server, tenant, name, rollout, "resume")


@command(rollouts, "forward")
def forward(server: AdminClient, tenant: Tenant, name: Name, rollout: Rollout = None) -> Shown:
    """Take the next step at once."""
    return _act(server, tenant, name, rollout, "forward")


@command(rollouts, "back")
def back(server: AdminClient, tenant: Tenant, name: Name, rollout: Rollout = None) -> Shown:
    """Give the live version all requests back."""
    return _act(server, tenant, name, rollout, "roll_back")


def _act(server: AdminClient, tenant: str, name: str, rollout: str | None, action: str) -> Shown:
    found = _found(server, tenant, name, rollout)
    document = server.patch(*_path(tenant, name), found["id"], body={"action": action})
    return document, view(document)


def _path(tenant: str, name: str) -> tuple[str, ...]:
    return "tenants", tenant, "adapters", name, "rollouts"


def _found(server: AdminClient, tenant: str, name: str, rollout: str | None) -> Any:
    if rollout is None:
        newest = server.get(*_path(tenant, name), limit=1)["data"]
        if not newest:
            raise typer.BadParameter(f"{name} has had no rollout", param_hint="the adapter's name")
        rollout = newest[0]["id"]
    return server.get(*_path(tenant, name), rollout)


def view(document: Mapping[str, Any]) -> Any:
    """A rollout as tables: how far it is, what was seen of both versions, its tests, its decisions."""
    from rich.console import Group
    from rich.markup import escape

    line = f"version {document['version']} beside {document['live']}: [bold]{document['state']}[/bold]"
    line += f" at {document['share']} % (steps {', '.join(map(str, document['steps']))})"
    if document["waits_for"] and document["state"] not in _ENDED:
        line += f", waits for {escape(document['waits_for'])}"
    decisions = [
        (decision["at"], decision["action"], f"{decision['share']} %", decision["by"], decision["reason"])
        for decision in document["decisions"]
    ]
    parts = [line, "", *_numbers(document), show.table(("at", "what", "share", "by", "why"), decisions)]
    return Group(*parts)


def _numbers(document: Mapping[str, Any]) -> Sequence[Any]:
    numbers = document["numbers"]
    if not numbers:
        return ()
    new, live = numbers["new"], numbers["live"]
    seen = [(what.replace("_", " "), new[what], live[what]) for what in new]
    versions = (f"version {document['version']}", f"version {document['live']}")
    tests = [
        (one["test"], one["verdict"], f"{one['harm']:.0%}", f"{one['safe']:.0%}", one["compared"])
        for one in numbers["tests"]
    ]
    headings = ("test", "verdict", "evidence of harm", "of being safe", "compared")
    replays = numbers.get("replays")
    replayed: tuple[Any, ...] = ()
    if replays:
        told = [f"replayed {name.replace('_', ' ')}" for name in replays]
        replayed = (show.table(told, [tuple(replays.values())]), "")
    parts = (show.table(("", *versions), seen), "", show.table(headings, tests), "")
    return (*parts, *replayed)
