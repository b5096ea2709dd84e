"""What the help of each command shows is not only understood: it runs, in one world, against a served app."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from server.__main__ import cli
from server.cli.examples import CUSTOMERS, EXAMPLES, LOOKING, PANELS, commands
from tests.service.cli.test_commands import run
from tests.service.publishing.test_golden import trained, upload
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
URL = "/admin/v1/tenants/acme/adapters/support/versions"
SCOPES = ["inference", "adapters:write", "usage:read"]
# What comes before the others, and what after them; all else in the order of the table.
FIRST = ("tenants create", "people create", "keys create")
ROLLED = ("rollouts start", "rollouts forward", "rollouts pause", "rollouts resume", "rollouts list",
          "rollouts show", "rollouts back", "rollouts watch")  # fmt: skip
LAST = ("keys revoke", "adapters delete-version", "adapters delete", "people delete", "tenants delete")
# Without an end of their own, or a long one.
SHORT = {"top": ["--count", "1"], "bench": ["--seconds", "0.5", "--prompt-words", "3", "--max-tokens", "2"]}


def lines() -> list[tuple[str, str]]:
    """The command and the line of each example that asks a running server, in an order that makes sense."""
    asking = [path for path, _ in commands(cli) if PANELS[path.partition(" ")[0]] in (CUSTOMERS, LOOKING)]
    middle = [path for path in asking if path not in (*FIRST, *ROLLED, *LAST)]
    return [(path, line) for path in (*FIRST, *middle, *ROLLED, *LAST) for line in EXAMPLES[path]]


async def world(site: Site, folder: Path) -> dict[str, str]:
    """What the examples name that is not there from the start: words, and what stands for them here."""
    golden = await trained(site)  # makes an adapter of its own
    for seed in (1, 2, 3):
        made = await upload(site, golden, seed=1, url=URL) if seed == 1 else None
        made = made or await site.upload("acme", "support", tiny.adapter(seed))
        assert made.status_code == 201, made.text
    await site.admin.patch(URL.removesuffix("/versions"), json={"live": 1})
    keys = [(await site.admin.post("/admin/v1/tenants/acme/keys", json={"scopes": SCOPES})).json()]
    keys += [(await site.admin.post("/admin/v1/tenants/acme/keys", json={})).json() for _ in range(2)]
    asked = await site.chat(keys[0]["key"], "hi", model="support", max_tokens=1)
    (folder / "keys.txt").write_text(keys[0]["key"])
    return {
        "http://127.0.0.1:8000": site.url,
        "keys.txt": str(folder / "keys.txt"),
        "times.html": str(folder / "times.html"),
        "support-2.tar": str(folder / "support-2.tar"),
        "./adapter": str(tiny.adapter(4)),
        "7ed32500dd44e1f0": asked.headers["x-request-id"],
        "own": keys[0]["key"],
        "rotated": keys[1]["id"],
        "revoked": keys[2]["id"],
    }


async def test_every_example_runs(tmp_path: Path) -> None:
    failed: list[str] = []
    known: dict[str, str] = {}
    async with fake_site(tmp_path / "data", FakeEngine(tiny.base(), times=Times(step=0.001))) as site:
        for path, line in lines():
            words = shlex.split(line.partition("  #")[0])[1:]
            if path == "tenants create" and "--limits" in words:
                words[2] = "acme2"
            if path not in FIRST and "own" not in known:
                known = await world(site, tmp_path)
            if path == "adapters delete-version":  # which no live one is
                await site.admin.patch(URL.removesuffix("/versions"), json={"live": 2})
            known["49f6b6208c280669"] = known.get("rotated" if path == "keys rotate" else "revoked", "")
            words = [known.get(word, word) for word in words] + SHORT.get(path, [])
            is_own = path == "chat" or "own key" in line
            env = {"LORAPLEX_KEY": known["own"]} if is_own else {}
            done = await run(site, *words, answer="" if path == "chat" else "y\n", **env)
            if done.exit_code != 0:
                failed.append(f"{line}: {done.exit_code} {done.output[-300:]}")
    assert failed == []
    assert "<svg" in (tmp_path / "times.html").read_text()
    assert (tmp_path / "support-2.tar").stat().st_size > 1000
