"""``loraplex top``: what a server is doing, looked at again and again."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from typing import Any

from rich.console import Console, Group, RenderableType

from server.cli import tables as show
from server.cli.client import AdminClient, RemoteError
from server.cli.looks import looks

# What is looked at on the page of metrics: counters with the label ``tenant``, and what they are called here.
COUNTED = {
    "loraplex_output_tokens_total": "output",
    "loraplex_prompt_tokens_total": "prompt",
    "loraplex_cached_tokens_total": "cached",
    "loraplex_requests_total": "ended",
    "loraplex_time_to_first_token_seconds_sum": "first_seconds",
    "loraplex_time_to_first_token_seconds_count": "first_tokens",
}
_LINE = re.compile(r"(\w+)\{([^}]*)\} (\S+)")
_LABEL = re.compile(r'(\w+)="([^"]*)"')
# Outcomes of requests that were not answered, for no fault of theirs.
_REFUSED = ("refused", "quarantined", "unavailable", "failed")

Counts = Mapping[str, Mapping[str, float]]  # by tenant, then by name


def watch(server: AdminClient, *, interval: float, count: int | None, replica: str | None = None) -> None:
    """Shows ``view`` every ``interval`` seconds, ``count`` times or until Ctrl-C. Raises RemoteError.

    On a terminal in place of the one before, elsewhere below it, each as soon as it is there.
    """
    before: tuple[float, Counts] | None = None
    with looks(Console()) as show_look:
        try:
            while count is None or count > 0:
                now, counts = time.monotonic(), _counts(server)
                since = changes(before[1], counts) if before else None
                seconds = now - before[0] if before else 0.0
                show_look(view(server.get("residency", replica=replica), since, seconds))
                before = now, counts
                count = None if count is None else count - 1
                if count != 0:
                    time.sleep(interval)
        except KeyboardInterrupt:
            return


def _counts(server: AdminClient) -> Counts:
    """Nothing where the page of metrics has a key of its own."""
    try:
        return counts_of(server.metrics())
    except RemoteError as exc:
        if exc.code != "invalid_api_key":
            raise
        return {}


def counts_of(page: str) -> dict[str, dict[str, float]]:
    """What ``COUNTED`` names on a page of metrics, by tenant; ``refused`` are some of ``ended``."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _samples(page):
        mine = found.setdefault(labels["tenant"], {})
        names = [COUNTED[name]] + (["refused"] if labels.get("outcome") in _REFUSED else [])
        for counted in names:
            mine[counted] = mine.get(counted, 0.0) + value
    return found


def _samples(page: str) -> Iterator[tuple[str, dict[str, str], float]]:
    for line in page.splitlines():
        if line.startswith("loraplex_") and (sample := _LINE.match(line)) and sample[1] in COUNTED:
            yield sample[1], dict(_LABEL.findall(sample[2])), float(sample[3])


def changes(before: Counts, now: Counts) -> dict[str, dict[str, float]]:
    """What came meanwhile; a counter that went down began anew with the server."""
    return {
        tenant: {
            name: count - was if count >= (was := before.get(tenant, {}).get(name, 0.0)) else count
            for name, count in counts.items()
        }
        for tenant, counts in now.items()
    }


def view(residency: Mapping[str, Any], since: Counts | None = None, seconds: float = 0.0) -> RenderableType:
    """``/admin/v1/residency`` as tables; ``since`` is what came in the last ``seconds``, by tenant."""
    queued, running, counters = (residency[name] for name in ("queued", "running", "counters"))
    whose = ("replica",) if "replicas" in residency else ()
    slots = [
        (
            *_whose(slot),
            number,
            _name(slot),
            "draining" if slot["draining"] else slot["state"],
            slot["running"],
        )
        if slot["version"]
        else (*_whose(slot), number, "free", None, None)
        for number, slot in _numbered(residency["slots"])
    ]
    host = [
        (
            *_whose(entry),
            *(_name(entry), entry["tier"], entry["state"], entry["pinned"], show.size(entry["size_bytes"])),
        )
        for entry in residency["host"]
    ]
    tenants = [
        (name, queued.get(name, 0), running.get(name, 0), round(counters.get(name, 0)))
        + (_recent(since.get(name, {}), seconds) if since is not None else ())
        for name in sorted({*queued, *running, *counters, *(since or ())})
    ]
    rated = ("tokens/s", "first token s", "refused", "cached %") if since is not None else ()
    return Group(
        _line(residency, since, seconds),
        "",
        *((_replicas(residency["replicas"]), "") if whose else ()),
        show.table((*whose, "slot", "adapter", "state", "running"), slots),
        "",
        show.table((*whose, "host memory", "tier", "state", "pinned", "size"), host),
        "",
        show.table(("tenant", "queued", "running", "tokens had", *rated), tenants),
    )


def _replicas(replicas: Iterable[Mapping[str, Any]]) -> RenderableType:
    """How each is; one that does not answer has dashes."""
    rows = [
        {
            "replica": one["id"],
            "url": one["url"],
            "state": one["state"] if one["answered"] or one["state"] != "ready" else "does not answer",
            **{name: one[name] for name in ("running", "queued", "aside", "drains", "preemptions")},
            "backlog_s": one["backlog_seconds"],
            "tokens/s": one["rates"] and one["rates"]["output_tokens_per_second"],
        }
        for one in replicas
    ]
    return show.rows(rows)


def _whose(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """The replica that a slot or an entry is of, in a fleet."""
    return (entry["replica"],) if "replica" in entry else ()


def _numbered(slots: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """From 0 on, at each replica."""
    for _, of_one in groupby(slots, key=_whose):
        yield from enumerate(of_one)


def _line(residency: Mapping[str, Any], since: Counts | None, seconds: float) -> str:
    queued, running, rates = (residency[name] for name in ("queued", "running", "rates"))
    line = (
        f"{sum(queued.values())} queued, {sum(running.values())} running, {residency['aside']} put aside,"
        f" {residency['drains']} drains, {residency['preemptions']} preemptions"
    )
    if rates["first_token_p50"] is not None:
        line += f", first token {rates['first_token_p50']:.2f} s (p99 {rates['first_token_p99']:.2f})"
    if since is not None and seconds > 0:
        produced = sum(counts.get("output", 0.0) for counts in since.values())
        line += f", {produced / seconds:.1f} tokens/s"
    return line + (" [yellow](draining)[/yellow]" if residency["draining"] else "")


def _recent(counts: Mapping[str, float], seconds: float) -> tuple[Any, ...]:
    """Tokens per second, mean seconds to the first token, refusals, and the share of cached prompt tokens."""
    firsts, prompt = counts.get("first_tokens", 0.0), counts.get("prompt", 0.0)
    return (
        round(counts.get("output", 0.0) / seconds, 1) if seconds > 0 else None,
        round(counts["first_seconds"] / firsts, 3) if firsts else None,
        round(counts.get("refused", 0.0)),
        round(100 * counts.get("cached", 0.0) / prompt) if prompt else None,
    )


def _name(entry: Mapping[str, Any]) -> str:
    """``tenant/adapter@version``; with as much of the digest as people compare where that is not known."""
    if entry["name"]:
        return f"{entry['tenant']}/{entry['name']}"
    name, _, digest = str(entry["version"]).rpartition("@")
    return f"{name}@{digest[:12]}"
