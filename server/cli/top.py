"""``loraplex top``: what a server is doing, looked at again and again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live

from server.cli import tables as show
from server.cli.client import AdminClient
from server.metrics import OUTPUT_TOKENS, by_tenant

Tokens = Mapping[str, float]  # by tenant


def watch(server: AdminClient, *, interval: float, count: int | None) -> None:
    """Shows ``view`` every ``interval`` seconds, ``count`` times or until Ctrl-C. Raises RemoteError."""
    before: tuple[float, Tokens] | None = None
    with Live(console=Console(), auto_refresh=False) as live:
        try:
            while count is None or count > 0:
                now, tokens = time.monotonic(), by_tenant(server.metrics(), OUTPUT_TOKENS)
                rates = rates_of(before[1], tokens, now - before[0]) if before else None
                live.update(view(server.get("residency"), rates), refresh=True)
                before = now, tokens
                count = None if count is None else count - 1
                if count != 0:
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


def rates_of(before: Tokens, now: Tokens, seconds: float) -> dict[str, float]:
    """Tokens per second; a counter that went down began anew with the server."""
    return {
        tenant: (count - before.get(tenant, 0) if count >= before.get(tenant, 0) else count) / seconds
        for tenant, count in now.items()
    }


def view(residency: Mapping[str, Any], rates: Tokens | None = None) -> RenderableType:
    """``/admin/v1/residency`` as tables; with ``rates``, tokens per second by tenant."""
    queued, running, counters = (residency[name] for name in ("queued", "running", "counters"))
    slots = [
        (
            number,
            _version(slot["version"]),
            "draining" if slot["draining"] else slot["state"],
            slot["running"],
        )
        if slot["version"]
        else (number, "free", None, None)
        for number, slot in enumerate(residency["slots"])
    ]
    host = [
        (
            _version(entry["version"]),
            entry["tier"],
            entry["state"],
            entry["pinned"],
            show.size(entry["size_bytes"]),
        )
        for entry in residency["host"]
    ]
    tenants = [
        (name, queued.get(name, 0), running.get(name, 0), round(counters.get(name, 0)))
        + ((round(rates.get(name, 0.0), 1),) if rates is not None else ())
        for name in sorted({*queued, *running, *counters, *(rates or ())})
    ]
    line = (
        f"{sum(queued.values())} queued, {sum(running.values())} running, {residency['aside']} put aside,"
        f" {residency['drains']} drains, {residency['preemptions']} preemptions"
    )
    if rates is not None:
        line += f", {sum(rates.values()):.1f} tokens/s"
    if residency["draining"]:
        line += " [yellow](draining)[/yellow]"
    rated = ("tokens/s",) if rates is not None else ()
    return Group(
        line,
        "",
        show.table(("slot", "adapter", "state", "running"), slots),
        "",
        show.table(("host memory", "tier", "state", "pinned", "size"), host),
        "",
        show.table(("tenant", "queued", "running", "tokens had", *rated), tenants),
    )


def _version(key: str) -> str:
    """``tenant/adapter@digest`` with as much of the digest as people compare."""
    name, _, digest = key.rpartition("@")
    return f"{name}@{digest[:12]}"
