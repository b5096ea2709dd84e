"""``/v1/responses``, ``/v1/messages`` and tokens over HTTP, by the vendors' own clients, on a fake engine."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from server.app import drain
from server.engine.serving import with_object_calls
from tests.service.http.test_api import digest, engine_of, error
from tests.support import tiny
from tests.support.fakes import FakeEngine, Times
from tests.support.site import ADMIN_KEY, SERVICE_KEY, Site, bearer
from tests.support.tiny import fake_site

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated")

TURN: list[Any] = [{"role": "user", "content": "Hello there"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/responses": {"input": "Hello there", "max_output_tokens": 4},
    "/v1/messages": {"model": "support", "messages": TURN, "max_tokens": 4},
    "/v1/messages/count_tokens": {"model": "support", "messages": TURN},
    "/tokenize": {"prompt": "Hello there"},
    "/detokenize": {"tokens": [0]},
}
ANSWERS = ("/v1/responses", "/v1/messages")


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with fake_site(tmp_path, FakeEngine(tiny.base(), times=Times(step=0.002))) as site:
        yield site


@pytest.fixture
async def key(site: Site) -> str:
    made = await site.tenant("acme", {"support": tiny.adapter(1), "sales": tiny.adapter(2)})
    engine_of(site).calls.clear()  # of the uploads
    engine_of(site).ops.clear()
    return made


async def post(site: Site, key: str, url: str, **changes: Any) -> httpx.Response:
    return await site.http.post(url, json=BODIES[url] | changes, headers=bearer(key))


def refused(response: httpx.Response, url: str, status: int, code: str, param: str | None = None) -> str:
    """The message of an error in the shape that the clients of ``url`` read."""
    if not url.startswith("/v1/messages"):
        return str(error(response, status, code, param)["message"])
    assert response.status_code == status, response.text
    body = response.json()
    assert (body.keys(), body["type"]) == ({"type", "error"}, "error")
    assert body["error"].keys() == {"type", "message", "code"}
    assert body["error"]["code"] == code, body
    return str(body["error"]["message"])


# --- responses --------------------------------------------------------------------------------------


async def test_the_openai_client_gets_responses(site: Site, key: str) -> None:
    client = site.openai(key)
    first = await digest(site, "acme", "support")
    made = await client.responses.create(model="support", input="Hello there", max_output_tokens=4)
    assert made.output_text == f"{first} 1 2 3"
    assert (made.model, made.status) == ("support", "incomplete")
    assert made.usage is not None
    assert (made.usage.input_tokens, made.usage.output_tokens) == (3, 4)
    whole = await client.responses.create(model="sales@1", input=TURN, instructions="Be kind.", store=False)
    assert (whole.model, whole.status) == ("sales@1", "completed")
    async with client.responses.stream(model="support", input="Hello there", max_output_tokens=4) as stream:
        spoken = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert "".join(spoken) == final.output_text == made.output_text
    assert final.usage == made.usage


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("conversation", "conv_1"),
        ("background", True),
        ("store", True),
        ("prompt", {"id": "pmpt_1"}),
    ],
)
async def test_nothing_is_kept_between_responses(site: Site, key: str, name: str, value: Any) -> None:
    said = await post(site, key, "/v1/responses", **{name: value})
    assert "leave out" in refused(said, "/v1/responses", 400, "stateless", name) or "send" in said.text
    assert (await post(site, key, "/v1/responses", **{name: None})).status_code == 200


async def test_a_response_cannot_be_fetched(site: Site, key: str) -> None:
    made = await site.openai(key).responses.create(model="support", input="hi")
    with pytest.raises(openai.NotFoundError):
        await site.openai(key).responses.retrieve(made.id)


async def test_only_tools_that_the_customer_runs(site: Site, key: str) -> None:
    for tool in ({"type": "web_search"}, {"type": "mcp", "server_url": "http://x", "server_label": "x"}):
        said = await post(site, key, "/v1/responses", tools=[tool])
        refused(said, "/v1/responses", 400, "invalid_request", "tools.0.type")


# --- messages ---------------------------------------------------------------------------------------


async def test_the_anthropic_client_gets_messages(site: Site, key: str) -> None:
    client = site.anthropic(key)
    first = await digest(site, "acme", "support")
    made = await client.messages.create(model="support", messages=TURN, max_tokens=4)
    assert [block.text for block in made.content if block.type == "text"] == [f"{first} 1 2 3"]
    assert (made.model, made.stop_reason, made.role) == ("support", "max_tokens", "assistant")
    assert (made.usage.input_tokens, made.usage.output_tokens) == (3, 4)
    asked: dict[str, Any] = {"model": "support", "messages": TURN, "max_tokens": 4, "system": "Be kind."}
    async with client.messages.stream(**asked) as stream:
        spoken = "".join([text async for text in stream.text_stream])
        final = await stream.get_final_message()
    assert spoken == f"{first} 1 2 3"
    assert (final.model, final.usage.output_tokens) == ("support", 4)
    counted = await client.messages.count_tokens(model="support", messages=TURN)
    assert counted.input_tokens == made.usage.input_tokens


async def test_the_anthropic_client_reads_the_errors(site: Site, key: str) -> None:
    client = site.anthropic(key)
    with pytest.raises(anthropic.NotFoundError) as missing:
        await client.messages.create(model="nobodys", messages=TURN, max_tokens=4)
    assert missing.value.body == {
        "type": "error",
        "error": {
            "type": "not_found_error",
            "message": "The model `nobodys` does not exist.",
            "code": "model_not_found",
        },
    }
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        await client.messages.create(
            model="support", messages=TURN, max_tokens=4, extra_body={"temperature": -1}
        )
    with pytest.raises(anthropic.AuthenticationError):
        await site.anthropic("wrong").messages.create(model="support", messages=TURN, max_tokens=4)
    engine_of(site).break_streams = (500, 2)
    with pytest.raises(anthropic.APIStatusError, match="The engine failed") as broken:
        async with client.messages.stream(model="support", messages=TURN, max_tokens=9) as stream:
            await stream.get_final_message()
    assert broken.value.body["error"]["type"] == "api_error"  # type: ignore[index]


async def test_fields_about_anthropics_own_service_are_dropped(site: Site, key: str) -> None:
    dropped: dict[str, Any] = {"metadata": {"user_id": "1"}, "service_tier": "auto"}
    assert (await post(site, key, "/v1/messages", **dropped)).status_code == 200


# --- who may, and what is refused, on every route ---------------------------------------------------


@pytest.mark.parametrize("url", BODIES)
async def test_who_may(site: Site, key: str, url: str) -> None:
    other = await site.tenant("zeta", {"theirs": tiny.adapter(3)})
    anthropics = url.startswith("/v1/messages")
    unknown = (401, "invalid_api_key")
    for headers, status, code in (
        ({}, *unknown),
        (bearer(ADMIN_KEY), 403, "permission_denied"),
        ({"x-api-key": ADMIN_KEY}, *((403, "permission_denied") if anthropics else unknown)),
        ({"x-api-key": key, **bearer("wrong")}, *((400, "conflicting_keys") if anthropics else unknown)),
    ):
        param = "X-API-Key" if code == "conflicting_keys" else None
        refused(await site.http.post(url, json=BODIES[url], headers=headers), url, status, code, param)
    by_gateway = {**bearer(SERVICE_KEY), "X-Customer-ID": "acme"}
    assert (await site.http.post(url, json=BODIES[url], headers=by_gateway)).status_code == 200
    by_key = await site.http.post(url, json=BODIES[url], headers={"x-api-key": key})
    assert by_key.status_code == (200 if anthropics else 401)
    for name in ("theirs", "nobodys", "support@9"):
        missing = await post(site, key, url, model=name)
        assert name in refused(missing, url, 404, "model_not_found", "model")
    mine = {"model": "theirs"} if "model" in BODIES[url] else {}
    assert (await post(site, other, url, **mine)).status_code == 200


@pytest.mark.parametrize("url", BODIES)
async def test_what_is_not_meant_is_refused(site: Site, key: str, url: str) -> None:
    for name in ("cache_salt", "priority", "vllm_xargs", "chat_template", "request_id", "lora_path"):
        said = await post(site, key, url, **{name: 1})
        refused(said, url, 400, "unknown_field", name)
    headed = await site.http.post(url, json=BODIES[url], headers={**bearer(key), "X-Session-Id": "x"})
    refused(headed, url, 400, "unknown_header", "x-session-id")
    for content in (b"{", b"[]", b'{"model": "\xff"}', b'{"a": NaN}'):
        raw = await site.http.post(url, content=content, headers=bearer(key))
        refused(raw, url, 400, "invalid_json")
    assert engine_of(site).calls == []
    assert site.services.dispatcher.open_leases() == []


@pytest.mark.parametrize("url", ANSWERS)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_error_before_the_first_token_has_a_status(
    site: Site, key: str, url: str, stream: bool
) -> None:
    for code, status, name in ((400, 400, "invalid_request"), (503, 503, "server_overloaded")):
        engine_of(site).break_streams = (code, 0)
        said = await post(site, key, url, stream=stream)
        assert "it broke" in refused(said, url, status, name)
        assert ("retry-after" in said.headers) == (status == 503)


async def test_an_error_in_a_stream_of_a_response_is_its_last_event(site: Site, key: str) -> None:
    engine_of(site).break_streams = (503, 2)
    stream = await site.openai(key).responses.create(model="support", input="hi", stream=True)
    told = [event async for event in stream]
    last = told[-1]
    assert last.type == "error"
    assert (last.code, last.message) == ("server_overloaded", "it broke")
    assert [event.sequence_number for event in told] == list(range(len(told)))


# --- leases -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("url", ANSWERS)
async def test_usage_is_counted_and_leases_given_back(site: Site, key: str, url: str) -> None:
    for stream in (False, True):
        assert (await post(site, key, url, stream=stream)).status_code == 200
    page = (await site.http.get("/metrics")).text
    assert 'loraplex_requests_total{outcome="completed",tenant="acme"} 2.0' in page
    assert 'loraplex_prompt_tokens_total{tenant="acme"} 6.0' in page
    assert 'loraplex_output_tokens_total{tenant="acme"} 8.0' in page
    assert site.services.dispatcher.open_leases() == []
    assert {call.cache_salt for call in engine_of(site).calls} != {""}


@pytest.mark.parametrize("url", ANSWERS)
async def test_whoever_leaves_gives_the_place_back(site: Site, key: str, url: str) -> None:
    limit = "max_output_tokens" if url == "/v1/responses" else "max_tokens"
    body = BODIES[url] | {limit: 400, "stream": True}
    async with site.http.stream("POST", url, json=body, headers=bearer(key)) as got:
        await anext(got.aiter_lines())
    async with asyncio.timeout(60):
        while site.services.dispatcher.open_leases():
            await asyncio.sleep(0.01)
    assert 'outcome="disconnected",tenant="acme"} 1.0' in (await site.http.get("/metrics")).text


async def test_a_response_that_a_drain_cuts_is_not_complete(tmp_path: Path) -> None:
    engine = FakeEngine(tiny.base(), times=Times(step=0.05))
    async with fake_site(tmp_path, engine, drain_timeout=0.2) as site:
        key = await site.tenant("acme", {"support": tiny.adapter(1)})
        long = asyncio.create_task(post(site, key, "/v1/responses", max_output_tokens=400, stream=True))
        while not engine.running:
            await asyncio.sleep(0.01)
        await drain(site.app)
        last = (await long).text.strip().rsplit("data: ", 1)[1]
        assert json.loads(last)["response"]["status"] == "cancelled"


async def test_tokens_need_no_slot(site: Site, key: str) -> None:
    told = (await post(site, key, "/tokenize", model="support")).json()
    assert told == {"tokens": [0, 1, 2], "count": 3, "max_model_len": 512}
    back = await post(site, key, "/detokenize", tokens=told["tokens"])
    assert back.json() == {"prompt": "Hello there"}
    said = await post(site, key, "/detokenize", tokens=[10**9])
    refused(said, "/detokenize", 400, "invalid_request", "tokens")
    chat = (await site.http.post("/tokenize", json={"messages": TURN}, headers=bearer(key))).json()
    assert chat["count"] == 3
    assert engine_of(site).ops == []
    assert engine_of(site).calls == []


@pytest.mark.parametrize(
    ("arguments", "whole"), [('{"a": 1}', True), ('"a"', False), ("[]", False), ('{"a', False), ("", False)]
)
def test_a_tools_input_is_an_object(arguments: str, whole: bool) -> None:
    called = SimpleNamespace(function=SimpleNamespace(arguments=arguments))
    message = SimpleNamespace(tool_calls=[called], content=None)
    choice = SimpleNamespace(message=message, finish_reason="tool_calls")
    with_object_calls(SimpleNamespace(choices=[choice]))
    assert message.tool_calls == ([called] if whole else [])
    assert message.content == (None if whole else arguments)
    assert choice.finish_reason == ("tool_calls" if whole else "stop")
