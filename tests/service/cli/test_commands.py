"""The command line against a served app: every command, as people see it and as scripts do."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import Result

from server.__main__ import cli
from server.cli import client as remote
from server.cli import command, tables, top
from server.metrics import Metrics
from server.publishing.quarantine import quarantine
from tests.support import tiny
from tests.support.commands import Commands
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(
        tmp_path, FakeEngine(tiny.base(), times=Times(step=0.02), max_model_len=1 << 16)
    ) as site:
        yield site


async def run(site: Site, *words: str, key: str = ADMIN_KEY, answer: str = "", **env: str) -> Result:
    """The command as a process would run it; the server goes on in this loop meanwhile."""
    settings = {"LORAPLEX_URL": site.url, "LORAPLEX_ADMIN_KEY": key, "COLUMNS": "200"} | env
    return await asyncio.to_thread(Commands().invoke, cli, list(words), input=answer, env=settings)


def test_a_pipe_gets_a_row_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody says how wide it is; a terminal's own width counts there."""
    rows = tables.rows([{"id": "a" * 32, "outcome": "rejected (context_length_exceeded)", "at": "b" * 60}])
    lines = {}
    for columns in ("", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        if not columns:
            monkeypatch.delenv("COLUMNS")
        command.show(rows)
        lines[columns] = len(capsys.readouterr().out.strip().splitlines())
    assert lines[""] == 2 < lines["40"]


async def shown(site: Site, *words: str) -> list[list[str]]:
    """What a command that succeeds prints, in cells."""
    result = await run(site, *words)
    assert result.exit_code == 0, result.output
    return [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines() if line.strip()]


async def document(site: Site, *words: str) -> Any:
    result = await run(site, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def refusal(site: Site, *words: str, **options: Any) -> str:
    """What a command that fails says, on one line."""
    result = await run(site, *words, **options)
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    return result.stderr.strip()


# --- tenants and keys -------------------------------------------------------------------------------


async def test_tenants(site: Site) -> None:
    made = await shown(site, "tenants", "create", "acme", "--name", "[Acme] Inc", "--weight", "2.5")
    assert made[:5] == [
        ["id", "acme"],
        ["name", "[Acme] Inc"],
        ["weight", "2.5"],
        ["priority", "standard"],
        ["base allowed", "yes"],
    ]
    await shown(site, "tenants", "create", "zeta", "--no-base", "--max-queued", "7")
    headings, *rows = await shown(site, "tenants", "list")
    assert headings == ["tenant", "name", "weight", "base", "max queued", "max running", "stored", "since"]
    assert [row[:-1] for row in rows] == [
        ["acme", "[Acme] Inc", "2.5", "yes", "-", "-", "0 bytes"],
        ["zeta", "zeta", "1", "no", "7", "-", "0 bytes"],
    ]
    listed = (await site.admin.get("/admin/v1/tenants")).json()
    assert (await document(site, "tenants", "list"))["data"][1] == listed["data"][1] | {"stored_bytes": 0}
    assert await document(site, "tenants", "show", "zeta") == listed["data"][1]

    changed = await document(
        site, "tenants", "set", "zeta", "--base", "--max-queued", "none", "--max-running", "3",
        "--priority", "batch", "--sample-prompts",
    )  # fmt: skip
    assert changed == listed["data"][1] | {
        "base_allowed": True, "max_queued": None, "max_running": 3, "priority": "batch",
        "sample_prompts": True,
    }  # fmt: skip
    assert "interactive" in await refusal(site, "tenants", "set", "zeta", "--priority", "high")

    assert await document(site, "tenants", "delete", "zeta", "--yes") == {"deleted": "zeta"}
    assert [t["id"] for t in (await document(site, "tenants", "list"))["data"]] == ["acme"]


async def test_what_cannot_be_undone_is_asked(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    for words in (
        ("tenants", "delete", "acme"),
        ("adapters", "delete", "acme", "a"),
        ("adapters", "delete-version", "acme", "a", "1"),
    ):
        for answer in ("n\n", ""):
            refused = await run(site, *words, answer=answer)
            assert refused.exit_code == 1
            assert "[y/N]" in refused.stderr
        assert (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).status_code == 200
    assert (await run(site, "tenants", "delete", "acme", answer="y\n")).exit_code == 0
    assert (await site.admin.get("/admin/v1/tenants/acme")).status_code == 404


async def test_keys(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    issued = await document(site, "keys", "create", "acme", "--name", "ci")
    assert (await site.http.get("/v1/models", headers=bearer(issued["key"]))).status_code == 200
    other = dict(row for row in await shown(site, "keys", "create", "acme") if len(row) == 2)
    assert other["key"].startswith("lp-")
    headings, *rows = await shown(site, "keys", "list", "acme")
    assert headings == ["id", "name", "scopes", "limits", "since", "expires", "last used"]
    assert [row[:3] for row in rows] == [[issued["id"], "ci", "inference"], [other["id"], "-", "inference"]]
    assert await shown(site, "keys", "revoke", "acme", issued["id"]) == [[f"deleted {issued['id']}"]]
    assert (await site.http.get("/v1/models", headers=bearer(issued["key"]))).status_code == 401
    listed = await document(site, "keys", "list", "acme")
    assert [key["id"] for key in listed["data"]] == [other["id"]]


async def test_keys_with_scopes_limits_and_a_successor(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    words = ("--scope", "inference", "--scope", "usage:read", "--expires-at", "2100-01-01T00:00:00Z")
    limits = '{"requests_per_minute": 5}'
    old = await document(site, "keys", "create", "acme", *words, "--limits", limits)
    new = await document(site, "keys", "rotate", "acme", old["id"], "--overlap", "60")
    assert new["replaces"]["id"] == old["id"]
    for key in (old, new):
        assert (await site.http.get("/v1/usage", headers=bearer(key["key"]))).status_code == 200
    listed = (await document(site, "keys", "list", "acme"))["data"]
    assert {tuple(key["scopes"]) for key in listed} == {("inference", "usage:read")}
    assert listed[0]["limits"] == {"requests_per_minute": 5}
    assert limits in [row[3] for row in await shown(site, "keys", "list", "acme")]
    again = await shown(site, "keys", "rotate", "acme", new["id"])
    assert [row[0] for row in again] == ["id", "key", "name"]
    assert (await site.http.get("/v1/usage", headers=bearer(new["key"]))).status_code == 401
    assert (await run(site, "keys", "create", "acme", "--limits", "{")).exit_code == 2


async def test_limits_and_budgets_of_a_tenant(site: Site) -> None:
    made = await document(
        site,
        "tenants",
        "create",
        "acme",
        "--limits",
        '{"max_tokens": 9}',
        "--budgets",
        '{"day": {"tokens": 5}}',
    )
    assert made["limits"]["max_tokens"] == 9
    assert made["budgets"]["day"]["tokens"] == 5
    changed = await document(site, "tenants", "set", "acme", "--limits", '{"max_tokens": null}')
    assert changed["limits"].get("max_tokens") is None
    assert "max_tokens" in await refusal(site, "tenants", "set", "acme", "--limits", '{"max_tokens": "x"}')


# --- adapters ---------------------------------------------------------------------------------------


async def test_a_push_says_which_files_it_leaves_out(site: Site, tmp_path: Path) -> None:
    await document(site, "tenants", "create", "acme")
    shutil.copytree(tiny.adapter(1), tmp_path / "run")
    (tmp_path / "run" / "additional_chat_templates").mkdir()
    (tmp_path / "run" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "run" / "tokenizer.model").write_bytes(b"sentences")
    words = ("adapters", "push", str(tmp_path / "run"), "--tenant", "acme", "--name", "left")
    result = await run(site, *words)
    assert "tool_use.jinja, tokenizer.model ignored" in " ".join(result.stderr.split()), result.stderr


async def push(site: Site, folder: Path, name: str = "a") -> Any:
    return await document(site, "adapters", "push", str(folder), "--tenant", "acme", "--name", name)


async def test_adapters(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    first = await push(site, tiny.adapter(1))
    assert (first["version"], first["live"]) == (1, 1)
    headings, row = await shown(
        site, "adapters", "push", str(tiny.adapter(2)), "--tenant", "acme", "--name", "a"
    )
    assert headings == ["adapter", "version", "live", "rank", "size", "digest"]
    assert row[:4] == ["a", "2", "2", "2"]
    await push(site, tiny.adapter(3), "b")

    headings, *rows = await shown(site, "adapters", "list", "acme")
    assert headings == ["adapter", "live", "versions", "tier", "default", "pinned", "rank", "since"]
    assert [row[:3] + row[4:7] for row in rows] == [
        ["a", "2", "2", "yes", "no", "2"],
        ["b", "1", "1", "no", "no", "2"],
    ]

    back = await document(site, "adapters", "rollback", "acme", "a")
    assert back["live"] == 1
    assert "no version before 1" in await refusal(site, "adapters", "rollback", "acme", "a")
    assert (await document(site, "adapters", "live", "acme", "a", "2"))["live"] == 2
    assert (await document(site, "adapters", "default", "acme", "b"))["default"] is True
    assert (await document(site, "adapters", "warm", "acme", "b", "--slot"))["tier"] == "gpu"
    assert "no version 9" in await refusal(site, "adapters", "warm", "acme", "b", "--version", "9")
    assert (await document(site, "adapters", "pin", "acme", "b"))["pinned"] is True

    title, headings, *rows = await shown(site, "adapters", "show", "acme", "b")
    assert title == ["acme/b (default, pinned)"]
    assert headings == ["version", "tier", "rank", "size", "digest", "since"]
    assert rows[0][:2] == ["1", "live"]
    assert (await document(site, "adapters", "unpin", "acme", "b"))["pinned"] is False

    await document(site, "adapters", "delete-version", "acme", "a", "1", "--yes")
    found = await document(site, "adapters", "show", "acme", "a")
    assert [version["version"] for version in found["versions"]] == [2]
    await document(site, "adapters", "delete", "acme", "b", "-y")
    assert [a["name"] for a in (await document(site, "adapters", "list", "acme"))["data"]] == ["a"]


async def test_a_refused_upload_says_why(site: Site, tmp_path: Path) -> None:
    await document(site, "tenants", "create", "acme")
    words = ("adapters", "push", str(tmp_path / "nothing"), "--tenant", "acme", "--name", "a")
    assert "no_adapter: " in await refusal(site, *words)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text('{"r": 0}')
    (broken / "adapter_model.safetensors").write_bytes(b"x" * 3_000_000)
    said = await refusal(site, "adapters", "push", str(broken), "--tenant", "acme", "--name", "a")
    assert said.startswith("not_lora: adapter_config.json: "), said


async def test_a_name_is_divided_between_versions(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    for seed in (1, 2):
        await push(site, tiny.adapter(seed))
    divided = await document(site, "adapters", "canary", "acme", "a", "1=90", "2=10")
    assert divided["split"] == {"1": 90, "2": 10}
    rows = await shown(site, "adapters", "show", "acme", "a")
    assert [row[:2] for row in rows[2:4]] == [["1", "90 %"], ["2", "10 %"]]
    assert (await document(site, "adapters", "canary", "acme", "a", "--off"))["split"] is None
    assert "100" in await refusal(site, "adapters", "canary", "acme", "a", "1=90")
    for wrong in (["1"], ["1=x"], ["a=1"], [], ["1=100", "--off"]):
        assert (await run(site, "adapters", "canary", "acme", "a", *wrong)).exit_code == 2


async def test_defaults_are_set_shown_and_found_in_the_audit(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    await push(site, tiny.adapter(1))
    given = '{"max_tokens": 3}'
    assert (await document(site, "adapters", "defaults", "acme", "a", given))["defaults"] == {"max_tokens": 3}
    assert [f"defaults: {given}"] in await shown(site, "adapters", "show", "acme", "a")
    assert (await document(site, "adapters", "defaults", "acme", "a", "none"))["defaults"] is None
    assert not any(
        row[0].startswith("defaults") for row in await shown(site, "adapters", "show", "acme", "a")
    )
    changes = [row[-1] for row in await shown(site, "audit", "--tenant", "acme", "--limit", "2")]
    assert changes == ["change", f"defaults {given} -> none", f"defaults none -> {given}"]
    assert (await run(site, "adapters", "defaults", "acme", "a", "{")).exit_code == 2


async def test_a_version_without_probes_is_not_verified(site: Site) -> None:
    await document(site, "tenants", "create", "acme")
    await push(site, tiny.adapter(1))
    for words in ((), ("--version", "1")):
        assert "probes.json" in await refusal(site, "adapters", "verify", "acme", "a", *words)
    assert "version_not_found: " in await refusal(site, "adapters", "verify", "acme", "a", "--version", "9")


# --- now --------------------------------------------------------------------------------------------


async def test_residency_and_top(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    talking = asyncio.create_task(site.chat(key, "hi", max_tokens=60_000, stream=True))
    while not site.services.dispatcher.snapshot().running:
        await asyncio.sleep(0.01)
    now = await document(site, "residency")
    assert now["slots"][0]["version"].startswith("acme/support@")
    rows = await shown(site, "residency")
    assert rows[0][0].startswith("0 queued, 1 running, 0 put aside, 0 drains, 0 preemptions, first token ")
    assert rows[2][0] == "0"
    assert rows[2][1] == "acme/support@1"
    assert rows[3] == ["1", "free", "-", "-"]
    assert ["tenant", "queued", "running", "tokens had"] in rows
    events = await shown(site, "residency", "--events", "4")
    assert events[0] == ["event", "now", "arguments"]
    assert len(events) >= 5

    rows = await shown(site, "top", "--interval", "0.5", "--count", "2")
    looks = [number for number, row in enumerate(rows) if " queued, " in row[0]]
    assert len(looks) == 2, "each is there for whoever reads from a pipe"
    rows = rows[looks[1] :]
    assert re.search(r"([\d.]+) tokens/s$", rows[0][0])
    last = ["tokens/s", "first token s", "refused", "cached %"]
    assert ["tenant", "queued", "running", "tokens had", *last] in rows
    (acme,) = (row for row in rows if row[0] == "acme")
    assert acme[:3] == ["acme", "0", "1"]
    assert acme[5:] == ["-", "0", "-"]
    assert 0 < float(acme[4]) < 100, "while the answer is being made, not when it is done"
    talking.cancel()


async def test_usage_and_audit(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    assert (await site.chat(key, "hi", max_tokens=4)).status_code == 200
    headings, *rows = await shown(site, "usage", "--by", "tenant,adapter", "--tenant", "acme")
    assert headings == ["tenant", "adapter", "requests", "prompt", "cached", "output", "total", "cost"]
    assert rows == [["acme", "support", "1", "2", "0", "4", "6", "0"]]
    told = await document(site, "usage", "--tenant", "acme")
    assert told["data"][0]["output_tokens"] == 4
    assert await shown(site, "usage", "--tenant", "nobody") == [["none"]]
    assert "`by`" in await refusal(site, "usage", "--by", "weather")

    headings, *rows = await shown(site, "audit", "--tenant", "acme")
    assert headings == ["id", "at", "actor", "action", "tenant", "target", "change"]
    assert [row[4] for row in rows] == ["acme"] * len(rows)
    *others, first = (await document(site, "audit"))["data"]
    assert len(others) == len(rows) - 1
    page = await document(site, "audit", "--limit", "1", "--after", str(first["id"]))
    assert [entry["id"] for entry in page["data"]] == [others[-1]["id"]]


def test_changes_are_what_came_meanwhile() -> None:
    before, now = (
        {"a": {"output": 10.0}, "b": {"output": 5.0}, "restarted": {"output": 100.0}},
        {"a": {"output": 30.0}, "b": {"output": 5.0}, "restarted": {"output": 4.0}, "new": {"output": 6.0}},
    )
    came = {tenant: counts["output"] for tenant, counts in top.changes(before, now).items()}
    assert came == {"a": 20.0, "b": 0.0, "restarted": 4.0, "new": 6.0}


def test_counts_are_read_from_the_page() -> None:
    metrics = Metrics()
    metrics.consumed("acme", 3, 1, 12)
    metrics.ended("acme", "refused")
    metrics.ended("acme", "completed")
    metrics.token_times("acme").first(0.5)
    metrics.consumed("zeta", 0, 0, 1)
    found = top.counts_of(metrics.render().decode())
    assert found["acme"] == {
        "output": 12.0, "prompt": 3.0, "cached": 1.0, "ended": 2.0, "refused": 1.0,
        "first_seconds": 0.5, "first_tokens": 1.0,
    }  # fmt: skip
    assert found["zeta"]["output"] == 1.0


# --- what goes wrong --------------------------------------------------------------------------------


async def test_the_servers_refusals_are_printed(site: Site) -> None:
    assert (
        await refusal(site, "tenants", "show", "nobody")
        == "not_found: " + ((await site.admin.get("/admin/v1/tenants/nobody")).json()["error"]["message"])
    )
    assert (await refusal(site, "tenants", "create", "BAD NAME")).split(":")[0] != "http_422"
    assert "invalid_api_key: " in await refusal(site, "tenants", "list", key="wrong")
    assert "no_key: " in await refusal(site, "tenants", "list", key="")
    assert "key_invalid: " in await refusal(site, "tenants", "list", key="schlüssel")


async def test_names_are_no_steps_in_a_path(site: Site) -> None:
    """``adapters delete acme ..`` must not delete the tenant."""
    await site.tenant("acme", {"a": tiny.adapter(1)})
    for name in ("..", ".", ""):
        assert "name_invalid: " in await refusal(site, "adapters", "delete", "acme", name, "--yes")
    for name in ("../../acme", "a/../..", "a?x=1", "a#b"):
        assert "not_found" in await refusal(site, "adapters", "delete", "acme", name, "--yes")
    assert (await site.admin.get("/admin/v1/tenants/acme/adapters/a")).status_code == 200


async def test_no_server_is_explained(site: Site) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        said = await refusal(site, "tenants", "list", LORAPLEX_URL=url)
    assert said.startswith(f"no_connection: No connection to {url}")
    for wrong in ("127.0.0.1:8000", "ftp://127.0.0.1", "http://x:y"):
        assert "url_invalid: " in await refusal(site, "tenants", "list", LORAPLEX_URL=wrong)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (httpx.Response(502, text="<h1>Bad Gateway</h1>"), "http_502"),
        (httpx.Response(200, text="<h1>It works!</h1>", headers={"content-type": "text/html"}), "http_200"),
        (httpx.Response(307, headers={"location": "http://elsewhere"}), "http_307"),
        (httpx.Response(404, json={"detail": "Not Found"}), "http_404"),
        (httpx.Response(500, json=[]), "http_500"),
    ],
)
def test_another_server_is_not_taken_for_this_one(answer: httpx.Response, code: str) -> None:
    server = remote.AdminClient("http://x", "k", httpx.MockTransport(lambda _: answer))
    with pytest.raises(remote.RemoteError) as refused:
        server.get("tenants")
    assert refused.value.code == code


@pytest.mark.parametrize(
    ("raised", "code"),
    [(httpx.ReadTimeout("slow"), "timeout"), (httpx.ReadError("reset"), "connection_lost")],
)
def test_a_broken_connection_is_named(raised: Exception, code: str) -> None:
    def broken(_: httpx.Request) -> httpx.Response:
        raise raised

    server = remote.AdminClient("http://x", "k", httpx.MockTransport(broken))
    with pytest.raises(remote.RemoteError) as refused:
        server.delete("tenants", "acme")
    assert refused.value.code == code


# --- start ------------------------------------------------------------------------------------------


async def test_names_may_be_given_as_options_too(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    listed = await document(site, "adapters", "list", "acme")
    for words in (["--tenant", "acme"], ["--tenant=acme"]):
        assert await document(site, "adapters", "list", *words) == listed
    shown = await document(site, "adapters", "show", "acme", "a")
    for words in (["--tenant", "acme", "a"], ["--name", "a", "acme"], ["--name=a", "--tenant=acme"]):
        assert await document(site, "adapters", "show", *words) == shown
    folder = str(tiny.adapter(1))
    for words in ([folder, "--tenant", "acme", "--name", "b"], ["acme", "b", folder]):
        assert (await document(site, "adapters", "push", *words))["adapter"] == "b"
    missing = await run(site, "adapters", "list", "--tenant")
    assert missing.exit_code in (1, 2)


async def test_show_says_what_the_report_says(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    report = (await document(site, "adapters", "show", "acme", "a"))["versions"][0]["report"]
    assert report["probe"]
    text = (await run(site, "adapters", "show", "acme", "a")).stdout
    assert "version 1: probe: " in text
    for name in report["probe"]:
        assert name in text


ASKING = ["adapters", "list", "acme", "--url", "http://127.0.0.1:9", "--key", "x"]


@pytest.mark.parametrize(
    "words", [["version"], ["--help"], ["adapters", "--help"], ["serve", "--help"], ASKING]
)
def test_what_needs_no_server_imports_none(words: list[str]) -> None:
    """Deterministic, where seconds are not: the imports are what ``version`` waited for."""
    slow = (
        "vllm",
        "torch",
        "server.settings",
        "httpx",
        "sqlalchemy",
        "prometheus_client",
        "fastapi",
        "httpx._main",
    )
    script = (
        "import sys\nfrom server.__main__ import cli\n"
        f"try: cli({words!r})\nexcept SystemExit: pass\n"
        f"print([name for name in {slow!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == ("['httpx']" if words is ASKING else "[]")


async def test_what_is_out_of_service_is_shown_and_released(site: Site) -> None:
    await shown(site, "tenants", "create", "acme")
    await shown(site, "adapters", "push", "acme", "a", str(tiny.adapter(1)))
    version = await site.services.publishing.catalog.version("acme", "a", 1)
    await quarantine(site.services.publishing.quarantine, site.services.dispatcher, version, "it made NaN")
    text = (await run(site, "adapters", "show", "acme", "a")).stdout
    assert "live out of service" in text
    assert re.search(r"version 1: out of service since [-\d]+ [:\d]+: it made NaN", text)
    released = (await run(site, "adapters", "release", "acme", "a", "1")).stdout
    assert "out of service" not in released
    assert "version 9" in await refusal(site, "adapters", "release", "acme", "a", "9")
    out = (await run(site, "adapters", "quarantine", "acme", "a", "1", "--reason", "it is too slow")).stdout
    assert "it is too slow" in out


def test_writing_to_who_has_gone_is_an_error_and_not_the_end() -> None:
    """A server's client may leave at any moment: the default of SIGPIPE would end the server."""
    program = """
import socket, server.__main__ as command

def writes() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    try:
        ours.send(b"x")
    except BrokenPipeError:
        print("went on")

command.cli = writes
command.main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "went on\n"), done


def test_whoever_reads_no_further_gets_no_traceback() -> None:
    command = [sys.executable, "-m", "server", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
