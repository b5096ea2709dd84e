"""The fields that vLLM's users send, on the real engine: each changes what it says."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
import pytest_asyncio

from server.inference.dialects.fields import BEAMS, RESERVED, VLLM_ADVICE
from server.inference.dialects.registry import DIALECTS
from tests.support.site import Site, bearer

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

TURN = {"role": "user", "content": "Name three colours of the rainbow."}
LONG = "word " * 1100
CHAT: dict[str, Any] = {"model": "base", "messages": [TURN], "max_tokens": 12, "temperature": 0}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def key(site: Site) -> str:
    return await site.tenant("fields", base_allowed=True)


async def ask(site: Site, key: str, url: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    body = {**CHAT, "model": site.services.engine.base.name, **fields}
    return await site.http.post(
        url, json={k: v for k, v in body.items() if v is not ...}, headers=bearer(key)
    )


async def told(site: Site, key: str, **fields: Any) -> tuple[str, str, dict[str, Any]]:
    said = await ask(site, key, **fields)
    assert said.status_code == 200, said.text
    choice = said.json()["choices"][0]
    return choice["message"]["content"] or "", choice["finish_reason"], said.json()


async def each(site: Site, key: str, *changes: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """What is told with each of ``changes``, asked at once: they share the engine's steps."""
    return list(await asyncio.gather(*(told(site, key, **fields) for fields in changes)))


async def test_each_sampling_field_changes_what_is_said(site: Site, key: str) -> None:
    hot = {"temperature": 2, "seed": 7}
    (plain, _, _), (again, _, _), (wild, _, _) = await each(site, key, {}, {"top_p": 1}, hot)
    assert plain == again
    assert wild != plain
    narrow = [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 1e-6}]
    different: list[dict[str, Any]] = [
        {"repetition_penalty": 5.0},
        {"bad_words": [plain.split()[0]]},
        {"allowed_token_ids": [260, 28]},
        {"structured_outputs": {"choice": ["violet", "indigo"]}},
        {"structured_outputs": {"regex": "[0-9]{3}"}},
        {"guided_regex": "[0-9]{3}"},
        {"guided_choice": ["violet"]},
        {"guided_json": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
        {"add_generation_prompt": False},
    ]
    said = [text for text, _, _ in await each(site, key, *({**hot, **one} for one in narrow), *different)]
    for changed, other in zip(narrow, said[: len(narrow)], strict=True):
        assert other == plain, changed
    for changed, other in zip(different, said[len(narrow) :], strict=True):
        assert other != plain, changed
    texts = dict(zip(map(str, different), said[len(narrow) :], strict=True))
    assert texts[str({"guided_choice": ["violet"]})] == "violet"
    assert texts[str({"structured_outputs": {"regex": "[0-9]{3}"}})].isdigit()


async def test_where_an_answer_ends(site: Site, key: str) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ending = {"logit_bias": {"2": 16}}  # as likely an end as a base of all its layers comes to
    brief: dict[str, Any] = {"messages": question, "max_tokens": 60, **ending}
    endless = {**brief, "ignore_eos": True}
    shown: dict[str, Any] = {"skip_special_tokens": False}
    ends, goes_on, least, marked, loud, tight, ids = await each(
        site,
        key,
        brief,
        endless,
        {**brief, "min_tokens": 50},
        {**brief, **shown, "include_stop_str_in_output": True},
        {**endless, **shown},
        {**endless, **shown, "spaces_between_special_tokens": False},
        {"return_token_ids": True},
    )
    short, finish, _ = ends
    assert finish == "stop"
    longer, finish, body = goes_on
    assert (finish, body["usage"]["completion_tokens"]) == ("length", 60)
    assert longer.startswith(short)
    assert least[2]["usage"]["completion_tokens"] >= 50
    assert marked[0] == short or "<|im_end|>" in marked[0]
    assert "<|im_end|>" in loud[0]
    assert "<|im_end|>" in tight[0]
    third = ids[2]["choices"][0]["token_ids"][2]
    _, finish, body = await told(site, key, stop_token_ids=[third])
    assert (finish, body["usage"]["completion_tokens"]) == ("stop", 3)


async def test_more_of_an_answer(site: Site, key: str) -> None:
    prompt, cut, as_ids, chosen = [
        body
        for _, _, body in await each(
            site,
            key,
            {"prompt_logprobs": 1},
            {"truncate_prompt_tokens": 5},
            {"logprobs": True, "return_tokens_as_token_ids": True},
            {"logprobs": True, "logprob_token_ids": [260, 28]},
        )
    ]
    assert len(prompt["prompt_logprobs"]) == prompt["usage"]["prompt_tokens"]
    assert cut["usage"]["prompt_tokens"] == 5
    assert as_ids["choices"][0]["logprobs"]["content"][0]["token"].startswith("token_id:")
    assert len(chosen["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) >= 2


async def test_a_message_is_gone_on_with(site: Site, key: str) -> None:
    begun = [TURN, {"role": "assistant", "content": "Red, green and"}]
    more, _, body = await told(site, key, messages=begun, continue_final_message=True)
    other, _, again = await told(site, key, messages=begun)
    assert body["usage"]["prompt_tokens"] < again["usage"]["prompt_tokens"]
    assert more != other


async def test_anthropics_begun_answer_is_gone_on_with(site: Site, key: str) -> None:
    begun = [TURN, {"role": "assistant", "content": "Red, green and"}]
    more, _, body = await told(site, key, messages=begun, continue_final_message=True)
    parts = [TURN, {"role": "assistant", "content": [{"type": "text", "text": "Red, green and"}]}]
    for messages in (begun, parts):
        said = (await ask(site, key, "/v1/messages", messages=messages)).json()
        assert said["content"][0]["text"] == more
        assert said["usage"]["input_tokens"] == body["usage"]["prompt_tokens"]
        form = {"messages": messages, "max_tokens": ..., "temperature": ...}
        counted = await ask(site, key, "/v1/messages/count_tokens", **form)
        assert counted.json()["input_tokens"] == body["usage"]["prompt_tokens"]
    for url in ("/v1/messages", "/v1/messages/count_tokens"):
        form = {"max_tokens": 5 if url.endswith("messages") else ..., "temperature": ...}
        empty = await ask(site, key, url, messages=[{"role": "user", "content": []}], **form)
        assert empty.status_code == 400, empty.text
        assert "content" in empty.json()["error"]["message"]


async def test_completions_and_responses_have_them_too(site: Site, key: str) -> None:
    url = "/v1/completions"
    plain = await ask(site, key, url, messages=..., prompt="One two three")
    other = await ask(site, key, url, messages=..., prompt="One two three", guided_regex="[0-9]{3}")
    assert plain.json()["choices"][0]["text"] != other.json()["choices"][0]["text"]
    assert other.json()["choices"][0]["text"].isdigit()
    form = {"messages": ..., "max_tokens": ..., "max_output_tokens": 12, "input": TURN["content"]}
    url = "/v1/responses"
    for fields in ({"repetition_penalty": 5.0}, {"structured_outputs": {"choice": ["violet"]}}, {"seed": 1}):
        said = await ask(site, key, url, **form, **fields)
        assert said.status_code == 200, (fields, said.text)
    assert (await ask(site, key, url, **form, structured_outputs={"choice": ["violet"]})).json()["output"][
        -1
    ]["content"][0]["text"] == "violet"


@pytest.mark.parametrize("kind", ["chat", "completion", "responses", "messages", "embedding", "count_tokens"])
async def test_each_field_of_vllm_is_known(kind: str) -> None:
    """A release of vLLM's with a new field fails here, before a customer finds it."""
    from server.engine.serving import resolve

    dialect = DIALECTS[kind]
    known = dialect.accepted | dialect.ignored | dialect.only.keys() | RESERVED | VLLM_ADVICE | BEAMS.keys()
    stateful = {"background", "previous_response_id", "prompt"} if kind == "responses" else set()
    model = resolve(dialect.request_model({}))
    assert set(model.model_fields) - known - stateful == set()


async def test_limits_hold_for_what_is_asked_for_at_least(site: Site) -> None:
    key = await site.tenant("few", base_allowed=True, limits={"max_tokens": 8})
    refused = await ask(site, key, max_tokens=..., min_tokens=9)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "max_tokens_too_large")
    assert refused.json()["error"]["param"] == "min_tokens"
    _, _, body = await told(site, key, max_tokens=..., min_tokens=8, ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 8
    _, _, body = await told(site, key, max_tokens=..., ignore_eos=True)
    assert body["usage"]["completion_tokens"] == 8


@pytest.mark.parametrize(
    ("url", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "word " * 5000}]}, "messages"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/completions", {"messages": ..., "prompt": LONG}, "prompt"),
        ("/v1/completions", {"messages": ..., "prompt": [5] * 1024}, "prompt"),
        ("/v1/responses", {"messages": ..., "max_tokens": ..., "input": LONG}, "input"),
        ("/v1/responses", {"messages": ..., "max_tokens": ..., "input": LONG, "stream": True}, "input"),
        ("/v1/chat/completions", {"max_tokens": 2000}, "max_tokens"),
        ("/v1/chat/completions", {"max_tokens": ..., "max_completion_tokens": 2000}, "max_completion_tokens"),
        ("/v1/completions", {"messages": ..., "prompt": "x", "max_tokens": 2000}, "max_tokens"),
        (
            "/v1/responses",
            {"messages": ..., "max_tokens": ..., "input": "x", "max_output_tokens": 2000},
            "max_output_tokens",
        ),
    ],
)  # fmt: skip
async def test_a_prompt_that_is_too_long(
    site: Site, key: str, url: str, fields: dict[str, Any], param: str
) -> None:
    refused = await ask(site, key, url, **fields)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)


async def test_anthropics_prompt_that_is_too_long(site: Site, key: str) -> None:
    long = [{"role": "user", "content": LONG}]
    for url in ("/v1/messages", "/v1/messages/count_tokens"):
        fields = {"temperature": ..., "max_tokens": 5 if url.endswith("messages") else ...}
        refused = await ask(site, key, url, messages=long, **fields)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith("prompt is too long: ")
        assert "> 1024 maximum" in error["message"]
    refused = await ask(site, key, "/v1/messages", max_tokens=2000)
    assert refused.json()["error"]["message"].startswith("max_tokens: 2000 > 1024, which is the maximum")


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("/v1/chat/completions", {"type": "image_url", "image_url": {"url": "data:image/png;base64,aa"}}),
        ("/v1/chat/completions", {"type": "input_audio", "input_audio": {"data": "aa", "format": "wav"}}),
        ("/v1/chat/completions", {"type": "file", "file": {"file_id": "f"}}),
        ("/v1/responses", {"type": "input_image", "image_url": "data:image/png;base64,aa"}),
        (
            "/v1/messages",
            {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "aa"}},
        ),
    ],
)
async def test_a_base_that_reads_text_alone(site: Site, key: str, url: str, part: dict[str, Any]) -> None:
    turns = [{"role": "user", "content": [part]}]
    form = {"input": turns, "messages": ..., "max_tokens": ...} if "responses" in url else {"messages": turns}
    refused = await ask(site, key, url, **form)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["code"] == "not_supported_by_base"
    assert error.get("param") in ("messages", "input", None)
