"""``/v1`` over real HTTP: what a customer's client sees, on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from server.inference.dialects.fields import BEAMS
from server.inference.dialects.registry import DIALECTS
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer, waits_at_most
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

MESSAGES: list[Any] = [{"role": "user", "content": "Hello there"}]
CHAT = {"messages": MESSAGES, "max_tokens": 4}
CHAT_URL = "/v1/chat/completions"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path) as site:
        yield site


def engine_of(site: Site) -> FakeEngine:
    engine = site.services.engine
    assert isinstance(engine, FakeEngine)
    return engine


async def digest(site: Site, tenant: str, name: str, number: int = 1) -> str:
    shown = (await site.admin.get(f"/admin/v1/tenants/{tenant}/adapters/{name}")).json()
    return next(str(v["digest"]) for v in shown["versions"] if v["version"] == number)


def error(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error of a response that must be one, in OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert (body["error"]["code"], body["error"]["param"]) == (code, param), body
    assert body["error"]["message"]
    assert response.headers["x-request-id"]
    if status in (429, 503):
        assert int(response.headers["retry-after"]) >= 1
    return dict(body["error"])


# --- answers ----------------------------------------------------------------------------------------


async def test_the_official_client_chats(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1), "sales": tiny.adapter(2)})
    client = site.openai(key)
    support, sales = await digest(site, "acme", "support"), await digest(site, "acme", "sales")
    for model, shown, first in (
        ("support", "support", support),
        ("sales", "sales", sales),
        ("sales@1", "sales@1", sales),
        ("default", "support", support),
        (tiny.NAME, tiny.NAME, "base"),
    ):
        made = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=4)
        assert made.model == shown
        assert made.choices[0].message.content == f"{first} 1 2 3"
        assert made.choices[0].finish_reason == "length"
        assert made.usage is not None
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (3, 4)
        stream = await client.chat.completions.create(
            model=model,
            messages=MESSAGES,
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == f"{first} 1 2 3"
        assert {chunk.model for chunk in chunks} == {shown}
        assert chunks[-1].usage == made.usage
    unnamed = await site.http.post(CHAT_URL, json=CHAT, headers=bearer(key))
    assert unnamed.json()["model"] == "support"


async def test_the_official_client_completes_text(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    client, first = site.openai(key), await digest(site, "acme", "support")
    made = await client.completions.create(model="support", prompt=["One two", "Three"], max_tokens=2, n=2)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in made.choices} == {f"{first} 1"}
    assert made.usage is not None
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 8)
    stream = await client.completions.create(model="support", prompt="One", max_tokens=3, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == f"{first} 1 2"


async def test_a_stream_is_one(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    async with site.http.stream("POST", CHAT_URL, json={**CHAT, "stream": True}, headers=bearer(key)) as got:
        assert got.headers["content-type"].startswith("text/event-stream")
        assert got.headers["cache-control"] == "no-cache"
        assert "content-length" not in got.headers
        lines = [line async for line in got.aiter_lines()]
    assert lines[-2:] == ["data: [DONE]", ""]


async def test_tenants_are_kept_apart_in_the_prefix_cache(site: Site) -> None:
    keys = [await site.tenant(f"t{i}", {"support": tiny.adapter(1)}) for i in range(2)]
    engine_of(site).calls.clear()  # the probe's
    for key in (*keys, keys[0]):
        assert (await site.chat(key, "hi", max_tokens=1)).status_code == 200
    salts = [call.cache_salt for call in engine_of(site).calls]
    assert salts[0] == salts[2] != salts[1]
    assert len({call.id for call in engine_of(site).calls}) == 3
    assert len({call.model for call in engine_of(site).calls}) == 2, "the same bytes, but a name of its own"


async def test_models_are_the_tenants_own(site: Site) -> None:
    key = await site.tenant("acme", {"b": tiny.adapter(1), "a": tiny.adapter(2)})
    bare = await site.tenant("bare", base_allowed=False)
    models = (await site.openai(key).models.list()).data
    assert [model.id for model in models] == ["a", "b", tiny.NAME]
    assert [model.owned_by for model in models] == ["acme", "acme", "loraplex"]
    assert all(model.created > 1_600_000_000 and model.object == "model" for model in models)
    for name in ("b", "b@1", "default", tiny.NAME):
        assert (await site.openai(key).models.retrieve(name)).id == name
    assert (await site.openai(bare).models.list()).data == []
    nobodys = ((bare, "b"), (bare, tiny.NAME), (bare, "default"), (key, "c"), (key, "a/b"), (key, "b@2"))
    for asker, name in nobodys:
        error(
            await site.http.get(f"/v1/models/{name}", headers=bearer(asker)), 404, "model_not_found", "model"
        )
    raw = (await site.http.get("/v1/models", headers=bearer(key))).text
    assert "blobs" not in raw


# --- who may ----------------------------------------------------------------------------------------

CREDENTIALS: dict[str, tuple[dict[str, str], str]] = {
    "a tenant key": ({}, "ok"),
    "a tenant key and its own name": ({"X-Customer-ID": "acme"}, "ok"),
    "a tenant key and another's name": ({"X-Customer-ID": "zeta"}, "customer_mismatch"),
    "a service key and a name": ({**bearer(SERVICE_KEY), "X-Customer-ID": "acme"}, "ok"),
    "a service key alone": (bearer(SERVICE_KEY), "customer_required"),
    "a service key and no such name": (
        {**bearer(SERVICE_KEY), "X-Customer-ID": "nobody"},
        "unknown_customer",
    ),
    "a service key and garbage": ({**bearer(SERVICE_KEY), "X-Customer-ID": "../x"}, "unknown_customer"),
    "the admin key": (bearer(ADMIN_KEY), "permission_denied"),
    "the admin key and a name": ({**bearer(ADMIN_KEY), "X-Customer-ID": "acme"}, "permission_denied"),
    "no key": ({"Authorization": ""}, "invalid_api_key"),
    "no key but a name": ({"Authorization": "", "X-Customer-ID": "acme"}, "invalid_api_key"),
    "a wrong key": (bearer("lp-" + "x" * 43), "invalid_api_key"),
    "a long key": (bearer("x" * 5000), "invalid_api_key"),
    "another scheme": ({"Authorization": "Basic YTpi"}, "invalid_api_key"),
    "a bare key": ({"Authorization": ADMIN_KEY}, "invalid_api_key"),
}
STATUS = {"invalid_api_key": 401, "customer_required": 400, "ok": 200}


async def test_who_may_run_what(site: Site) -> None:
    key = await site.tenant("acme", {"support": tiny.adapter(1)})
    await site.tenant("zeta")
    for name, (headers, expected) in CREDENTIALS.items():
        given = {k: v for k, v in {**bearer(key), **headers}.items() if v}
        for response in (
            await site.http.get("/v1/models", headers=given),
            await site.http.get("/v1/models/support", headers=given),
            await site.http.post(CHAT_URL, json=CHAT, headers=given),
            await site.http.post("/v1/completions", json={"prompt": "a"}, headers=given),
        ):
            status = STATUS.get(expected, 403)
            assert response.status_code == status, (name, response.text)
            if status != 200:
                assert response.json()["error"]["code"] == expected, name
            assert ("www-authenticate" in response.headers) == (status == 401)


async def test_anothers_adapter_looks_like_none(site: Site) -> None:
    key = await site.tenant("acme", {"mine": tiny.adapter(1)})
    await site.tenant("zeta", {"theirs": tiny.adapter(2)})
    answers = []
    for name in ("theirs", "nobodys"):
        refused = await site.chat(key, "hi", model=name)
        answers.append(error(refused, 404, "model_not_found", "model")["message"].replace(name, "*"))
    assert answers[0] == answers[1]
    for name in ("zeta/theirs", "mine@2", "mine@0", "mine@x", "", "x" * 5000, "\0", "../mine"):
        body = json.dumps({**CHAT, "model": name}).encode()
        error(
            await site.http.post(CHAT_URL, content=body, headers=bearer(key)), 404, "model_not_found", "model"
        )
    error(await site.chat(key, "hi", model=5), 400, "invalid_request", "model")


async def test_a_tenant_without_the_base_or_a_default(site: Site) -> None:
    key = await site.tenant("acme", base_allowed=False)
    error(await site.chat(key, "hi"), 404, "model_not_found", "model")
    error(await site.chat(key, "hi", model=tiny.NAME), 404, "model_not_found", "model")


async def test_a_revoked_key_is_refused_at_once(site: Site) -> None:
    await site.tenant("acme", {"a": tiny.adapter(1)})
    made = (await site.admin.post("/admin/v1/tenants/acme/keys", json={"name": "laptop"})).json()
    assert (await site.chat(made["key"], "hi")).status_code == 200
    gone = await site.admin.delete(f"/admin/v1/tenants/acme/keys/{made['id']}")
    assert gone.status_code == 204
    error(await site.chat(made["key"], "hi"), 401, "invalid_api_key")


# --- what is refused --------------------------------------------------------------------------------

CHAT_SURFACE, TEXT_SURFACE = DIALECTS["chat"], DIALECTS["completion"]
CHAT_EXTRAS = ChatCompletionRequest.model_fields.keys() - CHAT_SURFACE.accepted - CHAT_SURFACE.ignored
TEXT_EXTRAS = CompletionRequest.model_fields.keys() - TEXT_SURFACE.accepted - TEXT_SURFACE.ignored
EXTRAS = [
    *(("chat", name) for name in (*sorted(CHAT_EXTRAS), "lora_path", "prompt")),
    *(("text", name) for name in (*sorted(TEXT_EXTRAS), "messages")),
]


async def test_every_field_that_is_not_meant_is_refused_by_name(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    engine_of(site).calls.clear()  # the probe's
    assert len(EXTRAS) > 30, "vLLM's request models have moved"
    for kind, name in EXTRAS:
        url, body = (CHAT_URL, CHAT) if kind == "chat" else ("/v1/completions", {"prompt": "a"})
        refused = await site.http.post(url, json={**body, name: "x"}, headers=bearer(key))
        error(refused, 400, "unsupported_parameter" if name in BEAMS else "unknown_field", name)
    for body in (
        {"stream": True, "stream_options": {"continuous_usage_stats": True}},
        {"response_format": {"type": "structural_tag"}},
    ):
        assert (await site.http.post(CHAT_URL, json={**CHAT, **body}, headers=bearer(key))).status_code == 400
    assert engine_of(site).calls == []


async def test_a_part_that_vllm_reads_apart_is_named_by_its_messages(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
    asked = {**CHAT, "messages": [{"role": "assistant", "tool_calls": [call]}]}
    refused = await site.http.post(CHAT_URL, json=asked, headers=bearer(key))
    error(refused, 400, "invalid_request", "messages")
    assert "function.arguments" in refused.json()["error"]["message"]


async def test_fields_about_openais_own_service_are_dropped(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    dropped = dict.fromkeys(CHAT_SURFACE.ignored, "x") | {"stream_options": {"include_obfuscation": False}}
    answered = await site.http.post(CHAT_URL, json={**CHAT, **dropped, "stream": True}, headers=bearer(key))
    assert answered.status_code == 200


@pytest.mark.parametrize("header", ["X-Vllm-Priority", "X-data-parallel-rank", "X-Session-Id"])
async def test_headers_to_the_engine_are_refused(site: Site, header: str) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    refused = await site.http.post(CHAT_URL, json=CHAT, headers={**bearer(key), header: "1"})
    error(refused, 400, "unknown_header", header.lower())


BODIES: dict[str, tuple[bytes, int, str]] = {
    "nothing": (b"", 400, "invalid_json"),
    "no JSON": (b"{", 400, "invalid_json"),
    "a list": (b"[]", 400, "invalid_json"),
    "not UTF-8": (b'{"messages": "\xff"}', 400, "invalid_json"),
    "NaN": (b'{"temperature": NaN}', 400, "invalid_json"),
    "infinity": (b'{"temperature": -Infinity}', 400, "invalid_json"),
    "nested too deeply": (b'{"messages": ' + b"[" * 100_000, 400, "invalid_json"),
    "an endless number": (b'{"seed": ' + b"9" * 10_000 + b"}", 400, "invalid_json"),
    "no messages": (b"{}", 400, "invalid_request"),
    "a lone surrogate for a name": (b'{"\\ud800": 1}', 400, "invalid_json"),
    "half a surrogate pair": (b'{"stop": "\\ud83d"}', 400, "invalid_json"),
    "half a pair deep inside": (
        b'{"messages": [{"role": "user", "content": "\\udc00"}]}',
        400,
        "invalid_json",
    ),
    "UTF-16": ('{"messages": []}'.encode("utf-16"), 400, "invalid_json"),
    "UTF-16 without a mark": ('{"messages": []}'.encode("utf-16-le"), 400, "invalid_json"),
    "UTF-32": ('{"messages": []}'.encode("utf-32"), 400, "invalid_json"),
    "a key twice": (b'{"model": "a", "model": "b"}', 400, "invalid_json"),
    "a key twice inside": (b'{"messages": [{"role": "user", "role": "system"}]}', 400, "invalid_json"),
    "a key twice, written in two ways": (b'{"n": 1, "\\u006e": 2}', 400, "invalid_json"),
    "too large a number": (b'{"temperature": 1e999}', 400, "invalid_json"),
    "a hundred thousand ones": (b'{"messages": [' + b"1," * 99_999 + b"1]}", 400, "invalid_request"),
    "a million ones": (b'{"messages": [' + b"1," * 1_000_000 + b"1]}", 400, "invalid_json"),
    "a hundred thousand objects": (b'{"messages": [' + b"{}," * 99_999 + b"{}]}", 400, "invalid_json"),
    "as many in another field": (b'{"tools": [' + b"[]," * 99_999 + b"[]]}", 400, "invalid_json"),
    "as many texts": (b'{"stop": [' + b'"",' * 199_999 + b'""]}', 400, "invalid_json"),
    "as many fractions": (b'{"stop": [' + b"1e3," * 199_999 + b"1]}", 400, "invalid_json"),
    "a long number in a long body": (
        b'{"seed": [' + (b"9" * 4000 + b",") * 100 + b"1]}",
        400,
        "invalid_json",
    ),
    "a long name": (b'{"' + b"x" * 100_000 + b'": 1}', 400, "unknown_field"),
    "too large": (b" " * (70 << 10) + b"{}", 413, "body_too_large"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def limited(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[Site, str]]:
    """A server with a limit of a body's bytes, and a customer's key."""
    async with fake_site(tmp_path_factory.mktemp("bodies"), max_body_bytes=request.param) as site:
        yield site, await site.tenant("acme", {"a": tiny.adapter(1)})


@pytest.mark.parametrize(
    ("what", "limited"),
    [(what, 64 << 10 if status == 413 else 4 << 20) for what, (_, status, _) in BODIES.items()],
    ids=BODIES,
    indirect=["limited"],
)
@pytest.mark.asyncio(loop_scope="module")
async def test_bodies_that_are_none(limited: tuple[Site, str], what: str) -> None:
    (site, key), (content, status, code) = limited, BODIES[what]

    async def in_chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    for sent in (content, in_chunks()):
        refused = await site.http.post(CHAT_URL, content=sent, headers=bearer(key))
        assert refused.status_code == status, refused.text
        assert refused.json()["error"]["code"] == code
        assert len(refused.text) < 3000, "an error repeats only so much of what was sent"


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"n": 100}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"role": "user", "content": "word " * 600}]}, "prompt"),
        ({"messages": [{"role": "user", "content": "word " * 600}], "stream": True}, "prompt"),
    ],
)
async def test_wrong_values_are_named_before_the_first_byte(
    site: Site, changes: dict[str, Any], param: str
) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    refused = await site.http.post(CHAT_URL, json={**CHAT, **changes}, headers=bearer(key))
    assert refused.status_code == 400, refused.text
    said = refused.json()["error"]
    assert said["type"] == "invalid_request_error"
    assert said["param"] == param or param in said["message"]
    assert len(said["message"]) < 500
    site.services.dispatcher._plan.check()
    assert site.services.dispatcher.open_leases() == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_prompt_that_vllm_cannot_encode(site: Site, stream: bool) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    body = json.dumps({**CHAT, "messages": [{"role": "\ud800", "content": "\ud800"}], "stream": stream})
    answered = await site.http.post(CHAT_URL, content=body.encode(), headers=bearer(key))
    assert answered.status_code in (200, 400)


# --- what goes wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "said"), [(400, 400, "it broke"), (503, 503, "it broke"), (500, 500, "failed")]
)
async def test_an_engine_error_before_the_first_token_has_a_status(
    site: Site, code: int, status: int, said: str
) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    engine_of(site).break_streams = (code, 0)
    for stream in (False, True):
        refused = await site.http.post(CHAT_URL, json={**CHAT, "stream": stream}, headers=bearer(key))
        assert refused.status_code == status, refused.text
        assert said in refused.json()["error"]["message"]
        assert isinstance(refused.json()["error"]["code"], str)


async def test_an_engine_error_after_the_first_token_is_an_event(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    engine_of(site).break_streams = (500, 2)
    stream = await site.openai(key).chat.completions.create(
        model="a", messages=MESSAGES, max_tokens=9, stream=True
    )
    heard = []

    async def listen() -> None:
        async for chunk in stream:
            heard.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError, match="The engine failed"):
        await listen()
    assert heard[-1] == " 1"


@pytest.fixture
async def narrow(tmp_path: Path) -> AsyncIterator[Site]:
    """A site with one place in the engine, which is taken."""
    engine = FakeEngine(tiny.base(), max_running=1, times=Times(step=0.1), max_model_len=1 << 16)
    async with fake_site(tmp_path, engine, queue_timeout=600) as site:
        key = await site.tenant("first", {"a": tiny.adapter(1)})
        body = {**CHAT, "max_tokens": 60_000, "stream": True}
        async with site.http.stream("POST", CHAT_URL, json=body, headers=bearer(key)):
            yield site


async def test_whoever_waits_too_long_is_told(narrow: Site) -> None:
    key = await narrow.tenant("acme", {"a": tiny.adapter(1)})
    waits_at_most(narrow, 0.5)
    error(await narrow.chat(key, "hi"), 503, "queue_timeout")
    with pytest.raises(openai.InternalServerError) as refused:
        await narrow.openai(key).chat.completions.create(model="a", messages=MESSAGES)
    assert refused.value.status_code == 503


async def test_only_so_many_may_wait(narrow: Site) -> None:
    key = await narrow.tenant("acme", {"a": tiny.adapter(1)}, max_queued=1)
    waiting = asyncio.create_task(narrow.chat(key, "hi"))
    async with asyncio.timeout(60):
        while narrow.services.dispatcher.snapshot().queued != {"acme": 1}:
            await asyncio.sleep(0.01)
    error(await narrow.chat(key, "hi"), 429, "rate_limit_exceeded")
    with pytest.raises(openai.RateLimitError):
        await narrow.openai(key).chat.completions.create(model="a", messages=MESSAGES)
    waiting.cancel()
    await asyncio.wait([waiting])
    async with asyncio.timeout(60):
        while narrow.services.dispatcher.snapshot().queued:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_says_which_version_gave_it(site: Site, stream: bool) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    assert (await site.upload("acme", "a", tiny.adapter(2))).status_code == 201
    for model, version in (("a", "a@2"), ("a@1", "a@1"), (tiny.NAME, None)):
        answer = await site.chat(key, "hi", model=model, stream=stream)
        assert answer.status_code == 200, answer.text
        assert answer.headers.get_list("x-loraplex-version") == ([version] if version else [])
        assert answer.headers.get("x-accel-buffering") == ("no" if stream else None)
        refused = await site.chat(key, "word " * 5000, model=model, stream=stream)
        error(refused, 400, "context_length_exceeded", "messages")
        assert refused.headers.get("x-loraplex-version") == version
    body = {"model": "a@1", "messages": MESSAGES}
    for url in ("/tokenize", "/v1/messages/count_tokens"):
        counted = await site.http.post(url, json=body, headers=bearer(key))
        assert counted.headers["x-loraplex-version"] == "a@1", counted.text


async def test_models_with_a_slash_are_models(site: Site) -> None:
    key = await site.tenant("acme", {"a": tiny.adapter(1)})
    listed = [await site.http.get(path, headers=bearer(key)) for path in ("/v1/models", "/v1/models/")]
    assert listed[0].json() == listed[1].json()
    assert [answer.status_code for answer in listed] == [200, 200]
