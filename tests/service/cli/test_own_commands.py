"""The command line with a customer's own key; uploads that are repeated; chat, requests and people."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.cli.client import OWN, RemoteError, own_path
from server.cli.push import Push
from server.publishing.quarantine import quarantine
from tests.service.cli.test_commands import document, refusal, run, shown
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import Site
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")
SCOPES = ["inference", "adapters:write", "usage:read", "keys:write"]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.001))) as site:
        yield site


async def own_key(site: Site, tenant: str = "acme") -> str:
    await site.tenant(tenant)
    made = await site.admin.post(f"/admin/v1/tenants/{tenant}/keys", json={"scopes": SCOPES})
    return str(made.json()["key"])


async def own(site: Site, key: str, *words: str) -> Any:
    result = await run(site, *words, "--json", LORAPLEX_KEY=key)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def test_a_customer_names_no_customer(site: Site) -> None:
    key = await own_key(site)
    pushed = await own(site, key, "adapters", "push", "a", str(tiny.adapter(1)))
    assert (pushed["adapter"], pushed["version"]) == ("a", 1)
    pushed = await own(site, key, "adapters", "push", str(tiny.adapter(2)), "--name", "a")
    assert pushed["version"] == 2
    assert [a["name"] for a in (await own(site, key, "adapters", "list"))["data"]] == ["a"]
    assert (await own(site, key, "adapters", "show", "a"))["live"] == 2
    assert (await own(site, key, "adapters", "show", "acme", "a"))["live"] == 2, "it may name itself"
    assert (await own(site, key, "adapters", "live", "a", "1"))["live"] == 1
    assert (await own(site, key, "adapters", "canary", "a", "1=90", "2=10"))["split"] == {"1": 90, "2": 10}
    assert (await own(site, key, "adapters", "canary", "a", "--off"))["split"] is None
    assert (await own(site, key, "adapters", "warm", "a"))["tier"] in ("host", "gpu")
    assert [k["scopes"] for k in (await own(site, key, "keys", "list"))["data"]][-1] == SCOPES
    made = await own(site, key, "keys", "create", "--name", "ci")
    assert (await own(site, key, "keys", "revoke", made["id"]))["deleted"] == made["id"]
    assert (await own(site, key, "tenants", "show"))["tenant"]["id"] == "acme"
    assert (await own(site, key, "usage", "--by", "adapter"))["data"] == []
    assert "version.create" in {entry["action"] for entry in (await own(site, key, "audit"))["data"]}


async def test_a_customer_is_told_what_is_not_its_own(site: Site) -> None:
    key = await own_key(site)
    await site.tenant("zeta", {"z": tiny.adapter(3)})
    for words in (
        ("adapters", "show", "zeta", "z"),
        ("usage", "--tenant", "zeta"),
        ("residency",),
        ("requests",),
        ("audit", "--actor", "admin"),
    ):
        assert "operator_only: " in await refusal(site, *words, LORAPLEX_KEY=key), words
    assert "permission_denied: " in await refusal(site, "adapters", "pin", "a", LORAPLEX_KEY=key)


async def test_an_operator_has_to_name_the_customer(site: Site) -> None:
    assert "tenant_missing: " in await refusal(site, "adapters", "list")
    assert (await run(site, "adapters", "show")).exit_code == 2


def test_paths_of_a_customers_own() -> None:
    assert own_path(("tenants", OWN, "adapters", "a", "versions"), {}, "acme") == (
        "adapters",
        "a",
        "versions",
    )
    assert own_path(("tenants", "acme", "limits"), {}, "acme") == ("me",)
    assert own_path(("audit",), {"order": "newest", "actor": None}, "acme") == ("audit",)
    with pytest.raises(RemoteError):
        own_path(("replicas",), {}, "acme")


async def test_the_same_files_again_make_nothing_new(site: Site) -> None:
    await site.tenant("acme")
    push = ("adapters", "push", "acme", "a", str(tiny.adapter(1)))
    assert (await document(site, *push))["version"] == 1
    again = await run(site, *push, "--json")
    assert json.loads(again.stdout)["version"] == 1
    assert "these files are version 1" in again.stderr
    assert (await document(site, *push, "--again"))["version"] == 2
    assert (await document(site, *push, "--note", "another"))["version"] == 3, "options tell them apart"
    assert "note: another" in (await run(site, "adapters", "show", "acme", "a")).stdout


def test_a_key_is_of_the_files_and_the_options() -> None:
    keys = [Push(tiny.adapter(seed), query).key() for seed, query in ((1, {}), (2, {}), (1, {"note": "x"}))]
    assert len(set(keys)) == 3
    assert Push(tiny.adapter(1), {}).key() == keys[0]


async def test_a_refused_job_has_its_code(site: Site, tmp_path: Path) -> None:
    await site.tenant("acme")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 0}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * 200_000)
    said = await refusal(site, "adapters", "push", "acme", "a", str(tmp_path))
    assert ": " in said
    listed = (await site.admin.get("/admin/v1/tenants/acme/adapters/a/uploads")).json()["data"]
    assert listed[0]["error"]["code"] == said.split(":")[0]


async def test_show_has_coverage(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    rows = await shown(site, "adapters", "show", "acme", "a")
    assert ["version 1 changes"] in rows
    assert ["module", "layers", "of", "rank", "scaling", "norm of the change"] in rows
    assert next(row[:4] for row in rows if row[0] == "self_attn.q_proj") == [
        "self_attn.q_proj",
        "0",
        "1",
        "2",
    ]


async def test_chat_puts_the_base_beside(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    words = ("chat", "a@1", "hello", "--max-tokens", "3")
    found = await own(site, key, *words)
    ours, base = found["answers"]
    assert (ours["model"], base["model"]) == ("a@1", "tiny-llama")
    assert ours["text"] != base["text"]
    assert (ours["output_tokens"], base["output_tokens"]) == (3, 3)
    assert 0 < ours["first_token_seconds"] <= ours["seconds"]
    (alone,) = (await own(site, key, *words, "--alone"))["answers"]
    assert alone["text"] == ours["text"]
    seen = await run(site, *words, LORAPLEX_KEY=key)
    assert seen.exit_code == 0
    assert "a@1" in seen.stdout
    assert "3 tokens, first after" in seen.stdout
    assert "model_not_found: " in (await run(site, "chat", "b", "hi", LORAPLEX_KEY=key)).stderr
    assert "customers_only: " in await refusal(site, *words)


async def test_a_conversation_goes_on(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    result = await run(
        site, "chat", "a", "--alone", "--json", "--max-tokens", "2", answer="one\ntwo\n", LORAPLEX_KEY=key
    )
    assert [json.loads(line)["prompt"] for line in result.stdout.splitlines()] == ["one", "two"]
    asked = (await site.admin.get("/admin/v1/requests")).json()["data"]
    assert asked[0]["prompt_tokens"] > asked[1]["prompt_tokens"], "the second has the first in it"


async def test_requests_are_found_by_their_id(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    said = await site.chat(key, "hi", max_tokens=2, model="a")
    assert (await site.chat(key, "hi", model="none")).status_code == 404
    headings, *rows = await shown(site, "requests", "--tenant", "acme")
    assert headings == [
        "at", "tenant", "model", "outcome", "prompt", "output", "queue", "load", "first", "total", "id",
    ]  # fmt: skip
    assert [row[2:4] for row in rows] == [["-", "rejected (model_not_found)"], ["a@1", "completed"]]
    (found,) = (await document(site, "requests", "--id", said.headers["x-request-id"]))["data"]
    assert found["output_tokens"] == 2
    version = await site.services.publishing.catalog.version("acme", "a", 1)
    await quarantine(site.services.publishing.quarantine, site.services.dispatcher, version, "NaN")
    assert (await site.chat(key, "hi", model="a")).status_code == 409
    _, refused, *_ = await shown(site, "requests", "--tenant", "acme")
    assert refused[2:4] == ["a@1", "quarantined (adapter_quarantined)"]


async def test_people(site: Site) -> None:
    made = await document(site, "people", "create", "ada", "--role", "viewer")
    assert "operator_only" not in json.dumps(await document(site, "tenants", "list"))
    assert "role_missing: " in await refusal(site, "tenants", "create", "acme", LORAPLEX_KEY=made["key"])
    headings, row = await shown(site, "people", "list")
    assert headings == ["name", "role", "created at", "expires at", "last used at"]
    assert row[:2] == ["ada", "viewer"]
    assert await document(site, "people", "delete", "ada", "--yes") == {"deleted": "ada"}
    assert (await document(site, "people", "list"))["data"] == []
    assert "not_found: " in await refusal(site, "people", "delete", "ada", "--yes")


async def test_doctor_asks_the_server(site: Site, tmp_path: Path) -> None:
    elsewhere = await run(site, "doctor", str(tiny.adapter(1)), "--server")
    assert elsewhere.exit_code == 2
    assert "name its folder with --base" in elsewhere.stderr
    assert "--server" in (await run(site, "doctor", str(tiny.adapter(1)))).stderr
