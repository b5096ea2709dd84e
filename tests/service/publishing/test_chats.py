"""What an upload says about chats, and what an adapter says where a request says nothing."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.model import CHAT_FILE, CONFIG_FILE, WEIGHTS_FILE
from tests.support import tiny
from tests.support.fakes import FakeEngine
from tests.support.site import Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated", "ignore::DeprecationWarning")

OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
TURNS: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base())) as site:
        yield site


async def upload(site: Site, name: str, seed: int = 1, **files: Any) -> httpx.Response:
    folder = tiny.adapter(seed)
    sent = {file: (folder / file).read_bytes() for file in (CONFIG_FILE, WEIGHTS_FILE)}
    for file, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        sent["chat_template.jinja" if file == "template" else f"{file}.json"] = text.encode()
    return await site.admin.post(f"/admin/v1/tenants/acme/adapters/{name}/versions", files=sent)


async def asked(site: Site, key: str, url: str = "/v1/chat/completions", **fields: Any) -> Any:
    """vLLM's request, as the engine got it."""
    seen: list[Any] = []
    engine = site.services.engine
    plain = engine.parse_in_turns

    async def parse(kind: str, body: dict[str, Any]) -> Any:
        seen.append(body)
        return await plain(kind, body)

    engine.parse_in_turns = parse
    body = {"model": "a", "max_tokens": 4, "messages": TURNS} | fields
    said = await site.http.post(
        url, json={k: v for k, v in body.items() if v is not None}, headers=bearer(key)
    )
    del engine.parse_in_turns
    assert said.status_code == 200, said.text
    return seen[-1]


async def test_a_template_of_its_own_is_a_part_of_the_version(site: Site) -> None:
    key = await site.tenant("acme")
    plain = (await upload(site, "a")).json()
    own = await upload(site, "a", template=OWN, generation_config={"temperature": 0.25, "eos_token_id": 7})
    assert own.status_code == 201, own.text
    made = own.json()
    assert made["digest"] != plain["digest"]
    chat = made["report"]["chat"]
    assert (len(chat["template"]), chat["defaults"], chat["content_format"]) == (
        64,
        {"temperature": 0.25},
        "string",
    )
    path = site.services.blobs.path(made["digest"])
    assert sorted(file.name for file in path.iterdir()) == sorted([CONFIG_FILE, WEIGHTS_FILE, CHAT_FILE])
    assert json.loads((path / CHAT_FILE).read_text())["template"] == OWN
    await asked(site, key)
    manner = site.services.engine.calls[-1].manner
    assert (manner.template, manner.stop_token_ids) == (OWN, (7,))
    await asked(site, key, model="a@1")
    assert site.services.engine.calls[-1].manner is None


async def test_an_archive_brings_it_too(site: Site) -> None:
    await site.tenant("acme")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            archive.add(tiny.adapter(1) / file, f"run/{file}")
        for name in (
            "run/chat_template.jinja",
            "chat_template.jinja",
            "run/checkpoint-5/chat_template.jinja",
        ):
            content = (OWN if name.startswith("run/chat") else "{% broken").encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    url = "/admin/v1/tenants/acme/adapters/a/versions"
    made = await site.admin.post(url, content=buffer.getvalue(), headers={"Content-Type": "application/gzip"})
    assert made.status_code == 201, made.text
    assert made.json()["report"]["chat"]["template"]


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ({"template": "{% if %}"}, "chat_template_invalid"),
        ({"template": "{{ 'x' * 10 ** 10 }}"}, "chat_template_invalid"),
        ({"tokenizer_config": []}, "chat_file_invalid"),
        ({"generation_config": {"top_p": "x"}}, "chat_file_invalid"),
    ],
)
async def test_what_cannot_be_used_is_refused(site: Site, files: dict[str, Any], code: str) -> None:
    await site.tenant("acme")
    refused = await upload(site, "a", **files)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, code)
    assert (await site.admin.get("/admin/v1/tenants/acme/adapters")).json()["data"] == []


async def test_defaults_hold_where_a_request_says_nothing(site: Site) -> None:
    key = await site.tenant("acme")
    await upload(site, "a", generation_config={"temperature": 0.25, "top_k": 7, "max_new_tokens": 3})
    body = await asked(site, key, max_tokens=None)
    assert (body["temperature"], body["top_k"], body["max_completion_tokens"]) == (0.25, 7, 3)
    body = await asked(site, key, temperature=0.5, max_tokens=2)
    assert (body["temperature"], body["max_tokens"]) == (0.5, 2)
    url = "/admin/v1/tenants/acme/adapters/a"
    set_ = {"temperature": 0.75, "system": "Be brief.", "max_tokens": 5}
    changed = await site.admin.patch(url, json={"defaults": set_})
    assert changed.status_code == 200, changed.text
    assert changed.json()["defaults"] == set_
    body = await asked(site, key, max_tokens=None)
    assert (body["temperature"], body["top_k"], body["max_completion_tokens"]) == (0.75, 7, 5)
    assert body["messages"] == [{"role": "system", "content": "Be brief."}, *TURNS]
    own = [{"role": "system", "content": "Be long."}, *TURNS]
    assert (await asked(site, key, messages=own))["messages"] == own
    body = await asked(site, key, "/v1/responses", messages=None, max_tokens=None, input="hi")
    assert (body["instructions"], body["temperature"], body["max_output_tokens"]) == ("Be brief.", 0.75, 5)
    body = await asked(site, key, "/v1/messages")
    assert (body["system"], body["top_k"]) == ("Be brief.", 7)
    body = await asked(site, key, "/v1/completions", messages=None, prompt="hi", max_tokens=None)
    assert (body["temperature"], body["max_tokens"]) == (0.75, 5)
    assert (await site.admin.patch(url, json={"defaults": None})).json()["defaults"] is None
    assert (await asked(site, key))["temperature"] == 0.25


async def test_a_default_length_stays_within_limits(site: Site) -> None:
    key = await site.tenant("acme", limits={"max_tokens": 4})
    await upload(site, "a", generation_config={"max_new_tokens": 100})
    assert (await asked(site, key, max_tokens=None))["max_completion_tokens"] == 4


@pytest.mark.parametrize(
    "defaults", [{"temperature": 3}, {"top_p": "1"}, {"max_tokens": 0}, {"template": "x"}, {"system": 5}, []]
)
async def test_defaults_that_are_none(site: Site, defaults: Any) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    refused = await site.admin.patch("/admin/v1/tenants/acme/adapters/a", json={"defaults": defaults})
    assert refused.status_code == 422, refused.text
