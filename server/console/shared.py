"""What pages of operators and of customers have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlencode

from starlette.exceptions import HTTPException
from starlette.responses import Response

from adapters.errors import CURES
from server.console import views
from server.console.api import Api, Refused
from server.console.formats import NONE, flat, number, segment, size
from server.console.web import Page

DAYS = {"1": 1, "7": 7, "30": 30, "90": 90}
LONGEST = 200  # rows of a table of sums
REFUSED = 5  # uploads
VALUES = ("total_tokens", "output_tokens", "requests", "cost")
# What the numbers of a probe are; those of ``noise`` are of the base against itself.
SAID = {
    "log_prob": "Largest change of a log-probability",
    "kl": "KL divergence from the base",
    "change": "Change",
    "noise.log_prob": "The base against itself, log-probability",
    "noise.kl": "The base against itself, KL",
    "noise.change": "The base against itself",
    "base": "Base model",
    "dtype": "Type",
    "no_effect_allowed": "Accepted without effect",
    "prompts": "Prompts",
    "tolerance": "Allowed difference",
    "largest_difference": "Largest difference",
    "worst_prompt": "In prompt",
}


def ago(days: int) -> str:
    """The beginning of the day that many days before today, in UTC, as the API takes it."""
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return (today - timedelta(days=days - 1)).isoformat()


def moments(days: int) -> list[str]:
    """The beginnings of the last ``days`` days, or of today's hours for one, as the API writes them."""
    start, now = datetime.fromisoformat(ago(days)), datetime.now(UTC)
    step = timedelta(hours=1) if days == 1 else timedelta(days=1)
    return [(start + n * step).isoformat() for n in range((now - start) // step + 1)]


def gauges(standing: Mapping[str, Any]) -> list[views.Gauge]:
    """The limits and budgets of ``GET …/limits`` that say how much of them is used."""
    found = []
    for row in standing["limits"]:
        if row["used"] is not None:
            found.append(views.gauge(_limit_name(row), row["used"], row["allowed"]))
    for row in standing["budgets"]:
        limit, kind = (row["allowed"], "") if row["allowed"] is not None else (row["soft"], " (soft)")
        found.append(
            views.gauge(
                f"{row['unit']} this {row['period']}{kind}",
                row["used"],
                limit,
                row["resets_at"],
            )
        )
    return [it for it in found if it is not None]


def uncounted(standing: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and value of the other limits of ``GET …/limits``: those of which nothing is used up."""
    return [(_limit_name(row), _allowed(row)) for row in standing["limits"] if row["used"] is None]


def _limit_name(row: Mapping[str, Any]) -> str:
    name = str(row["limit"]).replace("_", " ")
    return name if row["of"] == "tenant" else f"{name} of this key"


def _allowed(row: Mapping[str, Any]) -> str:
    allowed = row["allowed"]
    if isinstance(allowed, bool):
        return "yes" if allowed else "no"
    if isinstance(allowed, list):
        return ", ".join(allowed) or NONE
    return size(allowed) if row["limit"].endswith("_bytes") else number(allowed)


def rows_of(adapters: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Adapters of either list as the table has them: those of one customer come with whole versions."""
    rows = []
    for adapter in adapters:
        versions, live = adapter["versions"], adapter["live"]
        row = dict(adapter)
        if isinstance(versions, list):
            answering = next((v for v in versions if v["version"] == live), None)
            report = answering["report"] if answering else {}
            row["version_count"] = len(versions)
            row["warnings"] = len(report.get("warnings") or ())
            row["quarantined"] = bool(answering and answering["quarantine"])
        else:
            row["version_count"] = versions
            row["quarantined"] = bool(adapter.get("quarantine"))
        rows.append(row)
    return rows


async def every_adapter(page: Page, call: str) -> list[dict[str, Any]]:
    """All pages of a customer's adapters."""
    asked: dict[str, str] = {}
    adapters: list[dict[str, Any]] = []
    while True:
        found = await page.api.get(call, asked)
        adapters += found["data"]
        if found["next"] is None:
            return adapters
        asked = {"after": found["next"]}


async def newest_rollout(page: Page, where: str) -> Mapping[str, Any] | None:
    """The adapter's newest rollout in full, if it ever had one; ``where`` is the adapter's path."""
    listed = (await page.api.get(f"{where}/rollouts", {"limit": 1}))["data"]
    if not listed:
        return None
    found: Mapping[str, Any] = await page.api.get(f"{where}/rollouts/{listed[0]['id']}")
    return found


async def refused_uploads(page: Page, where: str) -> Sequence[Mapping[str, Any]]:
    """The newest uploads that did not become versions, and why; ``where`` is the adapter's path."""
    try:
        found = (await page.api.get(f"{where}/uploads"))["data"]
    except Refused as exc:
        if exc.code != "scope_missing":
            raise
        return []
    return [{**row, "cure": CURES.get(row["error"]["code"])} for row in found if row["error"]][:REFUSED]


def adapter_page(
    page: Page,
    adapter: Mapping[str, Any],
    used: Sequence[Mapping[str, Any]],
    where: str,
    rollout: Mapping[str, Any] | None,
    refused: Sequence[Mapping[str, Any]],
    *,
    operator: bool,
) -> Response:
    """``where`` is the call's path up to the adapter's name; ``used`` sums by version and outcome.

    The page asks for the ``part`` of it that changes by itself.
    """
    split = {int(v): share for v, share in (adapter["split"] or {}).items()}
    newest = sorted(adapter["versions"], key=lambda v: -v["version"])
    versions = [{**v, "share": split.get(v["version"], 0)} for v in newest]
    wanted = page.query.get("version") or str(adapter["live"] or "")
    chosen = next((v for v in versions if str(v["version"]) == wanted), versions[0] if versions else None)
    if chosen is None:
        raise HTTPException(404, "This adapter has no version.")
    report = chosen["report"]
    return page.show(
        "rollout_part.html" if page.query.get("part") == "rollout" else "adapter.html",
        adapter=adapter,
        api=f"{where}/{segment(adapter['name'])}",
        with_tenant=operator,
        can_verify=True,
        versions=versions,
        chosen=chosen,
        report=report,
        canary=_canary(split, used),
        rollout=rollout,
        refused=refused,
        facts=_facts(report, chosen),
        probe=_numbers(report.get("probe"), skip=("effect",)),
        golden=_numbers(report.get("golden"), skip=("matches", "bits")),
        heat=views.heat_map(report.get("coverage") or ()),
        upload_api=where,
        upload_name=adapter["name"],
    )


def _canary(split: Mapping[int, int], used: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    outcomes: dict[int, dict[str, int]] = defaultdict(dict)
    waited: dict[int, float] = defaultdict(float)
    for row in used:
        if row["version"] is not None:
            outcomes[row["version"]][row["outcome"]] = row["requests"]
            waited[row["version"]] += row["first_token_seconds"]
    return [
        {
            "version": version,
            "share": share,
            "requests": sum(outcomes[version].values()),
            "outcomes": outcomes[version],
            "first_token": waited[version] / count if (count := sum(outcomes[version].values())) else None,
        }
        for version, share in sorted(split.items())
    ]


def _facts(report: Mapping[str, Any], version: Mapping[str, Any]) -> list[tuple[str, Any]]:
    names = {
        "rank": "Rank",
        "alpha": "Alpha",
        "dtype": "Type",
        "modules": "Modules",
        "base_model": "Trained on",
    }
    found = [(shown, report[name]) for name, shown in names.items() if report.get(name) is not None]
    if report.get("size_bytes"):
        found.append(("Size", size(report["size_bytes"])))
    lists = {"target_modules": "Target modules", "conversions": "Rewritten", "ignored_fields": "Ignored"}
    for name, shown in lists.items():
        if report.get(name):
            found.append((shown, ", ".join(map(str, report[name]))))
    if report.get("implausible"):
        found.append(("Accepted in spite of", report["implausible"]))
    return [*found, ("Digest", version["digest"])]


def _numbers(report: Mapping[str, Any] | None, *, skip: Sequence[str]) -> list[tuple[str, str]]:
    """What a probe found, in words; what it does not know is left out."""
    shown = []
    for name, value in flat(report).items():
        if name in skip or value in (NONE, ""):
            continue
        text = SAID.get(name) or name.replace("_", " ").capitalize()
        try:
            shown.append((text, f"{float(value):.4g}"))
        except ValueError:
            shown.append((text, {"True": "yes", "False": "no"}.get(value, value)))
    return shown


async def usage_page(page: Page, call: str, groups: Sequence[str], *, with_tenant: bool) -> Response:
    """Bars by hour or day and by one group, the sums below, and a link to the same as CSV."""
    days, by, value = (
        chosen if (chosen := page.query.get(name, "")) in allowed else default
        for name, allowed, default in (
            ("days", DAYS, "7"),
            ("by", groups, groups[0]),
            ("value", VALUES, VALUES[0]),
        )
    )
    moment = "hour" if days == "1" else "day"
    asked = {"from": ago(DAYS[days]), "tenant": page.query.get("tenant") if with_tenant else None}
    bars, stack = await _sums(page.api, call, asked | {"by": f"{moment},{by}"}), by
    if bars is None:
        bars, stack = (await page.api.get(call, asked | {"by": moment}))["data"], ""
    rows = await _sums(page.api, call, asked | {"by": by})
    query = urlencode({n: v for n, v in (asked | {"by": f"{moment},{by}", "format": "csv"}).items() if v})
    return page.show(
        "usage.html",
        query=page.query,
        with_tenant=with_tenant,
        days=days,
        by=by,
        groups=groups,
        shown=value,
        usage=views.stacked(bars, moment, stack, value, moments(DAYS[days])),
        rows=sorted(rows or [], key=lambda row: -row["total_tokens"])[:LONGEST],
        crowded=rows is None or len(rows) > LONGEST or not stack,
        csv=f"{page.root}/api{call}?{query}",
    )


async def _sums(api: Api, call: str, asked: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The sums that the call answers; None where there are more than it gives at once."""
    try:
        found: list[dict[str, Any]] = (await api.get(call, asked))["data"]
    except Refused as exc:
        if exc.status != 422:
            raise
        return None
    return found


def models_of(adapters: Iterable[Mapping[str, Any]], base: str | None) -> list[str]:
    """What may be asked: the base, the adapters by name, and their single versions."""
    found = [base] if base else []
    for adapter in adapters:
        if adapter["live"] is not None:
            found.append(adapter["name"])
        found += [f"{adapter['name']}@{v['version']}" for v in adapter["versions"] if not v["quarantine"]]
    return found


def playground_page(
    page: Page,
    *,
    tenants: list[str] | None,
    tenant: str | None,
    models: list[str],
    needs_key: bool,
    note: str = "",
) -> Response:
    """The base first, then what the link named or the first adapter, then its version before."""
    first = page.query.get("model") or next((name for name in models if name != page.base), "")
    first = first if first in models else ""
    name, _, version = first.partition("@")
    others = [other for other in models if other.startswith(f"{name}@") and other != first]
    third = others[-1] if version and others else ""
    base = page.base if page.base in models else (first or (models[0] if models else ""))
    return page.show(
        "playground.html",
        tenants=tenants,
        tenant=tenant,
        models=models,
        needs_key=needs_key and bool(models),
        chosen=[base, first if base != first else "", third],
        note=note,
    )
